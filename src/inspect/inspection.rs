//! Everything that `inspect` found about one model, for JSON and the page.

use serde::Serialize;
use upcycle_routers::diagnose;

use super::{
    evaluate::Text,
    routing::Choices,
    similarity::Similarity,
    summary::Summary,
    traffic::{Sample, Traffic},
};

/// One model, looked at.
#[derive(Debug, Serialize)]
pub struct Inspection {
    /// what the user calls it
    pub model: String,
    /// what it is made of
    pub summary: Summary,
    /// names, or numbers where names are not known; empty if dense
    pub experts: Vec<String>,
    /// of each sparse layer
    pub gates: Vec<GateReport>,
    /// what the gates look like in words
    pub warnings: Vec<String>,
    /// one per text
    pub texts: Vec<TextReport>,
    /// of each layer, if there were texts; null for dense layers
    pub head_room: Vec<Option<f64>>,
    /// of a recipe's experts
    pub similarity: Option<Similarity>,
}

/// The gate of a layer.
#[derive(Debug, Serialize)]
pub struct GateReport {
    /// l
    pub layer: usize,
    /// condition number, cosines
    #[serde(flatten)]
    pub diagnosis: diagnose::Layer,
}

/// Where a text's tokens went.
#[derive(Debug, Serialize)]
pub struct TextReport {
    /// of the domain
    pub name: String,
    /// the expert that it belongs to
    pub expert: Option<usize>,
    /// tokens read
    pub tokens: u64,
    /// of each layer; null for dense ones
    pub layers: Vec<Option<LayerReport>>,
    /// a few of its tokens, one by one; for the page alone
    #[serde(skip)]
    pub sample: Sample,
}

/// What one layer's gate did with a text.
#[derive(Debug, Serialize)]
pub struct LayerReport {
    /// share of all choices [E]
    pub load: Vec<f64>,
    /// share of first choices [E]
    pub first: Vec<f64>,
    /// experts that would have this load's entropy if they shared evenly
    pub effective_experts: f64,
    /// mean entropy of a token's choice, in nats
    pub entropy: f64,
}

impl LayerReport {
    /// `None` without tokens.
    pub fn new(choices: &Choices) -> Option<Self> {
        (choices.tokens > 0).then(|| Self {
            load: choices.chosen.shares(),
            first: choices.first.shares(),
            effective_experts: choices.chosen.effective_experts(),
            entropy: choices.entropy / choices.tokens as f64,
        })
    }
}

impl Inspection {
    /// Adds what the texts showed.
    pub fn add(&mut self, texts: &[Text], traffic: Traffic) {
        for ((text, choices), sample) in texts.iter().zip(&traffic.choices).zip(traffic.samples) {
            self.texts.push(TextReport {
                name: text.name.clone(),
                expert: text.expert,
                tokens: choices.iter().map(|layer| layer.tokens).max().unwrap_or(0),
                layers: choices.iter().map(LayerReport::new).collect(),
                sample,
            });
        }
        self.head_room = traffic.head_room;
    }
}
