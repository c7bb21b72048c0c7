//! Which of cuBLASLt's algorithms is fastest for a shape, remembered on disk beside the cubins.

use std::collections::HashMap;
use std::io::Write;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use cudarc::cublaslt::sys::cublasLtMatmulAlgo_t;
use cudarc::driver::{result, sys};
use minisgl_tensor::{Memory, Result};

use crate::device::{Device, DeviceMemory, driver, fail};
use crate::kernels::cache_dir;

/// What an algorithm is picked for: `out[m, n] (+)= x[m, k] · w[n, k]ᵀ`, m rounded up.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Shape {
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) out_f32: bool,
    pub(crate) add: bool,
    pub(crate) exact: bool,
}

/// Changes when what was found before shall be found anew.
const FORM: usize = 2;

/// The fastest algorithms so far.
pub(crate) struct Algorithms {
    known: Mutex<HashMap<Shape, cublasLtMatmulAlgo_t>>,
    /// A line a shape. None where there is no folder for it.
    file: Option<PathBuf>,
}

impl Algorithms {
    /// Those that earlier processes found on the same card with the same library.
    pub(crate) fn open(card: &str, library: usize) -> Self {
        let card: String =
            card.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        let file = cache_dir().map(|dir| dir.join(format!("cublaslt-{FORM}-{library}-{card}.txt")));
        let text = file.as_ref().and_then(|file| std::fs::read_to_string(file).ok());
        let known = text.iter().flat_map(|text| text.lines()).filter_map(parse).collect();
        Self { known: Mutex::new(known), file }
    }

    pub(crate) fn get(&self, shape: Shape) -> Option<cublasLtMatmulAlgo_t> {
        self.known.lock().ok()?.get(&shape).copied()
    }

    pub(crate) fn insert(&self, shape: Shape, algorithm: cublasLtMatmulAlgo_t) {
        if let Ok(mut known) = self.known.lock() {
            known.insert(shape, algorithm);
        }
        let Some(file) = &self.file else { return };
        // Lines are short, so that processes which append at once do not mix them.
        let written = file.parent().map_or(Ok(()), std::fs::create_dir_all).and_then(|()| {
            let mut file = std::fs::OpenOptions::new().create(true).append(true).open(file)?;
            file.write_all(line(shape, &algorithm).as_bytes())
        });
        if let Err(error) = written {
            tracing::warn!(path = %file.display(), %error, "an algorithm could not be kept");
        }
    }
}

fn line(s: Shape, algorithm: &cublasLtMatmulAlgo_t) -> String {
    let flags = [s.out_f32, s.add, s.exact].map(usize::from);
    let mut words = vec![s.m as u64, s.n as u64, s.k as u64];
    words.extend(flags.map(|flag| flag as u64));
    words.extend(algorithm.data);
    words.iter().map(|word| format!("{word:x}")).collect::<Vec<_>>().join(" ") + "\n"
}

/// A damaged line is a shape that will be measured again.
fn parse(line: &str) -> Option<(Shape, cublasLtMatmulAlgo_t)> {
    let words: Vec<u64> =
        line.split(' ').map(|word| u64::from_str_radix(word, 16)).collect::<Result<_, _>>().ok()?;
    let [m, n, k, out_f32, add, exact, data @ ..] = words.as_slice() else { return None };
    let [m, n, k] = [*m, *n, *k].map(|x| x as usize);
    let [out_f32, add, exact] = [*out_f32, *add, *exact].map(|x| x == 1);
    let data = data.try_into().ok()?;
    Some((Shape { m, n, k, out_f32, add, exact }, cublasLtMatmulAlgo_t { data }))
}

/// Times device work on a stream of its own, also while the card's main stream is captured.
pub(crate) struct Stopwatch {
    device: Arc<Device>,
    pub(crate) stream: sys::CUstream,
    start: sys::CUevent,
    end: sys::CUevent,
    /// Larger than the L2 cache: writing it leaves nothing else in there, as in a step, which
    /// reads each weight once.
    flush: Arc<DeviceMemory>,
}

impl Stopwatch {
    const FLUSH_BYTES: usize = 128 << 20;
    const RUNS: usize = 7;
    const LONG_MS: f32 = 1.0;

    pub(crate) fn new(device: &Arc<Device>) -> Result<Self> {
        let event = || {
            result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT)
                .map_err(|e| driver("cuEventCreate", e))
        };
        let flush = device.alloc(Self::FLUSH_BYTES)?;
        Ok(Self {
            stream: result::stream::create(result::stream::StreamKind::NonBlocking)
                .map_err(|e| driver("cuStreamCreate", e))?,
            start: event()?,
            end: event()?,
            device: Arc::clone(device),
            flush,
        })
    }

    /// The median of some times of `enqueue`, in milliseconds, each from memory and not the cache.
    pub(crate) fn time(&self, mut enqueue: impl FnMut(sys::CUstream) -> Result<()>) -> Result<f32> {
        let mut times = Vec::with_capacity(Self::RUNS);
        // Of what takes long, three times say as much.
        while times.len() < Self::RUNS && !(times.len() == 3 && times[0] > Self::LONG_MS) {
            // SAFETY: stream, events and memory live as long as `self`.
            times.push(unsafe {
                result::memset_d8_async(self.flush.address(), 0, self.flush.bytes(), self.stream)
                    .map_err(|e| driver("cuMemsetD8Async", e))?;
                result::event::record(self.start, self.stream)
                    .map_err(|e| driver("cuEventRecord", e))?;
                enqueue(self.stream)?;
                result::event::record(self.end, self.stream)
                    .map_err(|e| driver("cuEventRecord", e))?;
                result::event::synchronize(self.end)
                    .map_err(|e| driver("cuEventSynchronize", e))?;
                result::event::elapsed(self.start, self.end)
                    .map_err(|e| driver("cuEventElapsedTime", e))?
            });
        }
        times.sort_by(f32::total_cmp);
        times.get(times.len() / 2).copied().ok_or_else(|| fail("no times have no median"))
    }
}

impl Drop for Stopwatch {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: made by `new`; every use was waited for.
            unsafe {
                let _ = result::event::destroy(self.start);
                let _ = result::event::destroy(self.end);
                let _ = result::stream::destroy(self.stream);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_keep_algorithms_and_damage_is_left_out() {
        let shape = Shape { m: 16, n: 4096, k: 1024, out_f32: false, add: true, exact: false };
        let algorithm = cublasLtMatmulAlgo_t { data: [1, 2, 3, u64::MAX, 0, 0, 7, 8] };
        let (read, data) = parse(line(shape, &algorithm).trim_end()).unwrap();
        assert!(read == shape && data.data == algorithm.data);
        assert!(parse("10 1000").is_none() && parse("").is_none() && parse("x y").is_none());
    }
}
