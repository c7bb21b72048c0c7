//! `Tensor`, and the traits that a device implements: `Backend` and `Collective`.
//!
//! This crate knows no device. A tensor is an address, a type and a shape; what the address means
//! is the backend's business. Reading order: `dtype`, `tensor`, `weight`, `backend`, `collective`.
#![forbid(unsafe_code)]

mod backend;
mod collective;
mod dtype;
mod tensor;
mod weight;

pub use backend::*;
pub use collective::*;
pub use dtype::*;
pub use tensor::*;
pub use weight::*;
