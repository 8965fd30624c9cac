//! The goldens see each mistake that servers have made: a drafter, or what it is fed, is made wrong on purpose, and
//! the comparison turns red. Without these a golden test could be green for want of looking.

use paceline_testkit::Golden;

use crate::rig::{BLOCK, GREEN, MASK, N_VOCAB, Parts, Rig, Tensor, agrees, draft, follows};

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

/// What version 2 adds, each part of it wrong on purpose.
#[test]
fn convolutions_that_differ() {
    let right = || Parts::golden("dflash2");
    let red = |parts: Parts| red("dflash2", &parts, |_| {});
    assert_eq!(red(right()), GREEN);
    let (n_embd, n_tap, n_group) = (40, 3, 8);
    let convs = || (0..3).flat_map(|il| ["attn", "ffn"].map(|part| format!("blk.{il}.{part}_conv")));
    // `index` of a value in its place gives the place that it is taken from.
    let moved = |part: &str, width: usize, index: &dyn Fn(usize) -> usize| {
        convs().fold(right(), |parts, conv| {
            parts.edit(&format!("{conv}_{part}"), |values| {
                let rows: Vec<Vec<f32>> = values.chunks_exact(width).map(<[f32]>::to_vec).collect();
                for (at, row) in values.chunks_exact_mut(width).enumerate() {
                    row.copy_from_slice(&rows[index(at)]);
                }
            })
        })
    };
    let base = |index: &dyn Fn(usize) -> usize| moved("base", n_embd, index);
    let proj = |index: &dyn Fn(usize) -> usize| moved("proj.weight", n_embd, index);
    assert_eq!(red(base(&|row| row / n_tap * n_tap + (n_tap - 1 - row % n_tap))), ALL, "taps in reverse");
    assert_eq!(red(base(&|row| (row + n_tap) % (2 * n_tap))), ALL, "sides of the common kernels swapped");
    assert_eq!(red(base(&|row| row % 2 * n_tap + row / 2)), ALL, "sides and taps transposed");
    // [n_embd, n_tap] read as [n_tap, n_embd].
    let transposed = moved("base", 1, &|at| {
        let (side, at) = (at / (n_tap * n_embd), at % (n_tap * n_embd));
        side * n_tap * n_embd + at % n_embd * n_tap + at / n_embd
    });
    assert_eq!(red(transposed), ALL, "channels and taps transposed");
    let delta = |at: usize| (at / (n_tap * n_group), at / n_group % n_tap, at % n_group);
    let place = |side: usize, tap: usize, group: usize| (side * n_tap + tap) * n_group + group;
    let swapped = |at: usize| {
        let (side, tap, group) = delta(at);
        place(1 - side, tap, group)
    };
    assert_eq!(red(proj(&swapped)), ALL, "sides of a row's own kernels swapped");
    let grouped = |at: usize| {
        let (side, tap, group) = delta(at);
        side * n_tap * n_group + group * n_tap + tap
    };
    assert_eq!(red(proj(&grouped)), ALL, "groups and taps transposed");
    let early = |at: usize| {
        let (side, tap, group) = delta(at);
        place(side, (tap + 1) % n_tap, group)
    };
    assert_eq!(red(proj(&early)), ALL, "a row's own kernels one tap off");
    let without_past = convs().fold(right(), |parts, conv| {
        parts
            .edit(&format!("{conv}_base"), |values| {
                values
                    .chunks_exact_mut(n_embd)
                    .enumerate()
                    .filter(|(at, _)| at % n_tap > 0)
                    .for_each(|(_, row)| row.fill(0.0));
            })
            .edit(&format!("{conv}_proj.weight"), |values| {
                let rows = values.chunks_exact_mut(n_embd).enumerate();
                rows.filter(|(at, _)| delta(*at).1 > 0).for_each(|(_, row)| row.fill(0.0));
            })
    });
    assert_eq!(red(without_past), ALL, "rows that look at themselves alone");
    let exchanged =
        right().rename("attn_conv", "x").rename("ffn_conv", "attn_conv").rename(".x_", ".ffn_conv_");
    assert_eq!(red(exchanged), ALL, "convolutions of attention and feed-forward exchanged");
}

#[test]
fn masks_and_windows_of_version_2() {
    let red = |key: &str, value: paceline_gguf::Value| {
        red("dflash2", &Parts::golden("dflash2").set(key, value), |_| {})
    };
    assert_eq!(red("dflash.attention.causal", true.into()), ALL);
    for window in [7u32, 9] {
        assert_eq!(red("dflash.attention.sliding_window", window.into()), BEYOND_WINDOW, "window {window}");
    }
}

#[test]
fn selectors_that_differ() {
    let right = || Parts::golden("dflash2");
    let red = |parts: Parts| red("dflash2", &parts, |_| {});
    let (a, b) = ("selector_predecessor", "selector_successor");
    assert_eq!(
        red(right().rename(a, "x").rename(b, a).rename("x.weight", &format!("{b}.weight"))),
        ALL,
        "tables swapped"
    );
    let none = right().edit("selector_hidden.weight", |values| values.fill(0.0));
    assert_eq!(red(none), ALL, "no selector");
    for n_top in [1u32, 6, 8] {
        assert_eq!(red(right().set("dflash.selector_top_k", n_top)), ALL, "{n_top} candidates");
    }
    let next = right().edit(&format!("{a}.weight"), |values| values.rotate_left(6));
    assert_eq!(red(next), ALL, "tables of the next token");
    // The walk worked out from the reference's rows: as it is meant, and as it is not.
    let values = |name: &str| Tensor::values(right().tensor(name));
    let (a, b, p) = (
        values("selector_predecessor.weight"),
        values("selector_successor.weight"),
        values("selector_hidden.weight"),
    );
    let rig = Rig::new("dflash2");
    let walks = |point, before_is_anchor: bool, late: usize| {
        let logits = rig.reference(point);
        let states = rig.golden.f32(&format!("point.{}.final_norm", point.index));
        let mut before = point.anchor;
        let mut path = Vec::new();
        for (i, row) in logits.iter().enumerate() {
            let state = &states[(i + 1 - late) * 40..][..40];
            let hidden = p.chunks_exact(40).map(|w| w.iter().zip(state).map(|(w, x)| w * x).sum::<f32>());
            let gate: Vec<f32> = hidden.zip(&a[before as usize * 6..]).map(|(h, a)| h * a).collect();
            let mut order: Vec<usize> = (0..N_VOCAB).collect();
            order.sort_by(|&x, &y| row[y].total_cmp(&row[x]));
            let pair = |c: usize| gate.iter().zip(&b[c * 6..]).map(|(g, b)| g * b).sum::<f32>();
            let scores: Vec<f32> = order[..7].iter().map(|&c| row[c] + pair(c)).collect();
            let (at, log_q) = crate::rig::likeliest(&scores);
            path.push((order[at as usize] as u32, log_q));
            before = if before_is_anchor { point.anchor } else { order[at as usize] as u32 };
        }
        let draft = paceline_spec::Draft {
            tokens: path.iter().map(|(token, _)| *token).collect(),
            q: path.iter().map(|(_, log_q)| log_q.exp()).collect(),
            fault: None,
        };
        follows(&draft, &rig.path(point))
    };
    for point in rig.points() {
        assert!(walks(point, false, 0), "{point:?}");
        assert!(!walks(point, true, 0), "{point:?}: pairs with the anchor alone");
        assert!(!walks(point, false, 1), "{point:?}: states of the row before");
    }
}
