//! Sampling from logits, without sorting the vocabulary: weights once, a histogram over the high
//! bits of the logits to find the border of top-k and top-p, and only the border's bin sorted.

use minisgl_tensor::{Logprobs, Sample, Tensor};

use crate::backend::Machine;
use crate::memory::{Shared, view};
use crate::pool::PerThread;
use crate::simd::{Kernel, LANES, Simd, math};

/// Weights that are summed before a draw looks inside.
const CHUNK: usize = 512;
/// Bits of a logit's key that do not choose its bin.
const BIN_SHIFT: u32 = 19;

/// What one row asks for.
struct Choice {
    temperature: f32,
    top_k: usize,
    top_p: f64,
    min_p: f32,
    uniform: f64,
}

/// A thread's buffers.
#[derive(Default)]
pub struct Scratch {
    /// `e^((logit − max) / temperature)`.
    weights: Vec<f32>,
    /// Sums of `CHUNK` weights.
    sums: Vec<f64>,
    /// By the high bits of the logits' keys: how many, and their weight.
    bins: Vec<(u32, f64)>,
    /// Ids in the border's bin, the likeliest first.
    border: Vec<u32>,
    /// Ids to draw from, ascending.
    kept: Vec<u32>,
}

/// See `Backend::sample`.
pub fn sample(on: &Machine, scratch: &PerThread<Scratch>, args: &Sample<'_>, logits: &Tensor) {
    let vocab = logits.row_len();
    let logits = view::<f32>(logits);
    let (temperature, top_k) = (view::<f32>(args.temperature), view::<i32>(args.top_k));
    let (top_p, min_p) = (view::<f32>(args.top_p), view::<f32>(args.min_p));
    let (seed, position) = (view::<i32>(args.seed), view::<i32>(args.position));
    let slots = view::<i32>(args.slots);
    let (table, tokens) = (Shared::<i32>::of(args.token_table), Shared::<i32>::of(args.tokens));
    on.pool.run(logits.len() / vocab, &|thread, row| {
        let x = &logits[row * vocab..][..vocab];
        // SAFETY: this thread's, and operations run one at a time.
        let scratch = unsafe { scratch.get(thread) };
        let max = on.isa.run(Max(x));
        let token = if args.all_greedy || temperature[row] <= 0.0 {
            first_of(x, max)
        } else {
            let key = [seed[2 * row] as u32, seed[2 * row + 1] as u32];
            let choice = Choice {
                temperature: temperature[row],
                top_k: usize::try_from(top_k[row]).unwrap_or(0),
                top_p: f64::from(top_p[row]),
                min_p: min_p[row],
                uniform: uniform(key, position[row] as u32),
            };
            on.isa.run(Weigh { x, max, temperature: choice.temperature, scratch });
            scratch.draw(x, &choice)
        };
        // SAFETY: each row has its own entry, and rows of a step have different slots.
        unsafe { tokens.part(row, 1)[0] = token as i32 };
        if let Ok(slot) = usize::try_from(slots[row]) {
            // SAFETY: as above.
            unsafe { table.part(slot, 1)[0] = token as i32 };
        }
    });
}

struct Max<'a>(&'a [f32]);

impl Kernel for Max<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> f32 {
        let mut most = [f32::NEG_INFINITY; 2 * LANES];
        let (whole, rest) = self.0.as_chunks::<{ 2 * LANES }>();
        for x in whole {
            for (most, &x) in most.iter_mut().zip(x) {
                *most = if x > *most { x } else { *most };
            }
        }
        most.into_iter().chain(rest.iter().copied()).fold(f32::NEG_INFINITY, f32::max)
    }
}

/// The lowest id with this logit.
fn first_of(x: &[f32], max: f32) -> usize {
    x.iter().position(|&x| x == max).unwrap_or(0)
}

struct Weigh<'a> {
    x: &'a [f32],
    max: f32,
    temperature: f32,
    scratch: &'a mut Scratch,
}

impl Kernel for Weigh<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Scratch { weights, sums, .. } = self.scratch;
        weights.resize(self.x.len(), 0.0);
        let factor = self.temperature.recip();
        for (w, x) in weights.iter_mut().zip(self.x) {
            *w = math::exp((x - self.max) * factor);
        }
        sums.clear();
        sums.extend(weights.chunks(CHUNK).map(|chunk| {
            let mut lanes = [0f64; 8];
            let (whole, rest) = chunk.as_chunks::<8>();
            for w in whole {
                for (lane, &w) in lanes.iter_mut().zip(w) {
                    *lane += f64::from(w);
                }
            }
            lanes.iter().sum::<f64>() + rest.iter().copied().map(f64::from).sum::<f64>()
        }));
    }
}

impl Scratch {
    fn draw(&mut self, x: &[f32], choice: &Choice) -> usize {
        let by_count = choice.top_k > 0 && choice.top_k < x.len();
        if !by_count && choice.top_p >= 1.0 && choice.min_p <= 0.0 {
            return self.draw_from_all(choice.uniform);
        }
        self.count(x);
        let mut border = self.bins.len();
        let mut total: f64 = self.bins.iter().map(|bin| bin.1).sum();
        if by_count {
            (border, total) = self.keep_top_k(x, choice.top_k);
        }
        if choice.top_p < 1.0 {
            border = self.keep_top_p(x, choice.top_p * total, border);
        }
        self.collect(x, border, choice.min_p);
        let weight = |i: u32| f64::from(self.weights[i as usize]);
        let goal = choice.uniform * self.kept.iter().map(|&i| weight(i)).sum::<f64>();
        let mut sum = 0.0;
        let found = self.kept.iter().find(|&&i| {
            sum += weight(i);
            sum > goal
        });
        found.or(self.kept.last()).map_or(0, |&i| i as usize)
    }

    fn draw_from_all(&self, uniform: f64) -> usize {
        let mut rest = uniform * self.sums.iter().sum::<f64>();
        let inside = self.sums.iter().position(|&sum| {
            let found = rest < sum;
            rest -= if found { 0.0 } else { sum };
            found
        });
        let first = inside.unwrap_or(self.sums.len() - 1) * CHUNK;
        let mut last = first;
        for (i, &w) in self.weights[first..].iter().take(CHUNK).enumerate() {
            // Rounding may leave a little behind the last one: then that one is it.
            if w > 0.0 {
                last = first + i;
                if rest < f64::from(w) {
                    break;
                }
                rest -= f64::from(w);
            }
        }
        last
    }

    /// Fills the bins, the likeliest last.
    fn count(&mut self, x: &[f32]) {
        self.bins.clear();
        self.bins.resize(1 << (32 - BIN_SHIFT), (0, 0.0));
        for (&x, &w) in x.iter().zip(&self.weights) {
            let bin = &mut self.bins[bin_of(x)];
            bin.0 += 1;
            bin.1 += f64::from(w);
        }
        self.border.clear();
    }

    /// Ids of a bin, the likeliest first.
    fn sort_bin(&mut self, x: &[f32], bin: usize) {
        self.border.clear();
        self.border.extend((0..x.len() as u32).filter(|&i| bin_of(x[i as usize]) == bin));
        self.border.sort_unstable_by(|&a, &b| likelier(x, a, b));
    }

    /// The bin of the kth and, in `border`, what of it is kept; and the weight of all that is.
    fn keep_top_k(&mut self, x: &[f32], k: usize) -> (usize, f64) {
        let (mut rest, mut mass) = (k, 0.0);
        for bin in (0..self.bins.len()).rev() {
            let (count, weight) = self.bins[bin];
            if count as usize >= rest {
                self.sort_bin(x, bin);
                self.border.truncate(rest);
                mass +=
                    self.border.iter().map(|&i| f64::from(self.weights[i as usize])).sum::<f64>();
                return (bin, mass);
            }
            rest -= count as usize;
            mass += weight;
        }
        (0, mass)
    }

    /// As `keep_top_k` for the fewest likeliest with a weight of `goal`, among those above
    /// `border` and those listed of it.
    fn keep_top_p(&mut self, x: &[f32], goal: f64, border: usize) -> usize {
        let mut sum = 0.0;
        for bin in (0..self.bins.len()).rev() {
            let (count, weight) = self.bins[bin];
            if count > 0 && (bin == border || sum + weight >= goal) {
                if bin != border {
                    self.sort_bin(x, bin);
                }
                let enough = self.border.iter().position(|&i| {
                    sum += f64::from(self.weights[i as usize]);
                    sum >= goal
                });
                self.border.truncate(enough.map_or(self.border.len(), |last| last + 1));
                return bin;
            }
            sum += weight;
        }
        0
    }

    /// Lists what is kept: above the border's bin, or in `border`.
    fn collect(&mut self, x: &[f32], border: usize, min_p: f32) {
        let all = border == self.bins.len();
        self.border.sort_unstable();
        let mut listed = self.border.iter().copied().peekable();
        self.kept.clear();
        for (i, (&x, &w)) in x.iter().zip(&self.weights).enumerate() {
            let kept = all || bin_of(x) > border || listed.next_if_eq(&(i as u32)).is_some();
            if kept && w >= min_p {
                self.kept.push(i as u32);
            }
        }
    }
}

/// Larger logits have larger keys.
fn bin_of(x: f32) -> usize {
    let bits = x.to_bits();
    let key = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    (key >> BIN_SHIFT) as usize
}

/// Likelier first, the lower id among equals.
fn likelier(x: &[f32], a: u32, b: u32) -> std::cmp::Ordering {
    x[b as usize].total_cmp(&x[a as usize]).then(a.cmp(&b))
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
pub fn logprobs(on: &Machine, args: &Logprobs<'_>, logits: &Tensor) {
    let (vocab, top) = (logits.row_len(), args.top_ids.row_len());
    let targets = view::<i32>(args.targets);
    let (out, ranks) = (Shared::<f32>::of(args.logprob), Shared::<i32>::of(args.rank));
    let (ids, values) = (Shared::<i32>::of(args.top_ids), Shared::<f32>::of(args.top_logprobs));
    let logits = view::<f32>(logits);
    on.pool.run(targets.len().min(logits.len() / vocab), &|_, row| {
        let x = &logits[row * vocab..][..vocab];
        let max = on.isa.run(Max(x));
        let sum: f64 = x.iter().map(|&v| f64::from(math::exp(v - max))).sum();
        let logprob = |i: usize| (f64::from(x[i] - max) - sum.ln()) as f32;
        let target = targets[row] as usize;
        let before = (0..vocab as u32).filter(|&i| likelier(x, i, target as u32).is_lt()).count();
        // SAFETY: each row has its own entries.
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
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Salmon et al.'s known answer for key and counter zero.
    #[test]
    fn philox_known_answer() {
        let want = f64::from(0x6627_e8d5_u32 >> 8) / f64::from(1 << 24);
        assert_eq!(uniform([0, 0], 0), want);
    }
}
