//! Random operations on pages and prefix cache, against a model that is too simple to be wrong.

mod common;

use std::collections::HashMap;

use common::Random;
use minisgl_scheduler::cache::CacheType;
use minisgl_scheduler::memory::{Holding, KvMemory};
use minisgl_scheduler::pages::PageLease;
use minisgl_scheduler::plan::PageId;

/// A request as the model sees it: what it computed, and in which pages.
struct Request {
    holding: Holding,
    tokens: Vec<u32>,
    computed: usize,
    pages: Vec<PageId>,
}

/// Operations on a memory of few pages and few different tokens, so that everything collides.
struct Model {
    memory: KvMemory,
    requests: Vec<Request>,
    replaced: Vec<PageLease>,
    /// What was computed into each page: the whole sequence up to the page's end.
    written: HashMap<PageId, Vec<u32>>,
    random: Random,
    page_size: usize,
    /// Pages found in the cache, pages replaced by equal ones, and leases that were refused.
    seen: [usize; 3],
}

impl Model {
    fn new(page_size: usize, pages: usize, cache: CacheType, seed: u8) -> Self {
        Self {
            memory: KvMemory::new(pages, page_size, cache),
            requests: Vec::new(),
            replaced: Vec::new(),
            written: HashMap::new(),
            random: Random(seed.into()),
            page_size,
            seen: [0; 3],
        }
    }

    fn below(&mut self, bound: usize) -> usize {
        self.random.below(bound)
    }

    fn step(&mut self) {
        match self.below(10) {
            0..=2 if self.requests.len() < 12 => self.open(),
            0..=6 => self.compute(),
            7 | 8 => self.close(),
            _ if self.below(20) == 0 => self.flush(),
            _ => self.release(),
        }
        let holdings = self.requests.iter().map(|request| &request.holding);
        self.memory.check_integrity(holdings, self.replaced.iter());
        self.check_pages();
    }

    /// A request whose tokens have many prefixes in common with others'.
    fn open(&mut self) {
        let len = 1 + self.below(6 * self.page_size + 3);
        let tokens: Vec<u32> = (0..len).map(|_| (self.below(8) == 0) as u32).collect();
        let mut holding = self.memory.open();
        let pages = self.memory.follow(&mut holding, &tokens);
        let computed = pages.len() * self.page_size;
        assert!(computed <= tokens.len());
        self.seen[0] += pages.len();
        self.requests.push(Request { holding, tokens, computed, pages });
    }

    /// A chunk of a request: follows the cache, leases, writes, publishes.
    fn compute(&mut self) {
        if self.requests.is_empty() {
            return;
        }
        let at = self.below(self.requests.len());
        let chunk = 1 + self.below(2 * self.page_size);
        let request = &mut self.requests[at];
        let found = self.memory.follow(&mut request.holding, &request.tokens);
        request.computed += found.len() * self.page_size;
        request.pages.extend(found);
        let end = request.tokens.len().min(request.computed + chunk);
        let available = self.memory.available_pages();
        let held = request.holding.pages();
        let needed = self.memory.pages_for(end).saturating_sub(held);
        let grown = self.memory.grow(&mut request.holding, self.memory.pages_for(end));
        assert_eq!(grown, needed <= available, "growth fails only where pages are missing");
        if !grown {
            self.seen[2] += 1;
            return;
        }
        request.pages.extend(request.holding.leased_from(held.min(request.pages.len())));
        for index in request.computed / self.page_size..end.div_ceil(self.page_size) {
            let upto = end.min((index + 1) * self.page_size);
            self.written.insert(request.pages[index], request.tokens[..upto].to_vec());
        }
        request.computed = request.computed.max(end);
        let shared = self.memory.shared_len(&request.holding);
        let computed = &request.tokens[shared..request.computed];
        let duplicates = self.memory.publish(&mut request.holding, computed);
        let shared = self.memory.shared_len(&request.holding);
        assert_eq!(self.memory.shared_tokens(&request.holding), request.tokens[..shared]);
        if let Some(duplicates) = duplicates {
            assert_eq!(duplicates.pages.len(), duplicates.replaced.len());
            let places = duplicates.first..duplicates.first + duplicates.pages.len();
            request.pages.splice(places, duplicates.pages);
            self.seen[1] += duplicates.replaced.len();
            self.replaced.extend(duplicates.replaced);
        }
    }

    fn close(&mut self) {
        if !self.requests.is_empty() {
            let at = self.below(self.requests.len());
            let request = self.requests.swap_remove(at);
            self.memory.close(request.holding);
        }
    }

    fn release(&mut self) {
        self.memory.release(std::mem::take(&mut self.replaced));
    }

    fn flush(&mut self) {
        let evictable = self.memory.available_pages() - self.memory.free_pages();
        assert_eq!(self.memory.flush(), evictable);
    }

    /// Every page of every request still has what the request computed, or found, there.
    fn check_pages(&self) {
        for request in &self.requests {
            assert_eq!(request.pages.len(), request.holding.pages());
            for (index, page) in request.pages.iter().enumerate() {
                let start = index * self.page_size;
                let end = request.computed.min(start + self.page_size);
                if end > start {
                    assert_eq!(self.written[page], request.tokens[..end], "page {}", page.0);
                }
            }
        }
    }
}

#[test]
fn random_operations_never_lose_or_share_a_page_wrongly() {
    let mut refused_in_all = 0;
    for cache in [CacheType::Radix, CacheType::Naive] {
        for (seed, (page_size, pages)) in
            [(1, 20), (1, 50), (2, 30), (3, 25), (4, 40), (16, 30)].into_iter().enumerate()
        {
            let mut model = Model::new(page_size, pages, cache, seed as u8);
            for _ in 0..20_000 {
                model.step();
            }
            for request in std::mem::take(&mut model.requests) {
                model.memory.close(request.holding);
            }
            model.release();
            assert_eq!(model.memory.available_pages(), pages);
            model.flush();
            let is_radix = cache == CacheType::Radix;
            let [found, replaced, refused] = model.seen;
            assert_eq!(found > 100, is_radix, "{found}");
            // Pages of one token are followed one by one, and never computed twice.
            assert_eq!(replaced > 0, is_radix && page_size > 1, "{replaced}");
            refused_in_all += refused;
            assert_eq!(model.memory.free_pages(), pages);
        }
    }
    assert!(refused_in_all > 1000, "the pools are meant to be too small at times");
}

#[test]
fn what_was_used_last_is_evicted_last() {
    let mut memory = KvMemory::new(8, 2, CacheType::Radix);
    let mut run = |tokens: &[u32]| {
        let mut holding = memory.open();
        let found = memory.follow(&mut holding, tokens).len();
        assert!(memory.grow(&mut holding, tokens.len() / 2));
        let new = &tokens[memory.shared_len(&holding)..];
        assert!(memory.publish(&mut holding, new).is_none());
        memory.close(holding);
        found
    };
    assert_eq!(run(&[1, 2, 3, 4]), 0);
    assert_eq!(run(&[1, 2, 5, 6]), 1);
    assert_eq!(run(&[7, 8, 9, 10]), 0);
    // Five pages are cached. The oldest branch is used again; the second oldest has to go.
    assert_eq!(run(&[1, 2, 3, 4]), 2);
    assert_eq!(run(&[20, 21, 22, 23, 24, 25, 26, 27]), 0);
    assert_eq!(run(&[1, 2, 3, 4]), 2);
    // A prefix outlives what hangs on it.
    assert_eq!(run(&[1, 2, 5, 6]), 1);
}
