//! What a turn of `chat` says: a message, or a command that begins with a slash. Also what may be written next, for completion.

use std::str::FromStr;

/// A turn.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Turn {
    Nothing,
    Message(String),
    Help,
    Exit,
    System(String),
    Reset,
    Undo,
    Regenerate,
    /// without a name, all are listed
    Set(Option<(String, String)>),
    Experts,
    /// one expert, by name or index
    Expert(String, Choice),
    Bias(String, f32),
    Save(String),
    Load(String),
}

/// Whether an expert may be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Choice {
    On,
    Off,
    Only,
}

/// Usage and meaning of each command; the first word is what is typed.
pub(super) const COMMANDS: &[(&str, &str)] = &[
    ("/help", "this list"),
    ("/system TEXT", "what the model should be (starts again)"),
    ("/reset", "start again"),
    ("/undo", "take the last message and its answer back"),
    ("/regenerate", "answer the last message again"),
    ("/set NAME VALUE", "temperature, top_p, ... (alone: list them; VALUE auto: as it was); also /temperature 0.7"),
    ("/experts", "the experts, what each had to do and what is set"),
    ("/expert NAME on|off|only", "whether an expert may be chosen"),
    ("/bias NAME X", "add X to what the routers give an expert"),
    ("/save FILE", "write the conversation as JSON"),
    ("/load FILE", "go on with a conversation"),
    ("/exit", "leave (or Ctrl-D)"),
];

/// What `/set` sets.
pub(super) const SETTINGS: &[&str] = &[
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "max_tokens",
    "seed",
    "experts_per_token",
];

/// Reads a turn; the error says what is wrong with a command.
pub(super) fn parse(line: &str) -> Result<Turn, String> {
    let line = line.trim();
    if line.is_empty() {
        return Ok(Turn::Nothing);
    }
    if !line.starts_with('/') {
        return Ok(Turn::Message(line.to_owned()));
    }
    let (name, rest) = word(line);
    let (first, more) = word(rest);
    match name {
        "/help" => Ok(Turn::Help),
        "/exit" | "/quit" => Ok(Turn::Exit),
        "/system" => Ok(Turn::System(rest.to_owned())),
        "/reset" => Ok(Turn::Reset),
        "/undo" => Ok(Turn::Undo),
        "/regenerate" => Ok(Turn::Regenerate),
        "/experts" => Ok(Turn::Experts),
        "/set" if rest.is_empty() => Ok(Turn::Set(None)),
        "/set" => setting(first, more),
        "/expert" => {
            let (name, last) = last_word(rest);
            let choice = match last {
                "on" => Choice::On,
                "off" => Choice::Off,
                "only" => Choice::Only,
                _ => return Err("`/expert` needs a name and `on`, `off` or `only`".into()),
            };
            named(name, "/expert").map(|name| Turn::Expert(name, choice))
        }
        "/bias" => {
            let (name, bias) = last_word(rest);
            let bias = number(bias).ok_or("`/bias` needs a name and a number")?;
            named(name, "/bias").map(|name| Turn::Bias(name, bias))
        }
        "/save" | "/load" if rest.is_empty() => Err(format!("`{name}` needs a file")),
        "/save" => Ok(Turn::Save(rest.to_owned())),
        "/load" => Ok(Turn::Load(rest.to_owned())),
        _ if SETTINGS.contains(&&name[1..]) => setting(&name[1..], rest),
        _ => Err(format!("there is no command {name}; /help lists them")),
    }
}

fn setting(name: &str, value: &str) -> Result<Turn, String> {
    if !SETTINGS.contains(&name) {
        return Err(format!("there is no setting `{name}`, but {}", SETTINGS.join(", ")));
    }
    if value.is_empty() {
        Err(format!("`{name}` needs a value, or `auto`"))
    } else {
        Ok(Turn::Set(Some((name.to_owned(), value.to_owned()))))
    }
}

fn named(name: &str, command: &str) -> Result<String, String> {
    if name.is_empty() { Err(format!("`{command}` needs the name of an expert; /experts lists them")) } else { Ok(name.to_owned()) }
}

/// A finite number.
pub(super) fn number<T: FromStr + Into<f64> + Copy>(text: &str) -> Option<T> {
    text.parse().ok().filter(|number: &T| (*number).into().is_finite())
}

fn word(text: &str) -> (&str, &str) {
    let (word, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
    (word, rest.trim())
}

fn last_word(text: &str) -> (&str, &str) {
    let (rest, word) = text.rsplit_once(char::is_whitespace).unwrap_or(("", text));
    (rest.trim(), word)
}

/// Where the word that ends `line` begins, and what it may become.
pub(super) fn complete(line: &str, experts: &[String]) -> (usize, Vec<String>) {
    let start = line.rfind(char::is_whitespace).map_or(0, |space| space + 1);
    let (before, begun) = line.split_at(start);
    let before: Vec<&str> = before.split_whitespace().collect();
    let words: Vec<&str> = match before[..] {
        [] if begun.starts_with('/') => COMMANDS.iter().map(|(usage, _)| word(usage).0).collect(),
        ["/set"] => SETTINGS.to_vec(),
        ["/expert" | "/bias"] => experts.iter().map(String::as_str).collect(),
        ["/expert", _] => vec!["on", "off", "only"],
        _ => Vec::new(),
    };
    let fitting = words.into_iter().filter(|word| word.starts_with(begun)).map(|word| format!("{word} "));
    (start, fitting.collect())
}

/// Whether a turn goes on in the next line: after a backslash, or within `"""`.
pub(super) fn goes_on(turn: &str) -> bool {
    let turn = turn.trim();
    match turn.strip_prefix(QUOTE) {
        Some(rest) => !rest.ends_with(QUOTE),
        None => turn.ends_with('\\'),
    }
}

/// A whole turn without what held its lines together.
pub(super) fn join(turn: &str) -> String {
    let trimmed = turn.trim();
    match trimmed.strip_prefix(QUOTE).and_then(|rest| rest.strip_suffix(QUOTE)) {
        Some(text) => text.trim_matches('\n').to_owned(),
        None => turn.replace("\\\n", "\n"),
    }
}

const QUOTE: &str = "\"\"\"";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_read_with_what_they_need() {
        let set = |name: &str, value: &str| Turn::Set(Some((name.into(), value.into())));
        for (line, turn) in [
            ("  ", Turn::Nothing),
            (" What is /help? ", Turn::Message("What is /help?".into())),
            ("/help", Turn::Help),
            ("/quit", Turn::Exit),
            ("/system  Be  brief. ", Turn::System("Be  brief.".into())),
            ("/set", Turn::Set(None)),
            ("/set temperature 0.5", set("temperature", "0.5")),
            ("/top_k auto", set("top_k", "auto")),
            ("/expert old german off", Turn::Expert("old german".into(), Choice::Off)),
            ("/bias math -1.5", Turn::Bias("math".into(), -1.5)),
            ("/save a b.json", Turn::Save("a b.json".into())),
        ] {
            assert_eq!(parse(line), Ok(turn));
        }
        for (line, words) in [
            ("/halp", "there is no command /halp"),
            ("/temperature", "needs a value"),
            ("/set heat 1", "there is no setting `heat`"),
            ("/expert math", "`on`, `off` or `only`"),
            ("/expert off", "needs the name"),
            ("/bias math much", "a number"),
            ("/bias math nan", "a number"),
            ("/load", "needs a file"),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn every_command_and_setting_is_understood() {
        for (usage, _) in COMMANDS {
            let line = usage.replace("on|off|only", "only").replace("NAME VALUE", "seed 1").replace('X', "1");
            assert!(parse(&line).is_ok_and(|turn| !matches!(turn, Turn::Message(_))), "{usage}");
        }
        assert!(SETTINGS.iter().all(|name| parse(&format!("/{name} 1")).is_ok()));
    }

    #[test]
    fn words_are_completed_where_they_fit() {
        let experts = ["code".to_owned(), "chess".to_owned()];
        let complete = |line: &str| complete(line, &experts);
        assert_eq!(complete("/re"), (0, vec!["/reset ".into(), "/regenerate ".into()]));
        assert_eq!(complete("/set top"), (5, vec!["top_p ".into(), "top_k ".into()]));
        assert_eq!(complete("/bias co"), (6, vec!["code ".into()]));
        assert_eq!(complete("/expert code o").1.len(), 3);
        assert_eq!(complete("hello c").1.len(), 0);
    }

    #[test]
    fn turns_of_several_lines_are_joined() {
        assert!(goes_on("a \\") && goes_on("\"\"\"a\nb") && goes_on("\"\"\""));
        assert!(!goes_on("a") && !goes_on("\"\"\"a\nb\"\"\"") && !goes_on("a \\\nb") && !goes_on("say \"\"\""));
        assert_eq!(join("a\\\nb\\\nc"), "a\nb\nc");
        assert_eq!(join("\"\"\"\na\\\nb\n\"\"\""), "a\\\nb");
        assert_eq!(join("a"), "a");
    }
}
