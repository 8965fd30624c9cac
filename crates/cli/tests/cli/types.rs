//! Targets in every type that files come in: they load and run, stay near the exact weights, and their drafter, which
//! was trained with other bits, goes on being right.
//!
//! The bundled target's weights, exact at 8 bits, are the truth. Near is measured as the mean over a text of the
//! Kullback-Leibler divergence of the next token's distribution from the true one, in nats: 0 is exact, and a tenth of it is
//! felt. Bounds lie at about twice what was measured when this was written, which the tables give.

use std::{
    collections::BTreeSet,
    path::Path,
    sync::{Arc, OnceLock},
};

use paceline_backend::{Backend, KvType, PlanBuilder, StateConfig, Step, StepOut, cpu::CpuBackend};
use paceline_gguf::{GgmlType, Gguf, TensorInfo};
use paceline_kernels::formats::{
    FORMATS, format,
    mix::{Assignment, Model, mix},
    quantize_rows,
};
use paceline_memory::Memory;
use paceline_text::{Encode, Tokenizer};

use crate::command::{paceline, repo, repo_str, rewritten};

const TARGET: &str = "models/bundled/target.gguf";

/// Of the kind that the model was trained on, so that it has something to be sure of.
const TEXT: &str = "<|im_start|>user\nWrite a story about a lost kite.<|im_end|>\n<|im_start|>assistant\nOnce upon a \
                    time there was a little girl named Lily. She had a red kite. One day the wind took the kite over the \
                    hill. Lily ran after it. She asked a kind bird for help. The bird saw the kite in a tall tree and brought \
                    it down. Lily said thank you, and they were friends from that day on.<|im_end|>\n";

/// The target with its matrices in the types that `types` gives.
fn requantised(dir: &Path, name: &str, types: &mut dyn FnMut(&TensorInfo) -> Option<GgmlType>) -> String {
    rewritten(TARGET, dir, &format!("{name}.gguf"), &|_| {}, &mut |tensor, data| {
        let is_matrix = tensor.ty == GgmlType::Q8_0;
        let Some(ty) = types(tensor).filter(|_| is_matrix) else { return (tensor.ty, data.to_vec()) };
        let mut values = vec![0.0; tensor.n_elements() as usize];
        (format(tensor.ty).unwrap().dequantize)(data, &mut values);
        (ty, quantize_rows(ty, tensor.shape[0] as usize, &values))
    })
}

/// Logits of each row of a text, `[n_token, n_vocab]`, their width, and the tokens.
pub fn logits(path: &str, text: &str) -> (Vec<f32>, usize, Vec<u32>) {
    let file = Arc::new(Gguf::open(path).unwrap());
    let tokenizer = Tokenizer::from_metadata(file.metadata()).unwrap();
    let tokens = tokenizer.encode(text, Encode { add_bos: true, parse_special: true });
    let n = tokens.len();
    let backend: Arc<dyn Backend> = Arc::new(CpuBackend::new(2).unwrap());
    let model = paceline_models::load(&file, &backend).unwrap_or_else(|error| panic!("{path}: {error}"));
    let mut plan = PlanBuilder::new(&[]);
    let head = model.record(&mut plan);
    let config = StateConfig { kv: KvType::F32.into(), ..StateConfig::default() };
    let states = backend.alloc_states(model.states(), config).unwrap();
    let mut exec = backend.compile(Arc::new(plan.finish(Some(head))), &states).unwrap();
    let mut memory = Memory::new(states, 4096);
    let seq = memory.create();
    memory.prepare(seq, n, n).unwrap();
    let positions: Vec<u32> = (0..n as u32).collect();
    let lanes = [memory.lane(seq, 0)];
    let step =
        Step { tokens: &tokens, inputs: &[], positions: &positions, lanes: &lanes, outputs: &positions };
    let mut out = StepOut::default();
    exec.run(&step, &mut out);
    (out.output, out.output_width, tokens)
}

pub fn log_softmax(row: &[f32]) -> Vec<f64> {
    let max = f64::from(row.iter().copied().fold(f32::MIN, f32::max));
    let sum: f64 = row.iter().map(|&x| (f64::from(x) - max).exp()).sum();
    row.iter().map(|&x| f64::from(x) - max - sum.ln()).collect()
}

/// Mean divergence of the rows of `got` from the exact ones.
fn divergence(got: &[f32]) -> f64 {
    static EXACT: OnceLock<(Vec<f32>, usize)> = OnceLock::new();
    let (exact, width) = EXACT.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let (rows, width, _) = logits(&requantised(dir.path(), "exact", &mut |_| Some(GgmlType::F32)), TEXT);
        (rows, width)
    });
    assert_eq!(got.len(), exact.len());
    let of_row = |(exact, got): (&[f32], &[f32])| -> f64 {
        let (p, q) = (log_softmax(exact), log_softmax(got));
        p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum()
    };
    let rows = exact.chunks_exact(*width).zip(got.chunks_exact(*width));
    rows.map(of_row).sum::<f64>() * *width as f64 / exact.len() as f64
}

/// Runs the file in every way; its divergence may be `bound` and tokens per forward `floor` at least.
fn check(path: &str, bound: f64, floor: f64) {
    let (rows, ..) = logits(path, TEXT);
    let divergence = divergence(&rows);
    let drafter = repo_str("models/bundled/drafter.gguf");
    let run = |drafting: &[&str]| {
        let prompt = "Write a story about a lost kite.";
        let args = ["run", "-m", path, "-p", prompt, "-n", "96", "--temp", "0", "--json"];
        paceline(&[&args[..], drafting].concat()).json()
    };
    let (drafted, plain) = (run(&["-md", &drafter, "--draft-fixed"]), run(&["--no-draft"]));
    assert_eq!(drafted["tokens"], plain["tokens"], "{path}");
    let accept_len = drafted["speculation"]["accept_len"].as_f64().unwrap();
    eprintln!("{path}: divergence {divergence:.6}, {accept_len:.2} tokens per forward");
    assert!(divergence <= bound, "{path}: divergence {divergence}, expected at most {bound}");
    assert!(accept_len >= floor, "{path}: {accept_len} tokens per forward, expected at least {floor}");
}

/// Beside each bound and floor is what was measured.
#[test]
fn targets_in_every_type() {
    use GgmlType::*;
    let bounds = [
        (F32, 1e-6, 4.0),    // 0          5.7
        (F16, 1e-6, 4.0),    // 0.0000003  5.7
        (BF16, 2e-5, 4.0),   // 0.000006   5.7
        (Q8_0, 1e-3, 4.0),   // 0, with room for kernels that round what they multiply  5.7
        (Q6_K, 1.2e-3, 3.0), // 0.0006     5.3
        (Q5_K, 6e-3, 3.0),   // 0.0027     4.2
        (Q5_1, 6e-3, 3.0),   // 0.0024     4.2
        (Q5_0, 6e-3, 3.0),   // 0.0029     5.1
        (Q4_K, 2e-2, 2.5),   // 0.0094     4.0
        (Q4_1, 2e-2, 2.5),   // 0.0099     4.6
        (Q4_0, 3e-2, 2.5),   // 0.0149     4.0
        (IQ4_NL, 3e-2, 2.5), // 0.0148     5.7
        (IQ4_XS, 3e-2, 2.5), // 0.0147     5.7
        (NVFP4, 4e-2, 2.5),  // 0.0177     3.8
        (MXFP4, 6e-2, 2.5),  // 0.0282     3.8
        (Q3_K, 9e-2, 1.2),   // 0.0408     3.3
        (Q2_K, 0.6, 1.2),    // 0.268      2.7
    ];
    assert_eq!(bounds.len(), FORMATS.len(), "each format has its bound");
    // As it came, so that the exact one is held to something too.
    check(&repo_str(TARGET), 1e-3, 4.0);
    let dir = tempfile::tempdir().unwrap();
    for (ty, bound, floor) in bounds {
        let path = requantised(dir.path(), ty.name(), &mut |_| Some(ty));
        check(&path, bound, floor);
    }
}

#[test]
fn targets_in_mixes() {
    let dir = tempfile::tempdir().unwrap();
    for (name, bound, floor) in [
        ("q5_k_m", 4e-3, 3.0),   // 0.0017  5.3
        ("q4_k_m", 1e-2, 2.5),   // 0.0048  5.3
        ("q4_k_s", 1.2e-2, 2.5), // 0.0057  4.4
        ("iq4_xs", 2e-2, 2.5),   // 0.0101  5.3
    ] {
        let file = Gguf::open(repo(TARGET)).unwrap();
        let model = Model::new(file.tensors().iter().map(|tensor| tensor.name.as_str()), 8, 4, 2);
        let mut types = Assignment::new(mix(name).unwrap(), model);
        let mut seen = BTreeSet::new();
        let path = requantised(dir.path(), name, &mut |tensor| {
            let ty = types.next(&tensor.name, &tensor.shape);
            seen.extend(ty);
            ty
        });
        assert!(seen.len() > 1, "{name} is no mix: {seen:?}");
        check(&path, bound, floor);
    }
    // Files whose makers chose a type for each tensor, as in the "UD" ones: here all of more than four bits in turn.
    let mut types = FORMATS.iter().map(|format| format.ty).filter(|ty| bits(*ty) > 4.0).cycle();
    let path = requantised(dir.path(), "each-its-own", &mut |_| types.next());
    check(&path, 1.3e-2, 2.5); // 0.0062  5.3
}

/// Bits of a weight, scales included.
fn bits(ty: GgmlType) -> f64 {
    8.0 * ty.block_bytes() as f64 / ty.block_len() as f64
}
