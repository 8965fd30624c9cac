//! Pre-tokenizers cut text into pieces that BPE merges never cross: words, numbers, punctuation, white space.
//!
//! Models define theirs by a regular expression, one alternative after the other:
//!
//! ```text
//! (?i:'s|'t|'re|'ve|'m|'ll|'d)      a contraction
//! [^\r\n\p{L}\p{N}]?\p{L}+          a word, with one character in front that may be a space
//! \p{N}{1,3}                        a number, in parts
//!  ?[^\s\p{L}\p{N}]+[\r\n]*         punctuation, with a space in front and the ends of line behind
//! \s*[\r\n]+                        white space up to the last end of line
//! \s+(?!\S)                         white space, but for the one in front of what follows
//! \s+                               that one
//! ```
//!
//! Here each is a function from the rest of the text to the length of its first piece, written by hand: the one
//! lookahead needs a backtracking engine otherwise, and a megabyte of spaces must take linear time. Classes are those
//! of Unicode 16. No normalisation is applied, as in llama.cpp: Hugging Face composes (NFC) text for Qwen first, which
//! gives other tokens for decomposed text only.

use unicode_general_category::{GeneralCategory as Category, get_general_category};

use crate::Error;

/// A way to cut text, under the names that files use (`tokenizer.ggml.pre`).
#[derive(Debug)]
pub struct PreTokenizer {
    /// The usual name first, then others for the same rule.
    pub names: &'static [&'static str],
    /// A piece that is a token is taken whole, whatever the merges say.
    pub ignore_merges: bool,
    /// What a file without `add_bos_token` means.
    pub add_bos: bool,
    /// Bytes in the first piece of a text that is not empty.
    pub first_piece: fn(&str) -> usize,
}

/// Every pre-tokenizer, by name in files.
pub const PRETOKENIZERS: &[PreTokenizer] = &[
    PreTokenizer { names: &["qwen2", "deepseek-r1-qwen"], first_piece: qwen2, ..PLAIN },
    PreTokenizer { names: &["qwen35"], first_piece: qwen35, ..PLAIN },
    PreTokenizer {
        names: &["llama-bpe", "llama3", "llama-v3"],
        first_piece: llama3,
        ignore_merges: true,
        add_bos: true,
    },
    PreTokenizer { names: &["gemma4"], first_piece: newline_runs, add_bos: true, ..PLAIN },
    PreTokenizer { names: &["gpt-2", "default"], first_piece: gpt2, ..PLAIN },
];

const PLAIN: PreTokenizer =
    PreTokenizer { names: &[], ignore_merges: false, add_bos: false, first_piece: gpt2 };

/// The pre-tokenizer that a file names; GPT-2's for a file that names none.
pub fn find(name: Option<&str>) -> Result<&'static PreTokenizer, Error> {
    let name = name.unwrap_or("default");
    PRETOKENIZERS.iter().find(|pre| pre.names.contains(&name)).ok_or_else(|| Error::UnknownPreTokenizer {
        found: name.to_owned(),
        known: PRETOKENIZERS.iter().flat_map(|pre| pre.names).copied().collect::<Vec<_>>().join(", "),
    })
}

impl PreTokenizer {
    /// The pieces of `text`, which together are `text`.
    pub fn split<'a>(&self, text: &'a str) -> impl Iterator<Item = &'a str> + use<'a> {
        let first_piece = self.first_piece;
        let mut rest = text;
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let (piece, after) = rest.split_at(first_piece(rest));
            rest = after;
            Some(piece)
        })
    }
}

/// What the expressions tell characters apart by.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    /// `\p{L}`
    Letter,
    /// `\p{M}`
    Mark,
    /// `\p{N}`
    Number,
    /// `\s`
    Space,
    /// The rest.
    Other,
}

fn class(c: char) -> Class {
    match c {
        'a'..='z' | 'A'..='Z' => return Class::Letter,
        '0'..='9' => return Class::Number,
        '\0'..='\x7f' => return if c.is_whitespace() { Class::Space } else { Class::Other },
        _ if c.is_whitespace() => return Class::Space,
        _ => {}
    }
    match get_general_category(c) {
        Category::UppercaseLetter
        | Category::LowercaseLetter
        | Category::TitlecaseLetter
        | Category::ModifierLetter
        | Category::OtherLetter => Class::Letter,
        Category::NonspacingMark | Category::SpacingMark | Category::EnclosingMark => Class::Mark,
        Category::DecimalNumber | Category::LetterNumber | Category::OtherNumber => Class::Number,
        _ => Class::Other,
    }
}

fn is_line_end(c: char) -> bool {
    matches!(c, '\r' | '\n')
}

/// Bytes at the start of `text` whose characters satisfy `wanted`.
fn run(text: &str, wanted: impl Fn(char) -> bool) -> usize {
    text.find(|c| !wanted(c)).unwrap_or(text.len())
}

/// Bytes of `rest` that `'s`, `'t`, `'re`, `'ve`, `'m`, `'ll` or `'d` match.
fn contraction(rest: &str, ignore_case: bool) -> Option<usize> {
    let after = rest.strip_prefix('\'')?;
    // The long s folds to s; no other character beyond ASCII folds to one of these.
    let fold = |c: char| match c {
        'ſ' if ignore_case => 's',
        _ if ignore_case => c.to_ascii_lowercase(),
        _ => c,
    };
    let mut chars = after.chars();
    let first = chars.next()?;
    let second = chars.next().map(fold);
    match (fold(first), second) {
        ('s' | 't' | 'm' | 'd', _) => Some(1 + first.len_utf8()),
        ('r' | 'v', Some('e')) | ('l', Some('l')) => Some(3),
        _ => None,
    }
}

/// How the newer expressions differ among themselves.
struct Words {
    /// Combining marks belong to words rather than to punctuation.
    marks_in_words: bool,
    /// Digits in one piece at most.
    max_digits: usize,
}

fn qwen2(rest: &str) -> usize {
    first_word(rest, Words { marks_in_words: false, max_digits: 1 })
}

fn qwen35(rest: &str) -> usize {
    first_word(rest, Words { marks_in_words: true, max_digits: 1 })
}

fn llama3(rest: &str) -> usize {
    first_word(rest, Words { marks_in_words: false, max_digits: 3 })
}

/// The expression in this module's head, alternative by alternative.
fn first_word(rest: &str, words: Words) -> usize {
    if let Some(len) = contraction(rest, true) {
        return len;
    }
    let in_word = |c| match class(c) {
        Class::Letter => true,
        Class::Mark => words.marks_in_words,
        _ => false,
    };
    let is_punctuation = |c| !in_word(c) && matches!(class(c), Class::Other | Class::Mark);

    let first = rest.chars().next().expect("a piece is asked of text that is not empty");
    if in_word(first) {
        return run(rest, in_word);
    }
    let after_first = &rest[first.len_utf8()..];
    if !is_line_end(first) && class(first) != Class::Number && after_first.starts_with(in_word) {
        return first.len_utf8() + run(after_first, in_word);
    }
    if class(first) == Class::Number {
        let digits = rest.chars().take(words.max_digits).take_while(|c| class(*c) == Class::Number);
        return digits.map(char::len_utf8).sum();
    }
    let space = usize::from(first == ' ');
    if rest[space..].starts_with(is_punctuation) {
        let punctuation = space + run(&rest[space..], is_punctuation);
        return punctuation + run(&rest[punctuation..], is_line_end);
    }
    let white = &rest[..run(rest, char::is_whitespace)];
    match white.rfind(is_line_end) {
        Some(last) => last + 1,
        None => white_but_the_last(rest, white),
    }
}

/// GPT-2's expression: `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`.
fn gpt2(rest: &str) -> usize {
    if let Some(len) = contraction(rest, false) {
        return len;
    }
    // Marks are punctuation here.
    let kind = |c| if class(c) == Class::Mark { Class::Other } else { class(c) };
    let space = usize::from(rest.starts_with(' '));
    match rest[space..].chars().next().map(kind) {
        Some(first) if first != Class::Space => space + run(&rest[space..], |c| kind(c) == first),
        _ => white_but_the_last(rest, &rest[..run(rest, char::is_whitespace)]),
    }
}

/// `\s+(?!\S)|\s+`: of the white space that begins `rest`, all at the end of the text; else all but the last character,
/// which goes with what follows; else the only one.
fn white_but_the_last(rest: &str, white: &str) -> usize {
    let last = white.chars().next_back().expect("all other text was matched before").len_utf8();
    if white.len() == rest.len() || white.len() == last { white.len() } else { white.len() - last }
}

/// `[^\n]+|[\n]+`
fn newline_runs(rest: &str) -> usize {
    let newline = rest.starts_with('\n');
    run(rest, |c| (c == '\n') == newline)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    /// Pieces of `text` with a dot between them.
    fn check(pre: &str, text: &str, expected: &str) {
        let pieces: Vec<&str> = find(Some(pre)).unwrap().split(text).collect();
        assert_eq!(pieces.join("·"), expected, "{pre}");
    }

    #[test]
    fn words_numbers_and_contractions() {
        let text = "Hello, world! 12345 it's  IT'S";
        for pre in ["qwen2", "qwen35"] {
            check(pre, text, "Hello·,· world·!· ·1·2·3·4·5· it·'s· · IT·'S");
        }
        for pre in ["llama-bpe", "llama3", "llama-v3"] {
            check(pre, text, "Hello·,· world·!· ·123·45· it·'s· · IT·'S");
        }
        check("default", text, "Hello·,· world·!· 12345· it·'s· · IT·'·S");
    }

    #[test]
    fn white_space() {
        for pre in ["qwen2", "qwen35", "llama-bpe"] {
            check(pre, "a\n\n  b  \n c   ", "a·\n\n· · b·  \n· c·   ");
            check(pre, "x=foo(1);\r\n\treturn", "x·=foo·(·1·);\r\n·\treturn");
            check(pre, " \n\t\n x", " \n\t\n· x");
            check(pre, "   ", "   ");
            check(pre, " ", " ");
        }
        check("gpt-2", "a\n\n  b", "a·\n\n ·· b".replace("··", "·").as_str());
    }

    #[test]
    fn marks() {
        let devanagari = "\u{928}\u{92e}\u{938}\u{94d}\u{924}\u{947}";
        check("qwen35", devanagari, devanagari);
        check("qwen2", devanagari, "\u{928}\u{92e}\u{938}·\u{94d}\u{924}·\u{947}");
        check("llama-bpe", devanagari, "\u{928}\u{92e}\u{938}·\u{94d}\u{924}·\u{947}");
        check("qwen35", " e\u{301}t", " e\u{301}t");
        check("qwen2", " e\u{301}t", " e·\u{301}t");
    }

    #[test]
    fn unknown_names_are_told_the_known_ones() {
        let message = find(Some("qwen9")).unwrap_err().to_string();
        assert!(message.contains("`qwen9`") && message.contains("llama-bpe, llama3"), "{message}");
    }

    #[test]
    fn a_megabyte_of_anything_is_linear() {
        let texts = [" ", "a", "\n", "1", ".", "\u{301}", " \n", "é ", "' "].map(|unit| unit.repeat(1 << 20));
        let start = Instant::now();
        for text in &texts {
            for pre in PRETOKENIZERS {
                assert_eq!(pre.split(text).map(str::len).sum::<usize>(), text.len());
            }
        }
        // About 45 passes over a megabyte or two; quadratic time would be hours.
        assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    }
}
