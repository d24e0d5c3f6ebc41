//! Rules of the house that a compiler does not check. Each test lists every offender.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

/// What the licences of everything that is compiled in must allow us by.
const LICENSES: [&str; 14] = [
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "CDLA-Permissive-2.0",
    "ISC",
    "MIT",
    "MPL-2.0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Weights in the repository: the bundled experts and the tests' goldens.
const WEIGHTS: [&str; 4] = ["safetensors", "gguf", "bin", "npz"];
const MOST_BYTES_OF_WEIGHTS: u64 = 40_000_000;

/// The repository's files, tracked or about to be; none where this is not a git checkout.
fn files() -> Vec<PathBuf> {
    let git = Command::new("git").args(["ls-files", "--cached", "--others", "--exclude-standard", "-z"]).output();
    match git {
        Ok(output) if output.status.success() => {
            let names = String::from_utf8(output.stdout).unwrap();
            names.split('\0').map(PathBuf::from).filter(|path| path.is_file()).collect()
        }
        _ => {
            eprintln!("skipped: this is not a git checkout");
            Vec::new()
        }
    }
}

/// Rust files with their text.
fn sources() -> impl Iterator<Item = (PathBuf, String)> {
    files().into_iter().filter(|path| has_extension(path, &["rs"])).map(|path| {
        let text = fs_err::read_to_string(&path).unwrap();
        (path, text)
    })
}

fn has_extension(path: &Path, extensions: &[&str]) -> bool {
    path.extension().is_some_and(|extension| extensions.iter().any(|one| extension == *one))
}

/// Lines with one of the words, as `file:line: text`, comments left out.
fn uses(path: &Path, text: &str, words: &[&str]) -> Vec<String> {
    let code = |line: &str| !line.trim_start().starts_with("//");
    let offends = |line: &str| code(line) && words.iter().any(|word| line.contains(word));
    text.lines()
        .enumerate()
        .filter(|(_, line)| offends(line))
        .map(|(i, line)| format!("{}:{}: {}", path.display(), i + 1, line.trim()))
        .collect()
}

fn none(offenders: &[String], rule: &str) {
    assert!(offenders.is_empty(), "{rule}:\n{}", offenders.join("\n"));
}

#[test]
fn every_file_says_what_it_is_for() {
    let offenders: Vec<_> = sources().filter(|(_, text)| !text.starts_with("//!")).map(|(path, _)| path.display().to_string()).collect();
    none(&offenders, "a file starts with `//!`: its job and its limits");
}

#[test]
fn the_environment_is_read_in_one_place() {
    let words = ["env::var", "env::home_dir", "env = \"", "option_env!"];
    let elsewhere = |path: &Path| path != Path::new("src/env.rs") && !path.starts_with("tests");
    let offenders: Vec<_> = sources().filter(|(path, _)| elsewhere(path)).flat_map(|(path, text)| uses(&path, &text, &words)).collect();
    none(&offenders, "environment variables are read in src/env.rs, which also lists what libraries read");
}

#[test]
fn unsafe_code_stands_in_two_places() {
    let elsewhere = |path: &Path| {
        path != Path::new("src/source/map.rs") && !path.starts_with("architectures/src/kernels") && !path.starts_with("tests")
    };
    let words = ["unsafe {", "unsafe fn ", "unsafe impl "];
    let offenders: Vec<_> = sources().filter(|(path, _)| elsewhere(path)).flat_map(|(path, text)| uses(&path, &text, &words)).collect();
    none(&offenders, "`unsafe` stands in src/source/map.rs and architectures/src/kernels alone");
}

#[test]
fn only_commands_print() {
    let words = ["println!", "eprintln!", "print!(", "eprint!(", "dbg!("];
    let silent = |path: &Path| !path.starts_with("src/cli") && !path.starts_with("tests") && !path.ends_with("build.rs");
    let offenders: Vec<_> = sources().filter(|(path, _)| silent(path)).flat_map(|(path, text)| uses(&path, &text, &words)).collect();
    none(&offenders, "only src/cli prints");
}

#[test]
fn nothing_is_left_for_later() {
    let words = ["todo!(", "unimplemented!(", "#[ignore", "TODO", "FIXME", "XXX"];
    let this = Path::new("tests/tidy.rs");
    let mut offenders = Vec::new();
    for (path, text) in sources().filter(|(path, _)| path != this) {
        let lines = text.lines().enumerate().filter(|(_, line)| words.iter().any(|word| line.contains(word)));
        offenders.extend(lines.map(|(i, line)| format!("{}:{}: {}", path.display(), i + 1, line.trim())));
    }
    none(&offenders, "what is not done is an issue, not a comment");
}

#[test]
fn no_paths_of_one_machine() {
    let roots = ["work", "root", "tmp"].map(|root| format!("/{root}/"));
    // A vocabulary holds pieces of everyone's text.
    let ours = |path: &Path| !path.ends_with("tokenizer.json") && !path.ends_with("vocab.json");
    let mut offenders = Vec::new();
    for path in files().into_iter().filter(|path| ours(path)) {
        let Ok(text) = fs_err::read_to_string(&path) else { continue };
        let lines = text.lines().enumerate().filter(|(_, line)| roots.iter().any(|root| line.contains(root.as_str())));
        offenders.extend(lines.map(|(i, line)| format!("{}:{}: {}", path.display(), i + 1, line.trim())));
    }
    none(&offenders, "no file names a path of the machine that it was made on");
}

#[test]
fn weights_stay_small() {
    let weights: Vec<_> = files().into_iter().filter(|path| has_extension(path, &WEIGHTS)).collect();
    let bytes: u64 = weights.iter().map(|path| fs_err::metadata(path).unwrap().len()).sum();
    assert!(bytes <= MOST_BYTES_OF_WEIGHTS, "{bytes} bytes of weights are tracked, in {} files", weights.len());
}

/// As built here with the default features: what other platforms and features add is not on this disk.
#[test]
fn licenses_of_dependencies() {
    let rustc = Command::new("rustc").arg("-vV").output().unwrap();
    let version = String::from_utf8(rustc.stdout).unwrap();
    let host = version.lines().find_map(|line| line.strip_prefix("host: ")).unwrap();
    let arguments = ["metadata", "--format-version", "1", "--locked", "--offline", "--filter-platform", host];
    let cargo = Command::new(env!("CARGO")).args(arguments).output().unwrap();
    assert!(cargo.status.success(), "{}", String::from_utf8_lossy(&cargo.stderr));
    let metadata: Value = serde_json::from_slice(&cargo.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    assert!(packages.len() > 100, "{} packages are few", packages.len());
    let describe = |package: &Value| format!("{} {}: {}", package["name"], package["version"], package["license"]);
    let offenders: Vec<_> = packages.iter().filter(|package| !package["license"].as_str().is_some_and(allowed)).map(describe).collect();
    none(&offenders, "dependencies are under licences that bind nobody who uses us");
}

fn allowed(license: &str) -> bool {
    let license = spdx::Expression::parse_mode(license, spdx::ParseMode::LAX).unwrap();
    license.evaluate(|requirement| LICENSES.contains(&requirement.to_string().as_str()))
}

#[test]
fn the_licence_check_tells_licences_apart() {
    assert!(allowed("MIT/GPL-3.0-only") && allowed("(MIT OR Apache-2.0) AND Unicode-3.0") && allowed("Apache-2.0 WITH LLVM-exception"));
    assert!(!allowed("GPL-3.0-only") && !allowed("MIT AND AGPL-3.0-or-later") && !allowed("Apache-2.0 WITH Classpath-exception-2.0"));
}
