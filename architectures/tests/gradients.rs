//! Gradients of the one forward pass against finite differences, and that values with gradients are the values without.

use candle_core::{D, DType, Device, Tensor, Var};
use upcycle_architectures::{
    AttentionPart::{K, KNorm, O, Q, QNorm, V},
    Config, LayerRole, Role, Weights,
    decoder::{Decoder, DecoderError, Logits, NoProbe, Probe, Step, Substitute},
};
use upcycle_routers::route::Routing;

use crate::support::{Case, assert_close, values};

/// With a shared expert and without, weights normalised or not, with norms over heads, with a window.
const CASES: [&str; 6] = ["mixtral", "mixtral-sliding", "qwen2-moe", "qwen2-moe-norm", "qwen3-moe", "qwen3-moe-no-norm"];
const RANK: usize = 3;

fn noise(seed: usize, len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i as f32 + 1.0) * (seed as f32 + 1.3) * 12.9898).sin()).collect()
}

fn tensor(seed: usize, shape: &[usize], scale: f32) -> Tensor {
    let values: Vec<f32> = noise(seed, shape.iter().product()).into_iter().map(|value| value * scale).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// Everything that can be trained, with a name.
fn variables(case: &Case, decoder: &mut Decoder) -> Vec<(String, Var)> {
    let mut all = Vec::new();
    for (seed, (role, shape)) in case.family.tensors(&case.config).into_iter().enumerate() {
        match role {
            Role::Layer(
                _,
                LayerRole::Router
                | LayerRole::SharedGate
                | LayerRole::InputNorm
                | LayerRole::PostNorm
                | LayerRole::Attention(QNorm | KNorm),
            )
            | Role::FinalNorm => {
                let fused = |l| case.family.fused_names(l).map(|names| names[0].clone());
                let name = case.family.name(role).unwrap();
                let name = match role {
                    Role::Layer(l, LayerRole::Router) if case.weights.info(&name).is_none() => fused(l).unwrap(),
                    _ => name,
                };
                let start = case.weights.read(&name).unwrap().to_tensor(DType::F32, &Device::Cpu).unwrap();
                let var = Var::from_tensor(&start).unwrap();
                decoder.substitute(role, &Substitute::Whole(var.as_tensor().clone())).unwrap();
                all.push((name, var));
            }
            Role::Layer(_, LayerRole::Attention(Q | K | V | O)) => {
                let down = Var::from_tensor(&tensor(seed, &[RANK, shape[1]], 0.2)).unwrap();
                let up = Var::from_tensor(&tensor(seed + 1, &[shape[0], RANK], 0.05)).unwrap();
                let change = Substitute::LowRank { down: down.as_tensor().clone(), up: up.as_tensor().clone() };
                decoder.substitute(role, &change).unwrap();
                let name = case.family.name(role).unwrap();
                all.extend([(format!("{name} down"), down), (format!("{name} up"), up)]);
            }
            _ => {}
        }
    }
    all
}

/// Two sequences of different length, so that their rows must not mix.
fn tokens(config: &Config) -> [Vec<u32>; 2] {
    [11, 6].map(|len| (0..len).map(|i| (i * 37 + len * 5) % config.vocab as u32).collect())
}

fn logits(decoder: &Decoder, probe: &mut dyn Probe) -> Result<Tensor, DecoderError> {
    let tokens = tokens(decoder.config());
    let mut caches = [decoder.cache(), decoder.cache()];
    let steps = tokens.iter().zip(&mut caches).map(|(tokens, cache)| Step { tokens, cache, logits: Logits::All });
    decoder.forward(&mut steps.collect::<Vec<_>>(), probe)
}

/// Sum of the negative log-likelihoods of some tokens.
fn loss(logits: &Tensor) -> Tensor {
    let (rows, vocab) = logits.dims2().unwrap();
    let targets: Vec<u32> = (0..rows).map(|i| (i * 53 % vocab) as u32).collect();
    let targets = Tensor::from_vec(targets, (rows, 1), &Device::Cpu).unwrap();
    let chosen = logits.gather(&targets, 1).unwrap().squeeze(1).unwrap();
    (logits.log_sum_exp(D::Minus1).unwrap() - chosen).unwrap().sum_all().unwrap()
}

/// Remembers who was chosen.
#[derive(Default)]
struct Chosen(Vec<u32>);

impl Probe for Chosen {
    fn route(&mut self, _: usize, _: &[f32], routing: &mut Routing) {
        self.0.extend(&routing.experts);
    }
}

#[test]
fn gradients_are_finite_differences() {
    for name in CASES {
        let case = Case::open(name);
        let mut decoder = case.decoder(DType::F32);
        let variables = variables(&case, &mut decoder);
        let mut here = Chosen::default();
        let gradients = loss(&logits(&decoder, &mut here).unwrap()).backward().unwrap();
        for (seed, (what, var)) in variables.iter().enumerate() {
            let gradient = gradients.get(var).unwrap_or_else(|| panic!("{name}: {what} has no gradient"));
            let norm = gradient.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
            assert!(norm > 0.0, "{name}: {what}");
            // Along the gradient and something else: the differences stand out of the rounding, and no element goes unseen.
            let other = tensor(seed, var.dims(), norm / (var.elem_count() as f32).sqrt());
            let direction = (gradient + other).unwrap();
            let expected = (gradient * &direction).unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
            let start = var.as_tensor().copy().unwrap().detach();
            let mut size = 0.5 / (norm * norm).max(1e-3);
            let found = loop {
                let at = |way: f64| {
                    var.set(&(&start + (&direction * (way * f64::from(size))).unwrap()).unwrap()).unwrap();
                    let mut there = Chosen::default();
                    let value = loss(&logits(&decoder, &mut there).unwrap()).to_scalar::<f32>().unwrap();
                    (value, there.0 == here.0)
                };
                let (above, below) = (at(1.0), at(-1.0));
                let slope = (above.0 - below.0) / (2.0 * size);
                // A step so long that other experts are chosen, or the curve bends, says nothing.
                if above.1 && below.1 && (slope - expected).abs() <= 0.02 * expected.abs() || size * expected < 2e-3 {
                    break slope;
                }
                size /= 2.0;
            };
            var.set(&start).unwrap();
            assert!((found - expected).abs() <= 0.02 * expected.abs(), "{name}: {what}: {found}, by the gradient {expected}");
        }
    }
}

#[test]
fn gradients_change_no_value() {
    for name in CASES {
        let case = Case::open(name);
        let plain = case.decoder(DType::F32);
        let mut trained = plain.clone();
        for (what, var) in variables(&case, &mut trained) {
            if what.ends_with("up") {
                var.set(&var.zeros_like().unwrap()).unwrap();
            }
        }
        let tracked = logits(&trained, &mut NoProbe).unwrap();
        assert!(tracked.track_op());
        assert_close(name, &values(&tracked), &values(&logits(&plain, &mut NoProbe).unwrap()));
    }
}

/// Sends every token to the first expert.
struct First;

impl Probe for First {
    fn route(&mut self, _: usize, _: &[f32], routing: &mut Routing) {
        let tokens = routing.experts.len() / routing.top_k;
        *routing = Routing { top_k: 1, experts: vec![0; tokens], weights: vec![1.0; tokens] };
    }
}

#[test]
fn what_a_probe_chose_does_not_depend_on_the_gate() {
    let case = Case::open("mixtral");
    let mut decoder = case.decoder(DType::F32);
    let variables = variables(&case, &mut decoder);
    let gradients = loss(&logits(&decoder, &mut First).unwrap()).backward().unwrap();
    for (what, var) in variables {
        assert_eq!(gradients.get(&var).is_some(), !what.ends_with("gate.weight"), "{what}");
    }
}

#[test]
fn a_tracked_call_leaves_the_cache_as_it_was() {
    let case = Case::open("mixtral");
    let plain = case.decoder(DType::F32);
    let mut trained = plain.clone();
    let _variables = variables(&case, &mut trained);
    let tokens: Vec<u32> = (0..9).collect();
    let mut cache = plain.cache();
    let step = |decoder: &Decoder, tokens: &[u32], cache: &mut _| {
        values(&decoder.forward(&mut [Step { tokens, cache, logits: Logits::Last }], &mut NoProbe).unwrap())
    };
    step(&plain, &tokens[..5], &mut cache);
    // Behind the same past, a tracked call gives what a tracked call of the whole gives, again and again.
    for _ in 0..2 {
        assert_eq!(cache.len(), 5);
        step(&trained, &tokens[5..], &mut cache);
    }
    let whole = step(&plain, &tokens, &mut plain.cache());
    assert_close("after it", &step(&plain, &tokens[5..], &mut cache), &whole);
}

#[test]
fn substitutes_must_fit() {
    let case = Case::open("mixtral");
    let mut decoder = case.decoder(DType::F32);
    let (d, e) = (case.config.hidden, case.config.moe.as_ref().unwrap().experts);
    let mut put = |role, shape: &[usize]| decoder.substitute(role, &Substitute::Whole(tensor(1, shape, 1.0)));
    assert!(put(Role::Layer(0, LayerRole::Router), &[e, d]).is_ok());
    assert!(put(Role::Layer(0, LayerRole::Router), &[d, e]).is_err());
    assert!(put(Role::Layer(99, LayerRole::Router), &[e, d]).is_err());
    assert!(put(Role::Embedding, &[case.config.vocab, d]).is_err());
    let error = put(Role::FinalNorm, &[d + 1]).unwrap_err();
    assert_eq!(error.to_string(), "nothing of this kind and shape can stand in for FinalNorm");
}
