//! Against the reference: block logits at several points of a sequence, and drafts that do not depend on who else
//! drafts, how the context arrived, or what was drafted before.

use std::sync::Arc;

use paceline_sampling::{Sampler, SamplingParams};
use paceline_spec::{Draft, DraftRequest};

use crate::rig::{BLOCK, N_VOCAB, Point, Rig, draft, follows, no_past};

fn check(name: &str) {
    let mut rig = Rig::new(name);
    let points = rig.points();
    assert!(points.len() >= 5, "only {points:?}");
    for point in points {
        let got = rig.draft_at(point.n, point.anchor);
        let want = rig.path(point);
        assert!(follows(&got, &want), "{name} {point:?}: {got:?}, reference {want:?}");
        check_equalities(&mut rig, point, &got);
    }
    assert_eq!(rig.drafter.state_bytes(), 0);
}

fn check_equalities(rig: &mut Rig, Point { n, anchor, .. }: Point, want: &Draft) {
    for chunk in [1, 3, 16] {
        let seq = rig.sequence(n, chunk);
        // Twice: a draft leaves nothing behind.
        for _ in 0..2 {
            let got = draft(&mut *rig.drafter, &[(seq, n, anchor)], BLOCK - 1, N_VOCAB);
            assert_eq!(&got[0], want, "chunks of {chunk}");
        }
        rig.drafter.forget(seq);
    }
    // Among others, at any place of the batch.
    let (seq, a, b) = (rig.sequence(n, 75), rig.sequence(5, 75), rig.sequence(40, 7));
    for order in [[(seq, n, anchor), (a, 5, 3), (b, 40, 9)], [(a, 5, 3), (b, 40, 9), (seq, n, anchor)]] {
        let drafts = draft(&mut *rig.drafter, &order, BLOCK - 1, N_VOCAB);
        let at = order.iter().position(|r| r.0 == seq).unwrap();
        assert_eq!(&drafts[at], want, "among others");
    }
    for seq in [seq, a, b] {
        rig.drafter.forget(seq);
    }
}

#[test]
fn sliding_causal_and_full_layers() {
    check("dflash");
}

#[test]
fn sliding_layers_that_see_the_whole_block() {
    check("dflash-noncausal");
}

/// Beside others, behind any history: convolutions begin anew with each block of each sequence.
#[test]
fn convolutions_and_a_selector() {
    check("dflash2");
}

/// What the target's sampler would draw from the same logits at the same position: common noise is what makes a
/// sampled draft likely to be kept.
#[test]
fn a_sampled_draft_uses_the_noise_of_its_positions() {
    let mut rig = Rig::new("dflash");
    let sampler = |seed| {
        let params = SamplingParams { seed, temperature: 1.0, ..SamplingParams::default() };
        Sampler::new(params, N_VOCAB, Arc::default()).unwrap()
    };
    let (mut n, mut n_same, mut n_shifted) = (0, 0, 0);
    for point in rig.points() {
        let (want, seq) = (rig.reference(point), rig.sequence(point.n, 75));
        for seed in 0..6 {
            let (mut own, mut other) = (sampler(seed), sampler(seed));
            let request = DraftRequest {
                seq,
                anchor: point.anchor,
                position: point.n,
                n_max: BLOCK - 1,
                past: no_past(),
                sampler: &mut own,
            };
            let got = rig.drafter.draft(&mut [request]).remove(0);
            for (i, row) in want.iter().enumerate() {
                let mut at = |position: usize| other.propose(position as u64, row).unwrap().token;
                n += 1;
                n_same += usize::from(got.tokens[i] == at(point.n + 1 + i));
                n_shifted += usize::from(got.tokens[i] == at(point.n + i));
            }
        }
    }
    // One draw may fall between the reference's logits and ours.
    assert!(n_same + 1 >= n && n_shifted < n / 2, "{n_same} and {n_shifted} of {n}");
}

#[test]
fn any_depth_is_the_beginning_of_the_whole_block() {
    any_depth("dflash");
    any_depth("dflash2");
}

fn any_depth(name: &str) {
    let mut rig = Rig::new(name);
    assert_eq!(rig.drafter.n_draft_max(), BLOCK - 1);
    let whole = rig.draft_at(40, 29);
    let seq = rig.sequence(40, 75);
    for (n_max, n) in [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 5), (1000, 5)] {
        let got = &draft(&mut *rig.drafter, &[(seq, 40, 29)], n_max, N_VOCAB)[0];
        assert_eq!((&got.tokens[..], &got.q[..]), (&whole.tokens[..n], &whole.q[..n]), "at most {n_max}");
    }
}

#[test]
fn nothing_is_held_for_forgotten_sequences() {
    let mut rig = Rig::new("dflash");
    let seq = rig.sequence(40, 9);
    assert!(rig.drafter.state_bytes() > 0);
    rig.drafter.forget(seq);
    assert_eq!(rig.drafter.state_bytes(), 0);
}

#[test]
fn a_gap_in_its_memory_is_said_not_drafted_over() {
    let mut rig = Rig::new("dflash");
    let seq = rig.sequence(10, 75);
    let unknown = rig.ids.create();
    let drafts = draft(&mut *rig.drafter, &[(seq, 12, 3), (unknown, 12, 3)], 3, N_VOCAB);
    assert!(drafts.iter().all(|d| d.tokens.is_empty()));
    assert_eq!(drafts[0].fault.as_deref(), Some("its memory has 10 of 12 committed tokens"));
    assert_eq!(drafts[1].fault.as_deref(), Some("it has no memory of this sequence"));
}
