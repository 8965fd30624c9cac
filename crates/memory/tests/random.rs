//! Random lives of sequences over the hash model: whatever happens to the others, the rows of each hash what its own
//! tokens alone give, and every page comes back.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use paceline_backend::{Exec, Lane, StateConfig, States, Step, StepOut};
use paceline_memory::{Memory, SeqId};
use paceline_testkit::{HashExec, HashKind, HashModel, HashStates, Reading, Rng, Seeded, Token};

/// A memory, the device behind it, and what each sequence should hold.
struct World {
    memory: Memory,
    states: Arc<HashStates>,
    exec: HashExec,
    model: HashModel,
    truth: Vec<(SeqId, Vec<Token>)>,
    out: StepOut,
}

impl World {
    fn new(kind: HashKind, page_len: usize, n_cell_max: usize) -> World {
        let model = HashModel { n_vocab: 4, bias: [].into(), ..HashModel::new(11, kind) };
        let config = StateConfig { page_len, n_tentative_max: 8, ..StateConfig::default() };
        let states = model.states(config);
        World {
            memory: Memory::new(states.clone(), n_cell_max),
            exec: HashExec::new(model.clone(), states.clone()),
            states,
            model,
            truth: Vec::new(),
            out: StepOut::default(),
        }
    }

    fn create(&mut self) -> SeqId {
        let seq = self.memory.create();
        self.truth.push((seq, Vec::new()));
        seq
    }

    fn fork(&mut self, at: usize) -> SeqId {
        let tokens = self.truth[at].1.clone();
        let seq = self.memory.fork(self.truth[at].0);
        self.truth.push((seq, tokens));
        seq
    }

    /// A fork with the first tokens, where such a fork can be made.
    fn fork_prefix(&mut self, at: usize, len: usize) {
        let (seq, tokens) = &self.truth[at];
        let can = len == tokens.len() || (len < tokens.len() && self.goes_back(tokens.len(), len));
        let tokens = tokens[..len.min(tokens.len())].to_vec();
        let fork = self.memory.fork_prefix(*seq, len);
        assert_eq!(fork.is_some(), can, "{len} of {} tokens, {:?}", tokens.len(), self.model.kind);
        self.truth.extend(fork.map(|fork| (fork, tokens)));
    }

    /// True if a sequence of `n` tokens still has what one of `len` looks at.
    fn goes_back(&self, n: usize, len: usize) -> bool {
        let page_len = self.states.config().page_len;
        // A page is gone when all its cells are further back than a window reaches from the next cell.
        let n_gone =
            |n: usize, window: usize| (0..n).filter(|p| (p + 1) * page_len + window <= n + 1).count();
        let mut windows = self.model.kind.windows().iter().flatten();
        !self.model.kind.has_slots() && windows.all(|&window| n_gone(n, window) == n_gone(len, window))
    }

    /// Another sequence with the same past, by way of bytes; false imports leave nothing.
    fn reload(&mut self, at: usize, rng: &mut Rng) {
        let (seq, tokens) = self.truth[at].clone();
        let fork = self.memory.fork(seq);
        let mut bytes = Vec::new();
        self.memory.export(fork, &mut bytes);
        self.memory.free(fork);
        let (usage, n_page) = (self.memory.usage(), self.states.n_page());
        let n = rng.range(0..bytes.len());
        self.memory.import(&bytes[..n]).expect_err("a part of it");
        self.memory.import(&[&bytes[..], &[0]].concat()).expect_err("more than it");
        assert_eq!((self.memory.usage(), self.states.n_page()), (usage, n_page), "a refused import");
        let seq = self.memory.import(&bytes).expect("what was exported");
        assert_eq!(self.memory.len(seq), tokens.len());
        self.truth.push((seq, tokens));
    }

    fn free(&mut self, at: usize) {
        let (seq, _) = self.truth.swap_remove(at);
        self.memory.free(seq);
    }

    /// One forward for the sequences at `lanes` that get room, checked row by row; then commits the given numbers of
    /// rows. A lane is `(index, tokens, n_certain, n_final)`. Returns how many had no room, or not for all.
    fn step(&mut self, lanes: &[(usize, Vec<Token>, usize, usize)]) -> usize {
        let (mut ran, mut n_cut) = (Vec::new(), 0);
        for lane in lanes {
            let seq = self.truth[lane.0].0;
            let before = (self.memory.usage(), self.memory.len(seq), self.states.traffic());
            // In one go or in two, as an engine does for known tokens and drafts.
            let n_first = if lane.0 % 2 == 0 { lane.1.len() } else { lane.2.max(1) };
            match self.memory.prepare(seq, n_first, lane.2) {
                Ok(()) => {
                    let n_more = lane.1.len() - n_first;
                    let n_row = n_first + self.memory.extend(seq, n_more);
                    if n_row < lane.1.len() {
                        assert_eq!(self.memory.n_page_free(), 0, "a draft is cut only where no page is left");
                        n_cut += 1;
                    }
                    ran.push((lane.0, lane.1[..n_row].to_vec(), lane.2, lane.3.min(n_row)));
                }
                Err(error) => {
                    assert!(error.needed > error.free && error.free <= error.total, "{error}");
                    let after = (self.memory.usage(), self.memory.len(seq), self.states.traffic());
                    assert_eq!(after, before, "a refused step leaves everything as it was");
                }
            }
            self.memory.check();
        }
        let rows = row_ranges(ran.iter().map(|lane| lane.1.len()));
        let tokens: Vec<Token> = ran.iter().flat_map(|lane| lane.1.iter().copied()).collect();
        let (mut positions, mut step_lanes): (Vec<u32>, Vec<Lane<'_>>) = (Vec::new(), Vec::new());
        for (lane, rows) in ran.iter().zip(&rows) {
            let described = self.memory.lane(self.truth[lane.0].0, rows.start);
            assert_eq!(&described.rows, rows);
            positions.extend((described.n_past as u32..).take(rows.len()));
            step_lanes.push(described);
        }
        let outputs: Vec<u32> = (0..tokens.len() as u32).collect();
        let step = Step {
            tokens: &tokens,
            inputs: &[],
            positions: &positions,
            lanes: &step_lanes,
            outputs: &outputs,
        };
        if !ran.is_empty() {
            self.exec.run(&step, &mut self.out);
        }
        for (lane, rows) in ran.iter().zip(rows) {
            let (at, tokens, _, n_final) = lane;
            let (seq, known) = &mut self.truth[*at];
            let mut reading: Reading = self.model.read(known);
            for (row, &token) in rows.zip(tokens) {
                reading.push(token);
                assert_eq!(self.out.output_row(row), reading.logits(), "{seq:?} at {}", reading.n_tokens());
            }
            self.memory.commit(*seq, *n_final);
            known.extend(&tokens[..*n_final]);
            assert_eq!(self.memory.len(*seq), known.len());
        }
        self.memory.check();
        lanes.len() - ran.len() + n_cut
    }

    /// Writes `tokens` to the sequence at `at`, all certain.
    fn append(&mut self, at: usize, tokens: &[Token]) {
        assert_eq!(self.step(&[(at, tokens.to_vec(), tokens.len(), tokens.len())]), 0, "there is room");
    }

    fn balanced(&self) {
        let traffic = self.states.traffic();
        let usage = self.memory.usage();
        assert_eq!(self.states.n_page(), usage.n_page_all, "pages with storage are those in use");
        let bytes: usize = self.truth.iter().map(|&(seq, _)| self.memory.bytes_alone(seq)).sum();
        assert!(bytes <= usage.bytes + usage.bytes_resting, "what each has alone is part of all");
        assert_eq!(traffic.n_alloc - traffic.n_release, self.states.n_page());
    }
}

fn live(seed: u64) {
    let _seeded = Seeded::new("a random life", seed);
    let mut rng = Rng::new(seed);
    let kind = *rng.pick(&HashKind::ALL);
    let page_len = *rng.pick(&[1, 2, 3, 8, 64]);
    let n_cell_max = if rng.chance(0.5) { rng.range(8..80) } else { 2000 };
    let mut world = World::new(kind, page_len, n_cell_max);
    let (mut n_refused, n_op) = (0, rng.range(20..80));
    for _ in 0..n_op {
        let n_seq = world.truth.len();
        match rng.range(0..10) {
            0 if n_seq < 6 => {
                let seq = world.create();
                assert!(world.memory.is_empty(seq));
            }
            1 if (1..6).contains(&n_seq) => {
                let (n_page, usage) = (world.states.n_page(), world.memory.usage());
                let at = rng.range(0..n_seq);
                match rng.chance(0.5) {
                    true => _ = world.fork(at),
                    false => world.fork_prefix(at, rng.range(0..world.truth[at].1.len() + 2)),
                }
                assert_eq!(world.states.n_page(), n_page, "a fork takes no page");
                assert_eq!(world.memory.usage().n_page, usage.n_page, "and counts for none until it wakes");
            }
            2 if n_seq > 0 => world.free(rng.range(0..n_seq)),
            4 if (1..6).contains(&n_seq) && rng.chance(0.5) => world.reload(rng.range(0..n_seq), &mut rng),
            3 if n_seq > 0 && !kind.has_slots() => {
                let at = rng.range(0..n_seq);
                let n = world.truth[at].1.len();
                let len = rng.range(n.saturating_sub(40)..n + 3);
                if len < n && !world.goes_back(n, len) {
                    continue;
                }
                let (seq, known) = &mut world.truth[at];
                world.memory.truncate(*seq, len);
                known.truncate(len);
            }
            _ => {
                let mut lanes = Vec::new();
                for at in 0..n_seq {
                    if rng.chance(0.6) {
                        let n_certain = rng.range(0..12);
                        let n_tentative = rng.range(usize::from(n_certain == 0)..9);
                        let n_final = n_certain + rng.range(0..n_tentative + 1);
                        let tokens = (0..n_certain + n_tentative).map(|_| rng.range(0..4) as Token).collect();
                        lanes.push((at, tokens, n_certain, n_final));
                    }
                }
                n_refused += world.step(&lanes);
            }
        }
        world.memory.check();
        world.balanced();
        let usage = world.memory.usage();
        assert_eq!(usage.n_seq + usage.n_resting, world.truth.len());
        assert!(world.memory.usage().n_page <= world.memory.usage().n_page_max);
    }
    assert!(n_refused == 0 || n_cell_max < 80, "room enough, and {n_refused} steps were refused");
    while !world.truth.is_empty() {
        world.free(0);
    }
    world.memory.check();
    world.balanced();
    let usage = world.memory.usage();
    assert_eq!((usage.n_seq, usage.n_page, usage.bytes), (0, 0, 0), "nothing stays in use");
    assert_eq!((usage.n_resting, usage.n_page_resting, usage.bytes_resting), (0, 0, 0), "and nothing rests");
    assert_eq!(usage.n_page_all, 0);
    assert_eq!(world.states.n_saved(), 0);
}

#[test]
fn random_lives_leave_every_sequence_its_own() {
    (0..1500).for_each(live);
}

#[test]
fn a_fork_shares_until_one_side_writes() {
    let mut world = World::new(HashKind::Hybrid, 4, 100);
    world.create();
    world.append(0, &[0, 1, 2, 3, 0, 1]);
    world.fork(0);
    assert_eq!((world.states.n_page(), world.states.traffic().n_copy), (2, 0), "shared, nothing copied");
    // Only the page that is written into is copied, by whoever writes first.
    world.append(1, &[3]);
    assert_eq!((world.states.n_page(), world.states.traffic().n_copy), (3, 1));
    world.append(0, &[2]);
    assert_eq!(
        (world.states.n_page(), world.states.traffic().n_copy),
        (3, 1),
        "the other side is alone by now"
    );
    world.append(1, &[1, 1, 1]);
    world.append(0, &[0, 2, 0]);
    world.free(0);
    world.append(0, &[2, 2, 2]);
    world.balanced();
}

/// A window's pages go as soon as no later row looks at them, and not before; who looks from further back keeps them.
#[test]
fn a_window_leaves_its_pages_behind() {
    // Windows of 6 and of all cells, pages of 2.
    let mut world = World::new(HashKind::Sliding, 2, 1000);
    let seq = world.create();
    world.append(0, &[1; 7]);
    assert_eq!(world.states.n_page(), 4 + 3, "row 7 looks at 2 ..= 7");
    assert!(!world.memory.forks_anywhere(7) && world.memory.forks_anywhere(6));
    // Rows that come to nothing move no window.
    world.step(&[(0, vec![2; 8], 0, 0)]);
    assert_eq!(world.states.n_page(), 4 + 3);
    let early = world.fork(0);
    world.append(0, &[2; 193]);
    assert_eq!(world.memory.len(seq), 200);
    assert_eq!(
        world.states.n_page(),
        100 + 3 + 1 + 3,
        "the whole, the window, a copied page, and the early window"
    );
    let bytes = world.states.page_bytes(0);
    assert_eq!(world.memory.bytes_alone(early), (1 + 3) * bytes, "what only the early one has");
    // The early one goes on as if nothing had been, the late one can't be entered there any more.
    world.append(1, &[3; 20]);
    world.fork_prefix(0, 7);
    world.fork_prefix(0, 199);
    world.balanced();
    world.reload(0, &mut Rng::new(1));
    world.append(world.truth.len() - 1, &[1; 5]);
    let mut bytes = Vec::new();
    let fork = world.memory.fork(seq);
    world.memory.export(fork, &mut bytes);
    let n_byte_page = 8 + world.states.page_bytes(0);
    assert!(bytes.len() < 104 * n_byte_page + 100, "an export holds the window: {} bytes", bytes.len());
}

#[test]
fn a_fork_at_a_page_boundary_copies_nothing() {
    let mut world = World::new(HashKind::Attention, 4, 100);
    world.create();
    world.append(0, &[0, 1, 2, 3]);
    world.fork(0);
    world.append(1, &[3]);
    world.append(0, &[2]);
    assert_eq!((world.states.n_page(), world.states.traffic().n_copy), (3, 0));
}

#[test]
fn a_look_at_the_past_takes_nothing() {
    let mut world = World::new(HashKind::Hybrid, 4, 100);
    let seq = world.create();
    world.append(0, &[0, 1, 2, 3, 0, 1, 2, 3]);
    let before = world.memory.usage();
    let past = world.memory.past(seq);
    // Not even a page for its own row.
    assert_eq!((past.n_past, past.rows, past.tables[0].pages.len(), past.slot), (8, 0..1, 2, None));
    assert_eq!(world.memory.usage(), before);
    let fork = world.fork(0);
    assert_eq!(world.memory.past(fork).tables, world.memory.past(seq).tables);
    assert!(world.memory.rests(fork), "nobody wakes for it");
    world.memory.check();
}

#[test]
fn a_truncated_prefix_may_be_shared() {
    let mut world = World::new(HashKind::Attention, 4, 100);
    world.create();
    world.append(0, &[0, 1, 2, 3, 0, 1]);
    let seq = world.fork(0);
    world.memory.truncate(seq, 3);
    world.truth[1].1.truncate(3);
    world.append(1, &[1, 1, 1, 1]);
    world.append(0, &[2, 2, 2]);
}

#[test]
fn storage_is_taken_when_used() {
    let mut world = World::new(HashKind::Hybrid, 64, 1 << 40);
    assert_eq!((world.states.n_page(), world.memory.usage().bytes), (0, 0), "a limit is no reservation");
    let seq = world.create();
    assert_eq!(world.states.n_page(), 0);
    world.append(0, &[1; 65]);
    assert_eq!(world.states.n_page(), 2);
    // Room made for a draft of which nothing is kept goes back.
    world.append(0, &[1; 63]);
    world.step(&[(0, vec![2; 9], 1, 1)]);
    assert_eq!(world.states.n_page(), 3);
    world.step(&[(0, vec![2; 8], 0, 0)]);
    assert_eq!((world.states.n_page(), world.memory.len(seq)), (3, 129));
}

#[test]
fn a_full_cache_says_what_is_missing() {
    let mut world = World::new(HashKind::Attention, 4, 16);
    let (a, b) = (world.create(), world.create());
    world.append(0, &[1; 9]);
    let error = world.memory.prepare(b, 5, 5).unwrap_err();
    assert_eq!((error.needed, error.free, error.total, error.page_len), (2, 1, 4, 4));
    assert_eq!(error.to_string(), "the KV cache is full: 2 more pages of 4 cells needed, 1 free of 4");
    assert_eq!(world.memory.n_cell_free(), 4);
    world.append(0, &[1; 7]);
    // A copy needs a page too: a full cache refuses to write into what is shared.
    world.memory.truncate(a, 15);
    world.truth[0].1.truncate(15);
    let c = world.fork(0);
    let error = world.memory.prepare(c, 1, 1).unwrap_err();
    assert_eq!((error.needed, error.free), (1, 0));
    world.free(0);
    world.memory.prepare(c, 1, 1).expect("alone now");
}

/// What misuse earns.
fn check_panic(misuse: impl Fn(&mut World, SeqId), message: &str) {
    let mut world = World::new(HashKind::Hybrid, 4, 100);
    let seq = world.create();
    let panic = catch_unwind(AssertUnwindSafe(|| misuse(&mut world, seq))).expect_err("a panic");
    let said =
        panic.downcast_ref::<String>().cloned().or(panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
    let said = said.unwrap_or_default();
    assert!(said.contains(message), "{said:?} does not say {message:?}");
}

/// The id of a sequence that is gone, its place taken by another.
fn check_stale(misuse: impl Fn(&mut World, SeqId)) {
    let stale = |world: &mut World, seq| {
        world.free(0);
        world.create();
        misuse(world, seq);
    };
    check_panic(stale, "does not exist");
}

#[test]
fn misuse_panics() {
    check_stale(|w, seq| _ = w.memory.len(seq));
    check_stale(|w, seq| w.memory.free(seq));
    check_stale(|w, seq| _ = w.memory.fork(seq));
    check_stale(|w, seq| _ = w.memory.prepare(seq, 1, 1));
    check_stale(|w, seq| w.memory.commit(seq, 1));
    check_panic(|w, seq| w.memory.commit(seq, 0), "no prepared rows");
    check_panic(|w, seq| _ = w.memory.lane(seq, 0), "no prepared rows");
    check_panic(|w, seq| _ = w.memory.extend(seq, 1), "no prepared rows");
    check_panic(
        |w, seq| {
            w.memory.prepare(seq, 1, 1).expect("room");
            w.memory.past(seq);
        },
        "inside a step",
    );
    check_panic(|w, seq| _ = w.memory.prepare(seq, 1, 2), "2 certain of 1 rows");
    check_panic(|w, seq| w.memory.truncate(seq, 0), "can't be truncated");
    check_panic(
        |w, seq| (0..2).for_each(|_| w.memory.prepare(seq, 1, 1).expect("room")),
        "already inside a step",
    );
    let prepared = |w: &mut World, seq| w.memory.prepare(seq, 3, 2).expect("room");
    check_panic(
        |w, seq| (prepared(w, seq), w.memory.commit(seq, 1)).1,
        "commit of 1 rows with 2 certain of 3",
    );
    check_panic(
        |w, seq| (prepared(w, seq), w.memory.commit(seq, 4)).1,
        "commit of 4 rows with 2 certain of 3",
    );
    check_panic(|w, seq| _ = (prepared(w, seq), w.memory.fork(seq)), "inside a step");
}

/// Rows of consecutive lanes: the ranges that follow each other from 0 with the given lengths.
fn row_ranges(lens: impl IntoIterator<Item = usize>) -> Vec<std::ops::Range<usize>> {
    let mut next = 0;
    lens.into_iter()
        .map(|len| {
            let rows = next..next + len;
            next = rows.end;
            rows
        })
        .collect()
}
