//! The CPU backend: `CpuBackend` and the collective through shared memory.
//!
//! Reading order: `backend` (the operations' entrances), `matrix` and `attention` (where the time
//! goes), `sample`, then what they stand on: `pool` (threads), `simd` (one vector vocabulary for
//! all instruction sets), `memory` (the only place that turns addresses into slices), `quant`
//! (GGML's block types in plain code).

mod attention;
mod backend;
mod collective;
mod matrix;
mod memory;
mod ops;
mod pool;
mod quant;
mod sample;
mod simd;

pub use backend::{CpuBackend, CpuOptions};
pub use collective::shared_memory_group;
pub use pool::physical_cores;
pub use simd::{ISA_VARIABLE, IsaChoice};
