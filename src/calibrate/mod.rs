//! Runs the decoder over a recipe's prompts and asks the router crate for gates.
