//! A drafter around another one that lets no breach of the contract pass.
//!
//! Per sequence: committed rows follow each other without gap or overlap from position 0 on; each row's taps are
//! those that the reference gives for the tokens so far; a draft is asked for at most once between commits, at the
//! position that the committed rows end at; the commit after it begins with the anchor and goes on with a prefix of
//! the draft; a fork begins with rows that the other one has and then lives on its own; after `forget` nothing is heard
//! of the sequence again.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use paceline_backend::Tap;
use paceline_memory::SeqId;
use paceline_spec::{Draft, DraftRequest, Drafter, Kept};

use crate::{HashModel, Reading, Token};

/// What a [`Recorder`] saw. Panics under the lock are the findings themselves, so poisoning is ignored.
#[derive(Clone, Debug, Default)]
pub struct Log(Arc<Mutex<Entries>>);

#[derive(Debug, Default)]
struct Entries {
    live: HashMap<SeqId, Seen>,
    gone: HashSet<SeqId>,
    n_draft: usize,
    n_commit: usize,
    n_row: usize,
    n_fork: usize,
}

#[derive(Debug)]
struct Seen {
    reading: Reading,
    tokens: Vec<Token>,
    /// Anchor and draft since the last commit.
    drafted: Option<(Token, Vec<Token>)>,
}

impl Log {
    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sequences that had rows committed and were not forgotten.
    pub fn n_live(&self) -> usize {
        self.entries().live.len()
    }

    /// Drafts asked for.
    pub fn n_draft(&self) -> usize {
        self.entries().n_draft
    }

    /// Rows committed.
    pub fn n_row(&self) -> usize {
        self.entries().n_row
    }

    /// Sequences forked.
    pub fn n_fork(&self) -> usize {
        self.entries().n_fork
    }

    /// Calls of `commit`.
    pub fn n_commit(&self) -> usize {
        self.entries().n_commit
    }
}

/// Checks every call before passing it on.
pub struct Recorder<D> {
    model: HashModel,
    inner: D,
    log: Log,
}

impl<D: Drafter> Recorder<D> {
    /// Watches `inner` draft for `model`.
    pub fn new(model: HashModel, inner: D) -> (Recorder<D>, Log) {
        let log = Log::default();
        (Recorder { model, inner, log: log.clone() }, log)
    }
}

impl<D: Drafter> Drafter for Recorder<D> {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn contract(&self) -> String {
        self.inner.contract()
    }

    fn taps(&self) -> &[Tap] {
        self.inner.taps()
    }

    fn n_draft_max(&self) -> usize {
        self.inner.n_draft_max()
    }

    fn draft(&mut self, requests: &mut [DraftRequest<'_>]) -> Vec<Draft> {
        assert!(!requests.is_empty(), "a draft for nobody");
        let asked: Vec<_> = requests.iter().map(|r| (r.seq, r.anchor, r.n_max)).collect();
        let mut log = self.log.entries();
        let mut seqs = HashSet::new();
        for r in requests.iter() {
            assert!(seqs.insert(r.seq), "{:?} is asked twice in one call", r.seq);
            assert!(!log.gone.contains(&r.seq), "a draft for {:?}, which was forgotten", r.seq);
            assert!((1..=self.inner.n_draft_max()).contains(&r.n_max), "{} tokens asked", r.n_max);
            let Some(seen) = log.live.get(&r.seq) else {
                panic!("a draft for {:?}, of which no row was seen", r.seq)
            };
            assert_eq!(r.position, seen.reading.n_tokens(), "position of the anchor of {:?}", r.seq);
            assert!(seen.drafted.is_none(), "{:?} drafts twice without a commit", r.seq);
        }
        log.n_draft += requests.len();
        let drafts = self.inner.draft(requests);
        for ((seq, anchor, n_max), draft) in asked.into_iter().zip(&drafts) {
            let tokens = draft.tokens.iter().copied().take(n_max).collect();
            if let Some(seen) = log.live.get_mut(&seq) {
                seen.drafted = Some((anchor, tokens));
            }
        }
        drafts
    }

    fn commit(&mut self, kept: &[Kept<'_>]) {
        let mut log = self.log.entries();
        log.n_commit += 1;
        let mut seqs = HashSet::new();
        for k in kept {
            assert!(seqs.insert(k.seq), "{:?} commits twice in one call", k.seq);
            assert!(!log.gone.contains(&k.seq), "rows of {:?}, which was forgotten", k.seq);
            assert!(!k.tokens.is_empty(), "a commit without rows");
            let width = self.model.n_tap;
            assert_eq!(k.taps.len(), k.tokens.len() * width, "taps of {} rows", k.tokens.len());
            log.n_row += k.tokens.len();
            let fresh = || Seen { reading: self.model.reading(), tokens: Vec::new(), drafted: None };
            let seen = log.live.entry(k.seq).or_insert_with(fresh);
            assert_eq!(k.first_position, seen.reading.n_tokens(), "first row of {:?}", k.seq);
            if let Some((anchor, draft)) = seen.drafted.take() {
                assert_eq!(k.tokens[0], anchor, "the row after a draft is its anchor's");
                let accepted = &k.tokens[1..];
                // One that had nothing to say may see what another one drafted.
                assert!(
                    draft.is_empty() || draft.starts_with(accepted),
                    "{accepted:?} was never drafted, {draft:?} was"
                );
            }
            for (i, &token) in k.tokens.iter().enumerate() {
                seen.reading.push(token);
                seen.tokens.push(token);
                let position = k.first_position + i;
                let taps = &k.taps[i * width..(i + 1) * width];
                assert!(
                    taps == seen.reading.taps(),
                    "{:?}: taps at position {position} are another row's",
                    k.seq
                );
            }
        }
        drop(log);
        self.inner.commit(kept);
    }

    fn fork(&mut self, from: SeqId, to: SeqId, len: usize) -> bool {
        let mut log = self.log.entries();
        assert!(
            !log.gone.contains(&from) && !log.gone.contains(&to),
            "a fork of {from:?}, {to:?}: forgotten"
        );
        assert!(!log.live.contains_key(&to), "{to:?} has rows of its own");
        let Some(seen) = log.live.get(&from) else { panic!("a fork of {from:?}, of which no row was seen") };
        let Some(tokens) = seen.tokens.get(..len).map(<[Token]>::to_vec) else {
            panic!("a fork of {len} rows of {from:?}, which has {}", seen.tokens.len())
        };
        if !self.inner.fork(from, to, len) {
            return false;
        }
        log.n_fork += 1;
        log.live.insert(to, Seen { reading: self.model.read(&tokens), tokens, drafted: None });
        true
    }

    fn export(&self, seq: SeqId) -> Option<Vec<u8>> {
        let log = self.log.entries();
        let tokens = &log.live.get(&seq)?.tokens;
        // Its own part first, so that what comes back can be watched too.
        let mut out = (tokens.len() as u64).to_le_bytes().to_vec();
        tokens.iter().for_each(|token| out.extend(token.to_le_bytes()));
        out.extend(self.inner.export(seq)?);
        Some(out)
    }

    fn forks_anywhere(&self, len: usize) -> bool {
        self.inner.forks_anywhere(len)
    }

    fn import(&mut self, seq: SeqId, len: usize, bytes: &[u8]) -> Result<(), String> {
        let (&n, rest) = bytes.split_first_chunk().ok_or("no length")?;
        let n = u64::from_le_bytes(n) as usize * size_of::<Token>();
        let (tokens, inner) = rest.split_at_checked(n).ok_or("too short")?;
        self.inner.import(seq, len, inner)?;
        let tokens: Vec<Token> =
            tokens.as_chunks().0.iter().map(|&token| Token::from_le_bytes(token)).collect();
        let mut log = self.log.entries();
        assert!(!log.gone.contains(&seq), "{seq:?} was forgotten");
        let old = log.live.insert(seq, Seen { reading: self.model.read(&tokens), tokens, drafted: None });
        assert!(old.is_none(), "{seq:?} has rows of its own");
        Ok(())
    }

    fn forget(&mut self, seq: SeqId) {
        let mut log = self.log.entries();
        log.live.remove(&seq);
        log.gone.insert(seq);
        drop(log);
        self.inner.forget(seq);
    }

    fn state_bytes(&self) -> usize {
        self.inner.state_bytes()
    }

    fn resting_bytes(&self) -> usize {
        self.inner.resting_bytes()
    }
}
