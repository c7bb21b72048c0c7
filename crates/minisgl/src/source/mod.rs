//! Where a model comes from: a path, a hub, or the default model's own sources.

mod default_model;
mod download;
mod hub;
mod modelscope;

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

pub use default_model::{DEFAULT_MODEL_FILE, DEFAULT_MODEL_SHA256};
pub use download::RemoteFile;
pub use hub::{CachedModel, Hub};

/// Which hub serves ids like `Qwen/Qwen3-0.6B`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ModelSource {
    /// The Hugging Face hub, or what `HF_ENDPOINT` names.
    #[default]
    Huggingface,
    /// ModelScope, or what `MODELSCOPE_ENDPOINT` names.
    Modelscope,
}

/// A model as the user names it.
#[derive(Clone, Debug, Default)]
pub struct ModelLocator {
    /// A `.gguf` file, a folder in Hugging Face layout, or a hub id, which may name a file:
    /// `org/name` or `org/name/file.gguf`. `None` is the default model.
    pub model: Option<String>,
    /// Branch, tag or commit on the hub.
    pub revision: Option<String>,
    /// Which hub.
    pub source: ModelSource,
    /// Leave the weights where they are: `--dummy-weight` needs only the configuration.
    pub without_weights: bool,
}

impl ModelLocator {
    /// The local file or folder, fetched if need be.
    ///
    /// # Errors
    /// Says what was tried, and why it failed.
    pub fn locate(&self) -> Result<PathBuf> {
        let Some(model) = &self.model else {
            return default_model::locate();
        };
        let path = expand_home(model);
        if path.exists() {
            return Ok(path);
        }
        let Some(id) = HubId::parse(model) else {
            bail!("{model}: no such file or folder, and not a hub id like Qwen/Qwen3-0.6B");
        };
        match self.source {
            ModelSource::Huggingface => {
                let revision = self.revision.as_deref().unwrap_or("main");
                Hub::from_env()?.fetch(&id, revision, !self.without_weights)
            }
            ModelSource::Modelscope => {
                let revision = self.revision.as_deref().unwrap_or("master");
                modelscope::fetch(&id, revision, !self.without_weights)
            }
        }
        .with_context(|| format!("model {model}: there is no such path, and the hub did not help"))
    }
}

/// `org/name`, maybe with the path of one file in that repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubId {
    /// `org/name`.
    pub repo: String,
    /// The one file asked for.
    pub file: Option<String>,
}

impl HubId {
    /// Reads `org/name` or `org/name/path/to/file.gguf`; `None` for anything else.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.splitn(3, '/');
        let (org, name, file) = (parts.next()?, parts.next()?, parts.next());
        let plain = |part: &str| {
            !part.is_empty()
                && !part.starts_with(['.', '-', '~'])
                && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        if !plain(org) || !plain(name) {
            return None;
        }
        match file {
            Some(file) if !file.ends_with(".gguf") || !is_safe_path(file) => None,
            None if name.ends_with(".gguf") => None,
            file => Some(Self { repo: format!("{org}/{name}"), file: file.map(str::to_string) }),
        }
    }
}

/// Of a repository's files, those that serving needs.
///
/// # Errors
/// If the repository has no weights that can be read, or several GGUF files and none was named.
fn choose_files(names: &[String], id: &HubId, weights: bool) -> Result<Vec<String>> {
    if let Some(file) = &id.file {
        if !names.contains(file) {
            bail!("{} has no file {file}; it has {}", id.repo, names.join(", "));
        }
        return Ok(vec![file.clone()]);
    }
    const SIDE_FILES: [&str; 8] = [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "chat_template.jinja",
        "chat_template.json",
    ];
    let mut chosen: Vec<String> =
        names.iter().filter(|name| SIDE_FILES.contains(&name.as_str())).cloned().collect();
    // Mistral ships its weights twice; `consolidated` is the copy under other tensor names.
    let tensors: Vec<&String> = names
        .iter()
        .filter(|name| !name.contains('/') && !name.starts_with("consolidated"))
        .filter(|name| name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json"))
        .collect();
    if !tensors.is_empty() {
        if weights {
            chosen.extend(tensors.into_iter().cloned());
        }
        return Ok(chosen);
    }
    let ggufs: Vec<&String> = names.iter().filter(|name| name.ends_with(".gguf")).collect();
    match ggufs.as_slice() {
        [only] => Ok(vec![(*only).clone()]),
        [] => bail!("{} holds neither .safetensors nor .gguf files", id.repo),
        [first, ..] => bail!(
            "{repo} holds {count} GGUF files; name one, for example --model {repo}/{first}",
            repo = id.repo,
            count = ggufs.len()
        ),
    }
}

/// A name from a server may not leave the folder that it is stored in.
fn is_safe_path(name: &str) -> bool {
    !name.is_empty()
        && !name.contains(['\\', ':', '\0'])
        && name.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
}

/// What this program keeps between runs: `MINISGL_CACHE`, or `minisgl` in the user's cache folder.
pub fn cache_folder() -> PathBuf {
    env_path("MINISGL_CACHE").unwrap_or_else(|| user_cache().join("minisgl"))
}

fn user_cache() -> PathBuf {
    env_path("XDG_CACHE_HOME").unwrap_or_else(|| home().join(".cache"))
}

fn home() -> PathBuf {
    env::home_dir().unwrap_or_else(|| PathBuf::from("."))
}

fn env_path(name: &str) -> Option<PathBuf> {
    env_text(name).map(|value| expand_home(&value))
}

fn env_text(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

fn env_flag(name: &str) -> bool {
    env_text(name).is_some_and(|value| {
        ["1", "true", "yes", "on"].contains(&value.to_ascii_lowercase().as_str())
    })
}

fn expand_home(path: &str) -> PathBuf {
    match path.strip_prefix("~/") {
        Some(rest) => home().join(rest),
        None => Path::new(path).to_path_buf(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hub_ids_are_told_from_paths() {
        let id = HubId::parse("Qwen/Qwen3-0.6B").unwrap();
        assert_eq!((id.repo.as_str(), id.file), ("Qwen/Qwen3-0.6B", None));
        let id = HubId::parse("a/b-GGUF/q/c.gguf").unwrap();
        assert_eq!((id.repo.as_str(), id.file.as_deref()), ("a/b-GGUF", Some("q/c.gguf")));
        for path in ["model", "./a/b", "/a/b", "a/b.gguf", "a/b/c", "a/b/../c.gguf", "a//b", "~/a"]
        {
            assert_eq!(HubId::parse(path), None, "{path}");
        }
    }

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_string()).collect()
    }

    #[test]
    fn only_the_files_that_serving_needs_are_chosen() {
        let id = HubId::parse("a/b").unwrap();
        let all = names(&[
            "README.md",
            "config.json",
            "consolidated.safetensors",
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
            "onnx/model.safetensors",
            "pytorch_model.bin",
            "tokenizer.json",
        ]);
        let chosen = choose_files(&all, &id, true).unwrap();
        let expected = [
            "config.json",
            "tokenizer.json",
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
        ];
        assert_eq!(chosen, expected);
        assert_eq!(choose_files(&all, &id, false).unwrap(), ["config.json", "tokenizer.json"]);
    }

    #[test]
    fn among_several_ggufs_one_must_be_named() {
        let all = names(&["x.Q4_0.gguf", "x.Q8_0.gguf"]);
        let error = choose_files(&all, &HubId::parse("a/b").unwrap(), true).unwrap_err();
        assert!(error.to_string().contains("--model a/b/x.Q4_0.gguf"), "{error}");
        let named = HubId::parse("a/b/x.Q8_0.gguf").unwrap();
        assert_eq!(choose_files(&all, &named, true).unwrap(), ["x.Q8_0.gguf"]);
    }

    #[test]
    fn names_from_a_server_stay_in_their_folder() {
        for name in ["../x", "a/../../x", "/etc/x", "a\\b", "c:x", "", "a//b"] {
            assert!(!is_safe_path(name), "{name}");
        }
        assert!(is_safe_path("a/b.json"));
    }
}
