//! Recipe and sources to a plan: for every output tensor, where its bytes come from.
