//! Mistral, and the text part of Mistral 3. Their window, where they have one, is in the config.

use super::decoder::{DecoderSpec, MlpKind};

pub const SPEC: DecoderSpec = DecoderSpec { qk_norm: false, mlp: MlpKind::Dense };
