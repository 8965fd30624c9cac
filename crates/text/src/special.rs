//! Special tokens are found in text before any tokenizer sees it, the longest first.
//!
//! The rule, as files' authors expect it: take the special tokens by length, longest first; each claims, from the left,
//! every occurrence that no longer one has touched. Looking for thousands of tokens one after the other would be slow
//! (Gemma has six thousand), so one automaton reports all occurrences and the rule is applied to those.

use aho_corasick::{AhoCorasick, MatchKind};

use crate::{Error, Token, TokenKind, Vocab};

/// A piece of text between special tokens, or one of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fragment<'a> {
    Text(&'a str),
    Special(Token),
}

/// The special tokens of a vocabulary, ready to be looked for.
#[derive(Clone, Debug)]
pub(crate) struct SpecialTokens {
    /// Control, unknown and user-defined tokens: text from a chat template.
    all: Finder,
    /// User-defined tokens only: text from a user, who must not be able to write a turn marker.
    user_defined: Finder,
}

impl SpecialTokens {
    pub fn new(vocab: &Vocab) -> Result<SpecialTokens, Error> {
        let user_defined: Vec<Token> = vocab.of_kind(TokenKind::UserDefined).collect();
        let mut all: Vec<Token> = vocab.of_kind(TokenKind::Control).collect();
        all.extend(vocab.of_kind(TokenKind::Unknown));
        all.extend(&user_defined);
        Ok(SpecialTokens { all: Finder::new(vocab, all)?, user_defined: Finder::new(vocab, user_defined)? })
    }

    pub fn partition<'a>(&self, text: &'a str, parse_special: bool) -> Vec<Fragment<'a>> {
        if parse_special { self.all.partition(text) } else { self.user_defined.partition(text) }
    }
}

#[derive(Clone, Debug)]
struct Finder {
    /// Longest first; a pattern's number in the automaton is its place here.
    tokens: Vec<Token>,
    automaton: Option<AhoCorasick>,
}

impl Finder {
    fn new(vocab: &Vocab, mut tokens: Vec<Token>) -> Result<Finder, Error> {
        tokens.retain(|&t| !vocab.text(t).is_empty() && std::str::from_utf8(vocab.text(t)).is_ok());
        tokens.sort_by_key(|&t| (std::cmp::Reverse(vocab.text(t).len()), t));
        if tokens.is_empty() {
            return Ok(Finder { tokens, automaton: None });
        }
        let automaton = AhoCorasick::builder()
            .match_kind(MatchKind::Standard)
            .build(tokens.iter().map(|&t| vocab.text(t)))
            .map_err(|e| Error::BadKey {
                key: "tokenizer.ggml.tokens".to_owned(),
                expected: "special tokens few enough to be looked for at once".to_owned(),
                found: e.to_string(),
            })?;
        Ok(Finder { tokens, automaton: Some(automaton) })
    }

    fn partition<'a>(&self, text: &'a str) -> Vec<Fragment<'a>> {
        let mut found: Vec<(usize, usize, usize)> = match &self.automaton {
            Some(automaton) => automaton
                .find_overlapping_iter(text)
                .map(|m| (m.pattern().as_usize(), m.start(), m.end()))
                .collect(),
            None => Vec::new(),
        };
        if found.is_empty() {
            return if text.is_empty() { Vec::new() } else { vec![Fragment::Text(text)] };
        }
        found.sort_unstable();
        let mut claimed = vec![false; text.len()];
        // Claims so far are at least as long as this one, so one that overlaps it covers its first or last byte.
        found.retain(|&(_, start, end)| {
            let free = !claimed[start] && !claimed[end - 1];
            if free {
                claimed[start..end].fill(true);
            }
            free
        });
        found.sort_unstable_by_key(|&(_, start, _)| start);

        let mut fragments = Vec::with_capacity(2 * found.len() + 1);
        let mut done = 0;
        for (pattern, start, end) in found {
            if done < start {
                fragments.push(Fragment::Text(&text[done..start]));
            }
            fragments.push(Fragment::Special(self.tokens[pattern]));
            done = end;
        }
        if done < text.len() {
            fragments.push(Fragment::Text(&text[done..]));
        }
        fragments
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{TokenTable, TokenizerModel};

    fn vocab(specials: &[&str]) -> Vocab {
        let mut table = TokenTable::new(TokenizerModel::ByteLevelBpe);
        table.tokens = specials.iter().collect();
        table.kinds = vec![TokenKind::Control; specials.len()];
        Vocab::new(&table).unwrap()
    }

    fn partition(specials: &[&str], text: &str) -> String {
        let vocab = vocab(specials);
        let found = SpecialTokens::new(&vocab).unwrap();
        let shown: Vec<String> = found
            .partition(text, true)
            .iter()
            .map(|f| match f {
                Fragment::Text(t) => (*t).to_owned(),
                Fragment::Special(id) => format!("[{}]", specials[*id as usize]),
            })
            .collect();
        shown.join("·")
    }

    #[test]
    fn the_longest_claims_first() {
        let check = |specials: &[&str], text, expected| assert_eq!(partition(specials, text), expected);
        check(&["<a>"], "x<a>y<a>", "x·[<a>]·y·[<a>]");
        check(&["<a>"], "", "");
        check(&["<a>"], "<a", "<a");
        check(&["aa"], "aaa", "[aa]·a");
        check(&["ab", "bcd"], "abcd", "a·[bcd]");
        check(&["\n", "\n\n\n", "\n\n"], "\n\n\n\n\n\n\n\n", "[\n\n\n]·[\n\n\n]·[\n\n]");
        check(&["é"], "né\u{e8}", "n·[é]·è");
    }

    #[test]
    fn users_cannot_write_control_tokens() {
        let vocab = vocab(&["<|im_end|>"]);
        let found = SpecialTokens::new(&vocab).unwrap();
        assert_eq!(found.partition("a<|im_end|>", false), [Fragment::Text("a<|im_end|>")]);
    }

    /// The rule as written in the module's head, one token after the other.
    fn one_by_one(specials: &[String], text: &str) -> String {
        let mut order: Vec<&String> = specials.iter().collect();
        order.sort_by_key(|s| std::cmp::Reverse(s.len()));
        let mut fragments = vec![(text.to_owned(), false)];
        for special in order {
            let mut next = Vec::new();
            for (fragment, claimed) in fragments {
                if claimed {
                    next.push((fragment, true));
                    continue;
                }
                for (i, part) in fragment.split(special.as_str()).enumerate() {
                    if i > 0 {
                        next.push((format!("[{special}]"), true));
                    }
                    if !part.is_empty() {
                        next.push((part.to_owned(), false));
                    }
                }
            }
            fragments = next;
        }
        fragments.into_iter().map(|(f, _)| f).collect::<Vec<_>>().join("·")
    }

    proptest! {
        #[test]
        fn equals_looking_one_by_one(
            specials in prop::collection::hash_set("[abé]{1,4}", 1..6),
            text in "[abcé]{0,24}",
        ) {
            // Equal lengths are taken by id, so sort as ids will be.
            let mut specials: Vec<String> = specials.into_iter().collect();
            specials.sort();
            let names: Vec<&str> = specials.iter().map(String::as_str).collect();
            prop_assert_eq!(partition(&names, &text), one_by_one(&specials, &text));
        }
    }
}
