//! The two matrices that know the vocabulary, each rank holding its share of the rows.

use std::borrow::Cow;

use anyhow::{Context, Result, ensure};
use minisgl_tensor::{
    BackendError, DType, Embed, HostTensor, Linear as LinearArgs, Norm, Store, Tensor, Weight,
};

use super::ForwardCtx;
use crate::config::ModelConfig;
use crate::weights::WeightScope;

/// Token ids to vectors.
pub struct Embedding {
    table: Weight,
    first_id: usize,
    scale: f32,
    partial: bool,
}

impl Embedding {
    pub fn new(scope: &WeightScope<'_>, config: &ModelConfig, scale: f32) -> Result<Self> {
        let share = Share::of(scope, config);
        let table = share.matrix(scope, config)?;
        Ok(Self { table, first_id: share.first, scale, partial: scope.tp.size > 1 })
    }

    /// Writes the residual stream. Ids of other ranks' shares give zeros, which the sum fills.
    pub fn forward(&self, ctx: &ForwardCtx<'_>) -> Result<(), BackendError> {
        let args = Embed {
            input_ids: ctx.input_ids,
            token_table: &ctx.workspace.token_table,
            table: &self.table,
            first_id: self.first_id,
            scale: self.scale,
        };
        ctx.backend.embed(&args, &ctx.hidden())?;
        if self.partial { ctx.collective.all_reduce(&ctx.hidden()) } else { Ok(()) }
    }
}

/// Vectors to logits.
pub struct Head {
    weight: Weight,
    norm: Norm,
    /// 0 for tokens, −∞ for rows that pad the vocabulary to a multiple of the ranks.
    padding: Option<Weight>,
    soft_cap: Option<f32>,
}

impl Head {
    /// The head behind the model's last norm; a tied one is the embedding.
    pub fn new(
        scope: &WeightScope<'_>,
        config: &ModelConfig,
        embedding: &Embedding,
    ) -> Result<Self> {
        let head_scope = scope.at("lm_head");
        let share = Share::of(&head_scope, config);
        let weight = match config.tie_embeddings {
            true => embedding.table.clone(),
            false => share.matrix(&head_scope, config)?,
        };
        let padding = match share.real.len() < share.padded {
            false => None,
            true => Some(share.padding_bias(scope)?),
        };
        let padded = share.padded * scope.tp.size > config.vocab_size;
        ensure!(
            !(padded && config.logit_soft_cap.is_some()),
            "a soft-capped vocabulary of {} cannot be split over {} ranks unevenly",
            config.vocab_size,
            scope.tp.size
        );
        let norm = scope.at("model.norm").norm(
            config.hidden_size,
            config.norm_eps,
            config.norm_plus_one,
        )?;
        Ok(Self { weight, norm, padding, soft_cap: config.logit_soft_cap })
    }

    /// The logits of `x [rows, hidden]`, the residual stream's last state: `[rows, vocabulary]`,
    /// padded to a multiple of the ranks.
    pub fn forward(&self, ctx: &ForwardCtx<'_>, x: &Tensor) -> Result<Tensor, BackendError> {
        let rows = x.dim(0);
        let (part_width, ranks) = (self.weight.rows(), ctx.collective.size());
        let part = ctx.workspace.logits_part.reshape(&[rows, part_width]);
        let args = LinearArgs {
            x,
            norm: Some(&self.norm),
            weight: &self.weight,
            bias: self.padding.as_ref(),
            store: Store::Set,
        };
        ctx.backend.linear(&args, &part)?;
        let logits = match &ctx.workspace.logits {
            None => part,
            Some(whole) => {
                let whole = whole.reshape(&[rows, part_width * ranks]);
                ctx.collective.all_gather_cols(&part, &whole)?;
                whole
            }
        };
        if let Some(cap) = self.soft_cap {
            ctx.backend.soft_cap(&logits, cap)?;
        }
        Ok(logits)
    }
}

/// A rank's share of the vocabulary: `padded` rows, of which those in `real` are tokens.
struct Share {
    first: usize,
    real: std::ops::Range<usize>,
    padded: usize,
}

impl Share {
    fn of(scope: &WeightScope<'_>, config: &ModelConfig) -> Self {
        let vocab = config.vocab_size;
        let padded = vocab.div_ceil(scope.tp.size);
        let first = scope.tp.rank * padded;
        Self { first, real: first.min(vocab)..(first + padded).min(vocab), padded }
    }

    fn matrix(&self, scope: &WeightScope<'_>, config: &ModelConfig) -> Result<Weight> {
        let width = config.hidden_size;
        let real = scope.rows([config.vocab_size, width], self.real.clone())?;
        let missing = self.padded - self.real.len();
        if missing == 0 {
            return scope.stack(&[real]);
        }
        // Zero bytes are zeros in every type, quantized ones included.
        let bytes = real.dtype.bytes_of(missing * width).context("whole rows are whole blocks")?;
        let zeros = HostTensor {
            name: format!("{} (padding)", real.name),
            shape: vec![missing, width],
            data: Cow::Owned(vec![0; bytes]),
            ..real.clone()
        };
        scope.stack(&[real, zeros])
    }

    fn padding_bias(&self, scope: &WeightScope<'_>) -> Result<Weight> {
        let mut bias = vec![0.0_f32; self.real.len()];
        bias.resize(self.padded, f32::NEG_INFINITY);
        let data = bias.iter().flat_map(|value| value.to_le_bytes()).collect();
        Ok(scope.backend.vector(&[HostTensor {
            name: "vocabulary padding".to_owned(),
            dtype: DType::F32,
            shape: vec![self.padded],
            data: Cow::Owned(data),
            scale: None,
        }])?)
    }
}
