//! The decoder that most families share: norm, attention, norm, MLP, each added to the residual.

use anyhow::{Context, Result};
use minisgl_tensor::{BackendError, Norm};

use super::{Model, rope_table};
use crate::config::ModelConfig;
use crate::layers::{Attention, AttentionSpec, Embedding, Experts, ForwardCtx, Head, Mlp};
use crate::weights::WeightScope;

/// What a family does differently. Sizes, biases and windows are the checkpoint's business and
/// stand in `ModelConfig`.
pub struct DecoderSpec {
    /// Q and K are normed per head before the rotation.
    pub qk_norm: bool,
    /// What follows attention.
    pub mlp: MlpKind,
}

/// What follows attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MlpKind {
    /// One MLP.
    Dense,
    /// Experts, in the layers that the config lists.
    Moe,
}

/// A loaded decoder.
pub struct Decoder {
    embedding: Embedding,
    layers: Vec<Layer>,
    head: Head,
}

struct Layer {
    attention_norm: Norm,
    attention: Attention,
    mlp_norm: Norm,
    mlp: LayerMlp,
}

enum LayerMlp {
    Dense(Mlp),
    Moe(Experts),
}

impl Decoder {
    pub fn new(
        weights: &WeightScope<'_>,
        config: &ModelConfig,
        spec: DecoderSpec,
        positions: usize,
    ) -> Result<Self> {
        let rope = rope_table(weights.backend, &config.rope, positions)?;
        let embedding = Embedding::new(&weights.at("model.embed_tokens"), config, 1.0)?;
        let layers = (0..config.num_layers)
            .map(|index| {
                let attention =
                    AttentionSpec { qk_norm: spec.qk_norm, rope: rope.clone(), layer: index };
                let scope = weights.at("model.layers").at(index);
                Layer::new(&scope, config, attention, spec.mlp)
            })
            .collect::<Result<_>>()?;
        let head = Head::new(weights, config, &embedding)?;
        Ok(Self { embedding, layers, head })
    }
}

impl Layer {
    fn new(
        scope: &WeightScope<'_>,
        config: &ModelConfig,
        attention: AttentionSpec,
        mlp: MlpKind,
    ) -> Result<Self> {
        let norm = |name: &str| {
            scope.at(name).norm(config.hidden_size, config.norm_eps, config.norm_plus_one)
        };
        let moe = match mlp {
            MlpKind::Dense => None,
            MlpKind::Moe => {
                let moe = config.moe.as_ref().context("the config describes no experts")?;
                moe.sparse_layers[attention.layer].then_some(moe)
            }
        };
        let attention = Attention::new(&scope.at("self_attn"), config, attention)?;
        let attention_norm = attention.fold_norm(scope, norm("input_layernorm")?)?;
        let mlp_norm = norm("post_attention_layernorm")?;
        let (mlp, mlp_norm) = match moe {
            // Router and experts both multiply what the norm gives.
            Some(moe) => (LayerMlp::Moe(Experts::new(&scope.at("mlp"), config, moe)?), mlp_norm),
            None => {
                let mlp = Mlp::new(&scope.at("mlp"), config)?;
                let mlp_norm = mlp.fold_norm(scope, mlp_norm)?;
                (LayerMlp::Dense(mlp), mlp_norm)
            }
        };
        Ok(Self { attention_norm, attention, mlp_norm, mlp })
    }
}

impl Model for Decoder {
    fn forward(&self, ctx: &ForwardCtx<'_>) -> Result<(), BackendError> {
        self.embedding.forward(ctx)?;
        for layer in &self.layers {
            layer.attention.add_to_hidden(ctx, &layer.attention_norm)?;
            match &layer.mlp {
                LayerMlp::Dense(mlp) => mlp.add_to_hidden(ctx, &layer.mlp_norm)?,
                LayerMlp::Moe(experts) => experts.add_to_hidden(ctx, &layer.mlp_norm)?,
            }
        }
        Ok(())
    }

    fn head(&self) -> &Head {
        &self.head
    }
}
