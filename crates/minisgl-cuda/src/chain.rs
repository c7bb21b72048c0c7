//! Products and attentions of a recorded decode step of few rows, gathered as they are called and
//! launched as one kernel, `kernels/chain.cu`.
//!
//! An operation that can be a link is kept until something else is enqueued (`Device` sees to
//! that) or the graph ends.

use std::collections::HashMap;
use std::sync::{Arc, MutexGuard};

use cudarc::driver::result;
use minisgl_tensor::{Memory, Result};

use crate::backend::CudaBackend;
use crate::device::{Device, DeviceMemory, Function, Launch, address_of, driver, fail};
use crate::kernels::Module;
use crate::tiles::TensorMap;

/// The most rows of a chain, as `ROWS` in `kernels/chain.cu`.
const ROWS: usize = 8;
/// Copies of what all blocks read, over the rows.
const COPIES: usize = 16;
/// Tags of a launch, as in `kernels/chain.cu`.
const LINKS_MAX: usize = 1000;
/// As in `kernels/chain.cu`.
const WARPS: usize = 8;
const SLOTS: usize = 8;
const SLOT_BYTES: usize = 18 << 10;
const ROUNDS: usize = 4;

/// As `Link` in `kernels/chain.cu`: a tag, then the larger of both.
#[repr(C, u32)]
#[derive(Clone, Copy)]
enum Link {
    Matmul(Matmul),
    Attend(Attend),
}

/// As in `kernels/chain.cu`. Whoever adds it leaves what is `tagged` zero.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct Matmul {
    pub(crate) x: u64,
    pub(crate) x_tagged: u64,
    pub(crate) w: u64,
    pub(crate) norm: u64,
    pub(crate) bias: u64,
    pub(crate) old: u64,
    pub(crate) old_tagged: u64,
    pub(crate) out: u64,
    pub(crate) out_tagged: u64,
    pub(crate) rows: i32,
    pub(crate) n: i32,
    pub(crate) k: i32,
    pub(crate) tiles: i32,
    pub(crate) gated: i32,
    pub(crate) gelu: i32,
    pub(crate) out_f32: i32,
    pub(crate) x_copies: i32,
    pub(crate) out_copies: i32,
    pub(crate) x_tag: u32,
    pub(crate) out_tag: u32,
    pub(crate) old_tag: u32,
    pub(crate) eps: f32,
    pub(crate) shift: f32,
}

/// As `Matmul`; `partial` and `maps` are the chain's business, too.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct Attend {
    pub(crate) qkv_tagged: u64,
    pub(crate) out: u64,
    pub(crate) out_tagged: u64,
    pub(crate) partial: u64,
    pub(crate) k_pages: u64,
    pub(crate) v_pages: u64,
    pub(crate) maps: u64,
    pub(crate) slots: u64,
    pub(crate) kv_len: u64,
    pub(crate) page_table: u64,
    pub(crate) store_at: u64,
    pub(crate) rope: u64,
    pub(crate) q_norm: u64,
    pub(crate) k_norm: u64,
    pub(crate) rows: i32,
    pub(crate) pages_a_row: i32,
    pub(crate) page_shift: i32,
    pub(crate) q_heads: i32,
    pub(crate) kv_heads: i32,
    pub(crate) window: i32,
    pub(crate) out_copies: i32,
    pub(crate) qkv_tag: u32,
    pub(crate) out_tag: u32,
    pub(crate) q_eps: f32,
    pub(crate) q_shift: f32,
    pub(crate) k_eps: f32,
    pub(crate) k_shift: f32,
    pub(crate) scale: f32,
    pub(crate) soft_cap: f32,
}

/// What the kernel is compiled for. Attentions of a chain are alike.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Shape {
    rows: usize,
    /// Head size, query heads to a KV head, KV heads, window.
    attention: Option<[usize; 4]>,
}

/// A tensor that a link has written: where its tagged words are, as an offset in the chain's
/// memory, and which link that was.
struct Version {
    width: usize,
    places: [u64; 2],
    link: usize,
    turn: usize,
}

/// The links that wait, and the memory of those launched since `take_programs`.
#[derive(Default)]
pub(crate) struct Chain {
    links: Vec<Link>,
    maps: Vec<[TensorMap; 2]>,
    /// By the plain tensor's address.
    versions: HashMap<u64, Version>,
    tagged_bytes: u64,
    /// What the last link writes.
    last_out: u64,
    kernel: Option<(Shape, Function)>,
    programs: Vec<Arc<DeviceMemory>>,
}

// SAFETY: tensor maps are plain data.
unsafe impl Send for Chain {}

impl Shape {
    /// Shared memory that one link has of its own.
    fn own_bytes(self) -> usize {
        let product = ROUNDS * WARPS * 2 * ROWS * 8 * 4 + WARPS * ROWS * 4;
        let attention = |[dim, group, ..]: [usize; 4]| 16 * (dim + 8) * 2 + WARPS * group * dim * 4;
        product.max(self.attention.map_or(0, attention))
    }

    fn links_max(self, device: &Device) -> usize {
        // The kernel's own variables, and room to align the ring.
        let taken = SLOTS * SLOT_BYTES + self.own_bytes() + 1024 + 2048;
        ((device.shared_max as usize).saturating_sub(taken) / size_of::<Link>()).min(LINKS_MAX)
    }

    /// This shape as one that `other` fits, too.
    fn with(self, other: Self) -> Option<Self> {
        let one = match (self.attention, other.attention) {
            (Some(a), Some(b)) if a != b => return None,
            (a, b) => a.or(b),
        };
        (self.rows == other.rows).then_some(Self { attention: one, ..self })
    }

    fn copies(self) -> usize {
        (COPIES / self.rows).max(2)
    }

    fn defines(self) -> [(&'static str, i32); 2] {
        let [dim, group, ..] = self.attention.unwrap_or([0, 1, 0, 0]);
        [("DIM", dim as i32), ("HALVES", if group <= 8 { 1 } else { 2 })]
    }
}

impl Chain {
    /// The tagged words of a tensor, and their tag; zeros where no link has written it.
    fn read(&self, address: u64, width: usize) -> Result<(u64, u32)> {
        match self.versions.get(&address) {
            None => Ok((0, 0)),
            Some(version) if version.width == width => {
                Ok((version.places[version.turn], version.link as u32 + 1))
            }
            Some(_) => Err(fail("a chain's tensor is read in another shape")),
        }
    }

    /// The same for what the next link writes; the link before that wrote it needs to leave no
    /// plain copy any more.
    fn write(&mut self, address: u64, width: usize) -> (u64, u32) {
        let link = self.links.len();
        self.last_out = address;
        let copies = self.kernel.map_or(1, |(shape, _)| shape.copies());
        let bytes = (copies * ROWS * width * 4).next_multiple_of(128) as u64;
        // Offsets begin behind zero, which is none.
        let first = 128 + self.tagged_bytes;
        let version = self.versions.entry(address).or_insert_with(|| {
            self.tagged_bytes += 2 * bytes;
            Version { width, places: [first, first + bytes], link: usize::MAX, turn: 1 }
        });
        match self.links.get_mut(version.link) {
            Some(Link::Matmul(before)) => before.out = 0,
            Some(Link::Attend(before)) => before.out = 0,
            None => {}
        }
        version.link = link;
        version.turn ^= 1;
        (version.places[version.turn], link as u32 + 1)
    }
}

impl CudaBackend {
    /// Whether what is called now may become a link: in a graph, on one card alone.
    pub(crate) fn chains(&self, rows: usize) -> Result<bool> {
        Ok(!self.exact
            && self.device.capability == (9, 0)
            && self.device.group.get().is_none()
            && rows <= ROWS
            && self.device.is_capturing()?)
    }

    pub(crate) fn add_matmul(&self, mut link: Matmul) -> Result<()> {
        let (rows, n, k) = (link.rows as usize, link.n as usize, link.k as usize);
        let mut chain = self.chain_for(Shape { rows, attention: None }, link.x)?;
        (link.x_tagged, link.x_tag) = chain.read(link.x, k)?;
        (link.x_copies, link.out_copies) = (1, 1);
        if link.x_tagged != 0 {
            let copies = Shape { rows, attention: None }.copies() as i32;
            link.x_copies = copies;
            // It is the last link's.
            match chain.links.last_mut() {
                Some(Link::Matmul(before)) => before.out_copies = copies,
                Some(Link::Attend(before)) => before.out_copies = copies,
                None => {}
            }
        }
        if link.old != 0 {
            (link.old_tagged, link.old_tag) = chain.read(link.old, n)?;
        }
        if link.out_f32 == 0 {
            (link.out_tagged, link.out_tag) = chain.write(link.out, n);
        }
        chain.links.push(Link::Matmul(link));
        Ok(())
    }

    /// False where the chain does not end with the product that gives `qkv`.
    pub(crate) fn add_attention(
        &self,
        dim: usize,
        qkv: u64,
        mut link: Attend,
        maps: [TensorMap; 2],
    ) -> Result<bool> {
        let (rows, q, kv) = (link.rows as usize, link.q_heads as usize, link.kv_heads as usize);
        let attention = Some([dim, q / kv, kv, link.window as usize]);
        let mut chain = self.chain_for(Shape { rows, attention }, qkv)?;
        (link.qkv_tagged, link.qkv_tag) = chain.read(qkv, (q + 2 * kv) * dim)?;
        if link.qkv_tagged == 0 {
            if chain.links.is_empty() {
                chain.kernel = None;
            }
            return Ok(false);
        }
        (link.out_tagged, link.out_tag) = chain.write(link.out, q * dim);
        link.out_copies = 1;
        link.maps = chain.maps.len() as u64;
        chain.maps.push(maps);
        chain.links.push(Link::Attend(link));
        Ok(true)
    }

    /// The chain, ready for one more link, of this shape and reading `reads`: a chain goes on only
    /// with what its last link writes.
    fn chain_for(&self, shape: Shape, reads: u64) -> Result<MutexGuard<'_, Chain>> {
        let mut chain = self.device.chain()?;
        if let Some((old, function)) = chain.kernel {
            match old.with(shape) {
                Some(both)
                    if chain.last_out == reads
                        && chain.links.len() < both.links_max(&self.device) =>
                {
                    let function = if both == old { function } else { self.chain_kernel(both)? };
                    chain.kernel = Some((both, function));
                    return Ok(chain);
                }
                _ => {
                    drop(chain);
                    self.device.flush_chain()?;
                    chain = self.device.chain()?;
                }
            }
        }
        chain.kernel = Some((shape, self.chain_kernel(shape)?));
        Ok(chain)
    }

    fn chain_kernel(&self, shape: Shape) -> Result<Function> {
        self.kernels.get(Module::Chain, &shape.defines(), "chain")
    }
}

impl Device {
    fn chain(&self) -> Result<MutexGuard<'_, Chain>> {
        self.chain.lock().map_err(|_| fail("the chain is poisoned"))
    }

    /// The memory that graphs recorded since the last call read.
    pub(crate) fn take_programs(&self) -> Result<Vec<Arc<DeviceMemory>>> {
        Ok(std::mem::take(&mut self.chain()?.programs))
    }

    /// Enqueues the links that wait.
    pub(crate) fn flush_chain(self: &Arc<Self>) -> Result<()> {
        let mut chain = self.chain()?;
        let Some((shape, function)) = chain.kernel.take() else { return Ok(()) };
        let programs = std::mem::take(&mut chain.programs);
        let Chain { mut links, maps, tagged_bytes, .. } =
            std::mem::replace(&mut *chain, Chain { programs, ..Chain::default() });
        drop(chain);
        // Zeroed: [state | tagged words | partial sums | maps | links].
        let partial = 128 + tagged_bytes;
        let dim = shape.attention.map_or(0, |[dim, ..]| dim);
        let partial_bytes = self.multiprocessors * 16 * (dim + 2) * 8;
        let maps_at = partial + partial_bytes.next_multiple_of(128) as u64;
        let links_at = maps_at + size_of_val(&*maps) as u64;
        let memory = self.alloc(links_at as usize + size_of_val(&*links))?;
        let base = memory.address();
        let place = |offset: u64| if offset == 0 { 0 } else { base + offset };
        for link in &mut links {
            match link {
                Link::Matmul(m) => {
                    m.x_tagged = place(m.x_tagged);
                    m.old_tagged = place(m.old_tagged);
                    m.out_tagged = place(m.out_tagged);
                }
                Link::Attend(a) => {
                    a.qkv_tagged = place(a.qkv_tagged);
                    a.out_tagged = place(a.out_tagged);
                    a.partial = base + partial;
                    a.maps = base + maps_at + a.maps * size_of::<[TensorMap; 2]>() as u64;
                }
            }
        }
        // SAFETY: the memory was made for both; nothing reads it yet.
        unsafe {
            result::memcpy_htod_sync(base + maps_at, &maps)
                .and_then(|()| result::memcpy_htod_sync(base + links_at, &links))
                .map_err(|e| driver("cuMemcpyHtoD", e))?;
        }
        self.chain()?.programs.push(memory);
        let (from, count) = (base + links_at, links.len() as i32);
        let launch = Launch {
            grid: [self.multiprocessors, 1, 1],
            threads: 32 * WARPS + 128,
            shared: 1024 + SLOTS * SLOT_BYTES + 16 + size_of_val(&*links) + shape.own_bytes(),
            cluster: 1,
        };
        let mut words = [address_of(&from), address_of(&count), address_of(&base)];
        // SAFETY: the kernel's parameters in order; the program lives as long as the graph.
        unsafe { self.launch_now(function, launch, &mut words) }
    }
}
