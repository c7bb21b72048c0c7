//! Copies between host and card through pinned memory, so that neither waits for the other.

use std::sync::{Arc, Mutex};

use cudarc::driver::{result, sys};
use minisgl_tensor::{Download, Result, Tensor};

use crate::device::{Device, Function, Launch, args, driver, fail};
use crate::kernels::{Kernels, Module};

const SLOTS: usize = 32;
const SLOT_BYTES: usize = 2 << 20;
/// Threads that fill the ring for large uploads; each has as many of its buffers.
const READERS: usize = 8;
/// Downloads' buffers made ahead: a few steps' tokens.
const READY: usize = 8;
const READY_BYTES: usize = 4096;
/// Up to so many bytes are copied by a kernel.
const KERNEL_BYTES_MAX: usize = 128 << 10;

/// A ring of pinned buffers for uploads, and a pool of them for downloads.
pub(crate) struct Staging {
    device: Arc<Device>,
    ring: Mutex<(Vec<Pinned>, usize)>,
    pool: Arc<Mutex<Vec<Pinned>>>,
    /// Kernels of `elementwise.cu`, for what a step sends to and fro.
    upload_kernel: Function,
    download_kernel: Function,
}

impl Staging {
    pub(crate) fn new(device: &Arc<Device>, kernels: &Kernels) -> Result<Self> {
        let ring = (0..SLOTS).map(|_| Pinned::new(device, SLOT_BYTES)).collect::<Result<_>>()?;
        // Page-locking memory stalls the card, so what a step's downloads need is there from the
        // start. Ranks that share a card would even stall each other for good.
        let pool = (0..READY).map(|_| Pinned::new(device, READY_BYTES)).collect::<Result<_>>()?;
        Ok(Self {
            device: Arc::clone(device),
            ring: Mutex::new((ring, 0)),
            pool: Arc::new(Mutex::new(pool)),
            upload_kernel: kernels.get(Module::Elementwise, &[], "upload")?,
            download_kernel: kernels.get(Module::Elementwise, &[], "download")?,
        })
    }

    /// Copies `src` to the front of `dst`; `src` may be reused when this returns.
    pub(crate) fn upload(&self, src: &[u8], dst: &Tensor) -> Result<()> {
        self.copy_in(src, dst, is_for_kernel(src.len(), dst.address()))
    }

    /// As `upload`, of weights: kernels read these before they wait for the ones in front, and so they are not
    /// written by kernels.
    pub(crate) fn load(&self, src: &[u8], dst: &Tensor) -> Result<()> {
        self.copy_in(src, dst, false)
    }

    fn copy_in(&self, src: &[u8], dst: &Tensor, by_kernel: bool) -> Result<()> {
        if src.len() > dst.bytes() {
            return Err(fail(format!("{} bytes do not fit {dst:?}", src.len())));
        }
        self.device.bind()?;
        let mut ring = self.ring.lock().map_err(|_| fail("the staging ring is poisoned"))?;
        let (slots, next) = &mut *ring;
        if src.len() > READERS * SLOT_BYTES {
            return upload_in_parallel(slots, src, dst.address());
        }
        for (i, part) in src.chunks(SLOT_BYTES).enumerate() {
            let slot = &mut slots[*next];
            *next = (*next + 1) % SLOTS;
            let to = dst.address() + (i * SLOT_BYTES) as u64;
            if by_kernel {
                slot.fill(part)?;
                self.copy_words(self.upload_kernel, slot.address as u64, to, part.len())?;
                slot.record()?;
            } else {
                slot.send(part, to)?;
            }
        }
        Ok(())
    }

    pub(crate) fn download(&self, src: &Tensor) -> Result<Box<dyn Download>> {
        self.device.bind()?;
        let bytes = src.bytes();
        let mut pool = self.pool.lock().map_err(|_| fail("the download pool is poisoned"))?;
        let found = pool.iter().position(|p| p.bytes >= bytes);
        let mut pinned = match found {
            Some(i) => pool.swap_remove(i),
            None => Pinned::new(&self.device, bytes.next_power_of_two().max(4096))?,
        };
        drop(pool);
        if is_for_kernel(bytes, src.address()) {
            let to = pinned.address as u64;
            self.copy_words(self.download_kernel, src.address(), to, bytes)?;
        } else {
            let to = &mut pinned.bytes_mut()[..bytes];
            // SAFETY: the buffer is owned by the download until its event has come.
            unsafe { result::memcpy_dtoh_async(to, src.address(), self.device.stream) }
                .map_err(|e| driver("cuMemcpyDtoHAsync", e))?;
        }
        pinned.record()?;
        Ok(Box::new(Pending { pinned: Some(pinned), bytes, pool: Arc::clone(&self.pool) }))
    }

    fn copy_words(&self, kernel: Function, from: u64, to: u64, bytes: usize) -> Result<()> {
        let words = bytes / 4;
        let shape = Launch::new(words.div_ceil(256), 256);
        // SAFETY: both hold so many words. Page-locked memory has one address for host and card, and nobody
        // touches it until its event has come.
        unsafe { self.device.launch(kernel, shape, args![from, to, words]) }
    }
}

/// Whether so many bytes to or from such an address on the card are copied by a kernel.
fn is_for_kernel(bytes: usize, address: u64) -> bool {
    bytes <= KERNEL_BYTES_MAX && bytes.is_multiple_of(4) && address.is_multiple_of(4)
}

/// Weights come from a mapped file: one thread would wait for its pages one after the other, and
/// copies more slowly than the card fetches.
fn upload_in_parallel(slots: &mut [Pinned], src: &[u8], to: u64) -> Result<()> {
    let mut shares: Vec<Vec<&mut Pinned>> = (0..READERS).map(|_| Vec::new()).collect();
    slots.iter_mut().enumerate().for_each(|(i, slot)| shares[i % READERS].push(slot));
    let send_share = |reader: usize, mut slots: Vec<&mut Pinned>| {
        slots[0].device.bind()?;
        let count = slots.len();
        let parts = src.chunks(SLOT_BYTES).enumerate().skip(reader).step_by(READERS);
        for (turn, (i, part)) in parts.enumerate() {
            slots[turn % count].send(part, to + (i * SLOT_BYTES) as u64)?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let send_share = &send_share;
        let readers: Vec<_> = shares
            .into_iter()
            .enumerate()
            .map(|(reader, slots)| scope.spawn(move || send_share(reader, slots)))
            .collect();
        readers.into_iter().try_for_each(|reader| {
            reader.join().unwrap_or_else(|_| Err(fail("a thread that uploads panicked")))
        })
    })
}

struct Pending {
    pinned: Option<Pinned>,
    bytes: usize,
    pool: Arc<Mutex<Vec<Pinned>>>,
}

impl Download for Pending {
    fn wait(mut self: Box<Self>) -> Result<Vec<u8>> {
        let mut pinned = self.pinned.take().ok_or_else(|| fail("a download is waited for once"))?;
        pinned.wait()?;
        let bytes = pinned.bytes_mut()[..self.bytes].to_vec();
        if let Ok(mut pool) = self.pool.lock() {
            pool.push(pinned);
        }
        Ok(bytes)
    }
}

impl Drop for Pending {
    /// What nobody wants, as on all ranks but the first, goes back at once: its copy may still be
    /// under way, but the next one into the same memory is enqueued behind it. Giving page-locked
    /// memory back to the driver instead waits for the whole card.
    fn drop(&mut self) {
        if let (Some(pinned), Ok(mut pool)) = (self.pinned.take(), self.pool.lock()) {
            pool.push(pinned);
        }
    }
}

/// Page-locked host memory and the event behind its last copy.
struct Pinned {
    device: Arc<Device>,
    address: *mut u8,
    bytes: usize,
    event: sys::CUevent,
}

// SAFETY: owned by one value; the driver's handles are not bound to a thread.
unsafe impl Send for Pinned {}

impl Pinned {
    fn new(device: &Arc<Device>, bytes: usize) -> Result<Self> {
        device.bind()?;
        // SAFETY: owned and freed by this value.
        let address =
            unsafe { result::malloc_host(bytes, 0) }.map_err(|e| driver("cuMemHostAlloc", e))?;
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
            .map_err(|e| driver("cuEventCreate", e))?;
        // SAFETY: `bytes` bytes were just allocated.
        unsafe { address.cast::<u8>().write_bytes(0, bytes) };
        Ok(Self { device: Arc::clone(device), address: address.cast(), bytes, event })
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: initialised memory of this length, borrowed with `self`.
        unsafe { std::slice::from_raw_parts_mut(self.address, self.bytes) }
    }

    /// Takes `part` in, once the last copy is done.
    fn fill(&mut self, part: &[u8]) -> Result<()> {
        self.wait()?;
        self.bytes_mut()[..part.len()].copy_from_slice(part);
        Ok(())
    }

    /// Starts copying `part` to the device's address `to`.
    fn send(&mut self, part: &[u8], to: u64) -> Result<()> {
        self.fill(part)?;
        let stream = self.device.stream;
        // SAFETY: source and destination hold the part; the buffer is not written before its event
        // has come.
        unsafe { result::memcpy_htod_async(to, &self.bytes_mut()[..part.len()], stream) }
            .map_err(|e| driver("cuMemcpyHtoDAsync", e))?;
        self.record()
    }

    fn record(&self) -> Result<()> {
        // SAFETY: event and stream live.
        unsafe { result::event::record(self.event, self.device.stream) }
            .map_err(|e| driver("cuEventRecord", e))
    }

    /// Waits until the last copy is done.
    fn wait(&self) -> Result<()> {
        // SAFETY: the event lives.
        unsafe { self.device.wait(self.event) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // The copy may still be under way when its owner lost interest. That wait has a time limit,
        // behind which a group of ranks ends, and with it what the device waits for.
        let waited = self.wait();
        // SAFETY: made by `new`, given back once.
        unsafe {
            if waited.is_ok() || result::event::synchronize(self.event).is_ok() {
                let _ = result::event::destroy(self.event);
                let _ = result::free_host(self.address.cast());
            }
        }
    }
}
