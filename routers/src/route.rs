//! Logits to experts: the only place that knows how chosen weights are normalised.
//!
//! Softmax, then top-k, then (or not) normalisation: Mixtral (arXiv 2401.04088, section 2.1) takes the softmax of the K chosen logits, which
//! equals normalising the chosen weights of the softmax over all E, as `norm_topk_prob` of Qwen-MoE does; without it they stay as they are.

use std::cmp::Ordering;

/// How experts are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// K
    pub top_k: usize,
    /// whether the K weights sum to one (Mixtral, and `norm_topk_prob`); otherwise they are the softmax over all E
    pub normalise: bool,
}

/// The experts chosen for N tokens, and their weights.
#[derive(Debug, Clone, PartialEq)]
pub struct Routing {
    /// K
    pub top_k: usize,
    /// row-major [N, K], each token's experts by falling weight; of equal logits the lower index comes first
    pub experts: Vec<u32>,
    /// row-major [N, K]
    pub weights: Vec<f32>,
}

/// How a sequence's experts are chosen otherwise than its routers alone would.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Steering {
    /// added to the logits of the first experts; minus infinity rules one out
    pub bias: Vec<f32>,
    /// instead of the rule's K
    pub top_k: Option<usize>,
}

impl Steering {
    /// What is added to an expert's logit.
    pub fn bias(&self, expert: usize) -> f32 {
        self.bias.get(expert).copied().unwrap_or(0.0)
    }

    /// Those of so many experts that may be chosen; all where none may be.
    pub fn allowed(&self, experts: usize) -> impl Iterator<Item = usize> {
        let may = |e| self.bias(e) > f32::NEG_INFINITY;
        let any = (0..experts).any(may);
        (0..experts).filter(move |&e| !any || may(e))
    }
}

/// Softmax over the E logits of each token (f32), the K largest, normalised as the rule says.
///
/// `logits` is row-major [N, E]; more than E experts are never chosen. A logit that is not a number is the lowest, so that weights are
/// always finite.
pub fn route(logits: &[f32], experts: usize, rule: Rule) -> Routing {
    let as_it_is = Steering::default();
    steered(logits, experts, rule, |_| &as_it_is)
}

/// As [`route`], each token under the steering of its row, as if there were no experts but those that it allows.
///
/// All tokens have as many choices as the one that has most: who has fewer has its first expert again, with weight 0, which is no choice.
pub fn steered<'a>(logits: &[f32], experts: usize, rule: Rule, steering: impl Fn(usize) -> &'a Steering) -> Routing {
    let tokens = logits.len().checked_div(experts).unwrap_or(0);
    let wanted = |token| steering(token).top_k.unwrap_or(rule.top_k).min(experts);
    let k = (0..tokens).map(wanted).max().unwrap_or(0);
    let mut routing = Routing { top_k: k, experts: Vec::with_capacity(tokens * k), weights: Vec::with_capacity(tokens * k) };
    if k == 0 {
        return routing;
    }
    let (mut row, mut order) = (Vec::with_capacity(experts), Vec::with_capacity(experts));
    for (token, logits) in logits.chunks_exact(experts).enumerate() {
        let steering = steering(token);
        row.clear();
        row.extend(logits.iter().enumerate().map(|(e, &v)| finite(finite(v) + steering.bias(e))));
        order.clear();
        order.extend(steering.allowed(experts).map(|e| e as u32));
        let by_falling_logit = |a: &u32, b: &u32| {
            let values = row[*b as usize].partial_cmp(&row[*a as usize]);
            values.unwrap_or(Ordering::Equal).then(a.cmp(b))
        };
        let own = wanted(token).clamp(1, order.len());
        order.select_nth_unstable_by(own - 1, by_falling_logit);
        let chosen = &mut order[..own];
        chosen.sort_unstable_by(by_falling_logit);
        let max = row[chosen[0] as usize];
        let total: f32 = if rule.normalise {
            chosen.iter().map(|&e| (row[e as usize] - max).exp()).sum()
        } else {
            row.iter().map(|v| (v - max).exp()).sum()
        };
        routing.weights.extend(chosen.iter().map(|&e| (row[e as usize] - max).exp() / total));
        routing.weights.resize(routing.weights.len() + k - own, 0.0);
        routing.experts.extend_from_slice(chosen);
        routing.experts.resize(routing.experts.len() + k - own, chosen[0]);
    }
    routing
}

fn finite(v: f32) -> f32 {
    if v.is_nan() { f32::MIN } else { v.clamp(f32::MIN, f32::MAX) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NORMALISED: Rule = Rule { top_k: 2, normalise: true };

    #[test]
    fn weights_are_those_of_the_formulas() {
        // softmax of (1, 3, 2, 0) is (0.0871, 0.6439, 0.2369, 0.0321)
        let logits = [1.0, 3.0, 2.0, 0.0];
        let close = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4);
        let normalised = route(&logits, 4, NORMALISED);
        assert_eq!(normalised.experts, [1, 2]);
        assert!(close(&normalised.weights, &[0.7311, 0.2689]));
        let plain = route(&logits, 4, Rule { normalise: false, ..NORMALISED });
        assert_eq!(plain.experts, [1, 2]);
        assert!(close(&plain.weights, &[0.6439, 0.2369]));
    }

    #[test]
    fn equal_logits_go_to_the_lower_index() {
        assert_eq!(route(&[0.0, 1.0, 1.0, 1.0, -0.0, 0.0, 0.0, 0.0], 4, NORMALISED).experts, [1, 2, 0, 1]);
    }

    #[test]
    fn what_is_not_a_number_comes_last() {
        let routing = route(&[f32::NAN, 1.0, f32::NEG_INFINITY], 3, NORMALISED);
        assert_eq!((routing.experts, routing.weights), (vec![1, 0], vec![1.0, 0.0]));
        assert_eq!(route(&[f32::NAN; 4], 4, NORMALISED).weights, [0.5, 0.5]);
        assert_eq!(route(&[f32::INFINITY, f32::INFINITY, 0.0], 3, NORMALISED).weights, [0.5, 0.5]);
    }

    #[test]
    fn at_most_all_experts_are_chosen() {
        let routing = route(&[0.0, 1.0, 2.0, 3.0], 2, Rule { top_k: 5, normalise: false });
        assert_eq!((routing.top_k, routing.experts), (2, vec![1, 0, 1, 0]));
        assert!(route(&[], 4, NORMALISED).experts.is_empty());
        assert!(route(&[], 0, NORMALISED).experts.is_empty());
        assert!(route(&[1.0, 2.0], 2, Rule { top_k: 0, normalise: true }).experts.is_empty());
    }

    #[test]
    fn who_is_forced_has_all_the_weight() {
        let forced = Steering { bias: vec![f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY], top_k: None };
        for rule in [NORMALISED, Rule { normalise: false, ..NORMALISED }] {
            let routing = steered(&[3.0, -3.0, 9.0, f32::NAN, f32::NAN, f32::NAN], 3, rule, |_| &forced);
            assert_eq!((routing.top_k, &routing.experts[..2]), (2, [1, 1].as_slice()));
            assert_eq!(routing.weights[..2], [1.0, 0.0]);
            assert_eq!(routing.experts[2..], [1, 1]);
        }
        let nobody = Steering { bias: vec![f32::NEG_INFINITY; 3], top_k: Some(1) };
        assert_eq!(steered(&[3.0, -3.0, 9.0], 3, NORMALISED, |_| &nobody).weights, [1.0]);
    }

    fn logits() -> impl Strategy<Value = (usize, Vec<f32>, usize, bool)> {
        (1..9usize, 1..5usize).prop_flat_map(|(experts, tokens)| {
            (Just(experts), prop::collection::vec(-20f32..20.0, experts * tokens), 1..=experts, any::<bool>())
        })
    }

    proptest! {
        #[test]
        fn weights_fall_and_sum_to_one((experts, logits, top_k, normalise) in logits()) {
            let routing = route(&logits, experts, Rule { top_k, normalise });
            prop_assert_eq!(routing.experts.len(), logits.len() / experts * top_k);
            for (chosen, weights) in routing.experts.chunks(top_k).zip(routing.weights.chunks(top_k)) {
                prop_assert!(weights.is_sorted_by(|a, b| a >= b));
                let total: f32 = weights.iter().sum();
                prop_assert!(total <= 1.0 + 1e-5);
                prop_assert!((total - 1.0).abs() < 1e-5 || !(normalise || top_k == experts));
                prop_assert!(chosen.iter().all(|e| chosen.iter().filter(|f| e == *f).count() == 1));
            }
        }

        #[test]
        fn steering_is_as_if_those_ruled_out_were_not_there(
            (experts, logits, top_k, normalise) in logits(), out in any::<u8>(), bias in prop::collection::vec(-4f32..4.0, 8), other in 1..9usize,
        ) {
            let left: Vec<usize> = (0..experts).filter(|e| out >> e & 1 == 0).collect();
            prop_assume!(!left.is_empty());
            let ruled = |e: usize| if left.contains(&e) { bias[e] } else { f32::NEG_INFINITY };
            let steering = Steering { bias: (0..experts).map(ruled).collect(), top_k: Some(other) };
            // Neighbours have a K of their own.
            let plain = Steering::default();
            let rule = Rule { top_k, normalise };
            let mixed = steered(&logits, experts, rule, |row| if row % 2 == 0 { &steering } else { &plain });
            prop_assert!(mixed.top_k >= other.min(experts));
            for (row, values) in logits.chunks(experts).enumerate() {
                let expected = if row % 2 == 0 {
                    let values: Vec<f32> = left.iter().map(|&e| values[e] + bias[e]).collect();
                    let mut among = route(&values, left.len(), Rule { top_k: other, normalise });
                    among.experts.iter_mut().for_each(|e| *e = left[*e as usize] as u32);
                    among
                } else {
                    route(values, experts, rule)
                };
                let own = row * mixed.top_k..(row + 1) * mixed.top_k;
                let (chosen, padding) = mixed.experts[own.clone()].split_at(expected.top_k);
                prop_assert_eq!(chosen, &expected.experts);
                let (weights, none) = mixed.weights[own].split_at(expected.top_k);
                prop_assert!(weights.iter().zip(&expected.weights).all(|(a, b)| (a - b).abs() < 1e-6));
                prop_assert!(padding.iter().all(|e| *e == chosen[0]) && none.iter().all(|w| w.to_bits() == 0));
            }
        }

        #[test]
        fn a_shift_of_all_logits_changes_nothing((experts, logits, top_k, normalise) in logits(), shift in -8i8..8) {
            // whole numbers, so that the shift itself does not round
            let whole: Vec<f32> = logits.iter().map(|v| v.round()).collect();
            let shifted: Vec<f32> = whole.iter().map(|v| v + f32::from(shift)).collect();
            let rule = Rule { top_k, normalise };
            prop_assert_eq!(route(&whole, experts, rule), route(&shifted, experts, rule));
        }

        #[test]
        fn permuting_the_experts_permutes_the_routing((experts, mut logits, top_k, normalise) in logits(), turn in 0..9usize) {
            logits.sort_by(f32::total_cmp);
            logits.dedup();
            prop_assume!(logits.len() >= experts);
            logits.truncate(logits.len() / experts * experts);
            let rule = Rule { top_k, normalise };
            let straight = route(&logits, experts, rule);
            logits.chunks_mut(experts).for_each(|row| row.rotate_left(turn % experts));
            let turned = route(&logits, experts, rule);
            let back: Vec<u32> = turned.experts.iter().map(|&e| (e + (turn % experts) as u32) % experts as u32).collect();
            prop_assert_eq!(straight.experts, back);
            prop_assert!(straight.weights.iter().zip(&turned.weights).all(|(a, b)| (a - b).abs() < 1e-6));
        }
    }
}
