//! What can go wrong with gates, as numbers: gates that cannot tell experts apart, experts that get no tokens.
//!
//! Nothing here is an error: a composite with poor gates works, badly.

use std::collections::BTreeMap;

use rayon::prelude::*;
use serde::Serialize;

use crate::{gate::Gate, route::Routing};

/// mergekit-moe's bound on a condition number.
pub const DEGENERATE: f64 = 5.0;
/// Gates that point the same way more than this split their tokens by chance.
pub const COLLISION: f64 = 0.95;

/// The state of one layer's gate.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Layer {
    /// σmax / σmin of the [E, D] gate; infinite (null in JSON) if a row is zero or not a number
    pub condition: f64,
    /// The same of the gate less its mean row, of its E - 1 directions: neither which experts are chosen nor how they are weighed depends on
    /// what all rows have in common, so this, not `condition`, says whether they can be told apart. Rows of a softmax regression add up to
    /// nothing, which makes `condition` large and is no fault.
    pub spread: f64,
    /// cosine of every pair of rows, a before b
    pub pairs: Vec<Pair>,
    /// experts whose rows, less the mean, add up with signs to nearly nothing: those that dominate the weakest of those directions
    pub dependent: Vec<usize>,
}

/// Two experts' gates.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Pair {
    /// the lower index
    pub a: usize,
    /// the higher index
    pub b: usize,
    /// cosine of the angle between the rows; 0 if one of them is zero
    pub cosine: f64,
}

impl Layer {
    /// Whether `spread` is beyond [`DEGENERATE`].
    pub fn is_degenerate(&self) -> bool {
        self.spread > DEGENERATE
    }

    /// Experts whose gates nearly coincide, in groups: pairs beyond [`COLLISION`], joined where they share an expert.
    pub fn collisions(&self) -> Vec<Vec<usize>> {
        let mut groups: Vec<Vec<usize>> = Vec::new();
        for pair in self.pairs.iter().filter(|pair| pair.cosine > COLLISION) {
            let (mut joined, others): (Vec<_>, Vec<_>) =
                groups.into_iter().partition(|group| group.contains(&pair.a) || group.contains(&pair.b));
            joined.push(vec![pair.a, pair.b]);
            groups = others;
            groups.push(joined.concat());
        }
        for group in &mut groups {
            group.sort_unstable();
            group.dedup();
        }
        groups.sort();
        groups
    }
}

/// Looks at every layer's gate. Cost: O(E² (D + E)) per layer.
pub fn diagnose(gates: &[Gate]) -> Vec<Layer> {
    gates.par_iter().map(layer).collect()
}

fn layer(gate: &Gate) -> Layer {
    let rows: Vec<Vec<f64>> = (0..gate.experts).map(|e| gate.row(e).iter().map(|&v| f64::from(v)).collect()).collect();
    let norms: Vec<f64> = rows.iter().map(|row| dot(row, row).sqrt()).collect();
    let mut pairs = Vec::new();
    for a in 0..gate.experts {
        for b in a + 1..gate.experts {
            let scale = norms[a] * norms[b];
            let cosine = if scale > 0.0 { dot(&rows[a], &rows[b]) / scale } else { 0.0 };
            pairs.push(Pair { a, b, cosine });
        }
    }
    let mean: Vec<f64> = (0..gate.hidden).map(|d| rows.iter().map(|row| row[d]).sum::<f64>() / rows.len() as f64).collect();
    let centered = rows.iter().map(|row| row.iter().zip(&mean).map(|(v, mean)| v - mean).collect()).collect();
    let (condition, _) = condition(rows, gate.experts.min(gate.hidden));
    let (spread, direction) = self::condition(centered, gate.experts.saturating_sub(1).min(gate.hidden));
    let heaviest = direction.iter().fold(0.0, |max: f64, v| max.max(v.abs()));
    // One that stands half-way between two others weighs twice as much as they do.
    let dependent = (0..direction.len()).filter(|&e| direction[e].abs() >= 0.4 * heaviest).collect();
    Layer { condition, spread, pairs, dependent }
}

/// The largest of the rows' singular values over the one of index `rank` - 1, and the direction of that one. (More rows than columns are
/// dependent in any case; as usual, the condition number then is that of the min(E, D) first.)
fn condition(rows: Vec<Vec<f64>>, rank: usize) -> (f64, Vec<f64>) {
    let singular = singular_values(triangle(rows));
    match (singular.first(), singular.get(rank.wrapping_sub(1))) {
        (Some((largest, _)), Some((smallest, direction))) => {
            let condition = largest / smallest;
            (if condition.is_nan() { f64::INFINITY } else { condition }, direction.clone())
        }
        _ => (1.0, Vec::new()),
    }
}

/// L of the decomposition L Q with orthonormal rows of Q (modified Gram-Schmidt): [E, E] with the singular values and left vectors of [E, D].
fn triangle(rows: Vec<Vec<f64>>) -> Vec<Vec<f64>> {
    let experts = rows.len();
    let mut basis: Vec<Vec<f64>> = Vec::with_capacity(experts);
    let reduce = |mut row: Vec<f64>| {
        let mut reduced = Vec::with_capacity(experts);
        for q in &basis {
            let along = dot(&row, q);
            row.iter_mut().zip(q).for_each(|(v, q)| *v -= along * q);
            reduced.push(along);
        }
        let rest = dot(&row, &row).sqrt();
        reduced.push(rest);
        reduced.resize(experts, 0.0);
        basis.push(row.into_iter().map(|v| if rest > 0.0 { v / rest } else { 0.0 }).collect());
        reduced
    };
    rows.into_iter().map(reduce).collect()
}

/// Singular values of the matrix, largest first, each with its left singular vector: one-sided Jacobi (Hestenes 1958), which turns pairs of
/// rows until all are orthogonal and finds small values as precisely as large ones.
fn singular_values(mut rows: Vec<Vec<f64>>) -> Vec<(f64, Vec<f64>)> {
    let experts = rows.len();
    let mut turns: Vec<Vec<f64>> = (0..experts).map(|i| (0..experts).map(|j| f64::from(i == j)).collect()).collect();
    // Convergence is quadratic: in practice a handful of sweeps. The bound is for values that are not numbers.
    for _ in 0..60 {
        let mut orthogonal = true;
        for a in 0..experts {
            for b in a + 1..experts {
                let (aa, bb, ab) = (dot(&rows[a], &rows[a]), dot(&rows[b], &rows[b]), dot(&rows[a], &rows[b]));
                if ab.abs() <= f64::EPSILON * (aa * bb).sqrt() {
                    continue;
                }
                orthogonal = false;
                let zeta = (bb - aa) / (2.0 * ab);
                let tan = zeta.signum() / (zeta.abs() + zeta.hypot(1.0));
                let cos = 1.0 / tan.hypot(1.0);
                turn(&mut rows, a, b, cos, cos * tan);
                turn(&mut turns, a, b, cos, cos * tan);
            }
        }
        if orthogonal {
            break;
        }
    }
    let mut values: Vec<_> = rows.iter().map(|row| dot(row, row).sqrt()).zip(turns).collect();
    values.sort_by(|(a, _), (b, _)| b.total_cmp(a));
    values
}

fn turn(rows: &mut [Vec<f64>], a: usize, b: usize, cos: f64, sin: f64) {
    let (head, tail) = rows.split_at_mut(b);
    for (x, y) in head[a].iter_mut().zip(&mut tail[0]) {
        (*x, *y) = (cos * *x - sin * *y, sin * *x + cos * *y);
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// One line for each group of experts that some layers cannot tell apart; nothing for sound gates.
/// `names` are the experts' names, one per row of the gates.
pub fn warnings(layers: &[Layer], names: &[&str]) -> Vec<String> {
    let mut found: BTreeMap<(Kind, Vec<usize>), Vec<usize>> = BTreeMap::new();
    for (l, layer) in layers.iter().enumerate() {
        let collisions = layer.collisions();
        if collisions.is_empty() && layer.is_degenerate() {
            found.entry((Kind::Dependent, layer.dependent.clone())).or_default().push(l);
        }
        for group in collisions {
            found.entry((Kind::Coincide, group)).or_default().push(l);
        }
    }
    let line = |((kind, experts), at): (&(Kind, Vec<usize>), &Vec<usize>)| {
        let of = |layer: &Layer| if *kind == Kind::Dependent { layer.spread } else { layer.condition };
        let condition = at.iter().map(|&l| of(&layers[l])).fold(0.0, f64::max);
        let within = |pair: &&Pair| experts.contains(&pair.a) && experts.contains(&pair.b);
        let cosine = at.iter().flat_map(|&l| layers[l].pairs.iter().filter(within)).map(|pair| pair.cosine).fold(-1.0, f64::max);
        let place = place(at, layers.len());
        let named: Vec<String> = experts.iter().map(|&e| format!("`{}`", names.get(e).copied().unwrap_or("?"))).collect();
        let named = list(&named);
        let condition = match condition {
            small if small < 100.0 => format!("{small:.1}"),
            large if large < 1e6 => format!("{large:.0}"),
            _ => "over a million".to_owned(),
        };
        match kind {
            Kind::Coincide => format!(
                "{place}: gates of experts {named} nearly coincide (cosine {cosine:.3}, condition number {condition}): tokens are split between them \
                 almost at random; give them prompts that differ more, also in their last words"
            ),
            Kind::Dependent => format!(
                "{place}: gates of experts {named} depend on one another (cosine at most {cosine:.3}, condition number {condition}): some will get few \
                 tokens; give them prompts that differ more, and negative prompts that are not the other experts' positive ones"
            ),
        }
    };
    found.iter().map(line).collect()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Coincide,
    Dependent,
}

/// `all layers`, `layer 3`, `layers 0, 2 to 5 and 7`.
fn place(layers: &[usize], all: usize) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for &l in layers {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == l => *last = l,
            _ => runs.push((l, l)),
        }
    }
    let run = |&(first, last): &(usize, usize)| match last - first {
        0 => vec![first.to_string()],
        1 => vec![first.to_string(), last.to_string()],
        _ => vec![format!("{first} to {last}")],
    };
    let runs: Vec<String> = runs.iter().flat_map(run).collect();
    match layers.len() {
        n if n == all && all > 1 => "all layers".to_owned(),
        1 => format!("layer {}", runs[0]),
        _ => format!("layers {}", list(&runs)),
    }
}

/// `a`, `a and b`, `a, b and c`.
fn list(items: &[String]) -> String {
    match items {
        [] => String::new(),
        [one] => one.clone(),
        [head @ .., last] => format!("{} and {last}", head.join(", ")),
    }
}

/// How tokens were spread over the experts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Load {
    /// [E], how often each expert was chosen
    pub counts: Vec<u64>,
}

impl Load {
    /// Nothing yet, for E experts.
    pub fn new(experts: usize) -> Self {
        Self { counts: vec![0; experts] }
    }

    /// Counts a routing; experts beyond E are not counted.
    pub fn add(&mut self, routing: &Routing) {
        for &e in &routing.experts {
            if let Some(count) = self.counts.get_mut(e as usize) {
                *count += 1;
            }
        }
    }

    /// [E], each expert's share of all choices; zeros if there was none.
    pub fn shares(&self) -> Vec<f64> {
        let total: u64 = self.counts.iter().sum();
        self.counts.iter().map(|&count| count as f64 / total.max(1) as f64).collect()
    }

    /// Entropy of the shares in nats: 0 if one expert takes all, ln E if they share evenly.
    pub fn entropy(&self) -> f64 {
        self.shares().iter().filter(|&&share| share > 0.0).map(|share| -share * share.ln()).sum()
    }

    /// How many experts sharing evenly would have this entropy: exp(entropy), between 1 and E.
    pub fn effective_experts(&self) -> f64 {
        self.entropy().exp()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn gate(rows: &[&[f32]]) -> Gate {
        Gate { experts: rows.len(), hidden: rows[0].len(), weight: rows.concat() }
    }

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() <= 1e-4 * b.abs()
    }

    #[test]
    fn condition_numbers_are_those_of_numpy() {
        // numpy.linalg.cond
        let full = gate(&[&[1.0, 2.0, 3.0, 4.0], &[2.0, -1.0, 0.5, 1.0], &[1.0, 1.0, -1.0, 0.0]]);
        assert!(close(layer(&full).condition, 3.287_106), "{}", layer(&full).condition);
        let tall = gate(&[&[1.0, 0.0], &[0.0, 1.0], &[1.0, 1.0]]);
        assert!(close(layer(&tall).condition, 3f64.sqrt()));
        let nearly_equal = gate(&[&[1.0, 0.0, 0.0], &[1.0, 1e-3, 0.0]]);
        assert!(close(layer(&nearly_equal).condition, 2000.0));
        assert!(close(layer(&gate(&[&[0.0, 2.0]])).condition, 1.0));
    }

    #[test]
    fn dependent_and_broken_gates_are_degenerate() {
        assert!(layer(&gate(&[&[1.0, 2.0], &[1.0, 2.0]])).condition > 1e12);
        assert!(layer(&gate(&[&[0.0, 0.0], &[0.0, 0.0]])).is_degenerate());
        assert!(layer(&gate(&[&[f32::NAN, 0.0], &[1.0, 0.0]])).is_degenerate());
        assert!(!layer(&gate(&[&[1.0, 0.0], &[0.0, 1.0]])).is_degenerate());
    }

    #[test]
    fn what_all_rows_share_is_no_fault() {
        // Rows that add up to nothing, as those of a softmax regression do; and rows that differ little from their mean.
        let cancel = gate(&[&[1.0, -1.0, 0.001], &[0.0, 1.0, -1.0], &[-1.0, 0.0, 1.0]]);
        let alike = gate(&[&[9.0, 9.5, 9.0], &[9.5, 9.0, 9.0], &[9.0, 9.0, 9.5]]);
        for gate in [cancel, alike] {
            let layer = layer(&gate);
            assert!(layer.condition > 30.0 && !layer.is_degenerate(), "{layer:?}");
        }
    }

    #[test]
    fn opposite_gates_do_not_collide() {
        assert!(layer(&gate(&[&[1.0, 0.0], &[-1.0, 0.1]])).collisions().is_empty());
    }

    #[test]
    fn collisions_that_share_an_expert_are_one_group() {
        let (x, y) = ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0]);
        let diagnosis = layer(&gate(&[&x, &y, &[1.0, 0.01, 0.0], &[0.0, 1.0, 0.01], &[1.0, 0.0, 0.02]]));
        assert_eq!(diagnosis.collisions(), [vec![0, 2, 4], vec![1, 3]]);
    }

    #[test]
    fn warnings_say_which_layers_and_experts() {
        let sound = gate(&[&[1.0, 0.0, 0.0], &[0.0, 1.0, 0.0], &[0.0, 0.0, 1.0]]);
        let coincide = gate(&[&[1.0, 0.0, 0.0], &[0.0, 1.0, 0.0], &[1.0, 0.0, 0.01]]);
        // The third stands between the others: whoever it is chosen for, one of them is chosen before it.
        let between = gate(&[&[1.0, 0.0, 0.0], &[0.0, 1.0, 0.0], &[0.5, 0.5, 0.001]]);
        let layers = diagnose(&[coincide.clone(), sound.clone(), coincide.clone(), coincide, between, sound.clone()]);
        let lines = warnings(&layers, &["code", "math", "german"]);
        assert_eq!(
            lines,
            [
                "layers 0, 2 and 3: gates of experts `code` and `german` nearly coincide (cosine 1.000, condition number 200): tokens are \
                 split between them almost at random; give them prompts that differ more, also in their last words",
                "layer 4: gates of experts `code`, `math` and `german` depend on one another (cosine at most 0.707, condition number \
                 1225): some will get few tokens; give them prompts that differ more, and negative prompts that are not the other experts' \
                 positive ones",
            ]
        );
        assert_eq!(warnings(&diagnose(&[sound.clone(), sound]), &["code", "math", "german"]), Vec::<String>::new());
    }

    #[test]
    fn places_are_short() {
        assert_eq!(place(&[0, 1, 2], 3), "all layers");
        assert_eq!(place(&[0], 1), "layer 0");
        assert_eq!(place(&[0, 1, 2, 4, 5, 9], 10), "layers 0 to 2, 4, 5 and 9");
    }

    #[test]
    fn load_is_counted() {
        let mut load = Load::new(4);
        assert_eq!(load.shares(), [0.0; 4]);
        load.add(&Routing { top_k: 2, experts: vec![0, 1, 0, 1, 1, 0], weights: vec![0.5; 6] });
        assert_eq!(load.shares(), [0.5, 0.5, 0.0, 0.0]);
        assert!(close(load.entropy(), 2f64.ln()));
        assert!(close(load.effective_experts(), 2.0));
        load.add(&Routing { top_k: 1, experts: vec![2, 3, 9], weights: vec![1.0; 3] });
        assert_eq!(load.counts, [3, 3, 1, 1]);
    }

    proptest! {
        #[test]
        fn singular_values_keep_the_norm_and_the_directions(values in prop::collection::vec(-3f64..3.0, 20)) {
            let rows: Vec<Vec<f64>> = values.chunks(5).map(<[f64]>::to_vec).collect();
            let singular = singular_values(triangle(rows.clone()));
            let squares: f64 = singular.iter().map(|(value, _)| value * value).sum();
            prop_assert!((squares - values.iter().map(|v| v * v).sum::<f64>()).abs() < 1e-9);
            for (value, direction) in &singular {
                // |uᵀG| = σ
                let image: Vec<f64> = (0..5).map(|d| (0..4).map(|e| direction[e] * rows[e][d]).sum()).collect();
                prop_assert!((dot(&image, &image).sqrt() - value).abs() < 1e-9);
            }
        }
    }
}
