//! What must hold of any composite, whatever its gates: copies of one model are that model, and an expert alone is its own model.

use crate::support::{Case, Held, assert_close, logits, max_difference, values};
use candle_core::{DType, Device};
use serde_json::{Value, json};
use upcycle_architectures::{
    Config, Dtype, Family, LayerRole, Role, View, Weights,
    decoder::{Decoder, Logits, NoProbe, Probe, Step},
    detect,
};
use upcycle_routers::route::Routing;

const EXPERTS: usize = 4;

/// Dense cases and the sparse families that hold them.
const PAIRS: [(&str, &str); 4] = [("llama-gqa", "mixtral"), ("mistral-sliding", "mixtral"), ("qwen2", "qwen2_moe"), ("qwen3", "qwen3_moe")];

/// Numbers without a pattern, in -1..1.
fn noise(seed: usize, len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i as f32 + 1.0) * (seed as f32 + 1.3) * 12.9898).sin()).collect()
}

fn view(values: &[f32], shape: &[usize]) -> View {
    View::from_f32(values, Dtype::F32, shape.to_vec()).unwrap()
}

/// The dense case's config in a sparse family.
fn sparse_config(case: &str, sparse: &str) -> (&'static Family, Config) {
    let path = crate::support::root().join("tests/golden/decoder").join(case).join("config.json");
    let mut json: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let more = json!({
        "model_type": sparse, "num_experts": EXPERTS, "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "norm_topk_prob": true,
        "moe_intermediate_size": json["intermediate_size"], "shared_expert_intermediate_size": 16,
    });
    json.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    detect(&json).unwrap()
}

/// The dense model with the MLPs of expert `e`; expert 0 is the model itself.
fn expert(case: &Case, e: usize) -> Held {
    let mut weights = case.weights.clone();
    for (role, shape) in case.family.tensors(&case.config) {
        if let (Role::Layer(layer, LayerRole::Mlp(_)), 1..) = (role, e) {
            let tensor = weights.0.get_mut(&case.family.name(role).unwrap()).unwrap();
            let changed: Vec<f32> =
                tensor.to_f32().iter().zip(noise(e + layer, tensor.info.elements())).map(|(w, n)| w + 0.2 * n).collect();
            *tensor = view(&changed, &shape);
        }
    }
    weights
}

/// Experts around the first one's shared weights, with patternless gates and a shared expert that gives nothing.
fn composite(family: &Family, config: &Config, dense: &Family, experts: &[Held]) -> Held {
    let tensor = |role: Role, shape: &[usize]| {
        let elements = shape.iter().product();
        let of = |e: usize, role| experts[e].read(&dense.name(role).unwrap()).unwrap();
        match role {
            Role::Layer(l, LayerRole::Expert(e, projection)) => of(e, Role::Layer(l, LayerRole::Mlp(projection))),
            Role::Layer(l, LayerRole::Router) => view(&noise(100 + l, elements), shape),
            Role::Layer(_, LayerRole::SharedExpert(upcycle_architectures::Projection::Down)) => view(&vec![0.0; elements], shape),
            Role::Layer(_, LayerRole::SharedExpert(_) | LayerRole::SharedGate) => view(&noise(7, elements), shape),
            role => of(0, role),
        }
    };
    Held(family.tensors(config).into_iter().map(|(role, shape)| (family.name(role).unwrap(), tensor(role, &shape))).collect())
}

fn load(family: &Family, config: &Config, weights: &Held) -> Decoder {
    Decoder::load(family, config, weights, DType::F32, &Device::Cpu).unwrap()
}

#[test]
fn copies_of_one_model_are_that_model() {
    for (name, sparse) in PAIRS {
        let (case, (family, config)) = (Case::open(name), sparse_config(name, sparse));
        let copies = vec![case.weights.clone(); EXPERTS];
        let decoder = load(family, &config, &composite(family, &config, case.family, &copies));
        let got = logits(&decoder, &case.golden.tokens("long.input_ids"));
        assert_close(name, &case.long_rows(&got), &case.golden.values("long.logits"));
    }
}

/// Sends every token to one expert.
struct Forced(u32);

impl Probe for Forced {
    fn route(&mut self, _layer: usize, _logits: &[f32], routing: &mut Routing) {
        let tokens = routing.experts.len() / routing.top_k;
        *routing = Routing { top_k: 1, experts: vec![self.0; tokens], weights: vec![1.0; tokens] };
    }
}

fn logits_with(decoder: &Decoder, tokens: &[u32], probe: &mut dyn Probe) -> Vec<f32> {
    values(&decoder.forward(&mut [Step { tokens, cache: &mut decoder.cache(), logits: Logits::All }], probe).unwrap())
}

#[test]
fn a_forced_expert_is_its_own_model() {
    for (name, sparse) in PAIRS {
        let (case, (family, config)) = (Case::open(name), sparse_config(name, sparse));
        let experts: Vec<Held> = (0..EXPERTS).map(|e| expert(&case, e)).collect();
        let decoder = load(family, &config, &composite(family, &config, case.family, &experts));
        let tokens = case.golden.tokens("short.input_ids");
        let mixed = logits(&decoder, &tokens);
        for (e, weights) in (0..).zip(&experts) {
            let alone = logits(&load(case.family, &case.config, weights), &tokens);
            assert_close(&format!("{name} expert {e}"), &logits_with(&decoder, &tokens, &mut Forced(e)), &alone);
            assert!(max_difference(&mixed, &alone) > 0.1, "the experts of {name} do not differ, so this shows nothing");
        }
    }
}

#[test]
fn the_order_of_experts_is_of_no_meaning() {
    let order = [2, 0, 3, 1];
    for (name, sparse) in PAIRS {
        let (case, (family, config)) = (Case::open(name), sparse_config(name, sparse));
        let experts: Vec<Held> = (0..EXPERTS).map(|e| expert(&case, e)).collect();
        let weights = composite(family, &config, case.family, &experts);
        let mut permuted = weights.clone();
        for (role, shape) in family.tensors(&config) {
            let changed = match role {
                Role::Layer(l, LayerRole::Expert(e, p)) => {
                    weights.0[&family.name(Role::Layer(l, LayerRole::Expert(order[e], p))).unwrap()].clone()
                }
                Role::Layer(_, LayerRole::Router) => {
                    let rows = weights.0[&family.name(role).unwrap()].to_f32();
                    view(&order.map(|e| &rows[e * config.hidden..(e + 1) * config.hidden]).concat(), &shape)
                }
                _ => continue,
            };
            permuted.0.insert(family.name(role).unwrap(), changed);
        }
        let tokens = case.golden.tokens("long.input_ids");
        let [one, other] = [&weights, &permuted].map(|weights| logits(&load(family, &config, weights), &tokens));
        assert_close(name, &one, &other);
        assert!(max_difference(&one, &logits(&load(case.family, &case.config, &experts[0]), &tokens)) > 0.1, "{name} is not mixed");
    }
}

/// Probes see what comes before the layer that they stop at, and a stopped call leaves no trace.
#[test]
fn a_stopped_call_leaves_no_trace() {
    struct Stop(usize);
    impl Probe for Stop {
        fn go_on(&self, layer: usize) -> bool {
            layer < self.0
        }
    }
    let case = Case::open("mixtral");
    let decoder = case.decoder(DType::F32);
    let tokens = case.golden.tokens("short.input_ids");
    let mut cache = decoder.cache();
    let stopped = decoder.forward(&mut [Step { tokens: &tokens, cache: &mut cache, logits: Logits::All }], &mut Stop(0)).unwrap();
    assert_eq!((stopped.dims(), cache.len()), (&[0, case.config.vocab][..], 0));
    let after = decoder.forward(&mut [Step { tokens: &tokens, cache: &mut cache, logits: Logits::All }], &mut NoProbe).unwrap();
    assert_close("after a stop", &values(&after), &case.golden.values("short.logits"));
}

/// Without attention a token's result is that of the token alone at any place.
#[test]
fn without_attention_tokens_are_alone() {
    struct Alone;
    impl Probe for Alone {
        fn attends(&self, _layer: usize) -> bool {
            false
        }
    }
    let case = Case::open("llama-bias");
    let decoder = case.decoder(DType::F32);
    let tokens = case.golden.tokens("short.input_ids");
    let together = logits_with(&decoder, &tokens, &mut Alone);
    let mut cache = decoder.cache();
    for (token, together) in tokens.iter().zip(together.chunks(case.config.vocab)) {
        let step = Step { tokens: &[*token], cache: &mut cache, logits: Logits::All };
        assert_close("alone", &values(&decoder.forward(&mut [step], &mut Alone).unwrap()), together);
        assert_eq!(cache.len(), 0);
    }
    assert!(max_difference(&together, &case.golden.values("short.logits")) > 0.1);
}

/// A cache that is cut back goes on as if the rest had never been.
#[test]
fn a_cut_cache_forgets() {
    let case = Case::open("mistral-sliding");
    let decoder = case.decoder(DType::F32);
    let (short, long) = (case.golden.tokens("short.input_ids"), case.golden.tokens("long.input_ids"));
    let mut cache = decoder.cache();
    crate::support::run(&decoder, &short[..10], &mut cache);
    crate::support::run(&decoder, &long[20..220], &mut cache);
    cache.truncate(10);
    let rest = crate::support::run(&decoder, &short[10..], &mut cache);
    assert_close("after a cut", &rest, &case.golden.values("short.logits")[10 * case.config.vocab..]);
}

#[test]
fn wrong_calls_are_errors() {
    struct Broken(u32, usize);
    impl Probe for Broken {
        fn route(&mut self, _layer: usize, _logits: &[f32], routing: &mut Routing) {
            routing.experts[0] = self.0;
            routing.weights.truncate(self.1);
        }
    }
    let (case, other) = (Case::open("mixtral"), Case::open("qwen2-moe-step"));
    let (decoder, other) = (case.decoder(DType::F32), other.decoder(DType::F32));
    let call = |tokens: &[u32], mut cache, probe: &mut dyn Probe| {
        decoder.forward(&mut [Step { tokens, cache: &mut cache, logits: Logits::All }], probe).unwrap_err().to_string()
    };
    assert_eq!(call(&[3, 128], decoder.cache(), &mut NoProbe), "token 128 is not in the vocabulary of 128");
    assert_eq!(
        call(&[3], other.cache(), &mut NoProbe),
        "the cache is another model's: it has 4 layers (of an ensemble: experts), the model 2"
    );
    let routing = "the routing of layer 0 does not give each of 2 tokens some of 4 experts";
    assert_eq!(call(&[3, 4], decoder.cache(), &mut Broken(4, 4)), routing);
    assert_eq!(call(&[3, 4], decoder.cache(), &mut Broken(0, 3)), routing);
    let error = Decoder::load(case.family, &case.config, &case.weights, DType::F64, &Device::Cpu).unwrap_err();
    assert_eq!(error.to_string(), "cannot compute in F64, only in f32, f16 or bf16");
}

/// Shapes are compared before a byte is read, in both layouts.
#[test]
fn wrong_weights_are_errors() {
    /// Has headers and no bytes.
    struct Headers(Held);
    impl Weights for Headers {
        fn names(&self) -> Vec<String> {
            self.0.names()
        }
        fn info(&self, name: &str) -> Option<upcycle_architectures::TensorInfo> {
            self.0.info(name)
        }
        fn read(&self, name: &str) -> Result<View, upcycle_architectures::WeightsError> {
            panic!("{name} was read")
        }
    }
    let load = |case: &Case, edit: &dyn Fn(&mut Held)| {
        let mut weights = case.weights.clone();
        edit(&mut weights);
        Decoder::load(case.family, &case.config, &Headers(weights), DType::F32, &Device::Cpu).unwrap_err().to_string()
    };
    let reshape = |weights: &mut Held, name: &str, shape: &[usize]| weights.0.get_mut(name).unwrap().info.shape = shape.to_vec();
    let (classic, fused) = (Case::open("mixtral"), Case::open("mixtral-fused"));

    let w2 = "model.layers.1.block_sparse_moe.experts.3.w2.weight";
    assert_eq!(
        load(&classic, &|weights| reshape(weights, w2, &[48, 32])),
        format!("tensor `{w2}` has shape [48, 32], but the config makes it [32, 48]")
    );
    assert_eq!(load(&classic, &|weights| drop(weights.0.remove(w2))), format!("tensor `{w2}` is missing"));
    let down = "model.layers.1.mlp.experts.down_proj";
    assert_eq!(
        load(&fused, &|weights| reshape(weights, down, &[3, 32, 48])),
        format!("tensor `{down}` has shape [3, 32, 48], but the config makes it [4, 32, 48]")
    );
    assert!(load(&fused, &|weights| drop(weights.0.remove(down))).ends_with("experts.0.w2.weight` is missing"));

    // A header that lies about its bytes.
    let mut short = classic.weights.clone();
    let tensor = short.0.get_mut(w2).unwrap();
    tensor.data = tensor.data.slice(..10);
    let error = Decoder::load(classic.family, &classic.config, &short, DType::F32, &Device::Cpu).unwrap_err().to_string();
    assert_eq!(error, format!("cannot read tensor `{w2}`: got 10 bytes of shape [32, 48], expected shape [32, 48]"));
}
