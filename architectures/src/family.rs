//! A model family as data: how it names its tensors and how its `config.json` is read.
//!
//! A [`Role`] says what a tensor is for; a family turns it into a name. Nothing outside a family's file knows a tensor name.

use crate::config::{Config, ConfigError};

/// One architecture.
#[derive(Debug)]
pub struct Family {
    /// `model_type` in config.json
    pub model_type: &'static str,
    /// `architectures[0]` in config.json
    pub architecture: &'static str,
    /// tensor names
    pub names: Names,
    /// reads config.json
    pub read: fn(&serde_json::Value) -> Result<Config, ConfigError>,
}

/// Name templates: `{l}` is the layer, `{e}` the expert. Projections stand in the order of [`Projection`].
#[derive(Debug, Clone, Copy)]
pub struct Names {
    /// [V, D]
    pub embedding: &'static str,
    /// `[D]`
    pub final_norm: &'static str,
    /// [V, D]
    pub head: &'static str,
    /// prefix of everything in a layer
    pub layer: &'static str,
    /// `[D]`, before attention
    pub input_norm: &'static str,
    /// `[D]`, before the MLP
    pub post_norm: &'static str,
    /// in the order of [`AttentionPart`]
    pub attention: [&'static str; 10],
    /// dense MLP, each followed by `.weight` or `.bias`
    pub mlp: [&'static str; 3],
    /// sparse part
    pub moe: Option<MoeNames>,
}

/// Names of a sparse layer's tensors.
#[derive(Debug, Clone, Copy)]
pub struct MoeNames {
    /// [E, D]
    pub router: &'static str,
    /// [F, D], [F, D], [D, F]
    pub expert: [&'static str; 3],
    /// the layout that transformers 5 holds in memory and mergekit 0.1.5 writes: router, gate and up [E, 2F, D], down [E, D, F]
    pub fused: [&'static str; 3],
    /// shared expert's projections and its gate [1, D], if the family has one
    pub shared: Option<([&'static str; 3], &'static str)>,
}

/// What a tensor is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// token embeddings [V, D]
    Embedding,
    /// a tensor of layer l
    Layer(usize, LayerRole),
    /// last norm `[D]`
    FinalNorm,
    /// output projection [V, D]; absent if tied
    Head,
}

/// What a layer's tensor is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LayerRole {
    /// norm before attention `[D]`
    InputNorm,
    /// attention
    Attention(AttentionPart),
    /// norm before the MLP `[D]`
    PostNorm,
    /// dense MLP weight
    Mlp(Projection),
    /// dense MLP bias
    MlpBias(Projection),
    /// gate of the router [E, D]
    Router,
    /// weight of expert e
    Expert(usize, Projection),
    /// weight of the shared expert
    SharedExpert(Projection),
    /// gate of the shared expert [1, D]
    SharedGate,
}

/// Parts of attention, in the order of [`Names::attention`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum AttentionPart {
    /// [H hd, D]
    Q,
    /// [KV hd, D]
    K,
    /// [KV hd, D]
    V,
    /// [D, H hd]
    O,
    /// [H hd]
    QBias,
    /// [KV hd]
    KBias,
    /// [KV hd]
    VBias,
    /// `[D]`
    OBias,
    /// `[hd]`
    QNorm,
    /// `[hd]`
    KNorm,
}

/// Projections of a gated MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Projection {
    /// [F, D], behind the activation
    Gate,
    /// [F, D]
    Up,
    /// [D, F]
    Down,
}

impl Projection {
    /// All three.
    pub const ALL: [Self; 3] = [Self::Gate, Self::Up, Self::Down];

    /// Shape of the weight, [out, in].
    pub const fn shape(self, hidden: usize, ffn: usize) -> [usize; 2] {
        match self {
            Self::Gate | Self::Up => [ffn, hidden],
            Self::Down => [hidden, ffn],
        }
    }
}

/// The names of Llama, which most families share.
pub const LLAMA_NAMES: Names = Names {
    embedding: "model.embed_tokens.weight",
    final_norm: "model.norm.weight",
    head: "lm_head.weight",
    layer: "model.layers.{l}.",
    input_norm: "input_layernorm.weight",
    post_norm: "post_attention_layernorm.weight",
    attention: [
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        "self_attn.o_proj.weight",
        "self_attn.q_proj.bias",
        "self_attn.k_proj.bias",
        "self_attn.v_proj.bias",
        "self_attn.o_proj.bias",
        "self_attn.q_norm.weight",
        "self_attn.k_norm.weight",
    ],
    mlp: ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    moe: None,
};

impl Family {
    /// The tensor's name on disk, classic (per-expert) layout; `None` if this family has no such tensor.
    pub fn name(&self, role: Role) -> Option<String> {
        let names = &self.names;
        Some(match role {
            Role::Embedding => names.embedding.to_owned(),
            Role::FinalNorm => names.final_norm.to_owned(),
            Role::Head => names.head.to_owned(),
            Role::Layer(layer, role) => {
                let tail = match role {
                    LayerRole::InputNorm => names.input_norm.to_owned(),
                    LayerRole::PostNorm => names.post_norm.to_owned(),
                    LayerRole::Attention(part) => names.attention[part as usize].to_owned(),
                    LayerRole::Mlp(projection) => format!("{}.weight", names.mlp[projection as usize]),
                    LayerRole::MlpBias(projection) => format!("{}.bias", names.mlp[projection as usize]),
                    LayerRole::Router => names.moe?.router.to_owned(),
                    LayerRole::Expert(e, projection) => names.moe?.expert[projection as usize].replace("{e}", &e.to_string()),
                    LayerRole::SharedExpert(projection) => names.moe?.shared?.0[projection as usize].to_owned(),
                    LayerRole::SharedGate => names.moe?.shared?.1.to_owned(),
                };
                names.layer.replace("{l}", &layer.to_string()) + &tail
            }
        })
    }

    /// Names of a layer's router, gate-and-up and down tensors in the fused layout; `None` for a dense family.
    pub fn fused_names(&self, layer: usize) -> Option<[String; 3]> {
        let prefix = self.names.layer.replace("{l}", &layer.to_string());
        self.names.moe.map(|moe| moe.fused.map(|tail| format!("{prefix}{tail}")))
    }

    /// Every tensor that a model of this config has, with its shape, in the order in which it is used.
    pub fn tensors(&self, config: &Config) -> Vec<(Role, Vec<usize>)> {
        let (d, hd) = (config.hidden, config.head_dim);
        let (q, kv) = (config.heads * hd, config.kv_heads * hd);
        let mut all = vec![(Role::Embedding, vec![config.vocab, d])];
        for l in 0..config.layers {
            let mut add = |role, shape: &[usize]| all.push((Role::Layer(l, role), shape.to_vec()));
            add(LayerRole::InputNorm, &[d]);
            for (part, shape, present) in [
                (AttentionPart::Q, &[q, d][..], true),
                (AttentionPart::K, &[kv, d], true),
                (AttentionPart::V, &[kv, d], true),
                (AttentionPart::O, &[d, q], true),
                (AttentionPart::QBias, &[q], config.qkv_bias),
                (AttentionPart::KBias, &[kv], config.qkv_bias),
                (AttentionPart::VBias, &[kv], config.qkv_bias),
                (AttentionPart::OBias, &[d], config.o_bias),
                (AttentionPart::QNorm, &[hd], config.qk_norm),
                (AttentionPart::KNorm, &[hd], config.qk_norm),
            ] {
                if present {
                    add(LayerRole::Attention(part), shape);
                }
            }
            add(LayerRole::PostNorm, &[d]);
            match &config.moe {
                Some(moe) if moe.sparse[l] => {
                    add(LayerRole::Router, &[moe.router_rows(), d]);
                    for e in 0..moe.experts {
                        for p in Projection::ALL {
                            add(LayerRole::Expert(e, p), &p.shape(d, moe.ffn));
                        }
                    }
                    if let Some(ffn) = moe.shared_ffn {
                        for p in Projection::ALL {
                            add(LayerRole::SharedExpert(p), &p.shape(d, ffn));
                        }
                        add(LayerRole::SharedGate, &[1, d]);
                    }
                }
                _ => {
                    for p in Projection::ALL {
                        let shape = p.shape(d, config.ffn);
                        add(LayerRole::Mlp(p), &shape);
                        if config.mlp_bias {
                            add(LayerRole::MlpBias(p), &shape[..1]);
                        }
                    }
                }
            }
        }
        all.push((Role::FinalNorm, vec![d]));
        if !config.tied {
            all.push((Role::Head, vec![config.vocab, d]));
        }
        all
    }
}
