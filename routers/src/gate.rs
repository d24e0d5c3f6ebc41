//! The gate of one layer: a bias-free linear map from the router's input to one logit per expert.

/// Gate of one layer, row-major [E, D].
#[derive(Debug, Clone, PartialEq)]
pub struct Gate {
    /// E
    pub experts: usize,
    /// D
    pub hidden: usize,
    /// E * D values, one row per expert
    pub weight: Vec<f32>,
}

impl Gate {
    /// Row of expert `e`, [D].
    pub fn row(&self, e: usize) -> &[f32] {
        &self.weight[e * self.hidden..(e + 1) * self.hidden]
    }
}
