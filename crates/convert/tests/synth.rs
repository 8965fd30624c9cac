//! Synthetic models: the bytes follow from what was asked for, and the weights are those of no broken model.

use std::path::Path;

use paceline_convert::synth::{DRAFTERS, SHAPES, SynthOptions, synthesize};
use paceline_gguf::{GgmlType, Gguf};
use paceline_kernels::formats::format;

fn write(dir: &Path, shape: &str, ty: &str, seed: u64) -> Gguf {
    let out = dir.join(format!("{}-{ty}-{seed}.gguf", shape.replace(':', "-")));
    let options = SynthOptions { seed, ..SynthOptions::new(shape, ty, &out) };
    let report = synthesize(&options, |_| ()).unwrap();
    assert_eq!(report.file_bytes, std::fs::metadata(&out).unwrap().len());
    Gguf::open(out).unwrap()
}

fn values(file: &Gguf, name: &str) -> Vec<f32> {
    let tensor = file.require_tensor(name).unwrap();
    let mut values = vec![0.0; tensor.n_elements() as usize];
    (format(tensor.ty).unwrap().dequantize)(file.data(tensor), &mut values);
    values
}

#[test]
fn bytes_follow_from_shape_type_and_seed() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = |name: &str, shape: &str, ty: &str, seed| {
        let out = dir.path().join(name);
        synthesize(&SynthOptions { seed, ..SynthOptions::new(shape, ty, &out) }, |_| ()).unwrap();
        std::fs::read(out).unwrap()
    };
    let first = bytes("a", "toy:2", "q4_k_m", 7);
    assert!(first == bytes("b", "toy:2", "q4_k_m", 7), "the same bytes");
    assert!(first != bytes("c", "toy:2", "q4_k_m", 8), "another seed, other bytes");
    assert!(first.len() < bytes("d", "toy:2", "q8_0", 7).len());
    assert!(first.len() < bytes("e", "toy:3", "q4_k_m", 7).len());
}

#[test]
fn weights_have_the_deviation_of_their_inputs_in_every_type() {
    let dir = tempfile::tempdir().unwrap();
    for ty in ["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "iq4_xs"] {
        let file = write(dir.path(), "toy:1", ty, 0);
        for (name, want) in
            [("blk.0.ffn_up.weight", 1.0 / 16.0), ("blk.0.ffn_down.weight", 512f32.powf(-0.5))]
        {
            let values = values(&file, name);
            let n = values.len() as f32;
            let mean = values.iter().sum::<f32>() / n;
            let deviation = (values.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / n).sqrt();
            assert!(mean.abs() < want / 20.0, "{ty}: mean {mean}");
            assert!((deviation / want - 1.0).abs() < 0.05, "{ty}: deviation {deviation}, not {want}");
        }
        let norm = values(&file, "blk.0.attn_norm.weight");
        assert!(norm.iter().all(|x| (0.5..1.5).contains(x)), "{ty}: {norm:?}");
    }
}

/// Equal rows would make products cheaper to get right than real ones, and logits equal.
#[test]
fn no_two_rows_are_alike() {
    let dir = tempfile::tempdir().unwrap();
    let file = write(dir.path(), "toy-hybrid:4", "q8_0", 0);
    let tensor = file.require_tensor("blk.0.ffn_down.weight").unwrap();
    let mut rows: Vec<&[u8]> = file.data(tensor).chunks(tensor.ty.row_bytes(512)).collect();
    let n = rows.len();
    rows.sort_unstable();
    rows.dedup();
    assert_eq!((n, rows.len()), (256, 256));
    assert_ne!(
        values(&file, "blk.0.ffn_up.weight")[..256],
        values(&file, "blk.1.ffn_up.weight")[..256],
        "nor are layers"
    );
}

#[test]
fn types_are_those_of_the_mix() {
    let dir = tempfile::tempdir().unwrap();
    let file = write(dir.path(), "toy-moe", "q4_k_m", 0);
    let ty = |name: &str| file.require_tensor(name).unwrap().ty;
    assert_eq!(ty("token_embd.weight"), GgmlType::Q6_K, "the head");
    assert_eq!(ty("blk.0.ffn_down_exps.weight"), GgmlType::Q6_K, "the first eighth");
    assert_eq!(ty("blk.1.ffn_down_exps.weight"), GgmlType::Q4_K);
    assert_eq!(ty("blk.1.ffn_gate_inp.weight"), GgmlType::F32, "the router");
    let shape = &file.require_tensor("blk.0.ffn_up_exps.weight").unwrap().shape;
    assert_eq!(shape[..], [256, 256, 8], "n_embd, n_ff, n_expert");
    let hybrid = write(dir.path(), "toy-hybrid:4", "q4_k_m", 0);
    assert_eq!(hybrid.require_tensor("blk.0.ssm_conv1d.weight").unwrap().ty, GgmlType::F32);
    assert!(hybrid.tensor("blk.3.attn_q.weight").is_some(), "every fourth layer attends");
}

#[test]
fn a_drafter_names_the_layers_it_taps() {
    let dir = tempfile::tempdir().unwrap();
    let file = write(dir.path(), "dflash:toy-hybrid", "q8_0", 0);
    assert_eq!(file.tensors().len(), 3 + 11 * 2);
    assert_eq!(file.metadata().u32_array("dflash.target_layers").unwrap().unwrap(), [2, 3, 4, 5, 6]);
    assert_eq!(file.require_tensor("fc.weight").unwrap().shape[..], [5 * 256, 256]);
    // Of a target that is cut, the layers that are left.
    let file = write(dir.path(), "dflash:toy:3", "q8_0", 0);
    assert_eq!(file.metadata().u32_array("dflash.target_layers").unwrap().unwrap(), [1, 2, 3]);
}

#[test]
fn refusals_say_what_there_is() {
    let dir = tempfile::tempdir().unwrap();
    let check = |shape: &str, ty: &str, parts: &[&str]| {
        let out = dir.path().join("x.gguf");
        let error = synthesize(&SynthOptions::new(shape, ty, &out), |_| ()).unwrap_err().to_string();
        for part in parts {
            assert!(error.contains(part), "{part} in {error}");
        }
        assert!(!out.exists(), "nothing is left behind");
    };
    check("qwen9-1b", "q8_0", &["qwen9-1b", SHAPES[3].name, "dflash:qwen3.6-27b"]);
    check("dflash:qwen3-32b", "q8_0", &["dflash:qwen3-32b", DRAFTERS[0].target]);
    check("toy", "q9_z", &["q9_z", "q4_k_m"]);
    check("toy:0", "q8_0", &["toy:0", "1 to 8 layers", "`0`"]);
    check("toy:9", "q8_0", &["1 to 8 layers"]);
    check("toy:x", "q8_0", &["`x`"]);
}
