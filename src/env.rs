//! Every environment variable that is read, and what it means. The Hub's variables mean what they mean to `huggingface_hub`.
//!
//! More are read by libraries: `RUST_LOG` by the log filter, `RAYON_NUM_THREADS` and `CANDLE_NUM_THREADS` by the thread pools (candle's waits
//! in a loop: on a busy machine 1 is faster, see docs/log.md), and `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY`, `NO_PROXY` by the HTTP client.

use std::{env, ffi::OsString, path::PathBuf};

use crate::source::Hub;

/// The variable that gives an option of `serve`; the option wins.
pub fn option(name: &str) -> String {
    format!("UPCYCLE_{}", name.replace('-', "_").to_ascii_uppercase())
}

/// Directory of what can be made again: text that experts wrote, fits.
pub const CACHE: &str = "UPCYCLE_CACHE";

/// Name and meaning of each variable, for `doctor`.
pub const VARIABLES: &[(&str, &str)] = &[
    ("UPCYCLE_OPTION", "any option of `serve`, as UPCYCLE_MAX_BODY for --max-body"),
    (CACHE, "directory of what can be made again: text that experts wrote, fits"),
    ("HF_HUB_CACHE", "directory of the models fetched from the Hub"),
    ("HUGGINGFACE_HUB_CACHE", "older name of HF_HUB_CACHE"),
    ("HF_HOME", "directory of everything of the Hub's: cache in hub/, token in token"),
    ("XDG_CACHE_HOME", "HF_HOME is huggingface/ in it, if not set"),
    ("XDG_STATE_HOME", "what is written in `chat` is remembered in upcycle/ in it; ~/.local/state if not set"),
    ("HF_TOKEN", "token for private and gated models"),
    ("HUGGING_FACE_HUB_TOKEN", "older name of HF_TOKEN"),
    ("HF_TOKEN_PATH", "file that holds the token"),
    ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1: no token is sent"),
    ("HF_ENDPOINT", "address of the Hub or of a mirror"),
    ("HF_HUB_OFFLINE", "1: only the cache is used"),
    ("TRANSFORMERS_OFFLINE", "older name of HF_HUB_OFFLINE"),
];

/// Where text that experts wrote and fits are kept: `UPCYCLE_CACHE`, else `upcycle/` in the user's cache directory.
pub fn cache() -> PathBuf {
    let path = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let user = || path("XDG_CACHE_HOME").unwrap_or_else(|| env::home_dir().unwrap_or_default().join(".cache"));
    path(CACHE).unwrap_or_else(|| user().join("upcycle"))
}

/// Where what people wrote is remembered: `upcycle/` in the user's state directory.
pub fn state() -> PathBuf {
    let path = env::var_os("XDG_STATE_HOME").filter(|value| !value.is_empty()).map(PathBuf::from);
    path.unwrap_or_else(|| env::home_dir().unwrap_or_default().join(".local/state")).join("upcycle")
}

/// The Hub as the environment describes it.
pub fn hub() -> Hub {
    hub_from(|name| env::var_os(name), env::home_dir())
}

fn hub_from(get: impl Fn(&str) -> Option<OsString>, user: Option<PathBuf>) -> Hub {
    let get = |name| get(name).filter(|value| !value.is_empty());
    let path = |name| get(name).map(PathBuf::from);
    let text = |name| get(name).and_then(|value| value.into_string().ok());
    let is_on = |name| text(name).is_some_and(|value| matches!(value.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE"));
    let home = path("HF_HOME")
        .unwrap_or_else(|| path("XDG_CACHE_HOME").unwrap_or_else(|| user.unwrap_or_default().join(".cache")).join("huggingface"));
    let token = || {
        let saved = || fs_err::read_to_string(path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"))).ok();
        text("HF_TOKEN").or_else(|| text("HUGGING_FACE_HUB_TOKEN")).or_else(saved).map(|token| token.trim().to_owned())
    };
    Hub {
        token: if is_on("HF_HUB_DISABLE_IMPLICIT_TOKEN") { None } else { token().filter(|token| !token.is_empty()) },
        endpoint: text("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into()).trim_end_matches('/').to_owned(),
        offline: is_on("HF_HUB_OFFLINE") || is_on("TRANSFORMERS_OFFLINE"),
        cache: path("HF_HUB_CACHE").or_else(|| path("HUGGINGFACE_HUB_CACHE")).unwrap_or_else(|| home.join("hub")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(variables: &[(&str, &str)]) -> Hub {
        let get = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| OsString::from(value));
        hub_from(get, Some("/home/me".into()))
    }

    #[test]
    fn the_cache_is_where_python_has_it() {
        let cache = |variables: &[(&str, &str)]| from(variables).cache.display().to_string();
        assert_eq!(cache(&[]), "/home/me/.cache/huggingface/hub");
        assert_eq!(cache(&[("XDG_CACHE_HOME", "/x")]), "/x/huggingface/hub");
        assert_eq!(cache(&[("XDG_CACHE_HOME", "/x"), ("HF_HOME", "/h")]), "/h/hub");
        assert_eq!(cache(&[("HF_HOME", "/h"), ("HUGGINGFACE_HUB_CACHE", "/old")]), "/old");
        assert_eq!(cache(&[("HUGGINGFACE_HUB_CACHE", "/old"), ("HF_HUB_CACHE", "/c")]), "/c");
        assert_eq!(cache(&[("HF_HUB_CACHE", "")]), "/home/me/.cache/huggingface/hub");
    }

    #[test]
    fn a_token_comes_from_a_variable_or_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().to_str().unwrap();
        fs_err::write(dir.path().join("token"), "from-home\n").unwrap();
        fs_err::write(dir.path().join("other"), " from-path ").unwrap();
        let other = format!("{home}/other");
        let token = |variables: &[(&str, &str)]| from(variables).token;
        assert_eq!(token(&[("HF_HOME", "/nowhere")]), None);
        assert_eq!(token(&[("HF_HOME", home)]).as_deref(), Some("from-home"));
        assert_eq!(token(&[("HF_HOME", home), ("HF_TOKEN_PATH", &other)]).as_deref(), Some("from-path"));
        assert_eq!(token(&[("HF_HOME", home), ("HF_TOKEN", "t")]).as_deref(), Some("t"));
        assert_eq!(token(&[("HF_HOME", home), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]), None);
    }

    #[test]
    fn offline_and_endpoint() {
        assert!(!from(&[("HF_HUB_OFFLINE", "0")]).offline);
        assert!(from(&[("HF_HUB_OFFLINE", "true")]).offline);
        assert_eq!(from(&[("HF_ENDPOINT", "http://mirror/")]).endpoint, "http://mirror");
        assert_eq!(from(&[]).endpoint, "https://huggingface.co");
    }
}
