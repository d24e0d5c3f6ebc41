//! What the small files beside a model say.

use serde_json::Value;

use super::Source;

/// A sidecar's bytes; `None` if the model has no such file or it cannot be read.
pub fn sidecar(source: &Source, name: &str) -> Option<Vec<u8>> {
    source.sidecars.get(name)?.read().ok()
}

/// Every id that ends a text: `eos_token_id` of `config.json`, then of `generation_config.json`.
pub fn eos_ids(source: &Source) -> Vec<u32> {
    let mut ids = source.config.eos.clone();
    let generation = sidecar(source, "generation_config.json").and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok());
    let more = match generation.as_ref().and_then(|json| json.get("eos_token_id")) {
        Some(Value::Array(list)) => list.clone(),
        Some(one) => vec![one.clone()],
        None => Vec::new(),
    };
    ids.extend(more.iter().filter_map(|id| u32::try_from(id.as_u64()?).ok()));
    let mut seen = std::collections::BTreeSet::new();
    ids.retain(|id| seen.insert(*id));
    ids
}
