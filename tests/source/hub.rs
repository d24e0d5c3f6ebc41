//! Names on the Hub, against a server that speaks its API.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use insta::assert_snapshot;
use tempfile::TempDir;
use upcycle::{
    recipe::ModelRef,
    source::{self, OpenOptions, Progress, Source, SourceError},
};

use super::{assert_same_tensors, model, open};
use crate::support::{
    hub::{Behaviour, COMMIT, Hub, Request},
    models,
};

/// A server with one repository, and an empty cache.
struct Setting {
    hub: Hub,
    cache: TempDir,
    model: TempDir,
    options: OpenOptions,
}

fn setting(id: &str, change: impl FnOnce(&Path)) -> Setting {
    let model = model("llama");
    fs_err::write(model.path().join("LICENSE"), "free").unwrap();
    fs_err::write(model.path().join("README.md"), "not needed").unwrap();
    fs_err::write(model.path().join("pytorch_model.bin"), "not needed").unwrap();
    change(model.path());
    let repos = BTreeMap::from([(id.to_owned(), files(model.path()))]);
    let hub = Hub::start(Behaviour { repos, ..Behaviour::default() });
    let cache = tempfile::tempdir().unwrap();
    let at = source::Hub { cache: cache.path().to_owned(), endpoint: hub.endpoint(), token: Some("secret".into()), offline: false };
    let options = OpenOptions { hub: Some(at), ..OpenOptions::default() };
    Setting { hub, cache, model, options }
}

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs_err::read_dir(dir).unwrap().map(Result::unwrap);
    entries.map(|entry| (entry.file_name().into_string().unwrap(), fs_err::read(entry.path()).unwrap())).collect()
}

impl Setting {
    fn open(&self, name: &str) -> Result<Source, SourceError> {
        let (path, revision) = name.split_once('@').map_or((name, None), |(path, revision)| (path, Some(revision.to_owned())));
        source::open(&ModelRef { path: path.into(), revision, lora: None }, &self.options)
    }

    fn message(&self, name: &str) -> String {
        let message = self.open(name).err().expect("it opens").to_string();
        message.replace(self.cache.path().to_str().unwrap(), "[CACHE]").replace(&self.hub.port.to_string(), "[PORT]")
    }

    fn offline(&mut self) {
        if let Some(hub) = &mut self.options.hub {
            hub.offline = true;
        }
    }

    fn repo(&self) -> PathBuf {
        self.cache.path().join("models--someone--tiny")
    }

    /// Ranges of the requests for large files' bytes since the last call.
    fn ranges(&self) -> Vec<Option<String>> {
        let requests = self.hub.take_requests().into_iter();
        requests.filter(|request| request.line.starts_with("GET /cdn/")).map(|request| request.range).collect()
    }
}

#[test]
fn a_name_is_fetched_once_and_laid_out_as_python_does() {
    let setting = setting("someone/tiny", |_| ());
    let source = setting.open("someone/tiny").unwrap();
    assert_same_tensors(&source, &open(setting.model.path()).unwrap());
    assert_eq!(source.location, setting.repo().join("snapshots").join(COMMIT));
    assert_eq!(source.sidecars["LICENSE"].read().unwrap(), b"free");
    assert_eq!(fs_err::read_to_string(setting.repo().join("refs/main")).unwrap(), COMMIT);
    let fetched: Vec<_> = files(&source.location).into_keys().collect();
    assert_eq!(
        fetched,
        ["LICENSE", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    );
    #[cfg(unix)]
    {
        let link = fs_err::read_link(source.location.join("model.safetensors")).unwrap();
        let blob = source.location.join(&link);
        assert!(link.starts_with("../../blobs") && link.file_name().unwrap().len() == 64, "{link:?}");
        assert_eq!(fs_err::read(blob).unwrap(), fs_err::read(setting.model.path().join("model.safetensors")).unwrap());
    }
    assert!(!setting.hub.take_requests().is_empty());
    setting.open("someone/tiny").unwrap();
    setting.open(&format!("someone/tiny@{COMMIT}")).unwrap();
    assert_eq!(setting.hub.take_requests(), []);
}

#[test]
fn revisions_are_branches_tags_and_commits() {
    let setting = setting("someone/tiny", |_| ());
    setting.open("someone/tiny@v1").unwrap();
    setting.open("someone/tiny@refs/pr/1").unwrap();
    setting.open(&format!("someone/tiny@{COMMIT}")).unwrap();
    assert_eq!(fs_err::read_to_string(setting.repo().join("refs/v1")).unwrap(), COMMIT);
    assert_eq!(fs_err::read_to_string(setting.repo().join("refs/refs/pr/1")).unwrap(), COMMIT);
    assert!(!setting.repo().join("refs").join(COMMIT).exists());
}

#[test]
fn the_token_goes_to_the_hub_alone() {
    let setting = setting("someone/tiny", |_| ());
    setting.hub.behaviour.lock().unwrap().token = Some("secret".into());
    setting.open("someone/tiny").unwrap();
    let (cdn, hub): (Vec<Request>, Vec<Request>) =
        setting.hub.take_requests().into_iter().partition(|request| request.host.starts_with("localhost"));
    assert!(!cdn.is_empty() && cdn.iter().all(|request| request.authorization.is_none()), "{cdn:?}");
    assert!(hub.iter().all(|request| request.authorization.as_deref() == Some("Bearer secret")), "{hub:?}");
    assert!(!format!("{:?}", setting.options.hub).contains("secret"));
}

#[test]
fn a_connection_that_breaks_is_taken_up_again() {
    let setting = setting("someone/tiny", |_| ());
    setting.hub.behaviour.lock().unwrap().cuts = 1;
    let size = fs_err::metadata(setting.model.path().join("model.safetensors")).unwrap().len();
    let source = setting.open("someone/tiny").unwrap();
    assert_same_tensors(&source, &open(setting.model.path()).unwrap());
    assert_eq!(setting.ranges(), [None, Some(format!("bytes={}-", size / 2))]);
}

#[test]
fn a_download_that_broke_goes_on_in_the_next_run() {
    let setting = setting("someone/tiny", |_| ());
    setting.hub.behaviour.lock().unwrap().cuts = 3;
    let message = setting.message("someone/tiny");
    assert!(message.contains("run the command again to go on"), "{message}");
    assert!(!setting.repo().join("refs/main").exists());
    assert_eq!(setting.ranges().len(), 3);
    let source = setting.open("someone/tiny").unwrap();
    assert_same_tensors(&source, &open(setting.model.path()).unwrap());
    let size = fs_err::metadata(setting.model.path().join("model.safetensors")).unwrap().len();
    let done = size / 2 + (size - size / 2) / 2;
    let ranges = setting.ranges();
    assert_eq!(ranges.len(), 1);
    let start: u64 = ranges[0].as_ref().unwrap().trim_start_matches("bytes=").trim_end_matches('-').parse().unwrap();
    assert!(start > done && start < size, "{start} of {size}");
}

#[test]
fn a_server_that_sends_the_whole_file_again_does_no_harm() {
    let setting = setting("someone/tiny", |_| ());
    {
        let mut behaviour = setting.hub.behaviour.lock().unwrap();
        (behaviour.cuts, behaviour.ignores_range) = (1, true);
    }
    let source = setting.open("someone/tiny").unwrap();
    assert_same_tensors(&source, &open(setting.model.path()).unwrap());
}

#[test]
fn a_part_with_wrong_bytes_is_noticed() {
    let setting = setting("someone/tiny", |_| ());
    setting.hub.behaviour.lock().unwrap().cuts = 3;
    setting.open("someone/tiny").err().unwrap();
    let blobs = fs_err::read_dir(setting.repo().join("blobs")).unwrap().map(|entry| entry.unwrap().path());
    let part = blobs.into_iter().find(|path| path.extension().is_some_and(|e| e == "incomplete")).unwrap();
    let mut bytes = fs_err::read(&part).unwrap();
    bytes[1000] ^= 1;
    fs_err::write(&part, bytes).unwrap();
    let message = setting.message("someone/tiny");
    assert!(message.contains("model.safetensors of `someone/tiny@main` arrived as SHA-256"), "{message}");
    assert!(!part.exists());
    setting.open("someone/tiny").unwrap();
}

#[test]
fn shards_adapters_and_gguf_files_are_fetched() {
    let sharded = setting("someone/tiny", |dir| drop(models::shard(dir)));
    assert_same_tensors(&sharded.open("someone/tiny").unwrap(), &open(sharded.model.path()).unwrap());
    // A shard that is gone from the cache is fetched alone.
    let snapshot = sharded.repo().join("snapshots").join(COMMIT);
    fs_err::remove_file(snapshot.join("model-00002-of-00002.safetensors")).unwrap();
    sharded.hub.take_requests();
    sharded.open("someone/tiny").unwrap();
    assert!(!sharded.hub.take_requests().iter().any(|request| request.line.contains("model-00001")));

    let adapter = tempfile::tempdir().unwrap();
    fs_err::write(adapter.path().join("adapter_config.json"), r#"{"peft_type": "LORA", "base_model_name_or_path": "someone/tiny"}"#)
        .unwrap();
    let norm = vec![0u8; 64];
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::BF16, vec![32], &norm).unwrap();
    safetensors::serialize_to_file([("base_model.model.model.norm.weight", view)], None, &adapter.path().join("adapter_model.safetensors"))
        .unwrap();
    sharded.hub.behaviour.lock().unwrap().repos.insert("someone/lora".into(), files(adapter.path()));
    let merged = sharded.open("someone/lora").unwrap();
    assert_eq!(merged.weights.read("model.norm.weight").unwrap().data, norm);
}

#[test]
fn one_gguf_of_several_is_named_by_its_file() {
    let setting = setting("someone/tiny", |dir| {
        fs_err::rename(dir.join("model.safetensors"), dir.join("tiny.Q8_0.gguf")).unwrap();
        fs_err::write(dir.join("tiny.Q4_0.gguf"), "GGUF").unwrap();
    });
    assert_snapshot!(setting.message("someone/tiny"), @"`someone/tiny@main` has several GGUF files and nothing says which one is the model: tiny.Q4_0.gguf, tiny.Q8_0.gguf; name the file too: .../FILE.gguf");
    assert_snapshot!(setting.message("someone/tiny/tiny.Q2_K.gguf"), @"http://127.0.0.1:[PORT] answered about `someone/tiny@main`: there is no tiny.Q2_K.gguf; it has: LICENSE, README.md, config.json, generation_config.json, pytorch_model.bin, tiny.Q4_0.gguf, tiny.Q8_0.gguf, tokenizer.json, tokenizer_config.json");
    // Fetched and then read: this one breaks off after its first bytes.
    let message = setting.message("someone/tiny/tiny.Q4_0.gguf");
    assert!(message.contains("tiny.Q4_0.gguf`: its header claims 4 bytes"), "{message}");
    let requests = setting.hub.take_requests();
    assert!(!requests.iter().any(|request| request.line.contains("Q8_0")), "{requests:?}");
}

#[test]
fn offline_the_cache_must_have_it() {
    let mut setting = setting("someone/tiny", |dir| drop(models::shard(dir)));
    setting.offline();
    assert_snapshot!(setting.message("someone/tiny"), @"`someone/tiny@main` is not a path here, its snapshot is not in the Hub's cache (`[CACHE]`), and HF_HUB_OFFLINE forbids to fetch it: unset it, or fetch the model first");
    if let Some(hub) = &mut setting.options.hub {
        hub.offline = false;
    }
    setting.open("someone/tiny").unwrap();
    setting.offline();
    setting.hub.take_requests();
    setting.open("someone/tiny").unwrap();
    let snapshot = setting.repo().join("snapshots").join(COMMIT);
    fs_err::remove_file(snapshot.join("model-00002-of-00002.safetensors")).unwrap();
    assert_snapshot!(setting.message("someone/tiny"), @"`someone/tiny@main` is not a path here, its model-00002-of-00002.safetensors is not in the Hub's cache (`[CACHE]`), and HF_HUB_OFFLINE forbids to fetch it: unset it, or fetch the model first");
    assert_eq!(setting.hub.take_requests(), []);
}

#[test]
fn what_the_hub_refuses() {
    let mut setting = setting("someone/tiny", |_| ());
    assert_snapshot!(setting.message("someone/else"), @"`someone/else@main` is not a path here, and http://127.0.0.1:[PORT] answered 404: there is no such model, revision or file");
    assert_snapshot!(setting.message("someone/tiny@v2"), @"`someone/tiny@v2` is not a path here, and http://127.0.0.1:[PORT] answered 404: there is no such model, revision or file");
    setting.hub.behaviour.lock().unwrap().token = Some("another".into());
    assert_snapshot!(setting.message("someone/tiny"), @"`someone/tiny@main` is not a path here, and http://127.0.0.1:[PORT] answered 401: the token does not open it; accept its terms on its page, or use another token");
    if let Some(hub) = &mut setting.options.hub {
        hub.token = None;
    }
    assert_snapshot!(setting.message("someone/tiny"), @"`someone/tiny@main` is not a path here, and http://127.0.0.1:[PORT] answered 401: it does not exist, or is private or gated; if it is yours to use, set HF_TOKEN");
    assert_snapshot!(setting.message("not a name"), @"`not a name` is neither a file nor a directory here, nor a name on the Hub (`owner/name[@revision]`); check the path");
    assert_snapshot!(setting.message("someone/../tiny"), @"`someone/../tiny` is neither a file nor a directory here, nor a name on the Hub (`owner/name[@revision]`); check the path");
    assert_snapshot!(setting.message("someone/tiny@../../x"), @"`someone/tiny@../../x` is neither a file nor a directory here, nor a name on the Hub (`owner/name[@revision]`); check the path");
}

#[test]
fn a_repository_without_safetensors_says_so_before_anything_is_fetched() {
    let setting = setting("someone/tiny", |dir| fs_err::remove_file(dir.join("model.safetensors")).unwrap());
    assert_snapshot!(setting.message("someone/tiny"), @"`someone/tiny@main` has its weights only as PyTorch pickles (`pytorch_model.bin`), which are not read because they can run code; convert them: `AutoModelForCausalLM.from_pretrained(dir).save_pretrained(out, safe_serialization=True)`");
    assert_eq!(setting.hub.take_requests().len(), 1);
}

#[test]
fn a_path_goes_before_a_name() {
    let mut setting = setting("someone/tiny", |_| ());
    setting.offline();
    let path = setting.model.path().to_str().unwrap().to_owned();
    assert_eq!(setting.open(&path).unwrap().location, setting.model.path());
}

#[test]
fn progress_is_told() {
    #[derive(Default)]
    struct Log(Mutex<Vec<(String, u64, u64)>>);
    impl Progress for Log {
        fn start(&self, file: &str, total: u64, done: u64) {
            self.0.lock().unwrap().push((file.to_owned(), total, done));
        }
        fn advance(&self, bytes: u64) {
            self.0.lock().unwrap().last_mut().unwrap().2 += bytes;
        }
        fn finish(&self) {}
    }
    let mut setting = setting("someone/tiny", |_| ());
    let log = Arc::new(Log::default());
    setting.options.progress = Some(log.clone());
    setting.open("someone/tiny").unwrap();
    let log = log.0.lock().unwrap();
    assert_eq!(log.len(), 6);
    assert!(log.iter().all(|(_, total, done)| total == done), "{log:?}");
}
