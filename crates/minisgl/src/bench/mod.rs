//! Benchmarks: the reference's workload, through the scheduler or as single steps; a load on a
//! server.

pub mod load;
mod offline;
mod python_random;
mod steps;
mod workload;

pub use offline::{OfflineResult, run_offline};
pub use python_random::PythonRandom;
pub use steps::StepBench;
pub use workload::{Workload, WorkloadSpec};
