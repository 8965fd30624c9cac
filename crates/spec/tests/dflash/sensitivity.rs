//! The goldens see each mistake that servers have made: a drafter, or what it is fed, is made wrong on purpose, and
//! the comparison turns red. Without these a golden test could be green for want of looking.

use paceline_testkit::Golden;

use crate::rig::{BLOCK, GREEN, MASK, N_VOCAB, Parts, Rig, agrees, draft};

fn upstream() -> Parts {
    Parts::golden("dflash")
}

/// The comparison with a drafter made of `parts` and features made by `feed`: the points that are red.
fn red(golden: &str, parts: &Parts, feed: impl Fn(&mut Rig)) -> Vec<usize> {
    let mut rig = Rig::of(golden, parts);
    feed(&mut rig);
    rig.red()
}

/// Sizes of context at the points where the longest one reaches further back than a window of 8, seen from the last
/// row of the block.
const BEYOND_WINDOW: &[usize] = &[3, 7, 9, 13, 40, 69, 75];
const ALL: &[usize] = &[1, 3, 7, 9, 13, 40, 69, 75];

/// Features of `layers`, row by row, moved down by `n_later` rows.
fn features(layers: [usize; 3], n_later: usize) -> Vec<f32> {
    let target = Golden::open("qwen35");
    let hidden = layers.map(|il| target.f32(&format!("hidden.{il}")));
    let width = target.shape("hidden.0")[1];
    let n = target.shape("hidden.0")[0];
    let row = |i: usize| {
        let from = i.saturating_sub(n_later);
        hidden.iter().flat_map(move |h| h[from * width..(from + 1) * width].to_vec())
    };
    (0..n).flat_map(row).collect()
}

#[test]
fn right_ones_are_green() {
    assert_eq!(red("dflash", &upstream(), |_| {}), GREEN);
    assert_eq!(red("dflash", &upstream(), |rig| rig.features = features([1, 3, 6], 0)), GREEN);
}

#[test]
fn features_of_a_neighbouring_layer() {
    assert_eq!(red("dflash", &upstream(), |rig| rig.features = features([0, 2, 5], 0)), ALL);
    assert_eq!(red("dflash", &upstream(), |rig| rig.features = features([1, 3, 5], 0)), ALL);
}

#[test]
fn features_in_another_order() {
    assert_eq!(red("dflash", &upstream(), |rig| rig.features = features([3, 1, 6], 0)), ALL);
}

#[test]
fn features_of_the_row_before() {
    let red = red("dflash", &upstream(), |rig| rig.features = features([1, 3, 6], 1));
    // Row 0 is its own neighbour here.
    assert_eq!(red, ALL[1..]);
}

#[test]
fn two_rows_of_context_swapped() {
    let swap = |rig: &mut Rig| (0..rig.width).for_each(|i| rig.features.swap(i, rig.width + i));
    assert_eq!(red("dflash", &upstream(), swap)[..3], [1, 3, 7]);
}

#[test]
fn windows_one_off() {
    for window in [7u32, 9] {
        let parts = upstream().set("dflash.attention.sliding_window", window);
        let red = red("dflash", &parts, |_| {});
        // The last row of a block of 6 sees past a window of 8 as soon as there are 3 tokens of context.
        assert_eq!(red, BEYOND_WINDOW, "window {window}");
    }
}

#[test]
fn windows_on_other_layers() {
    let key = "dflash.attention.sliding_window_pattern";
    for pattern in [[false, true, true], [true, true, true], [false, false, false]] {
        assert_eq!(red("dflash", &upstream().set(key, pattern.to_vec()), |_| {}), ALL, "{pattern:?}");
    }
}

#[test]
fn causal_where_full_was_meant_and_the_other_way_round() {
    for causal in [true, false] {
        let parts = upstream().set("dflash.attention.causal", causal);
        assert_eq!(red("dflash", &parts, |_| {}), ALL, "all layers causal: {causal}");
    }
    assert_eq!(red("dflash-noncausal", &Parts::golden("dflash-noncausal"), |_| {}), GREEN);
    assert_eq!(red("dflash-noncausal", &upstream(), |_| {}), ALL);
}

#[test]
fn another_mask_token() {
    assert_eq!(red("dflash", &upstream().set("tokenizer.ggml.mask_token_id", MASK + 1), |_| {}), ALL);
}

#[test]
fn the_mask_in_the_anchors_place() {
    let mut rig = Rig::new("dflash");
    for point in rig.points() {
        let got = rig.draft_at(point.n, MASK);
        assert!(!agrees(&got, &rig.reference(point)), "{point:?}");
    }
}

#[test]
fn a_draft_one_row_off() {
    let mut rig = Rig::new("dflash");
    for point in rig.points() {
        let (got, mut logits) = (rig.draft_at(point.n, point.anchor), rig.reference(point));
        logits.rotate_left(1);
        assert!(!agrees(&got, &logits), "{point:?}");
    }
}

#[test]
fn another_rotary_base() {
    assert_eq!(red("dflash", &upstream().set("dflash.rope.freq_base", 10_000f32), |_| {}), ALL);
    assert_eq!(red("dflash", &upstream().set("dflash.rope.freq_base", 1e7f32), |_| {}), ALL);
}

#[test]
fn half_of_a_head_rotated() {
    // What reading degenerate sections as a width would do.
    assert_eq!(red("dflash", &upstream().set("dflash.rope.dimension_count", 6u32), |_| {}), ALL);
}

#[test]
fn norms_in_each_others_place() {
    let swapped =
        upstream().rename(".attn_norm", ".x").rename(".ffn_norm", ".attn_norm").rename(".x", ".ffn_norm");
    assert_eq!(red("dflash", &swapped, |_| {}), ALL);
    let swapped = upstream()
        .rename("attn_q_norm", "x")
        .rename("attn_k_norm", "attn_q_norm")
        .rename(".x.", ".attn_k_norm.");
    assert_eq!(red("dflash", &swapped, |_| {}), ALL);
    let swapped = upstream().rename("enc.output_norm", "x");
    let swapped = Parts { tensors: swapped.tensors, ..swapped }.rename("output_norm", "enc.output_norm");
    assert_eq!(red("dflash", &swapped.rename("x.weight", "output_norm.weight"), |_| {}), ALL);
}

#[test]
fn a_block_that_was_left_behind() {
    // Rows of a draft that count as context: what committing a draft's own rows would do.
    let mut rig = Rig::new("dflash");
    for point in rig.points().into_iter().filter(|p| p.n > 1) {
        let seq = rig.sequence(point.n - 1, 75);
        let stale = rig.features[..rig.width].to_vec();
        let token = [point.anchor];
        rig.drafter.commit(&[paceline_spec::Kept {
            seq,
            first_position: point.n - 1,
            tokens: &token,
            taps: &stale,
        }]);
        let got = draft(&mut *rig.drafter, &[(seq, point.n, point.anchor)], BLOCK - 1, N_VOCAB).remove(0);
        assert!(!agrees(&got, &rig.reference(point)), "{point:?}");
    }
}
