//! A config as GGUF metadata: which of llama.cpp's architectures computes the model, and what it has to be told.

use upcycle_architectures::{
    AttentionPart, Config, LayerRole, Projection, Role,
    config::{Activation, Moe, RopeScaling},
    decoder::tensor,
};

use super::{
    Model,
    file::{Metadata, Value, size},
};

type Result<T> = std::result::Result<T, String>;

/// How a model is laid out for llama.cpp.
#[derive(Debug)]
pub(super) struct Architecture {
    /// `general.architecture`
    pub name: &'static str,
    /// q and k have the rows of a head in another order
    pub interleaved: bool,
    /// the shared expert is left out, for it adds nothing
    pub without_shared: bool,
    /// a tied head is written all the same
    pub needs_head: bool,
    /// what llama.cpp computes otherwise than the model's own config says
    pub warnings: Vec<String>,
}

impl Architecture {
    /// The architecture of a model; `Err` says why there is none.
    pub(super) fn of(model: &Model<'_>) -> Result<Self> {
        let config = model.config;
        if config.activation != Activation::Silu {
            return Err(format!("its MLPs use {:?}; llama.cpp has SiLU for this family", config.activation));
        }
        if config.o_bias && matches!(config.model_type.as_str(), "qwen2" | "qwen2_moe") {
            return Err("it has a bias on the attention output, which llama.cpp does not read in this family".into());
        }
        let mut warnings = Vec::new();
        let plain = |name, interleaved| Self { name, interleaved, without_shared: false, needs_head: false, warnings: Vec::new() };
        let mut architecture = match (config.model_type.as_str(), &config.moe) {
            ("llama" | "mistral" | "mixtral", _) => plain("llama", true),
            ("qwen2", _) => plain("qwen2", false),
            ("qwen3", _) => plain("qwen3", false),
            ("qwen3_moe", Some(moe)) => {
                if !moe.normalise && moe.top_k < moe.experts {
                    warnings.push("llama.cpp normalises the weights of a token's experts; this model's are not".to_owned());
                }
                plain("qwen3moe", false)
            }
            ("qwen2_moe", Some(moe)) => qwen2_moe(model, moe, &mut warnings)?,
            (other, _) => return Err(format!("llama.cpp has no architecture for `{other}` here")),
        };
        if let Some(moe) = &config.moe {
            if moe.directions.is_some() {
                return Err("its routers are no linear gates: no other engine knows them; set `gate_mode: auto` in the recipe".into());
            }
            if moe.sparse.contains(&false) {
                return Err("some of its layers have a dense MLP, which llama.cpp does not read in this family".into());
            }
        }
        if config.windows.iter().flatten().any(|window| *window < config.max_positions) {
            warnings
                .push("llama.cpp knows no sliding window in this architecture: texts longer than the window come out otherwise".to_owned());
        }
        if config.rope.partial < 1.0 {
            warnings.push("llama.cpp rotates whole heads in this architecture; this model rotates a part of each".to_owned());
        }
        architecture.warnings = warnings;
        Ok(architecture)
    }
}

/// llama.cpp's own `qwen2moe` does not normalise the weights of a token's experts and wants a shared expert. What has to be normalised and has
/// no shared expert, or one that adds nothing, is computed as a `llama` with experts and biases.
fn qwen2_moe(model: &Model<'_>, moe: &Moe, warnings: &mut Vec<String>) -> Result<Architecture> {
    let normalised = moe.normalise || moe.top_k == moe.experts;
    if normalised && !shared_expert_counts(model, moe)? {
        return Ok(Architecture { name: "llama", interleaved: true, without_shared: true, needs_head: false, warnings: Vec::new() });
    }
    if moe.shared_ffn.is_none() {
        return Err("it has no shared expert and does not normalise its experts' weights; llama.cpp has no architecture for that".into());
    }
    if !normalised {
        return Ok(Architecture { name: "qwen2moe", interleaved: false, without_shared: false, needs_head: true, warnings: Vec::new() });
    }
    if moe.top_k < moe.experts {
        warnings.push(
            "llama.cpp does not normalise the weights of a token's experts in `qwen2moe`, which a shared expert asks for: \
             it will answer otherwise than upcycle does"
                .to_owned(),
        );
    }
    Ok(Architecture { name: "qwen2moe", interleaved: false, without_shared: false, needs_head: true, warnings: Vec::new() })
}

/// Whether a layer's shared expert adds anything.
fn shared_expert_counts(model: &Model<'_>, moe: &Moe) -> Result<bool> {
    let Some(ffn) = moe.shared_ffn else { return Ok(false) };
    let shape = Projection::Down.shape(model.config.hidden, ffn);
    for layer in 0..model.config.layers {
        let role = Role::Layer(layer, LayerRole::SharedExpert(Projection::Down));
        let view = tensor(model.family, model.config, model.weights, role, &shape).map_err(|error| error.to_string())?;
        if view.data.iter().any(|byte| *byte != 0) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// How many heads' rows of a tensor are put in another order.
pub(super) fn interleaved(config: &Config, role: Role) -> Option<usize> {
    match role {
        Role::Layer(_, LayerRole::Attention(AttentionPart::Q | AttentionPart::QBias)) => Some(config.heads),
        Role::Layer(_, LayerRole::Attention(AttentionPart::K | AttentionPart::KBias)) => Some(config.kv_heads),
        _ => None,
    }
}

/// The metadata that a model is computed by, and the divisors of its frequencies (`rope_freqs`), if it has some.
pub(super) fn make(model: &Model<'_>, architecture: &Architecture) -> Result<(Metadata, Option<Vec<f32>>)> {
    let (config, name) = (model.config, architecture.name);
    let mut out: Metadata = vec![
        ("general.architecture".into(), Value::Text(name.into())),
        ("general.type".into(), Value::Text("model".into())),
        ("general.name".into(), Value::Text(model.name.into())),
        // `GGML_QNT_VERSION`
        ("general.quantization_version".into(), Value::U32(2)),
    ];
    let mut set = |key: &str, value: Value| out.push((format!("{name}.{key}"), value));
    let dense_ffn = match &config.moe {
        Some(moe) if name == "llama" => moe.ffn,
        _ => config.ffn,
    };
    for (key, value) in [
        ("block_count", config.layers),
        ("context_length", config.max_positions),
        ("embedding_length", config.hidden),
        ("feed_forward_length", dense_ffn),
        ("attention.head_count", config.heads),
        ("attention.head_count_kv", config.kv_heads),
        ("attention.key_length", config.head_dim),
        ("attention.value_length", config.head_dim),
        ("rope.dimension_count", (config.head_dim as f64 * config.rope.partial) as usize),
        ("vocab_size", config.vocab),
    ] {
        set(key, size(value));
    }
    set("attention.layer_norm_rms_epsilon", Value::F32(config.norm_eps as f32));
    set("rope.freq_base", Value::F32(config.rope.theta as f32));
    if let Some(window) = config.windows.first().copied().flatten().filter(|_| name == "llama") {
        set("attention.sliding_window", size(window));
    }
    if let Some(moe) = &config.moe {
        set("expert_count", size(moe.experts));
        set("expert_used_count", size(moe.top_k));
        set("expert_weights_norm", Value::Bool(moe.normalise));
        if name != "llama" {
            set("expert_feed_forward_length", size(moe.ffn));
        }
        if let Some(ffn) = moe.shared_ffn.filter(|_| !architecture.without_shared) {
            set("expert_shared_feed_forward_length", size(ffn));
        }
    }
    let mut divisors = None;
    match &config.rope.scaling {
        RopeScaling::Default => {}
        RopeScaling::Linear { factor } => {
            set("rope.scaling.type", Value::Text("linear".into()));
            set("rope.scaling.factor", Value::F32(*factor as f32));
        }
        RopeScaling::Yarn { truncate: false, .. } => {
            return Err("its YaRN does not truncate the correction range, as llama.cpp does".into());
        }
        RopeScaling::Yarn { factor, original, beta_fast, beta_slow, attention_factor, .. } => {
            set("rope.scaling.type", Value::Text("yarn".into()));
            set("rope.scaling.factor", Value::F32(*factor as f32));
            set("rope.scaling.original_context_length", size(*original));
            set("rope.scaling.yarn_beta_fast", Value::F32(*beta_fast as f32));
            set("rope.scaling.yarn_beta_slow", Value::F32(*beta_slow as f32));
            // llama.cpp takes the paper's factor times this.
            let usual = if *factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 };
            set("rope.scaling.attn_factor", Value::F32((attention_factor / usual) as f32));
        }
        RopeScaling::Llama3 { .. } if name != "llama" => {
            return Err("llama.cpp reads Llama 3's rope in the llama architecture alone".into());
        }
        RopeScaling::Llama3 { factor, low, high, original } => {
            // For us alone: llama.cpp asks for the divisors.
            set("rope.scaling.low_freq_factor", Value::F32(*low as f32));
            set("rope.scaling.high_freq_factor", Value::F32(*high as f32));
            set("rope.scaling.original_context_length", size(*original));
            divisors = Some(llama3_divisors(config, *factor, (*low, *high), *original));
        }
        RopeScaling::Dynamic { .. } => {
            return Err("its rope is stretched with the text's length (`dynamic`), which llama.cpp does not do".into());
        }
        RopeScaling::LongRope { .. } => return Err("LongRoPE is not written to GGUF".into()),
    }
    Ok((out, divisors))
}

/// What llama.cpp divides each pair's frequency by: 1 for the high ones, the factor for the low ones, between them what is smooth.
fn llama3_divisors(config: &Config, factor: f64, (low, high): (f64, f64), original: usize) -> Vec<f32> {
    let divisor = |pair: usize| {
        let wavelength = std::f64::consts::TAU * config.rope.theta.powf(2.0 * pair as f64 / config.head_dim as f64);
        let smooth = ((original as f64 / wavelength - low) / (high - low)).clamp(0.0, 1.0);
        1.0 / ((1.0 - smooth) / factor + smooth)
    };
    (0..config.head_dim / 2).map(|pair| divisor(pair) as f32).collect()
}
