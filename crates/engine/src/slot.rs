//! A slot and the request that it serves.

use std::sync::Arc;

use paceline_memory::SeqId;
use paceline_sampling::{Sampler, TokenLogprobs};
use paceline_text::{StopMatcher, StreamDecoder, Vocab};

use crate::{
    Finish, Request, RequestId, SpeculationNote, Stats, Token, TokenOut,
    choose::{Chooser, Outcome},
};

/// What a slot is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Nothing.
    Idle,
    /// Computing a prompt.
    Prefill,
    /// Generating.
    Decode,
}

/// A slot as its users see it.
#[derive(Clone, Debug)]
pub struct SlotStatus {
    /// Index.
    pub id: usize,
    /// What it is doing.
    pub phase: Phase,
    /// The request served.
    pub request: Option<RequestId>,
    /// Prompt tokens of the request.
    pub n_prompt: usize,
    /// Prompt tokens computed.
    pub n_prompt_computed: usize,
    /// Tokens generated.
    pub n_predicted: usize,
    /// Tokens still allowed, if there is a limit.
    pub n_remaining: Option<usize>,
    /// Drafted and accepted tokens.
    pub n_draft: (usize, usize),
}

/// A request in its slot. Owns everything that the sequence has outside the two memories.
pub(crate) struct Active {
    pub request: RequestId,
    /// Gone while it waits.
    pub seq: SeqId,
    /// Its number in the order of starts.
    pub born: u64,
    /// The slot that it asked for.
    pub wanted: Option<usize>,
    /// Begins with cached prefixes and leaves some.
    pub caches: bool,
    /// Numbers of tokens behind which a snapshot is due, the next one last.
    pub cuts: Vec<usize>,
    /// The most computed prompt tokens that were told.
    pub n_told: usize,
    /// Prompt and answer; the last one is the anchor while decoding.
    pub tokens: Vec<Token>,
    /// Tokens whose rows are committed.
    pub n_computed: usize,
    pub sampler: Sampler,
    /// Most tokens drafted per step.
    pub n_draft_max: usize,
    pub stats: Stats,
    /// Who drafts.
    pub chooser: Chooser,
    /// The drafter whose draft is out, until it is verified.
    pub drafted_by: Option<usize>,
    /// What the last verified draft came to, until it is settled.
    pub outcome: Option<Outcome>,
    n_predict: Option<usize>,
    n_ctx: usize,
    ignore_eos: bool,
    decoder: StreamDecoder,
    stop: StopMatcher,
    vocab: Arc<Vocab>,
}

/// Drafted tokens without one accepted after which a drafter is reported as useless.
const USELESS_AFTER: usize = 64;

impl Active {
    pub fn new(
        request: Request,
        seq: SeqId,
        sampler: Sampler,
        chooser: Chooser,
        n_draft_max: usize,
        n_ctx: usize,
        vocab: Arc<Vocab>,
    ) -> Self {
        Active {
            request: request.id,
            seq,
            born: 0,
            wanted: request.slot,
            caches: request.cache_prompt,
            cuts: Vec::new(),
            n_told: 0,
            n_computed: 0,
            sampler,
            n_draft_max,
            chooser,
            drafted_by: None,
            outcome: None,
            stats: Stats { n_prompt: request.prompt.len(), ..Stats::default() },
            n_predict: request.n_predict,
            n_ctx,
            ignore_eos: request.ignore_eos,
            decoder: StreamDecoder::new(vocab.clone(), request.show_special),
            stop: StopMatcher::new(request.stop),
            vocab,
            tokens: request.prompt,
        }
    }

    /// Tokens known and not computed.
    pub fn n_gap(&self) -> usize {
        self.tokens.len() - self.n_computed
    }

    /// Known tokens that may be computed in one go.
    pub fn n_known_max(&self) -> usize {
        self.cuts.last().map_or(usize::MAX, |cut| cut - self.n_computed).min(self.n_gap())
    }

    /// Takes a snapshot behind `n` tokens too, which are not computed yet.
    pub fn add_cut(&mut self, n: usize) {
        assert!(n > self.n_computed, "a cut at {n} of {} computed tokens", self.n_computed);
        if let Err(at) = self.cuts.binary_search_by(|cut| n.cmp(cut)) {
            self.cuts.insert(at, n);
        }
    }

    /// Forgets the cuts that were reached, and says whether one was.
    pub fn reach_cuts(&mut self) -> bool {
        let n = self.cuts.len();
        self.cuts.truncate(self.cuts.iter().take_while(|&&cut| cut > self.n_computed).count());
        self.cuts.len() < n
    }

    /// True once the prompt is computed, so that the gap is the anchor alone.
    pub fn is_decoding(&self) -> bool {
        self.stats.n_predicted > 0
    }

    /// Tokens that may still be generated.
    fn n_remaining(&self) -> usize {
        let by_context = self.n_ctx - self.tokens.len();
        let by_request = self.n_predict.map_or(usize::MAX, |n| n - self.stats.n_predicted);
        by_context.min(by_request)
    }

    /// How many tokens a draft may have: one of the tokens that a verify gains is the bonus token.
    pub fn n_draft_room(&self) -> usize {
        if !self.is_decoding() || self.n_gap() != 1 {
            return 0;
        }
        self.n_draft_max.min(self.n_remaining().saturating_sub(1))
    }

    /// Takes the tokens that a verify chose, up to the one that ends the answer. Returns the text that became
    /// certain, the tokens taken, and why the answer ended, if it did.
    pub fn take(
        &mut self,
        chosen: Vec<(Token, Option<TokenLogprobs>)>,
        n_accepted: usize,
    ) -> (String, Vec<TokenOut>, Option<Finish>) {
        let mut text = String::new();
        let mut out = Vec::with_capacity(chosen.len());
        for (i, (id, logprobs)) in chosen.into_iter().enumerate() {
            self.tokens.push(id);
            self.stats.n_predicted += 1;
            out.push(TokenOut { id, logprobs, drafted: i < n_accepted });
            if !self.ignore_eos && self.vocab.is_eog(id) {
                return (text, out, Some(Finish::Eog(id)));
            }
            let piece = self.decoder.push(id);
            let stopped = self.stop.push(&piece);
            text.push_str(&stopped.text);
            if let Some(i) = stopped.stopped {
                let word = self.stop.stop_string(i).to_owned();
                return (text, out, Some(Finish::Stop(word)));
            }
            if self.n_predict.is_some_and(|n| self.stats.n_predicted >= n) {
                return (text, out, Some(Finish::Limit));
            }
            if self.tokens.len() >= self.n_ctx {
                return (text, out, Some(Finish::Context));
            }
        }
        (text, out, None)
    }

    /// The text still held back when the answer ends.
    pub fn finish_text(&mut self, finish: &Finish) -> String {
        if matches!(finish, Finish::Stop(_)) {
            return String::new();
        }
        let tail = self.decoder.finish();
        let stopped = self.stop.push(&tail);
        stopped.text + &self.stop.finish()
    }

    /// Counts a verified draft and says so if the drafter has become a nuisance.
    pub fn count_draft(&mut self, n_draft: usize, n_accepted: usize) {
        self.stats.n_verify += 1;
        self.stats.n_draft += n_draft;
        self.stats.n_accepted += n_accepted;
        if self.stats.by_position.len() < n_draft {
            self.stats.by_position.resize(n_draft, (0, 0));
        }
        for (i, (drafted, accepted)) in self.stats.by_position.iter_mut().enumerate().take(n_draft) {
            *drafted += 1;
            *accepted += usize::from(i < n_accepted);
        }
        if self.stats.speculation == SpeculationNote::Active
            && self.stats.n_accepted == 0
            && self.stats.n_draft >= USELESS_AFTER
        {
            self.stats.speculation = SpeculationNote::Useless;
        } else if self.stats.speculation == SpeculationNote::Useless && self.stats.n_accepted > 0 {
            self.stats.speculation = SpeculationNote::Active;
        }
    }

    pub fn status(&self, id: usize) -> SlotStatus {
        SlotStatus {
            id,
            phase: if self.is_decoding() { Phase::Decode } else { Phase::Prefill },
            request: Some(self.request),
            n_prompt: self.stats.n_prompt,
            n_prompt_computed: self.n_computed.min(self.stats.n_prompt),
            n_predicted: self.stats.n_predicted,
            n_remaining: self.n_predict.map(|n| n - self.stats.n_predicted),
            n_draft: (self.stats.n_draft, self.stats.n_accepted),
        }
    }
}
