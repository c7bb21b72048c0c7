//! A request's tokens, kept once.

use std::ops::Range;

/// The prompt, then what was generated. While a request decodes, nobody asks for those of its tokens
/// that the prefix cache has as well; they are left out until it has to start again.
#[derive(Debug)]
pub(crate) struct Tokens {
    /// As many are left out in front.
    left_out: usize,
    kept: Vec<u32>,
}

impl Tokens {
    pub fn new(prompt: Vec<u32>) -> Self {
        Self { left_out: 0, kept: prompt }
    }

    /// How many there are, those that are left out with them.
    pub fn len(&self) -> usize {
        self.left_out + self.kept.len()
    }

    pub fn push(&mut self, token: u32) {
        self.kept.push(token);
    }

    /// Some of them, of which none may be left out.
    pub fn slice(&self, range: Range<usize>) -> &[u32] {
        &self.kept[range.start - self.left_out..range.end - self.left_out]
    }

    /// The one at a position that is not left out, if there is one.
    pub fn get(&self, position: usize) -> Option<u32> {
        self.kept.get(position - self.left_out).copied()
    }

    /// Leaves the first `count` out, at least those that are left out already.
    pub fn leave_out(&mut self, count: usize) {
        if count > self.left_out {
            self.kept = self.kept.split_off(count - self.left_out);
            self.left_out = count;
        }
    }

    /// Takes back what was left out, from a sequence that begins with it.
    pub fn take_back(&mut self, sequence: impl FnOnce() -> Vec<u32>) {
        if self.left_out > 0 {
            self.kept.splice(0..0, sequence().drain(..self.left_out));
            self.left_out = 0;
        }
    }
}
