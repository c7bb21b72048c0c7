//! `minisgl inspect MODEL`

use std::collections::BTreeMap;

use anyhow::Result;
use clap::Args;
use minisgl_engine::{Checkpoint, ModelConfig};
use serde_json::json;

use minisgl::runtime::text_model;
use minisgl::source::{ModelLocator, ModelSource};

use super::models::size;
use super::out;

/// Show what a model is.
#[derive(Args, Debug)]
pub struct InspectArgs {
    /// As for --model
    model: Option<String>,

    /// The hub that ids belong to
    #[arg(long, value_enum, default_value_t)]
    model_source: ModelSource,

    /// Branch, tag or commit on the hub
    #[arg(long)]
    revision: Option<String>,

    /// List every tensor
    #[arg(long)]
    tensors: bool,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Bytes of an element of K or V: bfloat16 on a GPU, and here the common case.
const KV_ELEMENT_BYTES: u64 = 2;
const CONTEXTS: [usize; 4] = [1024, 4096, 16_384, 65_536];
const BATCHES: [usize; 4] = [1, 8, 64, 256];

impl InspectArgs {
    pub(super) fn run(self) -> Result<()> {
        let locator = ModelLocator {
            model: self.model.clone(),
            revision: self.revision.clone(),
            source: self.model_source,
            without_weights: false,
        };
        let checkpoint = Checkpoint::open(locator.locate()?)?;
        if self.json { self.print_json(&checkpoint) } else { self.print_text(&checkpoint) }
    }

    fn print_text(&self, checkpoint: &Checkpoint) -> Result<()> {
        let config = checkpoint.config();
        let mut text = format!("{}\n\n", checkpoint.path().display());
        for (name, value) in settings(config) {
            text += &format!("  {name:<20} {value}\n");
        }
        text += &format!("  {:<20} {:?}\n\nweights\n", "ends of a sequence", checkpoint.eos_ids());
        let mut all = 0;
        for (dtype, (count, bytes)) in by_dtype(checkpoint) {
            text += &format!("  {dtype:<12} {count:>6} tensors {:>12}\n", size(bytes));
            all += bytes;
        }
        text += &format!("  {:<12} {:>6}         {:>12}\n", "in all", "", size(all));
        if checkpoint.left_out() > 0 {
            text += &format!("  {} tensors of other parts are left out\n", checkpoint.left_out());
        }
        text.push('\n');
        if self.tensors {
            for tensor in checkpoint.tensors() {
                let dtype = tensor.dtype.to_string();
                text += &format!("  {:<56} {dtype:<10} {:?}\n", tensor.name, tensor.shape);
            }
            text.push('\n');
        }
        if let Some(template) = chat_template(checkpoint) {
            text += &format!("chat template\n{template}\n\n");
        }
        text += "memory for weights and a 16-bit KV cache, by context length and requests\n";
        text += &format!("  {:>8}", "");
        text.extend(BATCHES.map(|batch| format!("{batch:>12}")));
        text.push('\n');
        let shorter = CONTEXTS.into_iter().filter(|&context| context < config.max_positions);
        for context in shorter.chain([config.max_positions]) {
            text += &format!("  {context:>8}");
            for batch in BATCHES {
                let kv = kv_bytes_a_token(config) * (context * batch) as u64;
                text += &format!("{:>12}", size(all + kv));
            }
            text.push('\n');
        }
        out(&text)
    }

    fn print_json(&self, checkpoint: &Checkpoint) -> Result<()> {
        let config = checkpoint.config();
        let tensors: Vec<_> = checkpoint
            .tensors()
            .map(|tensor| {
                json!({
                    "name": tensor.name,
                    "dtype": tensor.dtype.to_string(),
                    "shape": tensor.shape,
                    "bytes": tensor.bytes,
                })
            })
            .collect();
        let description = json!({
            "path": checkpoint.path(),
            "architecture": format!("{:?}", config.architecture),
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "num_layers": config.num_layers,
            "q_heads": config.q_heads,
            "kv_heads": config.kv_heads,
            "head_dim": config.head_dim,
            "max_positions": config.max_positions,
            "eos_ids": checkpoint.eos_ids(),
            "kv_bytes_a_token": kv_bytes_a_token(config),
            "tensors": tensors,
            "chat_template": chat_template(checkpoint),
        });
        out(&format!("{description}\n"))
    }
}

/// The configuration, for people: what a model does not have is not listed.
fn settings(config: &ModelConfig) -> Vec<(&'static str, String)> {
    let of = minisgl_engine::architectures().iter().find(|(of, ..)| *of == config.architecture);
    let mut all = vec![
        ("architecture", of.map_or("", |(_, name, _)| name).to_string()),
        ("layers", config.num_layers.to_string()),
        ("hidden size", config.hidden_size.to_string()),
        (
            "heads",
            format!("{} of {}, {} for K and V", config.q_heads, config.head_dim, config.kv_heads),
        ),
        ("intermediate size", config.intermediate_size.to_string()),
        ("vocabulary", config.vocab_size.to_string()),
        ("context", format!("{} tokens", config.max_positions)),
        ("rotation", format!("base {}, scaling {:?}", config.rope.base, config.rope.scaling)),
        ("head", if config.tie_embeddings { "the embedding" } else { "its own" }.to_string()),
    ];
    if let Some(moe) = &config.moe {
        let sparse = moe.sparse_layers.iter().filter(|sparse| **sparse).count();
        let (experts, used) = (moe.num_experts, moe.num_experts_per_tok);
        let inner = moe.moe_intermediate_size;
        let experts = format!("{used} of {experts}, of {inner} each, in {sparse} layers");
        all.push(("experts", experts));
    }
    if let Some(window) = config.sliding_window {
        let sliding =
            (0..config.num_layers).filter(|&layer| config.window(layer).is_some()).count();
        all.push(("window", format!("{window} tokens, in {sliding} layers")));
    }
    all
}

fn kv_bytes_a_token(config: &ModelConfig) -> u64 {
    2 * KV_ELEMENT_BYTES * (config.num_layers * config.kv_heads * config.head_dim) as u64
}

/// How many tensors, and how many bytes, of each type.
fn by_dtype(checkpoint: &Checkpoint) -> BTreeMap<String, (usize, u64)> {
    let mut all = BTreeMap::new();
    for tensor in checkpoint.tensors() {
        let (count, bytes) = all.entry(tensor.dtype.to_string()).or_insert((0, 0));
        *count += 1;
        *bytes += tensor.bytes as u64;
    }
    all
}

/// A model without a tokenizer, or with one that is broken, may be looked at all the same.
fn chat_template(checkpoint: &Checkpoint) -> Option<String> {
    let text = text_model(checkpoint).ok()?;
    text.template.map(|template| template.source().to_string())
}
