//! `CudaBackend`: the operations of `minisgl_tensor::Backend` on one card.

use std::any::Any;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use cudarc::driver::{result, sys};
use minisgl_tensor::{
    Activation, Adjust, Attention, AttentionLayer, Backend, DType, Download, Embed, Graph, Heads,
    HostTensor, Linear, Logprobs, Mark, MemoryInfo, Mlp, Moe, Norm, Precision, Result, RopeStore,
    Sample, Tensor, Weight,
};

use crate::choice::{AttentionKernels, Card, ModelShape};
use crate::clock::Clock;
use crate::decode::Plans;
use crate::device::{Arg, Device, Function, Launch, args, driver, fail};
use crate::fault::Fault;
use crate::gemm::Gemm;
use crate::half_layer::Pending;
use crate::kernels::{Kernels, Module};
use crate::staging::Staging;
use crate::weights::tensor;

/// How to open a card.
#[derive(Clone, Copy, Debug)]
pub struct CudaOptions {
    /// Which card, as the driver counts.
    pub device: usize,
    /// `Native`: bf16 activations. `Exact`: f32 everywhere, without tf32.
    pub precision: Precision,
    /// The model: its kernels are compiled with the others. Without it the fastest that can
    /// run are compiled when they are first needed.
    pub model: Option<ModelShape>,
    /// Kernels are compiled so that a race checker can follow them: for tests. See `kernels/common.cuh`.
    pub race_checked: bool,
}

impl CudaOptions {
    /// A card at a precision, and nothing else said.
    pub fn new(device: usize, precision: Precision) -> Self {
        Self { device, precision, model: None, race_checked: false }
    }
}

/// What takes matrix products with bf16 weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Products {
    /// cuBLASLt, whatever the number of rows.
    Library,
    /// Those of up to 16 rows `kernels/stream.cu` or `gemv.cu`, of up to 8 with long rows of weights
    /// `wide.cu`, of 17 to 64 `narrow.cu`, `strip.cu` (large matrices) or `strip_short.cu` (short rows of weights), of
    /// 65 to 256 `strip_tall.cu` (small matrices), and logits of 17 to 128 `head.cu`, each where it is faster, and cuBLASLt
    /// the others.
    #[default]
    Own,
}

/// One card, as the engine sees it.
pub struct CudaBackend {
    pub(crate) device: Arc<Device>,
    pub(crate) kernels: Kernels,
    pub(crate) gemm: Gemm,
    pub(crate) staging: Staging,
    pub(crate) exact: bool,
    pub(crate) attention: AttentionKernels,
    pub(crate) fault: Option<Fault>,
    pub(crate) plans: Arc<Plans>,
    clock: Clock,
    scratch: Mutex<HashMap<&'static str, Vec<Tensor>>>,
    products: Mutex<Products>,
    fuses: AtomicBool,
    fused_halves: AtomicUsize,
    clusters_at_once: Mutex<HashMap<Function, usize>>,
    pending: Mutex<Option<Pending>>,
}

impl CudaBackend {
    /// Opens a card and compiles (or finds) the kernels that every model needs.
    ///
    /// # Errors
    /// If the driver, NVRTC or cuBLASLt is missing, the card is, or it is older than 8.0; or if no kernel
    /// takes the model's heads, or attention kernels were asked for by name that cannot run here.
    pub fn new(options: CudaOptions) -> Result<Self> {
        let started = Instant::now();
        let device = Arc::new(Device::open(options.device)?);
        tracing::info!(seconds = started.elapsed().as_secs_f64(), "the card is open");
        let exact = options.precision == Precision::Exact;
        let card = Card { exact, capability: device.capability };
        let model = options.model.as_ref();
        model.map_or(Ok(()), |model| model.check(card))?;
        let kernels = Kernels::new(&device, exact, options.race_checked)?;
        let mut modules = vec![(Module::Elementwise, vec![]), (Module::Sample, vec![])];
        if !exact {
            modules.extend(crate::linear::gemv_variants(device.capability.0 >= 9));
        }
        if card.has_warpgroups() {
            modules.extend(crate::narrow::narrow_variants());
            modules.extend(crate::head::head_variants());
        }
        if let Some(model) = model {
            modules.extend(model.modules(card, device.multiprocessors));
        }
        kernels.prepare(&modules)?;
        tracing::info!(seconds = started.elapsed().as_secs_f64(), "kernels are compiled");
        let gemm = Gemm::new(&device)?;
        tracing::info!(seconds = started.elapsed().as_secs_f64(), "cuBLASLt is open");
        let staging = Staging::new(&device, &kernels)?;
        tracing::info!(seconds = started.elapsed().as_secs_f64(), "staging memory is there");
        Ok(Self {
            gemm,
            staging,
            clock: Clock::new(&device),
            device,
            kernels,
            exact,
            attention: model.map_or_else(Default::default, |model| model.allowed_kernels(card)),
            fault: Fault::from_environment(),
            plans: Arc::default(),
            scratch: Mutex::default(),
            products: Mutex::default(),
            fuses: AtomicBool::new(true),
            fused_halves: AtomicUsize::new(0),
            clusters_at_once: Mutex::default(),
            pending: Mutex::default(),
        })
    }

    pub(crate) fn card(&self) -> Card {
        Card { exact: self.exact, capability: self.device.capability }
    }

    pub(crate) fn dtype(&self) -> DType {
        if self.exact { DType::F32 } else { DType::BF16 }
    }

    pub(crate) fn alloc_tensor(&self, dtype: DType, shape: &[usize]) -> Result<Tensor> {
        let elements = shape.iter().product();
        let bytes = dtype
            .bytes_of(elements)
            .ok_or_else(|| fail(format!("{shape:?} of {dtype} is no whole blocks")))?;
        Ok(Tensor::new(self.device.alloc(bytes)?, dtype, shape))
    }

    /// Memory for what lives inside one operation. It grows, and what captured graphs may point
    /// to is never given back before the backend is.
    pub(crate) fn scratch(
        &self,
        name: &'static str,
        dtype: DType,
        shape: &[usize],
    ) -> Result<Tensor> {
        let mut all = self.scratch.lock().map_err(|_| fail("the scratch table is poisoned"))?;
        let list = all.entry(name).or_default();
        let bytes = dtype
            .bytes_of(shape.iter().product())
            .ok_or_else(|| fail("scratch of no whole blocks"))?;
        match list.last() {
            Some(last) if last.bytes() >= bytes => Ok(last.view_as(dtype, shape)),
            _ => {
                let fresh = self.alloc_tensor(DType::U8, &[bytes.next_power_of_two()])?;
                list.push(fresh.clone());
                Ok(fresh.view_as(dtype, shape))
            }
        }
    }

    /// Launches a kernel of `elementwise.cu`.
    pub(crate) fn simple(&self, name: &'static str, shape: Launch, args: &[Arg]) -> Result<()> {
        let function = self.kernels.get(Module::Elementwise, &[], name)?;
        // SAFETY: callers pass the kernel's own parameters, over tensors of the stated shapes.
        unsafe { self.device.launch(function, shape, args) }
    }

    /// Has these kernels take matrix products from here on: what tests and benchmarks compare.
    pub fn set_products(&self, products: Products) {
        *self.products.lock().unwrap_or_else(PoisonError::into_inner) = products;
    }

    pub(crate) fn products(&self) -> Products {
        *self.products.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether decode steps of up to 8 rows take half a layer in one kernel, where it fits.
    pub fn set_fused_layers(&self, on: bool) {
        self.fuses.store(on, Ordering::Relaxed);
    }

    /// How many halves of layers have been launched as one kernel so far.
    pub fn fused_halves(&self) -> usize {
        self.fused_halves.load(Ordering::Relaxed)
    }

    /// Such a kernel has been launched, and leaves the residual stream like this.
    pub(crate) fn set_pending(&self, pending: Pending) -> Result<()> {
        self.fused_halves.fetch_add(1, Ordering::Relaxed);
        *self.pending()? = Some(pending);
        Ok(())
    }

    pub(crate) fn fuses(&self) -> bool {
        self.fuses.load(Ordering::Relaxed)
    }

    /// Whether all clusters of such a launch run at once.
    pub(crate) fn clusters_fit(&self, function: Function, shape: Launch) -> Result<bool> {
        let mut asked =
            self.clusters_at_once.lock().map_err(|_| fail("the clusters' counts are poisoned"))?;
        let wanted = shape.grid[0] / shape.cluster;
        let most = match asked.get(&function) {
            Some(most) => *most,
            None => {
                let most = self.device.clusters_at_once(function, shape)?;
                tracing::debug!(most, wanted, blocks = shape.cluster, "clusters at once");
                *asked.entry(function).or_insert(most)
            }
        };
        Ok(wanted <= most)
    }

    pub(crate) fn pending(&self) -> Result<MutexGuard<'_, Option<Pending>>> {
        self.pending.lock().map_err(|_| fail("the residual stream's state is poisoned"))
    }

    /// Weights drawn from a normal distribution, made on the card: what benchmarks run on.
    ///
    /// # Errors
    /// If memory or the device fails.
    pub fn random_matrix(&self, shape: &[usize], seed: u32, deviation: f32) -> Result<Weight> {
        let out = self.alloc_tensor(self.dtype(), shape)?;
        self.fill_random(&out, seed, deviation)?;
        Ok(Weight::new(shape, crate::weights::DeviceWeight(out)))
    }

    /// Fills activations or pages with such numbers.
    ///
    /// # Errors
    /// If the device fails.
    pub fn fill_random(&self, out: &Tensor, seed: u32, deviation: f32) -> Result<()> {
        let shape = Launch::new(self.device.multiprocessors * 8, 256);
        self.simple("fill_random", shape, args![out, out.elements(), seed as i32, deviation])
    }
}

pub(crate) fn norm_args(norm: Option<&Norm>) -> (u64, f32, f32) {
    norm.map_or((0, 0.0, 0.0), |n| {
        (tensor(&n.weight).address(), n.eps, f32::from(u8::from(n.plus_one)))
    })
}

impl Backend for CudaBackend {
    fn name(&self) -> String {
        self.device.name.clone()
    }

    fn bind_thread(&self) -> Result<()> {
        self.device.bind()
    }

    fn memory(&self) -> Result<MemoryInfo> {
        self.device.memory()
    }

    fn activation_dtype(&self) -> DType {
        self.dtype()
    }

    fn kv_dtype(&self) -> DType {
        self.dtype()
    }

    fn alloc(&self, dtype: DType, shape: &[usize]) -> Result<Tensor> {
        self.alloc_tensor(dtype, shape)
    }

    fn upload(&self, src: &[u8], dst: &Tensor) -> Result<()> {
        self.plans.end_pass();
        self.staging.upload(src, dst)
    }

    fn download(&self, src: &Tensor) -> Result<Box<dyn Download>> {
        self.settle()?;
        self.staging.download(src)
    }

    fn synchronize(&self) -> Result<()> {
        self.device.synchronize()
    }

    fn capture(&self, enqueue: &mut dyn FnMut() -> Result<()>) -> Result<Option<Box<dyn Graph>>> {
        self.device.bind()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream lives; capture is ended below whatever `enqueue` does.
        unsafe { result::stream::begin_capture(self.device.stream, mode) }
            .map_err(|e| driver("cuStreamBeginCapture", e))?;
        // No kernel of a graph changes what its plans depend on. And it makes those that it needs.
        self.plans.begin_pass();
        let outcome = enqueue().and_then(|()| self.settle());
        self.plans.end_pass();
        // SAFETY: as above.
        let graph = unsafe { result::stream::end_capture(self.device.stream) }
            .map_err(|e| driver("cuStreamEndCapture", e));
        outcome?;
        let graph = graph?;
        // SAFETY: `graph` was just made; the executable graph does not need it.
        let executable = unsafe {
            let made = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            let _ = result::graph::destroy(graph);
            made
        }
        .map_err(|e| driver("cuGraphInstantiate", e))?;
        // SAFETY: graph and stream live. Without this the first launch would do it.
        unsafe { sys::cuGraphUpload(executable, self.device.stream) }
            .result()
            .map_err(|e| driver("cuGraphUpload", e))?;
        let (device, plans) = (Arc::clone(&self.device), Arc::clone(&self.plans));
        Ok(Some(Box::new(CudaGraph { device, plans, executable })))
    }

    fn mark(&self) -> Result<Option<Box<dyn Mark>>> {
        self.clock.mark().map(Some)
    }

    fn matrix_dtype(&self) -> Option<DType> {
        (!self.device.integrated).then(|| self.dtype())
    }

    fn matrix(&self, parts: &[HostTensor<'_>], _precision: Precision) -> Result<Weight> {
        let cols = parts.first().and_then(|p| p.shape.last()).copied().unwrap_or(0);
        let rows =
            parts.iter().map(|p| p.shape[..p.shape.len() - 1].iter().product::<usize>()).sum();
        self.load(parts, self.dtype(), &[rows, cols])
    }

    fn expert_matrices(
        &self,
        experts: &[Vec<HostTensor<'_>>],
        _precision: Precision,
    ) -> Result<Weight> {
        let flat: Vec<HostTensor<'_>> = experts.iter().flatten().cloned().collect();
        let cols = flat.first().and_then(|p| p.shape.last()).copied().unwrap_or(0);
        let all: usize = flat.iter().map(|p| p.shape.iter().product::<usize>()).sum();
        let rows = all / (cols * experts.len()).max(1);
        self.load(&flat, self.dtype(), &[experts.len(), rows, cols])
    }

    fn random(&self, shape: &[usize], seed: u32) -> Result<Option<Weight>> {
        self.random_matrix(shape, seed, 0.02).map(Some)
    }

    fn vector(&self, parts: &[HostTensor<'_>]) -> Result<Weight> {
        let count = parts.iter().map(|p| p.shape.iter().product::<usize>()).sum();
        self.load(parts, DType::F32, &[count])
    }

    fn fold_norm(&self, norm: Norm, matrix: &Weight) -> Result<Norm> {
        // What is exact is done in the order in which others do it.
        if self.exact { Ok(norm) } else { self.fold(norm, matrix) }
    }

    fn embed(&self, a: &Embed<'_>, out: &Tensor) -> Result<()> {
        // What a pass that failed has left of the residual stream is lost with it.
        *self.pending()? = None;
        self.plans.begin_pass();
        let table = tensor(a.table);
        let threads = (out.row_len() / 4).next_multiple_of(32).clamp(32, 512);
        self.simple(
            "embed",
            Launch::new(out.dim(0), threads),
            args![
                a.input_ids,
                a.token_table,
                table,
                a.first_id,
                table.dim(0),
                out.row_len(),
                a.scale,
                out
            ],
        )
    }

    fn rms_norm(&self, x: &Tensor, norm: &Norm, out: &Tensor) -> Result<()> {
        self.settle()?;
        let (weight, eps, shift) = norm_args(Some(norm));
        // A thread has 16 bytes of a row; 64 where there are rows enough to fill the card, so that more of
        // them are on their way at once.
        let fills = !self.exact && x.dim(0) >= 16 * self.device.multiprocessors;
        let pieces = (x.row_len() / 8).div_ceil(if fills { 4 } else { 1 });
        let threads = pieces.next_multiple_of(32).clamp(32, 512);
        self.simple(
            "rms_norm",
            Launch::new(x.dim(0), threads),
            args![x, weight, eps, shift, x.row_len(), out],
        )
    }

    fn attention_layer(&self, args: &AttentionLayer<'_>, hidden: &Tensor) -> Result<()> {
        if self.attend_op(args, hidden)? { Ok(()) } else { args.in_parts(self, hidden) }
    }

    fn mlp(&self, args: &Mlp<'_>, hidden: &Tensor) -> Result<()> {
        if self.fused_mlp_op(args, hidden)? { Ok(()) } else { args.in_parts(self, hidden) }
    }

    fn linear(&self, args: &Linear<'_>, out: &Tensor) -> Result<()> {
        self.settle()?;
        self.linear_op(args, out)
    }

    fn logits(
        &self,
        args: &Linear<'_>,
        temperature: &Tensor,
        out: &Tensor,
    ) -> Result<Option<Tensor>> {
        self.settle()?;
        self.logits_op(args, temperature, out)
    }

    fn gated_linear(&self, args: &Linear<'_>, activation: Activation, out: &Tensor) -> Result<()> {
        self.settle()?;
        self.gated_linear_op(args, activation, out)
    }

    fn add(&self, x: &Tensor, delta: &Tensor) -> Result<()> {
        self.settle()?;
        let count = x.elements();
        self.simple("add", Launch::new(count.div_ceil(256), 256), args![x, delta, count])
    }

    fn rope_store(&self, args: &RopeStore<'_>, qkv: &Tensor) -> Result<()> {
        self.rope_store_op(args, 0, 0, qkv)
    }

    fn attention(&self, args: &Attention<'_>, qkv: &Tensor, out: &Tensor) -> Result<()> {
        self.attention_from(0, args, None, qkv, out)
    }

    fn prefix_rows_max(&self, heads: Heads) -> usize {
        self.lot_size(heads)
    }

    fn prefixes_pay(&self, rows: usize, spared: usize) -> bool {
        self.lots_pay(rows, spared)
    }

    fn rope_attention(
        &self,
        store: &RopeStore<'_>,
        attention: &Attention<'_>,
        qkv: &Tensor,
        out: &Tensor,
    ) -> Result<()> {
        self.rope_attention_op(store, attention, qkv, out)
    }

    fn moe(&self, args: &Moe<'_>, out: &Tensor) -> Result<()> {
        self.settle()?;
        self.moe_op(args, out)
    }

    fn gather(&self, x: &Tensor, indices: &Tensor, out: &Tensor) -> Result<()> {
        self.settle()?;
        self.simple("gather", Launch::new(out.dim(0), 256), args![x, indices, x.row_len(), out])
    }

    fn scatter(&self, indices: &Tensor, values: &Tensor, out: &Tensor) -> Result<()> {
        let count = indices.elements();
        self.simple(
            "scatter",
            Launch::new(count.div_ceil(256), 256),
            args![indices, values, count, out],
        )
    }

    fn soft_cap(&self, logits: &Tensor, cap: f32) -> Result<()> {
        let count = logits.elements();
        self.simple("soft_cap", Launch::new(count.div_ceil(256), 256), args![logits, cap, count])
    }

    fn adjust(&self, args: &Adjust<'_>, logits: &Tensor) -> Result<()> {
        self.adjust_op(args, logits)
    }

    fn sample(&self, args: &Sample<'_>, logits: &Tensor) -> Result<()> {
        self.sample_op(args, logits)
    }

    fn logprobs(&self, args: &Logprobs<'_>, logits: &Tensor) -> Result<()> {
        self.logprobs_op(args, logits)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

struct CudaGraph {
    device: Arc<Device>,
    plans: Arc<Plans>,
    executable: sys::CUgraphExec,
}

// SAFETY: a driver handle, used by one thread at a time.
unsafe impl Send for CudaGraph {}

impl Graph for CudaGraph {
    fn launch(&self) -> Result<()> {
        self.device.bind()?;
        // Its plans take the place of those that there are.
        self.plans.end_pass();
        // SAFETY: graph and stream live.
        let launch = || unsafe {
            result::graph::launch(self.executable, self.device.stream)
                .map_err(|e| driver("cuGraphLaunch", e))
        };
        match self.device.group.get() {
            Some(group) => group.in_step(launch),
            None => launch(),
        }
    }
}

impl Drop for CudaGraph {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: made by `capture`, destroyed once; the driver waits for launches under way.
            let _ = unsafe { result::graph::exec_destroy(self.executable) };
        }
    }
}
