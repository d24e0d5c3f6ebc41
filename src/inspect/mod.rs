//! Looking at a model: what it is made of, and which experts its tokens choose.

mod routing;
mod summary;

pub use routing::load;
pub use summary::{Summary, gates, summary};
