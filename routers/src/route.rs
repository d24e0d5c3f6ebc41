//! Logits to experts: the only place that knows how chosen weights are normalised.

/// How experts are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// K
    pub top_k: usize,
    /// whether the K weights sum to one (Mixtral, and `norm_topk_prob`); otherwise they are the softmax over all E
    pub normalise: bool,
}

/// The experts chosen for N tokens, and their weights.
#[derive(Debug, Clone, PartialEq)]
pub struct Routing {
    /// K
    pub top_k: usize,
    /// row-major [N, K], each token's experts by falling weight; of equal logits the lower index comes first
    pub experts: Vec<u32>,
    /// row-major [N, K]
    pub weights: Vec<f32>,
}

/// Softmax over the E logits of each token (f32), the K largest, normalised as the rule says.
/// `logits` is row-major [N, E]; `rule.top_k` is at most E.
pub fn route(logits: &[f32], experts: usize, rule: Rule) -> Routing {
    let k = rule.top_k.min(experts);
    let tokens = logits.len() / experts.max(1);
    let mut routing = Routing { top_k: k, experts: Vec::with_capacity(tokens * k), weights: Vec::with_capacity(tokens * k) };
    let mut order: Vec<u32> = Vec::with_capacity(experts);
    for row in logits.chunks_exact(experts.max(1)) {
        order.clear();
        order.extend(0..experts as u32);
        order.sort_by(|&a, &b| row[b as usize].total_cmp(&row[a as usize]));
        let max = row[order[0] as usize];
        let chosen = &order[..k];
        let summed = if rule.normalise { chosen } else { &order[..] };
        let total: f32 = summed.iter().map(|&e| (row[e as usize] - max).exp()).sum();
        routing.weights.extend(chosen.iter().map(|&e| (row[e as usize] - max).exp() / total));
        routing.experts.extend_from_slice(chosen);
    }
    routing
}
