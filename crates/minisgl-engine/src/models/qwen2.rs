//! Qwen2 and Qwen2.5. The biases of Q, K and V are in the config: `ModelConfig::qkv_bias`.

use super::decoder::{DecoderSpec, MlpKind};

pub const SPEC: DecoderSpec = DecoderSpec { qk_norm: false, mlp: MlpKind::Dense };
