//! What may happen to a compose: kills, full disks, sources that change under it, two at once. Whatever it is, no broken file gets a final
//! name, and the same command ends with the same bytes.

use std::{
    collections::BTreeMap,
    panic::AssertUnwindSafe,
    path::Path,
    process::{Command, Output},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use assert_cmd::cargo::cargo_bin;
use candle_core::Device;
use upcycle::{
    calibrate::{
        self,
        text::{Corpus, Sequence},
    },
    plan::{self, Sources},
    recipe::{ModelRef, Recipe},
    source::{self, DataFile, OpenOptions, Source},
    write::{self, Options, Progress, Silent, WriteError},
};

use crate::{
    compose::{Models, composite, files},
    support::models,
};

const MANY_SHARDS: Options = Options {
    shard_size: 20_000,
    by_expert: false,
    overwrite: false,
    tokenizer: true,
    card: true,
    allow_non_finite: false,
    sync: true,
    checkpoint: 4_000,
};

/// Does something when the first byte is about to be written, or when the first shard is on disk.
struct At<F> {
    begin: bool,
    done: AtomicBool,
    act: F,
}

impl<F: Fn() + Sync> At<F> {
    fn begin(act: F) -> Self {
        Self { begin: true, done: AtomicBool::new(false), act }
    }

    fn shard(act: F) -> Self {
        Self { begin: false, done: AtomicBool::new(false), act }
    }

    fn act(&self, begin: bool) {
        if begin == self.begin && !self.done.swap(true, Ordering::Relaxed) {
            (self.act)();
        }
    }
}

impl<F: Fn() + Sync> Progress for At<F> {
    fn begin(&self, _: u64, _: u64) {
        self.act(true);
    }

    fn shard(&self, _: &str, _: u64) {
        self.act(false);
    }
}

fn compose(recipe: &Recipe, out: &Path, options: &Options, progress: &dyn Progress) -> Result<u64, WriteError> {
    write::write(&composite(recipe), recipe, out, options, progress).map(|written| written.found)
}

/// What `recipe` makes when nothing happens.
fn whole(recipe: &Recipe, out: &Path) -> BTreeMap<String, Vec<u8>> {
    compose(recipe, out, &MANY_SHARDS, &Silent).unwrap();
    files(out)
}

/// Every file under a final name is the one that a whole run leaves there.
fn nothing_broken(out: &Path, whole: &BTreeMap<String, Vec<u8>>) {
    if !out.exists() {
        return;
    }
    for (name, bytes) in files(out).into_iter().filter(|(name, _)| !name.starts_with('.')) {
        assert!(whole.get(&name) == Some(&bytes), "{name} is not what a whole run writes");
    }
}

#[test]
fn a_run_that_fails_goes_on_within_a_shard() {
    let models = Models::new("llama");
    let recipe = models.recipe("gate_mode: random", "");
    let whole = whole(&recipe, &models.path("whole"));
    let out = models.path("out");
    // One shard, one thread: what stops it stops it in the middle.
    let options = Options { shard_size: 1 << 30, ..MANY_SHARDS };
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    struct Stop;
    impl Progress for Stop {
        fn begin(&self, total: u64, found: u64) {
            assert!(found < total);
        }
        fn advance(&self, bytes: u64) {
            // The head, which comes last and is larger than what comes before it.
            assert!(bytes != (models::VOCAB * models::HIDDEN * 2) as u64 || !FIRST.swap(true, Ordering::Relaxed), "killed");
        }
    }
    static FIRST: AtomicBool = AtomicBool::new(true);
    FIRST.store(false, Ordering::Relaxed);
    let stopped = one.install(|| std::panic::catch_unwind(AssertUnwindSafe(|| compose(&recipe, &out, &options, &Stop))));
    assert!(stopped.is_err());
    nothing_broken(&out, &whole);
    let found = compose(&recipe, &out, &options, &Silent).unwrap();
    let bytes = composite(&recipe).plan.bytes();
    assert!(0 < found && found < bytes, "{found} of {bytes} bytes were there");
    let single = models.path("single");
    compose(&recipe, &single, &options, &Silent).unwrap();
    assert_eq!(files(&out), files(&single));
}

#[test]
fn a_journal_cut_anywhere_claims_no_more_than_there_is() {
    let models = Models::new("llama");
    let recipe = models.recipe("gate_mode: random", "");
    let whole = whole(&recipe, &models.path("whole"));
    let out = models.path("out");
    let kill = At::shard(|| panic!("killed"));
    assert!(std::panic::catch_unwind(AssertUnwindSafe(|| compose(&recipe, &out, &MANY_SHARDS, &kill))).is_err());
    let marker = out.join(".upcycle-unfinished");
    let journal = fs_err::read(&marker).unwrap();
    assert!(journal.len() > 100);
    for cut in [journal.len() - 1, journal.len() - 9, 64, 10, 0] {
        fs_err::write(&marker, &journal[..cut]).unwrap();
        let copy = models.path("copy");
        fs_err::create_dir_all(&copy).unwrap();
        for (name, bytes) in files(&out) {
            fs_err::write(copy.join(name), bytes).unwrap();
        }
        compose(&recipe, &copy, &MANY_SHARDS, &Silent).unwrap();
        assert_eq!(files(&copy), whole, "cut at {cut}");
        fs_err::remove_dir_all(&copy).unwrap();
    }
}

#[test]
fn a_partial_file_of_another_length_is_begun_again() {
    let models = Models::new("llama");
    let recipe = models.recipe("gate_mode: random", "");
    let whole = whole(&recipe, &models.path("whole"));
    let out = models.path("out");
    let kill = At::shard(|| panic!("killed"));
    assert!(std::panic::catch_unwind(AssertUnwindSafe(|| compose(&recipe, &out, &MANY_SHARDS, &kill))).is_err());
    let partial = |name: &String| name.ends_with(".partial");
    let partials: Vec<String> = files(&out).into_keys().filter(partial).collect();
    assert!(partials.len() > 2);
    fs_err::write(out.join(&partials[0]), b"short").unwrap();
    fs_err::remove_file(out.join(&partials[1])).unwrap();
    compose(&recipe, &out, &MANY_SHARDS, &Silent).unwrap();
    assert_eq!(files(&out), whole);
}

#[test]
fn a_source_cut_short_meanwhile_is_an_error() {
    for head in ["gate_mode: random", "gate_mode: random\ndtype: float32", "gate_mode: random\nshared: average"] {
        let models = Models::new("llama");
        let recipe = models.recipe(head, "");
        let (out, file) = (models.path("out"), models.path("b").join("model.safetensors"));
        let cut = At::begin(|| fs_err::OpenOptions::new().write(true).open(&file).unwrap().set_len(4096).unwrap());
        let error = compose(&recipe, &out, &MANY_SHARDS, &cut).unwrap_err().to_string();
        assert!(error.contains(&file.display().to_string()) && error.contains("changed while it was being read"), "{error}");
        assert!(!out.join("config.json").exists());
    }
}

/// Maps of such a file would end the process.
#[test]
fn a_source_cut_short_while_it_is_fitted_is_an_error() {
    let models = Models::new("llama");
    let recipe = models.recipe("gate_mode: ridge\nshared: fit", "");
    let sources = Sources::open(&recipe, |reference, _| source::open(reference, &OpenOptions::default())).unwrap();
    let plan = plan::plan(&recipe, &sources, &[]).unwrap();
    let sequence = |e: u32| Sequence { tokens: (0..40).map(|i| 3 + 20 * e + i * i % 17).collect(), counts: vec![true; 40], opening: false };
    let corpus = Corpus { experts: (0..3).map(|e| vec![sequence(e); 4]).collect(), origin: Vec::new(), warnings: Vec::new() };
    let file = models.path("b").join("model.safetensors");
    let cut = |done: usize, _: usize| {
        if done == 1 {
            fs_err::OpenOptions::new().write(true).open(&file).unwrap().set_len(4096).unwrap();
        }
    };
    let error = calibrate::fit(&recipe, &plan, &sources, &corpus, &Device::Cpu, &models.path("cache"), &cut).map(|_| ()).unwrap_err();
    let error = error.to_string();
    assert!(error.contains(&file.display().to_string()) && error.contains("changed while it was being read"), "{error}");
    assert_eq!(files(&models.path("cache")).len(), 0, "nothing is left of it");
}

#[test]
fn a_source_that_changed_meanwhile_is_an_error_and_then_another_source() {
    let models = Models::new("llama");
    let recipe = models.recipe("gate_mode: random", "");
    let (out, file) = (models.path("out"), models.path("b").join("model.safetensors"));
    // After everything was read: the same length, another time.
    let touch = At::shard(|| {
        let later = SystemTime::now() + Duration::from_secs(7);
        fs_err::OpenOptions::new().write(true).open(&file).unwrap().file().set_modified(later).unwrap();
    });
    let error = compose(&recipe, &out, &Options { shard_size: 1 << 30, ..MANY_SHARDS }, &touch).unwrap_err().to_string();
    assert!(error.contains("changed while it was being read"), "{error}");
    assert!(files(&out).keys().all(|name| name.starts_with('.')), "nothing has a final name");
    assert_eq!(compose(&recipe, &out, &MANY_SHARDS, &Silent).unwrap(), 0, "what was read of the earlier file is not used");
    assert_eq!(files(&out), whole(&recipe, &models.path("whole")));
}

#[test]
fn a_directory_taken_away_is_an_error() {
    let models = Models::new("llama");
    let recipe = models.recipe("gate_mode: random", "");
    let (out, away) = (models.path("out"), models.path("away"));
    let error = compose(&recipe, &out, &MANY_SHARDS, &At::shard(|| fs_err::rename(&out, &away).unwrap())).unwrap_err();
    assert!(matches!(error, WriteError::Io(_)) && error.to_string().contains(&out.display().to_string()), "{error}");
    assert!(files(&away).keys().all(|name| name.starts_with('.')));
}

#[test]
fn two_composes_do_not_write_into_one_directory() {
    let models = Models::new("llama");
    let recipe = models.recipe("gate_mode: random", "");
    let out = models.path("out");
    let second = At::begin(|| assert!(matches!(compose(&recipe, &out, &MANY_SHARDS, &Silent), Err(WriteError::Locked(_)))));
    compose(&recipe, &out, &MANY_SHARDS, &second).unwrap();
    assert!(second.done.load(Ordering::Relaxed));
    assert_eq!(files(&out), whole(&recipe, &models.path("whole")));
}

#[test]
fn an_earlier_composite_stays_whole_until_the_new_one_is_on_disk() {
    let models = Models::new("llama");
    let (before, after) = (models.recipe("gate_mode: random", ""), models.recipe("gate_mode: random\ndtype: float32", ""));
    let out = models.path("out");
    let old = whole(&before, &out);
    let overwrite = Options { overwrite: true, ..MANY_SHARDS };
    let kill = At::shard(|| panic!("killed"));
    assert!(std::panic::catch_unwind(AssertUnwindSafe(|| compose(&after, &out, &overwrite, &kill))).is_err());
    nothing_broken(&out, &old);
    assert!(old.keys().all(|name| out.join(name).exists()));
    source::open(&out.display().to_string().parse().unwrap(), &OpenOptions::default()).unwrap();
    // Whoever did not say that it may go does not lose it now.
    assert!(matches!(compose(&models.recipe("gate_mode: random\nseed: 5", ""), &out, &MANY_SHARDS, &Silent), Err(WriteError::Occupied(_))));
    compose(&after, &out, &overwrite, &Silent).unwrap();
    assert_eq!(files(&out), whole(&after, &models.path("whole")));
}

#[test]
fn only_shards_that_change_are_written_again() {
    let models = Models::new("llama");
    let recipe = models.recipe("gate_mode: random", "");
    let out = models.path("out");
    whole(&recipe, &out);
    let overwrite = Options { overwrite: true, ..MANY_SHARDS };
    let bytes = composite(&recipe).plan.bytes();
    assert_eq!(compose(&recipe, &out, &overwrite, &Silent).unwrap(), bytes, "nothing changed");
    // The last expert of the last layer is in the last shards.
    models::write(&models.path("c"), "llama", 77);
    let kept = compose(&recipe, &out, &overwrite, &Silent).unwrap();
    assert!(0 < kept && kept < bytes, "{kept} of {bytes} bytes were kept");
    assert_eq!(files(&out), whole(&recipe, &models.path("whole")));
    // A shard that somebody changed is not kept, whatever the manifest says.
    let shard = out.join("model-00001-of-00004.safetensors");
    let mut damaged = fs_err::read(&shard).unwrap();
    *damaged.last_mut().unwrap() ^= 1;
    fs_err::write(&shard, damaged).unwrap();
    let later = SystemTime::now() + Duration::from_secs(7);
    fs_err::OpenOptions::new().write(true).open(&shard).unwrap().file().set_modified(later).unwrap();
    compose(&recipe, &out, &overwrite, &Silent).unwrap();
    assert_eq!(files(&out), files(&models.path("whole")));
}

fn verify(out: &Path) -> write::Verified {
    let open = |name: &str, _: Option<&Source>| source::open(&name.parse().unwrap(), &OpenOptions::default());
    let written = source::open(&out.display().to_string().parse().unwrap(), &OpenOptions::default()).unwrap();
    write::verify(written, open, &Silent).unwrap()
}

#[test]
fn verify_names_what_is_not_as_it_was_written() {
    let models = Models::new("llama");
    let recipe = models.recipe("gate_mode: random\nshared: average", "    noise_scale: 0.1\n");
    let out = models.path("out");
    let tensors = composite(&recipe).plan.tensors.len();
    whole(&recipe, &out);
    let found = verify(&out);
    assert_eq!((found.tensors, found.differences.len(), found.absent.len()), (tensors, 0, 0), "{found:?}");
    assert_eq!(found.compared, tensors - models::LAYERS, "all but the gates");

    // One bit of the last tensor of a shard.
    let shard = out.join("model-00002-of-00004.safetensors");
    let good = fs_err::read(&shard).unwrap();
    let mut bad = good.clone();
    *bad.last_mut().unwrap() ^= 1;
    fs_err::write(&shard, bad).unwrap();
    let found = verify(&out);
    assert_eq!(found.differences.len(), 2, "{found:?}");
    assert!(found.differences[0].contains("checksum") && found.differences[0].contains("model-00002-of-00004.safetensors"), "{found:?}");
    assert!(found.differences[1].contains("from element"), "{found:?}");
    fs_err::write(&shard, good).unwrap();

    // Another fine-tune under an expert's name, and one that is gone.
    models::write(&models.path("a"), "llama", 99);
    fs_err::remove_dir_all(models.path("c")).unwrap();
    let found = verify(&out);
    assert!(found.differences.iter().all(|line| line.contains("experts.0") && line.contains("from element")), "{found:?}");
    assert_eq!(found.differences.len(), 3 * models::LAYERS);
    assert_eq!(found.absent.len(), 1);
}

#[test]
fn a_manifest_whose_sizes_add_up_to_more_than_there_can_be_is_an_error() {
    let models = Models::new("llama");
    let out = models.path("out");
    whole(&models.recipe("gate_mode: random", ""), &out);
    let file = out.join(write::MANIFEST);
    let mut manifest: serde_json::Value = serde_json::from_slice(&fs_err::read(&file).unwrap()).unwrap();
    for tensor in ["lm_head.weight", "model.norm.weight"] {
        manifest["tensors"][tensor]["shape"] = serde_json::json!([i64::MAX as u64 / 2, 2]);
    }
    fs_err::write(&file, manifest.to_string()).unwrap();
    let written = source::open(&out.display().to_string().parse().unwrap(), &OpenOptions::default()).unwrap();
    let error = write::verify(written, |_, _| Err("not there"), &Silent).unwrap_err();
    assert!(matches!(&error, WriteError::Manifest { reason, .. } if reason.contains("more bytes than there can be")), "{error}");
}

/// A base and experts that take long enough to write to be killed on the way, and a recipe over them.
fn larger(dir: &Path) {
    let (d, f, layers) = (128, 512, 8);
    let mut config = models::config("llama");
    config["hidden_size"] = d.into();
    config["intermediate_size"] = f.into();
    config["num_hidden_layers"] = layers.into();
    config["head_dim"] = 32.into();
    let resize = |(name, shape): (String, Vec<usize>)| {
        let size = |n: usize| match n {
            models::HIDDEN => d,
            models::FFN => f,
            16 => d / 2,
            other => other,
        };
        (name, shape.into_iter().map(size).collect::<Vec<_>>())
    };
    let first: Vec<_> = models::tensors("llama").into_iter().map(resize).collect();
    let of_layer = |l: usize| {
        first
            .iter()
            .filter(|(n, _)| n.contains("layers.0."))
            .map(move |(n, s)| (n.replace("layers.0.", &format!("layers.{l}.")), s.clone()))
    };
    let mut tensors: Vec<_> = (0..layers).flat_map(of_layer).collect();
    tensors.extend(first.iter().filter(|(name, _)| !name.contains("layers.")).cloned());
    let mut recipe = "base_model: base\ngate_mode: random\nexperts:\n".to_owned();
    for (seed, name) in ["base", "a", "b", "c"].iter().enumerate() {
        models::write_with(&dir.join(name), &config, &tensors, seed as u64);
        if *name != "base" {
            recipe += &format!("  - source_model: {name}\n    positive_prompts: [{name}]\n");
        }
    }
    fs_err::write(dir.join("recipe.yml"), recipe).unwrap();
}

fn upcycle(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(cargo_bin!("upcycle"));
    command.args(args).current_dir(dir).env("RAYON_NUM_THREADS", "2").env("HF_HUB_OFFLINE", "1").env("NO_COLOR", "1");
    command
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn killed_at_any_moment_it_goes_on_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    larger(dir);
    let compose = |out| upcycle(dir, &["compose", "recipe.yml", out, "--out-shard-size", "2M"]);
    let start = Instant::now();
    let output = compose("whole").output().unwrap();
    let time = start.elapsed();
    assert!(output.status.success(), "{}", said(&output));
    let (whole, out) = (files(&dir.join("whole")), dir.join("out"));
    for moment in 1..=8 {
        let mut child = compose("out").stderr(std::process::Stdio::null()).spawn().unwrap();
        std::thread::sleep(time * moment / 8);
        child.kill().unwrap();
        child.wait().unwrap();
        nothing_broken(&out, &whole);
        if moment % 2 == 0 {
            let output = compose("out").output().unwrap();
            assert!(output.status.success() || said(&output).contains("is not empty"), "{}", said(&output));
            assert!(files(&out) == whole, "killed at {moment} of 8");
            fs_err::remove_dir_all(&out).unwrap();
        }
    }
}

/// A disk that fails: at its beginning nothing is mapped into a process's memory, so that reading there is an I/O error.
#[cfg(target_os = "linux")]
#[test]
fn a_source_that_cannot_be_read_is_an_error_that_names_it() {
    for head in ["gate_mode: random", "gate_mode: random\ndtype: float32", "gate_mode: random\nshared: average"] {
        let models = Models::new("llama");
        let recipe = models.recipe(head, "");
        let damaged = |reference: &ModelRef, _: Option<&Source>| -> Result<Source, source::SourceError> {
            let mut source = source::open(reference, &OpenOptions::default())?;
            if reference.path.ends_with("/c") {
                let file = Arc::new(DataFile::of(Path::new("/proc/self/mem")).unwrap());
                source.extents.values_mut().for_each(|extent| (extent.file, extent.offset) = (file.clone(), 0));
            }
            Ok(source)
        };
        let sources = Sources::open(&recipe, damaged).unwrap();
        let good = composite(&recipe);
        let bad = plan::composite((*good.plan).clone(), sources, good.gates().clone(), None);
        let out = models.path("out");
        let error = write::write(&bad, &recipe, &out, &MANY_SHARDS, &Silent).unwrap_err().to_string();
        assert!(error.contains("/proc/self/mem") && error.contains("Input/output error"), "{head}: {error}");
        assert!(files(&out).keys().all(|name| name.starts_with('.')), "nothing has a final name");
        compose(&recipe, &out, &MANY_SHARDS, &Silent).unwrap();
        assert_eq!(files(&out), whole(&recipe, &models.path("whole")));
    }
}

/// As somebody whom permissions bind, which root is not.
#[cfg(unix)]
#[test]
fn a_directory_that_may_no_longer_be_written_is_an_error() {
    use std::os::unix::{fs::PermissionsExt as _, process::CommandExt as _};
    const NOBODY: u32 = 65_534;
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    larger(dir);
    assert!(upcycle(dir, &["compose", "recipe.yml", "whole"]).status().unwrap().success());
    let (out, allow) = (dir.join("out"), |path: &Path, mode| fs_err::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap());
    allow(dir, 0o755);
    for model in ["base", "a", "b", "c"] {
        allow(&dir.join(model).join("model.safetensors"), 0o644);
    }
    fs_err::create_dir(&out).unwrap();
    let root = std::os::unix::fs::chown(&out, Some(NOBODY), None).is_ok();
    let compose = || {
        let mut command = upcycle(dir, &["compose", "recipe.yml", "out", "--overwrite"]);
        if root {
            command.uid(NOBODY).env("HOME", dir);
        }
        command.stderr(std::process::Stdio::piped()).spawn()
    };
    // It may be faster than we are.
    for _ in 0..20 {
        let Ok(mut child) = compose() else { return eprintln!("skipped: no other user can run it here") };
        while !out.join(".upcycle-unfinished").exists() && child.try_wait().unwrap().is_none() {}
        allow(&out, 0o555);
        let output = child.wait_with_output().unwrap();
        allow(&out, 0o755);
        if output.status.success() {
            files(&out).into_keys().for_each(|name| fs_err::remove_file(out.join(name)).unwrap());
            continue;
        }
        assert!(said(&output).contains("Permission denied") && said(&output).contains("out/"), "{}", said(&output));
        assert!(!out.join("config.json").exists());
        assert!(compose().unwrap().wait().unwrap().success());
        assert!(files(&out) == files(&dir.join("whole")));
        return;
    }
    panic!("twenty times it was done before the directory could be closed");
}

/// Where a process may mount nothing, its files may still be limited.
#[cfg(unix)]
#[test]
fn a_file_that_may_not_grow_is_a_full_disk() {
    let dir = tempfile::tempdir().unwrap();
    larger(dir.path());
    let shell = "trap '' XFSZ; ulimit -f 64; exec \"$0\" compose recipe.yml out";
    let output = Command::new("sh").args(["-c", shell]).arg(cargo_bin!("upcycle")).current_dir(dir.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(said(&output).contains("no room in out"), "{}", said(&output));
    let output = upcycle(dir.path(), &["compose", "recipe.yml", "out"]).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
}

/// A file system of two megabytes, in name spaces of our own; skipped where there are none.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_said_before_a_byte_is_written_and_is_not_filled() {
    let dir = tempfile::tempdir().unwrap();
    larger(dir.path());
    let script = r#"
        mkdir out && mount -t tmpfs -o size=2m tmpfs out || exit 99
        "$0" compose recipe.yml out && exit 98
        ls -A out
        mount -o remount,size=64m out && "$0" compose recipe.yml out && "$0" verify out && "$0" compose recipe.yml whole && diff -r out whole"#;
    let run = Command::new("unshare").args(["-rm", "sh", "-c", script]).arg(cargo_bin!("upcycle")).current_dir(dir.path()).output();
    let output = match run {
        Ok(output) if output.status.code() != Some(99) && !said(&output).contains("unshare") => output,
        _ => return eprintln!("skipped: no file system can be mounted here"),
    };
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    assert!(said(&output).contains("no room in out for"), "{}", said(&output));
    assert_eq!(String::from_utf8_lossy(&output.stdout), ".upcycle-unfinished\n", "what was reserved is given back");
}
