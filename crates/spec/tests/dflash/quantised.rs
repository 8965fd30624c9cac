//! Drafters in the types that are published.

use paceline_gguf::GgmlType;
use paceline_kernels::formats::quantize_rows;
use paceline_spec::{Draft, Kept};
use paceline_testkit::Rng;

use crate::rig::{Parts, Rig, Target, Tensor, converted, draft, random_drafter, seq_ids};

const N_VOCAB: usize = 97;

/// `parts` with its matrices in another type; vectors stay as they are.
fn quantised(mut parts: Parts, ty: GgmlType) -> Parts {
    for tensor in parts.tensors.iter_mut().filter(|t| t.shape.len() > 1) {
        let data = quantize_rows(ty, tensor.shape[0] as usize, &tensor.values());
        *tensor = Tensor { ty, data, ..tensor.clone() };
    }
    parts
}

/// A draft of a random drafter behind 50 random rows.
fn draft_of(target: &Target, parts: &Parts) -> Draft {
    let mut drafter = target.load(parts.file()).unwrap_or_else(|error| panic!("{error}"));
    let (mut rng, n) = (Rng::new(3), 50);
    let taps: Vec<f32> =
        (0..n * 3 * 256).map(|_| (rng.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0).collect();
    let seq = seq_ids().create();
    drafter.commit(&[Kept { seq, first_position: 0, tokens: &vec![0; n], taps: &taps }]);
    draft(&mut *drafter, &[(seq, n, 7)], 15, N_VOCAB).remove(0)
}

#[test]
fn every_published_type_loads_and_drafts() {
    let target = Target::ends(8, 256, N_VOCAB);
    let parts = random_drafter(&[2, 4, 7], 2);
    let exact = draft_of(&target, &parts);
    assert_eq!(exact.tokens.len(), 15);
    // Bound on how far the probability of the first token moves where it stays the likeliest; the types' mean
    // errors of a weight are 0.02, 0.2, 0.6, 1.9, 3.9 and 7.6 %.
    for (ty, bound, same_tokens) in [
        (GgmlType::F16, 0.005, 15),
        (GgmlType::BF16, 0.05, 13),
        (GgmlType::Q8_0, 0.1, 12),
        (GgmlType::Q6_K, 0.3, 8),
        (GgmlType::Q5_K, 0.6, 6),
        (GgmlType::Q4_K, 1.0, 3),
    ] {
        let got = draft_of(&target, &quantised(parts.clone(), ty));
        assert_eq!((got.tokens.len(), &got.fault), (15, &None), "{ty}");
        assert!(got.q.iter().all(|q| q.is_finite() && *q > 0.0 && *q <= 1.0), "{ty}: {:?}", got.q);
        let same: Vec<usize> = (0..15).filter(|&i| got.tokens[i] == exact.tokens[i]).collect();
        let worst = same.iter().map(|&i| (got.q[i] / exact.q[i]).ln().abs()).fold(0.0, f32::max);
        assert!(same.len() >= same_tokens && worst <= bound, "{ty}: {} tokens the same, {worst}", same.len());
    }
}

#[test]
fn norms_stay_as_they_were_in_every_type() {
    let exact = Parts::golden("dflash");
    for ty in ["bf16", "f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"] {
        let file = converted("dflash", ty);
        let parts = Parts::of(&file);
        let vectors: Vec<&Tensor> = parts.tensors.iter().filter(|t| t.shape.len() == 1).collect();
        assert_eq!(vectors.len(), 2 + 4 * 3);
        for tensor in vectors {
            assert_eq!(tensor.data, exact.tensor(&tensor.name).data, "{ty} {}", tensor.name);
        }
        let drafts = Rig::of("dflash", &parts).drafts();
        assert!(drafts.iter().all(|d| d.q.len() == 5 && d.q.iter().all(|q| q.is_finite())), "{ty}");
    }
}
