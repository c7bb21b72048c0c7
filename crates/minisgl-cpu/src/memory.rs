//! Host memory behind tensors, and the typed views through which operations reach it.
//!
//! A tensor is an address; this module is the only one that turns addresses into slices. It relies
//! on the contract of `Backend`: an operation runs alone on its backend, and what it writes does
//! not overlap what it reads unless its documentation says so (checked in debug builds).

use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::Arc;

use bytemuck::Pod;
use memmap2::MmapMut;
use minisgl_tensor::{BackendError, DType, Memory, Result, Tensor};

/// Alignment of every piece: a cache line, and the widest vector.
const ALIGN: usize = 64;
/// Bytes that are asked for at a time to hold weights: many large pages.
const CHUNK: usize = 64 << 20;

/// Zeroed host memory of whole pages, straight from the system: a large KV pool costs nothing
/// before it is written.
pub struct Buffer {
    /// Keeps the memory. It is only reached through `start`.
    _map: MmapMut,
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: a buffer owns its memory like a `Vec<u8>`, and has no interior of its own to race on.
unsafe impl Send for Buffer {}
// SAFETY: as above; shared access to the bytes goes through the views below.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// Zeroed memory.
    pub fn zeroed(bytes: usize) -> Result<Self> {
        let out_of_memory = |_| BackendError::OutOfMemory { bytes, free: free_bytes() };
        let mut map = MmapMut::map_anon(bytes.max(1)).map_err(out_of_memory)?;
        let start = NonNull::from(&mut map[..]).cast();
        Ok(Self { _map: map, start, bytes })
    }

    /// As `zeroed`, in large pages where the system has them: reading weights through small ones
    /// is a third slower.
    fn in_large_pages(bytes: usize) -> Result<Self> {
        let buffer = Self::zeroed(bytes)?;
        #[cfg(target_os = "linux")]
        // A system without them is slower, not wrong.
        let _ = buffer._map.advise(memmap2::Advice::HugePage);
        Ok(buffer)
    }
}

impl Memory for Buffer {
    fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    fn bytes(&self) -> usize {
        self.bytes
    }
}

/// Where weights come to lie, one behind the other in large pages.
#[derive(Default)]
pub struct Arena {
    chunk: Option<Arc<Buffer>>,
    used: usize,
}

impl Arena {
    /// Zeroed bytes that nobody else has.
    pub fn take(&mut self, bytes: usize) -> Result<Piece> {
        let room = self.chunk.as_ref().map_or(0, |chunk| chunk.bytes - self.used);
        let chunk = match &self.chunk {
            Some(chunk) if bytes <= room => Arc::clone(chunk),
            _ => {
                let chunk = Arc::new(Buffer::in_large_pages(bytes.max(CHUNK))?);
                self.used = 0;
                Arc::clone(self.chunk.insert(chunk))
            }
        };
        let offset = self.used;
        self.used = (offset + bytes).next_multiple_of(ALIGN).min(chunk.bytes);
        Ok(Piece { chunk, offset, bytes })
    }
}

/// A part of a buffer that belongs to its holder alone.
pub struct Piece {
    chunk: Arc<Buffer>,
    offset: usize,
    bytes: usize,
}

impl Piece {
    /// The bytes, to read.
    pub fn as_bytes(&self) -> &[u8] {
        // SAFETY: inside the chunk's initialized memory, which nobody else has a piece of here.
        unsafe {
            std::slice::from_raw_parts(self.chunk.start.as_ptr().add(self.offset), self.bytes)
        }
    }

    /// The bytes, to write.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and exclusive as `self` is.
        unsafe {
            std::slice::from_raw_parts_mut(self.chunk.start.as_ptr().add(self.offset), self.bytes)
        }
    }
}

/// A zeroed tensor in a buffer of its own.
pub fn alloc(dtype: DType, shape: &[usize]) -> Result<Tensor> {
    let elements = shape.iter().try_fold(1usize, |n, &size| n.checked_mul(size));
    let bytes = elements.and_then(|n| dtype.bytes_of(n)).ok_or_else(|| {
        BackendError::Unsupported(format!("a {dtype} tensor of shape {shape:?}").into())
    })?;
    Ok(Tensor::new(Arc::new(Buffer::zeroed(bytes)?), dtype, shape))
}

/// The elements of a tensor, to read.
///
/// # Panics
/// If the tensor has another element size than `T`.
pub fn view<T: Pod>(tensor: &Tensor) -> &[T] {
    let len = typed_len::<T>(tensor);
    // SAFETY: the tensor keeps its memory alive and holds `len` initialized elements, aligned as
    // `typed_len` checked; by the module's contract nobody writes them while the operation reads.
    unsafe { std::slice::from_raw_parts(tensor.address() as *const T, len) }
}

fn typed_len<T: Pod>(tensor: &Tensor) -> usize {
    assert_eq!(tensor.dtype().block_bytes(), size_of::<T>(), "element size of {tensor:?}");
    assert!(tensor.address().is_multiple_of(align_of::<T>() as u64), "alignment of {tensor:?}");
    tensor.elements()
}

/// The elements of a tensor or a slice, to be written by several threads, each its own part.
#[derive(Clone, Copy)]
pub struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    owner: PhantomData<&'a mut [T]>,
}

// SAFETY: it is a `&mut [T]` that threads split among themselves; `part` leaves the proof that the
// parts are disjoint to its callers.
unsafe impl<T: Send> Send for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T: Pod> Shared<'a, T> {
    /// All elements of `tensor`.
    pub fn of(tensor: &'a Tensor) -> Self {
        let len = typed_len::<T>(tensor);
        Self { start: tensor.address() as *mut T, len, owner: PhantomData }
    }

    /// All elements of `slice`.
    pub fn of_slice(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), owner: PhantomData }
    }

    /// `len` elements from `start`.
    ///
    /// # Safety
    /// While the result lives, no other part overlaps it and nobody else touches its elements.
    #[inline(always)]
    pub unsafe fn part(self, start: usize, len: usize) -> &'a mut [T] {
        assert!(start <= self.len && len <= self.len - start, "a part lies inside the whole");
        // SAFETY: inside the memory that `self` was made of; exclusive by the caller's word.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }

    /// All of it.
    ///
    /// # Safety
    /// As `part`.
    pub unsafe fn all(self) -> &'a mut [T] {
        // SAFETY: the caller's word.
        unsafe { self.part(0, self.len) }
    }
}

/// Memory that the system could still give, as far as it says.
pub fn free_bytes() -> usize {
    meminfo("MemAvailable:").unwrap_or(8 << 30)
}

/// A line of `/proc/meminfo`, in bytes.
pub fn meminfo(line: &str) -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let value = text.lines().find_map(|l| l.strip_prefix(line))?;
    value.trim().trim_end_matches(" kB").parse::<usize>().ok()?.checked_mul(1024)
}
