//! Integration tests: one binary, a module per topic. No network, no GPU; fixtures are made by code or lie in `demo/` and `tests/golden/`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a test fails loudly; clippy.toml exempts only the #[test] functions themselves, not their helpers"
)]

mod support;

mod bad_input;
mod chat;
mod cli;
mod compose;
mod constraints;
mod engine;
mod eval;
mod faults;
mod fuzz;
mod gates;
mod identities;
mod inspect;
mod page;
mod recipe;
mod recompose;
mod sequence;
mod serve;
mod source;
mod stats;
mod sweep;
mod text;
mod tidy;
mod tune;
