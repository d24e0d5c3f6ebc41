//! A Hub on this machine: the part of its HTTP API that downloads use, with switches for everything that can go wrong.
//!
//! Large files (`.safetensors`, `.gguf`) are redirected to another host name, as the Hub does, so that a token that follows is noticed.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Write as _},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
};

use sha2::{Digest as _, Sha256};

/// The commit that every known revision stands for.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the server does.
#[derive(Default)]
pub struct Behaviour {
    /// Repositories by id, files by name.
    pub repos: BTreeMap<String, BTreeMap<String, Vec<u8>>>,
    /// If set, requests without it are refused.
    pub token: Option<String>,
    /// So many bodies of large files break off in the middle.
    pub cuts: usize,
    /// `Range` is not honoured.
    pub ignores_range: bool,
}

/// A request as it came in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    pub line: String,
    pub host: String,
    pub range: Option<String>,
    pub authorization: Option<String>,
}

/// The running server; it ends with the process.
pub struct Hub {
    pub port: u16,
    pub behaviour: Arc<Mutex<Behaviour>>,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Hub {
    pub fn start(behaviour: Behaviour) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let hub = Self { port, behaviour: Arc::new(Mutex::new(behaviour)), requests: Arc::default() };
        let (behaviour, requests) = (hub.behaviour.clone(), hub.requests.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (behaviour, requests) = (behaviour.clone(), requests.clone());
                // A client that hangs up early is no failure of the server.
                std::thread::spawn(move || answer(stream, port, &behaviour, &requests).ok());
            }
        });
        hub
    }

    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// The requests since the last call.
    pub fn take_requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.requests.lock().unwrap())
    }
}

fn answer(stream: TcpStream, port: u16, behaviour: &Mutex<Behaviour>, requests: &Mutex<Vec<Request>>) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let line = lines.next().transpose()?.unwrap_or_default();
    let mut request = Request { line: line.trim_end_matches(" HTTP/1.1").into(), host: String::new(), range: None, authorization: None };
    for line in lines.map_while(Result::ok).take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(": ").unwrap();
        match name.to_ascii_lowercase().as_str() {
            "host" => value.clone_into(&mut request.host),
            "range" => request.range = Some(value.into()),
            "authorization" => request.authorization = Some(value.into()),
            _ => {}
        }
    }
    requests.lock().unwrap().push(request.clone());
    let reply = reply(&request, port, &mut behaviour.lock().unwrap());
    let mut stream = stream;
    write!(stream, "HTTP/1.1 {}\r\nConnection: close\r\nContent-Length: {}\r\n", reply.status, reply.length.unwrap_or(reply.body.len()))?;
    for (name, value) in &reply.headers {
        write!(stream, "{name}: {value}\r\n")?;
    }
    stream.write_all(b"\r\n")?;
    if !request.line.starts_with("HEAD ") {
        stream.write_all(&reply.body)?;
    }
    stream.flush()
}

#[derive(Default)]
struct Reply {
    status: String,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    /// If the body is not as long as announced.
    length: Option<usize>,
}

fn status(status: &str) -> Reply {
    Reply { status: status.into(), ..Reply::default() }
}

fn reply(request: &Request, port: u16, behaviour: &mut Behaviour) -> Reply {
    let (method, path) = request.line.split_once(' ').unwrap();
    // Where the bytes lie; no token is known there.
    if let Some(rest) = path.strip_prefix("/cdn/") {
        let mut parts = rest.splitn(3, '/');
        let id = format!("{}/{}", parts.next().unwrap(), parts.next().unwrap());
        return body(request, behaviour.repos[&id][parts.next().unwrap()].clone(), behaviour);
    }
    if behaviour.token.as_ref().is_some_and(|token| request.authorization.as_deref() != Some(&format!("Bearer {token}"))) {
        return status("401 Unauthorized");
    }
    let known = |revision: &str| matches!(revision, "main" | "v1" | "refs%2Fpr%2F1" | COMMIT);
    if let Some(rest) = path.strip_prefix("/api/models/") {
        let (id, revision) = rest.split_once("/revision/").unwrap();
        let Some(files) = behaviour.repos.get(id).filter(|_| known(revision)) else { return status("404 Not Found") };
        let siblings: Vec<_> = files.keys().map(|name| serde_json::json!({"rfilename": name})).collect();
        let listing = serde_json::json!({"id": id, "sha": COMMIT, "siblings": siblings});
        return Reply { body: listing.to_string().into_bytes(), ..status("200 OK") };
    }
    let Some((id, (revision, name))) = path[1..].split_once("/resolve/").and_then(|(id, rest)| Some((id, rest.split_once('/')?))) else {
        return status("404 Not Found");
    };
    let file = behaviour.repos.get(id).and_then(|files| files.get(name)).filter(|_| known(revision)).cloned();
    let Some(file) = file else { return status("404 Not Found") };
    let hash = format!("{:x}", Sha256::digest(&file));
    let commit = ("X-Repo-Commit", COMMIT.to_owned());
    if std::path::Path::new(name).extension().is_some_and(|e| e == "safetensors" || e == "gguf") {
        let linked = [("X-Linked-Etag", format!("\"{hash}\"")), ("X-Linked-Size", file.len().to_string())];
        let location = ("Location", format!("http://localhost:{port}/cdn/{id}/{name}"));
        return Reply { headers: [commit, location].into_iter().chain(linked).collect(), ..status("302 Found") };
    }
    // Small files are named by a hash of another length.
    let headers = vec![commit, ("ETag", format!("W/\"{}\"", &hash[..40]))];
    let length = (method == "HEAD").then_some(file.len());
    Reply { headers, body: file, length, ..status("200 OK") }
}

fn body(request: &Request, file: Vec<u8>, behaviour: &mut Behaviour) -> Reply {
    let start = request.range.as_ref().filter(|_| !behaviour.ignores_range);
    let start: usize = start.map_or(0, |range| range.trim_start_matches("bytes=").trim_end_matches('-').parse().unwrap());
    let mut reply = if start == 0 {
        Reply { body: file, ..status("200 OK") }
    } else {
        let range = format!("bytes {start}-{}/{}", file.len() - 1, file.len());
        Reply { headers: vec![("Content-Range", range)], body: file[start..].to_vec(), ..status("206 Partial Content") }
    };
    if behaviour.cuts > 0 {
        behaviour.cuts -= 1;
        reply.length = Some(reply.body.len());
        reply.body.truncate(reply.body.len() / 2);
    }
    reply
}
