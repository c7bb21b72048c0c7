//! Llama 2 and 3, and all that share their shape (SmolLM2, TinyLlama, …).

use super::decoder::{DecoderSpec, MlpKind};

pub const SPEC: DecoderSpec = DecoderSpec { qk_norm: false, mlp: MlpKind::Dense };
