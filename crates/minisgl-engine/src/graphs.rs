//! Decode batches of fixed sizes, recorded once and launched as one.

use minisgl_tensor::{BackendError, Graph};

use crate::layers::Logits;

/// One recorded forward pass for each bucket; two where some steps share prefixes and some do not.
#[derive(Default)]
pub struct Graphs {
    /// By rows, ascending.
    buckets: Vec<Bucket>,
}

struct Bucket {
    rows: usize,
    /// Whether it was recorded with `Batch::shared`.
    shares: bool,
    graph: Box<dyn Graph>,
    /// Where the graph leaves its logits.
    logits: Logits,
}

/// Sizes up to `rows_max`: 1, 2, 4, then every multiple of 8, of 16 from 32 on, of 32 from 128 on,
/// and `rows_max` itself.
pub fn bucket_sizes(rows_max: usize) -> Vec<usize> {
    let mut sizes = Vec::new();
    let mut rows = 1;
    while rows < rows_max {
        sizes.push(rows);
        rows = match rows {
            1 | 2 | 4 => rows * 2,
            8..32 => rows + 8,
            32..128 => rows + 16,
            _ => rows + 32,
        };
    }
    sizes.extend((rows_max > 0).then_some(rows_max));
    sizes
}

impl Graphs {
    pub fn push(&mut self, rows: usize, shares: bool, graph: Box<dyn Graph>, logits: Logits) {
        self.buckets.push(Bucket { rows, shares, graph, logits });
        self.buckets.sort_by_key(|bucket| bucket.rows);
    }

    /// The smallest bucket that holds `rows`.
    pub fn bucket_for(&self, rows: usize) -> Option<usize> {
        self.buckets.iter().map(|bucket| bucket.rows).find(|size| *size >= rows)
    }

    /// Launches the graph of bucket `size` with shared prefixes or without; its logits.
    pub fn launch(&self, size: usize, shares: bool) -> Result<&Logits, BackendError> {
        let wanted = |bucket: &&Bucket| (bucket.rows, bucket.shares) == (size, shares);
        let bucket = self.buckets.iter().find(wanted).expect("both ways of a size are recorded");
        bucket.graph.launch()?;
        Ok(&bucket.logits)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use minisgl_cpu::{CpuBackend, CpuOptions};
    use minisgl_tensor::{Backend, DType, Result};

    use super::*;

    struct Noting(Arc<AtomicUsize>, usize);

    impl Graph for Noting {
        fn launch(&self) -> Result<()> {
            self.0.store(self.1, Ordering::SeqCst);
            Ok(())
        }
    }

    #[test]
    fn a_step_finds_the_smallest_graph_that_is_like_it() {
        let backend = CpuBackend::new(CpuOptions { threads: Some(1), ..CpuOptions::default() });
        let values = backend.unwrap().alloc(DType::F32, &[8, 4]).unwrap();
        let logits = Logits { values, survey: None };
        let (mut graphs, launched) = (Graphs::default(), Arc::new(AtomicUsize::new(0)));
        for (number, (rows, shares)) in
            [(8, false), (8, true), (4, false), (4, true), (1, false)].into_iter().enumerate()
        {
            let graph = Noting(Arc::clone(&launched), number);
            graphs.push(rows, shares, Box::new(graph), logits.first(rows));
        }
        for (rows, shares, number) in [(1, false, 4), (3, true, 3), (4, false, 2), (5, true, 1)] {
            let size = graphs.bucket_for(rows).unwrap();
            assert!(graphs.launch(size, shares).unwrap().values.dim(0) >= rows);
            assert_eq!(launched.load(Ordering::SeqCst), number, "{rows} rows, {shares}");
        }
        assert_eq!(graphs.bucket_for(9), None);
    }
}
