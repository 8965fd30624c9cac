//! The driver: settings, committed history and buffers of one sequence; logits in, token out.
//!
//! A choice is a function of (settings, committed tokens, position, logits). Only [`Sampler::accept`] and
//! [`Sampler::accept_prompt`] change what later choices see, so verifying a draft is: choose at its first
//! position, accept that token whatever it is, and go on exactly while the draft agrees.

use crate::candidates::{Candidate, Candidates, argmax};
use crate::history::History;
use crate::log_sum_exp::log_sum_exp;
use crate::logprobs::TokenLogprobs;
use crate::noise::{PositionNoise, gumbel_bound, gumbel_of};
use crate::params::{ParamError, SamplingParams};
use crate::samplers::dry::{self, DryBreakers};
use crate::samplers::{Moment, SamplerKind};
use std::sync::Arc;

/// The target's token at one position.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// The token.
    pub token: u32,
    /// Present when the settings ask for it (`n_probs` above 0).
    pub logprobs: Option<TokenLogprobs>,
}

/// The drafter's token at one position.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Proposal {
    /// The token.
    pub token: u32,
    /// Its probability in the distribution that it was drawn from; when greedy, in the softmax of the logits.
    pub q: f32,
}

/// Why there is no token. It concerns this row alone: the sampler is as it was.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SampleError {
    /// The model computed something that is not a logit.
    #[error("position {position}: expected finite logits, found {value} for token {token}")]
    NonFinite {
        /// Index of the token to be chosen in its sequence.
        position: u64,
        /// The first token concerned.
        token: u32,
        /// NaN or +inf; -inf is an ordinary ban.
        value: f32,
    },
    /// Every token is banned.
    #[error(
        "position {position}: no token is left to choose from, all are banned by the logits or `logit_bias`"
    )]
    NothingLeft {
        /// Index of the token to be chosen in its sequence.
        position: u64,
    },
    /// The row is not one of this vocabulary.
    #[error("position {position}: expected a row of {expected} logits, found {found}")]
    WrongWidth {
        /// Index of the token to be chosen in its sequence.
        position: u64,
        /// The vocabulary's size.
        expected: usize,
        /// The row's length.
        found: usize,
    },
}

/// Chooses the tokens of one sequence.
#[derive(Debug, Clone)]
pub struct Sampler {
    params: SamplingParams,
    n_vocab: usize,
    /// The samplers that do something under these settings, in order.
    chain: Vec<&'static SamplerKind>,
    history: History,
    breakers: Arc<DryBreakers>,
    candidates: Candidates,
    dry: dry::Scratch,
    top: Vec<Candidate>,
}

impl Sampler {
    /// A sampler without history. `breakers` are the tokens of `dry_sequence_breakers` in this vocabulary
    /// ([`DryBreakers::from_vocab`]); where DRY is off, the default does.
    pub fn new(
        params: SamplingParams,
        n_vocab: usize,
        breakers: Arc<DryBreakers>,
    ) -> Result<Self, ParamError> {
        params.validate(n_vocab)?;
        let mut chain = params.samplers.clone();
        chain.retain(|kind| (kind.is_active)(&params));
        // Greedy asks for nothing but the likeliest: what can't change which that is need not run at the end.
        while params.is_greedy() && chain.last().is_some_and(|kind| kind.keeps_argmax) {
            chain.pop();
        }
        Ok(Self {
            history: History::new(&params),
            chain,
            params,
            n_vocab,
            breakers,
            candidates: Candidates::default(),
            dry: dry::Scratch::default(),
            top: Vec::new(),
        })
    }

    /// The settings.
    pub fn params(&self) -> &SamplingParams {
        &self.params
    }

    /// Whether every choice is the largest logit of its row and nothing more is asked: then an argmax computed
    /// where the logits are (on a device, say) serves instead of the row.
    pub fn is_plain_argmax(&self) -> bool {
        self.takes_raw_argmax() && self.params.n_probs == 0
    }

    /// Takes a committed token into the history of penalties and DRY.
    pub fn accept(&mut self, token: u32) {
        self.history.accept(token);
    }

    /// Takes the prompt, which penalties and DRY see like generated text.
    pub fn accept_prompt(&mut self, tokens: &[u32]) {
        tokens.iter().for_each(|&token| self.history.accept(token));
    }

    /// Forgets every accepted token.
    pub fn reset_history(&mut self) {
        self.history = History::new(&self.params);
    }

    /// The token at `position` (its index in the sequence, prompt included), from the target's logits
    /// `[n_vocab]` there. -inf is a ban.
    pub fn choose(&mut self, position: u64, logits: &[f32]) -> Result<Choice, SampleError> {
        self.choose_known(position, logits, None)
    }

    /// The same from a row of which something is known already, which spares going over it where that is enough.
    pub fn choose_known(
        &mut self,
        position: u64,
        logits: &[f32],
        known: Option<Known>,
    ) -> Result<Choice, SampleError> {
        let chosen = self.draw(position, logits, known)?;
        let logprobs = (self.params.n_probs > 0).then(|| {
            let n_probs = self.params.n_probs as usize;
            if !self.params.post_sampling_probs {
                TokenLogprobs::of_logits(chosen.token, logits, n_probs, &mut self.top)
            } else if self.params.is_greedy() {
                TokenLogprobs::certain(chosen.token)
            } else {
                let list = self.candidates.softmax();
                let chosen = list.iter().find(|c| c.token == chosen.token).expect("the chosen one is listed");
                TokenLogprobs::of_candidates(&chosen.clone(), list, n_probs)
            }
        });
        Ok(Choice { token: chosen.token, logprobs })
    }

    /// A token that something other than sampling decided (a forced end of thinking, an only legal token), with
    /// the probabilities that the settings ask for: the model's, or 1 where those after sampling are wanted.
    pub fn forced(&mut self, position: u64, token: u32, logits: &[f32]) -> Result<Choice, SampleError> {
        self.check(position, logits)?;
        assert!(
            (token as usize) < self.n_vocab,
            "forced token {token} outside a vocabulary of {}",
            self.n_vocab
        );
        let logprobs = (self.params.n_probs > 0).then(|| {
            if self.params.post_sampling_probs {
                TokenLogprobs::certain(token)
            } else {
                TokenLogprobs::of_logits(token, logits, self.params.n_probs as usize, &mut self.top)
            }
        });
        Ok(Choice { token, logprobs })
    }

    /// The drafter's guess at `position` from its own logits `[n_vocab]`: the same chain over the same committed
    /// history and, above all, the same noise as [`Self::choose`] will use there. The nearer the two rows, the
    /// likelier the two tokens agree; equal rows give equal tokens.
    pub fn propose(&mut self, position: u64, logits: &[f32]) -> Result<Proposal, SampleError> {
        self.propose_known(position, logits, None)
    }

    /// The same from a row of which something is known already.
    pub fn propose_known(
        &mut self,
        position: u64,
        logits: &[f32],
        known: Option<Known>,
    ) -> Result<Proposal, SampleError> {
        let drawn = self.draw(position, logits, known)?;
        let q = if self.params.is_greedy() {
            // The chain would leave 1; the softmax says how sure the drafter is, which is what planning needs.
            let log_sum = known.map_or_else(
                || log_sum_exp(logits, argmax(logits).map_or(0.0, |(_, logit)| logit)),
                |known| known.log_sum,
            );
            (f64::from(logits[drawn.token as usize]) - log_sum).exp() as f32
        } else {
            let list = self.candidates.softmax();
            list.iter().find(|c| c.token == drawn.token).expect("the drawn one is listed").p
        };
        Ok(Proposal { token: drawn.token, q })
    }

    /// The row is this vocabulary's and holds numbers or bans.
    fn check(&self, position: u64, logits: &[f32]) -> Result<(), SampleError> {
        if logits.len() != self.n_vocab {
            return Err(SampleError::WrongWidth { position, expected: self.n_vocab, found: logits.len() });
        }
        // No early exit: without one the loop is vectorised, and a bad row is rare.
        let is_bad = |logit: f32| logit.is_nan() | (logit == f32::INFINITY);
        if logits.iter().fold(false, |bad, &logit| bad | is_bad(logit)) {
            let token = logits.iter().position(|&logit| is_bad(logit)).expect("one was seen");
            return Err(SampleError::NonFinite { position, token: token as u32, value: logits[token] });
        }
        Ok(())
    }

    fn takes_raw_argmax(&self) -> bool {
        self.params.is_greedy() && self.chain.is_empty() && self.params.logit_bias.is_empty()
    }

    /// Runs the chain and draws; except for the raw argmax, `self.candidates` then holds what the chain left.
    fn draw(
        &mut self,
        position: u64,
        logits: &[f32],
        known: Option<Known>,
    ) -> Result<Candidate, SampleError> {
        let nothing_left = SampleError::NothingLeft { position };
        let only = |(token, logit)| Candidate { token, logit, p: 1.0, key: 0.0 };
        match known {
            Some(known) if self.takes_raw_argmax() && logits.len() == self.n_vocab => {
                return Ok(only((known.token, logits[known.token as usize])));
            }
            _ => self.check(position, logits)?,
        }
        if self.takes_raw_argmax() {
            return argmax(logits).map(only).ok_or(nothing_left);
        }
        let Self { params, chain, history, breakers, candidates, dry, .. } = self;
        candidates.load(logits);
        params.logit_bias.iter().for_each(|&(token, bias)| candidates.bias(token, bias));
        let mut moment = Moment { params, position, history, breakers, dry };
        for kind in chain {
            (kind.apply)(candidates, &mut moment);
        }
        if params.is_greedy() {
            return candidates.argmax().map(only).ok_or(nothing_left);
        }
        pick(candidates.list(), PositionNoise::new(params.seed, position)).ok_or(nothing_left)
    }
}

/// What is known of a row of logits, none of which is NaN or infinity, by whoever computed them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Known {
    /// The greatest logit's token, the lowest of several.
    pub token: u32,
    /// `ln Σ exp(logit)`.
    pub log_sum: f64,
}

/// `argmax (logit + G(token))`, ties to the lowest token. The normalisation of log-probabilities cancels.
fn pick(list: &[Candidate], noise: PositionNoise) -> Option<Candidate> {
    let mut best: Option<(f64, &Candidate)> = None;
    for c in list.iter().filter(|c| c.logit > f32::NEG_INFINITY) {
        let bits = noise.bits(u64::from(c.token));
        // Two logarithms per token are what noise costs; most can't win and need none.
        if best.is_some_and(|(value, _)| f64::from(c.logit) + gumbel_bound(bits) < value) {
            continue;
        }
        let value = f64::from(c.logit) + f64::from(gumbel_of(bits));
        if best.is_none_or(|(most, b)| value > most || value == most && c.token < b.token) {
            best = Some((value, c));
        }
    }
    best.map(|(_, c)| *c)
}
