//! Do these models fit together? Answered from configs, headers and tokenizers alone.

use std::collections::HashMap;

use upcycle_architectures::{Config, TensorInfo};

use super::{Part, PlanError, PlannedTensor, Problem, Sources};
use crate::{
    recipe::{Recipe, Shared},
    source::{self, Source},
};

pub(super) const LINTS: &[(&str, &str)] = &[
    ("rope-mismatch", "an expert was trained with other rotary embeddings than the base"),
    ("eps-mismatch", "an expert's norms have another epsilon than the base's"),
    ("vocabulary-mismatch", "an expert's tokenizer gives other ids to the same text"),
    ("drift", "attention of an expert is far from what the composite uses"),
    ("licence-conflict", "licences that no one work can be under"),
];

/// One message for a list of problems.
pub(super) fn list(problems: &[Problem]) -> String {
    let lines = problems.iter().map(|problem| match problem.lint {
        Some(lint) => format!("{} (`--allow {lint}` if it is meant)", problem.message),
        None => problem.message.clone(),
    });
    let lines: Vec<String> = lines.collect();
    match lines.as_slice() {
        [one] => one.clone(),
        many => format!("these models cannot be composed:\n  - {}", many.join("\n  - ")),
    }
}

/// Problems whose lint is allowed become warnings; others are the end.
pub(super) fn waive(problems: Vec<Problem>, allow: &[String], warnings: &mut Vec<String>) -> Result<(), PlanError> {
    let (waived, fatal): (Vec<_>, Vec<_>) =
        problems.into_iter().partition(|problem| problem.lint.is_some_and(|lint| allow.iter().any(|name| name == lint)));
    warnings.extend(waived.into_iter().map(|problem| problem.message));
    if fatal.is_empty() { Ok(()) } else { Err(PlanError::Problems(fatal)) }
}

/// Every way in which the experts differ from the base (and, averaged, from each other) that a composite cannot express.
pub(super) fn problems(recipe: &Recipe, sources: &Sources, warnings: &mut Vec<String>) -> Vec<Problem> {
    let base = sources.base();
    let mut problems = Vec::new();
    if base.config.moe.is_some() {
        problems.push(already_sparse(base));
        return problems;
    }
    problems.extend(licences(sources));
    let mut seen = Vec::new();
    let shared = recipe.shared_experts.iter();
    for (expert, routed) in recipe.experts.iter().map(|e| (e, true)).chain(shared.map(|e| (e, false))) {
        let source = sources.get(&expert.source_model);
        if routed {
            let first = sources.get(&recipe.experts[0].source_model);
            if source.config.ffn != first.config.ffn {
                let values = format!("{} in `{}`, {} in `{}`", first.config.ffn, first.reference, source.config.ffn, source.reference);
                problems.push(fatal(format!("experts differ in `intermediate_size`: {values}; use experts of one size")));
            }
        }
        if std::ptr::eq(source, base) || seen.contains(&&source.reference) {
            continue;
        }
        seen.push(&source.reference);
        compare_configs(base, source, &mut problems, warnings);
        compare_vocabularies(recipe, base, source, &mut problems, warnings);
    }
    problems
}

/// Two models whose cards name licences that do not go together; the first such pair says enough.
fn licences(sources: &Sources) -> Option<Problem> {
    let named: Vec<_> = sources.all.iter().filter_map(|source| Some((source, source::licence(source)?))).collect();
    named.iter().enumerate().find_map(|(i, (a, first))| {
        named[i + 1..].iter().find_map(|(b, second)| {
            let reason = source::conflict(first, second)?;
            let (a, b) = (&a.reference, &b.reference);
            let message =
                format!("`{a}` is under `{first}`, `{b}` under `{second}`: {reason}; ask whoever holds the rights, or leave one out");
            Some(Problem { lint: Some("licence-conflict"), message })
        })
    })
}

fn fatal(message: String) -> Problem {
    Problem { lint: None, message }
}

/// A difference in what all experts share.
fn unfit(difference: &str) -> Problem {
    fatal(format!("{difference}; experts must be fine-tunes of the base"))
}

fn already_sparse(source: &Source) -> Problem {
    let (name, family) = (&source.reference, &source.config.model_type);
    fatal(format!("`{name}` is a Mixture-of-Experts already (`{family}`); name the dense models that it was made from"))
}

fn compare_configs(base: &Source, expert: &Source, problems: &mut Vec<Problem>, warnings: &mut Vec<String>) {
    let (a, b) = (&base.config, &expert.config);
    if b.moe.is_some() {
        problems.push(already_sparse(expert));
        return;
    }
    if a.model_type != b.model_type {
        problems.push(unfit(&differ("model type", base, &a.model_type, expert, &b.model_type)));
        return;
    }
    let sizes: [(&str, fn(&Config) -> usize); 5] = [
        ("hidden_size", |c| c.hidden),
        ("num_hidden_layers", |c| c.layers),
        ("num_attention_heads", |c| c.heads),
        ("num_key_value_heads", |c| c.kv_heads),
        ("head_dim", |c| c.head_dim),
    ];
    for (key, value) in sizes {
        if value(a) != value(b) {
            problems.push(unfit(&differ(&format!("`{key}`"), base, value(a), expert, value(b))));
        }
    }
    if a.activation != b.activation {
        problems.push(unfit(&differ("`hidden_act`", base, format!("{:?}", a.activation), expert, format!("{:?}", b.activation))));
    }
    if (a.qkv_bias, a.o_bias, a.qk_norm) != (b.qkv_bias, b.o_bias, b.qk_norm) {
        let show = |c: &Config| format!("qkv bias {}, output bias {}, qk norm {}", c.qkv_bias, c.o_bias, c.qk_norm);
        problems.push(unfit(&differ("attention", base, show(a), expert, show(b))));
    }
    let foreign = |difference: String| format!("{difference}; the composite uses the base's, which that expert was not trained with");
    if a.rope.theta.to_bits() != b.rope.theta.to_bits() {
        let message = foreign(differ("`rope_theta`", base, a.rope.theta, expert, b.rope.theta));
        problems.push(Problem { lint: Some("rope-mismatch"), message });
    } else if a.rope != b.rope {
        let message = foreign(differ("rope scaling", base, format!("{:?}", a.rope.scaling), expert, format!("{:?}", b.rope.scaling)));
        problems.push(Problem { lint: Some("rope-mismatch"), message });
    }
    if a.norm_eps.to_bits() != b.norm_eps.to_bits() {
        problems
            .push(Problem { lint: Some("eps-mismatch"), message: foreign(differ("`rms_norm_eps`", base, a.norm_eps, expert, b.norm_eps)) });
    }
    if a.windows != b.windows {
        let show = |c: &Config| c.windows.iter().flatten().next().map_or("none".to_owned(), ToString::to_string);
        warnings.push(format!("{}; the base's is used", differ("the sliding window", base, show(a), expert, show(b))));
    }
    if a.max_positions > b.max_positions {
        let what = "`max_position_embeddings`";
        warnings.push(format!("{}; the base's is used", differ(what, base, a.max_positions, expert, b.max_positions)));
    }
}

fn differ(what: &str, base: &Source, a: impl std::fmt::Display, expert: &Source, b: impl std::fmt::Display) -> String {
    format!("{what} differs: {a} in the base `{}`, {b} in `{}`", base.reference, expert.reference)
}

/// The composite speaks the base's vocabulary. Extra tokens of an expert are unknown to it (a warning, since its embeddings are not used);
/// other ids for the same token mean that the expert reads other text than is written.
pub(super) fn compare_vocabularies(
    recipe: &Recipe,
    base: &Source,
    expert: &Source,
    problems: &mut Vec<Problem>,
    warnings: &mut Vec<String>,
) {
    let (rows, other_rows) = (base.config.vocab, expert.config.vocab);
    if matches!(recipe.shared, Shared::Average | Shared::Fit) && rows != other_rows {
        let remedy = "their embeddings cannot be averaged; use `shared: base`";
        problems.push(fatal(format!("{}: {remedy}", differ("`vocab_size`", base, rows, expert, other_rows))));
        return;
    }
    let (Some(ours), Some(theirs)) = (vocabulary(base), vocabulary(expert)) else {
        if rows != other_rows {
            warnings.push(differ("`vocab_size`", base, rows, expert, other_rows));
        }
        return;
    };
    let mut different: Vec<(&str, usize, usize)> =
        theirs.iter().filter_map(|(token, &id)| ours.get(token).filter(|own| **own != id).map(|&own| (token.as_str(), own, id))).collect();
    different.sort_unstable_by_key(|(_, own, _)| *own);
    let taken: HashMap<usize, &str> = ours.iter().map(|(token, &id)| (id, token.as_str())).collect();
    let unknown: Vec<&String> = theirs.keys().filter(|token| !ours.contains_key(*token)).collect();
    let replaced = unknown.iter().filter(|token| taken.contains_key(&theirs[**token])).count();
    if let Some((token, own, id)) = different.first() {
        let message = format!(
            "{} of {} tokens of `{}` have another id than in the base `{}` (`{token}` is {id} there, {own} here): \
             the expert would read another text than is written",
            different.len() + replaced,
            theirs.len(),
            expert.reference,
            base.reference,
        );
        problems.push(Problem { lint: Some("vocabulary-mismatch"), message });
    } else if replaced * 100 > theirs.len() {
        let message = format!(
            "{replaced} of {} tokens of `{}` stand for other text in the base `{}`: the vocabularies differ",
            theirs.len(),
            expert.reference,
            base.reference,
        );
        problems.push(Problem { lint: Some("vocabulary-mismatch"), message });
    } else if !unknown.is_empty() {
        let mut names = unknown.clone();
        names.sort();
        let shown = names.iter().take(4).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        let more = if names.len() > 4 { ", ..." } else { "" };
        warnings.push(format!(
            "`{}` has {} tokens that the base `{}` lacks ({shown}{more}): the composite does not know them",
            expert.reference,
            names.len(),
            base.reference,
        ));
    }
}

/// An expert that reads by itself needs an embedding for every token of the base's tokenizer.
pub(super) fn too_few_embeddings(base: &Source, expert: &Source) -> Option<Problem> {
    let tokens = vocabulary(base)?.into_values().max()? + 1;
    let rows = expert.config.vocab;
    (rows < tokens).then(|| {
        let (base, expert) = (&base.reference, &expert.reference);
        fatal(format!("`{expert}` has embeddings of {rows} tokens, but the tokenizer of the base `{base}` has {tokens}: use a base whose text it can read"))
    })
}

/// Token to id, from tokenizer.json: the model's vocabulary and the added tokens; `None` without one.
fn vocabulary(source: &Source) -> Option<HashMap<String, usize>> {
    let json: serde_json::Value = serde_json::from_slice(&source::sidecar(source, "tokenizer.json")?).ok()?;
    let mut all = HashMap::new();
    match json.pointer("/model/vocab")? {
        serde_json::Value::Object(map) => {
            all.extend(map.iter().filter_map(|(token, id)| Some((token.clone(), id.as_u64()? as usize))));
        }
        // Unigram: a list of [token, score].
        serde_json::Value::Array(list) => {
            all.extend(list.iter().enumerate().filter_map(|(id, pair)| Some((pair.get(0)?.as_str()?.to_owned(), id))));
        }
        _ => return None,
    }
    for token in json.get("added_tokens").and_then(|added| added.as_array()).into_iter().flatten() {
        if let (Some(content), Some(id)) =
            (token.get("content").and_then(|c| c.as_str()), token.get("id").and_then(serde_json::Value::as_u64))
        {
            all.insert(content.to_owned(), id as usize);
        }
    }
    Some(all)
}

/// Every tensor that the plan reads and a source does not have, or has in another shape.
pub(super) fn missing(sources: &Sources, tensors: &[PlannedTensor]) -> Vec<Problem> {
    let mut problems = Vec::new();
    let expected: Vec<HashMap<String, Vec<usize>>> = sources
        .all
        .iter()
        .map(|source| {
            let tensors = source.family.tensors(&source.config).into_iter();
            tensors.filter_map(|(role, shape)| Some((source.family.name(role)?, shape))).collect()
        })
        .collect();
    let mut check = |index: usize, name: &String| {
        let source = &sources.all[index];
        let message = match (source.weights.info(name), expected[index].get(name)) {
            (None, _) => {
                let location = source.location.display();
                format!("`{location}` has no tensor `{name}`, which its config.json asks for; it is incomplete: fetch it again")
            }
            (Some(TensorInfo { shape, .. }), Some(wanted)) if shape != *wanted => {
                let location = source.location.display();
                format!(
                    "`{location}`: tensor `{name}` has shape {shape:?}, but its config.json makes it {wanted:?}; \
                     weights and config are of different models: fetch both again"
                )
            }
            _ => return,
        };
        problems.push(fatal(message));
    };
    for part in tensors.iter().flat_map(|tensor| &tensor.parts) {
        match part {
            Part::Tensor { source, tensor, .. } => check(*source, tensor),
            Part::Mean { of } => of.iter().for_each(|(source, tensor)| check(*source, tensor)),
            Part::Gate { .. } | Part::SharedGate { .. } | Part::Zeros { .. } | Part::Fitted { .. } | Part::Tuned { .. } => {}
        }
    }
    let more = problems.len().saturating_sub(12);
    problems.truncate(12);
    if more > 0 {
        problems.push(fatal(format!("and {more} more tensors")));
    }
    problems
}
