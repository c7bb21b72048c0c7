//! Norm and rotation of Q and K, and the write of K and V into their pages.

use half::f16;
use half::slice::HalfFloatSliceExt;
use minisgl_tensor::{DType, RopeStore, Tensor};

use crate::activations::NormRow;
use crate::backend::Machine;
use crate::memory::{Shared, view};

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
        let (cos, sin) = rope[positions[t] as usize * dim..][..dim].split_at(dim / 2);
        for (head, x) in token[..(heads.q + heads.kv) * dim].chunks_exact_mut(dim).enumerate() {
            if let Some(norm) = if head < heads.q { args.q_norm } else { args.k_norm } {
                on.isa.run(NormRow { x, norm });
            }
            let (a, b) = x.split_at_mut(dim / 2);
            for (((a, b), cos), sin) in a.iter_mut().zip(b).zip(cos).zip(sin) {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
        let Ok(at) = usize::try_from(store_at[t]) else { return };
        let (page, slot) = (at / batch.page_size, at % batch.page_size);
        let (keys, values) = token[heads.q * dim..].split_at(heads.kv * dim);
        for head in 0..heads.kv {
            let to = ((page * heads.kv + head) * batch.page_size + slot) * dim;
            pages.store(to, &keys[head * dim..][..dim], &values[head * dim..][..dim]);
        }
    });
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
