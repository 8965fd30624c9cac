//! Quantising GGUF files: what changes, what stays, and that what is said of columns counts.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use paceline_convert::quantize::{QuantizeOptions, plan};
use paceline_convert::{Sums, write_importances};
use paceline_gguf::GgmlType::{self, *};
use paceline_gguf::{Gguf, Metadata, to_bytes};
use paceline_kernels::formats::{format, mix::MIXES, quantize_rows, quantize_rows_weighted};
use tempfile::TempDir;

/// A small model with all that needs care: a norm, a bias, a router, a convolution, a row length that is no block, experts, a
/// prediction head, and bits of two kinds.
const TENSORS: &[(&str, &[u64], GgmlType)] = &[
    ("token_embd.weight", &[256, 40], BF16),
    ("output_norm.weight", &[256], F32),
    ("output.weight", &[256, 40], BF16),
    ("blk.0.attn_q.weight", &[256, 300], BF16),
    ("blk.0.attn_q.bias", &[300], F32),
    ("blk.0.attn_v.weight", &[256, 64], F16),
    ("blk.0.ssm_conv1d.weight", &[4, 64], F32),
    ("blk.0.attn_conv_base", &[256, 2, 2], F32),
    ("blk.0.ffn_gate_inp.weight", &[256, 3], F32),
    ("blk.0.ffn_up_exps.weight", &[256, 96, 3], BF16),
    ("blk.0.ffn_down_exps.weight", &[96, 256, 3], F32),
    ("blk.1.nextn.eh_proj.weight", &[512, 256], BF16),
    ("blk.1.nextn.enorm.weight", &[256], BF16),
];

/// Sums of four uniform numbers, as good as normal; the same each time.
fn noise(name: &str, n: usize) -> Vec<f32> {
    let mut state =
        name.bytes().fold(88172645463325252u64, |s, b| (s ^ u64::from(b)).wrapping_mul(0x100000001b3));
    let mut uniform = move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u32 << 24) as f32 - 0.5
    };
    (0..n).map(|_| uniform() + uniform() + uniform() + uniform()).collect()
}

fn metadata() -> Metadata {
    let mut metadata = Metadata::new();
    metadata.insert("general.architecture", "tiny");
    metadata.insert("tiny.block_count", 2u32);
    metadata.insert("tiny.attention.head_count", 4u32);
    metadata.insert("general.file_type", 32u32);
    metadata.insert("tokenizer.ggml.tokens", vec![b"a".to_vec(), vec![0xff, 0]]);
    metadata
}

fn tensors(range: std::ops::Range<usize>) -> Vec<(&'static str, &'static [u64], GgmlType, Vec<u8>)> {
    let of = |&(name, shape, ty): &(&'static str, &'static [u64], GgmlType)| {
        let values = noise(name, shape.iter().product::<u64>() as usize);
        (name, shape, ty, quantize_rows(ty, shape[0] as usize, &values))
    };
    TENSORS[range].iter().map(of).collect()
}

struct Files(TempDir);

impl Files {
    fn new() -> Files {
        let files = Files(tempfile::tempdir().unwrap());
        fs::write(files.path("in.gguf"), to_bytes(&metadata(), &tensors(0..TENSORS.len())).unwrap()).unwrap();
        files
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn quantize(&self, input: &str, out: &str, options: &QuantizeOptions) -> Result<Gguf, String> {
        let plan = plan(Gguf::open(self.path(input)).unwrap(), options).map_err(|e| e.to_string())?;
        let mut seen = Vec::new();
        plan.write(&self.path(out), |p| seen.push((p.tensor.to_string(), p.done_bytes, p.total_bytes)))
            .map_err(|e| e.to_string())?;
        let (last, done, total) = seen.pop().unwrap();
        assert!(last.is_empty() && done == total && seen.len() == plan.tensors().count());
        assert_eq!(fs::metadata(self.path(out)).unwrap().len(), plan.file_bytes());
        Ok(Gguf::open(self.path(out)).unwrap())
    }

    fn importances(&self, name: &str, entries: &[(&str, Sums)]) -> QuantizeOptions {
        let sums: BTreeMap<String, Sums> =
            entries.iter().map(|(tensor, sums)| (tensor.to_string(), sums.clone())).collect();
        write_importances(&self.path(name), &sums, "a text", 7, 512).unwrap();
        QuantizeOptions { importances: Some(self.path(name)), ..QuantizeOptions::new("q4_k_m") }
    }
}

fn types(file: &Gguf) -> Vec<GgmlType> {
    file.tensors().iter().map(|tensor| tensor.ty).collect()
}

fn values(file: &Gguf, name: &str) -> Vec<f32> {
    let tensor = file.require_tensor(name).unwrap();
    let mut values = vec![0.0; tensor.n_elements() as usize];
    (format(tensor.ty).unwrap().dequantize)(file.data(tensor), &mut values);
    values
}

fn error(file: &Gguf, name: &str, weights: Option<&[f32]>) -> f64 {
    let n = values(file, name).len();
    let truth = noise(name, n);
    let term = |(i, (x, y)): (usize, (&f32, &f32))| {
        let w = weights.map_or(1.0, |w| w[i % w.len()]);
        (f64::from(w * (x - y) * (x - y)), f64::from(w * x * x))
    };
    let (e, all) = truth
        .iter()
        .zip(&values(file, name))
        .enumerate()
        .map(term)
        .fold((0.0, 0.0), |a, b| (a.0 + b.0, a.1 + b.1));
    (e / all).sqrt()
}

#[test]
fn matrices_change_and_the_rest_keeps_every_bit() {
    let files = Files::new();
    let source = Gguf::open(files.path("in.gguf")).unwrap();
    let out = files.quantize("in.gguf", "out.gguf", &QuantizeOptions::new("Q4_K_M")).unwrap();
    let expected = [Q4_K, F32, Q6_K, Q4_K, F32, Q6_K, F32, F32, F32, Q4_K, Q5_0, Q4_K, BF16];
    assert_eq!(types(&out), expected);
    for (before, after) in source.tensors().iter().zip(out.tensors()) {
        assert_eq!((&before.name, &before.shape), (&after.name, &after.shape));
        if before.ty == after.ty {
            assert!(source.data(before) == out.data(after), "{}", before.name);
        } else {
            assert!(error(&out, &after.name, None) < 0.08, "{}", after.name);
        }
    }
    let mut kept = metadata();
    kept.insert("general.file_type", 15u32);
    kept.insert("general.quantization_version", 2u32);
    assert_eq!(*out.metadata(), kept);
    let names: Vec<String> = fs::read_dir(files.0.path())
        .unwrap()
        .map(|f| f.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(names.len(), 2, "nothing else is left: {names:?}");
}

#[test]
fn a_fallback_is_told() {
    let files = Files::new();
    let plan = plan(Gguf::open(files.path("in.gguf")).unwrap(), &QuantizeOptions::new("q4_k_m")).unwrap();
    let fallen: Vec<_> = plan
        .tensors()
        .filter_map(|(info, tensor)| Some((info.name.as_str(), tensor.instead_of?, tensor.to)))
        .collect();
    assert_eq!(fallen, [("blk.0.ffn_down_exps.weight", Q4_K, Q5_0)]);
}

/// Every mix that can be asked for works, errs no more than its types do, and tells its number.
#[test]
fn every_mix() {
    let files = Files::new();
    for mix in MIXES {
        let out = files.quantize("in.gguf", "out.gguf", &QuantizeOptions::new(mix.name)).unwrap();
        assert_eq!(out.metadata().u32("general.file_type").unwrap(), Some(mix.file_type));
        let bound = match mix.base().bits_per_weight() {
            16.0.. => 0.002,
            8.0.. => 0.0065,
            6.5.. => 0.018,
            5.0.. => 0.075,
            4.25.. => 0.12,
            3.0.. => 0.16,
            _ => 0.29,
        };
        let error = error(&out, "blk.0.attn_q.weight", None);
        assert!(error <= bound, "{}: {error}", mix.name);
    }
}

#[test]
fn threads_leave_no_trace() {
    let files = Files::new();
    let bytes = |n_thread: usize| {
        files
            .quantize("in.gguf", "out.gguf", &QuantizeOptions { n_thread, ..QuantizeOptions::new("q3_k_m") })
            .unwrap();
        fs::read(files.path("out.gguf")).unwrap()
    };
    let one = bytes(1);
    assert!(one == bytes(2) && one == bytes(5) && one == bytes(0));
}

#[test]
fn shards_become_one_file() {
    let files = Files::new();
    for (no, range) in [(0u16, 0..5), (1, 5..TENSORS.len())] {
        let mut shard = if no == 0 { metadata() } else { Metadata::new() };
        shard.insert("split.no", no);
        shard.insert("split.count", 2u16);
        shard.insert("split.tensors.count", TENSORS.len() as i32);
        let path = files.path(&format!("in-{:05}-of-00002.gguf", no + 1));
        fs::write(path, to_bytes(&shard, &tensors(range)).unwrap()).unwrap();
    }
    let read = |input: &str, ty: &str| {
        files.quantize(input, "out.gguf", &QuantizeOptions::new(ty)).unwrap();
        fs::read(files.path("out.gguf")).unwrap()
    };
    assert!(read("in-00001-of-00002.gguf", "q5_k_s") == read("in.gguf", "q5_k_s"));
    assert!(
        read("in-00002-of-00002.gguf", "copy") == fs::read(files.path("in.gguf")).unwrap(),
        "merged, and no more"
    );
}

#[test]
fn what_is_quantised_is_not_quantised_again_unasked() {
    let files = Files::new();
    files.quantize("in.gguf", "q8.gguf", &QuantizeOptions::new("q8_0")).unwrap();
    let refused = files.quantize("q8.gguf", "out.gguf", &QuantizeOptions::new("q4_0")).unwrap_err();
    for part in ["q8.gguf", "token_embd.weight", "q8_0", "q4_0", "--allow-requantize"] {
        assert!(refused.contains(part), "{part} in {refused}");
    }
    assert!(!files.path("out.gguf").exists());
    let insist = QuantizeOptions { allow_requantize: true, ..QuantizeOptions::new("q4_0") };
    assert!(files.quantize("q8.gguf", "out.gguf", &insist).is_ok());
    // To the type that it has, nothing is done.
    let same = files.quantize("q8.gguf", "again.gguf", &QuantizeOptions::new("q8_0")).unwrap();
    assert_eq!(same.tensors().len(), TENSORS.len());
    assert!(fs::read(files.path("again.gguf")).unwrap() == fs::read(files.path("q8.gguf")).unwrap());
}

#[test]
fn importances_guide_the_fit() {
    let files = Files::new();
    let name = "blk.0.attn_q.weight";
    let means: Vec<f32> = noise("means", 256).iter().map(|x| (4.0 * x).exp()).collect();
    let sums = Sums { squares: means.iter().map(|x| x * 32.0).collect(), counts: vec![32.0] };
    let told = files.quantize("in.gguf", "out.gguf", &files.importances("i.gguf", &[(name, sums)])).unwrap();
    let plain = files.quantize("in.gguf", "plain.gguf", &QuantizeOptions::new("q4_k_m")).unwrap();
    let (with, without) = (error(&told, name, Some(&means)), error(&plain, name, Some(&means)));
    assert!(with < 0.9 * without, "{with} with importances, {without} without");
    // Counts divide: the bytes are those of the means.
    let exact =
        quantize_rows_weighted(Q4_K, &means, &values(&Gguf::open(files.path("in.gguf")).unwrap(), name));
    assert!(told.data(told.require_tensor(name).unwrap()) == exact);
    // Others are as before, and the file says where it comes from.
    let other = "blk.1.nextn.eh_proj.weight";
    assert!(values(&told, other) == values(&plain, other));
    let meta = told.metadata();
    assert_eq!(meta.str("quantize.imatrix.file").unwrap(), Some("i.gguf"));
    assert_eq!(meta.str("quantize.imatrix.dataset").unwrap(), Some("a text"));
    assert_eq!(meta.u32("quantize.imatrix.chunks_count").unwrap(), Some(7));

    // The binary form says the same.
    let mut binary = 1i32.to_le_bytes().to_vec();
    binary.extend((name.len() as i32).to_le_bytes());
    binary.extend(name.bytes());
    binary.extend(32i32.to_le_bytes());
    binary.extend(256i32.to_le_bytes());
    means.iter().for_each(|x| binary.extend((x * 32.0).to_le_bytes()));
    let options =
        QuantizeOptions { importances: Some(files.path("i.dat")), ..QuantizeOptions::new("q4_k_m") };
    fs::write(files.path("i.dat"), &binary).unwrap();
    let same = files.quantize("in.gguf", "binary.gguf", &options).unwrap();
    assert!(values(&same, name) == values(&told, name));
    binary.extend(7i32.to_le_bytes());
    binary.extend(6i32.to_le_bytes());
    binary.extend(b"a text");
    fs::write(files.path("i.dat"), &binary).unwrap();
    let same = files.quantize("in.gguf", "binary.gguf", &options).unwrap();
    assert_eq!(same.metadata().u32("quantize.imatrix.chunks_count").unwrap(), Some(7));
    assert_eq!(same.metadata().str("quantize.imatrix.dataset").unwrap(), Some("a text"));
    // Cut anywhere, it is refused; a file of something else too.
    for len in [0, 3, 10, 40, binary.len() - 1] {
        fs::write(files.path("i.dat"), &binary[..len]).unwrap();
        let refused = files.quantize("in.gguf", "x.gguf", &options).unwrap_err();
        assert!(refused.contains("i.dat") && refused.contains("importance matrix"), "{len}: {refused}");
    }
    let model = QuantizeOptions { importances: Some(files.path("in.gguf")), ..options };
    assert!(files.quantize("in.gguf", "x.gguf", &model).unwrap_err().contains("importance matrix"));
}

/// Each expert has columns of its own, and one that no token came to is fitted as if all were equal.
#[test]
fn experts_have_importances_of_their_own() {
    let files = Files::new();
    let name = "blk.0.ffn_up_exps.weight";
    let squares: Vec<f32> = noise("experts", 3 * 256).iter().map(|x| (4.0 * x).exp()).collect();
    let sums = Sums { squares: squares.clone(), counts: vec![1.0, 0.0, 4.0] };
    let told = files.quantize("in.gguf", "out.gguf", &files.importances("i.gguf", &[(name, sums)])).unwrap();
    let x = values(&Gguf::open(files.path("in.gguf")).unwrap(), name);
    let mut exact = Vec::new();
    for (e, x) in x.chunks(256 * 96).enumerate() {
        let means: Vec<f32> = match e {
            0 => squares[..256].to_vec(),
            1 => vec![1.0; 256],
            _ => squares[512..].iter().map(|x| x / 4.0).collect(),
        };
        exact.extend(quantize_rows_weighted(Q4_K, &means, x));
    }
    assert!(told.data(told.require_tensor(name).unwrap()) == exact);
}

#[test]
fn importances_of_another_model_are_refused() {
    let files = Files::new();
    let sums = |n: usize| Sums { squares: vec![1.0; n], counts: vec![1.0] };
    let check = |entries: &[(&str, Sums)], parts: &[&str]| {
        let refused = files.quantize("in.gguf", "x.gguf", &files.importances("i.gguf", entries)).unwrap_err();
        assert!(parts.iter().all(|part| refused.contains(part)), "{refused}");
    };
    check(&[("blk.7.attn_q.weight", sums(256))], &["i.gguf", "another model"]);
    check(&[("blk.0.attn_q.weight", sums(512))], &["i.gguf", "blk.0.attn_q.weight", "256", "512"]);
    let nan = Sums { squares: vec![f32::NAN; 256], counts: vec![1.0] };
    check(&[("blk.0.attn_q.weight", nan)], &["i.gguf", "blk.0.attn_q.weight", "NaN"]);
    assert!(!files.path("x.gguf").exists());
    // What is written for the embedding counts tokens, not columns.
    let options =
        files.importances("i.gguf", &[("token_embd.weight", sums(40)), ("output.weight", sums(256))]);
    assert!(files.quantize("in.gguf", "x.gguf", &options).is_ok());
}

#[test]
fn refusals() {
    let files = Files::new();
    let check = |options: &QuantizeOptions, part: &str| {
        let refused = files.quantize("in.gguf", "x.gguf", options).unwrap_err();
        assert!(refused.contains(part), "{refused}");
        assert!(!files.path("x.gguf").exists());
    };
    check(&QuantizeOptions::new("q9_z"), "q4_k_m");
    let with = |pattern: &str, ty| QuantizeOptions {
        tensor_types: vec![(pattern.to_string(), ty)],
        ..QuantizeOptions::new("q8_0")
    };
    check(&with("attn_(", Q8_0), "attn_(");
    check(&with("attn_q", IQ2_XXS), "iq2_xxs");
    let missing =
        QuantizeOptions { importances: Some(PathBuf::from("nowhere")), ..QuantizeOptions::new("q8_0") };
    check(&missing, "nowhere");
    assert!(Path::new("nowhere").metadata().is_err());
}
