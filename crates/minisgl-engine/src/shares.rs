//! Which part of a model a rank holds.
//!
//! Shares are as even as whole units allow: heads go by groups that share keys and values, inner
//! features by whole quantization blocks. What does not divide is split unevenly, not refused.

use std::ops::Range;

use anyhow::{Result, bail};

use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;

/// One rank's part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shares {
    pub rank: usize,
    pub ranks: usize,
    pub q_heads: Range<usize>,
    /// With fewer of them than ranks, the one that this rank holds beside others.
    pub kv_heads: Range<usize>,
    /// Of a dense MLP's inner features.
    pub inner: Range<usize>,
    /// Of each expert's inner features.
    pub expert_inner: Range<usize>,
    /// Of the vocabulary.
    pub tokens: Range<usize>,
    /// Rows of the vocabulary's matrices on every rank: `tokens`, padded to the longest share.
    pub token_rows: usize,
}

/// Matrices that are cut along the dimension in which quantization blocks run: a cut lies between
/// blocks. Elements in a block; 1 where nothing is quantized.
#[derive(Clone, Copy)]
pub struct Blocks {
    pub o_proj: usize,
    pub down_proj: usize,
}

impl Shares {
    /// Every rank's share.
    ///
    /// # Errors
    /// As `new`.
    pub fn all(config: &ModelConfig, blocks: Blocks, ranks: usize) -> Result<Vec<Self>> {
        (0..ranks.max(1)).map(|rank| Self::new(config, blocks, rank, ranks)).collect()
    }

    /// The share of rank `rank` of `ranks`.
    ///
    /// # Errors
    /// If some rank would have nothing to do; says why, and which numbers would do.
    pub fn new(config: &ModelConfig, blocks: Blocks, rank: usize, ranks: usize) -> Result<Self> {
        if let Some(reason) = obstacle(config, blocks, ranks) {
            let fits = |ranks: &usize| obstacle(config, blocks, *ranks).is_none();
            let most = (1..=config.q_heads).rev().find(fits).unwrap_or(1);
            bail!("--tp {ranks} does not fit this model: {reason}; 1 to {most} would do");
        }
        let (q_heads, kv_heads) = heads(config, blocks, rank, ranks);
        let inner = |size| share(size, inner_unit(size, blocks), rank, ranks);
        let token_rows = config.vocab_size.div_ceil(ranks);
        let first_token = rank * token_rows;
        Ok(Self {
            rank,
            ranks,
            q_heads,
            kv_heads,
            inner: inner(config.intermediate_size),
            expert_inner: config.moe.as_ref().map_or(0..0, |moe| inner(moe.moe_intermediate_size)),
            tokens: first_token.min(config.vocab_size)
                ..(first_token + token_rows).min(config.vocab_size),
            token_rows,
        })
    }
}

impl Blocks {
    /// The longest blocks of any layer. All lengths are powers of two, so that it serves for all.
    pub fn of(checkpoint: &Checkpoint) -> Self {
        let longest = |suffix: &str| {
            checkpoint
                .tensors()
                .filter(|tensor| tensor.name.ends_with(suffix))
                .map(|tensor| tensor.dtype.block_len())
                .max()
                .unwrap_or(1)
        };
        Self { o_proj: longest(".o_proj.weight"), down_proj: longest(".down_proj.weight") }
    }
}

/// Units of `unit` things each, dealt out so that no two ranks differ by more than one.
fn share(count: usize, unit: usize, rank: usize, ranks: usize) -> Range<usize> {
    let units = count.div_ceil(unit);
    let border = |rank: usize| (rank * units / ranks * unit).min(count);
    border(rank)..border(rank + 1)
}

/// Query heads, and the KV heads that they read.
fn heads(
    config: &ModelConfig,
    blocks: Blocks,
    rank: usize,
    ranks: usize,
) -> (Range<usize>, Range<usize>) {
    let kv_heads = config.kv_heads;
    let group = config.q_heads / kv_heads;
    if kv_heads >= ranks {
        let kv = share(kv_heads, whole_blocks(group * config.head_dim, blocks.o_proj), rank, ranks);
        return (kv.start * group..kv.end * group, kv);
    }
    // Ranks `first..next` hold the same KV head and deal out the query heads that read it.
    let kv = rank * kv_heads / ranks;
    let (first, next) = ((kv * ranks).div_ceil(kv_heads), ((kv + 1) * ranks).div_ceil(kv_heads));
    let unit = whole_blocks(config.head_dim, blocks.o_proj);
    let q = share(group, unit, rank - first, next - first);
    (kv * group + q.start..kv * group + q.end, kv..kv + 1)
}

/// How many things of `len` elements fill whole blocks.
fn whole_blocks(len: usize, block: usize) -> usize {
    (1..block).find(|count| (count * len).is_multiple_of(block)).unwrap_or(block)
}

/// Eight features, or a block: what kernels load at once.
fn inner_unit(size: usize, blocks: Blocks) -> usize {
    if size.is_multiple_of(8) { blocks.down_proj.max(8) } else { blocks.down_proj }
}

/// Why the model cannot be split over so many ranks.
fn obstacle(config: &ModelConfig, blocks: Blocks, ranks: usize) -> Option<String> {
    if ranks == 0 {
        return Some("there is no rank".to_owned());
    }
    let in_blocks = |block: usize| match block {
        1 => String::new(),
        block => format!(" in quantized blocks of {block}"),
    };
    let idle = |rank| heads(config, blocks, rank, ranks).0.is_empty();
    let group = config.q_heads / config.kv_heads;
    let cuts_blocks =
        config.kv_heads < ranks && !(group * config.head_dim).is_multiple_of(blocks.o_proj);
    if cuts_blocks || (0..ranks).any(idle) {
        return Some(format!(
            "{} query heads of {}, which share {} key and value heads{}, are too few",
            config.q_heads,
            config.head_dim,
            config.kv_heads,
            in_blocks(blocks.o_proj),
        ));
    }
    let experts = config.moe.as_ref().map(|moe| moe.moe_intermediate_size);
    let dense = config.moe.as_ref().is_none_or(|moe| moe.sparse_layers.contains(&false));
    let mut inner = dense.then_some(config.intermediate_size).into_iter().chain(experts);
    let small = inner.find(|size| size.div_ceil(inner_unit(*size, blocks)) < ranks);
    small.map(|size| {
        format!("an intermediate size of {size}{} is too small", in_blocks(blocks.down_proj))
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn config(q_heads: usize, kv_heads: usize, head_dim: usize, inner: usize) -> ModelConfig {
        ModelConfig::from_json(&json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": q_heads * head_dim,
            "num_attention_heads": q_heads, "num_key_value_heads": kv_heads,
            "head_dim": head_dim, "num_hidden_layers": 1, "intermediate_size": inner,
            "vocab_size": 121, "max_position_embeddings": 128,
        }))
        .unwrap()
    }

    /// Every rank has something to do, its query heads read its KV heads, cuts lie between
    /// blocks, and together the ranks hold everything once.
    #[test]
    fn shares_cover_everything_once_in_whole_blocks() {
        for (q_heads, kv_heads, head_dim, inner, block) in [
            (9, 3, 64, 1536, 32),
            (40, 8, 128, 17408, 256),
            (32, 4, 128, 768, 1),
            (4, 1, 256, 2048, 256),
            (15, 5, 64, 2560, 32),
            (8, 2, 80, 100, 1),
        ] {
            let config = config(q_heads, kv_heads, head_dim, inner);
            let blocks = Blocks { o_proj: block, down_proj: block };
            let group = q_heads / kv_heads;
            let fitting = (1..=q_heads).filter(|n| Shares::new(&config, blocks, 0, *n).is_ok());
            for ranks in fitting {
                let (mut q, mut features, mut tokens) = (0, 0, 0);
                for rank in 0..ranks {
                    let shares = Shares::new(&config, blocks, rank, ranks).unwrap();
                    assert_eq!((shares.q_heads.start, shares.inner.start), (q, features));
                    assert!(!shares.q_heads.is_empty() && !shares.inner.is_empty());
                    assert_eq!(shares.kv_heads.start, shares.q_heads.start / group);
                    assert_eq!(shares.kv_heads.end, shares.q_heads.end.div_ceil(group));
                    assert_eq!(shares.q_heads.len() % shares.kv_heads.len(), 0);
                    assert!((shares.q_heads.end * head_dim).is_multiple_of(block));
                    assert!(shares.inner.end.is_multiple_of(block) || shares.inner.end == inner);
                    (q, features) = (shares.q_heads.end, shares.inner.end);
                    assert!(shares.tokens.len() <= shares.token_rows);
                    tokens += shares.tokens.len();
                }
                assert_eq!((q, features, tokens), (q_heads, inner, 121), "{ranks} ranks");
            }
        }
    }

    #[test]
    fn what_cannot_work_says_what_would() {
        let refused = |config: &ModelConfig, block: usize, ranks: usize| {
            let blocks = Blocks { o_proj: block, down_proj: block };
            Shares::new(config, blocks, 0, ranks).unwrap_err().to_string()
        };
        let error = refused(&config(9, 3, 64, 1536), 32, 10);
        assert!(error.contains("9 query heads") && error.ends_with("1 to 9 would do"), "{error}");
        // Five heads of 128 are two and a half blocks of 256: KV heads go in pairs.
        let error = refused(&config(40, 8, 128, 17408), 256, 8);
        assert!(error.contains("blocks of 256") && error.ends_with("1 to 4 would do"), "{error}");
        let error = refused(&config(8, 8, 64, 96), 32, 4);
        assert!(error.contains("size of 96 in") && error.ends_with("1 to 3 would do"), "{error}");
    }
}
