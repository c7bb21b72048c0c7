//! Norm and rotation of Q and K, and the write of K and V into their pages.

use half::f16;
use half::slice::HalfFloatSliceExt;
use minisgl_tensor::{DType, RopeStore, Tensor};

use crate::activations::NormRow;
use crate::backend::Machine;
use crate::memory::{Shared, view};
use crate::simd::{Kernel, Simd};

/// See `Backend::rope_store`.
pub fn rope_store(on: &Machine, args: &RopeStore<'_>, qkv: &Tensor) {
    let (heads, dim, batch) = (args.heads, args.heads.dim, args.batch);
    let (positions, store_at) = (view::<i32>(&batch.positions), view::<i32>(&batch.store_at));
    let rope = view::<f32>(args.rope);
    let all = Shared::<f32>::of(qkv);
    let pages = match args.kv.k.dtype() {
        DType::F16 => Pages::F16(Shared::of(&args.kv.k), Shared::of(&args.kv.v)),
        _ => Pages::F32(Shared::of(&args.kv.k), Shared::of(&args.kv.v)),
    };
    let width = heads.qkv_width();
    on.pool.run(batch.tokens, &|_, t| {
        // SAFETY: each token is its own item.
        let token = unsafe { all.part(t * width, width) };
        let rope = &rope[positions[t] as usize * dim..][..dim];
        on.isa.run(Rotate { args, token, rope });
        let Ok(at) = usize::try_from(store_at[t]) else { return };
        let (page, slot) = (at / batch.page_size, at % batch.page_size);
        let (keys, values) = token[heads.q * dim..].split_at(heads.kv * dim);
        for head in 0..heads.kv {
            let to = ((page * heads.kv + head) * batch.page_size + slot) * dim;
            pages.store(to, &keys[head * dim..][..dim], &values[head * dim..][..dim]);
        }
    });
}

/// Norms and rotates a token's Q and K.
struct Rotate<'a> {
    args: &'a RopeStore<'a>,
    token: &'a mut [f32],
    rope: &'a [f32],
}

impl Kernel for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (heads, dim) = (self.args.heads, self.args.heads.dim);
        let (cos, sin) = self.rope.split_at(dim / 2);
        let both = &mut self.token[..(heads.q + heads.kv) * dim];
        for (head, x) in both.chunks_exact_mut(dim).enumerate() {
            let norm = if head < heads.q { self.args.q_norm } else { self.args.k_norm };
            if let Some(norm) = norm {
                NormRow { x, norm }.run(s);
            }
            let (a, b) = x.split_at_mut(dim / 2);
            for (((a, b), cos), sin) in a.iter_mut().zip(b).zip(cos).zip(sin) {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
}

enum Pages<'a> {
    F32(Shared<'a, f32>, Shared<'a, f32>),
    F16(Shared<'a, f16>, Shared<'a, f16>),
}

impl Pages<'_> {
    fn store(&self, at: usize, key: &[f32], value: &[f32]) {
        // SAFETY: tokens of a step are stored in different slots, by one thread each.
        unsafe {
            match self {
                Self::F32(k, v) => {
                    k.part(at, key.len()).copy_from_slice(key);
                    v.part(at, key.len()).copy_from_slice(value);
                }
                Self::F16(k, v) => {
                    k.part(at, key.len()).convert_from_f32_slice(key);
                    v.part(at, key.len()).convert_from_f32_slice(value);
                }
            }
        }
    }
}
