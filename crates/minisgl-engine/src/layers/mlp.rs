//! Gated MLPs: one, or many of which a token uses a few.

use anyhow::Result;
use minisgl_tensor::{
    Activation, BackendError, HostTensor, Mlp as MlpArgs, Moe, Norm, Store, Tensor, Weight,
};

use super::{ColumnPart, ForwardCtx, Linear};
use crate::config::{ModelConfig, MoeConfig};
use crate::weights::WeightScope;

/// `down(act(gate(x)) · up(x))`.
pub struct Mlp {
    gate_up: Linear,
    down: Linear,
    activation: Activation,
    /// Inner features on this rank.
    inner: usize,
}

impl Mlp {
    pub fn new(scope: &WeightScope<'_>, config: &ModelConfig) -> Result<Self> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let rows = scope.shares.inner.clone();
        let part = |name: &str| ColumnPart {
            scope: scope.at(name),
            out_features: inner,
            rows: rows.clone(),
        };
        let parts = [part("gate_proj"), part("up_proj")];
        Ok(Self {
            gate_up: Linear::column_parallel(&parts, hidden, false)?,
            down: Linear::row_parallel(&scope.at("down_proj"), [hidden, inner], rows.clone())?,
            activation: config.activation,
            inner: rows.len(),
        })
    }

    /// See [`Linear::fold_norm`].
    pub fn fold_norm(&self, scope: &WeightScope<'_>, norm: Norm) -> Result<Norm> {
        self.gate_up.fold_norm(scope, norm)
    }

    /// `hidden += mlp(norm(hidden))`.
    pub fn add_to_hidden(&self, ctx: &ForwardCtx<'_>, norm: &Norm) -> Result<(), BackendError> {
        let whole = self.gate_up.whole().zip(self.down.whole());
        let Some(((gate_up, None), (down, _))) = whole else {
            return self.down.add_to_hidden(ctx, &self.gated(ctx, norm)?);
        };
        let mid = &ctx.workspace.inner.reshape(&[ctx.batch.tokens, self.inner]);
        let args = MlpArgs { norm, gate_up, activation: self.activation, down, mid };
        ctx.backend.mlp(&args, &ctx.hidden())
    }

    /// `delta = mlp(norm(hidden))`.
    pub fn forward(&self, ctx: &ForwardCtx<'_>, norm: &Norm) -> Result<(), BackendError> {
        self.down.forward(ctx, &self.gated(ctx, norm)?, None, &ctx.delta())
    }

    fn gated(&self, ctx: &ForwardCtx<'_>, norm: &Norm) -> Result<Tensor, BackendError> {
        let inner = ctx.workspace.inner.reshape(&[ctx.batch.tokens, self.inner]);
        self.gate_up.forward_gated(ctx, norm, self.activation, &inner)?;
        Ok(inner)
    }
}

/// A mixture of experts; each rank has a share of every expert's inner features.
pub struct Experts {
    router: Weight,
    gate_up: Weight,
    down: Weight,
    top_k: usize,
    renormalize: bool,
    partial: bool,
}

impl Experts {
    pub fn new(scope: &WeightScope<'_>, config: &ModelConfig, moe: &MoeConfig) -> Result<Self> {
        let (hidden, inner) = (config.hidden_size, moe.moe_intermediate_size);
        let share = scope.shares.expert_inner.clone();
        let mut gate_up: Vec<Vec<HostTensor<'_>>> = Vec::new();
        let mut down: Vec<Vec<HostTensor<'_>>> = Vec::new();
        for expert in 0..moe.num_experts {
            let scope = scope.at("experts").at(expert);
            gate_up.push(vec![
                scope.at("gate_proj").rows([inner, hidden], share.clone())?,
                scope.at("up_proj").rows([inner, hidden], share.clone())?,
            ]);
            down.push(vec![scope.at("down_proj").cols([hidden, inner], share.clone())?]);
        }
        let router = scope.at("gate");
        let router_rows = router.rows([moe.num_experts, hidden], 0..moe.num_experts)?;
        Ok(Self {
            router: router.stack(&[router_rows])?,
            gate_up: scope.stack_experts(&gate_up)?,
            down: scope.stack_experts(&down)?,
            top_k: moe.num_experts_per_tok,
            renormalize: moe.norm_topk_prob,
            partial: scope.shares.ranks > 1,
        })
    }

    /// `hidden += experts(norm(hidden))`.
    pub fn add_to_hidden(&self, ctx: &ForwardCtx<'_>, norm: &Norm) -> Result<(), BackendError> {
        let (hidden, delta) = (ctx.hidden(), ctx.delta());
        let args = Moe {
            x: &hidden,
            norm,
            router: &self.router,
            gate_up: &self.gate_up,
            down: &self.down,
            top_k: self.top_k,
            renormalize: self.renormalize,
            store: Store::Set,
        };
        ctx.backend.moe(&args, &delta)?;
        if self.partial {
            ctx.collective.all_reduce(&delta)?;
        }
        ctx.backend.add(&hidden, &delta)
    }
}
