//! A backend for each rank, and the engine over them.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use minisgl_cpu::{CpuBackend, CpuOptions, cores_of, physical_cores, shared_memory_group};
use minisgl_cuda::{
    AttentionKernels, CudaBackend, CudaOptions, GroupOptions, ModelShape, Transport,
};
use minisgl_engine::{Checkpoint, EngineOptions, KvSize, LocalEngine, ModelConfig};
use minisgl_tensor::{Alone, Backend, Collective, Heads, Precision};

use crate::options::{self, Device, Dtype, RuntimeOptions};

/// Seconds that a rank waits for the others, where nothing is said.
const RANK_TIMEOUT_S: u64 = 60;

/// An engine, and the name of what it runs on.
pub struct LoadedEngine {
    /// Ready for its first step.
    pub engine: LocalEngine,
    /// As the backend calls itself.
    pub device: String,
}

impl LoadedEngine {
    /// Opens the devices and loads the model.
    ///
    /// # Errors
    /// If a device is not there or too small, or the checkpoint is not what it says.
    pub fn load(checkpoint: Checkpoint, options: &RuntimeOptions) -> Result<Self> {
        ensure!(
            options.dummy_weight || !checkpoint.is_empty(),
            "{} holds no weights; --dummy-weight runs without them",
            checkpoint.path().display()
        );
        if checkpoint.left_out() > 0 {
            tracing::warn!(
                "{} tensors of parts other than the text model are left out",
                checkpoint.left_out()
            );
        }
        let device = resolve(options.device);
        let ranks = open_ranks(device, options, checkpoint.config())?;
        let engine_options = engine_options(device, options);
        let device = ranks[0].0.name();
        let engine = LocalEngine::new(Arc::new(checkpoint), &engine_options, ranks)?;
        Ok(Self { engine, device })
    }
}

type RankDevices = (Arc<dyn Backend>, Arc<dyn Collective>);

fn resolve(device: Device) -> Device {
    match device {
        Device::Auto if minisgl_cuda::devices().is_empty() => Device::Cpu,
        Device::Auto => Device::Cuda(0),
        device => device,
    }
}

fn open_ranks(
    device: Device,
    options: &RuntimeOptions,
    config: &ModelConfig,
) -> Result<Vec<RankDevices>> {
    let ranks = options.tp.unwrap_or(1);
    ensure!(ranks > 0, "--tp 0: a model runs on at least one rank");
    let precision = precision(options.dtype);
    let timeout = Duration::from_secs(options.rank_timeout.unwrap_or(RANK_TIMEOUT_S));
    match device {
        Device::Cuda(first) => {
            let transport = match options.collective {
                options::Transport::Auto => Transport::Auto,
                options::Transport::Nccl => Transport::Nccl,
                options::Transport::Peers => Transport::Peers,
            };
            let heads = Heads { q: config.q_heads, kv: config.kv_heads, dim: config.head_dim };
            let page_size = options.page_size.unwrap_or(EngineOptions::default().page_size);
            let open = |device| {
                let model = Some(ModelShape {
                    kernels: options.attn,
                    heads,
                    hidden: config.hidden_size,
                    inner: config.intermediate_size,
                    ranks,
                    page_size,
                    soft_cap: config.attention_soft_cap.is_some(),
                });
                let options = CudaOptions { model, ..CudaOptions::new(device, precision) };
                Ok(Arc::new(CudaBackend::new(options)?))
            };
            open_cards(first, ranks, open, GroupOptions { timeout, transport })
        }
        Device::Cpu | Device::Auto => {
            ensure!(
                options.attn == AttentionKernels::default(),
                "--attn {} names kernels of NVIDIA GPUs, and this runs on the CPU",
                options.attn
            );
            let share = || (physical_cores() / ranks).max(1);
            let threads = options.threads.unwrap_or_else(share);
            let backend = |rank| {
                // One rank has the machine to itself, and the system places its threads well.
                let cores = if ranks > 1 { cores_of(rank, ranks) } else { Vec::new() };
                let cores = if threads <= cores.len() { cores } else { Vec::new() };
                let threads = Some(threads);
                CpuBackend::new(CpuOptions { threads, cores, precision, ..CpuOptions::default() })
            };
            let backends = (0..ranks).map(backend).collect::<Result<Vec<_>, _>>()?;
            let ends: Vec<Arc<dyn Collective>> = match ranks {
                1 => vec![Arc::new(Alone)],
                _ => shared_memory_group(ranks, timeout),
            };
            let devices = backends.into_iter().zip(ends);
            Ok(devices.map(|(b, end)| (Arc::new(b) as Arc<dyn Backend>, end)).collect())
        }
    }
}

/// The cards `first..first + ranks`, each a rank.
fn open_cards(
    first: usize,
    ranks: usize,
    open: impl Fn(usize) -> Result<Arc<CudaBackend>>,
    group: GroupOptions,
) -> Result<Vec<RankDevices>> {
    let cards = minisgl_cuda::devices().len();
    let most = cards.saturating_sub(first);
    // A first card that is not there has a message of its own.
    ensure!(
        ranks <= most || most == 0,
        "--tp {ranks} from cuda:{first} on needs {} GPUs, this machine has {cards}; 1 to {most} \
         would do",
        first + ranks
    );
    let backends = (first..first + ranks).map(open).collect::<Result<Vec<_>>>()?;
    let ends: Vec<Arc<dyn Collective>> = match ranks {
        1 => vec![Arc::new(Alone)],
        _ => minisgl_cuda::group(&backends, group)?,
    };
    Ok(backends.into_iter().zip(ends).map(|(b, end)| (b as Arc<dyn Backend>, end)).collect())
}

fn engine_options(device: Device, options: &RuntimeOptions) -> EngineOptions {
    let defaults = EngineOptions::default();
    let is_cpu = device == Device::Cpu;
    // Running requests wait for a chunk of somebody's prompt, so it is as large as the device is fast.
    let (requests, step_tokens) = if is_cpu { (64, 512) } else { (256, 8192) };
    let kv_size = match (options.num_pages, options.memory_ratio) {
        (Some(pages), _) => KvSize::Pages(pages),
        (None, Some(share)) => KvSize::FreeShare(share),
        // A card is there to serve; a computer does other things, too.
        (None, None) if is_cpu => KvSize::Modest,
        (None, None) => KvSize::FreeShare(0.9),
    };
    EngineOptions {
        precision: precision(options.dtype),
        page_size: options.page_size.unwrap_or(defaults.page_size),
        kv_size,
        running_requests_max: options.max_running_requests.unwrap_or(requests),
        seq_len_max: options.max_seq_len_override,
        step_tokens_max: options.max_prefill_length.unwrap_or(step_tokens),
        graph_batch_max: options.cuda_graph_max_bs.unwrap_or(defaults.graph_batch_max),
        dummy_weights: options.dummy_weight,
        note_device_times: options.trace.is_some(),
    }
}

fn precision(dtype: Dtype) -> Precision {
    match dtype {
        Dtype::Float32 => Precision::Exact,
        Dtype::Auto | Dtype::Float16 | Dtype::Bfloat16 => Precision::Native,
    }
}
