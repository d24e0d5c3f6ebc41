//! Every parser of foreign bytes under mutated input: whatever comes, it neither panics, nor runs on, nor allocates what the input's own
//! length does not bound.
//!
//! A test mutates its seeds (good files made by code, and what lies in `tests/corpus/`) by a generator with a fixed seed, a few hundred times.
//! `RUST_BACKTRACE=0 UPCYCLE_FUZZ_SECONDS=600 cargo test --test tests fuzz::` goes on for ten minutes each, from a seed that it prints; an input
//! that fails is kept in the directory that it names, and so is the last one where the process ends. (To print where a panic came from, one that
//! is caught too, takes megabytes.)

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    collections::BTreeMap,
    panic::AssertUnwindSafe,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rand::{Rng as _, SeedableRng as _, seq::IndexedRandom as _};
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, json};
use tempfile::TempDir;
use upcycle::{
    engine::{Chat, ChatTemplate, Specials, Tokenizer},
    recipe,
    source::{self, OpenOptions, Source},
    write::{self, Options, Silent},
};

#[cfg(feature = "serve")]
use crate::serve::Running;
use crate::{
    compose::{Models, composite},
    source::gguf,
    support::models,
};

/// The system's allocator, which notes the largest request of each thread.
struct Largest;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

#[global_allocator]
static ALLOCATOR: Largest = Largest;

// SAFETY: every request goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Largest {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(layout.size())));
        // SAFETY: the caller's layout.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(layout.size())));
        // SAFETY: the caller's layout.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(size)));
        // SAFETY: the caller's pointer, which came from `alloc`, with its layout.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's pointer, which came from `alloc`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// What four megabytes and sixty-four times the input do not cover was asked for by a number in it.
const SPARE: usize = 4 << 20;
const TIMES: usize = 64;
/// For one input, on a busy machine.
const LONGEST: Duration = Duration::from_secs(20);
const ROUNDS: usize = 300;

/// Runs `parse` on mutated seeds. It writes the input where it is read from.
fn fuzz(name: &str, mut seeds: Vec<Vec<u8>>, spare: usize, parse: impl Fn(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(name);
    for entry in fs_err::read_dir(corpus).into_iter().flatten() {
        seeds.push(fs_err::read(entry.unwrap().path()).unwrap());
    }
    let seconds = std::env::var("UPCYCLE_FUZZ_SECONDS").ok().map(|seconds| seconds.parse().unwrap());
    let seed = if seconds.is_some() { rand::rng().random() } else { 7 };
    println!("{name}: {} seeds, generator seeded by {seed}", seeds.len());
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let (start, mut rounds) = (Instant::now(), 0);
    while seconds.map_or(rounds < ROUNDS + seeds.len(), |seconds| start.elapsed() < Duration::from_secs(seconds)) {
        // First the seeds as they are.
        let mut input = seeds.get(rounds).unwrap_or_else(|| seeds.choose(&mut rng).unwrap()).clone();
        if rounds >= seeds.len() {
            (0..rng.random_range(1..6)).for_each(|_| mutate(&mut input, &seeds, &mut rng));
        }
        rounds += 1;
        if seconds.is_some() {
            fs_err::write(std::env::temp_dir().join(format!("upcycle-fuzz-{name}-last")), &input).unwrap();
        }
        LARGEST.set(0);
        let begun = Instant::now();
        let panicked = std::panic::catch_unwind(AssertUnwindSafe(|| parse(&input))).is_err();
        let (largest, time) = (LARGEST.get(), begun.elapsed());
        if panicked || largest > spare + TIMES * input.len() || time > LONGEST {
            let file = std::env::temp_dir().join(format!("upcycle-fuzz-{name}-{rounds}"));
            fs_err::write(&file, &input).unwrap();
            panic!("{}: panicked: {panicked}, allocated {largest} bytes at once for {}, took {time:?}", file.display(), input.len());
        }
    }
    println!("{name}: {rounds} inputs in {:?}", start.elapsed());
}

/// One change of the kinds that break parsers: bits, lengths, numbers, nesting, pieces that are missing, doubled or of another file.
fn mutate(input: &mut Vec<u8>, seeds: &[Vec<u8>], rng: &mut ChaCha8Rng) {
    const NUMBERS: [u64; 10] = [0, 1, 0x7f, 0xff, 0xffff, 0x7fff_ffff, 0xffff_ffff, 1 << 40, i64::MAX as u64, u64::MAX];
    const WORDS: [&str; 14] = [
        "-1",
        "1e999",
        "18446744073709551616",
        "null",
        "[]",
        "{}",
        "\"\"",
        "\\u0000",
        "../",
        "/dev/zero",
        "[[[[[[[[",
        "{{",
        "{%",
        "\u{feff}",
    ];
    // Most of what decides anything stands in front.
    let size = if rng.random_bool(0.5) { input.len() } else { input.len().min(256) };
    let at = rng.random_range(0..=size);
    let end = input.len().min(at + rng.random_range(0..64));
    match rng.random_range(0..9) {
        0 if at < input.len() => input[at] ^= 1 << rng.random_range(0..8),
        1 if at < input.len() => input[at] = rng.random(),
        2 => drop(input.drain(at..end)),
        3 => {
            let piece = input[at..end].to_vec();
            let times = rng.random_range(1..20);
            input.splice(at..at, piece.repeat(times));
        }
        4 if at + 8 <= input.len() => input[at..at + 8].copy_from_slice(&NUMBERS.choose(rng).unwrap().to_le_bytes()),
        5 => {
            let number = NUMBERS.choose(rng).unwrap().to_string();
            let digits = input[at..].iter().position(u8::is_ascii_digit).map(|first| at + first);
            if let Some(first) = digits {
                let last = input[first..].iter().position(|byte| !byte.is_ascii_digit()).map_or(input.len(), |length| first + length);
                input.splice(first..last, number.into_bytes());
            }
        }
        6 => drop(input.splice(at..at, WORDS.choose(rng).unwrap().bytes())),
        7 => input.truncate(at),
        _ => {
            let other = seeds.choose(rng).unwrap();
            let from = rng.random_range(0..=other.len());
            let piece = other[from..other.len().min(from + 256)].to_vec();
            input.splice(at..end, piece);
        }
    }
}

/// A directory with one tiny model, of which one file is replaced.
struct Model {
    dir: TempDir,
}

impl Model {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        models::write(dir.path(), "llama", 1);
        Self { dir }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn good(&self, name: &str) -> Vec<Vec<u8>> {
        vec![fs_err::read(self.file(name)).unwrap()]
    }
}

fn open(path: &Path) -> Option<Source> {
    source::open(&path.display().to_string().parse().unwrap(), &OpenOptions::default()).ok()
}

/// Opens a model and reads all of it.
fn read(path: &Path) {
    if let Some(source) = open(path) {
        source.weights.names().iter().for_each(|name| drop(source.weights.read(name)));
    }
}

/// Replaces a file of a model, which is then opened and read.
fn fuzz_file(name: &str, file: &str, model: &Model) {
    fuzz(name, model.good(file), SPARE, |input| {
        // Under the old file there may be maps: it is replaced, as upcycle's own writers do it.
        fs_err::write(model.file("next"), input).unwrap();
        fs_err::rename(model.file("next"), model.file(file)).unwrap();
        read(model.dir.path());
    });
}

#[test]
fn safetensors() {
    fuzz_file("safetensors", "model.safetensors", &Model::new());
}

#[test]
fn index() {
    let model = Model::new();
    models::shard(model.dir.path());
    fuzz_file("index", "model.safetensors.index.json", &model);
}

#[test]
fn config() {
    fuzz_file("config", "config.json", &Model::new());
}

#[test]
fn tokenizer() {
    let model = Model::new();
    fuzz("tokenizer", model.good("tokenizer.json"), SPARE, |input| {
        fs_err::write(model.file("tokenizer.json"), input).unwrap();
        let source = open(model.dir.path()).unwrap();
        if let Ok(tokenizer) = Tokenizer::open(&source.sidecars, &source.config) {
            let ids = tokenizer.encode("w5 w6 <s> and more\u{301}", Specials::Written).unwrap_or_default();
            drop(tokenizer.decode(&ids));
        }
    });
}

#[test]
fn adapter_config() {
    let model = Model::new();
    let adapter = tempfile::tempdir().unwrap();
    let both = format!("{}+{}", model.dir.path().display(), adapter.path().display());
    let header = r#"{"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight":{"dtype":"F32","shape":[2,32],"data_offsets":[0,256]},"base_model.model.model.layers.0.mlp.up_proj.lora_B.weight":{"dtype":"F32","shape":[48,2],"data_offsets":[256,640]}}"#;
    let weights = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &[0; 640]].concat();
    fs_err::write(adapter.path().join("adapter_model.safetensors"), weights).unwrap();
    let good = br#"{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"], "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": false}"#;
    let config = adapter.path().join("adapter_config.json");
    fs_err::write(&config, good).unwrap();
    assert!(source::open(&both.parse().unwrap(), &OpenOptions::default()).is_ok(), "the seed is a good one");
    fuzz("adapter_config", vec![good.to_vec()], SPARE, |input| {
        fs_err::write(&config, input).unwrap();
        if let Ok(source) = source::open(&both.parse().unwrap(), &OpenOptions::default()) {
            drop(source.weights.read("model.layers.0.mlp.up_proj.weight"));
        }
    });
}

#[test]
fn gguf_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("next.gguf");
    fuzz("gguf", gguf::examples(), SPARE, |input| {
        // Not over the file that a map may still be of.
        drop(fs_err::remove_file(&file));
        fs_err::write(&file, input).unwrap();
        read(&file);
    });
}

#[test]
fn recipes() {
    let seeds = [
        "base_model: a\nexperts: [{source_model: b, positive_prompts: [x]}, {source_model: c@main+d, positive_prompts: ['y']}]\n",
        "&a [*a]",
    ];
    fuzz("recipe", seeds.iter().map(|seed| seed.as_bytes().to_vec()).collect(), SPARE, |input| {
        if let Ok(text) = std::str::from_utf8(input) {
            drop(recipe::parse(text, "recipe.yml".as_ref(), &[]));
            drop(recipe::experts(text));
            drop(recipe::edit(text, &recipe::Change::Remove(0)));
        }
    });
}

#[test]
fn chat_template() {
    let seed = "{%- for m in messages %}{% if loop.first and m.role == 'system' %}{{ m['content'] | trim }}{% else %}<{{ m.role }}>{{ m.content.split('x')[-1] }}\
                {% endif %}{% endfor %}{% if add_generation_prompt %}{{ bos_token + '<a>' * 3 }}{% endif %}";
    // What a template may write is bounded, but not by its length.
    fuzz("chat_template", vec![seed.as_bytes().to_vec()], 256 << 20, |input| {
        let Ok(template) = ChatTemplate::new(&String::from_utf8_lossy(input), BTreeMap::from([("bos_token".into(), "<s>".into())])) else {
            return;
        };
        let messages = [json!({"role": "system", "content": "be brief"}), json!({"role": "user", "content": "hello"})];
        drop(template.render(&Chat { messages: &messages, add_generation_prompt: true, variables: &Map::default(), now: None }));
    });
}

#[test]
fn manifest() {
    let models = Models::new("llama");
    let recipe = models.recipe("gate_mode: random", "");
    let out = models.path("out");
    write::write(&composite(&recipe), &recipe, &out, &Options::default(), &Silent).unwrap();
    let file = out.join(write::MANIFEST);
    fuzz("manifest", vec![fs_err::read(&file).unwrap()], SPARE, |input| {
        fs_err::write(&file, input).unwrap();
        let written = open(&out).unwrap();
        drop(write::verify(
            written,
            |name, _| name.parse().map_err(|_| "").and_then(|name| source::open(&name, &OpenOptions::default()).map_err(|_| "")),
            &Silent,
        ));
    });
}

/// Sends mutated bodies to a route of a server, on a real socket. What is allocated there is not looked at: bodies have a limit of their own.
#[cfg(feature = "serve")]
fn fuzz_route(name: &str, path: &str, seeds: &[serde_json::Value]) {
    let server = Running::start(upcycle::engine::Options { context: Some(48), ..upcycle::engine::Options::default() });
    let seeds = seeds.iter().map(|seed| seed.to_string().into_bytes()).collect();
    fuzz(name, seeds, SPARE, |body| server.survives(path, body));
    server.survives(path, b"{}");
}

#[cfg(feature = "serve")]
#[test]
fn chat_requests() {
    let sampled = json!({
        "model": "math", "messages": [{"role": "system", "content": "Brief."}, {"role": "user", "content": [{"type": "text", "text": "1 + 2?"}]}],
        "max_tokens": 3, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1, "presence_penalty": 0.1,
        "frequency_penalty": 0.1, "seed": 7, "stop": ["a", "b"], "n": 2, "logit_bias": {"5": -1.5}, "logprobs": true, "top_logprobs": 2, "stream": true,
        "stream_options": {"include_usage": true}, "chat_template_kwargs": {"thinking": false},
    });
    let tools = json!([{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}]);
    let called = json!([
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": null, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
    ]);
    let calling = json!({"messages": called, "max_tokens": 3, "tools": tools, "tool_choice": "auto", "parallel_tool_calls": false});
    let schema = json!({"type": "object", "properties": {"x": {"enum": ["a", "b"]}}, "required": ["x"], "additionalProperties": false});
    let bound = json!({
        "messages": [{"role": "user", "content": "?"}], "max_tokens": 3,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": true, "schema": schema}},
    });
    let steered = json!({
        "messages": [{"role": "user", "content": "?"}], "max_tokens": 3, "experts_per_token": 1, "mask_experts": ["code"], "force_experts": [0, "1"],
        "expert_bias": {"math": 1.5}, "return_experts": true,
    });
    fuzz_route("chat_requests", "/v1/chat/completions", &[sampled, calling, bound, steered]);
}

#[cfg(feature = "serve")]
#[test]
fn text_requests() {
    let text = json!({"prompt": ["Problem:", "Compute"], "max_tokens": 3, "logprobs": 2, "echo": true, "stream": true, "stop": "x", "best_of": 2, "n": 1});
    let tokens = json!({"prompt": [[5, 6], [7]], "max_tokens": 3, "response_format": {"type": "regex", "regex": "[a-c]{1,3}(x|y)*"}});
    let lark = json!({"prompt": [5, 6], "max_tokens": 3, "response_format": {"type": "lark", "lark": "start: \"a\" | /[b-d]+/ start"}});
    fuzz_route("text_requests", "/v1/completions", &[text, tokens, lark]);
}

#[cfg(feature = "serve")]
#[test]
fn ollama_requests() {
    let options = json!({"num_predict": 3, "temperature": 0.5, "stop": ["x"], "seed": 1, "top_k": 5, "repeat_penalty": 1.1});
    let generate = json!({"model": "math", "prompt": "1", "system": "s", "raw": false, "stream": true, "format": "json", "keep_alive": "5m", "options": options});
    fuzz_route("ollama_generate", "/api/generate", &[generate]);
    let format = json!({"type": "object", "properties": {"a": {"type": "boolean"}}});
    let chat = json!({"model": "math", "messages": [{"role": "user", "content": "1"}], "stream": false, "format": format, "keep_alive": 60, "options": options});
    fuzz_route("ollama_chat", "/api/chat", &[chat]);
    fuzz_route("ollama_show", "/api/show", &[json!({"model": "math", "verbose": true})]);
}

#[cfg(feature = "serve")]
#[test]
fn other_requests() {
    fuzz_route("models_load", "/models/load", &[json!({"model": "math"})]);
    let tokens = json!({"input": [[5, 6], [7]], "encoding_format": "base64", "dimensions": 3});
    fuzz_route("embedding_requests", "/v1/embeddings", &[json!({"input": ["1", "2"]}), tokens]);
    fuzz_route("tokenize", "/tokenize", &[json!({"content": "1 + 2", "add_special": true, "with_pieces": true})]);
    fuzz_route("detokenize", "/detokenize", &[json!({"tokens": [5, 6, 7]})]);
    fuzz_route("models_reload", "/models/reload", &[json!({"model": "math"})]);
}
