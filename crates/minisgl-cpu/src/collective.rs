//! Tensor parallelism through shared memory: ranks lay their parts on a table and all read them.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use minisgl_tensor::{BackendError, Collective, Result, Tensor};

use crate::memory::{Shared, view};

type Parts = Arc<Vec<Arc<Vec<f32>>>>;

struct SharedMemory {
    rank: usize,
    size: usize,
    timeout: Duration,
    table: Arc<(Mutex<Table>, Condvar)>,
}

#[derive(Default)]
struct Table {
    /// Exchanges finished.
    round: u64,
    parts: Vec<Option<Arc<Vec<f32>>>>,
    filled: usize,
    /// The last round's parts, in rank order.
    last: Parts,
    /// A rank gave up: nobody waits any more.
    broken: bool,
}

/// The ends of a group of `size` ranks in this process. Waiting longer than `timeout` for the
/// others, or for a rank whose end was dropped, is an error on every rank.
pub fn shared_memory_group(size: usize, timeout: Duration) -> Vec<Arc<dyn Collective>> {
    let table = Table { parts: vec![None; size], ..Table::default() };
    let table = Arc::new((Mutex::new(table), Condvar::new()));
    let end = |rank| SharedMemory { rank, size, timeout, table: Arc::clone(&table) };
    (0..size).map(|rank| Arc::new(end(rank)) as Arc<dyn Collective>).collect()
}

impl SharedMemory {
    /// Everybody's parts, in rank order.
    fn exchange(&self, mine: &[f32]) -> Result<Parts> {
        let (table, changed) = &*self.table;
        let mut guard = table.lock().unwrap_or_else(PoisonError::into_inner);
        let round = guard.round;
        if !guard.broken {
            guard.parts[self.rank] = Some(Arc::new(mine.to_vec()));
            guard.filled += 1;
        }
        if guard.filled == self.size {
            guard.last = Arc::new(guard.parts.iter_mut().filter_map(Option::take).collect());
            guard.filled = 0;
            guard.round += 1;
            changed.notify_all();
        }
        let deadline = Instant::now() + self.timeout;
        while guard.round == round {
            let left = deadline.saturating_duration_since(Instant::now());
            if guard.broken || left.is_zero() {
                guard.broken = true;
                changed.notify_all();
                let message = "another rank is gone or late";
                return Err(BackendError::Device(message.into()));
            }
            guard = changed.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(Arc::clone(&guard.last))
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        let (table, changed) = &*self.table;
        table.lock().unwrap_or_else(PoisonError::into_inner).broken = true;
        changed.notify_all();
    }
}

impl Collective for SharedMemory {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn all_reduce(&self, tensor: &Tensor) -> Result<()> {
        let parts = self.exchange(view(tensor))?;
        // SAFETY: the tensor is this rank's; what the others read is the copy on the table.
        let out = unsafe { Shared::<f32>::of(tensor).all() };
        for (i, out) in out.iter_mut().enumerate() {
            *out = parts.iter().map(|part| part[i]).sum();
        }
        Ok(())
    }

    fn all_gather_cols(&self, part: &Tensor, out: &Tensor) -> Result<()> {
        let parts = self.exchange(view(part))?;
        let width = part.row_len();
        // SAFETY: as above.
        let out = unsafe { Shared::<f32>::of(out).all() };
        for (i, out) in out.chunks_exact_mut(width).enumerate() {
            out.copy_from_slice(&parts[i % self.size][i / self.size * width..][..width]);
        }
        Ok(())
    }
}
