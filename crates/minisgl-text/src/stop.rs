//! Stop strings in a text that comes in pieces.

/// Finds the first of several stop strings in a text that comes in pieces, and holds back what may
/// be the beginning of one.
pub struct StopMatcher {
    stops: Vec<String>,
    longest: usize,
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
        /// The stop string that was found: of several, the one that begins first, and of those the
        /// one that is named first.
        stop: String,
    },
}

impl StopMatcher {
    /// Looks for any of `stops`; empty ones are never found.
    pub fn new(mut stops: Vec<String>) -> Self {
        stops.retain(|stop| !stop.is_empty());
        let longest = stops.iter().map(String::len).max().unwrap_or(0);
        Self { stops, longest, held: String::new() }
    }

    /// Takes the next piece of the text.
    pub fn push(&mut self, piece: &str) -> StopOutcome {
        if self.stops.is_empty() {
            return StopOutcome::Text(piece.to_string());
        }
        self.held.push_str(piece);
        if let Some((at, stop)) = self.first_match() {
            let stop = stop.to_string();
            self.held.truncate(at);
            return StopOutcome::Matched { text: std::mem::take(&mut self.held), stop };
        }
        let kept = self.unfinished_from();
        let rest = self.held.split_off(kept);
        StopOutcome::Text(std::mem::replace(&mut self.held, rest))
    }

    /// What was held back, when no more text comes.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    fn first_match(&self) -> Option<(usize, &str)> {
        let found =
            self.stops.iter().filter_map(|stop| Some((self.held.find(stop)?, stop.as_str())));
        found.min_by_key(|(at, _)| *at)
    }

    /// Where the text may be beginning a stop string that is not finished.
    fn unfinished_from(&self) -> usize {
        let first = (self.held.len() + 1).saturating_sub(self.longest);
        let starts = (first..self.held.len()).filter(|&at| self.held.is_char_boundary(at));
        let may_begin =
            |at: &usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[*at..]));
        starts.into_iter().find(may_begin).unwrap_or(self.held.len())
    }
}
