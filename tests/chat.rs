//! `chat` in a terminal, as util-linux's `script` lends one: editing, completion, history, and an answer that Ctrl-C stops. What commands mean
//! is tested beside their code, and without a terminal in `engine.rs`.
#![cfg(target_os = "linux")]

use std::{
    io::{Read as _, Write as _},
    path::Path,
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{self, Receiver},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::support::engines::demo;

struct Terminal {
    child: Child,
    keys: ChildStdin,
    output: Receiver<String>,
    /// what came and was not waited for yet
    seen: String,
}

impl Terminal {
    /// `upcycle chat` with a home of its own; none, aloud, where `script` is missing.
    fn open(home: &Path) -> Option<Self> {
        // As wide as no line here is: what is written stands in one piece.
        let chat =
            format!("stty cols 500; exec '{}' chat --temperature 0 -n 450 '{}'", env!("CARGO_BIN_EXE_upcycle"), demo("bible").display());
        let child = Command::new("script")
            .args(["-qefc", &chat, "/dev/null"])
            .envs([("TERM", "xterm"), ("RAYON_NUM_THREADS", "2")])
            .env("XDG_STATE_HOME", home)
            .env_remove("NO_COLOR")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let Ok(mut child) = child else {
            eprintln!("skipped: there is no `script`");
            return None;
        };
        let (tell, output) = mpsc::channel();
        let mut screen = child.stdout.take().unwrap();
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = screen.read(&mut bytes) {
                let _ = tell.send(String::from_utf8_lossy(&bytes[..count]).into_owned());
            }
        });
        let keys = child.stdin.take().unwrap();
        let mut terminal = Self { child, keys, output, seen: String::new() };
        terminal.wait("is listening");
        terminal.wait("> ");
        Some(terminal)
    }

    fn keys(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
        self.keys.flush().unwrap();
    }

    /// Waits until this is on the screen, and forgets what stands up to it.
    fn wait(&mut self, text: &str) {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(at) = self.seen.find(text) {
                self.seen.drain(..at + text.len());
                return;
            }
            let left = end.saturating_duration_since(Instant::now());
            self.seen += &self.output.recv_timeout(left).unwrap_or_else(|_| panic!("never {text:?}, but {:?}", self.seen));
        }
    }

    /// Leaves with Ctrl-D.
    fn leave(mut self) {
        self.keys("\x04");
        assert_eq!(self.child.wait().unwrap().code(), Some(0));
    }
}

fn saved(file: &Path) -> Vec<(String, String)> {
    let conversation: Value = serde_json::from_str(&fs_err::read_to_string(file).unwrap()).unwrap();
    let text = |message: &Value, field: &str| message[field].as_str().unwrap().to_owned();
    conversation["messages"].as_array().unwrap().iter().map(|message| (text(message, "role"), text(message, "content"))).collect()
}

#[test]
fn a_terminal_edits_completes_remembers_and_stops() {
    let home = tempfile::tempdir().unwrap();
    let file = |name: &str| home.path().join(name);
    let Some(mut terminal) = Terminal::open(home.path()) else { return };
    let save = |terminal: &mut Terminal, name: &str| {
        terminal.keys(&format!("/save {}\r", file(name).display()));
        terminal.keys("/set\r");
        terminal.wait("seed auto");
        terminal.wait("> ");
        saved(&file(name))
    };
    // Completed, and corrected at its beginning.
    terminal.keys("/sys\te brief.\x1b[D\x1b[D\x1b[D\x1b[D\x1b[D\x1b[D\x1b[D\x1b[DB\r");
    terminal.keys("In the beginning\\\rGod created\r");
    terminal.wait("God created");
    let whole = save(&mut terminal, "whole.json");
    let says = |who: &str, what: &str| (who.to_owned(), what.to_owned());
    assert_eq!(whole[..2], [says("system", "Be brief."), says("user", "In the beginning\nGod created")]);

    // The same answer, stopped.
    terminal.keys("/regenerate\r");
    terminal.wait("/regenerate");
    terminal.wait("\n");
    terminal.wait(whole[2].1.split_whitespace().next().unwrap());
    terminal.keys("\x03");
    terminal.wait("> ");
    let part = save(&mut terminal, "part.json");
    assert_eq!(part[..2], whole[..2]);
    assert!(whole[2].1.starts_with(&part[2].1) && part[2].1.len() < whole[2].1.len(), "{part:?} {whole:?}");
    terminal.keys("/undo\r/halp\r");
    terminal.wait("there is no command /halp");
    assert_eq!(save(&mut terminal, "undone.json"), whole[..1]);
    terminal.keys(&format!("/load {}\r", file("whole.json").display()));
    assert_eq!(save(&mut terminal, "loaded.json"), whole);
    terminal.leave();

    // What was written is there the next time.
    let mut terminal = Terminal::open(home.path()).unwrap();
    terminal.keys("\x1b[A");
    terminal.wait("/set");
    terminal.keys("\x03");
    terminal.wait("Ctrl-D leaves");
    terminal.wait("> ");
    terminal.leave();
    assert!(fs_err::read_to_string(file("upcycle/chat_history")).unwrap().contains("/system Be brief."));
}
