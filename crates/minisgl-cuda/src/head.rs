//! Logits of dozens of rows on Hopper, and what sampling would read all of them for: `kernels/head.cu`. Of more rows,
//! cuBLASLt is faster by more than that (h200-operations.md).

use std::ops::RangeInclusive;

use minisgl_tensor::{DType, Linear, Result, Store, Tensor};

use crate::backend::{CudaBackend, Products};
use crate::device::{Launch, address_of};
use crate::kernels::{Key, Module};
use crate::linear::GEMV_ROWS_MAX;
use crate::tiles::Matrix;
use crate::weights::tensor;

/// Rows of x that the kernel is compiled for.
const ROWS: [usize; 2] = [64, 128];
const X_ROWS: RangeInclusive<usize> = GEMV_ROWS_MAX + 1..=ROWS[1];
/// As in the kernel: rows of w in a tile, elements of k in a step, the most stages, threads in all, and warps that store.
pub(crate) const TILE: usize = 128;
const STEP: usize = 64;
const STAGES_MAX: usize = 16;
const THREADS: usize = 384;
const STORING_WARPS: usize = 8;
/// Of a warp: 16 rows of 32 logits on their way out.
const OUT_BYTES: usize = 16 * (32 * 4 + 16);
/// Of a block's shared memory, without the kernel's barriers.
const SHARED_BYTES: usize = 226 << 10;

/// As `Args` in the kernel.
#[repr(C)]
struct Args {
    temperature: u64,
    logits: u64,
    survey: u64,
    rows: i32,
    n: i32,
    k: i32,
    stages: i32,
}

impl CudaBackend {
    /// As `Backend::logits`.
    pub(crate) fn logits_op(
        &self,
        a: &Linear<'_>,
        temperature: &Tensor,
        out: &Tensor,
    ) -> Result<Option<Tensor>> {
        if !self.takes_head(a, out) {
            return self.linear_op(a, out).map(|()| None);
        }
        let (rows, k, n) = (a.x.dim(0), a.x.row_len(), out.row_len());
        let compiled = rows_compiled(rows);
        let x = self.normed(a)?;
        let survey = self.scratch("survey", DType::F32, &[rows, n.div_ceil(TILE), 4])?;
        let address = tensor(a.weight).address();
        let w = Matrix { address, rows: n, cols: k, box_rows: TILE }.map()?;
        let x = Matrix { address: x.address(), rows, cols: k, box_rows: rows }.map()?;
        let stage_bytes = (TILE + compiled) * STEP * 2;
        let out_bytes = STORING_WARPS * OUT_BYTES;
        let stages = ((SHARED_BYTES - 1024 - out_bytes) / stage_bytes).min(STAGES_MAX);
        let args = Args {
            temperature: temperature.address(),
            logits: out.address(),
            survey: survey.address(),
            rows: rows as i32,
            n: n as i32,
            k: k as i32,
            stages: stages as i32,
        };
        let function = self.kernels.get(Module::Head, &variant(compiled), "head")?;
        let shape = Launch {
            grid: [n.div_ceil(TILE).min(self.device.multiprocessors), 1, 1],
            threads: THREADS,
            shared: 1024 + stages * stage_bytes + out_bytes,
            cluster: 1,
        };
        let mut words = [address_of(&w), address_of(&x), address_of(&args)];
        // SAFETY: the kernel's parameters in order; the maps cover `w` and `x`, `out` has a row of n for each
        // row of x, `temperature` an entry, and the survey one for each tile of a row.
        unsafe { self.device.launch_raw(function, shape, &mut words) }?;
        Ok(Some(survey))
    }

    /// Whether `head.cu` takes these logits.
    fn takes_head(&self, a: &Linear<'_>, out: &Tensor) -> bool {
        self.card().has_warpgroups()
            && self.products() == Products::Own
            && X_ROWS.contains(&a.x.dim(0))
            && a.x.row_len().is_multiple_of(8)
            && out.row_len().is_multiple_of(8)
            && a.bias.is_none()
            && a.store == Store::Set
    }
}

fn rows_compiled(rows: usize) -> usize {
    ROWS.into_iter().find(|most| rows <= *most).unwrap_or(ROWS[1])
}

fn variant(rows: usize) -> Vec<(&'static str, i32)> {
    vec![("ROWS", rows as i32)]
}

/// Every variant.
pub(crate) fn head_variants() -> impl Iterator<Item = Key> {
    ROWS.into_iter().map(|rows| (Module::Head, variant(rows)))
}
