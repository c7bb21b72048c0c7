//! Whether a model's weights fit where they are to go: said before one of them is read.

use anyhow::{Result, bail};
use minisgl_tensor::{Backend, DType};

use crate::config::ModelConfig;
use crate::layers::Attention;
use crate::shares::{Blocks, Shares};

/// More cards than a machine has.
const CARDS_MAX: usize = 64;

/// Bytes of a rank's matrices where all are kept as `dtype`. What else a model has, vectors and the
/// tables of rotations, is small beside them and left out: a model that just fits is not refused.
pub fn matrix_bytes(config: &ModelConfig, shares: &Shares, dtype: DType) -> usize {
    let heads = Attention::heads(config, shares);
    let attention = heads.qkv_width() + heads.q * heads.dim;
    let mlp = |layer: usize| match &config.moe {
        // A gate, an up and a down projection, and the router's row.
        Some(moe) if moe.sparse_layers[layer] => {
            moe.num_experts * (3 * shares.expert_inner.len() + 1)
        }
        _ => 3 * shares.inner.len(),
    };
    let vocabularies = if config.tie_embeddings { 1 } else { 2 };
    // A config is not trusted: the largest numbers that it may hold make more than fits a `usize`.
    (0..config.num_layers)
        .map(|layer| (attention + mlp(layer)).saturating_mul(config.hidden_size))
        .fold(vocabularies * shares.token_rows * config.hidden_size, usize::saturating_add)
        .saturating_mul(dtype.block_bytes())
}

/// Refuses a rank's weights that its device has no room for.
///
/// # Errors
/// Says what they take, what is free, and over how many cards they would fit.
pub fn ensure_weights_fit(
    config: &ModelConfig,
    blocks: Blocks,
    shares: &Shares,
    backend: &dyn Backend,
) -> Result<()> {
    let Some(dtype) = backend.matrix_dtype() else { return Ok(()) };
    let (needed, free) = (matrix_bytes(config, shares, dtype), backend.memory()?.free);
    if needed <= free {
        return Ok(());
    }
    let most = config.q_heads.min(CARDS_MAX);
    let over = |ranks: usize| {
        let all = Shares::all(config, blocks, ranks).ok()?;
        let largest = all.iter().map(|shares| matrix_bytes(config, shares, dtype)).max()?;
        (largest <= free).then_some((ranks, largest))
    };
    let way_out = match (shares.ranks + 1..=most).find_map(over) {
        Some((ranks, largest)) => {
            format!("--tp {ranks} would bring that to {} MB a card", megabytes(largest))
        }
        None => format!("no --tp up to {most} would make them fit"),
    };
    let whose = match shares.ranks {
        1 => String::new(),
        _ => format!(" of rank {}", shares.rank),
    };
    let halved = if dtype == DType::F32 { "; --dtype bfloat16 would halve it" } else { "" };
    bail!(
        "the weights{whose} do not fit on {}: they take {} MB there, as {dtype} whatever type a \
         file has, and {} MB are free; {way_out}{halved}",
        backend.name(),
        megabytes(needed),
        free >> 20,
    )
}

/// Rounded up, as room for them would be.
pub fn megabytes(bytes: usize) -> usize {
    bytes.div_ceil(1 << 20)
}
