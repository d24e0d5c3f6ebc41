//! The decoder against `transformers`: every family, rope kind, layout and window, in one call, in pieces, and among neighbours.

use crate::support::{Case, Golden, assert_close, cosine, held, in_pieces, logits, root, run, values};
use candle_core::{DType, Device, Tensor};
use upcycle_architectures::{
    decoder::{Cache, Decoder, KvType, Logits, NoProbe, Probe, Site, Step},
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
            if kernels.rounds() {
                let similarity = cosine(&long, &golden_long).min(cosine(short, &golden_short));
                assert!(similarity > 0.999, "{what}: cosine {similarity}");
            } else {
                assert_close(&what, &long, &golden_long);
                assert_close(&what, short, &golden_short);
            }
        }
    }
}

/// Not only close: neither chunks nor neighbours nor a shared past change a bit, whatever type keys and values are kept in.
#[test]
fn batching_changes_no_bit() {
    for case in Case::all().iter().filter(|case| !case.rope_follows_length()) {
        for kernels in Kernels::available() {
            let decoder = Decoder::load_with(case.family, &case.config, &case.weights, DType::F32, kernels).unwrap();
            let (short, long) = (case.golden.tokens("short.input_ids"), case.golden.tokens("long.input_ids"));
            same_to_the_bit(&format!("{} {kernels:?}", case.name), &decoder, &short, &long);
        }
    }
    let decoder = demo_base();
    let [short, long] = [20, 300].map(|len| (0..len).map(|i| i * 37 % 2048).collect::<Vec<u32>>());
    for kv_type in [KvType::F16, KvType::Q8_0] {
        same_to_the_bit(&format!("demo/base {kv_type:?}"), &decoder.clone().with_kv_type(kv_type).unwrap(), &short, &long);
    }
}

fn same_to_the_bit(what: &str, decoder: &Decoder, short: &[u32], long: &[u32]) {
    let vocab = decoder.config().vocab;
    let together = |caches: &mut [Cache], fed: &[&[u32]]| {
        let steps = caches.iter_mut().zip(fed).map(|(cache, tokens)| Step { tokens, cache, logits: Logits::All });
        values(&decoder.forward(&mut steps.collect::<Vec<_>>(), &mut NoProbe).unwrap())
    };
    let alone = logits(decoder, long);
    assert!(alone == in_pieces(decoder, long, &[7, 64, 1, 3, 100]), "{what}: chunks");
    let mut caches = [decoder.cache(), decoder.cache()];
    assert!(alone == together(&mut caches, &[short, long])[short.len() * vocab..], "{what}: neighbours");
    // Three go on from one past, each in its own way and all in one call.
    let [_, past] = caches;
    let mut forks = [past.fork(100).unwrap(), past.fork(100).unwrap(), past];
    assert!(
        alone[100 * vocab..] == together(&mut forks, &[&long[100..], short, short])[..(long.len() - 100) * vocab],
        "{what}: a shared past"
    );
}

#[test]
fn rounded_keys_and_values() {
    let (decoder, golden) = (demo_base(), Golden::open(&root().join("tests/golden/demo_base_logits.safetensors")));
    for (kv_type, least) in [(KvType::F16, 0.999_999), (KvType::Q8_0, 0.9999)] {
        let decoder = decoder.clone().with_kv_type(kv_type).unwrap();
        let similarity = cosine(&logits(&decoder, &golden.tokens("input_ids")), &golden.values("logits"));
        assert!(similarity > least && similarity < 1.0 - 1e-12, "{kv_type:?}: cosine {similarity}");
    }
    let small = Case::open("mixtral").decoder(DType::F32).with_kv_type(KvType::Q8_0).unwrap_err();
    assert_eq!(small.to_string(), "keys and values cannot be kept as q8_0: heads of 8 are no multiple of 32; f16 and f32 take any");
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
    let golden = Golden::open(&root().join("tests/golden/demo_base_logits.safetensors"));
    assert_close("demo/base", &logits(&demo_base(), &golden.tokens("input_ids")), &golden.values("logits"));
}

fn demo_base() -> Decoder {
    let dir = root().join("demo/base");
    let (family, config) = detect(&serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap()).unwrap();
    Decoder::load(family, &config, &held(&dir.join("model.safetensors")), DType::F32, &Device::Cpu).unwrap()
}
