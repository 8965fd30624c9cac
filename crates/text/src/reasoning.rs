//! Separates a model's thoughts, `<think>…</think>`, from its answer, while both stream.
//!
//! ```text
//! start ──<think>──▶ thinking ──</think>──▶ after ──text──▶ content
//!   └────────────── any other text ────────────────────────────▲
//! ```
//!
//! Thoughts are recognised only at the start of an answer: a model that writes about `<think>` later means the text. A
//! template may have opened the thought already, at the end of the prompt; then the answer begins inside it. White
//! space around thoughts, and between them and the answer, belongs to neither. What may be part of a tag, or white
//! space that may turn out to be at an end, is held back, so the result does not depend on how the text is cut.

use std::str::FromStr;

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";

/// What becomes of thoughts; names and meanings as in llama-server's `reasoning_format`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReasoningFormat {
    /// They stay in the content, tags and all.
    None,
    /// They become reasoning, and the content is without them.
    Deepseek,
    /// They become reasoning and stay in the content as well.
    DeepseekLegacy,
    /// As [`ReasoningFormat::Deepseek`].
    #[default]
    Auto,
}

impl FromStr for ReasoningFormat {
    type Err = String;

    fn from_str(name: &str) -> Result<ReasoningFormat, String> {
        match name {
            "none" => Ok(ReasoningFormat::None),
            "deepseek" => Ok(ReasoningFormat::Deepseek),
            "deepseek-legacy" => Ok(ReasoningFormat::DeepseekLegacy),
            "auto" => Ok(ReasoningFormat::Auto),
            _ => Err(format!("expected none, deepseek, deepseek-legacy or auto, found `{name}`")),
        }
    }
}

/// A piece of an answer, told apart. Never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Delta {
    /// Part of the thought.
    Reasoning(String),
    /// Part of the answer.
    Content(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Start,
    /// Inside a thought of which nothing was given out; with `reopens`, the model may repeat the prompt's tag.
    Opened {
        reopens: bool,
    },
    Thinking,
    After,
    Content,
}

/// Whether a rendered prompt ends inside a thought, so that the answer continues it.
pub fn prompt_ends_in_think(prompt: &str) -> bool {
    prompt.trim_end().ends_with(OPEN)
}

/// Parses one answer.
#[derive(Clone, Debug)]
pub struct ReasoningParser {
    format: ReasoningFormat,
    state: State,
    held: String,
    /// Legacy content shows the opening tag, which the prompt may have taken from the answer.
    owes_open_tag: bool,
}

impl ReasoningParser {
    /// For one answer; [`prompt_ends_in_think`] tells about its prompt.
    pub fn new(format: ReasoningFormat, prompt_ends_in_think: bool) -> ReasoningParser {
        let state = if prompt_ends_in_think { State::Opened { reopens: true } } else { State::Start };
        let owes_open_tag = format == ReasoningFormat::DeepseekLegacy && prompt_ends_in_think;
        ReasoningParser { format, state, held: String::new(), owes_open_tag }
    }

    /// Whether the answer so far ends inside a thought.
    pub fn is_thinking(&self) -> bool {
        matches!(self.state, State::Opened { .. } | State::Thinking)
    }

    /// Takes the next piece of the answer.
    pub fn push(&mut self, text: &str) -> Vec<Delta> {
        self.held.push_str(text);
        let mut parsed = Vec::new();
        while self.advance(&mut parsed) {}
        self.formatted(text, parsed)
    }

    /// What was held back, at the end of the answer.
    pub fn finish(&mut self) -> Vec<Delta> {
        let held = std::mem::take(&mut self.held);
        let parsed = match self.state {
            State::Start | State::Content => vec![Delta::Content(held)],
            State::Opened { .. } => vec![Delta::Reasoning(held.trim().to_owned())],
            State::Thinking => vec![Delta::Reasoning(held.trim_end().to_owned())],
            State::After => Vec::new(),
        };
        self.formatted("", parsed)
    }

    /// Makes one transition or gives out what can be; true if more may follow.
    fn advance(&mut self, parsed: &mut Vec<Delta>) -> bool {
        match self.state {
            State::Start => {
                let text = self.held.trim_start();
                if let Some(rest) = text.strip_prefix(OPEN) {
                    self.held = rest.to_owned();
                    self.state = State::Opened { reopens: false };
                } else if OPEN.starts_with(text) {
                    return false;
                } else {
                    self.state = State::Content;
                }
                true
            }
            State::Opened { reopens } => {
                let text = self.held.trim_start();
                if let Some(rest) = text.strip_prefix(OPEN).filter(|_| reopens) {
                    self.held = rest.to_owned();
                    self.state = State::Opened { reopens: false };
                } else if text.is_empty() || (reopens && OPEN.starts_with(text)) {
                    return false;
                } else {
                    self.held = text.to_owned();
                    self.state = State::Thinking;
                }
                true
            }
            State::Thinking => match self.held.find(CLOSE) {
                Some(at) => {
                    parsed.push(Delta::Reasoning(self.held[..at].trim_end().to_owned()));
                    self.held.drain(..at + CLOSE.len());
                    self.state = State::After;
                    true
                }
                None => {
                    let tag = (1..CLOSE.len()).rev().find(|n| self.held.ends_with(&CLOSE[..*n])).unwrap_or(0);
                    let sure = self.held[..self.held.len() - tag].trim_end().len();
                    parsed.push(Delta::Reasoning(self.held.drain(..sure).collect()));
                    false
                }
            },
            State::After => {
                let text = self.held.trim_start();
                if text.is_empty() {
                    return false;
                }
                self.held = text.to_owned();
                self.state = State::Content;
                true
            }
            State::Content => {
                parsed.push(Delta::Content(std::mem::take(&mut self.held)));
                false
            }
        }
    }

    /// Puts what was parsed, and the text it came from, into the form asked for.
    fn formatted(&mut self, raw: &str, mut parsed: Vec<Delta>) -> Vec<Delta> {
        match self.format {
            ReasoningFormat::None => parsed = vec![Delta::Content(raw.to_owned())],
            ReasoningFormat::Deepseek | ReasoningFormat::Auto => {}
            ReasoningFormat::DeepseekLegacy => {
                parsed.retain(|delta| matches!(delta, Delta::Reasoning(_)));
                let open_tag = if std::mem::take(&mut self.owes_open_tag) { OPEN } else { "" };
                parsed.push(Delta::Content(format!("{open_tag}{raw}")));
            }
        }
        parsed.retain(|(Delta::Reasoning(text) | Delta::Content(text))| !text.is_empty());
        parsed
    }
}

#[cfg(test)]
mod tests {
    use ReasoningFormat::*;

    use super::*;

    /// Reasoning and content of the pieces, each put together.
    fn run<'a>(
        format: ReasoningFormat,
        opened: bool,
        pieces: impl Iterator<Item = &'a str>,
    ) -> (String, String) {
        let mut parser = ReasoningParser::new(format, opened);
        let mut deltas: Vec<Delta> = pieces.flat_map(|piece| parser.push(piece)).collect();
        deltas.extend(parser.finish());
        let mut out = (String::new(), String::new());
        for delta in deltas {
            match delta {
                Delta::Reasoning(text) => out.0.push_str(&text),
                Delta::Content(text) => out.1.push_str(&text),
            }
        }
        out
    }

    /// Parses `text` whole, character by character, and cut in three at every pair of places.
    fn check(format: ReasoningFormat, opened: bool, text: &str, reasoning: &str, content: &str) {
        let want = (reasoning.to_owned(), content.to_owned());
        assert_eq!(run(format, opened, [text].into_iter()), want, "{text:?} whole");
        let places: Vec<usize> = (0..=text.len()).filter(|at| text.is_char_boundary(*at)).collect();
        let chars = places.windows(2).map(|w| &text[w[0]..w[1]]);
        assert_eq!(run(format, opened, chars), want, "{text:?} by character");
        for (i, &a) in places.iter().enumerate() {
            for &b in &places[i..] {
                let cut = [&text[..a], &text[a..b], &text[b..]];
                assert_eq!(run(format, opened, cut.into_iter()), want, "{cut:?}");
            }
        }
    }

    #[test]
    fn thoughts_and_answers() {
        check(Auto, false, "<think>\nhm é\n</think>\n\nYes.", "hm é", "Yes.");
        check(Deepseek, false, " \n<think>a</think>b", "a", "b");
        check(Deepseek, false, "<think>\n\n</think>\n\nb", "", "b");
        check(Deepseek, false, "<think>a < b </thinker> </thin", "a < b </thinker> </thin", "");
        check(Deepseek, false, "<think>never ends \n", "never ends", "");
        check(Deepseek, false, "<think>a</think>b <think>c</think> ", "a", "b <think>c</think> ");
        check(Deepseek, false, "<think>a</th </think>b", "a</th", "b");
    }

    #[test]
    fn plain_answers() {
        check(Auto, false, "", "", "");
        check(Auto, false, " \n hello <think>", "", " \n hello <think>");
        check(Auto, false, "<thin air", "", "<thin air");
        check(Auto, false, "<thi", "", "<thi");
    }

    #[test]
    fn thoughts_that_the_prompt_opened() {
        check(Auto, true, "\nhm\n</think>\nYes", "hm", "Yes");
        check(Auto, true, "<think>\nhm</think>Yes", "hm", "Yes");
        check(Auto, true, "</think>Yes", "", "Yes");
        check(Auto, true, "<thi", "<thi", "");
        check(Auto, true, "", "", "");
    }

    #[test]
    fn other_formats() {
        check(None, false, "<think>a</think>\nb", "", "<think>a</think>\nb");
        check(None, true, "a</think>b", "", "a</think>b");
        check(DeepseekLegacy, false, "<think>a </think>\nb", "a", "<think>a </think>\nb");
        check(DeepseekLegacy, true, "a</think>b", "a", "<think>a</think>b");
    }

    #[test]
    fn prompts() {
        assert!(prompt_ends_in_think("<|im_start|>assistant\n<think>\n"));
        assert!(!prompt_ends_in_think("<|im_start|>assistant\n<think>\n\n</think>\n\n"));
        assert!(!prompt_ends_in_think(""));
    }
}
