//! A fork of what copies text knows that part of it and no more.

use paceline_spec::{Drafter, Kept, Ngram, SeqId};
use paceline_testkit::Rng;

use crate::rig::{draft, seq_ids};

fn commit(drafter: &mut Ngram, seq: SeqId, first_position: usize, tokens: &[u32]) {
    drafter.commit(&[Kept { seq, first_position, tokens, taps: &[] }]);
}

#[test]
fn a_fork_copies_as_a_fresh_drafter() {
    let (mut rng, mut ids) = (Rng::new(3), seq_ids());
    let text: Vec<u32> = (0..300).map(|_| rng.range(0..3) as u32).collect();
    let (mut drafter, whole) = (Ngram::new(8), ids.create());
    commit(&mut drafter, whole, 0, &text);
    for len in (1..299).step_by(7) {
        let (fork, copy, fresh) = (ids.create(), ids.create(), ids.create());
        assert!(drafter.fork(whole, fork, len));
        let bytes = drafter.export(fork).unwrap();
        assert!(drafter.import(copy, len + 1, &bytes).is_err());
        drafter.import(copy, len, &bytes).unwrap();
        assert_eq!(drafter.resting_bytes(), 2 * len * size_of::<u32>());
        // At once, and behind further rows.
        let (at, anchor) = (len, text[len]);
        commit(&mut drafter, fresh, 0, &text[..len]);
        let got = draft(&mut drafter, &[(fork, at, anchor), (copy, at, anchor), (fresh, at, anchor)], 8, 3);
        assert!(got[0] == got[2] && got[1] == got[2], "{len}: {got:?}");
        let other: Vec<u32> = (0..20).map(|_| rng.range(0..3) as u32).collect();
        [fork, copy, fresh].iter().for_each(|&seq| commit(&mut drafter, seq, len, &other));
        let asked = [fork, copy, fresh].map(|seq| (seq, len + 20, 1));
        let got = draft(&mut drafter, &asked, 8, 3);
        assert!(got[0] == got[2] && got[1] == got[2], "{len}: {got:?}");
        assert_eq!(drafter.resting_bytes(), 0);
        [fork, copy, fresh].iter().for_each(|&seq| drafter.forget(seq));
    }
    assert!(!drafter.fork(whole, ids.create(), 301), "more than there is");
    drafter.forget(whole);
    assert_eq!(drafter.state_bytes(), 0);
}
