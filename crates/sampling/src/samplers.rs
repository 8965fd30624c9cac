//! The samplers, one file each, and the registry that names them.
//!
//! A sampler edits logits or removes candidates, as a function of the settings, the committed tokens and, for XTC,
//! of the position's own random stream. None keeps state between positions: that is what lets a draft be verified
//! without anything to roll back. To add one: write its file with a `KIND`, add its line to [`SAMPLERS`].

use crate::candidates::Candidates;
use crate::history::History;
use crate::params::{ParamError, SamplingParams};
use serde::{Serialize, Serializer};

pub(crate) mod dry;
mod min_p;
pub(crate) mod penalties;
mod temperature;
mod top_k;
mod top_n_sigma;
mod top_p;
mod typical;
mod xtc;

/// Every sampler, in llama-server's default order.
pub const SAMPLERS: &[SamplerKind] = &[
    penalties::KIND,
    dry::KIND,
    top_n_sigma::KIND,
    top_k::KIND,
    typical::KIND,
    top_p::KIND,
    min_p::KIND,
    xtc::KIND,
    temperature::KIND,
];

/// One sampler: its names, and what it does to the candidates.
pub struct SamplerKind {
    /// The name in requests and replies.
    pub name: &'static str,
    /// Other names that requests use. Hyphens and capitals need no alias.
    pub aliases: &'static [&'static str],
    /// Its letter where `samplers` is a string of letters.
    pub letter: char,
    /// Whether it never removes the likeliest candidate, nor makes another one likelier.
    pub(crate) keeps_argmax: bool,
    /// False when these settings make it do nothing.
    pub(crate) is_active: fn(&SamplingParams) -> bool,
    pub(crate) apply: fn(&mut Candidates, &mut Moment<'_>),
}

/// What a sampler may look at besides the candidates.
pub(crate) struct Moment<'a> {
    pub params: &'a SamplingParams,
    pub position: u64,
    pub history: &'a History,
    pub breakers: &'a dry::DryBreakers,
    pub dry: &'a mut dry::Scratch,
}

/// The sampler of this name: `top_k`, `top-k`, `typ_p`, `typical_p`, `temp`, `temperature`, …
pub fn by_name(name: &str) -> Result<&'static SamplerKind, ParamError> {
    let plain = name.to_ascii_lowercase().replace('-', "_");
    SAMPLERS.iter().find(|kind| kind.name == plain || kind.aliases.contains(&plain.as_str())).ok_or_else(
        || {
            let known: Vec<_> = SAMPLERS.iter().map(|kind| kind.name).collect();
            ParamError::UnknownSampler { found: name.to_owned(), known: known.join(", ") }
        },
    )
}

/// The chain that a string of letters stands for: `edskypmxt` is the default one.
pub fn by_letters(letters: &str) -> Result<Vec<&'static SamplerKind>, ParamError> {
    let one = |letter: char| {
        SAMPLERS.iter().find(|kind| kind.letter == letter).ok_or_else(|| {
            let known: Vec<_> =
                SAMPLERS.iter().map(|kind| format!("{} ({})", kind.letter, kind.name)).collect();
            ParamError::UnknownSampler { found: letter.to_string(), known: known.join(", ") }
        })
    };
    letters.chars().map(one).collect()
}

impl std::fmt::Debug for SamplerKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

impl PartialEq for SamplerKind {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for SamplerKind {}

impl Serialize for SamplerKind {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What one sampler leaves of a row: (token, logit), by token.
    pub(crate) fn apply(
        kind: &SamplerKind,
        params: &SamplingParams,
        position: u64,
        logits: &[f32],
    ) -> Vec<(u32, f32)> {
        apply_after(kind, params, position, &[], &dry::DryBreakers::default(), logits)
    }

    /// The same after committed tokens, from the dense and from the listed form: they must agree.
    pub(crate) fn apply_after(
        kind: &SamplerKind,
        params: &SamplingParams,
        position: u64,
        committed: &[u32],
        breakers: &dry::DryBreakers,
        logits: &[f32],
    ) -> Vec<(u32, f32)> {
        let mut history = History::new(params);
        committed.iter().for_each(|&t| history.accept(t));
        let [dense, listed] = [false, true].map(|listed| {
            let mut candidates = Candidates::default();
            candidates.load(logits);
            if listed {
                candidates.list();
            }
            let scratch = &mut dry::Scratch::default();
            let mut moment = Moment { params, position, history: &history, breakers, dry: scratch };
            if (kind.is_active)(params) {
                (kind.apply)(&mut candidates, &mut moment);
            }
            let mut left: Vec<_> = candidates.list().iter().map(|c| (c.token, c.logit)).collect();
            left.sort_unstable_by_key(|&(token, _)| token);
            left
        });
        assert_eq!(dense, listed, "{kind:?} depends on the form of its candidates");
        dense
    }

    /// Rows with some bans, from peaked to nearly flat.
    pub(crate) fn row() -> impl Strategy<Value = Vec<f32>> {
        let logit = prop_oneof![9 => -9.0f32..9.0, 1 => Just(f32::NEG_INFINITY)];
        (prop::collection::vec(logit, 1..200), prop_oneof![Just(1.0f32), 0.02f32..1.0])
            .prop_map(|(row, scale)| row.into_iter().map(|logit| logit * scale).collect::<Vec<f32>>())
            .prop_filter("something must be left", |row| row.iter().any(|l| *l > f32::NEG_INFINITY))
    }

    /// (token, probability) of the tokens that are not banned, likeliest first, ties to the lower token.
    pub(crate) fn sorted_probs(logits: &[f32]) -> Vec<(u32, f64)> {
        let sum: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
        let mut probs: Vec<(u32, f64)> =
            (0..).zip(logits.iter().map(|&l| f64::from(l).exp() / sum)).collect();
        probs.retain(|&(_, p)| p > 0.0);
        probs.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        probs
    }

    /// The tokens, by id.
    pub(crate) fn tokens(left: impl IntoIterator<Item = (u32, impl Sized)>) -> Vec<u32> {
        let mut tokens: Vec<u32> = left.into_iter().map(|(token, _)| token).collect();
        tokens.sort_unstable();
        tokens
    }

    fn check(name: &str, expected: Option<&str>) {
        assert_eq!(by_name(name).ok().map(|kind| kind.name), expected, "{name}");
    }

    #[test]
    fn names_aliases_and_letters_find_their_sampler() {
        for kind in SAMPLERS {
            check(kind.name, Some(kind.name));
            check(&kind.name.to_uppercase().replace('_', "-"), Some(kind.name));
            kind.aliases.iter().for_each(|alias| check(alias, Some(kind.name)));
            assert_eq!(by_letters(&kind.letter.to_string()).unwrap(), [kind]);
        }
        check("typical_p", Some("typ_p"));
        check("temp", Some("temperature"));
        check("nucleus", Some("top_p"));
        check("top-n-sigma", Some("top_n_sigma"));
        check("topk", None);
        check("", None);
        assert_eq!(by_letters("edskypmxt").unwrap(), SamplingParams::default().samplers);
        assert_eq!(by_letters("").unwrap(), Vec::<&SamplerKind>::new());
    }

    #[test]
    fn no_two_samplers_share_a_name_or_a_letter() {
        let mut names: Vec<_> = SAMPLERS.iter().flat_map(|k| [&[k.name], k.aliases].concat()).collect();
        let mut letters: Vec<_> = SAMPLERS.iter().map(|k| k.letter).collect();
        let n = (names.len(), letters.len());
        names.sort_unstable();
        names.dedup();
        letters.sort_unstable();
        letters.dedup();
        assert_eq!((names.len(), letters.len()), n);
    }

    #[test]
    fn an_unknown_name_is_answered_with_the_known_ones() {
        let message = by_name("topk").unwrap_err().to_string();
        assert!(
            message.starts_with("`samplers`: unknown sampler \"topk\", expected one of penalties, dry, ")
        );
        let message = by_letters("kz").unwrap_err().to_string();
        assert!(message.contains("unknown sampler \"z\"") && message.contains("k (top_k)"), "{message}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]

        #[test]
        fn whoever_claims_to_keep_the_argmax_does(row in row(), min_keep in 0u32..3, hot in 0.1f32..3.0) {
            let params = SamplingParams {
                top_k: 3, top_p: 0.3, min_p: 0.5, top_n_sigma: 0.5, min_keep, temperature: hot,
                ..SamplingParams::default()
            };
            for kind in SAMPLERS.iter().filter(|kind| kind.keeps_argmax) {
                let left = apply(kind, &params, 1, &row);
                let best = left.iter().max_by(|a, b| a.1.total_cmp(&b.1).then(b.0.cmp(&a.0))).map(|c| c.0);
                prop_assert_eq!(best, crate::candidates::argmax(&row).map(|(token, _)| token), "{:?}", kind);
            }
        }
    }
}
