//! The CUDA backend of minisgl: `minisgl_tensor::Backend` on one NVIDIA GPU.
//!
//! The driver, NVRTC and cuBLASLt are opened at run time, so this crate builds and its host-side
//! tests run on machines without any of them. Kernels are `kernels/*.cu`, embedded in the binary,
//! compiled for the card's own architecture at first use and kept as cubins on disk.
//!
//! Reading order: `device` (context, stream, memory, launches), `staging` (copies), `kernels`
//! (compiling and caching), `gemm` and `tuning` (cuBLASLt), `weights`, and `backend` with its
//! operations in `linear`, `wide`, `narrow`, `strip`, `rope`, `attention`, `decode`, `half_layer`,
//! `moe` and `sampling`;
//! `choice` is which attention kernels run, `clock` tells when. Several cards: `collective`, over
//! `mailbox` (peer memory) and `nccl`; `group` is what ends them together. `fault` breaks things on
//! purpose, `nvtx` names them for profilers.

mod attention;
mod backend;
mod choice;
mod clock;
mod collective;
mod decode;
mod device;
mod fault;
mod gemm;
mod group;
mod half_layer;
mod head;
mod kernels;
mod linear;
mod mailbox;
mod moe;
mod narrow;
mod nccl;
mod nvtx;
mod rope;
mod sampling;
mod staging;
mod strip;
mod tiles;
mod tuning;
mod weights;
mod wide;

pub use backend::{CudaBackend, CudaOptions, Products};
pub use choice::{AttentionKernels, DecodeKernel, ModelShape, PrefillKernel};
pub use collective::{GroupOptions, Transport, group};
pub use device::devices;
pub use kernels::{Module, compile};
pub use nvtx::Nvtx;
