//! The licence that a model's card names, as the Hub spells it (`apache-2.0`, `cc-by-nc-4.0`, `llama3.1`), and which of them do not go together.
//!
//! This is a look at names, not legal advice: a card without a licence is passed over, and no licence's text is read.

use std::io::Read as _;

use serde_json::{Map, Value};

use super::Source;

/// Bytes of a card that are looked at: the licence stands in its front matter.
const FRONT: u64 = 64 << 10;

/// What the front matter of the model's `README.md` says; `None` if it says nothing.
pub fn licence(source: &Source) -> Option<String> {
    let mut text = Vec::new();
    fs_err::File::open(source.location.join("README.md")).ok()?.take(FRONT).read_to_end(&mut text).ok()?;
    front_matter(&String::from_utf8_lossy(&text))
}

fn front_matter(card: &str) -> Option<String> {
    let rest = card.trim_start_matches('\u{feff}').strip_prefix("---")?;
    let (yaml, _) = rest.split_once("\n---")?;
    let card: Map<String, Value> = serde_saphyr::from_str(yaml).ok()?;
    let text =
        |key: &str| card.get(key).and_then(Value::as_str).map(|text| text.trim().to_ascii_lowercase()).filter(|text| !text.is_empty());
    match text("license")?.as_str() {
        "other" => text("license_name"),
        "unknown" => None,
        named => Some(named.to_owned()),
    }
}

/// Whether what is made of the work must have the same licence.
fn passes_itself_on(licence: &str) -> bool {
    ["gpl", "agpl", "cc-by-sa", "cc-by-nc-sa", "odbl", "osl"].iter().any(|prefix| licence.starts_with(prefix))
}

/// Whether a licence asks for no more than that its text comes along.
fn permissive(licence: &str) -> bool {
    let prefixes =
        ["apache", "mit", "bsd", "isc", "cc0", "unlicense", "cc-by-2", "cc-by-3", "cc-by-4", "zlib", "bsl-1", "cdla-permissive", "wtfpl"];
    prefixes.iter().any(|prefix| licence.starts_with(prefix))
}

/// Why one work cannot be under both licences; `None` if nothing is known against it.
pub fn conflict(a: &str, b: &str) -> Option<&'static str> {
    if [a, b].iter().any(|licence| licence.contains("-nd")) {
        return Some("it allows no derived works");
    }
    let alone = |a: &str, b: &str| passes_itself_on(a) && a != b && !permissive(b);
    (alone(a, b) || alone(b, a)).then_some("what is made of it must have the same licence, and the other asks for more")
}

#[cfg(test)]
mod tests {
    use super::{conflict, front_matter};

    #[test]
    fn licences_are_read_from_the_front_matter() {
        assert_eq!(front_matter("---\nlicense: Apache-2.0\ntags: [a]\n---\n# x"), Some("apache-2.0".into()));
        assert_eq!(front_matter("---\nlicense: other\nlicense_name: yi-license\n---\n"), Some("yi-license".into()));
        for none in ["# license: mit", "---\ntags: []\n---\n", "---\nlicense: [a", "---\nlicense: unknown\n---\n", ""] {
            assert_eq!(front_matter(none), None, "{none}");
        }
    }

    #[test]
    fn conflicts_are_between_those_that_ask_for_different_things() {
        for (a, b) in [("gpl-3.0", "llama3"), ("cc-by-nc-sa-4.0", "cc-by-sa-4.0"), ("mit", "cc-by-nc-nd-4.0"), ("gemma", "agpl-3.0")] {
            assert!(conflict(a, b).is_some() && conflict(b, a).is_some(), "{a} and {b}");
        }
        for (a, b) in [("mit", "apache-2.0"), ("gpl-3.0", "mit"), ("gpl-3.0", "gpl-3.0"), ("llama3", "apache-2.0"), ("cc-by-nc-4.0", "mit")]
        {
            assert!(conflict(a, b).is_none() && conflict(b, a).is_none(), "{a} and {b}");
        }
    }
}
