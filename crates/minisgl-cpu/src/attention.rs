//! Attention over pages, one query head of one token an item.

use minisgl_tensor::{Attention, Tensor};

use crate::matrix::Dot;
use crate::memory::{Shared, view};
use crate::pool::Pool;
use crate::simd::Isa;

/// See `Backend::attention`.
pub fn attention((isa, pool): (Isa, &Pool), args: &Attention<'_>, qkv: &Tensor, out: &Tensor) {
    let (heads, dim, batch) = (args.heads, args.heads.dim, args.batch);
    let (starts, lens) = (view::<i32>(&batch.query_start), view::<i32>(&batch.kv_len));
    let (slots, table) = (view::<i32>(&batch.slots), view::<i32>(&batch.page_table));
    let (q, k, v) = (view::<f32>(qkv), view::<f32>(&args.kv.k), view::<f32>(&args.kv.v));
    let (out, across) = (Shared::<f32>::of(out), batch.page_table.dim(1));
    for row in (0..batch.rows).filter(|&row| lens[row] > 0) {
        let (first_token, end) = (starts[row] as usize, starts[row + 1] as usize);
        let pages = &table[slots[row] as usize * across..][..across];
        let base = lens[row] as usize - (end - first_token);
        pool.run((end - first_token) * heads.q, &|_, item| {
            let (t, head) = (item / heads.q, item % heads.q);
            let (last, kv_head) = (base + t, head / (heads.q / heads.kv));
            let first = args.window.map_or(0, |window| (last + 1).saturating_sub(window));
            let token = first_token + t;
            let query = &q[token * heads.qkv_width() + head * dim..][..dim];
            let at = |position: usize| {
                let page = pages[position / batch.page_size] as usize;
                let slot = position % batch.page_size;
                ((page * heads.kv + kv_head) * batch.page_size + slot) * dim
            };
            let mut scores: Vec<f32> = (first..=last)
                .map(|position| {
                    let score = isa.run(Dot(query, &k[at(position)..][..dim])) * args.scale;
                    args.soft_cap.map_or(score, |cap| cap * (score / cap).tanh())
                })
                .collect();
            let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let mut total = 0.0;
            for score in &mut scores {
                *score = (*score - max).exp();
                total += *score;
            }
            // SAFETY: each head of each token is its own item.
            let out = unsafe { out.part((token * heads.q + head) * dim, dim) };
            out.fill(0.0);
            for (position, score) in (first..=last).zip(scores) {
                for (out, v) in out.iter_mut().zip(&v[at(position)..][..dim]) {
                    *out += score * v;
                }
            }
            out.iter_mut().for_each(|out| *out /= total);
        });
    }
}
