//! The tokens still in the running at one position, and their logits.
//!
//! Two forms, because a vocabulary has 10^5 tokens and the chain usually leaves a few dozen. A chain starts with
//! the **dense** form, a copy of the logits row indexed by token, cheap to edit at single tokens and to scan. The
//! first sampler that narrows turns it into the **listed** form, entries in no particular order. Nothing sorts
//! the whole vocabulary: [`Candidates::keep_head`] orders a growing head until its caller has enough.
//!
//! Everywhere the order is: larger logit first, then smaller token id. That makes ties, and with them every
//! choice, well defined. Once loaded, logits are finite or -inf (banned); NaN and +inf are refused at the door.
//! All buffers are kept between positions.

use std::cmp::Ordering;
use std::collections::HashMap;

/// A token in the listed form.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Candidate {
    pub token: u32,
    pub logit: f32,
    /// Probability among the listed; set by [`Candidates::softmax`].
    pub p: f32,
    /// Scratch for samplers that order by something other than the logit.
    pub key: f32,
}

impl Candidate {
    /// Likeliest first, ties by token id.
    pub fn likelier(a: &Self, b: &Self) -> Ordering {
        // Never NaN, and unlike `total_cmp` this has 0.0 and -0.0 tie.
        b.logit.partial_cmp(&a.logit).unwrap_or(Ordering::Equal).then(a.token.cmp(&b.token))
    }
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Candidates {
    row: Vec<f32>,
    list: Vec<Candidate>,
    dense: bool,
}

/// Below this under the maximum a term adds nothing to an f32 sum, even times a vocabulary.
const NEGLIGIBLE: f32 = -40.0;

impl Candidates {
    /// Starts over from a row of logits, which the caller has checked.
    pub fn load(&mut self, logits: &[f32]) {
        self.row.clear();
        self.row.extend_from_slice(logits);
        self.list.clear();
        self.dense = true;
    }

    /// Starts over from some tokens, each of them once, whose logits the caller has checked.
    pub fn load_some(&mut self, tokens: &[u32], logits: &[f32]) {
        self.list.clear();
        let some = tokens.iter().zip(logits).filter(|(_, logit)| **logit > f32::NEG_INFINITY);
        self.list.extend(some.map(|(&token, &logit)| listed(token as usize, logit)));
        self.dense = false;
    }

    /// Adds to one token's logit, if it is there; -inf bans it.
    pub fn bias(&mut self, token: u32, bias: f32) {
        let logit = match self.dense {
            true => &mut self.row[token as usize],
            // Nobody banned is listed.
            false if bias == f32::NEG_INFINITY => return self.list.retain(|c| c.token != token),
            false => match self.list.iter_mut().find(|c| c.token == token) {
                Some(c) => &mut c.logit,
                None => return,
            },
        };
        *logit = if bias == f32::NEG_INFINITY { bias } else { edited(*logit, |l| l + f64::from(bias)) };
    }

    /// Rewrites the logits of the tokens in `by_token`; banned ones stay banned.
    pub fn edit<V>(&mut self, by_token: &HashMap<u32, V>, rewrite: impl Fn(f64, &V) -> f64) {
        if self.dense {
            for (&token, value) in by_token {
                // A prompt token beyond the logits row (a special of another table) has nothing to edit.
                if let Some(logit) = self.row.get_mut(token as usize) {
                    *logit = edited(*logit, |l| rewrite(l, value));
                }
            }
        } else {
            for c in &mut self.list {
                if let Some(value) = by_token.get(&c.token) {
                    c.logit = edited(c.logit, |l| rewrite(l, value));
                }
            }
        }
    }

    /// Every logit that is not banned.
    pub fn logits(&self) -> impl Iterator<Item = f32> {
        let (row, list) = if self.dense { (&self.row[..], &[][..]) } else { (&[][..], &self.list[..]) };
        row.iter().copied().chain(list.iter().map(|c| c.logit)).filter(|&l| l > f32::NEG_INFINITY)
    }

    /// The listed form, without banned tokens.
    pub fn list(&mut self) -> &mut Vec<Candidate> {
        if self.dense {
            self.retain_logit(f32::MIN);
        }
        &mut self.list
    }

    /// The likeliest token.
    pub fn argmax(&self) -> Option<(u32, f32)> {
        if self.dense {
            return argmax(&self.row);
        }
        let best = self.list.iter().min_by(|a, b| Candidate::likelier(a, b))?;
        (best.logit > f32::NEG_INFINITY).then_some((best.token, best.logit))
    }

    /// Keeps the `n` likeliest.
    pub fn keep_top(&mut self, n: usize) {
        if self.dense {
            top_n(&self.row, n, &mut self.list);
            self.dense = false;
        } else if n < self.list.len() {
            if n > 0 {
                self.list.select_nth_unstable_by(n - 1, Candidate::likelier);
            }
            self.list.truncate(n);
        }
    }

    /// Keeps logits of at least `floor`.
    pub fn retain_logit(&mut self, floor: f32) {
        if self.dense {
            self.list.clear();
            let kept = self.row.iter().enumerate().filter(|&(_, &logit)| logit >= floor);
            self.list.extend(kept.map(|(token, &logit)| listed(token, logit)));
            self.dense = false;
        } else {
            self.list.retain(|c| c.logit >= floor);
        }
    }

    /// Sets the probabilities of the listed form, which sum to 1.
    pub fn softmax(&mut self) -> &mut Vec<Candidate> {
        let max = self.argmax().map_or(0.0, |(_, logit)| logit);
        let list = self.list();
        let mut sum = 0.0;
        for c in list.iter_mut() {
            let x = c.logit - max;
            c.p = if x < NEGLIGIBLE { 0.0 } else { x.exp() };
            sum += f64::from(c.p);
        }
        for c in list.iter_mut() {
            c.p = (f64::from(c.p) / sum) as f32;
        }
        list
    }

    /// Keeps the head, in `order`, up to and with the candidate at which `full(its index, mass so far)` first
    /// holds; all of it if that never happens. Needs the probabilities.
    pub fn keep_head(
        &mut self,
        order: impl Fn(&Candidate, &Candidate) -> Ordering,
        full: impl Fn(usize, f64) -> bool,
    ) {
        debug_assert!(!self.dense);
        let (mut n_sorted, mut mass) = (0, 0.0);
        while n_sorted < self.list.len() {
            let to = (n_sorted * 8).max(64).min(self.list.len());
            let rest = &mut self.list[n_sorted..];
            if to - n_sorted < rest.len() {
                rest.select_nth_unstable_by(to - n_sorted, &order);
            }
            self.list[n_sorted..to].sort_unstable_by(&order);
            for i in n_sorted..to {
                mass += f64::from(self.list[i].p);
                if full(i, mass) {
                    self.list.truncate(i + 1);
                    return;
                }
            }
            n_sorted = to;
        }
    }
}

fn listed(token: usize, logit: f32) -> Candidate {
    Candidate { token: token as u32, logit, p: 0.0, key: 0.0 }
}

/// In f64, where no product of two f32 overflows, and back within f32's finite range.
fn edited(logit: f32, rewrite: impl FnOnce(f64) -> f64) -> f32 {
    if logit == f32::NEG_INFINITY {
        return logit;
    }
    rewrite(f64::from(logit)).clamp(f64::from(f32::MIN), f64::from(f32::MAX)) as f32
}

/// The likeliest token of a row, ties to the lowest id; None if all are banned.
pub(crate) fn argmax(row: &[f32]) -> Option<(u32, f32)> {
    // The maximum first, in lanes the compiler can vectorise, then the first index that has it.
    let mut lanes = [f32::NEG_INFINITY; 16];
    let chunks = row.chunks_exact(lanes.len());
    let tail = chunks.remainder().iter().fold(f32::NEG_INFINITY, |m, &l| if l > m { l } else { m });
    for chunk in chunks {
        for (m, &l) in lanes.iter_mut().zip(chunk) {
            *m = if l > *m { l } else { *m };
        }
    }
    let max = lanes.iter().fold(tail, |m, &l| if l > m { l } else { m });
    if max == f32::NEG_INFINITY {
        return None;
    }
    row.iter().position(|&l| l == max).map(|token| (token as u32, row[token]))
}

/// The `n` likeliest of a row, in no particular order, banned ones never.
pub(crate) fn top_n(row: &[f32], n: usize, out: &mut Vec<Candidate>) {
    out.clear();
    if n == 0 {
        return;
    }
    // Whatever is not above the n-th best so far can't be among the n: tokens come in the order of their ids,
    // so a later tie loses.
    let capacity = n.saturating_mul(2).saturating_add(64);
    let mut floor = f32::NEG_INFINITY;
    for (token, &logit) in row.iter().enumerate() {
        if logit > floor {
            out.push(listed(token, logit));
            if out.len() == capacity {
                let (_, nth, _) = out.select_nth_unstable_by(n - 1, Candidate::likelier);
                floor = nth.logit;
                out.truncate(n);
            }
        }
    }
    if n < out.len() {
        out.select_nth_unstable_by(n - 1, Candidate::likelier);
        out.truncate(n);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Few distinct values, so that ties are common, and bans.
    fn row() -> impl Strategy<Value = Vec<f32>> {
        let logit =
            prop_oneof![8 => (-20i8..20).prop_map(|x| f32::from(x) / 4.0), 1 => Just(f32::NEG_INFINITY)];
        prop::collection::vec(logit, 1..400)
    }

    fn sorted(row: &[f32]) -> Vec<u32> {
        let mut tokens: Vec<u32> =
            (0..row.len() as u32).filter(|&t| row[t as usize] > f32::NEG_INFINITY).collect();
        tokens.sort_by(|&a, &b| row[b as usize].total_cmp(&row[a as usize]).then(a.cmp(&b)));
        tokens
    }

    fn tokens(candidates: &mut Candidates) -> Vec<u32> {
        let mut tokens: Vec<u32> = candidates.list().iter().map(|c| c.token).collect();
        tokens.sort_unstable();
        tokens
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn dense_and_listed_agree_with_a_full_sort(row in row(), n in 0usize..50, floor in -5.0f32..5.0) {
            let order = sorted(&row);
            prop_assert_eq!(argmax(&row).map(|(t, _)| t), order.first().copied());
            for listed_first in [false, true] {
                let mut c = Candidates::default();
                let load = |c: &mut Candidates| {
                    c.load(&row);
                    if listed_first {
                        c.list();
                    }
                };
                load(&mut c);
                prop_assert_eq!(c.argmax().map(|(t, _)| t), order.first().copied());
                prop_assert_eq!(c.logits().count(), order.len());
                c.keep_top(n);
                let mut want: Vec<u32> = order.iter().copied().take(n).collect();
                want.sort_unstable();
                prop_assert_eq!(tokens(&mut c), want);
                load(&mut c);
                c.retain_logit(floor);
                let mut want: Vec<u32> = order.iter().copied().filter(|&t| row[t as usize] >= floor).collect();
                want.sort_unstable();
                prop_assert_eq!(tokens(&mut c), want);
            }
        }

        #[test]
        fn the_head_is_that_of_a_full_sort(row in row(), n in 0usize..300) {
            let mut c = Candidates::default();
            c.load(&row);
            c.softmax();
            c.keep_head(Candidate::likelier, |i, _| i + 1 >= n);
            let want: Vec<u32> = sorted(&row).into_iter().take(n.max(1)).collect();
            prop_assert_eq!(c.list().iter().map(|c| c.token).collect::<Vec<_>>(), want);
        }

        #[test]
        fn probabilities_are_those_of_f64(row in row()) {
            let mut c = Candidates::default();
            c.load(&row);
            let exact = row.iter().map(|&l| f64::from(l).exp()).sum::<f64>().ln();
            for c in c.softmax().iter() {
                let want = (f64::from(c.logit) - exact).exp();
                prop_assert!((f64::from(c.p) - want).abs() < 1e-6, "{} {}", c.p, want);
            }
        }
    }

    #[test]
    fn edits_stay_finite() {
        let mut c = Candidates::default();
        c.load(&[f32::MAX, f32::MIN, 1.0, f32::NEG_INFINITY]);
        c.edit(&HashMap::from([(0, 1e30), (1, 1e30), (3, 1e30), (9, 1.0)]), |l, by| l * by);
        assert_eq!(c.row, [f32::MAX, f32::MIN, 1.0, f32::NEG_INFINITY]);
        c.bias(2, f32::NEG_INFINITY);
        c.bias(0, f32::MAX);
        assert_eq!(c.row, [f32::MAX, f32::MIN, f32::NEG_INFINITY, f32::NEG_INFINITY]);
    }
}
