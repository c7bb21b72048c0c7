//! Matrix products: our own kernels for few rows, cuBLASLt for many.

use minisgl_tensor::{Activation, Backend, DType, Linear, Norm, Result, Store, Tensor};

use crate::backend::{CudaBackend, Products, norm_args};
use crate::device::{Launch, args};
use crate::gemm::Product;
use crate::kernels::Module;
use crate::weights::tensor;

/// Up to this many rows of a matrix of up to this many elements, `gemv.cu` is faster than cuBLASLt
/// (measured on an H200): what counts there is launches and fusing, not the reading of weights.
pub(crate) const GEMV_ROWS_MAX: usize = 16;
const GEMV_ELEMENTS_MAX: usize = 16 << 20;
/// The same for `stream.cu`: rows of this many elements, whatever their number. With Qwen3-14B's, of
/// 5,120 and more, it reads at 85% of what the memory gives: `wide.cu` takes those.
pub(crate) const STREAM_ROW_MAX: usize = 4096;
/// As in `kernels/elementwise.cu`: a block's threads at most, and how many times a thread of it takes 8 columns.
const GATE_THREADS: usize = 576;
const GATE_PIECES: usize = 4;

/// How many blocks of how many threads have a row of so many columns in `gate`. A thread has several pieces only where
/// one block could not take all.
fn gate_blocks(inner: usize) -> (usize, usize) {
    let blocks = inner.div_ceil(8 * GATE_THREADS * GATE_PIECES);
    let pieces = inner.div_ceil(8 * GATE_THREADS * blocks);
    (blocks, inner.div_ceil(8 * blocks * pieces).next_multiple_of(32))
}

impl CudaBackend {
    pub(crate) fn linear_op(&self, a: &Linear<'_>, out: &Tensor) -> Result<()> {
        if self.prefers_gemv(a) {
            return self.gemv(a, None, out);
        }
        if self.prefers_wide(a) {
            return self.wide(a, None, out);
        }
        if let Some(division) = self.strips(a, out) {
            return self.strip(&division, a, None, out);
        }
        if self.prefers_narrow(a, false, out) {
            return self.narrow(a, None, out);
        }
        self.library(a, out)
    }

    /// By cuBLASLt, with kernels for what it does not do.
    fn library(&self, a: &Linear<'_>, out: &Tensor) -> Result<()> {
        let x = self.normed(a)?;
        let mut add = a.store == Store::Add;
        if let Some(bias) = a.bias {
            let name =
                if out.dtype() == self.dtype() { "spread_bias_t" } else { "spread_bias_f32" };
            let count = out.elements();
            self.simple(
                name,
                Launch::new(count.div_ceil(256), 256),
                args![tensor(bias), out.row_len(), count, add, out],
            )?;
            add = true;
        }
        self.gemm.run(&Product {
            x: x.address(),
            w: tensor(a.weight),
            out: out.address(),
            rows: a.x.dim(0),
            out_dtype: out.dtype(),
            add,
        })
    }

    pub(crate) fn gated_linear_op(
        &self,
        a: &Linear<'_>,
        activation: Activation,
        out: &Tensor,
    ) -> Result<()> {
        let (rows, inner) = (a.x.dim(0), out.row_len());
        if self.prefers_gemv(a) {
            return self.gemv(a, Some(activation), out);
        }
        if self.prefers_wide(a) {
            return self.wide(a, Some(activation), out);
        }
        if let Some(division) = self.strips(a, out) {
            return self.strip(&division, a, Some(activation), out);
        }
        if self.prefers_narrow(a, true, out) {
            return self.narrow(a, Some(activation), out);
        }
        let both = self.scratch("gate_up", self.dtype(), &[rows, 2 * inner])?;
        // Of a folded norm, a factor a row is left, which may come behind the product.
        let later = a.norm.filter(|norm| norm.folded && a.bias.is_none());
        let norm = if later.is_some() { None } else { a.norm };
        self.library(&Linear { store: Store::Set, norm, ..*a }, &both)?;
        let (x, eps) = later.map_or((0, 0.0), |norm| (a.x.address(), norm.eps));
        let gelu = activation == Activation::GeluTanh;
        let (blocks, threads) = gate_blocks(inner);
        let shape = Launch { grid: [rows, blocks, 1], threads, shared: 0, cluster: 1 };
        self.simple("gate", shape, args![&both, x, a.x.row_len(), eps, inner, gelu, out])
    }

    /// `x`, normed where there is a norm.
    pub(crate) fn normed(&self, a: &Linear<'_>) -> Result<Tensor> {
        let Some(norm) = a.norm else { return Ok(a.x.clone()) };
        let normed = self.scratch("normed", self.dtype(), a.x.shape())?;
        self.rms_norm(a.x, norm, &normed)?;
        Ok(normed)
    }

    /// `x` and the norm that is left to a kernel that takes the weights of none, or `x` normed.
    pub(crate) fn normed_or_folded<'a>(
        &self,
        a: &Linear<'a>,
    ) -> Result<(Tensor, Option<&'a Norm>)> {
        match a.norm {
            Some(norm) if norm.folded => Ok((a.x.clone(), Some(norm))),
            _ => Ok((self.normed(a)?, None)),
        }
    }

    fn prefers_gemv(&self, a: &Linear<'_>) -> bool {
        let weight = tensor(a.weight);
        !self.exact
            && self.products() == Products::Own
            && a.x.dim(0) <= GEMV_ROWS_MAX
            && match self.streams() {
                true => weight.row_len() <= STREAM_ROW_MAX,
                false => weight.elements() <= GEMV_ELEMENTS_MAX,
            }
            && weight.row_len().is_multiple_of(8)
    }

    /// Whether the card copies in bulk, and `stream.cu` takes `gemv.cu`'s place.
    fn streams(&self) -> bool {
        self.device.capability.0 >= 9
    }

    /// `gemv.cu`'s product with the weights fetched ahead of the kernels in front.
    fn stream(&self, a: &Linear<'_>, gated: Option<Activation>, out: &Tensor) -> Result<()> {
        let (rows, k, n) = (a.x.dim(0), a.x.row_len(), out.row_len());
        let is_logits = out.dtype() == DType::F32;
        let many = !is_logits && n >= 16 * self.device.multiprocessors;
        let tiles = if gated.is_some() || many { 2 } else { 1 };
        let (stage, bytes) = if is_logits { LOGITS_STAGE } else { STREAM_STAGE };
        let blocks = n.div_ceil(if gated.is_some() { 8 } else { tiles * 8 });
        // All blocks walk as many tiles, so that all end at about the same time.
        let rounds = blocks.div_ceil(self.device.multiprocessors * 2);
        let grid = blocks.div_ceil(rounds);
        let stage_bytes = tiles * 8 * (stage * 2 + 64);
        let steps = k.div_ceil(stage) * rounds;
        let stages = steps.min(bytes / stage_bytes);
        let args = ProductArgs::new(a, gated, out, stages);
        let mut defines = variant(rows > 8, gated.is_some(), a.norm.is_some(), is_logits);
        defines.push(("TILES", tiles as i32));
        let function = self.kernels.get(Module::Stream, &defines, "stream")?;
        let norm_bytes = if a.norm.is_some() { k * 4 } else { 0 };
        let shape = Launch {
            grid: [grid, 1, 1],
            threads: 288,
            shared: stages * stage_bytes + norm_bytes,
            cluster: 1,
        };
        // SAFETY: `ProductArgs` has the kernel's layout; shapes as `Backend::linear` states.
        unsafe { self.device.launch_struct(function, shape, &args) }
    }

    fn gemv(&self, a: &Linear<'_>, gated: Option<Activation>, out: &Tensor) -> Result<()> {
        if self.streams() {
            return self.stream(a, gated, out);
        }
        let (rows, k, n) = (a.x.dim(0), a.x.row_len(), out.row_len());
        let defines =
            variant(rows > 8, gated.is_some(), a.norm.is_some(), out.dtype() == DType::F32);
        let function = self.kernels.get(Module::Gemv, &defines, "gemv")?;
        let (norm, eps, shift) = norm_args(a.norm);
        // So few warps that the next kernel's blocks fit beside these and fetch their weights.
        let warps = if n / 8 < 2 * self.device.multiprocessors { 8 } else { 4 };
        let tiles = if gated.is_some() { 2 } else { 1 };
        let shape = Launch {
            grid: [n.div_ceil(8), 1, 1],
            threads: warps * 32,
            shared: warps * (tiles * 16 * 8 + 16) * 4,
            cluster: 1,
        };
        let bias = a.bias.map_or(0, |b| tensor(b).address());
        let gelu = gated == Some(Activation::GeluTanh);
        let add = a.store == Store::Add;
        // SAFETY: the kernel's parameters in order; shapes as `Backend::linear` states.
        unsafe {
            self.device.launch(
                function,
                shape,
                args![a.x, tensor(a.weight), norm, eps, shift, bias, rows, n, k, add, gelu, out],
            )
        }
    }
}

fn variant(two_halves: bool, gated: bool, norm: bool, out_f32: bool) -> Vec<(&'static str, i32)> {
    vec![
        ("HALVES", 1 + i32::from(two_halves)),
        ("GATED", i32::from(gated)),
        ("NORM", i32::from(norm)),
        ("OUT_F32", i32::from(out_f32)),
    ]
}

/// Every variant that a decoder can ask for.
pub(crate) fn gemv_variants(streams: bool) -> Vec<(Module, Vec<(&'static str, i32)>)> {
    let mut all = Vec::new();
    for two_halves in [false, true] {
        for (gated, norm, out_f32) in [
            (false, false, false),
            (false, true, false),
            (true, true, false),
            (false, false, true),
            (false, true, true),
        ] {
            let defines = variant(two_halves, gated, norm, out_f32);
            if !streams {
                all.push((Module::Gemv, defines));
                continue;
            }
            // Few rows of w only where a result is added to the residual stream.
            for tiles in match (out_f32, norm) {
                (true, _) => 1..=1,
                (false, true) => 2..=2,
                (false, false) => 1..=2,
            } {
                let mut defines = defines.clone();
                defines.push(("TILES", tiles));
                all.push((Module::Stream, defines));
            }
        }
    }
    all
}

/// `STAGE` in `kernels/stream.cu`, and the bytes of a block's stages: so little shared memory that, up to 8 rows, the
/// next product's blocks find room beside two of this one's.
const STREAM_STAGE: (usize, usize) = (512, 53 << 10);
/// The same for logits, behind which no product comes.
const LOGITS_STAGE: (usize, usize) = (1024, 88 << 10);

/// As `Args` in `kernels/stream.cu` and `kernels/wide.cu`.
#[repr(C)]
pub(crate) struct ProductArgs {
    x: u64,
    w: u64,
    norm: u64,
    bias: u64,
    out: u64,
    rows: i32,
    n: i32,
    k: i32,
    /// Stages of `stream.cu`, blocks of a cluster of `wide.cu`.
    division: i32,
    add: i32,
    gelu: i32,
    eps: f32,
    shift: f32,
}

impl ProductArgs {
    pub(crate) fn new(
        a: &Linear<'_>,
        gated: Option<Activation>,
        out: &Tensor,
        division: usize,
    ) -> Self {
        let (norm, eps, shift) = norm_args(a.norm);
        Self {
            x: a.x.address(),
            w: tensor(a.weight).address(),
            norm,
            bias: a.bias.map_or(0, |b| tensor(b).address()),
            out: out.address(),
            rows: a.x.dim(0) as i32,
            n: out.row_len() as i32,
            k: a.x.row_len() as i32,
            division: division as i32,
            add: i32::from(a.store == Store::Add),
            gelu: i32::from(gated == Some(Activation::GeluTanh)),
            eps,
            shift,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_column_is_gated() {
        for inner in (8..=40_000).step_by(8) {
            let (blocks, threads) = gate_blocks(inner);
            assert!(threads <= GATE_THREADS && threads.is_multiple_of(32), "{inner}");
            assert!(blocks * GATE_PIECES * threads * 8 >= inner, "{inner}");
        }
        // Qwen3-0.6B's and 14B's.
        assert_eq!([3072, 17408].map(gate_blocks), [(1, 384), (1, 544)]);
    }
}
