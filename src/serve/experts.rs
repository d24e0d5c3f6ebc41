//! Experts over HTTP: what a request may wish of them, and `/v1/experts`. No part of OpenAI's API.

use std::{collections::BTreeMap, sync::Arc};

use axum::{
    Json,
    extract::{Query, State, rejection::QueryRejection},
    http::StatusCode,
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Server, blocking, error::ApiError};
use crate::engine::{self, Engine, EngineError, Experts, Steering, WishError, experts::LayerLoads};

/// What a request wishes of experts.
#[derive(Debug, Default)]
pub(super) struct Wishes<'a> {
    /// K instead of the composite's
    pub(super) per_token: Option<usize>,
    /// added to the routers' logits
    pub(super) bias: Option<&'a BTreeMap<String, f32>>,
    /// never chosen
    pub(super) mask: Option<&'a [Value]>,
    /// no others are chosen
    pub(super) force: Option<&'a [Value]>,
    /// whether the answer says who was chosen
    pub(super) told: bool,
}

impl Wishes<'_> {
    /// The field of the first wish.
    fn first(&self) -> Option<&'static str> {
        let some = |list: Option<&[Value]>| list.is_some_and(|list| !list.is_empty());
        let fields = [
            ("experts_per_token", self.per_token.is_some()),
            ("expert_bias", self.bias.is_some_and(|bias| !bias.is_empty())),
            ("mask_experts", some(self.mask)),
            ("force_experts", some(self.force)),
            ("return_experts", self.told),
        ];
        fields.into_iter().find(|(_, wished)| *wished).map(|(field, _)| field)
    }

    /// What the engine makes of them.
    pub(super) fn steering(&self, engine: &Engine) -> Result<Option<Steering>, ApiError> {
        let Some(field) = self.first() else { return Ok(None) };
        let experts = engine.experts().ok_or_else(|| ApiError::invalid(field, EngineError::Dense.to_string()))?;
        let mut wishes = engine::Wishes { per_token: self.per_token, ..engine::Wishes::default() };
        for (name, &by) in self.bias.into_iter().flatten() {
            if !by.is_finite() {
                return Err(ApiError::invalid("expert_bias", format!("`expert_bias` of `{name}` is {by}, expected a number")));
            }
            *wishes.bias.entry(find(experts, "expert_bias", name)?).or_default() += by;
        }
        let named = |field: &'static str, list: Option<&[Value]>| {
            let list = list.unwrap_or_default().iter();
            list.map(|expert| find(experts, field, &name(field, expert)?)).collect::<Result<_, ApiError>>()
        };
        (wishes.mask, wishes.force) = (named("mask_experts", self.mask)?, named("force_experts", self.force)?);
        wishes.steering(experts.choice()).map_err(|error| {
            let field = if error == WishError::Nobody { "mask_experts" } else { "experts_per_token" };
            ApiError::invalid(field, error.to_string())
        })
    }
}

/// What a list calls an expert: its name, or its number.
fn name(field: &'static str, expert: &Value) -> Result<String, ApiError> {
    match expert {
        Value::String(name) => Ok(name.clone()),
        Value::Number(number) => Ok(number.to_string()),
        _ => Err(ApiError::invalid(field, format!("`{field}` must be a list of experts' names or numbers"))),
    }
}

fn find(experts: &Experts, field: &'static str, name: &str) -> Result<usize, ApiError> {
    let unknown = || {
        let names = experts.names().join(", ");
        ApiError::invalid(field, format!("there is no expert `{name}`; there are {names}, numbered from 0"))
    };
    experts.find(name).ok_or_else(unknown)
}

/// Whose experts are asked for.
#[derive(Debug, Deserialize)]
pub(super) struct Whose {
    model: Option<String>,
    /// Whether the model is loaded for it.
    #[serde(default = "yes")]
    load: bool,
}

fn yes() -> bool {
    true
}

/// `GET /v1/experts`
pub(super) async fn list(State(server): State<Arc<Server>>, whose: Result<Query<Whose>, QueryRejection>) -> Result<Json<Value>, ApiError> {
    let Query(Whose { model, load }) = whose.map_err(|rejection| ApiError::new(StatusCode::BAD_REQUEST, rejection.body_text()))?;
    let model = if load { blocking(move || server.model(model.as_deref())).await? } else { server.registry.present(model.as_deref())? };
    let Some(experts) = model.engine.experts() else {
        return Ok(Json(
            json!({"object": "experts", "model": model.name, "experts": [], "experts_per_token": 0, "tokens": 0, "layers": []}),
        ));
    };
    let loads = experts.loads();
    let named: Vec<Value> = experts.names().iter().enumerate().map(|(index, name)| json!({"index": index, "name": name})).collect();
    Ok(Json(json!({
        "object": "experts", "model": model.name, "experts": named, "experts_per_token": experts.choice().top_k, "tokens": loads.tokens,
        "layers": loads.layers.iter().map(layer).collect::<Vec<_>>(),
    })))
}

fn layer(loads: &LayerLoads) -> Value {
    let load = shares(&loads.choices.iter().map(|count| *count as f64).collect::<Vec<_>>());
    let entropy = load.iter().filter(|share| **share > 0.0).fold(0.0, |sum, share| sum - share * share.ln());
    json!({"layer": loads.layer, "load": load, "recent": shares(&loads.recent), "entropy": entropy})
}

/// Each one's part of the sum; of nothing, nothing.
fn shares(counts: &[f64]) -> Vec<f64> {
    let total: f64 = counts.iter().sum();
    counts.iter().map(|count| if total > 0.0 { count / total } else { 0.0 }).collect()
}
