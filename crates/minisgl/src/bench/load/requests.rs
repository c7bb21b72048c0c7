//! What a load asks for: prompts from a file, made up, or as a trace has them.

use std::time::Duration;

use super::super::PythonRandom;

/// One request of a load.
#[derive(Clone, Debug, PartialEq)]
pub struct LoadRequest {
    /// What is asked.
    pub prompt: LoadPrompt,
    /// Tokens to answer with.
    pub output_tokens: u32,
    /// When it is sent, counted from the beginning, where a trace says so.
    pub at: Option<Duration>,
}

/// What is asked.
#[derive(Clone, Debug, PartialEq)]
pub enum LoadPrompt {
    /// These words.
    Text(String),
    /// Runs of made-up tokens, the same wherever a run's seed is the same.
    Runs(Vec<Run>),
}

/// Made-up tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Chooses the tokens.
    pub seed: u64,
    /// How many.
    pub tokens: u32,
}

impl LoadPrompt {
    /// Token ids below `id_end`; `None` for text.
    pub fn ids(&self, id_end: u32) -> Option<Vec<u32>> {
        match self {
            Self::Text(_) => None,
            Self::Runs(runs) => {
                let draw = |run: &Run| numbers(*run).map(move |x| (x % u64::from(id_end)) as u32);
                Some(runs.iter().flat_map(draw).collect())
            }
        }
    }

    /// Text: of made-up tokens, a common word each.
    pub fn text(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Runs(runs) => {
                let words = runs.iter().flat_map(|&run| numbers(run));
                let words = words.map(|x| WORDS[(x % WORDS.len() as u64) as usize]);
                words.collect::<Vec<_>>().join(" ")
            }
        }
    }
}

/// SplitMix64 (Steele, Lea and Flood, 2014), seeded with the run's seed.
fn numbers(run: Run) -> impl Iterator<Item = u64> {
    let mut state = run.seed.wrapping_mul(0xd134_2543_de82_ef95);
    (0..run.tokens).map(move |_| {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    })
}

/// Words that most vocabularies have as one token behind a space.
const WORDS: [&str; 48] = [
    "the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by",
    "on", "not", "he", "his", "but", "at", "are", "this", "have", "from", "or", "had", "an",
    "they", "which", "one", "you", "were", "all", "her", "she", "there", "would", "their", "we",
    "him", "been", "has", "when", "who", "will", "no", "more", "if",
];

/// Made-up requests.
#[derive(Clone, Debug)]
pub struct Synthetic {
    /// How many.
    pub requests: usize,
    /// Tokens of a prompt's own part, uniform with both ends in it.
    pub input_tokens: (u32, u32),
    /// Tokens of an answer, uniform.
    pub output_tokens: (u32, u32),
    /// Tokens in front that requests share.
    pub prefix_tokens: u32,
    /// Different such beginnings; requests take them in turn.
    pub prefixes: usize,
    /// Of the draw.
    pub seed: u64,
}

impl Synthetic {
    /// Draws them.
    pub fn draw(&self) -> Vec<LoadRequest> {
        let mut random = PythonRandom::new(self.seed);
        let mut next_seed = || u64::from(random.randint(0, u32::MAX - 1)) << 1;
        let prefixes: Vec<u64> = (0..self.prefixes.max(1)).map(|_| next_seed()).collect();
        let own: Vec<u64> = (0..self.requests).map(|_| next_seed()).collect();
        let mut uniform = |(low, high)| random.randint(low, high);
        let make = |(index, seed)| {
            let prefix = Run { seed: prefixes[index % prefixes.len()], tokens: self.prefix_tokens };
            // Odd, so that no prompt continues as another's prefix begins.
            let own = Run { seed: seed | 1, tokens: uniform(self.input_tokens) };
            let prompt = LoadPrompt::Runs(vec![prefix, own]);
            LoadRequest { prompt, output_tokens: uniform(self.output_tokens), at: None }
        };
        own.into_iter().enumerate().map(make).collect()
    }
}

/// Requests from lines of text, in turn until there are as many as are wanted.
pub fn from_lines(text: &str, requests: usize, output_tokens: u32) -> Vec<LoadRequest> {
    let lines = text.lines().filter(|line| !line.trim().is_empty());
    let prompts = lines.map(|line| {
        let prompt = serde_json::from_str::<serde_json::Value>(line).ok();
        let prompt = prompt.as_ref().and_then(|object| object["prompt"].as_str());
        prompt.unwrap_or(line).to_string()
    });
    let prompts: Vec<String> = prompts.collect();
    let turns = prompts.iter().cycle().take(requests);
    let make = |text: &String| LoadRequest {
        prompt: LoadPrompt::Text(text.clone()),
        output_tokens,
        at: None,
    };
    turns.map(make).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn made_up_prompts_share_what_they_should_and_no_more() {
        let synthetic = Synthetic {
            requests: 4,
            input_tokens: (5, 9),
            output_tokens: (3, 3),
            prefix_tokens: 20,
            prefixes: 2,
            seed: 7,
        };
        let drawn = synthetic.draw();
        assert_eq!(drawn, synthetic.draw());
        let ids: Vec<Vec<u32>> =
            drawn.iter().map(|request| request.prompt.ids(1000).unwrap()).collect();
        assert_eq!(ids[0][..20], ids[2][..20]);
        assert_eq!(ids[1][..20], ids[3][..20]);
        assert_ne!(ids[0][..20], ids[1][..20]);
        assert_ne!(ids[0][20..25], ids[2][20..25]);
        for (request, ids) in drawn.iter().zip(&ids) {
            assert!((25..=29).contains(&ids.len()) && ids.iter().all(|&id| id < 1000));
            assert_eq!(request.prompt.text().split(' ').count(), ids.len());
            assert_eq!(request.output_tokens, 3);
        }
    }

    #[test]
    fn lines_of_a_file_come_in_turn() {
        let requests = from_lines("one\n\n{\"prompt\": \"two\"}\n", 3, 5);
        let texts: Vec<String> = requests.iter().map(|request| request.prompt.text()).collect();
        assert_eq!(texts, ["one", "two", "one"]);
    }
}
