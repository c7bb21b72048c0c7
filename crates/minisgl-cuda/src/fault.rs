//! Faults on purpose, to see an engine end in order: `MINISGL_CUDA_FAULT=KIND:STEP`, for tests only.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use minisgl_tensor::Result;

use crate::backend::CudaBackend;
use crate::device::Launch;

/// What goes wrong, and in which step.
pub(crate) struct Fault {
    kind: Kind,
    at: u64,
    steps: AtomicU64,
}

#[derive(Clone, Copy)]
enum Kind {
    /// A kernel that traps: the context is lost, and every later call fails.
    Trap,
    /// A launch that the driver refuses.
    Launch,
    /// More memory than any card has.
    Memory,
}

impl Fault {
    pub(crate) fn from_environment() -> Option<Self> {
        let text = std::env::var("MINISGL_CUDA_FAULT").ok()?;
        let (kind, at) = text.split_once(':')?;
        let kind = match kind {
            "trap" => Kind::Trap,
            "launch" => Kind::Launch,
            "memory" => Kind::Memory,
            _ => return None,
        };
        Some(Self { kind, at: at.parse().ok()?, steps: AtomicU64::new(0) })
    }

    /// Counts a step, and spoils it if it is the one.
    pub(crate) fn step(&self, backend: &CudaBackend) -> Result<()> {
        if self.steps.fetch_add(1, Ordering::Relaxed) + 1 != self.at {
            return Ok(());
        }
        match self.kind {
            Kind::Trap => backend.simple("trap", Launch::new(1, 1), &[]),
            Kind::Launch => backend.simple("trap", Launch::new(1, 4096), &[]),
            Kind::Memory => Arc::clone(&backend.device).alloc(1 << 50).map(drop),
        }
    }
}
