//! What the ranks of a group share on the host: whether the group still works, why not, and where
//! its ranks meet.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cudarc::driver::{result, sys};
use minisgl_tensor::Result;

use crate::device::{Device, driver, fail};
use crate::nccl::Communicator;

/// How long the last rank waits for NCCL.
const LEAVE_GRACE: Duration = Duration::from_secs(10);

/// The state of a group of ranks. A group that has ended stays so.
pub(crate) struct Group {
    broken: BrokenWord,
    /// The first reason for which the group has ended.
    why: Mutex<Option<Arc<str>>>,
    /// A rank's communicator, where the ranks have NCCL.
    communicators: Vec<Mutex<Option<Communicator>>>,
    /// The thread that ends them.
    ending: Mutex<Option<JoinHandle<()>>>,
    /// Ranks that have not left.
    present: AtomicUsize,
    /// How long ranks wait for each other.
    pub(crate) timeout: Duration,
    meeting: Mutex<Meeting>,
    changed: Condvar,
    /// Whether several ranks share a card, as only tests do.
    one_card: bool,
}

#[derive(Default)]
struct Meeting {
    arrived: usize,
    /// Meetings held.
    held: u64,
}

impl Group {
    pub(crate) fn new(
        device: &Device,
        ranks: usize,
        one_card: bool,
        timeout: Duration,
    ) -> Result<Self> {
        Ok(Self {
            broken: BrokenWord::new(device)?,
            why: Mutex::default(),
            communicators: (0..ranks).map(|_| Mutex::default()).collect(),
            ending: Mutex::default(),
            present: AtomicUsize::new(ranks),
            timeout,
            meeting: Mutex::default(),
            changed: Condvar::new(),
            one_card: one_card && ranks > 1,
        })
    }

    /// The word that kernels look at and set.
    pub(crate) fn broken_address(&self) -> u64 {
        self.broken.0 as u64
    }

    pub(crate) fn set_communicator(&self, rank: usize, communicator: Communicator) {
        let place = &self.communicators[rank];
        *place.lock().unwrap_or_else(PoisonError::into_inner) = Some(communicator);
    }

    /// Where rank `rank`'s communicator is; none once the group has ended.
    pub(crate) fn communicator(&self, rank: usize) -> &Mutex<Option<Communicator>> {
        &self.communicators[rank]
    }

    /// Ends the group: whatever waits in it, on the host or on a device, comes back.
    pub(crate) fn end(&self, why: &str) {
        self.why.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| why.into());
        // The reason comes first, then the word, then what lets go of waiting devices: whoever
        // finds its work done and after that the word still unset has whole results.
        self.broken.word().fetch_max(BrokenWord::BY_HOST, Ordering::SeqCst);
        self.changed.notify_all();
        let taken: Vec<Communicator> = self
            .communicators
            .iter()
            .filter_map(|c| c.lock().unwrap_or_else(PoisonError::into_inner).take())
            .collect();
        if taken.is_empty() {
            return;
        }
        // NCCL ends a communicator only when the graphs that it is recorded in are gone, and those
        // may be this very thread's to let go of.
        match std::thread::Builder::new().name("nccl-end".into()).spawn(|| drop(taken)) {
            Ok(thread) => {
                *self.ending.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
            }
            Err(error) => tracing::error!(%error, "no thread to end NCCL's communicators"),
        }
    }

    /// A rank that holds no graphs any more goes. With the last one NCCL's communicators have ended: a
    /// process that ended meanwhile would have NCCL taken down under them. An engine that has failed does
    /// not wait that long for its ranks.
    pub(crate) fn leave(&self) {
        if self.present.fetch_sub(1, Ordering::SeqCst) > 1 {
            return;
        }
        let ending = self.ending.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(thread) = ending else { return };
        let start = Instant::now();
        while !thread.is_finished() {
            if start.elapsed() > LEAVE_GRACE {
                return tracing::warn!("NCCL's communicators have not ended in {LEAVE_GRACE:?}");
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Fails once the group has ended.
    pub(crate) fn check(&self) -> Result<()> {
        let why = match self.broken.word().load(Ordering::SeqCst) {
            0 => return Ok(()),
            BrokenWord::BY_HOST => self.why.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            late => {
                let rank = late - 1;
                let why = format!("rank {rank} did not come to an exchange in {:?}", self.timeout);
                self.end(&why);
                Some(why.into())
            }
        };
        Err(fail(why.unwrap_or_else(|| "the group of ranks has ended".into())))
    }

    /// Enqueues what waits on the device for the other ranks. Those on one card do so together: a
    /// call that waits for the whole card, as those do that load a kernel or give memory back,
    /// would never see the end of work that waits for this very rank.
    pub(crate) fn in_step(&self, enqueue: impl FnOnce() -> Result<()>) -> Result<()> {
        self.check()?;
        if !self.one_card {
            return enqueue();
        }
        self.meet()?;
        enqueue()?;
        self.meet()
    }

    /// Waits on the host until all ranks are here.
    fn meet(&self) -> Result<()> {
        let deadline = Instant::now() + self.timeout;
        let mut meeting = self.meeting.lock().unwrap_or_else(PoisonError::into_inner);
        let held = meeting.held;
        meeting.arrived += 1;
        if meeting.arrived == self.communicators.len() {
            *meeting = Meeting { arrived: 0, held: held + 1 };
            self.changed.notify_all();
        }
        while meeting.held == held {
            self.check()?;
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.end(&format!("not all ranks came to an exchange in {:?}", self.timeout));
            }
            let step = left.min(Duration::from_millis(10));
            meeting =
                self.changed.wait_timeout(meeting, step).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// Waits until `is_done`, or until the group ends: which it does when this takes longer than
    /// ranks wait for each other.
    pub(crate) fn wait(&self, is_done: impl Fn() -> Result<bool>) -> Result<()> {
        let start = Instant::now();
        for tries in 1_u64.. {
            let done = is_done()?;
            self.check()?;
            if done {
                break;
            }
            if tries.is_multiple_of(1024) {
                self.check_communicators();
                if start.elapsed() > self.timeout {
                    self.end(&format!("the device was not done in {:?}", self.timeout));
                }
            }
            std::thread::yield_now();
        }
        Ok(())
    }

    fn check_communicators(&self) {
        let failed = self.communicators.iter().find_map(|communicator| {
            let guard = communicator.lock().unwrap_or_else(PoisonError::into_inner);
            guard.as_ref().and_then(|communicator| communicator.state().err())
        });
        if let Some(error) = failed {
            self.end(&error.to_string());
        }
    }
}

/// A word of page-locked host memory that all devices see: 0, 1 + the rank that a kernel waited
/// for in vain, or `BY_HOST`. It belongs to the context in which it was made and goes with it:
/// ranks hold on to each other's devices until their own are idle.
struct BrokenWord(*mut u32);

// SAFETY: the memory is only accessed as an atomic, on both sides.
unsafe impl Send for BrokenWord {}
// SAFETY: as above.
unsafe impl Sync for BrokenWord {}

impl BrokenWord {
    const BY_HOST: u32 = 0xff;

    fn new(device: &Device) -> Result<Self> {
        device.bind()?;
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: zeroed before anybody reads it.
        unsafe {
            let address = result::malloc_host(size_of::<u32>(), flags)
                .map_err(|e| driver("cuMemHostAlloc", e))?
                .cast::<u32>();
            address.write(0);
            Ok(Self(address))
        }
    }

    fn word(&self) -> &AtomicU32 {
        // SAFETY: aligned, initialised memory that lives as long as the context, which lives as
        // long as any rank.
        unsafe { AtomicU32::from_ptr(self.0) }
    }
}
