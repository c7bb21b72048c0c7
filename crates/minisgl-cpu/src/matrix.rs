//! Matrices in f32, and the product with them. The order of a dot product's sum depends on its
//! length alone, so a row's result does not depend on its neighbours or on the threads.

use minisgl_tensor::{BackendError, DType, HostTensor, Result};

use crate::memory::Shared;
use crate::pool::Pool;
use crate::quant::decode_row;
use crate::simd::{Isa, Kernel, Simd};

/// Rows of a matrix that one work item multiplies with all rows of x.
const ROWS: usize = 8;

/// `[rows, cols]`, row-major.
pub struct Matrix {
    pub cols: usize,
    pub values: Vec<f32>,
}

impl Matrix {
    /// Decodes `parts`, stacked along the rows.
    pub fn decode(parts: &[HostTensor<'_>], pool: &Pool) -> Result<Self> {
        let cols = parts.first().map_or(0, |part| part.shape.last().copied().unwrap_or(1));
        let total = parts.iter().map(|part| part.shape.iter().product::<usize>()).sum();
        let mut values = vec![0.0; total];
        let mut rest = values.as_mut_slice();
        for part in parts {
            let elements = part.shape.iter().product::<usize>();
            let bytes = part.dtype.bytes_of(cols).filter(|&bytes| {
                part.shape.last() == Some(&cols)
                    && !matches!(part.dtype, DType::I32 | DType::U8)
                    && bytes.checked_mul(elements / cols.max(1)) == Some(part.data.len())
            });
            let bytes = bytes.ok_or_else(|| {
                let (name, dtype, shape) = (&part.name, part.dtype, &part.shape);
                let message = format!("{name}: {dtype} {shape:?} does not fit its matrix or bytes");
                BackendError::Unsupported(message.into())
            })?;
            let (front, behind) = rest.split_at_mut(elements);
            rest = behind;
            let out = Shared::of_slice(front);
            pool.run(elements / cols.max(1), &|_, row| {
                // SAFETY: each row is its own item.
                let out = unsafe { out.part(row * cols, cols) };
                decode_row(part.dtype, &part.data[row * bytes..][..bytes], out);
                if let Some(scale) = &part.scale {
                    let across = cols.div_ceil(scale.block[1]);
                    let scales = &scale.values[row / scale.block[0] * across..][..across];
                    for (x, s) in out.chunks_mut(scale.block[1]).zip(scales) {
                        x.iter_mut().for_each(|x| *x *= s);
                    }
                }
            });
        }
        Ok(Self { cols, values })
    }

    /// Row `index`.
    pub fn row(&self, index: usize) -> &[f32] {
        &self.values[index * self.cols..][..self.cols]
    }

    /// Rows in it.
    pub fn rows(&self) -> usize {
        self.values.len() / self.cols.max(1)
    }

    /// Calls `put(x's row, w's row, x · w)` for rows `w` of the matrix and all of `x [n, cols]`.
    pub fn multiply(
        &self,
        (isa, pool): (Isa, &Pool),
        rows: std::ops::Range<usize>,
        x: &[f32],
        put: &(dyn Fn(usize, usize, f32) + Sync),
    ) {
        pool.run(rows.len().div_ceil(ROWS), &|_, item| {
            let first = rows.start + item * ROWS;
            let last = (first + ROWS).min(rows.end);
            for (m, x) in x.chunks_exact(self.cols).enumerate() {
                for w in first..last {
                    put(m, w, isa.run(Dot(x, self.row(w))));
                }
            }
        });
    }
}

/// The dot product of two slices of one length.
pub struct Dot<'a>(pub &'a [f32], pub &'a [f32]);

impl Kernel for Dot<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let ((a, a_rest), (b, b_rest)) = (s.split(self.0), s.split(self.1));
        let mut sums = [s.splat(0.0); 4];
        let (a4, a) = a.as_chunks::<4>();
        let (b4, b) = b.as_chunks::<4>();
        for (a, b) in a4.iter().zip(b4) {
            for i in 0..4 {
                sums[i] = s.fma(s.load(&a[i]), s.load(&b[i]), sums[i]);
            }
        }
        for (a, b) in a.iter().zip(b) {
            sums[0] = s.fma(s.load(a), s.load(b), sums[0]);
        }
        if !a_rest.is_empty() {
            sums[1] = s.fma(s.load_front(a_rest), s.load_front(b_rest), sums[1]);
        }
        s.sum(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])))
    }
}
