//! States of prompts, pooled as they come: at no time more than one batch's activations are held.

use candle_core::{DType, Result, Tensor};
use upcycle_architectures::{
    Role, TensorInfo, View, WeightsError,
    decoder::{Decoder, LanguageModel as _, Logits, Probe, Site, Step},
};
use upcycle_routers::init::{Pooled, PromptState};

use super::{CalibrateError, prompts::Prompts};
use crate::source::Source;

/// Tokens of one forward pass, unless a single prompt has more: enough that weights are read few times, few enough to stay small.
const BATCH: usize = 512;

/// Which of a prompt's states count.
#[derive(Clone, Copy)]
pub(super) enum Pool {
    /// the last token's
    Last,
    /// The mean over all positions of the batch in which mergekit-moe runs the prompts of one expert and sign, which it pads to their longest.
    /// A padding position attends to nothing: its state is what the MLPs alone make of the padding token. (So it is with transformers 5; 4.x let
    /// it attend to everything, later tokens too.)
    Mean {
        /// the padding token
        pad: Option<u32>,
    },
}

/// Pooled states that enter each layer, [layer][expert].
pub(super) fn run(decoder: &Decoder, experts: &[Prompts], pool: Pool) -> std::result::Result<Vec<Vec<PromptState>>, CalibrateError> {
    let layers = decoder.config().layers;
    let pads = match pool {
        Pool::Mean { pad: Some(pad) } => Some(pad_states(decoder, pad)?),
        _ => None,
    };
    let mut states = vec![vec![PromptState::default(); experts.len()]; layers];
    let mut queue: Vec<Item> = Vec::new();
    for (expert, prompts) in experts.iter().enumerate() {
        for (negative, prompts) in [(false, &prompts.positive), (true, &prompts.negative)] {
            let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
            queue.extend(prompts.iter().map(|tokens| Item { tokens, expert, negative, padding: longest - tokens.len() }));
        }
    }
    let mut rest = &queue[..];
    while let Some(first) = rest.first() {
        let (mut count, mut total) = (1, first.tokens.len());
        while let Some(next) = rest.get(count).filter(|next| total + next.tokens.len() <= BATCH) {
            (count, total) = (count + 1, total + next.tokens.len());
        }
        let (batch, others) = rest.split_at(count);
        forward(decoder, batch, &mut Collector { batch, pool, pads: pads.as_deref(), states: &mut states })?;
        rest = others;
    }
    check(&states, experts)?;
    Ok(states)
}

/// A prompt and where its state belongs.
struct Item<'a> {
    tokens: &'a [u32],
    expert: usize,
    negative: bool,
    /// padding positions beside it in its batch
    padding: usize,
}

fn forward(decoder: &Decoder, batch: &[Item<'_>], probe: &mut dyn Probe) -> std::result::Result<(), CalibrateError> {
    let mut caches: Vec<_> = batch.iter().map(|_| decoder.scratch()).collect();
    let mut steps: Vec<Step<'_>> =
        batch.iter().zip(&mut caches).map(|(item, cache)| Step { tokens: item.tokens, cache, logits: Logits::None }).collect();
    decoder.forward(&mut steps, probe)?;
    Ok(())
}

struct Collector<'a> {
    batch: &'a [Item<'a>],
    pool: Pool,
    /// [layer], the padding token's state [D]
    pads: Option<&'a [Vec<f32>]>,
    states: &'a mut [Vec<PromptState>],
}

/// What leaves a layer is what enters the next one: the last need not be computed.
fn enters(site: Site, layer: usize) -> Option<usize> {
    match site {
        Site::LayerInput => (layer == 0).then_some(0),
        _ => Some(layer + 1),
    }
}

impl Probe for Collector<'_> {
    fn wants(&self, site: Site) -> bool {
        matches!(site, Site::LayerInput | Site::LayerOutput)
    }

    fn go_on(&self, layer: usize) -> bool {
        layer + 2 < self.states.len()
    }

    fn observe(&mut self, site: Site, layer: usize, x: &Tensor) -> Result<()> {
        let Some(layer) = enters(site, layer).filter(|layer| *layer < self.states.len()) else { return Ok(()) };
        let mut start = 0;
        for item in self.batch {
            let length = item.tokens.len();
            let state = match self.pool {
                Pool::Last => rounded(&x.get(start + length - 1)?)?.to_vec1::<f32>()?,
                Pool::Mean { .. } => {
                    let mut positions = Pooled::default();
                    for row in rounded(&x.narrow(0, start, length)?)?.to_vec2::<f32>()? {
                        positions.add(&row, 1);
                    }
                    if let Some(pads) = self.pads {
                        positions.add(&pads[layer], item.padding);
                    }
                    positions.mean_bf16()
                }
            };
            let expert = &mut self.states[layer][item.expert];
            let pooled = if item.negative { expert.negative.get_or_insert_default() } else { &mut expert.positive };
            pooled.add(&state, 1);
            start += length;
        }
        Ok(())
    }
}

/// To bf16, in which mergekit-moe runs the base: what is done to the states is then done to the same numbers.
fn rounded(x: &Tensor) -> Result<Tensor> {
    x.to_dtype(DType::BF16)?.to_dtype(DType::F32)
}

/// The padding token's state entering each layer, [layer][D].
fn pad_states(decoder: &Decoder, pad: u32) -> std::result::Result<Vec<Vec<f32>>, CalibrateError> {
    struct Alone(Vec<Vec<f32>>);
    impl Probe for Alone {
        fn wants(&self, site: Site) -> bool {
            site == Site::LayerInput
        }
        fn observe(&mut self, _: Site, _: usize, x: &Tensor) -> Result<()> {
            self.0.push(rounded(&x.get(0)?)?.to_vec1()?);
            Ok(())
        }
        fn attends(&self, _: usize) -> bool {
            false
        }
    }
    let mut alone = Alone(Vec::new());
    forward(decoder, &[Item { tokens: &[pad], expert: 0, negative: false, padding: 0 }], &mut alone)?;
    Ok(alone.0)
}

fn check(states: &[Vec<PromptState>], experts: &[Prompts]) -> std::result::Result<(), CalibrateError> {
    for (layer, states) in states.iter().enumerate() {
        for (state, prompts) in states.iter().zip(experts) {
            let mut sums = [Some(&state.positive), state.negative.as_ref()].into_iter().flatten().flat_map(|pooled| &pooled.sum);
            if !sums.all(|v| v.is_finite()) {
                return Err(CalibrateError::NotFinite { expert: prompts.expert.clone(), layer });
            }
        }
    }
    Ok(())
}

/// Summed token embeddings, [1][expert]. Only the rows of tokens that occur are read.
pub(super) fn embeddings(base: &Source, experts: &[Prompts]) -> std::result::Result<Vec<Vec<PromptState>>, CalibrateError> {
    let name = base.family.name(Role::Embedding).ok_or_else(|| WeightsError::Missing { tensor: "embedding".into() })?;
    let table = base.weights.read(&name)?;
    let hidden = base.config.hidden;
    let size = table.info.dtype.bytes(hidden);
    let mut states = Vec::new();
    for prompts in experts {
        let sum = |prompts_of_sign: &[Vec<u32>]| {
            let mut all = Pooled::default();
            for tokens in prompts_of_sign {
                let mut prompt = Pooled::default();
                for &token in tokens {
                    let at = token as usize * size;
                    if at + size > table.data.len() {
                        return Err(CalibrateError::Token { expert: prompts.expert.clone(), token, vocab: table.data.len() / size });
                    }
                    let info = TensorInfo { dtype: table.info.dtype, shape: vec![hidden] };
                    prompt.add(&View { info, data: table.data.slice(at..at + size) }.to_f32(), 1);
                }
                all.add(&prompt.sum, 1);
            }
            Ok(all)
        };
        let negative = if prompts.negative.is_empty() { None } else { Some(sum(&prompts.negative)?) };
        states.push(PromptState { positive: sum(&prompts.positive)?, negative });
    }
    check(std::slice::from_ref(&states), experts)?;
    Ok(vec![states])
}
