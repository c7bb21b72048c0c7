//! The two matrices that know the vocabulary, each rank holding its share of the rows.

use std::borrow::Cow;

use anyhow::{Context, Result, ensure};
use minisgl_tensor::{
    BackendError, DType, Embed, HostTensor, Linear as LinearArgs, Norm, Store, Tensor, Weight,
};

use super::ForwardCtx;
use crate::config::ModelConfig;
use crate::shares::Shares;
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
        Ok(Self {
            table: token_rows(scope, config)?,
            first_id: scope.shares.tokens.start,
            scale,
            partial: scope.shares.ranks > 1,
        })
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

/// What a head gives.
#[derive(Clone)]
pub struct Logits {
    /// `[rows, vocabulary] F32`, padded to a multiple of the ranks.
    pub values: Tensor,
    /// As `Backend::logits` gave it, where these are its logits as they were.
    pub survey: Option<Tensor>,
}

impl Logits {
    /// Of the first `rows` rows.
    pub fn first(&self, rows: usize) -> Self {
        let survey = self.survey.as_ref().map(|survey| survey.first(rows));
        Self { values: self.values.first(rows), survey }
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
        let weight = match config.tie_embeddings {
            true => embedding.table.clone(),
            false => token_rows(&scope.at("lm_head"), config)?,
        };
        let Shares { tokens, token_rows, ranks, .. } = scope.shares;
        let padding = match tokens.len() < *token_rows {
            false => None,
            true => Some(padding_bias(scope)?),
        };
        ensure!(
            token_rows * ranks == config.vocab_size || config.logit_soft_cap.is_none(),
            "a soft-capped vocabulary of {} cannot be split over {ranks} ranks unevenly",
            config.vocab_size,
        );
        let norm = scope.at("model.norm").norm(
            config.hidden_size,
            config.norm_eps,
            config.norm_plus_one,
        )?;
        Ok(Self { weight, norm, padding, soft_cap: config.logit_soft_cap })
    }

    /// The logits of `x [rows, hidden]`, the residual stream's last state. `temperature`: each row's, where they will
    /// be sampled from.
    pub fn forward(
        &self,
        ctx: &ForwardCtx<'_>,
        x: &Tensor,
        temperature: Option<&Tensor>,
    ) -> Result<Logits, BackendError> {
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
        // Not of parts, nor of what a cap changes.
        let temperature = temperature.filter(|_| ranks == 1 && self.soft_cap.is_none());
        let survey = match temperature {
            Some(temperature) => ctx.backend.logits(&args, temperature, &part)?,
            None => ctx.backend.linear(&args, &part).map(|()| None)?,
        };
        let values = match &ctx.workspace.logits {
            None => part,
            Some(whole) => {
                let whole = whole.reshape(&[rows, part_width * ranks]);
                ctx.collective.all_gather_cols(&part, &whole)?;
                whole
            }
        };
        if let Some(cap) = self.soft_cap {
            ctx.backend.soft_cap(&values, cap)?;
        }
        Ok(Logits { values, survey })
    }
}

/// This rank's rows of a matrix `[vocabulary, hidden]`, padded with zeros.
fn token_rows(scope: &WeightScope<'_>, config: &ModelConfig) -> Result<Weight> {
    let width = config.hidden_size;
    let Shares { tokens, token_rows, .. } = scope.shares;
    let real = scope.rows([config.vocab_size, width], tokens.clone())?;
    let missing = token_rows - tokens.len();
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

fn padding_bias(scope: &WeightScope<'_>) -> Result<Weight> {
    let Shares { tokens, token_rows, .. } = scope.shares;
    let mut bias = vec![0.0_f32; tokens.len()];
    bias.resize(*token_rows, f32::NEG_INFINITY);
    let data = bias.iter().flat_map(|value| value.to_le_bytes()).collect();
    Ok(scope.backend.vector(&[HostTensor {
        name: "vocabulary padding".to_owned(),
        dtype: DType::F32,
        shape: vec![*token_rows],
        data: Cow::Owned(data),
        scale: None,
    }])?)
}
