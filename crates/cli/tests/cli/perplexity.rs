//! `paceline perplexity`.

use std::fs;

use crate::{
    command::{paceline, repo_str},
    types::{log_softmax, logits},
};

const TARGET: &str = "models/bundled/target.gguf";

/// Of the kind that the bundled model knows.
const STORY: &str = "Once upon a time there was a little girl named Lily. She had a red kite. One day the wind took the kite \
                     over the hill. Lily ran after it. She asked a kind bird for help. The bird saw the kite in a tall tree \
                     and brought it down. Lily said thank you, and they were friends from that day on.\n";

struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Files {
        let files = Files(tempfile::tempdir().unwrap());
        fs::write(files.path("story.txt"), STORY.repeat(6)).unwrap();
        files
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_string()
    }

    fn measure(&self, more: &[&str]) -> serde_json::Value {
        let (target, story) = (repo_str(TARGET), self.path("story.txt"));
        let args = ["perplexity", "-m", &target, "-f", &story, "-c", "64", "--json"];
        paceline(&[&args[..], more].concat()).json()
    }
}

/// One window against logits that were computed in one forward and scored here.
#[test]
fn a_window_is_scored_from_its_middle_on() {
    let files = Files::new();
    let (rows, width, tokens) = logits(&repo_str(TARGET), STORY);
    let n_ctx = tokens.len();
    fs::write(files.path("one.txt"), STORY).unwrap();
    let (n_ctx_text, one) = (n_ctx.to_string(), files.path("one.txt"));
    let got = files.measure(&["-f", &one, "-c", &n_ctx_text, "-ctk", "f32", "-ctv", "f32"]);
    let scored = n_ctx / 2..n_ctx - 1;
    let nll = |i: usize| -log_softmax(&rows[i * width..(i + 1) * width])[tokens[i + 1] as usize];
    let mean = scored.clone().map(nll).sum::<f64>() / scored.len() as f64;
    assert_eq!((&got["n_scored"], &got["n_chunk"]), (&scored.len().into(), &1.into()));
    let perplexity = got["perplexity"].as_f64().unwrap();
    assert!((perplexity - mean.exp()).abs() < 1e-6 * perplexity, "{perplexity}, expected {}", mean.exp());
    assert!(perplexity < 30.0, "of a text that it knows: {perplexity}");
}

#[test]
fn batches_threads_and_drafters_change_no_bit() {
    let files = Files::new();
    let whole = files.measure(&[]);
    assert!(whole["n_chunk"].as_u64() > Some(4) && whole["perplexity_error"].as_f64() > Some(0.0), "{whole}");
    let drafter = repo_str("models/bundled/drafter.gguf");
    for more in [&["-ub", "7"][..], &["-t", "1"], &["-md", &drafter], &["-np", "3"]] {
        assert_eq!(files.measure(more)["perplexity"], whole["perplexity"], "{more:?}");
    }
    assert_eq!(files.measure(&["--chunks", "2"])["n_scored"], 2 * 31);
}

#[test]
fn divergence_from_a_reference() {
    let files = Files::new();
    let base = files.path("base.kld");
    let exact = files.measure(&["--kl-divergence-base", &base]);
    // Of itself it is nothing at all.
    let same = files.measure(&["--kl-divergence", &base]);
    let kl = |shown: &serde_json::Value, key: &str| shown["kl_divergence"][key].as_f64().unwrap();
    assert_eq!((kl(&same, "mean"), kl(&same, "same_top"), kl(&same, "ln_ratio")), (0.0, 1.0, 0.0));
    assert_eq!(same["kl_divergence"]["quantiles"]["max"], 0.0);
    assert_eq!(same["kl_divergence"]["base_perplexity"], exact["perplexity"]);
    // Cells of fewer bits are further away, each by its bits. The text need not be given again.
    let target = repo_str(TARGET);
    let cells = |ty: &str| {
        let args = ["perplexity", "-m", &target, "--json", "--kl-divergence-base", &base, "--kl-divergence"];
        paceline(&[&args[..], &["-ctk", ty, "-ctv", ty]].concat()).json()
    };
    let (q8, q4) = (cells("q8_0"), cells("q4_0"));
    assert!(kl(&q8, "mean") > 0.0 && kl(&q8, "mean") < 0.01, "{q8}");
    assert!(kl(&q4, "mean") > 3.0 * kl(&q8, "mean") && kl(&q4, "mean") < 0.3, "{q4}");
    assert!(kl(&q8, "same_top") > 0.95 && q8["cache_type_k"] == "q8_0", "{q8}");
    let told = paceline(&["perplexity", "-m", &target, "--kl-divergence", &base, "-ctk", "q4_0"]).ok();
    for part in
        ["perplexity", "q4_0/f16", "KLD, mean", "KLD, 99.9%", "Δp, root mean square", "same likeliest token"]
    {
        assert!(told.contains(part), "{part} in {told}");
    }
    assert_eq!(fs::read_dir(files.0.path()).unwrap().count(), 2, "nothing else is left");

    // Foreign ones are refused, and say why.
    let refused = |more: &[&str], parts: &[&str]| {
        let args = ["perplexity", "--kl-divergence", &base];
        paceline(&[&args[..], more].concat()).fails_with(parts);
    };
    let other = files.path("other.gguf");
    paceline(&["convert", &repo_str("goldens/qwen35"), &other, "--type", "f32"]).ok();
    refused(&["-m", &other], &["base.kld", "vocabulary"]);
    let text = files.path("text.txt");
    fs::write(&text, format!("Another day. {}", STORY.repeat(6))).unwrap();
    refused(&["-m", &target, "-f", &text], &["base.kld", "text is another one"]);
    refused(&["-m", &target, "-c", "32"], &["-c 32", "64"]);
    let bytes = fs::read(&base).unwrap();
    fs::write(&base, &bytes[..bytes.len() - 4]).unwrap();
    refused(&["-m", &target], &["base.kld", "bytes", "damaged"]);
    fs::write(&base, [b"_logits_", &bytes[8..]].concat()).unwrap();
    refused(&["-m", &target], &["llama-perplexity"]);
    fs::write(&base, [b"PACEKLD2", &bytes[8..]].concat()).unwrap();
    refused(&["-m", &target], &["base.kld", "PACEKLD1"]);
}

#[test]
fn refusals() {
    let files = Files::new();
    let (target, story) = (repo_str(TARGET), files.path("story.txt"));
    paceline(&["perplexity", "-m", &target]).fails_with(&["-f"]);
    paceline(&["perplexity", "-m", &target, "-f", &story, "-c", "4000"])
        .fails_with(&["4000 tokens", "hint:"]);
    paceline(&["perplexity", "-m", &target, "-f", &story, "-c", "2"]).fails_with(&["-c 2"]);
    paceline(&["perplexity", "-m", &target, "-f", &story, "--kl-divergence"])
        .fails_with(&["--kl-divergence-base"]);
    paceline(&["perplexity", "-m", &target, "-f", "nowhere.txt"]).fails_with(&["nowhere.txt"]);
}
