//! An inspection as one page of HTML that needs nothing else: no network, no other file.
//!
//! The page's code is `page.html`; all that is put into it is JSON, and all that it shows of the JSON it shows as text.

use serde_json::json;

use super::inspection::Inspection;
use crate::engine::tokenizer::{TextStream, Tokenizer, TokenizerError};

const PAGE: &str = include_str!("page.html");
/// Where the data go in the page.
const DATA: &str = "__DATA__";

/// The page. `tokenizer` spells the sampled tokens.
pub fn page(inspection: &Inspection, tokenizer: &std::sync::Arc<Tokenizer>) -> Result<String, TokenizerError> {
    let samples = inspection.texts.iter().map(|text| {
        let mut stream = TextStream::new(tokenizer.clone(), &[])?;
        let pieces = text.sample.tokens.iter().map(|token| stream.push(*token)).collect::<Result<Vec<_>, _>>()?;
        Ok(json!({"pieces": pieces, "choices": text.sample.choices}))
    });
    let samples = samples.collect::<Result<Vec<_>, TokenizerError>>()?;
    Ok(fill(&json!({"inspection": inspection, "samples": samples})))
}

fn fill(data: &serde_json::Value) -> String {
    // Inside a script element only `<` can end it or begin a comment; in JSON these characters occur in strings alone.
    let data = data.to_string().replace('<', "\\u003c").replace('>', "\\u003e").replace('&', "\\u0026");
    let (head, tail) = PAGE.split_once(DATA).unwrap_or((PAGE, ""));
    [head, &data, tail].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_in_the_data_ends_the_script() {
        let evil = "</script><script>alert(1)</script><!-- & __DATA__";
        let page = fill(&json!({"pieces": [evil]}));
        assert_eq!(page.matches("</script").count(), PAGE.matches("</script").count());
        assert!(!page.contains("<!-- &"));
        let (_, rest) = page.split_once("<script type=\"application/json\" id=\"data\">").unwrap();
        let (data, _) = rest.split_once("</script>").unwrap();
        let data: serde_json::Value = serde_json::from_str(data).unwrap();
        assert_eq!(data["pieces"][0], evil);
    }

    #[test]
    fn the_page_asks_nobody_for_anything_and_writes_no_markup() {
        for word in [
            "http:",
            "https:",
            "src=",
            "@import",
            "url(",
            "fetch(",
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
        ] {
            assert!(!PAGE.contains(word), "{word}");
        }
        assert_eq!(PAGE.matches(DATA).count(), 1);
    }
}
