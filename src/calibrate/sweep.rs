//! Gates, shared weights and repaired experts from text, by least squares and a convex fit of the gates, in one sweep over the layers.
//!
//! All experts walk through their texts in lock-step, twice: in their *own* model, which says what should come out, and in the *composite*,
//! as far as it is fitted, which says what goes in. Layer by layer the sweep solves, in this order,
//!
//! 1. q, k, v: the matrix that makes from the composite's inputs what each expert's own makes from its own inputs, by least squares, held
//!    near the experts' mean weighted by their inputs' second moments (`RegMean`, arXiv 2212.09849);
//! 2. o: the matrix that brings the residual stream to where it is in the expert's own model;
//! 3. the gate, on the composite's true router inputs, labelled with the text's expert, openings among them;
//! 4. the experts' down projections, together, under the routing that this gate gives: they make up for wrongly routed tokens and for
//!    what the shared weights could not do. The tokens of a fold are routed by a gate fitted on the other folds, so that routing goes
//!    wrong here as often as it will on new text.
//!
//! Then the head, like q. Besides the states of all tokens, only one layer's weights and moments are held. N tokens of all texts, E experts,
//! D hidden, F ffn, V vocabulary.

use std::{collections::BTreeMap, ops::Range, path::Path};

use candle_core::{DType, Device, Result as TensorResult, Tensor};
use upcycle_architectures::{
    AttentionPart, LayerRole, Projection, Role, View, Weights as _,
    decoder::{Block, Sequences},
};
use upcycle_routers::{
    gate::Gate,
    init::{self, FitError, FitReport, Fitted},
    route::{Rule, route},
    statistics::{LayerStatistics, Shape},
};

use super::{
    CalibrateError, FOLDS,
    solve::{self, Factor, Seen},
    store::{Found, Overlay, Store, Writer},
    text::Corpus,
};
use crate::{
    plan::Plan,
    recipe::{Recipe, Shared},
    source::{Positioned, Source},
};

/// Router inputs of each expert's text that a gate is fitted to as they are; more are summed up.
const ROWS: usize = 16_384;
/// How strongly a down projection is held to the expert's own, relative to the mean diagonal of its inputs' moments.
const REPAIR_RIDGE: f64 = 0.1;
/// Rounds of solving for one expert after the other.
const REPAIR_ROUNDS: usize = 2;
/// Added to each token's share of a text when embeddings are averaged by use, relative to a uniform share.
const UNUSED: f32 = 0.02;

/// Rows that an expert was picked for.
struct Picked {
    /// of all N, `[n]`
    ids: Vec<u32>,
    /// hidden states times routing weights, [n, F]
    a: Tensor,
}

impl Picked {
    fn ids(&self) -> TensorResult<Tensor> {
        Tensor::new(&self.ids[..], self.a.device())
    }

    /// Second moments of `a`, [F, F], in the rows `wanted`, with weights [N, 1]; `None` without rows.
    fn gram(&self, weight: &Tensor, wanted: impl Fn(usize) -> bool) -> TensorResult<Option<Tensor>> {
        let wanted = |place: &u32| wanted(self.ids[*place as usize] as usize);
        let places: Vec<u32> = (0..self.ids.len() as u32).filter(wanted).collect();
        if places.is_empty() {
            return Ok(None);
        }
        let a = if places.len() == self.ids.len() {
            self.a.clone()
        } else {
            self.a.index_select(&Tensor::new(&places[..], self.a.device())?, 0)?
        };
        let ids: Vec<u32> = places.iter().map(|place| self.ids[*place as usize]).collect();
        solve::gram(&a, &weight.index_select(&Tensor::new(ids, self.a.device())?, 0)?).map(Some)
    }
}

/// What is fitted besides the gates.
pub(super) struct Sweep<'a> {
    pub recipe: &'a Recipe,
    pub plan: &'a Plan,
    pub base: &'a Source,
    /// the routed experts' sources
    pub experts: Vec<&'a Source>,
    pub device: &'a Device,
}

/// All texts, end to end, expert by expert.
struct Texts {
    own: Vec<Sequences>,
    all: Sequences,
    rows: Vec<Range<usize>>,
    /// [N, 1], the same sum for every expert, mean 1; zero for openings. Tokens that do not count are among them: whoever comes after them
    /// attends to them.
    weight: Tensor,
    /// which tokens say something about their expert: the ones that gates are fitted to [N]
    counts: Vec<bool>,
    labels: Vec<u32>,
    folds: Vec<usize>,
}

impl Texts {
    /// Second moments [in, in] of each expert's own inputs `[n_e, in]`.
    fn grams(&self, own: &[Tensor]) -> TensorResult<Vec<Tensor>> {
        own.iter().zip(&self.rows).map(|(inputs, rows)| solve::gram(inputs, &self.weight.narrow(0, rows.start, rows.len())?)).collect()
    }
}

impl Sweep<'_> {
    /// Runs the sweep over the corpus; tensors go to the file `path`. `progress` is told the layers done.
    pub fn run(&self, corpus: &Corpus, path: &Path, keep: &Path, progress: &dyn Fn(usize)) -> Result<Store, CalibrateError> {
        let texts = self.texts(corpus)?;
        let mut store = Writer::create(path)?;
        let mut own =
            self.experts.iter().zip(&texts.own).map(|(e, texts)| embed(e, None, texts, self.device)).collect::<Result<Vec<_>, _>>()?;
        let embedding = if self.fits() { Some(self.embedding(&texts)?) } else { self.averaged(Role::Embedding)? };
        let mut c = embed(self.base, embedding.as_ref(), &texts.all, self.device)?; // [N, D]
        if self.fits() {
            self.put(&mut store, Role::Embedding, embedding.as_ref())?;
        }
        let mut gates = Vec::new();
        let (mut notes, mut right) = (Vec::new(), vec![0.0; self.experts.len()]);
        for l in 0..self.base.config.layers {
            let (gate, report) = self.layer(l, &texts, &mut own, &mut c, &mut store)?;
            gates.push(gate);
            notes.push(format!("layer {l}: {}", report.why));
            right.iter_mut().zip(&report.accuracy).for_each(|(sum, right)| *sum += right / self.base.config.layers as f64);
            progress(l + 1);
        }
        if self.fits() {
            let head = self.head(&texts, &own, &c)?;
            self.put(&mut store, Role::Head, Some(&head))?;
        }
        Ok(store.finish(Found { gates, notes, right }, keep)?)
    }

    fn fits(&self) -> bool {
        self.recipe.shared == Shared::Fit
    }

    fn texts(&self, corpus: &Corpus) -> Result<Texts, CalibrateError> {
        let (mut own, mut rows, mut counts, mut labels, mut folds) = (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut weight: Vec<f32> = Vec::new();
        let mut all = Vec::new();
        for (e, sequences) in corpus.experts.iter().enumerate() {
            let start = labels.len();
            let whole: usize = sequences.iter().filter(|sequence| !sequence.opening).map(|sequence| sequence.tokens.len()).sum();
            for (i, sequence) in sequences.iter().enumerate() {
                counts.extend_from_slice(&sequence.counts);
                let share = if sequence.opening { 0.0 } else { 1.0 / whole as f32 };
                weight.extend(sequence.tokens.iter().map(|_| share));
                labels.extend(sequence.tokens.iter().map(|_| e as u32));
                folds.extend(sequence.tokens.iter().map(|_| i * FOLDS / sequences.len()));
            }
            let tokens: Vec<Vec<u32>> = sequences.iter().map(|s| s.tokens.clone()).collect();
            all.extend(tokens.clone());
            own.push(Sequences::new(tokens, &self.base.config, self.device)?);
            rows.push(start..labels.len());
        }
        let n = labels.len();
        let weight = (Tensor::from_vec(weight, (n, 1), self.device)? * (n as f64 / rows.len() as f64))?;
        Ok(Texts { own, all: Sequences::new(all, &self.base.config, self.device)?, rows, weight, counts, labels, folds })
    }

    /// One layer: `own` and `c` go in as the residual streams entering it and come out as those leaving it.
    fn layer(
        &self,
        l: usize,
        texts: &Texts,
        own: &mut [Tensor],
        c: &mut Tensor,
        store: &mut Writer,
    ) -> Result<(Gate, FitReport), CalibrateError> {
        let blocks =
            self.experts.iter().map(|e| Block::load(e.family, &e.config, &Positioned(e), l, self.device)).collect::<Result<Vec<_>, _>>()?;
        let mut over = BTreeMap::new();
        for role in self.small_roles(l) {
            self.place(&mut over, role, self.averaged(role)?);
        }

        // What comes out of attention in the experts' own models.
        let inputs = blocks.iter().zip(&*own).map(|(b, x)| b.attention_input(x)).collect::<TensorResult<Vec<_>>>()?;
        let mixed =
            blocks.iter().zip(&inputs).zip(&texts.own).map(|((b, z), texts)| b.attend(z, texts)).collect::<TensorResult<Vec<_>>>()?;
        let attended = blocks.iter().zip(&*own).zip(&mixed).map(|((b, x), z)| x + b.project(AttentionPart::O, z)?);
        let attended = attended.collect::<TensorResult<Vec<_>>>()?;

        // The composite's attention.
        let attention = |part| Role::Layer(l, LayerRole::Attention(part));
        let z = self.block(l, &over)?.attention_input(c)?; // [N, D]
        let seen = self.fits().then(|| Ok::<_, CalibrateError>((texts.grams(&inputs)?, Seen::new(&z, &texts.weight)?))).transpose()?;
        for (part, bias) in
            [(AttentionPart::Q, AttentionPart::QBias), (AttentionPart::K, AttentionPart::KBias), (AttentionPart::V, AttentionPart::VBias)]
        {
            if let Some((own, seen)) = &seen {
                let targets = blocks.iter().zip(&inputs).map(|(b, z)| b.project(part, z)).collect::<TensorResult<Vec<_>>>()?;
                let targets = self.without_bias(Tensor::cat(&targets, 0)?, attention(bias), self.base.config.qkv_bias)?;
                let matrix = self.fit_matrix(attention(part), own, seen, &targets)?;
                self.put(store, attention(part), Some(&matrix))?;
                self.place(&mut over, attention(part), Some(matrix));
            } else {
                self.place(&mut over, attention(part), self.averaged(attention(part))?);
            }
        }
        drop(seen);
        let z = self.block(l, &over)?.attend(&z, &texts.all)?; // [N, H hd]
        if self.fits() {
            let attended = Tensor::cat(&attended, 0)?;
            let weight = relative(&texts.weight, &attended)?;
            let targets = (attended - &*c)?;
            let targets = self.without_bias(targets, attention(AttentionPart::OBias), self.base.config.o_bias)?;
            let matrix = self.fit_matrix(attention(AttentionPart::O), &texts.grams(&mixed)?, &Seen::new(&z, &weight)?, &targets)?;
            self.put(store, attention(AttentionPart::O), Some(&matrix))?;
            self.place(&mut over, attention(AttentionPart::O), Some(matrix));
        } else {
            self.place(&mut over, attention(AttentionPart::O), self.averaged(attention(AttentionPart::O))?);
        }
        drop((inputs, mixed));
        let shared = self.block(l, &over)?;
        let m = (&*c + shared.project(AttentionPart::O, &z)?)?; // [N, D]

        // What comes out of the layer in the experts' own models.
        for ((x, block), m) in own.iter_mut().zip(&blocks).zip(&attended) {
            *x = (m + dense(block.mlp_hidden(&block.mlp_input(m)?).and_then(|h| h.map(|h| block.mlp_output(&h)).transpose()))??)?;
        }
        let target = Tensor::cat(own, 0)?;
        let weight = relative(&texts.weight, &target)?;
        let target = (target - &m)?;

        let r = shared.mlp_input(&m)?; // [N, D]
        let (gate, held_out, report) = self.gate(l, texts, &r)?;
        let routing = route(&held_out, self.experts.len(), Rule { top_k: self.plan.top_k(), normalise: true });

        // The experts under that routing.
        let mut rest = target.clone();
        let mut chosen = Vec::new();
        for (e, block) in blocks.iter().enumerate() {
            let picks = routing.experts.iter().zip(&routing.weights).enumerate().filter(|(_, (expert, _))| **expert as usize == e);
            let (ids, gains): (Vec<u32>, Vec<f32>) = picks.map(|(i, (_, weight))| ((i / routing.top_k) as u32, *weight)).unzip();
            let n = ids.len();
            if n == 0 {
                chosen.push(Picked { ids, a: Tensor::zeros((0, self.base.config.ffn), DType::F32, self.device)? });
                continue;
            }
            let rows = ids;
            let ids = Tensor::new(&rows[..], self.device)?;
            // Where norms are folded, an expert sees its own.
            let seen = if self.fits() { block.mlp_input(&m.index_select(&ids, 0)?)? } else { r.index_select(&ids, 0)? };
            let gains = Tensor::from_vec(gains, (n, 1), self.device)?;
            let a = dense(block.mlp_hidden(&seen))??; // [n, F]
            // In this order, products are rounded as in the expert's own model.
            let y = dense(block.mlp_output(&a))??.broadcast_mul(&gains)?; // [n, D]
            rest = rest.index_add(&ids, &y.neg()?, 0)?;
            chosen.push(Picked { ids: rows, a: a.broadcast_mul(&gains)? });
        }
        if self.plan.repaired {
            self.repair(l, texts, &weight, &chosen, &mut rest, store)?;
        }
        *c = (m + (target - rest)?)?;
        Ok((gate, report))
    }

    /// The gate for router inputs `r`, [N, D]; logits, [N, E], of every token from the gate that did not see its fold; and how it came about.
    fn gate(&self, l: usize, texts: &Texts, r: &Tensor) -> Result<(Gate, Vec<f32>, FitReport), CalibrateError> {
        let (n, hidden) = r.dims2()?;
        let experts = self.experts.len();
        let host = |tensor: &Tensor| tensor.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>();
        let inputs = host(r)?;
        let mut statistics = LayerStatistics::new(Shape { hidden, domains: experts, folds: FOLDS, rows: ROWS });
        let part = |i: usize| (texts.labels[i], texts.folds[i]);
        let failed = |cause: FitError| CalibrateError::Gate { layer: l, cause };
        for run in (0..n).collect::<Vec<_>>().chunk_by(|a, b| part(*a) == part(*b)) {
            let counted = run.iter().filter(|i| texts.counts[**i]);
            let rows: Vec<f32> = counted.flat_map(|i| &inputs[i * hidden..(i + 1) * hidden]).copied().collect();
            let (domain, fold) = part(run[0]);
            statistics.add(domain as usize, fold, &rows).map_err(|cause| failed(cause.into()))?;
        }
        let Fitted { gate, without, report } = init::fit(self.recipe.gate_mode.candidates(), &statistics).map_err(failed)?;
        let mut logits = Vec::with_capacity(n * experts);
        for run in (0..n).collect::<Vec<_>>().chunk_by(|a, b| texts.folds[*a] == texts.folds[*b]) {
            let gate = without.get(texts.folds[run[0]]).unwrap_or(&gate);
            let gate = Tensor::from_slice(&gate.weight, (experts, hidden), self.device)?;
            logits.extend(host(&r.narrow(0, run[0], run.len())?.matmul(&gate.t()?)?)?);
        }
        Ok((gate, logits, report))
    }

    /// Changes all down projections by the step of [`changes`](Self::changes), scaled by how much of it serves the fold that the same step from
    /// the other folds has not seen.
    fn repair(
        &self,
        l: usize,
        texts: &Texts,
        weight: &Tensor,
        chosen: &[Picked],
        rest: &mut Tensor,
        store: &mut Writer,
    ) -> Result<(), CalibrateError> {
        let unseen = |fold: &usize| f32::from(*fold == 0);
        let unseen = Tensor::from_vec(texts.folds.iter().map(unseen).collect::<Vec<_>>(), (texts.folds.len(), 1), self.device)?;
        let test = (weight * &unseen)?;
        let (mut all, mut known) = (Vec::new(), Vec::new());
        for picked in chosen {
            let whole = picked.gram(weight, |_| true)?;
            let has_known = picked.ids.iter().any(|row| texts.folds[*row as usize] != 0);
            let unseen = picked.gram(weight, |row| texts.folds[row] == 0)?;
            known.push(match (&whole, unseen) {
                (Some(whole), Some(unseen)) if has_known => Some((whole - unseen)?),
                (whole, None) => whole.clone(),
                _ => None,
            });
            all.push(whole);
        }
        let mut left = rest.clone();
        self.changes(&(weight - &test)?, chosen, &known, &mut left)?;
        // The size of the step that leaves the least of the fold's errors.
        let step = (&*rest - left)?;
        let along = |a: &Tensor| (a * &step)?.broadcast_mul(&test)?.sum_all()?.to_scalar::<f32>();
        let (gained, length) = (along(rest)?, along(&step)?);
        let size = if length > 0.0 { f64::from(gained / length).clamp(0.0, 1.0) } else { 1.0 };
        tracing::debug!("layer {l}: experts are repaired by {size:.2} of the step");

        let mut left = rest.clone();
        let changes = self.changes(weight, chosen, &all, &mut left)?;
        *rest = ((&*rest * (1.0 - size))? + (left * size)?)?;
        for (e, change) in changes.iter().enumerate() {
            let role = Role::Layer(l, LayerRole::Mlp(Projection::Down));
            let repaired = (self.tensor(self.experts[e], role)? + (change * size)?)?;
            self.put(store, Role::Layer(l, LayerRole::Expert(e, Projection::Down)), Some(&self.round(&repaired)?))?;
        }
        Ok(())
    }

    /// All down projections at once, one expert after the other (block Gauss-Seidel): minimises over the changes `C_e`
    /// `sum_i w_i |rest_i - sum_e a_ie C_e^T|^2 + ridge |C_e|^2`, with `grams` [F, F] the weighted second moments of each expert's `a_e`, if it has
    /// any. Takes what they do off `rest`.
    fn changes(
        &self,
        weight: &Tensor,
        chosen: &[Picked],
        grams: &[Option<Tensor>],
        rest: &mut Tensor,
    ) -> Result<Vec<Tensor>, CalibrateError> {
        let experts = chosen.iter().zip(grams).map(|(picked, gram)| {
            let Some(gram) = gram else { return Ok(None) };
            let ids = picked.ids()?;
            Ok(Some((weight.index_select(&ids, 0)?, ids, &picked.a, gram, Factor::new(gram, REPAIR_RIDGE)?)))
        });
        let experts = experts.collect::<Result<Vec<_>, CalibrateError>>()?;
        let (d, f) = (self.base.config.hidden, self.base.config.ffn);
        let mut changes = vec![Tensor::zeros((d, f), DType::F32, self.device)?; chosen.len()];
        for _ in 0..REPAIR_ROUNDS {
            for (expert, change) in experts.iter().zip(&mut changes) {
                let Some((weight, ids, a, gram, factor)) = expert else { continue };
                let left = rest.index_select(ids, 0)?.broadcast_mul(weight)?;
                let b = (left.t()?.matmul(a)? + change.matmul(gram)?)?; // [D, F]
                let next = factor.solve(&b)?;
                *rest = rest.index_add(ids, &a.matmul(&(&*change - &next)?.t()?)?, 0)?;
                *change = next;
            }
        }
        Ok(changes)
    }

    /// The shared matrix of a role, from the moments of each expert's own inputs, what the composite sees and targets [N, out] for it.
    fn fit_matrix(&self, role: Role, own: &[Tensor], seen: &Seen<'_>, targets: &Tensor) -> Result<View, CalibrateError> {
        self.round(&seen.fit_near(&self.weighted_mean(role, own)?, targets)?)
    }

    /// The experts' matrices of a role, weighted by the moments of their own inputs; [out, in].
    fn weighted_mean(&self, role: Role, own: &[Tensor]) -> Result<Tensor, CalibrateError> {
        solve::weighted_mean(self.experts.iter().zip(own).map(|(source, gram)| Ok((self.tensor(source, role)?, gram))))
    }

    /// The head [V, D], fitted like q but from moments alone: N logits of V entries would not fit into memory.
    fn head(&self, texts: &Texts, own: &[Tensor], c: &Tensor) -> Result<View, CalibrateError> {
        let eps = self.base.config.norm_eps as f32;
        let norm = |source: &Source, x: &Tensor| {
            let weight = self.tensor(source, Role::FinalNorm)?;
            Ok::<_, CalibrateError>(candle_nn::ops::rms_norm(&x.contiguous()?, &weight, eps)?)
        };
        let outputs = self.experts.iter().zip(own).map(|(e, x)| norm(e, x)).collect::<Result<Vec<_>, _>>()?;
        let shared = match self.averaged(Role::FinalNorm)? {
            Some(view) => view.to_tensor(DType::F32, self.device)?,
            None => self.tensor(self.base, Role::FinalNorm)?,
        };
        let z = candle_nn::ops::rms_norm(&c.contiguous()?, &shared, eps)?;
        let start = self.weighted_mean(Role::Head, &texts.grams(&outputs)?)?;
        let weighted = z.broadcast_mul(&texts.weight)?;
        let gram = weighted.t()?.matmul(&z)?;
        let mut b = start.matmul(&gram)?.neg()?; // [V, D]
        for ((source, own), rows) in self.experts.iter().zip(&outputs).zip(&texts.rows) {
            let cross = own.t()?.matmul(&weighted.narrow(0, rows.start, rows.len())?)?;
            b = (b + self.tensor(source, Role::Head)?.matmul(&cross)?)?;
        }
        self.round(&solve::correct(&start, &gram, &b)?)
    }

    /// Embeddings [V, D]: the experts' mean, each token weighted by how much of an expert's text it is.
    fn embedding(&self, texts: &Texts) -> Result<View, CalibrateError> {
        let (v, d) = (self.base.config.vocab, self.base.config.hidden);
        let (mut sum, mut total) = (vec![0f32; v * d], vec![0f32; v]);
        for (source, sequences) in self.experts.iter().zip(&texts.own) {
            let mut share = vec![UNUSED / v as f32; v];
            let one = 1.0 / sequences.tokens().count().max(1) as f32;
            sequences.tokens().for_each(|token| share[token as usize] += one);
            let rows = view(source, Role::Embedding)?.to_f32();
            for ((sum, row), (share, total)) in sum.chunks_exact_mut(d).zip(rows.chunks_exact(d)).zip(share.iter().zip(&mut total)) {
                sum.iter_mut().zip(row).for_each(|(sum, value)| *sum += share * value);
                *total += share;
            }
        }
        sum.chunks_exact_mut(d).zip(&total).for_each(|(row, total)| row.iter_mut().for_each(|value| *value /= total));
        Ok(View::from_f32(&sum, self.plan.dtype, vec![v, d])?)
    }

    /// Norms, biases and whatever else of attention is not a matrix.
    fn small_roles(&self, l: usize) -> Vec<Role> {
        let tensors = self.base.family.tensors(&self.base.config).into_iter();
        tensors
            .filter(|(role, shape)| {
                matches!(role, Role::Layer(layer, part) if *layer == l && !matches!(part, LayerRole::Mlp(_) | LayerRole::MlpBias(_)))
                    && shape.len() == 1
            })
            .map(|(role, _)| role)
            .collect()
    }

    /// The composite's attention and norms of a layer; its MLP is the base's, and not used.
    fn block(&self, l: usize, over: &BTreeMap<String, View>) -> Result<Block, CalibrateError> {
        let weights = Overlay { over: over.clone(), under: &Positioned(self.base) };
        Ok(Block::load(self.base.family, &self.base.config, &weights, l, self.device)?)
    }

    /// The mean of the experts' tensors, as the plan has it; `None` where the composite has the base's.
    fn averaged(&self, role: Role) -> Result<Option<View>, CalibrateError> {
        if self.recipe.shared == Shared::Base {
            return Ok(None);
        }
        let views = self.experts.iter().map(|source| Ok(view(source, role)?.to_f32())).collect::<Result<Vec<_>, CalibrateError>>()?;
        let count = views.len() as f64;
        let mean = (0..views[0].len()).map(|i| (views.iter().map(|v| f64::from(v[i])).sum::<f64>() / count) as f32);
        let shape = view(self.base, role)?.info.shape;
        Ok(Some(View::from_f32(&mean.collect::<Vec<_>>(), self.plan.dtype, shape)?))
    }

    fn without_bias(&self, targets: Tensor, bias: Role, present: bool) -> Result<Tensor, CalibrateError> {
        if !present {
            return Ok(targets);
        }
        let bias = match self.averaged(bias)? {
            Some(view) => view.to_tensor(DType::F32, self.device)?,
            None => self.tensor(self.base, bias)?,
        };
        Ok(targets.broadcast_sub(&bias)?)
    }

    fn tensor(&self, source: &Source, role: Role) -> Result<Tensor, CalibrateError> {
        Ok(view(source, role)?.to_tensor(DType::F32, self.device)?)
    }

    /// Rounded to the output's type, so that what follows sees what is written.
    fn round(&self, tensor: &Tensor) -> Result<View, CalibrateError> {
        let values = tensor.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
        Ok(View::from_f32(&values, self.plan.dtype, tensor.dims().to_vec())?)
    }

    fn put(&self, store: &mut Writer, role: Role, view: Option<&View>) -> Result<(), CalibrateError> {
        if let (Some(view), Some(name)) = (view, self.plan.family().name(role)) {
            store.put(name, view)?;
        }
        Ok(())
    }

    fn place(&self, over: &mut BTreeMap<String, View>, role: Role, view: Option<View>) {
        if let (Some(view), Some(name)) = (view, self.base.family.name(role)) {
            over.insert(name, view);
        }
    }
}

/// Weights [N, 1] for errors in a residual stream [N, D], of mean 1: over its mean square, as a norm stands in front of all that reads it. Without
/// that, the few tokens whose states are a thousand times as large as others' (a text's first; arXiv 2402.17762) would decide every fit.
fn relative(weight: &Tensor, stream: &Tensor) -> TensorResult<Tensor> {
    let relative = weight.div(&(stream.sqr()?.mean_keepdim(1)? + 1e-12)?)?;
    relative.broadcast_div(&relative.mean_all()?)
}

/// A tensor of a dense model; a tied model's head is its embedding.
fn view(source: &Source, role: Role) -> Result<View, CalibrateError> {
    let role = if role == Role::Head && source.config.tied { Role::Embedding } else { role };
    Ok(Positioned(source).read(&source.family.name(role).unwrap_or_default())?)
}

/// Rows of an embedding for all tokens, [N, D].
fn embed(source: &Source, embedding: Option<&View>, texts: &Sequences, device: &Device) -> Result<Tensor, CalibrateError> {
    let d = source.config.hidden;
    let view = match embedding {
        Some(view) => view.clone(),
        None => self::view(source, Role::Embedding)?,
    };
    let bytes = view.info.dtype.bytes(d);
    let rows: Vec<u8> = texts.tokens().flat_map(|token| view.data.slice(token as usize * bytes..(token as usize + 1) * bytes)).collect();
    let shape = vec![rows.len() / bytes, d];
    let info = upcycle_architectures::TensorInfo { dtype: view.info.dtype, shape };
    Ok(View { info, data: rows.into() }.to_tensor(DType::F32, device)?)
}

/// A part of a dense layer; sources that are sparse are refused when they are planned.
fn dense<T>(part: Option<T>) -> Result<T, CalibrateError> {
    part.ok_or(CalibrateError::NoExperts)
}
