//! The model card: what the composite is made of and how to use it.

use std::fmt::Write as _;

use crate::{plan::Composite, recipe::Recipe};

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
    let experts = recipe.experts.len();
    let k = recipe.experts_per_token;
    let _ = write!(
        text,
        "---\n\n# Mixture of {experts} experts\n\nA {} model of {:.2} B parameters, {:.2} B of them active per token ({k} of {experts} experts), \
         composed with [upcycle](https://crates.io/crates/upcycle).\n\n| | model |\n|---|---|\n| base | {} |\n",
        plan.family().architecture,
        all as f64 / 1e9,
        active as f64 / 1e9,
        recipe.base_model,
    );
    for (e, expert) in recipe.experts.iter().enumerate() {
        let _ = writeln!(text, "| expert {e} | {} |", expert.source_model);
    }
    for expert in &recipe.shared_experts {
        let _ = writeln!(text, "| shared expert | {} |", expert.source_model);
    }
    let _ = write!(text, "\nGates: `{}`.\n\n## Recipe\n\n```yaml\n{}\n```\n", recipe.gate_mode.name, recipe.text.trim_end());
    text
}

/// `owner/name`, not a path.
fn hub_name(path: &str) -> bool {
    let plain =
        |part: &str| !part.is_empty() && !part.starts_with('.') && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
    matches!(path.split('/').collect::<Vec<_>>().as_slice(), [owner, name] if plain(owner) && plain(name))
        && !std::path::Path::new(path).exists()
}
