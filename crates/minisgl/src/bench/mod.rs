//! Benchmarks: the reference's workload, offline runs of it, and single steps by themselves.

mod offline;
mod python_random;
mod steps;
mod workload;

pub use offline::OfflineRun;
pub use offline::{OfflineResult, run_offline};
pub use python_random::PythonRandom;
pub use steps::StepBench;
pub use workload::{Workload, WorkloadSpec};
