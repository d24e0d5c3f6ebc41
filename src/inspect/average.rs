//! The plain mean of several models of one family as a set of weights: the merge that a composite has to beat. Nothing is written.

use std::collections::HashMap;

use upcycle_architectures::{Config, Dtype, Family, Role, TensorInfo, View, Weights, WeightsError};

use crate::source::Source;

/// The mean of dense models, tensor by tensor.
pub struct Average<'a> {
    /// That of all of them.
    pub family: &'static Family,
    /// The config of the mean.
    pub config: Config,
    sources: Vec<&'a Source>,
    dtype: Dtype,
    tensors: HashMap<String, (Role, Vec<usize>)>,
}

impl<'a> Average<'a> {
    /// The mean of `sources`, computed in f64 and held in `dtype`, with the config of `base`. Fails where a tensor is missing or of another
    /// shape.
    pub fn new(base: &Source, sources: Vec<&'a Source>, dtype: Dtype) -> Result<Self, WeightsError> {
        let tied = sources.iter().all(|source| source.config.tied);
        let config = Config { tied, dtype: Some(dtype), ..base.config.clone() };
        let family = base.family;
        let mut tensors = HashMap::new();
        for (role, expected) in family.tensors(&config) {
            for source in &sources {
                let tensor = name_in(source, role)?;
                match source.weights.info(&tensor) {
                    None => return Err(WeightsError::Missing { tensor }),
                    Some(TensorInfo { shape, .. }) if shape != expected => {
                        return Err(WeightsError::Shape { tensor, expected, found: shape });
                    }
                    Some(_) => {}
                }
            }
            tensors.extend(family.name(role).map(|name| (name, (role, expected))));
        }
        Ok(Self { family, config, sources, dtype, tensors })
    }
}

/// A tied model's head is its embedding.
pub(super) fn name_in(source: &Source, role: Role) -> Result<String, WeightsError> {
    let role = if role == Role::Head && source.config.tied { Role::Embedding } else { role };
    source.family.name(role).ok_or_else(|| WeightsError::Missing { tensor: format!("{role:?}") })
}

impl Weights for Average<'_> {
    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.tensors.get(name).map(|(_, shape)| TensorInfo { dtype: self.dtype, shape: shape.clone() })
    }

    fn read(&self, name: &str) -> Result<View, WeightsError> {
        let (role, shape) = self.tensors.get(name).ok_or_else(|| WeightsError::Missing { tensor: name.to_owned() })?;
        let mut sum = vec![0f64; shape.iter().product()];
        for source in &self.sources {
            let values = source.weights.read(&name_in(source, *role)?)?.to_f32();
            sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += f64::from(value));
        }
        let mean: Vec<f32> = sum.into_iter().map(|sum| (sum / self.sources.len() as f64) as f32).collect();
        View::from_f32(&mean, self.dtype, shape.clone())
    }
}
