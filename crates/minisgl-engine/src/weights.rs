//! Reads weights: only this rank's slices, under names that are walked like a path.

use std::borrow::Cow;
use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};
use minisgl_tensor::{Backend, DType, HostTensor, Norm, Precision, Weight};

use crate::checkpoint::Checkpoint;
use crate::checkpoint::gguf::tensor_bytes;
use crate::shares::Shares;

/// Where weights come from, and the part of the model whose weights are meant.
#[derive(Clone)]
pub struct WeightScope<'a> {
    pub backend: &'a dyn Backend,
    pub precision: Precision,
    pub shares: &'a Shares,
    source: Source<'a>,
    path: String,
}

#[derive(Clone, Copy)]
enum Source<'a> {
    Checkpoint(&'a Checkpoint),
    Dummy(&'a DummyBlock),
}

impl<'a> WeightScope<'a> {
    /// The whole model; `dummy` replaces the checkpoint's weights.
    pub fn new(
        checkpoint: &'a Checkpoint,
        dummy: Option<&'a DummyBlock>,
        backend: &'a dyn Backend,
        precision: Precision,
        shares: &'a Shares,
    ) -> Self {
        let source = match dummy {
            Some(block) => Source::Dummy(block),
            None => Source::Checkpoint(checkpoint),
        };
        Self { backend, precision, shares, source, path: String::new() }
    }

    /// A part of this part.
    pub fn at(&self, name: impl std::fmt::Display) -> Self {
        let dot = if self.path.is_empty() { "" } else { "." };
        Self { path: format!("{}{dot}{name}", self.path), ..self.clone() }
    }

    /// Rows of a `[rows, cols]` matrix.
    pub fn rows(&self, shape: [usize; 2], rows: Range<usize>) -> Result<HostTensor<'a>> {
        let name = format!("{}.weight", self.path);
        match self.source {
            Source::Dummy(block) => Ok(block.matrix(name, rows, shape[1])),
            Source::Checkpoint(checkpoint) => self.read(checkpoint, &name, shape, rows),
        }
    }

    /// Columns of a `[rows, cols]` matrix.
    pub fn cols(&self, shape: [usize; 2], cols: Range<usize>) -> Result<HostTensor<'a>> {
        if cols == (0..shape[1]) {
            return self.rows(shape, 0..shape[0]);
        }
        let name = format!("{}.weight", self.path);
        match self.source {
            Source::Dummy(block) => Ok(block.matrix(name, 0..shape[0], cols.len())),
            Source::Checkpoint(checkpoint) => {
                slice_cols(self.read(checkpoint, &name, shape, 0..shape[0])?, cols)
            }
        }
    }

    /// A part of the vector `name`.
    pub fn vector(&self, name: &str, len: usize, range: Range<usize>) -> Result<HostTensor<'a>> {
        let name = format!("{}.{name}", self.path);
        match self.source {
            Source::Dummy(_) => Ok(constant(name, 0.0, range.len())),
            Source::Checkpoint(checkpoint) => {
                expect_shape(&name, checkpoint.shape(&name)?, &[len])?;
                checkpoint.rows(&name, None, range)
            }
        }
    }

    /// The norm whose weight is here.
    pub fn norm(&self, width: usize, eps: f32, plus_one: bool) -> Result<Norm> {
        let values = match self.source {
            Source::Dummy(_) => {
                constant(self.path.clone(), if plus_one { 0.0 } else { 1.0 }, width)
            }
            Source::Checkpoint(_) => self.vector("weight", width, 0..width)?,
        };
        Ok(Norm { weight: self.backend.vector(&[values])?, eps, plus_one })
    }

    /// Hands parts to the backend as one stacked matrix.
    pub fn stack(&self, parts: &[HostTensor<'_>]) -> Result<Weight> {
        self.backend.matrix(parts, self.precision).with_context(|| format!("loading {}", self.path))
    }

    /// Expert weights stand one by one (`experts.3.up_proj`), or in one tensor
    /// (`experts.up_proj`, `[experts, rows, cols]`).
    fn read(
        &self,
        checkpoint: &'a Checkpoint,
        name: &str,
        shape: [usize; 2],
        rows: Range<usize>,
    ) -> Result<HostTensor<'a>> {
        if !checkpoint.contains(name)
            && let Some((merged, expert)) = merged_expert(name)
            && checkpoint.contains(&merged)
        {
            let stored = checkpoint.shape(&merged)?;
            ensure!(
                stored.len() == 3 && expert < stored[0] && stored[1..] == shape,
                "{merged}: the file has shape {stored:?}, the config says [experts, {}, {}]",
                shape[0],
                shape[1]
            );
            return checkpoint.rows(&merged, Some(expert), rows);
        }
        expect_shape(name, checkpoint.shape(name)?, &shape)?;
        checkpoint.rows(name, None, rows)
    }
}

fn expect_shape(name: &str, stored: &[usize], expected: &[usize]) -> Result<()> {
    ensure!(
        stored == expected,
        "{name}: the file has shape {stored:?}, the config says {expected:?}"
    );
    Ok(())
}

/// `mlp.experts.3.up_proj.weight` as `mlp.experts.up_proj.weight` and 3.
fn merged_expert(name: &str) -> Option<(String, usize)> {
    let (before, after) = name.split_once(".experts.")?;
    let (expert, rest) = after.split_once('.')?;
    Some((format!("{before}.experts.{rest}"), expert.parse().ok()?))
}

/// Columns of a matrix, copied; they must begin and end with whole blocks.
fn slice_cols<'a>(tensor: HostTensor<'a>, cols: Range<usize>) -> Result<HostTensor<'a>> {
    let dtype = tensor.dtype;
    let (Some(skip), Some(take), Some(row_bytes)) = (
        dtype.bytes_of(cols.start),
        dtype.bytes_of(cols.len()),
        tensor_bytes(dtype, &tensor.shape[1..]),
    ) else {
        bail!(
            "{}: columns {cols:?} of a rank cut through {dtype} blocks of {}",
            tensor.name,
            dtype.block_len()
        );
    };
    let mut data = Vec::with_capacity(take * tensor.shape[0]);
    for row in tensor.data.chunks_exact(row_bytes.max(1)) {
        data.extend_from_slice(&row[skip..skip + take]);
    }
    let scale = tensor.scale.map(|scale| scale.cols(tensor.shape[1], cols.clone()));
    let shape = vec![tensor.shape[0], cols.len()];
    Ok(HostTensor { name: tensor.name, dtype, shape, data: Cow::Owned(data), scale })
}

fn constant<'a>(name: String, value: f32, len: usize) -> HostTensor<'a> {
    let data = Cow::Owned(value.to_le_bytes().repeat(len));
    HostTensor { name, dtype: DType::F32, shape: vec![len], data, scale: None }
}

/// Random bf16 numbers, normal with standard deviation 0.02. Dummy matrices are made of this one
/// block, each from another place in it, which takes no longer than copying.
pub struct DummyBlock {
    bytes: Vec<u8>,
}

impl DummyBlock {
    const LEN: usize = 1 << 20;

    pub fn new() -> Self {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut uniform = || {
            state = splitmix(state);
            (state >> 11) as f64 / (1_u64 << 53) as f64
        };
        // The sum of twelve uniform numbers less six is nearly normal.
        let mut normal = || (0..12).map(|_| uniform()).sum::<f64>() - 6.0;
        let bytes = (0..Self::LEN)
            .flat_map(|_| half::bf16::from_f64(0.02 * normal()).to_le_bytes())
            .collect();
        Self { bytes }
    }

    fn matrix<'a>(&self, name: String, rows: Range<usize>, cols: usize) -> HostTensor<'a> {
        let shape = vec![rows.len(), cols];
        let wanted = 2 * rows.len() * cols;
        let hash = name.bytes().fold(rows.start as u64, |h, byte| splitmix(h ^ u64::from(byte)));
        let start = 2 * (hash as usize % Self::LEN);
        let mut data = Vec::with_capacity(wanted);
        data.extend_from_slice(&self.bytes[start..][..wanted.min(self.bytes.len() - start)]);
        while data.len() < wanted {
            let left = wanted - data.len();
            data.extend_from_slice(&self.bytes[..left.min(self.bytes.len())]);
        }
        HostTensor { name, dtype: DType::BF16, shape, data: Cow::Owned(data), scale: None }
    }
}

fn splitmix(state: u64) -> u64 {
    let z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
