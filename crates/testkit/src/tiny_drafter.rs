//! Random DFlash drafters for targets of any size: useless guesses from a forward that has all of its parts.

use paceline_gguf::{GgmlType, Metadata, to_bytes};

use crate::Rng;

/// What a drafter must know of its target.
#[derive(Clone, Copy, Debug)]
pub struct DrafterSizes {
    /// Layers of the target.
    pub n_layer: usize,
    /// Width of its hidden states, an even number.
    pub n_embd: usize,
    /// Its vocabulary.
    pub n_vocab: usize,
}

const N_LAYER: usize = 2;
const N_HEAD: usize = 4;
const N_HEAD_KV: usize = 2;
const HEAD: usize = 10;
const FF: usize = 30;
/// Channels that share a kernel of version 2, its taps, rank and candidates.
const GROUP: usize = 2;
const N_TAP: usize = 2;
const RANK: usize = 5;
const N_TOP: usize = 8;

impl DrafterSizes {
    /// A drafter's file: blocks of 6, taps behind the first and the last layer, a sliding layer and a full one; of version 2
    /// with convolutions and a selector.
    pub fn drafter(&self, is_version2: bool) -> Vec<u8> {
        let &DrafterSizes { n_layer, n_embd, n_vocab } = self;
        let mut meta = Metadata::for_file("drafter.gguf");
        meta.insert("general.architecture", "dflash");
        let mut size = |key: &str, n: usize| meta.insert(format!("dflash.{key}"), n as u32);
        for (key, n) in [
            ("block_count", N_LAYER),
            ("context_length", 512),
            ("embedding_length", n_embd),
            ("feed_forward_length", FF),
            ("attention.head_count", N_HEAD),
            ("attention.head_count_kv", N_HEAD_KV),
            ("attention.key_length", HEAD),
            ("attention.value_length", HEAD),
            ("attention.sliding_window", 8),
            ("block_size", 6),
        ] {
            size(key, n);
        }
        if is_version2 {
            for (key, n) in [
                ("conv_kernel_size", N_TAP),
                ("conv_group_size", GROUP),
                ("selector_rank", RANK),
                ("selector_top_k", N_TOP),
            ] {
                size(key, n);
            }
        }
        meta.insert("dflash.attention.sliding_window_pattern", vec![true, false]);
        meta.insert("dflash.attention.layer_norm_rms_epsilon", 1e-6f32);
        meta.insert("dflash.rope.freq_base", 1e4f32);
        meta.insert("dflash.target_layers", vec![1u32, n_layer as u32]);
        meta.insert("tokenizer.ggml.mask_token_id", 4u32);

        let mut tensors: Vec<(String, Vec<u64>, GgmlType, Vec<u8>)> = Vec::new();
        let mut rng = Rng::new(7);
        // Values around `middle` that keep a product the size of its input.
        let mut tensor = |name: String, shape: &[usize], middle: f32| {
            let spread = (3.0 / if shape.len() > 1 { shape[0] as f32 } else { 12.0 }).sqrt();
            let n: usize = shape.iter().product();
            let unit = |rng: &mut Rng| (rng.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0;
            let data = (0..n).flat_map(|_| (middle + spread * unit(&mut rng)).to_le_bytes()).collect();
            tensors.push((name, shape.iter().map(|&n| n as u64).collect(), GgmlType::F32, data));
        };
        tensor("fc.weight".into(), &[2 * n_embd, n_embd], 0.0);
        tensor("enc.output_norm.weight".into(), &[n_embd], 1.0);
        tensor("output_norm.weight".into(), &[n_embd], 1.0);
        for il in 0..N_LAYER {
            let (q, kv) = (N_HEAD * HEAD, N_HEAD_KV * HEAD);
            for (part, shape) in [
                ("attn_q", [n_embd, q]),
                ("attn_k", [n_embd, kv]),
                ("attn_v", [n_embd, kv]),
                ("attn_output", [q, n_embd]),
                ("ffn_gate", [n_embd, FF]),
                ("ffn_up", [n_embd, FF]),
                ("ffn_down", [FF, n_embd]),
            ] {
                tensor(format!("blk.{il}.{part}.weight"), &shape, 0.0);
            }
            for (part, len) in
                [("attn_norm", n_embd), ("ffn_norm", n_embd), ("attn_q_norm", HEAD), ("attn_k_norm", HEAD)]
            {
                tensor(format!("blk.{il}.{part}.weight"), &[len], 1.0);
            }
            for part in ["attn", "ffn"].into_iter().filter(|_| is_version2) {
                tensor(format!("blk.{il}.{part}_conv_base"), &[n_embd, N_TAP, 2], 0.6);
                let n_delta = 2 * N_TAP * n_embd / GROUP;
                tensor(format!("blk.{il}.{part}_conv_proj.weight"), &[n_embd, n_delta], 0.0);
            }
        }
        if is_version2 {
            tensor("selector_predecessor.weight".into(), &[RANK, n_vocab], 0.0);
            tensor("selector_successor.weight".into(), &[RANK, n_vocab], 0.0);
            tensor("selector_hidden.weight".into(), &[n_embd, RANK], 0.0);
        }
        let tensors: Vec<_> =
            tensors.iter().map(|(name, shape, ty, data)| (name, shape, *ty, data)).collect();
        match to_bytes(&meta, &tensors) {
            Ok(bytes) => bytes,
            Err(error) => panic!("{error}"),
        }
    }
}
