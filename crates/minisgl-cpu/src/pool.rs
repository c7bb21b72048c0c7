//! A thread pool for steps of microseconds.
//!
//! One thread calls `run` and works along; the others wait, first spinning, then parked. Each thread
//! has a share of a job's items, consecutive ones, and takes them in shrinking runs, so that it reads
//! memory in order and writes to no cache line of others; who is done takes from the ends of the
//! others' shares. Nobody waits for a thread that has not come: a worker *enters* a job, and when the
//! items are gone the job closes and only those inside are waited for. A worker that the system keeps
//! off its core therefore costs nothing but its help. No allocation and, while workers spin, no
//! system call.

use std::cell::UnsafeCell;
use std::hint::spin_loop;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

use crate::cores::stay_on;

/// How long a worker without work keeps its core: longer than what the host does between steps.
const SPIN: Duration = Duration::from_micros(150);

/// Set in `Shared::state` while a job accepts workers.
const OPEN: u64 = 1 << 16;
/// Steps from one job's number to the next.
const JOB: u64 = 1 << 17;
/// The low bits of `Shared::state` count the workers inside.
const INSIDE: u64 = OPEN - 1;

/// A pool of threads, the caller of `run` being one of them.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    unpark: Vec<Thread>,
    /// One job at a time.
    turn: Mutex<()>,
}

struct Shared {
    /// A worker that sees a new job has all of it.
    now: Line<Now>,
    /// What is left of each thread's share.
    shares: Vec<Line<Share>>,
    parked: AtomicUsize,
    panicked: AtomicBool,
    stop: AtomicBool,
}

struct Now {
    /// The job's number, `OPEN`, and how many workers are inside.
    state: AtomicU64,
    job: UnsafeCell<Job>,
}

/// A cache line of its own, and the one that the processor fetches with it.
#[repr(align(128))]
struct Line<T>(T);

#[derive(Clone, Copy)]
struct Job {
    work: *const (dyn Fn(usize, usize) + Sync),
    items: usize,
    /// The number's low bits, never 0.
    tag: u64,
}

/// Items `next..end` of the job with number `tag`, 24, 24 and 16 bits. Under another tag, nobody has
/// taken any of this job's yet.
struct Share(AtomicU64);

impl Share {
    const BITS: u32 = 24;
    const ITEMS_MAX: usize = (1 << Self::BITS) - 1;
    const TAGS: u64 = 1 << (64 - 2 * Self::BITS);

    /// Takes a third of what is left, from the front or from the back. `whole` is the share before
    /// anybody took of it.
    fn take(&self, tag: u64, whole: &Range<usize>, front: bool) -> Option<Range<usize>> {
        let mut seen = self.0.load(Ordering::Relaxed);
        loop {
            let Range { start, end } = match seen >> (2 * Self::BITS) == tag {
                true => {
                    let part = |shift: u32| (seen >> shift) as usize & Self::ITEMS_MAX;
                    part(Self::BITS)..part(0)
                }
                false => whole.clone(),
            };
            if start >= end {
                return None;
            }
            let count = ((end - start) / 3).max(1);
            let (taken, left) = match front {
                true => (start..start + count, start + count..end),
                false => (end - count..end, start..end - count),
            };
            let left = (tag << Self::BITS | left.start as u64) << Self::BITS | left.end as u64;
            match self.0.compare_exchange_weak(seen, left, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some(taken),
                Err(current) => seen = current,
            }
        }
    }
}

// SAFETY: `job` is written only by the thread inside `run` while no job is open and nobody is
// inside, and read only by threads that entered; everything else is atomic.
unsafe impl Sync for Shared {}
// SAFETY: the pointer in `job` is only followed while `run` keeps its target alive.
unsafe impl Send for Shared {}

impl Pool {
    /// A pool of `threads` threads, the caller included, each on a core of its own as far as `cores`
    /// go. The caller has the first of them, and puts itself there.
    pub fn new(threads: usize, cores: &[usize]) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            now: Line(Now {
                state: AtomicU64::new(0),
                job: UnsafeCell::new(Job { work: &|_, _| (), items: 0, tag: 0 }),
            }),
            shares: (0..threads.max(1)).map(|_| Line(Share(AtomicU64::new(0)))).collect(),
            parked: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let mut pool =
            Self { shared, workers: Vec::new(), unpark: Vec::new(), turn: Mutex::new(()) };
        for index in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let core = cores.get(index).copied();
            let serve = move || {
                if let Some(core) = core {
                    stay_on(core);
                }
                shared.serve(index);
            };
            let worker = thread::Builder::new().name(format!("cpu-{index}")).spawn(serve)?;
            pool.unpark.push(worker.thread().clone());
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// Threads, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `work(thread, item)` once for each of `items`, on all threads. `thread` is less than
    /// `threads()`, and at any time no two calls have the same.
    ///
    /// # Panics
    /// If `work` does, or there are more than 24 bits can count.
    pub fn run(&self, items: usize, work: &(dyn Fn(usize, usize) + Sync)) {
        if items == 0 {
            return;
        }
        // A panic in `work` is handed on below, after which the pool is as before.
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &*self.shared;
        if items == 1 || self.workers.is_empty() {
            (0..items).for_each(|item| work(0, item));
            return;
        }
        assert!(items <= Share::ITEMS_MAX, "{items} items");
        let now = &shared.now.0;
        let mut number = (now.state.load(Ordering::Relaxed) & !(JOB - 1)).wrapping_add(JOB);
        if (number / JOB).is_multiple_of(Share::TAGS) {
            // Tags begin again: nobody may take what is left of long ago for this job's.
            shared.shares.iter().for_each(|share| share.0.0.store(0, Ordering::Relaxed));
            number = number.wrapping_add(JOB);
        }
        let job = Job { work: erase(work), items, tag: number / JOB % Share::TAGS };
        // SAFETY: the last job is closed and empty, so nobody reads `job` now.
        unsafe { *now.job.get() = job };
        // Sequentially consistent against `parked`: either the worker that parks sees this job, or
        // we see that it parks.
        now.state.store(number | OPEN, Ordering::SeqCst);
        if shared.parked.load(Ordering::SeqCst) > 0 {
            self.unpark.iter().for_each(Thread::unpark);
        }
        let mine = catch_unwind(AssertUnwindSafe(|| shared.take_items(0, job)));
        shared.close();
        if let Err(panic) = mine {
            resume_unwind(panic);
        }
        assert!(!shared.panicked.swap(false, Ordering::Relaxed), "a kernel panicked");
    }
}

/// Forgets the lifetime of `work`.
fn erase<'a>(work: &'a (dyn Fn(usize, usize) + Sync + 'a)) -> *const (dyn Fn(usize, usize) + Sync) {
    // SAFETY: only the lifetime changes. `run` does not return before everyone who may call it has
    // left the job.
    unsafe {
        std::mem::transmute::<
            *const (dyn Fn(usize, usize) + Sync + 'a),
            *const (dyn Fn(usize, usize) + Sync + 'static),
        >(work)
    }
}

impl Shared {
    fn take_items(&self, thread: usize, job: Job) {
        let threads = self.shares.len();
        for other in (thread..threads).chain(0..thread) {
            let whole = other * job.items / threads..(other + 1) * job.items / threads;
            let share = &self.shares[other].0;
            while let Some(items) = share.take(job.tag, &whole, other == thread) {
                for item in items {
                    // SAFETY: this thread is inside the job, or is the one that runs it, so the
                    // closure is alive.
                    unsafe { (*job.work)(thread, item) };
                }
            }
        }
    }

    /// Lets nobody in any more, and waits for those inside: spinning, then giving way to others.
    fn close(&self) {
        let state = &self.now.0.state;
        state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0u32;
        while state.load(Ordering::Acquire) & INSIDE != 0 {
            spins += 1;
            if spins.is_multiple_of(4096) { thread::yield_now() } else { spin_loop() }
        }
    }

    fn serve(&self, thread: usize) {
        let mut last = 0;
        while let Some(job) = self.enter(&mut last) {
            if catch_unwind(AssertUnwindSafe(|| self.take_items(thread, job))).is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
            self.now.0.state.fetch_sub(1, Ordering::Release);
        }
    }

    /// Waits for a job other than number `last` and enters it. `None` when the pool is dropped.
    fn enter(&self, last: &mut u64) -> Option<Job> {
        let mut idle_since = None;
        let mut spins = 0u32;
        loop {
            let state = self.now.0.state.load(Ordering::Acquire);
            let number = state & !(JOB - 1);
            if state & OPEN != 0 && number != *last {
                let entered = self.now.0.state.compare_exchange_weak(
                    state,
                    state + 1,
                    Ordering::Acquire,
                    Ordering::Relaxed,
                );
                if entered.is_ok() {
                    *last = number;
                    // SAFETY: we are inside an open job; `run` changes it only when we have left.
                    return Some(unsafe { *self.now.0.job.get() });
                }
                continue;
            }
            if self.stop.load(Ordering::Relaxed) {
                return None;
            }
            spin_loop();
            spins += 1;
            if spins.is_multiple_of(64)
                && idle_since.get_or_insert_with(Instant::now).elapsed() > SPIN
            {
                self.park(*last);
                idle_since = None;
            }
        }
    }

    fn park(&self, last: u64) {
        self.parked.fetch_add(1, Ordering::SeqCst);
        let state = self.now.0.state.load(Ordering::SeqCst);
        let work = state & OPEN != 0 && state & !(JOB - 1) != last;
        if !work && !self.stop.load(Ordering::SeqCst) {
            thread::park();
        }
        self.parked.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.unpark.iter().for_each(Thread::unpark);
        for worker in self.workers.drain(..) {
            // A worker catches what its work throws, so it has nothing to report.
            let _ = worker.join();
        }
    }
}

/// A value for each thread of a pool, to keep buffers in.
pub struct PerThread<T>(Vec<Line<UnsafeCell<T>>>);

// SAFETY: `get` leaves it to its callers that a thread's value is that thread's alone.
unsafe impl<T: Send> Sync for PerThread<T> {}

impl<T: Default> PerThread<T> {
    /// For the threads of `pool`.
    pub fn new(pool: &Pool) -> Self {
        Self((0..pool.threads()).map(|_| Line(UnsafeCell::default())).collect())
    }

    /// Thread `thread`'s.
    ///
    /// # Safety
    /// While the result lives, nobody else asks for the same thread's: true of work that a pool
    /// calls and that asks for its own, if only one operation at a time uses these values.
    #[expect(clippy::mut_from_ref, reason = "the caller proves that it is the only one")]
    pub unsafe fn get(&self, thread: usize) -> &mut T {
        // SAFETY: the caller's word.
        unsafe { &mut *self.0[thread].0.get() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_once_on_any_number_of_threads() {
        for threads in [1, 2, 3, 8] {
            let pool = Pool::new(threads, &[]).unwrap();
            for items in [0, 1, 2, 7, 100, 1000] {
                let seen: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
                pool.run(items, &|thread, item| {
                    assert!(thread < threads);
                    seen[item].fetch_add(1, Ordering::Relaxed);
                });
                assert!(seen.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn every_item_once_when_tags_begin_again() {
        let pool = Pool::new(3, &[]).unwrap();
        for job in 0..Share::TAGS as usize + 100 {
            // The third thread has no share of the jobs before the last ones.
            let items = if job < Share::TAGS as usize { 2 } else { 7 };
            let seen = AtomicUsize::new(0);
            pool.run(items, &|_, item| {
                seen.fetch_add(1 << (8 * item), Ordering::Relaxed);
            });
            assert_eq!(seen.into_inner(), (0..items).map(|item| 1 << (8 * item)).sum(), "{job}");
        }
    }

    #[test]
    fn workers_wake_from_parking() {
        let pool = Pool::new(2, &[]).unwrap();
        for _ in 0..20 {
            thread::sleep(Duration::from_millis(1));
            let sum = AtomicUsize::new(0);
            pool.run(64, &|_, item| {
                sum.fetch_add(item, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 64 * 63 / 2);
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(2, &[]).unwrap();
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.run(100, &|_, item| assert_ne!(item, 50));
        }));
        assert!(result.is_err());
        let count = AtomicUsize::new(0);
        pool.run(100, &|_, _| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.into_inner(), 100);
    }
}
