//! The merge loop that all three tokenizers share: symbols in a row, the best adjacent pair joined until none is left.
//!
//! Symbols form a linked list; candidate pairs wait in a heap, best first and leftmost among equals. A candidate goes
//! stale when one of its symbols was joined to another neighbour; it is recognised when popped, because ids tell
//! texts apart, and dropped. Each join adds at most two candidates: O(n log n) for n symbols.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// A symbol that neither is a token nor takes part in any merge rule.
pub(crate) const NO_SYMBOL: u32 = u32::MAX;

const NONE: usize = usize::MAX;

/// A stretch of the text being tokenized.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Symbol {
    /// Which text this is: a token id, an id beyond the vocabulary for texts only merge rules know, or [`NO_SYMBOL`].
    pub id: u32,
    /// First byte in the text.
    pub start: usize,
    /// One past the last byte.
    pub end: usize,
}

struct Link {
    prev: usize,
    next: usize,
}

/// Joins adjacent symbols until `join` knows no pair.
///
/// `join` gives a pair's priority, the smallest first, and the id of the joined symbol. Symbols must adjoin.
pub(crate) fn merge_pairs<P: Ord + Copy>(
    symbols: &mut Vec<Symbol>,
    join: impl Fn(&Symbol, &Symbol) -> Option<(P, u32)>,
) {
    let n = symbols.len();
    let mut links: Vec<Link> = (0..n)
        .map(|i| Link { prev: i.wrapping_sub(1), next: if i + 1 < n { i + 1 } else { NONE } })
        .collect();
    let mut candidates = BinaryHeap::new();
    let offer = |candidates: &mut BinaryHeap<_>, symbols: &[Symbol], left: usize, right: usize| {
        if let Some((priority, joined)) = join(&symbols[left], &symbols[right]) {
            candidates.push(Reverse((priority, left, symbols[left].id, symbols[right].id, joined)));
        }
    };
    for left in 1..n {
        offer(&mut candidates, symbols, left - 1, left);
    }
    while let Some(Reverse((_, left, left_id, right_id, joined))) = candidates.pop() {
        let right = links[left].next;
        let alive = symbols[left].end > symbols[left].start;
        let fresh = alive && right != NONE && symbols[left].id == left_id && symbols[right].id == right_id;
        if !fresh {
            continue;
        }
        symbols[left] = Symbol { id: joined, end: symbols[right].end, ..symbols[left] };
        symbols[right].end = symbols[right].start; // empty: joined to its left
        let after = links[right].next;
        links[left].next = after;
        if after != NONE {
            links[after].prev = left;
            offer(&mut candidates, symbols, left, after);
        }
        let before = links[left].prev;
        if before != NONE {
            offer(&mut candidates, symbols, before, left);
        }
    }
    symbols.retain(|s| s.end > s.start);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Merges the letters of `text` by `rules`, best first, and shows the result with dots.
    fn check(text: &str, rules: &[&str], expected: &str) {
        let mut symbols: Vec<Symbol> = text
            .bytes()
            .enumerate()
            .map(|(i, b)| Symbol { id: u32::from(b), start: i, end: i + 1 })
            .collect();
        merge_pairs(&mut symbols, |l, r| {
            let joined = &text[l.start..r.end];
            rules.iter().position(|rule| *rule == joined).map(|rank| (rank, 1000 + rank as u32))
        });
        let shown: Vec<&str> = symbols.iter().map(|s| &text[s.start..s.end]).collect();
        assert_eq!(shown.join("·"), expected, "{text} by {rules:?}");
    }

    #[test]
    fn best_rank_first_then_leftmost() {
        check("abc", &["bc", "ab"], "a·bc");
        check("abc", &["ab", "bc"], "ab·c");
        check("aaa", &["aa"], "aa·a");
        check("aaaa", &["aa", "aaaa"], "aaaa");
        check("abab", &["ab", "abab", "ba"], "abab");
        check("", &["ab"], "");
        check("x", &["ab"], "x");
        // After `ab` joins, the waiting candidate `bc` is stale.
        check("abcbc", &["ab", "bc"], "ab·c·bc");
    }
}
