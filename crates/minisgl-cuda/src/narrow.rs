//! Matrix products of some dozens of rows on Hopper: `kernels/narrow.cu`.

use minisgl_tensor::{Activation, DType, Linear, Result, Store, Tensor};

use crate::backend::CudaBackend;
use crate::device::{Launch, address_of};
use crate::kernels::Module;
use crate::tiles::Matrix;
use crate::weights::tensor;

/// Up to this many rows, and this many elements of a matrix, `narrow.cu` is faster than cuBLASLt on
/// an H200: larger products fill the card with large tiles.
const ROWS_MAX: usize = 128;
const ELEMENTS_MAX: usize = 0;
/// As `STAGE` in the kernel.
const STAGE: usize = 128;
/// So little shared memory that the next product's blocks find room beside this one's.
const RING_BYTES: usize = 100 << 10;

/// As `Args` in the kernel.
#[repr(C)]
struct Args {
    bias: u64,
    out: u64,
    rows: i32,
    n: i32,
    k: i32,
    stages: i32,
    add: i32,
    gelu: i32,
}

impl CudaBackend {
    pub(crate) fn prefers_narrow(&self, a: &Linear<'_>) -> bool {
        let weight = tensor(a.weight);
        self.has_warpgroups()
            && a.x.dim(0) <= ROWS_MAX
            && weight.elements() <= ELEMENTS_MAX
            && weight.row_len().is_multiple_of(8)
    }

    /// As `Backend::linear` and `gated_linear` of an `x` that is normed already.
    pub(crate) fn narrow(
        &self,
        a: &Linear<'_>,
        x: &Tensor,
        gated: Option<Activation>,
        out: &Tensor,
    ) -> Result<()> {
        let (rows, k, n) = (x.dim(0), x.row_len(), out.row_len());
        let tile_rows = rows.next_power_of_two().max(32);
        let columns = if gated.is_some() { 32 } else { 64 };
        let (tiles, steps) = (n.div_ceil(columns), k.div_ceil(STAGE));
        // Blocks for every multiprocessor, none without work.
        let cluster = [8, 4, 2]
            .into_iter()
            .find(|c| tiles * c <= self.device.multiprocessors && *c <= steps)
            .unwrap_or(1);
        let stage_bytes = 2 * (64 + tile_rows) * 128;
        let stages = (RING_BYTES / stage_bytes).min(steps.div_ceil(cluster));
        let sums_bytes = 2 * tile_rows * 68 * 4;
        let weight = tensor(a.weight);
        let w = Matrix {
            address: weight.address(),
            rows: weight.elements() / k,
            cols: k,
            box_rows: columns,
        }
        .map()?;
        let x = Matrix { address: x.address(), rows, cols: k, box_rows: tile_rows }.map()?;
        let args = Args {
            bias: a.bias.map_or(0, |b| tensor(b).address()),
            out: out.address(),
            rows: rows as i32,
            n: n as i32,
            k: k as i32,
            stages: stages as i32,
            add: i32::from(a.store == Store::Add),
            gelu: i32::from(gated == Some(Activation::GeluTanh)),
        };
        let defines = variant(tile_rows, gated.is_some(), out.dtype() == DType::F32);
        let function = self.kernels.get(Module::Narrow, &defines, "narrow")?;
        let shape = Launch {
            grid: [tiles * cluster, 1, 1],
            threads: 288,
            shared: (stages * stage_bytes).max(sums_bytes) + 1024,
            cluster,
        };
        let mut words = [address_of(&w), address_of(&x), address_of(&args)];
        // SAFETY: the kernel's parameters in order; the maps cover `w` and `x`, `out` has a row of n
        // for each row of x.
        unsafe { self.device.launch_raw(function, shape, &mut words) }
    }
}

fn variant(rows: usize, gated: bool, out_f32: bool) -> Vec<(&'static str, i32)> {
    vec![("ROWS", rows as i32), ("GATED", i32::from(gated)), ("OUT_F32", i32::from(out_f32))]
}

/// Every variant that a decoder can ask for.
pub(crate) fn narrow_variants() -> Vec<(Module, Vec<(&'static str, i32)>)> {
    let kinds = [(false, false), (true, false), (false, true)];
    [32, 64, ROWS_MAX]
        .into_iter()
        .flat_map(|rows| kinds.map(|(gated, f32)| (Module::Narrow, variant(rows, gated, f32))))
        .collect()
}
