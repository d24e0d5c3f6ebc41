//! Ensembles against a plain computation of the mixture, its bound, and what must not change who answers.

use candle_core::{DType, Device, Tensor};
use upcycle_architectures::{
    Dtype, View,
    decoder::{Decoder, DecoderError, Ensemble, EnsembleCache, LanguageModel as _, Logits, NoProbe, Probe, Step},
};
use upcycle_routers::{
    init::sequence::{CHECK, FLOOR},
    route::Routing,
};

use crate::support::{Case, assert_close, logits, values};

/// How far an expert is from the golden case, in every weight: the second is nearly the first, so that it stays for a while.
const EXPERTS: [f32; 3] = [0.0, 0.03, 0.1];

fn expert(case: &Case, distance: f32) -> Decoder {
    let mut weights = case.weights.clone();
    for (seed, tensor) in weights.0.values_mut().enumerate() {
        let noise = |i: usize| ((i as f32 + 1.0) * (seed as f32 + 1.3) * 12.9898).sin();
        let moved: Vec<f32> = tensor.to_f32().iter().enumerate().map(|(i, w)| w + distance * noise(i)).collect();
        *tensor = View::from_f32(&moved, Dtype::F32, tensor.info.shape.clone()).unwrap();
    }
    Decoder::load(case.family, &case.config, &weights, DType::F32, &Device::Cpu).unwrap()
}

fn ensemble(case: &Case) -> Ensemble {
    Ensemble::new(EXPERTS.iter().map(|distance| expert(case, *distance)).collect()).unwrap()
}

/// Tokens that the first expert likes.
fn tokens(case: &Case, first: u32, count: usize) -> Vec<u32> {
    let decoder = expert(case, 0.0);
    let mut tokens = vec![first];
    while tokens.len() < count {
        let row = logits(&decoder, &tokens)[(tokens.len() - 1) * case.config.vocab..].to_vec();
        // not the likeliest, which would say little about the others, but a different one of the likely ones each time
        let mut order: Vec<usize> = (0..row.len()).collect();
        order.sort_by(|a, b| row[*b].total_cmp(&row[*a]));
        tokens.push(order[tokens.len() % 3] as u32);
    }
    tokens
}

fn run(ensemble: &Ensemble, tokens: &[u32], cache: &mut EnsembleCache, logits: Logits) -> Vec<f32> {
    values(&ensemble.forward(&mut [Step { tokens, cache, logits }], &mut NoProbe).unwrap())
}

fn all(ensemble: &Ensemble, tokens: &[u32]) -> Vec<f32> {
    run(ensemble, tokens, &mut ensemble.cache(), Logits::All)
}

/// log softmax of rows of V
fn log_softmax(logits: &[f32], vocab: usize) -> Vec<f64> {
    let row = |row: &[f32]| {
        let total = row.iter().map(|v| f64::from(*v).exp()).sum::<f64>().ln();
        row.iter().map(|v| f64::from(*v) - total).collect::<Vec<_>>()
    };
    logits.chunks_exact(vocab).flat_map(row).collect()
}

/// Log probabilities of the next tokens, and who is left behind each token, written down as the method is.
fn by_hand(case: &Case, tokens: &[u32]) -> (Vec<f64>, Vec<Vec<usize>>) {
    let vocab = case.config.vocab;
    let said: Vec<Vec<f64>> = EXPERTS.iter().map(|distance| log_softmax(&logits(&expert(case, *distance), tokens), vocab)).collect();
    let mut weights = vec![1.0; EXPERTS.len()];
    let (mut mixture, mut left) = (Vec::new(), Vec::new());
    for (t, &token) in tokens.iter().enumerate() {
        if t > 0 {
            weights.iter_mut().zip(&said).for_each(|(weight, said)| *weight *= said[(t - 1) * vocab + token as usize].exp());
        }
        let total: f64 = weights.iter().sum();
        weights.iter_mut().for_each(|weight| *weight /= total);
        mixture.extend((0..vocab).map(|v| weights.iter().zip(&said).map(|(w, said)| w * said[t * vocab + v].exp()).sum::<f64>().ln()));
        if (t + 1) % CHECK == 0 {
            weights.iter_mut().filter(|weight| **weight < FLOOR).for_each(|weight| *weight = 0.0);
        }
        left.push((0..weights.len()).filter(|e| weights[*e] > 0.0).collect());
    }
    (mixture, left)
}

#[test]
fn the_mixture_is_what_the_formula_says_and_ends_in_one_expert() {
    let case = Case::open("llama-gqa");
    let ensemble = ensemble(&case);
    let tokens = tokens(&case, 3, 100);
    let (expected, left) = by_hand(&case, &tokens);
    assert!(left[CHECK..].iter().any(|left| left.len() == 2), "one goes first: {left:?}");
    assert_eq!(left.last().unwrap(), &[0], "the first expert's text: {left:?}");
    let mut cache = ensemble.cache();
    let got = run(&ensemble, &tokens, &mut cache, Logits::All);
    let mixture = log_softmax(&got, case.config.vocab);
    let difference = mixture.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(difference < 1e-3, "{difference}");
    assert_eq!((cache.left().collect::<Vec<_>>(), ensemble.answering(&cache), cache.len()), (vec![0], Some(0), 100));
    // Behind the decision, logits are that expert's, not only their distribution.
    let last = (tokens.len() - 1) * case.config.vocab;
    assert_close("last row", &got[last..], &logits(&expert(&case, 0.0), &tokens)[last..]);
}

#[test]
fn a_sequence_costs_at_most_ln_e_more_than_with_the_best_expert() {
    let case = Case::open("llama-gqa");
    let (ensemble, vocab) = (ensemble(&case), case.config.vocab);
    let loss = |logits: &[f32], tokens: &[u32]| {
        let said = log_softmax(logits, vocab);
        tokens[1..].iter().enumerate().map(|(t, token)| -said[t * vocab + *token as usize]).sum::<f64>()
    };
    for first in [1, 5, 9] {
        let tokens = tokens(&case, first, 80);
        let best = EXPERTS.iter().map(|distance| loss(&logits(&expert(&case, *distance), &tokens), &tokens)).fold(f64::INFINITY, f64::min);
        let mixture = loss(&all(&ensemble, &tokens), &tokens);
        assert!(mixture <= best + (EXPERTS.len() as f64).ln() + 1e-3, "{mixture} against {best}");
    }
}

#[test]
fn neither_calls_nor_neighbours_change_who_answers() {
    let case = Case::open("llama-gqa");
    let ensemble = ensemble(&case);
    let texts: Vec<Vec<u32>> = [(3, 90), (7, 40), (11, 5), (2, 64)].map(|(first, count)| tokens(&case, first, count)).into();
    let alone: Vec<Vec<f32>> = texts.iter().map(|text| all(&ensemble, text)).collect();
    for length in [1, 7, 16, 33] {
        let mut caches: Vec<EnsembleCache> = texts.iter().map(|_| ensemble.cache()).collect();
        let mut got = vec![Vec::new(); texts.len()];
        for start in (0..90).step_by(length) {
            let pieces: Vec<&[u32]> = texts.iter().map(|text| &text[start.min(text.len())..(start + length).min(text.len())]).collect();
            let steps = pieces.iter().zip(&mut caches).map(|(tokens, cache)| Step { tokens, cache, logits: Logits::All });
            let logits = values(&ensemble.forward(&mut steps.collect::<Vec<_>>(), &mut NoProbe).unwrap());
            let mut rows = logits.chunks_exact(case.config.vocab);
            for (got, piece) in got.iter_mut().zip(&pieces) {
                got.extend(rows.by_ref().take(piece.len()).flatten());
            }
        }
        for ((got, alone), cache) in got.iter().zip(&alone).zip(&caches) {
            assert_close(&format!("pieces of {length}"), got, alone);
            assert!(cache.len() % CHECK != 0 || !cache.is_empty());
        }
    }
    let (vocab, text) = (case.config.vocab, &texts[0]);
    for (wanted, from) in [(Logits::Last, text.len() - 1), (Logits::None, text.len())] {
        assert_close("fewer rows", &run(&ensemble, text, &mut ensemble.cache(), wanted), &alone[0][from * vocab..]);
    }
    // While several are left, too.
    assert_close("undecided", &run(&ensemble, &text[..12], &mut ensemble.cache(), Logits::Last), &alone[0][11 * vocab..12 * vocab]);
}

#[test]
fn what_was_forgotten_can_be_read_again() {
    let case = Case::open("llama-gqa");
    let ensemble = ensemble(&case);
    let (text, other) = (tokens(&case, 3, 100), tokens(&case, 8, 60));
    let expected = all(&ensemble, &[&text[..90], &other[..9]].concat());
    for (read, len, kept) in [(100, 90, 90), (12, 5, 0), (100, 10, 0), (30, 40, 30)] {
        let mut cache = ensemble.cache();
        run(&ensemble, &text[..read], &mut cache, Logits::None);
        cache.truncate(len);
        assert_eq!(cache.len(), kept, "of {read} to {len}");
        run(&ensemble, &text[kept..90], &mut cache, Logits::None);
        let got = run(&ensemble, &other[..9], &mut cache, Logits::All);
        assert_close("read again", &got, &expected[90 * case.config.vocab..]);
    }
}

/// Remembers what it is shown.
#[derive(Default)]
struct Seen(Vec<(usize, Vec<f32>, Routing)>);

impl Probe for Seen {
    fn route(&mut self, layer: usize, logits: &[f32], routing: &mut Routing) {
        self.0.push((layer, logits.to_vec(), routing.clone()));
    }
}

#[test]
fn a_probe_sees_the_posterior_as_one_router() {
    let case = Case::open("llama-gqa");
    let ensemble = ensemble(&case);
    let text = tokens(&case, 3, 70);
    let (_, left) = by_hand(&case, &text);
    let mut seen = Seen::default();
    let mut caches = [ensemble.cache(), ensemble.cache()];
    let [a, b] = &mut caches;
    let steps = &mut [Step { tokens: &text, cache: a, logits: Logits::None }, Step { tokens: &text[..3], cache: b, logits: Logits::None }];
    ensemble.forward(steps, &mut seen).unwrap();
    let [(0, logits, routing)] = seen.0.as_slice() else { panic!("{} calls", seen.0.len()) };
    assert_eq!((logits.len(), routing.top_k, routing.experts.len()), (73 * EXPERTS.len(), 1, 73));
    for (t, row) in logits.chunks_exact(EXPERTS.len()).enumerate() {
        let total: f32 = row.iter().map(|v| v.exp()).sum();
        assert!((total - 1.0).abs() < 1e-5, "{row:?}");
        assert!(
            (row[routing.experts[t] as usize].exp() - routing.weights[t]).abs() < 1e-6 && row.iter().all(|v| v.exp() <= routing.weights[t])
        );
        // Whoever is left behind a token has read the next one.
        let readers = if t % 70 == 0 { 3 } else { left[t % 70 - 1].len() };
        assert_eq!(row.iter().filter(|v| v.is_finite()).count(), readers, "token {t}");
    }
}

#[test]
fn mistakes_leave_nothing_half_done() {
    let case = Case::open("llama-gqa");
    assert!(matches!(Ensemble::new(Vec::new()), Err(DecoderError::NoExperts)));
    let ensemble = ensemble(&case);
    let mut cache = ensemble.cache();
    let text = tokens(&case, 3, 20);
    let expected = all(&ensemble, &text);
    run(&ensemble, &text[..4], &mut cache, Logits::None);
    let beyond = [case.config.vocab as u32];
    let refused = ensemble.forward(&mut [Step { tokens: &beyond, cache: &mut cache, logits: Logits::All }], &mut NoProbe);
    assert!(matches!(refused, Err(DecoderError::Token { .. })));
    assert_close("goes on", &run(&ensemble, &text[4..], &mut cache, Logits::All), &expected[4 * case.config.vocab..]);
    let of_another = &mut Ensemble::new(vec![expert(&case, 0.0)]).unwrap().cache();
    let refused = ensemble.forward(&mut [Step { tokens: &text, cache: of_another, logits: Logits::All }], &mut NoProbe);
    assert!(matches!(refused, Err(DecoderError::Cache { expected: 3, found: 1 })));
    let nothing: Tensor = ensemble.forward(&mut [Step { tokens: &[], cache: &mut cache, logits: Logits::All }], &mut NoProbe).unwrap();
    assert_eq!(nothing.dims(), [0, case.config.vocab]);
}

#[test]
fn one_expert_is_that_expert_and_copies_are_too() {
    let case = Case::open("llama-gqa");
    let text = tokens(&case, 3, 40);
    let expected = logits(&expert(&case, 0.0), &text);
    for copies in [1, 3] {
        let ensemble = Ensemble::new((0..copies).map(|_| expert(&case, 0.0)).collect()).unwrap();
        assert_close("copies", &all(&ensemble, &text), &expected);
    }
}
