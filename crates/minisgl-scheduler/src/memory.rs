//! The KV cache as running requests use it: a pool of pages with a prefix cache over it.

use std::collections::HashMap;

use crate::cache::{CacheType, NodeId, PrefixCache};
use crate::pages::{PageLease, PagePool};
use crate::plan::{PageId, SharedPrefix};

/// Free pages + cached pages + leased pages = all pages.
pub struct KvMemory {
    page_size: usize,
    pool: PagePool,
    cache: Box<dyn PrefixCache>,
}

/// The pages of one request, in the order of its tokens: first those that the cache owns and that
/// are locked for it, then its own. Goes back by [`KvMemory::close`].
#[derive(Debug)]
#[must_use = "a holding that is dropped is pages lost"]
pub struct Holding {
    node: NodeId,
    /// Owned by the cache.
    shared_pages: usize,
    /// Of these, how many another request computed.
    borrowed_pages: usize,
    leases: Vec<PageLease>,
}

impl Holding {
    /// Pages in all.
    pub fn pages(&self) -> usize {
        self.shared_pages + self.leases.len()
    }

    /// Pages that the cache may keep for nobody else once this holding is closed.
    pub fn own_pages(&self) -> usize {
        self.pages() - self.borrowed_pages
    }

    /// The last pages, from `index` on, which must all be the holding's own.
    pub fn leased_from(&self, index: usize) -> impl Iterator<Item = PageId> {
        self.leases[index - self.shared_pages..].iter().map(PageLease::page)
    }
}

/// What [`KvMemory::publish`] found to be in the cache already, from another request.
#[derive(Debug, Default)]
pub struct Duplicates {
    /// Index in the holding of the first page that was replaced.
    pub first: usize,
    /// The cached pages that took the place of the holding's own.
    pub pages: Vec<PageId>,
    /// The pages that they replaced. A step in flight may still read them.
    pub replaced: Vec<PageLease>,
}

impl KvMemory {
    /// `pages` free pages of `page_size` tokens, and an empty cache.
    pub fn new(pages: usize, page_size: usize, cache_type: CacheType) -> Self {
        assert!((1..=256).contains(&page_size), "a page has 1 to 256 tokens, not {page_size}");
        Self { page_size, pool: PagePool::new(pages), cache: cache_type.build(page_size) }
    }

    /// A holding of no page.
    pub fn open(&mut self) -> Holding {
        self.cache.lock(NodeId::ROOT);
        Holding { node: NodeId::ROOT, shared_pages: 0, borrowed_pages: 0, leases: Vec::new() }
    }

    /// Adds the cached pages of `tokens` that follow those which the holding has, and tells which
    /// they are. Nothing is added behind a page that only the holding has.
    pub fn follow(&mut self, holding: &mut Holding, tokens: &[u32]) -> Vec<PageId> {
        let mut pages = Vec::new();
        let tokens = tokens.get(holding.shared_pages * self.page_size..).unwrap_or_default();
        if holding.leases.is_empty() && tokens.len() >= self.page_size {
            let node = self.cache.find(holding.node, tokens, &mut pages);
            self.cache.lock(node);
            self.cache.unlock(holding.node);
            holding.node = node;
            holding.shared_pages += pages.len();
            holding.borrowed_pages += pages.len();
        }
        pages
    }

    /// Leases pages until the holding has `pages`, evicting what is cached if it must; all or, by
    /// returning false, none.
    pub fn grow(&mut self, holding: &mut Holding, pages: usize) -> bool {
        let count = pages.saturating_sub(holding.pages());
        let missing = count.saturating_sub(self.pool.free_pages());
        if missing > self.cache.evictable_pages() {
            return false;
        }
        if missing > 0 {
            self.cache.evict(missing, &mut self.pool);
        }
        holding.leases.extend((0..count).map_while(|_| self.pool.lease()));
        true
    }

    /// Tokens whose pages the cache has for a holding, the first ones of its request.
    pub fn shared_len(&self, holding: &Holding) -> usize {
        holding.shared_pages * self.page_size
    }

    /// These tokens.
    pub fn shared_tokens(&self, holding: &Holding) -> Vec<u32> {
        self.cache.sequence(holding.node)
    }

    /// Shares the whole pages of `tokens`, which follow the holding's shared ones and whose K and V
    /// are computed by steps that have been launched or are about to be, with other requests. Where
    /// another request was faster, its pages replace the holding's own.
    pub fn publish(&mut self, holding: &mut Holding, tokens: &[u32]) -> Option<Duplicates> {
        let pages = tokens.len() / self.page_size;
        if pages == 0 {
            return None;
        }
        let first = holding.shared_pages;
        let tokens = &tokens[..pages * self.page_size];
        let mut found = Vec::new();
        let node = self.cache.find(holding.node, tokens, &mut found);
        let mut duplicates = None;
        if !found.is_empty() {
            self.cache.lock(node);
            self.cache.unlock(holding.node);
            let replaced = holding.leases.drain(..found.len()).collect();
            holding.shared_pages += found.len();
            holding.borrowed_pages += found.len();
            duplicates = Some(Duplicates { first, pages: found, replaced });
        }
        let tokens = &tokens[(holding.shared_pages - first) * self.page_size..];
        let leases_before = holding.leases.len();
        holding.node = self.cache.append(node, tokens, &mut holding.leases);
        holding.shared_pages += leases_before - holding.leases.len();
        duplicates
    }

    /// Of these holdings, those that had best be taken together, and the pages that they begin with,
    /// if up to `lot` of them can be.
    pub fn shared_prefixes<'a>(
        &mut self,
        holdings: impl Iterator<Item = &'a Holding>,
        lot: usize,
    ) -> Vec<SharedPrefix> {
        let ends: Vec<NodeId> = holdings.map(|holding| holding.node).collect();
        let mut prefixes: Vec<SharedPrefix> = Vec::new();
        let mut place_of = HashMap::new();
        for (row, group) in self.cache.shared(&ends, lot).into_iter().enumerate() {
            let Some((end, pages)) = group else { continue };
            let place = *place_of.entry(end).or_insert(prefixes.len());
            if place == prefixes.len() {
                prefixes.push(SharedPrefix { rows: Vec::new(), pages: pages as u32 });
            }
            prefixes[place].rows.push(row as u32);
        }
        prefixes
    }

    /// Takes a request's pages back; those that were published stay cached.
    pub fn close(&mut self, holding: Holding) {
        self.cache.unlock(holding.node);
        self.release(holding.leases);
    }

    /// Takes replaced pages back.
    pub fn release(&mut self, leases: impl IntoIterator<Item = PageLease>) {
        for lease in leases {
            self.pool.release(lease);
        }
    }

    /// Empties the cache of what nobody has locked; returns how many pages that freed.
    pub fn flush(&mut self) -> usize {
        self.cache.evict(usize::MAX, &mut self.pool)
    }

    /// Tokens in a page.
    pub fn page_size(&self) -> usize {
        self.page_size
    }

    /// Pages that `tokens` tokens need.
    pub fn pages_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.page_size)
    }

    /// Pages that could be leased now.
    pub fn available_pages(&self) -> usize {
        self.pool.free_pages() + self.cache.evictable_pages()
    }

    /// Pages that nobody holds and that cache nothing.
    pub fn free_pages(&self) -> usize {
        self.pool.free_pages()
    }

    /// Pages that the cache owns.
    pub fn cached_pages(&self) -> usize {
        self.cache.cached_pages()
    }

    /// Pages that the requests own.
    pub fn leased_pages(&self) -> usize {
        self.pool.pages() - self.free_pages() - self.cached_pages()
    }

    /// All pages.
    pub fn pages(&self) -> usize {
        self.pool.pages()
    }

    /// Panics unless every page is in exactly one place, given all holdings and replaced pages.
    pub fn check_integrity<'a>(
        &self,
        holdings: impl Iterator<Item = &'a Holding>,
        replaced: impl Iterator<Item = &'a PageLease>,
    ) {
        let mut held = Vec::new();
        self.cache.check_integrity(&mut |page| held.push(page));
        held.extend(holdings.flat_map(|holding| &holding.leases).map(PageLease::page));
        held.extend(replaced.map(PageLease::page));
        self.pool.check_integrity(held.into_iter());
    }
}
