//! Which sequences begin alike, and for how many pages it pays to take them together.

use super::RadixCache;
use crate::cache::NodeId;

/// Prefixes of fewer tokens are not worth it: what is read of them once and not several times is no
/// more than what putting a row's two parts together again costs.
const TOKENS_MIN: usize = 64;

/// What is known of the nodes of one question.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// By node; what an earlier question left there has another number.
    seen: Vec<Seen>,
    question: u64,
    /// The nodes of this question, each behind its parent.
    order: Vec<NodeId>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    question: u64,
    /// Pages from the root to the end of the node.
    depth: usize,
    /// Sequences that end at it or below.
    rows: usize,
    /// Pages that are saved by the best choice among its children.
    saved_below: usize,
    /// Sequences that go through it are taken together here, or where an ancestor says so.
    is_end: bool,
    /// Where they are taken together.
    group: Option<NodeId>,
}

impl RadixCache {
    /// For each of the sequences that end at `ends`: the node to which it is taken together with
    /// others, and the pages down to there. The choice reads the fewest pages, if a lot of `lot`
    /// sequences reads a page once, and a sequence is in one lot at most.
    pub(super) fn shared(&mut self, ends: &[NodeId], lot: usize) -> Vec<Option<(NodeId, usize)>> {
        let mut tally = std::mem::take(&mut self.tally);
        tally.question += 1;
        tally.seen.resize(self.nodes.len(), Seen::default());
        tally.order.clear();
        for &end in ends {
            self.visit(end, &mut tally);
            tally.seen[end.0 as usize].rows += 1;
        }
        self.choose(lot, &mut tally);
        let group_of = |end: &NodeId| {
            let group = tally.seen[end.0 as usize].group?;
            Some((group, tally.seen[group.0 as usize].depth))
        };
        let groups = ends.iter().map(group_of).collect();
        self.tally = tally;
        groups
    }

    /// Notes a node and those above it, as far as they are not noted yet.
    fn visit(&self, end: NodeId, tally: &mut Tally) {
        let first = tally.order.len();
        let mut at = end;
        while tally.seen[at.0 as usize].question != tally.question {
            tally.seen[at.0 as usize] = Seen { question: tally.question, ..Seen::default() };
            tally.order.push(at);
            if at == NodeId::ROOT {
                break;
            }
            at = self.node(at).parent;
        }
        tally.order[first..].reverse();
        for i in first..tally.order.len() {
            let id = tally.order[i];
            let node = self.node(id);
            let above =
                if id == NodeId::ROOT { 0 } else { tally.seen[node.parent.0 as usize].depth };
            tally.seen[id.0 as usize].depth = above + node.pages.len();
        }
    }

    fn choose(&self, lot: usize, tally: &mut Tally) {
        for i in (0..tally.order.len()).rev() {
            let id = tally.order[i];
            let seen = &mut tally.seen[id.0 as usize];
            let is_long = seen.depth * self.page_size >= TOKENS_MIN;
            let saved_here =
                if is_long { seen.depth * (seen.rows - seen.rows.div_ceil(lot)) } else { 0 };
            seen.is_end = saved_here > 0 && saved_here >= seen.saved_below;
            let (rows, saved) = (seen.rows, saved_here.max(seen.saved_below));
            if id != NodeId::ROOT {
                let parent = &mut tally.seen[self.node(id).parent.0 as usize];
                parent.rows += rows;
                parent.saved_below += saved;
            }
        }
        for i in 0..tally.order.len() {
            let id = tally.order[i];
            let above = match id {
                NodeId::ROOT => None,
                _ => tally.seen[self.node(id).parent.0 as usize].group,
            };
            let seen = &mut tally.seen[id.0 as usize];
            seen.group = above.or(seen.is_end.then_some(id));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::PrefixCache;
    use crate::pages::PagePool;

    /// A tree over pages of 16 tokens, whose sequences are named by their pages' first tokens.
    struct Tree {
        cache: RadixCache,
        pool: PagePool,
    }

    impl Tree {
        fn new() -> Self {
            Self { cache: RadixCache::new(16), pool: PagePool::new(4096) }
        }

        fn add(&mut self, pages: &[u32]) -> NodeId {
            let tokens: Vec<u32> = pages.iter().flat_map(|page| vec![*page; 16]).collect();
            let mut found = Vec::new();
            let at = self.cache.find(NodeId::ROOT, &tokens, &mut found);
            self.cache.lock(at);
            let tokens = &tokens[found.len() * 16..];
            let mut leases = (0..tokens.len() / 16).map_while(|_| self.pool.lease()).collect();
            self.cache.append(at, tokens, &mut leases)
        }
    }

    /// Pages read by the best choice, tried out: all rows below a node together or not.
    fn fewest(rows: &[Vec<u32>], depth: usize, lot: usize) -> usize {
        let saved = |depth: usize, rows: usize| match depth * 16 < TOKENS_MIN {
            true => 0,
            false => depth * (rows - rows.div_ceil(lot)),
        };
        let mut next: Vec<u32> = rows.iter().filter_map(|row| row.get(depth).copied()).collect();
        next.sort_unstable();
        next.dedup();
        let below = |page: &u32| -> usize {
            let rows: Vec<_> =
                rows.iter().filter(|row| row.get(depth) == Some(page)).cloned().collect();
            fewest(&rows, depth + 1, lot)
        };
        saved(depth, rows.len()).max(next.iter().map(below).sum())
    }

    #[test]
    fn the_choice_reads_the_fewest_pages() {
        let mut state = 1_u64;
        let mut below = |bound: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % bound
        };
        let mut gained = 0;
        for _ in 0..300 {
            let mut tree = Tree::new();
            let lot = 2 + below(7) as usize;
            // All begin alike, then branch again and again.
            let system = below(12);
            let rows: Vec<Vec<u32>> = (0..1 + below(24))
                .map(|_| {
                    let mut pages = vec![7; system as usize];
                    for _ in 0..below(4) {
                        let (kind, len) = (below(2) as u32, 1 + below(6));
                        pages.extend((0..len).map(|page| 10 * kind + page as u32));
                    }
                    pages
                })
                .collect();
            let ends: Vec<NodeId> = rows.iter().map(|row| tree.add(row)).collect();
            // Where a path's node has been extended or cut since, its sequence ends there all the same.
            let groups = tree.cache.shared(&ends, lot);
            let mut members = std::collections::BTreeMap::<_, Vec<usize>>::new();
            for (row, group) in groups.iter().enumerate() {
                members.entry(*group).or_default().push(row);
            }
            let mut saved = 0;
            for (group, members) in &members {
                let Some((_, pages)) = group else { continue };
                let prefix = &rows[members[0]][..*pages];
                assert!(members.len() > 1 && pages * 16 >= TOKENS_MIN);
                assert!(members.iter().all(|row| rows[*row].starts_with(prefix)));
                saved += pages * (members.len() - members.len().div_ceil(lot));
            }
            assert_eq!(saved, fewest(&rows, 0, lot), "{rows:?} in lots of {lot}");
            gained += saved;
        }
        assert!(gained > 1000);
    }
}
