//! Stop strings: the same as a naive search over the whole text, however the text is cut.

use minisgl_text::{StopMatcher, StopOutcome};

/// What was given out, and the stop string that ended it.
fn run(stops: &[&str], pieces: &[&str]) -> (String, Option<String>) {
    let mut matcher = StopMatcher::new(stops.iter().map(ToString::to_string).collect());
    let mut text = String::new();
    for piece in pieces {
        match matcher.push(piece) {
            StopOutcome::Text(safe) => text.push_str(&safe),
            StopOutcome::Matched { text: last, stop } => return (text + &last, Some(stop)),
        }
    }
    (text + &matcher.finish(), None)
}

/// The stop string that ends first, and of those the longest.
fn naive(stops: &[&str], text: &str) -> (String, Option<String>) {
    let ends = (1..=text.len()).filter(|&end| text.is_char_boundary(end));
    for end in ends {
        let found = stops.iter().filter(|stop| !stop.is_empty() && text[..end].ends_with(**stop));
        if let Some(stop) = found.max_by_key(|stop| stop.len()) {
            return (text[..end - stop.len()].to_string(), Some(stop.to_string()));
        }
    }
    (text.to_string(), None)
}

/// A small generator (xorshift), so that a failing case comes back.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound as u64) as usize
    }

    fn text(&mut self, length_max: usize) -> String {
        let length = self.below(length_max + 1);
        (0..length).map(|_| ['a', 'b', 'ä', '–', '🦀'][self.below(5)]).collect()
    }
}

#[test]
fn any_cut_agrees_with_a_naive_search() {
    let mut random = Random(7);
    let mut matched = 0;
    for case in 0..20_000 {
        let stops: Vec<String> = (0..random.below(4)).map(|_| random.text(4)).collect();
        let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
        let text = random.text(24);
        let mut pieces = vec![String::new()];
        for character in text.chars() {
            if random.below(3) == 0 {
                pieces.push(String::new());
            }
            pieces.last_mut().expect("there is one").push(character);
        }
        let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
        let expected = naive(&stops, &text);
        matched += usize::from(expected.1.is_some());
        assert_eq!(run(&stops, &pieces), expected, "case {case}: {stops:?} in {pieces:?}");
    }
    assert!(matched > 5_000, "only {matched} cases had a stop string in them");
}

#[test]
fn text_is_held_back_only_as_long_as_it_may_begin_a_stop_string() {
    let mut matcher = StopMatcher::new(vec!["</s>".into(), "\n\nUser".into()]);
    let mut push = |piece: &str| matcher.push(piece);
    assert_eq!(push("a <"), StopOutcome::Text("a ".into()));
    assert_eq!(push("/"), StopOutcome::Text(String::new()));
    assert_eq!(push("b\n"), StopOutcome::Text("</b".into()));
    assert_eq!(push("c"), StopOutcome::Text("\nc".into()));
    assert_eq!(
        push("d</s>e"),
        StopOutcome::Matched { text: "d".into(), stop: "</s>".into() },
        "nothing behind the stop string comes out"
    );
}

/// Looking at each stop string for each byte would take 10^10 steps.
#[test]
fn ten_thousand_stop_strings_cost_no_more_than_one() {
    let stops: Vec<String> =
        (0..10_000).map(|number| format!("aaaaaaaaaaaaaaaaaaaa{number}b")).collect();
    let mut matcher = StopMatcher::new(stops);
    let text = "a".repeat(1_000_000);
    let started = std::time::Instant::now();
    let StopOutcome::Text(safe) = matcher.push(&text) else { panic!("nothing is to be found") };
    assert_eq!(safe.len() + matcher.finish().len(), text.len());
    assert!(started.elapsed().as_secs() < 5, "took {:?}", started.elapsed());
    assert!(matches!(matcher.push("aaaaaaaaaaaaaaaaaaaa9999b"), StopOutcome::Matched { .. }));
}
