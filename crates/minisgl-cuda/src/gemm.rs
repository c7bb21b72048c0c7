//! Matrix products of many rows: cuBLASLt, with the algorithm picked by measurement per shape.

use std::sync::{Arc, Mutex};

use cudarc::cublaslt::{result as lt, sys};
use cudarc::driver::sys::CUstream;
use minisgl_tensor::{BackendError, DType, Memory, Result, Tensor};

use crate::device::{Device, DeviceMemory, fail};
use crate::tuning::{Algorithms, Shape, Stopwatch};

const WORKSPACE: usize = 64 << 20;
const CANDIDATES: usize = 24;

/// One product `out[m, n] = beta · out + x[m, k] · w[n, k]ᵀ`.
pub(crate) struct Product<'a> {
    pub(crate) x: u64,
    pub(crate) w: &'a Tensor,
    pub(crate) out: u64,
    pub(crate) rows: usize,
    pub(crate) out_dtype: DType,
    pub(crate) add: bool,
}

pub(crate) struct Gemm {
    device: Arc<Device>,
    handle: sys::cublasLtHandle_t,
    workspace: Arc<DeviceMemory>,
    algorithms: Algorithms,
    /// Made when there is something to time.
    stopwatch: Mutex<Option<Stopwatch>>,
}

// SAFETY: cuBLASLt handles may be shared between threads.
unsafe impl Send for Gemm {}
// SAFETY: as above.
unsafe impl Sync for Gemm {}

impl Gemm {
    pub(crate) fn new(device: &Arc<Device>) -> Result<Self> {
        // SAFETY: only opens the library.
        if !unsafe { sys::is_culib_present() } {
            return Err(fail(
                "cuBLASLt was not found: libcublasLt.so.13 or .12 is not on the loader's path; \
                 install it (`pip install nvidia-cublas`) and add its folder to LD_LIBRARY_PATH",
            ));
        }
        device.bind()?;
        Ok(Self {
            device: Arc::clone(device),
            handle: lt::create_handle().map_err(|e| fail(format!("cublasLtCreate: {e}")))?,
            workspace: device.alloc(WORKSPACE)?,
            // SAFETY: asks for a number.
            algorithms: Algorithms::open(&device.name, unsafe { sys::cublasLtGetVersion() }),
            stopwatch: Mutex::default(),
        })
    }

    pub(crate) fn run(&self, product: &Product<'_>) -> Result<()> {
        self.device.bind()?;
        let shape = Shape {
            m: bucket(product.rows),
            n: product.w.shape()[product.w.shape().len() - 2],
            k: product.w.row_len(),
            out_f32: product.out_dtype == DType::F32,
            add: product.add,
            exact: product.w.dtype() == DType::F32,
        };
        let plan = Plan::new(product, shape)?;
        let algorithm = match self.algorithms.get(shape) {
            Some(algorithm) if self.fits(&plan, &algorithm) => algorithm,
            // Timing takes memory, which the driver may give only when the other ranks' cards rest, and
            // they may be waiting for this one. Where a graph is recorded, nothing runs.
            _ if self.device.group.get().is_some() && !self.device.is_capturing()? => {
                self.first_candidate(&plan)?
            }
            _ => match self.choose(&plan, product, shape) {
                Ok(algorithm) => {
                    self.algorithms.insert(shape, algorithm);
                    algorithm
                }
                // What is left beside the KV pool may not do for timing.
                Err(BackendError::OutOfMemory { .. }) => self.first_candidate(&plan)?,
                Err(error) => return Err(error),
            },
        };
        self.enqueue(
            &plan,
            product,
            product.out,
            (&algorithm, self.workspace.address(), self.device.stream),
        )
    }

    /// Times the heuristic's candidates with as many rows as the choice is for, on a stream, a workspace and
    /// into an output of their own.
    fn choose(
        &self,
        asked: &Plan,
        product: &Product<'_>,
        shape: Shape,
    ) -> Result<sys::cublasLtMatmulAlgo_t> {
        let x = match product.rows == shape.m {
            true => None,
            false => Some(self.device.alloc(shape.m * shape.k * product.w.dtype().block_bytes())?),
        };
        let x_address = x.as_ref().map_or(product.x, |x| x.address());
        let product = &Product { x: x_address, rows: shape.m, ..*product };
        let plan = &Plan::new(product, shape)?;
        let mut candidates = self.candidates(plan)?;
        candidates.retain(|candidate| self.fits(asked, candidate));
        if candidates.is_empty() {
            candidates = self.candidates(asked)?;
        }
        let mut stopwatch = self.stopwatch.lock().map_err(|_| fail("the stopwatch is poisoned"))?;
        if stopwatch.is_none() {
            *stopwatch = Some(Stopwatch::new(&self.device)?);
        }
        let stopwatch = stopwatch.as_ref().ok_or_else(|| fail("a stopwatch was just made"))?;
        let bytes = product.rows * plan.n * product.out_dtype.block_bytes();
        let (out, workspace) = (self.device.alloc(bytes)?, self.device.alloc(WORKSPACE)?);
        let mut best = None;
        // Twice the first candidate: what an idle card is timed at is too long.
        for algorithm in candidates.first().into_iter().chain(&candidates) {
            let time = stopwatch.time(|stream| {
                self.enqueue(plan, product, out.address(), (algorithm, workspace.address(), stream))
            });
            if let Ok(time) = time
                && best.is_none_or(|(least, _)| time < least)
            {
                best = Some((time, *algorithm));
            }
        }
        best.map(|(_, algorithm)| algorithm)
            .ok_or_else(|| fail("cuBLASLt has no algorithm for this shape"))
    }

    /// What the heuristic would take.
    fn first_candidate(&self, plan: &Plan) -> Result<sys::cublasLtMatmulAlgo_t> {
        let candidates = self.candidates(plan)?;
        candidates.first().copied().ok_or_else(|| fail("cuBLASLt has no algorithm for this shape"))
    }

    fn candidates(&self, plan: &Plan) -> Result<Vec<sys::cublasLtMatmulAlgo_t>> {
        let preference = lt::create_matmul_pref()
            .map_err(|e| fail(format!("cublasLtMatmulPreferenceCreate: {e}")))?;
        let bytes = WORKSPACE;
        // SAFETY: an all-zero result is a valid value of this plain struct.
        let mut found: [sys::cublasLtMatmulHeuristicResult_t; CANDIDATES] =
            unsafe { std::mem::zeroed() };
        let mut count = 0;
        // SAFETY: descriptors live in `plan`; the buffer has CANDIDATES entries.
        let outcome =
            unsafe {
                lt::set_matmul_pref_attribute(
                preference,
                sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const bytes).cast(),
                size_of::<usize>(),
            )
            .and_then(|()| {
                sys::cublasLtMatmulAlgoGetHeuristic(
                    self.handle, plan.operation, plan.w, plan.x, plan.out, plan.out, preference,
                    CANDIDATES as i32, found.as_mut_ptr(), &raw mut count,
                )
                .result()
            })
            };
        // SAFETY: made above.
        let _ = unsafe { lt::destroy_matmul_pref(preference) };
        outcome.map_err(|e| fail(format!("cublasLtMatmulAlgoGetHeuristic: {e}")))?;
        Ok(found[..count as usize].iter().map(|f| f.algo).collect())
    }

    fn fits(&self, plan: &Plan, algorithm: &sys::cublasLtMatmulAlgo_t) -> bool {
        // SAFETY: as in `candidates`.
        unsafe {
            let mut result: sys::cublasLtMatmulHeuristicResult_t = std::mem::zeroed();
            sys::cublasLtMatmulAlgoCheck(
                self.handle,
                plan.operation,
                plan.w,
                plan.x,
                plan.out,
                plan.out,
                algorithm,
                &raw mut result,
            )
            .result()
            .is_ok()
                && result.workspaceSize <= WORKSPACE
        }
    }

    fn enqueue(
        &self,
        plan: &Plan,
        product: &Product<'_>,
        out: u64,
        (algorithm, workspace, stream): (&sys::cublasLtMatmulAlgo_t, u64, CUstream),
    ) -> Result<()> {
        let (alpha, beta) = (1f32, f32::from(u8::from(product.add)));
        // SAFETY: addresses and layouts describe memory that the caller holds.
        unsafe {
            lt::matmul(
                self.handle,
                plan.operation,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                product.w.address() as *const _,
                plan.w,
                product.x as *const _,
                plan.x,
                out as *const _,
                plan.out,
                out as *mut _,
                plan.out,
                algorithm,
                workspace as *mut _,
                WORKSPACE,
                stream.cast(),
            )
        }
        .map_err(|e| {
            fail(format!(
                "cublasLtMatmul of {}×{}×{}: {e}",
                product.rows,
                plan.n,
                product.w.row_len()
            ))
        })
    }
}

impl Drop for Gemm {
    fn drop(&mut self) {
        // SAFETY: nobody else holds the handle.
        let _ = unsafe { lt::destroy_handle(self.handle) };
    }
}

/// Rows are rounded up to a size that stands for them when an algorithm is picked: up to 256 to one of decode
/// graphs', beyond to a power of two or three quarters of it, as prompts are rehearsed.
fn bucket(rows: usize) -> usize {
    match rows {
        0..=64 => rows.next_multiple_of(16),
        65..=256 => rows.next_multiple_of(32),
        _ => {
            let power = rows.next_power_of_two();
            if rows <= power / 4 * 3 { power / 4 * 3 } else { power }
        }
    }
}

/// cuBLASLt's descriptors. It thinks in columns: `outᵀ[n, m] = w[n, k] · xᵀ[k, m]`.
struct Plan {
    operation: sys::cublasLtMatmulDesc_t,
    w: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    n: usize,
}

impl Plan {
    fn new(product: &Product<'_>, shape: Shape) -> Result<Self> {
        let kind = |dtype| match dtype {
            DType::F32 => sys::cudaDataType_t::CUDA_R_32F,
            _ => sys::cudaDataType_t::CUDA_R_16BF,
        };
        let layout = |dtype, rows: usize, cols: usize| {
            lt::create_matrix_layout(kind(dtype), rows as u64, cols as u64, rows as i64)
                .map_err(|e| fail(format!("cublasLtMatrixLayoutCreate: {e}")))
        };
        let operation = lt::create_matmul_desc(
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cudaDataType_t::CUDA_R_32F,
        )
        .map_err(|e| fail(format!("cublasLtMatmulDescCreate: {e}")))?;
        let transpose = 1i32;
        // SAFETY: the attribute is one i32: CUBLAS_OP_T.
        unsafe {
            lt::set_matmul_desc_attribute(
                operation,
                sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA,
                (&raw const transpose).cast(),
                size_of::<i32>(),
            )
        }
        .map_err(|e| fail(format!("cublasLtMatmulDescSetAttribute: {e}")))?;
        let dtype = product.w.dtype();
        Ok(Self {
            operation,
            w: layout(dtype, shape.k, shape.n)?,
            x: layout(dtype, shape.k, product.rows)?,
            out: layout(product.out_dtype, shape.n, product.rows)?,
            n: shape.n,
        })
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once.
        unsafe {
            let _ = lt::destroy_matrix_layout(self.w);
            let _ = lt::destroy_matrix_layout(self.x);
            let _ = lt::destroy_matrix_layout(self.out);
            let _ = lt::destroy_matmul_desc(self.operation);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_sizes_stand_for_all() {
        let of = [1, 16, 65, 208, 257, 384, 385, 416, 513, 768, 769, 5000, 6145, 8192];
        let stand = [16, 16, 96, 224, 384, 384, 512, 512, 768, 768, 1024, 6144, 8192, 8192];
        assert_eq!(of.map(bucket), stand);
    }
}
