//! The keys of a recipe, ours and those of neighbouring tools, and what their values may be.
//!
//! Every mistake is noted and reading goes on, so that one run shows them all. What values mean together is checked by the lints.

use std::{
    fmt::Display,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use upcycle_architectures::{Dtype, families::FAMILIES};
use upcycle_routers::init;

use super::{
    Expert, Layout, ModelRef, Problem, Recipe, Severity, Shared,
    problem::{File, Place},
    prompts,
    yaml::{self, Entry, Node, Value},
};

/// What mergekit-moe calls its outputs; `architecture` is a prefix of one, in any case.
const OUTPUTS: [&str; 4] = ["Mixtral", "DeepSeek MoE", "Qwen MoE", "Qwen3 MoE"];

/// What to say where a file of the recipe is not found.
const BESIDE: &str = "the path is relative to the recipe's folder";

/// The keys of one kind of mapping.
struct Schema {
    /// what the mapping is, in messages
    of: &'static str,
    known: &'static [&'static str],
    /// a neighbouring tool's key and the one of ours that it means
    renamed: &'static [(&'static str, &'static str)],
    /// a neighbouring tool's key that means nothing here, and why
    ignored: &'static [(&'static str, &'static str)],
}

const RECIPE: Schema = Schema {
    of: "a recipe",
    known: &[
        "base_model",
        "experts",
        "shared_experts",
        "gate_mode",
        "dtype",
        "experts_per_token",
        "architecture",
        "shared",
        "repair",
        "chat_template",
        "tokenizer",
        "layout",
        "seed",
    ],
    renamed: &[("num_experts_per_tok", "experts_per_token"), ("tokenizer_source", "tokenizer"), ("out_dtype", "dtype")],
    ignored: &[
        ("merge_method", "experts are not merged, each keeps its own MLPs"),
        ("parameters", "merge methods take parameters, experts do not"),
        ("name", "a composite is named by the folder that it is written to"),
    ],
};

const EXPERT: Schema = Schema {
    of: "an expert",
    known: &["source_model", "positive_prompts", "negative_prompts", "prompts_file", "text_file", "noise_scale", "residual_scale"],
    renamed: &[
        ("model", "source_model"),
        ("prompts", "positive_prompts"),
        ("positive_prompt", "positive_prompts"),
        ("negative_prompt", "negative_prompts"),
    ],
    ignored: &[("name", "experts are known by their index"), ("parameters", "merge methods take parameters, experts do not")],
};

const MODEL: Schema = Schema {
    of: "a model",
    known: &["model", "lora", "path", "revision"],
    renamed: &[],
    ignored: &[("override_architecture", "the family is read from the model's config.json")],
};

/// Where in the text the parts of a recipe stand.
pub(super) struct Places {
    /// the keys, or the whole recipe's first where a key is not given
    pub(super) experts: Range<usize>,
    pub(super) shared_experts: Range<usize>,
    pub(super) gate_mode: Range<usize>,
    pub(super) experts_per_token: Range<usize>,
    pub(super) expert: Vec<ExpertPlaces>,
}

pub(super) struct ExpertPlaces {
    pub(super) source_model: Range<usize>,
    /// the key that gives the positive prompts; the source where there is none
    pub(super) positive: Range<usize>,
    /// the key `negative_prompts`; the source where there is none
    pub(super) negative: Range<usize>,
}

/// The entries of a mapping by our names for the keys; those without a value left out.
struct Fields<'n>(Vec<(&'static str, &'n Entry)>);

impl<'n> Fields<'n> {
    fn get(&self, key: &str) -> Option<&'n Entry> {
        self.0.iter().find(|(name, _)| *name == key).map(|(_, entry)| *entry)
    }
}

/// Reads one recipe and gathers what is wrong with it.
pub(super) struct Reader<'t> {
    text: &'t str,
    pub(super) file: Arc<File>,
    pub(super) problems: Vec<Problem>,
}

impl<'t> Reader<'t> {
    pub(super) fn new(text: &'t str, file: &Path) -> Self {
        let source = text.strip_prefix('\u{feff}').unwrap_or(text);
        Self { text, file: Arc::new(File { path: file.to_owned(), text: source.to_owned() }), problems: Vec::new() }
    }

    /// The recipe, if it could be understood; the problems say why not.
    pub(super) fn recipe(&mut self) -> Option<(Recipe, Places)> {
        let file = Arc::clone(&self.file);
        let root = match yaml::parse(&file.text) {
            Ok(root) => root,
            Err((message, span)) => {
                self.error(&span, message, Some("check the indentation and the quotes here and in the line above".into()));
                return None;
            }
        };
        let Value::Map(entries) = &root.value else {
            let hint = "a recipe has at least `base_model` and `experts`, each with its `source_model`";
            let found = if matches!(root.value, Value::Null) {
                "the recipe is empty".into()
            } else {
                found(&root, "a recipe must be a mapping of keys")
            };
            self.error(&root.span, found, Some(hint.to_owned()));
            return None;
        };
        let key = |name: &str| entries.iter().find(|entry| entry.key == name);
        if let (None, Some(merge)) = (key("experts"), ["models", "slices", "modules"].into_iter().find_map(key)) {
            let hint = "give `experts`, each with its `source_model`; a merge of models into one dense model is another job";
            self.error(&merge.key_span, "this is a recipe for mergekit-yaml, which merges models into one", Some(hint.to_owned()));
            return None;
        }

        let fields = self.fields(&root, &RECIPE)?;
        let places = |name| fields.get(name).map_or_else(|| root.span.clone(), |entry| entry.key_span.clone());
        let base_model = self.required(&fields, "base_model", &root, &RECIPE).and_then(|entry| self.model(&entry.node));
        let experts = self.required(&fields, "experts", &root, &RECIPE).and_then(|entry| self.experts(entry));
        let shared_experts = self.given(&fields, "shared_experts", Self::experts);
        let gate_mode = self.given(&fields, "gate_mode", Self::gate_mode);
        let dtype = self.given(&fields, "dtype", Self::dtype);
        let experts_per_token = self.given(&fields, "experts_per_token", |reader, entry| match &entry.node.value {
            Value::Text(text) if text == "auto" => Some(None),
            _ => reader.whole(entry, 1).map(|count| Some(usize::try_from(count).unwrap_or(usize::MAX))),
        });
        let architecture = self.given(&fields, "architecture", Self::architecture);
        let shared = self.given(&fields, "shared", |reader, entry| reader.choice(entry, &Shared::ALL));
        let repair = self.given(&fields, "repair", |reader, entry| {
            reader.switch(entry, "it says whether the experts' down projections are fitted to the shared weights and the routing")
        });
        let layout = self.given(&fields, "layout", |reader, entry| reader.choice(entry, &Layout::ALL));
        let chat_template = self.given(&fields, "chat_template", |reader, entry| {
            reader.switch(entry, "it says whether prompts are wrapped in the base's chat template before they are run")
        });
        let tokenizer = self.given(&fields, "tokenizer", Self::tokenizer);
        let seed = self.given(&fields, "seed", |reader, entry| reader.whole(entry, 0));

        let (experts, expert): (Vec<_>, Vec<_>) = experts?.into_iter().unzip();
        // A shared expert's gate is made from prompts alone.
        let default = if shared_experts.is_some() { "hidden" } else { "auto" };
        let gate_mode = gate_mode.or_else(|| init::find(default))?;
        let usual = if gate_mode.all_experts { experts.len() } else { 2 };
        let recipe = Recipe {
            base_model: base_model?,
            experts,
            shared_experts: shared_experts.unwrap_or_default().into_iter().map(|(expert, _)| expert).collect(),
            gate_mode,
            dtype,
            experts_per_token: experts_per_token.flatten().unwrap_or(usual),
            choose_experts_per_token: experts_per_token.flatten().is_none() && !gate_mode.candidates().is_empty(),
            architecture,
            shared: shared.unwrap_or_default(),
            repair,
            chat_template,
            tokenizer,
            layout: layout.unwrap_or_default(),
            seed,
            text: self.text.to_owned(),
            file: file.path.clone(),
        };
        let places = Places {
            experts: places("experts"),
            shared_experts: places("shared_experts"),
            gate_mode: places("gate_mode"),
            experts_per_token: places("experts_per_token"),
            expert,
        };
        Some((recipe, places))
    }

    fn experts(&mut self, entry: &Entry) -> Option<Vec<(Expert, ExpertPlaces)>> {
        let Value::List(items) = &entry.node.value else {
            let hint = "write one `- source_model: ...` per expert below it";
            self.error(&entry.node.span, found(&entry.node, &format!("`{}` must be a list of experts", entry.key)), Some(hint.to_owned()));
            return None;
        };
        let experts: Vec<_> = items.iter().map(|item| self.expert(item)).collect();
        experts.into_iter().collect()
    }

    fn expert(&mut self, node: &Node) -> Option<(Expert, ExpertPlaces)> {
        if let Value::Text(model) = &node.value {
            self.error(&node.span, found(node, "an expert must be a mapping of keys"), Some(format!("write `- source_model: {model}`")));
            return None;
        }
        let fields = self.fields(node, &EXPERT)?;
        let source = self.required(&fields, "source_model", node, &EXPERT);
        let source_model = source.and_then(|entry| self.model(&entry.node));
        let positive = self.given(&fields, "positive_prompts", Self::prompts);
        let file = self.given(&fields, "prompts_file", Self::prompts_file);
        let negative = self.given(&fields, "negative_prompts", Self::prompts);
        let text_file = self.given(&fields, "text_file", Self::text_file);
        let noise_scale = self.given(&fields, "noise_scale", Self::number);
        let residual_scale = self.given(&fields, "residual_scale", Self::number);
        let source = source?.node.span.clone();
        let key = |names: &[&str]| names.iter().find_map(|name| fields.get(name)).map_or_else(|| source.clone(), |e| e.key_span.clone());
        let places = ExpertPlaces {
            positive: key(&["positive_prompts", "prompts_file"]),
            negative: key(&["negative_prompts"]),
            source_model: source.clone(),
        };
        let expert = Expert {
            source_model: source_model?,
            positive_prompts: positive.into_iter().chain(file).flatten().collect(),
            negative_prompts: negative.unwrap_or_default(),
            text_file,
            noise_scale,
            residual_scale,
        };
        Some((expert, places))
    }

    /// A list of texts; under the singular keys of neighbouring tools also one text.
    fn prompts(&mut self, entry: &Entry) -> Option<Vec<String>> {
        match &entry.node.value {
            Value::List(items) => {
                let prompts: Vec<_> = items.iter().map(|item| self.text(item, "a prompt").map(str::to_owned)).collect();
                prompts.into_iter().collect()
            }
            Value::Text(prompt) if entry.key.ends_with("_prompt") => Some(vec![prompt.clone()]),
            _ => {
                let hint = match &entry.node.value {
                    Value::Text(_) => "put `- ` in front of it, on a line of its own",
                    _ => "write one `- \"...\"` per prompt below it",
                };
                self.error(
                    &entry.node.span,
                    found(&entry.node, &format!("`{}` must be a list of prompts", entry.key)),
                    Some(hint.to_owned()),
                );
                None
            }
        }
    }

    fn prompts_file(&mut self, entry: &Entry) -> Option<Vec<String>> {
        let name = self.text(&entry.node, "`prompts_file`")?;
        self.ok(&entry.node, prompts::read(&self.beside(name)), Some(BESIDE))
    }

    fn text_file(&mut self, entry: &Entry) -> Option<PathBuf> {
        let name = self.text(&entry.node, "`text_file`")?;
        let path = self.beside(name);
        if !path.extension().is_some_and(|end| end == "txt" || end == "jsonl") {
            let hint = "plain text in a .txt; in a .jsonl one `{\"messages\": [..]}` or `{\"text\": ..}` per line";
            self.error(&entry.node.span, "a file of text ends in .txt or .jsonl", Some(hint.to_owned()));
            return None;
        }
        self.ok(&entry.node, fs_err::File::open(&path), Some(BESIDE)).map(|_| path)
    }

    fn beside(&self, name: &str) -> PathBuf {
        self.file.path.parent().unwrap_or_else(|| Path::new("")).join(name)
    }

    fn gate_mode(&mut self, entry: &Entry) -> Option<&'static init::Method> {
        let name = self.text(&entry.node, "`gate_mode`")?;
        let method = init::find(name);
        if method.is_none() {
            self.unknown_value(entry, name, init::METHODS.iter().map(|method| method.name));
        }
        method
    }

    fn dtype(&mut self, entry: &Entry) -> Option<Dtype> {
        let name = self.text(&entry.node, "`dtype`")?;
        let dtype = Dtype::parse(name);
        if dtype.is_none() {
            self.unknown_value(entry, name, ["float32", "float16", "bfloat16", "float64"]);
        }
        dtype
    }

    /// `None` for the empty text, which mergekit takes as not given.
    fn architecture(&mut self, entry: &Entry) -> Option<String> {
        let name = self.text(&entry.node, "`architecture`")?;
        let lower = name.to_ascii_lowercase();
        let prefix = |output: &&str| output.to_ascii_lowercase().starts_with(&lower);
        if !OUTPUTS.iter().any(prefix) && !FAMILIES.iter().any(|family| family.model_type == lower) {
            self.unknown_value(entry, name, OUTPUTS);
            return None;
        }
        Some(name.to_owned()).filter(|name| !name.is_empty())
    }

    /// `None` for `auto`, which is what it is when it is not given.
    fn switch(&mut self, entry: &Entry, hint: &str) -> Option<bool> {
        let value = match &entry.node.value {
            Value::Bool(value) => Some(*value),
            Value::Text(text) if text == "auto" => return None,
            Value::Text(text) => text.parse().ok(),
            _ => None,
        };
        if value.is_none() {
            self.error(&entry.node.span, format!("`{}` must be `true`, `false` or `auto`", entry.key), Some(hint.to_owned()));
        }
        value
    }

    /// `None` for mergekit-yaml's word for the base's tokenizer.
    fn tokenizer(&mut self, entry: &Entry) -> Option<ModelRef> {
        match &entry.node.value {
            Value::Text(text) if text == "base" => None,
            Value::Text(text) if text == "union" => {
                let hint = "name the one model whose tokenizer files are copied, or leave the key out for the base's";
                self.error(&entry.node.span, "tokenizers are not joined: every expert uses one vocabulary", Some(hint.to_owned()));
                None
            }
            _ => self.model(&entry.node),
        }
    }

    /// `PATH[@REVISION][+LORA[@REVISION]]`, or mergekit's mapping `{model: {path, revision}, lora: {path, revision}}`.
    fn model(&mut self, node: &Node) -> Option<ModelRef> {
        if !matches!(node.value, Value::Map(_)) {
            let text = self.text(node, "a model")?;
            return self.ok(node, text.parse(), None);
        }
        let fields = self.fields(node, &MODEL)?;
        let mut model = match (fields.get("path"), fields.get("model")) {
            (Some(path), None) => ModelRef { path: self.text(&path.node, "`path`")?.to_owned(), revision: None, lora: None },
            (None, Some(model)) => self.model(&model.node)?,
            _ => {
                self.error(
                    &node.span,
                    "a model must have either `path` or `model`",
                    Some("write `model: {path: ..., revision: ...}`".to_owned()),
                );
                return None;
            }
        };
        if let Some(revision) = fields.get("revision") {
            model.revision = Some(self.text(&revision.node, "`revision`")?.to_owned());
        }
        if let Some(lora) = fields.get("lora") {
            model.lora = Some(Box::new(self.model(&lora.node)?));
        }
        Some(model)
    }

    fn choice<T: Copy>(&mut self, entry: &Entry, all: &[(&'static str, T)]) -> Option<T> {
        let name = self.text(&entry.node, &format!("`{}`", entry.key))?;
        let value = all.iter().find(|(one, _)| *one == name).map(|(_, value)| *value);
        if value.is_none() {
            self.unknown_value(entry, name, all.iter().map(|(name, _)| *name));
        }
        value
    }

    /// A whole number of at least `least`; text and floats that are one count, as they do in mergekit.
    fn whole(&mut self, entry: &Entry, least: u64) -> Option<u64> {
        let value = match &entry.node.value {
            Value::Int(value) => Some(*value),
            Value::Float(value) if value.fract() == 0.0 => Some(*value as i128),
            Value::Text(text) => text.trim().parse().ok(),
            _ => None,
        };
        let whole = value.and_then(|value| u64::try_from(value).ok()).filter(|value| *value >= least);
        if whole.is_none() {
            self.error(&entry.node.span, format!("`{}` must be a whole number of at least {least}", entry.key), None);
        }
        whole
    }

    fn number(&mut self, entry: &Entry) -> Option<f64> {
        let value = match &entry.node.value {
            Value::Int(value) => Some(*value as f64),
            Value::Float(value) => Some(*value),
            Value::Text(text) => text.trim().parse().ok(),
            _ => None,
        };
        let finite = value.filter(|value| value.is_finite());
        if finite.is_none() {
            self.error(&entry.node.span, format!("`{}` must be a finite number", entry.key), None);
        }
        finite
    }

    fn text<'n>(&mut self, node: &'n Node, what: &str) -> Option<&'n str> {
        if let Value::Text(text) = &node.value {
            return Some(text);
        }
        let scalar = matches!(node.value, Value::Int(_) | Value::Float(_) | Value::Bool(_) | Value::Null) && !node.span.is_empty();
        let hint = scalar.then(|| format!("quote it: \"{}\"", &self.file.text[node.span.clone()]));
        self.error(&node.span, found(node, &format!("{what} must be text")), hint);
        None
    }

    /// The entries of a mapping, keys checked.
    fn fields<'n>(&mut self, node: &'n Node, schema: &Schema) -> Option<Fields<'n>> {
        let Value::Map(entries) = &node.value else {
            let known = format!("its keys are {}", list(schema.known));
            self.error(&node.span, found(node, &format!("{} must be a mapping of keys", schema.of)), Some(known));
            return None;
        };
        let mut fields = Fields(Vec::new());
        for entry in entries {
            let key = entry.key.as_str();
            let renamed = schema.renamed.iter().find(|(theirs, _)| *theirs == key).map(|(_, ours)| *ours);
            if let Some(known) = schema.known.iter().copied().find(|known| *known == key).or(renamed) {
                if let Some(twice) = fields.get(known) {
                    let hint = format!("keep one of `{}` and `{key}`", twice.key);
                    self.error(&entry.key_span, format!("`{known}` is given twice"), Some(hint));
                    continue;
                }
                if renamed.is_some() {
                    self.warn(&entry.key_span, format!("`{key}` is read as `{known}`"), "rename it".to_owned());
                }
                if !matches!(entry.node.value, Value::Null) {
                    fields.0.push((known, entry));
                }
            } else if let Some((_, why)) = schema.ignored.iter().find(|(theirs, _)| *theirs == key) {
                self.warn(&entry.key_span, format!("`{key}` is ignored: {why}"), "remove it".to_owned());
            } else {
                let hint = match nearest(key, schema.known.iter().copied()) {
                    Some(known) => format!("did you mean `{known}`? {} has the keys {}", capital(schema.of), list(schema.known)),
                    None => format!("{} has the keys {}", schema.of, list(schema.known)),
                };
                self.error(&entry.key_span, format!("unknown key `{key}` in {}", schema.of), Some(hint));
            }
        }
        Some(fields)
    }

    fn required<'n>(&mut self, fields: &Fields<'n>, key: &str, node: &Node, schema: &Schema) -> Option<&'n Entry> {
        let entry = fields.get(key);
        if entry.is_none() {
            self.error(&node.span, format!("{} needs `{key}`", schema.of), None);
        }
        entry
    }

    fn given<T>(&mut self, fields: &Fields<'_>, key: &str, read: impl FnOnce(&mut Self, &Entry) -> Option<T>) -> Option<T> {
        fields.get(key).and_then(|entry| read(self, entry))
    }

    fn ok<T, E: Display>(&mut self, node: &Node, result: Result<T, E>, hint: Option<&str>) -> Option<T> {
        result.map_err(|error| self.error(&node.span, error.to_string(), hint.map(str::to_owned))).ok()
    }

    fn unknown_value(&mut self, entry: &Entry, found: &str, known: impl IntoIterator<Item = &'static str>) {
        let known: Vec<_> = known.into_iter().collect();
        let known_list = format!("it is one of {}", list(&known));
        let hint = match nearest(found, known.iter().copied()) {
            Some(near) => format!("did you mean `{near}`? {}", capital(&known_list)),
            None => known_list,
        };
        self.error(&entry.node.span, format!("unknown value `{found}` for `{}`", entry.key), Some(hint));
    }

    fn error(&mut self, span: &Range<usize>, message: impl Into<String>, hint: Option<String>) {
        self.push(Severity::Error, span, message.into(), hint);
    }

    fn warn(&mut self, span: &Range<usize>, message: String, hint: String) {
        self.push(Severity::Warning, span, message, Some(hint));
    }

    fn push(&mut self, severity: Severity, span: &Range<usize>, message: String, hint: Option<String>) {
        let places = vec![Place { span: span.clone(), label: String::new() }];
        self.problems.push(Problem { severity, lint: None, message, about: None, hint, places, file: Arc::clone(&self.file) });
    }
}

/// "`what`, but this is ...".
fn found(node: &Node, what: &str) -> String {
    let kind = match &node.value {
        Value::Null => "nothing",
        Value::Bool(_) => "a truth value",
        Value::Int(_) | Value::Float(_) => "a number",
        Value::Text(_) => "text",
        Value::List(_) => "a list",
        Value::Map(_) => "a mapping of keys",
    };
    format!("{what}, but this is {kind}")
}

/// The candidate that a misspelt word most likely means.
fn nearest<'c>(word: &str, candidates: impl IntoIterator<Item = &'c str>) -> Option<&'c str> {
    let word = word.to_lowercase();
    candidates
        .into_iter()
        .map(|candidate| (strsim::normalized_damerau_levenshtein(&word, &candidate.to_lowercase()), candidate))
        .filter(|(likeness, _)| *likeness >= 0.6)
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, candidate)| candidate)
}

/// "`a`, `b`, `c`".
fn list(words: &[&str]) -> String {
    words.iter().map(|word| format!("`{word}`")).collect::<Vec<_>>().join(", ")
}

fn capital(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| first.to_uppercase().chain(chars).collect())
}
