//! Exchanges in one pass over memory that ranks read directly (`kernels/collective.cu`).

use std::sync::Arc;

use cudarc::driver::sys;
use minisgl_tensor::{BackendError, Memory, Result, Tensor};

use crate::backend::CudaBackend;
use crate::device::{Device, DeviceMemory, Function, Launch, driver};
use crate::group::Group;
use crate::kernels::Module;

/// As in the kernel file.
const BLOCKS: usize = 32;
const THREADS: usize = 512;
pub(crate) const RANKS_MAX: usize = 8;
const HEADER_BYTES: usize = 4096;

/// The most that one exchange moves. A larger message takes several.
const SLOT_BYTES: usize = 2 << 20;

/// One rank's view of everybody's mailboxes.
pub(crate) struct Mailboxes {
    group: GroupArgs,
    ranks: usize,
    all_reduce: Function,
    all_gather: Function,
    /// Every rank's, kept while any rank may read it.
    _memory: Vec<Arc<DeviceMemory>>,
}

/// `Group` of the kernel file.
#[derive(Clone, Copy)]
#[repr(C)]
struct GroupArgs {
    mailboxes: [u64; RANKS_MAX],
    slot_bytes: u64,
    broken: u64,
    limit: u64,
    rank: i32,
    next_early: i32,
}

#[repr(C)]
struct Reduce {
    group: GroupArgs,
    x: u64,
    count: u64,
}

#[repr(C)]
struct Gather {
    group: GroupArgs,
    part: u64,
    out: u64,
    rows: u64,
    width: u64,
}

impl Mailboxes {
    /// Mailboxes on every backend's card, seen from each. The cards reach each other.
    pub(crate) fn new(backends: &[Arc<CudaBackend>], group: &Group) -> Result<Vec<Self>> {
        let allocate = |backend: &Arc<CudaBackend>| {
            let memory = backend.device.alloc(HEADER_BYTES + 2 * SLOT_BYTES)?;
            backend.device.synchronize()?;
            Ok(memory)
        };
        let memory = backends.iter().map(allocate).collect::<Result<Vec<_>>>()?;
        let mut mailboxes = [0; RANKS_MAX];
        for (address, memory) in mailboxes.iter_mut().zip(&memory) {
            *address = memory.address();
        }
        // On one card, a kernel that starts early could take the room that the other rank needs.
        let next_early = !on_one_card(backends);
        let ranks = backends.len();
        let view = |(rank, backend): (usize, &Arc<CudaBackend>)| {
            let defines = [("RANKS", ranks as i32)];
            let kernel = |name| backend.kernels.get(Module::Collective, &defines, name);
            Ok(Self {
                group: GroupArgs {
                    mailboxes,
                    slot_bytes: SLOT_BYTES as u64,
                    broken: group.broken_address(),
                    limit: group.timeout.as_nanos() as u64,
                    rank: rank as i32,
                    next_early: i32::from(next_early),
                },
                ranks,
                all_reduce: kernel("all_reduce")?,
                all_gather: kernel("all_gather")?,
                _memory: memory.clone(),
            })
        };
        backends.iter().enumerate().map(view).collect()
    }

    /// `x = Σ over ranks of x`.
    pub(crate) fn all_reduce(&self, device: &Device, x: &Tensor) -> Result<()> {
        let (bytes, end) = (x.bytes() / x.elements().max(1), x.address() + x.bytes() as u64);
        if !x.address().is_multiple_of(16) {
            return Err(BackendError::Unsupported(
                format!("a sum of {x:?}, not on 16 bytes").into(),
            ));
        }
        for from in (x.address()..end).step_by(SLOT_BYTES) {
            let count = (end - from).min(SLOT_BYTES as u64) / bytes as u64;
            let args = Reduce { group: self.group, x: from, count };
            // SAFETY: the kernel's struct, over a part of `x`.
            unsafe { device.launch_struct(self.all_reduce, shape(), &args)? };
        }
        Ok(())
    }

    /// `out[:, rank·n .. (rank+1)·n] = part of rank`.
    pub(crate) fn all_gather(&self, device: &Device, part: &Tensor, out: &Tensor) -> Result<()> {
        let row_bytes = part.bytes() / part.dim(0).max(1);
        let rows_each = SLOT_BYTES / row_bytes.max(1);
        if rows_each == 0 || !row_bytes.is_multiple_of(4) {
            return Err(BackendError::Unsupported(
                format!("a gather of rows of {row_bytes} bytes").into(),
            ));
        }
        for row in (0..part.dim(0)).step_by(rows_each) {
            let args = Gather {
                group: self.group,
                part: part.address() + (row * row_bytes) as u64,
                out: out.address() + (row * row_bytes * self.ranks) as u64,
                rows: rows_each.min(part.dim(0) - row) as u64,
                width: row_bytes as u64 / 4,
            };
            // SAFETY: the kernel's struct, over some rows of both.
            unsafe { device.launch_struct(self.all_gather, shape(), &args)? };
        }
        Ok(())
    }
}

fn shape() -> Launch {
    Launch::new(BLOCKS, THREADS)
}

/// Whether all ranks share a card, as only tests do.
pub(crate) fn on_one_card(backends: &[Arc<CudaBackend>]) -> bool {
    backends.iter().all(|backend| backend.device.handle == backends[0].device.handle)
}

/// Lets every card read every other's memory; false if one cannot.
pub(crate) fn open_peers(backends: &[Arc<CudaBackend>]) -> Result<bool> {
    let pairs = || {
        let all = |a| backends.iter().map(move |b| (a, b));
        backends.iter().flat_map(all).filter(|(a, b)| a.device.handle != b.device.handle)
    };
    for (a, b) in pairs() {
        let mut reachable = 0;
        // SAFETY: handles of the driver; the answer is of this frame.
        unsafe { sys::cuDeviceCanAccessPeer(&raw mut reachable, a.device.handle, b.device.handle) }
            .result()
            .map_err(|e| driver("cuDeviceCanAccessPeer", e))?;
        if reachable == 0 {
            return Ok(false);
        }
    }
    for (a, b) in pairs() {
        a.device.bind()?;
        // SAFETY: the context lives as long as the backend.
        match unsafe { sys::cuCtxEnablePeerAccess(b.device.context, 0) } {
            sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => {}
            status => status.result().map_err(|e| driver("cuCtxEnablePeerAccess", e))?,
        }
    }
    Ok(true)
}
