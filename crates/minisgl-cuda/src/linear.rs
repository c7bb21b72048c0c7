//! Matrix products: our own kernel for few rows, cuBLASLt for many.

use minisgl_tensor::{Activation, DType, Linear, Result, Store, Tensor};

use crate::backend::{CudaBackend, norm_args};
use crate::device::{Launch, args};
use crate::gemm::Product;
use crate::kernels::Module;
use crate::weights::tensor;

/// Up to this many rows of a matrix of up to this many elements, `gemv.cu` is faster than cuBLASLt
/// (measured on an H200): what counts there is launches and fusing, not the reading of weights.
const GEMV_ROWS_MAX: usize = 16;
const GEMV_ELEMENTS_MAX: usize = 16 << 20;

impl CudaBackend {
    pub(crate) fn linear_op(&self, a: &Linear<'_>, out: &Tensor) -> Result<()> {
        let (rows, k) = (a.x.dim(0), a.x.row_len());
        if self.prefers_gemv(a) {
            return self.gemv(a, None, out);
        }
        let weight = tensor(a.weight);
        let x = match a.norm {
            Some(norm) => {
                let normed = self.scratch("normed", self.dtype(), &[rows, k])?;
                minisgl_tensor::Backend::rms_norm(self, a.x, norm, &normed)?;
                normed
            }
            None => a.x.clone(),
        };
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
            w: weight,
            out: out.address(),
            rows,
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
        let both = self.scratch("gate_up", self.dtype(), &[rows, 2 * inner])?;
        self.linear_op(&Linear { store: Store::Set, ..*a }, &both)?;
        let count = rows * inner;
        let gelu = activation == Activation::GeluTanh;
        self.simple(
            "gate",
            Launch::new(count.div_ceil(2048), 256),
            args![&both, inner, gelu, count, out],
        )
    }

    fn prefers_gemv(&self, a: &Linear<'_>) -> bool {
        let weight = tensor(a.weight);
        !self.exact
            && a.x.dim(0) <= GEMV_ROWS_MAX
            && weight.elements() <= GEMV_ELEMENTS_MAX
            && weight.row_len().is_multiple_of(8)
    }

    fn gemv(&self, a: &Linear<'_>, gated: Option<Activation>, out: &Tensor) -> Result<()> {
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
pub(crate) fn gemv_variants() -> Vec<(Module, Vec<(&'static str, i32)>)> {
    let mut all = Vec::new();
    for two_halves in [false, true] {
        for (gated, norm, out_f32) in [
            (false, false, false),
            (false, true, false),
            (true, true, false),
            (false, false, true),
            (false, true, true),
        ] {
            all.push((Module::Gemv, variant(two_halves, gated, norm, out_f32)));
        }
    }
    all
}
