//! Which type each tensor of a quantised model gets, and models whose weights are encoded when they are read.
//!
//! The mixes are those of llama.cpp (`llama_tensor_get_type` in `llama-quant.cpp`), by the names that everyone knows them by. Norms, biases and
//! gates stay f32. Symbols: L layers, E experts.

mod gather;
mod importance;
mod weights;

use std::str::FromStr;

use upcycle_architectures::{AttentionPart, Config, Dtype, LayerRole, Projection, Role};

pub(crate) use self::weights::{CHUNK, rows};
pub use self::{
    gather::gather,
    importance::{Importance, ImportanceError},
    weights::Quantised,
};

/// What most matrices are stored as; in the mixes, the ones that quality depends on most get more bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Mix {
    F32,
    F16,
    Bf16,
    Q8_0,
    Q6K,
    Q5KM,
    Q5KS,
    Q4KM,
    Q4KS,
    Q4_0,
}

impl Mix {
    /// Every mix with its name, the largest first.
    pub const ALL: [(&str, Self); 10] = [
        ("f32", Self::F32),
        ("f16", Self::F16),
        ("bf16", Self::Bf16),
        ("q8_0", Self::Q8_0),
        ("q6_k", Self::Q6K),
        ("q5_k_m", Self::Q5KM),
        ("q5_k_s", Self::Q5KS),
        ("q4_k_m", Self::Q4KM),
        ("q4_k_s", Self::Q4KS),
        ("q4_0", Self::Q4_0),
    ];

    /// The type of most matrices.
    const fn base(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::F16 => Dtype::F16,
            Self::Bf16 => Dtype::Bf16,
            Self::Q8_0 => Dtype::Q8_0,
            Self::Q6K => Dtype::Q6K,
            Self::Q5KM | Self::Q5KS => Dtype::Q5K,
            Self::Q4KM | Self::Q4KS => Dtype::Q4K,
            Self::Q4_0 => Dtype::Q4_0,
        }
    }
}

/// Not the name of a mix.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is none of {names}", names = Mix::ALL.map(|(name, _)| name).join(", "))]
pub struct UnknownMix(String);

impl FromStr for Mix {
    type Err = UnknownMix;

    /// Takes `q4_k` and `q5_k` for their medium mixes, as llama.cpp does.
    fn from_str(name: &str) -> Result<Self, UnknownMix> {
        let lower = name.to_ascii_lowercase();
        let full = match lower.as_str() {
            "q4_k" => "q4_k_m",
            "q5_k" => "q5_k_m",
            other => other,
        };
        Self::ALL.iter().find(|(name, _)| *name == full).map(|(_, mix)| *mix).ok_or_else(|| UnknownMix(name.to_owned()))
    }
}

/// A mix, and what it is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scheme {
    /// for matrices
    pub mix: Mix,
    /// whether it is for the experts alone: everything else stays bf16 (or f16, where the model is)
    pub experts_only: bool,
}

impl Scheme {
    /// The type that a tensor is stored in: what the scheme has for it, or what fits its rows of `row` elements.
    pub fn dtype(self, config: &Config, role: Role, row: usize) -> Dtype {
        fitting(self.wanted(config, role), row)
    }

    /// The scheme's type, whatever the tensor's rows.
    pub(crate) fn wanted(self, config: &Config, role: Role) -> Dtype {
        use AttentionPart::{K, O, Q, V};
        let (base, layers) = (self.mix.base(), config.layers);
        let eight = config.moe.as_ref().is_some_and(|moe| moe.experts == 8);
        let matrix = !matches!(
            role,
            Role::FinalNorm
                | Role::Layer(
                    _,
                    LayerRole::InputNorm | LayerRole::PostNorm | LayerRole::Router | LayerRole::SharedGate | LayerRole::MlpBias(_)
                )
        );
        match role {
            _ if !matrix => Dtype::F32,
            Role::Layer(_, LayerRole::Attention(part)) if !matches!(part, Q | K | V | O) => Dtype::F32,
            role if self.experts_only && !matches!(role, Role::Layer(_, LayerRole::Expert(..))) => match config.dtype {
                Some(Dtype::F16) => Dtype::F16,
                _ => Dtype::Bf16,
            },
            _ if !base.is_blocks() => base,
            // What the head multiplies decides every token, be it a tensor of its own or the embedding.
            Role::Head => of_head(base),
            Role::Embedding if config.tied => of_head(base),
            // With eight experts, attention is a small part of the model.
            Role::Layer(_, LayerRole::Attention(K | V)) if eight => Dtype::Q8_0,
            Role::Layer(_, LayerRole::Attention(O)) if eight && base == Dtype::Q4K => Dtype::Q5K,
            Role::Layer(l, LayerRole::Attention(V)) => match self.mix {
                Mix::Q4KM | Mix::Q5KM if needs_bits(l, layers) => Dtype::Q6K,
                Mix::Q4KS if l < 4 => Dtype::Q5K,
                _ => base,
            },
            Role::Layer(
                l,
                LayerRole::Mlp(Projection::Down) | LayerRole::Expert(_, Projection::Down) | LayerRole::SharedExpert(Projection::Down),
            ) => match self.mix {
                Mix::Q4KM | Mix::Q5KM if needs_bits(l, layers) => Dtype::Q6K,
                Mix::Q4KS if l < layers / 8 => Dtype::Q5K,
                _ => base,
            },
            _ => base,
        }
    }
}

fn of_head(base: Dtype) -> Dtype {
    if base == Dtype::Q8_0 { base } else { Dtype::Q6K }
}

/// The first and the last eighth of the layers, and every third one between.
fn needs_bits(layer: usize, layers: usize) -> bool {
    let eighth = layers / 8;
    layer < eighth || layer >= 7 * layers / 8 || (layer - eighth) % 3 == 2
}

/// The type itself if rows of `row` elements are whole blocks of it, else the next that they are whole blocks of.
fn fitting(dtype: Dtype, row: usize) -> Dtype {
    let smaller = match dtype {
        Dtype::Q4K => Dtype::Q5_0,
        Dtype::Q5K | Dtype::Q6K => Dtype::Q8_0,
        other => other,
    };
    let fits = |dtype: &Dtype| row.is_multiple_of(dtype.block().0);
    [dtype, smaller].into_iter().find(fits).unwrap_or(Dtype::F16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_that_do_not_fit_fall_back() {
        assert_eq!(fitting(Dtype::Q4K, 512), Dtype::Q4K);
        assert_eq!([Dtype::Q4K, Dtype::Q5K, Dtype::Q6K].map(|dtype| fitting(dtype, 576)), [Dtype::Q5_0, Dtype::Q8_0, Dtype::Q8_0]);
        assert_eq!([Dtype::Q4_0, Dtype::Q8_0, Dtype::Q6K].map(|dtype| fitting(dtype, 72)), [Dtype::F16; 3]);
        assert_eq!(fitting(Dtype::Bf16, 7), Dtype::Bf16);
    }

    #[test]
    fn names_are_read_and_others_refused() {
        for (name, mix) in Mix::ALL {
            assert_eq!(name.to_ascii_uppercase().parse(), Ok(mix));
        }
        assert_eq!("q4_k".parse(), Ok(Mix::Q4KM));
        assert!("q3_k".parse::<Mix>().unwrap_err().to_string().contains("q4_k_m"));
    }

    #[test]
    fn more_bits_go_where_llama_cpp_puts_them() {
        let layers: Vec<usize> = (0..32).filter(|l| needs_bits(*l, 32)).collect();
        assert_eq!(layers, [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]);
    }
}
