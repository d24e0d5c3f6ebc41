//! What several test modules need: tiny models made by code, temporary directories, transcripts of the command line.

pub mod engines;
pub mod models;
