//! The tags of a template as they are compiled here: those that minijinja does not know mean nothing, and what is assigned goes through a filter.
//!
//! Tags are found as minijinja's lexer finds them, beside comments, raw text and the strings in expressions. What they mean is not looked at.

/// The filters that what is assigned goes through: to a name, and to an attribute.
pub(super) const ASSIGNED: [&str; 2] = ["upcycle_assigned", "upcycle_held"];

/// The template's text with its tags as they are compiled.
pub(super) fn prepared(source: &str) -> String {
    let mut out = String::new();
    let mut rest = source;
    while let Some(at) = ["{%", "{{", "{#"].iter().filter_map(|opening| rest.find(opening)).min() {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let end = match &rest[..2] {
            "{#" => rest.find("#}").map(|at| at + 2),
            "{{" => find(&rest[2..], "}}").map(|at| at + 4),
            _ => find(&rest[2..], "%}").map(|at| at + 4),
        };
        let (tag, after) = rest.split_at(end.unwrap_or(rest.len()));
        out.push_str(&compiled(tag));
        rest = after;
        if words(tag).is_some_and(|(_, words, _)| words == "raw") {
            let raw = end_of_raw(rest);
            out.push_str(&rest[..raw]);
            rest = &rest[raw..];
        }
    }
    out + rest
}

/// What stands between the marks of a tag, and those marks with their white space control.
fn words(tag: &str) -> Option<(&str, &str, &str)> {
    let inner = tag.strip_prefix("{%")?.strip_suffix("%}")?;
    let open = 2 + usize::from(inner.starts_with(['-', '+']));
    let close = tag.len() - 2 - usize::from(inner.len() + 2 >= open && inner.ends_with(['-', '+']));
    (open <= close).then(|| (&tag[..open], tag[open..close].trim(), &tag[close..]))
}

fn compiled(tag: &str) -> String {
    let Some((open, words, close)) = words(tag) else { return tag.to_owned() };
    // It marks the assistant's words for training. A block that does nothing keeps the white space that its tags remove.
    match words {
        "generation" => return format!("{open} if true {close}"),
        "endgeneration" => return format!("{open} endif {close}"),
        _ => {}
    }
    let assignment = words.strip_prefix("set").filter(|rest| rest.starts_with(char::is_whitespace));
    match assignment.and_then(|rest| Some((rest, find(rest, "=")?))) {
        Some((rest, at)) => {
            let (target, value) = (&rest[..at], &rest[at + 1..]);
            let filter = ASSIGNED[usize::from(target.contains('.'))];
            format!("{open} set{target}= ({value}) | {filter} {close}")
        }
        None => tag.to_owned(),
    }
}

/// Where a mark stands in the text of an expression, outside of strings and brackets.
fn find(text: &str, mark: &str) -> Option<usize> {
    let (mut quote, mut depth, mut escaped) = (None, 0_usize, false);
    for (at, byte) in text.bytes().enumerate() {
        if let Some(open) = quote {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                _ if byte == open => quote = None,
                _ => {}
            }
            continue;
        }
        match byte {
            _ if depth == 0 && text.as_bytes()[at..].starts_with(mark.as_bytes()) => return Some(at),
            b'\'' | b'"' => quote = Some(byte),
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    None
}

/// Where the tag begins that ends raw text.
fn end_of_raw(text: &str) -> usize {
    let tags = text.match_indices("{%").map(|(at, _)| at);
    let ends = |at: &usize| {
        let inner = text[at + 2..].trim_start_matches(['-', '+']).trim_start();
        inner.starts_with("endraw")
    };
    tags.into_iter().find(ends).unwrap_or(text.len())
}

#[cfg(test)]
mod tests {
    use super::prepared;

    #[test]
    fn assignments_are_found_where_they_are() {
        let [name, attribute] = super::ASSIGNED;
        for (source, expected) in [
            ("a {% set x = 1 %} b", format!("a {{% set x = ( 1) | {name} %}} b")),
            ("{%- set ns.x = '%}' ~ \"{%\" -%}", format!("{{%- set ns.x = ( '%}}' ~ \"{{%\") | {attribute} -%}}")),
            (
                "{% set x = {'a': {'b': 1}} if c == d else f(a=1) %}",
                format!("{{% set x = ( {{'a': {{'b': 1}}}} if c == d else f(a=1)) | {name} %}}"),
            ),
            ("{% set x %}{{ '{% set y = 1 %}' }}{% endset %}", "{% set x %}{{ '{% set y = 1 %}' }}{% endset %}".into()),
            (
                "{# {% set x = 1 %} #}{% raw %}{% set x = 1 %}{%- endraw %}",
                "{# {% set x = 1 %} #}{% raw %}{% set x = 1 %}{%- endraw %}".into(),
            ),
            (
                "{% raw %}{% x %}{% endraw %}{% set a, b = 1, 2 %}",
                format!("{{% raw %}}{{% x %}}{{% endraw %}}{{% set a, b = ( 1, 2) | {name} %}}"),
            ),
            ("it's {%- generation -%} so{% endgeneration %}", "it's {%- if true -%} so{% endif %}".into()),
            ("{% settle = 1 %}{% set x|f('=') %}{% %}{%-%}{%", "{% settle = 1 %}{% set x|f('=') %}{% %}{%-%}{%".into()),
            ("é{% set x = 'é", "é{% set x = 'é".into()),
        ] {
            assert_eq!(prepared(source), expected, "{source}");
        }
    }
}
