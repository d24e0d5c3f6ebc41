//! Integration tests: one binary, a module per topic. No network, no GPU; fixtures are made by code or lie in `demo/` and `tests/golden/`.

mod support;

mod cli;
mod compose;
mod engine;
mod gates;
mod recipe;
mod serve;
mod source;
mod tidy;
