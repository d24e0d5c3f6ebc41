//! How well a model predicts a text: windows of its tokens in, losses out.
//!
//! Pure: a model and tokens. A window's first token has nothing before it and is not scored. Where the tokenizer starts a text with special
//! tokens they stand in front of every window, unscored as well, so that models with and without them are scored on the same tokens.
//! T tokens of a window, N rows of a forward pass, V vocabulary.

use std::ops::Range;

use candle_core::{D, Tensor};
use serde::Serialize;
use upcycle_architectures::decoder::{DecoderError, LanguageModel, Logits, Probe, Step};

/// Logits held at a time, at most about so many (256 MiB): rows of a forward pass times V.
const LOGITS: usize = 1 << 26;
/// Rows of a forward pass: more make nothing faster.
const ROWS: usize = 2048;

/// Loss of one window.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Loss {
    /// negative log-likelihood of the scored tokens, in nats
    pub sum: f64,
    /// tokens scored
    pub tokens: usize,
}

/// Loss per token over all windows; not a number if there is none.
pub fn mean(losses: &[Loss]) -> f64 {
    let (sum, tokens) = losses.iter().fold((0.0, 0), |(sum, tokens), loss| (sum + loss.sum, tokens + loss.tokens));
    sum / tokens as f64
}

/// Tokens that are read in one piece.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    /// what the tokenizer puts in front of a text, then the text's tokens
    pub tokens: Vec<u32>,
    /// how many stand in front
    pub prefix: usize,
}

impl Window {
    /// Positions whose next token is scored.
    pub(crate) fn scored(&self) -> Range<usize> {
        self.prefix..self.tokens.len().saturating_sub(1)
    }
}

/// Cuts a text into windows of `length` tokens and takes `count` of them, spread evenly from the first to the last; all if there are fewer.
pub fn windows(text: &[u32], prefix: &[u32], length: usize, count: usize) -> Vec<Window> {
    let all: Vec<&[u32]> = text.chunks_exact(length.max(1)).collect();
    let count = count.min(all.len());
    let at = |i: usize| i * (all.len() - 1) / (count - 1).max(1);
    (0..count).map(|i| Window { tokens: [prefix, all[at(i)]].concat(), prefix: prefix.len() }).collect()
}

/// Loss of every window. `done` is told how many more windows are finished.
pub fn losses(
    model: &impl LanguageModel,
    windows: &[Window],
    probe: &mut dyn Probe,
    done: &mut dyn FnMut(usize),
) -> Result<Vec<Loss>, DecoderError> {
    let rows = (LOGITS / model.config().vocab.max(1)).clamp(64, ROWS);
    let mut losses = Vec::with_capacity(windows.len());
    let mut rest = windows;
    while let Some(first) = rest.first() {
        let (mut count, mut total) = (1, first.tokens.len());
        while let Some(next) = rest.get(count).filter(|next| total + next.tokens.len() <= rows) {
            (count, total) = (count + 1, total + next.tokens.len());
        }
        let (batch, others) = rest.split_at(count);
        losses.extend(together(model, batch, rows, probe)?);
        done(count);
        rest = others;
    }
    Ok(losses)
}

/// Windows that run side by side; a single one that is longer than `rows` runs in pieces through its cache.
fn together(model: &impl LanguageModel, batch: &[Window], rows: usize, probe: &mut dyn Probe) -> Result<Vec<Loss>, DecoderError> {
    let mut losses = vec![Loss { sum: 0.0, tokens: 0 }; batch.len()];
    let longest = batch.iter().map(|window| window.tokens.len()).max().unwrap_or(0);
    let piece = if batch.len() > 1 { longest } else { rows };
    let mut caches: Vec<_> = batch.iter().map(|_| if longest <= piece { model.scratch() } else { model.cache() }).collect();
    for start in (0..longest).step_by(piece.max(1)) {
        let part = |window: &Window| start.min(window.tokens.len())..(start + piece).min(window.tokens.len());
        let mut steps: Vec<_> = batch
            .iter()
            .zip(&mut caches)
            .map(|(window, cache)| Step { tokens: &window.tokens[part(window)], cache, logits: Logits::All })
            .collect();
        let logits = model.forward(&mut steps, probe)?; // [N, V]
        // A row without a next token is scored on token 0, and not counted.
        let next = |window: &Window, at: usize| window.tokens.get(at + 1).copied().unwrap_or(0);
        let targets: Vec<u32> = batch.iter().flat_map(|window| part(window).map(|at| next(window, at))).collect();
        let mut nll = negative_log_likelihood(&logits, &targets)?.into_iter();
        for (window, loss) in batch.iter().zip(&mut losses) {
            let scored = window.scored();
            for (at, nll) in part(window).zip(&mut nll) {
                if scored.contains(&at) {
                    loss.sum += f64::from(nll);
                    loss.tokens += 1;
                }
            }
        }
    }
    Ok(losses)
}

/// logits [N, V], targets [N] -> log sum exp(logits) - logits[target], [N]
fn negative_log_likelihood(logits: &Tensor, targets: &[u32]) -> candle_core::Result<Vec<f32>> {
    let index = Tensor::new(targets, logits.device())?.unsqueeze(1)?; // [N, 1]
    let chosen = logits.gather(&index, 1)?.squeeze(1)?;
    (logits.log_sum_exp(D::Minus1)? - chosen)?.to_vec1()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_spread_from_the_first_to_the_last() {
        let text: Vec<u32> = (0..29).collect();
        let starts = |length, count| windows(&text, &[], length, count).iter().map(|w| w.tokens[0]).collect::<Vec<_>>();
        assert_eq!(starts(4, 3), [0, 12, 24]);
        assert_eq!(starts(4, 7), [0, 4, 8, 12, 16, 20, 24]);
        assert_eq!(starts(4, 100), [0, 4, 8, 12, 16, 20, 24]);
        assert_eq!(starts(4, 1), [0]);
        assert!(starts(30, 5).is_empty());
    }

    #[test]
    fn neither_the_prefix_nor_the_first_token_is_scored() {
        let window = &windows(&[5, 6, 7], &[1, 2], 3, 1)[0];
        assert_eq!(window.tokens, [1, 2, 5, 6, 7]);
        let scored: Vec<u32> = window.scored().map(|at| window.tokens[at + 1]).collect();
        assert_eq!(scored, [6, 7]);
    }

    #[test]
    fn means_are_per_token() {
        let losses = [Loss { sum: 6.0, tokens: 2 }, Loss { sum: 3.0, tokens: 1 }, Loss { sum: 0.0, tokens: 1 }];
        assert!((mean(&losses) - 2.25).abs() < 1e-12);
        assert!(mean(&[]).is_nan());
    }
}
