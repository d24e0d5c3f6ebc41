//! The text that is being written: keys change it, and it knows how it looks on a terminal. Touches no terminal itself.

use unicode_width::UnicodeWidthChar as _;

use super::{command, keys::Key};

const PROMPT: &str = "> ";

/// What a key led to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// the text may have changed
    Edited,
    /// the screen is to be cleared
    Cleared,
    /// what the last word may become
    Candidates(Vec<String>),
    /// a turn is complete
    Turn(String),
    /// it was dropped
    Dropped,
    /// there will be no more
    Over,
}

/// The text, and turns that were written before.
#[derive(Debug, Default)]
pub(super) struct Editor {
    text: Vec<char>,
    cursor: usize,
    /// oldest first
    history: Vec<String>,
    /// the turn of `history` that is being looked at; beyond it, the draft
    place: usize,
    draft: String,
    /// the row of the cursor when it was last drawn, below the first
    row: usize,
}

impl Editor {
    pub(super) fn new(history: Vec<String>) -> Self {
        Self { place: history.len(), history, ..Self::default() }
    }

    /// Takes a key. `complete` says where the word before the cursor begins and what it may become.
    pub(super) fn press(&mut self, key: Key, complete: impl Fn(&str) -> (usize, Vec<String>)) -> Step {
        match key {
            Key::Char(c) => self.insert(&[c]),
            Key::Paste(text) => self.insert(&text.chars().filter(|c| *c == '\n' || !c.is_control()).collect::<Vec<_>>()),
            Key::Enter if command::goes_on(&self.written()) => {
                self.cursor = self.text.len();
                self.insert(&['\n']);
            }
            Key::Enter => return self.finish(),
            Key::Control('c') => {
                self.set("");
                self.place = self.history.len();
                return Step::Dropped;
            }
            Key::Control('d') if self.text.is_empty() => return Step::Over,
            Key::Control('l') => return Step::Cleared,
            Key::Tab => return self.complete(complete),
            Key::Backspace | Key::Control('h') => self.cut(self.cursor.saturating_sub(1), self.cursor),
            Key::Delete | Key::Control('d') => self.cut(self.cursor, self.cursor + 1),
            Key::Control('w') => self.cut(self.word_before(), self.cursor),
            Key::Control('u') => self.cut(self.line_begin(), self.cursor),
            Key::Control('k') => self.cut(self.cursor, self.line_end()),
            Key::Left | Key::Control('b') => self.cursor = self.cursor.saturating_sub(1),
            Key::Right | Key::Control('f') => self.cursor = (self.cursor + 1).min(self.text.len()),
            Key::Home | Key::Control('a') => self.cursor = self.line_begin(),
            Key::End | Key::Control('e') => self.cursor = self.line_end(),
            Key::Alt('b') => self.cursor = self.word_before(),
            Key::Alt('f') => self.cursor = self.word_after(),
            Key::Up | Key::Control('p') => self.up(),
            Key::Down | Key::Control('n') => self.down(),
            Key::Control(_) | Key::Alt(_) => {}
        }
        Step::Edited
    }

    fn written(&self) -> String {
        self.text.iter().collect()
    }

    fn set(&mut self, text: &str) {
        self.text = text.chars().collect();
        self.cursor = self.text.len();
    }

    fn insert(&mut self, new: &[char]) {
        self.text.splice(self.cursor..self.cursor, new.iter().copied());
        self.cursor += new.len();
    }

    fn cut(&mut self, from: usize, to: usize) {
        self.text.drain(from..to.min(self.text.len()));
        self.cursor = from;
    }

    fn finish(&mut self) -> Step {
        let turn = self.written();
        if !turn.trim().is_empty() && self.history.last() != Some(&turn) {
            self.history.push(turn.clone());
        }
        self.place = self.history.len();
        self.set("");
        Step::Turn(turn)
    }

    fn complete(&mut self, complete: impl Fn(&str) -> (usize, Vec<String>)) -> Step {
        let before: String = self.text[..self.cursor].iter().collect();
        let (start, candidates) = complete(&before);
        let begun = &before[start..];
        let Some(first) = candidates.first() else { return Step::Edited };
        let alike = |other: &String| first.chars().zip(other.chars()).take_while(|(a, b)| a == b).count();
        let common = candidates.iter().map(alike).min().unwrap_or(0);
        let more: Vec<char> = first.chars().take(common).skip(begun.chars().count()).collect();
        if more.is_empty() && candidates.len() > 1 {
            return Step::Candidates(candidates);
        }
        self.insert(&more);
        Step::Edited
    }

    fn line_begin(&self) -> usize {
        self.text[..self.cursor].iter().rposition(|c| *c == '\n').map_or(0, |at| at + 1)
    }

    fn line_end(&self) -> usize {
        self.text[self.cursor..].iter().position(|c| *c == '\n').map_or(self.text.len(), |after| self.cursor + after)
    }

    fn word_before(&self) -> usize {
        let end = self.text[..self.cursor].iter().rposition(|c| !c.is_whitespace()).unwrap_or(0);
        self.text[..end].iter().rposition(|c| c.is_whitespace()).map_or(0, |at| at + 1)
    }

    fn word_after(&self) -> usize {
        let rest = &self.text[self.cursor..];
        let begin = rest.iter().position(|c| !c.is_whitespace()).unwrap_or(rest.len());
        self.cursor + rest[begin..].iter().position(|c| c.is_whitespace()).map_or(rest.len(), |end| begin + end)
    }

    /// To the line above, or from the first one to the turn before.
    fn up(&mut self) {
        let begin = self.line_begin();
        if begin > 0 {
            let column = self.cursor - begin;
            self.cursor = begin - 1;
            self.cursor = self.line_end().min(self.line_begin() + column);
        } else if self.place > 0 {
            if self.place == self.history.len() {
                self.draft = self.written();
            }
            self.place -= 1;
            self.set(&self.history[self.place].clone());
        }
    }

    /// To the line below, or from the last one to the turn after.
    fn down(&mut self) {
        let (begin, end) = (self.line_begin(), self.line_end());
        if end < self.text.len() {
            let column = self.cursor - begin;
            self.cursor = end + 1;
            self.cursor = self.line_end().min(self.cursor + column);
        } else if self.place < self.history.len() {
            self.place += 1;
            let turn = self.history.get(self.place).unwrap_or(&self.draft).clone();
            self.set(&turn);
        }
    }

    /// What a terminal of this width is sent to show the text in place of what it shows of it.
    pub(super) fn draw(&mut self, width: usize) -> String {
        let mut out = String::from("\r");
        if self.row > 0 {
            out += &format!("\x1b[{}A", self.row);
        }
        out += "\x1b[J";
        out += PROMPT;
        for c in &self.text {
            if *c == '\n' { out += "\r\n  " } else { out.push(*c) }
        }
        let (last, column) = place(&self.text, width);
        // A full row: the cursor waits behind it until something follows.
        if column == 0 {
            out += "\r\n";
        }
        let (row, column) = place(&self.text[..self.cursor], width);
        if last > row {
            out += &format!("\x1b[{}A", last - row);
        }
        out.push('\r');
        if column > 0 {
            out += &format!("\x1b[{column}C");
        }
        self.row = row;
        out
    }

    /// What leaves the text as it is shown: its end, and what comes next stands below it.
    pub(super) fn leave(&mut self, shown: &str, width: usize) -> String {
        let (last, _) = place(&shown.chars().collect::<Vec<_>>(), width);
        let down = last.saturating_sub(std::mem::take(&mut self.row));
        if down > 0 { format!("\x1b[{down}B\r\n") } else { "\r\n".into() }
    }

    /// From now on it is drawn in a new place.
    pub(super) fn moved(&mut self) {
        self.row = 0;
    }
}

/// Where what follows the text after the prompt stands: row and column, from 0.
fn place(text: &[char], width: usize) -> (usize, usize) {
    let (mut row, mut column) = (0, PROMPT.len());
    for c in text {
        if *c == '\n' {
            (row, column) = (row + 1, PROMPT.len());
            continue;
        }
        let own = c.width().unwrap_or(0);
        if column + own > width {
            (row, column) = (row + 1, 0);
        }
        column += own;
        if column >= width {
            (row, column) = (row + 1, 0);
        }
    }
    (row, column)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn press(editor: &mut Editor, keys: &[Key]) -> Step {
        let complete = |line: &str| command::complete(line, &["code".to_owned()]);
        keys.iter().map(|key| editor.press(key.clone(), complete)).last().unwrap_or(Step::Edited)
    }

    fn write(editor: &mut Editor, text: &str) {
        text.chars().for_each(|c| drop(press(editor, &[Key::Char(c)])));
    }

    #[test]
    fn keys_edit() {
        let mut editor = Editor::default();
        write(&mut editor, "one too  three");
        press(
            &mut editor,
            &[
                Key::Alt('b'),
                Key::Left,
                Key::Left,
                Key::Left,
                Key::Left,
                Key::Char('w'),
                Key::Delete,
                Key::End,
                Key::Control('w'),
                Key::Backspace,
            ],
        );
        assert_eq!(editor.written(), "one two ");
        press(&mut editor, &[Key::Home, Key::Alt('f'), Key::Control('k'), Key::Char('é'), Key::Control('u')]);
        assert_eq!(editor.written(), "");
        assert_eq!(press(&mut editor, &[Key::Control('d')]), Step::Over);
        write(&mut editor, "ab");
        assert_eq!(press(&mut editor, &[Key::Left, Key::Control('d'), Key::Enter]), Step::Turn("a".into()));
        write(&mut editor, "x");
        assert_eq!((press(&mut editor, &[Key::Control('c')]), editor.written()), (Step::Dropped, String::new()));
    }

    #[test]
    fn a_turn_can_have_several_lines() {
        let mut editor = Editor::default();
        write(&mut editor, "one\\");
        press(&mut editor, &[Key::Enter]);
        write(&mut editor, "two");
        press(&mut editor, &[Key::Up, Key::Char('!'), Key::Down, Key::Home, Key::Char('-')]);
        assert_eq!(press(&mut editor, &[Key::Enter]), Step::Turn("one!\\\n-two".into()));
        let pasted = Key::Paste("a\nb\x07".into());
        assert_eq!(press(&mut editor, &[pasted, Key::Enter]), Step::Turn("a\nb".into()));
    }

    #[test]
    fn turns_before_come_back_and_so_does_the_draft() {
        let mut editor = Editor::new(vec!["first".into(), "second".into()]);
        write(&mut editor, "draft");
        let mut see = |key: Key| {
            press(&mut editor, &[key]);
            editor.written()
        };
        assert_eq!(
            [Key::Up, Key::Up, Key::Up, Key::Down, Key::Down, Key::Down].map(&mut see),
            ["second", "first", "first", "second", "draft", "draft"]
        );
        assert_eq!(press(&mut editor, &[Key::Up, Key::Enter]), Step::Turn("second".into()));
        assert_eq!(editor.history.len(), 2, "what was just written is not remembered twice");
    }

    #[test]
    fn words_are_completed_as_far_as_they_are_alike() {
        let mut editor = Editor::default();
        write(&mut editor, "/und");
        press(&mut editor, &[Key::Tab]);
        assert_eq!(editor.written(), "/undo ");
        press(&mut editor, &[Key::Control('u')]);
        write(&mut editor, "/exp");
        press(&mut editor, &[Key::Tab]);
        assert_eq!(editor.written(), "/expert");
        assert_eq!(press(&mut editor, &[Key::Tab]), Step::Candidates(vec!["/experts ".into(), "/expert ".into()]));
        write(&mut editor, " c");
        press(&mut editor, &[Key::Tab]);
        assert_eq!(editor.written(), "/expert code ");
    }

    #[test]
    fn the_cursor_is_where_the_text_is() {
        let chars = |text: &str| text.chars().collect::<Vec<_>>();
        for (text, at) in
            [("", (0, 2)), ("abc", (0, 5)), ("12345678", (1, 0)), ("123456789", (1, 1)), ("a\nb", (1, 3)), ("1234567漢", (1, 2))]
        {
            assert_eq!(place(&chars(text), 10), at, "{text}");
        }
        let mut editor = Editor::default();
        write(&mut editor, "123456789\nb");
        assert_eq!(editor.draw(10), "\r\x1b[J> 123456789\r\n  b\r\x1b[3C");
        press(&mut editor, &[Key::Up]);
        assert_eq!(editor.draw(10), "\r\x1b[2A\x1b[J> 123456789\r\n  b\x1b[2A\r\x1b[3C");
        assert_eq!(editor.leave("123456789\nb", 10), "\x1b[2B\r\n");
    }
}
