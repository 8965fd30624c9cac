//! Top-k: keeps the `k` likeliest (Fan et al., 2018).
//!
//! Ties at the edge go to the lower token ids. `min_keep` plays no part here, as in llama-server.

use super::SamplerKind;

pub(crate) const KIND: SamplerKind = SamplerKind {
    name: "top_k",
    aliases: &[],
    letter: 'k',
    keeps_argmax: true,
    is_active: |params| params.top_k > 0,
    apply: |candidates, moment| candidates.keep_top(moment.params.top_k as usize),
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::SamplingParams;
    use crate::samplers::tests::{apply, row, sorted_probs, tokens};
    use proptest::prelude::*;

    fn check(top_k: i32, logits: &[f32], expected: &[u32]) {
        let params = SamplingParams { top_k, ..SamplingParams::default() };
        assert_eq!(tokens(apply(&KIND, &params, 0, logits)), expected, "{top_k} {logits:?}");
    }

    #[test]
    fn examples() {
        check(1, &[1.0, 3.0, 3.0, 2.0], &[1]);
        check(2, &[1.0, 3.0, 3.0, 2.0], &[1, 2]);
        check(3, &[0.0, 0.0, 0.0, 0.0], &[0, 1, 2]);
        check(9, &[1.0, f32::NEG_INFINITY], &[0]);
        check(0, &[1.0, 2.0], &[0, 1]);
        check(-1, &[1.0, 2.0], &[0, 1]);
        check(i32::MAX, &[1.0, 2.0], &[0, 1]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn equals_its_twin(row in row(), k in 1usize..50) {
            check(k as i32, &row, &tokens(sorted_probs(&row).into_iter().take(k)));
        }
    }
}
