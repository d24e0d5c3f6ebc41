//! `sequence`: every sequence is answered by one whole expert, with its own attention, embeddings and head.
//!
//! Who answers needs no gate: each expert's likelihood of the tokens x so far says whose kind of text this is. From equal priors, expert e has
//! the posterior p(e | x) = p(x | e) / Σ p(x | f), a sum over all experts f, and the next token the distribution Σ p(f | x) p(next | x, f). That is
//! the Bayesian mixture of prediction with expert advice under log loss (Cesa-Bianchi & Lugosi, Prediction, Learning, and Games, 2006, chapter
//! 9): its loss over a whole sequence is at most that of the best expert plus ln E nats, whatever the sequence.
//!
//! An expert whose posterior has fallen below [`FLOOR`] is dropped, at positions that depend on nothing else than the tokens ([`CHECK`]). The
//! bound stays exact for every expert that is kept: a dropped one counts from then on as one that says what the others say. And text that an
//! expert itself would write makes it drop out with a probability of at most E · [`FLOOR`]: there, Σ p(x | f) / p(x | e) is a martingale that
//! starts at E and would have to exceed 1 / [`FLOOR`] (Ville's inequality).

use super::{How, Method, Runtime};

/// The method.
pub const METHOD: Method = Method {
    name: "sequence",
    aliases: &[],
    about: "one whole expert answers each sequence, the one that its tokens speak for: needs no prompts; served, never written",
    all_experts: false,
    how: How::Runtime(Runtime::Sequence),
};

/// Posterior below which an expert is dropped.
pub const FLOOR: f64 = 1e-4;

/// Experts are dropped where so many tokens, or a multiple of that, have been read.
pub const CHECK: usize = 16;

/// Log likelihoods of the sequence so far, of those experts that are left, to the logarithms of their posteriors.
pub fn log_posterior(likelihoods: &[f64]) -> Vec<f64> {
    let most = likelihoods.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total = most + likelihoods.iter().map(|l| (l - most).exp()).sum::<f64>().ln();
    likelihoods.iter().map(|l| l - total).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn posteriors_are_the_likelihoods_shares() {
        let posterior: Vec<f64> = log_posterior(&[0.5f64.ln(), 0.25f64.ln(), 0.25f64.ln()]).iter().map(|l| l.exp()).collect();
        assert!(posterior.iter().zip([0.5, 0.25, 0.25]).all(|(a, b)| (a - b).abs() < 1e-12));
        // far beyond what exp can hold
        let posterior = log_posterior(&[-5000.0, -5000.0 - 3f64.ln()]);
        assert!((posterior[0] - 0.75f64.ln()).abs() < 1e-9 && (posterior[1] - 0.25f64.ln()).abs() < 1e-9);
    }
}
