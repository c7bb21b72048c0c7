//! The architectures: most are a `DecoderSpec`; the others write their own forward from `layers`.

mod decoder;
mod gemma3;
mod llama;
mod mistral;
mod qwen2;
mod qwen3;
mod qwen3_moe;

use anyhow::{Result, bail, ensure};
use minisgl_tensor::{Backend, BackendError, DType, Tensor};

use self::decoder::{Decoder, DecoderSpec};
use crate::config::ModelConfig;
use crate::layers::{ForwardCtx, Head};
use crate::rope::RopeConfig;
use crate::weights::WeightScope;

/// A loaded model on one rank.
pub trait Model: Send {
    /// Computes the residual stream behind the last layer, for all tokens of the batch, into
    /// `workspace.hidden`.
    fn forward(&self, ctx: &ForwardCtx<'_>) -> Result<(), BackendError>;

    /// What turns that into logits.
    fn head(&self) -> &Head;
}

/// A model family that can be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names are the documentation")]
pub enum Architecture {
    Llama,
    Mistral,
    Mistral3,
    Qwen2,
    Qwen3,
    Qwen3Moe,
    Gemma3,
}

/// Every architecture with its name in `config.json` and its name in GGUF files, which some share.
pub fn architectures() -> &'static [(Architecture, &'static str, &'static str)] {
    &[
        (Architecture::Llama, "LlamaForCausalLM", "llama"),
        (Architecture::Mistral, "MistralForCausalLM", "llama"),
        (Architecture::Mistral3, "Mistral3ForConditionalGeneration", "llama"),
        (Architecture::Qwen2, "Qwen2ForCausalLM", "qwen2"),
        (Architecture::Qwen3, "Qwen3ForCausalLM", "qwen3"),
        (Architecture::Qwen3Moe, "Qwen3MoeForCausalLM", "qwen3moe"),
        (Architecture::Gemma3, "Gemma3ForCausalLM", "gemma3"),
    ]
}

impl Architecture {
    /// By the name in `config.json`.
    pub fn from_name(name: &str) -> Result<Self> {
        let found = architectures().iter().find(|(_, hf, _)| *hf == name);
        let Some((architecture, ..)) = found else {
            let names: Vec<&str> = architectures().iter().map(|(_, hf, _)| *hf).collect();
            bail!("architecture {name:?} is not supported; these are: {}", names.join(", "));
        };
        Ok(*architecture)
    }

    /// By the name in a GGUF file. A Mistral there is a Llama, which it is in all but name.
    pub fn from_gguf_name(name: &str) -> Result<Self> {
        let found = architectures().iter().find(|(_, _, gguf)| *gguf == name);
        let Some((architecture, ..)) = found else {
            let mut names: Vec<&str> = architectures().iter().map(|a| a.2).collect();
            names.dedup();
            bail!("architecture {name:?} is not supported; these are: {}", names.join(", "));
        };
        Ok(*architecture)
    }

    /// How the common decoder becomes this architecture; `None` if it does not fit.
    fn decoder_spec(self) -> Option<DecoderSpec> {
        match self {
            Architecture::Llama => Some(llama::SPEC),
            Architecture::Mistral | Architecture::Mistral3 => Some(mistral::SPEC),
            Architecture::Qwen2 => Some(qwen2::SPEC),
            Architecture::Qwen3 => Some(qwen3::SPEC),
            Architecture::Qwen3Moe => Some(qwen3_moe::SPEC),
            Architecture::Gemma3 => None,
        }
    }
}

/// Loads this rank's part of a model.
pub fn load(
    weights: &WeightScope<'_>,
    config: &ModelConfig,
    positions: usize,
) -> Result<Box<dyn Model>> {
    Ok(match config.architecture.decoder_spec() {
        Some(spec) => Box::new(Decoder::new(weights, config, spec, positions)?),
        None => Box::new(gemma3::Gemma3::new(weights, config, positions)?),
    })
}

/// Puts a rotation's table on the device: `[positions, head_dim]`.
fn rope_table(backend: &dyn Backend, rope: &RopeConfig, positions: usize) -> Result<Tensor> {
    ensure!(positions > 0, "there is room for no position");
    let table = backend.alloc(DType::F32, &[positions, rope.head_dim])?;
    let bytes: Vec<u8> = rope.table(positions).iter().flat_map(|v| v.to_le_bytes()).collect();
    backend.upload(&bytes, &table)?;
    Ok(table)
}
