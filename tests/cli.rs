//! The command line as its users see it: transcripts of what is typed and what comes back. Models are the business of other modules.

use insta::assert_snapshot;

use crate::support::cli::transcript;

/// Runs a command in a directory that holds `recipe.yml`.
fn with_recipe(recipe: &str, args: &[&str]) -> String {
    let dir = tempfile::tempdir().unwrap();
    fs_err::write(dir.path().join("recipe.yml"), recipe).unwrap();
    transcript(dir.path(), args)
}

const RECIPE: &str = "base_model: org/base
experts_per_token: 1
experts:
  - source_model: org/coder
    positive_prompts: [\"Write a function that sorts a list\"]
  - source_model: org/poet
    positive_prompts: [\"Compose a sonnet about rain.\"]
";

#[test]
fn a_recipe_alone_can_be_checked() {
    assert_snapshot!(with_recipe(RECIPE, &["plan", "--recipe-only", "recipe.yml"]), @"
    $ upcycle plan --recipe-only recipe.yml
    exit 0
    --- stdout
    recipe.yml is a good recipe: 2 experts, gate mode auto
    ");
    assert_snapshot!(with_recipe(RECIPE, &["plan", "--recipe-only", "--json", "recipe.yml"]), @r#"
    $ upcycle plan --recipe-only --json recipe.yml
    exit 0
    --- stdout
    {
      "base_model": "org/base",
      "experts": [
        {
          "source_model": "org/coder",
          "positive_prompts": [
            "Write a function that sorts a list"
          ],
          "negative_prompts": [],
          "text_file": null,
          "noise_scale": null,
          "residual_scale": null
        },
        {
          "source_model": "org/poet",
          "positive_prompts": [
            "Compose a sonnet about rain."
          ],
          "negative_prompts": [],
          "text_file": null,
          "noise_scale": null,
          "residual_scale": null
        }
      ],
      "shared_experts": [],
      "gate_mode": "auto",
      "dtype": null,
      "experts_per_token": 1,
      "architecture": null,
      "shared": "auto",
      "repair": null,
      "chat_template": "auto",
      "tokenizer": null,
      "layout": "classic",
      "seed": null
    }
    "#);
}

#[test]
fn a_warning_does_not_stop_a_command() {
    let recipe = RECIPE.to_owned() + "merge_method: moe\n";
    assert_snapshot!(with_recipe(&recipe, &["plan", "--recipe-only", "recipe.yml"]), @"
    $ upcycle plan --recipe-only recipe.yml
    exit 0
    --- stdout
    recipe.yml is a good recipe: 2 experts, gate mode auto
    --- stderr
    warning: `merge_method` is ignored: experts are not merged, each keeps its own MLPs
     --> recipe.yml:8:1
      |
    8 | merge_method: moe
      | ^^^^^^^^^^^^
      |
    hint: remove it
    ");
}

#[test]
fn mistakes_in_a_recipe_end_with_exit_code_1() {
    let recipe = RECIPE.replace("experts_per_token: 1", "expert_per_token: 1\ngate_mode: hiden");
    assert_snapshot!(with_recipe(&recipe, &["plan", "--recipe-only", "recipe.yml"]), @"
    $ upcycle plan --recipe-only recipe.yml
    exit 1
    --- stderr
    error: unknown key `expert_per_token` in a recipe
     --> recipe.yml:2:1
      |
    2 | expert_per_token: 1
      | ^^^^^^^^^^^^^^^^
      |
    hint: did you mean `experts_per_token`? A recipe has the keys `base_model`, `experts`, `shared_experts`, `gate_mode`, `dtype`, `experts_per_token`, `architecture`, `shared`, `repair`, `chat_template`, `tokenizer`, `layout`, `seed`

    error: unknown value `hiden` for `gate_mode`
     --> recipe.yml:3:12
      |
    3 | gate_mode: hiden
      |            ^^^^^
      |
    hint: did you mean `hidden`? It is one of `auto`, `softmax`, `ridge`, `lda`, `centroid`, `hidden`, `hidden_avg`, `cheap_embed`, `uniform`, `sequence`, `subspace`, `random`, `uniform_random`
    ");
    assert_snapshot!(with_recipe("", &["plan", "no-such.yml"]), @"
    $ upcycle plan no-such.yml
    exit 1
    --- stderr
    error: failed to open file `no-such.yml`: No such file or directory (os error 2)
    ");
}

#[test]
fn checks_are_waived_by_name() {
    let same = RECIPE.replace("org/poet", "org/coder");
    assert_snapshot!(with_recipe(&same, &["plan", "--recipe-only", "recipe.yml"]), @r#"
    $ upcycle plan --recipe-only recipe.yml
    exit 1
    --- stderr
    error[same-model-experts]: every expert is the same model
     --> recipe.yml:4:19
      |
    4 |   - source_model: org/coder
      |                   ^^^^^^^^^ expert 0
    5 |     positive_prompts: ["Write a function that sorts a list"]
    6 |   - source_model: org/coder
      |                   --------- expert 1
      |
      = note: copies of one model compute what that model computes, at several times its size
    hint: name different fine-tunes; copies are useful only as a start for training; `--allow same-model-experts` if it is meant
    "#);
    assert_snapshot!(with_recipe(&same, &["plan", "--recipe-only", "recipe.yml", "--allow", "same-model-experts"]), @r#"
    $ upcycle plan --recipe-only recipe.yml --allow same-model-experts
    exit 0
    --- stdout
    recipe.yml is a good recipe: 2 experts, gate mode auto
    --- stderr
    warning[same-model-experts]: every expert is the same model
     --> recipe.yml:4:19
      |
    4 |   - source_model: org/coder
      |                   ^^^^^^^^^ expert 0
    5 |     positive_prompts: ["Write a function that sorts a list"]
    6 |   - source_model: org/coder
      |                   --------- expert 1
      |
      = note: copies of one model compute what that model computes, at several times its size
    hint: name different fine-tunes; copies are useful only as a start for training
    "#);
    assert_snapshot!(with_recipe(&same, &["plan", "--recipe-only", "recipe.yml", "--allow", "same-modelexperts"]), @"
    $ upcycle plan --recipe-only recipe.yml --allow same-modelexperts
    exit 2
    --- stderr
    error: invalid value 'same-modelexperts' for '--allow <NAME>'
      [possible values: one-expert, identical-prompts, same-model-experts, first-experts, twin-prompts, twin-experts, same-endings, circular-negatives, keyword-prompts, uneven-prompts, empty-prompts, unused-prompts, rope-mismatch, eps-mismatch, vocabulary-mismatch, drift, licence-conflict, non-finite-weights]

      tip: a similar value exists: 'same-model-experts'

    For more information, try '--help'.
    ");
}

#[test]
fn a_bad_command_line_ends_with_exit_code_2() {
    assert_snapshot!(with_recipe("", &["plan"]), @"
    $ upcycle plan
    exit 2
    --- stderr
    error: the following required arguments were not provided:
      <RECIPE>

    Usage: upcycle plan <RECIPE>

    For more information, try '--help'.
    ");
    assert_snapshot!(with_recipe("", &["plann", "recipe.yml"]), @"
    $ upcycle plann recipe.yml
    exit 2
    --- stderr
    error: unrecognized subcommand 'plann'

      tip: a similar subcommand exists: 'plan'

    Usage: upcycle [OPTIONS] <COMMAND>

    For more information, try '--help'.
    ");
    assert_snapshot!(with_recipe("", &["plan", "recipe.yml", "--jsn"]), @"
    $ upcycle plan recipe.yml --jsn
    exit 2
    --- stderr
    error: unexpected argument '--jsn' found

      tip: a similar argument exists: '--json'

    Usage: upcycle plan --json <RECIPE>

    For more information, try '--help'.
    ");
}

#[test]
fn a_model_becomes_a_gguf_file() {
    let dir = tempfile::tempdir().unwrap();
    let base = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/base");
    fs_err::create_dir(dir.path().join("base")).unwrap();
    for entry in fs_err::read_dir(base).unwrap() {
        let entry = entry.unwrap();
        fs_err::copy(entry.path(), dir.path().join("base").join(entry.file_name())).unwrap();
    }
    let run = |args: &[&str]| transcript(dir.path(), args);
    assert_snapshot!(run(&["quantize", "base", "out.gguf", "--type", "q4_k"]), @"
    $ upcycle quantize base out.gguf --type q4_k
    exit 0
    --- stderr
     INFO wrote 2.11 MiB to out.gguf in [time]: 5.18 bits per weight, tensors 9 float32, 25 Q4_K, 5 Q6_K
    hint: upcycle serve out.gguf
    ");
    assert_snapshot!(run(&["quantize", "base", "out.gguf"]), @"
    $ upcycle quantize base out.gguf
    exit 1
    --- stderr
    error: out.gguf is there already; give another name, or `--overwrite`
    ");
    assert_snapshot!(run(&["quantize", "out.gguf", "again.gguf", "--type", "q8_0"]), @"
    $ upcycle quantize out.gguf again.gguf --type q8_0
    exit 0
    --- stderr
    warning: the model is quantised already: what changes its type loses twice; quantise the original if there is one
     INFO wrote 3.52 MiB to again.gguf in [time]: 8.66 bits per weight, tensors 9 float32, 30 Q8_0
    hint: upcycle serve again.gguf
    ");
    assert_snapshot!(run(&["run", "base", "--quantize", "q3_k", "Hello"]), @"
    $ upcycle run base --quantize q3_k Hello
    exit 2
    --- stderr
    error: invalid value 'q3_k' for '--quantize <TYPE>'
      [possible values: f32, f16, bf16, q8_0, q6_k, q5_k_m, q5_k_s, q4_k_m, q4_k_s, q4_0]

      tip: a similar value exists: 'q6_k'

    For more information, try '--help'.
    ");
    let text = |args: &[&str]| run(args).lines().skip(1).map(str::to_owned).collect::<Vec<_>>();
    let options = ["--temperature", "0", "-n", "12", "--quiet"];
    let from_file = text(&[&["run", "out.gguf", "Hello"][..], &options].concat());
    assert_eq!(text(&[&["run", "base", "--quantize", "q4_k_m", "Hello"][..], &options].concat()), from_file);
    assert!(from_file[0] == "exit 0" && from_file.len() > 2, "{from_file:?}");
}

#[test]
fn a_benchmark_takes_kernels_by_name() {
    let base = concat!(env!("CARGO_MANIFEST_DIR"), "/demo/base");
    let run = |kernels| {
        let small = ["bench", base, "-p", "4", "-n", "2", "--repeat", "1", "--parallel", "1", "--quantize", "q4_k_m", "--preload"];
        transcript(tempfile::tempdir().unwrap().path(), &[&small[..], &["--kernels", kernels]].concat())
    };
    let plain = run("plain");
    assert!(plain.contains("exit 0") && plain.contains("cpu: plain, reads [rate]"), "{plain}");
    let unknown = run("fast");
    assert!(unknown.contains("exit 2") && unknown.contains("`fast` is none of the kernels that this CPU has: "), "{unknown}");
}

#[test]
fn help_names_every_command() {
    assert_snapshot!(with_recipe("", &["--help"]), @"
    $ upcycle --help
    exit 0
    --- stdout
    Compose fine-tunes of one base model into a Mixture-of-Experts, and serve it

    Usage: upcycle [OPTIONS] <COMMAND>

    Commands:
      demo            Compose and try the bundled tiny experts: nothing to download
      plan            Say what would be written: tensors, bytes, memory, problems
      compose         Write the composite
      add-expert      One more expert in a composite
      replace-expert  Another model in place of an expert of a composite
      remove-expert   One expert less in a composite
      verify          Hold a composite against what was written, and the models that it was made of
      serve           Serve a model with OpenAI's API
      chat            Talk to a model in the terminal
      run             One prompt in, text out
      eval            Perplexity per domain, beside the experts, their average and a perfect router
      inspect         Show what a model is made of and where its tokens go
      tune            Train the gates of a composite, or its attention too, on text of each expert's
                      kind
      stats           Gather or merge statistics of what a composite's routers see
      gates           Set a composite's gates anew, from such statistics
      quantize        Write a model as one GGUF file, smaller
      bench           How fast a model reads and writes here
      doctor          Devices, features, disk and memory
      completions     Shell completions
      help            Print this message or the help of the given subcommand(s)

    Options:
      -v, --verbose...  Say more (-v), or much more (-vv)
      -q, --quiet       Say nothing but errors
      -h, --help        Print help
      -V, --version     Print version
    ");
    assert!(with_recipe("", &["completions", "bash"]).contains("complete -F _upcycle"));
}
