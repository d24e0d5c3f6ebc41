//! A composite that a command changes and writes again: from a recipe, or as it lies on disk.

use std::path::Path;

use upcycle::{
    calibrate,
    plan::{self, Composite},
    recipe::{self as recipes, Recipe},
    source::{self, Source},
    write::{self, Papers},
};

use super::{
    model::{self, DeviceArgs},
    recipe, ui,
};

/// A composite, and what is known of it beside its weights.
pub(crate) struct Given {
    pub(crate) composite: Composite,
    /// what its experts are called
    pub(crate) experts: Vec<String>,
    pub(crate) recipe: Option<Recipe>,
}

/// Opens a recipe's composite or one on disk; `None` for a dense model.
pub(crate) fn open(model: &str, options: &recipe::Options, device: &DeviceArgs) -> anyhow::Result<Option<Given>> {
    if model::is_recipe(model) {
        let mut recipe = recipe::read(Path::new(model), options)?;
        let composite = recipe::composite(&mut recipe, options, device)?;
        let experts = calibrate::names(&recipe.experts.iter().collect::<Vec<_>>());
        return Ok(Some(Given { composite, experts, recipe: Some(recipe) }));
    }
    let source = source::open(&model.parse()?, &ui::open_options(None))?;
    let experts = names(&source);
    Ok(plan::opened(source).map(|composite| Given { composite, experts, recipe: None }))
}

/// What the experts of a composite on disk are called: as in the recipe beside it, or else by their number. A dense model has none.
pub(crate) fn names(source: &Source) -> Vec<String> {
    let experts = source.config.moe.as_ref().map_or(0, |moe| moe.experts);
    let recipe = fs_err::read_to_string(source.location.join(write::RECIPE)).unwrap_or_default();
    let names = calibrate::names(&recipes::experts(&recipe).iter().collect::<Vec<_>>());
    if names.len() == experts { names } else { (0..experts).map(|e| e.to_string()).collect() }
}

/// The papers that the composite came with; `note` is added to its card.
pub(crate) fn papers<'a>(given: &'a Given, note: &str) -> Papers<'a> {
    let mut papers = if let Some(recipe) = &given.recipe {
        write::papers(&given.composite, recipe)
    } else {
        let source = given.composite.sources.base();
        let read = |name: &'static str| Some((name, fs_err::read(source.location.join(name)).ok()?));
        Papers { tokenizer: source, files: [write::RECIPE, write::CARD].into_iter().filter_map(read).collect() }
    };
    for (_, bytes) in papers.files.iter_mut().filter(|(name, _)| *name == write::CARD) {
        bytes.extend_from_slice(note.as_bytes());
    }
    papers
}
