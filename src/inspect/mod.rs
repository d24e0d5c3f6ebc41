//! Looking at a model: what it is made of, which experts its tokens choose, how well it predicts texts and beside what.

mod average;
pub mod evaluate;
pub mod inspection;
mod page;
pub mod perplexity;
pub mod report;
mod routing;
mod similarity;
mod summary;
mod traffic;

pub use average::Average;
pub use page::page;
pub use routing::{Choices, Observer, Router, load};
pub use similarity::{Drift, Similarity, similarity};
pub use summary::{Summary, gates, summary, together};
pub use traffic::{Sample, Traffic, answers, traffic};
