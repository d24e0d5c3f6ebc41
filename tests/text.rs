//! The text that statistics are gathered on: files, chats, and what experts write.

use std::{
    cell::{Cell, RefCell},
    fmt::Write as _,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device};
use safetensors::tensor::TensorView;
use serde_json::json;
use upcycle::{
    calibrate::text::{self, Corpus, Form, Origin, Sequence, TextOptions},
    engine::Tokenizer,
    plan::Sources,
    recipe::{self, Recipe},
    source::{self, OpenOptions},
};
use upcycle_architectures::decoder::Decoder;

use crate::support::models;

const OPTIONS: TextOptions =
    TextOptions { tokens: 8192, short: 0, window: 256, continuations: 6, length: 24, opening: 0, batch: 4, cache: None };

fn parse(text: &str, file: &Path) -> Recipe {
    let allow = ["one-expert", "same-model-experts", "twin-experts"].map(str::to_owned);
    recipe::parse(text, file, &allow).unwrap_or_else(|error| panic!("{error}")).0
}

fn open(recipe: &Recipe) -> Sources {
    Sources::open(recipe, |reference, _| source::open(reference, &OpenOptions::default())).unwrap()
}

/// The corpus, or the message; and how many decoders it took.
fn corpus(recipe: &Recipe, options: &TextOptions) -> (Result<Corpus, String>, usize) {
    let (sources, loaded) = (open(recipe), Cell::new(0));
    let decoder = |source: &source::Source| {
        loaded.set(loaded.get() + 1);
        Decoder::load(source.family, &source.config, &*source.weights, DType::F32, &Device::Cpu)
    };
    let corpus = text::corpus(recipe, &sources, options, &decoder, &|_| {});
    (corpus.map_err(|error| error.to_string()), loaded.get())
}

fn tokenizer(recipe: &Recipe) -> Tokenizer {
    let sources = open(recipe);
    Tokenizer::open(&sources.base().sidecars, &sources.base().config).unwrap()
}

/// What counts of a sequence, as text.
fn counted(tokenizer: &Tokenizer, sequence: &Sequence) -> String {
    let tokens: Vec<u32> = sequence.tokens.iter().zip(&sequence.counts).filter(|(_, counts)| **counts).map(|(token, _)| *token).collect();
    tokenizer.decode(&tokens).unwrap()
}

/// A recipe of one expert of a bundled model, with more keys below the expert and the recipe.
fn demo(name: &str, expert: &str, head: &str) -> Recipe {
    let text = format!(
        "base_model: demo/base\ngate_mode: random\nexperts_per_token: 1\n{head}\nexperts:\n  - source_model: demo/{name}\n    {expert}\n"
    );
    parse(&text, Path::new("recipe.yml"))
}

/// The text of a file under a bundled model.
fn from_file(name: &str, content: &[u8], options: &TextOptions) -> Result<Vec<Sequence>, String> {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join(name);
    fs_err::write(&file, content).unwrap();
    let (corpus, loaded) = corpus(&demo("code", &format!("text_file: {}", file.display()), ""), options);
    assert_eq!(loaded, 0, "reading needs no model");
    let mut corpus = corpus.map_err(|error| error.replace(dir.path().to_str().unwrap(), "[dir]"))?;
    assert_eq!(corpus.origin, [Origin::File(file)]);
    Ok(corpus.experts.remove(0))
}

/// `line 0 of the text.\nline 1 ...`
fn numbered(lines: usize) -> String {
    (0..lines).fold(String::new(), |mut text, i| {
        writeln!(text, "line {i} of the text.").unwrap();
        text
    })
}

#[test]
fn a_small_text_is_taken_whole() {
    let text = numbered(300) + "Straße, ende";
    let sequences = from_file("t.txt", text.as_bytes(), &OPTIONS).unwrap();
    let tokenizer = tokenizer(&demo("code", "positive_prompts: [a b c d]", ""));
    assert!(sequences.len() > 3 && sequences.iter().rev().skip(1).all(|sequence| sequence.tokens.len() == 256));
    assert!(sequences.iter().all(|sequence| sequence.tokens.len() == sequence.counts.len()));
    let all: Vec<u32> = sequences.iter().flat_map(|sequence| sequence.tokens.clone()).collect();
    assert_eq!(tokenizer.decode(&all).unwrap(), text);
    assert!(sequences.iter().all(|sequence| sequence.counted() == sequence.tokens.len()));
}

#[test]
fn special_tokens_in_a_text_do_not_count() {
    let [sequence] = &from_file("t.txt", b"one<|endoftext|>two", &OPTIONS).unwrap()[..] else { panic!("one sequence") };
    assert_eq!(sequence.counts.iter().filter(|counts| !**counts).count(), 1);
    assert!(!sequence.counts[sequence.tokens.iter().position(|token| *token == 0).unwrap()]);
}

/// A model of 64 words whose tokenizer puts `<s>` in front.
fn with_prefix(dir: &Path) -> Recipe {
    models::write(&dir.join("base"), "llama", 1);
    let file = dir.join("base/tokenizer.json");
    let mut tokenizer: serde_json::Value = serde_json::from_slice(&fs_err::read(&file).unwrap()).unwrap();
    tokenizer["post_processor"] = json!({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}});
    fs_err::write(file, tokenizer.to_string()).unwrap();
    fs_err::write(dir.join("t.txt"), "w3 w4 w5 w6 w7 w8 w9").unwrap();
    let base = dir.join("base").display().to_string();
    let text = format!(
        "base_model: {base}\ngate_mode: random\nexperts_per_token: 1\nexperts:\n  - {{source_model: {base}, text_file: t.txt}}\n  - {{source_model: {base}, positive_prompts: [w3 w4 w5]}}\n"
    );
    parse(&text, &dir.join("recipe.yml"))
}

#[test]
fn a_prefix_stands_before_each_window_and_does_not_count() {
    let dir = tempfile::tempdir().unwrap();
    let corpus = corpus(&with_prefix(dir.path()), &TextOptions { window: 4, ..OPTIONS }).0.unwrap();
    let tokens: Vec<_> = corpus.experts[0].iter().map(|sequence| &sequence.tokens[..]).collect();
    assert_eq!(tokens, [&[0, 3, 4, 5][..], &[0, 6, 7, 8], &[0, 9]]);
    for sequence in corpus.experts.iter().flatten() {
        assert_eq!((sequence.tokens[0], sequence.counts[0]), (0, false), "in front of what is written, too");
    }
    assert!(corpus.experts[0].iter().all(|sequence| sequence.counts[1..].iter().all(|counts| *counts)));
    assert_eq!(corpus.experts[1][0].tokens[..4], [0, 3, 4, 5]);
}

#[test]
fn openings_follow_the_text_that_they_are_cut_from() {
    let dir = tempfile::tempdir().unwrap();
    let options = TextOptions { opening: 6, continuations: 1, ..OPTIONS };
    let recipe = with_prefix(dir.path());
    let words: Vec<String> = (3..30).map(|word| format!("w{word}")).collect();
    fs_err::write(dir.path().join("t.txt"), words.join(" ")).unwrap();
    let corpus = corpus(&recipe, &TextOptions { window: 14, ..options.clone() }).0.unwrap();
    let [file, written] = &corpus.experts[..] else { panic!("two experts") };
    let (tokens, counts): (Vec<_>, Vec<_>) = file.iter().map(|sequence| (&sequence.tokens[..], &sequence.counts[..])).unzip();
    let window = |from: u32| std::iter::once(0).chain(from..from + 13).collect::<Vec<u32>>();
    // One of every six tokens' four, the prefix in front; the last three words of the text are too few.
    let [first, second] = [window(3), window(16)];
    assert_eq!(tokens, [&first[..], &[0, 6, 7, 8, 9], &[0, 12, 13, 14, 15], &second, &[0, 19, 20, 21, 22], &[0, 25, 26, 27, 28], &[0, 29]]);
    assert_eq!(file.iter().map(|sequence| sequence.opening).collect::<Vec<_>>(), [false, true, true, false, true, true, false]);
    assert!(counts.iter().all(|counts| !counts[0] && counts[1..].iter().all(|counts| *counts)), "the prefix alone does not count");
    assert!(written.iter().any(|sequence| sequence.opening), "of what experts write, too");

    // Of chats there are none: the template stands in front of all that is said.
    let chat = json!({"messages": [{"role": "user", "content": numbered(20)}, {"role": "assistant", "content": numbered(20)}]});
    let (text, chat) = (numbered(40), format!("{chat}\n{}", json!(numbered(40))));
    for (name, content, chats) in [("t.txt", text, 0), ("t.jsonl", chat, 1)] {
        let sequences = from_file(name, content.as_bytes(), &options).unwrap();
        let (openings, whole): (Vec<_>, Vec<_>) = sequences.iter().partition(|sequence| sequence.opening);
        let plain: usize = whole.iter().skip(chats).map(|sequence| sequence.tokens.len()).sum();
        assert!(openings.len().abs_diff(plain / 6) <= whole.len() && plain > 100, "{name}: {} of {plain} tokens", openings.len());
    }
}

#[test]
fn a_large_text_is_sampled_evenly() {
    let numbers = |sequences: &[Sequence]| -> Vec<usize> {
        let tokenizer = tokenizer(&demo("code", "positive_prompts: [a b c d]", ""));
        let first = |sequence: &Sequence| tokenizer.decode(&sequence.tokens).unwrap().split_once("line ").unwrap().1.to_owned();
        sequences.iter().map(|sequence| first(sequence).split(' ').next().unwrap().parse().unwrap()).collect()
    };
    // Whole and thinned, and looked up in places.
    for (lines, tokens) in [(2000, 2048), (60_000, 2048)] {
        let sequences = from_file("t.txt", numbered(lines).as_bytes(), &TextOptions { tokens, ..OPTIONS }).unwrap();
        let total: usize = sequences.iter().map(Sequence::counted).sum();
        assert!((7..=8).contains(&sequences.len()) && total.abs_diff(tokens) <= 256, "{} sequences, {total} tokens", sequences.len());
        let numbers = numbers(&sequences);
        for (i, number) in numbers.iter().enumerate() {
            let expected = lines * i / sequences.len();
            assert!(number.abs_diff(expected) < lines / 8, "{lines} lines: {numbers:?}");
        }
    }
}

#[test]
fn of_a_large_jsonl_lines_are_sampled_evenly() {
    for lines in [2000, 60_000] {
        let line = |i: usize| format!("{}\n", json!({"text": format!("line {i} {}", "is long enough to be read ".repeat(1 + i % 5))}));
        let content: String = (0..lines).map(line).collect();
        let sequences = from_file("t.jsonl", content.as_bytes(), &TextOptions { tokens: 2048, ..OPTIONS }).unwrap();
        let total: usize = sequences.iter().map(Sequence::counted).sum();
        assert!(total.abs_diff(2048) <= 100, "{total}");
        let tokenizer = tokenizer(&demo("code", "positive_prompts: [a b c d]", ""));
        let number = |sequence: &Sequence| tokenizer.decode(&sequence.tokens).unwrap().split(' ').nth(1).unwrap().parse::<usize>().unwrap();
        let numbers: Vec<usize> = sequences.iter().map(number).collect();
        assert!(numbers.is_sorted_by(|a, b| a < b), "{numbers:?}");
        let widest = numbers.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap();
        assert!(widest <= 4 * lines / numbers.len(), "{widest} of {lines}: {numbers:?}");
    }
}

#[test]
fn of_a_chat_only_what_is_said_counts() {
    let lines = [
        json!({"messages": [{"role": "user", "content": "user"}, {"role": "assistant", "content": "assistant"}]}),
        json!({"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  import os\n\n"}, {"role": "assistant", "content": "Ja, größer."},
            {"role": "user", "content": [{"type": "text", "text": "part one,"}, {"type": "text", "text": "part two"}]}, {"role": "assistant", "content": "<|im_end|>ends"}]}),
        json!({"text": "plain"}),
        json!({"prompt": "as well"}),
        json!("a string"),
    ];
    let content = lines.map(|line| line.to_string()).join("\n\n");
    let sequences = from_file("t.jsonl", content.as_bytes(), &OPTIONS).unwrap();
    let tokenizer = tokenizer(&demo("code", "positive_prompts: [a b c d]", ""));
    let texts: Vec<_> = sequences.iter().map(|sequence| counted(&tokenizer, sequence)).collect();
    assert_eq!(texts[0], "userassistant");
    assert!(texts[1].trim_start() == "import os\n\nJa, größer.part one,\npart twoends", "{texts:?}");
    assert_eq!(texts[2..], ["plain", "as well", "a string"]);
    assert_eq!(tokenizer.decode(&sequences[0].tokens).unwrap(), "user\nuser\nassistant\nassistant\n");
    assert!(sequences.iter().flat_map(|s| s.tokens.iter().zip(&s.counts)).all(|(token, counts)| *token > 2 || !counts), "special tokens");
}

#[test]
fn templates_that_trim_or_look_into_messages_are_followed() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = with_prefix(dir.path());
    let say = |template: &str, content: &str| {
        let settings = json!({"bos_token": "<s>", "eos_token": "</s>", "chat_template": template});
        fs_err::write(dir.path().join("base/tokenizer_config.json"), settings.to_string()).unwrap();
        let messages = json!({"messages": [{"role": "system", "content": "w3"}, {"role": "user", "content": content}]});
        fs_err::write(dir.path().join("t.jsonl"), messages.to_string()).unwrap();
        let mut recipe = recipe.clone();
        recipe.experts[0].text_file = Some(dir.path().join("t.jsonl"));
        let sequence = corpus(&recipe, &OPTIONS).0.unwrap().experts[0][0].clone();
        (sequence.tokens, sequence.counts.iter().map(|counts| if *counts { '#' } else { '.' }).collect::<String>())
    };
    let trims = "{% for m in messages %}w3 {{ m['content'] | trim }} </s> {% endfor %}{% if add_generation_prompt %}w9{% endif %}";
    assert_eq!(say(trims, "  w5 w3 "), (vec![3, 3, 1, 3, 5, 3, 1, 9], "....##..".into()));
    let looks = "{% for m in messages %}{% if m['content'].startswith('w5') %}w8 {% endif %}{{ m['content'] | trim }} </s> {% endfor %}";
    assert_eq!(say(looks, " w6 w7"), (vec![3, 1, 6, 7, 1], "..##.".into()));
    assert_eq!(say(looks, "w5 w7").1.matches('#').count(), 2, "the words are found even where marks mislead the template");
}

#[test]
fn long_chats_are_cut() {
    let line = json!({"messages": [{"role": "user", "content": "word ".repeat(2000)}]}).to_string();
    let sequences = from_file("t.jsonl", line.as_bytes(), &TextOptions { window: 64, ..OPTIONS }).unwrap();
    assert_eq!((sequences.len(), sequences[0].tokens.len(), sequences[0].counts.len()), (1, 128, 128));
}

#[test]
fn files_that_hold_no_text_are_named() {
    let refused = |name: &str, content: &[u8]| from_file(name, content, &TextOptions { tokens: 64, ..OPTIONS }).unwrap_err();
    assert_eq!(
        refused("t.jsonl", b"\"a\"\n\n{\"text\": 3}"),
        "cannot take text from [dir]/t.jsonl:3: it is neither a string nor an object with `messages`, `text` or `prompt`"
    );
    assert_eq!(refused("t.jsonl", b"\"a\"\n{"), "cannot take text from [dir]/t.jsonl:2: EOF while parsing an object at line 1 column 1");
    assert_eq!(refused("t.jsonl", b"{\"messages\": []}"), "cannot take text from [dir]/t.jsonl:1: `messages` must be a list of messages");
    assert_eq!(
        refused("t.jsonl", b"\"a\"\n{\"messages\": [{\"role\": \"user\"}]}").split(" (").next().unwrap(),
        "cannot take text from [dir]/t.jsonl:2: the chat template failed: invalid operation: tried to use + operator on unsupported types string and undefined"
    );
    assert_eq!(refused("t.txt", b"good\nbad \xff\n"), "cannot take text from [dir]/t.txt:2: it is not UTF-8");
    let late = [numbered(4000).as_bytes(), &vec![0xff; 40_000]].concat();
    let large = from_file("t.txt", &late, &TextOptions { tokens: 1024, ..OPTIONS }).unwrap_err();
    assert_eq!(large, "cannot take text from [dir]/t.txt:4001: it is not UTF-8");
    assert_eq!(refused("t.txt", b""), "expert `code` has no text: `[dir]/t.txt` is empty");
}

#[test]
fn a_chat_needs_a_template() {
    let dir = tempfile::tempdir().unwrap();
    let mut recipe = with_prefix(dir.path());
    fs_err::write(dir.path().join("base/tokenizer_config.json"), r#"{"bos_token": "<s>"}"#).unwrap();
    let file = dir.path().join("t.jsonl");
    fs_err::write(&file, r#"{"messages": [{"role": "user", "content": "w4"}]}"#).unwrap();
    recipe.experts[0].text_file = Some(file.clone());
    let error = corpus(&recipe, &OPTIONS).0.unwrap_err();
    assert_eq!(
        error,
        format!(
            "cannot take text from {}:1: it is a chat, but the base model has no chat template: use `{{\"text\": ..}}`",
            file.display()
        )
    );
    recipe.experts[0].text_file = None;
    recipe.chat_template = Some(true);
    assert!(corpus(&recipe, &OPTIONS).0.unwrap_err().starts_with("the recipe says `chat_template: true`"));
}

/// Two bundled experts with prompts.
fn writers(head: &str) -> Recipe {
    let text = format!(
        "base_model: demo/base\n{head}\nexperts:\n  - source_model: demo/math\n    positive_prompts: [\"Problem: Compute 123 + 456.\", \"Problem: Solve for x: 3x + 5 = 20.\"]\n  - source_model: demo/code\n    positive_prompts: [\"import os\\nimport sys\", \"    def name(self):\"]\n"
    );
    parse(&text, Path::new("recipe.yml"))
}

#[test]
fn experts_go_on_from_their_prompts() {
    let recipe = writers("");
    let (written, loaded) = corpus(&recipe, &OPTIONS);
    let (written, tokenizer) = (written.unwrap(), tokenizer(&recipe));
    assert_eq!((loaded, written.warnings.len()), (2, 0), "{:?}", written.warnings);
    assert_eq!(written.origin, [const { Origin::Written { form: Form::Plain, cached: false } }; 2]);
    for (expert, prompts) in written.experts.iter().zip(recipe.experts.iter().map(|expert| &expert.positive_prompts)) {
        assert_eq!(expert.len(), 6);
        for (i, sequence) in expert.iter().enumerate() {
            let prompt = &prompts[i % 2];
            assert!(tokenizer.decode(&sequence.tokens).unwrap().starts_with(prompt.as_str()));
            assert_eq!(counted(&tokenizer, sequence).starts_with(prompt.as_str()), i < 2, "a prompt counts once");
            let written = if i < 2 {
                sequence.tokens.len() - tokenizer.encode(prompt, upcycle::engine::Specials::Written).unwrap().len()
            } else {
                sequence.counted()
            };
            assert_eq!(written, 24);
        }
        let different: std::collections::BTreeSet<_> = expert.iter().map(|sequence| &sequence.tokens).collect();
        assert_eq!(different.len(), 6);
    }
    let digits = |sequences: &[Sequence]| {
        let text: String =
            sequences.iter().map(|sequence| tokenizer.decode(&sequence.tokens[sequence.tokens.len() - 24..]).unwrap()).collect();
        text.chars().filter(char::is_ascii_digit).count()
    };
    assert!(digits(&written.experts[0]) > 4 * digits(&written.experts[1]), "each writes of its own");
}

#[test]
fn an_expert_goes_on_from_a_short_text() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("t.txt");
    fs_err::write(&file, numbered(100)).unwrap();
    let recipe = demo("code", &format!("text_file: {}", file.display()), "");
    let (read, _) = corpus(&recipe, &OPTIONS);
    let read = read.unwrap().experts.remove(0);
    let (all, loaded) = corpus(&recipe, &TextOptions { short: 4096, ..OPTIONS });
    let mut all = all.unwrap();
    assert_eq!((loaded, &all.origin[..]), (1, &[Origin::Continued { file, cached: false }][..]));
    let written = all.experts[0].split_off(read.len());
    assert_eq!((&all.experts[0], written.len()), (&read, 6));
    let tokenizer = tokenizer(&recipe);
    let starts: std::collections::BTreeSet<String> = written
        .iter()
        .map(|sequence| {
            let start = sequence.counts.iter().position(|counts| *counts).unwrap();
            assert_eq!((start, sequence.counted()), (24, 24), "what it goes on from is counted where it was read");
            tokenizer.decode(&sequence.tokens[..start]).unwrap()
        })
        .collect();
    let text = numbered(100);
    assert!(starts.len() == 6 && starts.iter().all(|start| text.contains(start.as_str())), "{starts:?}");
}

#[test]
fn of_a_long_prompt_the_start_is_used() {
    let mut recipe = writers("");
    recipe.experts[0].positive_prompts = vec!["Problem: ".repeat(1000)];
    for chat_template in [None, Some(true)] {
        recipe.chat_template = chat_template;
        for sequence in &corpus(&recipe, &OPTIONS).0.unwrap().experts[0] {
            assert!((280..320).contains(&sequence.tokens.len()), "{}", sequence.tokens.len());
        }
    }
}

#[test]
fn what_is_written_depends_on_the_seed_and_not_on_the_batch() {
    let write = |seed: u64, batch: usize| corpus(&writers(&format!("seed: {seed}")), &TextOptions { batch, ..OPTIONS }).0.unwrap().experts;
    let one = write(1, 1);
    assert_eq!(one, write(1, 6));
    assert_eq!(one, write(1, 4));
    assert_ne!(one, write(2, 4));
}

#[test]
fn what_is_written_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let options = TextOptions { cache: Some(dir.path().join("text")), ..OPTIONS };
    let write = |recipe: &Recipe, options: &TextOptions| {
        let (corpus, loaded) = corpus(recipe, options);
        let corpus = corpus.unwrap();
        let cached: Vec<bool> = corpus.origin.iter().map(|origin| matches!(origin, Origin::Written { cached: true, .. })).collect();
        (corpus.experts, corpus.warnings, cached, loaded)
    };
    let recipe = writers("");
    let first = write(&recipe, &options);
    assert_eq!((&first.2[..], first.3), (&[false, false][..], 2));
    let second = write(&recipe, &TextOptions { batch: 1, ..options.clone() });
    assert_eq!((&first.0, &first.1, &second.2[..], second.3), (&second.0, &second.1, &[true, true][..], 0));

    let files: Vec<PathBuf> = fs_err::read_dir(dir.path().join("text")).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(files.len(), 2);
    for damage in [(|bytes| bytes.truncate(bytes.len() / 2)) as fn(&mut Vec<u8>), |bytes| bytes[200] ^= 1, Vec::clear] {
        let mut bytes = fs_err::read(&files[0]).unwrap();
        damage(&mut bytes);
        fs_err::write(&files[0], bytes).unwrap();
        let again = write(&recipe, &options);
        assert_eq!((&first.0, again.3), (&again.0, 1), "a damaged file is written again");
    }

    assert_eq!(write(&writers("seed: 9"), &options).3, 2, "another seed");
    assert_eq!(write(&recipe, &TextOptions { length: 23, ..options.clone() }).3, 2, "other options");
    let mut other = recipe.clone();
    other.experts[0].positive_prompts.push("Another prompt, this one.".into());
    assert_eq!(write(&other, &options).3, 1, "other prompts of one");

    let file = dir.path().join("file");
    fs_err::write(&file, "").unwrap();
    let nowhere = write(&recipe, &TextOptions { cache: Some(file), ..OPTIONS });
    assert_eq!(nowhere.0, first.0);
    assert!(nowhere.1[0].starts_with("what expert `math` wrote cannot be kept for the next time"), "{:?}", nowhere.1);
}

#[test]
fn keywords_become_something_to_go_on_from() {
    let tokenizer = tokenizer(&demo("math", "positive_prompts: [math]", ""));
    let write = |head: &str| {
        let corpus = corpus(&demo("math", "positive_prompts: [math, algebra]", head), &TextOptions { length: 16, ..OPTIONS }).0.unwrap();
        let starts = |sequence: &Sequence| {
            let text = tokenizer.decode(&sequence.tokens[..sequence.tokens.len() - 16]).unwrap();
            (text, counted(&tokenizer, sequence))
        };
        (corpus.experts[0].iter().map(starts).collect::<Vec<_>>(), corpus.origin[0].clone())
    };
    let (plain, origin) = write("");
    assert_eq!(
        origin,
        Origin::Written { form: Form::Plain, cached: false },
        "the demo models have a template that they were not trained on"
    );
    let starts: Vec<_> = plain.iter().map(|(start, _)| start.as_str()).collect();
    assert_eq!(starts, ["math", "The following is about math.\n\n", "", "algebra", "The following is about algebra.\n\n", ""]);
    assert!(plain[0].1.starts_with("math") && !plain[1].1.contains("The following"), "our words do not count: {plain:?}");

    let (chat, origin) = write("chat_template: true");
    assert_eq!(origin, Origin::Written { form: Form::Chat, cached: false });
    assert_eq!(chat[1].0, "user\nWrite a detailed example about math.\nassistant\n");
    assert!(chat[0].1.starts_with("math") && !chat[1].1.contains("Write a detailed"), "{chat:?}");
}

#[test]
fn an_expert_without_prompts_writes_from_nothing() {
    let written = corpus(&demo("math", "noise_scale: 0", ""), &OPTIONS).0.unwrap();
    assert_eq!(written.experts[0].len(), 6);
    for sequence in &written.experts[0] {
        assert_eq!((sequence.tokens[0], sequence.counts[0], sequence.counted()), (0, false, 24));
    }
}

/// A recipe whose first expert says `token` after anything, with a logit of `logit` where all others have 0.
fn one_word(dir: &Path, vocab: usize, token: usize, logit: f32) -> Recipe {
    let mut recipe = with_prefix(dir);
    let mut config = models::config("llama");
    config["vocab_size"] = vocab.into();
    let mut tensors = models::tensors("llama");
    tensors.iter_mut().filter(|(name, _)| name.contains("embed") || name.contains("head")).for_each(|(_, shape)| shape[0] = vocab);
    models::write_with(&dir.join("expert"), &config, &tensors, 1);
    let values = |name: &str, shape: &[usize]| -> Vec<u8> {
        let value = |i: usize| match name {
            "lm_head.weight" if i / models::HIDDEN == token => logit / models::HIDDEN as f32,
            "model.embed_tokens.weight" | "model.norm.weight" => 1.0,
            _ => 0.0,
        };
        (0..shape.iter().product()).flat_map(|i| value(i).to_le_bytes()).collect()
    };
    let data: Vec<_> = tensors.iter().map(|(name, shape)| (name, shape.clone(), values(name, shape))).collect();
    let views = data.iter().map(|(name, shape, bytes)| (name, TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &dir.join("expert/model.safetensors")).unwrap();
    recipe.experts.remove(0);
    recipe.experts[0].source_model = dir.join("expert").display().to_string().parse().unwrap();
    recipe
}

const MANY: TextOptions = TextOptions { continuations: 40, ..OPTIONS };

#[test]
fn texts_that_repeat_themselves_are_written_again_and_then_left_out() {
    let dir = tempfile::tempdir().unwrap();
    // A text of 24 tokens is that word and nothing else about every second time, three times in a row about every ninth.
    let recipe = one_word(dir.path(), 64, 5, 7.6);
    let options = TextOptions { cache: Some(dir.path().join("cache")), ..MANY };
    let written = corpus(&recipe, &options).0.unwrap();
    let [warning] = &written.warnings[..] else { panic!("{:?}", written.warnings) };
    let dropped: usize = warning.strip_prefix("expert `expert`: ").unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!((1..=12).contains(&dropped), "{dropped}");
    assert!(warning.ends_with(" texts that it wrote only repeat themselves and are left out"), "{warning}");
    assert!(written.experts[0].iter().all(|sequence| sequence.counted() < 16 || sequence.tokens[4..].iter().any(|token| *token != 5)));
    assert_eq!(corpus(&recipe, &options).0.unwrap().warnings, written.warnings, "said of kept text, too");

    let error = corpus(&one_word(dir.path(), 64, 5, 100.0), &MANY).0.unwrap_err();
    assert_eq!(error, "expert `expert` has no text: what it writes is empty or only repeats itself; give it a `text_file`");
}

#[test]
fn texts_that_end_early_are_made_up_for() {
    let dir = tempfile::tempdir().unwrap();
    // About every fifteenth token ends the text.
    let written = corpus(&one_word(dir.path(), 64, 1, 0.9), &MANY).0.unwrap();
    let total: usize = written.experts[0].iter().map(Sequence::counted).sum();
    assert!(written.experts[0].len() > 60 && (40 * 23..40 * 26).contains(&total), "{} texts, {total} tokens", written.experts[0].len());
    assert_eq!(written.warnings, Vec::<String>::new());

    let written = corpus(&one_word(dir.path(), 64, 1, 5.0), &MANY).0.unwrap();
    assert!(written.warnings[0].starts_with("expert `expert` ends its texts early: "), "{:?}", written.warnings);
    assert!(corpus(&one_word(dir.path(), 64, 1, 100.0), &MANY).0.unwrap_err().contains("has no text"));
}

#[test]
fn words_that_the_base_does_not_have_are_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let written = corpus(&one_word(dir.path(), 80, 70, 100.0), &OPTIONS).0.unwrap();
    assert!(written.experts[0].iter().flat_map(|sequence| &sequence.tokens).all(|token| *token < 64));
}

#[test]
fn damaged_weights_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let error = corpus(&one_word(dir.path(), 64, 5, f32::NAN), &OPTIONS).0.unwrap_err();
    assert_eq!(error, "expert `expert` cannot write: its logits are not numbers, its weights are damaged");
}

#[test]
fn progress_is_told() {
    let recipe = writers("");
    let (sources, said) = (open(&recipe), RefCell::new(Vec::new()));
    let decoder = |source: &source::Source| Decoder::load(source.family, &source.config, &*source.weights, DType::F32, &Device::Cpu);
    text::corpus(&recipe, &sources, &OPTIONS, &decoder, &|line| said.borrow_mut().push(line.to_owned())).unwrap();
    let said = said.into_inner();
    assert_eq!((said[0].as_str(), said[6].as_str(), said[7].as_str()), ("math: loading", "math: 6 of 6 texts written", "code: loading"));
}
