//! `auto`: of all fitted methods and regularisers the one that knows the right expert best in rows it was not fitted to.

use super::{How, Method, centroid, lda, ridge, softmax};

/// The method.
pub const METHOD: Method = Method {
    name: "auto",
    aliases: &[],
    about: "the best of `softmax`, `ridge`, `lda` and `centroid` in each layer, by text that was left out of the fit",
    all_experts: false,
    how: How::Fitted(&[softmax::with(1e-3), softmax::with(1e-4), ridge::with(0.1), ridge::with(0.01), lda::with(0.1), centroid::CANDIDATE]),
};
