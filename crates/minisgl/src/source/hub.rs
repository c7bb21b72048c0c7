//! The Hugging Face hub and its cache folder, which the Python tools share.
//!
//! Layout, as `huggingface_hub` documents it: `models--org--name/` with `refs/<revision>` (a
//! commit), `blobs/<etag>` (contents) and `snapshots/<commit>/<file>` (links to blobs).

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use ureq::Agent;
use ureq::http::Response;

use super::download::{RemoteFile, agent, fetch_all};
use super::{HubId, choose_files, env_flag, env_path, env_text, is_safe_path, user_cache};

/// The hub as the environment describes it.
pub struct Hub {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
    cache: PathBuf,
    offline: bool,
}

/// A model in the cache.
#[derive(Clone, Debug)]
pub struct CachedModel {
    /// `org/name`.
    pub repo: String,
    /// Its newest snapshot's folder.
    pub path: PathBuf,
    /// Of all its blobs.
    pub bytes: u64,
}

impl Hub {
    /// Reads `HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_CACHE`, `HF_HOME`, `HF_HUB_OFFLINE`.
    ///
    /// # Errors
    /// None so far; the signature leaves room for a bad environment.
    pub fn from_env() -> Result<Self> {
        Ok(Self {
            agent: agent(),
            endpoint: endpoint(),
            token: token(),
            cache: cache(),
            offline: env_flag("HF_HUB_OFFLINE"),
        })
    }

    /// The snapshot's folder, or the file in it that `id` names. Asks the hub which commit the
    /// revision is, and fetches what the cache lacks; where the hub cannot be reached, a snapshot
    /// in the cache will do.
    ///
    /// # Errors
    /// If neither has the model.
    pub fn fetch(&self, id: &HubId, revision: &str, weights: bool) -> Result<PathBuf> {
        if !is_safe_path(revision) {
            bail!("{revision:?} is no revision");
        }
        let folder = self.cache.join(format!("models--{}", id.repo.replace('/', "--")));
        if self.offline {
            return cached(&folder, id, revision, weights)
                .context("HF_HUB_OFFLINE is set, and the cache does not have it");
        }
        let info = match self.info(id, revision) {
            Ok(info) => info,
            Err(error) => {
                let path = cached(&folder, id, revision, weights).map_err(|_| error)?;
                eprintln!("The hub cannot be reached; taking {} from the cache.", id.repo);
                return Ok(path);
            }
        };
        self.fetch_snapshot(&folder, id, revision, &info, weights)
    }

    fn fetch_snapshot(
        &self,
        folder: &Path,
        id: &HubId,
        revision: &str,
        info: &RepoInfo,
        weights: bool,
    ) -> Result<PathBuf> {
        let names: Vec<String> = info
            .siblings
            .iter()
            .map(|file| file.rfilename.clone())
            .filter(|n| is_safe_path(n))
            .collect();
        let names = choose_files(&names, id, weights)?;
        let snapshot = folder.join("snapshots").join(&info.sha);
        let missing: Vec<&String> =
            names.iter().filter(|name| !snapshot.join(name).exists()).collect();
        let blobs = folder.join("blobs");
        let files: Vec<RemoteFile> = missing
            .iter()
            .map(|name| self.describe(id, &info.sha, name, &blobs))
            .collect::<Result<_>>()?;
        fetch_all(&self.agent, self.token.as_deref(), &files)?;
        for (name, file) in missing.iter().zip(&files) {
            link(&file.target, &snapshot.join(name))?;
        }
        // A commit is its own name and needs no reference.
        if revision != info.sha {
            let reference = folder.join("refs").join(revision);
            fs::create_dir_all(reference.parent().unwrap_or(folder))?;
            fs::write(&reference, &info.sha)
                .with_context(|| format!("writing {}", reference.display()))?;
        }
        Ok(result_path(&snapshot, &names))
    }

    /// Which commit a revision is, and its files.
    fn info(&self, id: &HubId, revision: &str) -> Result<RepoInfo> {
        let url = format!("{}/api/models/{}/revision/{revision}", self.endpoint, id.repo);
        let mut response = self.request(self.agent.get(&url)).call().context(url.clone())?;
        match response.status().as_u16() {
            200 => {}
            401 | 403 if self.token.is_none() => bail!(
                "{url}: not public, or it does not exist; if it is yours to read, set HF_TOKEN"
            ),
            401 | 403 => bail!("{url}: HF_TOKEN may not read it (has its licence been accepted?)"),
            404 => bail!("{url}: no such model or revision"),
            status => bail!("{url}: the hub answers {status}"),
        }
        let info: RepoInfo = serde_json::from_reader(response.body_mut().as_reader())
            .with_context(|| format!("{url}: not the answer of a hub"))?;
        if info.sha.is_empty() || !info.sha.chars().all(|c| c.is_ascii_alphanumeric()) {
            bail!("{url}: {:?} is no commit", info.sha);
        }
        Ok(info)
    }

    /// Asks for a file's size and hash. Large files are redirected to a store whose own ETag means
    /// nothing; the hub's answer before the redirect has what counts.
    fn describe(&self, id: &HubId, commit: &str, name: &str, blobs: &Path) -> Result<RemoteFile> {
        let url = format!("{}/{}/resolve/{commit}/{name}", self.endpoint, id.repo);
        let request = self.request_head(&url);
        let response = request.call().with_context(|| url.clone())?;
        let status = response.status();
        if !status.is_success() && !status.is_redirection() {
            bail!("{url}: the hub answers {status}");
        }
        let etag = header(&response, "x-linked-etag").or_else(|| header(&response, "etag"));
        let etag = etag.map(|etag| etag.trim_start_matches("W/").trim_matches('"').to_string());
        let etag = etag
            .filter(|etag| {
                !etag.is_empty() && etag.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
            })
            .with_context(|| format!("{url}: the answer has no ETag"))?;
        let size = header(&response, "x-linked-size")
            .or_else(|| header(&response, "content-length").filter(|_| status.is_success()))
            .and_then(|size| size.parse().ok());
        // The ETag of a large file is its SHA-256; that of a small one is git's hash.
        let sha256 = (etag.len() == 64).then(|| etag.clone());
        Ok(RemoteFile { name: name.to_string(), url, target: blobs.join(etag), size, sha256 })
    }

    fn request<T>(&self, request: ureq::RequestBuilder<T>) -> ureq::RequestBuilder<T> {
        match &self.token {
            Some(token) => request.header("Authorization", format!("Bearer {token}")),
            None => request,
        }
    }

    fn request_head(&self, url: &str) -> ureq::RequestBuilder<ureq::typestate::WithoutBody> {
        let request = self.agent.head(url).header("Accept-Encoding", "identity");
        self.request(request).config().max_redirects(0).max_redirects_will_error(false).build()
    }

    /// What the cache holds.
    ///
    /// # Errors
    /// If the cache folder is there and cannot be read.
    pub fn cached_models(&self) -> Result<Vec<CachedModel>> {
        let Ok(entries) = fs::read_dir(&self.cache) else {
            return Ok(Vec::new());
        };
        let mut models = Vec::new();
        for entry in entries {
            let folder = entry?.path();
            let name = folder.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let Some(repo) = name.strip_prefix("models--") else { continue };
            let Some(path) = newest_snapshot(&folder) else { continue };
            let repo = repo.replacen("--", "/", 1);
            models.push(CachedModel { repo, path, bytes: folder_bytes(&folder.join("blobs")) });
        }
        models.sort_by(|a, b| a.repo.cmp(&b.repo));
        Ok(models)
    }
}

#[derive(Deserialize)]
struct RepoInfo {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

/// The hub's address.
pub(super) fn endpoint() -> String {
    let endpoint = env_text("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_string());
    endpoint.trim_end_matches('/').to_string()
}

/// `HF_TOKEN`, or what `hf auth login` has stored.
pub(super) fn token() -> Option<String> {
    env_text("HF_TOKEN").or_else(|| {
        let stored = fs::read_to_string(hf_home().join("token")).ok()?;
        Some(stored.trim().to_string()).filter(|token| !token.is_empty())
    })
}

fn hf_home() -> PathBuf {
    env_path("HF_HOME").unwrap_or_else(|| user_cache().join("huggingface"))
}

fn cache() -> PathBuf {
    env_path("HF_HUB_CACHE").unwrap_or_else(|| hf_home().join("hub"))
}

fn header<T>(response: &Response<T>, name: &str) -> Option<String> {
    response.headers().get(name)?.to_str().ok().map(str::to_string)
}

/// A snapshot of the cache that has all that is needed, as far as can be told without the hub.
fn cached(folder: &Path, id: &HubId, revision: &str, weights: bool) -> Result<PathBuf> {
    let reference = folder.join("refs").join(revision);
    let commit = match fs::read_to_string(&reference) {
        Ok(commit) => commit.trim().to_string(),
        Err(_) => revision.to_string(),
    };
    let snapshot = folder.join("snapshots").join(&commit);
    let mut names = file_names(&snapshot)
        .with_context(|| format!("no snapshot of {revision} at {}", snapshot.display()))?;
    if let Some(file) = id.file.as_ref().filter(|file| snapshot.join(file).exists()) {
        names.push(file.clone());
    }
    let names = choose_files(&names, id, true)
        .or_else(|error| if weights { Err(error) } else { Ok(vec!["config.json".to_string()]) })?;
    if weights {
        check_shards(&snapshot)?;
    }
    Ok(result_path(&snapshot, &names))
}

/// What is in a folder, without links that lead nowhere.
pub(super) fn file_names(folder: &Path) -> std::io::Result<Vec<String>> {
    let names = fs::read_dir(folder)?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| folder.join(name).exists());
    Ok(names.collect())
}

/// An interrupted download leaves an index without all its shards.
pub(super) fn check_shards(snapshot: &Path) -> Result<()> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: std::collections::BTreeMap<String, String>,
    }
    let path = snapshot.join("model.safetensors.index.json");
    let Ok(text) = fs::read_to_string(&path) else { return Ok(()) };
    let index: Index =
        serde_json::from_str(&text).with_context(|| format!("reading {}", path.display()))?;
    match index.weight_map.values().find(|shard| !snapshot.join(shard).exists()) {
        Some(shard) => bail!("{} lacks {shard}", snapshot.display()),
        None => Ok(()),
    }
}

/// A GGUF file is a model by itself; anything else is a folder.
pub(super) fn result_path(snapshot: &Path, names: &[String]) -> PathBuf {
    match names {
        [only] if only.ends_with(".gguf") => snapshot.join(only),
        _ => snapshot.to_path_buf(),
    }
}

fn link(blob: &Path, name: &Path) -> Result<()> {
    let folder = name.parent().context("a snapshot is a folder")?;
    fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    // A dangling link of an earlier run stands in the way.
    let _ = fs::remove_file(name);
    place(blob, name).with_context(|| format!("linking {}", name.display()))
}

/// A relative link, so that the cache can be moved as a whole.
#[cfg(unix)]
fn place(blob: &Path, name: &Path) -> std::io::Result<()> {
    let depth = name.iter().rev().take_while(|part| *part != "snapshots").count();
    let mut target: PathBuf = std::iter::repeat_n("..", depth).collect();
    target.push("blobs");
    target.push(blob.file_name().unwrap_or_default());
    std::os::unix::fs::symlink(target, name)
}

#[cfg(not(unix))]
fn place(blob: &Path, name: &Path) -> std::io::Result<()> {
    fs::hard_link(blob, name).or_else(|_| fs::copy(blob, name).map(drop))
}

fn newest_snapshot(folder: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(folder.join("snapshots")).ok()?;
    entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            Some((entry.metadata().ok()?.modified().ok()?, entry.path()))
        })
        .max()
        .map(|(_, path)| path)
}

fn folder_bytes(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    entries.filter_map(|entry| Some(entry.ok()?.metadata().ok()?.len())).sum()
}
