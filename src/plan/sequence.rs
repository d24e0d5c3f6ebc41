//! A recipe whose experts answer whole sequences: nothing of them is joined, they only have to read the same text.

use upcycle_architectures::Config;

use super::{PlanError, Sources, check, eos_ids};
use crate::{recipe::Recipe, source::Source};

/// Experts that take turns.
#[derive(Debug)]
pub struct Sequence {
    /// The base's config, which goes with its tokenizer: with the vocabulary and the context that all experts have, and every token that ends a
    /// text in one of them.
    pub config: Config,
    /// What the user should know, though nothing is wrong.
    pub warnings: Vec<String>,
}

impl Sources {
    /// The experts' models, in the recipe's order.
    pub fn experts(&self, recipe: &Recipe) -> Vec<&Source> {
        recipe.experts.iter().map(|expert| self.get(&expert.source_model)).collect()
    }
}

/// Checks that the experts speak the base's vocabulary. Of different sizes, families and rope they may be. `allow` names the lints that are
/// waived (they become warnings).
pub fn sequence(recipe: &Recipe, sources: &Sources, allow: &[String]) -> Result<Sequence, PlanError> {
    let base = sources.base();
    let experts = sources.experts(recipe);
    let mut warnings = Vec::new();
    let mut problems = Vec::new();
    for (e, expert) in experts.iter().enumerate() {
        if !std::ptr::eq(*expert, base) && !experts[..e].iter().any(|earlier| std::ptr::eq(*earlier, *expert)) {
            check::compare_vocabularies(recipe, base, expert, &mut problems, &mut warnings);
            problems.extend(check::too_few_embeddings(base, expert));
        }
    }
    check::waive(problems, allow, &mut warnings)?;
    let least = |of: fn(&Config) -> usize| experts.iter().map(|expert| of(&expert.config)).min();
    let (vocab, max_positions) = (least(|config| config.vocab), least(|config| config.max_positions));
    let config = Config {
        vocab: vocab.unwrap_or(base.config.vocab),
        max_positions: max_positions.unwrap_or(base.config.max_positions),
        eos: eos_ids(sources),
        ..base.config.clone()
    };
    if config.max_positions < base.config.max_positions {
        let (found, base) = (config.max_positions, base.config.max_positions);
        warnings.push(format!("the context is {found} tokens, the least of the experts' `max_position_embeddings`; the base's is {base}"));
    }
    Ok(Sequence { config, warnings })
}
