//! Decode batches of fixed sizes, recorded once and launched as one.

use minisgl_tensor::{BackendError, Graph, Tensor};

/// One recorded forward pass for each bucket.
#[derive(Default)]
pub struct Graphs {
    /// By rows, ascending.
    buckets: Vec<Bucket>,
}

struct Bucket {
    rows: usize,
    graph: Box<dyn Graph>,
    /// `[rows, vocabulary]`: where the graph leaves its logits.
    logits: Tensor,
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
    pub fn push(&mut self, rows: usize, graph: Box<dyn Graph>, logits: Tensor) {
        self.buckets.push(Bucket { rows, graph, logits });
        self.buckets.sort_by_key(|bucket| bucket.rows);
    }

    /// The smallest bucket that holds `rows`.
    pub fn bucket_for(&self, rows: usize) -> Option<usize> {
        self.buckets.iter().map(|bucket| bucket.rows).find(|size| *size >= rows)
    }

    /// Launches the graph of bucket `size`; its logits.
    pub fn launch(&self, size: usize) -> Result<&Tensor, BackendError> {
        let bucket = self.buckets.iter().find(|bucket| bucket.rows == size);
        let bucket = bucket.expect("bucket_for gave this size");
        bucket.graph.launch()?;
        Ok(&bucket.logits)
    }
}
