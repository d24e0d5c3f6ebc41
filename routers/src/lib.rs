//! How tokens choose experts: gates and the ways to set them, top-k routing, diagnostics.
//!
//! This crate never runs a model. It receives statistics of hidden states and returns numbers; it does no I/O.
//! Dimensions: L layers, E experts, D hidden, N tokens, K chosen.

pub mod diagnose;
pub mod gate;
pub mod init;
pub mod linalg;
pub mod route;
pub mod statistics;
