//! A conversation: what was said, how answers are drawn and by whom, and what commands change of that.

use std::{
    io::{self, Write as _},
    str::FromStr,
    thread,
    time::Duration,
};

use anstream::{AutoStream, ColorChoice, eprintln, stdout};
use anyhow::{Context as _, bail, ensure};
use serde_json::{Map, Value, json};
use tokio::sync::mpsc::error::TryRecvError;
use upcycle::engine::{Engine, EngineError, Event, Experts, Request, Sampling, Tell, Wishes, experts::LayerLoads};

use super::{
    super::{model::Loaded, run},
    command::{COMMANDS, Choice, Turn},
    paint::{self, Painter},
};

/// How long a stop may wait to be noticed.
const POLL: Duration = Duration::from_millis(2);

pub(super) struct Session<'a> {
    engine: &'a Engine,
    loaded: &'a Loaded,
    messages: Vec<Value>,
    sampling: Sampling,
    max_tokens: usize,
    /// as it was in the beginning
    most_tokens: usize,
    wishes: Wishes,
}

impl<'a> Session<'a> {
    pub(super) fn new(engine: &'a Engine, loaded: &'a Loaded, max_tokens: usize) -> Self {
        let sampling = engine.text().sampling.clone();
        let (messages, wishes) = (Vec::new(), Wishes::default());
        Self { engine, loaded, messages, sampling, max_tokens, most_tokens: max_tokens, wishes }
    }

    /// What its experts are called.
    pub(super) fn names(&self) -> &'a [String] {
        self.engine.experts().map_or(&[], Experts::names)
    }

    /// Does what a turn says. `stop` says whether an answer is to end where it is.
    pub(super) fn take(&mut self, turn: Turn, stop: &mut dyn FnMut() -> bool) -> anyhow::Result<()> {
        match turn {
            Turn::Nothing | Turn::Exit => {}
            Turn::Message(text) => {
                self.messages.push(json!({"role": "user", "content": text}));
                self.answer(stop)?;
            }
            Turn::Help => {
                let width = COMMANDS.iter().map(|(usage, _)| usage.len()).max().unwrap_or(0);
                COMMANDS.iter().for_each(|(usage, about)| eprintln!("{usage:width$}  {about}"));
                eprintln!("A line that ends with \\ goes on in the next; \"\"\" begins and ends a text of several lines.");
            }
            Turn::System(text) => {
                self.messages = (!text.is_empty()).then(|| json!({"role": "system", "content": text})).into_iter().collect();
            }
            Turn::Reset => self.messages.retain(|message| message["role"] == "system"),
            Turn::Undo => {
                let last = self.last_question()?;
                self.messages.truncate(last);
            }
            Turn::Regenerate => {
                let last = self.last_question()?;
                self.messages.truncate(last + 1);
                self.answer(stop)?;
            }
            Turn::Set(None) => self.list(),
            Turn::Set(Some((name, value))) => self.set(&name, &value)?,
            Turn::Experts => self.list_experts()?,
            Turn::Expert(name, choice) => {
                let (expert, mut wishes) = (self.expert(&name)?, self.wishes.clone());
                wishes.mask.remove(&expert);
                wishes.force.remove(&expert);
                match choice {
                    Choice::On => false,
                    Choice::Off => wishes.mask.insert(expert),
                    Choice::Only => wishes.force.insert(expert),
                };
                self.wish(wishes)?;
            }
            Turn::Bias(name, bias) => {
                let (expert, mut wishes) = (self.expert(&name)?, self.wishes.clone());
                wishes.bias.insert(expert, bias);
                self.wish(wishes)?;
            }
            Turn::Save(file) => {
                let conversation = json!({"model": self.loaded.name, "messages": self.messages});
                fs_err::write(file, format!("{conversation:#}\n"))?;
            }
            Turn::Load(file) => {
                let text = fs_err::read_to_string(&file)?;
                self.messages = messages(&text).with_context(|| format!("{file} holds no conversation"))?;
            }
        }
        Ok(())
    }

    fn last_question(&self) -> anyhow::Result<usize> {
        self.messages.iter().rposition(|message| message["role"] == "user").context("nothing has been said yet")
    }

    /// Answers what was said last. If there is no answer at all, it was not said.
    fn answer(&mut self, stop: &mut dyn FnMut() -> bool) -> anyhow::Result<()> {
        let text = self.print(stop);
        match text.as_deref() {
            Ok("") | Err(_) => drop(self.messages.pop()),
            Ok(text) => self.messages.push(json!({"role": "assistant", "content": text})),
        }
        text.map(drop)
    }

    /// Prints an answer as it comes, and returns it.
    fn print(&self, stop: &mut dyn FnMut() -> bool) -> anyhow::Result<String> {
        let prompt = self.engine.text().chat_prompt(&self.messages, &Map::new())?;
        let steering = self.engine.experts().map(|experts| self.wishes.steering(experts.choice())).transpose()?.flatten();
        let coloured = !self.names().is_empty() && AutoStream::choice(&io::stdout()) != ColorChoice::Never;
        let request = Request {
            prompt,
            sampling: self.sampling.clone(),
            max_tokens: Some(self.max_tokens),
            steering,
            tell: Tell { experts: coloured, ..Tell::default() },
            ..Request::default()
        };
        let mut events = self.engine.submit(request)?;
        let (mut out, mut text, mut painter) = (stdout().lock(), String::new(), Painter::default());
        while !stop() {
            match events.try_recv() {
                Ok(Event::Tokens(tokens)) => painter.told(&tokens),
                Ok(Event::Text(piece)) => {
                    write!(out, "{}", painter.paint(&piece))?;
                    out.flush()?;
                    text += &piece;
                }
                Ok(Event::Done(finish)) => {
                    run::report(self.loaded, &finish);
                    break;
                }
                Ok(Event::Failed(reason)) => bail!(EngineError::Failed(reason)),
                Err(TryRecvError::Empty) => thread::sleep(POLL),
                Err(TryRecvError::Disconnected) => bail!(EngineError::Stopped),
            }
        }
        if !text.ends_with('\n') {
            writeln!(out)?;
        }
        Ok(text)
    }

    fn experts(&self) -> anyhow::Result<&'a Experts> {
        self.engine.experts().context("the model has no experts")
    }

    fn expert(&self, name: &str) -> anyhow::Result<usize> {
        let experts = self.experts()?;
        experts.find(name).with_context(|| format!("there is no expert `{name}`; there are {}", experts.names().join(", ")))
    }

    /// From now on experts are chosen like this, if it leaves any.
    fn wish(&mut self, wishes: Wishes) -> anyhow::Result<()> {
        wishes.steering(self.experts()?.choice())?;
        self.wishes = wishes;
        Ok(())
    }

    fn list_experts(&self) -> anyhow::Result<()> {
        let experts = self.experts()?;
        let layers = experts.loads().layers;
        let count = |of: &dyn Fn(&LayerLoads) -> f64| layers.iter().map(of).sum::<f64>();
        let all = count(&|layer| layer.choices.iter().sum::<u64>() as f64).max(1.0);
        let recent = count(&|layer| layer.recent.iter().sum()).max(f64::MIN_POSITIVE);
        let width = experts.names().iter().map(|name| name.chars().count()).max().unwrap_or(0);
        for (e, name) in experts.names().iter().enumerate() {
            let bias = self.wishes.bias.get(&e).filter(|bias| **bias != 0.0).map_or(String::new(), |bias| format!("  bias {bias:+}"));
            let set = match (self.wishes.mask.contains(&e), self.wishes.force.contains(&e)) {
                (true, _) => "  off",
                (_, true) => "  only",
                _ => "",
            };
            let (name, own) = (paint::painted(&format!("{name:width$}"), e), 100.0 * count(&|layer| layer.choices[e] as f64) / all);
            eprintln!("{name}  {own:3.0} % of the choices, {:3.0} % of late{bias}{set}", 100.0 * count(&|layer| layer.recent[e]) / recent);
        }
        Ok(())
    }

    fn list(&self) {
        let Sampling { temperature, top_p, top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty, seed, .. } =
            &self.sampling;
        eprintln!("temperature {temperature}, top_p {top_p}, top_k {top_k}, min_p {min_p}, repetition_penalty {repetition_penalty},");
        eprintln!("presence_penalty {presence_penalty}, frequency_penalty {frequency_penalty}, max_tokens {},", self.max_tokens);
        let number = |number: Option<String>| number.unwrap_or_else(|| "auto".to_owned());
        let per_token = self.wishes.per_token.map(|k| k.to_string());
        eprintln!("seed {}, experts_per_token {}", number(seed.map(|seed| seed.to_string())), number(per_token));
    }

    fn set(&mut self, name: &str, value: &str) -> anyhow::Result<()> {
        let auto = &self.engine.text().sampling;
        let mut sampling = self.sampling.clone();
        match name {
            "temperature" => sampling.temperature = read(name, value, auto.temperature)?,
            "top_p" => sampling.top_p = read(name, value, auto.top_p)?,
            "top_k" => sampling.top_k = read(name, value, auto.top_k)?,
            "min_p" => sampling.min_p = read(name, value, auto.min_p)?,
            "repetition_penalty" => sampling.repetition_penalty = read(name, value, auto.repetition_penalty)?,
            "presence_penalty" => sampling.presence_penalty = read(name, value, auto.presence_penalty)?,
            "frequency_penalty" => sampling.frequency_penalty = read(name, value, auto.frequency_penalty)?,
            "seed" => sampling.seed = if value == "auto" { auto.seed } else { Some(read(name, value, 0)?) },
            "experts_per_token" => {
                let per_token = if value == "auto" { None } else { Some(read(name, value, 1)?) };
                self.wish(Wishes { per_token, ..self.wishes.clone() })?;
            }
            _ => {
                let most = read(name, value, self.most_tokens)?;
                ensure!(most > 0, "`{name}` must be at least 1");
                self.max_tokens = most;
            }
        }
        sampling.check()?;
        self.sampling = sampling;
        Ok(())
    }
}

/// A value, or what it is by itself.
fn read<T: FromStr>(name: &str, value: &str, auto: T) -> anyhow::Result<T> {
    if value == "auto" {
        return Ok(auto);
    }
    value.parse().ok().with_context(|| format!("`{name}` cannot be `{value}`: it is a number, or `auto`"))
}

/// The messages of a conversation that was saved, or of a list.
fn messages(text: &str) -> Option<Vec<Value>> {
    let conversation: Value = serde_json::from_str(text).ok()?;
    let messages = conversation.get("messages").unwrap_or(&conversation).as_array()?;
    let whole = |message: &Value| message["role"].is_string() && message["content"].is_string();
    messages.iter().all(whole).then(|| messages.clone())
}
