//! Drafters that follow a script: right as often as told, or wrong in every way that a drafter can be.

use std::{
    collections::{HashMap, HashSet},
    fmt,
};

use paceline_memory::SeqId;
use paceline_spec::{Draft, DraftRequest, Drafter, Kept};

use crate::{HashModel, Rng, Token};

/// A script: the sequence's tokens, its anchor included, and what is asked.
type Script = Box<dyn FnMut(&[Token], &mut DraftRequest<'_>) -> Draft + Send>;

/// At which lengths a drafter can fork a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forks {
    /// At any.
    Anywhere,
    /// Only with all that was committed.
    Whole,
    /// At any as long as no more than so many were committed, as with a window; else with all.
    Within(usize),
    /// At none.
    Never,
}

/// A drafter whose drafts are what a closure says.
pub struct Scripted {
    name: &'static str,
    n_draft_max: usize,
    script: Script,
    forks: Forks,
    committed: HashMap<SeqId, Vec<Token>>,
    /// Sequences that were forked and not moved since.
    resting: HashSet<SeqId>,
}

impl Scripted {
    /// A drafter that asks `script`, which gets the sequence's tokens up to its anchor. At most `n_draft_max` tokens
    /// are claimed; the script may break that.
    pub fn new(
        name: &'static str,
        n_draft_max: usize,
        script: impl FnMut(&[Token], &mut DraftRequest<'_>) -> Draft + Send + 'static,
    ) -> Scripted {
        let (committed, resting) = (HashMap::new(), HashSet::new());
        Scripted { name, n_draft_max, script: Box::new(script), forks: Forks::Anywhere, committed, resting }
    }

    /// The same drafter, which can fork sequences at such lengths only.
    pub fn forking(mut self, forks: Forks) -> Scripted {
        self.forks = forks;
        self
    }

    /// What the script says to `tokens`, for scripts made of others.
    pub fn answer(&mut self, tokens: &[Token], request: &mut DraftRequest<'_>) -> Draft {
        (self.script)(tokens, request)
    }
}

impl fmt::Debug for Scripted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scripted").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Drafter for Scripted {
    fn name(&self) -> &'static str {
        self.name
    }

    fn contract(&self) -> String {
        format!("{}: a script", self.name)
    }

    fn n_draft_max(&self) -> usize {
        self.n_draft_max
    }

    fn draft(&mut self, requests: &mut [DraftRequest<'_>]) -> Vec<Draft> {
        let mut drafts = Vec::with_capacity(requests.len());
        for request in requests {
            let mut tokens = self.committed.get(&request.seq).cloned().unwrap_or_default();
            tokens.push(request.anchor);
            drafts.push((self.script)(&tokens, request));
        }
        drafts
    }

    fn commit(&mut self, kept: &[Kept<'_>]) {
        for kept in kept {
            self.committed.entry(kept.seq).or_default().extend(kept.tokens);
            self.resting.remove(&kept.seq);
        }
    }

    fn fork(&mut self, from: SeqId, to: SeqId, len: usize) -> bool {
        let Some(tokens) = self.committed.get(&from) else { return false };
        let can = match self.forks {
            Forks::Anywhere => len <= tokens.len(),
            Forks::Whole => len == tokens.len(),
            Forks::Within(n) => len == tokens.len() || (len < tokens.len() && tokens.len() <= n),
            Forks::Never => false,
        };
        if can {
            let tokens = tokens[..len].to_vec();
            self.committed.insert(to, tokens);
            self.resting.insert(to);
        }
        can
    }

    fn export(&self, seq: SeqId) -> Option<Vec<u8>> {
        Some(self.committed.get(&seq)?.iter().flat_map(|token| token.to_le_bytes()).collect())
    }

    fn forks_anywhere(&self, len: usize) -> bool {
        match self.forks {
            Forks::Anywhere => true,
            Forks::Within(n) => len <= n,
            Forks::Whole | Forks::Never => false,
        }
    }

    fn import(&mut self, seq: SeqId, len: usize, bytes: &[u8]) -> Result<(), String> {
        let (tokens, []) = bytes.as_chunks() else { return Err("half a token".to_string()) };
        if tokens.len() != len {
            return Err(format!("{} tokens of {len}", tokens.len()));
        }
        self.committed.insert(seq, tokens.iter().map(|&token| Token::from_le_bytes(token)).collect());
        self.resting.insert(seq);
        Ok(())
    }

    fn forget(&mut self, seq: SeqId) {
        self.committed.remove(&seq);
        self.resting.remove(&seq);
    }

    fn state_bytes(&self) -> usize {
        self.committed.values().map(|tokens| tokens.len() * size_of::<Token>()).sum()
    }

    fn resting_bytes(&self) -> usize {
        self.resting.iter().map(|seq| self.committed[seq].len() * size_of::<Token>()).sum()
    }
}

/// How many of an oracle's tokens are right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accept {
    /// This many at most; the next one is wrong.
    Exactly(usize),
    /// All.
    All,
    /// Another number each time.
    Varying,
}

/// A drafter that knows what `model` will choose, with the request's own sampler, and errs where told.
pub fn oracle(model: HashModel, n_draft_max: usize, accept: Accept, seed: u64) -> Scripted {
    let mut rng = Rng::new(seed);
    Scripted::new("oracle", n_draft_max, move |tokens, request| {
        let n_draft = match accept {
            Accept::Varying => rng.range(0..request.n_max + 1),
            _ => request.n_max,
        };
        let n_right = match accept {
            Accept::Exactly(n) => n.min(n_draft),
            Accept::All => n_draft,
            Accept::Varying => rng.range(0..n_draft + 1),
        };
        let mut draft = truth(&model, tokens, request, n_right);
        // A token too large by one is wrong, and so is whatever follows.
        if n_right < n_draft && draft.len() == n_right {
            draft.extend(truth(&model, tokens, request, n_right + 1).get(n_right));
            if let Some(last) = draft.get_mut(n_right) {
                *last = (*last + 1) % model.n_vocab as Token;
            }
            while draft.len() < n_draft {
                draft.push(rng.range(0..model.n_vocab) as Token);
            }
        }
        Draft { q: vec![0.5; draft.len()], tokens: draft, fault: None }
    })
}

/// The next `n` tokens; fewer where the model's logits become unusable.
fn truth(model: &HashModel, tokens: &[Token], request: &DraftRequest<'_>, n: usize) -> Vec<Token> {
    let mut sampler = request.sampler.clone();
    let mut reading = model.read(tokens);
    let mut out = Vec::with_capacity(n);
    while out.len() < n {
        let Ok(choice) = sampler.choose(reading.n_tokens() as u64, &reading.logits()) else { break };
        sampler.accept(choice.token);
        reading.push(choice.token);
        out.push(choice.token);
    }
    out
}

/// A way to lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lie {
    /// Any tokens.
    Random,
    /// The model's least likely token, over and over.
    Unlikely,
    /// An id that the vocabulary does not have.
    OutOfRange,
    /// More tokens than asked for, all right: believing them would pass a limit.
    TooMany,
    /// Nothing.
    Empty,
    /// The anchor repeated.
    Repeat,
    /// The truth with probabilities that are no numbers.
    BadQ,
    /// "My output is not finite."
    Fault,
    /// What comes out with the target's noise from logits that are slightly off.
    SharedNoise,
}

impl Lie {
    /// Every lie.
    pub const ALL: [Lie; 9] = [
        Lie::Random,
        Lie::Unlikely,
        Lie::OutOfRange,
        Lie::TooMany,
        Lie::Empty,
        Lie::Repeat,
        Lie::BadQ,
        Lie::Fault,
        Lie::SharedNoise,
    ];

    /// Lies that get the drafter dropped for the request.
    pub fn is_fatal(self) -> bool {
        matches!(self, Lie::OutOfRange | Lie::Fault)
    }
}

/// A drafter that tells one of `lies` each time.
pub fn liar(model: HashModel, n_draft_max: usize, lies: &'static [Lie], seed: u64) -> Scripted {
    let mut rng = Rng::new(seed);
    Scripted::new("liar", n_draft_max, move |tokens, request| {
        let (n, n_vocab) = (rng.range(1..request.n_max + 1), model.n_vocab);
        let lie = *rng.pick(lies);
        let mut fault = None;
        let drafted = match lie {
            Lie::Random => (0..n).map(|_| rng.range(0..n_vocab) as Token).collect(),
            Lie::Unlikely => {
                let logits = model.read(tokens).logits();
                let least = (0..n_vocab).min_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap_or(0);
                vec![least as Token; n]
            }
            Lie::OutOfRange => {
                let mut drafted = truth(&model, tokens, request, n - 1);
                drafted.push(*rng.pick(&[n_vocab as Token, Token::MAX, i32::MAX as Token]));
                drafted
            }
            Lie::TooMany => truth(&model, tokens, request, request.n_max + rng.range(1..20)),
            Lie::Empty => Vec::new(),
            Lie::Repeat => vec![request.anchor; n],
            Lie::BadQ => truth(&model, tokens, request, n),
            Lie::Fault => {
                fault = Some("a lie".to_owned());
                truth(&model, tokens, request, n)
            }
            Lie::SharedNoise => {
                let mut reading = model.read(tokens);
                let mut drafted = Vec::with_capacity(n);
                while drafted.len() < n {
                    let mut logits = reading.logits();
                    logits.iter_mut().for_each(|l| *l += rng.range(0..1000) as f32 / 500.0 - 1.0);
                    let Ok(p) = request.sampler.propose(reading.n_tokens() as u64, &logits) else { break };
                    reading.push(p.token);
                    drafted.push(p.token);
                }
                drafted
            }
        };
        let q = match lie {
            Lie::BadQ => vec![f32::NAN; drafted.len() / 2],
            _ => vec![1.0; drafted.len()],
        };
        Draft { tokens: drafted, q, fault }
    })
}
