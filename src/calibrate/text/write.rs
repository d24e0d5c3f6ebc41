//! An expert writes: continuations of its starts, sampled at temperature 1 from its own model, many at a time.
//!
//! Each text has a generator of its own, seeded by the recipe's seed, the expert's name, and its number, so that neither order nor batch
//! decides what is written.

use std::collections::{HashSet, VecDeque};

use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use upcycle_architectures::decoder::{Cache, Decoder, DecoderError, Logits, NoProbe, Step};

use super::{Form, Sequence, TextError, TextOptions, encode::Encoder, starts};
use crate::{
    engine::sampling::{Sampler, Sampling},
    recipe::Expert,
    source::{self, Source},
};

/// How often a text that only repeats itself is written again before it is given up.
const RETRIES: usize = 2;

/// Times as many texts as asked for may be begun to make up for those that end early.
const MOST: usize = 4;

/// Length of the phrases that are looked at for repetition, and the share of different ones that a text must have.
const PHRASE: usize = 4;
const LEAST_DIFFERENT: f64 = 0.2;

/// Texts shorter than this are not judged.
const SHORT: usize = 16;

/// How likely it must be that a turn ends behind a plain answer, if the model is one that answers.
const ANSWERS: f32 = 0.05;

/// An expert, and everything that decides what it writes.
pub(super) struct Author<'a> {
    pub(super) name: &'a str,
    pub(super) expert: &'a Expert,
    pub(super) source: &'a Source,
    /// `None`: a chat if the expert answers
    pub(super) form: Option<Form>,
    /// what it goes on from instead of its prompts; none if empty
    pub(super) starts: Vec<Sequence>,
    pub(super) seed: u64,
    pub(super) encoder: &'a Encoder,
    pub(super) options: &'a TextOptions,
    pub(super) progress: &'a dyn Fn(&str),
}

/// What an expert wrote.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Written {
    pub(super) form: Form,
    /// start and continuation; a start that is used again does not count again
    pub(super) sequences: Vec<Sequence>,
    /// texts given up
    pub(super) dropped: usize,
}

impl Author<'_> {
    /// What it goes on from, in the forms that come into question, the better first.
    pub(super) fn starts(&self) -> Result<Vec<(Form, Vec<Sequence>)>, TextError> {
        if !self.starts.is_empty() {
            return Ok(vec![(self.form.unwrap_or(Form::Plain), self.starts.clone())]);
        }
        let forms = self.form.map_or_else(|| vec![Form::Chat, Form::Plain], |form| vec![form]);
        let starts = forms.into_iter().map(|form| Ok((form, starts::starts(self.expert, form, self.encoder)?)));
        let mut starts = starts.collect::<Result<Vec<_>, TextError>>()?;
        starts.retain(|(_, starts)| !starts.is_empty());
        if starts.is_empty() {
            let reason = "it has neither a `text_file` nor `positive_prompts` to go on from".to_owned();
            return Err(TextError::None { expert: self.name.to_owned(), reason });
        }
        Ok(starts)
    }

    fn sampler(&self, text: usize, attempt: usize) -> Sampler {
        let mut hash = Sha256::new();
        hash.update(self.name);
        for number in [self.seed, text as u64, attempt as u64] {
            hash.update(number.to_le_bytes());
        }
        let seed = hash.finalize().iter().take(8).fold(0, |seed, byte| seed << 8 | u64::from(*byte));
        Sampler::new(Sampling { seed: Some(seed), ..Sampling::default() }, &[])
    }
}

/// Lets the expert write from the first of `starts`, or from the second if it does not answer in a chat.
pub(super) fn write(author: &Author<'_>, decoder: &Decoder, starts: &[(Form, Vec<Sequence>)]) -> Result<Written, TextError> {
    let (form, starts) = match starts {
        [(Form::Chat, _), plain] if !answers(decoder, author.encoder)? => plain,
        _ => &starts[0],
    };
    let TextOptions { continuations, length, .. } = *author.options;
    let mut written = Written { form: *form, sequences: Vec::new(), dropped: 0 };
    let (mut begun, mut missing) = (0, continuations * length);
    while begun < MOST * continuations && 2 * missing > length {
        let end = (begun + missing.div_ceil(length)).min(MOST * continuations);
        let texts = attempt(author, decoder, starts, begun..end)?;
        for (number, text) in (begun..end).zip(texts) {
            // What was given up is not made up for: the next would be no better.
            missing = missing.saturating_sub(text.as_ref().map_or(length, Vec::len));
            let Some(text) = text else {
                written.dropped += 1;
                continue;
            };
            if text.is_empty() {
                continue;
            }
            let start = starts[number % starts.len()].clone();
            let start = if number < starts.len() { start } else { start.uncounted() };
            let sequence: Sequence =
                start.tokens.into_iter().zip(start.counts).chain(text.into_iter().map(|token| (token, true))).collect();
            written.sequences.push(sequence);
        }
        begun = end;
    }
    Ok(written)
}

/// The texts of these numbers, `None` for those that repeat themselves however often they are written.
fn attempt(
    author: &Author<'_>,
    decoder: &Decoder,
    starts: &[Sequence],
    numbers: std::ops::Range<usize>,
) -> Result<Vec<Option<Vec<u32>>>, TextError> {
    let mut texts: Vec<Option<Vec<u32>>> = vec![None; numbers.len()];
    let mut open: Vec<usize> = numbers.clone().collect();
    for attempt in 0..=RETRIES {
        let jobs = open.iter().map(|&number| Job {
            number,
            start: &starts[number % starts.len()].tokens,
            text: Vec::new(),
            cache: decoder.cache(),
            sampler: author.sampler(number, attempt),
        });
        for (number, text) in run(author, decoder, jobs.collect())? {
            if !repeats(&text) {
                texts[number - numbers.start] = Some(text);
            }
        }
        open.retain(|number| texts[number - numbers.start].is_none());
    }
    Ok(texts)
}

/// A text that is being written.
struct Job<'a> {
    number: usize,
    start: &'a [u32],
    text: Vec<u32>,
    cache: Cache,
    sampler: Sampler,
}

/// Writes all texts to their ends, some at a time; they come as they are finished.
fn run(author: &Author<'_>, decoder: &Decoder, mut waiting: VecDeque<Job<'_>>) -> Result<Vec<(usize, Vec<u32>)>, TextError> {
    let (encoder, options, eos) = (author.encoder, author.options, source::eos_ids(author.source));
    let ends = |token: u32| encoder.tokenizer.is_eos(token) || encoder.tokenizer.is_special(token) || eos.contains(&token);
    let context = encoder.context.min(decoder.config().max_positions);
    let (all, mut finished, mut active) = (waiting.len(), Vec::new(), Vec::new());
    loop {
        let free = options.batch.max(1).saturating_sub(active.len()).min(waiting.len());
        active.extend(waiting.drain(..free));
        if active.is_empty() {
            return Ok(finished);
        }
        let mut steps: Vec<Step<'_>> = active.iter_mut().map(Job::step).collect();
        let logits = decoder.forward(&mut steps, &mut NoProbe)?.to_vec2::<f32>().map_err(DecoderError::from)?;
        let mut going = Vec::with_capacity(active.len());
        for (mut job, mut logits) in active.into_iter().zip(logits) {
            if logits.iter().any(|logit| logit.is_nan()) {
                return Err(TextError::NotFinite { expert: author.name.to_owned() });
            }
            // The composite has the base's vocabulary, whatever an expert has added to it.
            logits.truncate(encoder.vocab);
            let token = job.sampler.sample(&mut logits);
            if !ends(token) {
                job.text.push(token);
                if job.text.len() < options.length && job.start.len() + job.text.len() < context {
                    going.push(job);
                    continue;
                }
            }
            finished.push((job.number, job.text));
            (author.progress)(&format!("{}: {} of {all} texts written", author.name, finished.len()));
        }
        active = going;
    }
}

impl Job<'_> {
    /// What it has not read yet: at first its start, then what it wrote last.
    fn step(&mut self) -> Step<'_> {
        let read = self.cache.len();
        let tokens = if read < self.start.len() { &self.start[read..] } else { &self.text[read - self.start.len()..] };
        Step { tokens, cache: &mut self.cache, logits: Logits::Last }
    }
}

/// Whether a text says hardly anything but what it has said.
fn repeats(text: &[u32]) -> bool {
    let different = text.windows(PHRASE).collect::<HashSet<_>>().len();
    text.len() >= SHORT && (different as f64) < LEAST_DIFFERENT * (text.len() - PHRASE + 1) as f64
}

/// Whether the model was trained on chats in this template: one that was ends its turn behind an answer. Many base models come with a template
/// that they do not know.
fn answers(decoder: &Decoder, encoder: &Encoder) -> Result<bool, TextError> {
    let Some(template) = &encoder.template else { return Ok(false) };
    let turns = [json!({"role": "user", "content": "Hello!"}), json!({"role": "assistant", "content": "Hello! How can I help you today?"})];
    let (chat, end) = encoder.tagged(template, &turns)?;
    let Some(end) = end else { return Ok(false) };
    let (mut cache, tokens) = (decoder.cache(), &chat.tokens[..end]);
    let logits = decoder.forward(&mut [Step { tokens, cache: &mut cache, logits: Logits::Last }], &mut NoProbe)?;
    let logits = logits.flatten_all().and_then(|logits| logits.to_vec1::<f32>()).map_err(DecoderError::from)?;
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = logits.iter().map(|logit| (logit - most).exp()).sum();
    let probability = logits.get(chat.tokens[end] as usize).map_or(0.0, |logit| (logit - most).exp() / sum);
    Ok(probability >= ANSWERS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_that_repeat_themselves_are_seen() {
        let text = |period: u32| (0..128).map(|i| i % period).collect::<Vec<u32>>();
        assert!(repeats(&text(1)) && repeats(&text(10)) && repeats(&text(24)));
        assert!(!repeats(&text(26)) && !repeats(&text(128)));
        assert!(!repeats(&[7; 15]) && repeats(&[7; 16]) && !repeats(&[]));
    }
}
