//! The operations' entrances: `Backend` for the CPU.

use std::any::Any;
use std::sync::{Mutex, MutexGuard, PoisonError};

use minisgl_tensor::{
    Activation, Adjust, Attention, Backend, BackendError, DType, Download, Embed, Graph,
    HostTensor, Linear, Logprobs, MemoryInfo, Moe, Norm, Precision, Result, RopeStore, Sample,
    Store, Tensor, Weight,
};

use crate::activations::{Input, NormRow, Prepared};
use crate::cores::{physical_cores, stay_on};
use crate::kernels::Rows;
use crate::matrix::{self, Experts, Matrix, Vector};
use crate::memory::{self, Arena, Shared, view};
use crate::pool::{PerThread, Pool};
use crate::simd::{Isa, IsaChoice, Kernel, LANES, Simd};
use crate::{attention, moe, rope, sample};

/// How a CPU backend is made.
#[derive(Clone, Debug)]
pub struct CpuOptions {
    /// Threads; one for each physical core where `None`.
    pub threads: Option<usize>,
    /// Logical processors to keep the threads on, one each; threads beyond them, and all where it is
    /// empty, run where the system puts them.
    pub cores: Vec<usize>,
    /// What activations, K and V are kept in.
    pub precision: Precision,
    /// The instruction set.
    pub isa: IsaChoice,
}

impl Default for CpuOptions {
    fn default() -> Self {
        let cores = Vec::new();
        Self { threads: None, cores, precision: Precision::Native, isa: IsaChoice::Auto }
    }
}

/// The CPU.
///
/// Operations run when they are called, one at a time, on all threads of the backend's pool.
pub struct CpuBackend {
    on: Machine,
    precision: Precision,
    scratch: Mutex<Scratch>,
    /// Where the thread that drives it runs, if that is said.
    first_core: Option<usize>,
}

/// What computes.
pub struct Machine {
    pub pool: Pool,
    pub isa: Isa,
    /// What products are computed in.
    pub product: PerThread<matrix::Scratch>,
    arena: Mutex<Arena>,
}

impl Machine {
    /// Where weights go.
    pub fn arena(&self) -> MutexGuard<'_, Arena> {
        self.arena.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Buffers that grow to the largest step's and stay, so that a step allocates nothing.
struct Scratch {
    prepared: Prepared,
    attention: attention::Scratch,
    moe: moe::Scratch,
    sample: PerThread<sample::Scratch>,
}

impl CpuBackend {
    /// Starts the threads. Errors: an instruction set that is not there, no threads to be had.
    pub fn new(options: CpuOptions) -> Result<Self> {
        let threads = options.threads.unwrap_or_else(physical_cores).max(1);
        let pool = Pool::new(threads, &options.cores).map_err(|error| {
            BackendError::Device(format!("starting {threads} threads: {error}").into())
        })?;
        let scratch = Scratch {
            prepared: Prepared::default(),
            attention: attention::Scratch::new(&pool),
            moe: moe::Scratch::default(),
            sample: PerThread::new(&pool),
        };
        let isa = Isa::detect(options.isa)?;
        let on = Machine { product: PerThread::new(&pool), pool, isa, arena: Mutex::default() };
        let first_core = options.cores.first().copied();
        Ok(Self { on, precision: options.precision, scratch: Mutex::new(scratch), first_core })
    }

    /// An operation's turn. One that panicked has left nothing that the next one reads.
    fn scratch(&self) -> MutexGuard<'_, Scratch> {
        self.scratch.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Scratch {
    /// What a product reads: the rows of `x`, and how many they are.
    fn input<'a>(&'a mut self, on: &Machine, args: &Linear<'a>) -> (Rows<'a>, usize) {
        let (cols, needs) = (args.x.row_len(), args.weight.get::<Matrix>().needs(on));
        let input = Input { x: view(args.x), cols, norm: args.norm, order: None };
        (self.prepared.prepare(on, input, needs), args.x.elements() / cols)
    }
}

/// Where products `[rows, 16]` go in a matrix of `width` columns.
#[derive(Clone, Copy)]
pub struct Target<'a> {
    pub out: Shared<'a, f32>,
    /// Its first row there.
    pub row: usize,
    pub width: usize,
    /// `[width]`, added to every row.
    pub bias: Option<&'a [f32]>,
    pub store: Store,
}

impl Target<'_> {
    /// Fetches the lines where the products of `count` rows will go: stores that miss the first
    /// cache hold up all that follow.
    pub fn fetch(&self, isa: Isa, (row, column): (usize, usize), count: usize) {
        isa.run(Fetch { target: *self, row, column, count });
    }

    /// Puts the products of rows from `row` on and columns `column..column + lanes`. Each product
    /// is to be put once.
    pub fn put(&self, isa: Isa, at: (usize, usize, usize), products: &[[f32; LANES]]) {
        isa.run(Put { target: *self, at, products });
    }
}

struct Fetch<'a> {
    target: Target<'a>,
    row: usize,
    column: usize,
    count: usize,
}

impl Kernel for Fetch<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let first = self.target.row + self.row;
        for row in first..first + self.count {
            // SAFETY: these elements are this item's, and nothing is done with them.
            let out = unsafe { self.target.out.part(row * self.target.width + self.column, 1) };
            s.will_write(&out[0]);
        }
    }
}

struct Put<'a> {
    target: Target<'a>,
    at: (usize, usize, usize),
    products: &'a [[f32; LANES]],
}

impl Kernel for Put<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { target: Target { out, row: first, width, bias, store }, at, products } = self;
        let (row, column, lanes) = at;
        let bias = bias.map(|bias| &bias[column..][..lanes]);
        for (i, product) in products.iter().enumerate() {
            // SAFETY: each product is put once.
            let out = unsafe { out.part((first + row + i) * width + column, lanes) };
            if let Some(out) = out.first_chunk_mut::<LANES>() {
                let mut y = s.load(product);
                if let Some(bias) = bias.and_then(<[f32]>::first_chunk) {
                    y = s.add(y, s.load(bias));
                }
                s.store(if store == Store::Add { s.add(s.load(out), y) } else { y }, out);
                continue;
            }
            for (lane, (out, y)) in out.iter_mut().zip(product).enumerate() {
                let y = y + bias.map_or(0.0, |bias| bias[lane]);
                *out = if store == Store::Add { *out + y } else { y };
            }
        }
    }
}

struct Done(Vec<u8>);

impl Download for Done {
    fn wait(self: Box<Self>) -> Result<Vec<u8>> {
        Ok(self.0)
    }
}

fn bytes_of(tensor: &Tensor) -> Vec<u8> {
    let bytes = tensor.view_as(DType::U8, &[tensor.bytes()]);
    view::<u8>(&bytes).to_vec()
}

impl Backend for CpuBackend {
    fn name(&self) -> String {
        format!("cpu ({}, {} threads)", self.on.isa.name(), self.on.pool.threads())
    }

    fn bind_thread(&self) -> Result<()> {
        if let Some(core) = self.first_core {
            stay_on(core);
        }
        Ok(())
    }

    fn memory(&self) -> Result<MemoryInfo> {
        let free = memory::free_bytes();
        Ok(MemoryInfo { total: memory::meminfo("MemTotal:").unwrap_or(free), free })
    }

    fn activation_dtype(&self) -> DType {
        DType::F32
    }

    fn kv_dtype(&self) -> DType {
        match self.precision {
            Precision::Exact => DType::F32,
            Precision::Native => DType::F16,
        }
    }

    fn alloc(&self, dtype: DType, shape: &[usize]) -> Result<Tensor> {
        memory::alloc(dtype, shape)
    }

    fn upload(&self, src: &[u8], dst: &Tensor) -> Result<()> {
        let dst = dst.view_as(DType::U8, &[src.len()]);
        // SAFETY: operations run one after the other, so nobody else touches `dst`.
        unsafe { Shared::<u8>::of(&dst).all() }.copy_from_slice(src);
        Ok(())
    }

    fn scatter(&self, indices: &Tensor, values: &Tensor, out: &Tensor) -> Result<()> {
        // SAFETY: as in `upload`.
        let out = unsafe { Shared::<i32>::of(out).all() };
        for (&i, &value) in view::<i32>(indices).iter().zip(view::<i32>(values)) {
            if let Ok(i) = usize::try_from(i) {
                out[i] = value;
            }
        }
        Ok(())
    }

    fn download(&self, src: &Tensor) -> Result<Box<dyn Download>> {
        Ok(Box::new(Done(bytes_of(src))))
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    fn capture(&self, _: &mut dyn FnMut() -> Result<()>) -> Result<Option<Box<dyn Graph>>> {
        Ok(None)
    }

    fn matrix_dtype(&self) -> Option<DType> {
        None
    }

    fn matrix(&self, parts: &[HostTensor<'_>], precision: Precision) -> Result<Weight> {
        let matrix = Matrix::pack(parts, precision, &self.on)?;
        Ok(Weight::new(&[matrix.rows, matrix.cols], matrix))
    }

    fn expert_matrices(
        &self,
        experts: &[Vec<HostTensor<'_>>],
        precision: Precision,
    ) -> Result<Weight> {
        let pack = |parts: &Vec<_>| Matrix::pack(parts, precision, &self.on);
        let packed = experts.iter().map(pack).collect::<Result<Vec<_>>>()?;
        let (rows, cols) = packed.first().map_or((0, 0), |first| (first.rows, first.cols));
        if packed.iter().any(|matrix| (matrix.rows, matrix.cols) != (rows, cols)) {
            return Err(BackendError::Unsupported("experts of different shapes".into()));
        }
        Ok(Weight::new(&[packed.len(), rows, cols], Experts(packed)))
    }

    fn random(&self, _: &[usize], _: u32) -> Result<Option<Weight>> {
        Ok(None)
    }

    fn vector(&self, parts: &[HostTensor<'_>]) -> Result<Weight> {
        let vector = matrix::vector(parts)?;
        Ok(Weight::new(&[vector.0.len()], vector))
    }

    fn embed(&self, args: &Embed<'_>, out: &Tensor) -> Result<()> {
        let (table, width) = (args.table.get::<Matrix>(), args.table.cols());
        let (ids, newest) = (view::<i32>(args.input_ids), view::<i32>(args.token_table));
        let out = Shared::<f32>::of(out);
        self.on.pool.run(ids.len(), &|_, token| {
            // SAFETY: each token is its own item.
            let out = unsafe { out.part(token * width, width) };
            let id = ids[token];
            let id = if id >= 0 { id } else { newest[(-1 - id) as usize] };
            let row = usize::try_from(id).ok().and_then(|id| id.checked_sub(args.first_id));
            match row.filter(|&row| row < table.rows) {
                Some(row) => {
                    table.row(row, out);
                    out.iter_mut().for_each(|x| *x *= args.scale);
                }
                None => out.fill(0.0),
            }
        });
        Ok(())
    }

    fn rms_norm(&self, x: &Tensor, norm: &Norm, out: &Tensor) -> Result<()> {
        let width = x.row_len();
        // `x` may be `out`, and then must not be seen as a slice that nobody writes.
        let (from, to) = (Shared::<f32>::of(x), Shared::<f32>::of(out));
        self.on.pool.run(x.elements() / width, &|_, row| {
            // SAFETY: each row is its own item, and `from` is let go before `to` is taken.
            let copy = unsafe { from.part(row * width, width) }.as_ptr();
            // SAFETY: as above.
            let to = unsafe { to.part(row * width, width) };
            // SAFETY: both have `width` elements; `copy` may move them onto themselves.
            unsafe { std::ptr::copy(copy, to.as_mut_ptr(), width) };
            self.on.isa.run(NormRow { x: to, norm });
        });
        Ok(())
    }

    fn linear(&self, args: &Linear<'_>, out: &Tensor) -> Result<()> {
        let mut scratch = self.scratch();
        let (x, rows) = scratch.input(&self.on, args);
        let matrix = args.weight.get::<Matrix>();
        let bias = args.bias.map(|bias| bias.get::<Vector>().0.as_slice());
        let (out, width, store) = (Shared::of(out), matrix.rows, args.store);
        let target = Target { out, row: 0, width, bias, store };
        matrix.multiply(&self.on, x, rows, target);
        Ok(())
    }

    fn gated_linear(&self, args: &Linear<'_>, activation: Activation, out: &Tensor) -> Result<()> {
        let mut scratch = self.scratch();
        let (x, rows) = scratch.input(&self.on, args);
        let matrix = args.weight.get::<Matrix>();
        let (out, width, store) = (Shared::of(out), matrix.rows / 2, args.store);
        let target = Target { out, row: 0, width, bias: None, store };
        matrix.multiply_gated(&self.on, x, rows, activation, target)
    }

    fn add(&self, x: &Tensor, delta: &Tensor) -> Result<()> {
        // SAFETY: as in `upload`.
        let x = unsafe { Shared::<f32>::of(x).all() };
        x.iter_mut().zip(view::<f32>(delta)).for_each(|(x, d)| *x += d);
        Ok(())
    }

    fn rope_store(&self, args: &RopeStore<'_>, qkv: &Tensor) -> Result<()> {
        rope::rope_store(&self.on, args, qkv);
        Ok(())
    }

    fn attention(&self, args: &Attention<'_>, qkv: &Tensor, out: &Tensor) -> Result<()> {
        attention::attention(&self.on, &mut self.scratch().attention, args, qkv, out);
        Ok(())
    }

    fn moe(&self, args: &Moe<'_>, out: &Tensor) -> Result<()> {
        let mut scratch = self.scratch();
        let Scratch { prepared, moe: own, .. } = &mut *scratch;
        moe::moe(&self.on, own, prepared, args, out)
    }

    fn gather(&self, x: &Tensor, indices: &Tensor, out: &Tensor) -> Result<()> {
        let (x, width) = (view::<f32>(x), x.row_len());
        // SAFETY: as in `upload`.
        let out = unsafe { Shared::<f32>::of(out).all() };
        for (&i, out) in view::<i32>(indices).iter().zip(out.chunks_exact_mut(width)) {
            out.copy_from_slice(&x[i as usize * width..][..width]);
        }
        Ok(())
    }

    fn soft_cap(&self, logits: &Tensor, cap: f32) -> Result<()> {
        // SAFETY: as in `upload`.
        let logits = unsafe { Shared::<f32>::of(logits).all() };
        logits.iter_mut().for_each(|l| *l = cap * (*l / cap).tanh());
        Ok(())
    }

    fn adjust(&self, args: &Adjust<'_>, logits: &Tensor) -> Result<()> {
        let vocab = logits.row_len();
        // SAFETY: as in `upload`.
        let logits = unsafe { Shared::<f32>::of(logits).all() };
        for &(row, token, scale, bias) in args.edits {
            let l = &mut logits[row as usize * vocab + token as usize];
            *l = if *l > 0.0 { *l / scale } else { *l * scale } + bias;
        }
        for &(row, mask) in args.masks {
            for (i, l) in logits[row as usize * vocab..][..vocab].iter_mut().enumerate() {
                if mask.get(i / 32).is_none_or(|word| word >> (i % 32) & 1 == 0) {
                    *l = f32::NEG_INFINITY;
                }
            }
        }
        Ok(())
    }

    fn sample(&self, args: &Sample<'_>, logits: &Tensor) -> Result<()> {
        sample::sample(&self.on, &self.scratch().sample, args, logits);
        Ok(())
    }

    fn logprobs(&self, args: &Logprobs<'_>, logits: &Tensor) -> Result<()> {
        sample::logprobs(&self.on, args, logits);
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
