//! Work side by side: a second stream that forks from the first and joins it again.
//!
//! Decode attention reads the cache at what the memory gives, and the products around it wait for
//! launches and for each other. Two halves of a batch, each on a lane of its own, fill each other's
//! gaps, at the price of reading the weights twice (NanoFlow, Zhu et al., 2024). Under capture the
//! lanes become branches of the graph.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use cudarc::driver::{result, sys};
use minisgl_tensor::Result;

use crate::device::{Device, driver};

/// As many as run side by side.
pub(crate) const LANES: usize = 2;

/// Lane 0 is the device's own stream.
pub(crate) struct Lanes {
    second: sys::CUstream,
    fork: sys::CUevent,
    join: sys::CUevent,
    current: AtomicUsize,
    forked: AtomicBool,
    /// The next launch is the first behind a fork or a join.
    crossing: AtomicBool,
    /// Blocks of decode attention in a lane; 0 is three quarters of the multiprocessors.
    attention_blocks: AtomicUsize,
}

impl Lanes {
    pub(crate) fn new() -> Result<Self> {
        let event = || {
            result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
                .map_err(|e| driver("cuEventCreate", e))
        };
        Ok(Self {
            second: result::stream::create(result::stream::StreamKind::NonBlocking)
                .map_err(|e| driver("cuStreamCreate", e))?,
            fork: event()?,
            join: event()?,
            current: AtomicUsize::new(0),
            forked: AtomicBool::new(false),
            crossing: AtomicBool::new(false),
            attention_blocks: AtomicUsize::new(0),
        })
    }

    /// Which lane operations go to now.
    pub(crate) fn current(&self) -> usize {
        self.current.load(Ordering::Relaxed)
    }

    /// Whether the next kernel is the first behind a fork or a join; asked once for each.
    pub(crate) fn take_crossing(&self) -> bool {
        self.crossing.swap(false, Ordering::Relaxed)
    }

    /// Of `multiprocessors`, those that decode attention takes: beside another lane it leaves some
    /// to the other's products.
    pub(crate) fn attention_blocks(&self, multiprocessors: usize) -> usize {
        if !self.forked.load(Ordering::Relaxed) {
            return multiprocessors;
        }
        match self.attention_blocks.load(Ordering::Relaxed) {
            0 => (multiprocessors * 3 / 4).max(1),
            blocks => blocks.min(multiprocessors),
        }
    }

    pub(crate) fn set_attention_blocks(&self, blocks: usize) {
        self.attention_blocks.store(blocks, Ordering::Relaxed);
    }

    pub(crate) fn destroy(&self) {
        // SAFETY: made by `new`, destroyed once, with the context current.
        unsafe {
            let _ = result::event::destroy(self.fork);
            let _ = result::event::destroy(self.join);
            let _ = result::stream::destroy(self.second);
        }
    }
}

impl Device {
    /// The stream of the lane that operations go to now.
    pub(crate) fn current_stream(&self) -> sys::CUstream {
        if self.lanes.current() == 0 { self.stream } else { self.lanes.second }
    }

    /// As `Backend::side_by_side`. The streams are joined again whatever the lanes report, so that a
    /// capture can end.
    pub(crate) fn side_by_side(&self, lanes: &mut [&mut dyn FnMut() -> Result<()>]) -> Result<()> {
        self.bind()?;
        self.order(self.lanes.fork, self.stream, self.lanes.second)?;
        self.lanes.forked.store(true, Ordering::Relaxed);
        let outcome = lanes.iter_mut().enumerate().try_for_each(|(index, lane)| {
            self.lanes.current.store(index % LANES, Ordering::Relaxed);
            self.lanes.crossing.store(true, Ordering::Relaxed);
            lane()
        });
        self.lanes.current.store(0, Ordering::Relaxed);
        self.lanes.forked.store(false, Ordering::Relaxed);
        self.lanes.crossing.store(true, Ordering::Relaxed);
        self.order(self.lanes.join, self.lanes.second, self.stream)?;
        outcome
    }

    /// What comes next on `behind` waits for what is on `first` now.
    fn order(
        &self,
        event: sys::CUevent,
        first: sys::CUstream,
        behind: sys::CUstream,
    ) -> Result<()> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: event and streams live as long as `self`.
        unsafe {
            result::event::record(event, first).map_err(|e| driver("cuEventRecord", e))?;
            result::stream::wait_event(behind, event, flags)
        }
        .map_err(|e| driver("cuStreamWaitEvent", e))
    }
}
