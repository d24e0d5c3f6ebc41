//! Transcripts of the command line, for snapshots: what was typed, the exit code, and what came out on which stream.
//!
//! What differs from run to run is replaced: the directory that the command ran in and the times that it took.

use std::{fmt::Write as _, path::Path, time::Duration};

use assert_cmd::cargo::cargo_bin_cmd;
use regex::Regex;

/// Runs `upcycle ARGS` in `dir`, with no network, no colour and nobody's Hub cache.
pub fn transcript(dir: &Path, args: &[&str]) -> String {
    let mut command = cargo_bin_cmd!("upcycle");
    command.args(args).current_dir(dir).timeout(Duration::from_secs(120));
    for inherited in ["RUST_LOG", "HF_TOKEN", "HF_ENDPOINT", "HF_HUB_CACHE", "CLICOLOR_FORCE"] {
        command.env_remove(inherited);
    }
    command.envs([("HF_HOME", "hf"), ("HF_HUB_OFFLINE", "1"), ("NO_COLOR", "1"), ("COLUMNS", "100"), ("RAYON_NUM_THREADS", "2")]);
    let output = command.output().unwrap();
    let code = output.status.code().map_or("none: it was killed".to_owned(), |code| code.to_string());
    let mut transcript = format!("$ upcycle {}\nexit {code}\n", args.join(" "));
    for (name, stream) in [("stdout", &output.stdout), ("stderr", &output.stderr)] {
        if !stream.is_empty() {
            write!(transcript, "--- {name}\n{}", String::from_utf8_lossy(stream)).unwrap();
        }
    }
    filter(&transcript, dir)
}

fn filter(text: &str, dir: &Path) -> String {
    let canonical = dir.canonicalize().unwrap();
    let mut text = text.replace(canonical.to_str().unwrap(), "[dir]").replace(dir.to_str().unwrap(), "[dir]");
    for (pattern, with) in
        [(r"\b\d+(\.\d+)? ?(ns|µs|ms|s|min)\b", "[time]"), (r"\b\d+(\.\d+)? (tokens|[KMG]?i?B)/s", "[rate]"), (r"[ \t]+\n", "\n")]
    {
        text = Regex::new(pattern).unwrap().replace_all(&text, with).into_owned();
    }
    text
}
