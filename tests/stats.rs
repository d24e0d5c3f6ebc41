//! Statistics of what routers see: gathered, merged, kept in files, and turned into gates.

use std::path::Path;

use candle_core::{DType, Device};
use insta::assert_snapshot;
use proptest::{
    prelude::{ProptestConfig, any},
    proptest,
};
use tempfile::TempDir;
use upcycle::{
    calibrate::{
        stats::{self, ExpertId, Fingerprint, Routing, Stats},
        text::Sequence,
    },
    plan,
    source::{self, OpenOptions, Source},
};
use upcycle_architectures::decoder::Decoder;
use upcycle_routers::init;

use crate::support::{cli::transcript, models};

/// In `dir`: base, two experts, a text of words of its own for each, a recipe and what it composes to.
fn composed() -> TempDir {
    let dir = TempDir::new().unwrap();
    let mut recipe = "base_model: base\ndtype: float32\ngate_mode: random\nseed: 1\nexperts:\n".to_owned();
    models::write(&dir.path().join("base"), "llama", 0);
    for (seed, (name, from)) in [("code", 3), ("law", 30)].into_iter().enumerate() {
        models::write(&dir.path().join(name), "llama", seed as u64 + 1);
        let word = |i: usize| format!("w{}", from + (i * i + 3 * i) % 12);
        fs_err::write(dir.path().join(format!("{name}.txt")), (0..900).map(word).collect::<Vec<_>>().join(" ")).unwrap();
        recipe += &format!("  - source_model: {name}\n    text_file: {name}.txt\n");
    }
    fs_err::write(dir.path().join("recipe.yml"), recipe).unwrap();
    done(dir.path(), &["compose", "recipe.yml", "out"]);
    dir
}

fn done(dir: &Path, args: &[&str]) -> String {
    let said = transcript(dir, args);
    assert!(said.contains("\nexit 0\n"), "{said}");
    said
}

fn open(dir: &Path) -> Source {
    source::open(&dir.display().to_string().parse().unwrap(), &OpenOptions::default()).unwrap()
}

fn sequences(expert: u32) -> Vec<Sequence> {
    let sequence = |s: u32| (0..40).map(|i| (3 + 27 * expert + (i * i + s * i) % 12, i > 0)).collect::<Vec<_>>();
    let sequence = |s| sequence(s).into_iter().unzip();
    (0..8).map(sequence).map(|(tokens, counts)| Sequence { tokens, counts, opening: false }).collect()
}

/// Statistics of a composite from these texts of its experts.
fn gathered(composite: &Source, texts: &[Vec<Sequence>], keep: usize) -> Stats {
    let config = &composite.config;
    let decoder = Decoder::load(composite.family, config, &*composite.weights, DType::F32, &Device::Cpu).unwrap();
    let fingerprint = Fingerprint::of(composite.family, config, &*composite.weights).unwrap();
    let domain = |(e, text): (usize, &Vec<Sequence>)| {
        let expert = ExpertId { name: e.to_string(), weights: fingerprint.experts[e].clone() };
        stats::gather(&decoder, (expert, Some(e)), text, keep, &|_| ()).unwrap()
    };
    let experts = texts.iter().enumerate().map(domain).collect();
    Stats { routing: Routing::Forced, composite: fingerprint.shared.clone(), layers: config.layers, hidden: config.hidden, experts }
}

fn gates(stats: &Stats, order: &[usize]) -> Vec<Vec<f32>> {
    let fitted = stats.gates(order, init::find("ridge").unwrap().candidates(), &|_| ()).unwrap();
    fitted.into_iter().map(|fitted| fitted.gate.weight).collect()
}

#[track_caller]
fn assert_close(a: &[Vec<f32>], b: &[Vec<f32>]) {
    for (a, b) in a.iter().zip(b) {
        let size = a.iter().fold(0f32, |most, v| most.max(v.abs()));
        assert!(size > 0.0 && a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-3 * size), "{a:?}\n{b:?}");
    }
}

#[test]
fn merged_parts_are_the_whole() {
    let dir = composed();
    let composite = open(&dir.path().join("out"));
    let half = |odd: usize| [0, 1].map(|e| sequences(e).into_iter().skip(odd).step_by(2).collect());
    let whole = gathered(&composite, &[0, 1].map(sequences), 1000);
    let (mut parts, other) = (gathered(&composite, &half(0), 1000), gathered(&composite, &half(1), 1000));
    parts.merge(&other, "a", "b").unwrap();
    assert_eq!((parts.experts[1].seen(), parts.experts[1].kept()), (312, 312));
    assert_close(&gates(&parts, &[0, 1]), &gates(&whole, &[0, 1]));
    // What is there already changes nothing.
    let mut twice = whole.clone();
    twice.merge(&whole, "a", "a").unwrap();
    assert_eq!(twice, whole);
    // Of two experts, each may come from somebody else.
    let alone = |e: usize| Stats { experts: vec![whole.experts[e].clone()], ..whole.clone() };
    let mut joined = alone(1);
    joined.merge(&alone(0), "a", "b").unwrap();
    let ids: Vec<ExpertId> = whole.experts.iter().map(|domain| domain.expert.clone()).collect();
    assert_eq!(joined.find(&ids).unwrap(), [1, 0]);
    assert_close(&gates(&joined, &[1, 0]), &gates(&whole, &[0, 1]));
}

#[test]
fn a_sample_is_bounded_and_fair() {
    let dir = composed();
    let composite = open(&dir.path().join("out"));
    let whole = gathered(&composite, &[0, 1].map(sequences), 1000);
    let some = gathered(&composite, &[0, 1].map(sequences), 100);
    let mut cut = whole.clone();
    cut.limit(100);
    assert_eq!(some, cut);
    assert_eq!((some.experts[0].seen(), some.experts[0].kept()), (312, 100));
    // Of a part of which much is kept, no more than of one of which little is.
    let (mut few, mut sparse) = (gathered(&composite, &[sequences(0)[..4].to_vec()], 1000), some.clone());
    sparse.merge(&few, "a", "b").unwrap();
    few.merge(&some, "b", "a").unwrap();
    for both in [&sparse.experts[0], &few.experts[0]] {
        assert_eq!(both.seen(), 312 + 156);
        let share = both.kept() as f64 / both.seen() as f64;
        assert!((share - 100.0 / 312.0).abs() < 0.05, "{share}");
    }
}

#[test]
fn a_file_gives_back_what_was_written() {
    let dir = composed();
    let file = dir.path().join("all.stats");
    let stats = gathered(&open(&dir.path().join("out")), &[0, 1].map(sequences), 100);
    stats.write(&file).unwrap();
    assert_eq!(stats::read(&file).unwrap(), stats);
    let first = fs_err::read(&file).unwrap();
    stats.write(&file).unwrap();
    assert_eq!(fs_err::read(&file).unwrap(), first);
    // f16 rows of two layers, a key for each token, and the header
    assert!(first.len() < 2 * 100 * (2 * 32 * 2 + 8) + 2500, "{}", first.len());
}

#[test]
fn damaged_files_are_errors() {
    let dir = composed();
    let file = dir.path().join("all.stats");
    gathered(&open(&dir.path().join("out")), &[0, 1].map(sequences), 20).write(&file).unwrap();
    let good = fs_err::read(&file).unwrap();
    let attempt = |bytes: &[u8]| {
        // What is mapped must not be written over.
        let file = dir.path().join("damaged.stats");
        let _ = fs_err::remove_file(&file);
        fs_err::write(&file, bytes).unwrap();
        let stats = stats::read(&file)?;
        let order: Vec<usize> = (0..stats.experts.len()).collect();
        stats.gates(&order, init::find("ridge").unwrap().candidates(), &|_| ()).map(|_| ())
    };
    attempt(&good).unwrap();
    for length in (0..good.len()).step_by(97) {
        assert!(attempt(&good[..length]).is_err(), "{length}");
    }
    let edited = |from: &str, to: &str| {
        let at = good.windows(from.len()).position(|bytes| bytes == from.as_bytes()).expect(from);
        let mut bytes = good.clone();
        bytes[at..at + from.len()].copy_from_slice(to.as_bytes());
        attempt(&bytes).unwrap_err().to_string()
    };
    assert!(edited("version\\\":1", "version\\\":9").contains("a newer upcycle wrote it"));
    assert!(edited("layers\\\":2", "layers\\\":0").contains("0 routers of width 32 cannot be"));
    assert!(edited("hidden\\\":32", "hidden\\\":31").contains("not F16 of [5, 2, 31]"));
    assert!(edited("seen\\\":[78", "seen\\\":[ 4").contains("keeps 5 of 4 tokens"));
    assert!(edited("upcycle_stats", "upcycle_state").contains("a safetensors file without statistics"));
    let mut infinite = good.clone();
    let last = infinite.len();
    infinite[last - 2..].copy_from_slice(&half::f16::INFINITY.to_le_bytes());
    assert!(attempt(&infinite).is_err());
    proptest!(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) }, |(at in 0..good.len(), byte in any::<u8>())| {
        let mut bytes = good.clone();
        bytes[at] = byte;
        let _ = attempt(&bytes);
    });
}

#[test]
fn new_gates_are_all_that_changes() {
    let dir = composed();
    done(dir.path(), &["stats", "out", "--text", "code=code.txt", "-o", "code.stats"]);
    done(dir.path(), &["stats", "out", "--text", "law=law.txt", "-o", "law.stats"]);
    done(dir.path(), &["stats", "law.stats", "code.stats", "-o", "all.stats"]);
    done(dir.path(), &["gates", "out", "--stats", "law.stats", "code.stats", "--method", "ridge", "-o", "new"]);
    done(dir.path(), &["gates", "out", "--stats", "all.stats", "--method", "ridge", "-o", "same"]);
    // Under the composite's own routing gates are fitted, too, and it matters which experts stand beside.
    done(dir.path(), &["stats", "recipe.yml", "--own-routing", "-o", "own.stats"]);
    done(dir.path(), &["gates", "out", "--stats", "own.stats", "-o", "own"]);
    let [forced, own] = ["all.stats", "own.stats"].map(|file| stats::read(&dir.path().join(file)).unwrap());
    assert_eq!(forced.find(&own.experts.iter().map(|domain| domain.expert.clone()).collect::<Vec<_>>()).unwrap(), [1, 0]);
    assert_ne!(gates(&forced, &[1, 0]), gates(&own, &[0, 1]));
    // A recipe and what is written of it are one.
    done(dir.path(), &["stats", "recipe.yml", "--text", "code=code.txt", "--text", "law=law.txt", "-o", "recipe.stats"]);
    done(dir.path(), &["gates", "recipe.yml", "--stats", "recipe.stats", "--method", "ridge", "-o", "composed"]);
    let [old, new, same, composed] = ["out", "new", "same", "composed"].map(|name| open(&dir.path().join(name)));
    for name in old.weights.names() {
        let [old, new, same, composed] = [&old, &new, &same, &composed].map(|model| model.weights.read(&name).unwrap());
        let gate = name.ends_with("block_sparse_moe.gate.weight");
        assert_eq!(old.data != new.data, gate, "{name}");
        assert!(new.data == same.data && new.data == composed.data && new.info == old.info, "{name}");
    }
    let card = fs_err::read_to_string(dir.path().join("new/README.md")).unwrap();
    assert!(card.contains("Set anew by `upcycle gates`"), "{card}");
    for file in ["config.json", "tokenizer.json", "upcycle_recipe.yml", "generation_config.json"] {
        assert_eq!(fs_err::read(dir.path().join("out").join(file)).unwrap(), fs_err::read(dir.path().join("new").join(file)).unwrap());
    }
    // Texts so different are told apart by everyone, and not by gates that were drawn.
    let stats = stats::read(&dir.path().join("all.stats")).unwrap();
    let fitted = stats.gates(&[0, 1], init::find("auto").unwrap().candidates(), &|_| ()).unwrap();
    assert!(fitted.iter().all(|fitted| fitted.report.held_out && fitted.report.accuracy[0] > 0.99));
}

#[test]
fn layouts_have_one_fingerprint() {
    let dir = composed();
    let recipe = fs_err::read_to_string(dir.path().join("recipe.yml")).unwrap();
    fs_err::write(dir.path().join("fused.yml"), recipe + "layout: fused\n").unwrap();
    done(dir.path(), &["compose", "fused.yml", "fused"]);
    let of = |name: &str| {
        let model = open(&dir.path().join(name));
        Fingerprint::of(model.family, &model.config, &*model.weights).unwrap()
    };
    assert_eq!(of("out"), of("fused"));
    assert_ne!(of("out").experts[0], of("out").experts[1]);
    done(dir.path(), &["stats", "out", "--text", "code=code.txt", "--text", "law=law.txt", "-o", "all.stats"]);
    done(dir.path(), &["gates", "fused", "--stats", "all.stats", "-o", "new"]);
    assert!(plan::opened(open(&dir.path().join("base"))).is_none());
}

#[test]
fn mistakes_are_named() {
    let dir = composed();
    let other = composed();
    models::write(&other.path().join("base"), "llama", 9);
    done(other.path(), &["compose", "recipe.yml", "out", "--overwrite"]);
    done(dir.path(), &["stats", "out", "--text", "code=code.txt", "-o", "code.stats"]);
    done(other.path(), &["stats", "out", "--text", "law=law.txt", "-o", "law.stats"]);
    done(dir.path(), &["stats", "out", "--text", "law=law.txt", "--own-routing", "-o", "own.stats"]);
    fs_err::copy(other.path().join("law.stats"), dir.path().join("law.stats")).unwrap();
    let all = [
        &["stats", "code.stats", "law.stats", "-o", "all.stats"][..],
        &["stats", "code.stats", "own.stats", "-o", "all.stats"],
        &["stats", "out", "-o", "all.stats"],
        &["stats", "out", "--text", "poetry=law.txt", "--text", "code=code.txt", "-o", "all.stats"],
        &["stats", "base", "--text", "code=code.txt", "-o", "all.stats"],
        &["stats", "out", "--text", "code=code.txt"],
        &["stats", "recipe.yml", "code.stats"],
        &["gates", "out", "--stats", "code.stats", "-o", "new"],
        &["gates", "out", "--stats", "law.stats", "-o", "new"],
        &["gates", "out", "--stats", "missing.stats", "-o", "new"],
        &["gates", "out", "--stats", "base/model.safetensors", "-o", "new"],
    ];
    assert_snapshot!(all.map(|args| transcript(dir.path(), args)).join("\n"), @"
    $ upcycle stats code.stats law.stats -o all.stats
    exit 1
    --- stderr
    error: code.stats and law.stats do not belong together: they are of composites with different shared weights

    $ upcycle stats code.stats own.stats -o all.stats
    exit 1
    --- stderr
    error: code.stats and own.stats do not belong together: one was gathered under the composite's own routing, the other with experts forced

    $ upcycle stats out -o all.stats
    exit 1
    --- stderr
    error: give text of at least one expert's domain: `--text EXPERT=FILE`; the experts are `code`, `law`

    $ upcycle stats out --text poetry=law.txt --text code=code.txt -o all.stats
    exit 1
    --- stderr
    error: text `poetry` belongs to no expert: name it after one of `code`, `law`

    $ upcycle stats base --text code=code.txt -o all.stats
    exit 1
    --- stderr
    error: `base` is a dense model: only a Mixture-of-Experts has routers to gather statistics of

    $ upcycle stats out --text code=code.txt
    exit 1
    --- stderr
    error: `--out FILE` says where the statistics go

    $ upcycle stats recipe.yml code.stats
    exit 1
    --- stderr
    error: give one model, or only .stats files

    $ upcycle gates out --stats code.stats -o new
    exit 1
    --- stderr
    error: there are no statistics of expert `law`, only of `code`: gather them with `upcycle stats MODEL --text law=FILE`

    $ upcycle gates out --stats law.stats -o new
    exit 1
    --- stderr
    error: law.stats and out do not belong together: they are of composites with different shared weights

    $ upcycle gates out --stats missing.stats -o new
    exit 1
    --- stderr
    error: failed to open file `missing.stats`: No such file or directory (os error 2)

    $ upcycle gates out --stats base/model.safetensors -o new
    exit 1
    --- stderr
    error: base/model.safetensors holds no statistics that can be used: it is a safetensors file without statistics
    ");
}
