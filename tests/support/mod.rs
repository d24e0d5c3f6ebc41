//! What several test modules need: tiny models made by code, temporary directories, transcripts of the command line.

#[cfg(feature = "hub")]
pub mod hub;
pub mod models;
