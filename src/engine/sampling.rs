//! Logits to the next token.
//!
//! The order of the steps is that of `transformers`: bias, penalties, temperature, top-k, top-p, min-p, draw.

use std::collections::{HashMap, VecDeque};

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

/// How the next token is chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// divisor of the logits; 0 takes the most likely token
    pub temperature: f32,
    /// keeps this many most likely tokens; 0 keeps all
    pub top_k: usize,
    /// keeps the most likely tokens until their probabilities reach this sum
    pub top_p: f32,
    /// keeps tokens at least this likely relative to the most likely one
    pub min_p: f32,
    /// divides positive and multiplies negative logits of tokens in prompt or text (arXiv 1909.05858)
    pub repetition_penalty: f32,
    /// subtracted from the logits of tokens in the text
    pub presence_penalty: f32,
    /// subtracted for each time that the token is in the text
    pub frequency_penalty: f32,
    /// so many of the newest tokens of prompt and text are penalised; all if not given
    pub repeat_last_n: Option<usize>,
    /// added to the logits of these tokens
    pub logit_bias: Vec<(u32, f32)>,
    /// the same seed and request give the same tokens; drawn if not given
    pub seed: Option<u64>,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repeat_last_n: None,
            logit_bias: Vec::new(),
            seed: None,
        }
    }
}

/// A parameter outside its range.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("`{parameter}` is {found}, expected {expected}")]
pub struct SamplingError {
    /// its name in the API
    pub parameter: &'static str,
    /// what was given
    pub found: f32,
    /// what can be given
    pub expected: &'static str,
}

impl Sampling {
    /// What a model's `generation_config.json` recommends; `do_sample: false` means temperature 0.
    pub fn recommended(generation_config: &Value) -> Self {
        let default = Self::default();
        let number = |key: &str, default: f32| generation_config[key].as_f64().map_or(default, |v| v as f32);
        let greedy = generation_config["do_sample"] == false;
        Self {
            temperature: if greedy { 0.0 } else { number("temperature", default.temperature) },
            top_k: generation_config["top_k"].as_u64().map_or(default.top_k, |k| k as usize),
            top_p: number("top_p", default.top_p),
            min_p: number("min_p", default.min_p),
            repetition_penalty: number("repetition_penalty", default.repetition_penalty),
            ..default
        }
    }

    /// Refuses values that have no meaning.
    pub fn check(&self) -> Result<(), SamplingError> {
        let checks = [
            ("temperature", self.temperature, 0.0..=100.0, "a number from 0 to 100"),
            ("top_p", self.top_p, 0.0..=1.0, "a number from 0 to 1"),
            ("min_p", self.min_p, 0.0..=1.0, "a number from 0 to 1"),
            ("repetition_penalty", self.repetition_penalty, f32::MIN_POSITIVE..=100.0, "a number above 0, up to 100"),
            ("presence_penalty", self.presence_penalty, -2.0..=2.0, "a number from -2 to 2"),
            ("frequency_penalty", self.frequency_penalty, -2.0..=2.0, "a number from -2 to 2"),
        ];
        let biases = self.logit_bias.iter().map(|&(_, bias)| ("logit_bias", bias, -100.0..=100.0, "numbers from -100 to 100"));
        for (parameter, found, range, expected) in checks.into_iter().chain(biases) {
            if !range.contains(&found) {
                return Err(SamplingError { parameter, found, expected });
            }
        }
        Ok(())
    }
}

/// One request's sampling state.
#[derive(Debug)]
pub struct Sampler {
    sampling: Sampling,
    rng: ChaCha8Rng,
    /// the tokens that are penalised
    seen: HashMap<u32, Seen>,
    /// the same in their order, where the oldest are forgotten; whether each is of the text
    newest: VecDeque<(u32, bool)>,
}

/// How often a token stands in prompt and text.
#[derive(Debug, Clone, Copy, Default)]
struct Seen {
    anywhere: u32,
    in_text: u32,
}

impl Sampler {
    /// A sampler for the text after `prompt`.
    pub fn new(sampling: Sampling, prompt: &[u32]) -> Self {
        let seed = sampling.seed.unwrap_or_else(|| rand::rng().random());
        let rng = ChaCha8Rng::seed_from_u64(seed);
        let mut sampler = Self { sampling, rng, seen: HashMap::new(), newest: VecDeque::new() };
        prompt.iter().for_each(|&token| sampler.see(token, false));
        sampler
    }

    fn see(&mut self, token: u32, in_text: bool) {
        let seen = self.seen.entry(token).or_default();
        seen.anywhere += 1;
        seen.in_text += u32::from(in_text);
        let Some(most) = self.sampling.repeat_last_n else { return };
        self.newest.push_back((token, in_text));
        while self.newest.len() > most
            && let Some((old, in_text)) = self.newest.pop_front()
            && let Some(seen) = self.seen.get_mut(&old)
        {
            seen.anywhere -= 1;
            seen.in_text -= u32::from(in_text);
            if seen.anywhere == 0 {
                self.seen.remove(&old);
            }
        }
    }

    /// Chooses the next token from `logits` [V] (which become scratch) and counts it as part of the text. Nothing but this request's
    /// prompt, parameters, seed and logits has a say. NaN counts as impossible.
    pub fn sample(&mut self, logits: &mut [f32]) -> u32 {
        self.bend(logits);
        let token = if self.sampling.temperature == 0.0 { most_likely(logits) } else { self.draw(logits) };
        self.see(token, true);
        token
    }

    /// Bias and penalties.
    fn bend(&self, logits: &mut [f32]) {
        let s = &self.sampling;
        for &(token, bias) in &s.logit_bias {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit += bias;
            }
        }
        for (&token, seen) in &self.seen {
            let Some(logit) = logits.get_mut(token as usize) else { continue };
            *logit = if *logit > 0.0 { *logit / s.repetition_penalty } else { *logit * s.repetition_penalty };
            if seen.in_text > 0 {
                *logit -= s.presence_penalty + s.frequency_penalty * seen.in_text as f32;
            }
        }
    }

    fn draw(&mut self, logits: &[f32]) -> u32 {
        let s = &self.sampling;
        let max = largest(logits);
        if !max.is_finite() {
            return most_likely(logits);
        }
        // (probability up to a factor, token); the most likely token has 1
        let weigh = |(token, &logit): (usize, &f32)| (((logit - max) / s.temperature).exp(), token as u32);
        let mut kept: Vec<(f32, u32)> = logits.iter().enumerate().map(weigh).filter(|(weight, _)| *weight > 0.0).collect();
        let by_weight = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        if s.top_k > 0 && s.top_k < kept.len() {
            kept.select_nth_unstable_by(s.top_k - 1, by_weight);
            kept.truncate(s.top_k);
        }
        if s.top_p < 1.0 {
            let target = s.top_p * sum(&kept);
            // Tokens this unlikely together do not reach 1 - top_p: they need not be sorted.
            let floor = (1.0 - s.top_p) * sum(&kept) / kept.len() as f32;
            if s.top_p > 0.0 {
                kept.retain(|(weight, _)| *weight >= floor);
            }
            kept.sort_unstable_by(by_weight);
            let mut reached = 0.0;
            let enough = kept.iter().position(|(weight, _)| {
                reached += weight;
                reached >= target
            });
            kept.truncate(enough.map_or(kept.len(), |last| last + 1));
        }
        kept.retain(|(weight, _)| *weight >= s.min_p);
        // The draw goes through the tokens in a fixed order, whatever the steps above did to it.
        kept.sort_unstable_by_key(|(_, token)| *token);
        let mut left = self.rng.random::<f32>() * sum(&kept);
        for &(weight, token) in &kept {
            left -= weight;
            if left < 0.0 {
                return token;
            }
        }
        kept.last().map_or_else(|| most_likely(logits), |(_, token)| *token)
    }
}

fn sum(kept: &[(f32, u32)]) -> f32 {
    kept.iter().map(|(weight, _)| weight).sum()
}

/// The first of the largest; where all are impossible, token 0.
fn most_likely(logits: &[f32]) -> u32 {
    let max = largest(logits);
    let first = logits.iter().position(|logit| *logit >= max);
    first.filter(|_| max > f32::NEG_INFINITY).unwrap_or(0) as u32
}

/// The largest that is a number.
fn largest(logits: &[f32]) -> f32 {
    const LANES: usize = 16;
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    // Lanes of their own, which the compiler keeps in vectors.
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (whole, rest) = logits.as_chunks::<LANES>();
    for chunk in whole {
        for (lane, logit) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, *logit);
        }
    }
    lanes.into_iter().chain(rest.iter().copied()).fold(f32::NEG_INFINITY, larger)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn sampler(sampling: Sampling, prompt: &[u32]) -> Sampler {
        Sampler::new(Sampling { seed: Some(sampling.seed.unwrap_or(1)), ..sampling }, prompt)
    }

    /// Share of each token among `n` draws from the same logits.
    fn shares(sampling: &Sampling, logits: &[f32], n: usize) -> Vec<f64> {
        let mut counts = vec![0.0; logits.len()];
        let mut sampler = sampler(sampling.clone(), &[]);
        for _ in 0..n {
            counts[sampler.sample(&mut logits.to_vec()) as usize] += 1.0 / n as f64;
        }
        counts
    }

    /// The distribution by the definitions, without short cuts.
    fn exact(s: &Sampling, logits: &[f32]) -> Vec<f64> {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        if s.top_k > 0 {
            order.truncate(s.top_k);
        }
        let weight = |i: usize| (f64::from(logits[i]) / f64::from(s.temperature)).exp();
        let total: f64 = order.iter().map(|&i| weight(i)).sum();
        let mut reached = 0.0;
        let cut = order.iter().position(|&i| {
            reached += weight(i) / total;
            reached >= f64::from(s.top_p) - 1e-6
        });
        order.truncate(cut.map_or(order.len(), |last| last + 1));
        let best = weight(order[0]);
        order.retain(|&i| weight(i) >= f64::from(s.min_p) * best - 1e-9);
        let total: f64 = order.iter().map(|&i| weight(i)).sum();
        (0..logits.len()).map(|i| if order.contains(&i) { weight(i) / total } else { 0.0 }).collect()
    }

    const LOGITS: [f32; 6] = [1.0, 3.0, 2.5, -1.0, 0.0, 2.0];

    #[test]
    fn draws_follow_the_exact_distribution() {
        for sampling in [
            Sampling::default(),
            Sampling { temperature: 0.5, ..Sampling::default() },
            Sampling { top_k: 3, ..Sampling::default() },
            Sampling { top_p: 0.7, ..Sampling::default() },
            Sampling { min_p: 0.3, temperature: 2.0, ..Sampling::default() },
            Sampling { top_k: 4, top_p: 0.9, min_p: 0.2, temperature: 1.5, ..Sampling::default() },
        ] {
            let exact = exact(&sampling, &LOGITS);
            for (token, (drawn, expected)) in shares(&sampling, &LOGITS, 20_000).iter().zip(&exact).enumerate() {
                assert!((drawn - expected).abs() < 0.015, "{sampling:?}: token {token} drawn {drawn}, expected {expected}");
                assert!(*expected > 0.0 || *drawn == 0.0, "{sampling:?}: token {token} was cut off but drawn");
            }
        }
    }

    #[test]
    fn temperature_0_takes_the_first_of_the_largest() {
        let mut greedy = sampler(Sampling { temperature: 0.0, ..Sampling::default() }, &[]);
        assert_eq!(greedy.sample(&mut [0.0, 5.0, f32::NAN, 5.0]), 1);
        assert_eq!(greedy.sample(&mut [f32::NAN, f32::NEG_INFINITY]), 0);
    }

    #[test]
    fn a_nucleus_of_nothing_is_the_most_likely_token() {
        let sampling = Sampling { top_p: 0.0, ..Sampling::default() };
        assert!((shares(&sampling, &LOGITS, 50)[1] - 1.0).abs() < 1e-9);
    }

    #[test]
    fn infinite_and_nan_logits_do_not_break_the_draw() {
        let mut any = sampler(Sampling::default(), &[]);
        assert_eq!(any.sample(&mut [f32::NAN, 1.0, f32::NEG_INFINITY]), 1);
        assert_eq!(any.sample(&mut [0.0, f32::INFINITY]), 1);
    }

    #[test]
    fn penalties_and_bias_bend_the_logits_as_defined() {
        let sampling = Sampling {
            temperature: 0.0,
            repetition_penalty: 2.0,
            presence_penalty: 0.5,
            frequency_penalty: 0.25,
            logit_bias: vec![(2, -100.0), (3, 1.0), (99, 5.0)],
            ..Sampling::default()
        };
        let mut s = sampler(sampling, &[0, 1]);
        (0..3).for_each(|_| s.see(4, true));
        let mut logits = [4.0, -1.0, 9.0, 0.5, 8.0];
        s.bend(&mut logits);
        for (bent, expected) in logits.iter().zip([2.0, -2.0, -91.0, 1.5, 4.0 - 0.5 - 0.75]) {
            assert!((bent - expected).abs() < 1e-6, "{logits:?}");
        }
    }

    #[test]
    fn what_was_sampled_counts_as_text() {
        let mut s = sampler(Sampling { temperature: 0.0, frequency_penalty: 2.0, ..Sampling::default() }, &[]);
        let drawn: Vec<u32> = (0..4).map(|_| s.sample(&mut [3.0, 2.5, 1.0])).collect();
        assert_eq!(drawn, [0, 1, 0, 2]);
    }

    #[test]
    fn only_the_newest_tokens_are_penalised() {
        let drawn = |repeat_last_n| {
            let sampling = Sampling { temperature: 0.0, repetition_penalty: 100.0, repeat_last_n, ..Sampling::default() };
            let mut s = sampler(sampling, &[0, 1, 1]);
            (0..4).map(|_| s.sample(&mut [4.0, 3.0, 2.0, 1.0])).collect::<Vec<_>>()
        };
        assert_eq!(drawn(Some(0)), [0, 0, 0, 0]);
        assert_eq!(drawn(Some(1)), [0, 1, 0, 1]);
        assert_eq!(drawn(Some(2)), [0, 2, 1, 0]);
        assert_eq!(drawn(None), drawn(Some(100)));
        assert_eq!(drawn(None)[..2], [2, 3]);
    }

    #[test]
    fn a_seed_fixes_the_draws() {
        let draws = |seed| {
            let mut s = Sampler::new(Sampling { seed: Some(seed), ..Sampling::default() }, &[]);
            (0..32).map(|_| s.sample(&mut LOGITS.to_vec())).collect::<Vec<_>>()
        };
        assert_eq!(draws(5), draws(5));
        assert_ne!(draws(5), draws(6));
    }

    #[test]
    fn recommendations_come_from_the_generation_config() {
        let config = json!({"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": 1});
        assert_eq!(Sampling::recommended(&config), Sampling { temperature: 0.6, top_k: 20, top_p: 0.95, ..Sampling::default() });
        assert!(Sampling::recommended(&json!({"do_sample": false, "temperature": 0.6})).temperature.abs() < f32::EPSILON);
        assert_eq!(Sampling::recommended(&Value::Null), Sampling::default());
    }

    #[test]
    fn values_out_of_range_are_named() {
        let error = Sampling { top_p: 1.5, ..Sampling::default() }.check().unwrap_err();
        assert_eq!(error.to_string(), "`top_p` is 1.5, expected a number from 0 to 1");
        for bad in [
            Sampling { temperature: -1.0, ..Sampling::default() },
            Sampling { temperature: f32::NAN, ..Sampling::default() },
            Sampling { repetition_penalty: 0.0, ..Sampling::default() },
            Sampling { logit_bias: vec![(0, 101.0)], ..Sampling::default() },
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
        Sampling::default().check().unwrap();
    }

    proptest! {
        #[test]
        fn only_tokens_of_the_exact_support_are_drawn(
            logits in prop::collection::vec(-8f32..8.0, 1..40), k in 0usize..8, p in 0.05f32..1.0, min_p in 0f32..0.5, seed: u64,
        ) {
            let sampling = Sampling { top_k: k, top_p: p, min_p, seed: Some(seed), ..Sampling::default() };
            let exact = exact(&sampling, &logits);
            // Rounding may move the border of the nucleus by one token of almost no weight.
            let slack = Sampling { top_p: (p + 1e-4).min(1.0), min_p: (min_p - 1e-4).max(0.0), ..sampling.clone() };
            let slack = self::exact(&slack, &logits);
            let token = Sampler::new(sampling, &[]).sample(&mut logits.clone()) as usize;
            prop_assert!(exact[token] > 0.0 || slack[token] > 0.0, "token {} of {:?}", token, exact);
        }
    }
}
