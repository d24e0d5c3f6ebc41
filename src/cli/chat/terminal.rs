//! A terminal whose keys are read as they are pressed: while it is open, Ctrl-C is a key, and nothing is echoed but what the editor draws.

use std::{
    collections::VecDeque,
    fs::OpenOptions,
    io::{self, Read as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::PathBuf,
    sync::mpsc::{self, Receiver},
    thread,
};

use rustix::termios::{LocalModes, OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use super::{
    super::ui,
    command,
    editor::{Editor, Step},
    keys::{Key, Keys},
};

/// Turns that are remembered.
const REMEMBERED: usize = 1000;
const PASTE_ON: &str = "\x1b[?2004h";
const PASTE_OFF: &str = "\x1b[?2004l";

pub(super) struct Terminal {
    /// how it was found
    before: Termios,
    keys: Receiver<Key>,
    /// keys that were pressed during an answer
    early: VecDeque<Key>,
    editor: Editor,
    experts: Vec<String>,
    /// where turns are remembered, as long as that works
    history: Option<PathBuf>,
}

impl Terminal {
    pub(super) fn open(history: PathBuf, experts: Vec<String>) -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.local_modes -= LocalModes::ICANON | LocalModes::ECHO | LocalModes::IEXTEN;
        raw.special_codes[SpecialCodeIndex::VINTR] = 0;
        tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
        let (tell, keys) = mpsc::channel();
        thread::spawn(move || {
            let mut decoder = Keys::default();
            for byte in io::stdin().lock().bytes().map_while(Result::ok) {
                if decoder.push(byte).is_some_and(|key| tell.send(key).is_err()) {
                    return;
                }
            }
        });
        show(PASTE_ON)?;
        let editor = Editor::new(remembered(&history));
        Ok(Self { before, keys, early: VecDeque::new(), editor, experts, history: Some(history) })
    }

    /// The next turn, as it was written; none at the end.
    pub(super) fn turn(&mut self) -> io::Result<Option<String>> {
        self.editor.moved();
        loop {
            let width = width();
            // What comes faster than anybody types is drawn when it is complete.
            if self.early.front().is_none_or(|key| *key == Key::Enter) {
                show(&self.editor.draw(width))?;
            }
            let key = self.early.pop_front().or_else(|| self.keys.recv().ok());
            let Some(key) = key else { return Ok(None) };
            self.early.extend(self.keys.try_iter());
            match self.editor.press(key, |line| command::complete(line, &self.experts)) {
                Step::Edited => {}
                Step::Cleared => {
                    self.editor.moved();
                    show("\x1b[2J\x1b[H")?;
                }
                Step::Candidates(words) => {
                    let below = self.editor.leave("", width);
                    show(&format!("{below}{}\r\n", words.join(" ")))?;
                }
                Step::Turn(turn) => {
                    let below = self.editor.leave(&turn, width);
                    show(&below)?;
                    self.remember(&turn);
                    return Ok(Some(turn));
                }
                Step::Dropped => {
                    self.editor.moved();
                    show("\r\n(Ctrl-D leaves)\r\n")?;
                }
                Step::Over => {
                    show("\r\n")?;
                    return Ok(None);
                }
            }
        }
    }

    /// Whether Ctrl-C was pressed; other keys wait for the next turn.
    pub(super) fn interrupted(&mut self) -> bool {
        self.early.extend(self.keys.try_iter());
        let pressed = self.early.contains(&Key::Control('c'));
        if pressed {
            self.early.clear();
        }
        pressed
    }

    fn remember(&mut self, turn: &str) {
        let Some(file) = self.history.as_ref().filter(|_| !turn.trim().is_empty()) else { return };
        let append = || {
            file.parent().map_or(Ok(()), fs_err::create_dir_all)?;
            // What people write is nobody else's business.
            let mut file = OpenOptions::new().create(true).append(true).mode(0o600).open(file)?;
            writeln!(file, "{}", serde_json::Value::from(turn))
        };
        if let Err(error) = append() {
            ui::warn(format!("what you write is not remembered in {}: {error}", file.display()));
            self.history = None;
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // A terminal that has gone needs nothing back.
        let _ = show(PASTE_OFF);
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.before);
    }
}

/// The last turns of a file of JSON strings, one a line; what is none is passed over.
fn remembered(file: &PathBuf) -> Vec<String> {
    let text = fs_err::read_to_string(file).unwrap_or_default();
    let turns: Vec<String> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    turns[turns.len().saturating_sub(REMEMBERED)..].to_vec()
}

fn width() -> usize {
    tcgetwinsize(io::stderr()).map_or(80, |size| usize::from(size.ws_col)).max(10)
}

fn show(text: &str) -> io::Result<()> {
    let mut err = io::stderr().lock();
    err.write_all(text.as_bytes())?;
    err.flush()
}
