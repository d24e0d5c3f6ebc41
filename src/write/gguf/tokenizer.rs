//! A Hugging Face tokenizer as GGUF metadata: the reverse of what reading a GGUF file does.
//!
//! Two kinds have a place in GGUF: byte-level BPE (`gpt2`), whose splitting pattern is stored by its name in llama.cpp, and the BPE of
//! `SentencePiece` (`llama`), whose merges become scores.

use std::collections::{BTreeMap, HashMap};

use serde_json::Value as Json;
use upcycle_architectures::Config;

use super::file::{Metadata, Value, size};
use crate::{
    engine::{
        template::ChatTemplate,
        tokenizer::{Specials, Tokenizer},
    },
    source::{Sidecar, gguf::splitting_name},
};

type Result<T> = std::result::Result<T, String>;

/// `llama_token_type`
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// The metadata of a model's tokenizer.
pub(super) fn metadata(sidecars: &BTreeMap<String, Sidecar>, config: &Config) -> Result<Metadata> {
    let tokenizer = Tokenizer::open(sidecars, config).map_err(|error| error.to_string())?;
    let bytes = sidecars.get("tokenizer.json").map(Sidecar::read).transpose().map_err(|error| error.to_string())?;
    let json: Json = serde_json::from_slice(&bytes.unwrap_or_default()).map_err(|error| format!("tokenizer.json: {error}"))?;
    let vocabulary = Vocabulary::read(&json, config.vocab)?;
    let mut out: Metadata = Vec::new();
    let mut set = |key: &str, value: Value| out.push((format!("tokenizer.{key}"), value));

    let byte_level = steps(&json["pre_tokenizer"]).iter().any(|step| step["type"] == "ByteLevel");
    let pieces = json["model"]["byte_fallback"] == true;
    if byte_level {
        set("ggml.model", Value::Text("gpt2".into()));
        set("ggml.pre", Value::Text(pre(&json)?.into()));
    } else if pieces {
        set("ggml.model", Value::Text("llama".into()));
        set("ggml.pre", Value::Text("default".into()));
        set("ggml.add_space_prefix", Value::Bool(space_prefix(&json)));
    } else {
        return Err("its tokenizer is neither byte-level BPE nor SentencePiece's BPE, which are all that GGUF files hold here".into());
    }
    let kinds = vocabulary.kinds(&json, pieces);
    set("ggml.tokens", Value::Texts(vocabulary.tokens.iter().enumerate().map(|(id, token)| token_text(id, token.as_deref())).collect()));
    set("ggml.token_type", Value::I32s(kinds));
    let merges = merges(&json)?;
    if byte_level {
        set("ggml.merges", Value::Texts(merges.iter().map(|[left, right]| format!("{left} {right}")).collect()));
    } else {
        set("ggml.scores", Value::F32s(vocabulary.scores(&merges)));
    }

    let special = |name: &str| tokenizer.special_tokens().get(name).and_then(|token| vocabulary.ids.get(token)).copied();
    let bos = special("bos_token").or(config.bos.map(|id| id as usize));
    let eos = special("eos_token").or(config.eos.first().map(|id| *id as usize));
    for (name, id) in [("bos", bos), ("eos", eos), ("unknown", special("unk_token")), ("padding", special("pad_token"))] {
        if let Some(id) = id.filter(|id| *id < config.vocab) {
            set(&format!("ggml.{name}_token_id"), size(id));
        }
    }
    // Whatever else ends a text: the ends of turns and messages.
    let others = tokenizer.eos().iter().map(|id| *id as usize).filter(|id| Some(*id) != eos && *id < config.vocab);
    for (name, id) in ["eot", "eom"].into_iter().zip(others) {
        set(&format!("ggml.{name}_token_id"), size(id));
    }
    let encode = |specials| tokenizer.encode("a", specials).map_err(|error| error.to_string());
    let (with, without) = (encode(Specials::Add)?, encode(Specials::Written)?);
    let is = |id: Option<&u32>, special: Option<usize>| id.is_some_and(|id| Some(*id as usize) == special);
    set("ggml.add_bos_token", Value::Bool(is(with.first(), bos) && with.first() != without.first()));
    set("ggml.add_eos_token", Value::Bool(is(with.last(), eos) && with.last() != without.last()));
    if let Some(template) = ChatTemplate::text(sidecars).map_err(|error| error.to_string())? {
        set("chat_template", Value::Text(template));
    }
    Ok(out)
}

fn token_text(id: usize, token: Option<&str>) -> String {
    token.map_or_else(|| format!("[PAD{id}]"), ToOwned::to_owned)
}

/// Tokens by id and ids by token.
struct Vocabulary {
    tokens: Vec<Option<String>>,
    ids: HashMap<String, usize>,
}

impl Vocabulary {
    fn read(json: &Json, size: usize) -> Result<Self> {
        let map = json["model"]["vocab"].as_object().ok_or("tokenizer.json: `model.vocab` is no object: the tokenizer is no BPE")?;
        let own = map.iter().map(|(token, id)| (token.as_str(), id));
        let added = added(json).map(|token| (token["content"].as_str().unwrap_or_default(), &token["id"]));
        let (mut tokens, mut ids) = (vec![None; size], HashMap::with_capacity(map.len()));
        for (token, id) in own.chain(added) {
            let id = id.as_u64().and_then(|id| usize::try_from(id).ok()).ok_or_else(|| format!("tokenizer.json: `{token}` has no id"))?;
            // Models with fewer embeddings than tokens never see the others.
            if let Some(slot) = tokens.get_mut(id) {
                *slot = Some(token.to_owned());
                ids.insert(token.to_owned(), id);
            }
        }
        Ok(Self { tokens, ids })
    }

    /// `llama_token_type` of each token.
    fn kinds(&self, json: &Json, pieces: bool) -> Vec<i32> {
        let mut kinds: Vec<i32> = self.tokens.iter().map(|token| if token.is_some() { NORMAL } else { UNUSED }).collect();
        let mut mark = |token: &str, kind: i32| {
            if let Some(id) = self.ids.get(token) {
                kinds[*id] = kind;
            }
        };
        if pieces {
            (0..=u8::MAX).for_each(|byte| mark(&format!("<0x{byte:02X}>"), BYTE));
        }
        for token in added(json) {
            let text = token["content"].as_str().unwrap_or_default();
            // As llama.cpp's converter has it: some models call their marks no special tokens.
            let special = token["special"] == true || text.starts_with("<|") && text.ends_with("|>");
            mark(text, if special { CONTROL } else { USER_DEFINED });
        }
        if let Some(unknown) = json["model"]["unk_token"].as_str().filter(|_| pieces) {
            mark(unknown, UNKNOWN);
        }
        kinds
    }

    /// A piece that is merged earlier has the better score; what no merge makes has the worst.
    fn scores(&self, merges: &[[String; 2]]) -> Vec<f32> {
        let mut scores = vec![-(merges.len() as f32); self.tokens.len()];
        for (rank, [left, right]) in merges.iter().enumerate().rev() {
            if let Some(id) = self.ids.get(&format!("{left}{right}")) {
                scores[*id] = -(rank as f32);
            }
        }
        scores
    }
}

fn added(json: &Json) -> impl Iterator<Item = &Json> {
    json["added_tokens"].as_array().into_iter().flatten()
}

/// Both spellings: `"a b"` and `["a", "b"]`.
fn merges(json: &Json) -> Result<Vec<[String; 2]>> {
    let all = json["model"]["merges"].as_array().ok_or("tokenizer.json: `model.merges` is no list: the tokenizer is no BPE")?;
    let pair = |merge: &Json| {
        let (left, right) = match merge {
            Json::String(text) => text.split_once(' ')?,
            other => (other[0].as_str()?, other[1].as_str()?),
        };
        Some([left.to_owned(), right.to_owned()])
    };
    all.iter().map(|merge| pair(merge).ok_or_else(|| format!("tokenizer.json: `{merge}` is no merge"))).collect()
}

/// The steps of a sequence, or the only one.
fn steps(json: &Json) -> Vec<&Json> {
    match json["pretokenizers"].as_array().or_else(|| json["normalizers"].as_array()) {
        Some(steps) => steps.iter().collect(),
        None => vec![json],
    }
}

/// llama.cpp's name for the way in which texts are split.
fn pre(json: &Json) -> Result<&'static str> {
    let mut patterns = Vec::new();
    for step in steps(&json["pre_tokenizer"]) {
        match step["type"].as_str() {
            Some("Split") => patterns.extend(step["pattern"]["Regex"].as_str()),
            Some("Digits") if step["individual_digits"] == true => patterns.push(r"\p{N}"),
            Some("ByteLevel") if step["use_regex"] == false => {}
            Some("ByteLevel") => patterns.push(crate::source::gguf::GPT2),
            other => return Err(format!("its tokenizer splits texts by `{}`, for which GGUF has no name", other.unwrap_or("nothing"))),
        }
    }
    let nfc = steps(&json["normalizer"]).iter().any(|step| step["type"] == "NFC");
    let ignore_merges = json["model"]["ignore_merges"] == true;
    splitting_name(&patterns, nfc, ignore_merges).ok_or_else(|| {
        format!("its tokenizer splits texts by a pattern for which no name of llama.cpp's is known here: {}", patterns.join("  "))
    })
}

/// Whether a text gets a space in front.
fn space_prefix(json: &Json) -> bool {
    let prepends = steps(&json["normalizer"]).iter().any(|step| step["type"] == "Prepend");
    let metaspace = |step: &&Json| step["type"] == "Metaspace" && step["prepend_scheme"] != "never" && step["add_prefix_space"] != false;
    prepends || steps(&json["pre_tokenizer"]).iter().any(metaspace)
}
