//! A composite beside everything that it competes with: base, experts, their mean, no gate, mergekit's gate, a perfect router, the
//! experts' Bayesian mixture, the oracle.
//!
//! One model is loaded at a time, straight off the maps; nothing is written.

use candle_core::{DType, Device};
use upcycle_architectures::{
    Config, Dtype, Family, Weights, WeightsError,
    decoder::{Decoder, DecoderError, Ensemble, Probe},
};
use upcycle_routers::route::Routing;

use super::{
    average::Average,
    perplexity::{self, Loss, Window},
    report::{Kind, Row},
    routing::{Choices, Observer, Router},
};
use crate::{
    plan::{Composite, Sources},
    recipe::Recipe,
    source::Source,
};

/// A text of one domain.
#[derive(Debug, Clone)]
pub struct Text {
    /// of the domain
    pub name: String,
    /// what of it is read
    pub windows: Vec<Window>,
    /// the expert that the domain belongs to
    pub expert: Option<usize>,
}

/// Is told how an evaluation goes.
pub trait Progress {
    /// A model begins, which will read so many windows.
    fn begin(&self, row: &str, windows: usize);
    /// So many more windows are read.
    fn advance(&self, windows: usize);
}

/// Where and how to compute, and who is told.
pub struct Setting<'a> {
    /// the device
    pub device: Device,
    /// the type to compute in
    pub dtype: DType,
    /// is told
    pub progress: &'a dyn Progress,
}

/// Why there are no figures.
#[derive(Debug, thiserror::Error)]
#[error("{row}: {source}")]
pub struct EvalError {
    /// of the table
    pub row: String,
    /// what went wrong
    pub source: DecoderError,
}

impl EvalError {
    fn of(row: &str) -> impl Fn(DecoderError) -> Self {
        move |source| Self { row: row.to_owned(), source }
    }
}

/// What a recipe's evaluation found.
#[derive(Debug, Default)]
pub struct Evaluation {
    /// in the order in which they are shown
    pub rows: Vec<Row>,
    /// of the recipe's own gates: [text][layer]
    pub choices: Vec<Vec<Choices>>,
    /// what could not be had, and why
    pub notes: Vec<String>,
}

/// One model as it is: its losses, and what its gates chose if it has some, [text][layer].
pub fn model(
    name: &str,
    (family, config): (&Family, &Config),
    weights: &dyn Weights,
    texts: &[Text],
    setting: &Setting<'_>,
) -> Result<(Row, Vec<Vec<Choices>>), EvalError> {
    let decoder = Decoder::load(family, config, weights, setting.dtype, &setting.device).map_err(EvalError::of(name))?;
    read(name, Kind::Model, &decoder, texts, setting, |_| Some(Router::Gates))
}

/// Every row of a recipe. `hidden` is the composite that mergekit would make of it.
pub fn recipe(
    recipe: &Recipe,
    composite: &Composite,
    hidden: Option<&Composite>,
    names: &[String],
    texts: &[Text],
    setting: &Setting<'_>,
) -> Result<Evaluation, EvalError> {
    let mut evaluation = dense(recipe, &composite.sources, composite.plan.dtype, names, texts, setting)?;
    if let Some(hidden) = hidden {
        evaluation.rows.push(mergekit(hidden, texts, setting)?);
    }
    let decoder = load("this recipe", composite, setting)?;
    let composite = |name: &str, kind, router: &dyn Fn(&Text) -> Option<Router>| read(name, kind, &decoder, texts, setting, router);
    evaluation.rows.push(composite("uniform", Kind::Uniform, &|_| Some(Router::Uniform))?.0);
    let (row, choices) = composite("this recipe", Kind::Recipe, &|_| Some(Router::Gates))?;
    evaluation.rows.push(row);
    evaluation.choices = choices;
    evaluation.rows.push(composite("perfect router", Kind::Perfect, &|text| text.expert.map(Router::Only))?.0);
    evaluation.rows.sort_by_key(|row| row.kind);
    Ok(evaluation)
}

/// The rows of a recipe whose experts answer whole sequences: `ensemble`. The average is held in `dtype`.
pub fn sequence(
    recipe: &Recipe,
    (sources, dtype): (&Sources, Dtype),
    ensemble: &Ensemble,
    names: &[String],
    texts: &[Text],
    setting: &Setting<'_>,
) -> Result<Evaluation, EvalError> {
    let mut evaluation = dense(recipe, sources, dtype, names, texts, setting)?;
    let name = "this recipe";
    setting.progress.begin(name, texts.iter().map(|text| text.windows.len()).sum());
    let (mut losses, mut read, mut tokens) = (Vec::new(), 0, 0);
    for text in texts {
        let mut readers = Readers { observer: Observer::of_ensemble(ensemble), read: 0 };
        let done = &mut |done| setting.progress.advance(done);
        losses.push(perplexity::losses(ensemble, &text.windows, &mut readers, done).map_err(EvalError::of(name))?);
        read += readers.read;
        tokens += readers.observer.layers[0].tokens;
        evaluation.choices.push(readers.observer.layers);
    }
    evaluation.rows.push(Row { name: name.to_owned(), kind: Kind::Recipe, losses });
    evaluation.rows.sort_by_key(|row| row.kind);
    evaluation.notes.push("there are no rows for `uniform` and a perfect router: whole experts have no token-wise mean, and who always asks the right one is the oracle".into());
    let mean = read as f64 / tokens.max(1) as f64;
    evaluation.notes.push(format!("a token was read by {mean:.2} of {} experts in the mean, until one was left", ensemble.experts()));
    Ok(evaluation)
}

/// Counts the experts that read each token, besides what an observer counts.
struct Readers {
    observer: Observer,
    read: u64,
}

impl Probe for Readers {
    fn route(&mut self, layer: usize, logits: &[f32], routing: &mut Routing) {
        self.read += logits.iter().filter(|posterior| posterior.is_finite()).count() as u64;
        self.observer.route(layer, logits, routing);
    }
}

/// The rows of all dense models: base, experts, their mean held in `dtype`, oracle.
fn dense(
    recipe: &Recipe,
    sources: &Sources,
    dtype: Dtype,
    names: &[String],
    texts: &[Text],
    setting: &Setting<'_>,
) -> Result<Evaluation, EvalError> {
    let mut evaluation = Evaluation::default();
    let base = sources.base();
    let dense = |name: &str, kind, source: &Source| -> Result<Row, EvalError> {
        let (row, _) = model(name, (source.family, &source.config), &*source.weights, texts, setting)?;
        Ok(Row { kind, ..row })
    };
    evaluation.rows.push(dense("base", Kind::Base, base)?);
    let mut experts: Vec<Row> = Vec::new();
    for (e, name) in names.iter().enumerate() {
        let reference = &recipe.experts[e].source_model;
        let label = format!("expert `{name}`");
        let earlier = recipe.experts[..e].iter().position(|earlier| earlier.source_model == *reference);
        let known = earlier.map(|earlier| &experts[earlier]).or_else(|| (*reference == base.reference).then(|| &evaluation.rows[0]));
        let row = match known {
            Some(row) => Row { name: label, kind: Kind::Expert, losses: row.losses.clone() },
            None => dense(&label, Kind::Expert, sources.get(reference))?,
        };
        experts.push(row);
    }
    let (mixture, oracle) = (mixture(&experts, texts), oracle(&experts, texts));
    evaluation.rows.extend(experts);
    evaluation.rows.extend([mixture, oracle]);
    match Average::new(base, sources.experts(recipe), dtype) {
        Ok(average) => {
            let (row, _) = model("average", (average.family, &average.config), &average, texts, setting)?;
            evaluation.rows.push(Row { kind: Kind::Average, ..row });
        }
        Err(error) => evaluation.notes.push(no_average(&error)),
    }
    Ok(evaluation)
}

/// The row of the composite that mergekit would make.
pub fn mergekit(hidden: &Composite, texts: &[Text], setting: &Setting<'_>) -> Result<Row, EvalError> {
    let name = "mergekit `hidden`";
    Ok(read(name, Kind::Hidden, &load(name, hidden, setting)?, texts, setting, |_| Some(Router::Gates))?.0)
}

fn load(name: &str, composite: &Composite, setting: &Setting<'_>) -> Result<Decoder, EvalError> {
    Decoder::load(composite.plan.family(), &composite.plan.config, composite, setting.dtype, &setting.device).map_err(EvalError::of(name))
}

fn no_average(error: &WeightsError) -> String {
    format!("there is no row for the average: the experts cannot be averaged ({error})")
}

/// All experts on every text that has one, as a Bayesian mixture: the next token's probability is their mean, each weighted by the probability
/// that it gave the window so far. Over a whole window that is the mean of the probabilities that they give it: at most ln E nats are lost to
/// the right one, which is what it costs not to be told which that is.
fn mixture(experts: &[Row], texts: &[Text]) -> Row {
    let of_window = |t: usize, w: usize| {
        let least = experts.iter().map(|row| row.losses[t][w].sum).fold(f64::INFINITY, f64::min);
        let mean = experts.iter().map(|row| (least - row.losses[t][w].sum).exp()).sum::<f64>() / experts.len() as f64;
        Loss { sum: least - mean.ln(), ..experts[0].losses[t][w] }
    };
    let of_text = |(t, text): (usize, &Text)| {
        let windows = if text.expert.is_some() { text.windows.len() } else { 0 };
        (0..windows).map(|w| of_window(t, w)).collect()
    };
    Row { name: "Bayes mixture".to_owned(), kind: Kind::Mixture, losses: texts.iter().enumerate().map(of_text).collect() }
}

/// Each expert alone on its own texts.
fn oracle(experts: &[Row], texts: &[Text]) -> Row {
    let own = |(t, text): (usize, &Text)| text.expert.map_or_else(Vec::new, |e| experts[e].losses[t].clone());
    Row { name: "oracle".to_owned(), kind: Kind::Oracle, losses: texts.iter().enumerate().map(own).collect() }
}

/// Reads every text for which there is a router.
fn read(
    name: &str,
    kind: Kind,
    decoder: &Decoder,
    texts: &[Text],
    setting: &Setting<'_>,
    router: impl Fn(&Text) -> Option<Router>,
) -> Result<(Row, Vec<Vec<Choices>>), EvalError> {
    let routers: Vec<Option<Router>> = texts.iter().map(router).collect();
    let windows = texts.iter().zip(&routers).filter(|(_, router)| router.is_some()).map(|(text, _)| text.windows.len()).sum();
    setting.progress.begin(name, windows);
    let (mut losses, mut choices): (Vec<Vec<Loss>>, Vec<_>) = (Vec::new(), Vec::new());
    for (text, router) in texts.iter().zip(routers) {
        let mut observer = Observer::new(decoder, router.unwrap_or(Router::Gates));
        losses.push(match router {
            Some(_) => perplexity::losses(decoder, &text.windows, &mut observer, &mut |done| setting.progress.advance(done))
                .map_err(EvalError::of(name))?,
            None => Vec::new(),
        });
        choices.push(observer.layers);
    }
    Ok((Row { name: name.to_owned(), kind, losses }, choices))
}

/// Which expert each domain belongs to: the one of that name, or the one whose name has the domain's as a word (`mlp-code` has `code`).
/// If no name fits and there is a text for each expert, they belong together in their order: the second value is then true.
pub fn match_experts(domains: &[&str], experts: &[String]) -> (Vec<Option<usize>>, bool) {
    let has_word = |expert: &str, domain: &str| expert.split(|c: char| !c.is_alphanumeric()).any(|word| word.eq_ignore_ascii_case(domain));
    let find = |domain: &&str| {
        let exact = experts.iter().position(|expert| expert.eq_ignore_ascii_case(domain));
        let mut words = (0..experts.len()).filter(|&e| has_word(&experts[e], domain));
        exact.or_else(|| words.next().filter(|_| words.next().is_none()))
    };
    let matched: Vec<Option<usize>> = domains.iter().map(find).collect();
    if matched.iter().all(Option::is_none) && domains.len() == experts.len() {
        return ((0..experts.len()).map(Some).collect(), true);
    }
    (matched, false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mixture_pays_once_for_what_it_is_not_told() {
        let row = |sums: [f64; 2]| Row {
            name: String::new(),
            kind: Kind::Expert,
            losses: vec![sums.map(|sum| Loss { sum, tokens: 10 }).to_vec(), sums.map(|sum| Loss { sum, tokens: 10 }).to_vec()],
        };
        let window = Window { tokens: vec![0; 11], prefix: 0 };
        let text = |expert| Text { name: String::new(), windows: vec![window.clone(); 2], expert };
        // Equal experts lose nothing; one that is far better than the others loses the logarithm of their number.
        let losses = mixture(&[row([20.0, 20.0]), row([20.0, 900.0])], &[text(Some(0)), text(None)]).losses;
        assert!((losses[0][0].sum - 20.0).abs() < 1e-12 && (losses[0][1].sum - 20.0 - 2f64.ln()).abs() < 1e-12, "{losses:?}");
        assert!(losses[0][0].tokens == 10 && losses[1].is_empty(), "a text of no expert has no right one");
    }

    #[test]
    fn domains_find_their_experts() {
        let experts = ["mlp-code", "mlp-bible", "german"].map(str::to_owned);
        assert_eq!(match_experts(&["german", "Code", "prose"], &experts), (vec![Some(2), Some(0), None], false));
        assert_eq!(match_experts(&["mlp", "prose"], &experts), (vec![None, None], false), "two experts have that word");
        assert_eq!(match_experts(&["a", "b", "c"], &experts), (vec![Some(0), Some(1), Some(2)], true));
        assert_eq!(match_experts(&["a", "b"], &experts), (vec![None, None], false));
    }
}
