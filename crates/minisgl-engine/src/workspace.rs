//! Device memory of a step, sized once for the largest, so that every step and every captured
//! graph finds the same things at the same addresses.

use anyhow::Result;
use minisgl_tensor::{Backend, DType, Tensor};

use crate::config::ModelConfig;
use crate::layers::Attention;
use crate::shares::Shares;

/// Alternatives that log-probabilities can be asked for.
pub const TOP_LOGPROBS_MAX: usize = 128;

/// The largest step.
#[derive(Clone, Copy, Debug)]
pub struct StepSizes {
    pub tokens: usize,
    /// Requests; also the rows whose logits are taken at once.
    pub rows: usize,
}

/// Activations and results.
pub struct Workspace {
    /// `[tokens, hidden]`: the residual stream.
    pub hidden: Tensor,
    /// `[tokens, hidden]`: what is added to it next.
    pub delta: Tensor,
    /// `[tokens, (q + 2·kv)·head_dim]`.
    pub qkv: Tensor,
    /// `[tokens, q·head_dim]`.
    pub attention: Tensor,
    /// `[tokens, inner]`.
    pub inner: Tensor,
    /// `[rows, hidden]`: the residual stream where logits are wanted.
    pub gathered: Tensor,
    /// `[rows, this rank's share of the vocabulary] F32`.
    pub logits_part: Tensor,
    /// `[rows, vocabulary] F32`, where that is not the same.
    pub logits: Option<Tensor>,
    /// `[slots] I32`: each running request's newest token.
    pub token_table: Tensor,
    /// `[rows] I32`.
    pub tokens: Tensor,
    pub logprobs: LogprobBuffers,
}

/// Where `Backend::logprobs` writes.
pub struct LogprobBuffers {
    /// `[rows] F32`.
    pub logprob: Tensor,
    /// `[rows] I32`.
    pub rank: Tensor,
    /// `[rows, top] I32`.
    pub top_ids: Tensor,
    /// `[rows, top] F32`.
    pub top_logprobs: Tensor,
}

impl Workspace {
    pub fn new(
        backend: &dyn Backend,
        config: &ModelConfig,
        shares: &Shares,
        sizes: StepSizes,
    ) -> Result<Self> {
        let StepSizes { tokens, rows } = sizes;
        let heads = Attention::heads(config, shares);
        let float =
            |rows: usize, cols: usize| backend.alloc(backend.activation_dtype(), &[rows, cols]);
        Ok(Self {
            hidden: float(tokens, config.hidden_size)?,
            delta: float(tokens, config.hidden_size)?,
            qkv: float(tokens, heads.qkv_width())?,
            attention: float(tokens, heads.q * heads.dim)?,
            inner: float(tokens, shares.inner.len())?,
            gathered: float(rows, config.hidden_size)?,
            logits_part: backend.alloc(DType::F32, &[rows, shares.token_rows])?,
            logits: match shares.ranks {
                1 => None,
                size => Some(backend.alloc(DType::F32, &[rows, shares.token_rows * size])?),
            },
            token_table: backend.alloc(DType::I32, &[rows])?,
            tokens: backend.alloc(DType::I32, &[rows])?,
            logprobs: LogprobBuffers {
                logprob: backend.alloc(DType::F32, &[rows])?,
                rank: backend.alloc(DType::I32, &[rows])?,
                top_ids: backend.alloc(DType::I32, &[rows, TOP_LOGPROBS_MAX])?,
                top_logprobs: backend.alloc(DType::F32, &[rows, TOP_LOGPROBS_MAX])?,
            },
        })
    }
}
