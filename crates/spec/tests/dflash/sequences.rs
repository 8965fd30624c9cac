//! Many sequences, any order of events: what a sequence drafts depends on its own rows alone.

use std::collections::HashMap;

use paceline_spec::{Draft, Kept, SeqId};
use paceline_testkit::{Rng, Seeded};

use crate::rig::{BLOCK, N_VOCAB, Parts, Rig, Target, draft};

/// A sequence of the run: it holds rows `offset..offset + n` of the golden, from position 0.
#[derive(Clone, Copy)]
struct Live {
    seq: SeqId,
    offset: usize,
    n: usize,
}

fn feed(rig: &mut Rig, moved: &[(Live, usize)]) {
    let kept: Vec<Kept<'_>> = moved
        .iter()
        .map(|(live, n_new)| {
            let rows = live.offset + live.n..live.offset + live.n + n_new;
            let taps = &rig.features[rows.start * rig.width..rows.end * rig.width];
            Kept { seq: live.seq, first_position: live.n, tokens: &rig.tokens[rows], taps }
        })
        .collect();
    rig.drafter.commit(&kept);
}

/// What a drafter that has done nothing else says behind the same rows.
fn fresh(name: &str, parts: &Parts, live: Live, anchor: u32) -> Draft {
    let mut rig = Rig::of(name, parts);
    let seq = rig.ids.create();
    feed(&mut rig, &[(Live { seq, n: 0, ..live }, live.n)]);
    draft(&mut *rig.drafter, &[(seq, live.n, anchor)], BLOCK - 1, N_VOCAB).remove(0)
}

#[test]
fn any_history_drafts_as_a_fresh_drafter() {
    any_history("dflash");
    any_history("dflash2");
}

fn any_history(name: &str) {
    let parts = Parts::golden(name);
    let mut known: HashMap<(usize, usize, u32), Draft> = HashMap::new();
    let (mut n_drafts, mut n_forgotten, mut n_fork) = (0, 0, 0);
    for seed in 0..12 {
        let _seeded = Seeded::new("histories", seed);
        let mut rng = Rng::new(seed);
        let mut rig = Rig::of(name, &parts);
        let mut all: Vec<Live> = Vec::new();
        for _ in 0..40 {
            match rng.range(0..10) {
                0..2 if all.len() < 6 => {
                    let live = Live { seq: rig.ids.create(), offset: 5 * rng.range(0..4), n: 0 };
                    let n_new = 1 + 6 * rng.range(0..5);
                    feed(&mut rig, &[(live, n_new)]);
                    all.push(Live { n: n_new, ..live });
                }
                2 if !all.is_empty() => {
                    let gone = all.swap_remove(rng.range(0..all.len()));
                    rig.drafter.forget(gone.seq);
                    n_forgotten += 1;
                }
                3 if !all.is_empty() => {
                    // Another goes on from some of its rows, at times after some time as bytes.
                    let from = *rng.pick(&all);
                    let (mut to, n) = (Live { seq: rig.ids.create(), ..from }, rng.range(1..from.n + 1));
                    to.n = n;
                    if !rig.drafter.fork(from.seq, to.seq, n) {
                        // Its window there is gone, which only happens where the drafter says so.
                        assert!(n < from.n && !rig.drafter.forks_anywhere(from.n));
                        continue;
                    }
                    if rng.chance(0.5) {
                        let bytes = rig.drafter.export(to.seq).unwrap();
                        rig.drafter.forget(to.seq);
                        to.seq = rig.ids.create();
                        rig.drafter.import(to.seq, n, &bytes).unwrap();
                    }
                    let at = rng.range(0..all.len());
                    rig.drafter.forget(all[at].seq);
                    all[at] = to;
                    n_fork += 1;
                }
                4..6 => {
                    // As after a verification: one step, some of the sequences, some rows each.
                    let mut moved = Vec::new();
                    for live in &mut all {
                        let n_new = rng.range(0..8).min(60 - live.offset - live.n);
                        if n_new > 0 {
                            moved.push((*live, n_new));
                            live.n += n_new;
                        }
                    }
                    feed(&mut rig, &moved);
                }
                _ => {
                    let anchor = *rng.pick(&[3u32, 77, 109]);
                    let n_max = rng.range(1..BLOCK + 2);
                    let asked: Vec<Live> = all.iter().copied().filter(|_| rng.chance(0.7)).collect();
                    let requests: Vec<_> = asked.iter().map(|l| (l.seq, l.n, anchor)).collect();
                    let drafts = draft(&mut *rig.drafter, &requests, n_max, N_VOCAB);
                    for (live, got) in asked.iter().zip(drafts) {
                        let want = known
                            .entry((live.offset, live.n, anchor))
                            .or_insert_with(|| fresh(name, &parts, *live, anchor));
                        let n = n_max.min(BLOCK - 1);
                        assert_eq!((&got.tokens[..], &got.q[..]), (&want.tokens[..n], &want.q[..n]));
                        n_drafts += 1;
                    }
                }
            }
        }
        assert_eq!(rig.drafter.state_bytes() > 0, !all.is_empty());
        all.iter().for_each(|live| rig.drafter.forget(live.seq));
        assert_eq!(rig.drafter.state_bytes(), 0);
    }
    assert!(n_drafts > 250 && n_forgotten > 10 && n_fork > 10, "{n_drafts} drafts, {n_forgotten} forgotten");
}

#[test]
fn without_room_a_sequence_is_forgotten_and_says_so() {
    let parts = Parts::golden("dflash");
    let want = Rig::of("dflash", &parts).draft_at(40, 29);
    let mut rig = Rig::with("dflash", Target::golden().load_with_room(parts.file(), 64).unwrap());
    // Four pages of 16, and every one has rows.
    let (a, b) = (rig.sequence(40, 75), rig.sequence(9, 75));
    assert_eq!(draft(&mut *rig.drafter, &[(a, 40, 29), (b, 9, 5)], BLOCK - 1, N_VOCAB)[0], want);
    rig.commit(b, 9, 30);
    let drafts = draft(&mut *rig.drafter, &[(a, 40, 29), (b, 30, 5)], BLOCK - 1, N_VOCAB);
    assert_eq!(drafts[0], want);
    assert_eq!(drafts[1].fault.as_deref(), Some("it has no memory of this sequence"));
    // What comes later doesn't bring it back with a hole.
    rig.commit(b, 30, 32);
    let late = draft(&mut *rig.drafter, &[(b, 32, 5)], BLOCK - 1, N_VOCAB).remove(0);
    assert_eq!(late.fault.as_deref(), Some("it has no memory of this sequence"));
    // Room for the rows and none for a block: no draft, and nothing wrong.
    rig.commit(a, 40, 62);
    let full = draft(&mut *rig.drafter, &[(a, 62, 5)], BLOCK - 1, N_VOCAB).remove(0);
    assert_eq!((full.tokens.len(), full.fault), (0, None));
    rig.drafter.forget(a);
    assert_eq!(rig.drafter.state_bytes(), 0);
}

#[test]
fn features_that_are_not_finite_harm_their_sequence_alone() {
    let mut rig = Rig::new("dflash");
    let want = rig.draft_at(40, 29);
    let (good, bad) = (rig.sequence(40, 75), rig.sequence(20, 75));
    let taps = vec![f32::NAN; rig.width];
    rig.drafter.commit(&[Kept { seq: bad, first_position: 20, tokens: &[1], taps: &taps }]);
    for order in [[(good, 40, 29), (bad, 21, 3)], [(bad, 21, 3), (good, 40, 29)]] {
        for ((seq, ..), got) in order.iter().zip(draft(&mut *rig.drafter, &order, BLOCK - 1, N_VOCAB)) {
            if *seq == good {
                assert_eq!(got, want);
            } else {
                let fault = got.fault.expect("its logits are not finite");
                assert!(
                    got.tokens.is_empty() && fault.starts_with("row 1 of its block can't be sampled"),
                    "{fault}"
                );
            }
        }
    }
    // The pages that it leaves behind harm nobody.
    rig.drafter.forget(bad);
    assert_eq!(rig.draft_at(40, 29), want);
}

/// Layers with a window of 8 keep the pages of 16 that it lies in; a fork begins where all of its window is left, and drafts as a
/// drafter that was given its rows alone.
#[test]
fn sliding_layers_keep_their_window() {
    let parts = Parts::golden("dflash").unset("dflash.attention.sliding_window_pattern");
    let mut rig = Rig::of("dflash", &parts);
    let seq = rig.sequence(20, 75);
    let early = rig.drafter.state_bytes();
    rig.commit(seq, 20, 70);
    assert_eq!(rig.drafter.state_bytes(), early, "two pages of each layer before and after");
    assert!(rig.drafter.forks_anywhere(22) && !rig.drafter.forks_anywhere(23));
    // Behind 70 rows the next one sees 63, behind 40 it would have seen 33.
    for (len, is_left) in [(70, true), (60, true), (40, false)] {
        let fork = rig.ids.create();
        assert_eq!(rig.drafter.fork(seq, fork, len), is_left, "{len}");
        if is_left {
            let got = draft(&mut *rig.drafter, &[(fork, len, 29)], BLOCK - 1, N_VOCAB).remove(0);
            assert_eq!(got, fresh("dflash", &parts, Live { seq, offset: 0, n: len }, 29), "{len}");
            rig.drafter.forget(fork);
        }
    }
    rig.drafter.forget(seq);
    assert_eq!(rig.drafter.state_bytes(), 0);
}
