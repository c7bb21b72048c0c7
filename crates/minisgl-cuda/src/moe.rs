//! Mixture of experts: routing, expansion and reduction, all on the device.

use minisgl_tensor::{Backend, DType, Moe, Result, Store, Tensor};

use crate::backend::CudaBackend;
use crate::device::{Launch, args};
use crate::kernels::Module;
use crate::weights::tensor;

impl CudaBackend {
    pub(crate) fn moe_op(&self, a: &Moe<'_>, out: &Tensor) -> Result<()> {
        let (tokens, hidden) = (a.x.dim(0), a.x.row_len());
        let (experts, inner) = (a.router.rows(), a.down.cols());
        let normed = self.scratch("normed", self.dtype(), &[tokens, hidden])?;
        self.rms_norm(a.x, a.norm, &normed)?;
        let ids = self.scratch("expert ids", DType::I32, &[tokens, a.top_k])?;
        let weights = self.scratch("expert weights", DType::F32, &[tokens, a.top_k])?;
        let mid = self.scratch("expert activations", self.dtype(), &[tokens * a.top_k, inner])?;
        let kernel = |name| self.kernels.get(Module::Moe, &[], name);
        let shape = Launch { grid: [tokens, 1, 1], threads: 256, shared: experts * 4, cluster: 1 };
        // SAFETY: each kernel's parameters in order, over tensors of the shapes in `moe.cu`.
        unsafe {
            self.device.launch(
                kernel("route")?,
                shape,
                args![
                    &normed,
                    tensor(a.router),
                    hidden,
                    experts,
                    a.top_k,
                    a.renormalize,
                    &ids,
                    &weights
                ],
            )?;
            let shape = Launch {
                grid: [inner.div_ceil(8), tokens * a.top_k, 1],
                threads: 256,
                shared: 0,
                cluster: 1,
            };
            self.device.launch(
                kernel("expand")?,
                shape,
                args![&normed, tensor(a.gate_up), &ids, hidden, inner, a.top_k, &mid],
            )?;
            let shape = Launch {
                grid: [hidden.div_ceil(8), tokens, 1],
                threads: 256,
                shared: 0,
                cluster: 1,
            };
            self.device.launch(
                kernel("reduce")?,
                shape,
                args![
                    &mid,
                    tensor(a.down),
                    &ids,
                    &weights,
                    hidden,
                    inner,
                    a.top_k,
                    a.store == Store::Add,
                    out
                ],
            )
        }
    }
}
