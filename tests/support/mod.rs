//! What several test modules need: tiny models made by code, temporary directories, transcripts of the command line, a browser.

#[cfg(feature = "serve")]
pub mod browser;
pub mod cli;
pub mod engines;
#[cfg(feature = "hub")]
pub mod hub;
pub mod models;
