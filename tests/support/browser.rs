//! A headless Chromium over the `DevTools` protocol, through its pipes: no port, no driver, no crate.
//!
//! Where there is none, tests that want one say so and pass.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{self, Receiver},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(60);
const NAMES: [&str; 4] = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"];
const FLAGS: [&str; 9] = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
    "--window-size=1280,800",
];

/// A request that the page made.
#[derive(Debug, Clone)]
pub struct Asked {
    /// where
    pub url: String,
    /// with what body, `null` without one
    pub body: Value,
    /// with what key
    pub authorization: Option<String>,
}

/// What requests whose address ends like this get instead of the server's answer.
struct Canned {
    path: &'static str,
    status: u16,
    body: String,
}

/// A page in a browser of its own, closed when dropped.
pub struct Page {
    browser: Child,
    commands: ChildStdin,
    messages: Receiver<Value>,
    session: Option<String>,
    last: u64,
    asked: Vec<Asked>,
    /// what went wrong in its scripts
    pub exceptions: Vec<String>,
    canned: Vec<Canned>,
    _profile: TempDir,
}

impl Page {
    /// An empty page, or none, aloud, where there is no browser.
    pub fn new() -> Option<Self> {
        let there = |name: &&str| Command::new(name).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
        let Some(name) = NAMES.into_iter().find(there) else {
            eprintln!("skipped: there is no Chromium");
            return None;
        };
        let profile = tempfile::tempdir().unwrap();
        // Chromium reads commands from descriptor 3 and writes to 4.
        let mut browser = Command::new("sh")
            .args(["-c", r#"exec "$0" "$@" 3<&0 4>&1 </dev/null >/dev/null"#, name])
            .args(FLAGS)
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (tell, messages) = mpsc::channel();
        let output = BufReader::new(browser.stdout.take().unwrap());
        thread::spawn(move || {
            for message in output.split(0).map_while(Result::ok) {
                let _ = tell.send(serde_json::from_slice(&message).unwrap());
            }
        });
        let commands = browser.stdin.take().unwrap();
        let (asked, exceptions, canned) = (Vec::new(), Vec::new(), Vec::new());
        let mut page = Self { browser, commands, messages, session: None, last: 0, asked, exceptions, canned, _profile: profile };
        let target = page.call("Target.createTarget", &json!({"url": "about:blank"}))["targetId"].clone();
        let attached = page.call("Target.attachToTarget", &json!({"targetId": target, "flatten": true}));
        page.session = Some(attached["sessionId"].as_str().unwrap().to_owned());
        for domain in ["Page", "Runtime", "Network"] {
            page.call(&format!("{domain}.enable"), &json!({}));
        }
        Some(page)
    }

    /// Sends a command and waits for what it gives.
    pub fn call(&mut self, method: &str, params: &Value) -> Value {
        let id = self.send(method, params);
        let end = Instant::now() + PATIENCE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let message = self.messages.recv_timeout(left).unwrap_or_else(|error| panic!("{method}: {error}"));
            if message["id"] == id {
                assert!(message.get("error").is_none(), "{method}: {message}");
                return message["result"].clone();
            }
            self.notice(&message);
        }
    }

    fn send(&mut self, method: &str, params: &Value) -> u64 {
        self.last += 1;
        let mut command = json!({"id": self.last, "method": method, "params": params});
        if let Some(session) = &self.session {
            command["sessionId"] = json!(session);
        }
        self.commands.write_all(format!("{command}\0").as_bytes()).unwrap();
        self.last
    }

    fn notice(&mut self, event: &Value) {
        let params = &event["params"];
        match event["method"].as_str() {
            Some("Network.requestWillBeSent") => {
                let request = &params["request"];
                let body = request["postData"].as_str().map_or(Value::Null, |body| serde_json::from_str(body).unwrap());
                let authorization = request["headers"]["Authorization"].as_str().map(str::to_owned);
                self.asked.push(Asked { url: request["url"].as_str().unwrap().to_owned(), body, authorization });
            }
            Some("Runtime.exceptionThrown") => self.exceptions.push(params["exceptionDetails"].to_string()),
            Some("Fetch.requestPaused") => {
                let (id, url) = (&params["requestId"], params["request"]["url"].as_str().unwrap());
                match self.canned.iter().find(|canned| url.split('?').next().unwrap().ends_with(canned.path)) {
                    Some(Canned { status, body, .. }) => {
                        use base64::{Engine as _, prelude::BASE64_STANDARD};
                        let reply = json!({"requestId": id, "responseCode": status, "body": BASE64_STANDARD.encode(body)});
                        self.send("Fetch.fulfillRequest", &reply);
                    }
                    None => drop(self.send("Fetch.continueRequest", &json!({"requestId": id}))),
                }
            }
            _ => {}
        }
    }

    /// From now on requests to this path get this answer.
    pub fn can(&mut self, path: &'static str, status: u16, body: impl Into<String>) {
        self.canned.retain(|canned| canned.path != path);
        self.canned.push(Canned { path, status, body: body.into() });
        self.call("Fetch.enable", &json!({"patterns": [{"urlPattern": "*/v1/*"}]}));
    }

    /// From now on the server answers everything itself.
    pub fn can_nothing(&mut self) {
        self.canned.clear();
        self.call("Fetch.disable", &json!({}));
    }

    /// Goes to an address.
    pub fn open(&mut self, url: &str) {
        self.call("Page.navigate", &json!({"url": url}));
        self.wait("document.readyState === 'complete'");
    }

    /// Loads the page again.
    pub fn reload(&mut self) {
        self.eval("window.before = true");
        self.call("Page.reload", &json!({}));
        self.wait("!window.before && document.readyState === 'complete'");
    }

    /// The value of an expression.
    pub fn eval(&mut self, expression: &str) -> Value {
        let params = json!({"expression": expression, "awaitPromise": true, "returnByValue": true});
        let result = self.call("Runtime.evaluate", &params);
        assert!(result.get("exceptionDetails").is_none(), "{expression}: {result}");
        result["result"].get("value").cloned().unwrap_or(Value::Null)
    }

    /// The value of an expression, as text.
    pub fn text(&mut self, expression: &str) -> String {
        self.eval(expression).as_str().unwrap_or_else(|| panic!("{expression} is no text")).to_owned()
    }

    /// Waits until an expression is true.
    pub fn wait(&mut self, expression: &str) {
        let end = Instant::now() + PATIENCE;
        while self.eval(&format!("Boolean({expression})")) != json!(true) {
            assert!(Instant::now() < end, "never: {expression}\n{}", self.text("document.body.innerText"));
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Clicks on what a selector finds first.
    pub fn click(&mut self, selector: &str) {
        self.eval(&format!("document.querySelector({}).click()", json!(selector)));
    }

    /// Puts text in where the caret is.
    pub fn write(&mut self, text: &str) {
        self.call("Input.insertText", &json!({"text": text}));
    }

    /// Presses a key.
    pub fn press(&mut self, key: &str) {
        let (code, text) = match key {
            "Tab" => (9, ""),
            "Enter" => (13, "\r"),
            "Escape" => (27, ""),
            "Space" => (32, " "),
            "ArrowRight" => (39, ""),
            _ => panic!("no key {key}"),
        };
        let key = if key == "Space" { " " } else { key };
        let mut event = json!({"type": "keyDown", "key": key, "code": key, "windowsVirtualKeyCode": code, "text": text});
        self.call("Input.dispatchKeyEvent", &event);
        event["type"] = json!("keyUp");
        event["text"] = json!("");
        self.call("Input.dispatchKeyEvent", &event);
    }

    /// All requests so far.
    pub fn asked(&mut self) -> &[Asked] {
        // What was noticed before this answer came has been read by then.
        self.eval("0");
        &self.asked
    }

    /// Bodies of the requests to a path.
    pub fn bodies(&mut self, path: &str) -> Vec<Value> {
        self.asked().iter().filter(|asked| asked.url.ends_with(path)).map(|asked| asked.body.clone()).collect()
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        self.session = None;
        self.last += 1;
        let close = format!("{}\0", json!({"id": self.last, "method": "Browser.close"}));
        let _ = self.commands.write_all(close.as_bytes());
        let _ = self.browser.wait();
    }
}
