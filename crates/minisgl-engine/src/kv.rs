//! The paged KV pool.

use anyhow::{Result, ensure};
use minisgl_tensor::{Backend, Heads, KvLayer};

use crate::options::KvSize;

/// Every layer's pages.
pub struct KvPool {
    pub layers: Vec<KvLayer>,
}

/// What one page takes and what there is for it, on one rank.
#[derive(Clone, Copy, Debug)]
pub struct KvBudget {
    pub page_bytes: usize,
    pub free_bytes: usize,
}

impl KvBudget {
    pub fn measure(
        backend: &dyn Backend,
        layers: usize,
        heads: Heads,
        page_size: usize,
    ) -> Result<Self> {
        let element = backend.kv_dtype().block_bytes();
        let page_bytes = 2 * layers * heads.kv * page_size * heads.dim * element;
        Ok(Self { page_bytes, free_bytes: backend.memory()?.free })
    }

    /// How many pages the pool gets. `sequence_pages` is what the longest request takes.
    pub fn pages(&self, size: KvSize, sequence_pages: usize) -> Result<usize> {
        let fit = |bytes: f64| (bytes / self.page_bytes as f64) as usize;
        let all = fit(self.free_bytes as f64);
        let pages = match size {
            KvSize::Pages(pages) => pages,
            KvSize::FreeShare(share) => {
                ensure!(share > 0.0 && share <= 1.0, "--memory-ratio {share} is not in (0, 1]");
                fit(self.free_bytes as f64 * share)
            }
            KvSize::Modest => (4 * sequence_pages).min(fit(self.free_bytes as f64 / 8.0)),
        };
        ensure!(
            pages > 0,
            "there is no room for a KV pool: {} MB are free, of which all would make {all} pages",
            self.free_bytes >> 20
        );
        ensure!(
            pages <= all && u32::try_from(pages).is_ok(),
            "{pages} KV pages of {} KB do not fit into {} MB of free memory; {all} would",
            self.page_bytes >> 10,
            self.free_bytes >> 20
        );
        Ok(pages)
    }
}

impl KvPool {
    pub fn new(
        backend: &dyn Backend,
        layers: usize,
        heads: Heads,
        pages: usize,
        page_size: usize,
    ) -> Result<Self> {
        let shape = [pages, heads.kv, page_size, heads.dim];
        let dtype = backend.kv_dtype();
        let layers = (0..layers)
            .map(|_| {
                Ok(KvLayer { k: backend.alloc(dtype, &shape)?, v: backend.alloc(dtype, &shape)? })
            })
            .collect::<Result<_>>()?;
        Ok(Self { layers })
    }
}
