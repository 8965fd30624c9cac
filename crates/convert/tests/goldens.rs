//! Converts the checkpoints under `goldens/` and compares the files with the checkpoints, by formulas of their own.

use std::path::{Path, PathBuf};

use paceline_convert::{ConvertOptions, Report, convert};
use paceline_gguf::safetensors::SafeTensors;
use paceline_gguf::{GgmlType, Gguf};
use paceline_kernels::formats::format;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../goldens").join(name)
}

/// A converted checkpoint beside its source.
struct Converted {
    file: Gguf,
    source: SafeTensors,
    report: Report,
}

fn converted(name: &str, ty: &str, target: Option<&str>) -> Converted {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.gguf");
    let target_dir = target.map(golden);
    let options = ConvertOptions { ty: ty.into(), target_dir, ..ConvertOptions::new(golden(name), &out) };
    let (mut last, mut total) = (0, 0);
    let report = convert(&options, |progress| {
        assert!(progress.done_bytes >= last);
        (last, total) = (progress.done_bytes, progress.total_bytes);
    });
    let report = report.unwrap_or_else(|error| panic!("{name} to {ty}: {error}"));
    assert!(last == total && total > 0, "{last} of {total} bytes at the end");
    assert_eq!(report.file_bytes, std::fs::metadata(&out).unwrap().len());
    let file = Gguf::open(&out).unwrap();
    Converted { file, source: SafeTensors::open_dir(golden(name)).unwrap(), report }
}

impl Converted {
    fn values(&self, name: &str) -> Vec<f32> {
        let tensor = self.file.tensors().iter().find(|tensor| tensor.name == name);
        let tensor = tensor.unwrap_or_else(|| panic!("no tensor {name}"));
        let mut values = vec![0.0; tensor.shape.iter().product::<u64>() as usize];
        (format(tensor.ty).unwrap().dequantize)(self.file.data(tensor), &mut values);
        values
    }

    fn shape(&self, name: &str) -> Vec<u64> {
        self.file.tensors().iter().find(|tensor| tensor.name == name).unwrap().shape.to_vec()
    }

    /// The file's tensor holds `f` of the checkpoint's values.
    fn check(&self, name: &str, tensor: &str, shape: &[u64], f: impl Fn(&[f32]) -> Vec<f32>) {
        assert_eq!(self.shape(name), shape, "{name}");
        let want = f(&self.source.to_f32(tensor).unwrap());
        assert_eq!(self.values(name), want, "{name} from {tensor}");
    }

    fn same(&self, name: &str, tensor: &str, shape: &[u64]) {
        self.check(name, tensor, shape, <[f32]>::to_vec);
    }

    fn ints(&self, want: &[(&str, u32)]) {
        for (key, n) in want {
            assert_eq!(self.file.metadata().u32(key).unwrap(), Some(*n), "{key}");
        }
    }

    fn floats(&self, want: &[(&str, f32)]) {
        for (key, x) in want {
            assert_eq!(self.file.metadata().f32(key).unwrap(), Some(*x), "{key}");
        }
    }

    fn strs(&self, want: &[(&str, &str)]) {
        for (key, text) in want {
            assert_eq!(self.file.metadata().str(key).unwrap(), Some(*text), "{key}");
        }
    }

    fn token(&self, id: usize) -> (String, i32) {
        let metadata = self.file.metadata();
        let texts = metadata.require_bytes_array("tokenizer.ggml.tokens").unwrap();
        let types = metadata.require_i32_array("tokenizer.ggml.token_type").unwrap();
        assert_eq!(texts.len(), types.len());
        (String::from_utf8(texts[id].to_vec()).unwrap(), types[id])
    }
}

fn add_one(values: &[f32]) -> Vec<f32> {
    values.iter().map(|x| x + 1.0).collect()
}

/// Splits into slices of `len`, and takes them in this order.
fn reordered(values: &[f32], len: usize, order: &[usize]) -> Vec<f32> {
    assert_eq!(values.len(), len * order.len());
    order.iter().flat_map(|i| &values[i * len..][..len]).copied().collect()
}

/// Value heads by hand: `a0 a1 a2 b0 b1 b2` (two key heads, three value heads each) to `a0 b0 a1 b1 a2 b2`.
const TWO_BY_THREE: [usize; 6] = [0, 3, 1, 4, 2, 5];
/// `a0 a1 b0 b1 c0 c1` to `a0 b0 c0 a1 b1 c1`.
const THREE_BY_TWO: [usize; 6] = [0, 2, 4, 1, 3, 5];

fn check_delta_net(model: &Converted, il: usize, n_key: usize, order: &[usize]) {
    const HEAD: usize = 10;
    const EMBD: usize = 40;
    let (n_q_and_k, n_value_rows) = (2 * n_key * HEAD, 6 * HEAD);
    let n_conv = n_q_and_k + n_value_rows;
    let check = |name: &str, part: &str, shape: &[u64], f: &dyn Fn(&[f32]) -> Vec<f32>| {
        model.check(&format!("blk.{il}.{name}"), &format!("model.layers.{il}.linear_attn.{part}"), shape, f);
    };
    // q and k stay; v moves in whole heads, each of HEAD rows of `row_len`.
    let behind_q_and_k = |row_len: usize| {
        move |w: &[f32]| {
            let (stay, v) = w.split_at(n_q_and_k * row_len);
            [stay.to_vec(), reordered(v, HEAD * row_len, order)].concat()
        }
    };
    check("attn_qkv.weight", "in_proj_qkv.weight", &[EMBD as u64, n_conv as u64], &behind_q_and_k(EMBD));
    check("ssm_conv1d.weight", "conv1d.weight", &[4, n_conv as u64], &behind_q_and_k(4));
    check("attn_gate.weight", "in_proj_z.weight", &[EMBD as u64, n_value_rows as u64], &|w| {
        reordered(w, HEAD * EMBD, order)
    });
    for (name, part) in [("ssm_alpha.weight", "in_proj_a.weight"), ("ssm_beta.weight", "in_proj_b.weight")] {
        check(name, part, &[EMBD as u64, 6], &|w| reordered(w, EMBD, order));
    }
    check("ssm_a", "A_log", &[6], &|w| reordered(w, 1, order).iter().map(|x| -x.exp()).collect());
    check("ssm_dt.bias", "dt_bias", &[6], &|w| reordered(w, 1, order));
    check("ssm_norm.weight", "norm.weight", &[HEAD as u64], &|w| w.to_vec());
    // The columns of each row move, in groups of HEAD.
    check("ssm_out.weight", "out_proj.weight", &[n_value_rows as u64, EMBD as u64], &|w| {
        w.chunks(n_value_rows).flat_map(|row| reordered(row, HEAD, order)).collect()
    });
}

#[test]
fn qwen35() {
    let model = converted("qwen35", "f32", None);
    model.strs(&[
        ("general.architecture", "qwen35"),
        ("general.type", "model"),
        ("general.name", "qwen35"),
        ("tokenizer.ggml.model", "gpt2"),
        ("tokenizer.ggml.pre", "qwen35"),
    ]);
    model.ints(&[
        ("general.file_type", 0),
        ("general.quantization_version", 2),
        ("qwen35.block_count", 7),
        ("qwen35.context_length", 512),
        ("qwen35.embedding_length", 40),
        ("qwen35.feed_forward_length", 68),
        ("qwen35.attention.head_count", 6),
        ("qwen35.attention.head_count_kv", 2),
        ("qwen35.attention.key_length", 12),
        ("qwen35.attention.value_length", 12),
        ("qwen35.rope.dimension_count", 6),
        ("qwen35.ssm.conv_kernel", 4),
        ("qwen35.ssm.state_size", 10),
        ("qwen35.ssm.group_count", 2),
        ("qwen35.ssm.time_step_rank", 6),
        ("qwen35.ssm.inner_size", 60),
        ("qwen35.full_attention_interval", 3),
        ("tokenizer.ggml.eos_token_id", 110),
        ("tokenizer.ggml.eot_token_id", 110),
        ("tokenizer.ggml.padding_token_id", 108),
    ]);
    model.floats(&[("qwen35.attention.layer_norm_rms_epsilon", 1e-6), ("qwen35.rope.freq_base", 1e7)]);
    let metadata = model.file.metadata();
    assert_eq!(metadata.i32_array("qwen35.rope.dimension_sections").unwrap(), Some(vec![1, 1, 1, 0]));
    assert_eq!(metadata.bool("tokenizer.ggml.add_bos_token").unwrap(), Some(false));
    assert!(!metadata.contains("tokenizer.ggml.bos_token_id"));
    assert!(metadata.require_str("tokenizer.chat_template").unwrap().contains("<|im_start|>"));
    assert!(!metadata.contains("qwen35.nextn_predict_layers"));
    assert_eq!(metadata.require_bytes_array("tokenizer.ggml.tokens").unwrap().len(), 131);
    let merges = metadata.require_bytes_array("tokenizer.ggml.merges").unwrap();
    assert_eq!((merges.len(), &merges[2]), (12, "Ġ the".as_bytes()));
    for (id, text, ty) in [
        (0, "!", 1),
        (94, "Ġ", 1),
        (110, "<|im_end|>", 3),
        (111, "<think>", 4),
        (113, "<|MASK|>", 3),
        (114, "[PAD114]", 5),
        (130, "[PAD130]", 5),
    ] {
        assert_eq!(model.token(id), (text.to_string(), ty));
    }

    model.same("token_embd.weight", "model.embed_tokens.weight", &[40, 131]);
    model.same("output.weight", "lm_head.weight", &[40, 131]);
    model.check("output_norm.weight", "model.norm.weight", &[40], add_one);
    for il in 0..7 {
        let (blk, layer) = (
            |name: &str| format!("blk.{il}.{name}.weight"),
            |name: &str| format!("model.layers.{il}.{name}.weight"),
        );
        model.check(&blk("attn_norm"), &layer("input_layernorm"), &[40], add_one);
        model.check(&blk("post_attention_norm"), &layer("post_attention_layernorm"), &[40], add_one);
        for (part, shape) in [("gate", [40, 68]), ("up", [40, 68]), ("down", [68, 40])] {
            model.same(&blk(&format!("ffn_{part}")), &layer(&format!("mlp.{part}_proj")), &shape);
        }
        if [2, 5].contains(&il) {
            model.same(&blk("attn_q"), &layer("self_attn.q_proj"), &[40, 2 * 72]);
            model.same(&blk("attn_k"), &layer("self_attn.k_proj"), &[40, 24]);
            model.same(&blk("attn_v"), &layer("self_attn.v_proj"), &[40, 24]);
            model.same(&blk("attn_output"), &layer("self_attn.o_proj"), &[72, 40]);
            model.check(&blk("attn_q_norm"), &layer("self_attn.q_norm"), &[12], add_one);
            model.check(&blk("attn_k_norm"), &layer("self_attn.k_norm"), &[12], add_one);
        } else {
            check_delta_net(&model, il, 2, &TWO_BY_THREE);
        }
    }
    assert_eq!(model.file.tensors().len(), 3 + 5 * 14 + 2 * 11);
    assert_eq!(model.source.len(), model.file.tensors().len());
    assert_eq!(model.report.arch, "qwen35");
    assert_eq!(model.report.n_params, 137878);
    assert!(model.report.skipped.is_empty() && model.report.notes.is_empty(), "{:?}", model.report);
}

#[test]
fn a_tied_head_is_left_to_the_reader() {
    let model = converted("qwen35-tied", "f32", None);
    model.ints(&[("qwen35.full_attention_interval", 4), ("qwen35.ssm.group_count", 3)]);
    assert!(model.file.tensors().iter().all(|tensor| tensor.name != "output.weight"));
    for il in [0, 1, 2, 4] {
        check_delta_net(&model, il, 3, &THREE_BY_TWO);
    }
}

#[test]
fn qwen3() {
    let model = converted("qwen3", "f32", None);
    model.strs(&[("general.architecture", "qwen3"), ("tokenizer.ggml.pre", "qwen2")]);
    model.ints(&[
        ("qwen3.block_count", 4),
        ("qwen3.attention.key_length", 20),
        ("qwen3.rope.dimension_count", 20),
    ]);
    model.same("blk.3.attn_norm.weight", "model.layers.3.input_layernorm.weight", &[56]);
    model.same("blk.3.ffn_norm.weight", "model.layers.3.post_attention_layernorm.weight", &[56]);
    model.same("blk.3.attn_q.weight", "model.layers.3.self_attn.q_proj.weight", &[56, 120]);
    model.same("blk.3.attn_k.weight", "model.layers.3.self_attn.k_proj.weight", &[56, 40]);
    model.same("blk.3.attn_q_norm.weight", "model.layers.3.self_attn.q_norm.weight", &[20]);
    model.same("blk.3.attn_output.weight", "model.layers.3.self_attn.o_proj.weight", &[120, 56]);
    model.same("output_norm.weight", "model.norm.weight", &[56]);
    assert_eq!(model.file.tensors().len(), 3 + 4 * 11);
}

/// Experts of one projection, one behind the other.
fn check_experts(model: &Converted, il: usize, n_expert: usize, n_embd: u64, n_ff: u64) {
    for (part, [n_in, n_out]) in [("gate", [n_embd, n_ff]), ("up", [n_embd, n_ff]), ("down", [n_ff, n_embd])]
    {
        let name = format!("blk.{il}.ffn_{part}_exps.weight");
        assert_eq!(model.shape(&name), [n_in, n_out, n_expert as u64], "{name}");
        let expert = |e| format!("model.layers.{il}.mlp.experts.{e}.{part}_proj.weight");
        let want: Vec<f32> = (0..n_expert).flat_map(|e| model.source.to_f32(&expert(e)).unwrap()).collect();
        assert_eq!(model.values(&name), want, "{name}");
    }
    let (router, gate) =
        (format!("blk.{il}.ffn_gate_inp.weight"), format!("model.layers.{il}.mlp.gate.weight"));
    model.same(&router, &gate, &[n_embd, n_expert as u64]);
}

fn check_shared_expert(model: &Converted, il: usize, n_embd: u64, n_ff: u64) {
    let source = |part: &str| format!("model.layers.{il}.mlp.shared_expert{part}.weight");
    model.same(&format!("blk.{il}.ffn_gate_inp_shexp.weight"), &source("_gate"), &[n_embd, 1]);
    for (part, shape) in [("gate", [n_embd, n_ff]), ("up", [n_embd, n_ff]), ("down", [n_ff, n_embd])] {
        let name = format!("blk.{il}.ffn_{part}_shexp.weight");
        model.same(&name, &source(&format!(".{part}_proj")), &shape);
    }
}

#[test]
fn qwen3moe() {
    let model = converted("qwen3moe", "f32", None);
    model.strs(&[("general.architecture", "qwen3moe"), ("tokenizer.ggml.pre", "qwen2")]);
    model.ints(&[
        ("qwen3moe.block_count", 4),
        ("qwen3moe.feed_forward_length", 64),
        ("qwen3moe.expert_count", 7),
        ("qwen3moe.expert_used_count", 3),
        ("qwen3moe.expert_feed_forward_length", 28),
        ("qwen3moe.attention.key_length", 20),
    ]);
    assert!(!model.file.metadata().contains("qwen3moe.expert_shared_feed_forward_length"));
    (0..4).for_each(|il| check_experts(&model, il, 7, 48, 28));
    model.same("blk.3.ffn_norm.weight", "model.layers.3.post_attention_layernorm.weight", &[48]);
    model.same("blk.3.attn_q.weight", "model.layers.3.self_attn.q_proj.weight", &[48, 120]);
    assert_eq!(model.file.tensors().len(), 3 + 4 * 12);
}

#[test]
fn qwen35moe() {
    let model = converted("qwen35moe", "f32", None);
    model.strs(&[("general.architecture", "qwen35moe"), ("tokenizer.ggml.pre", "qwen35")]);
    model.ints(&[
        ("qwen35moe.block_count", 7),
        ("qwen35moe.full_attention_interval", 3),
        ("qwen35moe.expert_count", 9),
        ("qwen35moe.expert_used_count", 4),
        ("qwen35moe.expert_feed_forward_length", 20),
        ("qwen35moe.expert_shared_feed_forward_length", 36),
        ("qwen35moe.ssm.time_step_rank", 6),
    ]);
    assert!(!model.file.metadata().contains("qwen35moe.feed_forward_length"));
    let sections = model.file.metadata().i32_array("qwen35moe.rope.dimension_sections").unwrap();
    assert_eq!(sections, Some(vec![1, 1, 1, 0]));
    for il in 0..7 {
        check_experts(&model, il, 9, 44, 20);
        check_shared_expert(&model, il, 44, 36);
    }
    model.check("blk.0.ssm_dt.bias", "model.layers.0.linear_attn.dt_bias", &[6], |w| {
        reordered(w, 1, &TWO_BY_THREE)
    });
    assert_eq!(model.file.tensors().len(), 3 + 5 * (14 + 5) + 2 * (11 + 5));
}

#[test]
fn qwen3next() {
    const EMBD: usize = 36;
    let model = converted("qwen3next", "f32", None);
    model.strs(&[("general.architecture", "qwen3next"), ("tokenizer.ggml.pre", "qwen2")]);
    model.ints(&[
        ("qwen3next.block_count", 6),
        ("qwen3next.full_attention_interval", 4),
        ("qwen3next.feed_forward_length", 52),
        ("qwen3next.expert_count", 6),
        ("qwen3next.expert_used_count", 2),
        ("qwen3next.expert_feed_forward_length", 24),
        ("qwen3next.expert_shared_feed_forward_length", 40),
        ("qwen3next.ssm.group_count", 3),
        ("qwen3next.ssm.time_step_rank", 6),
        ("qwen3next.rope.dimension_count", 6),
    ]);
    assert!(!model.file.metadata().contains("qwen3next.rope.dimension_sections"));
    for il in 0..6 {
        check_experts(&model, il, 6, 36, 24);
        check_shared_expert(&model, il, 36, 40);
        if il == 3 {
            model.same("blk.3.attn_q.weight", "model.layers.3.self_attn.q_proj.weight", &[36, 2 * 56]);
            continue;
        }
        let source = |part: &str| format!("model.layers.{il}.linear_attn.{part}");
        let name = |part: &str| format!("blk.{il}.{part}");
        // 3 key heads of q, k, two v and two z, all of 8 rows: in eighths of 48 rows, q k v v z z.
        let eighths = |picked: &[usize], of: usize| -> Vec<usize> {
            (0..3).flat_map(|head| picked.iter().map(move |i| head * of + i)).collect()
        };
        let pick = |w: &[f32], order: Vec<usize>| -> Vec<f32> {
            order.iter().flat_map(|i| w[i * 8 * EMBD..(i + 1) * 8 * EMBD].to_vec()).collect()
        };
        model.check(&name("attn_qkv.weight"), &source("in_proj_qkvz.weight"), &[36, 96], |w| {
            pick(w, [eighths(&[0], 6), eighths(&[1], 6), eighths(&[2, 3], 6)].concat())
        });
        model.check(&name("attn_gate.weight"), &source("in_proj_qkvz.weight"), &[36, 48], |w| {
            pick(w, eighths(&[4, 5], 6))
        });
        model.same(&name("ssm_ba.weight"), &source("in_proj_ba.weight"), &[36, 12]);
        model.same(&name("ssm_dt.bias"), &source("dt_bias"), &[6]);
        model.check(&name("ssm_a"), &source("A_log"), &[6], |w| w.iter().map(|x| -x.exp()).collect());
        model.same(&name("ssm_conv1d.weight"), &source("conv1d.weight"), &[4, 96]);
        model.same(&name("ssm_norm.weight"), &source("norm.weight"), &[8]);
        model.same(&name("ssm_out.weight"), &source("out_proj.weight"), &[48, 36]);
    }
    assert_eq!(model.file.tensors().len(), 3 + 5 * 18 + 16);
}

#[test]
fn llama() {
    let model = converted("llama", "f32", None);
    model.strs(&[("general.architecture", "llama"), ("tokenizer.ggml.pre", "llama-bpe")]);
    model.ints(&[
        ("llama.rope.dimension_count", 12),
        ("llama.vocab_size", 127),
        ("tokenizer.ggml.bos_token_id", 108),
        ("tokenizer.ggml.eos_token_id", 112),
    ]);
    model.floats(&[("llama.attention.layer_norm_rms_epsilon", 1e-5), ("llama.rope.freq_base", 1e4)]);
    let metadata = model.file.metadata();
    assert_eq!(metadata.bool("tokenizer.ggml.add_bos_token").unwrap(), Some(true));
    assert!(metadata.require_str("tokenizer.chat_template").unwrap().contains("<|eot_id|>"));
    assert!(!metadata.contains("llama.rope.scaling.type"));
    // Rows 0, 6, 1, 7, … of each head of 12.
    let pairs: Vec<usize> = (0..12).map(|i| if i % 2 == 0 { i / 2 } else { 6 + i / 2 }).collect();
    let heads =
        |n_head: usize| (0..n_head).flat_map(|h| pairs.iter().map(move |i| 12 * h + i)).collect::<Vec<_>>();
    for (name, part, n_head) in [("attn_q", "q_proj", 6), ("attn_k", "k_proj", 3)] {
        let (name, tensor) =
            (format!("blk.1.{name}.weight"), format!("model.layers.1.self_attn.{part}.weight"));
        model.check(&name, &tensor, &[42, 12 * n_head as u64], |w| reordered(w, 42, &heads(n_head)));
    }
    model.same("blk.1.attn_v.weight", "model.layers.1.self_attn.v_proj.weight", &[42, 36]);
    // Wavelengths 2 pi * 10000^(i / 6): 6.3 is below 32 / 4, 29.2 is between, 135 and up are beyond 32 / 1.
    let freqs = model.values("rope_freqs.weight");
    let smooth = (32.0 / (std::f64::consts::TAU * 10000f64.powf(1.0 / 6.0)) - 1.0) / 3.0;
    let between = 1.0 / ((1.0 - smooth) / 8.0 + smooth);
    assert_eq!(freqs, [1.0, between as f32, 8.0, 8.0, 8.0, 8.0]);
    assert!(1.0 < between && between < 8.0);
    assert_eq!(model.file.tensors().len(), 3 + 4 * 9);
}

#[test]
fn dflash() {
    let model = converted("dflash", "f32", Some("qwen35"));
    model.strs(&[("general.architecture", "dflash"), ("tokenizer.ggml.pre", "qwen35")]);
    model.ints(&[
        ("dflash.block_count", 3),
        ("dflash.embedding_length", 40),
        ("dflash.feed_forward_length", 52),
        ("dflash.attention.head_count", 6),
        ("dflash.attention.head_count_kv", 2),
        ("dflash.attention.key_length", 14),
        ("dflash.rope.dimension_count", 14),
        ("dflash.block_size", 6),
        ("dflash.target_hidden_size", 40),
        ("dflash.vocab_size", 131),
        ("dflash.attention.sliding_window", 8),
        ("tokenizer.ggml.mask_token_id", 113),
        ("tokenizer.ggml.eos_token_id", 110),
    ]);
    model.floats(&[("dflash.rope.freq_base", 1e6)]);
    let metadata = model.file.metadata();
    assert_eq!(metadata.u32_array("dflash.target_layers").unwrap(), Some(vec![2, 4, 7]));
    let pattern = metadata.bool_array("dflash.attention.sliding_window_pattern").unwrap();
    assert_eq!(pattern, Some(vec![true, false, true]));
    assert!(!metadata.contains("dflash.attention.causal"));
    model.same("fc.weight", "fc.weight", &[120, 40]);
    model.same("enc.output_norm.weight", "hidden_norm.weight", &[40]);
    model.same("output_norm.weight", "norm.weight", &[40]);
    for il in 0..3 {
        let (blk, layer) = (
            |name: &str| format!("blk.{il}.{name}.weight"),
            |name: &str| format!("layers.{il}.{name}.weight"),
        );
        model.same(&blk("attn_norm"), &layer("input_layernorm"), &[40]);
        model.same(&blk("ffn_norm"), &layer("post_attention_layernorm"), &[40]);
        model.same(&blk("attn_q"), &layer("self_attn.q_proj"), &[40, 84]);
        model.same(&blk("attn_k"), &layer("self_attn.k_proj"), &[40, 28]);
        model.same(&blk("attn_v"), &layer("self_attn.v_proj"), &[40, 28]);
        model.same(&blk("attn_output"), &layer("self_attn.o_proj"), &[84, 40]);
        model.same(&blk("attn_q_norm"), &layer("self_attn.q_norm"), &[14]);
        model.same(&blk("attn_k_norm"), &layer("self_attn.k_norm"), &[14]);
        model.same(&blk("ffn_gate"), &layer("mlp.gate_proj"), &[40, 52]);
        model.same(&blk("ffn_up"), &layer("mlp.up_proj"), &[40, 52]);
        model.same(&blk("ffn_down"), &layer("mlp.down_proj"), &[52, 40]);
    }
    assert_eq!(model.file.tensors().len(), 3 + 11 * 3);
}

#[test]
fn dflash2() {
    let model = converted("dflash2", "f32", Some("qwen35"));
    model.strs(&[("general.architecture", "dflash"), ("tokenizer.ggml.pre", "qwen35")]);
    model.ints(&[
        ("dflash.block_size", 6),
        ("dflash.conv_kernel_size", 3),
        ("dflash.conv_group_size", 5),
        ("dflash.selector_rank", 6),
        ("dflash.selector_top_k", 7),
        ("dflash.attention.sliding_window", 8),
    ]);
    assert_eq!(model.file.metadata().bool("dflash.attention.causal").unwrap(), Some(false));
    for il in 0..3 {
        for (ours, theirs) in [("attn", "attention"), ("ffn", "mlp")] {
            let (name, conv) = (format!("blk.{il}.{ours}_conv"), format!("layers.{il}.{theirs}_conv"));
            model.same(&format!("{name}_base"), &format!("{conv}.base_kernel"), &[40, 3, 2]);
            let proj = format!("{conv}.kernel_projection.weight");
            model.same(&format!("{name}_proj.weight"), &proj, &[40, 48]);
        }
    }
    let selector = |part: &str| format!("candidate_selector.{part}");
    model.same("selector_predecessor.weight", &selector("predecessor_codebook"), &[6, 131]);
    model.same("selector_successor.weight", &selector("successor_codebook"), &[6, 131]);
    model.same("selector_hidden.weight", &selector("hidden_projection.weight"), &[40, 6]);
    assert_eq!(model.file.tensors().len(), 3 + 15 * 3 + 3);
    // Kernels keep every bit in any type.
    let small = converted("dflash2", "q8_0", None);
    let base = small.file.tensor("blk.1.ffn_conv_base").unwrap();
    assert_eq!((base.ty, small.values(&base.name)), (GgmlType::F32, model.values(&base.name)));

    let model = converted("dflash2-gemma4", "f32", Some("gemma4"));
    model.floats(&[
        ("dflash.embedding_scale", 5.0),
        ("dflash.logit_scale", 0.7),
        ("dflash.final_logit_softcapping", 2.5),
    ]);
    // Its config says nothing of this, and so version 2 means it.
    assert_eq!(model.file.metadata().bool("dflash.attention.causal").unwrap(), Some(false));
}

#[test]
fn qwen35moe_with_a_prediction_head() {
    let model = converted("qwen35moe-mtp", "f32", None);
    model.ints(&[("qwen35moe.block_count", 5), ("qwen35moe.nextn_predict_layers", 1)]);
    model.same("blk.4.nextn.eh_proj.weight", "mtp.fc.weight", &[88, 44]);
    model.same("blk.4.ffn_gate_inp.weight", "mtp.layers.0.mlp.gate.weight", &[44, 9]);
    model.same("blk.4.ffn_down_exps.weight", "mtp.layers.0.mlp.experts.down_proj", &[20, 44, 9]);
    for (part, first) in [("gate", 0), ("up", 20 * 44)] {
        model.check(
            &format!("blk.4.ffn_{part}_exps.weight"),
            "mtp.layers.0.mlp.experts.gate_up_proj",
            &[44, 20, 9],
            |w| w.chunks_exact(2 * 20 * 44).flat_map(|both| both[first..first + 20 * 44].to_vec()).collect(),
        );
    }
    model.same("blk.4.ffn_up_shexp.weight", "mtp.layers.0.mlp.shared_expert.up_proj.weight", &[44, 36]);
    model.same("blk.4.ffn_gate_inp_shexp.weight", "mtp.layers.0.mlp.shared_expert_gate.weight", &[44, 1]);
}

#[test]
fn gemma4_assistants() {
    let key = |suffix: &str| format!("gemma4-assistant.{suffix}");
    let model = converted("gemma4-assistant", "f32", Some("gemma4"));
    model.strs(&[("general.architecture", "gemma4-assistant"), ("tokenizer.ggml.model", "gemma4")]);
    for (suffix, n) in [
        ("block_count", 3),
        ("embedding_length", 36),
        ("embedding_length_out", 44),
        ("feed_forward_length", 50),
        ("attention.head_count", 12),
        ("attention.key_length", 20),
        ("attention.key_length_swa", 12),
        ("attention.sliding_window", 11),
        ("attention.shared_kv_layers", 3),
        ("nextn_predict_layers", 3),
    ] {
        model.ints(&[(&key(suffix), n)]);
    }
    let metadata = model.file.metadata();
    let pattern = metadata.bool_array(&key("attention.sliding_window_pattern")).unwrap();
    assert_eq!(pattern, Some(vec![true, true, false]));
    assert_eq!(metadata.bool(&key("use_ordered_embeddings")).unwrap(), Some(false));
    model.same("token_embd.weight", "model.embed_tokens.weight", &[36, 133]);
    model.same("nextn.pre_projection.weight", "pre_projection.weight", &[88, 36]);
    model.same("nextn.post_projection.weight", "post_projection.weight", &[36, 44]);
    model.same("blk.1.attn_q.weight", "model.layers.1.self_attn.q_proj.weight", &[36, 144]);
    model.same("blk.2.attn_q.weight", "model.layers.2.self_attn.q_proj.weight", &[36, 240]);
    model.same("blk.2.layer_output_scale.weight", "model.layers.2.layer_scalar", &[1]);
    // Table, norm, two projections, angles; no keys and no values.
    assert_eq!(model.file.tensors().len(), 5 + 11 * 3);

    // The order of the tokens stays whole numbers whatever the weights become.
    for ty in ["f32", "q8_0"] {
        let model = converted("gemma4-e-assistant", ty, None);
        for (suffix, n) in [("n_centroids", 7), ("centroid_top_k", 3), ("embedding_length_out", 40)] {
            model.ints(&[(&key(suffix), n)]);
        }
        assert_eq!(model.file.metadata().bool(&key("use_ordered_embeddings")).unwrap(), Some(true));
        assert_eq!(model.shape("masked_embd_centroids.weight"), [28, 7]);
        let order = model.file.tensor("masked_embd_ordering").unwrap();
        assert_eq!((order.ty, &order.shape[..]), (GgmlType::I32, &[133][..]));
        let source = model.source.require_tensor("masked_embedding.token_ordering").unwrap();
        let want: Vec<i64> = source.data.as_chunks().0.iter().map(|x| i64::from_le_bytes(*x)).collect();
        let data = model.file.data(order).as_chunks().0;
        let got: Vec<i64> = data.iter().map(|x| i32::from_le_bytes(*x).into()).collect();
        assert_eq!(got, want);
    }
}

#[test]
fn a_drafter_says_what_it_differs_in() {
    let model = converted("dflash-noncausal", "f32", None);
    let metadata = model.file.metadata();
    assert_eq!(metadata.bool("dflash.attention.causal").unwrap(), Some(false));
    assert!(!metadata.contains("tokenizer.ggml.tokens"));
    assert_eq!(metadata.u32("tokenizer.ggml.mask_token_id").unwrap(), Some(113));
    assert!(model.report.notes[0].contains("no tokenizer"), "{:?}", model.report.notes);
}

#[test]
fn types_round_trip() {
    let exact = converted("qwen35", "f32", None);
    for (ty, bound) in [("bf16", 4e-3), ("f16", 6e-4), ("q8_0", 6e-4)] {
        let model = converted("qwen35", ty, None);
        for tensor in model.file.tensors() {
            let small = tensor.shape.len() < 2 || tensor.name.ends_with("conv1d.weight");
            // 40 and 60 values are no whole quant blocks of 32: F16 instead.
            let want = match ty {
                _ if small => GgmlType::F32,
                "bf16" => GgmlType::BF16,
                _ => GgmlType::F16,
            };
            assert_eq!(tensor.ty, want, "{ty} {}", tensor.name);
            let (got, want) = (model.values(&tensor.name), exact.values(&tensor.name));
            for (a, b) in got.iter().zip(&want) {
                assert!((a - b).abs() <= bound * b.abs() + 1e-6, "{ty} {}: {a} for {b}", tensor.name);
            }
        }
        assert_eq!(model.report.types.values().sum::<usize>(), model.file.tensors().len());
    }
}

#[test]
fn gemma4() {
    let model = converted("gemma4", "f32", None);
    model.strs(&[
        ("general.architecture", "gemma4"),
        ("tokenizer.ggml.model", "gemma4"),
        ("tokenizer.ggml.pre", "gemma4"),
    ]);
    model.ints(&[
        ("gemma4.block_count", 5),
        ("gemma4.embedding_length", 44),
        ("gemma4.feed_forward_length", 76),
        ("gemma4.attention.head_count", 6),
        ("gemma4.attention.key_length", 20),
        ("gemma4.attention.value_length", 20),
        ("gemma4.attention.key_length_swa", 12),
        ("gemma4.attention.value_length_swa", 12),
        ("gemma4.attention.sliding_window", 11),
        ("gemma4.attention.shared_kv_layers", 0),
        ("gemma4.embedding_length_per_layer_input", 0),
        ("gemma4.rope.dimension_count", 20),
        ("gemma4.rope.dimension_count_swa", 12),
        ("tokenizer.ggml.bos_token_id", 2),
        ("tokenizer.ggml.eos_token_id", 1),
        ("tokenizer.ggml.eot_token_id", 6),
        ("tokenizer.ggml.padding_token_id", 0),
        ("tokenizer.ggml.mask_token_id", 4),
    ]);
    model.floats(&[
        ("gemma4.final_logit_softcapping", 3.5),
        ("gemma4.rope.freq_base", 1e6),
        ("gemma4.rope.freq_base_swa", 1e4),
    ]);
    let metadata = model.file.metadata();
    let sliding = metadata.bool_array("gemma4.attention.sliding_window_pattern").unwrap();
    assert_eq!(sliding, Some(vec![true, true, false, true, false]));
    let heads = metadata.u32_array("gemma4.attention.head_count_kv").unwrap();
    assert_eq!(heads, Some(vec![3, 3, 2, 3, 2]));
    assert_eq!(metadata.bool("tokenizer.ggml.add_bos_token").unwrap(), Some(true));
    assert!(!metadata.contains("gemma4.expert_count"));
    for (id, text, ty) in [
        (0, "<pad>", 3),
        (6, "<turn|>", 3),
        (7, "<|tool_response>", 4),
        (8, "<|channel>", 4),
        (9, "<0x09>", 6),
        (13, "!", 1),
        (107, "\u{2581}", 1),
        (108, "\n", 1),
        (117, "[PAD117]", 5),
    ] {
        assert_eq!(model.token(id), (text.to_string(), ty));
    }
    let merges = metadata.require_bytes_array("tokenizer.ggml.merges").unwrap();
    assert_eq!((merges.len(), &merges[6]), (8, "\n \n".as_bytes()));

    // Three of the ten pairs of a full layer turn.
    let divisors: Vec<f32> = (0..10).map(|i| if i < 3 { 1.0 } else { 1e30 }).collect();
    assert_eq!(model.values("rope_freqs.weight"), divisors);
    model.same("token_embd.weight", "model.embed_tokens.weight", &[44, 133]);
    model.same("output_norm.weight", "model.norm.weight", &[44]);
    for il in 0..5 {
        let (blk, layer) = (
            |name: &str| format!("blk.{il}.{name}.weight"),
            |name: &str| format!("model.layers.{il}.{name}"),
        );
        for (name, norm) in [
            ("attn_norm", "input_layernorm"),
            ("post_attention_norm", "post_attention_layernorm"),
            ("ffn_norm", "pre_feedforward_layernorm"),
            ("post_ffw_norm", "post_feedforward_layernorm"),
        ] {
            model.same(&blk(name), &layer(&format!("{norm}.weight")), &[44]);
        }
        let (dim, n_kv) = if [2, 4].contains(&il) { (20, 40) } else { (12, 36) };
        model.same(&blk("attn_q"), &layer("self_attn.q_proj.weight"), &[44, 6 * dim]);
        model.same(&blk("attn_k"), &layer("self_attn.k_proj.weight"), &[44, n_kv]);
        model.same(&blk("attn_output"), &layer("self_attn.o_proj.weight"), &[6 * dim, 44]);
        model.same(&blk("attn_k_norm"), &layer("self_attn.k_norm.weight"), &[dim]);
        model.same(&blk("layer_output_scale"), &layer("layer_scalar"), &[1]);
        let has_v = model.file.tensor(&blk("attn_v")).is_some();
        assert_eq!(has_v, ![2, 4].contains(&il), "the values of layer {il}");
    }
    assert_eq!(model.file.tensors().len(), 3 + 3 * 14 + 2 * 13);
    assert!(model.report.skipped.is_empty() && model.report.notes.is_empty(), "{:?}", model.report);
}

#[test]
fn gemma4_with_embeddings_per_layer() {
    let model = converted("gemma4-e", "f32", None);
    model.ints(&[
        ("gemma4.attention.shared_kv_layers", 4),
        ("gemma4.embedding_length_per_layer_input", 14),
        ("gemma4.attention.head_count_kv", 1),
    ]);
    let widths = model.file.metadata().u32_array("gemma4.feed_forward_length").unwrap();
    assert_eq!(widths, Some([[76; 6].to_vec(), [152; 4].to_vec()].concat()));
    model.same("per_layer_token_embd.weight", "model.embed_tokens_per_layer.weight", &[140, 133]);
    model.same("per_layer_model_proj.weight", "model.per_layer_model_projection.weight", &[40, 140]);
    model.same("per_layer_proj_norm.weight", "model.per_layer_projection_norm.weight", &[14]);
    model.same("blk.7.inp_gate.weight", "model.layers.7.per_layer_input_gate.weight", &[40, 14]);
    model.same("blk.7.proj.weight", "model.layers.7.per_layer_projection.weight", &[14, 40]);
    model.same("blk.7.post_norm.weight", "model.layers.7.post_per_layer_input_norm.weight", &[40]);
    model.same("blk.4.attn_v.weight", "model.layers.4.self_attn.v_proj.weight", &[40, 18]);
    assert!((6..10).all(|il| model.file.tensor(&format!("blk.{il}.attn_k.weight")).is_none()));
    assert_eq!(model.file.tensors().len(), 6 + 6 * 17 + 4 * 14);
}

#[test]
fn gemma4_with_experts() {
    let model = converted("gemma4-moe", "f32", None);
    model.ints(&[
        ("gemma4.expert_count", 9),
        ("gemma4.expert_used_count", 3),
        ("gemma4.expert_feed_forward_length", 20),
        ("gemma4.feed_forward_length", 76),
    ]);
    for (name, part, shape) in [
        ("ffn_gate_inp.weight", "router.proj.weight", &[44, 9][..]),
        ("ffn_gate_inp.scale", "router.scale", &[44]),
        ("ffn_down_exps.scale", "router.per_expert_scale", &[9]),
        ("ffn_gate_up_exps.weight", "experts.gate_up_proj", &[44, 40, 9]),
        ("ffn_down_exps.weight", "experts.down_proj", &[20, 44, 9]),
        ("pre_ffw_norm_2.weight", "pre_feedforward_layernorm_2.weight", &[44]),
        ("post_ffw_norm_1.weight", "post_feedforward_layernorm_1.weight", &[44]),
        ("post_ffw_norm_2.weight", "post_feedforward_layernorm_2.weight", &[44]),
    ] {
        model.same(&format!("blk.3.{name}"), &format!("model.layers.3.{part}"), shape);
    }
    assert_eq!(model.file.tensors().len(), 3 + 3 * 22 + 2 * 21);
}
