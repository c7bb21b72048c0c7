//! Norm and rotation of Q and K, and the write of K and V into their pages.

use minisgl_tensor::{Result, RopeStore, Tensor};

use crate::backend::{CudaBackend, norm_args};
use crate::choice::check_heads;
use crate::device::Launch;
use crate::kernels::Module;

impl CudaBackend {
    /// The tokens from `first` on, and of each the heads from `first_head` on: from `heads.q` on K and V.
    pub(crate) fn rope_store_op(
        &self,
        a: &RopeStore<'_>,
        first: usize,
        first_head: usize,
        qkv: &Tensor,
    ) -> Result<()> {
        let (batch, heads) = (a.batch, a.heads);
        check_heads(heads)?;
        let tokens = batch.tokens - first;
        if tokens == 0 {
            return Ok(());
        }
        let rest = |all: &Tensor| all.rows(first..batch.tokens).address();
        let (q_weight, q_eps, q_shift) = norm_args(a.q_norm);
        let (k_weight, k_eps, k_shift) = norm_args(a.k_norm);
        let args = Args {
            qkv: rest(qkv),
            k_pages: a.kv.k.address(),
            v_pages: a.kv.v.address(),
            q_weight,
            k_weight,
            rope: a.rope.address(),
            positions: rest(&batch.positions),
            store_at: rest(&batch.store_at),
            q_heads: heads.q as i32,
            kv_heads: heads.kv as i32,
            first_head: first_head as i32,
            dim: heads.dim as i32,
            page_size: batch.page_size as i32,
            q_eps,
            q_shift,
            k_eps,
            k_shift,
        };
        let function = self.kernels.get(Module::Elementwise, &[], "rope_store")?;
        // Of each half of a head, a lane has 16 bytes, or 4 elements where that does not divide it.
        let wide = if self.exact { 4 } else { 8 };
        let piece = if heads.dim % (2 * wide) == 0 { wide } else { 4 };
        let lanes = (heads.dim / 2 / piece).next_power_of_two();
        let all_threads = (heads.q + 2 * heads.kv - first_head) * lanes;
        let blocks = all_threads.div_ceil(256);
        let threads = all_threads.div_ceil(blocks).next_multiple_of(32);
        let shape = Launch { grid: [tokens, blocks, 1], threads, shared: 0, cluster: 1 };
        // SAFETY: `Args` has the kernel's layout; its addresses are the step's tensors.
        unsafe { self.device.launch_struct(function, shape, &args) }
    }
}

/// As `RopeArgs` in `kernels/elementwise.cu`.
#[repr(C)]
struct Args {
    qkv: u64,
    k_pages: u64,
    v_pages: u64,
    q_weight: u64,
    k_weight: u64,
    rope: u64,
    positions: u64,
    store_at: u64,
    q_heads: i32,
    kv_heads: i32,
    first_head: i32,
    dim: i32,
    page_size: i32,
    q_eps: f32,
    q_shift: f32,
    k_eps: f32,
    k_shift: f32,
}
