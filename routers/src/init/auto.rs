//! `auto`: `softmax`, unless another fitted method or regulariser knows the right expert clearly better in rows it was not fitted to, as
//! happens with little text.

use super::{How, Method, centroid, lda, ridge, softmax};

/// The method.
pub const METHOD: Method = Method {
    name: "auto",
    aliases: &[],
    about: "`softmax`, or in each layer what does clearly better in text left out of the fit",
    all_experts: false,
    how: How::Fitted(&[
        softmax::with(1e-3),
        softmax::with(1e-2),
        softmax::with(1e-1),
        ridge::with(0.1),
        lda::with(0.1),
        centroid::CANDIDATE,
    ]),
};
