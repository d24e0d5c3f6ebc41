//! Weights held in memory, golden cases, and comparisons.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor};
use safetensors::SafeTensors;
use upcycle_architectures::{
    Config, Dtype, Family, TensorInfo, View, Weights, WeightsError,
    decoder::{Cache, Decoder, Logits, NoProbe, Step},
    detect,
};

/// Tensors by name.
#[derive(Debug, Clone, Default)]
pub struct Held(pub BTreeMap<String, View>);

impl Weights for Held {
    fn names(&self) -> Vec<String> {
        self.0.keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.0.get(name).map(|view| view.info.clone())
    }

    fn read(&self, name: &str) -> Result<View, WeightsError> {
        self.0.get(name).cloned().ok_or_else(|| WeightsError::Missing { tensor: name.to_owned() })
    }
}

/// The tensors of a safetensors file; integers are left out. Their bytes lie one byte off their natural alignment.
pub fn held(path: &Path) -> Held {
    let mut file = vec![0];
    file.extend(std::fs::read(path).unwrap());
    let file = bytes::Bytes::from(file);
    let bytes = file.slice(1..);
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let view = |tensor: safetensors::tensor::TensorView<'_>| {
        let info = TensorInfo { dtype: Dtype::parse(&tensor.dtype().to_string())?, shape: tensor.shape().to_vec() };
        Some(View { info, data: file.slice_ref(tensor.data()) })
    };
    Held(tensors.iter().filter_map(|(name, tensor)| Some((name.to_owned(), view(tensor)?))).collect())
}

pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// What `transformers` computed: numbers and token ids by name.
pub struct Golden {
    values: Held,
    ids: BTreeMap<String, Vec<u32>>,
}

impl Golden {
    pub fn open(path: &Path) -> Self {
        let file = std::fs::read(path).unwrap();
        let tensors = SafeTensors::deserialize(&file).unwrap();
        let integers = tensors.iter().filter(|(_, tensor)| tensor.dtype() == safetensors::Dtype::I64);
        let id = |bytes: &[u8; 8]| u32::try_from(i64::from_le_bytes(*bytes)).unwrap();
        let ids = integers.map(|(name, tensor)| (name.to_owned(), tensor.data().as_chunks().0.iter().map(id).collect())).collect();
        Self { values: held(path), ids }
    }

    pub fn tokens(&self, name: &str) -> Vec<u32> {
        self.ids[name].clone()
    }

    pub fn values(&self, name: &str) -> Vec<f32> {
        self.values.0[name].to_f32()
    }
}

/// One golden case: a model and what it computes.
pub struct Case {
    pub name: String,
    pub family: &'static Family,
    pub config: Config,
    pub weights: Held,
    pub golden: Golden,
}

impl Case {
    pub fn open(name: &str) -> Self {
        let dir = root().join("tests/golden/decoder").join(name);
        let (family, config) = detect(&serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap()).unwrap();
        let (weights, golden) = (held(&dir.join("model.safetensors")), Golden::open(&dir.join("golden.safetensors")));
        Self { name: name.to_owned(), family, config, weights, golden }
    }

    /// Every case.
    pub fn all() -> Vec<Self> {
        let entries = std::fs::read_dir(root().join("tests/golden/decoder")).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names.iter().map(|name| Self::open(name.to_str().unwrap())).collect()
    }

    pub fn decoder(&self, dtype: DType) -> Decoder {
        Decoder::load(self.family, &self.config, &self.weights, dtype, &Device::Cpu).unwrap()
    }

    /// The rows `positions` of logits [T, V], as the golden `long.logits` has them.
    pub fn long_rows(&self, logits: &[f32]) -> Vec<f32> {
        let v = self.config.vocab;
        self.golden.tokens("long.positions").iter().flat_map(|p| logits[*p as usize * v..][..v].to_vec()).collect()
    }

    /// Whether frequencies depend on the length of a call.
    pub fn rope_follows_length(&self) -> bool {
        use upcycle_architectures::config::RopeScaling::{Dynamic, LongRope};
        matches!(self.config.rope.scaling, Dynamic { .. } | LongRope { .. })
    }
}

pub fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1().unwrap()
}

/// All logits of one call.
pub fn run(decoder: &Decoder, tokens: &[u32], cache: &mut Cache) -> Vec<f32> {
    values(&decoder.forward(&mut [Step { tokens, cache, logits: Logits::All }], &mut NoProbe).unwrap())
}

/// All logits of an empty cache's first call.
pub fn logits(decoder: &Decoder, tokens: &[u32]) -> Vec<f32> {
    run(decoder, tokens, &mut decoder.cache())
}

/// The logits of tokens fed in pieces of the given lengths, the last one again and again.
pub fn in_pieces(decoder: &Decoder, mut tokens: &[u32], lengths: &[usize]) -> Vec<f32> {
    let mut cache = decoder.cache();
    let mut all = Vec::new();
    let mut lengths = lengths.iter().copied();
    let mut length = 0;
    while !tokens.is_empty() {
        length = lengths.next().unwrap_or(length);
        let (piece, rest) = tokens.split_at(length.min(tokens.len()));
        all.extend(run(decoder, piece, &mut cache));
        tokens = rest;
    }
    all
}

pub fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| if (a - b).is_nan() { f32::INFINITY } else { (a - b).abs() }).fold(0.0, f32::max)
}

#[track_caller]
pub fn assert_close(what: &str, a: &[f32], b: &[f32]) {
    let difference = max_difference(a, b);
    assert!(difference <= 1e-4, "{what}: max difference {difference}");
}

pub fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}
