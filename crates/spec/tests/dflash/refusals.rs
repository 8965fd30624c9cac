//! Files that don't fit their target, contradict themselves or hold something else: the message that each earns.

use paceline_gguf::{GgmlType, Gguf, Value};

use crate::rig::{Parts, Target, Tensor};

const RECONVERT: &str =
    "; convert the original checkpoint again: paceline convert HF_DIR OUT.gguf --target TARGET_DIR";
const OTHER_TARGET: &str = "; this drafter was made for another target: load it with that one";
const CONTRADICTS: &str = "; the file contradicts itself: convert it again or download it from elsewhere";
const NOT_ALONE: &str = "; the file holds a variant that is not implemented, or is not a drafter";

fn upstream() -> Parts {
    Parts::golden("dflash")
}

fn set(key: &str, value: impl Into<Value>) -> Parts {
    upstream().set(key, value)
}

fn tensor(name: &str, len: u64) -> Tensor {
    Tensor::f32(name, &[len], &vec![1.0; len as usize])
}

/// Loading `parts` fails, and `want` follows the name of the file.
#[track_caller]
fn check(parts: Parts, want: impl AsRef<str>) {
    check_with(Target::golden(), parts, want);
}

#[track_caller]
fn check_with(target: &Target, parts: Parts, want: impl AsRef<str>) {
    let Err(error) = target.load(parts.file()) else { panic!("loaded; expected {}", want.as_ref()) };
    assert_eq!(error.to_string(), format!("drafter.gguf: {}", want.as_ref()));
}

#[test]
fn tensors_of_two_dialects() {
    check(
        upstream().with(Tensor::f32("dflash_fc.weight", &[120, 40], &[0.0; 4800])),
        format!("tensor names: expected one dialect, found fc.weight and dflash_fc.weight{CONTRADICTS}"),
    );
    let also = |name: &str| {
        format!("tensors: expected those of a DFlash v1 drafter of 3 layers, found also {name}{NOT_ALONE}")
    };
    check(upstream().with(tensor("dflash_hidden_norm.weight", 40)), also("dflash_hidden_norm.weight"));
    let both = upstream().with(tensor("blk.0.post_attention_norm.weight", 40));
    check(both, also("blk.0.post_attention_norm.weight"));
}

#[test]
fn a_missing_tensor_is_named() {
    check(
        upstream().without("fc.weight"),
        "fusion weight: expected fc.weight or dflash_fc.weight or dflash.fc.weight, found none of them; is this a drafter?",
    );
    for name in upstream().tensors.iter().map(|t| &t.name).filter(|name| *name != "fc.weight") {
        let Err(error) = Target::golden().load(upstream().without(name).file()) else {
            panic!("loaded without {name}")
        };
        let message = error.to_string();
        // Without its first norm a layer could be of the dialect that calls it otherwise.
        let named = name.replace("blk.0.ffn_norm", "blk.0.post_attention_norm");
        let blamed = message.contains(&format!("tensor `{named}`: expected"))
            || (name == "blk.0.ffn_norm.weight" && message.contains("blk.1.ffn_norm.weight"));
        assert!(message.starts_with("drafter.gguf: ") && blamed, "without {name}: {message}");
    }
}

#[test]
fn an_extra_tensor_is_named() {
    let also = |names: &str| {
        format!("tensors: expected those of a DFlash v1 drafter of 3 layers, found also {names}{NOT_ALONE}")
    };
    check(upstream().with(tensor("blk.1.attn_gate.weight", 40)), also("blk.1.attn_gate.weight"));
    check(upstream().with(tensor("blk.0.attn_q.scale", 1)), also("blk.0.attn_q.scale"));
    check(
        upstream().with(tensor("blk.3.attn_norm.weight", 40)).with(tensor("mask_embd", 40)),
        also("blk.3.attn_norm.weight, mask_embd"),
    );
}

#[test]
fn a_tensor_of_another_shape() {
    let parts = upstream().without("blk.1.attn_k.weight");
    check(
        parts.with(Tensor::f32("blk.1.attn_k.weight", &[40, 14], &[0.0; 560])),
        "tensor `blk.1.attn_k.weight`: expected shape [40, 28] (n_embd, n_head_kv·head_dim), found [40, 14]",
    );
}

#[test]
fn taps_that_the_target_does_not_have() {
    let key = "dflash.target_layers";
    let layers = |found: &str| {
        format!(
            "tapped target layers, counted from 0: expected ascending layers below 7, the target's number of layers, \
             found {found}{OTHER_TARGET}"
        )
    };
    check(set(key, vec![7u32, 4, 2]), layers("[6, 3, 1]"));
    check(set(key, vec![2u32, 2, 7]), layers("[1, 1, 6]"));
    check(set(key, vec![2u32, 4, 8]), layers("[1, 3, 7]"));
    check(set(key, Vec::<u32>::new()), layers("[]"));
    check(
        set(key, vec![0u32, 4, 7]),
        format!("dflash.target_layers: expected layers counted from 1, found [0, 4, 7]{RECONVERT}"),
    );
    check(
        set(key, vec![2u32, 7]),
        format!("tensor `fc.weight`, inputs: expected 2 taps of 40 values, found 120{CONTRADICTS}"),
    );
    check(
        set(key, vec![2u32, 7]).unset("dflash.target_hidden_size"),
        format!("width of the target's hidden states: expected 40, the target's, found 60{OTHER_TARGET}"),
    );
    check(
        upstream().unset(key),
        format!("tapped target layers: expected dflash.target_layers, found no such key{RECONVERT}"),
    );
    // A target with fewer layers than this drafter's.
    let small = Target::ends(6, 40, 131);
    check_with(&small, upstream(), layers("[1, 3, 6]").replace("below 7", "below 6"));
}

#[test]
fn taps_whose_base_nobody_knows() {
    for key in ["dflash.target_layer_ids", "dflash.dflash.target_layer_ids"] {
        check(
            set(key, vec![1u32, 3, 6]).unset("dflash.target_layers"),
            format!(
                "dflash.target_layers: expected layers counted from 1, found only target_layer_ids [1, 3, 6], whose \
                 base differs between the programs that wrote it{RECONVERT}"
            ),
        );
    }
}

#[test]
fn what_old_qwen35_files_leave_out() {
    let arch = "qwen35-dflash-draft";
    let old = upstream()
        .move_keys("dflash.", &format!("{arch}."))
        .set("general.architecture", arch)
        .unset(&format!("{arch}.target_layers"))
        .set(&format!("{arch}.dflash.n_target_layers"), 3u32)
        .rename("fc.weight", "dflash.fc.weight")
        .rename("enc.output_norm", "dflash.hidden_norm");
    check(
        old.clone().unset(&format!("{arch}.rope.freq_base")),
        format!(
            "{arch}.rope.freq_base, which old files of this kind leave out: expected the base of the checkpoint, \
             found no such key{RECONVERT}"
        ),
    );
    let window = format!("{arch}.attention.sliding_window");
    check(
        old.clone().unset(&window).unset(&format!("{window}_pattern")),
        format!(
            "{window}, which old files of this kind leave out: expected the window of the checkpoint, 0 if it has \
             none, found no such key{RECONVERT}"
        ),
    );
    check(
        old.set(&format!("{arch}.dflash.n_target_layers"), u32::MAX),
        "tapped target layers, counted from 0: expected ascending layers below 7, the target's number of layers, \
         found [1, 1, 2, 2, 3, 3, 4, 4]"
            .to_string()
            + OTHER_TARGET,
    );
}

#[test]
fn mask_tokens() {
    let key = "tokenizer.ggml.mask_token_id";
    let found = |found: &str, hint: &str| {
        format!("mask token: expected a token of the target's 131, found {found}{hint}")
    };
    let none = "neither mask_token_id nor tokenizer.ggml.mask_token_id";
    check(upstream().unset(key), found(none, RECONVERT));
    check(set(key, 131u32), found("131", OTHER_TARGET));
    check(set("dflash.mask_token_id", 248_070u32), found("248070", OTHER_TARGET));
    check(
        set("dflash.mask_token_id", 113u32).set("dflash-draft.dflash.mask_token_id", 4u32),
        format!(
            "keys `dflash.mask_token_id` and `dflash-draft.dflash.mask_token_id`: expected the same value, found two \
             values{CONTRADICTS}"
        ),
    );
}

#[test]
fn block_sizes() {
    let key = "dflash.block_size";
    let found = |found: &str| format!("block_size: expected 2 to 64, found {found}{RECONVERT}");
    check(upstream().unset(key), found("no such key"));
    for n in [0u32, 1, 65, 1000, u32::MAX] {
        check(set(key, n), found(&n.to_string()));
    }
}

#[test]
fn other_variants_are_recognised_by_name() {
    let unsupported = |variant: &str| {
        format!(
            "this is a {variant} drafter, which is not supported yet; use a DFlash or DFlash2 drafter of the same \
             target, or go without"
        )
    };
    for (name, variant) in [
        ("markov_w1.weight", "DSpark"),
        ("conf_proj.weight", "DSpark"),
        ("dflash_aux_hidden_norm.0", "Laguna DFlash"),
    ] {
        check(upstream().with(tensor(name, 40)), unsupported(&format!("{variant} (tensor `{name}`)")));
    }
    check(set("dflash.decoder_arch", "laguna"), unsupported("Laguna DFlash (decoder_arch)"));
    check(set("dflash-draft.dflash.laguna", true), unsupported("Laguna DFlash (laguna)"));
    check(set("dflash.sample_from_anchor", true), unsupported("DSpark (sample_from_anchor)"));
    for (key, value, variant) in [
        ("dflash.hyper_connection.count", 4.0f32, "DeepSeek DSpark (hyper_connection.count 4)"),
        ("dflash-draft.dflash.backbone_rotary_base", 1e4, "MiMo DFlash (backbone_rotary_base 10000)"),
    ] {
        check(set(key, value), unsupported(variant));
    }
}

#[test]
fn scales_and_caps_that_are_none() {
    for (key, value) in [("embedding_scale", 0.0f32), ("logit_scale", -0.5), ("logit_scale", f32::INFINITY)] {
        let want = format!("{key}: expected a positive number, found {value}{RECONVERT}");
        check(set(&format!("dflash.{key}"), value), want);
    }
    for value in [-30.0f32, f32::INFINITY] {
        check(
            set("dflash.final_logit_softcapping", value),
            format!("final_logit_softcapping: expected a positive number, found {value}{RECONVERT}"),
        );
    }
}

fn version2() -> Parts {
    Parts::golden("dflash2")
}

#[test]
fn what_version_2_needs() {
    for (key, expected, none, bad) in [
        ("conv_kernel_size", "2 to 16", "no such key", 1u32),
        ("conv_group_size", "a divisor of 40 (embedding_length)", "no such key", 7),
        ("selector_rank", "at least 1", "no such key", 0),
        ("selector_top_k", "1 to 131", "no such key", 132),
    ] {
        let name = format!("dflash.{key}");
        let want = |found: &str| format!("{key}: expected {expected}, found {found}{RECONVERT}");
        check(version2().unset(&name), want(none));
        check(version2().set(&name, bad), want(&bad.to_string()));
        // A key says that there ought to be more.
        check(
            set(&name, 2u32),
            format!(
                "tensors: expected those of DFlash2, as there is `{key}`, found those of DFlash v1 alone{CONTRADICTS}"
            ),
        );
    }
    for (key, n, want) in [
        (
            "conv_kernel_size",
            2u32,
            "tensor `blk.0.attn_conv_base`: expected shape [40, 2, 2] (n_embd, conv_kernel_size, sides), found [40, 3, 2]",
        ),
        (
            "conv_group_size",
            8,
            "tensor `blk.0.attn_conv_proj.weight`: expected shape [40, 30] (n_embd, sides·conv_kernel_size·groups), \
             found [40, 48]",
        ),
        (
            "selector_rank",
            5,
            "tensor `selector_hidden.weight`: expected shape [40, 5] (n_embd, selector_rank), found [40, 6]",
        ),
    ] {
        check(version2().set(&format!("dflash.{key}"), n), want);
    }
}

#[test]
fn a_missing_or_extra_tensor_of_version_2_is_named() {
    let of_version_2 = |name: &&String| name.contains("_conv_") || name.starts_with("selector_");
    let parts = version2();
    let names: Vec<&String> = parts.tensors.iter().map(|t| &t.name).filter(of_version_2).collect();
    assert_eq!(names.len(), 4 * 3 + 3);
    for name in names {
        let error = Target::golden().load(version2().without(name).file()).err().expect(name).to_string();
        assert!(error.starts_with(&format!("drafter.gguf: tensor `{name}`: expected")), "{error}");
    }
    check(
        version2().with(tensor("blk.1.attn_conv.weight", 40)),
        format!(
            "tensors: expected those of a DFlash2 drafter of 3 layers, found also blk.1.attn_conv.weight{NOT_ALONE}"
        ),
    );
    // A layer more than the file counts.
    check(
        version2().with(tensor("blk.3.ffn_conv_base", 40)),
        format!(
            "tensors: expected those of a DFlash2 drafter of 3 layers, found also blk.3.ffn_conv_base{NOT_ALONE}"
        ),
    );
    let ids: Vec<u8> = (0..131i64).flat_map(i64::to_le_bytes).collect();
    let map = Tensor { name: "d2t".into(), shape: vec![131], ty: GgmlType::I64, data: ids };
    let head = Tensor::f32("output.weight", &[40, 131], &[0.1; 5240]);
    check(
        version2().with(map).with(head),
        format!(
            "tensor `d2t`: expected none in a drafter with a selector, whose tables have a row for each token, found \
             one{RECONVERT}"
        ),
    );
}

#[test]
fn two_dialects_of_version_2_in_one_file() {
    let mixed = |from: &str, to: &str, found: &str| {
        check(
            version2().rename(from, to),
            format!("tensor names of version 2: expected one dialect, found {found}{CONTRADICTS}"),
        );
    };
    mixed("blk.2.ffn_conv_base", "blk.2.ffn_conv.base", "blk.0.attn_conv_base and blk.2.ffn_conv.base");
    mixed(
        "selector_hidden.weight",
        "selector.hidden_proj.weight",
        "blk.0.attn_conv_base and selector.hidden_proj.weight",
    );
}

#[test]
fn windows() {
    let (window, pattern) = ("dflash.attention.sliding_window", "dflash.attention.sliding_window_pattern");
    for n in [0, 2, 4] {
        check(
            set(pattern, vec![true; n]),
            format!("{pattern}: expected one value for each of 3 layers, found {n}{RECONVERT}"),
        );
    }
    for parts in [upstream().unset(window), set(window, 0u32)] {
        check(parts, format!("{window}: expected a window for the sliding layers, found none{RECONVERT}"));
    }
    // Causal layers may have any window; rows that see the whole block must not lose sight of it.
    let small = set(window, 5u32);
    assert!(Target::golden().load(small.clone().file()).is_ok());
    check(
        small.set("dflash.attention.causal", false),
        format!(
            "attention.sliding_window of layers that see the whole block: expected at least the block size 6, found \
             5{CONTRADICTS}"
        ),
    );
}

#[test]
fn a_target_of_another_width_or_depth() {
    let wide = Target::ends(7, 56, 131);
    check_with(
        &wide,
        upstream(),
        format!("width of the target's hidden states: expected 56, the target's, found 40{OTHER_TARGET}"),
    );
    check(
        set("dflash.target_hidden_size", 60u32),
        format!("tensor `fc.weight`, inputs: expected 3 taps of 60 values, found 120{CONTRADICTS}"),
    );
    // Also where the division would hide it.
    check(
        set("dflash.n_target_features", 121u32),
        format!("n_target_features: expected 120, the inputs of `fc.weight`, found 121{CONTRADICTS}"),
    );
    let words = Target::ends(7, 40, 119);
    check_with(
        &words,
        upstream(),
        format!("dflash.vocab_size: expected 119, the target's, found 131{OTHER_TARGET}"),
    );
    let arch = "gemma4-dflash-draft";
    let gemma = upstream()
        .move_keys("dflash.", &format!("{arch}."))
        .set("general.architecture", arch)
        .unset(&format!("{arch}.target_layers"))
        .set(&format!("{arch}.dflash.target_layer_ids"), vec![1u32, 3, 6])
        .set(&format!("{arch}.dflash.n_target_layers"), 60u32);
    check(gemma, format!("dflash.n_target_layers: expected 7, the target's, found 60{OTHER_TARGET}"));
}

#[test]
fn a_drafter_of_another_width_must_bring_both_ends() {
    // fc: from three taps of 56 to the drafter's 40.
    let narrow = set("dflash.target_hidden_size", 56u32).without("fc.weight").with(Tensor::f32(
        "fc.weight",
        &[168, 40],
        &[0.0; 6720],
    ));
    check_with(
        &Target::ends(7, 56, 131),
        narrow.clone(),
        format!(
            "embedding_length of a drafter that shares the target's embedding and head: expected 56, found \
             40{OTHER_TARGET}"
        ),
    );
    let end = |name| Tensor::f32(name, &[40, 131], &[0.1; 5240]);
    let own = narrow.with(end("token_embd.weight")).with(end("output.weight"));
    assert!(Target::ends(7, 56, 131).load(own.file()).is_ok());
}

#[test]
fn norms_that_are_not_finite() {
    for (name, at, value) in
        [("enc.output_norm.weight", 3, f32::NAN), ("blk.2.attn_k_norm.weight", 13, f32::NEG_INFINITY)]
    {
        check(
            upstream().edit(name, |values| values[at] = value),
            format!("tensor `{name}`: expected finite values, found NaN or infinity at {at}{CONTRADICTS}"),
        );
    }
    for (ty, ok, bad) in [(GgmlType::F16, 0x7bffu16, 0xfc00), (GgmlType::BF16, 0x7f7f, 0x7fc0)] {
        let norm = |bits: u16| {
            let mut parts = upstream();
            let tensor = parts.tensors.iter_mut().find(|t| t.name == "blk.1.attn_norm.weight").unwrap();
            (tensor.ty, tensor.data) = (ty, bits.to_le_bytes().repeat(40));
            parts
        };
        assert!(Target::golden().load(norm(ok).file()).is_ok(), "{ty}");
        let found = "expected finite values, found NaN or infinity at 0";
        check(norm(bad), format!("tensor `blk.1.attn_norm.weight`: {found}{CONTRADICTS}"));
    }
}

#[test]
fn scaled_rotary_angles() {
    check(
        set("dflash.rope.scaling.type", "yarn"),
        "dflash.rope.scaling.type: expected none (other scalings are not supported yet), found yarn",
    );
    for key in ["dflash.rope.scaling.factor", "dflash.rope.scale_linear"] {
        check(
            set(key, 4.0f32),
            format!(
                "{key}: expected 1 (scaled rotary angles are not supported yet), found 4; use a drafter without them"
            ),
        );
    }
}

#[test]
fn vocabulary_maps() {
    let map = |ids: &[i64]| Tensor {
        name: "d2t".into(),
        shape: vec![ids.len() as u64],
        ty: GgmlType::I64,
        data: ids.iter().flat_map(|id| id.to_le_bytes()).collect(),
    };
    let with_head = |ids: &[i64]| {
        let head = Tensor::f32("output.weight", &[40, ids.len() as u64], &vec![0.1; 40 * ids.len()]);
        upstream().with(map(ids)).with(head)
    };
    assert!(Target::golden().load(with_head(&[5, 0, 130]).file()).is_ok());
    check(
        upstream().with(map(&[5, 0, 130])),
        format!("tensor `d2t`: expected a head beside it, found no `output.weight`{RECONVERT}"),
    );
    for (ids, found) in
        [([5, 0, 131], "3 from 0 to 131"), ([-1, 0, 2], "3 from -1 to 2"), ([7, 2, 7], "3 from 2 to 7")]
    {
        let want = format!("tensor `d2t`: expected tokens below 131, each once, found {found}{OTHER_TARGET}");
        check(with_head(&ids), want);
    }
    check(
        upstream().with(tensor("d2t", 3)),
        format!("tensor `d2t`: expected type i64, found f32{RECONVERT}"),
    );
    check(
        with_head(&[1, 2, 3]).without("d2t").with(map(&[1, 2])),
        "tensor `output.weight`: expected shape [40, 2] (n_embd, n_vocab), found [40, 3]",
    );
}

#[test]
fn a_truncated_file() {
    let bytes = upstream().bytes();
    let error = Gguf::from_bytes("drafter.gguf", bytes[..bytes.len() / 2].to_vec()).unwrap_err().to_string();
    assert!(error.starts_with("drafter.gguf: tensor `"), "{error}");
    assert!(
        error.contains(" header implies ") && error.ends_with("truncated download? fetch it again"),
        "{error}"
    );
}

#[test]
fn a_file_that_is_no_drafter() {
    let target = Target::golden();
    let clip = upstream().set("general.architecture", "clip").file();
    let Err(error) = target.load(clip) else { panic!("an encoder of images was loaded as a drafter") };
    assert_eq!(
        error.to_string(),
        "drafter.gguf: architecture `clip` is not a drafter; known drafters: dflash, gemma4-assistant, draft"
    );
    let error = paceline_models::load(&upstream().file(), &target.backend).err().unwrap().to_string();
    assert!(error.ends_with("this is a drafter: give it with -md and its target with -m"), "{error}");
}
