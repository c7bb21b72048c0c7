//! What this machine can do at best: bytes read from memory, and products a second. A kernel's
//! share of these is how good it is.

use std::hint::black_box;
use std::time::{Duration, Instant};

use minisgl_tensor::{BackendError, Result};

use crate::pool::Pool;

/// Bytes that a thread takes at a time: as much as its second-level cache holds a part of.
const CHUNK: usize = 256 << 10;
/// How long each figure is measured; the best of the passes in this time counts.
const MEASURED: Duration = Duration::from_millis(600);
/// Passes of the inner loop of a product in one item of work.
const PASSES: usize = 20_000;
/// Sums that run beside each other, so that a sum's latency hides behind the others.
const SUMS: usize = 12;

/// Reads an array of so many bytes on all threads, again and again. Bytes a second, the best
/// pass's.
///
/// # Errors
/// If the threads cannot be had.
pub fn read_rate(threads: usize, bytes: usize) -> Result<f64> {
    let pool = pool(threads)?;
    let words = vec![1u64; bytes / 8];
    let chunks: Vec<&[u64]> = words.chunks(CHUNK / 8).collect();
    let sum = reader();
    Ok(best_rate(bytes as f64, || {
        pool.run(chunks.len(), &|_, chunk| {
            black_box(sum(chunks[chunk]));
        });
    }))
}

/// An instruction that multiplies and adds, and how many operations a second all threads do with
/// it: two for each product.
#[derive(Clone, Copy, Debug)]
pub struct ProductRate {
    /// Of the numbers that are multiplied.
    pub dtype: &'static str,
    /// Instruction set and instruction.
    pub instruction: &'static str,
    /// Multiplications and additions a second.
    pub ops_per_s: f64,
}

/// The products that this machine has instructions for: f32 always.
///
/// # Errors
/// If the threads cannot be had.
pub fn product_rates(threads: usize) -> Result<Vec<ProductRate>> {
    let pool = pool(threads)?;
    let items = 8 * pool.threads();
    let rates = products().into_iter().map(|Product { dtype, instruction, lane_products, run }| {
        let ops = 2.0 * (items * PASSES * SUMS * lane_products) as f64;
        let ops_per_s = best_rate(ops, || pool.run(items, &|_, _| run()));
        ProductRate { dtype, instruction, ops_per_s }
    });
    Ok(rates.collect())
}

fn pool(threads: usize) -> Result<Pool> {
    Pool::new(threads, &[]).map_err(|error| {
        BackendError::Device(format!("starting {threads} threads: {error}").into())
    })
}

fn best_rate(work: f64, mut pass: impl FnMut()) -> f64 {
    let until = Instant::now() + MEASURED;
    let mut best = f64::MAX;
    while Instant::now() < until {
        let started = Instant::now();
        pass();
        best = best.min(started.elapsed().as_secs_f64());
    }
    work / best
}

/// Makes sums of words with the widest loads there are.
fn reader() -> fn(&[u64]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            return x86::sum_avx512;
        }
        if is_x86_feature_detected!("avx2") {
            return x86::sum_avx2;
        }
    }
    sum
}

#[inline(always)]
fn sum(words: &[u64]) -> u64 {
    let mut sums = [0u64; 64];
    let (rows, _) = words.as_chunks::<64>();
    for row in rows {
        for (sum, word) in sums.iter_mut().zip(row) {
            *sum ^= word;
        }
    }
    sums.iter().fold(0, |all, sum| all ^ sum)
}

struct Product {
    dtype: &'static str,
    instruction: &'static str,
    /// Products that one instruction makes.
    lane_products: usize,
    /// `PASSES` times `SUMS` instructions.
    run: fn(),
}

fn products() -> Vec<Product> {
    #[cfg(target_arch = "x86_64")]
    let found = x86::products();
    #[cfg(not(target_arch = "x86_64"))]
    let found = Vec::new();
    if found.is_empty() { vec![portable()] } else { found }
}

fn portable() -> Product {
    fn run() {
        let x = black_box([1.0f32; 4]);
        let mut sums = [[0.0f32; 4]; SUMS];
        for _ in 0..PASSES {
            for sum in &mut sums {
                for (sum, x) in sum.iter_mut().zip(x) {
                    *sum += x * x;
                }
            }
        }
        black_box(sums);
    }
    Product { dtype: "f32", instruction: "portable", lane_products: 4, run }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;
    use std::arch::x86_64::*;
    use std::hint::black_box;

    use super::{PASSES, Product, SUMS};
    use crate::kernels::PANEL;
    use crate::simd::{Amx, MatrixUnit, Products};

    pub fn sum_avx2(words: &[u64]) -> u64 {
        #[target_feature(enable = "avx2")]
        fn with_features(words: &[u64]) -> u64 {
            super::sum(words)
        }
        // SAFETY: `reader` hands this function out only where the processor has AVX2.
        unsafe { with_features(words) }
    }

    pub fn sum_avx512(words: &[u64]) -> u64 {
        #[target_feature(enable = "avx512f")]
        fn with_features(words: &[u64]) -> u64 {
            super::sum(words)
        }
        // SAFETY: `reader` hands this function out only where the processor has AVX-512.
        unsafe { with_features(words) }
    }

    /// A function that does nothing but `SUMS` independent chains of one instruction.
    macro_rules! chains {
        ($features:literal, $zero:expr, $x:expr, |$sum:ident, $with:ident| $step:expr) => {{
            #[target_feature(enable = $features)]
            fn with_features() {
                let $with = black_box($x);
                let mut sums = [$zero; SUMS];
                for _ in 0..PASSES {
                    let mut i = 0;
                    while i < SUMS {
                        let $sum = sums[i];
                        sums[i] = $step;
                        i += 1;
                    }
                }
                black_box(sums);
            }
            // SAFETY: `products` takes this function only where the processor has its features.
            || unsafe { with_features() }
        }};
    }

    /// As `chains` for a product of whole tiles; these need no second chain.
    macro_rules! tiles {
        ($instruction:literal) => {
            || {
                let Some(unit) = Amx::detect() else { return };
                unit.begin(Products::Pairs { rows: PANEL });
                for _ in 0..PASSES * SUMS {
                    // SAFETY: `unit` proves the instruction, which works on registers alone;
                    // `begin` has made all three whole.
                    unsafe { asm!($instruction, out("tmm0") _, options(nomem, nostack)) };
                }
            }
        };
    }

    pub fn products() -> Vec<Product> {
        let mut found = Vec::new();
        let mut add = |dtype, instruction, lane_products, run| {
            found.push(Product { dtype, instruction, lane_products, run });
        };
        if is_x86_feature_detected!("avx512f") {
            let run = chains!("avx512f", _mm512_set1_ps(0.0), _mm512_set1_ps(1.0), |sum, x| {
                _mm512_fmadd_ps(x, x, sum)
            });
            add("f32", "AVX-512 vfmadd231ps", 16, run);
        } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            let run = chains!("avx2,fma", _mm256_set1_ps(0.0), _mm256_set1_ps(1.0), |sum, x| {
                _mm256_fmadd_ps(x, x, sum)
            });
            add("f32", "AVX2 vfmadd231ps", 8, run);
        }
        if is_x86_feature_detected!("avx512bf16") {
            let run = chains!(
                "avx512bf16,avx512f",
                _mm512_set1_ps(0.0),
                _mm512_cvtne2ps_pbh(_mm512_set1_ps(1.0), _mm512_set1_ps(1.0)),
                |sum, x| _mm512_dpbf16_ps(sum, x, x)
            );
            add("bf16", "AVX-512 vdpbf16ps", 32, run);
        }
        if Amx::detect().is_some() {
            add("bf16", "AMX tdpbf16ps", 16 * 16 * 32, tiles!("tdpbf16ps tmm0, tmm1, tmm2"));
            add("int8", "AMX tdpbssd", 16 * 16 * 64, tiles!("tdpbssd tmm0, tmm1, tmm2"));
        }
        if is_x86_feature_detected!("avx512vnni") {
            let run = chains!(
                "avx512vnni,avx512f",
                _mm512_set1_epi32(0),
                _mm512_set1_epi32(0x0101_0101),
                |sum, x| _mm512_dpbusd_epi32(sum, x, x)
            );
            add("int8", "AVX-512 vpdpbusd", 64, run);
        } else if is_x86_feature_detected!("avxvnni") {
            let run = chains!(
                "avxvnni",
                _mm256_set1_epi32(0),
                _mm256_set1_epi32(0x0101_0101),
                |sum, x| _mm256_dpbusd_avx_epi32(sum, x, x)
            );
            add("int8", "AVX-VNNI vpdpbusd", 32, run);
        } else if is_x86_feature_detected!("avx2") {
            // The sum goes into the product, so that no product can be taken out of the loop.
            let run = chains!(
                "avx2",
                _mm256_set1_epi32(0),
                (_mm256_set1_epi8(1), _mm256_set1_epi16(1)),
                |sum, x| {
                    let pairs = _mm256_maddubs_epi16(_mm256_xor_si256(sum, x.0), x.0);
                    _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, x.1))
                }
            );
            add("int8", "AVX2 vpmaddubsw, vpmaddwd", 32, run);
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_reads_every_word() {
        let mut words = vec![0u64; 64 * 9];
        for at in [0, 63, 64, 64 * 9 - 1] {
            words[at] = 1 << (at % 64);
            assert_eq!(reader()(&words), words[at], "word {at}");
            words[at] = 0;
        }
    }
}
