//! What a device must be able to do: whole, already fused operations.
//!
//! Every operation is ordered behind the ones called before it. On an asynchronous device a call
//! only enqueues; what it reports is that it could be enqueued. Shapes stand at the operations:
//! `tokens` are the tokens of a step, `rows` its requests. Activations have the backend's
//! `activation_dtype`, sums and norms are taken in f32 or better.

use std::any::Any;
use std::sync::Arc;
use std::time::Instant;

use crate::{DType, HostTensor, Precision, Tensor, Weight};

/// An operation's outcome.
pub type Result<T, E = BackendError> = std::result::Result<T, E>;

/// Why a device could not do what it was asked.
#[derive(Clone, Debug, thiserror::Error)]
pub enum BackendError {
    /// Not enough device memory.
    #[error("out of device memory: {bytes} bytes asked for, {free} free")]
    OutOfMemory {
        /// Bytes asked for.
        bytes: usize,
        /// Bytes free.
        free: usize,
    },
    /// The device, its driver or one of its libraries failed.
    #[error("{0}")]
    Device(Arc<str>),
    /// This backend has no kernel for what was asked; found when a model is loaded.
    #[error("{0}")]
    Unsupported(Arc<str>),
}

/// A device, as the engine sees it. One value per rank.
pub trait Backend: Send + Sync {
    // ---- memory ----

    /// For messages: `"cpu (AVX2, 2 threads)"`, `"NVIDIA H200"`.
    fn name(&self) -> String;
    /// The calling thread is the one that will drive this device: called once, before anything else.
    fn bind_thread(&self) -> Result<()>;
    /// What the device has and what of it is free.
    fn memory(&self) -> Result<MemoryInfo>;
    /// The type of activations at this precision.
    fn activation_dtype(&self) -> DType;
    /// The type in which K and V are kept.
    fn kv_dtype(&self) -> DType;
    /// Zeroed memory.
    fn alloc(&self, dtype: DType, shape: &[usize]) -> Result<Tensor>;
    /// Copies host bytes to the front of `dst`. `src` may be reused at once.
    fn upload(&self, src: &[u8], dst: &Tensor) -> Result<()>;
    /// `out[indices[i]] = values[i]`; negative indices are left out. All I32, `out` read as flat.
    /// This is how a step's changes reach the page table.
    fn scatter(&self, indices: &Tensor, values: &Tensor, out: &Tensor) -> Result<()>;
    /// Starts copying `src` to the host.
    fn download(&self, src: &Tensor) -> Result<Box<dyn Download>>;
    /// Waits for everything enqueued.
    fn synchronize(&self) -> Result<()>;
    /// Records what `enqueue` enqueues as a graph that can be launched again and again, without
    /// running it. `None` on a device without graphs: run `enqueue` each time instead.
    fn capture(&self, enqueue: &mut dyn FnMut() -> Result<()>) -> Result<Option<Box<dyn Graph>>>;
    /// Marks this place in what is enqueued, to learn when the device came to it. `None` on a device
    /// whose operations are done when their calls come back: there the host's own times say it.
    fn mark(&self) -> Result<Option<Box<dyn Mark>>> {
        Ok(None)
    }

    // ---- weights ----

    /// What every matrix becomes, whatever type a file has, on a device with memory of its own. `None`
    /// where weights lie in the host's: what can be had of that shows only when it is taken.
    fn matrix_dtype(&self) -> Option<DType>;
    /// A matrix `[Σ rows, cols]` from parts stacked along the rows (Q, K and V; gate and up).
    fn matrix(&self, parts: &[HostTensor<'_>], precision: Precision) -> Result<Weight>;
    /// The experts of one MoE layer: `gate_up[e]` are the parts of expert e's matrix as for
    /// `matrix`. Result `[experts, rows, cols]`.
    fn expert_matrices(
        &self,
        experts: &[Vec<HostTensor<'_>>],
        precision: Precision,
    ) -> Result<Weight>;
    /// A matrix `[rows, cols]` or `[experts, rows, cols]` of normal numbers with standard deviation
    /// 0.02, made on the device: what benchmarks run on. `None` where the device has no memory of
    /// its own: then the host makes it.
    fn random(&self, shape: &[usize], seed: u32) -> Result<Option<Weight>>;
    /// A vector in f32 (norm weights, biases): parts one behind the other.
    fn vector(&self, parts: &[HostTensor<'_>]) -> Result<Weight>;
    /// Where `matrix` is all that is multiplied with what `norm` gives, its columns may be multiplied with the
    /// norm's weights once and for all, if that makes for faster products. Returns the norm to call from then on.
    fn fold_norm(&self, norm: Norm, _matrix: &Weight) -> Result<Norm> {
        Ok(norm)
    }

    // ---- the forward pass ----

    /// `ids[t] = input_ids[t] >= 0 ? input_ids[t] : token_table[-1 - input_ids[t]]`, then
    /// `out[t] = table[ids[t]] · scale`. Ids outside `range` (another rank's share of the
    /// vocabulary) give a row of zeros.
    ///
    /// A forward pass begins with it: from then until the next `upload`, nothing changes what its `Batch` holds.
    ///
    /// `input_ids [tokens] I32`, `token_table [slots] I32`, `out [tokens, hidden]`.
    fn embed(&self, args: &Embed<'_>, out: &Tensor) -> Result<()>;
    /// `out = x / rms(x) · weight` (or `· (1 + weight)`). `x`, `out [rows, hidden]`, maybe equal.
    fn rms_norm(&self, x: &Tensor, norm: &Norm, out: &Tensor) -> Result<()>;
    /// `out = x · wᵀ (+ bias)`, or `out += …` for `Store::Add`. With `norm`, `x` is normed on the
    /// way; `x` itself does not change. `x [rows, in]`, `out [rows, out]`.
    fn linear(&self, args: &Linear<'_>, out: &Tensor) -> Result<()>;
    /// `out = act(g) · u`, where `[g, u] = norm(x) · wᵀ`, `w [2·inner, in]` with the gate's rows
    /// first. `out [rows, inner]`.
    fn gated_linear(&self, args: &Linear<'_>, activation: Activation, out: &Tensor) -> Result<()>;
    /// The attention half of a layer: `hidden += out · attention(rope(qkv · norm(hidden)))`. A device may
    /// do it in one pass and bring `hidden` up to date when another operation reads it; what it leaves
    /// in `qkv` and `attended` is then its own affair.
    fn attention_layer(&self, args: &AttentionLayer<'_>, hidden: &Tensor) -> Result<()> {
        args.in_parts(self, hidden)
    }
    /// The MLP half: `hidden += down · (act(g) · u)`, where `[g, u] = gate_up · norm(hidden)`; with the
    /// same freedom.
    fn mlp(&self, args: &Mlp<'_>, hidden: &Tensor) -> Result<()> {
        args.in_parts(self, hidden)
    }
    /// `x += delta`: the residual, where an all-reduce or a norm stands between. Both
    /// `[rows, hidden]`.
    fn add(&self, x: &Tensor, delta: &Tensor) -> Result<()>;
    /// Norms Q and K per head (where the model does), rotates them, writes K and V into their
    /// pages, and leaves Q, scaled by nothing, in place.
    /// `qkv [tokens, (q_heads + 2·kv_heads)·head_dim]`.
    fn rope_store(&self, args: &RopeStore<'_>, qkv: &Tensor) -> Result<()>;
    /// Causal attention of each row's queries over its pages, `cached_len + extend_len` long,
    /// the row's own tokens included. Reads Q from `qkv`; `out [tokens, q_heads·head_dim]`.
    fn attention(&self, args: &Attention<'_>, qkv: &Tensor, out: &Tensor) -> Result<()>;
    /// How many rows attention takes through a prefix at once that they share, reading its K and V one
    /// time for all of them: what `Batch::shared` is made of. 1 where it has no use for that.
    fn prefix_rows_max(&self, _heads: Heads) -> usize {
        1
    }
    /// Whether a step of so many decode rows is to come with `Batch::shared`, where reading prefixes at
    /// once spares the K and V of so many tokens.
    fn prefixes_pay(&self, _rows: usize, _spared: usize) -> bool {
        true
    }
    /// `rope_store`, then `attention`, of the same step and layer. A device may do both in one pass;
    /// what it leaves in `qkv` is then its own affair.
    fn rope_attention(
        &self,
        store: &RopeStore<'_>,
        attention: &Attention<'_>,
        qkv: &Tensor,
        out: &Tensor,
    ) -> Result<()> {
        self.rope_store(store, qkv)?;
        self.attention(attention, qkv, out)
    }
    /// `out += Σ over a token's top experts of weight_e · down_e(act(gate_e) · up_e)` of
    /// `norm(x)`, or `out = …`. `x`, `out [tokens, hidden]`.
    fn moe(&self, args: &Moe<'_>, out: &Tensor) -> Result<()>;
    /// `out[i] = x[indices[i]]`. `indices [n] I32`, `x [tokens, width]`, `out [n, width]`.
    fn gather(&self, x: &Tensor, indices: &Tensor, out: &Tensor) -> Result<()>;

    // ---- logits and sampling; logits are f32 [rows, vocab] ----

    /// `linear` of a model's head. `temperature [rows] F32` is what `sample` will be asked to draw with: a device may
    /// gather on the way what `sample` would have to read all logits for. It gives what it gathered, for
    /// `Sample::survey`, which holds until the next call and only while the logits are what they are.
    fn logits(
        &self,
        args: &Linear<'_>,
        _temperature: &Tensor,
        out: &Tensor,
    ) -> Result<Option<Tensor>> {
        self.linear(args, out).map(|()| None)
    }
    /// `logits = cap · tanh(logits / cap)`.
    fn soft_cap(&self, logits: &Tensor, cap: f32) -> Result<()>;
    /// Applies edits and masks. See `Adjust`.
    fn adjust(&self, args: &Adjust<'_>, logits: &Tensor) -> Result<()>;
    /// One token a row, written to `tokens[row]` and to `token_table[slots[row]]`.
    fn sample(&self, args: &Sample<'_>, logits: &Tensor) -> Result<()>;
    /// For row i: `logprob[i]` and `rank[i]` of `targets[i]`, and the `top` most likely ids with
    /// their log-probabilities, most likely first.
    fn logprobs(&self, args: &Logprobs<'_>, logits: &Tensor) -> Result<()>;

    /// Lets a backend's own tools reach it.
    fn as_any(&self) -> &dyn Any;
}

/// A download under way.
pub trait Download: Send {
    /// Waits for the bytes.
    fn wait(self: Box<Self>) -> Result<Vec<u8>>;
}

/// A place between a device's operations.
pub trait Mark: Send {
    /// Waits until the device has come to it; when that was, by the host's clock.
    fn time(self: Box<Self>) -> Result<Instant>;
}

/// Recorded device work. It reads and writes the very addresses it was recorded with.
pub trait Graph: Send {
    /// Enqueues the whole of it.
    fn launch(&self) -> Result<()>;
}

/// Device memory in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryInfo {
    /// In all.
    pub total: usize,
    /// Not in use by anyone.
    pub free: usize,
}

/// An RMS norm (Zhang and Sennrich, 2019).
#[derive(Clone, Debug)]
pub struct Norm {
    /// `[width]`.
    pub weight: Weight,
    /// Added to the mean square.
    pub eps: f32,
    /// Multiply with `1 + weight` (Gemma) and not `weight`.
    pub plus_one: bool,
    /// The weights are ones: [`Backend::fold_norm`] has them in the matrix behind the norm.
    pub folded: bool,
}

/// What becomes of an operation's result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// `out = …`
    Set,
    /// `out += …`
    Add,
}

/// The first factor of a gated MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x · sigmoid(x)`
    Silu,
    /// GELU by its tanh approximation.
    GeluTanh,
}

/// Arguments of `Backend::embed`.
#[derive(Debug)]
pub struct Embed<'a> {
    /// `[tokens] I32`; negative ids point into the token table.
    pub input_ids: &'a Tensor,
    /// `[slots] I32`.
    pub token_table: &'a Tensor,
    /// This rank's rows of the embedding.
    pub table: &'a Weight,
    /// The first id that `table` holds.
    pub first_id: usize,
    /// Multiplied with the embedding.
    pub scale: f32,
}

/// Arguments of `Backend::linear` and `gated_linear`.
#[derive(Debug)]
pub struct Linear<'a> {
    /// `[rows, in]`.
    pub x: &'a Tensor,
    /// Norms `x` on the way in.
    pub norm: Option<&'a Norm>,
    /// `[out, in]`.
    pub weight: &'a Weight,
    /// `[out]`.
    pub bias: Option<&'a Weight>,
    /// Whether the result is set or added.
    pub store: Store,
}

/// How the heads of one layer lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads on this rank.
    pub q: usize,
    /// Key and value heads on this rank; divides `q`.
    pub kv: usize,
    /// Elements of a head.
    pub dim: usize,
}

impl Heads {
    /// Width of a token's Q, K and V together.
    pub fn qkv_width(&self) -> usize {
        (self.q + 2 * self.kv) * self.dim
    }
}

/// One layer's pages: `[pages, kv_heads, page_size, head_dim]` each, in the backend's `kv_dtype`.
#[derive(Clone, Debug)]
pub struct KvLayer {
    /// Keys, rotated.
    pub k: Tensor,
    /// Values.
    pub v: Tensor,
}

/// The step as the device sees it. All tensors are I32 and lie in fixed buffers, so that a
/// captured graph finds the next step's values where it found the last one's.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Requests in the step. Padding rows of a graph bucket count: their `kv_len` is 0, and
    /// attention leaves their output alone.
    pub rows: usize,
    /// Tokens in the step.
    pub tokens: usize,
    /// Rows `0..decode_rows` extend by one token, row i being token i.
    pub decode_rows: usize,
    /// `[rows]`: which row of the page table.
    pub slots: Tensor,
    /// `[rows + 1]`: row i's tokens are `query_start[i]..query_start[i+1]`.
    pub query_start: Tensor,
    /// `[rows]`: tokens to attend over, `cached_len + extend_len`.
    pub kv_len: Tensor,
    /// `[tokens]`: position in its sequence.
    pub positions: Tensor,
    /// `[tokens]`: where K and V go: `page · page_size + offset`, or −1 for padding.
    pub store_at: Tensor,
    /// `[slots, pages a request]`.
    pub page_table: Tensor,
    /// Token slots in a page.
    pub page_size: usize,
    /// The same numbers on the host, for devices that plan their work there, and for grid sizes.
    /// `None` while a graph is captured: then nothing may depend on them.
    pub host: Option<Arc<HostBatch>>,
    /// The longest `kv_len` that this step (or any launch of the captured graph) can have.
    pub kv_len_max: usize,
    /// The most tokens in one row.
    pub extend_len_max: usize,
    /// What decode rows have in common, where the backend asked for it and it is much.
    pub shared: Option<SharedPrefixes>,
}

/// Decode rows that begin with the same tokens, in the same pages, dealt into lots of at most
/// `Backend::prefix_rows_max`. A row is in one lot or in none. All tensors are I32.
#[derive(Clone, Debug)]
pub struct SharedPrefixes {
    /// `[lots, rows a lot]`: row numbers, −1 behind a lot's last.
    pub rows: Tensor,
    /// `[lots]`: how many tokens a lot's rows share: whole pages, all older than the step. 0 for lots
    /// that only fill up a graph's.
    pub tokens: Tensor,
    /// `[decode_rows]`: the tokens of the row's lot; 0 where it is in none.
    pub covered: Tensor,
}

/// A step's lengths on the host.
#[derive(Clone, Debug, Default)]
pub struct HostBatch {
    /// As `Batch::query_start`.
    pub query_start: Vec<i32>,
    /// As `Batch::kv_len`.
    pub kv_len: Vec<i32>,
}

/// Arguments of `Backend::rope_store`.
#[derive(Debug)]
pub struct RopeStore<'a> {
    /// The step.
    pub batch: &'a Batch,
    /// This rank's heads.
    pub heads: Heads,
    /// Per-head norms before the rotation.
    pub q_norm: Option<&'a Norm>,
    /// As `q_norm`.
    pub k_norm: Option<&'a Norm>,
    /// `[positions, head_dim] F32`: for each position `head_dim/2` cosines, then as many sines.
    /// Element `i` rotates with element `i + head_dim/2` (the Hugging Face convention). Scaling
    /// of frequencies and attention factors are already in it.
    pub rope: &'a Tensor,
    /// Where K and V go.
    pub kv: &'a KvLayer,
}

/// Arguments of `Backend::attention`.
#[derive(Debug)]
pub struct Attention<'a> {
    /// The step.
    pub batch: &'a Batch,
    /// This rank's heads.
    pub heads: Heads,
    /// Pages to read.
    pub kv: &'a KvLayer,
    /// Multiplied with the scores.
    pub scale: f32,
    /// A token sees itself and this many − 1 before it.
    pub window: Option<usize>,
    /// `cap · tanh(score / cap)`.
    pub soft_cap: Option<f32>,
}

/// Arguments of `Backend::attention_layer`.
#[derive(Debug)]
pub struct AttentionLayer<'a> {
    /// Norms `hidden` on the way in.
    pub norm: &'a Norm,
    /// `[(q_heads + 2·kv_heads)·head_dim, hidden]`.
    pub qkv: &'a Weight,
    /// As many as `qkv` has rows.
    pub qkv_bias: Option<&'a Weight>,
    /// What becomes of Q, K and V.
    pub store: RopeStore<'a>,
    /// The same step and layer.
    pub attention: Attention<'a>,
    /// `[hidden, q_heads·head_dim]`.
    pub out: &'a Weight,
    /// Memory for `[tokens, (q_heads + 2·kv_heads)·head_dim]`.
    pub qkv_memory: &'a Tensor,
    /// Memory for `[tokens, q_heads·head_dim]`.
    pub attended: &'a Tensor,
}

impl AttentionLayer<'_> {
    /// One operation after the other.
    pub fn in_parts<B: Backend + ?Sized>(&self, backend: &B, hidden: &Tensor) -> Result<()> {
        let (x, norm, bias) = (hidden, Some(self.norm), self.qkv_bias);
        let qkv = Linear { x, norm, weight: self.qkv, bias, store: Store::Set };
        backend.linear(&qkv, self.qkv_memory)?;
        backend.rope_attention(&self.store, &self.attention, self.qkv_memory, self.attended)?;
        let (x, weight, store) = (self.attended, self.out, Store::Add);
        backend.linear(&Linear { x, norm: None, weight, bias: None, store }, hidden)
    }
}

/// Arguments of `Backend::mlp`.
#[derive(Debug)]
pub struct Mlp<'a> {
    /// Norms `hidden` on the way in.
    pub norm: &'a Norm,
    /// `[2·inner, hidden]`, the gate's rows first.
    pub gate_up: &'a Weight,
    /// The gate's.
    pub activation: Activation,
    /// `[hidden, inner]`.
    pub down: &'a Weight,
    /// Memory for `[tokens, inner]`.
    pub mid: &'a Tensor,
}

impl Mlp<'_> {
    /// One operation after the other.
    pub fn in_parts<B: Backend + ?Sized>(&self, backend: &B, hidden: &Tensor) -> Result<()> {
        let (norm, weight) = (Some(self.norm), self.gate_up);
        let gate_up = Linear { x: hidden, norm, weight, bias: None, store: Store::Set };
        backend.gated_linear(&gate_up, self.activation, self.mid)?;
        let (x, weight, store) = (self.mid, self.down, Store::Add);
        backend.linear(&Linear { x, norm: None, weight, bias: None, store }, hidden)
    }
}

/// Arguments of `Backend::moe`.
#[derive(Debug)]
pub struct Moe<'a> {
    /// `[tokens, hidden]`.
    pub x: &'a Tensor,
    /// Norms `x` on the way in.
    pub norm: &'a Norm,
    /// `[experts, hidden]`.
    pub router: &'a Weight,
    /// `[experts, 2·inner, hidden]`.
    pub gate_up: &'a Weight,
    /// `[experts, hidden, inner]`.
    pub down: &'a Weight,
    /// Experts a token.
    pub top_k: usize,
    /// Whether the chosen experts' weights are scaled to sum to 1.
    pub renormalize: bool,
    /// Whether the result is set or added.
    pub store: Store,
}

/// Arguments of `Backend::adjust`. Edits first, then masks:
/// `logit = (logit > 0 ? logit / scale : logit · scale) + bias`; masked logits become −∞.
#[derive(Debug)]
pub struct Adjust<'a> {
    /// `(row, token, scale, bias)`.
    pub edits: &'a [(u32, u32, f32, f32)],
    /// `(row, allowed tokens, a bit each, low bit first)`.
    pub masks: &'a [(u32, &'a [u32])],
}

/// Arguments of `Backend::sample`. Every tensor has one entry a row.
///
/// Temperature, then top-k, top-p and min-p over what is left, then one draw: the token is the
/// one that inverts the cumulative distribution at a uniform number made by Philox-4x32-10 from
/// `(seed, position)` alone. Equal logits on the border of top-k or top-p go to the lower id.
/// Temperature 0 takes the most likely token, the lowest id among equals.
#[derive(Debug)]
pub struct Sample<'a> {
    /// F32; 0 is greedy.
    pub temperature: &'a Tensor,
    /// I32; 0 keeps all.
    pub top_k: &'a Tensor,
    /// F32.
    pub top_p: &'a Tensor,
    /// F32.
    pub min_p: &'a Tensor,
    /// `[rows, 2] I32`: low and high half of the 64-bit seed.
    pub seed: &'a Tensor,
    /// I32: the position that the sampled token will have.
    pub position: &'a Tensor,
    /// I32: where in the token table the token goes; −1 for nowhere.
    pub slots: &'a Tensor,
    /// Whether every row is greedy, so that a simpler kernel does.
    pub all_greedy: bool,
    /// What `Backend::logits` gave with these very logits.
    pub survey: Option<&'a Tensor>,
    /// Whether nobody reads the logits afterwards: they may be lost.
    pub last_use: bool,
    /// Written: `[slots] I32`.
    pub token_table: &'a Tensor,
    /// Written: `[rows] I32`.
    pub tokens: &'a Tensor,
}

/// Arguments of `Backend::logprobs`.
#[derive(Debug)]
pub struct Logprobs<'a> {
    /// `[rows] I32`: the ids asked for.
    pub targets: &'a Tensor,
    /// Written: `[rows] F32`.
    pub logprob: &'a Tensor,
    /// Written: `[rows] I32`.
    pub rank: &'a Tensor,
    /// Written: `[rows, top] I32`.
    pub top_ids: &'a Tensor,
    /// Written: `[rows, top] F32`.
    pub top_logprobs: &'a Tensor,
}
