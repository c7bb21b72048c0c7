//! `minisgl models`

use std::fs;

use anyhow::Result;
use clap::Args;
use serde_json::json;

use minisgl::source::{DEFAULT_MODEL_FILE, Hub, cache_folder};

use super::out;

/// List what runs and what is there.
#[derive(Args, Debug)]
pub struct ModelsArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl ModelsArgs {
    pub(super) fn run(self) -> Result<()> {
        let cached = Hub::from_env()?.cached_models()?;
        let default = cache_folder().join("models").join(DEFAULT_MODEL_FILE);
        let default_bytes = fs::metadata(&default).ok().map(|found| found.len());
        if self.json {
            let architectures: Vec<_> = minisgl_engine::architectures()
                .iter()
                .map(|(_, name, gguf)| json!({"name": name, "gguf": gguf}))
                .collect();
            let mut models: Vec<_> = cached
                .iter()
                .map(|model| json!({"id": model.repo, "path": model.path, "bytes": model.bytes}))
                .collect();
            if let Some(bytes) = default_bytes {
                models.push(json!({"id": DEFAULT_MODEL_FILE, "path": default, "bytes": bytes}));
            }
            out(&format!("{}\n", json!({"architectures": architectures, "cached": models})))?;
            return Ok(());
        }
        let mut text = String::from("Architectures (config.json; GGUF)\n");
        for (_, name, gguf) in minisgl_engine::architectures() {
            text += &format!("  {name:<34} {gguf}\n");
        }
        text += "\nIn the cache\n";
        if let Some(bytes) = default_bytes {
            text += &format!("  {:<44} {:>10}  (default)\n", DEFAULT_MODEL_FILE, size(bytes));
        }
        for model in &cached {
            text += &format!("  {:<44} {:>10}\n", model.repo, size(model.bytes));
        }
        if cached.is_empty() && default_bytes.is_none() {
            text += "  nothing yet\n";
        }
        out(&text)
    }
}

/// Bytes for people.
pub(super) fn size(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}
