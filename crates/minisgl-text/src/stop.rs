//! Stop strings in a text that comes in pieces.

use std::collections::HashMap;

/// Finds the first stop string in a text that comes in pieces, and holds back what may be the
/// beginning of one. How the text is cut into pieces makes no difference, and each byte costs the
/// same however many stop strings there are.
pub struct StopMatcher {
    automaton: Automaton,
    state: usize,
    held: String,
}

/// What a piece of text led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopOutcome {
    /// This much is certain to be in front of any stop string.
    Text(String),
    /// The text ends here.
    Matched {
        /// What comes before the stop string and was not given out yet.
        text: String,
        /// The stop string that was found: of several, the one that ends first, and of those the
        /// longest.
        stop: String,
    },
}

impl StopMatcher {
    /// Looks for any of `stops`; empty ones are never found.
    pub fn new(stops: Vec<String>) -> Self {
        Self { automaton: Automaton::new(stops), state: ROOT, held: String::new() }
    }

    /// Takes the next piece of the text. After a match, the search begins anew.
    pub fn push(&mut self, piece: &str) -> StopOutcome {
        let before = self.held.len();
        self.held.push_str(piece);
        for (at, byte) in piece.bytes().enumerate() {
            self.state = self.automaton.step(self.state, byte);
            if let Some(stop) = self.automaton.nodes[self.state].stop {
                let stop = self.automaton.stops[stop].clone();
                self.held.truncate(before + at + 1 - stop.len());
                self.state = ROOT;
                return StopOutcome::Matched { text: std::mem::take(&mut self.held), stop };
            }
        }
        // The state is the longest beginning of a stop string that the text ends with.
        let certain = self.held.len() - self.automaton.nodes[self.state].depth;
        let rest = self.held.split_off(certain);
        StopOutcome::Text(std::mem::replace(&mut self.held, rest))
    }

    /// What was held back, when no more text comes.
    pub fn finish(&mut self) -> String {
        self.state = ROOT;
        std::mem::take(&mut self.held)
    }
}

/// Aho and Corasick, "Efficient string matching" (1975): a tree of all beginnings of the stop
/// strings, in which each node also knows the longest proper suffix of itself in the tree.
struct Automaton {
    stops: Vec<String>,
    nodes: Vec<Node>,
    children: HashMap<(usize, u8), usize>,
}

#[derive(Default)]
struct Node {
    depth: usize,
    /// Where to go on when no child has the next byte.
    suffix: usize,
    /// The longest stop string that ends here.
    stop: Option<usize>,
}

const ROOT: usize = 0;

impl Automaton {
    fn new(stops: Vec<String>) -> Self {
        let mut automaton = Self { stops, nodes: vec![Node::default()], children: HashMap::new() };
        for index in 0..automaton.stops.len() {
            automaton.add(index);
        }
        automaton.link_suffixes();
        automaton
    }

    fn add(&mut self, index: usize) {
        let mut node = ROOT;
        for byte in self.stops[index].bytes() {
            let depth = self.nodes[node].depth + 1;
            node = *self.children.entry((node, byte)).or_insert_with(|| {
                self.nodes.push(Node { depth, ..Node::default() });
                self.nodes.len() - 1
            });
        }
        if node != ROOT {
            self.nodes[node].stop = Some(index);
        }
    }

    /// A node's suffix is shallower than the node, so shallow nodes come first.
    fn link_suffixes(&mut self) {
        let mut edges: Vec<_> =
            self.children.iter().map(|(&(from, byte), &to)| (from, byte, to)).collect();
        edges.sort_unstable_by_key(|&(from, ..)| self.nodes[from].depth);
        for (from, byte, to) in edges {
            let suffix = if from == ROOT { ROOT } else { self.step(self.nodes[from].suffix, byte) };
            self.nodes[to].suffix = suffix;
            self.nodes[to].stop = self.nodes[to].stop.or(self.nodes[suffix].stop);
        }
    }

    fn step(&self, mut node: usize, byte: u8) -> usize {
        loop {
            match self.children.get(&(node, byte)) {
                Some(&child) => return child,
                None if node == ROOT => return ROOT,
                None => node = self.nodes[node].suffix,
            }
        }
    }
}
