//! A prefix cache that remembers nothing.

use crate::cache::{NodeId, PrefixCache};
use crate::pages::{PageLease, PagePool};
use crate::plan::PageId;

/// Finds nothing and takes no page, so that every request computes its whole prompt and gives all
/// of its pages back.
#[derive(Debug)]
pub struct NaiveCache;

impl PrefixCache for NaiveCache {
    fn find(&mut self, from: NodeId, _tokens: &[u32], _pages: &mut Vec<PageId>) -> NodeId {
        from
    }

    fn append(&mut self, from: NodeId, _tokens: &[u32], _leases: &mut Vec<PageLease>) -> NodeId {
        from
    }

    fn sequence(&self, _node: NodeId) -> Vec<u32> {
        Vec::new()
    }

    fn lock(&mut self, _node: NodeId) {}

    fn unlock(&mut self, _node: NodeId) {}

    fn evict(&mut self, _pages: usize, _pool: &mut PagePool) -> usize {
        0
    }

    fn shared(&mut self, ends: &[NodeId], _lot: usize) -> Vec<Option<(NodeId, usize)>> {
        vec![None; ends.len()]
    }

    fn cached_pages(&self) -> usize {
        0
    }

    fn evictable_pages(&self) -> usize {
        0
    }

    fn check_integrity(&self, _page: &mut dyn FnMut(PageId)) {}
}
