//! Qwen3: Q and K are normed per head.

use super::decoder::{DecoderSpec, MlpKind};

pub const SPEC: DecoderSpec = DecoderSpec { qk_norm: true, mlp: MlpKind::Dense };
