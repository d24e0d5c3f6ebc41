//! `upcycle` composes dense fine-tunes of one base model into a Mixture-of-Experts and serves it.
//!
//! A recipe and its opened sources give a plan; a plan is a set of weights; everything else reads weights. ARCHITECTURE.md is the map.

pub mod calibrate;
pub mod engine;
pub mod env;
pub mod inspect;
pub mod plan;
pub mod quantize;
pub mod recipe;
#[cfg(feature = "serve")]
pub mod serve;
pub mod source;
pub mod tune;
pub mod write;
