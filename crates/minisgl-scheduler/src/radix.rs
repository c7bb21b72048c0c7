//! The radix cache: token sequences as paths of a tree, a node for each stretch without a branch.
//!
//! After RadixAttention (Zheng et al., "SGLang: Efficient Execution of Structured Language Model
//! Programs", 2024). All operations take time in the length of the tokens they are given, and
//! O(log n) in the number of nodes.

mod shared;

use std::collections::{BTreeSet, HashMap};
use std::mem;

use crate::cache::{NodeId, PrefixCache};
use crate::pages::{PageLease, PagePool};
use crate::plan::PageId;

/// A stretch of tokens and the pages that hold their K and V.
#[derive(Debug)]
struct Node {
    parent: NodeId,
    /// `pages.len() * page_size` of them. Empty in the root only.
    tokens: Vec<u32>,
    pages: Vec<PageLease>,
    /// By their first page of tokens.
    children: HashMap<Box<[u32]>, NodeId>,
    /// Locks held on this node itself, plus the number of its locked children. So a lock climbs
    /// only to the first node that is locked already, and a node that is split stays right.
    locks: usize,
    /// When its last lock was given back.
    used_at: u64,
}

/// See the module. Nodes live in an arena; a `NodeId` is an index.
#[derive(Debug)]
pub struct RadixCache {
    page_size: usize,
    nodes: Vec<Node>,
    vacant: Vec<NodeId>,
    /// Exactly the unlocked leaves, least recently used first.
    evictable_leaves: BTreeSet<(u64, NodeId)>,
    clock: u64,
    cached_pages: usize,
    evictable_pages: usize,
    tally: shared::Tally,
}

impl RadixCache {
    /// An empty tree, over pages of `page_size` tokens.
    pub fn new(page_size: usize) -> Self {
        let root = Node::new(NodeId::ROOT, Vec::new(), Vec::new());
        Self {
            page_size,
            nodes: vec![root],
            vacant: Vec::new(),
            evictable_leaves: BTreeSet::new(),
            clock: 0,
            cached_pages: 0,
            evictable_pages: 0,
            tally: shared::Tally::default(),
        }
    }

    fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0 as usize]
    }

    fn node_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[id.0 as usize]
    }

    fn insert_node(&mut self, node: Node) -> NodeId {
        if let Some(id) = self.vacant.pop() {
            *self.node_mut(id) = node;
            return id;
        }
        self.nodes.push(node);
        NodeId(u32::try_from(self.nodes.len() - 1).expect("a node has a page, and pages 32 bits"))
    }

    /// Cuts `child` in two behind its first `pages` pages, and returns the upper half. The lower
    /// half keeps the id, because who holds it means the whole sequence down to its end.
    fn split(&mut self, child: NodeId, pages: usize) -> NodeId {
        let page_size = self.page_size;
        let lower = self.node_mut(child);
        let tokens_below = lower.tokens.split_off(pages * page_size);
        let tokens = mem::replace(&mut lower.tokens, tokens_below);
        let pages_below = lower.pages.split_off(pages);
        let pages = mem::replace(&mut lower.pages, pages_below);
        let mut upper = Node::new(lower.parent, tokens, pages);
        upper.children.insert(lower.tokens[..page_size].into(), child);
        upper.locks = usize::from(lower.locks > 0);
        upper.used_at = lower.used_at;

        let parent = upper.parent;
        let key: Box<[u32]> = upper.tokens[..page_size].into();
        let upper = self.insert_node(upper);
        self.node_mut(child).parent = upper;
        self.node_mut(parent).children.insert(key, upper);
        upper
    }

    /// Removes a leaf whose pages are gone; its parent may become an unlocked leaf by it.
    fn remove_leaf(&mut self, leaf: NodeId, key: &[u32]) {
        let parent_id = self.node(leaf).parent;
        let parent = self.node_mut(parent_id);
        parent.children.remove(key);
        if parent.children.is_empty() && parent.locks == 0 && parent_id != NodeId::ROOT {
            let entry = (parent.used_at, parent_id);
            self.evictable_leaves.insert(entry);
        }
        self.vacant.push(leaf);
    }
}

impl PrefixCache for RadixCache {
    fn find(&mut self, from: NodeId, mut tokens: &[u32], pages: &mut Vec<PageId>) -> NodeId {
        let mut at = from;
        while tokens.len() >= self.page_size {
            let Some(&child) = self.node(at).children.get(&tokens[..self.page_size]) else { break };
            let node = self.node(child);
            let common = common_prefix_len(&node.tokens, tokens) / self.page_size;
            at = if common < node.pages.len() { self.split(child, common) } else { child };
            pages.extend(self.node(at).pages.iter().map(PageLease::page));
            tokens = &tokens[common * self.page_size..];
        }
        at
    }

    fn append(&mut self, from: NodeId, tokens: &[u32], leases: &mut Vec<PageLease>) -> NodeId {
        let count = tokens.len() / self.page_size;
        debug_assert_eq!(count * self.page_size, tokens.len(), "only whole pages are cached");
        if count == 0 {
            return from;
        }
        self.cached_pages += count;
        let leases = leases.drain(..count);
        let node = self.node_mut(from);
        debug_assert!(node.locks > 0, "the place to append to is locked");
        // The caller's lock is the only one, so nobody else means the sequence that ends here.
        if node.locks == 1 && node.children.is_empty() && from != NodeId::ROOT {
            node.tokens.extend_from_slice(tokens);
            node.pages.extend(leases);
            return from;
        }
        let mut child = Node::new(from, tokens.to_vec(), leases.collect());
        // The lock moves: `from` has a holder less and a locked child more.
        child.locks = 1;
        let child = self.insert_node(child);
        let key = tokens[..self.page_size].into();
        let before = self.node_mut(from).children.insert(key, child);
        assert!(before.is_none(), "what is appended was not cached before");
        child
    }

    fn sequence(&self, node: NodeId) -> Vec<u32> {
        let mut stretches = Vec::new();
        let mut at = node;
        while at != NodeId::ROOT {
            stretches.push(self.node(at).tokens.as_slice());
            at = self.node(at).parent;
        }
        stretches.reverse();
        stretches.concat()
    }

    fn lock(&mut self, node: NodeId) {
        let mut at = node;
        loop {
            let node = self.node_mut(at);
            node.locks += 1;
            if node.locks > 1 {
                return;
            }
            let (entry, pages, parent) = ((node.used_at, at), node.pages.len(), node.parent);
            self.evictable_pages -= pages;
            self.evictable_leaves.remove(&entry);
            if at == NodeId::ROOT {
                return;
            }
            at = parent;
        }
    }

    fn unlock(&mut self, node: NodeId) {
        self.clock += 1;
        let used_at = self.clock;
        let mut at = node;
        loop {
            let node = self.node_mut(at);
            node.locks = node.locks.checked_sub(1).expect("an unlock belongs to a lock");
            if node.locks > 0 || at == NodeId::ROOT {
                return;
            }
            node.used_at = used_at;
            let (is_leaf, pages, parent) =
                (node.children.is_empty(), node.pages.len(), node.parent);
            self.evictable_pages += pages;
            if is_leaf {
                self.evictable_leaves.insert((used_at, at));
            }
            at = parent;
        }
    }

    fn evict(&mut self, pages: usize, pool: &mut PagePool) -> usize {
        let mut evicted = 0;
        while evicted < pages {
            let Some(&entry) = self.evictable_leaves.first() else { break };
            let (_, leaf) = entry;
            let page_size = self.page_size;
            let node = self.node_mut(leaf);
            let kept = node.pages.len().saturating_sub(pages - evicted);
            evicted += node.pages.len() - kept;
            for lease in node.pages.drain(kept..) {
                pool.release(lease);
            }
            if kept > 0 {
                node.tokens.truncate(kept * page_size);
            } else {
                let tokens = mem::take(&mut node.tokens);
                self.evictable_leaves.remove(&entry);
                self.remove_leaf(leaf, &tokens[..page_size]);
            }
        }
        self.cached_pages -= evicted;
        self.evictable_pages -= evicted;
        evicted
    }

    fn shared(&mut self, ends: &[NodeId], lot: usize) -> Vec<Option<(NodeId, usize)>> {
        RadixCache::shared(self, ends, lot)
    }

    fn cached_pages(&self) -> usize {
        self.cached_pages
    }

    fn evictable_pages(&self) -> usize {
        self.evictable_pages
    }

    fn check_integrity(&self, page: &mut dyn FnMut(PageId)) {
        let (mut reached, mut cached, mut evictable, mut leaves) = (0, 0, 0, 0);
        let mut stack = vec![NodeId::ROOT];
        while let Some(id) = stack.pop() {
            let node = self.node(id);
            reached += 1;
            cached += node.pages.len();
            node.pages.iter().map(PageLease::page).for_each(&mut *page);
            assert_eq!(node.tokens.len(), node.pages.len() * self.page_size);
            assert_eq!(node.pages.is_empty(), id == NodeId::ROOT, "only the root is empty");
            let mut locked_children = 0;
            for (key, &child) in &node.children {
                assert_eq!(self.node(child).parent, id);
                assert_eq!(**key, self.node(child).tokens[..self.page_size]);
                locked_children += usize::from(self.node(child).locks > 0);
                stack.push(child);
            }
            assert!(node.locks >= locked_children, "a locked child locks its parent");
            if node.locks == 0 {
                evictable += node.pages.len();
            }
            let is_evictable_leaf =
                node.locks == 0 && node.children.is_empty() && id != NodeId::ROOT;
            assert_eq!(self.evictable_leaves.contains(&(node.used_at, id)), is_evictable_leaf);
            leaves += usize::from(is_evictable_leaf);
        }
        assert_eq!(reached + self.vacant.len(), self.nodes.len(), "nodes are lost");
        assert_eq!(leaves, self.evictable_leaves.len());
        assert_eq!(cached, self.cached_pages);
        assert_eq!(evictable, self.evictable_pages);
    }
}

impl Node {
    fn new(parent: NodeId, tokens: Vec<u32>, pages: Vec<PageLease>) -> Self {
        Self { parent, tokens, pages, children: HashMap::new(), locks: 0, used_at: 0 }
    }
}

/// How many tokens `a` and `b` begin with in common.
pub(crate) fn common_prefix_len(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}
