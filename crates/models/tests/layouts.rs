//! The forms in which files hold the same model: projections packed in other ways, experts fused, any mix of tensor types.
//! What the goldens say of one form holds for the others, because they compute the same.

use std::sync::Arc;

use paceline_backend::{Backend, KvType, PlanBuilder, StateConfig, Step, StepOut, cpu::CpuBackend};
use paceline_convert::{ConvertOptions, convert};
use paceline_gguf::{GgmlType, Gguf, Metadata, to_bytes};
use paceline_kernels::formats::quantize_rows;
use paceline_memory::Memory;
use paceline_testkit::{Golden, goldens_dir};

/// A golden model as a file taken apart.
struct Parts {
    metadata: Metadata,
    tensors: Vec<(String, Vec<u64>, GgmlType, Vec<u8>)>,
}

impl Parts {
    fn of(name: &str) -> Parts {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("model.gguf");
        convert(&ConvertOptions::new(goldens_dir().join(name), &out), |_| {}).unwrap();
        let file = Gguf::open(&out).unwrap();
        let tensor =
            |t: &paceline_gguf::TensorInfo| (t.name.clone(), t.shape.to_vec(), t.ty, file.data(t).to_vec());
        let mut metadata = Metadata::for_file("model.gguf");
        file.metadata().iter().for_each(|(key, value)| metadata.insert(key, value.clone()));
        Parts { metadata, tensors: file.tensors().iter().map(tensor).collect() }
    }

    fn take(&mut self, name: &str) -> (Vec<u64>, Vec<u8>) {
        let at = self.tensors.iter().position(|(n, ..)| n == name).unwrap_or_else(|| panic!("no {name}"));
        let (_, shape, _, data) = self.tensors.remove(at);
        (shape, data)
    }

    fn put(&mut self, name: &str, shape: &[u64], data: Vec<u8>) {
        self.tensors.push((name.to_string(), shape.to_vec(), GgmlType::F32, data));
    }

    fn has(&self, name: &str) -> bool {
        self.tensors.iter().any(|(n, ..)| n == name)
    }

    fn file(&self) -> Arc<Gguf> {
        Arc::new(Gguf::from_bytes("model.gguf", to_bytes(&self.metadata, &self.tensors).unwrap()).unwrap())
    }

    /// Logits of the golden's tokens.
    fn logits(&self, name: &str) -> Result<Vec<f32>, String> {
        self.logits_of(&Golden::open(name).tokens(), usize::MAX)
    }

    /// Logits of tokens, computed so many at a time.
    fn logits_of(&self, tokens: &[u32], n_at_once: usize) -> Result<Vec<f32>, String> {
        let backend: Arc<dyn Backend> = Arc::new(CpuBackend::new(2).unwrap());
        let model = paceline_models::load(&self.file(), &backend).map_err(|e| e.to_string())?;
        let mut p = PlanBuilder::new(&[]);
        let logits = model.record(&mut p);
        let config = StateConfig { page_len: 16, kv: KvType::F32.into(), n_tentative_max: 16 };
        let states = backend.alloc_states(model.states(), config).unwrap();
        let mut exec = backend.compile(Arc::new(p.finish(Some(logits))), &states).unwrap();
        let mut memory = Memory::new(states, 4096);
        let (seq, mut all) = (memory.create(), Vec::new());
        for tokens in tokens.chunks(n_at_once) {
            let (n, past) = (tokens.len(), memory.len(seq) as u32);
            memory.prepare(seq, n, n).unwrap();
            let lanes = [memory.lane(seq, 0)];
            let outputs: Vec<u32> = (0..n as u32).collect();
            let positions: Vec<u32> = outputs.iter().map(|row| past + row).collect();
            let mut out = StepOut::default();
            let step = Step { tokens, inputs: &[], positions: &positions, lanes: &lanes, outputs: &outputs };
            exec.run(&step, &mut out);
            assert!(out.n_experts_read > 0);
            memory.commit(seq, n);
            all.extend(out.output);
        }
        Ok(all)
    }
}

/// Rows `[n, row_bytes]` of several matrices, run by run: of each matrix so many rows in turn.
fn interleave(matrices: &[(&[u8], usize)], n_run: usize, row_bytes: usize) -> Vec<u8> {
    let run = |i: usize| {
        matrices.iter().flat_map(move |(data, n)| &data[i * n * row_bytes..(i + 1) * n * row_bytes])
    };
    (0..n_run).flat_map(run).copied().collect()
}

#[test]
fn old_files_of_qwen3next_interleave_q_k_v_z() {
    const N_KEY: usize = 3;
    const DIM: usize = 8;
    let mut parts = Parts::of("qwen3next");
    let want = parts.logits("qwen3next").unwrap();
    for il in [0, 1, 2, 4, 5] {
        let ([n_embd, _], qkv) = {
            let (shape, data) = parts.take(&format!("blk.{il}.attn_qkv.weight"));
            (<[u64; 2]>::try_from(shape).unwrap(), data)
        };
        let (_, z) = parts.take(&format!("blk.{il}.attn_gate.weight"));
        let row_bytes = 4 * n_embd as usize;
        let (q, kv) = qkv.split_at(N_KEY * DIM * row_bytes);
        let (k, v) = kv.split_at(N_KEY * DIM * row_bytes);
        let all = interleave(&[(q, DIM), (k, DIM), (v, 2 * DIM), (&z, 2 * DIM)], N_KEY, row_bytes);
        parts.put(&format!("blk.{il}.ssm_in.weight"), &[n_embd, 6 * DIM as u64 * N_KEY as u64], all);
    }
    assert!(parts.has("blk.0.ssm_ba.weight"));
    assert_eq!(parts.logits("qwen3next").unwrap(), want);
}

#[test]
fn gate_and_up_of_experts_may_be_one_tensor() {
    for (name, n_layer) in [("qwen3moe", 4), ("qwen35moe", 7)] {
        let mut parts = Parts::of(name);
        let want = parts.logits(name).unwrap();
        for il in 0..n_layer {
            let (shape, gate) = parts.take(&format!("blk.{il}.ffn_gate_exps.weight"));
            let (_, up) = parts.take(&format!("blk.{il}.ffn_up_exps.weight"));
            let [n_embd, n_ff, n_expert] = shape[..].try_into().unwrap();
            let rows = n_ff as usize;
            let both = interleave(&[(&gate, rows), (&up, rows)], n_expert as usize, 4 * n_embd as usize);
            parts.put(&format!("blk.{il}.ffn_gate_up_exps.weight"), &[n_embd, 2 * n_ff, n_expert], both);
        }
        assert_eq!(parts.logits(name).unwrap(), want, "{name}");
    }
}

#[test]
fn the_gate_of_the_shared_expert_may_be_a_vector() {
    let mut parts = Parts::of("qwen35moe");
    let want = parts.logits("qwen35moe").unwrap();
    for (name, shape, ..) in &mut parts.tensors {
        if name.ends_with("ffn_gate_inp_shexp.weight") {
            assert_eq!(shape.pop(), Some(1));
        }
    }
    assert_eq!(parts.logits("qwen35moe").unwrap(), want);
}

#[test]
fn keys_choose_how_experts_are_weighed() {
    let with = |key: &str, value: paceline_gguf::Value| {
        let mut parts = Parts::of("qwen3moe");
        parts.metadata.insert(format!("qwen3moe.{key}"), value);
        parts.logits("qwen3moe")
    };
    let plain = Parts::of("qwen3moe").logits("qwen3moe").unwrap();
    for (key, value) in [("expert_weights_scale", 0.0f32.into()), ("expert_weights_scale", 1.0f32.into())] {
        assert_eq!(with(key, value).unwrap(), plain, "{key}: none");
    }
    assert_eq!(with("expert_weights_norm", true.into()).unwrap(), plain);
    assert_eq!(with("expert_gating_func", 1u32.into()).unwrap(), plain);
    for (key, value) in [
        ("expert_weights_scale", 2.5f32.into()),
        ("expert_weights_norm", false.into()),
        ("expert_gating_func", 2u32.into()),
        ("expert_used_count", 2u32.into()),
    ] {
        assert_ne!(with(key, value).unwrap(), plain, "{key}");
    }
    let message = |key: &str, value: paceline_gguf::Value| with(key, value).unwrap_err();
    let used = message("expert_used_count", 8u32.into());
    assert!(used.contains("qwen3moe.expert_used_count: expected 1 to the 7 experts"), "{used}");
    let gating = message("expert_gating_func", 9u32.into());
    assert!(gating.contains("expected 1 (softmax) or 2 (sigmoid), found 9"), "{gating}");
    let width = message("expert_feed_forward_length", 29u32.into());
    let want =
        "`blk.0.ffn_gate_exps.weight`: expected shape [48, 29, 7] (n_embd, n_ff of an expert, n_expert)";
    assert!(width.contains(want), "{width}");
}

#[test]
fn a_layer_without_a_router_is_dense() {
    let mut parts = Parts::of("qwen3moe");
    let moe = parts.logits("qwen3moe").unwrap();
    for part in ["gate_inp", "gate_exps", "up_exps", "down_exps"] {
        parts.take(&format!("blk.1.ffn_{part}.weight"));
    }
    assert!(parts.logits("qwen3moe").unwrap_err().contains("blk.1.ffn_gate.weight"));
    for (part, shape) in [("gate", [48, 64]), ("up", [48, 64]), ("down", [64, 48])] {
        let values = (0..48 * 64u32).flat_map(|i| ((i * 37 % 101) as f32 * 1e-3 - 0.05).to_le_bytes());
        parts.put(&format!("blk.1.ffn_{part}.weight"), &shape, values.collect());
    }
    let dense = parts.logits("qwen3moe").unwrap();
    assert!(dense.iter().all(|x| x.is_finite()) && dense != moe);
}

/// As quantisers that weigh tensors by importance make them: no two alike, down projections in formats of 32.
#[test]
fn every_tensor_may_have_a_type_of_its_own() {
    use GgmlType::*;
    const N_EXPERT: u64 = 6;
    let mut parts = Parts::of("qwen35moe");
    for (key, n) in [
        ("embedding_length", 256),
        ("expert_feed_forward_length", 96),
        ("expert_shared_feed_forward_length", 256),
        ("expert_count", N_EXPERT as u32),
        ("expert_used_count", 2),
    ] {
        parts.metadata.insert(format!("qwen35moe.{key}"), n);
    }
    let of_256 = [Q4_K, Q6_K, IQ4_XS, Q3_K, Q5_K, Q2_K, Q8_0, MXFP4, BF16];
    let of_32 = [Q5_0, Q8_0, IQ4_NL, Q5_1, F16, Q4_1, Q4_0];
    let mut seed = 1u32;
    for (i, (name, shape, ty, data)) in parts.tensors.iter_mut().enumerate() {
        for n in shape.iter_mut() {
            *n = match *n {
                44 => 256,
                20 => 96,
                36 => 256,
                9 if name.contains("ffn_") => N_EXPERT,
                n => n,
            };
        }
        let n_in = shape[0] as usize;
        *ty = match n_in {
            _ if shape.len() == 1 || name.contains("ssm_conv") || name.contains("gate_inp") => F32,
            256 => of_256[i % of_256.len()],
            96 => of_32[i / 3 % of_32.len()],
            _ => F32,
        };
        let norm = name.ends_with("norm.weight");
        let size = if norm { 0.3 } else { 1.7 / (n_in as f32).sqrt() };
        let values: Vec<f32> = (0..shape.iter().product::<u64>())
            .map(|_| {
                seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let x = size * (2.0 * (seed >> 8) as f32 / (1 << 24) as f32 - 1.0);
                // Decay rates are negative.
                if norm {
                    1.0 + x
                } else if name.ends_with("ssm_a") {
                    -x.abs()
                } else {
                    x
                }
            })
            .collect();
        *data = quantize_rows(*ty, n_in, &values);
    }
    let mut types: Vec<GgmlType> = parts.tensors.iter().map(|(_, _, ty, _)| *ty).collect();
    types.sort();
    types.dedup();
    assert!(types.len() > 14, "{types:?}");
    let tokens: Vec<u32> = (0..40).map(|i| i * 31 % 100).collect();
    let want = parts.logits_of(&tokens, usize::MAX).unwrap();
    assert!(want.iter().all(|x| x.is_finite()));
    for n_at_once in [1, 3, 16] {
        assert!(parts.logits_of(&tokens, n_at_once).unwrap() == want, "{n_at_once} at once");
    }
}
