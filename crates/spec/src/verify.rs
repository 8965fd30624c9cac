//! The decision: which drafted tokens are what the target would have chosen.

use crate::Token;

/// The outcome of verifying one draft.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict<T> {
    /// The target's choices, in order: the accepted tokens, then the bonus token.
    pub chosen: Vec<T>,
    /// Drafted tokens that the target agreed with; `chosen.len() == n_accepted + 1` unless a choice failed or
    /// said stop.
    pub n_accepted: usize,
}

/// Walks a draft: `choose(i)` is the target's choice after row `i` (row 0 is the anchor), made with its complete
/// sampler. Choosing ends with the first choice that is not the drafted token, or after the last row, or where
/// `choose` gives `None`.
///
/// `choose` is called in order and only along the accepted path, so it may advance sampler state as it goes.
pub fn verify<T>(
    draft: &[Token],
    mut choose: impl FnMut(usize) -> Option<T>,
    token: impl Fn(&T) -> Token,
) -> Verdict<T> {
    let mut chosen = Vec::with_capacity(draft.len() + 1);
    for i in 0..=draft.len() {
        let Some(choice) = choose(i) else { return Verdict { chosen, n_accepted: i.min(draft.len()) } };
        let agreed = draft.get(i) == Some(&token(&choice));
        chosen.push(choice);
        if !agreed {
            return Verdict { chosen, n_accepted: i };
        }
    }
    unreachable!("the row after the last drafted token agrees with nothing")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(draft: &[Token], target: &[Token], want: &[Token], n_accepted: usize) {
        let mut calls = 0;
        let verdict = verify(
            draft,
            |i| {
                assert_eq!(i, calls, "rows in order, each once");
                calls += 1;
                target.get(i).copied()
            },
            |t| *t,
        );
        assert_eq!((verdict.chosen.as_slice(), verdict.n_accepted), (want, n_accepted));
    }

    #[test]
    fn walks_until_the_first_difference() {
        check(&[], &[7], &[7], 0);
        check(&[7, 8], &[1, 2, 3], &[1], 0);
        check(&[7, 8], &[7, 2, 3], &[7, 2], 1);
        check(&[7, 8], &[7, 8, 3], &[7, 8, 3], 2);
        check(&[7, 8], &[8, 8, 3], &[8], 0);
    }

    #[test]
    fn a_choice_that_says_stop_ends_the_walk() {
        check(&[7, 8], &[7], &[7], 1);
        check(&[7, 8], &[], &[], 0);
    }
}
