//! The CPU backend: `CpuBackend` and the collective through shared memory.
//!
//! Reading order: `backend` (the operations' entrances), `tiles` and `matrix` (how weights lie and
//! how the work is handed out), `kernels` (the products), `activations` (norm, 8-bit rounding),
//! `attention`, `rope`, `moe`, `sample`; then what they stand on: `pool` (threads), `cores` (where those run), `simd` (one
//! vector vocabulary for all instruction sets), `memory` (the only place that turns addresses into
//! slices), `quant` (GGML's block types in plain code). `limits` measures the machine. docs/cpu-kernels.md says why.

mod activations;
mod attention;
mod backend;
mod collective;
mod cores;
mod kernels;
pub mod limits;
mod matrix;
mod memory;
mod moe;
mod pool;
pub mod quant;
mod rope;
mod sample;
mod simd;
mod tiles;

pub use backend::{CpuBackend, CpuOptions};
pub use collective::shared_memory_group;
pub use cores::{cores_of, physical_cores};
pub use simd::{ISA_VARIABLE, IsaChoice};
