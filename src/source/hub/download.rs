//! Fetching from the Hub into its cache, laid out as Python's: `blobs/ETAG`, `snapshots/COMMIT/FILE` linked to them, `refs/REVISION`.
//!
//! Only what opening a model needs is fetched. A blob grows as `ETAG.incomplete` and gets its name when its length, and its SHA-256 where
//! the Hub tells it, are right; a download that broke off goes on from there. (The `hf-hub` crate trusts a server to honour `Range`
//! and does not check what it has put together.)

use std::{
    io::{self, Read as _, Seek as _, Write as _},
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::Value;
use sha2::{Digest as _, Sha256};
use ureq::{
    Agent, Body,
    config::RedirectAuthHeaders,
    http::{HeaderMap, Response, StatusCode, header},
};

use super::{Hub, Repo};
use crate::source::{
    Progress, SourceError,
    place::{self, Files},
    safetensors::{is_plain_name, read_index, shards},
};

/// How often a file is tried before the user is told.
const TRIES: u32 = 3;
/// No listing or header is longer.
const MAX_LISTING: u64 = 32 << 20;

/// Fetches what the snapshot lacks; gives its directory.
pub(super) fn download(hub: &Hub, repo: &Repo, progress: Option<&dyn Progress>) -> Result<PathBuf, SourceError> {
    let session = Session { hub, repo, agent: agent(), progress: progress.unwrap_or(&Silent) };
    let (commit, names) = session.listing()?;
    let directory = hub.directory(repo);
    let snapshot = directory.join("snapshots").join(&commit);
    fs_err::create_dir_all(&snapshot)?;
    fs_err::create_dir_all(directory.join("blobs"))?;
    let fetch = |name: &str| session.file(&directory, &snapshot, &commit, name);
    if let Some(file) = &repo.file {
        if !names.contains(file) {
            return Err(session.protocol(format!("there is no {file}; it has: {}", names.join(", "))));
        }
        fetch(file)?;
    } else {
        let files = place::files(&repo.to_string(), &names)?;
        // The weights come last: where they are, the rest is.
        for name in place::sidecar_names(&names) {
            fetch(name)?;
        }
        match files {
            Files::Gguf(file) => fetch(&file)?,
            Files::Adapter => {
                fetch(place::ADAPTER_CONFIG)?;
                fetch(place::ADAPTER_WEIGHTS)?;
            }
            Files::One(file) => {
                fetch(place::CONFIG)?;
                fetch(&file)?;
            }
            Files::Sharded => {
                fetch(place::CONFIG)?;
                fetch(place::INDEX)?;
                for shard in shards(&read_index(&snapshot.join(place::INDEX))?) {
                    fetch(shard)?;
                }
            }
        }
    }
    // A snapshot that a reference leads to is whole.
    if repo.revision != commit {
        let reference = directory.join("refs").join(&repo.revision);
        if let Some(parent) = reference.parent() {
            fs_err::create_dir_all(parent)?;
        }
        fs_err::write(reference, &commit)?;
    }
    Ok(snapshot)
}

struct Session<'a> {
    hub: &'a Hub,
    repo: &'a Repo,
    agent: Agent,
    progress: &'a dyn Progress,
}

/// What the Hub says about a file before it is fetched.
struct Announced {
    etag: String,
    size: u64,
}

impl Session<'_> {
    /// The revision's commit and its files. (Files in subdirectories are none of ours.)
    fn listing(&self) -> Result<(String, Vec<String>), SourceError> {
        let Repo { id, revision, .. } = self.repo;
        let url = format!("{}/api/models/{id}/revision/{}", self.hub.endpoint, revision.replace('/', "%2F"));
        let mut response = self.call(self.get(&url), "the listing")?;
        self.check(response.status())?;
        let text = response.body_mut().with_config().limit(MAX_LISTING).read_to_string();
        let text = text.map_err(|error| self.network("the listing", &error))?;
        let json: Value = serde_json::from_str(&text).map_err(|error| self.protocol(format!("the listing is not JSON ({error})")))?;
        let commit = json.get("sha").and_then(Value::as_str).filter(|sha| is_plain_name(sha));
        let commit = commit.ok_or_else(|| self.protocol("the listing names no commit (`sha`)".into()))?;
        let siblings = json.get("siblings").and_then(Value::as_array);
        let names = siblings.into_iter().flatten().filter_map(|file| file.get("rfilename")?.as_str()).filter(|name| is_plain_name(name));
        Ok((commit.to_owned(), names.map(str::to_owned).collect()))
    }

    /// Fetches one file into the snapshot unless it is there.
    fn file(&self, directory: &Path, snapshot: &Path, commit: &str, name: &str) -> Result<(), SourceError> {
        let link = snapshot.join(name);
        if link.exists() {
            return Ok(());
        }
        let url = format!("{}/{}/resolve/{commit}/{}", self.hub.endpoint, self.repo.id, percent_encode(name));
        let announced = self.head(&url, name)?;
        let blobs = directory.join("blobs");
        let blob = blobs.join(&announced.etag);
        let lock = self.lock(directory, &announced.etag)?;
        if !blob.exists() {
            let part = blobs.join(format!("{}.incomplete", announced.etag));
            let mut tried = 1;
            while let Err(error) = self.body(&url, name, &part, &announced) {
                if tried == TRIES || !matches!(error, SourceError::Network { .. }) {
                    return Err(error);
                }
                std::thread::sleep(Duration::from_millis(200) * tried);
                tried += 1;
            }
            self.verify(name, &part, &announced)?;
            fs_err::rename(&part, &blob)?;
            self.progress.finish();
        }
        drop(lock);
        symlink(&Path::new("../../blobs").join(&announced.etag), &blob, &link)?;
        Ok(())
    }

    /// Asks for a file's name in `blobs/` and its length. The Hub tells them before it redirects to where the bytes lie.
    fn head(&self, url: &str, name: &str) -> Result<Announced, SourceError> {
        let mut url = url.to_owned();
        for _ in 0..5 {
            let request = self.agent.head(&url).header(header::ACCEPT_ENCODING, "identity");
            let request = request.config().max_redirects(0).max_redirects_will_error(false).build();
            let response = self.call(self.authorise(request), name)?;
            let (status, headers) = (response.status(), response.headers());
            // A repository that was renamed redirects within the Hub.
            if let Some(path) = text(headers, "location").filter(|to| status.is_redirection() && to.starts_with('/')) {
                url = format!("{}{path}", origin(&self.hub.endpoint));
                continue;
            }
            if !status.is_redirection() {
                self.check(status)?;
            }
            let announced = |linked, plain| text(headers, linked).or_else(|| text(headers, plain));
            let etag = announced("x-linked-etag", "etag").map(|etag| etag.trim_start_matches("W/").trim_matches('"'));
            let etag = etag.filter(|etag| !etag.is_empty() && etag.chars().all(|c| c.is_ascii_alphanumeric() || c == '-'));
            let size = announced("x-linked-size", "content-length").and_then(|size| size.parse().ok());
            return match (etag, size) {
                (Some(etag), Some(size)) => Ok(Announced { etag: etag.to_owned(), size }),
                _ => Err(self.protocol(format!("{name} comes without a usable `etag` or length"))),
            };
        }
        Err(self.protocol(format!("{name} is redirected in circles")))
    }

    /// Appends what is missing to the partial file.
    fn body(&self, url: &str, name: &str, part: &Path, announced: &Announced) -> Result<(), SourceError> {
        let mut file = fs_err::OpenOptions::new().create(true).append(true).open(part)?;
        let mut done = file.metadata()?.len();
        if done > announced.size {
            file.set_len(0)?;
            done = 0;
        }
        let mut request = self.get(url).header(header::ACCEPT_ENCODING, "identity");
        if done > 0 {
            if done == announced.size {
                return Ok(());
            }
            request = request.header(header::RANGE, format!("bytes={done}-"));
        }
        let response = self.call(request, name)?;
        self.check(response.status())?;
        // A server may answer with the whole file instead.
        let continues = response.status() == StatusCode::PARTIAL_CONTENT
            && text(response.headers(), "content-range").is_some_and(|range| range.starts_with(&format!("bytes {done}-")));
        if done > 0 && !continues {
            file.set_len(0)?;
            done = 0;
        }
        self.progress.start(name, announced.size, done);
        // One byte more than announced is enough to see that something is wrong.
        let mut reader = response.into_body().into_reader().take(announced.size - done + 1);
        let mut buffer = vec![0; 1 << 18];
        loop {
            let read = reader.read(&mut buffer).map_err(|error| self.network(name, &error))?;
            if read == 0 {
                break;
            }
            file.write_all(&buffer[..read])?;
            self.progress.advance(read as u64);
        }
        file.sync_all()?;
        match file.metadata()?.len() {
            length if length < announced.size => Err(self.network(name, &format!("it ended after {length} of {} bytes", announced.size))),
            _ => Ok(()),
        }
    }

    /// Compares the whole download with what was announced; deletes it if it differs.
    fn verify(&self, name: &str, part: &Path, announced: &Announced) -> Result<(), SourceError> {
        let mut file = fs_err::File::open(part)?;
        let length = file.seek(io::SeekFrom::End(0))?;
        let mut found = format!("{length} bytes");
        let mut expected = format!("{} bytes", announced.size);
        // Large files are named by their SHA-256, small ones by Git's hash.
        if length == announced.size && announced.etag.len() == 64 {
            file.rewind()?;
            let mut hash = Sha256::new();
            io::copy(&mut file, &mut hash)?;
            found = format!("SHA-256 {:x}", hash.finalize());
            expected = format!("SHA-256 {}", announced.etag);
        }
        if found == expected {
            return Ok(());
        }
        fs_err::remove_file(part)?;
        Err(SourceError::Corrupt { model: self.repo.to_string(), file: name.to_owned(), expected, found })
    }

    /// Keeps other processes, Python's among them, from writing the same blob. Freed when dropped.
    fn lock(&self, directory: &Path, etag: &str) -> Result<fs_err::File, SourceError> {
        let locks = self.hub.cache.join(".locks").join(directory.file_name().unwrap_or_default());
        fs_err::create_dir_all(&locks)?;
        let file = fs_err::File::create(locks.join(format!("{etag}.lock")))?;
        file.file().lock()?;
        Ok(file)
    }

    fn get(&self, url: &str) -> ureq::RequestBuilder<ureq::typestate::WithoutBody> {
        self.authorise(self.agent.get(url))
    }

    fn authorise<B>(&self, request: ureq::RequestBuilder<B>) -> ureq::RequestBuilder<B> {
        match &self.hub.token {
            Some(token) => request.header(header::AUTHORIZATION, format!("Bearer {token}")),
            None => request,
        }
    }

    fn call(&self, request: ureq::RequestBuilder<ureq::typestate::WithoutBody>, what: &str) -> Result<Response<Body>, SourceError> {
        request.call().map_err(|error| self.network(what, &error))
    }

    fn check(&self, status: StatusCode) -> Result<(), SourceError> {
        let hint = match status.as_u16() {
            200..=299 => return Ok(()),
            401 | 403 if self.hub.token.is_some() => "the token does not open it; accept its terms on its page, or use another token",
            401 | 403 => "it does not exist, or is private or gated; if it is yours to use, set HF_TOKEN",
            404 => "there is no such model, revision or file",
            429 => "too many requests; wait a little, or set HF_TOKEN",
            _ => "try again later",
        };
        Err(SourceError::Refused { model: self.repo.to_string(), endpoint: self.hub.endpoint.clone(), status: status.as_u16(), hint })
    }

    fn network(&self, what: &str, error: &dyn std::fmt::Display) -> SourceError {
        SourceError::Network { model: self.repo.to_string(), what: what.to_owned(), reason: error.to_string() }
    }

    fn protocol(&self, reason: String) -> SourceError {
        SourceError::Protocol { model: self.repo.to_string(), endpoint: self.hub.endpoint.clone(), reason }
    }
}

/// Redirects drop the token unless they stay on the host. There is no limit on a whole download, only on silence.
fn agent() -> Agent {
    Agent::config_builder()
        .http_status_as_error(false)
        .redirect_auth_headers(RedirectAuthHeaders::SameHost)
        .user_agent(concat!("upcycle/", env!("CARGO_PKG_VERSION")))
        .timeout_connect(Some(Duration::from_secs(20)))
        .timeout_recv_response(Some(Duration::from_secs(60)))
        .timeout_per_read(Some(Duration::from_secs(60)))
        .build()
        .into()
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// `https://host` of an address.
fn origin(url: &str) -> &str {
    let host = url.find("://").map_or(0, |at| at + 3);
    url[host..].find('/').map_or(url, |slash| &url[..host + slash])
}

/// File names may hold anything but a slash.
fn percent_encode(name: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte);
    name.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

/// Links a snapshot's file to its blob; where there are no symlinks, moves it, as Python does.
fn symlink(relative: &Path, blob: &Path, link: &Path) -> io::Result<()> {
    #[cfg(unix)]
    {
        let _ = blob;
        match fs_err::os::unix::fs::symlink(relative, link) {
            // Another process was faster.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            done => done,
        }
    }
    #[cfg(not(unix))]
    {
        let _ = relative;
        fs_err::rename(blob, link)
    }
}

/// Nobody watches.
struct Silent;

impl Progress for Silent {
    fn start(&self, _: &str, _: u64, _: u64) {}
    fn advance(&self, _: u64) {}
    fn finish(&self) {}
}
