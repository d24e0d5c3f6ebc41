//! The gate of one layer: a bias-free linear map from the router's input to one logit per expert.

/// Gate of one layer, row-major [E, D].
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
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

    /// The gate of the first `experts` experts and that of the others.
    pub fn split(mut self, experts: usize) -> (Self, Self) {
        let rest = self.weight.split_off(experts * self.hidden);
        let others = Self { experts: self.experts - experts, hidden: self.hidden, weight: rest };
        (Self { experts, ..self }, others)
    }
}
