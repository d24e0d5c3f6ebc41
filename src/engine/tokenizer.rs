//! Text to tokens and back, one token at a time, with the special tokens that a model starts and stops at.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    sync::Arc,
};

use serde_json::Value;
use upcycle_architectures::Config;

use super::sidecars::{SidecarError, bytes, invalid, json};
use crate::source::Sidecar;

/// Prompt tokens before the first generated one that its text may depend on (a leading space is kept only behind other text).
const CONTEXT: usize = 6;

/// Tokens that may wait for the rest of a character. The longest character has four bytes; beyond this they are not UTF-8,
/// and only what may still be the start of a character waits.
const MAX_HELD: usize = 8;

/// A model's tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    special: BTreeMap<String, String>,
    bos: Option<u32>,
    eos: BTreeSet<u32>,
    spelling: Option<Spelling>,
}

/// How a vocabulary spells the bytes of its tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spelling {
    /// a character for each byte
    ByteLevel,
    /// spaces are marked, and single bytes have numbers
    Marked,
}

/// Whether the special tokens that start a text are added or stand in it already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Specials {
    /// Plain text: the tokenizer adds what it adds (a BOS that the text begins with is not doubled).
    Add,
    /// A rendered chat template: everything is written out.
    Written,
}

/// What a token adds to a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// these bytes, which need not be whole characters
    Bytes(Vec<u8>),
    /// nothing: it is a mark of the model's own, written like this
    Special(String),
}

/// Why text or tokens could not be converted.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// A file could not be used.
    #[error(transparent)]
    Sidecar(#[from] SidecarError),
    /// There is no `tokenizer.json`.
    #[error("the model has no tokenizer.json (convert its tokenizer with `AutoTokenizer.from_pretrained(...).save_pretrained(...)`)")]
    Missing,
    /// The tokenizer refuses its input.
    #[error("the tokenizer: {0}")]
    Tokenizer(tokenizers::Error),
}

/// The tokenizers crate unwraps some of its own errors: what it panics at is an error here, and JSON that is none does not get so far.
fn parse(data: &[u8]) -> Result<tokenizers::Tokenizer, String> {
    serde_json::from_slice::<serde::de::IgnoredAny>(data).map_err(|error| error.to_string())?;
    let parsed = std::panic::catch_unwind(|| tokenizers::Tokenizer::from_bytes(data));
    parsed.map_err(|_| "one of its parts is malformed".to_owned())?.map_err(|error| error.to_string())
}

impl Tokenizer {
    /// Reads `tokenizer.json`; its special tokens come from `tokenizer_config.json` and `special_tokens_map.json`, and the tokens that end
    /// a text from those, from `config` and from `generation_config.json` together.
    pub fn open(sidecars: &BTreeMap<String, Sidecar>, config: &Config) -> Result<Self, TokenizerError> {
        let data = bytes(sidecars, "tokenizer.json")?.ok_or(TokenizerError::Missing)?;
        let mut inner = parse(&data).map_err(|error| invalid(sidecars, "tokenizer.json", error))?;
        // Settings of the training run that must not touch a prompt.
        inner.with_truncation(None).map_err(TokenizerError::Tokenizer)?.with_padding(None);

        let mut special = BTreeMap::new();
        for file in ["special_tokens_map.json", "tokenizer_config.json"] {
            special.extend(json(sidecars, file)?.iter().flat_map(special_tokens));
        }
        let id = |name: &str| special.get(name).and_then(|token| inner.token_to_id(token));
        let generation = json(sidecars, "generation_config.json")?.unwrap_or_default();
        let eos = config.eos.iter().copied().chain(id("eos_token")).chain(ids(&generation["eos_token_id"])).collect();
        let bos = id("bos_token").or(config.bos);
        let decoder = inner.get_decoder().and_then(|decoder| serde_json::to_value(decoder).ok()).unwrap_or_default();
        let spelling = if decodes(&decoder, "ByteLevel") {
            Some(Spelling::ByteLevel)
        } else if decodes(&decoder, "Metaspace") || decodes(&decoder, "ByteFallback") {
            Some(Spelling::Marked)
        } else {
            None
        };
        Ok(Self { inner, special, bos, eos, spelling })
    }

    /// The special tokens by name: `bos_token`, `eos_token` ...
    pub fn special_tokens(&self) -> &BTreeMap<String, String> {
        &self.special
    }

    /// The tokens that end a text.
    pub fn eos(&self) -> &BTreeSet<u32> {
        &self.eos
    }

    /// The token called BOS, whether or not texts start with it.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Whether the token ends a text.
    pub fn is_eos(&self, token: u32) -> bool {
        self.eos.contains(&token)
    }

    /// A text's tokens.
    pub fn encode(&self, text: &str, specials: Specials) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.inner.encode_fast(text, specials == Specials::Add).map_err(TokenizerError::Tokenizer)?;
        let ids = encoding.get_ids();
        let doubled = specials == Specials::Add && matches!((ids, self.bos), ([a, b, ..], Some(bos)) if *a == bos && *b == bos);
        Ok(ids[usize::from(doubled)..].to_vec())
    }

    /// The tokens of a text in which special tokens are written out, each with the bytes of the text that it stands for. A token of nothing
    /// but white space may be given none, behind it.
    pub fn encode_with_offsets(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>, TokenizerError> {
        let encoding = self.inner.encode(text, false).map_err(TokenizerError::Tokenizer)?;
        Ok(encoding.get_ids().iter().copied().zip(encoding.get_offsets().iter().map(|&(start, end)| start..end)).collect())
    }

    /// The token that is put in front of plain text, if there is one.
    pub fn prefix(&self) -> Result<Option<u32>, TokenizerError> {
        let first = |specials| self.encode("a", specials).map(|tokens| tokens.first().copied());
        let added = first(Specials::Add)?;
        Ok(added.filter(|_| first(Specials::Written).is_ok_and(|plain| plain != added)))
    }

    /// Whether the token is a mark of the model's own rather than text.
    pub fn is_special(&self, token: u32) -> bool {
        let added = self.inner.get_added_vocabulary();
        added.simple_id_to_token(token).is_some_and(|text| added.is_special_token(&text))
    }

    /// What each of the first `vocab` tokens adds to a text, byte for byte; nothing for ids that the tokenizer does not know. `None` if tokens
    /// have no bytes of their own, as where a decoder puts spaces between them.
    pub fn pieces(&self, vocab: usize) -> Option<Vec<Option<Piece>>> {
        self.spelling.map(|spelling| (0..vocab as u32).map(|id| self.piece(id, spelling)).collect())
    }

    fn piece(&self, id: u32, spelling: Spelling) -> Option<Piece> {
        let added = self.inner.get_added_vocabulary();
        if let Some(text) = added.simple_id_to_token(id) {
            return Some(if added.is_special_token(&text) { Piece::Special(text) } else { Piece::Bytes(text.into_bytes()) });
        }
        let token = self.inner.id_to_token(id)?;
        Some(Piece::Bytes(match spelling {
            Spelling::ByteLevel => token.chars().map(byte_of).collect::<Option<_>>()?,
            Spelling::Marked => fallback(&token),
        }))
    }

    /// The bytes that a token stands for, special ones as they are written. One that has no bytes of its own is what it is when it stands alone.
    pub fn written(&self, id: u32) -> Vec<u8> {
        match self.spelling.and_then(|spelling| self.piece(id, spelling)) {
            Some(Piece::Bytes(bytes)) => bytes,
            Some(Piece::Special(text)) => text.into_bytes(),
            None => self.inner.decode(&[id], false).unwrap_or_default().into_bytes(),
        }
    }

    /// The special token that is written like this.
    pub fn special(&self, text: &str) -> Option<u32> {
        self.inner.token_to_id(text).filter(|&id| self.is_special(id))
    }

    /// The tokens' text, special tokens as they are written.
    pub fn spell(&self, tokens: &[u32]) -> Result<String, TokenizerError> {
        self.inner.decode(tokens, false).map_err(TokenizerError::Tokenizer)
    }

    /// The tokens' text without special tokens. Tokens that the tokenizer does not know (a padded vocabulary) have none.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, TokenizerError> {
        self.inner.decode(tokens, true).map_err(TokenizerError::Tokenizer)
    }
}

/// Whether a decoder, or one of those that it consists of, is of this type.
fn decodes(decoder: &Value, kind: &str) -> bool {
    decoder["type"] == kind || decoder["decoders"].as_array().is_some_and(|all| all.iter().any(|decoder| decodes(decoder, kind)))
}

/// The byte that a character of a byte-level vocabulary stands for: itself where it is printable, else the next one from 256 on.
fn byte_of(c: char) -> Option<u8> {
    let printable = |byte: &u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    match u32::from(c) {
        code @ 0..256 => Some(code as u8).filter(printable),
        code => (0..=255).filter(|byte| !printable(byte)).nth(code as usize - 256),
    }
}

/// The bytes of a token in a vocabulary that marks spaces as `▁` and has single bytes as `<0x0A>`.
fn fallback(token: &str) -> Vec<u8> {
    let byte = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>')).filter(|digits| digits.len() == 2);
    match byte.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
        Some(byte) => vec![byte],
        None => token.replace('▁', " ").into_bytes(),
    }
}

fn special_tokens(config: &Value) -> Vec<(String, String)> {
    let Some(entries) = config.as_object() else { return Vec::new() };
    let named = entries.iter().filter(|(name, _)| name.ends_with("_token"));
    named.filter_map(|(name, value)| Some((name.clone(), value.as_str().or(value["content"].as_str())?.to_owned()))).collect()
}

/// One id or a list of them.
fn ids(value: &Value) -> Vec<u32> {
    let all = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
    all.iter().filter_map(Value::as_u64).filter_map(|id| u32::try_from(id).ok()).collect()
}

/// Generated tokens to text as they come: never half a character, and put together the same text as decoding them at once.
#[derive(Debug)]
pub struct TextStream {
    tokenizer: Arc<Tokenizer>,
    /// tokens whose text is out and on which the next one's may depend, then those held back
    tokens: Vec<u32>,
    /// how many of them are out
    out: usize,
    /// their text
    text: String,
}

impl TextStream {
    /// A stream of the text that follows `prompt`.
    pub fn new(tokenizer: Arc<Tokenizer>, prompt: &[u32]) -> Result<Self, TokenizerError> {
        let tokens = prompt[prompt.len().saturating_sub(CONTEXT)..].to_vec();
        let text = tokenizer.decode(&tokens)?;
        Ok(Self { tokenizer, out: tokens.len(), tokens, text })
    }

    /// Takes a token; returns the text that is complete with it, which may be empty.
    pub fn push(&mut self, token: u32) -> Result<String, TokenizerError> {
        self.tokens.push(token);
        let text = self.tokenizer.decode(&self.tokens)?;
        // Up to three bytes of a character that is not complete show as so many replacement characters.
        let open = text.chars().rev().take(3).take_while(|c| *c == char::REPLACEMENT_CHARACTER).count();
        if open > 0 && self.tokens.len() - self.out < MAX_HELD {
            return Ok(String::new());
        }
        let complete = &text[..text.len() - open * char::REPLACEMENT_CHARACTER.len_utf8()];
        let new = beyond(&self.text, complete).to_owned();
        if open > 0 {
            self.text.push_str(&new);
        } else if new.is_empty() {
            // A special token has no text: what stands before it stays the context of the next one.
            self.out = self.tokens.len();
        } else {
            self.tokens.drain(..self.out);
            self.out = self.tokens.len();
            self.text = self.tokenizer.decode(&self.tokens)?;
        }
        Ok(new)
    }

    /// The text of what is still held back.
    pub fn rest(&self) -> Result<String, TokenizerError> {
        let text = self.tokenizer.decode(&self.tokens)?;
        Ok(beyond(&self.text, &text).to_owned())
    }
}

/// What `text` has after the part that it shares with `before`.
fn beyond<'a>(before: &str, text: &'a str) -> &'a str {
    let shared = before.chars().zip(text.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
    &text[shared..]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    /// Byte-level without merges: every byte is a token (256 of them), then `<s>` 256, `</s>` 257, `<turn>` 258.
    fn byte_level(extra: &[(&str, Value)]) -> Arc<Tokenizer> {
        let printable = |b: u32| (33..=126).contains(&b) || (161..=172).contains(&b) || (174..=255).contains(&b);
        let mut shifted = 256..;
        let mut vocab = serde_json::Map::new();
        for byte in 0..256 {
            let code = if printable(byte) { byte } else { shifted.next().unwrap() };
            vocab.insert(char::from_u32(code).unwrap().to_string(), byte.into());
        }
        let special = |id: u32, content: &str| json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
        let post = json!({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [256], "tokens": ["<s>"]}}});
        let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        let tokenizer = json!({
            "version": "1.0", "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}, "padding": null,
            "added_tokens": [special(256, "<s>"), special(257, "</s>"), special(258, "<turn>")],
            "normalizer": null, "pre_tokenizer": byte_level, "post_processor": post, "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
        });
        open(&tokenizer, extra)
    }

    /// As Llama 2's: `▁` marks a space, which the decoder strips at the start of a text.
    fn metaspace() -> Arc<Tokenizer> {
        let special = json!({"id": 0, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [special], "normalizer": null, "pre_tokenizer": null, "post_processor": null,
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "vocab": {"<s>": 0, "▁Hello": 1, "▁world": 2, "<0xC3>": 3, "<0xA9>": 4}, "merges": [], "byte_fallback": true},
        });
        open(&tokenizer, &[])
    }

    fn open(tokenizer: &Value, extra: &[(&str, Value)]) -> Arc<Tokenizer> {
        let mut sidecars = BTreeMap::from([("tokenizer.json".to_owned(), Sidecar::Made(tokenizer.to_string().into_bytes()))]);
        sidecars.extend(extra.iter().map(|(name, value)| ((*name).to_owned(), Sidecar::Made(value.to_string().into_bytes()))));
        Arc::new(Tokenizer::open(&sidecars, &config()).unwrap())
    }

    fn config() -> Config {
        use upcycle_architectures::config::{Activation, Rope, RopeScaling};
        Config {
            model_type: "llama".into(),
            hidden: 8,
            layers: 1,
            heads: 1,
            kv_heads: 1,
            head_dim: 8,
            ffn: 8,
            vocab: 300,
            norm_eps: 1e-5,
            activation: Activation::Silu,
            rope: Rope { theta: 1e4, partial: 1.0, scaling: RopeScaling::Default },
            max_positions: 64,
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            qk_norm: false,
            tied: true,
            windows: vec![None],
            moe: None,
            dtype: None,
            bos: Some(256),
            eos: vec![7],
        }
    }

    fn stream(tokenizer: &Arc<Tokenizer>, prompt: &[u32], tokens: &[u32]) -> Vec<String> {
        let mut stream = TextStream::new(tokenizer.clone(), prompt).unwrap();
        let mut pieces: Vec<String> = tokens.iter().map(|&token| stream.push(token).unwrap()).collect();
        pieces.push(stream.rest().unwrap());
        pieces
    }

    #[test]
    fn characters_come_whole() {
        let tokenizer = byte_level(&[]);
        let bytes: Vec<u32> = "aé€😀".bytes().map(u32::from).collect();
        assert_eq!(stream(&tokenizer, &[256], &bytes), ["a", "", "é", "", "", "€", "", "", "", "😀", ""]);
        assert_eq!(stream(&tokenizer, &[], &bytes[..2]).concat(), "a\u{fffd}", "half a character at the end is shown as such");
    }

    #[test]
    fn bytes_that_are_no_text_are_not_held_for_ever() {
        let pieces = stream(&byte_level(&[]), &[], &[0xff; 20]);
        assert!(pieces[..20].iter().any(|piece| !piece.is_empty()), "{pieces:?}");
        assert_eq!(pieces.concat().chars().count(), 20);
    }

    #[test]
    fn a_leading_space_is_kept_behind_text_and_special_tokens() {
        let tokenizer = metaspace();
        assert_eq!(stream(&tokenizer, &[0, 1], &[2, 0, 1, 3, 4]).concat(), " world Helloé");
        assert_eq!(stream(&tokenizer, &[0], &[1, 2]).concat(), "Hello world");
    }

    #[test]
    fn tokens_have_the_bytes_of_their_text() {
        let pieces = byte_level(&[]).pieces(300).unwrap();
        for byte in 0..=255u8 {
            assert_eq!(pieces[usize::from(byte)], Some(Piece::Bytes(vec![byte])));
        }
        assert_eq!(pieces[256], Some(Piece::Special("<s>".into())));
        assert_eq!(pieces[299], None);
        let pieces = metaspace().pieces(5).unwrap();
        assert_eq!(
            pieces[1..4],
            [" Hello", " world"]
                .map(|text| Some(Piece::Bytes(text.into())))
                .into_iter()
                .chain([Some(Piece::Bytes(vec![0xc3]))])
                .collect::<Vec<_>>()[..]
        );
    }

    #[test]
    fn bos_is_added_once_and_truncation_is_off() {
        let tokenizer = byte_level(&[("tokenizer_config.json", json!({"bos_token": {"content": "<s>"}}))]);
        assert_eq!(tokenizer.encode("ab cde", Specials::Add).unwrap(), [256, 97, 98, 32, 99, 100, 101]);
        assert_eq!(tokenizer.encode("<s>a", Specials::Add).unwrap(), [256, 97]);
        assert_eq!(tokenizer.encode("<s>a<turn>", Specials::Written).unwrap(), [256, 97, 258]);
        assert_eq!(tokenizer.encode("a", Specials::Written).unwrap(), [97]);
        assert_eq!(tokenizer.prefix().unwrap(), Some(256));
        assert_eq!(metaspace().prefix().unwrap(), None);
    }

    #[test]
    fn texts_end_at_every_eos_of_every_file() {
        let tokenizer = byte_level(&[
            ("generation_config.json", json!({"eos_token_id": [8, 9]})),
            ("tokenizer_config.json", json!({"eos_token": "</s>", "pad_token": null})),
        ]);
        assert_eq!(tokenizer.eos(), &BTreeSet::from([7, 8, 9, 257]));
        assert_eq!(tokenizer.special_tokens(), &BTreeMap::from([("eos_token".to_owned(), "</s>".to_owned())]));
        assert!(byte_level(&[("generation_config.json", json!({"eos_token_id": 5}))]).eos().contains(&5));
    }

    #[test]
    fn unknown_tokens_have_no_text_and_missing_files_are_named() {
        assert_eq!(byte_level(&[]).decode(&[97, 299, 98]).unwrap(), "ab");
        let error = Tokenizer::open(&BTreeMap::new(), &config()).unwrap_err();
        assert!(matches!(error, TokenizerError::Missing));
        let broken = BTreeMap::from([("tokenizer.json".to_owned(), Sidecar::Made(b"{}".to_vec()))]);
        assert!(Tokenizer::open(&broken, &config()).unwrap_err().to_string().starts_with("tokenizer.json: "));
    }

    proptest! {
        #[test]
        fn streaming_gives_the_text_of_decoding_at_once(text in "\\PC{0,24}", specials in prop::collection::vec((0usize..40, 256u32..259), 0..4)) {
            let tokenizer = byte_level(&[]);
            let mut tokens: Vec<u32> = text.bytes().map(u32::from).collect();
            // A special token between two bytes of one character would split it for any decoder: put them at character borders.
            for (at, special) in specials {
                let border = text.char_indices().map(|(i, _)| i).nth(at).unwrap_or(text.len());
                if tokens.len() == text.len() {
                    tokens.insert(border, special);
                }
            }
            prop_assert_eq!(stream(&tokenizer, &[256], &tokens).concat(), tokenizer.decode(&tokens).unwrap());
        }
    }
}
