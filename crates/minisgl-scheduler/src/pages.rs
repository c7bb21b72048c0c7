//! Pages of the KV cache, and who holds them.

use crate::plan::PageId;

/// The right to write and read one page. Cannot be copied: whoever holds it gives it back to its
/// [`PagePool`] or hands it on.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a lease that is dropped is a page lost"]
pub struct PageLease(PageId);

impl PageLease {
    /// Which page.
    pub fn page(&self) -> PageId {
        self.0
    }
}

/// All pages, and which of them nobody holds.
#[derive(Debug)]
pub struct PagePool {
    free: Vec<PageId>,
    pages: usize,
}

impl PagePool {
    /// A pool of `pages` free pages.
    pub fn new(pages: usize) -> Self {
        let pages_u32 = u32::try_from(pages).expect("page ids have 32 bits");
        Self { free: (0..pages_u32).rev().map(PageId).collect(), pages }
    }

    /// Leases a free page, if there is one.
    pub fn lease(&mut self) -> Option<PageLease> {
        self.free.pop().map(PageLease)
    }

    /// Takes a page back.
    pub fn release(&mut self, lease: PageLease) {
        self.free.push(lease.0);
    }

    /// Pages that nobody holds.
    pub fn free_pages(&self) -> usize {
        self.free.len()
    }

    /// All pages.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Panics unless every page is exactly once either free or among `held`.
    pub fn check_integrity(&self, held: impl Iterator<Item = PageId>) {
        let mut seen = vec![false; self.pages];
        for page in self.free.iter().copied().chain(held) {
            let seen = &mut seen[page.0 as usize];
            assert!(!*seen, "page {} is in two places", page.0);
            *seen = true;
        }
        let lost = seen.iter().filter(|seen| !**seen).count();
        assert_eq!(lost, 0, "pages are neither free nor held");
    }
}
