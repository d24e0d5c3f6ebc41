//! What a well-formed recipe may still get wrong.
//!
//! A lint looks at the recipe alone. Prompts are judged as text; what they do to the gates is measured where the gates are made.

use std::{ops::Range, sync::Arc};

use upcycle_routers::init::{Needs, Runtime};

use super::{
    Expert, Problem, Recipe, Severity, Shared,
    problem::{File, Place},
    schema::Places,
};

/// A check that `--allow` waives.
#[derive(Debug)]
pub struct Lint {
    /// What `--allow` takes.
    pub name: &'static str,
    /// Why it matters.
    pub about: &'static str,
    /// What becomes of a recipe that it finds something in.
    pub level: Level,
    /// What to do.
    pub hint: &'static str,
    check: Check,
}

/// What becomes of a recipe that a lint finds something in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// Refused, as something useless would be made of it; allowed, it is warned of.
    Refuse,
    /// Warned of; allowed, nothing is said.
    Warn,
}

type Check = fn(&Recipe, &Places) -> Option<Finding>;

/// What a lint found: a message and the places it is about, the first of them the one that counts.
struct Finding {
    message: String,
    places: Vec<(Range<usize>, String)>,
}

/// What nothing can be made without, in mergekit-moe's order: the check and what to do.
const REQUIRED: &[(Check, &str)] = &[
    (no_experts, "write one `- source_model: ...` per expert below `experts`"),
    (too_few_experts, "add experts, or lower `experts_per_token` (2 if not given)"),
    (many_shared_experts, "keep one, and make the others experts"),
    (whole_experts, "remove it, or set `gate_mode: auto` for a composite"),
    (missing_prompts, "give it `positive_prompts` or a `prompts_file`, or set `gate_mode: random` and train the gates"),
    (fit_without_text, "leave `gate_mode` out, or set `shared: base` or `shared: average`"),
];

/// Every lint, in the order that they are checked: first what mergekit-moe refuses, in its order, then ours.
pub const LINTS: &[Lint] = &[
    Lint {
        name: "one-expert",
        about: "with one expert there is nothing to choose",
        level: Level::Refuse,
        hint: "add experts",
        check: one_expert,
    },
    Lint {
        name: "identical-prompts",
        about: "equal prompts give equal gates: every token would go to the first experts",
        level: Level::Refuse,
        hint: "give each expert prompts of what it is good at",
        check: identical_prompts,
    },
    Lint {
        name: "same-model-experts",
        about: "copies of one model compute what that model computes, at several times its size",
        level: Level::Refuse,
        hint: "name different fine-tunes; copies are useful only as a start for training",
        check: same_model_experts,
    },
    Lint {
        name: "first-experts",
        about: "gates of zeros tell no experts apart, and of equal ones the first win: the others would never be chosen",
        level: Level::Refuse,
        hint: "leave `experts_per_token` out, or set it to the number of experts",
        check: first_experts,
    },
    Lint {
        name: "twin-prompts",
        about: "equal prompts give equal gates, and of equal gates the first expert wins",
        level: Level::Warn,
        hint: "give each expert prompts of its own",
        check: twin_prompts,
    },
    Lint {
        name: "twin-experts",
        about: "the second copy takes memory and adds nothing",
        level: Level::Warn,
        hint: "keep one of them, with the prompts of both",
        check: twin_experts,
    },
    Lint {
        name: "same-endings",
        about: "`hidden` looks at the last token of each prompt, and the gate of the first layer sees nothing else",
        level: Level::Warn,
        hint: "end the prompts of different experts differently, or set `gate_mode: hidden_avg`",
        check: same_endings,
    },
    Lint {
        name: "circular-negatives",
        about: "gates of which each is a sum of the others cannot be told apart well: they have one dimension too few",
        level: Level::Warn,
        hint: "leave `negative_prompts` out, or write some that are no other expert's prompts",
        check: circular_negatives,
    },
    Lint {
        name: "keyword-prompts",
        about: "gates made from single words come out nearly parallel; whole requests tell experts apart",
        level: Level::Warn,
        hint: "write whole requests, 16 to 64 per expert; `prompts_file` takes them from a file",
        check: keyword_prompts,
    },
    Lint {
        name: "uneven-prompts",
        about: "a gate is a mean over its prompts: one made from a few is noisy beside one made from many",
        level: Level::Warn,
        hint: "give each expert about as many prompts",
        check: uneven_prompts,
    },
    Lint {
        name: "empty-prompts",
        about: "an empty prompt is the start token alone and says nothing about the expert",
        level: Level::Warn,
        hint: "remove it, or write what the expert is good at",
        check: empty_prompts,
    },
    Lint {
        name: "unused-prompts",
        about: "the prompts change nothing",
        level: Level::Warn,
        hint: "remove the prompts, or set `gate_mode: hidden` to use them",
        check: unused_prompts,
    },
];

/// What is wrong with a recipe, and what is doubtful unless it is allowed.
pub(super) fn check(recipe: &Recipe, places: &Places, allow: &[String], file: &Arc<File>) -> Vec<Problem> {
    let problem = |finding: Finding, severity, lint: Option<&Lint>, hint: String| Problem {
        severity,
        lint: lint.map(|lint| lint.name),
        message: finding.message,
        about: lint.map(|lint| lint.about),
        hint: Some(hint),
        places: finding.places.into_iter().map(|(span, label)| Place { span, label }).collect(),
        file: Arc::clone(file),
    };
    let required = REQUIRED.iter().filter_map(|(check, hint)| {
        let finding = check(recipe, places)?;
        Some(problem(finding, Severity::Error, None, (*hint).to_owned()))
    });
    let lints = LINTS.iter().filter_map(|lint| {
        let allowed = allow.iter().any(|name| name == lint.name);
        let (severity, hint) = match (lint.level, allowed) {
            (Level::Warn, true) => return None,
            (Level::Refuse, false) => (Severity::Error, format!("{}; `--allow {}` if it is meant", lint.hint, lint.name)),
            (Level::Refuse, true) | (Level::Warn, false) => (Severity::Warning, lint.hint.to_owned()),
        };
        Some(problem((lint.check)(recipe, places)?, severity, Some(lint), hint))
    });
    required.chain(lints).collect()
}

fn no_experts(recipe: &Recipe, places: &Places) -> Option<Finding> {
    recipe.experts.is_empty().then(|| Finding::at(&places.experts, "there are no experts".to_owned()))
}

fn too_few_experts(recipe: &Recipe, places: &Places) -> Option<Finding> {
    let (experts, chosen) = (recipe.experts.len(), recipe.experts_per_token);
    let message = || {
        format!("each token chooses {chosen} experts, but there {}", if experts == 1 { "is 1".into() } else { format!("are {experts}") })
    };
    let per_token = recipe.gate_mode.runtime() != Some(Runtime::Sequence);
    (per_token && 0 < experts && experts < chosen).then(|| Finding::at(&places.experts_per_token, message()))
}

fn many_shared_experts(recipe: &Recipe, places: &Places) -> Option<Finding> {
    let shared = recipe.shared_experts.len();
    (shared > 1).then(|| Finding::at(&places.shared_experts, format!("there can be one shared expert, not {shared}")))
}

/// Whole experts are taken as they are.
fn whole_experts(recipe: &Recipe, places: &Places) -> Option<Finding> {
    if recipe.gate_mode.runtime() != Some(Runtime::Sequence) {
        return None;
    }
    let edited = |of: fn(&Expert) -> bool| recipe.experts.iter().position(of).map(|e| places.expert[e].source_model.clone());
    let found = [
        ("shared_experts", (!recipe.shared_experts.is_empty()).then(|| places.shared_experts.clone())),
        ("shared", (recipe.shared != Shared::Auto).then(|| places.gate_mode.clone())),
        ("repair", (recipe.repair == Some(true)).then(|| places.gate_mode.clone())),
        ("noise_scale", edited(|expert| expert.noise_scale.is_some())),
        ("residual_scale", edited(|expert| expert.residual_scale.is_some())),
    ];
    let (key, place) = found.into_iter().find_map(|(key, place)| Some((key, place?)))?;
    Some(Finding::at(&place, format!("`sequence` answers with whole experts as they are, but the recipe has `{key}`")))
}

fn missing_prompts(recipe: &Recipe, places: &Places) -> Option<Finding> {
    let has_text = |expert: &Expert| recipe.fitted() && expert.text_file.is_some();
    let without = indices(recipe, |_, expert| expert.positive_prompts.is_empty() && !has_text(expert));
    let mode = recipe.gate_mode.name;
    let message = || format!("`{mode}` makes gates from prompts, but {} none", experts_have(&without));
    (uses_prompts(recipe) && !without.is_empty()).then(|| Finding::about(&without, message(), |e| places.expert[e].source_model.clone()))
}

fn fit_without_text(recipe: &Recipe, places: &Places) -> Option<Finding> {
    let mode = recipe.gate_mode.name;
    let message = || format!("`shared: fit` fits the shared weights along with the gates, and `{mode}` gates are not fitted");
    (recipe.shared == Shared::Fit && !recipe.fitted()).then(|| Finding::at(&places.gate_mode, message()))
}

fn one_expert(recipe: &Recipe, places: &Places) -> Option<Finding> {
    let chooses = uses_prompts(recipe) || recipe.gate_mode.runtime().is_some();
    (chooses && recipe.experts.len() == 1).then(|| Finding::at(&places.experts, "there is only one expert".to_owned()))
}

fn identical_prompts(recipe: &Recipe, places: &Places) -> Option<Finding> {
    let message = || "every expert has the same prompts".to_owned();
    (uses_prompts(recipe) && all_equal(recipe, prompts))
        .then(|| Finding::about(&all(recipe), message(), |e| places.expert[e].positive.clone()))
}

fn same_model_experts(recipe: &Recipe, places: &Places) -> Option<Finding> {
    let same = all_equal(recipe, |expert| Some(&expert.source_model));
    let message = || "every expert is the same model".to_owned();
    (uses_prompts(recipe) && same).then(|| Finding::about(&all(recipe), message(), |e| places.expert[e].source_model.clone()))
}

fn first_experts(recipe: &Recipe, places: &Places) -> Option<Finding> {
    let (experts, chosen) = (recipe.experts.len(), recipe.experts_per_token);
    let message =
        || format!("`{}` is for composites in which each token runs through all experts, not {chosen} of {experts}", recipe.gate_mode.name);
    (recipe.gate_mode.all_experts && chosen < experts).then(|| Finding::at(&places.experts_per_token, message()))
}

fn twin_prompts(recipe: &Recipe, places: &Places) -> Option<Finding> {
    let twins = twins(recipe, prompts).filter(|_| uses_prompts(recipe) && !all_equal(recipe, prompts))?;
    let message = format!("{} the same prompts", experts_have(&twins));
    Some(Finding::about(&twins, message, |e| places.expert[e].positive.clone()))
}

fn twin_experts(recipe: &Recipe, places: &Places) -> Option<Finding> {
    // Noise makes copies differ.
    let model =
        |expert: &Expert| expert.noise_scale.is_none().then(|| (expert.source_model.clone(), expert.residual_scale.map(f64::to_bits)));
    let twins = twins(recipe, model).filter(|_| uses_prompts(recipe) && !all_equal(recipe, |expert| Some(&expert.source_model)))?;
    let message = format!("{} are the same model", experts(&twins));
    Some(Finding::about(&twins, message, |e| places.expert[e].source_model.clone()))
}

fn same_endings(recipe: &Recipe, places: &Places) -> Option<Finding> {
    if recipe.gate_mode.needs() != Some(Needs::LastState) || recipe.chat_template == Some(true) {
        return None;
    }
    // A mean does not change when every ending is repeated as often, so one ending counts once.
    let endings = |expert: &Expert| {
        let mut endings: Vec<_> = expert.positive_prompts.iter().map(|prompt| ending(prompt).to_owned()).collect();
        endings.sort_unstable();
        if endings.first() == endings.last() {
            endings.truncate(1);
        }
        (expert.negative_prompts.is_empty() && !endings.is_empty()).then_some(endings)
    };
    let twins = twins(recipe, endings).filter(|group| twins(recipe, prompts).as_ref() != Some(group))?;
    let message = format!("the prompts of {} end the same way, so their gates in the first layer are equal", experts(&twins));
    Some(Finding::about(&twins, message, |e| places.expert[e].positive.clone()))
}

fn circular_negatives(recipe: &Recipe, places: &Places) -> Option<Finding> {
    let of_another = |e: usize, prompt: &String| {
        recipe.experts.iter().enumerate().any(|(other, expert)| other != e && expert.positive_prompts.contains(prompt))
    };
    let circular = |(e, expert): (usize, &Expert)| {
        !expert.negative_prompts.is_empty() && expert.negative_prompts.iter().all(|prompt| of_another(e, prompt))
    };
    let found = uses_prompts(recipe) && recipe.experts.len() > 1 && recipe.experts.iter().enumerate().all(circular);
    let message = || "every expert's negative prompts are other experts' positive prompts".to_owned();
    found.then(|| Finding::about(&all(recipe), message(), |e| places.expert[e].negative.clone()))
}

fn keyword_prompts(recipe: &Recipe, places: &Places) -> Option<Finding> {
    let one_word = |prompt: &String| prompt.split_whitespace().count() == 1;
    let keywords = indices(recipe, |_, expert| !expert.positive_prompts.is_empty() && expert.positive_prompts.iter().all(one_word));
    let states = matches!(recipe.gate_mode.needs(), Some(Needs::LastState | Needs::MeanState));
    let message = || format!("the prompts of {} are single words", experts(&keywords));
    (states && !keywords.is_empty()).then(|| Finding::about(&keywords, message(), |e| places.expert[e].positive.clone()))
}

fn uneven_prompts(recipe: &Recipe, places: &Places) -> Option<Finding> {
    let count = |e: &usize| recipe.experts[*e].positive_prompts.len();
    let (fewest, most) = (all(recipe).into_iter().min_by_key(count)?, all(recipe).into_iter().max_by_key(count)?);
    let uneven = uses_prompts(recipe) && count(&fewest) > 0 && count(&most) >= 4 * count(&fewest);
    let message = || format!("expert {fewest} has far fewer prompts than expert {most}: {} against {}", count(&fewest), count(&most));
    uneven.then(|| Finding::about(&[fewest, most], message(), |e| places.expert[e].positive.clone()))
}

fn empty_prompts(recipe: &Recipe, places: &Places) -> Option<Finding> {
    let empty = |prompts: &[String]| prompts.iter().any(|prompt| prompt.trim().is_empty());
    let with = indices(recipe, |_, expert| empty(&expert.positive_prompts) || empty(&expert.negative_prompts));
    let message = || format!("{} an empty prompt", experts_have(&with));
    (uses_prompts(recipe) && !with.is_empty()).then(|| Finding::about(&with, message(), |e| places.expert[e].positive.clone()))
}

fn unused_prompts(recipe: &Recipe, places: &Places) -> Option<Finding> {
    let given = recipe.experts.iter().any(|expert| !expert.positive_prompts.is_empty() || !expert.negative_prompts.is_empty());
    let message = || format!("`{}` does not look at prompts", recipe.gate_mode.name);
    (!uses_prompts(recipe) && given).then(|| Finding::at(&places.gate_mode, message()))
}

impl Finding {
    fn at(span: &Range<usize>, message: String) -> Self {
        Self { message, places: vec![(span.clone(), String::new())] }
    }

    fn about(experts: &[usize], message: String, place: impl Fn(usize) -> Range<usize>) -> Self {
        Self { message, places: experts.iter().map(|e| (place(*e), format!("expert {e}"))).collect() }
    }
}

fn uses_prompts(recipe: &Recipe) -> bool {
    recipe.gate_mode.needs() != Some(Needs::Nothing)
}

fn prompts(expert: &Expert) -> Option<(&[String], &[String])> {
    (!expert.positive_prompts.is_empty()).then_some((&expert.positive_prompts, &expert.negative_prompts))
}

fn all(recipe: &Recipe) -> Vec<usize> {
    (0..recipe.experts.len()).collect()
}

fn indices(recipe: &Recipe, holds: impl Fn(usize, &Expert) -> bool) -> Vec<usize> {
    recipe.experts.iter().enumerate().filter(|(e, expert)| holds(*e, expert)).map(|(e, _)| e).collect()
}

/// Whether there are several experts and all have the same key.
fn all_equal<'r, K: PartialEq>(recipe: &'r Recipe, key: impl Fn(&'r Expert) -> Option<K>) -> bool {
    let mut keys = recipe.experts.iter().map(key);
    let first = keys.next().flatten();
    recipe.experts.len() > 1 && first.is_some() && keys.all(|one| one == first)
}

/// The first expert that shares its key with later ones, and those.
fn twins<'r, K: PartialEq>(recipe: &'r Recipe, key: impl Fn(&'r Expert) -> Option<K>) -> Option<Vec<usize>> {
    let keys: Vec<_> = recipe.experts.iter().map(key).collect();
    let same_as = |first: &K| (0..keys.len()).filter(|e| keys[*e].as_ref() == Some(first)).collect::<Vec<_>>();
    keys.iter().flatten().map(same_as).find(|group| group.len() > 1)
}

/// Roughly the last token of a prompt: a special token such as `<|im_end|>`, a word, or a sign.
fn ending(prompt: &str) -> &str {
    let from = |at: Option<usize>| &prompt[at.unwrap_or(0)..];
    if prompt.ends_with("|>") {
        return from(prompt.rfind("<|"));
    }
    let word = prompt.trim_end_matches(char::is_alphanumeric).len();
    if word < prompt.len() { &prompt[word..] } else { from(prompt.char_indices().last().map(|(at, _)| at)) }
}

/// "expert 2", "experts 0, 1 and 3".
fn experts(indices: &[usize]) -> String {
    match indices {
        [] => "no expert".to_owned(),
        [one] => format!("expert {one}"),
        [first @ .., last] => {
            let first: Vec<_> = first.iter().map(usize::to_string).collect();
            format!("experts {} and {last}", first.join(", "))
        }
    }
}

fn experts_have(indices: &[usize]) -> String {
    format!("{} {}", experts(indices), if indices.len() == 1 { "has" } else { "have" })
}
