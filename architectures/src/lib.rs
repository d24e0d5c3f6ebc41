//! What a model family is, on disk and in motion.
//!
//! Configs and tensor names ([`family`], [`families`]), how a dense family becomes a sparse one ([`upcycle`]), and the one forward pass
//! ([`decoder`]) with its CPU kernels ([`kernels`]). This crate does no file, network or terminal I/O: weights come in through the [`Weights`] trait.

pub mod blocks;
pub mod config;
pub mod decoder;
pub mod families;
pub mod family;
pub mod kernels;
pub mod upcycle;
pub mod weights;

pub use config::{Config, ConfigError};
pub use families::{FAMILIES, detect};
pub use family::{AttentionPart, Family, LayerRole, Projection, Role};
pub use weights::{Dtype, TensorInfo, View, Weights, WeightsError};
