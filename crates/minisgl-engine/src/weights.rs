//! Reads weights: only this rank's slices, under names that are walked like a path.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::OnceLock;

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
            Source::Dummy(_) => Ok(unfilled(&name, rows.start, [rows.len(), shape[1]])),
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
            Source::Dummy(_) => Ok(unfilled(&name, cols.start, [shape[0], cols.len()])),
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
        Ok(Norm { weight: self.backend.vector(&[values])?, eps, plus_one, folded: false })
    }

    /// Hands parts to the backend as one stacked matrix.
    pub fn stack(&self, parts: &[HostTensor<'_>]) -> Result<Weight> {
        let made = match self.source {
            Source::Checkpoint(checkpoint) => {
                let made = self.backend.matrix(parts, self.precision);
                checkpoint.release(parts);
                made
            }
            Source::Dummy(block) => {
                match self.backend.random(&stacked_shape(parts), seed(parts))? {
                    Some(matrix) => Ok(matrix),
                    None => self.backend.matrix(&block.fill(parts), self.precision),
                }
            }
        };
        made.with_context(|| format!("loading {}", self.path))
    }

    /// The same for each of a layer's experts.
    pub fn stack_experts(&self, experts: &[Vec<HostTensor<'_>>]) -> Result<Weight> {
        let made = match self.source {
            Source::Checkpoint(checkpoint) => {
                let made = self.backend.expert_matrices(experts, self.precision);
                experts.iter().for_each(|parts| checkpoint.release(parts));
                made
            }
            Source::Dummy(block) => {
                let [rows, cols] = stacked_shape(&experts[0]);
                match self.backend.random(&[experts.len(), rows, cols], seed(&experts[0]))? {
                    Some(matrices) => Ok(matrices),
                    None => {
                        let filled: Vec<_> =
                            experts.iter().map(|parts| block.fill(parts)).collect();
                        self.backend.expert_matrices(&filled, self.precision)
                    }
                }
            }
        };
        made.with_context(|| format!("loading the experts of {}", self.path))
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

/// A dummy matrix, without its numbers: the device may make them itself.
fn unfilled<'a>(name: &str, first: usize, shape: [usize; 2]) -> HostTensor<'a> {
    // Ranks have parts that begin at different places, and then other numbers.
    let name = format!("{name} from {first}");
    let data = Cow::Owned(Vec::new());
    HostTensor { name, dtype: DType::BF16, shape: shape.to_vec(), data, scale: None }
}

fn stacked_shape(parts: &[HostTensor<'_>]) -> [usize; 2] {
    [parts.iter().map(|part| part.shape[0]).sum(), parts[0].shape[1]]
}

/// Depends on the name alone, so that runs are alike.
fn seed(parts: &[HostTensor<'_>]) -> u32 {
    hash(&parts[0].name) as u32
}

fn hash(name: &str) -> u64 {
    name.bytes().fold(0, |hash, byte| splitmix(hash ^ u64::from(byte)))
}

/// Random bf16 numbers, normal with standard deviation 0.02. Dummy matrices of the host are made of
/// this one block, each from another place in it, which takes no longer than copying.
pub struct DummyBlock {
    bytes: OnceLock<Vec<u8>>,
}

impl DummyBlock {
    const LEN: usize = 1 << 20;

    pub fn new() -> Self {
        Self { bytes: OnceLock::new() }
    }

    fn bytes(&self) -> &[u8] {
        self.bytes.get_or_init(|| {
            let mut state = 0x9e37_79b9_7f4a_7c15_u64;
            let mut uniform = || {
                state = splitmix(state);
                (state >> 11) as f64 / (1_u64 << 53) as f64
            };
            // The sum of twelve uniform numbers less six is nearly normal.
            let mut normal = || (0..12).map(|_| uniform()).sum::<f64>() - 6.0;
            (0..Self::LEN)
                .flat_map(|_| half::bf16::from_f64(0.02 * normal()).to_le_bytes())
                .collect()
        })
    }

    /// Gives numbers to the parts that have none yet.
    fn fill<'a>(&self, parts: &[HostTensor<'a>]) -> Vec<HostTensor<'a>> {
        let block = self.bytes();
        let filled = |part: &HostTensor<'a>| {
            if !part.data.is_empty() {
                return part.clone();
            }
            let wanted = 2 * part.shape.iter().product::<usize>();
            let start = 2 * (hash(&part.name) as usize % Self::LEN);
            let mut data = Vec::with_capacity(wanted);
            data.extend_from_slice(&block[start..][..wanted.min(block.len() - start)]);
            while data.len() < wanted {
                let left = wanted - data.len();
                data.extend_from_slice(&block[..left.min(block.len())]);
            }
            HostTensor { data: Cow::Owned(data), ..part.clone() }
        };
        parts.iter().map(filled).collect()
    }
}

fn splitmix(state: u64) -> u64 {
    let z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
