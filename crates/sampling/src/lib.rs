//! Logits to token: the sampler chain, penalties, and counter-based Gumbel noise.
//!
//! The token at position `i` of a request with seed `s` is
//!
//! ```text
//! argmax_v ( log p_i(v) + G(s, i, v) )
//! ```
//!
//! where `p_i` is the distribution that the whole chain leaves (logit bias, then [`SamplingParams::samplers`]
//! in their order) and `G` is standard Gumbel noise that is a function of `(s, i, v)` and of nothing else
//! ([`noise`]). The maximum of log-probability plus Gumbel noise is a draw from `p_i` (the Gumbel-max trick), so
//! this is ordinary sampling; but because no generator advances, the choice depends only on the committed
//! tokens, the settings and the seed. It comes out the same with and without speculation, in whatever groups
//! the rows are verified, and asking twice gives the same answer. Temperature 0 is the case without noise.
//!
//! The drafter picks from its own distribution with the *same* noise ([`Sampler::propose`]). Common noise couples
//! the two choices: they agree with probability at least `(1-d)/(1+d)`, `d` the total variation distance of the
//! two distributions, where independent draws agree only with `Σ q·p` ("Coupling without Communication and
//! Drafter-Invariant Speculative Decoding", Daliri, Musco and Suresh, 2024).
//!
//! ```
//! use paceline_sampling::{DryBreakers, Sampler, SamplingParams};
//!
//! let params = SamplingParams { seed: 7, ..SamplingParams::default() };
//! let mut sampler = Sampler::new(params, 4, DryBreakers::default().into())?;
//! sampler.accept_prompt(&[2, 0]);
//! let logits = [0.1, 2.0, -1.0, 1.9];
//! let choice = sampler.choose(2, &logits)?;
//! assert_eq!(choice.token, sampler.choose(2, &logits)?.token); // nothing has advanced
//! sampler.accept(choice.token);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Where to read on: [`SamplingParams`] is what a request says, [`samplers`] the chain, `candidates` the set
//! that the chain narrows, `sampler` the driver.

#![forbid(unsafe_code)]

mod candidates;
mod history;
mod log_sum_exp;
mod logprobs;
pub mod noise;
mod params;
mod sampler;
pub mod samplers;

pub use logprobs::TokenLogprobs;
pub use params::{ParamError, SamplingParams};
pub use sampler::{Choice, Known, Proposal, SampleError, Sampler};
pub use samplers::dry::DryBreakers;
pub use samplers::{SAMPLERS, SamplerKind};
