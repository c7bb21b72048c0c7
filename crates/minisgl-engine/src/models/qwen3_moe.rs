//! Qwen3-MoE: Qwen3 whose MLP is experts, except in the layers that the config names.

use super::decoder::{DecoderSpec, MlpKind};

pub const SPEC: DecoderSpec = DecoderSpec { qk_norm: true, mlp: MlpKind::Moe };
