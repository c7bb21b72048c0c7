//! Norm and rotation of Q and K, and the write of K and V into their pages.

use minisgl_tensor::{BackendError, Result, RopeStore, Tensor};

use crate::backend::{CudaBackend, norm_args};
use crate::device::{Launch, args};

impl CudaBackend {
    /// The tokens from `first` on.
    pub(crate) fn rope_store_op(
        &self,
        a: &RopeStore<'_>,
        first: usize,
        qkv: &Tensor,
    ) -> Result<()> {
        let (batch, heads) = (a.batch, a.heads);
        if heads.dim > 256 || !heads.dim.is_multiple_of(4) {
            return Err(BackendError::Unsupported(
                format!("head size {} on CUDA", heads.dim).into(),
            ));
        }
        let tokens = batch.tokens - first;
        if tokens == 0 {
            return Ok(());
        }
        let rest = |all: &Tensor| all.rows(first..batch.tokens);
        let (q, q_eps, q_shift) = norm_args(a.q_norm);
        let (k, k_eps, k_shift) = norm_args(a.k_norm);
        self.simple(
            "rope_store",
            Launch::new((tokens * (heads.q + 2 * heads.kv)).div_ceil(4), 128),
            args![
                &rest(qkv),
                tokens,
                heads.q,
                heads.kv,
                heads.dim,
                q,
                q_eps,
                q_shift,
                k,
                k_eps,
                k_shift,
                a.rope,
                &rest(&batch.positions),
                &rest(&batch.store_at),
                batch.page_size,
                &a.kv.k,
                &a.kv.v
            ],
        )
    }
}
