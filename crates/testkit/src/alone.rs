//! What a request must answer: computed from its tokens alone, one at a time, without engine, memory or drafter.

use paceline_engine::{Finish, Request};
use paceline_sampling::{DryBreakers, Sampler, TokenLogprobs};
use paceline_text::Vocab;

use crate::{HashModel, Token};

/// How an answer ended.
#[derive(Clone, Debug, PartialEq)]
pub enum End {
    /// As it should.
    Finish(Finish),
    /// The row at this position had logits that can't be sampled.
    BadLogits(usize),
}

/// A complete answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// Generated tokens, the one that ended it included.
    pub tokens: Vec<Token>,
    /// Their log probabilities, where asked for.
    pub logprobs: Vec<Option<TokenLogprobs>>,
    /// The text.
    pub text: String,
    /// Why it ended.
    pub end: End,
}

/// The answer that `request` gets from `model` with nobody else around, in a context of `n_ctx` tokens.
///
/// Text is decoded anew from all bytes after every token, and stop strings are searched in all of it, so nothing is
/// shared with the streaming forms of either.
pub fn alone(model: &HashModel, vocab: &Vocab, request: &Request, n_ctx: usize) -> Answer {
    let mut params = request.sampling.clone();
    if request.ignore_eos {
        params.logit_bias.extend(vocab.end_of_generation().iter().map(|&t| (t, f32::NEG_INFINITY)));
    }
    params.logit_bias.extend(vocab.suppressed().iter().map(|&t| (t, f32::NEG_INFINITY)));
    let mut sampler =
        Sampler::new(params, model.n_vocab, DryBreakers::default().into()).expect("valid settings");
    sampler.accept_prompt(&request.prompt);

    let mut reading = model.read(&request.prompt);
    let (mut tokens, mut logprobs, mut bytes) = (Vec::new(), Vec::new(), Vec::new());
    let (text, end) = loop {
        let n = reading.n_tokens();
        let Ok(choice) = sampler.choose(n as u64, &reading.logits()) else {
            break (decode(&bytes, false), End::BadLogits(n - 1));
        };
        sampler.accept(choice.token);
        reading.push(choice.token);
        tokens.push(choice.token);
        logprobs.push(choice.logprobs);
        if !request.ignore_eos && vocab.is_eog(choice.token) {
            break (decode(&bytes, true), End::Finish(Finish::Eog(choice.token)));
        }
        bytes.extend_from_slice(vocab.bytes(choice.token, request.show_special));
        let text = decode(&bytes, false);
        if let Some((start, word)) = first_stop(&text, &request.stop) {
            break (text[..start].to_owned(), End::Finish(Finish::Stop(word.to_owned())));
        }
        if request.n_predict.is_some_and(|n| tokens.len() >= n) {
            break (decode(&bytes, true), End::Finish(Finish::Limit));
        }
        if n + 1 >= n_ctx {
            break (decode(&bytes, true), End::Finish(Finish::Context));
        }
    };
    Answer { tokens, logprobs, text, end }
}

/// All text in `bytes`; without what may become a character yet, unless that is all there will be.
fn decode(bytes: &[u8], complete: bool) -> String {
    let n_open = match bytes.utf8_chunks().last() {
        Some(chunk) if !complete && is_open(chunk.invalid()) => chunk.invalid().len(),
        _ => 0,
    };
    String::from_utf8_lossy(&bytes[..bytes.len() - n_open]).into_owned()
}

/// True for the beginning of a character.
fn is_open(bytes: &[u8]) -> bool {
    matches!(std::str::from_utf8(bytes), Err(error) if error.error_len().is_none())
}

/// The stop string that is complete first, the longest of those.
fn first_stop<'a>(text: &str, stops: &'a [String]) -> Option<(usize, &'a str)> {
    let found = stops
        .iter()
        .filter(|s| !s.is_empty())
        .filter_map(|s| text.find(s.as_str()).map(|at| (at + s.len(), at, s)));
    found.min().map(|(_, at, s)| (at, s.as_str()))
}
