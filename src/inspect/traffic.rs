//! Texts on their way through a sparse model: who is chosen where, how much the choice matters, and one window to look at token by token.
//!
//! N rows of a forward pass, E experts, D hidden, L layers, K chosen.

use candle_core::{D, DType, Result, Tensor};
use serde::Serialize;
use upcycle_architectures::decoder::{Decoder, DecoderError, Ensemble, LanguageModel, Logits, Probe, Site, Step};
use upcycle_routers::route::Routing;

use super::{
    evaluate::Text,
    routing::{Choices, Observer, Router},
};

/// Windows of each text for which every expert is asked, chosen or not.
const ASKED: usize = 4;
/// Tokens of each text that are kept one by one.
const SAMPLE: usize = 256;

/// What was seen.
#[derive(Debug)]
pub struct Traffic {
    /// [text][layer]
    pub choices: Vec<Vec<Choices>>,
    /// Head-room of each layer: mean over tokens of the variance of the experts' outputs, relative to their mean's square. What little of it
    /// there is, is all that routing can win over averaging the experts (REAP, arXiv 2510.13999, theorem 1). `None` for a dense layer.
    pub head_room: Vec<Option<f64>>,
    /// one per text
    pub samples: Vec<Sample>,
}

/// The beginning of a text's first window.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Sample {
    /// its tokens
    pub tokens: Vec<u32>,
    /// [layer][token][choice]: expert and weight, the heaviest first; a dense layer's list is empty
    pub choices: Vec<Vec<Vec<(u32, f32)>>>,
}

/// Runs the texts through a sparse model. `done` is told of every window that is finished.
pub fn traffic(decoder: &Decoder, texts: &[Text], done: &mut dyn FnMut()) -> std::result::Result<Traffic, DecoderError> {
    follow(decoder, Some(decoder), &Observer::new(decoder, Router::Gates), texts, done)
}

/// Runs the texts through an ensemble: as traffic of one layer, who leads after each token.
pub fn answers(ensemble: &Ensemble, texts: &[Text], done: &mut dyn FnMut()) -> std::result::Result<Traffic, DecoderError> {
    let traffic = follow(ensemble, None, &Observer::of_ensemble(ensemble), texts, done)?;
    Ok(Traffic { head_room: Vec::new(), ..traffic })
}

/// `sparse` is asked what its experts make of a token, chosen or not.
fn follow(
    model: &impl LanguageModel,
    sparse: Option<&Decoder>,
    observer: &Observer,
    texts: &[Text],
    done: &mut dyn FnMut(),
) -> std::result::Result<Traffic, DecoderError> {
    let layers = observer.layers.len();
    let mut variance = vec![Mean::default(); layers];
    let mut choices = Vec::new();
    let mut samples = Vec::new();
    for text in texts {
        let mut observer = observer.clone();
        let mut sample = Sample { tokens: Vec::new(), choices: vec![Vec::new(); layers] };
        let stride = text.windows.len().div_ceil(ASKED).max(1);
        for (w, window) in text.windows.iter().enumerate() {
            let mut tourist = Tourist {
                observer: &mut observer,
                variance: sparse.filter(|_| w % stride == 0).map(|decoder| (decoder, &mut variance)),
                sample: (w == 0).then_some(&mut sample),
            };
            let mut cache = model.scratch();
            model.forward(&mut [Step { tokens: &window.tokens, cache: &mut cache, logits: Logits::None }], &mut tourist)?;
            if w == 0 {
                sample.tokens = window.tokens.iter().take(SAMPLE).copied().collect();
            }
            done();
        }
        choices.push(observer.layers);
        samples.push(sample);
    }
    let head_room = variance.iter().map(|mean| (mean.count > 0).then(|| mean.sum / mean.count as f64)).collect();
    Ok(Traffic { choices, head_room, samples })
}

#[derive(Debug, Clone, Copy, Default)]
struct Mean {
    sum: f64,
    count: usize,
}

struct Tourist<'a> {
    observer: &'a mut Observer,
    variance: Option<(&'a Decoder, &'a mut Vec<Mean>)>,
    sample: Option<&'a mut Sample>,
}

impl Probe for Tourist<'_> {
    fn wants(&self, site: Site) -> bool {
        site == Site::RouterInput && self.variance.is_some()
    }

    fn observe(&mut self, _: Site, layer: usize, x: &Tensor) -> Result<()> {
        let Some((decoder, variance)) = &mut self.variance else { return Ok(()) };
        let experts = decoder.config().moe.as_ref().map_or(0, |moe| moe.experts);
        let outputs: Vec<Tensor> = (0..experts).filter_map(|e| decoder.expert(layer, e, x).transpose()).collect::<Result<_>>()?;
        if outputs.is_empty() {
            return Ok(());
        }
        let outputs = Tensor::stack(&outputs, 0)?.to_dtype(DType::F32)?; // [E, N, D]
        let mean = outputs.mean(0)?; // [N, D]
        let spread = outputs.broadcast_sub(&mean)?.sqr()?.sum(D::Minus1)?.mean(0)?; // [N]
        let relative = (spread / mean.sqr()?.sum(D::Minus1)?)?.to_vec1::<f32>()?;
        let finite = relative.iter().filter(|ratio| ratio.is_finite());
        variance[layer].count += finite.clone().count();
        variance[layer].sum += finite.map(|ratio| f64::from(*ratio)).sum::<f64>();
        Ok(())
    }

    fn route(&mut self, layer: usize, logits: &[f32], routing: &mut Routing) {
        if let Some(sample) = &mut self.sample {
            let tokens = routing.experts.chunks(routing.top_k.max(1)).zip(routing.weights.chunks(routing.top_k.max(1)));
            let choices = tokens.take(SAMPLE).map(|(experts, weights)| experts.iter().copied().zip(weights.iter().copied()).collect());
            sample.choices[layer] = choices.collect();
        }
        self.observer.route(layer, logits, routing);
    }
}
