//! The decoder against `transformers`: every family, rope kind, layout and window, in one call, in pieces, and among neighbours.

use crate::support::{Case, Golden, assert_close, cosine, held, in_pieces, logits, root, run, values};
use candle_core::{DType, Device, Tensor};
use upcycle_architectures::{
    decoder::{Decoder, Logits, NoProbe, Probe, Site, Step},
    detect,
    kernels::Kernels,
};

#[test]
fn one_call() {
    for case in Case::all() {
        let decoder = case.decoder(DType::F32);
        assert_close(&case.name, &logits(&decoder, &case.golden.tokens("short.input_ids")), &case.golden.values("short.logits"));
        let long = logits(&decoder, &case.golden.tokens("long.input_ids"));
        assert_close(&case.name, &case.long_rows(&long), &case.golden.values("long.logits"));
    }
}

#[test]
fn token_by_token() {
    for case in Case::all() {
        let decoder = case.decoder(DType::F32);
        let last = |tokens: &[u32], pieces: &[usize]| {
            let all = in_pieces(&decoder, tokens, pieces);
            all[all.len() - case.config.vocab..].to_vec()
        };
        assert_close(&case.name, &last(&case.golden.tokens("short.input_ids"), &[1]), &case.golden.values("decode.short_last"));
        let long = case.golden.tokens("long.input_ids");
        assert_close(&case.name, &last(&long, &[1]), &case.golden.values("decode.long_last"));
        assert_close(&case.name, &last(&long, &[280, 1]), &case.golden.values("decode.long_tail"));
    }
}

#[test]
fn in_chunks() {
    for case in Case::all().iter().filter(|case| !case.rope_follows_length()) {
        let decoder = case.decoder(DType::F32);
        let long = in_pieces(&decoder, &case.golden.tokens("long.input_ids"), &[7, 64, 1, 3, 100]);
        assert_close(&case.name, &case.long_rows(&long), &case.golden.values("long.logits"));
    }
}

/// With every kind of instructions that this CPU has; the other tests run with the best.
#[test]
fn every_kernel() {
    for kernels in Kernels::available() {
        for case in Case::all() {
            let decoder = Decoder::load_with(case.family, &case.config, &case.weights, DType::F32, kernels).unwrap();
            let what = format!("{} {kernels:?}", case.name);
            let long = logits(&decoder, &case.golden.tokens("long.input_ids"));
            let short = in_pieces(&decoder, &case.golden.tokens("short.input_ids"), &[3, 1]);
            let (long, short) = (case.long_rows(&long), &short[short.len() - case.config.vocab..]);
            let (golden_long, golden_short) = (case.golden.values("long.logits"), case.golden.values("decode.short_last"));
            if kernels == Kernels::Avx512Bf16 {
                let similarity = cosine(&long, &golden_long).min(cosine(short, &golden_short));
                assert!(similarity > 0.999, "{what}: cosine {similarity}");
            } else {
                assert_close(&what, &long, &golden_long);
                assert_close(&what, short, &golden_short);
            }
        }
    }
}

/// Not only close: neither chunks nor neighbours change a bit.
#[test]
fn batching_changes_no_bit() {
    for case in Case::all().iter().filter(|case| !case.rope_follows_length()) {
        for kernels in Kernels::available() {
            let decoder = Decoder::load_with(case.family, &case.config, &case.weights, DType::F32, kernels).unwrap();
            let (short, long) = (case.golden.tokens("short.input_ids"), case.golden.tokens("long.input_ids"));
            let alone = logits(&decoder, &long);
            assert!(alone == in_pieces(&decoder, &long, &[7, 64, 1, 3, 100]), "{} {kernels:?}: chunks", case.name);
            let mut caches = [decoder.cache(), decoder.cache()];
            let mut steps: Vec<_> =
                caches.iter_mut().zip([&short, &long]).map(|(cache, tokens)| Step { tokens, cache, logits: Logits::All }).collect();
            let together = values(&decoder.forward(&mut steps, &mut NoProbe).unwrap());
            assert!(alone == together[short.len() * case.config.vocab..], "{} {kernels:?}: neighbours", case.name);
        }
    }
}

/// Sequences that decode, prefill and go on, all in one call, give what each gives alone.
#[test]
fn among_neighbours() {
    for case in Case::all() {
        let decoder = case.decoder(DType::F32);
        let (short, long) = (case.golden.tokens("short.input_ids"), case.golden.tokens("long.input_ids"));
        let mut caches = [decoder.cache(), decoder.cache(), decoder.cache(), decoder.cache()];
        run(&decoder, &short[..19], &mut caches[0]);
        run(&decoder, &long[..20], &mut caches[2]);
        let fed: [(&[u32], Logits); 4] =
            [(&short[19..], Logits::Last), (&long, Logits::All), (&long[20..40], Logits::None), (&[], Logits::Last)];
        let mut steps: Vec<_> = caches.iter_mut().zip(fed).map(|(cache, (tokens, logits))| Step { tokens, cache, logits }).collect();
        let got = decoder.forward(&mut steps, &mut NoProbe).unwrap();
        let v = case.config.vocab;
        assert_eq!(got.dims(), [1 + long.len(), v]);
        let got = values(&got);
        assert_close(&case.name, &got[..v], &case.golden.values("decode.short_last"));
        assert_close(&case.name, &case.long_rows(&got[v..]), &case.golden.values("long.logits"));
        assert_eq!(caches.map(|cache| cache.len()), [20, 300, 40, 0]);
    }
}

#[test]
fn bf16() {
    for case in Case::all() {
        let decoder = case.decoder(DType::BF16);
        let long = case.long_rows(&logits(&decoder, &case.golden.tokens("long.input_ids")));
        let similarity = cosine(&long, &case.golden.values("long.logits"));
        assert!(similarity > 0.999, "{}: cosine {similarity}", case.name);
    }
}

/// Collects what enters each layer, the final norm's output and the router logits.
#[derive(Default)]
struct Watch {
    hidden: Vec<f32>,
    router: Vec<f32>,
}

impl Probe for Watch {
    fn wants(&self, site: Site) -> bool {
        matches!(site, Site::LayerInput | Site::FinalNorm)
    }

    fn observe(&mut self, _site: Site, _layer: usize, x: &Tensor) -> candle_core::Result<()> {
        self.hidden.extend(values(x));
        Ok(())
    }

    fn route(&mut self, _layer: usize, logits: &[f32], _routing: &mut upcycle_routers::route::Routing) {
        self.router.extend(logits);
    }
}

#[test]
fn probes_see_the_hidden_states() {
    for case in Case::all() {
        let decoder = case.decoder(DType::F32);
        let (tokens, mut watch) = (case.golden.tokens("short.input_ids"), Watch::default());
        let mut cache = decoder.cache();
        let steps = &mut [Step { tokens: &tokens, cache: &mut cache, logits: Logits::None }];
        assert_eq!(decoder.forward(steps, &mut watch).unwrap().dims(), [0, case.config.vocab]);
        assert_close(&case.name, &watch.hidden, &case.golden.values("short.hidden"));
        if case.config.moe.is_some() {
            assert_close(&case.name, &watch.router, &case.golden.values("short.router_logits"));
        }
    }
}

/// A really trained model.
#[test]
fn trained_base() {
    let dir = root().join("demo/base");
    let (family, config) = detect(&serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap()).unwrap();
    let golden = Golden::open(&root().join("tests/golden/demo_base_logits.safetensors"));
    let decoder = Decoder::load(family, &config, &held(&dir.join("model.safetensors")), DType::F32, &Device::Cpu).unwrap();
    assert_close("demo/base", &logits(&decoder, &golden.tokens("input_ids")), &golden.values("logits"));
}
