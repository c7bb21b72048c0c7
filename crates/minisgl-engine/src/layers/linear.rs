//! Matrices, split over ranks by columns or rows of the output.

use std::ops::Range;

use anyhow::Result;
use minisgl_tensor::{
    Activation, BackendError, HostTensor, Linear as LinearArgs, Norm, Store, Tensor, Weight,
};

use super::ForwardCtx;
use crate::weights::WeightScope;

/// One of the matrices that a column-parallel linear stacks.
pub struct ColumnPart<'a> {
    pub scope: WeightScope<'a>,
    /// Out features on all ranks together.
    pub out_features: usize,
    /// The out features that this rank computes.
    pub rows: Range<usize>,
}

/// `x · wᵀ (+ bias)`.
pub struct Linear {
    weight: Weight,
    bias: Option<Weight>,
    /// Each rank has a part of the sum.
    partial: bool,
}

impl Linear {
    /// Each rank computes its own out features of each part.
    pub fn column_parallel(
        parts: &[ColumnPart<'_>],
        in_features: usize,
        bias: bool,
    ) -> Result<Self> {
        let weights: Vec<HostTensor<'_>> = parts
            .iter()
            .map(|part| part.scope.rows([part.out_features, in_features], part.rows.clone()))
            .collect::<Result<_>>()?;
        let bias = match bias {
            false => None,
            true => {
                let biases: Vec<HostTensor<'_>> = parts
                    .iter()
                    .map(|part| part.scope.vector("bias", part.out_features, part.rows.clone()))
                    .collect::<Result<_>>()?;
                Some(parts[0].scope.backend.vector(&biases)?)
            }
        };
        Ok(Self { weight: parts[0].scope.stack(&weights)?, bias, partial: false })
    }

    /// Each rank multiplies its own in features (`cols` of `[out, in]`); the ranks' results are summed.
    pub fn row_parallel(
        scope: &WeightScope<'_>,
        shape: [usize; 2],
        cols: Range<usize>,
    ) -> Result<Self> {
        let part = scope.cols(shape, cols)?;
        Ok(Self { weight: scope.stack(&[part])?, bias: None, partial: scope.shares.ranks > 1 })
    }

    /// The norm in front of this, and of nothing else, as it is to be called.
    pub fn fold_norm(&self, scope: &WeightScope<'_>, norm: Norm) -> Result<Norm> {
        Ok(scope.backend.fold_norm(norm, &self.weight)?)
    }

    /// `out = norm(x) · wᵀ + bias`, summed over the ranks where each has a part.
    pub fn forward(
        &self,
        ctx: &ForwardCtx<'_>,
        x: &Tensor,
        norm: Option<&Norm>,
        out: &Tensor,
    ) -> Result<(), BackendError> {
        ctx.backend.linear(&self.args(x, norm, Store::Set), out)?;
        if self.partial { ctx.collective.all_reduce(out) } else { Ok(()) }
    }

    /// `hidden += x · wᵀ`: added in the same operation, unless the ranks must sum first.
    pub fn add_to_hidden(&self, ctx: &ForwardCtx<'_>, x: &Tensor) -> Result<(), BackendError> {
        if !self.partial {
            return ctx.backend.linear(&self.args(x, None, Store::Add), &ctx.hidden());
        }
        self.forward(ctx, x, None, &ctx.delta())?;
        ctx.backend.add(&ctx.hidden(), &ctx.delta())
    }

    /// `out = act(g) · u` of a gate and an up projection stacked in this order.
    pub fn forward_gated(
        &self,
        ctx: &ForwardCtx<'_>,
        norm: &Norm,
        activation: Activation,
        out: &Tensor,
    ) -> Result<(), BackendError> {
        let hidden = ctx.hidden();
        ctx.backend.gated_linear(&self.args(&hidden, Some(norm), Store::Set), activation, out)
    }

    /// The matrix and the bias, where the whole product is this rank's; none where ranks have parts.
    pub fn whole(&self) -> Option<(&Weight, Option<&Weight>)> {
        (!self.partial).then_some((&self.weight, self.bias.as_ref()))
    }

    fn args<'a>(&'a self, x: &'a Tensor, norm: Option<&'a Norm>, store: Store) -> LinearArgs<'a> {
        LinearArgs { x, norm, weight: &self.weight, bias: self.bias.as_ref(), store }
    }
}
