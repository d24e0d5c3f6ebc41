//! `tokenizer.json`, `tokenizer_config.json` and `generation_config.json` made from GGUF metadata.
//!
//! Two kinds are known: byte-level BPE (`gpt2`), whose splitting pattern GGUF only names, and `SentencePiece` BPE (`llama`), whose merges
//! follow from the scores. Patterns are those of the original `tokenizer.json` files that llama.cpp's names stand for.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
};

use serde::{Serialize, Serializer};
use serde_json::{Value, json};

use super::{config::special_ids, read::Gguf};
use crate::source::Sidecar;

type Result<T> = std::result::Result<T, String>;

/// `llama_token_type`
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// No piece of `SentencePiece` is longer by default than 16 characters; longer ones would make the search for merges slow.
const LONGEST_MERGE: usize = 64;

/// The files.
pub(super) fn make(gguf: &Gguf, config: &Value) -> Result<BTreeMap<String, Sidecar>> {
    let model = gguf.text("tokenizer.ggml.model")?.ok_or("metadata `tokenizer.ggml.model` is missing")?;
    let tokens: Vec<_> = gguf.strings("tokenizer.ggml.tokens")?.collect();
    let vocabulary = Vocabulary::of(&tokens, gguf)?;
    let (mut tokenizer, adds_bos) = match model {
        "gpt2" => byte_level(gguf, &vocabulary)?,
        "llama" => (sentence_piece(gguf, &vocabulary)?, true),
        other => return Err(format!("tokenizer `{other}` is not supported in GGUF (supported: gpt2, llama)")),
    };
    let [(_, bos), (_, eos), (_, pad)] = special_ids(gguf)?;
    let token = |ids: &[usize]| ids.first().and_then(|id| vocabulary.tokens.get(*id));
    let adds_bos = gguf.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(adds_bos);
    let adds_eos = gguf.flag("tokenizer.ggml.add_eos_token")?.unwrap_or(false);
    let wrap = [adds_bos.then(|| bos.first().zip(token(&bos))).flatten(), adds_eos.then(|| eos.first().zip(token(&eos))).flatten()];
    if wrap.iter().any(Option::is_some) {
        tokenizer.post_processor = Some(template(wrap));
    }
    let unknown = gguf.integer("tokenizer.ggml.unknown_token_id")?.into_iter().collect::<Vec<_>>();
    let settings = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": adds_bos,
        "add_eos_token": adds_eos,
        "bos_token": token(&bos),
        "eos_token": token(&eos),
        "pad_token": token(&pad),
        "unk_token": token(&unknown),
        "clean_up_tokenization_spaces": false,
        "model_max_length": config["max_position_embeddings"],
        "chat_template": gguf.text("tokenizer.chat_template")?,
    });
    let generation = json!({
        "bos_token_id": config.get("bos_token_id"), "eos_token_id": config.get("eos_token_id"), "pad_token_id": config.get("pad_token_id"),
    });
    let made = [
        ("tokenizer.json", serde_json::to_vec(&tokenizer)),
        ("tokenizer_config.json", serde_json::to_vec(&settings)),
        ("generation_config.json", serde_json::to_vec(&generation)),
    ];
    made.into_iter().map(|(name, json)| Ok((name.to_owned(), Sidecar::Made(json.map_err(|error| error.to_string())?)))).collect()
}

/// tokenizer.json, without a copy of what is large in it.
#[derive(Serialize)]
struct Made<'a> {
    version: &'static str,
    truncation: Option<()>,
    padding: Option<()>,
    added_tokens: Vec<Value>,
    normalizer: Option<Value>,
    pre_tokenizer: Option<Value>,
    post_processor: Option<Value>,
    decoder: Value,
    model: Bpe<'a>,
}

impl<'a> Made<'a> {
    /// Without steps before and after the model.
    fn of(vocabulary: &'a Vocabulary<'a>, merges: Vec<[&'a str; 2]>, decoder: Value) -> Self {
        Self {
            version: "1.0",
            truncation: None,
            padding: None,
            added_tokens: vocabulary.added(),
            normalizer: None,
            pre_tokenizer: None,
            post_processor: None,
            decoder,
            model: Bpe {
                r#type: "BPE",
                dropout: None,
                unk_token: None,
                continuing_subword_prefix: None,
                end_of_word_suffix: None,
                fuse_unk: false,
                byte_fallback: false,
                ignore_merges: false,
                vocab: vocabulary,
                merges,
            },
        }
    }
}

#[derive(Serialize)]
struct Bpe<'a> {
    r#type: &'static str,
    dropout: Option<f32>,
    unk_token: Option<&'a str>,
    continuing_subword_prefix: Option<&'a str>,
    end_of_word_suffix: Option<&'a str>,
    fuse_unk: bool,
    byte_fallback: bool,
    ignore_merges: bool,
    vocab: &'a Vocabulary<'a>,
    merges: Vec<[&'a str; 2]>,
}

/// Tokens with their kinds and the id of each.
struct Vocabulary<'a> {
    tokens: &'a [Cow<'a, str>],
    kinds: Vec<i64>,
    ids: HashMap<&'a str, usize>,
}

impl<'a> Vocabulary<'a> {
    fn of(tokens: &'a [Cow<'a, str>], gguf: &Gguf) -> Result<Self> {
        let kinds = gguf.array("tokenizer.ggml.token_type")?.and_then(|array| array.integers()).map(Iterator::collect);
        let kinds: Vec<i64> = kinds.unwrap_or_else(|| vec![1; tokens.len()]);
        if kinds.len() != tokens.len() {
            return Err(format!("metadata `tokenizer.ggml.token_type` has {} entries for {} tokens", kinds.len(), tokens.len()));
        }
        let mut ids = HashMap::with_capacity(tokens.len());
        for (id, token) in tokens.iter().enumerate() {
            // Of two tokens with one text, the first can be produced.
            ids.entry(&**token).or_insert(id);
        }
        Ok(Self { tokens, kinds, ids })
    }

    /// `added_tokens` of tokenizer.json: the tokens that are cut out of a text before it is split.
    fn added(&self) -> Vec<Value> {
        let kinds = self.kinds.iter().zip(self.tokens).enumerate();
        kinds
            .filter(|(_, (kind, _))| matches!(**kind, UNKNOWN | CONTROL | USER_DEFINED))
            .map(|(id, (kind, token))| {
                json!({
                    "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                    "special": *kind != USER_DEFINED,
                })
            })
            .collect()
    }
}

/// `vocab` of tokenizer.json, in the order of the ids.
impl Serialize for Vocabulary<'_> {
    fn serialize<S: Serializer>(&self, to: S) -> std::result::Result<S::Ok, S::Error> {
        let tokens = self.tokens.iter().enumerate().map(|(id, token)| (token, id));
        to.collect_map(tokens.filter(|(token, id)| self.ids.get(&***token) == Some(id)))
    }
}

/// How a kind of byte-level BPE splits a text, by its name in `tokenizer.ggml.pre`.
struct Splitting {
    /// Applied one after another.
    patterns: &'static [&'static str],
    /// Unicode NFC first.
    nfc: bool,
    /// A whole word that is a token is taken as it is.
    ignore_merges: bool,
    /// A text begins with the BOS token if the metadata does not say.
    bos: bool,
}

pub(crate) const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DIGIT: &str = r"\p{N}";

fn splitting(name: &str) -> Option<Splitting> {
    let plain = Splitting { patterns: &[], nfc: false, ignore_merges: false, bos: false };
    Some(match name {
        "gpt-2" | "phi-2" | "olmo" | "mpt" | "jais" => Splitting { patterns: &[GPT2], ..plain },
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone" | "minerva-7b" => {
            Splitting { patterns: &[DIGIT, GPT2], ..plain }
        }
        "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "falcon-h1" | "pixtral" | "midm-2.0" | "lfm2" => {
            Splitting { patterns: &[LLAMA3], ignore_merges: true, bos: true, ..plain }
        }
        "dbrx" | "smaug-bpe" | "chatglm-bpe" | "glm4" => Splitting { patterns: &[LLAMA3], ..plain },
        "qwen2" | "deepseek-r1-qwen" | "kormo" => Splitting { patterns: &[QWEN2], nfc: true, ..plain },
        "stablelm2" | "hunyuan" | "megrez" => Splitting { patterns: &[QWEN2], ..plain },
        "tekken" => Splitting { patterns: &[TEKKEN], ignore_merges: true, bos: true, ..plain },
        // What llama.cpp takes for files that name nothing.
        "default" => Splitting { patterns: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"], ..plain },
        _ => return None,
    })
}

/// The name of a way to split, where one is known for these patterns: the one that has these switches too, or else one that splits alike.
pub(crate) fn splitting_name(patterns: &[&str], nfc: bool, ignore_merges: bool) -> Option<&'static str> {
    let names = ["gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "stablelm2", "tekken"];
    let alike = |name: &str| splitting(name).filter(|splitting| splitting.patterns == patterns);
    let same = |name: &str| alike(name).is_some_and(|splitting| splitting.nfc == nfc && splitting.ignore_merges == ignore_merges);
    names.into_iter().find(|name| same(name)).or_else(|| names.into_iter().find(|name| alike(name).is_some()))
}

/// Byte-level BPE, and whether it begins with BOS by default.
fn byte_level<'a>(gguf: &Gguf, vocabulary: &'a Vocabulary<'_>) -> Result<(Made<'a>, bool)> {
    let name = gguf.text("tokenizer.ggml.pre")?.unwrap_or("default");
    let splitting = splitting(name).ok_or_else(|| {
        format!("`tokenizer.ggml.pre` is `{name}`, whose splitting pattern is not known here; use the model's Hugging Face directory")
    })?;
    let merges = gguf.strings("tokenizer.ggml.merges")?.map(|merge| merge_of(&merge, vocabulary)).collect::<Result<Vec<_>>>()?;
    let mut steps: Vec<Value> = splitting
        .patterns
        .iter()
        .map(|pattern| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false}))
        .collect();
    steps.push(json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}));
    let decoder = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    let mut tokenizer = Made::of(vocabulary, merges, decoder);
    tokenizer.normalizer = splitting.nfc.then(|| json!({"type": "NFC"}));
    tokenizer.pre_tokenizer = Some(json!({"type": "Sequence", "pretokenizers": steps}));
    tokenizer.model.ignore_merges = splitting.ignore_merges;
    Ok((tokenizer, splitting.bos))
}

/// `"a b"` as a pair, if both and what they make are tokens.
fn merge_of<'a>(merge: &str, vocabulary: &'a Vocabulary<'_>) -> Result<[&'a str; 2]> {
    let token = |token: &str| vocabulary.ids.get(token).map(|id| &*vocabulary.tokens[*id]);
    let pair = merge.split_once(' ').and_then(|(left, right)| {
        vocabulary.ids.get(&*[left, right].concat())?;
        Some([token(left)?, token(right)?])
    });
    pair.ok_or_else(|| format!("metadata `tokenizer.ggml.merges` has `{merge}`, which joins no two tokens to a third"))
}

/// `SentencePiece`'s BPE as tokenizers does it: spaces become `▁`, unknown characters become bytes.
fn sentence_piece<'a>(gguf: &Gguf, vocabulary: &'a Vocabulary<'_>) -> Result<Made<'a>> {
    let key = "tokenizer.ggml.scores";
    let scores = gguf.array(key)?.and_then(|array| array.floats()).ok_or_else(|| format!("metadata `{key}` is not a list of floats"))?;
    let scores: Vec<f32> = scores.collect();
    if scores.len() != vocabulary.tokens.len() {
        return Err(format!("metadata `{key}` has {} entries for {} tokens", scores.len(), vocabulary.tokens.len()));
    }
    let mut normalizers = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"})];
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if gguf.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true) {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": "\u{2581}"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let unknown = gguf.integer("tokenizer.ggml.unknown_token_id")?.and_then(|id| vocabulary.tokens.get(id));
    let mut tokenizer = Made::of(vocabulary, merges(vocabulary, &scores), json!({"type": "Sequence", "decoders": decoders}));
    tokenizer.normalizer = Some(json!({"type": "Sequence", "normalizers": normalizers}));
    (tokenizer.model.fuse_unk, tokenizer.model.byte_fallback) = (true, true);
    tokenizer.model.unk_token = unknown.map(|token| &**token);
    Ok(tokenizer)
}

/// Every way to join two pieces to a third, the better score first and then the pieces in the order of their ids: how transformers'
/// converter (`generate_merges`) gets merges from a vocabulary.
fn merges<'a>(vocabulary: &'a Vocabulary<'_>, scores: &[f32]) -> Vec<[&'a str; 2]> {
    let mut merges = Vec::new();
    for (id, piece) in vocabulary.tokens.iter().enumerate() {
        if matches!(vocabulary.kinds[id], UNKNOWN | CONTROL) || piece.len() > 4 * LONGEST_MERGE || vocabulary.ids.get(&**piece) != Some(&id)
        {
            continue;
        }
        for (at, _) in piece.char_indices().skip(1) {
            if let (Some(left), Some(right)) = (vocabulary.ids.get(&piece[..at]), vocabulary.ids.get(&piece[at..])) {
                merges.push((scores[id], *left, *right));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    merges.into_iter().map(|(_, left, right)| [left, right].map(|id| &*vocabulary.tokens[id])).collect()
}

/// Puts BOS before a text and EOS after it.
fn template([bos, eos]: [Option<(&usize, &Cow<'_, str>)>; 2]) -> Value {
    let sequence = |id: &str, kind: usize| {
        let mut parts = Vec::new();
        parts.extend(bos.map(|(_, token)| json!({"SpecialToken": {"id": token, "type_id": kind}})));
        parts.push(json!({"Sequence": {"id": id, "type_id": kind}}));
        parts.extend(eos.map(|(_, token)| json!({"SpecialToken": {"id": token, "type_id": kind}})));
        parts
    };
    let special =
        [bos, eos].into_iter().flatten().map(|(id, token)| (token.to_string(), json!({"id": token, "ids": [id], "tokens": [token]})));
    let pair = [sequence("A", 0), sequence("B", 1)].concat();
    json!({
        "type": "TemplateProcessing", "single": sequence("A", 0), "pair": pair,
        "special_tokens": special.collect::<Value>(),
    })
}
