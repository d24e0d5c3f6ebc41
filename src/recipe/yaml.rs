//! YAML text to a tree of values that know where they stand. What the values mean is not known here.
//!
//! The parser refuses duplicate keys and bounds what anchors may expand to. A recipe is read through a tree, not straight into a struct,
//! so that every mistake in it can be shown at once and at its place.

use std::{fmt, ops::Range};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, SeqAccess, Visitor},
};
use serde_saphyr::{Location, Spanned};

/// A value and the bytes of the text that it was read from.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) value: Value,
    pub(super) span: Range<usize>,
}

#[derive(Debug)]
pub(super) enum Value {
    Null,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(String),
    List(Vec<Node>),
    Map(Vec<Entry>),
}

/// One `key: value`.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) key: String,
    pub(super) key_span: Range<usize>,
    pub(super) node: Node,
}

/// What every reading of a recipe allows.
pub(super) fn options() -> serde_saphyr::Options {
    serde_saphyr::options! {
        with_snippet: false,
        non_finite_float_policy: serde_saphyr::NonFiniteFloatPolicy::PassThrough,
        // Of a recipe's few keys none is worth repeating more often.
        alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: 10_000 },
    }
}

/// Reads one YAML document; an error is a message and where it belongs.
pub(super) fn parse(text: &str) -> Result<Node, (String, Range<usize>)> {
    let tree: Spanned<Tree> = serde_saphyr::from_str_with_options(text, options()).map_err(|error| {
        let mut message = error.render_with_formatter(&serde_saphyr::UserMessageFormatter);
        // The place is shown by the caret.
        message.truncate(message.rfind(" at line ").unwrap_or(message.len()));
        let span = error.location().map_or(0..0, |location| span(text, location));
        (message, span)
    })?;
    Ok(locate(text, tree))
}

/// What serde fills; [`locate`] turns its locations into byte ranges.
enum Tree {
    Leaf(Value),
    List(Vec<Spanned<Tree>>),
    Map(Vec<(Spanned<String>, Spanned<Tree>)>),
}

fn locate(text: &str, tree: Spanned<Tree>) -> Node {
    let own = span(text, tree.defined);
    match tree.value {
        Tree::Leaf(value) => Node { value, span: own },
        Tree::List(items) => {
            let items: Vec<_> = items.into_iter().map(|item| locate(text, item)).collect();
            let span = items.first().map_or(own, |first| first.span.clone());
            Node { value: Value::List(items), span }
        }
        Tree::Map(entries) => {
            let entries: Vec<_> = entries
                .into_iter()
                .map(|(key, value)| Entry { key_span: span(text, key.defined), key: key.value, node: locate(text, value) })
                .collect();
            let span = entries.first().map_or(own, |first| first.key_span.clone());
            Node { value: Value::Map(entries), span }
        }
    }
}

/// A location as a range of bytes that certainly lies in the text and on its character boundaries; white space at the end left out.
fn span(text: &str, location: Location) -> Range<usize> {
    let floor = |at: usize| (0..=at.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    let bytes = location.span().byte_offset().zip(location.span().byte_len());
    // Where the scanner gave up there is no span, only a line and a column.
    let (start, length) = bytes.map_or_else(|| (offset(text, location), 0), |(start, length)| (start as usize, length as usize));
    let (start, end) = (floor(start), floor(start.saturating_add(length)));
    start..start + text[start..end].trim_end().len()
}

fn offset(text: &str, location: Location) -> usize {
    let (line, column) = (location.line().max(1) as usize - 1, location.column().max(1) as usize - 1);
    let Some(line) = text.split_inclusive('\n').nth(line) else { return text.len() };
    let start = line.as_ptr() as usize - text.as_ptr() as usize;
    start + line.chars().take(column).map(char::len_utf8).sum::<usize>()
}

impl<'de> Deserialize<'de> for Tree {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TreeVisitor)
    }
}

struct TreeVisitor;

impl<'de> Visitor<'de> for TreeVisitor {
    type Value = Tree;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_unit<E>(self) -> Result<Tree, E> {
        Ok(Tree::Leaf(Value::Null))
    }

    fn visit_bool<E>(self, value: bool) -> Result<Tree, E> {
        Ok(Tree::Leaf(Value::Bool(value)))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Tree, E> {
        Ok(Tree::Leaf(Value::Int(value.into())))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Tree, E> {
        Ok(Tree::Leaf(Value::Int(value.into())))
    }

    fn visit_i128<E>(self, value: i128) -> Result<Tree, E> {
        Ok(Tree::Leaf(Value::Int(value)))
    }

    fn visit_u128<E: serde::de::Error>(self, value: u128) -> Result<Tree, E> {
        value.try_into().map(|value| Tree::Leaf(Value::Int(value))).map_err(|_| E::custom("this number is too large"))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Tree, E> {
        Ok(Tree::Leaf(Value::Float(value)))
    }

    fn visit_str<E>(self, value: &str) -> Result<Tree, E> {
        Ok(Tree::Leaf(Value::Text(value.to_owned())))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Tree, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = access.next_element()? {
            items.push(item);
        }
        Ok(Tree::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Tree, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = access.next_entry()? {
            entries.push(entry);
        }
        Ok(Tree::Map(entries))
    }
}
