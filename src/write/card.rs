//! The model card: what the composite is made of and how to use it.

use std::fmt::Write as _;

use upcycle_routers::diagnose;

use super::MANIFEST;
use crate::{
    calibrate,
    plan::Composite,
    recipe::{ModelRef, Recipe},
    source,
};

pub(super) fn render(composite: &Composite, recipe: &Recipe) -> String {
    let plan = &composite.plan;
    let (all, active) = plan.parameters();
    let mut text = String::from("---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [moe, merge, upcycle]\n");
    let named: Vec<String> =
        composite.sources.all.iter().map(|source| source.reference.path.clone()).filter(|path| hub_name(path)).collect();
    if !named.is_empty() {
        let _ = writeln!(text, "base_model:");
        for path in named {
            let _ = writeln!(text, "- {path}");
        }
    }
    let licence = |reference: &ModelRef| source::licence(composite.sources.get(reference));
    let mut licences: Vec<String> = composite.sources.all.iter().filter_map(source::licence).collect();
    licences.sort();
    licences.dedup();
    // One that all cards name is the composite's; several are for its owner to join.
    if let [one] = licences.as_slice() {
        let _ = writeln!(text, "license: {one}");
    }
    let experts = recipe.experts.len();
    let k = recipe.experts_per_token;
    let _ = write!(
        text,
        "---\n\n# Mixture of {experts} experts\n\nA {} model of {:.2} B parameters, {:.2} B of them active per token ({k} of {experts} experts), \
         composed with [upcycle](https://crates.io/crates/upcycle).\n\n| | model | licence |\n|---|---|---|\n| base | {} | {} |\n",
        plan.family().architecture,
        all as f64 / 1e9,
        active as f64 / 1e9,
        recipe.base_model,
        licence(&recipe.base_model).unwrap_or_default(),
    );
    for (e, expert) in recipe.experts.iter().enumerate() {
        let _ = writeln!(text, "| expert {e} | {} | {} |", expert.source_model, licence(&expert.source_model).unwrap_or_default());
    }
    for expert in &recipe.shared_experts {
        let _ = writeln!(text, "| shared expert | {} | {} |", expert.source_model, licence(&expert.source_model).unwrap_or_default());
    }
    let _ = write!(text, "\nGates: `{}`{}\n\n", recipe.gate_mode.name, gates(composite, recipe));
    let _ = write!(text, "`upcycle verify` holds these files against `{MANIFEST}`: the origin and the checksum of every tensor.\n\n");
    let _ = write!(text, "## Recipe\n\n```yaml\n{}\n```\n", recipe.text.trim_end());
    text
}

/// Around what `upcycle eval` adds to a card.
const EVALUATION: [&str; 2] = ["<!-- upcycle eval -->", "<!-- end of upcycle eval -->"];

/// The card with this evaluation, in place of an earlier one or at its end.
pub(super) fn evaluated(card: &str, table: &str) -> String {
    let [begin, end] = EVALUATION;
    let section = format!("{begin}\n## Evaluation\n\n{}\n{end}", table.trim());
    let earlier = card.find(begin).zip(card.find(end)).filter(|(from, to)| from < to);
    match earlier {
        Some((from, to)) => format!("{}{section}{}", &card[..from], &card[to + end.len()..]),
        None => format!("{}\n\n{section}\n", card.trim_end()),
    }
}

/// How well the gates tell the experts apart, by their weights alone.
fn gates(composite: &Composite, recipe: &Recipe) -> String {
    let layers = diagnose::diagnose(&composite.gates().routed);
    let mut spreads: Vec<f64> = layers.iter().map(|layer| layer.spread).collect();
    spreads.sort_by(f64::total_cmp);
    let (Some(least), Some(most)) = (spreads.first(), spreads.last()) else { return ".".into() };
    let names = calibrate::names(&recipe.experts.iter().collect::<Vec<_>>());
    let warnings = diagnose::warnings(&layers, &names.iter().map(String::as_str).collect::<Vec<_>>());
    let warnings: String = warnings.iter().map(|warning| format!("\n- {warning}")).collect();
    let median = spreads[spreads.len() / 2];
    format!(
        "; condition numbers of the {} layers less what all rows share: {least:.1} to {most:.1}, median {median:.1}.{warnings}",
        layers.len()
    )
}

/// `owner/name`, not a path.
fn hub_name(path: &str) -> bool {
    let plain =
        |part: &str| !part.is_empty() && !part.starts_with('.') && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
    matches!(path.split('/').collect::<Vec<_>>().as_slice(), [owner, name] if plain(owner) && plain(name))
        && !std::path::Path::new(path).exists()
}

#[cfg(test)]
mod tests {
    use super::evaluated;

    #[test]
    fn an_evaluation_takes_the_place_of_an_earlier_one() {
        let once = evaluated("# Card\n\n## Recipe\n\n```yaml\na: b\n```\n", "| a |\n");
        assert!(once.starts_with("# Card") && once.contains("## Evaluation\n\n| a |\n"), "{once}");
        let more = once.clone() + "\nWritten by hand.\n";
        assert_eq!(evaluated(&more, "| b |"), more.replace("| a |", "| b |"));
    }
}
