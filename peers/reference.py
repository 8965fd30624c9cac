"""Checkpoints with random weights, and what PyTorch computes with any checkpoint: the third side of `peers logits`.

    python reference.py random qwen35moe DIR                    # a checkpoint that every type of tensor fits
    python reference.py logits DIR --out FILE [--text TEXT]     # `tokens` [n] and `logits` [n, n_vocab], in f32

The configurations are those of goldens/make.py, widened: heads, experts and rows that block formats and llama.cpp's kernels
take. Every parameter is random there, also the ones that start as zeros or ones.
"""
import argparse
import pathlib
import sys

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "goldens"))
import make  # noqa: E402
import tiny_tokenizer  # noqa: E402

N_VOCAB = 512
WIDE = dict(vocab_size=N_VOCAB, hidden_size=256, intermediate_size=512)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=64)
DELTA = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=128, linear_value_head_dim=128)
EXPERTS = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=256)
SHARED = dict(shared_expert_intermediate_size=256)
MROPE = dict(rope_parameters={"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25,
                              "mrope_interleaved": True, "mrope_section": [3, 3, 2]})
PART = dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25})
GEMMA = dict(sliding_window=32, global_head_dim=128, final_logit_softcapping=6.0)
KEYS_ARE_VALUES = dict(attention_k_eq_v=True, num_global_key_value_heads=1)
# The golden whose configuration is widened -> what replaces its sizes. Tokens beyond 256 make more than one page of cells.
TARGETS = {
    "llama": WIDE | HEADS,
    "qwen3": WIDE | HEADS,
    "qwen3moe": WIDE | HEADS | EXPERTS,
    "qwen35": WIDE | HEADS | DELTA | MROPE,
    "qwen35moe": WIDE | HEADS | DELTA | EXPERTS | SHARED | MROPE,
    "qwen3next": WIDE | HEADS | DELTA | EXPERTS | SHARED | PART,
    "gemma4": WIDE | HEADS | GEMMA | KEYS_ARE_VALUES,
    # llama.cpp takes it that the last layers with keys and values of their own are a sliding and then a full one.
    "gemma4-e": WIDE | HEADS | GEMMA | dict(
        hidden_size_per_layer_input=64, vocab_size_per_layer_input=N_VOCAB, num_hidden_layers=8,
        layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * 2),
    "gemma4-moe": WIDE | HEADS | GEMMA | KEYS_ARE_VALUES | dict(num_experts=8, top_k_experts=2, moe_intermediate_size=256),
}


def widen(model, sizes):
    """A model of the same class whose configuration has these sizes."""
    config = model.config.to_dict() | sizes
    config.pop("per_layer_config", None)
    return type(model)(type(model.config)(**config))


def random(name, folder):
    pre, build, seed = make.TARGETS[name]
    ids = tiny_tokenizer.build(pre, folder)
    model = widen(build(ids), TARGETS[name]).float().eval()
    make.randomise(model, seed)
    if model.config.tie_word_embeddings and "Gemma" not in type(model).__name__:
        # Logits near 1, as an untied head has them.
        model.model.embed_tokens.weight.data.div_(model.config.hidden_size ** 0.5)
    model.save_pretrained(folder)
    print(f"{folder}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")


@torch.no_grad()
def logits(folder, out, text, n_token):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.config._experts_implementation = "eager"
    if text:
        ids = AutoTokenizer.from_pretrained(folder)(text.read_text(), add_special_tokens=False).input_ids
        tokens = torch.tensor(ids[:n_token])
    else:
        # Below the special tokens of the tokenizers of goldens/.
        tokens = torch.from_numpy(np.random.default_rng(1).integers(16, 96, n_token))
    z = model(input_ids=tokens[None], use_cache=False).logits[0].float()
    nll = torch.nn.functional.cross_entropy(z[:-1], tokens[1:])
    print(f"{folder}: {len(tokens)} tokens, perplexity {nll.exp():.4f}, deviation of a row {z.std(-1).mean():.2f}")
    save_file({"tokens": tokens.to(torch.int32), "logits": z.contiguous()}, out)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = ap.add_subparsers(dest="command", required=True)
    p = sub.add_parser("random")
    p.add_argument("name", choices=TARGETS)
    p.add_argument("folder", type=pathlib.Path)
    p = sub.add_parser("logits")
    p.add_argument("folder", type=pathlib.Path)
    p.add_argument("--out", type=pathlib.Path, required=True)
    p.add_argument("--text", type=pathlib.Path)
    p.add_argument("--tokens", type=int, default=512)
    a = ap.parse_args()
    torch.set_num_threads(1)
    if a.command == "random":
        random(a.name, a.folder)
    else:
        logits(a.folder, a.out, a.text, a.tokens)


if __name__ == "__main__":
    main()
