//! The operations' entrances: `Backend` for the CPU.

use std::any::Any;

use minisgl_tensor::{
    Activation, Adjust, Attention, Backend, BackendError, DType, Download, Embed, Graph,
    HostTensor, Linear, Logprobs, MemoryInfo, Moe, Norm, Precision, Result, RopeStore, Sample,
    Store, Tensor, Weight,
};

use crate::matrix::Matrix;
use crate::memory::{self, Shared, view};
use crate::pool::{Pool, physical_cores};
use crate::simd::{Isa, IsaChoice};
use crate::{attention, ops, sample};

/// How a CPU backend is made.
#[derive(Clone, Debug)]
pub struct CpuOptions {
    /// Threads; one for each physical core where `None`.
    pub threads: Option<usize>,
    /// What activations, K and V are kept in.
    pub precision: Precision,
    /// The instruction set.
    pub isa: IsaChoice,
}

impl Default for CpuOptions {
    fn default() -> Self {
        Self { threads: None, precision: Precision::Native, isa: IsaChoice::Auto }
    }
}

/// The CPU. It computes in f32 with weights decoded to f32, whatever precision is asked for.
pub struct CpuBackend {
    pool: Pool,
    isa: Isa,
}

impl CpuBackend {
    /// Starts the threads. Errors: an instruction set that is not there, no threads to be had.
    pub fn new(options: CpuOptions) -> Result<Self> {
        let threads = options.threads.unwrap_or_else(physical_cores).max(1);
        let pool = Pool::new(threads).map_err(|error| {
            BackendError::Device(format!("starting {threads} threads: {error}").into())
        })?;
        Ok(Self { pool, isa: Isa::detect(options.isa)? })
    }

    /// `x`, normed where `norm` says so.
    fn input(&self, x: &Tensor, norm: Option<&Norm>) -> Vec<f32> {
        let width = x.row_len();
        let mut rows = view::<f32>(x).to_vec();
        if let Some(norm) = norm {
            rows.chunks_exact_mut(width).for_each(|row| ops::norm_row(self.isa, row, norm));
        }
        rows
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
        format!("cpu ({}, {} threads)", self.isa.name(), self.pool.threads())
    }

    fn memory(&self) -> Result<MemoryInfo> {
        let free = memory::free_bytes();
        Ok(MemoryInfo { total: memory::meminfo("MemTotal:").unwrap_or(free), free })
    }

    fn activation_dtype(&self) -> DType {
        DType::F32
    }

    fn kv_dtype(&self) -> DType {
        DType::F32
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

    fn matrix(&self, parts: &[HostTensor<'_>], _: Precision) -> Result<Weight> {
        let matrix = Matrix::decode(parts, &self.pool)?;
        Ok(Weight::new(&[matrix.rows(), matrix.cols], matrix))
    }

    fn expert_matrices(&self, experts: &[Vec<HostTensor<'_>>], _: Precision) -> Result<Weight> {
        let parts: Vec<_> = experts.iter().flatten().cloned().collect();
        let matrix = Matrix::decode(&parts, &self.pool)?;
        Ok(Weight::new(&[experts.len(), matrix.rows() / experts.len(), matrix.cols], matrix))
    }

    fn vector(&self, parts: &[HostTensor<'_>]) -> Result<Weight> {
        let flat: Vec<_> = parts
            .iter()
            .map(|part| HostTensor { shape: vec![part.shape.iter().product(), 1], ..part.clone() })
            .collect();
        let matrix = Matrix::decode(&flat, &self.pool)?;
        Ok(Weight::new(&[matrix.values.len()], matrix))
    }

    fn embed(&self, args: &Embed<'_>, out: &Tensor) -> Result<()> {
        let (table, width) = (args.table.get::<Matrix>(), args.table.cols());
        let newest = view::<i32>(args.token_table);
        // SAFETY: as in `upload`.
        let out = unsafe { Shared::<f32>::of(out).all() };
        for (&id, out) in view::<i32>(args.input_ids).iter().zip(out.chunks_exact_mut(width)) {
            let id = if id >= 0 { id } else { newest[(-1 - id) as usize] };
            let row = usize::try_from(id).ok().and_then(|id| id.checked_sub(args.first_id));
            match row.filter(|&row| row < table.rows()) {
                Some(row) => {
                    for (out, x) in out.iter_mut().zip(table.row(row)) {
                        *out = x * args.scale;
                    }
                }
                None => out.fill(0.0),
            }
        }
        Ok(())
    }

    fn rms_norm(&self, x: &Tensor, norm: &Norm, out: &Tensor) -> Result<()> {
        let rows = self.input(x, Some(norm));
        // SAFETY: as in `upload`.
        unsafe { Shared::<f32>::of(out).all() }.copy_from_slice(&rows);
        Ok(())
    }

    fn linear(&self, args: &Linear<'_>, out: &Tensor) -> Result<()> {
        let x = self.input(args.x, args.norm);
        let matrix = args.weight.get::<Matrix>();
        let bias = args.bias.map(|bias| &bias.get::<Matrix>().values);
        let (width, out) = (matrix.rows(), Shared::<f32>::of(out));
        matrix.multiply((self.isa, &self.pool), 0..width, &x, &|m, w, y| {
            // SAFETY: each product is put once.
            let out = &mut unsafe { out.part(m * width + w, 1) }[0];
            let y = y + bias.map_or(0.0, |bias| bias[w]);
            *out = if args.store == Store::Add { *out + y } else { y };
        });
        Ok(())
    }

    fn gated_linear(&self, args: &Linear<'_>, activation: Activation, out: &Tensor) -> Result<()> {
        let x = self.input(args.x, args.norm);
        let matrix = args.weight.get::<Matrix>();
        let (width, rows) = (matrix.rows(), x.len() / matrix.cols.max(1));
        let mut both = vec![0.0; rows * width];
        let target = Shared::of_slice(&mut both);
        matrix.multiply((self.isa, &self.pool), 0..width, &x, &|m, w, y| {
            // SAFETY: each product is put once.
            unsafe { target.part(m * width + w, 1)[0] = y };
        });
        // SAFETY: as in `upload`.
        let out = unsafe { Shared::<f32>::of(out).all() };
        for (both, out) in both.chunks_exact(width).zip(out.chunks_exact_mut(width / 2)) {
            let (gate, up) = both.split_at(width / 2);
            for ((out, &g), u) in out.iter_mut().zip(gate).zip(up) {
                let y = ops::activate(activation, g) * u;
                *out = if args.store == Store::Add { *out + y } else { y };
            }
        }
        Ok(())
    }

    fn add(&self, x: &Tensor, delta: &Tensor) -> Result<()> {
        // SAFETY: as in `upload`.
        let x = unsafe { Shared::<f32>::of(x).all() };
        x.iter_mut().zip(view::<f32>(delta)).for_each(|(x, d)| *x += d);
        Ok(())
    }

    fn rope_store(&self, args: &RopeStore<'_>, qkv: &Tensor) -> Result<()> {
        ops::rope_store((self.isa, &self.pool), args, qkv);
        Ok(())
    }

    fn attention(&self, args: &Attention<'_>, qkv: &Tensor, out: &Tensor) -> Result<()> {
        attention::attention((self.isa, &self.pool), args, qkv, out);
        Ok(())
    }

    fn moe(&self, args: &Moe<'_>, out: &Tensor) -> Result<()> {
        let x = self.input(args.x, Some(args.norm));
        // SAFETY: as in `upload`; `x` is a copy.
        let out = unsafe { Shared::<f32>::of(out).all() };
        ops::moe((self.isa, &self.pool), args, &x, out);
        Ok(())
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
        sample::sample(&self.pool, args, logits);
        Ok(())
    }

    fn logprobs(&self, args: &Logprobs<'_>, logits: &Tensor) -> Result<()> {
        sample::logprobs(args, logits);
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
