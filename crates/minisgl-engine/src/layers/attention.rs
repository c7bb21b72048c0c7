//! Self-attention over pages: each rank has its share of the heads.

use std::ops::Range;

use anyhow::Result;
use minisgl_tensor::{
    Attention as AttentionArgs, AttentionLayer, BackendError, Heads, Norm, RopeStore, Tensor,
};

use super::{ColumnPart, ForwardCtx, Linear};
use crate::config::ModelConfig;
use crate::shares::Shares;
use crate::weights::WeightScope;

/// What differs between attentions.
pub struct AttentionSpec {
    /// Norm Q and K per head.
    pub qk_norm: bool,
    /// `[positions, head_dim]`, as `RopeStore::rope`.
    pub rope: Tensor,
    /// Which of the pool's layers is this one's.
    pub layer: usize,
}

/// Q, K, V, rotation, attention and the output projection.
pub struct Attention {
    qkv: Linear,
    out: Linear,
    heads: Heads,
    q_norm: Option<Norm>,
    k_norm: Option<Norm>,
    rope: Tensor,
    layer: usize,
    scale: f32,
    window: Option<usize>,
    soft_cap: Option<f32>,
}

impl Attention {
    /// This rank's heads.
    pub fn heads(config: &ModelConfig, shares: &Shares) -> Heads {
        Heads { q: shares.q_heads.len(), kv: shares.kv_heads.len(), dim: config.head_dim }
    }

    pub fn new(scope: &WeightScope<'_>, config: &ModelConfig, spec: AttentionSpec) -> Result<Self> {
        let dim = config.head_dim;
        let features = |heads: &Range<usize>| heads.start * dim..heads.end * dim;
        let part = |name: &str, heads: usize, mine: &Range<usize>| ColumnPart {
            scope: scope.at(name),
            out_features: heads * dim,
            rows: features(mine),
        };
        let Shares { q_heads, kv_heads, .. } = scope.shares;
        let parts = [
            part("q_proj", config.q_heads, q_heads),
            part("k_proj", config.kv_heads, kv_heads),
            part("v_proj", config.kv_heads, kv_heads),
        ];
        let norm = |name: &str| {
            spec.qk_norm
                .then(|| scope.at(name).norm(dim, config.norm_eps, config.norm_plus_one))
                .transpose()
        };
        Ok(Self {
            qkv: Linear::column_parallel(&parts, config.hidden_size, config.qkv_bias)?,
            out: Linear::row_parallel(
                &scope.at("o_proj"),
                [config.hidden_size, config.q_heads * dim],
                features(q_heads),
            )?,
            heads: Self::heads(config, scope.shares),
            q_norm: norm("q_norm")?,
            k_norm: norm("k_norm")?,
            rope: spec.rope,
            layer: spec.layer,
            scale: config.attention_scale,
            window: config.window(spec.layer),
            soft_cap: config.attention_soft_cap,
        })
    }

    /// See [`Linear::fold_norm`].
    pub fn fold_norm(&self, scope: &WeightScope<'_>, norm: Norm) -> Result<Norm> {
        self.qkv.fold_norm(scope, norm)
    }

    /// `hidden += attention(norm(hidden))`.
    pub fn add_to_hidden(&self, ctx: &ForwardCtx<'_>, norm: &Norm) -> Result<(), BackendError> {
        let whole = self.qkv.whole().zip(self.out.whole());
        let Some(((qkv, qkv_bias), (out, _))) = whole else {
            return self.out.add_to_hidden(ctx, &self.attend(ctx, norm)?);
        };
        let (store, attention) = self.args(ctx);
        let qkv_memory = &ctx.workspace.qkv.first(ctx.batch.tokens);
        let attended = &ctx.workspace.attention.first(ctx.batch.tokens);
        let args =
            AttentionLayer { norm, qkv, qkv_bias, store, attention, out, qkv_memory, attended };
        ctx.backend.attention_layer(&args, &ctx.hidden())
    }

    /// `delta = attention(norm(hidden))`.
    pub fn forward(&self, ctx: &ForwardCtx<'_>, norm: &Norm) -> Result<(), BackendError> {
        self.out.forward(ctx, &self.attend(ctx, norm)?, None, &ctx.delta())
    }

    fn attend(&self, ctx: &ForwardCtx<'_>, norm: &Norm) -> Result<Tensor, BackendError> {
        let qkv = ctx.workspace.qkv.first(ctx.batch.tokens);
        let out = ctx.workspace.attention.first(ctx.batch.tokens);
        self.qkv.forward(ctx, &ctx.hidden(), Some(norm), &qkv)?;
        let (store, attention) = self.args(ctx);
        ctx.backend.rope_attention(&store, &attention, &qkv, &out)?;
        Ok(out)
    }

    fn args<'a>(&'a self, ctx: &ForwardCtx<'a>) -> (RopeStore<'a>, AttentionArgs<'a>) {
        let (batch, heads, kv) = (ctx.batch, self.heads, &ctx.kv.layers[self.layer]);
        let (q_norm, k_norm) = (self.q_norm.as_ref(), self.k_norm.as_ref());
        let store = RopeStore { batch, heads, q_norm, k_norm, rope: &self.rope, kv };
        let (scale, window, soft_cap) = (self.scale, self.window, self.soft_cap);
        (store, AttentionArgs { batch, heads, kv, scale, window, soft_cap })
    }
}
