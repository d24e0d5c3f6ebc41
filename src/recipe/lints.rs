//! What a well-formed recipe may still get wrong: one table, in mergekit-moe's order of checks, then ours.
//!
//! A lint looks at the recipe alone. Prompts are judged as text; what they do to the gates is measured where the gates are made.

use std::{ops::Range, str::FromStr, sync::Arc};

use upcycle_routers::init::Needs;

use super::{
    Expert, Problem, Recipe, Severity,
    problem::{File, Place},
    schema::{self, Places},
};

/// One check.
#[derive(Debug, Clone, Copy)]
pub struct Lint {
    /// What `--allow` takes.
    pub name: &'static str,
    /// What becomes of a recipe that it finds something in.
    pub level: Level,
    /// Why that matters.
    pub why: &'static str,
    /// What to do.
    pub hint: &'static str,
    check: fn(&Recipe, &Places) -> Option<Finding>,
}

/// What becomes of a recipe that a lint finds something in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// Refused: nothing could be made of it.
    Error,
    /// Refused unless allowed: something could be made of it, but nothing useful.
    Refuse,
    /// Warned of unless allowed.
    Warn,
}

/// Why a name cannot be allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LintError {
    /// No lint of that name.
    #[error("`{name}` is no check{}; those that can be allowed are {known}", .near.map(|near| format!(" (did you mean `{near}`?)")).unwrap_or_default())]
    Unknown {
        /// the name
        name: String,
        /// what it may have meant
        near: Option<&'static str>,
        /// every name that can be given
        known: String,
    },
    /// One that nothing can be made without.
    #[error("`{0}` cannot be allowed: there is nothing to make of such a recipe")]
    Required(&'static str),
}

impl FromStr for Lint {
    type Err = LintError;

    fn from_str(name: &str) -> Result<Self, LintError> {
        match LINTS.iter().find(|lint| lint.name == name) {
            Some(Lint { level: Level::Error, name, .. }) => Err(LintError::Required(name)),
            Some(lint) => Ok(*lint),
            None => {
                let known: Vec<_> = LINTS.iter().filter(|lint| lint.level != Level::Error).map(|lint| lint.name).collect();
                let near = schema::nearest(name, known.iter().copied());
                Err(LintError::Unknown { name: name.to_owned(), near, known: schema::list(&known) })
            }
        }
    }
}

/// What a lint found: a message and the places it is about, the first of them the one that counts.
struct Finding {
    message: String,
    places: Vec<(Range<usize>, String)>,
}

/// Every lint, in the order that they are checked.
pub const LINTS: &[Lint] = &[
    Lint {
        name: "no-experts",
        level: Level::Error,
        why: "a composite without experts is the base",
        hint: "write one `- source_model: ...` per expert below `experts`",
        check: no_experts,
    },
    Lint {
        name: "too-few-experts",
        level: Level::Error,
        why: "a token cannot choose more experts than there are",
        hint: "add experts, or lower `experts_per_token` (2 if not given)",
        check: too_few_experts,
    },
    Lint {
        name: "many-shared-experts",
        level: Level::Error,
        why: "no architecture that others load has more than one",
        hint: "keep one, and make the others experts",
        check: many_shared_experts,
    },
    Lint {
        name: "missing-prompts",
        level: Level::Error,
        why: "the gate of an expert is made from its prompts",
        hint: "give it `positive_prompts` or a `prompts_file`, or set `gate_mode: random` and train the gates",
        check: missing_prompts,
    },
    Lint {
        name: "one-expert",
        level: Level::Refuse,
        why: "with one expert there is nothing to choose",
        hint: "add experts",
        check: one_expert,
    },
    Lint {
        name: "identical-prompts",
        level: Level::Refuse,
        why: "equal prompts give equal gates: every token would go to the first experts",
        hint: "give each expert prompts of what it is good at",
        check: identical_prompts,
    },
    Lint {
        name: "same-model-experts",
        level: Level::Refuse,
        why: "copies of one model compute what that model computes, at several times its size",
        hint: "name different fine-tunes; copies are useful only as a start for training",
        check: same_model_experts,
    },
    Lint {
        name: "twin-prompts",
        level: Level::Warn,
        why: "equal prompts give equal gates, and of equal gates the first expert wins",
        hint: "give each expert prompts of its own",
        check: twin_prompts,
    },
    Lint {
        name: "twin-experts",
        level: Level::Warn,
        why: "the second copy takes memory and adds nothing",
        hint: "keep one of them, with the prompts of both",
        check: twin_experts,
    },
    Lint {
        name: "same-endings",
        level: Level::Warn,
        why: "`hidden` looks at the last token of each prompt, and the gate of the first layer sees nothing else",
        hint: "end the prompts of different experts differently, or set `gate_mode: hidden_avg`",
        check: same_endings,
    },
    Lint {
        name: "circular-negatives",
        level: Level::Warn,
        why: "gates of which each is a sum of the others cannot be told apart well: they have one dimension too few",
        hint: "leave `negative_prompts` out, or write some that are no other expert's prompts",
        check: circular_negatives,
    },
    Lint {
        name: "keyword-prompts",
        level: Level::Warn,
        why: "gates made from single words come out nearly parallel; whole requests tell experts apart",
        hint: "write whole requests, 16 to 64 per expert; `prompts_file` takes them from a file",
        check: keyword_prompts,
    },
    Lint {
        name: "uneven-prompts",
        level: Level::Warn,
        why: "a gate is a mean over its prompts: one made from a few is noisy beside one made from many",
        hint: "give each expert about as many prompts",
        check: uneven_prompts,
    },
    Lint {
        name: "empty-prompts",
        level: Level::Warn,
        why: "an empty prompt is the start token alone and says nothing about the expert",
        hint: "remove it, or write what the expert is good at",
        check: empty_prompts,
    },
    Lint {
        name: "unused-prompts",
        level: Level::Warn,
        why: "the prompts change nothing",
        hint: "remove the prompts, or set `gate_mode: hidden` to use them",
        check: unused_prompts,
    },
];

/// What the lints find in a recipe, less what is allowed.
pub(super) fn check(recipe: &Recipe, places: &Places, allow: &[Lint], file: &Arc<File>) -> Vec<Problem> {
    let allowed = |lint: &&Lint| !allow.iter().any(|allowed| allowed.name == lint.name);
    let problem = |lint: &Lint| {
        let finding = (lint.check)(recipe, places)?;
        let hint = match lint.level {
            Level::Refuse => format!("{}; `--allow {}` if it is meant", lint.hint, lint.name),
            Level::Error | Level::Warn => lint.hint.to_owned(),
        };
        Some(Problem {
            severity: if lint.level == Level::Warn { Severity::Warning } else { Severity::Error },
            lint: Some(lint.name),
            message: finding.message,
            why: Some(lint.why),
            hint: Some(hint),
            places: finding.places.into_iter().map(|(span, label)| Place { span, label }).collect(),
            file: Arc::clone(file),
        })
    };
    LINTS.iter().filter(allowed).filter_map(problem).collect()
}

fn no_experts(recipe: &Recipe, places: &Places) -> Option<Finding> {
    recipe.experts.is_empty().then(|| Finding::at(&places.experts, "there are no experts".to_owned()))
}

fn too_few_experts(recipe: &Recipe, places: &Places) -> Option<Finding> {
    let (experts, chosen) = (recipe.experts.len(), recipe.experts_per_token);
    let message = || {
        format!("each token chooses {chosen} experts, but there {}", if experts == 1 { "is 1".into() } else { format!("are {experts}") })
    };
    (0 < experts && experts < chosen).then(|| Finding::at(&places.experts_per_token, message()))
}

fn many_shared_experts(recipe: &Recipe, places: &Places) -> Option<Finding> {
    let shared = recipe.shared_experts.len();
    (shared > 1).then(|| Finding::at(&places.shared_experts, format!("there can be one shared expert, not {shared}")))
}

fn missing_prompts(recipe: &Recipe, places: &Places) -> Option<Finding> {
    let without = indices(recipe, |_, expert| expert.positive_prompts.is_empty());
    let mode = recipe.gate_mode.name;
    let message = || format!("`{mode}` makes gates from prompts, but {} none", experts_have(&without));
    (uses_prompts(recipe) && !without.is_empty()).then(|| Finding::about(&without, message(), |e| places.expert[e].source_model.clone()))
}

fn one_expert(recipe: &Recipe, places: &Places) -> Option<Finding> {
    (uses_prompts(recipe) && recipe.experts.len() == 1).then(|| Finding::at(&places.experts, "there is only one expert".to_owned()))
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
    if recipe.gate_mode.needs != Needs::LastState || recipe.chat_template {
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
    let states = matches!(recipe.gate_mode.needs, Needs::LastState | Needs::MeanState);
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
    recipe.gate_mode.needs != Needs::Nothing
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
