//! Benchmarks: the reference's workload, and single steps by themselves.

mod python_random;
mod steps;
mod workload;

pub use python_random::PythonRandom;
pub use steps::StepBench;
pub use workload::{Workload, WorkloadSpec};
