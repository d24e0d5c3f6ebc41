//! Integration tests: one binary, a module per topic. No network, no GPU; goldens lie in `tests/golden/` of the workspace.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a test fails loudly; clippy.toml exempts only the #[test] functions themselves, not their helpers"
)]

mod support;

mod configs;
mod ensemble;
mod goldens;
mod gradients;
mod identities;
