//! Stop strings: the answer ends before the first one, and no part of one is ever given out.
//!
//! Text arrives in pieces of any size. For each stop string the matcher knows how many of its bytes the text so far
//! ends with (Knuth, Morris and Pratt); the longest of these is held back, since it may become a match, and all
//! before it is given out. The match that is complete first wins; of those complete at the same byte, the longest. So
//! neither the text nor the stop depends on how the text was cut.

use std::cmp::Reverse;

/// What a piece of text led to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StopStep {
    /// Text to give out now.
    pub text: String,
    /// The stop string that the text reached, as an index into those given. Nothing follows.
    pub stopped: Option<usize>,
}

/// Watches one answer for stop strings.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    patterns: Vec<Pattern>,
    held: String,
    stopped: Option<usize>,
}

#[derive(Clone, Debug)]
struct Pattern {
    text: String,
    /// `border[n]`: of the first `n + 1` bytes, how many at the end are also at the start.
    border: Vec<usize>,
    /// How many bytes the text so far ends with.
    matched: usize,
}

impl Pattern {
    fn new(text: String) -> Pattern {
        let bytes = text.as_bytes();
        let mut border = vec![0; bytes.len()];
        let mut n = 0;
        for at in 1..bytes.len() {
            while n > 0 && bytes[at] != bytes[n] {
                n = border[n - 1];
            }
            n += usize::from(bytes[at] == bytes[n]);
            border[at] = n;
        }
        Pattern { text, border, matched: 0 }
    }

    /// Takes one byte of text; true when the pattern is complete. Not called again after that.
    fn step(&mut self, byte: u8) -> bool {
        let bytes = self.text.as_bytes();
        if bytes.is_empty() {
            return false;
        }
        while self.matched > 0 && bytes[self.matched] != byte {
            self.matched = self.border[self.matched - 1];
        }
        self.matched += usize::from(bytes[self.matched] == byte);
        self.matched == bytes.len()
    }
}

impl StopMatcher {
    /// For one answer. Empty strings never match.
    pub fn new(stops: Vec<String>) -> StopMatcher {
        StopMatcher {
            patterns: stops.into_iter().map(Pattern::new).collect(),
            held: String::new(),
            stopped: None,
        }
    }

    /// Takes the next piece of the answer. After a stop all further text is swallowed.
    pub fn push(&mut self, piece: &str) -> StopStep {
        if self.stopped.is_some() {
            return StopStep { text: String::new(), stopped: self.stopped };
        }
        let n_before = self.held.len();
        self.held.push_str(piece);
        for (at, byte) in (n_before + 1..).zip(piece.bytes()) {
            // Every pattern must see every byte, so this cannot stop at the first that is complete.
            let mut longest: Option<(usize, Reverse<usize>)> = None;
            for (i, pattern) in self.patterns.iter_mut().enumerate() {
                if pattern.step(byte) {
                    longest = longest.max(Some((pattern.text.len(), Reverse(i))));
                }
            }
            if let Some((len, Reverse(i))) = longest {
                self.stopped = Some(i);
                self.held.truncate(at - len);
                return StopStep { text: std::mem::take(&mut self.held), stopped: self.stopped };
            }
        }
        let n_held = self.patterns.iter().map(|p| p.matched).max().unwrap_or(0);
        let keep = self.held.split_off(self.held.len() - n_held);
        StopStep { text: std::mem::replace(&mut self.held, keep), stopped: None }
    }

    /// The text held back, at the end of an answer that reached no stop string.
    pub fn finish(&mut self) -> String {
        self.patterns.iter_mut().for_each(|p| p.matched = 0);
        std::mem::take(&mut self.held)
    }

    /// The stop string at index `i`.
    pub fn stop_string(&self, i: usize) -> &str {
        &self.patterns[i].text
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Pushes `pieces`; what each gave out, with the stop string in brackets where one was reached, then the rest.
    fn check(stops: &[&str], pieces: &[&str], expected: &[&str]) {
        let mut matcher = StopMatcher::new(stops.iter().map(|s| (*s).to_owned()).collect());
        let mut got = Vec::new();
        for piece in pieces {
            let step = matcher.push(piece);
            got.push(match step.stopped {
                Some(i) => format!("{}[{}]", step.text, matcher.stop_string(i)),
                None => step.text,
            });
        }
        got.push(matcher.finish());
        assert_eq!(got, expected, "{stops:?} {pieces:?}");
    }

    #[test]
    fn holds_back_what_may_become_a_stop() {
        check(&[], &["a", "b"], &["a", "b", ""]);
        check(&[""], &["a"], &["a", ""]);
        check(&["###"], &["a#", "#b", "##"], &["a", "##b", "", "##"]);
        check(&["###"], &["a#", "##b", "c"], &["a", "[###]", "[###]", ""]);
        check(&["\nUser:"], &["hi\n", "Us", "er: x"], &["hi", "", "[\nUser:]", ""]);
        check(&["abab"], &["aba", "cabab"], &["", "abac[abab]", ""]);
        check(&["é"], &["e", "é"], &["e", "[é]", ""]);
        // "ü" shares its first byte with "é", and no half of it may go out.
        check(&["xé"], &["x", "ü"], &["", "xü", ""]);
    }

    #[test]
    fn the_first_complete_stop_wins() {
        check(&["abcd", "bc"], &["abcd"], &["a[bc]", ""]);
        check(&["c", "bc"], &["abc"], &["a[bc]", ""]);
        check(&["one", "two"], &["two one"], &["[two]", ""]);
    }

    /// All text given out, and the stop.
    fn run<'a>(stops: &[String], pieces: impl Iterator<Item = &'a str>) -> (String, Option<usize>) {
        let mut matcher = StopMatcher::new(stops.to_vec());
        let mut all = String::new();
        for piece in pieces {
            let step = matcher.push(piece);
            all.push_str(&step.text);
            if step.stopped.is_some() {
                return (all, step.stopped);
            }
        }
        (all + &matcher.finish(), None)
    }

    proptest! {
        #[test]
        fn cuts_do_not_matter(stops in prop::collection::vec("[abé]{1,4}", 1..4), text in "[abcé]{0,30}", cut in 1..5_usize) {
            let chars: Vec<char> = text.chars().collect();
            let pieces: Vec<String> = chars.chunks(cut).map(|c| c.iter().collect()).collect();
            let got = run(&stops, pieces.iter().map(String::as_str));
            // The definition: the match that ends first, the longest of those.
            let want = stops
                .iter()
                .enumerate()
                .filter_map(|(i, s)| text.find(s.as_str()).map(|start| (start + s.len(), start, i)))
                .min();
            let want = match want {
                Some((_, start, i)) => (text[..start].to_owned(), Some(i)),
                None => (text.clone(), None),
            };
            prop_assert_eq!(got, want);
        }
    }
}
