//! What a user can say about a model and how it is run. The names are the reference's wherever it
//! has one.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, ValueEnum};
use minisgl_cuda::AttentionKernels;

use crate::source::{ModelLocator, ModelSource};

/// A model, a device, and the engine's sizes. `None` leaves the choice to the program.
#[derive(Args, Clone, Debug, Default)]
#[command(allow_negative_numbers = true)]
pub struct RuntimeOptions {
    /// A .gguf file, a folder in Hugging Face layout, or a hub id such as Qwen/Qwen3-0.6B or
    /// org/name/file.gguf [default: SmolLM2-135M-Instruct, fetched once]
    #[arg(long, visible_alias = "model-path", value_name = "MODEL", help_heading = "Model")]
    pub model: Option<String>,

    /// The hub that ids belong to
    #[arg(long, value_enum, default_value_t, help_heading = "Model")]
    pub model_source: ModelSource,

    /// Branch, tag or commit on the hub
    #[arg(long, help_heading = "Model")]
    pub revision: Option<String>,

    /// Random weights: only the configuration is read
    #[arg(long, help_heading = "Model")]
    pub dummy_weight: bool,

    /// How weights and activations are computed: auto is what is fastest near the file's own
    /// precision, float32 dequantizes and computes everything in float32, which is exact and slow
    #[arg(long, value_enum, default_value_t, help_heading = "Model")]
    pub dtype: Dtype,

    /// Longest sequence, prompt and answer together [default: the model's own]
    #[arg(long, value_name = "TOKENS", help_heading = "Model")]
    pub max_seq_len_override: Option<usize>,

    /// cpu, cuda, cuda:N, or auto: the first NVIDIA GPU if there is one
    #[arg(long, default_value_t, help_heading = "Device")]
    pub device: Device,

    /// Ranks that the model is split over [default: 1]
    #[arg(
        long,
        visible_alias = "tp-size",
        visible_alias = "tensor-parallel-size",
        value_name = "RANKS",
        help_heading = "Device"
    )]
    pub tp: Option<usize>,

    /// What moves data between GPUs: peer memory for small messages and NCCL for the rest, or one
    /// of them alone
    #[arg(long, value_enum, default_value_t, help_heading = "Device")]
    pub collective: Transport,

    /// Seconds that a rank waits for the others before all of them end [default: 60]
    #[arg(
        long,
        value_name = "SECONDS",
        value_parser = clap::value_parser!(u64).range(1..=86_400),
        help_heading = "Device"
    )]
    pub rank_timeout: Option<u64>,

    /// CPU threads a rank [default: all physical cores, divided by the ranks]
    #[arg(long, help_heading = "Device")]
    pub threads: Option<usize>,

    /// Largest decode batch that runs as a CUDA graph; 0 turns graphs off
    #[arg(long, visible_alias = "graph", value_name = "REQUESTS", help_heading = "Device")]
    pub cuda_graph_max_bs: Option<usize>,

    /// Attention kernels of an NVIDIA GPU: auto, mma or wgmma for prompts, then auto, split, stream
    /// or cascade for single tokens, where cascade reads a prefix that requests share once for several
    /// of them; auto is the fastest that can run, and cascade in steps whose prefixes are long enough
    #[arg(
        long,
        visible_alias = "attention-backend",
        default_value_t,
        value_name = "PREFILL,DECODE",
        help_heading = "Device"
    )]
    pub attn: AttentionKernels,

    /// Requests that run at once; the others wait [default: 256 on a GPU, 64 on
    /// the CPU]
    #[arg(long, value_name = "REQUESTS", help_heading = "Scheduling")]
    pub max_running_requests: Option<usize>,

    /// Tokens that one step computes: longer prompts are prefilled in chunks [default: 8192 on
    /// a GPU, 512 on the CPU]
    #[arg(
        long,
        visible_alias = "max-extend-length",
        value_name = "TOKENS",
        help_heading = "Scheduling"
    )]
    pub max_prefill_length: Option<usize>,

    /// Most tokens of a step once a quarter as many requests generate: prompts then ride along, by a page a step at
    /// least, which steadies the time between tokens, and spares a large model readings of its weights
    /// [default: --max-prefill-length]
    #[arg(long, value_name = "TOKENS", help_heading = "Scheduling")]
    pub max_mixed_tokens: Option<usize>,

    /// Which waiting request runs next: fcfs as they came, or lof, the one that may generate the most
    /// tokens, which ends a batch of requests of many lengths sooner; on a server, short ones may
    /// wait for as long as longer ones come
    #[arg(long, value_enum, default_value_t, help_heading = "Scheduling")]
    pub schedule_policy: SchedulePolicy,

    /// Plan a step only when the last one has ended, to see what overlapping them gains
    #[arg(long, help_heading = "Scheduling")]
    pub disable_overlap: bool,

    /// Write a timeline of the steps on the host and on the GPU, for ui.perfetto.dev or
    /// chrome://tracing
    #[arg(long, value_name = "FILE", help_heading = "Scheduling")]
    pub trace: Option<PathBuf>,

    /// How prefixes are kept for later requests
    #[arg(long, value_enum, default_value_t, help_heading = "KV cache")]
    pub cache_type: CacheType,

    /// Tokens in a page of the KV cache, 1 to 256 [default: 16]
    #[arg(long, value_name = "TOKENS", help_heading = "KV cache")]
    pub page_size: Option<usize>,

    /// Pages in the KV cache, in place of --memory-ratio
    #[arg(long, value_name = "PAGES", help_heading = "KV cache")]
    pub num_pages: Option<usize>,

    /// Share of the memory that is free beside the weights for the KV cache [default: 0.9 on a
    /// GPU; on the CPU four of the longest sequences, in at most an eighth]
    #[arg(long, value_name = "SHARE", help_heading = "KV cache")]
    pub memory_ratio: Option<f64>,
}

impl RuntimeOptions {
    /// The model as it is named here.
    pub fn locator(&self) -> ModelLocator {
        ModelLocator {
            model: self.model.clone(),
            revision: self.revision.clone(),
            source: self.model_source,
            without_weights: self.dummy_weight,
        }
    }
}

/// How weights and activations are computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    /// What is fastest near the file's own precision.
    #[default]
    Auto,
    /// Taken as `auto`: this engine keeps 16-bit activations in bfloat16.
    Float16,
    /// Taken as `auto`.
    Bfloat16,
    /// Weights dequantized to f32, everything computed in f32.
    Float32,
}

/// What moves data between GPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Transport {
    /// Peer memory for small messages where the GPUs reach each other's, NCCL for the rest.
    #[default]
    Auto,
    /// NCCL alone.
    Nccl,
    /// Peer memory alone.
    Peers,
}

/// Which waiting request runs next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum SchedulePolicy {
    /// As they came.
    #[default]
    Fcfs,
    /// Longest output first.
    Lof,
}

impl From<SchedulePolicy> for minisgl_scheduler::SchedulePolicy {
    fn from(policy: SchedulePolicy) -> Self {
        match policy {
            SchedulePolicy::Fcfs => Self::Fcfs,
            SchedulePolicy::Lof => Self::Lof,
        }
    }
}

/// How prefixes are kept for later requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum CacheType {
    /// In a radix tree; the least recently used go when pages are needed.
    #[default]
    Radix,
    /// Not at all.
    Naive,
}

impl From<CacheType> for minisgl_scheduler::cache::CacheType {
    fn from(cache: CacheType) -> Self {
        match cache {
            CacheType::Radix => Self::Radix,
            CacheType::Naive => Self::Naive,
        }
    }
}

/// Where the model runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// The first NVIDIA GPU if there is one, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// An NVIDIA GPU; further ranks take the ones behind it.
    Cuda(usize),
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Device::Auto),
            "cpu" => Ok(Device::Cpu),
            "cuda" => Ok(Device::Cuda(0)),
            _ => text
                .strip_prefix("cuda:")
                .and_then(|index| index.parse().ok())
                .map(Device::Cuda)
                .ok_or_else(|| "expected cpu, cuda, cuda:N or auto".to_string()),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Auto => f.write_str("auto"),
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}
