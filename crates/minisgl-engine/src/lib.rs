//! One tensor-parallel rank of a model, and the engine that drives all of them.
//!
//! Reading order, along a model's life and then a step's:
//!
//! 1. `checkpoint`: an open file or folder: configuration, tensors by name, end-of-sequence ids.
//!    `gguf` and `safetensors` parse hostile files without trusting a number in them.
//! 2. `config`: `ModelConfig` from `config.json` or GGUF metadata; `rope`: rotary tables.
//! 3. `shares`: which part a rank holds. `weights`: reads those slices; `layers` and `models` are built from it.
//!    `footprint`: whether they fit on the device.
//! 4. `kv`: the paged pool. `workspace`: activations, sized once for the largest step.
//! 5. `inputs`: a plan as one packed upload. `rank`: upload, forward, sample, download.
//! 6. `graphs`: the same forward, recorded for decode batches of fixed sizes.
//! 7. `local`: one thread a rank, and `minisgl_scheduler::engine::Engine` over them.
//!
//! Nothing here knows how a device does an operation, and nothing knows text or HTTP.
#![deny(unsafe_code)]

mod checkpoint;
mod config;
mod footprint;
mod graphs;
mod inputs;
mod kv;
mod layers;
mod local;
mod models;
mod options;
mod rank;
mod rope;
mod sampler;
mod shares;
mod weights;
mod workspace;

pub use checkpoint::gguf::{GgufMetadata, GgufValue};
pub use checkpoint::{Checkpoint, TensorInfo};
pub use config::{ModelConfig, MoeConfig};
pub use local::{InFlight, LocalEngine};
pub use models::{Architecture, architectures};
pub use options::{EngineOptions, KvSize};
pub use rope::{RopeConfig, RopeScaling};
