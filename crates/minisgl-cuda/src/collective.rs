//! Sums and gathers over the cards of one process.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use minisgl_tensor::{BackendError, Collective, DType, Result, Tensor};

use crate::backend::CudaBackend;
use crate::device::{Launch, args, fail};
use crate::group::Group;
use crate::kernels::Module;
use crate::mailbox::{Mailboxes, RANKS_MAX, on_one_card, open_peers};
use crate::nccl::{Communicator, Kind};

/// How to connect ranks.
#[derive(Clone, Copy, Debug)]
pub struct GroupOptions {
    /// How long a rank waits for the others before all of them end.
    pub timeout: Duration,
    /// What moves the data.
    pub transport: Transport,
}

/// What moves data between cards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// Peer memory for small messages, where the cards reach each other's; NCCL for the rest.
    Auto,
    /// NCCL alone.
    Nccl,
    /// Peer memory alone. The only one with which ranks can share a card, as tests do.
    Peers,
}

/// The ends of a group over `backends`, in the order of their ranks. A backend belongs to one group
/// in its life. The group ends, on all ranks, when an end is dropped or a rank is late.
///
/// NCCL reads its settings from the environment, which only a program's start can change safely:
/// set `NCCL_NVLS_ENABLE=0` there to leave NVLink multicast off.
///
/// # Errors
/// If the cards do not reach each other, or NCCL is missing or does not connect them.
pub fn group(
    backends: &[Arc<CudaBackend>],
    options: GroupOptions,
) -> Result<Vec<Arc<dyn Collective>>> {
    let ranks = backends.len();
    let first = backends.first().ok_or_else(|| fail("a group of no ranks"))?;
    let devices: Vec<_> = backends.iter().map(|backend| Arc::clone(&backend.device)).collect();
    let one_card = on_one_card(backends);
    let group = Arc::new(Group::new(&first.device, ranks, one_card, options.timeout)?);
    let wants_peers = options.transport != Transport::Nccl && (2..=RANKS_MAX).contains(&ranks);
    let mailboxes: Vec<Option<Mailboxes>> = match wants_peers && open_peers(backends)? {
        true => Mailboxes::new(backends, &group)?.into_iter().map(Some).collect(),
        false => backends.iter().map(|_| None).collect(),
    };
    if options.transport != Transport::Peers {
        for (rank, end) in Communicator::connect(&devices, options.timeout)?.into_iter().enumerate()
        {
            group.set_communicator(rank, end);
        }
    } else if !wants_peers || mailboxes[0].is_none() {
        let message = format!("{ranks} ranks whose cards do not all read each other's memory");
        return Err(BackendError::Unsupported(message.into()));
    }
    for device in &devices {
        let taken = device.group.set(Arc::clone(&group)).is_err();
        if taken {
            return Err(fail("a backend belongs to one group only"));
        }
    }
    let small_bytes_max = match options.transport {
        Transport::Peers => usize::MAX,
        _ => small_bytes_max(ranks),
    };
    let end = |(rank, mailboxes)| -> Arc<dyn Collective> {
        Arc::new(CudaCollective {
            rank,
            size: ranks,
            backend: Arc::clone(&backends[rank]),
            group: Arc::clone(&group),
            mailboxes,
            small_bytes_max,
        })
    };
    Ok(mailboxes.into_iter().enumerate().map(end).collect())
}

/// Messages up to this size go through peer memory, where every rank reads all of what the others
/// have, and larger ones through NCCL, where each reads about twice its share: between two ranks the
/// same, so that the limit is where NCCL was found faster (docs/benchmarks/h200-x2.md). With more
/// ranks peer memory loses sooner; nobody has measured when.
const fn small_bytes_max(ranks: usize) -> usize {
    match ranks {
        2 => 4 << 20,
        _ => (1 << 20) / ranks,
    }
}

/// One rank's end.
struct CudaCollective {
    rank: usize,
    size: usize,
    backend: Arc<CudaBackend>,
    group: Arc<Group>,
    mailboxes: Option<Mailboxes>,
    small_bytes_max: usize,
}

impl CudaCollective {
    /// The mailboxes, where a message of this size goes through them.
    fn mailboxes_for(&self, bytes: usize) -> Option<&Mailboxes> {
        self.mailboxes.as_ref().filter(|_| bytes <= self.small_bytes_max)
    }

    fn exchange(&self, enqueue: impl FnOnce() -> Result<()>) -> Result<()> {
        if self.backend.device.is_capturing()? {
            self.group.check()?;
            return enqueue();
        }
        self.group.in_step(enqueue)
    }

    /// Calls NCCL and waits until it has enqueued: at a first call, it connects ranks.
    fn nccl(&self, enqueue: impl FnOnce(&Communicator) -> Result<()>) -> Result<()> {
        self.backend.device.bind()?;
        let mut enqueue = Some(enqueue);
        let start = Instant::now();
        loop {
            self.group.check()?;
            let communicator = self.group.communicator(self.rank);
            // Held for one call only: whoever ends the group takes the communicator away.
            let guard = communicator.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(communicator) = guard.as_ref() else { continue };
            if let Some(enqueue) = enqueue.take() {
                enqueue(communicator)?;
            }
            if communicator.state()? {
                return Ok(());
            }
            drop(guard);
            if start.elapsed() > self.group.timeout {
                let timeout = self.group.timeout;
                self.group.end(&format!("NCCL did not find the other ranks in {timeout:?}"));
            }
            std::thread::yield_now();
        }
    }
}

impl Collective for CudaCollective {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn all_reduce(&self, tensor: &Tensor) -> Result<()> {
        let kind = match tensor.dtype() {
            dtype if dtype != self.backend.dtype() => {
                return Err(BackendError::Unsupported(
                    format!("a sum over ranks of {dtype}").into(),
                ));
            }
            DType::F32 => Kind::F32,
            _ => Kind::BF16,
        };
        let device = &self.backend.device;
        self.exchange(|| match self.mailboxes_for(tensor.bytes()) {
            Some(mailboxes) => mailboxes.all_reduce(device, tensor),
            // SAFETY: the tensor's own elements.
            None => self.nccl(|nccl| unsafe {
                nccl.all_reduce(tensor.address(), tensor.elements(), kind, device)
            }),
        })
    }

    fn all_gather_cols(&self, part: &Tensor, out: &Tensor) -> Result<()> {
        let device = &self.backend.device;
        self.exchange(|| match self.mailboxes_for(part.bytes()) {
            Some(mailboxes) => mailboxes.all_gather(device, part, out),
            None if part.dim(0) == 1 => self.gather_parts(part, out),
            None => {
                let parts = self.backend.scratch("gathered parts", out.dtype(), out.shape())?;
                self.gather_parts(part, &parts)?;
                self.interleave(part, &parts, out)
            }
        })
    }
}

impl CudaCollective {
    /// `parts = the parts of all ranks, one behind the other`.
    fn gather_parts(&self, part: &Tensor, parts: &Tensor) -> Result<()> {
        // SAFETY: `parts` has the size of all ranks' parts.
        self.nccl(|nccl| unsafe {
            nccl.all_gather(part.address(), part.bytes(), parts.address(), &self.backend.device)
        })
    }

    /// `out[row, rank·n + i] = parts[rank, row, i]`, where `part` is `[rows, n]`.
    fn interleave(&self, part: &Tensor, parts: &Tensor, out: &Tensor) -> Result<()> {
        let (rows, words) = (part.dim(0), out.bytes() / 4);
        let width = words / (rows * self.size);
        let defines = [("RANKS", self.size as i32)];
        let kernel = self.backend.kernels.get(Module::Collective, &defines, "interleave")?;
        let shape = Launch::new(words.div_ceil(256), 256);
        // SAFETY: the kernel's own parameters, over tensors of the stated shapes.
        unsafe { self.backend.device.launch(kernel, shape, args![parts, rows, width, out]) }
    }
}

impl Drop for CudaCollective {
    fn drop(&mut self) {
        self.group.end(&format!("rank {} has ended", self.rank));
        // Peers' memory is let go of below: what still reads it must have come back. The group's
        // state would not say that any more.
        self.backend.device.drain();
        self.group.leave();
    }
}
