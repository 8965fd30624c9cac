//! Prompt lookup: what followed the last time that the text went the way it goes now ("Prompt Lookup Decoding",
//! Saxena, 2023). It copies from the prompt and from the answer so far, needs no model and costs next to nothing.
//!
//! ```text
//! text     … the quick brown fox jumps … the quick brown      ▏anchor = brown
//! index    every three tokens → where they were last, and before that, and before that …
//! draft    of the places that end like the text does, the one that agrees furthest back: fox jumps …
//! ```
//!
//! The index grows by one entry a token; that of a fork is made when it moves, from its tokens. A draft looks at a bounded number of places. A draft is no longer than the
//! agreement it stands on: three tokens in common are little to bet fifteen rows on.

use std::collections::HashMap;

use paceline_memory::SeqId;

use crate::{
    Draft, DraftRequest, Drafter, DrafterKind, Kept, Origin, Token,
    drafter::{token_bytes, tokens_of},
};

/// The registry entry. The name is llama.cpp's.
pub const KIND: DrafterKind = DrafterKind {
    name: "ngram-simple",
    aliases: &["ngram", "prompt-lookup"],
    origin: Origin::Text,
    load: |request| Ok(Box::new(Ngram::new(request.n_draft_max.unwrap_or(N_DRAFT)))),
};

/// Most tokens of a draft unless told otherwise.
const N_DRAFT: usize = 16;
/// Tokens that must agree before anything is copied.
const N_KEY: usize = 3;
/// Places looked at for one draft, the latest first.
const N_PLACE: usize = 16;
/// As far back as agreement is measured.
const N_AGREE: usize = 64;
/// No earlier place.
const NONE: u32 = u32::MAX;

/// The drafter. Each sequence has an index of its own.
#[derive(Debug)]
pub struct Ngram {
    n_draft_max: usize,
    sequences: HashMap<SeqId, Index>,
}

/// The committed tokens of a sequence, and where each run of [`N_KEY`] of them ended.
#[derive(Debug, Default)]
struct Index {
    tokens: Vec<Token>,
    latest: HashMap<[Token; N_KEY], u32>,
    /// For each token, where the run that it ends occurred before. Shorter than `tokens` for a fork that rests.
    before: Vec<u32>,
}

impl Index {
    /// Of tokens that are looked at later.
    fn resting(tokens: Vec<Token>) -> Index {
        Index { tokens, ..Index::default() }
    }

    fn rests(&self) -> bool {
        self.before.len() < self.tokens.len()
    }

    /// Looks at the tokens of a fork.
    fn wake(&mut self) {
        if self.rests() {
            std::mem::take(&mut self.tokens).into_iter().for_each(|token| self.push(token));
        }
    }

    fn bytes(&self) -> usize {
        self.tokens.len() * size_of::<Token>()
            + self.before.len() * size_of::<u32>()
            + self.latest.len() * (size_of::<[Token; N_KEY]>() + size_of::<u32>())
    }

    fn push(&mut self, token: Token) {
        let at = self.tokens.len() as u32;
        self.tokens.push(token);
        let before = self.tokens.last_chunk().and_then(|key| self.latest.insert(*key, at));
        self.before.push(before.unwrap_or(NONE));
    }

    /// Tokens before place `at` and before the anchor that are the same, the anchor included.
    fn agreement(&self, at: usize) -> usize {
        let back = self.tokens[..at].iter().rev().zip(self.tokens.iter().rev());
        1 + back.take(N_AGREE - 1).take_while(|(a, b)| a == b).count()
    }

    /// The place that agrees furthest back with the text and `anchor` behind it, the latest of equals.
    fn find(&self, anchor: Token) -> Option<(usize, usize)> {
        let mut key = [anchor; N_KEY];
        key[..N_KEY - 1].copy_from_slice(self.tokens.last_chunk::<{ N_KEY - 1 }>()?);
        let latest = *self.latest.get(&key)?;
        let before = |at: &u32| Some(self.before[*at as usize]).filter(|&at| at != NONE);
        let places = std::iter::successors(Some(latest), before).take(N_PLACE).map(|at| at as usize);
        let mut best: Option<(usize, usize)> = None;
        for at in places {
            let agreement = self.agreement(at);
            if best.is_none_or(|(_, most)| agreement > most) {
                best = Some((at, agreement));
            }
        }
        best
    }

    fn draft(&self, anchor: Token, n_max: usize) -> Draft {
        let Some((at, agreement)) = self.find(anchor) else { return Draft::default() };
        let n = self.tokens.len();
        let mut tokens: Vec<Token> = Vec::with_capacity(n_max.min(agreement));
        // Text that repeats itself runs into the anchor and then into the draft.
        for from in (at + 1..).take(n_max.min(agreement)) {
            tokens.push(match from.checked_sub(n) {
                None => self.tokens[from],
                Some(0) => anchor,
                Some(i) => tokens[i - 1],
            });
        }
        // Laplace's rule of succession, as if each token that agreed had been such a guess.
        let q = (agreement + 1) as f32 / (agreement + 2) as f32;
        Draft { q: vec![q; tokens.len()], tokens, fault: None }
    }
}

impl Ngram {
    /// A drafter of at most `n_draft_max` tokens at a time.
    pub fn new(n_draft_max: usize) -> Ngram {
        Ngram { n_draft_max, sequences: HashMap::new() }
    }
}

impl Drafter for Ngram {
    fn name(&self) -> &'static str {
        KIND.name
    }

    fn contract(&self) -> String {
        format!(
            "{}: copies what followed the last {N_KEY} or more tokens before, {} at most",
            KIND.name, self.n_draft_max
        )
    }

    fn n_draft_max(&self) -> usize {
        self.n_draft_max
    }

    fn draft(&mut self, requests: &mut [DraftRequest<'_>]) -> Vec<Draft> {
        let draft = |request: &mut DraftRequest<'_>| {
            let index = self.sequences.get_mut(&request.seq).filter(|i| i.tokens.len() == request.position);
            match index {
                Some(index) => {
                    index.wake();
                    index.draft(request.anchor, request.n_max)
                }
                None => {
                    Draft { fault: Some("its index is not of this text".to_string()), ..Draft::default() }
                }
            }
        };
        requests.iter_mut().map(draft).collect()
    }

    fn commit(&mut self, kept: &[Kept<'_>]) {
        for rows in kept {
            let index = self.sequences.entry(rows.seq).or_default();
            assert_eq!(index.tokens.len(), rows.first_position, "rows of {:?} out of order", rows.seq);
            index.wake();
            rows.tokens.iter().for_each(|&token| index.push(token));
        }
    }

    fn fork(&mut self, from: SeqId, to: SeqId, len: usize) -> bool {
        let Some(tokens) = self.sequences.get(&from).and_then(|index| index.tokens.get(..len)) else {
            return false;
        };
        let fork = Index::resting(tokens.to_vec());
        let old = self.sequences.insert(to, fork);
        assert!(old.is_none(), "{to:?} is known already");
        true
    }

    fn export(&self, seq: SeqId) -> Option<Vec<u8>> {
        Some(token_bytes(&self.sequences.get(&seq)?.tokens))
    }

    fn import(&mut self, seq: SeqId, len: usize, bytes: &[u8]) -> Result<(), String> {
        if len.checked_mul(size_of::<Token>()) != Some(bytes.len()) {
            return Err(format!("{} bytes for {len} tokens", bytes.len()));
        }
        let old = self.sequences.insert(seq, Index::resting(tokens_of(bytes)));
        assert!(old.is_none(), "{seq:?} is known already");
        Ok(())
    }

    fn forget(&mut self, seq: SeqId) {
        self.sequences.remove(&seq);
    }

    fn state_bytes(&self) -> usize {
        self.sequences.values().map(Index::bytes).sum()
    }

    fn resting_bytes(&self) -> usize {
        self.sequences.values().filter(|index| index.rests()).map(Index::bytes).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(text: &str) -> Index {
        let mut index = Index::default();
        text.bytes().for_each(|b| index.push(u32::from(b)));
        index
    }

    /// Text (its last letter the anchor) and a most -> the draft.
    fn check(text: &str, n_max: usize, want: &str) {
        let (text, anchor) = text.split_at(text.len() - 1);
        let draft = index(text).draft(u32::from(anchor.as_bytes()[0]), n_max);
        let got: String = draft.tokens.iter().map(|&t| t as u8 as char).collect();
        assert_eq!(got, want, "{text}|{anchor}");
        assert!(draft.q.len() == draft.tokens.len() && draft.q.iter().all(|q| (0.5..1.0).contains(q)));
    }

    #[test]
    fn copies_what_followed() {
        check("abcdefgh-abc", 8, "def"); // three agree, so three are bet
        check("abcdefgh-abcd", 8, "efgh");
        check("abcdefgh-abcd", 2, "ef");
        check("abcdef", 8, "");
        check("ab", 8, "");
        check("a", 8, "");
    }

    #[test]
    fn prefers_the_longest_agreement_and_then_the_latest() {
        check("xyabc1..zzabc2..xyabc", 1, "1");
        check("zyabc1..zyabc2..qyabc", 1, "2");
    }

    #[test]
    fn runs_on_through_its_own_draft() {
        check("abababab", 5, "ababa");
        check("aaaaaaaa", 6, "aaaaaa");
        check("xabcabcabc", 6, "abcabc");
    }

    /// However long the text, a draft looks at no more than so many places.
    #[test]
    fn finds_the_same_as_a_search_of_everything() {
        let mut state = 1u64;
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 60) as u32 % 3
        };
        for n in 3..80 {
            let text: Vec<u32> = (0..n).map(|_| next()).collect();
            let (known, anchor) = (&text[..n - 1], text[n - 1]);
            let mut index = Index::default();
            known.iter().for_each(|&t| index.push(t));
            let agrees = |at: usize| {
                (0..N_AGREE).take_while(|&i| i <= at && i < n && text[at - i] == text[n - 1 - i]).count()
            };
            let places: Vec<usize> =
                (0..n - 1).rev().filter(|&at| agrees(at) >= N_KEY).take(N_PLACE).collect();
            let most = places.iter().map(|&at| agrees(at)).max();
            let want = most.and_then(|most| places.iter().find(|&&at| agrees(at) == most));
            assert_eq!(index.find(anchor).map(|(at, _)| at), want.copied(), "{text:?}");
        }
    }
}
