//! Keys, out of the bytes that a terminal sends for them.

/// A key, or what was pasted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Key {
    Char(char),
    /// with the control key
    Control(char),
    /// with the alt key
    Alt(char),
    Enter,
    Tab,
    Backspace,
    Delete,
    Left,
    Right,
    Up,
    Down,
    Home,
    End,
    Paste(String),
}

const PASTE_BEGINS: &[u8] = b"\x1b[200~";
const PASTE_ENDS: &[u8] = b"\x1b[201~";

/// Puts keys together, byte by byte.
#[derive(Debug, Default)]
pub(super) struct Keys {
    begun: Vec<u8>,
}

impl Keys {
    /// The key that ends with this byte. Sequences that mean nothing here give none.
    pub(super) fn push(&mut self, byte: u8) -> Option<Key> {
        self.begun.push(byte);
        let key = match self.begun.as_slice() {
            paste if paste.starts_with(PASTE_BEGINS) => {
                let text = paste.strip_suffix(PASTE_ENDS)?.get(PASTE_BEGINS.len()..)?;
                Some(Key::Paste(String::from_utf8_lossy(text).replace("\r\n", "\n").replace('\r', "\n")))
            }
            [0x1b] | [0x1b, b'[' | b'O'] => return None,
            [0x1b, b'O', last] => named(&[], *last),
            [0x1b, b'[', .., last] if !(0x40..=0x7e).contains(last) => return None,
            [0x1b, b'[', parameters @ .., last] => named(parameters, *last),
            [0x1b, letter] => Some(Key::Alt(char::from(*letter))),
            [b'\r' | b'\n'] => Some(Key::Enter),
            [b'\t'] => Some(Key::Tab),
            [0x7f | 0x08] => Some(Key::Backspace),
            [control @ 1..=0x1a] => Some(Key::Control(char::from(b'a' + control - 1))),
            text => match std::str::from_utf8(text) {
                Ok(text) => text.chars().next().filter(|c| !c.is_control()).map(Key::Char),
                Err(error) if error.error_len().is_none() => return None,
                Err(_) => None,
            },
        };
        self.begun.clear();
        key
    }
}

/// What ends with this byte after an escape.
fn named(parameters: &[u8], last: u8) -> Option<Key> {
    Some(match (parameters, last) {
        (b"", b'A') => Key::Up,
        (b"", b'B') => Key::Down,
        (b"", b'C') => Key::Right,
        (b"", b'D') => Key::Left,
        (b"", b'H') | (b"1" | b"7", b'~') => Key::Home,
        (b"", b'F') | (b"4" | b"8", b'~') => Key::End,
        (b"3", b'~') => Key::Delete,
        (b"1;5" | b"1;3", b'C') => Key::Alt('f'),
        (b"1;5" | b"1;3", b'D') => Key::Alt('b'),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_become_keys() {
        let read = |bytes: &str| {
            let mut keys = Keys::default();
            bytes.bytes().filter_map(|byte| keys.push(byte)).collect::<Vec<_>>()
        };
        assert_eq!(read("aé😀\r"), [Key::Char('a'), Key::Char('é'), Key::Char('😀'), Key::Enter]);
        assert_eq!(read("\x1b[A\x1bOH\x1b[3~\x1b[1;5C\x1bb"), [Key::Up, Key::Home, Key::Delete, Key::Alt('f'), Key::Alt('b')]);
        assert_eq!(read("\x03\x04\t\x7f"), [Key::Control('c'), Key::Control('d'), Key::Tab, Key::Backspace]);
        assert_eq!(read("\x1b[200~a\r\nb\x1b[A\rc\x1b[201~d"), [Key::Paste("a\nb\x1b[A\nc".into()), Key::Char('d')]);
        assert_eq!(read("\x1b[99;1Xa"), [Key::Char('a')], "what is unknown is passed over");
        let mut keys = Keys::default();
        assert_eq!([0xff, b'a'].map(|byte| keys.push(byte)), [None, Some(Key::Char('a'))]);
    }
}
