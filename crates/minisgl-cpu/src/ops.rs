//! The small operations: norms, activations, rotation and the mixture of experts' routing.

use minisgl_tensor::{Activation, Moe, Norm, RopeStore, Store, Tensor};

use crate::matrix::{Dot, Matrix};
use crate::memory::{Shared, view};
use crate::pool::Pool;
use crate::simd::Isa;

/// Norms one row in place.
pub fn norm_row(isa: Isa, x: &mut [f32], norm: &Norm) {
    let mean = isa.run(Dot(x, x)) / x.len() as f32;
    let factor = (mean + norm.eps).sqrt().recip();
    let plus = if norm.plus_one { 1.0 } else { 0.0 };
    let weight = &norm.weight.get::<Matrix>().values;
    for (x, w) in x.iter_mut().zip(weight) {
        *x = *x * factor * (w + plus);
    }
}

/// `activation(x)`.
pub fn activate(activation: Activation, x: f32) -> f32 {
    match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::GeluTanh => {
            let inner = (2.0 / std::f32::consts::PI).sqrt() * (x + 0.044_715 * x * x * x);
            0.5 * x * (1.0 + inner.tanh())
        }
    }
}

/// See `Backend::rope_store`.
pub fn rope_store((isa, pool): (Isa, &Pool), args: &RopeStore<'_>, qkv: &Tensor) {
    let (heads, dim, batch) = (args.heads, args.heads.dim, args.batch);
    let (positions, store_at) = (view::<i32>(&batch.positions), view::<i32>(&batch.store_at));
    let rope = view::<f32>(args.rope);
    let (all, k, v) =
        (Shared::<f32>::of(qkv), Shared::<f32>::of(&args.kv.k), Shared::<f32>::of(&args.kv.v));
    let width = heads.qkv_width();
    pool.run(batch.tokens, &|_, t| {
        // SAFETY: each token is its own item.
        let token = unsafe { all.part(t * width, width) };
        let (cos, sin) = rope[positions[t] as usize * dim..][..dim].split_at(dim / 2);
        for (head, x) in token[..(heads.q + heads.kv) * dim].chunks_exact_mut(dim).enumerate() {
            if let Some(norm) = if head < heads.q { args.q_norm } else { args.k_norm } {
                norm_row(isa, x, norm);
            }
            let (a, b) = x.split_at_mut(dim / 2);
            for i in 0..dim / 2 {
                (a[i], b[i]) = (a[i] * cos[i] - b[i] * sin[i], b[i] * cos[i] + a[i] * sin[i]);
            }
        }
        let Ok(at) = usize::try_from(store_at[t]) else { return };
        let (page, slot) = (at / batch.page_size, at % batch.page_size);
        for head in 0..heads.kv {
            let to = ((page * heads.kv + head) * batch.page_size + slot) * dim;
            // SAFETY: tokens of a step are stored in different slots.
            let (k, v) = unsafe { (k.part(to, dim), v.part(to, dim)) };
            k.copy_from_slice(&token[(heads.q + head) * dim..][..dim]);
            v.copy_from_slice(&token[(heads.q + heads.kv + head) * dim..][..dim]);
        }
    });
}

/// See `Backend::moe`. One token after the other: a token's sum has its experts in order of their
/// weight, whoever else is in the step.
pub fn moe((isa, pool): (Isa, &Pool), args: &Moe<'_>, x: &[f32], out: &mut [f32]) {
    let (hidden, inner) = (args.router.cols(), args.down.cols());
    let (router, gate_up) = (args.router.get::<Matrix>(), args.gate_up.get::<Matrix>());
    let down = args.down.get::<Matrix>();
    let mut both = vec![0.0; 2 * inner];
    for (x, out) in x.chunks_exact(hidden).zip(out.chunks_exact_mut(hidden)) {
        if args.store == Store::Set {
            out.fill(0.0);
        }
        let logits: Vec<f32> = (0..router.rows()).map(|e| isa.run(Dot(x, router.row(e)))).collect();
        for (expert, weight) in route(&logits, args.top_k, args.renormalize) {
            let target = Shared::of_slice(&mut both);
            let first = expert * 2 * inner;
            gate_up.multiply((isa, pool), first..first + 2 * inner, x, &|_, w, y| {
                // SAFETY: each row of the matrix is put once.
                unsafe { target.part(w - first, 1)[0] = y };
            });
            let (gate, up) = both.split_at_mut(inner);
            for (g, u) in gate.iter_mut().zip(up) {
                *g = activate(Activation::Silu, *g) * *u;
            }
            let (target, first) = (Shared::of_slice(out), expert * hidden);
            down.multiply((isa, pool), first..first + hidden, gate, &|_, w, y| {
                // SAFETY: as above.
                unsafe { target.part(w - first, 1)[0] += weight * y };
            });
        }
    }
}

/// The `top_k` most likely experts and their weights; the lower index among equals.
fn route(logits: &[f32], top_k: usize, renormalize: bool) -> Vec<(usize, f32)> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f32 = logits.iter().map(|l| (l - max).exp()).sum();
    let mut chosen: Vec<_> = logits.iter().map(|l| (l - max).exp() / total).enumerate().collect();
    chosen.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    chosen.truncate(top_k);
    if renormalize {
        let sum: f32 = chosen.iter().map(|c| c.1).sum();
        chosen.iter_mut().for_each(|c| c.1 /= sum);
    }
    chosen
}
