//! Reading `config.json`: the keys that families share, in the spellings of transformers 4 and 5.
//!
//! Absent keys take the defaults of transformers, except the sizes that shape tensors: those must be stated. Whatever a config says,
//! the result is safe to compute with: sizes are at least one and small enough that no product of them overflows.

use serde_json::{Map, Value};

use crate::{
    config::{Activation, Config, ConfigError, Moe, Rope, RopeScaling},
    weights::Dtype,
};

// Far above any model, and low enough that the byte count of a whole model (at most MAX_LAYER_EXPERTS experts of three
// MAX_SIZE * MAX_SIZE matrices in f32) fits 64 bits.
const MAX_SIZE: usize = 1 << 20;
const MAX_LAYERS: usize = 1 << 12;
const MAX_EXPERTS: usize = 1 << 12;
const MAX_LAYER_EXPERTS: usize = 1 << 18;
const MAX_POSITIONS: usize = 1 << 31;

type Result<T> = std::result::Result<T, ConfigError>;

/// What a family's config class of transformers takes when a key is absent.
pub(super) struct Defaults {
    /// `None`: as many as heads
    pub kv_heads: Option<usize>,
    /// `None`: hidden size over heads
    pub head_dim: Option<usize>,
    pub norm_eps: f64,
    pub max_positions: usize,
    pub theta: f64,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
}

/// The keys of a JSON object; a key whose value is null counts as absent unless said otherwise.
pub(super) struct Keys<'a> {
    map: &'a Map<String, Value>,
    /// Where the object stands in the file, for messages.
    path: &'static str,
}

impl<'a> Keys<'a> {
    pub(super) fn new(json: &'a Value) -> Result<Self> {
        let map = json.as_object().ok_or_else(|| ConfigError::Invalid {
            key: "the whole file".to_owned(),
            found: shown(json),
            expected: "an object".to_owned(),
        })?;
        Ok(Self { map, path: "" })
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn missing(&self, key: &str) -> ConfigError {
        ConfigError::Missing { key: format!("{}{key}", self.path) }
    }

    fn invalid(&self, key: &str, expected: impl Into<String>) -> ConfigError {
        let found = self.map.get(key).map_or_else(|| "absent".to_owned(), shown);
        ConfigError::Invalid { key: format!("{}{key}", self.path), found, expected: expected.into() }
    }

    fn integer(&self, key: &str, min: usize, max: usize) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        // Some tools write sizes as `8192.0`.
        let whole = value.as_u64().or_else(|| value.as_f64().filter(|x| x.fract() == 0.0 && *x >= 0.0).map(|x| x as u64));
        match whole.and_then(|n| usize::try_from(n).ok()) {
            Some(n) if (min..=max).contains(&n) => Ok(Some(n)),
            _ => Err(self.invalid(key, format!("a whole number from {min} to {max}"))),
        }
    }

    /// A size of at least one.
    pub(super) fn size(&self, key: &str) -> Result<Option<usize>> {
        self.integer(key, 1, MAX_SIZE)
    }

    /// A size that must be stated.
    pub(super) fn needed_size(&self, key: &str) -> Result<usize> {
        self.size(key)?.ok_or_else(|| self.missing(key))
    }

    /// A size that may be zero.
    pub(super) fn count(&self, key: &str) -> Result<Option<usize>> {
        self.integer(key, 0, MAX_SIZE)
    }

    pub(super) fn flag(&self, key: &str, default: bool) -> Result<bool> {
        self.get(key).map_or(Ok(default), |value| value.as_bool().ok_or_else(|| self.invalid(key, "true or false")))
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_f64().filter(|x| x.is_finite()).map(Some).ok_or_else(|| self.invalid(key, "a number"))
    }

    fn positive(&self, key: &str) -> Result<Option<f64>> {
        match self.number(key)? {
            Some(x) if x <= 0.0 => Err(self.invalid(key, "a number above 0")),
            x => Ok(x),
        }
    }

    fn needed_positive(&self, key: &str) -> Result<f64> {
        self.positive(key)?.ok_or_else(|| self.missing(key))
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.get(key).map(|value| value.as_str().ok_or_else(|| self.invalid(key, "a string"))).transpose()
    }

    fn list(&self, key: &str) -> Result<Option<&'a [Value]>> {
        self.get(key).map(|value| value.as_array().map(Vec::as_slice).ok_or_else(|| self.invalid(key, "a list"))).transpose()
    }

    /// Whether the key is there and null.
    fn is_null(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(Value::is_null)
    }

    /// Everything that all families have; the family adds its biases, windows and experts.
    pub(super) fn dense(&self, defaults: &Defaults) -> Result<Config> {
        if let Some(quantization) = self.get("quantization_config") {
            return Err(ConfigError::Invalid {
                key: "quantization_config".to_owned(),
                found: quantization.get("quant_method").map_or_else(|| shown(quantization), shown),
                expected: "none: quantised safetensors are not read, use the original checkpoint or a GGUF".to_owned(),
            });
        }
        let hidden = self.needed_size("hidden_size")?;
        let layers = self.integer("num_hidden_layers", 1, MAX_LAYERS)?.ok_or_else(|| self.missing("num_hidden_layers"))?;
        let heads = self.needed_size("num_attention_heads")?;
        let kv_default = defaults.kv_heads.filter(|_| !self.is_null("num_key_value_heads")).unwrap_or(heads);
        let kv_heads = self.size("num_key_value_heads")?.unwrap_or(kv_default);
        if !heads.is_multiple_of(kv_heads) {
            return Err(self.invalid("num_key_value_heads", format!("a divisor of num_attention_heads ({heads}), not {kv_heads}")));
        }
        let head_dim = match self.size("head_dim")?.or(defaults.head_dim) {
            Some(size) => size,
            None if hidden.is_multiple_of(heads) => hidden / heads,
            None => return Err(self.invalid("hidden_size", format!("a multiple of num_attention_heads ({heads}), or a head_dim"))),
        };
        if heads * head_dim > MAX_SIZE {
            return Err(self.invalid("num_attention_heads", format!("at most {} heads of {head_dim}", MAX_SIZE / head_dim)));
        }
        let max_positions = self.integer("max_position_embeddings", 1, MAX_POSITIONS)?.unwrap_or(defaults.max_positions);
        Ok(Config {
            model_type: self.text("model_type")?.unwrap_or_default().to_owned(),
            hidden,
            layers,
            heads,
            kv_heads,
            head_dim,
            ffn: self.needed_size("intermediate_size")?,
            vocab: self.needed_size("vocab_size")?,
            norm_eps: self.positive("rms_norm_eps")?.unwrap_or(defaults.norm_eps),
            activation: self.activation()?,
            rope: self.rope(defaults.theta, head_dim, max_positions)?,
            max_positions,
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            qk_norm: false,
            tied: self.flag("tie_word_embeddings", false)?,
            windows: vec![None; layers],
            moe: None,
            dtype: self.dtype()?,
            bos: self.tokens("bos_token_id", defaults.bos)?.first().copied(),
            eos: self.tokens("eos_token_id", defaults.eos)?,
        })
    }

    fn activation(&self) -> Result<Activation> {
        Ok(match self.text("hidden_act")?.unwrap_or("silu") {
            "silu" | "swish" => Activation::Silu,
            "gelu" | "gelu_python" => Activation::Gelu,
            "gelu_new" | "gelu_fast" | "gelu_accurate" | "gelu_pytorch_tanh" | "gelu_python_tanh" => Activation::GeluTanh,
            "relu" => Activation::Relu,
            _ => return Err(self.invalid("hidden_act", "silu, gelu, gelu_pytorch_tanh or relu")),
        })
    }

    fn dtype(&self) -> Result<Option<Dtype>> {
        let key = if self.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
        match self.text(key)? {
            None | Some("auto") => Ok(None),
            Some(name) => Dtype::parse(name).map(Some).ok_or_else(|| self.invalid(key, "float32, bfloat16 or float16")),
        }
    }

    /// One token id or a list of them; none if the key is null.
    fn tokens(&self, key: &str, default: Option<u32>) -> Result<Vec<u32>> {
        let ids = match self.map.get(key) {
            None => return Ok(default.into_iter().collect()),
            Some(Value::Null) => return Ok(Vec::new()),
            Some(Value::Array(ids)) => ids.as_slice(),
            Some(id) => std::slice::from_ref(id),
        };
        let parsed: Option<Vec<u32>> = ids.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok())).collect();
        parsed.ok_or_else(|| self.invalid(key, "a token id, a list of token ids, or null"))
    }

    /// Rope as `standardize_rope_params` and `modeling_rope_utils` of transformers 5 read it, and as 4 wrote it: `rope_scaling` goes
    /// before `rope_parameters`, and a top-level `original_max_position_embeddings` before the one among the parameters.
    fn rope(&self, default_theta: f64, head_dim: usize, max_positions: usize) -> Result<Rope> {
        let path = ["rope_scaling", "rope_parameters"]
            .into_iter()
            .find(|key| self.get(key).is_some_and(|value| value.as_object().is_none_or(|map| !map.is_empty())));
        let empty = Map::new();
        let keys = match path.map(|key| (key, self.get(key).and_then(Value::as_object))) {
            None => Keys { map: &empty, path: "" },
            Some((key, None)) => return Err(self.invalid(key, "an object or null")),
            Some((key, Some(map))) => Keys { map, path: if key == "rope_scaling" { "rope_scaling." } else { "rope_parameters." } },
        };
        for layer_type in ["full_attention", "sliding_attention"] {
            if keys.get(layer_type).is_some() {
                return Err(keys.invalid(layer_type, "absent: rope that differs between layers is not supported"));
            }
        }
        let theta = match keys.number("rope_theta")? {
            Some(theta) => theta,
            None => self.number("rope_theta")?.unwrap_or(default_theta),
        };
        if theta <= 1.0 {
            let keys = if keys.get("rope_theta").is_some() { &keys } else { self };
            return Err(keys.invalid("rope_theta", "a number above 1"));
        }
        let partial = match keys.positive("partial_rotary_factor")? {
            Some(partial) => partial,
            None => self.positive("partial_rotary_factor")?.unwrap_or(1.0),
        };
        let rotary = (head_dim as f64 * partial) as usize;
        if partial > 1.0 || rotary < 2 || !rotary.is_multiple_of(2) {
            return Err(ConfigError::Invalid {
                key: "head_dim".to_owned(),
                found: format!("{head_dim} with partial_rotary_factor {partial}"),
                expected: "an even number of rotated dimensions, at least 2 and at most head_dim".to_owned(),
            });
        }
        Ok(Rope { theta, partial, scaling: self.scaling(&keys, rotary, max_positions)? })
    }

    fn scaling(&self, keys: &Keys<'_>, rotary: usize, max_positions: usize) -> Result<RopeScaling> {
        let kind_key = if keys.get("rope_type").is_some() { "rope_type" } else { "type" };
        if keys.get("mrope_section").is_some() {
            return Err(keys.invalid("mrope_section", "absent: the rope of multimodal models is not supported"));
        }
        let original = match self.integer("original_max_position_embeddings", 1, MAX_POSITIONS)? {
            Some(original) => original,
            None => keys.integer("original_max_position_embeddings", 1, MAX_POSITIONS)?.unwrap_or(max_positions),
        };
        // YaRN and LongRoPE may leave the factor to the ratio of the lengths.
        let stretch = || Ok(keys.positive("factor")?.unwrap_or(max_positions as f64 / original as f64));
        let attention_factor = |otherwise: f64| match keys.number("attention_factor")?.unwrap_or(otherwise) {
            x if x.is_finite() && x > 0.0 => Ok(x),
            _ => Err(keys.invalid("attention_factor", "a number above 0")),
        };
        Ok(match keys.text(kind_key)?.unwrap_or("default") {
            "default" => RopeScaling::Default,
            "linear" => RopeScaling::Linear { factor: keys.needed_positive("factor")? },
            "dynamic" if rotary == 2 => return Err(keys.invalid(kind_key, "another kind: dynamic rope needs more than 2 dimensions")),
            "dynamic" => RopeScaling::Dynamic { factor: keys.needed_positive("factor")?, original: max_positions },
            "yarn" => {
                let factor = stretch()?;
                // transformers takes a zero of these four as absent.
                let number = |key| Ok(keys.number(key)?.filter(|x| *x != 0.0));
                let magnitude = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
                let default_attention = match (number("mscale")?, number("mscale_all_dim")?) {
                    (Some(one), Some(all)) => magnitude(one) / magnitude(all),
                    _ => magnitude(1.0),
                };
                let (beta_fast, beta_slow) = (number("beta_fast")?.unwrap_or(32.0), number("beta_slow")?.unwrap_or(1.0));
                if beta_slow <= 0.0 || beta_fast < beta_slow {
                    return Err(keys.invalid("beta_fast", format!("at least beta_slow ({beta_slow}), both above 0")));
                }
                let truncate = keys.flag("truncate", true)?;
                let attention_factor = attention_factor(default_attention)?;
                RopeScaling::Yarn { factor, original, beta_fast, beta_slow, attention_factor, truncate }
            }
            "longrope" | "su" => {
                let factor = stretch()?;
                let default_attention = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / (original as f64).ln()).sqrt() };
                let attention_factor = attention_factor(default_attention)?;
                let (short, long) = (keys.factors("short_factor", rotary / 2)?, keys.factors("long_factor", rotary / 2)?);
                RopeScaling::LongRope { short, long, original, attention_factor }
            }
            "llama3" => {
                let factor = keys.needed_positive("factor")?;
                let (low, high) = (keys.needed_positive("low_freq_factor")?, keys.needed_positive("high_freq_factor")?);
                if high <= low {
                    return Err(keys.invalid("high_freq_factor", format!("more than low_freq_factor ({low})")));
                }
                RopeScaling::Llama3 { factor, low, high, original }
            }
            _ => return Err(keys.invalid(kind_key, "default, linear, dynamic, yarn, longrope or llama3")),
        })
    }

    /// One positive number per rotated pair of dimensions.
    fn factors(&self, key: &str, len: usize) -> Result<Vec<f64>> {
        let list = self.list(key)?.ok_or_else(|| self.missing(key))?;
        let factors: Vec<f64> = list.iter().filter_map(Value::as_f64).filter(|x| x.is_finite() && *x > 0.0).collect();
        if factors.len() != len || list.len() != len {
            return Err(self.invalid(key, format!("{len} numbers above 0, one for each pair of rotated dimensions")));
        }
        Ok(factors)
    }

    /// The window of all layers, for families that have one for all: `absent` if the key is not there, none if it is null.
    pub(super) fn one_window(&self, layers: usize, absent: Option<usize>) -> Result<Vec<Option<usize>>> {
        Ok(vec![self.window(absent)?; layers])
    }

    fn window(&self, absent: Option<usize>) -> Result<Option<usize>> {
        let window = self.integer("sliding_window", 1, MAX_POSITIONS)?;
        Ok(window.or(absent.filter(|_| !self.is_null("sliding_window"))))
    }

    /// Whether windows are in use at all (Qwen states them even where they are not).
    pub(super) fn uses_windows(&self) -> Result<bool> {
        self.flag("use_sliding_window", false)
    }

    /// Qwen's windows: `layer_types` says which layers have one, and where it is absent `slides(layer, max_window_layers)`.
    pub(super) fn windows(&self, layers: usize, slides: fn(usize, usize) -> bool) -> Result<Vec<Option<usize>>> {
        let window = if self.uses_windows()? { self.window(Some(4096))? } else { None };
        let Some(types) = self.list("layer_types")? else {
            let from = self.count("max_window_layers")?.unwrap_or(28);
            return Ok((0..layers).map(|l| window.filter(|_| slides(l, from))).collect());
        };
        if types.len() != layers {
            return Err(self.invalid("layer_types", format!("one entry for each of {layers} layers")));
        }
        types
            .iter()
            .map(|kind| match (kind.as_str(), window) {
                (Some("full_attention"), _) => Ok(None),
                (Some("sliding_attention"), Some(window)) => Ok(Some(window)),
                (Some("sliding_attention"), None) => {
                    Err(self.invalid("layer_types", "full_attention alone, as no sliding window is in use"))
                }
                _ => Err(self.invalid("layer_types", "full_attention or sliding_attention for each layer")),
            })
            .collect()
    }

    /// E in either spelling.
    pub(super) fn experts(&self, layers: usize) -> Result<usize> {
        let [local, plain] = ["num_local_experts", "num_experts"].map(|key| self.integer(key, 1, MAX_EXPERTS));
        let experts = match (local?, plain?) {
            (None, None) => return Err(self.missing("num_experts")),
            (Some(a), Some(b)) if a != b => return Err(self.invalid("num_experts", format!("as num_local_experts says, {a}"))),
            (Some(experts), _) | (_, Some(experts)) => experts,
        };
        if layers * experts > MAX_LAYER_EXPERTS {
            return Err(self.invalid("num_hidden_layers", format!("at most {} with {experts} experts", MAX_LAYER_EXPERTS / experts)));
        }
        Ok(experts)
    }

    /// K, at most E.
    pub(super) fn top_k(&self, experts: usize, default: usize) -> Result<usize> {
        match self.size("num_experts_per_tok")?.unwrap_or(default) {
            k if k > experts => Err(self.invalid("num_experts_per_tok", format!("at most the number of experts, {experts}"))),
            k => Ok(k),
        }
    }

    /// The sparse part as both Qwen families state it, without a shared expert.
    pub(super) fn qwen_moe(&self, layers: usize, default_top_k: usize) -> Result<Moe> {
        let experts = self.experts(layers)?;
        let step = self.size("decoder_sparse_step")?.unwrap_or(1);
        let mut sparse: Vec<bool> = (1..=layers).map(|nth| nth.is_multiple_of(step)).collect();
        for layer in self.list("mlp_only_layers")?.unwrap_or_default() {
            let layer = layer.as_u64().ok_or_else(|| self.invalid("mlp_only_layers", "a list of layer numbers"))?;
            // transformers lets a layer that the model does not have pass.
            if let Some(sparse) = usize::try_from(layer).ok().and_then(|layer| sparse.get_mut(layer)) {
                *sparse = false;
            }
        }
        Ok(Moe {
            experts,
            top_k: self.top_k(experts, default_top_k)?,
            normalise: self.flag("norm_topk_prob", false)?,
            ffn: self.needed_size("moe_intermediate_size")?,
            shared_ffn: None,
            sparse,
            directions: None,
        })
    }
}

/// A value for a message, cut short.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
