//! What tells composites apart whose statistics do not belong together.
//!
//! Digests of the tensors as they are written, so that a recipe and the directory composed from it are one. Of large tensors only places spread
//! evenly over them are looked at: training changes all of a tensor, and an 8x70B is fingerprinted in seconds.

use rayon::prelude::*;
use sha2::{Digest as _, Sha256};
use upcycle_architectures::{Config, Family, LayerRole, Role, Weights, WeightsError, decoder::tensor};

use super::Routing;

/// Bytes of one place that is looked at.
const SPOT: usize = 4096;
/// Places of one tensor.
const SPOTS: usize = 16;

/// A composite's shared weights and experts; the gates are not part of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fingerprint {
    /// of everything outside the experts
    pub shared: String,
    /// [E]
    pub experts: Vec<String>,
}

impl Fingerprint {
    /// Reads the weights of a composite.
    pub fn of(family: &Family, config: &Config, weights: &dyn Weights) -> Result<Self, WeightsError> {
        let roles = family.tensors(config);
        let digests = roles.par_iter().map(|(role, shape)| {
            if matches!(role, Role::Layer(_, LayerRole::Router)) {
                return Ok(None);
            }
            let view = tensor(family, config, weights, *role, shape)?;
            let mut hash = Sha256::new();
            let (owner, place) = match *role {
                Role::Layer(l, LayerRole::Expert(e, projection)) => (Some(e), format!("{l} {projection:?}")),
                role => (None, format!("{role:?}")),
            };
            hash.update(format!("{place} {shape:?} {}", view.info.dtype));
            if view.data.len() <= SPOT * SPOTS {
                hash.update(&view.data);
            } else {
                (0..SPOTS).for_each(|i| {
                    let start = (view.data.len() - SPOT) / (SPOTS - 1) * i;
                    hash.update(&view.data[start..start + SPOT]);
                });
            }
            Ok(Some((owner, hash.finalize())))
        });
        let digests = digests.collect::<Result<Vec<_>, WeightsError>>()?;
        let of = |owner: Option<usize>| {
            let own = digests.iter().flatten().filter(|(of, _)| *of == owner);
            hex(&own.fold(Sha256::new(), |hash, (_, digest)| hash.chain_update(digest)).finalize())
        };
        let experts = config.moe.as_ref().map_or(0, |moe| moe.experts);
        Ok(Self { shared: of(None), experts: (0..experts).map(|e| of(Some(e))).collect() })
    }

    /// Of what statistics depend on beside the text's expert: the shared weights, and under the composite's own routing all experts.
    pub fn of_routing(&self, routing: Routing) -> String {
        match routing {
            Routing::Forced => self.shared.clone(),
            Routing::Own => hex(&self.experts.iter().fold(Sha256::new().chain_update(&self.shared), Sha256::chain_update).finalize()),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
