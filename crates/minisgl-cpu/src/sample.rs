//! Sampling from logits.

use minisgl_tensor::{Logprobs, Sample, Tensor};

use crate::memory::{Shared, view};
use crate::pool::Pool;

/// What one row asks for.
struct Choice {
    temperature: f32,
    top_k: usize,
    top_p: f64,
    min_p: f32,
    uniform: f64,
}

/// See `Backend::sample`.
pub fn sample(pool: &Pool, args: &Sample<'_>, logits: &Tensor) {
    let vocab = logits.row_len();
    let logits = view::<f32>(logits);
    let (temperature, top_k) = (view::<f32>(args.temperature), view::<i32>(args.top_k));
    let (top_p, min_p) = (view::<f32>(args.top_p), view::<f32>(args.min_p));
    let (seed, position) = (view::<i32>(args.seed), view::<i32>(args.position));
    let slots = view::<i32>(args.slots);
    let (table, tokens) = (Shared::<i32>::of(args.token_table), Shared::<i32>::of(args.tokens));
    pool.run(logits.len() / vocab, &|_, row| {
        let x = &logits[row * vocab..][..vocab];
        let token = if args.all_greedy || temperature[row] <= 0.0 {
            best(x)
        } else {
            let key = [seed[2 * row] as u32, seed[2 * row + 1] as u32];
            draw(
                x,
                &Choice {
                    temperature: temperature[row],
                    top_k: usize::try_from(top_k[row]).unwrap_or(0),
                    top_p: f64::from(top_p[row]),
                    min_p: min_p[row],
                    uniform: uniform(key, position[row] as u32),
                },
            )
        };
        // SAFETY: each row has its own entry, and rows of a step have different slots.
        unsafe { tokens.part(row, 1)[0] = token as i32 };
        if let Ok(slot) = usize::try_from(slots[row]) {
            // SAFETY: as above.
            unsafe { table.part(slot, 1)[0] = token as i32 };
        }
    });
}

/// The most likely token, the lowest id among equals.
fn best(x: &[f32]) -> usize {
    let mut best = 0;
    for (i, &value) in x.iter().enumerate() {
        if value > x[best] {
            best = i;
        }
    }
    best
}

/// Likelier first, the lower id among equals.
fn likelier(x: &[f32], a: u32, b: u32) -> std::cmp::Ordering {
    x[b as usize].total_cmp(&x[a as usize]).then(a.cmp(&b))
}

fn draw(x: &[f32], choice: &Choice) -> usize {
    let max = x[best(x)];
    let weight = |i: u32| f64::from((x[i as usize] - max) / choice.temperature).exp();
    let mut kept: Vec<u32> = (0..x.len() as u32).collect();
    if choice.top_k > 0 && choice.top_k < kept.len() {
        kept.select_nth_unstable_by(choice.top_k - 1, |&a, &b| likelier(x, a, b));
        kept.truncate(choice.top_k);
    }
    if choice.top_p < 1.0 {
        keep_top_p(&mut kept, x, choice.top_p, &weight);
    }
    if choice.min_p > 0.0 {
        kept.retain(|&i| weight(i) >= f64::from(choice.min_p));
    }
    kept.sort_unstable();
    let total: f64 = kept.iter().map(|&i| weight(i)).sum();
    let (goal, mut sum) = (choice.uniform * total, 0.0);
    for &i in &kept {
        sum += weight(i);
        if sum > goal {
            return i as usize;
        }
    }
    kept.last().map_or(0, |&i| i as usize)
}

/// The fewest most likely tokens with `top_p` of the mass. Sorts only as many as it needs.
fn keep_top_p(kept: &mut Vec<u32>, x: &[f32], top_p: f64, weight: &dyn Fn(u32) -> f64) {
    let goal = top_p * kept.iter().map(|&i| weight(i)).sum::<f64>();
    let mut sorted = 256.min(kept.len());
    loop {
        if sorted < kept.len() {
            kept.select_nth_unstable_by(sorted, |&a, &b| likelier(x, a, b));
        }
        kept[..sorted].sort_unstable_by(|&a, &b| likelier(x, a, b));
        let mut sum = 0.0;
        let enough = kept[..sorted].iter().position(|&i| {
            sum += weight(i);
            sum >= goal
        });
        if let Some(last) = enough {
            return kept.truncate(last + 1);
        }
        if sorted == kept.len() {
            return;
        }
        sorted = (4 * sorted).min(kept.len());
    }
}

/// Philox-4x32-10 (Salmon et al., 2011): key the seed, counter `(position, 0, 0, 0)`; the upper 24
/// bits of the first word.
fn uniform(mut key: [u32; 2], position: u32) -> f64 {
    let mut c = [position, 0, 0, 0];
    for _ in 0..10 {
        let a = 0xd251_1f53_u64 * u64::from(c[0]);
        let b = 0xcd9e_8d57_u64 * u64::from(c[2]);
        let high = |x: u64| (x >> 32) as u32;
        c = [high(b) ^ c[1] ^ key[0], b as u32, high(a) ^ c[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(0x9e37_79b9), key[1].wrapping_add(0xbb67_ae85)];
    }
    f64::from(c[0] >> 8) / f64::from(1 << 24)
}

/// See `Backend::logprobs`.
pub fn logprobs(args: &Logprobs<'_>, logits: &Tensor) {
    let (vocab, top) = (logits.row_len(), args.top_ids.row_len());
    let targets = view::<i32>(args.targets);
    let (out, ranks) = (Shared::<f32>::of(args.logprob), Shared::<i32>::of(args.rank));
    let (ids, values) = (Shared::<i32>::of(args.top_ids), Shared::<f32>::of(args.top_logprobs));
    for (row, x) in view::<f32>(logits).chunks_exact(vocab).enumerate().take(targets.len()) {
        let max = x[best(x)];
        let sum: f64 = x.iter().map(|&v| f64::from(v - max).exp()).sum();
        let logprob = |i: usize| (f64::from(x[i] - max) - sum.ln()) as f32;
        let target = targets[row] as usize;
        let before = (0..vocab as u32).filter(|&i| likelier(x, i, target as u32).is_lt()).count();
        // SAFETY: each row has its own entries; one thread writes.
        unsafe {
            out.part(row, 1)[0] = logprob(target);
            ranks.part(row, 1)[0] = before as i32;
        }
        let mut order: Vec<u32> = (0..vocab as u32).collect();
        if top > 0 && top < vocab {
            order.select_nth_unstable_by(top - 1, |&a, &b| likelier(x, a, b));
        }
        order.truncate(top);
        order.sort_unstable_by(|&a, &b| likelier(x, a, b));
        for (i, id) in order.into_iter().enumerate() {
            // SAFETY: as above.
            unsafe {
                ids.part(row * top + i, 1)[0] = id as i32;
                values.part(row * top + i, 1)[0] = logprob(id as usize);
            }
        }
    }
}
