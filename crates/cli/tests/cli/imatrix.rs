//! `paceline imatrix`: what it sums, and that it helps.

use std::fs;

use paceline_gguf::Gguf;
use paceline_kernels::formats::format;
use paceline_text::{Encode, Tokenizer};

use crate::command::{paceline, repo_str};

const TARGET: &str = "models/bundled/target.gguf";
const STORY: &str = "Once upon a time there was a brave little fox named Pip. Pip lived near the river. One sunny morning Pip \
                     found a golden key in the grass. Anna said it was from the old library. They went there, and the door \
                     opened. Inside were many books and a soft blue chair. They read until evening and were very happy.\n";

fn floats(file: &Gguf, name: &str) -> Vec<f32> {
    let tensor = file.require_tensor(name).unwrap();
    let mut values = vec![0.0; tensor.n_elements() as usize];
    (format(tensor.ty).unwrap().dequantize)(file.data(tensor), &mut values);
    values
}

/// The first layer's input is a norm of the embedding, which can be worked out by hand.
#[test]
fn squares_of_inputs_are_summed() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let (text, out) = (path("text.txt"), path("i.gguf"));
    fs::write(&text, STORY.repeat(3)).unwrap();
    let args = ["imatrix", "-m", &repo_str(TARGET), "-f", &text, "-o", &out, "-c", "64", "--chunks", "2"];
    let said = paceline(&args).ok();
    assert!(said.contains("2 windows of 64 tokens"), "{said}");
    let bytes = fs::read(&out).unwrap();
    paceline(&[&args[..], &["-ub", "5", "-t", "1"]].concat()).ok();
    assert!(bytes == fs::read(&out).unwrap(), "batches and threads leave no trace");

    let (sums, target) = (Gguf::open(&out).unwrap(), Gguf::open(repo_str(TARGET)).unwrap());
    assert_eq!(sums.metadata().str("general.type").unwrap(), Some("imatrix"));
    assert_eq!(sums.metadata().u32("imatrix.chunk_count").unwrap(), Some(2));
    let tokenizer = Tokenizer::from_metadata(target.metadata()).unwrap();
    let tokens = tokenizer.encode(&STORY.repeat(3), Encode { add_bos: true, parse_special: false });
    let (table, norm) = (floats(&target, "token_embd.weight"), floats(&target, "blk.0.attn_norm.weight"));
    let eps = target.metadata().require_f32("qwen35.attention.layer_norm_rms_epsilon").unwrap();
    let mut expected = vec![0.0f64; norm.len()];
    for &token in &tokens[..128] {
        let x = &table[token as usize * norm.len()..][..norm.len()];
        let scale = 1.0 / (x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32 + eps).sqrt();
        for i in 0..x.len() {
            expected[i] += f64::from(x[i] * scale * norm[i]).powi(2);
        }
    }
    for name in ["blk.0.attn_qkv.weight", "blk.0.attn_gate.weight", "blk.0.ssm_alpha.weight"] {
        let got = floats(&sums, &format!("{name}.in_sum2"));
        assert_eq!(floats(&sums, &format!("{name}.counts")), [128.0]);
        for (got, want) in got.iter().zip(&expected) {
            assert!((f64::from(*got) - want).abs() <= 1e-4 * want.abs() + 1e-6, "{name}: {got} {want}");
        }
    }
    // Every matrix of every layer has its sums.
    for tensor in target.tensors().iter().filter(|t| t.shape.len() == 2 && t.name.starts_with("blk.")) {
        let found = sums.tensor(&format!("{}.in_sum2", tensor.name));
        assert_eq!(found.is_none(), tensor.name.contains("conv1d"), "{}", tensor.name);
        assert!(found.is_none_or(|sums| sums.shape[0] == tensor.shape[0]), "{}", tensor.name);
    }
}

#[test]
fn experts_are_summed_apart() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let (model, text, out, small) = (path("m.gguf"), path("text.txt"), path("i.gguf"), path("small.gguf"));
    fs::write(&text, STORY.repeat(3)).unwrap();
    paceline(&["convert", &repo_str("goldens/qwen3moe"), &model, "--type", "f32"]).ok();
    paceline(&["imatrix", "-m", &model, "-f", &text, "-o", &out, "-c", "32", "--chunks", "3"]).ok();
    let sums = Gguf::open(&out).unwrap();
    for product in ["gate", "down"] {
        // Three of seven experts for each of 96 tokens.
        let name = format!("blk.1.ffn_{product}_exps.weight");
        let counts = floats(&sums, &format!("{name}.counts"));
        assert_eq!((counts.len(), counts.iter().sum::<f32>()), (7, 3.0 * 96.0));
        let squares = floats(&sums, &format!("{name}.in_sum2"));
        for (count, squares) in counts.iter().zip(squares.chunks(squares.len() / 7)) {
            assert_eq!(*count == 0.0, squares.iter().all(|&x| x == 0.0));
        }
    }
    paceline(&["quantize", &model, &small, "q4_0", "--imatrix", &out]).ok();
}

/// Importances change what is fitted, and predictions stay about as near. A story is too short to come nearer with: what more text
/// brings is in `docs/performance.md`, and `convert/tests/` hold the fit itself to its weights.
#[test]
fn importances_are_used() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let (seen, out, base) = (path("seen.txt"), path("i.gguf"), path("base.kld"));
    fs::write(&seen, STORY.repeat(3)).unwrap();
    let target = repo_str(TARGET);
    paceline(&["imatrix", "-m", &target, "-f", &seen, "-o", &out, "-c", "64"]).ok();
    paceline(&["perplexity", "-m", &target, "-f", &seen, "-c", "64", "--kl-divergence-base", &base]).ok();
    let divergence = |more: &[&str]| {
        let small = path("small.gguf");
        let args = ["quantize", &target, &small, "q2_k", "--pure", "--allow-requantize"];
        let ran = paceline(&[&args[..], more].concat());
        let is_told = ran.err.contains("no importances for token_embd.weight and 1 more tensors");
        assert_eq!(is_told, !more.is_empty(), "{}", ran.err);
        ran.ok();
        let shown = paceline(&["perplexity", "-m", &small, "--json", "--kl-divergence", &base]).json();
        shown["kl_divergence"]["mean"].as_f64().unwrap()
    };
    let (plain, told) = (divergence(&[]), divergence(&["--imatrix", &out]));
    eprintln!("divergence of q2_k: {plain} without, {told} with importances");
    assert!(told != plain && told < 1.3 * plain, "{told} with importances, {plain} without");
}
