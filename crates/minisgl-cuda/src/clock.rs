//! When the card comes to a place in its stream, on the host's clock.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cudarc::driver::{result, sys};
use minisgl_tensor::{Mark, Result};

use crate::device::{Device, driver, fail};

/// How long an event serves as the reference for others. The driver tells times between events in
/// `f32` milliseconds, which resolve a quarter of a microsecond so far apart, and the two clocks do
/// not run away from each other in between.
const RENEWED_AFTER: Duration = Duration::from_secs(2);
/// Of so many references the one is taken whose time is known best.
const TRIES: usize = 3;

/// Makes marks. Costs nothing before the first.
pub(crate) struct Clock {
    device: Arc<Device>,
    reference: Mutex<Option<Arc<Reference>>>,
}

impl Clock {
    pub(crate) fn new(device: &Arc<Device>) -> Self {
        Self { device: Arc::clone(device), reference: Mutex::default() }
    }

    /// A mark behind what the stream has. The stream is not being captured.
    pub(crate) fn mark(&self) -> Result<Box<dyn Mark>> {
        let mut reference = self.reference.lock().map_err(|_| fail("the clock is poisoned"))?;
        let current = match reference.take() {
            Some(current) if current.at.elapsed() < RENEWED_AFTER => current,
            _ => Arc::new(Reference::make(&self.device)?),
        };
        *reference = Some(Arc::clone(&current));
        let event = TimedEvent::new(&self.device)?;
        event.record(self.device.stream)?;
        Ok(Box::new(CudaMark { event, reference: current }))
    }
}

struct CudaMark {
    event: TimedEvent,
    reference: Arc<Reference>,
}

impl Mark for CudaMark {
    fn time(self: Box<Self>) -> Result<Instant> {
        self.event.wait()?;
        // SAFETY: both events live, were recorded, and have come.
        let ms = unsafe { result::event::elapsed(self.reference.event.event, self.event.event) }
            .map_err(|e| driver("cuEventElapsedTime", e))?;
        Ok(self.reference.at + Duration::from_secs_f64(f64::from(ms.max(0.0)) / 1e3))
    }
}

/// An event and when it came.
struct Reference {
    event: TimedEvent,
    at: Instant,
}

impl Reference {
    /// On a stream of its own, where nothing is in front of it: the event comes between its recording
    /// and the end of the wait for it, some microseconds apart.
    fn make(device: &Arc<Device>) -> Result<Self> {
        device.bind()?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(|e| driver("cuStreamCreate", e))?;
        let tried = (0..TRIES).map(|_| Self::on(device, stream)).collect::<Result<Vec<_>>>();
        // SAFETY: made above; what was enqueued has been waited for, or goes with it.
        unsafe { result::stream::destroy(stream) }.map_err(|e| driver("cuStreamDestroy", e))?;
        let best = tried?.into_iter().min_by_key(|(uncertain, _)| *uncertain);
        best.map(|(_, reference)| reference).ok_or_else(|| fail("no reference was tried"))
    }

    /// Also how long it is uncertain when it came.
    fn on(device: &Arc<Device>, stream: sys::CUstream) -> Result<(Duration, Self)> {
        let event = TimedEvent::new(device)?;
        let before = Instant::now();
        event.record(stream)?;
        event.wait()?;
        let uncertain = before.elapsed();
        Ok((uncertain, Self { event, at: before + uncertain / 2 }))
    }
}

/// An event that knows when it came.
struct TimedEvent {
    device: Arc<Device>,
    event: sys::CUevent,
}

// SAFETY: owned by one value; the driver's handles are not bound to a thread.
unsafe impl Send for TimedEvent {}
// SAFETY: events that have come are only read.
unsafe impl Sync for TimedEvent {}

impl TimedEvent {
    fn new(device: &Arc<Device>) -> Result<Self> {
        device.bind()?;
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT)
            .map_err(|e| driver("cuEventCreate", e))?;
        Ok(Self { device: Arc::clone(device), event })
    }

    fn record(&self, stream: sys::CUstream) -> Result<()> {
        // SAFETY: event and stream live.
        unsafe { result::event::record(self.event, stream) }.map_err(|e| driver("cuEventRecord", e))
    }

    fn wait(&self) -> Result<()> {
        // SAFETY: the event lives.
        unsafe { self.device.wait(self.event) }
    }
}

impl Drop for TimedEvent {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: made by `new`, destroyed once; the driver keeps one that has not come until then.
            let _ = unsafe { result::event::destroy(self.event) };
        }
    }
}
