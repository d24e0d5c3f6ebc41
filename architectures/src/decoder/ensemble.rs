//! Whole models of one vocabulary as one: each sequence is answered by the one that its tokens speak for.
//!
//! All of them read a sequence until their posteriors ([`upcycle_routers::init::sequence`]) leave one; what comes before that is answered by
//! their mixture. Tokens are read in pieces that end where experts may be dropped, which is at positions of the sequence: so neither the cut
//! into calls nor a neighbour changes who answers. Steering says who may answer, and its bias what is thought before the first token. E experts, A of them left, V vocabulary, N rows of a call, T tokens of a piece.

use std::sync::Arc;

use candle_core::{D, Result, Tensor};
use upcycle_routers::{
    init::sequence::{CHECK, FLOOR, log_posterior},
    route::{Routing, Steering},
};

use super::{Cache, Choice, Decoder, DecoderError, KvType, LanguageModel, Logits, Memory, NoProbe, Probe, Step, cache::Caches, new_tokens};
use crate::config::Config;

/// Several decoders, of which each sequence is answered by one.
///
/// Of an ensemble, a [`Probe`] sees one thing: the logarithms of the posteriors [N, E] as the logits of layer 0, and as their routing who leads.
/// It steers nothing. After an error a cache has forgotten everything.
#[derive(Debug)]
pub struct Ensemble {
    config: Config,
    experts: Vec<Decoder>,
}

/// What an ensemble remembers of one sequence.
#[derive(Debug)]
pub struct EnsembleCache {
    /// of each expert
    caches: Vec<Caches>,
    len: usize,
    left: Vec<Member>,
    /// tokens after which one was left
    decided: usize,
    steering: Option<Arc<Steering>>,
}

/// An expert that is left.
#[derive(Debug)]
struct Member {
    expert: usize,
    cache: Cache,
    /// logarithm of the prior, and of the likelihood of all tokens but the first, which nothing speaks about
    likelihood: f64,
    /// logits [V] of the token that comes next and the logarithm of the sum of their exponentials; of no use to the only one left
    next: Option<(Tensor, f32)>,
}

impl EnsembleCache {
    fn new(caches: Vec<Caches>, steering: Option<Arc<Steering>>) -> Self {
        let prior = steering.clone().unwrap_or_default();
        let member = |expert: usize| {
            let bias = prior.bias(expert);
            let likelihood = if bias.is_finite() { f64::from(bias) } else { 0.0 };
            Member { expert, cache: Cache::new(&caches[expert]), likelihood, next: None }
        };
        Self { len: 0, left: prior.allowed(caches.len()).map(member).collect(), decided: 0, caches, steering }
    }

    /// Tokens held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The experts that are left.
    pub fn left(&self) -> impl Iterator<Item = usize> {
        self.left.iter().map(|member| member.expert)
    }

    /// Forgets all tokens from position `len` on; those before it, too, unless one expert was left by then: what the others made of them is
    /// not kept. [`EnsembleCache::len`] says where to go on.
    pub fn truncate(&mut self, len: usize) {
        match self.left.as_mut_slice() {
            _ if len >= self.len => {}
            [only] if len >= self.decided => {
                only.cache.truncate(len);
                self.len = len;
            }
            _ => *self = Self::new(std::mem::take(&mut self.caches), self.steering.take()),
        }
    }

    /// Counts tokens that all who are left have read, and drops whom they speak against.
    fn advance(&mut self, tokens: usize) {
        self.len += tokens;
        if self.left.len() == 1 || !self.len.is_multiple_of(CHECK) {
            return;
        }
        let likelihoods: Vec<f64> = self.left.iter().map(|member| member.likelihood).collect();
        let mut posterior = log_posterior(&likelihoods).into_iter();
        self.left.retain(|_| posterior.next().is_none_or(|posterior| posterior.is_nan() || posterior >= FLOOR.ln()));
        if let [only] = self.left.as_mut_slice() {
            only.next = None;
            self.decided = self.len;
        }
    }
}

impl Memory for EnsembleCache {
    fn steering(&self) -> Option<&Arc<Steering>> {
        self.steering.as_ref()
    }

    fn len(&self) -> usize {
        self.len
    }

    fn truncate(&mut self, len: usize) {
        self.truncate(len);
    }

    fn rewinds(&self) -> bool {
        self.left.len() == 1 && self.len > self.decided
    }

    fn fork(&self, len: usize) -> Result<Self> {
        let member = |member: &Member| {
            let cache = member.cache.fork(self.len)?;
            Ok(Member { cache, next: member.next.clone(), ..*member })
        };
        let left = self.left.iter().map(member).collect::<Result<_>>()?;
        let mut fork = Self { caches: self.caches.clone(), left, steering: self.steering.clone(), ..*self };
        fork.truncate(len);
        Ok(fork)
    }

    fn growth(&self, tokens: usize) -> usize {
        self.left.iter().map(|member| member.cache.growth(tokens)).sum()
    }
}

impl Ensemble {
    /// The experts share a vocabulary: ids beyond the smallest are not known. Their other dimensions may differ; what [`LanguageModel::config`]
    /// gives is the first expert's, with the vocabulary and the context that all have.
    pub fn new(experts: Vec<Decoder>) -> std::result::Result<Self, DecoderError> {
        let least = |of: fn(&Config) -> usize| experts.iter().map(|expert| of(&expert.config)).min().ok_or(DecoderError::NoExperts);
        let (vocab, max_positions) = (least(|config| config.vocab)?, least(|config| config.max_positions)?);
        Ok(Self { config: Config { vocab, max_positions, ..experts[0].config.clone() }, experts })
    }

    /// The same with keys and values of another type: [`Decoder::with_kv_type`].
    pub fn with_kv_type(self, kv_type: KvType) -> std::result::Result<Self, DecoderError> {
        let experts = self.experts.into_iter().map(|expert| expert.with_kv_type(kv_type)).collect::<std::result::Result<_, _>>()?;
        Ok(Self { experts, ..self })
    }

    /// E
    pub fn experts(&self) -> usize {
        self.experts.len()
    }

    /// Reads the runs to their ends, piece by piece.
    fn read(&self, runs: &mut [Run<'_>]) -> std::result::Result<(), DecoderError> {
        loop {
            let pieces: Vec<&[u32]> = runs.iter().map(Run::piece).collect();
            if pieces.iter().all(|piece| piece.is_empty()) {
                return Ok(());
            }
            let mut logits: Vec<Vec<Tensor>> = runs.iter().map(|_| Vec::new()).collect(); // [run][expert left] of [T, V]
            for (e, expert) in self.experts.iter().enumerate() {
                let mut steps = Vec::new();
                let mut readers = Vec::new();
                for (r, (run, &tokens)) in runs.iter_mut().zip(&pieces).enumerate() {
                    // To weigh several experts takes what each of them says of every token.
                    let wanted = if run.cache.left.len() == 1 { run.wanted } else { Logits::All };
                    let reader = run.cache.left.iter_mut().find(|member| member.expert == e && !tokens.is_empty());
                    if let Some(member) = reader {
                        readers.push((r, wanted.rows(tokens.len())));
                        steps.push(Step { tokens, cache: &mut member.cache, logits: wanted });
                    }
                }
                let all = expert.forward(&mut steps, &mut NoProbe)?.narrow(D::Minus1, 0, self.config.vocab)?;
                let mut start = 0;
                for (r, rows) in readers {
                    logits[r].push(all.narrow(0, start, rows)?);
                    start += rows;
                }
            }
            for ((run, piece), logits) in runs.iter_mut().zip(pieces).zip(logits).filter(|((_, piece), _)| !piece.is_empty()) {
                run.take(piece, logits, self.experts.len())?;
            }
        }
    }
}

impl LanguageModel for Ensemble {
    type Cache = EnsembleCache;

    fn config(&self) -> &Config {
        &self.config
    }

    fn steered(&self, steering: Option<Arc<Steering>>) -> EnsembleCache {
        EnsembleCache::new(self.experts.iter().map(|expert| expert.caches.clone()).collect(), steering)
    }

    fn choice(&self) -> Option<Choice> {
        Some(Choice { experts: self.experts(), top_k: 1, layers: vec![0], whole: true })
    }

    fn held(&self) -> usize {
        self.experts.iter().map(|expert| expert.caches.held()).sum()
    }

    fn preload(&self) {
        self.experts.iter().for_each(LanguageModel::preload);
    }

    fn forward(&self, steps: &mut [Step<'_, EnsembleCache>], probe: &mut dyn Probe) -> std::result::Result<Tensor, DecoderError> {
        let experts = self.experts.len();
        if let Some(step) = steps.iter().find(|step| step.cache.caches.len() != experts) {
            return Err(DecoderError::Cache { expected: experts, found: step.cache.caches.len() });
        }
        let tokens = new_tokens(steps, self.config.vocab)?;
        let mut runs: Vec<Run<'_>> = steps.iter_mut().map(Run::new).collect();
        if let Err(error) = self.read(&mut runs) {
            steps.iter_mut().for_each(|step| step.cache.truncate(0));
            return Err(error);
        }
        let posterior: Vec<f32> = runs.iter_mut().flat_map(|run| std::mem::take(&mut run.posterior)).collect(); // [N, E]
        let leader = |row: &[f32]| (0..experts).max_by(|&a, &b| row[a].total_cmp(&row[b]).then(b.cmp(&a))).unwrap_or(0);
        let leaders: Vec<usize> = posterior.chunks_exact(experts).map(leader).collect();
        let weights = leaders.iter().zip(posterior.chunks_exact(experts)).map(|(&leader, row)| row[leader].exp()).collect();
        let mut routing = Routing { top_k: 1, experts: leaders.iter().map(|&leader| leader as u32).collect(), weights };
        if !tokens.is_empty() {
            probe.route(0, &posterior, &mut routing);
        }
        let rows: Vec<Tensor> = runs.into_iter().flat_map(|run| run.rows).collect();
        if rows.is_empty() {
            let first = &self.experts[0];
            return Ok(Tensor::zeros((0, self.config.vocab), candle_core::DType::F32, &first.device)?);
        }
        Ok(Tensor::cat(&rows, 0)?)
    }

    fn answering(&self, cache: &EnsembleCache) -> Option<usize> {
        cache.left.iter().max_by(|a, b| a.likelihood.total_cmp(&b.likelihood)).map(|member| member.expert)
    }
}

/// One sequence on its way through a call.
struct Run<'a> {
    /// what is still to be read
    rest: &'a [u32],
    cache: &'a mut EnsembleCache,
    wanted: Logits,
    /// of the wanted logits, [.., V] each
    rows: Vec<Tensor>,
    /// logarithms of the posteriors behind each token read, row-major [.., E]
    posterior: Vec<f32>,
}

impl<'a> Run<'a> {
    fn new(step: &'a mut Step<'_, EnsembleCache>) -> Self {
        Self { rest: step.tokens, cache: step.cache, wanted: step.logits, rows: Vec::new(), posterior: Vec::new() }
    }

    /// What is read next: all by the only expert left, and by several until some of them may be dropped.
    fn piece(&self) -> &'a [u32] {
        let most = if self.cache.left.len() == 1 { usize::MAX } else { CHECK - self.cache.len % CHECK };
        &self.rest[..self.rest.len().min(most)]
    }

    /// Takes what the experts left say of a piece: [T, V] from each.
    fn take(&mut self, piece: &[u32], logits: Vec<Tensor>, experts: usize) -> Result<()> {
        self.rest = &self.rest[piece.len()..];
        let posteriors = if self.cache.left.len() == 1 {
            self.rows.extend(logits);
            vec![vec![0.0]; piece.len()]
        } else {
            let wanted = match self.wanted {
                Logits::Last if !self.rest.is_empty() => Logits::None,
                wanted => wanted,
            };
            self.weigh(piece, &logits, wanted.rows(piece.len()))?
        };
        for posterior in posteriors {
            let start = self.posterior.len();
            self.posterior.resize(start + experts, f32::NEG_INFINITY);
            for (member, posterior) in self.cache.left.iter().zip(posterior) {
                self.posterior[start + member.expert] = posterior as f32;
            }
        }
        self.cache.advance(piece.len());
        Ok(())
    }

    /// Counts what the piece's tokens say about the experts, and mixes the last `wanted` rows of their logits. Returns the logarithms of the
    /// posteriors, [token][expert left].
    fn weigh(&mut self, piece: &[u32], logits: &[Tensor], wanted: usize) -> Result<Vec<Vec<f64>>> {
        let tokens = piece.len();
        let mut likelihoods = vec![Vec::with_capacity(logits.len()); tokens]; // [T][A]
        let mut totals = Vec::with_capacity(logits.len()); // [A][T]
        for (member, logits) in self.cache.left.iter_mut().zip(logits) {
            let total = logits.log_sum_exp(D::Minus1)?.to_vec1::<f32>()?; // [T]
            let mut said = match &member.next {
                Some((next, total)) => vec![next.narrow(0, piece[0] as usize, 1)?.to_vec1::<f32>()?[0] - total],
                None => vec![0.0],
            };
            if tokens > 1 {
                let targets = Tensor::new(&piece[1..], logits.device())?.unsqueeze(1)?;
                let chosen = logits.narrow(0, 0, tokens - 1)?.contiguous()?.gather(&targets, 1)?.flatten_all()?.to_vec1::<f32>()?;
                said.extend(chosen.iter().zip(&total).map(|(logit, total)| logit - total));
            }
            for (all, said) in likelihoods.iter_mut().zip(said) {
                member.likelihood += f64::from(said);
                all.push(member.likelihood);
            }
            member.next = Some((logits.narrow(0, tokens - 1, 1)?.squeeze(0)?.force_contiguous()?, total[tokens - 1]));
            totals.push(total);
        }
        let posteriors: Vec<Vec<f64>> = likelihoods.iter().map(|all| log_posterior(all)).collect();
        if wanted > 0 {
            let first = tokens - wanted;
            // Probabilities do not say how large logits are, on which repetition penalties depend: their mean total is put back.
            let mean = |t: usize| posteriors[t].iter().zip(&totals).map(|(p, total)| p.exp() * f64::from(total[t])).sum::<f64>();
            let means: Vec<f64> = (first..tokens).map(mean).collect();
            let weighted = logits.iter().zip(&totals).enumerate().map(|(a, (logits, totals))| {
                let shift = |t: usize| (posteriors[t][a] - f64::from(totals[t]) + means[t - first]) as f32;
                let shifts = Tensor::from_vec((first..tokens).map(shift).collect(), (wanted, 1), logits.device())?;
                logits.narrow(0, first, wanted)?.broadcast_add(&shifts)
            });
            let weighted = Tensor::stack(&weighted.collect::<Result<Vec<_>>>()?, 0)?; // [A, wanted, V]
            self.rows.push(weighted.log_sum_exp(0)?);
        }
        Ok(posteriors)
    }
}
