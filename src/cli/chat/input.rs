//! Where the turns of `chat` come from: a terminal, with editing, history and completion, or the lines of stdin.

use std::{
    io::{self, IsTerminal, Lines, StdinLock},
    path::PathBuf,
};

use super::command;
#[cfg(unix)]
use super::terminal::Terminal;

/// What is read, turn by turn.
pub(super) enum Input {
    #[cfg(unix)]
    Terminal(Box<Terminal>),
    Lines(Lines<StdinLock<'static>>),
}

impl Input {
    /// Stdin. A terminal remembers turns in `history` and completes the names of `experts`.
    pub(super) fn open(history: PathBuf, experts: Vec<String>) -> io::Result<Self> {
        #[cfg(unix)]
        if io::stdin().is_terminal() && io::stderr().is_terminal() {
            return Ok(Self::Terminal(Box::new(Terminal::open(history, experts)?)));
        }
        let _ = (history, experts);
        Ok(Self::Lines(io::stdin().lines()))
    }

    /// Whether somebody sits at it.
    pub(super) fn is_terminal(&self) -> bool {
        !matches!(self, Self::Lines(_))
    }

    /// The next turn, all its lines; none at the end.
    pub(super) fn next(&mut self) -> io::Result<Option<String>> {
        let turn = match self {
            #[cfg(unix)]
            Self::Terminal(terminal) => terminal.turn()?,
            Self::Lines(lines) => {
                let mut turn = lines.next().transpose()?;
                while let Some(begun) = turn.as_mut().filter(|turn| command::goes_on(turn)) {
                    let Some(line) = lines.next().transpose()? else { break };
                    begun.push('\n');
                    *begun += &line;
                }
                turn
            }
        };
        Ok(turn.map(|turn| command::join(&turn)))
    }

    /// Whether somebody wants the answer to end.
    pub(super) fn interrupted(&mut self) -> bool {
        match self {
            #[cfg(unix)]
            Self::Terminal(terminal) => terminal.interrupted(),
            Self::Lines(_) => false,
        }
    }
}
