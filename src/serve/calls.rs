//! Calls of tools in a text as it comes: which part of it is words, which a call, and which of a call its arguments.
//!
//! Families write calls in three ways ([`Format`]). Nothing is lost: what looked like a call and is none stays text.

use std::collections::BTreeSet;

/// How a family writes calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number: Hermes, Qwen, and whoever is told so
    Hermes,
    /// `[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`
    Mistral,
    /// `{"name": ..., "parameters": {...}}` and nothing else, perhaps behind `<|python_tag|>`, several with `;` between: Llama 3
    Llama,
}

impl Format {
    /// What stands in front of calls.
    pub(super) fn opening(self) -> &'static str {
        match self {
            Self::Hermes => "<tool_call>",
            Self::Mistral => "[TOOL_CALLS]",
            Self::Llama => "<|python_tag|>",
        }
    }

    /// What stands behind a call, if anything must.
    fn closing(self) -> &'static str {
        if self == Self::Hermes { "</tool_call>" } else { "" }
    }
}

/// Part of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Part {
    /// words
    Text(String),
    /// a call begins, the how-manieth from 0
    Call { index: usize, name: String },
    /// more of its arguments: JSON when they are put together
    Arguments { index: usize, piece: String },
}

/// Reads an answer piece by piece.
#[derive(Debug)]
pub(super) struct Calls {
    format: Format,
    /// names of tools; what has another is no call
    names: BTreeSet<String>,
    /// calls that have begun
    count: usize,
    /// what has been said before may be more than white space
    spoke: bool,
    place: Place,
    /// not told yet
    held: String,
}

#[derive(Debug)]
enum Place {
    /// among words
    Words,
    /// behind an opening or a call: another call, or the end of calls; what stood before `held`, in case it is neither
    Between(String),
    /// in the object of a call, which `held` begins with
    Inside(Scan),
}

impl Calls {
    pub(super) fn new(format: Format, names: BTreeSet<String>) -> Self {
        Self { format, names, count: 0, spoke: false, place: Place::Words, held: String::new() }
    }

    /// What stands in front of calls; where it is a special token, it must be part of the text that is read.
    pub(super) fn opening(&self) -> &'static str {
        self.format.opening()
    }

    /// Calls so far.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// Takes a piece of the text; what is certain comes back.
    pub(super) fn push(&mut self, piece: &str) -> Vec<Part> {
        self.held.push_str(piece);
        let mut parts = Vec::new();
        while self.step(&mut parts) {}
        parts
    }

    /// What is still held back, when no more comes.
    pub(super) fn finish(&mut self) -> Vec<Part> {
        let held = std::mem::take(&mut self.held);
        let text = match &self.place {
            Place::Words => held,
            Place::Between(before) => format!("{before}{held}"),
            // The call has begun for the client, who sees that its arguments are not whole.
            Place::Inside(scan) if scan.told.is_some() => return Vec::new(),
            Place::Inside(scan) => format!("{}{held}", scan.before),
        };
        // White space after the last call says nothing.
        if text.is_empty() || (self.count > 0 && text.trim().is_empty()) { Vec::new() } else { vec![Part::Text(text)] }
    }

    /// Goes on as far as it can in one place; false when it waits for more.
    fn step(&mut self, parts: &mut Vec<Part>) -> bool {
        match &mut self.place {
            Place::Words => self.words(parts),
            Place::Between(before) => {
                let rest = self.held.trim_start();
                let rest = rest.strip_prefix(['[', ',', ';']).unwrap_or(rest).trim_start();
                let skipped = self.held.len() - rest.len();
                if rest.starts_with('{') {
                    let before = std::mem::take(before) + &self.held[..skipped];
                    self.held.drain(..skipped);
                    self.place = Place::Inside(Scan { before, ..Scan::default() });
                    return true;
                }
                if self.format == Format::Mistral && self.count > 0 && rest.starts_with(']') {
                    self.held.drain(..=skipped);
                    self.place = Place::Words;
                    return true;
                }
                if rest.is_empty() {
                    return false;
                }
                let before = std::mem::take(before);
                self.no_call(before, parts);
                true
            }
            Place::Inside(scan) => {
                scan.read(&self.held);
                if !scan.tell(&self.held, &self.names, &mut self.count, parts) {
                    // The name is no tool's.
                    let before = std::mem::take(&mut scan.before);
                    self.no_call(before, parts);
                    return true;
                }
                let Some(end) = scan.end else { return false };
                let after = self.held[end..].trim_start();
                let closing = self.format.closing();
                if after.len() < closing.len() && closing.starts_with(after) {
                    return false;
                }
                self.held = after.strip_prefix(closing).unwrap_or(after).to_owned();
                self.place = if self.format == Format::Hermes { Place::Words } else { Place::Between(String::new()) };
                true
            }
        }
    }

    /// Tells words up to where a call may begin.
    fn words(&mut self, parts: &mut Vec<Part>) -> bool {
        let opening = self.format.opening();
        if let Some(at) = self.held.find(opening) {
            let after = self.held.split_off(at + opening.len());
            // White space between words and calls, or between calls, belongs to neither.
            self.told_words(self.held[..at].trim_end().len(), parts);
            self.place = Place::Between(std::mem::replace(&mut self.held, after));
            return true;
        }
        if self.format == Format::Llama && !self.spoke && self.held.trim_start().starts_with('{') {
            self.place = Place::Between(String::new());
            return true;
        }
        let may_begin = |&(at, _): &(usize, char)| opening.starts_with(&self.held[at..]);
        let safe = self.held.char_indices().find(may_begin).map_or(self.held.len(), |(at, _)| at);
        // White space waits for what comes after it.
        let safe = self.held[..safe].trim_end().len();
        self.told_words(safe, parts);
        false
    }

    /// What looked like a call is none: what stood before `held` are words, and `held` may be.
    fn no_call(&mut self, before: String, parts: &mut Vec<Part>) {
        if !before.is_empty() {
            parts.push(Part::Text(before));
        }
        self.spoke = true;
        self.place = Place::Words;
    }

    fn told_words(&mut self, len: usize, parts: &mut Vec<Part>) {
        if len > 0 {
            let rest = self.held.split_off(len);
            parts.push(Part::Text(std::mem::replace(&mut self.held, rest)));
            self.spoke = true;
        }
    }
}

/// How far the object of a call has been read.
#[derive(Debug, Default)]
struct Scan {
    /// what stood before it, in case it is no call
    before: String,
    /// bytes that have been read
    at: usize,
    depth: usize,
    in_string: bool,
    escaped: bool,
    /// the key or value at depth 1 that is being read, from its first byte on
    start: Option<usize>,
    key: Option<String>,
    name: Option<String>,
    /// where the arguments lie, the end as far as it is known
    arguments: Option<(usize, Option<usize>)>,
    /// of the object
    end: Option<usize>,
    /// which call it is, and up to where its arguments have been told
    told: Option<(usize, usize)>,
}

impl Scan {
    fn read(&mut self, text: &str) {
        for (offset, c) in text[self.at..].char_indices() {
            if self.end.is_some() {
                return;
            }
            let at = self.at + offset;
            if self.in_string {
                match c {
                    _ if self.escaped => self.escaped = false,
                    '\\' => self.escaped = true,
                    '"' => self.in_string = false,
                    _ => {}
                }
                continue;
            }
            let closes = matches!(c, '}' | ']');
            if self.depth == 1 && (matches!(c, ':' | ',') || closes) {
                self.border(c, &text[..at]);
            } else if self.depth == 1 && !c.is_whitespace() && self.start.is_none() {
                self.start = Some(at);
                if self.is_arguments() {
                    self.arguments = Some((at, None));
                }
            }
            match c {
                '"' => self.in_string = true,
                '{' | '[' => self.depth += 1,
                '}' | ']' => {
                    self.depth = self.depth.saturating_sub(1);
                    if self.depth == 0 {
                        self.end = Some(at + 1);
                    }
                }
                _ => {}
            }
        }
        self.at = text.len();
    }

    fn is_arguments(&self) -> bool {
        matches!(self.key.as_deref(), Some("arguments" | "parameters"))
    }

    /// A key or value at depth 1 has ended with `before`.
    fn border(&mut self, c: char, before: &str) {
        let whole = self.start.take().map(|start| (start, before.trim_end()));
        let string = || whole.and_then(|(start, before)| serde_json::from_str::<String>(before.get(start..)?).ok());
        if c == ':' {
            self.key = string();
            return;
        }
        if self.key.as_deref() == Some("name") {
            self.name = string();
        } else if self.is_arguments()
            && let Some((start, before)) = whole
        {
            self.arguments = Some((start, Some(before.len())));
        }
        self.key = None;
    }

    /// Tells what is certain of the call; false if it is none.
    fn tell(&mut self, text: &str, names: &BTreeSet<String>, count: &mut usize, parts: &mut Vec<Part>) -> bool {
        let Some(name) = &self.name else { return self.end.is_none() };
        if !names.contains(name) {
            return false;
        }
        if self.told.is_none() && (self.arguments.is_some() || self.end.is_some()) {
            parts.push(Part::Call { index: *count, name: name.clone() });
            self.told = Some((*count, self.arguments.map_or(0, |(start, _)| start)));
            *count += 1;
        }
        let Some((index, told)) = &mut self.told else { return true };
        let mut tell = |piece: &str| {
            if !piece.is_empty() {
                parts.push(Part::Arguments { index: *index, piece: piece.to_owned() });
            }
        };
        match self.arguments {
            None if *told == 0 => {
                tell("{}");
                *told = text.len();
            }
            None => {}
            // Written as a string: what it holds is told when it is whole.
            Some((start, end)) if text[start..].starts_with('"') => {
                if let Some(end) = end.filter(|_| *told == start) {
                    tell(&serde_json::from_str::<String>(&text[start..end]).unwrap_or_default());
                    *told = end;
                }
            }
            Some((_, end)) => {
                // White space before the end of the object is not theirs.
                let certain = end.unwrap_or_else(|| text.trim_end().len()).max(*told);
                tell(&text[*told..certain]);
                *told = certain;
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(format: Format, pieces: &[&str]) -> (String, Vec<(String, String)>) {
        let mut calls = Calls::new(format, ["f", "g"].map(str::to_owned).into());
        let mut parts: Vec<Part> = pieces.iter().flat_map(|piece| calls.push(piece)).collect();
        parts.extend(calls.finish());
        let (mut text, mut all) = (String::new(), Vec::<(String, String)>::new());
        for part in parts {
            match part {
                Part::Text(words) => text += &words,
                Part::Call { index, name } => {
                    assert_eq!(index, all.len());
                    all.push((name, String::new()));
                }
                Part::Arguments { index, piece } => all[index].1 += &piece,
            }
        }
        assert_eq!(calls.count(), all.len());
        (text, all)
    }

    fn call(name: &str, arguments: &str) -> (String, String) {
        (name.to_owned(), arguments.to_owned())
    }

    const TEXTS: [(Format, &str, &str, &[(&str, &str)]); 17] = [
        (Format::Hermes, "Well <tool_call>", "Well <tool_call>", &[]),
        (Format::Hermes, "<tool_call>no <tool_call>{\"name\": \"f\"}</tool_call>", "<tool_call>no", &[("f", "{}")]),
        (Format::Mistral, "[TOOL_CALLS] [{\"name\": \"h\"}]", "[TOOL_CALLS] [{\"name\": \"h\"}]", &[]),
        (Format::Hermes, "Hello, <b>you</b>.", "Hello, <b>you</b>.", &[]),
        (
            Format::Hermes,
            "Let me see.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"}{\\\"\", \"b\": [1, {}]}}\n</tool_call>\n<tool_call>\n{\"name\": \"g\", \"arguments\": {} }\n</tool_call>",
            "Let me see.",
            &[("f", "{\"a\": \"}{\\\"\", \"b\": [1, {}]}"), ("g", "{}")],
        ),
        (Format::Hermes, "<tool_call>{\"arguments\": {\"x\": 1}, \"name\": \"f\"}</tool_call>", "", &[("f", "{\"x\": 1}")]),
        (Format::Hermes, "<tool_call>{\"name\": \"f\"}</tool_call>", "", &[("f", "{}")]),
        (Format::Hermes, "<tool_call>{\"name\": \"f\", \"arguments\": \"{\\\"x\\\": 1}\"}</tool_call>", "", &[("f", "{\"x\": 1}")]),
        (
            Format::Hermes,
            "<tool_call>{\"name\": \"h\", \"arguments\": {}}</tool_call>",
            "<tool_call>{\"name\": \"h\", \"arguments\": {}}</tool_call>",
            &[],
        ),
        (Format::Hermes, "<tool_call>no", "<tool_call>no", &[]),
        (Format::Hermes, "<tool_call>{\"name\": \"f\", \"arg", "<tool_call>{\"name\": \"f\", \"arg", &[]),
        (
            Format::Mistral,
            "[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {\"x\": 1}}, {\"name\": \"g\", \"arguments\": {}}]",
            "",
            &[("f", "{\"x\": 1}"), ("g", "{}")],
        ),
        (Format::Mistral, "[TOOL", "[TOOL", &[]),
        (Format::Llama, "{\"name\": \"f\", \"parameters\": {\"x\": 1}}", "", &[("f", "{\"x\": 1}")]),
        (
            Format::Llama,
            "<|python_tag|>{\"name\": \"f\", \"parameters\": {}}; {\"name\": \"g\", \"parameters\": {}}",
            "",
            &[("f", "{}"), ("g", "{}")],
        ),
        (Format::Llama, "{\"answer\": 42}", "{\"answer\": 42}", &[]),
        (Format::Llama, "Look: {\"name\": \"f\"}", "Look: {\"name\": \"f\"}", &[]),
    ];

    #[test]
    fn calls_are_told_from_words() {
        for (format, text, words, expected) in TEXTS {
            let expected: Vec<_> = expected.iter().map(|(name, arguments)| call(name, arguments)).collect();
            assert_eq!(read(format, &[text]), (words.to_owned(), expected), "{text}");
        }
    }

    #[test]
    fn arguments_come_as_they_are_written() {
        let mut calls = Calls::new(Format::Hermes, BTreeSet::from(["f".to_owned()]));
        assert_eq!(calls.push("<tool_call>{\"name\": \"f\", \"arguments\": "), []);
        let first = [Part::Call { index: 0, name: "f".into() }, Part::Arguments { index: 0, piece: "{\"x\":".into() }];
        assert_eq!(calls.push("{\"x\": "), first);
        assert_eq!(calls.push("1"), [Part::Arguments { index: 0, piece: " 1".into() }]);
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(which in 0..TEXTS.len(), cuts in prop::collection::vec(0usize..200, 0..6)) {
            let (format, text, ..) = TEXTS[which];
            let mut cuts: Vec<usize> = cuts.into_iter().filter(|cut| text.is_char_boundary(*cut)).chain([0, text.len()]).collect();
            cuts.sort_unstable();
            let pieces: Vec<&str> = cuts.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect();
            prop_assert_eq!(read(format, &pieces), read(format, &[text]));
        }

        #[test]
        fn any_text_is_read(pieces in prop::collection::vec("(<tool_call>|</tool_call>|\\{|\\}|\"name\": \"f\"|, |\"arguments\": |\\[|\\]|\\PC){0,6}", 0..8)) {
            for format in [Format::Hermes, Format::Mistral, Format::Llama] {
                let (text, calls) = read(format, &pieces.iter().map(String::as_str).collect::<Vec<_>>());
                prop_assert!(!calls.is_empty() || text.trim_end() == pieces.concat().trim_end(), "{:?}: {}", format, text);
            }
        }
    }
}
