//! What the scheduler asks of a prefix cache.

use crate::naive::NaiveCache;
use crate::pages::{PageLease, PagePool};
use crate::plan::PageId;
use crate::radix::RadixCache;

/// A point in a prefix cache: a sequence of whole pages of tokens, from the root to here. It stays
/// valid while it is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub(crate) u32);

impl NodeId {
    /// The empty sequence.
    pub const ROOT: NodeId = NodeId(0);
}

/// Remembers which pages hold K and V of which token sequences, and owns these pages.
///
/// Every sequence that comes in is a whole number of pages.
pub trait PrefixCache: Send {
    /// Follows `tokens` from `from` as far as they are cached, appends the pages found to
    /// `pages`, and returns where it ended. The result is not locked.
    fn find(&mut self, from: NodeId, tokens: &[u32], pages: &mut Vec<PageId>) -> NodeId;

    /// Adds `tokens` behind `from`, in the first pages of `leases`, and takes those out of it.
    /// Nothing behind `from` may match `tokens`. The caller's lock on `from` moves to the result.
    fn append(&mut self, from: NodeId, tokens: &[u32], leases: &mut Vec<PageLease>) -> NodeId;

    /// The tokens from the root to `node`.
    fn sequence(&self, node: NodeId) -> Vec<u32>;

    /// Keeps the pages from the root to `node` from eviction, until as many `unlock`s.
    fn lock(&mut self, node: NodeId);

    /// Undoes one `lock`.
    fn unlock(&mut self, node: NodeId);

    /// Gives the least recently used unlocked pages back, at most `pages`; returns how many.
    fn evict(&mut self, pages: usize, pool: &mut PagePool) -> usize;

    /// For each of the sequences that end at `ends`, with how many pages it had best be taken together
    /// with others that begin with the same ones, if up to `lot` sequences can be: where these pages
    /// end, and their number.
    fn shared(&mut self, ends: &[NodeId], lot: usize) -> Vec<Option<(NodeId, usize)>>;

    /// Pages owned.
    fn cached_pages(&self) -> usize;

    /// Pages that `evict` could give back now.
    fn evictable_pages(&self) -> usize;

    /// Panics unless the cache's own account is right; tells every page it owns to `page`.
    fn check_integrity(&self, page: &mut dyn FnMut(PageId));
}

/// Which prefix cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheType {
    /// Prefixes are shared through a radix tree.
    #[default]
    Radix,
    /// Nothing is shared.
    Naive,
}

impl CacheType {
    /// An empty cache of this type.
    pub fn build(self, page_size: usize) -> Box<dyn PrefixCache> {
        match self {
            CacheType::Radix => Box::new(RadixCache::new(page_size)),
            CacheType::Naive => Box::new(NaiveCache),
        }
    }
}
