//! What somebody wishes of a model's experts, and the steering that it comes to.

use std::collections::{BTreeMap, BTreeSet};

use upcycle_architectures::decoder::Choice;

use super::Steering;

/// Wishes, experts by their numbers.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Wishes {
    /// added to what the routers give an expert
    pub bias: BTreeMap<usize, f32>,
    /// never chosen
    pub mask: BTreeSet<usize>,
    /// if there are any, no others are chosen
    pub force: BTreeSet<usize>,
    /// K instead of the model's
    pub per_token: Option<usize>,
}

/// A wish that no model or not this one can fulfil.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WishError {
    /// a K that cannot be
    #[error("`experts_per_token` is {found}, expected 1 to {most}")]
    PerToken {
        /// K
        found: usize,
        /// E
        most: usize,
    },
    /// a K where there is no choice of it
    #[error("one expert answers each sequence here: `experts_per_token` can only be 1")]
    Whole,
    /// all are ruled out
    #[error("that leaves no expert to choose")]
    Nobody,
}

impl Wishes {
    /// What they mean for a model with this choice; nothing where they change nothing, so that its prefixes can be shared.
    pub fn steering(&self, choice: &Choice) -> Result<Option<Steering>, WishError> {
        if choice.whole && self.per_token.is_some_and(|k| k != 1) {
            return Err(WishError::Whole);
        }
        if let Some(found) = self.per_token.filter(|k| !(1..=choice.experts).contains(k)) {
            return Err(WishError::PerToken { found, most: choice.experts });
        }
        let out = |e: &usize| self.mask.contains(e) || !(self.force.is_empty() || self.force.contains(e));
        if (0..choice.experts).all(|e| out(&e)) {
            return Err(WishError::Nobody);
        }
        let bias = |e: usize| if out(&e) { f32::NEG_INFINITY } else { self.bias.get(&e).copied().unwrap_or(0.0) };
        let mut bias: Vec<f32> = (0..choice.experts).map(bias).collect();
        bias.truncate(bias.iter().rposition(|bias| *bias != 0.0).map_or(0, |last| last + 1));
        let top_k = self.per_token.filter(|k| *k != choice.top_k);
        Ok((!bias.is_empty() || top_k.is_some()).then_some(Steering { bias, top_k }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHOICE: Choice = Choice { experts: 3, top_k: 2, layers: Vec::new(), whole: false };

    #[test]
    fn wishes_become_steering() {
        assert_eq!(Wishes { per_token: Some(2), bias: [(1, 0.0)].into(), ..Wishes::default() }.steering(&CHOICE), Ok(None));
        let out = f32::NEG_INFINITY;
        for (wishes, bias) in [
            (Wishes { bias: [(1, -2.0)].into(), ..Wishes::default() }, vec![0.0, -2.0]),
            (Wishes { mask: [0].into(), ..Wishes::default() }, vec![out]),
            (Wishes { force: [0, 1].into(), mask: [1].into(), bias: [(0, 1.0)].into(), ..Wishes::default() }, vec![1.0, out, out]),
        ] {
            assert_eq!(wishes.steering(&CHOICE), Ok(Some(Steering { bias, top_k: None })));
        }
        let fewer = Wishes { per_token: Some(1), ..Wishes::default() };
        assert_eq!(fewer.steering(&CHOICE), Ok(Some(Steering { bias: Vec::new(), top_k: Some(1) })));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let per_token = |k| Wishes { per_token: Some(k), ..Wishes::default() };
        for k in [0, 4] {
            assert_eq!(per_token(k).steering(&CHOICE), Err(WishError::PerToken { found: k, most: 3 }));
        }
        let whole = Choice { whole: true, top_k: 1, ..CHOICE };
        assert_eq!((per_token(1).steering(&whole), per_token(2).steering(&whole)), (Ok(None), Err(WishError::Whole)));
        let nobody = Wishes { force: [1].into(), mask: [1].into(), ..Wishes::default() };
        assert_eq!(nobody.steering(&CHOICE), Err(WishError::Nobody));
    }
}
