//! Gemma 3 (text): sliding and global layers, each with its own rotation, and norms both before
//! and after attention and MLP.

use anyhow::{Context, Result};
use minisgl_tensor::{BackendError, DType, Norm};

use super::{Model, rope_table};
use crate::config::ModelConfig;
use crate::layers::{Attention, AttentionSpec, Embedding, ForwardCtx, Head, Mlp};
use crate::weights::WeightScope;

/// A loaded Gemma 3.
pub struct Gemma3 {
    embedding: Embedding,
    layers: Vec<Layer>,
    head: Head,
}

struct Layer {
    attention_norm: Norm,
    attention: Attention,
    attention_out_norm: Norm,
    mlp_norm: Norm,
    mlp: Mlp,
    mlp_out_norm: Norm,
}

impl Gemma3 {
    pub fn new(weights: &WeightScope<'_>, config: &ModelConfig, positions: usize) -> Result<Self> {
        let local = config.local_rope.as_ref().context("the config has no local rotation")?;
        let global_rope = rope_table(weights.backend, &config.rope, positions)?;
        let local_rope = rope_table(weights.backend, local, positions)?;
        let scale = (config.hidden_size as f32).sqrt();
        // As in training, the scale is rounded like an activation.
        let scale = match weights.backend.activation_dtype() {
            DType::BF16 => half::bf16::from_f32(scale).to_f32(),
            _ => scale,
        };
        let embedding = Embedding::new(&weights.at("model.embed_tokens"), config, scale)?;
        let layers = (0..config.num_layers)
            .map(|index| {
                let slides = config.window(index).is_some();
                let rope = if slides { &local_rope } else { &global_rope };
                let spec = AttentionSpec { qk_norm: true, rope: rope.clone(), layer: index };
                Layer::new(&weights.at("model.layers").at(index), config, spec)
            })
            .collect::<Result<_>>()?;
        let head = Head::new(weights, config, &embedding)?;
        Ok(Self { embedding, layers, head })
    }
}

impl Layer {
    fn new(scope: &WeightScope<'_>, config: &ModelConfig, spec: AttentionSpec) -> Result<Self> {
        let norm = |name: &str| {
            scope.at(name).norm(config.hidden_size, config.norm_eps, config.norm_plus_one)
        };
        let attention = Attention::new(&scope.at("self_attn"), config, spec)?;
        let mlp = Mlp::new(&scope.at("mlp"), config)?;
        Ok(Self {
            attention_norm: attention.fold_norm(scope, norm("input_layernorm")?)?,
            attention,
            attention_out_norm: norm("post_attention_layernorm")?,
            mlp_norm: mlp.fold_norm(scope, norm("pre_feedforward_layernorm")?)?,
            mlp,
            mlp_out_norm: norm("post_feedforward_layernorm")?,
        })
    }

    fn forward(&self, ctx: &ForwardCtx<'_>) -> Result<(), BackendError> {
        self.attention.forward(ctx, &self.attention_norm)?;
        add_normed(ctx, &self.attention_out_norm)?;
        self.mlp.forward(ctx, &self.mlp_norm)?;
        add_normed(ctx, &self.mlp_out_norm)
    }
}

/// `hidden += norm(delta)`.
fn add_normed(ctx: &ForwardCtx<'_>, norm: &Norm) -> Result<(), BackendError> {
    let delta = ctx.delta();
    ctx.backend.rms_norm(&delta, norm, &delta)?;
    ctx.backend.add(&ctx.hidden(), &delta)
}

impl Model for Gemma3 {
    fn forward(&self, ctx: &ForwardCtx<'_>) -> Result<(), BackendError> {
        self.embedding.forward(ctx)?;
        self.layers.iter().try_for_each(|layer| layer.forward(ctx))
    }

    fn head(&self) -> &Head {
        &self.head
    }
}
