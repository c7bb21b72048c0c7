//! A model's thinking, told apart from its answer while the text still comes.

/// Opens the thinking.
const OPEN: &str = "<think>";
/// Ends the thinking.
const CLOSE: &str = "</think>";

/// Splits the text of a model that thinks between `<think>` and `</think>` before it answers.
/// Tags are given to nobody, and neither is the white space around them. How the text is cut
/// into pieces makes no difference.
#[derive(Clone, Debug)]
pub struct ReasoningSplitter {
    state: State,
    /// What may be the beginning of a tag, or white space in front of one.
    held: String,
}

/// A piece of a model's text; never empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part<'a> {
    /// What the model thinks.
    Reasoning(&'a str),
    /// What it answers.
    Content(&'a str),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Only white space so far: a tag that opens may follow.
    Start,
    /// Behind the tag that opens, before the first word.
    ThinkingStart,
    Thinking,
    /// Behind the tag that closes, before the first word.
    AnswerStart,
    Answer,
}

impl ReasoningSplitter {
    /// Begins where `prompt` ends: some templates write the tag that opens themselves, and then
    /// the model's text begins inside.
    pub fn after(prompt: &str) -> Self {
        let opens = prompt.trim_end().ends_with(OPEN);
        let state = if opens { State::ThinkingStart } else { State::Start };
        Self { state, held: String::new() }
    }

    /// Takes the next piece of the text, and gives `part` what it is certain about.
    pub fn push(&mut self, piece: &str, part: &mut dyn FnMut(Part<'_>)) {
        if self.state == State::Answer {
            if !piece.is_empty() {
                part(Part::Content(piece));
            }
            return;
        }
        self.held.push_str(piece);
        while self.advance(part) {}
    }

    /// Gives out what was held back, when no more text comes.
    pub fn finish(&mut self, part: &mut dyn FnMut(Part<'_>)) {
        let held = std::mem::take(&mut self.held);
        match self.state {
            State::Thinking => give(Part::Reasoning, &held, part),
            State::ThinkingStart => give(Part::Reasoning, held.trim_start(), part),
            State::AnswerStart => give(Part::Content, held.trim_start(), part),
            State::Start | State::Answer => give(Part::Content, &held, part),
        }
    }

    /// One step through what is held; false when more text is needed.
    fn advance(&mut self, part: &mut dyn FnMut(Part<'_>)) -> bool {
        match self.state {
            State::Start => {
                let text = self.held.trim_start();
                if let Some(rest) = text.strip_prefix(OPEN) {
                    self.held = rest.to_string();
                    self.state = State::ThinkingStart;
                } else if OPEN.starts_with(text) {
                    return false;
                } else {
                    // An answer without thinking keeps its white space.
                    self.state = State::Answer;
                }
            }
            State::ThinkingStart | State::AnswerStart => {
                self.held = self.held.trim_start().to_string();
                if self.held.is_empty() {
                    return false;
                }
                self.state = match self.state {
                    State::ThinkingStart => State::Thinking,
                    _ => State::Answer,
                };
            }
            State::Thinking => {
                let Some(close) = self.held.find(CLOSE) else {
                    let rest = self.held.split_off(certain(&self.held));
                    give(Part::Reasoning, &self.held, part);
                    self.held = rest;
                    return false;
                };
                give(Part::Reasoning, self.held[..close].trim_end(), part);
                self.held.drain(..close + CLOSE.len());
                self.state = State::AnswerStart;
            }
            State::Answer => {
                give(Part::Content, &std::mem::take(&mut self.held), part);
                return false;
            }
        }
        true
    }
}

fn give<'a>(kind: fn(&'a str) -> Part<'a>, text: &'a str, part: &mut dyn FnMut(Part<'_>)) {
    if !text.is_empty() {
        part(kind(text));
    }
}

/// How much of a thought can be neither the tag that closes nor white space in front of it.
fn certain(text: &str) -> usize {
    let tag = (1..CLOSE.len()).rev().find(|&len| text.ends_with(&CLOSE[..len])).unwrap_or(0);
    text[..text.len() - tag].trim_end().len()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reasoning and content of a text that comes in `pieces`.
    fn split(prompt: &str, pieces: &[&str]) -> (String, String) {
        let mut splitter = ReasoningSplitter::after(prompt);
        let (mut reasoning, mut content) = (String::new(), String::new());
        let mut part = |part: Part<'_>| match part {
            Part::Reasoning(text) => {
                assert!(!text.is_empty());
                reasoning.push_str(text);
            }
            Part::Content(text) => {
                assert!(!text.is_empty());
                content.push_str(text);
            }
        };
        for piece in pieces {
            splitter.push(piece, &mut part);
        }
        splitter.finish(&mut part);
        (reasoning, content)
    }

    #[test]
    fn texts_are_split_the_same_however_they_are_cut() {
        let opened = "<|im_start|>assistant\n<think>\n";
        let plain = "<|im_start|>assistant\n";
        let table = [
            (plain, "<think>\nSo, 1 < 2.\n</think>\n\nYes — it is.", "So, 1 < 2.", "Yes — it is."),
            (plain, "\n<think>a</think>b", "a", "b"),
            (plain, "<think>\n\n</think>\n\nNo thought.", "", "No thought."),
            (
                plain,
                " An answer with <think>late</think> tags. ",
                "",
                " An answer with <think>late</think> tags. ",
            ),
            (plain, "<thin", "", "<thin"),
            (plain, "<think>cut </thin", "cut </thin", ""),
            (plain, "<think>a </thing> é </think> b </think>", "a </thing> é", "b </think>"),
            (plain, "", "", ""),
            (opened, "Inside.\n</think>\nOutside.\n", "Inside.", "Outside.\n"),
            (opened, "never closed  ", "never closed  ", ""),
        ];
        for (prompt, text, reasoning, content) in table {
            let expected = (reasoning.to_string(), content.to_string());
            let cuts: Vec<usize> =
                (0..=text.len()).filter(|&at| text.is_char_boundary(at)).collect();
            for &first in &cuts {
                for &second in cuts.iter().filter(|&&second| second >= first) {
                    let pieces = [&text[..first], &text[first..second], &text[second..]];
                    assert_eq!(split(prompt, &pieces), expected, "{pieces:?}");
                }
            }
            let mut buffer = [0; 4];
            let mut splitter = ReasoningSplitter::after(prompt);
            let mut all = (String::new(), String::new());
            let mut part = |part: Part<'_>| match part {
                Part::Reasoning(text) => all.0.push_str(text),
                Part::Content(text) => all.1.push_str(text),
            };
            text.chars().for_each(|c| splitter.push(c.encode_utf8(&mut buffer), &mut part));
            splitter.finish(&mut part);
            assert_eq!(all, expected, "{text:?} by characters");
        }
    }

    #[test]
    fn thoughts_are_given_out_as_they_come() {
        let mut splitter = ReasoningSplitter::after("");
        let mut given = Vec::new();
        for piece in ["<think>", "one", " two", " <", "/think>", "x"] {
            splitter.push(piece, &mut |part| given.push(format!("{part:?}")));
        }
        assert_eq!(given, ["Reasoning(\"one\")", "Reasoning(\" two\")", "Content(\"x\")"]);
    }
}
