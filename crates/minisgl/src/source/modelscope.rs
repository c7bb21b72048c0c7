//! ModelScope: one list of files with sizes and hashes, and a plain folder.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use ureq::Agent;

use super::download::{RemoteFile, agent, fetch_all};
use super::hub::{check_shards, file_names, result_path};
use super::{HubId, choose_files, env_path, env_text, is_safe_path, user_cache};

/// The model's folder in ModelScope's cache, or the one file that `id` names.
pub(super) fn fetch(id: &HubId, revision: &str, weights: bool) -> Result<PathBuf> {
    let endpoint = env_text("MODELSCOPE_ENDPOINT");
    let endpoint = endpoint.as_deref().unwrap_or("https://www.modelscope.cn").trim_end_matches('/');
    let cache = env_path("MODELSCOPE_CACHE").unwrap_or_else(|| user_cache().join("modelscope/hub"));
    let folder = cache.join("models").join(&id.repo);
    let agent = agent();
    let url = format!(
        "{endpoint}/api/v1/models/{}/repo/files?Revision={revision}&Recursive=true",
        id.repo
    );
    let listed = match list(&agent, &url) {
        Ok(listed) => listed,
        Err(error) => {
            let path = cached(&folder, id).map_err(|_| error)?;
            eprintln!("ModelScope cannot be reached; taking {} from the cache.", id.repo);
            return Ok(path);
        }
    };
    let names: Vec<String> = listed.iter().map(|file| file.path.clone()).collect();
    let names = choose_files(&names, id, weights)?;
    let files: Vec<RemoteFile> = listed
        .into_iter()
        .filter(|file| names.contains(&file.path))
        .map(|file| RemoteFile {
            url: format!("{endpoint}/models/{}/resolve/{revision}/{}", id.repo, file.path),
            target: folder.join(&file.path),
            name: file.path,
            size: Some(file.size),
            sha256: Some(file.sha256).filter(|hash| hash.len() == 64),
        })
        .collect();
    fetch_all(&agent, None, &files)?;
    Ok(result_path(&folder, &names))
}

/// The repository's files.
fn list(agent: &Agent, url: &str) -> Result<Vec<ListedFile>> {
    let mut response = agent.get(url).call().context(url.to_string())?;
    if !response.status().is_success() {
        bail!("{url}: the hub answers {}", response.status());
    }
    let listing: Listing = serde_json::from_reader(response.body_mut().as_reader())
        .with_context(|| format!("{url}: not the answer of ModelScope"))?;
    let mut listed = listing.data.files;
    listed.retain(|file| file.kind != "tree" && is_safe_path(&file.path));
    Ok(listed)
}

/// What an earlier run has fetched, if it was all of the model.
fn cached(folder: &Path, id: &HubId) -> Result<PathBuf> {
    let mut names = file_names(folder)?;
    names.extend(id.file.clone().filter(|file| folder.join(file).exists()));
    let names = choose_files(&names, id, true)?;
    check_shards(folder)?;
    Ok(result_path(folder, &names))
}

#[derive(Deserialize)]
struct Listing {
    #[serde(rename = "Data")]
    data: Files,
}

#[derive(Deserialize)]
struct Files {
    #[serde(rename = "Files")]
    files: Vec<ListedFile>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ListedFile {
    path: String,
    size: u64,
    #[serde(default)]
    sha256: String,
    #[serde(rename = "Type", default)]
    kind: String,
}
