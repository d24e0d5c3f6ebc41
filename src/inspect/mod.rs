//! Looking at a model: what it is made of, which experts its tokens choose, how well it predicts texts and beside what.

mod average;
pub mod evaluate;
pub mod perplexity;
pub mod report;
mod routing;
mod summary;

pub use average::Average;
pub use routing::{Choices, Observer, Router, load};
pub use summary::{Summary, gates, summary};
