//! The page at `/`: a chat that shows which expert speaks. One answer carries all of it; it asks this server alone, for what the API gives to everybody.
//!
//! The scripts are concatenated to one module, in the order below. The policy allows that module and the style by their hashes and nothing else
//! that runs, and forbids every way to turn text into markup.

use std::sync::LazyLock;

use axum::{
    http::{HeaderName, header},
    response::{Html, IntoResponse},
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use sha2::{Digest as _, Sha256};

const FRAME: &str = include_str!("index.html");
const STYLE: &str = include_str!("style.css");
const SCRIPT: &str = concat!(
    include_str!("dom.js"),
    include_str!("store.js"),
    include_str!("client.js"),
    include_str!("highlight.js"),
    include_str!("markdown.js"),
    include_str!("experts.js"),
    include_str!("controls.js"),
    include_str!("history.js"),
    include_str!("chat.js"),
    include_str!("main.js"),
);

static PAGE: LazyLock<String> = LazyLock::new(|| FRAME.replacen("__STYLE__", STYLE, 1).replacen("__SCRIPT__", SCRIPT, 1));

static POLICY: LazyLock<String> = LazyLock::new(|| {
    let hash = |text: &str| BASE64_STANDARD.encode(Sha256::digest(text));
    let (script, style) = (hash(SCRIPT), hash(STYLE));
    format!(
        "default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; connect-src 'self'; img-src data:; base-uri 'none'; \
         form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
});

pub(super) async fn page() -> impl IntoResponse {
    let headers: [(HeaderName, &str); 4] = [
        (header::CONTENT_SECURITY_POLICY, &POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, Html(PAGE.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_whole() {
        assert!(!PAGE.contains("__STYLE__") && !PAGE.contains("__SCRIPT__"));
        assert_eq!(PAGE.matches("</script>").count(), 1, "nothing in the scripts ends them");
    }

    #[test]
    fn nothing_in_it_writes_markup_or_runs_text() {
        for word in [
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "new Function",
            "srcdoc",
            "DOMParser",
            "url(",
            "@import",
        ] {
            assert!(!PAGE.contains(word), "{word}");
        }
    }
}
