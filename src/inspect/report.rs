//! The figures of an evaluation as a table, as JSON, and in words.
//!
//! Perplexities are per token of one tokenizer; their mean over domains is geometric. A composite's share is how much of the loss between the
//! best dense model (base or average) and the oracle it wins back.

use std::fmt::Write as _;

use serde::Serialize;
use serde_json::{Value, json};

use super::{
    evaluate::Evaluation,
    perplexity::{self, Loss},
    routing::Choices,
};
use crate::recipe::Shared;

/// What a row is, in the order in which rows are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// the base
    Base,
    /// one expert, dense
    Expert,
    /// the experts' plain mean, dense
    Average,
    /// the composite, every token to all experts
    Uniform,
    /// the composite that mergekit would make
    Hidden,
    /// the composite
    Recipe,
    /// the composite, every token to its domain's expert
    Perfect,
    /// the dense experts, mixed by how well they have predicted the text so far
    Mixture,
    /// each expert on its own domain, dense
    Oracle,
    /// a model beside the recipe
    Model,
}

/// A model's losses.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// in the first column
    pub name: String,
    /// what it is
    pub kind: Kind,
    /// [domain][window]; a domain without windows was not read
    pub losses: Vec<Vec<Loss>>,
}

/// A domain as the report names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Domain {
    /// as on the command line
    pub name: String,
    /// the name of the expert that it belongs to
    pub expert: Option<String>,
    /// that expert's index
    #[serde(skip)]
    pub index: Option<usize>,
}

/// An evaluation.
#[derive(Debug, Default)]
pub struct Report {
    /// the columns
    pub domains: Vec<Domain>,
    /// the lines
    pub rows: Vec<Row>,
    /// names of the experts of the model whose routing it is
    pub experts: Vec<String>,
    /// where the recipe takes its shared weights from
    pub shared: Shared,
    /// whether the recipe's gates are fitted to text
    pub fitted: bool,
    /// whether its experts answer whole sequences
    pub sequence: bool,
    /// what its gates chose: [domain][layer]; empty for dense models
    pub choices: Vec<Vec<Choices>>,
    /// what the reader should know
    pub notes: Vec<String>,
}

impl Report {
    /// Takes what a recipe's evaluation found.
    pub fn add(&mut self, evaluation: Evaluation) {
        self.rows = evaluation.rows;
        self.choices = evaluation.choices;
        self.notes.extend(evaluation.notes);
    }

    fn row(&self, kind: Kind) -> Option<&Row> {
        self.rows.iter().find(|row| row.kind == kind)
    }

    /// Domains that count for the mean: those of an expert, or all if no expert has one.
    fn counted(&self) -> Vec<usize> {
        let all = 0..self.domains.len();
        let owned: Vec<usize> = all.clone().filter(|&d| self.domains[d].index.is_some()).collect();
        if owned.is_empty() { all.collect() } else { owned }
    }

    /// Mean loss over the counted domains, in nats: the logarithm of the geometric mean of perplexities.
    fn mean(&self, row: &Row) -> f64 {
        let counted = self.counted();
        counted.iter().map(|&d| perplexity::mean(&row.losses[d])).sum::<f64>() / counted.len() as f64
    }

    /// The dense model with the lower mean: base or average.
    fn best_dense(&self) -> Option<&Row> {
        let dense = [Kind::Base, Kind::Average].into_iter().filter_map(|kind| self.row(kind));
        dense.min_by(|a, b| self.mean(a).total_cmp(&self.mean(b)))
    }

    /// Share of the loss from the best dense model to the oracle that the row wins back; `None` for dense models, and where nothing is to win.
    fn share(&self, row: &Row) -> Option<f64> {
        if !matches!(row.kind, Kind::Uniform | Kind::Hidden | Kind::Recipe | Kind::Perfect | Kind::Mixture | Kind::Model) {
            return None;
        }
        let (best, oracle) = (self.mean(self.best_dense()?), self.mean(self.row(Kind::Oracle)?));
        let share = (best - self.mean(row)) / (best - oracle);
        (best - oracle > NOTHING && share.is_finite()).then_some(share)
    }

    /// Standard error of the difference of two rows' means, window by window: the texts are the same, so most of the scatter cancels.
    fn noise(&self, a: &Row, b: &Row) -> f64 {
        let counted = self.counted();
        let variance = |&d: &usize| {
            let per_token = |loss: &Loss| loss.sum / loss.tokens as f64;
            let differences: Vec<f64> = a.losses[d].iter().zip(&b.losses[d]).map(|(a, b)| per_token(a) - per_token(b)).collect();
            let n = differences.len() as f64;
            let mean = differences.iter().sum::<f64>() / n;
            differences.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0) / n
        };
        counted.iter().map(variance).sum::<f64>().sqrt() / counted.len() as f64
    }

    /// Share of tokens that come to their domain's expert first, [layer][domain]; `None` where there is no such expert or no gate.
    fn accuracy(&self) -> Vec<Vec<Option<f64>>> {
        let layers = self.choices.first().map_or(0, Vec::len);
        let of = |l: usize, d: usize| Some(self.choices[d][l].accuracy(self.domains[d].index?)).filter(|share| share.is_finite());
        (0..layers).map(|l| (0..self.domains.len()).map(|d| of(l, d)).collect()).collect()
    }

    /// What the gates of each sparse layer did, over all domains: layer and choices.
    fn layers(&self) -> Vec<(usize, Choices)> {
        let layers = self.choices.first().map_or(0, Vec::len);
        let merged = (0..layers).map(|l| {
            let mut all = Choices::new(self.experts.len());
            self.choices.iter().for_each(|domain| all.merge(&domain[l]));
            (l, all)
        });
        merged.filter(|(_, choices)| choices.tokens > 0).collect()
    }

    /// The verdict, a sentence or two per line; nothing without a recipe.
    pub fn verdict(&self) -> Vec<String> {
        let mean = |kind| Some(self.mean(self.row(kind)?));
        let (Some(best), Some(row)) = (self.best_dense(), self.row(Kind::Recipe)) else { return Vec::new() };
        // Of whole experts, to choose the right one is all that an oracle does.
        let perfect = if self.sequence { Kind::Oracle } else { Kind::Perfect };
        let (Some(recipe), Some(perfect), Some(oracle)) = (mean(Kind::Recipe), mean(perfect), mean(Kind::Oracle)) else {
            return Vec::new();
        };
        if [recipe, perfect, oracle].iter().any(|mean| !mean.is_finite()) {
            return vec![
                "There is no verdict without texts that belong to experts: name a text after its expert (`--text EXPERT=FILE`).".into(),
            ];
        }
        let right: Vec<f64> = self.accuracy().into_iter().flatten().flatten().collect();
        verdict(&Figures {
            best: self.mean(best),
            merge: best.kind == Kind::Average,
            uniform: mean(Kind::Uniform),
            recipe,
            perfect,
            mixture: mean(Kind::Mixture).filter(|mean| mean.is_finite()),
            oracle,
            noise: self.noise(best, row),
            accuracy: right.iter().sum::<f64>() / right.len() as f64,
            experts: self.experts.len(),
            shared: self.shared,
            fitted: self.fitted,
            sequence: self.sequence,
        })
    }

    /// Tables of perplexities and of routing, verdict, notes.
    pub fn markdown(&self) -> String {
        let mut out = String::new();
        let shares = self.rows.iter().any(|row| self.share(row).is_some());
        let mut head = vec!["perplexity".to_owned()];
        head.extend(self.domains.iter().map(|domain| domain.name.clone()));
        head.push("geomean".into());
        if shares {
            head.push("share of the gap".into());
        }
        let rows = self.rows.iter().map(|row| {
            let mut cells = vec![if row.kind == Kind::Recipe { format!("**{}**", row.name) } else { row.name.clone() }];
            cells.extend(row.losses.iter().map(|losses| figure(perplexity::mean(losses))));
            cells.push(figure(self.mean(row)));
            if shares {
                cells.push(self.share(row).map_or(String::new(), percent));
            }
            cells
        });
        table(&mut out, &head, &rows.collect::<Vec<_>>());
        let layers = self.layers();
        if !layers.is_empty() {
            let mut head = vec!["routing: layer".to_owned()];
            head.extend(self.domains.iter().map(|domain| format!("right: {}", domain.name)));
            head.extend(["right: mean", "effective experts", "entropy of a choice"].map(str::to_owned));
            let accuracy = self.accuracy();
            let rows = layers.iter().map(|(l, choices)| {
                let mut cells = vec![if self.sequence { "all".to_owned() } else { l.to_string() }];
                cells.extend(accuracy[*l].iter().map(|share| share.map_or(String::new(), percent)));
                cells.push(mean_of(&accuracy[*l]).map_or(String::new(), percent));
                cells.push(format!("{:.2} of {}", choices.chosen.effective_experts(), self.experts.len()));
                cells.push(format!("{:.2}", choices.entropy / choices.tokens as f64));
                cells
            });
            out.push('\n');
            table(&mut out, &head, &rows.collect::<Vec<_>>());
        }
        let verdict = self.verdict();
        if !verdict.is_empty() {
            let _ = writeln!(out, "\n{}", verdict.join("\n"));
        }
        for note in &self.notes {
            let _ = writeln!(out, "\nNote: {note}.");
        }
        out
    }

    /// The same for programs.
    pub fn json(&self) -> Value {
        let rows = self.rows.iter().map(|row| {
            let losses: Vec<f64> = row.losses.iter().map(|losses| perplexity::mean(losses)).collect();
            json!({
                "name": row.name,
                "kind": row.kind,
                "perplexity": losses.iter().map(|loss| loss.exp()).collect::<Vec<_>>(),
                "loss": losses,
                "geomean": self.mean(row).exp(),
                "share": self.share(row),
            })
        });
        let accuracy = self.accuracy();
        let routing = self.layers().into_iter().map(|(l, choices)| {
            json!({
                "layer": l,
                "accuracy": accuracy[l],
                "mean_accuracy": mean_of(&accuracy[l]),
                "load": choices.chosen.shares(),
                "load_by_domain": self.choices.iter().map(|domain| domain[l].chosen.shares()).collect::<Vec<_>>(),
                "effective_experts": choices.chosen.effective_experts(),
                "entropy": choices.entropy / choices.tokens as f64,
            })
        });
        json!({
            "domains": self.domains,
            "experts": self.experts,
            "rows": rows.collect::<Vec<_>>(),
            "routing": routing.collect::<Vec<_>>(),
            "verdict": self.verdict(),
            "notes": self.notes,
        })
    }
}

fn mean_of(values: &[Option<f64>]) -> Option<f64> {
    let known: Vec<f64> = values.iter().flatten().copied().collect();
    (!known.is_empty()).then(|| known.iter().sum::<f64>() / known.len() as f64)
}

/// The perplexity of a loss; empty if there is none.
fn figure(loss: f64) -> String {
    match loss.exp() {
        p if p.is_nan() => String::new(),
        p if p < 1e4 => format!("{p:.2}"),
        p => format!("{p:.3e}"),
    }
}

fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

/// A markdown table: text to the left, figures to the right.
fn table(out: &mut String, head: &[String], rows: &[Vec<String>]) {
    let escape = |cell: &String| cell.replace('|', "\\|");
    let mut all: Vec<Vec<String>> =
        std::iter::once(head).chain(rows.iter().map(Vec::as_slice)).map(|row| row.iter().map(escape).collect()).collect();
    let widths: Vec<usize> = (0..head.len()).map(|c| all.iter().map(|row| row[c].chars().count()).max().unwrap_or(0)).collect();
    let rule = widths.iter().enumerate().map(|(c, width)| if c == 0 { "-".repeat(*width) } else { "-".repeat(width - 1) + ":" });
    all.insert(1, rule.collect());
    for row in all {
        let padded = row.iter().zip(&widths).enumerate();
        let cells: Vec<String> =
            padded.map(|(c, (cell, width))| if c == 0 { format!("{cell:<width$}") } else { format!("{cell:>width$}") }).collect();
        let _ = writeln!(out, "| {} |", cells.join(" | "));
    }
}

/// Differences of loss below this (half a per cent of perplexity) are none, whatever the windows say.
const NOTHING: f64 = 0.005;

/// Mean losses in nats, and what else a verdict needs.
#[derive(Debug, Clone, Copy)]
struct Figures {
    /// of the best dense model
    best: f64,
    /// whether that is the average, not the base
    merge: bool,
    uniform: Option<f64>,
    recipe: f64,
    perfect: f64,
    mixture: Option<f64>,
    oracle: f64,
    /// standard error of the difference of `recipe` and `best`
    noise: f64,
    /// share of tokens that come to the right expert first; not a number if unknown
    accuracy: f64,
    experts: usize,
    shared: Shared,
    fitted: bool,
    sequence: bool,
}

/// Is the composite worth it, and what is to blame for what is missing?
fn verdict(f: &Figures) -> Vec<String> {
    let ppl = |loss: f64| figure(loss);
    let dense = if f.merge { "the experts' average" } else { "the base" };
    let gap = f.best - f.oracle;
    if gap <= NOTHING {
        let oracle = ppl(f.oracle);
        return vec![format!(
            "There is nothing to route: on their own domains the experts (oracle {oracle}) are no better than {dense} ({}). Experts have to be \
             trained further before a Mixture-of-Experts can pay.",
            ppl(f.best)
        )];
    }
    let won = f.best - f.recipe;
    let against = format!("{} against {}", ppl(f.recipe), ppl(f.best));
    let mut lines = Vec::new();
    if won.abs() <= NOTHING.max(2.0 * f.noise) {
        lines.push(format!("This recipe hardly differs from {dense}, {against}: a dense model does the same with less."));
    } else if won > 0.0 {
        lines.push(format!(
            "This recipe beats {dense}, {against}, and closes {} of the gap to the oracle ({}).",
            percent(won / gap),
            ppl(f.oracle)
        ));
    } else {
        let instead = if f.merge { "a plain merge" } else { "the base alone" };
        lines.push(format!("This recipe is worse than {dense}, {against}: {instead} is the better model."));
    }
    let missing = f.recipe - f.oracle;
    if missing <= gap * 0.05 {
        lines.push("What is missing is not worth looking for.".into());
        return lines;
    }
    if f.sequence {
        lines.push("What is missing goes to texts whose expert is not clear yet, or not the one that they are counted for.".into());
        return lines;
    }
    let (shared, router) = ((f.perfect - f.oracle).max(0.0), (f.recipe - f.perfect).max(0.0));
    // Whoever is not told the domain has to find it out from the text, and pays for it at its beginning.
    let unknown = f.mixture.map_or(0.0, |mixture| mixture - f.oracle).clamp(0.0, router);
    let part = |part: f64| percent(part / (shared + router));
    let mut split = format!("of what is missing, {} lies in the shared weights and {} in the router", part(shared), part(router));
    if let Some(mixture) = f.mixture.filter(|_| unknown > 0.0) {
        split += &format!("; {} is the price of not being told the expert (Bayes mixture {})", part(unknown), ppl(mixture));
    }
    let chance = 1.0 / f.experts.max(1) as f64;
    let accuracy = if f.accuracy.is_finite() {
        format!("; the gates bring {} of the tokens to the right expert first (by chance it were {})", percent(f.accuracy), percent(chance))
    } else {
        String::new()
    };
    let try_shared = match (f.shared, f.fitted) {
        (Shared::Fit, _) => "try more text for the experts (`text_file`), or experts whose attention was not trained",
        (_, true) => "try `shared: fit`",
        (_, false) => "try `gate_mode: auto`, which fits the shared weights, too",
    };
    let try_router = if f.fitted {
        "try more text for the experts (`text_file`), closer to what they will see"
    } else {
        "try `gate_mode: auto`, which fits the gates to what the routers see"
    };
    if f.perfect >= f.best - NOTHING {
        lines.push(format!(
            "The shared weights are to blame: even a perfect router ({}) is no better than {dense}, because the experts do not work with this \
             attention, and no gate can help. First {try_shared}.",
            ppl(f.perfect)
        ));
    } else if shared > router {
        lines.push(format!(
            "The shared weights are to blame more than the router (perfect router {}): {split}. First {try_shared}.",
            ppl(f.perfect)
        ));
    } else if router - unknown <= gap * 0.01 {
        lines.push(format!("Another gate would gain little (perfect router {}): {split}{accuracy}.", ppl(f.perfect)));
    } else {
        lines.push(format!("The router is to blame (perfect router {}): {split}{accuracy}. First {try_router}.", ppl(f.perfect)));
    }
    if let Some(uniform) = f.uniform.filter(|uniform| *uniform < f.recipe - NOTHING) {
        lines.push(format!("The gates do harm: without them, every token to all experts, it is {} (uniform).", ppl(uniform)));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str, kind: Kind, perplexities: &[f64]) -> Row {
        let windows = |p: &f64| [-0.1, 0.1].iter().map(|d| Loss { sum: 10.0 * (p.ln() + d), tokens: 10 }).collect();
        Row { name: name.into(), kind, losses: perplexities.iter().map(windows).collect() }
    }

    fn report() -> Report {
        let domain = |name: &str, index: Option<usize>| Domain { name: name.into(), expert: index.map(|_| name.to_owned()), index };
        let mut first = Choices::new(2);
        first.tokens = 10;
        first.entropy = 5.0;
        first.first.counts = vec![9, 1];
        first.chosen.counts = vec![9, 1];
        let mut second = first.clone();
        second.first.counts = vec![5, 5];
        second.chosen.counts = vec![1, 9];
        Report {
            domains: vec![domain("code", Some(0)), domain("verse", Some(1)), domain("prose", None)],
            rows: vec![
                row("base", Kind::Base, &[100.0, 100.0, 50.0]),
                row("average", Kind::Average, &[64.0, 64.0, 60.0]),
                row("this recipe", Kind::Recipe, &[32.0, 32.0, 60.0]),
                row("perfect router", Kind::Perfect, &[16.0, 16.0, f64::NAN]),
                row("Bayes mixture", Kind::Mixture, &[20.0, 20.0, f64::NAN]),
                row("oracle", Kind::Oracle, &[16.0, 16.0, f64::NAN]),
            ],
            experts: vec!["code".into(), "verse".into()],
            shared: Shared::Average,
            fitted: true,
            sequence: false,
            choices: vec![vec![first.clone()], vec![second], vec![first]],
            notes: vec!["the texts are short".into()],
        }
    }

    #[test]
    fn means_are_geometric_and_over_the_experts_domains() {
        let report = report();
        assert!((report.mean(&row("", Kind::Model, &[4.0, 9.0, 1000.0])).exp() - 6.0).abs() < 1e-9);
        assert_eq!(report.best_dense().unwrap().kind, Kind::Average);
        // ln 64 - ln 32 is half of ln 64 - ln 16
        assert!((report.share(&report.rows[2]).unwrap() - 0.5).abs() < 1e-9);
        assert_eq!(report.share(&report.rows[0]), None);
    }

    #[test]
    fn noise_is_that_of_the_differences() {
        let report = report();
        assert!(report.noise(&report.rows[0], &report.rows[1]) < 1e-12, "the windows differ, their differences do not");
        let mut other = report.rows[1].clone();
        // differences per token of 0 and 0.2 in both domains: standard error 0.1 each, of the mean of two 0.1 / sqrt 2
        other.losses.iter_mut().for_each(|losses| losses[1].sum += 2.0);
        assert!((report.noise(&other, &report.rows[1]) - 0.1 / 2f64.sqrt()).abs() < 1e-9);
    }

    #[test]
    fn tables_and_json_say_the_same() {
        insta::assert_snapshot!(report().markdown());
        insta::assert_json_snapshot!(rounded(report().json()));
    }

    /// The last digits of a logarithm are each machine's own.
    fn rounded(value: Value) -> Value {
        match value {
            Value::Number(number) => number.as_f64().map_or(Value::Null, |v| json!((v * 1e6).round() / 1e6)),
            Value::Array(list) => list.into_iter().map(rounded).collect(),
            Value::Object(map) => map.into_iter().map(|(key, value)| (key, rounded(value))).collect(),
            other => other,
        }
    }

    #[test]
    fn the_verdict_names_the_culprit() {
        // perplexities: best dense, recipe, perfect router, oracle
        let cases = [
            ("nothing to route", (20.0, 19.9, 19.95, 19.95), "There is nothing to route"),
            ("all there", (64.0, 16.2, 16.1, 16.0), "not worth looking for"),
            ("router", (64.0, 48.0, 17.0, 16.0), "The router is to blame"),
            ("shared weights", (64.0, 48.0, 44.0, 16.0), "The shared weights are to blame more than the router"),
            ("shared weights alone", (64.0, 63.9, 68.0, 16.0), "even a perfect router"),
            ("worse than the router is right", (64.0, 70.0, 17.0, 16.0), "The router is to blame"),
        ];
        let figures = |(best, recipe, perfect, oracle): (f64, f64, f64, f64)| Figures {
            best: best.ln(),
            merge: true,
            uniform: None,
            recipe: recipe.ln(),
            perfect: perfect.ln(),
            mixture: None,
            oracle: oracle.ln(),
            noise: 0.001,
            accuracy: 0.5,
            experts: 4,
            shared: Shared::Base,
            fitted: false,
            sequence: false,
        };
        for (name, case, expected) in cases {
            let lines = verdict(&figures(case)).join("\n");
            assert!(lines.contains(expected), "{name}: {lines}");
        }
        let told = |mixture: f64| verdict(&Figures { mixture: Some(mixture.ln()), ..figures((64.0, 20.0, 16.0, 16.0)) }).join("\n");
        assert!(
            told(18.0).contains("The router is to blame")
                && told(18.0).contains("53 % is the price of not being told the expert (Bayes mixture 18.00)"),
            "{}",
            told(18.0)
        );
        for untold in [19.9, 21.0] {
            assert!(told(untold).contains("Another gate would gain little (perfect router 16.00)"), "{}", told(untold));
        }
        let whole = verdict(&Figures { sequence: true, ..figures((64.0, 20.0, 16.0, 16.0)) }).join("\n");
        assert!(whole.contains("goes to texts whose expert is not clear yet") && !whole.contains("to blame"), "{whole}");
        let first = |f: &Figures| verdict(f).swap_remove(0);
        assert!(first(&figures((64.0, 32.0, 17.0, 16.0))).contains("beats the experts' average, 32.00 against 64.00, and closes 50 %"));
        assert!(first(&figures((64.0, 70.0, 17.0, 16.0))).contains("a plain merge is the better model"));
        assert!(first(&Figures { merge: false, ..figures((64.0, 70.0, 17.0, 16.0)) }).contains("the base alone is the better model"));
        assert!(first(&Figures { noise: 0.5, ..figures((64.0, 50.0, 17.0, 16.0)) }).contains("hardly differs"), "within the noise");
        let harmful = verdict(&Figures { uniform: Some(40f64.ln()), ..figures((64.0, 48.0, 17.0, 16.0)) });
        assert!(harmful.last().unwrap().contains("The gates do harm"), "{harmful:?}");
        let harmless = verdict(&Figures { uniform: Some(60f64.ln()), ..figures((64.0, 48.0, 17.0, 16.0)) });
        assert!(!harmless.last().unwrap().contains("harm"), "{harmless:?}");
        let advice = |shared, fitted| verdict(&Figures { shared, fitted, ..figures((64.0, 48.0, 44.0, 16.0)) }).join(" ");
        assert!(advice(Shared::Base, false).contains("try `gate_mode: auto`") && advice(Shared::Base, true).contains("try `shared: fit`"));
        assert!(advice(Shared::Fit, true).contains("`text_file`"));
    }
}
