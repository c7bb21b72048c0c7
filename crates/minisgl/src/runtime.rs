//! A model made ready: its text side, its engine, and the frontend that joins them.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use minisgl_engine::{Checkpoint, GgufMetadata};
use minisgl_frontend::{Frontend, FrontendOptions};
use minisgl_scheduler::SchedulerOptions;
use minisgl_scheduler::stats::StepObserver;
use minisgl_text::{GgufTokenType, GgufVocab, TextModel};

use crate::devices::LoadedEngine;
use crate::options::RuntimeOptions;
use crate::trace::Trace;

/// A running model.
pub struct Runtime {
    /// Takes requests.
    pub frontend: Frontend,
    /// The model's name, as clients may call it.
    pub model: String,
    /// Where it was read from.
    pub path: PathBuf,
    /// As the backend calls itself.
    pub device: String,
}

impl Runtime {
    /// Finds the model, loads it and starts the engine.
    ///
    /// # Errors
    /// If the model cannot be had, is not what it says, or does not fit.
    pub fn start(options: &RuntimeOptions) -> Result<Self> {
        Self::start_with(options, scheduler_options(options)?)
    }

    /// As `start`, with more said about scheduling.
    ///
    /// # Errors
    /// As `start`.
    pub fn start_with(options: &RuntimeOptions, scheduler: SchedulerOptions) -> Result<Self> {
        let path = options.locator().locate()?;
        let checkpoint = Checkpoint::open(&path)?;
        let model = match &options.model {
            Some(model) => model.clone(),
            None => path.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
        };
        let mut text = text_model(&checkpoint)
            .with_context(|| format!("the text side of {}", path.display()))?;
        text.eos_ids.extend(checkpoint.eos_ids());
        text.eos_ids.sort_unstable();
        text.eos_ids.dedup();
        let loaded = LoadedEngine::load(checkpoint, options)?;
        let frontend =
            Frontend::start(loaded.engine, Arc::new(text), FrontendOptions { scheduler })?;
        Ok(Self { frontend, model, path, device: loaded.device })
    }
}

/// What the options say about scheduling.
///
/// # Errors
/// If the trace cannot be written.
pub fn scheduler_options(options: &RuntimeOptions) -> Result<SchedulerOptions> {
    let observer = match &options.trace {
        Some(path) => Some(Arc::new(Trace::create(path)?) as Arc<dyn StepObserver>),
        None => None,
    };
    Ok(SchedulerOptions {
        cache: options.cache_type.into(),
        policy: options.schedule_policy.into(),
        mixed_tokens_max: options.max_mixed_tokens,
        overlap: !options.disable_overlap,
        observer,
        ..SchedulerOptions::default()
    })
}

/// Tokenizer and chat template, from the GGUF file itself or from the files beside the weights.
///
/// # Errors
/// If they are missing or not what they say.
pub fn text_model(checkpoint: &Checkpoint) -> Result<TextModel> {
    match checkpoint.gguf() {
        Some(metadata) => {
            let template = metadata.string("tokenizer.chat_template").map(str::to_string);
            TextModel::from_gguf(gguf_vocab(metadata)?, template)
        }
        None => TextModel::from_folder(checkpoint.path()),
    }
}

fn gguf_vocab(metadata: &GgufMetadata) -> Result<GgufVocab> {
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let strings = |name: &str| metadata.strings(&key(name)).unwrap_or_default().to_vec();
    let id = |name: &str| metadata.unsigned(&key(name)).and_then(|id| u32::try_from(id).ok());
    let model = metadata.string(&key("model")).context("it names no tokenizer.ggml.model")?;
    let is_sentencepiece = model == "llama";
    let pre = metadata.string(&key("pre"));
    // As llama.cpp takes it where a file does not say: Llama 3 and Mistral begin with BOS, too.
    let begins_with_bos = is_sentencepiece
        || pre.is_some_and(|pre| ["llama-bpe", "llama3", "llama-v3", "tekken"].contains(&pre));
    let types = metadata.ints(&key("token_type")).unwrap_or_default();
    Ok(GgufVocab {
        model: model.to_string(),
        pre: pre.map(str::to_string),
        tokens: strings("tokens"),
        scores: metadata.floats(&key("scores")).unwrap_or_default().to_vec(),
        token_types: types.iter().map(|&kind| GgufTokenType::from(kind as u32)).collect(),
        merges: strings("merges"),
        bos: id("bos_token_id"),
        eos: ["eos_token_id", "eot_token_id", "eom_token_id"].into_iter().filter_map(id).collect(),
        unknown: id("unknown_token_id"),
        add_bos: metadata.bool(&key("add_bos_token")).unwrap_or(begins_with_bos),
        add_space_prefix: metadata.bool(&key("add_space_prefix")).unwrap_or(is_sentencepiece),
    })
}
