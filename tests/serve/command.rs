//! `upcycle serve` as a process: its options from three places, its log, its signals.
#![cfg(unix)]

use std::{
    io::{BufRead as _, BufReader, Read as _},
    net::SocketAddr,
    process::{Child, ChildStderr, Command, Stdio},
};

use serde_json::{Value, json};

use super::{finish, send_with};
use crate::support::engines::demo;

/// A process that is ended when dropped.
struct Served {
    child: Child,
    stderr: BufReader<ChildStderr>,
    address: SocketAddr,
}

impl Served {
    fn start(args: &[&str], variables: &[(&str, &str)]) -> Self {
        let mut child = command(args, variables).spawn().unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let mut log = String::new();
        while !log.contains("listening on http://") {
            assert!(stderr.read_line(&mut log).unwrap() > 0, "{log}");
        }
        let (_, address) = log.split_once("listening on http://").unwrap();
        let address = address.split(['"', '\n']).next().unwrap().parse().unwrap();
        Self { child, stderr, address }
    }

    /// Ends it by SIGTERM; its exit code and the rest of its log.
    fn end(mut self) -> (Option<i32>, String) {
        assert!(Command::new("kill").arg(self.child.id().to_string()).status().unwrap().success());
        let mut log = String::new();
        self.stderr.read_to_string(&mut log).unwrap();
        (self.child.wait().unwrap().code(), log)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
    }
}

fn command(args: &[&str], variables: &[(&str, &str)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_upcycle"));
    for inherited in ["UPCYCLE_HOST", "UPCYCLE_PORT", "RUST_LOG"] {
        command.env_remove(inherited);
    }
    command.arg("serve").args(args).envs(variables.iter().copied()).env("NO_COLOR", "1").stderr(Stdio::piped());
    command
}

#[test]
fn it_listens_on_a_free_port_and_ends_with_0_on_sigterm() {
    let served = Served::start(&["--port", "0", "--alias", "m", demo("math").to_str().unwrap()], &[]);
    assert_eq!(finish(send_with(served.address, "GET", "/v1/models/m", &[], b"")).ok()["id"], "m");
    assert_eq!(served.end().0, Some(0));
}

#[test]
fn options_come_from_a_file_below_variables_below_the_command_line() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("serve.yml");
    let math = demo("math");
    fs_err::write(
        &file,
        format!("model: {}\nport: 0\nalias: from-file\nlog-format: json\napi-key: [k1, k2]\nparallel: 3\n", math.display()),
    )
    .unwrap();
    let variables = [("UPCYCLE_ALIAS", "from-variable"), ("UPCYCLE_PARALLEL", "4")];
    let served = Served::start(&["--config", file.to_str().unwrap(), "--parallel", "5"], &variables);
    let key = [("Authorization", "Bearer k2")];
    let props = finish(send_with(served.address, "GET", "/props", &key, b"")).ok();
    assert_eq!((&props["model_alias"], &props["total_slots"]), (&json!("from-variable"), &json!(5)));
    served.end();

    fs_err::write(&file, "prot: 1\n").unwrap();
    let output = command(&["--config", file.to_str().unwrap(), math.to_str().unwrap()], &[]).output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("unknown key `prot`; did you mean `port`?"), "{error}");
}

#[test]
fn the_log_has_no_prompts_and_no_keys_unless_told() {
    let body = json!({"prompt": "the secret word", "max_tokens": 3}).to_string();
    for told in [false, true] {
        let math = demo("math");
        let mut args = vec!["--port", "0", "--log-format", "json", "--api-key", "sesame", math.to_str().unwrap()];
        args.extend(told.then_some("--log-prompts"));
        let served = Served::start(&args, &[]);
        let headers = [("Authorization", "Bearer sesame"), ("X-Request-Id", "mine")];
        finish(send_with(served.address, "POST", "/v1/completions", &headers, body.as_bytes())).ok();
        let (_, log) = served.end();
        let lines: Vec<Value> =
            log.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect();
        let request = lines.iter().find(|line| line["message"] == "request").unwrap();
        assert_eq!((&request["id"], &request["model"], &request["status"]), (&json!("mine"), &json!("math"), &json!(200)));
        assert_eq!(request["completion_tokens"], 3);
        assert!(request["seconds"].is_f64() && request["first_token_seconds"].is_f64() && request["timestamp"].is_string(), "{request}");
        assert_eq!(log.contains("secret"), told);
        assert!(!log.contains("sesame"), "{log}");
    }
}

#[test]
fn several_models_have_names_of_their_own() {
    let (math, code) = (demo("math"), demo("code"));
    let named = format!("coder={}", code.display());
    let served = Served::start(&["--port", "0", "--max-models", "1", math.to_str().unwrap(), &named], &[]);
    let models = finish(send_with(served.address, "GET", "/v1/models", &[], b"")).ok();
    assert_eq!((&models["data"][0]["id"], &models["data"][1]["id"]), (&json!("math"), &json!("coder")));
    let body = json!({"model": "coder", "prompt": "def", "max_tokens": 2}).to_string();
    assert_eq!(finish(send_with(served.address, "POST", "/v1/completions", &[], body.as_bytes())).ok()["model"], "coder");
    served.end();
    let twice = command(&[math.to_str().unwrap(), math.to_str().unwrap()], &[]).output().unwrap();
    let error = String::from_utf8(twice.stderr).unwrap();
    assert!(error.contains("are both called `math`: NAME=MODEL gives one another name"), "{error}");
}

#[test]
fn mistakes_in_options_are_said_at_once() {
    let math = demo("math");
    for (args, expected) in [
        (["--cors-origin", "good.example"], "`good.example` is no origin"),
        (["--api-key", ""], "but there is none"),
        (["--read-timeout", "0"], "would let no request in"),
        (["--max-body", "1X"], "`X` is no unit"),
    ] {
        let output = command(&[math.to_str().unwrap(), "--port", "0", args[0], args[1]], &[]).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && error.contains(expected), "{error}");
    }
}
