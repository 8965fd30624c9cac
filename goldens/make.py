"""Makes the golden models of this folder: tiny random checkpoints and what the reference computes with them.

    HF_HUB_OFFLINE=1 python make.py            # all folders
    HF_HUB_OFFLINE=1 python make.py llama      # one

Every dimension is chosen so that mixing up two of them breaks a shape or a value, and every parameter is
random, the ones that start as zeros or ones too (norms, dt_bias, A_log): defaults hide bugs.
Everything is seeded: a second run writes the same bytes.
"""
import json
import pathlib
import sys

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from transformers import (Gemma4AssistantConfig, Gemma4AssistantForCausalLM, Gemma4ForCausalLM, Gemma4TextConfig, LlamaConfig, LlamaForCausalLM, Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM,
                          Qwen3_5MoeTextConfig, Qwen3_5TextConfig, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig,
                          Qwen3MoeForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM)

import dflash2_reference
import dflash_reference
import mtp_reference
import tiny_tokenizer

HERE = pathlib.Path(__file__).parent
N_TOKENS = 75


def layer_kinds(n_layer: int, interval: int) -> list[str]:
    return ["full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(n_layer)]


# Of a trained context of 32, so that 75 tokens lie beyond it: the first pair keeps its frequency, the next is blended.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def qwen35(ids, n_layer, interval, hk, hv, tied, vocab, **rope):
    return Qwen3_5ForCausalLM(Qwen3_5TextConfig(
        vocab_size=vocab, hidden_size=40, intermediate_size=68, num_hidden_layers=n_layer,
        layer_types=layer_kinds(n_layer, interval), num_attention_heads=6, num_key_value_heads=2, head_dim=12,
        linear_num_key_heads=hk, linear_num_value_heads=hv, linear_key_head_dim=10, linear_value_head_dim=10,
        linear_conv_kernel_dim=4, tie_word_embeddings=tied, max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5,
                         "mrope_interleaved": True, "mrope_section": [1, 1, 1]} | rope,
        bos_token_id=None, eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"]))


def qwen3(ids, **rope):
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=121, hidden_size=56, intermediate_size=72, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=2, head_dim=20, tie_word_embeddings=False, max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6} | rope,
        bos_token_id=None, eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"]))


def llama(ids, **rope):
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=127, hidden_size=42, intermediate_size=72, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=3, head_dim=12, tie_word_embeddings=True, max_position_embeddings=512, rms_norm_eps=1e-5,
        # With 6 frequencies and these bounds one is kept, one is blended and four are divided by the factor.
        rope_parameters={"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 32} if not rope else {"rope_theta": 10000.0} | rope,
        bos_token_id=ids["<|begin_of_text|>"], eos_token_id=ids["<|eot_id|>"]))


def qwen3moe(ids):
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(
        vocab_size=125, hidden_size=48, intermediate_size=64, moe_intermediate_size=28, num_experts=7,
        num_experts_per_tok=3, norm_topk_prob=True, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2,
        head_dim=20, tie_word_embeddings=False, max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=None, eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"]))


def qwen35moe(ids, n_layer=7):
    return Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(
        vocab_size=129, hidden_size=44, moe_intermediate_size=20, shared_expert_intermediate_size=36, num_experts=9,
        num_experts_per_tok=4, num_hidden_layers=n_layer, layer_types=layer_kinds(n_layer, 3), num_attention_heads=6,
        num_key_value_heads=2, head_dim=12, linear_num_key_heads=2, linear_num_value_heads=6, linear_key_head_dim=10,
        linear_value_head_dim=10, linear_conv_kernel_dim=4, tie_word_embeddings=False, max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5,
                         "mrope_interleaved": True, "mrope_section": [1, 1, 1]},
        bos_token_id=None, eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"]))


def qwen3next(ids):
    return Qwen3NextForCausalLM(Qwen3NextConfig(
        vocab_size=123, hidden_size=36, intermediate_size=52, moe_intermediate_size=24,
        shared_expert_intermediate_size=40, num_experts=6, num_experts_per_tok=2, norm_topk_prob=True,
        num_hidden_layers=6, layer_types=layer_kinds(6, 4), num_attention_heads=4, num_key_value_heads=2, head_dim=14,
        linear_num_key_heads=3, linear_num_value_heads=6, linear_key_head_dim=8, linear_value_head_dim=8,
        linear_conv_kernel_dim=4, tie_word_embeddings=False, max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 6 / 14},
        bos_token_id=None, eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"]))


def gemma4(ids, kinds, **extra):
    """`kinds`: one letter a layer, s for sliding and f for full. The window is smaller than the 75 tokens, the cap near
    the logits, the head of a full layer wider, and of its 10 (or 9) pairs of dimensions few turn."""
    names = {"s": "sliding_attention", "f": "full_attention"}
    sizes = dict(hidden_size=44, intermediate_size=76, num_attention_heads=6, num_key_value_heads=3, head_dim=12,
                 global_head_dim=20, sliding_window=11, final_logit_softcapping=3.5, hidden_size_per_layer_input=0,
                 vocab_size=133) | extra
    return Gemma4ForCausalLM(Gemma4TextConfig(
        num_hidden_layers=len(kinds), layer_types=[names[k] for k in kinds], tie_word_embeddings=True,
        max_position_embeddings=512, bos_token_id=ids["<bos>"], eos_token_id=[ids["<eos>"], ids["<turn|>"]],
        pad_token_id=ids["<pad>"], rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.3}},
        **sizes))


# Tokenizer, model, seed.
TARGETS = {
    # 7 layers and an interval of 3: the last layer is a linear one. R = Hv/Hk = 3 differs from Hk = 2.
    "qwen35": ("qwen35", lambda ids: qwen35(ids, 7, 3, 2, 6, False, 131), 100),
    "qwen35-tied": ("qwen35", lambda ids: qwen35(ids, 5, 4, 3, 6, True, 119), 101),
    "qwen3": ("qwen2", qwen3, 102),
    "llama": ("llama-bpe", llama, 103),
    # Beyond the trained context, in the ways that metadata describe; a stretch of attention that is not the paper's own.
    "qwen3-yarn": ("qwen2", lambda ids: qwen3(ids, **YARN, beta_fast=8.0, beta_slow=0.5, attention_factor=1.3), 105),
    "qwen35-yarn": ("qwen35", lambda ids: qwen35(ids, 4, 2, 2, 6, False, 131, **YARN), 106),
    "llama-linear": ("llama-bpe", lambda ids: llama(ids, rope_type="linear", factor=4.0), 107),
    # With a prediction head, which transformers leaves out and `make_head` adds.
    "qwen35-mtp": ("qwen35", lambda ids: qwen35(ids, 4, 3, 2, 6, False, 131), 104),
    # Seeds with which no router comes near a tie, and rounding in f32 grows little on its way through delta rules.
    "qwen3moe": ("qwen2", qwen3moe, 100),
    # R = 3 and Hk = 2 as in `qwen35`, R = 2 and Hk = 3: tiled and grouped value heads differ in both.
    "qwen35moe": ("qwen35", qwen35moe, 207),
    "qwen3next": ("qwen2", qwen3next, 165),
    # Experts in the prediction head too.
    "qwen35moe-mtp": ("qwen35", lambda ids: qwen35moe(ids, 4), 210),
    # As the 31B: K = V on full layers, which have fewer KV heads.
    "gemma4": ("gemma4", lambda ids: gemma4(ids, "ssfsf", attention_k_eq_v=True, num_global_key_value_heads=2), 300),
    # As E2B: embeddings of each layer's own; the last layers read the KV of layers 4 and 5 and are twice as wide. Neither
    # the first, nor the nearest, nor the layer a fixed distance away is the right source.
    "gemma4-e": ("gemma4", lambda ids: gemma4(
        ids, "sfssfsfssf", hidden_size=40, num_key_value_heads=1, num_attention_heads=4, global_head_dim=18,
        hidden_size_per_layer_input=14, vocab_size_per_layer_input=133, num_kv_shared_layers=4,
        use_double_wide_mlp=True), 308),
    # As the 26B-A4B: experts beside the dense layer.
    "gemma4-moe": ("gemma4", lambda ids: gemma4(
        ids, "ssfsf", attention_k_eq_v=True, num_global_key_value_heads=2, enable_moe_block=True, num_experts=9,
        top_k_experts=3, moe_intermediate_size=20), 323),
}


@torch.no_grad()
def randomise(model, seed):
    """Matrices keep activations near unit size; vectors get values far from their defaults."""
    gen = torch.Generator().manual_seed(seed)
    normal = lambda p: torch.randn(p.shape, generator=gen)
    gemma = "Gemma" in type(model).__name__
    # Gemma's `layer_scalar` is no parameter, but is saved like one.
    scalars = [(name, p) for name, p in model.named_buffers() if name.endswith("layer_scalar")]
    for name, p in [*model.named_parameters(), *scalars]:
        if name.endswith("A_log"):
            p.copy_(torch.log(0.05 + 3.0 * torch.rand(p.shape, generator=gen)))
        elif name.endswith("dt_bias"):
            p.copy_(normal(p))
        elif "conv1d" in name:
            p.copy_(0.5 * normal(p))
        elif p.ndim == 1:
            p.copy_(p + 0.3 * normal(p))  # around 0 where the norm adds 1, around 1 elsewhere
            if gemma and name.endswith("q_norm.weight"):
                p.mul_(0.4)  # nothing else scales the scores down
        elif "embed_tokens" in name:
            # Gemma multiplies with the root of the width.
            p.copy_((1.0 / p.shape[1] ** 0.5 if gemma else 0.8) * normal(p))
        else:
            # Experts are stacked in front of rows and columns; routers decide clearly.
            p.copy_(normal(p) / p.shape[-1] ** 0.5 * {"mlp.gate": 2.0, "router.proj": 9.0}.get(
                ".".join(name.split(".")[-3:-1]), 1.0))


class Double(TorchFunctionMode):
    """Runs a model in f64 although its code asks for f32 in places (norms, the delta rule, rotations).

    In f32 the library's two forms of the delta rule differ by 1e-4 in the logits; in f64 the goldens are exact
    to their own rounding, and whatever a test measures is the error of the code under test.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        widen = lambda x: torch.float64 if x is torch.float32 else x
        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(widen, args), **{k: widen(v) for k, v in (kwargs or {}).items()})


@torch.no_grad()
def run(model, tokens):
    """The output of every decoder layer, the state after the final norm, and the logits."""
    hidden = {}

    def keep(il):
        def hook(_module, _inputs, out):
            hidden[il] = (out[0] if isinstance(out, tuple) else out)[0].clone()
        return hook

    # Hooks, because `hidden_states[-1]` of the library is taken after the final norm.
    hooks = [layer.register_forward_hook(keep(il)) for il, layer in enumerate(model.model.layers)]
    norm = model.model(input_ids=tokens[None], use_cache=False).last_hidden_state[0]
    for h in hooks:
        h.remove()
    logits = model(input_ids=tokens[None], use_cache=False).logits[0]
    cap = getattr(model.config, "final_logit_softcapping", None)
    head = model.lm_head(norm)
    assert (logits - (head if cap is None else cap * torch.tanh(head / cap))).abs().max() < 1e-12
    return [hidden[il] for il in sorted(hidden)], norm, logits


@torch.no_grad()
def router_margin(model, tokens):
    """How far the last expert chosen is from the first one not chosen, in logits, where that is least."""
    margin = float("inf")

    def look(router, _inputs, out):
        nonlocal margin
        # Gemma's router gives probabilities.
        top_k, scores = (router.top_k, out[0]) if hasattr(router, "top_k") else (router.config.top_k_experts, out[0].log())
        ranked = scores.sort(-1, descending=True).values
        margin = min(margin, (ranked[:, top_k - 1] - ranked[:, top_k]).min().item())

    hooks = [m.register_forward_hook(look) for m in model.modules() if type(m).__name__.endswith(("TopKRouter", "TextRouter"))]
    model(input_ids=tokens[None], use_cache=False)
    for h in hooks:
        h.remove()
    return margin


@torch.no_grad()
def decode_gap(model, tokens):
    """Largest difference between the logits of one pass and those of single-token decoding with the cache."""
    whole = model(input_ids=tokens[None], use_cache=False).logits[0]
    cache, gap = None, 0.0
    for i in range(len(tokens)):
        out = model(input_ids=tokens[None, i:i + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        gap = max(gap, (out.logits[0, 0] - whole[i]).abs().max().item())
    return gap


def make_target(name):
    pre, build, seed = TARGETS[name]
    folder = HERE / name
    ids = tiny_tokenizer.build(pre, folder)
    model = build(ids).float().eval()
    model.config._experts_implementation = "eager"  # the others ask for f32
    randomise(model, seed)
    model.save_pretrained(folder)
    n_vocab = model.config.vocab_size
    tokens = torch.from_numpy(np.random.default_rng(seed).integers(0, n_vocab, N_TOKENS))
    with Double():
        model.double()
        hidden, norm, logits = run(model, tokens)
        gap = decode_gap(model, tokens)
        margin = router_margin(model, tokens)
    assert logits.dtype == torch.float64 and gap < 1e-9, f"{name}: decoding differs from one pass by {gap}"
    # An f32 implementation is some 1e-5 off: none may choose another expert for that.
    assert margin > 1e-3, f"{name}: a router decides by {margin}: choose another seed"
    out = {f"hidden.{il}": h for il, h in enumerate(hidden)}
    out |= {"tokens": tokens.to(torch.int32), "final_norm": norm, "logits": logits}
    save(out, folder / "golden.safetensors")
    print(f"{name}: {sum(p.numel() for p in model.parameters())} parameters, logits in "
          f"[{logits.min():.2f}, {logits.max():.2f}], last hidden rms {hidden[-1].pow(2).mean().sqrt():.2f}, "
          f"decode gap {gap:.1e}, router margin {margin:.1e}")
    return model, ids, tokens, hidden, norm


def save(tensors, path):
    single = lambda v: (v.float() if v.is_floating_point() else v).contiguous()
    save_file({k: single(v) for k, v in tensors.items()}, path, metadata={"format": "pt"})


# Points of the sequence at which the drafter is asked: (committed positions, anchor or None for the sequence's
# own token, rows of the block). Contexts shorter than the window of 8, as long, longer; whole and short blocks.
POINTS = [(1, None, 6), (3, None, 6), (7, 5, 6), (8, None, 4), (9, None, 6), (12, 77, 2), (13, None, 6), (40, None, 6),
          (69, 0, 6), (75, 33, 6)]


# Every layer slides and sees both ways inside the block.
DFLASH2 = {"architectures": ["DFlash2DraftModel"], "layer_types": 3 * ["sliding_attention"]}


def make_drafter(name, seed, target, ids, tokens, hidden, taps, reference=dflash_reference, **extra):
    extra, more = {k: v for k, v in extra.items() if k != "dflash_config"}, extra.get("dflash_config", {})
    # As the target does it, unless the drafter says otherwise: a factor on embedded rows, a bound on the logits.
    scale = more.get("input_embedding_scale", getattr(target.model.embed_tokens, "scalar_embed_scale", 1.0))
    cap = more.get("final_logit_softcapping", getattr(target.config, "final_logit_softcapping", None))
    config = {
        "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "attention_bias": False, "block_size": 6,
        "dflash_config": {"mask_token_id": ids.get("<|MASK|>", ids.get("<mask>")), "target_layer_ids": taps} | more,
        "eos_token_id": ids.get("<|im_end|>", ids.get("<eos>")), "head_dim": 14, "hidden_act": "silu",
        "hidden_size": target.config.hidden_size, "intermediate_size": 52,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "max_position_embeddings": 512,
        "num_attention_heads": 6, "num_hidden_layers": 3, "num_key_value_heads": 2,
        "num_target_layers": target.config.num_hidden_layers, "rms_norm_eps": 1e-6, "rope_scaling": None,
        "rope_theta": 1e6, "sliding_window": 8, "use_sliding_window": True, "tie_word_embeddings": False,
        "vocab_size": target.config.vocab_size, **extra}
    gen = torch.Generator().manual_seed(seed)
    weights = {}
    for key, shape in reference.shapes(config).items():
        noise = torch.randn(shape, generator=gen)
        own = reference.random(key, shape, noise) if reference is dflash2_reference else None
        weights[key] = own if own is not None else 1 + 0.3 * noise if len(shape) == 1 else noise / shape[1] ** 0.5
    folder = HERE / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save(weights, folder / "model.safetensors")

    f64 = lambda t: t.detach().double()
    drafter = reference.Drafter(config, {k: f64(v) for k, v in weights.items()},
                                scale * f64(target.model.embed_tokens.weight), f64(target.lm_head.weight), cap,
                                more.get("output_multiplier", 1.0))
    features = torch.cat([hidden[t] for t in taps], -1)
    ctx = drafter.fuse(f64(features))
    cache = dflash_reference.Cache(drafter)
    out = {"tokens": tokens.to(torch.int32), "features": features, "ctx": ctx}
    rows, worst, lead = [], 0.0, float("inf")
    for i, (n, anchor, n_row) in enumerate(POINTS):
        anchor = int(tokens[n]) if anchor is None else anchor
        rows.append([n, anchor, n_row])
        dense = drafter.dense(ctx[:n], anchor, n_row)
        cache.extend(f64(features[cache.n:n]), chunk=1 + i % 3)
        step = cache.draft(anchor, n_row)
        for key, a in dense.items():
            worst = max(worst, (a - step[key]).abs().max().item())
            out[f"point.{i}.{key}"] = a
        if reference is dflash2_reference:
            path, log_q, least = drafter.walk(anchor, dense["final_norm"], dense["logits"])
            out[f"point.{i}.path"], out[f"point.{i}.path_log_q"], lead = path, log_q, min(lead, least)
    assert lead > 2e-3, f"{name}: a choice of the selector hangs on {lead}: choose another seed"
    assert worst < 1e-5, f"{name}: the dense and the incremental form differ by {worst}"
    for il, (k, v) in enumerate(cache.rows()):
        out[f"ctx_k.{il}"], out[f"ctx_v.{il}"] = k, v
    out["points"] = torch.tensor(rows, dtype=torch.int32)
    save(out, folder / "golden.safetensors")
    print(f"{name}: {len(POINTS)} points, dense against incremental {worst:.1e}, smallest lead of a choice {lead:.1e}")


# Points of the sequence at which the head drafts: (committed tokens, anchor or None for the sequence's own token).
HEAD_POINTS = [(1, None), (2, None), (3, 5), (16, None), (17, 77), (40, None), (75, 33)]
N_HEAD_DRAFT = 4
# Seeds of the heads.
HEADS = {"qwen35-mtp": 12, "qwen35moe-mtp": 14}


@torch.no_grad()
def make_head(name, seed, target, tokens, norm):
    """Adds a random prediction head to a checkpoint, and what it drafts to the goldens."""
    folder, gen = HERE / name, torch.Generator().manual_seed(seed)
    config = json.loads((folder / "config.json").read_text()) | {"mtp_num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    head = {}
    for key, shape in mtp_reference.shapes(config).items():
        noise = torch.randn(shape, generator=gen)
        head[key] = 0.3 * noise if len(shape) == 1 else noise / shape[-1] ** 0.5 * (2 if key.endswith("mlp.gate.weight") else 1)
    save(load_file(folder / "model.safetensors") | head, folder / "model.safetensors")

    f64 = lambda t: t.detach().double()
    reference = mtp_reference.Head(config, {k: f64(v) for k, v in head.items()}, f64(target.model.embed_tokens.weight),
                                   f64(target.lm_head.weight))
    out, rows, gap = load_file(folder / "golden.safetensors"), [], float("inf")
    for i, (n, anchor) in enumerate(HEAD_POINTS):
        anchor = int(tokens[n]) if anchor is None else anchor
        rows.append([n, anchor])
        logits = reference.draft(tokens[:n], f64(norm[:n]), anchor, N_HEAD_DRAFT)
        top = logits.topk(2).values
        gap = min(gap, (top[:, 0] - top[:, 1]).min().item())
        out[f"head.{i}.logits"] = logits
    assert reference.margin > 1e-3, f"{name}: the head's router decides by {reference.margin}; choose another seed"
    assert gap > 0.01, f"{name}: a greedy draft hangs on a difference of {gap}; choose another seed"
    out["head_points"] = torch.tensor(rows, dtype=torch.int32)
    save(out, folder / "golden.safetensors")
    print(f"{name}: {len(rows)} points, smallest lead of a choice {gap:.3f}")


def sharing(config):
    """Which layers own, keep and read keys and values. The library's reading (5.23.0) refuses a model of readers only, and
    keeps nothing for others in a target without readers."""
    first = config.num_hidden_layers - config.num_kv_shared_layers
    modes = [None] * first + ["reuse"] * config.num_kv_shared_layers
    for kind in set(config.layer_types):
        owners = [il for il in range(first) if config.layer_types[il] == kind]
        if owners:
            modes[owners[-1]] = "store"
    return modes


Gemma4TextConfig.kv_sharing_modes = property(sharing)


def assistant(target, kinds, **extra):
    """`kinds` as of `gemma4`. Heads and rotations are the target's, or queries would not fit its keys; every size of its own
    differs."""
    names = {"s": "sliding_attention", "f": "full_attention"}
    text, of_all = target.config, ("sliding_window", "max_position_embeddings", "vocab_size", "rope_parameters")
    full = [il for il, kind in enumerate(text.layer_types) if kind == names["f"]][-1]
    sliding = [il for il, kind in enumerate(text.layer_types) if kind == names["s"]][-1]
    per_layer = text.per_layer_config
    config = Gemma4TextConfig(
        num_hidden_layers=len(kinds), layer_types=[names[k] for k in kinds], tie_word_embeddings=True,
        num_kv_shared_layers=len(kinds), global_head_dim=per_layer[full].head_dim, attention_k_eq_v=text.attention_k_eq_v,
        num_global_key_value_heads=per_layer[full].num_key_value_heads if text.attention_k_eq_v else None,
        head_dim=per_layer[sliding].head_dim, num_key_value_heads=per_layer[sliding].num_key_value_heads, hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=0, final_logit_softcapping=None,
        **{key: getattr(text, key) for key in of_all},
        **{key: extra.pop(key) for key in ("hidden_size", "intermediate_size", "num_attention_heads")})
    return Gemma4AssistantForCausalLM(Gemma4AssistantConfig(
        text_config=config, backbone_hidden_size=text.hidden_size, **extra))


# Target, model, seed.
ASSISTANTS = {
    # As that of the 31B. Twice as many query heads as the target has.
    "gemma4-assistant": ("gemma4", lambda target: assistant(
        target, "ssf", hidden_size=36, intermediate_size=50, num_attention_heads=12), 402),
    # As that of E2B, with a head that ranks 3 of 7 groups of 19 tokens. (The last layer must be a full one.)
    "gemma4-e-assistant": ("gemma4-e", lambda target: assistant(
        target, "sff", hidden_size=28, intermediate_size=46, num_attention_heads=5, use_ordered_embeddings=True,
        num_centroids=7, centroid_intermediate_top_k=3), 407),
}

# Points of the sequence at which the assistant drafts: (committed tokens, anchor or None for the sequence's own token).
# Contexts shorter than the window of 11, as long as it, longer by one.
ASSISTANT_POINTS = [(1, None), (2, None), (9, None), (10, 5), (11, None), (12, None), (13, 77), (40, None), (64, 0), (75, 33)]
N_ASSISTANT_DRAFT = 4


@torch.no_grad()
def make_assistant(name, target, tokens, norm):
    """A random assistant and its greedy drafts behind what the target keeps of the first tokens. It sees of a sliding layer
    what the target's own next row would see: one cell less than the window, for its own is not computed yet. (The library
    lets it see up to two more, if they are kept; so does nobody else.)"""
    _, build, seed = ASSISTANTS[name]
    folder = HERE / name
    model = build(target).float().eval()
    randomise(model, seed)
    head = model.masked_embedding
    if head is not None:
        head.token_ordering.copy_(torch.randperm(head.vocab_size, generator=torch.Generator().manual_seed(seed)))
    model.save_pretrained(folder)
    out, rows, lead, margin = {"tokens": tokens.to(torch.int32)}, [], float("inf"), float("inf")
    ranked = None

    def rank(_centroids, _inputs, scores):
        nonlocal ranked
        ranked = scores[0, 0].sort(descending=True).values

    if head is not None:
        head.centroids.register_forward_hook(rank)
    window = target.config.sliding_window
    with Double():
        model.double()
        kept = target.model(input_ids=tokens[None], use_cache=False, return_shared_kv_states=True).shared_kv_states
        for i, (n, anchor) in enumerate(ASSISTANT_POINTS):
            token = int(tokens[n]) if anchor is None else anchor
            rows.append([n, token])
            seen = {kind: tuple(x[:, :, max(0, n + 1 - window) if "sliding" in kind else 0:n] for x in kv)
                    for kind, kv in dict(kept).items()}
            state, all_logits, states = norm[n - 1].double(), [], []
            for _ in range(N_ASSISTANT_DRAFT):
                embedded = target.model.embed_tokens(torch.tensor([[token]]))[0, 0].double()
                step = model(inputs_embeds=torch.cat([embedded, state])[None, None], shared_kv_states=seen,
                             position_ids=torch.tensor([[n]]))
                state, logits = step.last_hidden_state[0, 0], step.logits[0, 0]
                if head is not None:
                    # What is no candidate has no chance.
                    chosen = logits > logits.min() + 0.5
                    k = head.centroid_intermediate_top_k
                    assert chosen.sum() == k * head.vocab_size_per_centroid
                    logits = torch.where(chosen, logits, -torch.inf)
                    margin = min(margin, (ranked[k - 1] - ranked[k]).item())
                top = logits.topk(2).values
                lead = min(lead, (top[0] - top[1]).item())
                token = int(logits.argmax())
                all_logits.append(logits)
                states.append(state)
            out[f"point.{i}.logits"], out[f"point.{i}.states"] = torch.stack(all_logits), torch.stack(states)
    assert state.dtype == torch.float64
    assert lead > 0.01 and margin > 1e-3, f"{name}: a draft hangs on {lead}, a group on {margin}; choose another seed"
    out["points"] = torch.tensor(rows, dtype=torch.int32)
    save(out, folder / "golden.safetensors")
    print(f"{name}: {sum(p.numel() for p in model.parameters())} parameters, {len(rows)} points, smallest lead of a choice "
          f"{lead:.3f}, of a group {margin:.1e}")


def main():
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or [*TARGETS, "dflash", "dflash2", "dflash-gemma4", "dflash2-gemma4", *ASSISTANTS]
    for name in TARGETS:
        drafters = {"qwen35": ["dflash", "dflash2"], "gemma4": ["dflash-gemma4", "dflash2-gemma4"]}.get(name, [])
        assistants = [a for a, (of, *_) in ASSISTANTS.items() if of == name and a in wanted]
        if assistants or any(folder in wanted for folder in [name, *drafters]):
            model, ids, tokens, hidden, norm = make_target(name)
            if name in HEADS:
                make_head(name, HEADS[name], model, tokens, norm)
            if name == "qwen35" and "dflash" in wanted:
                taps = [1, 3, 6]  # a linear layer, another one, and the last layer before the final norm
                make_drafter("dflash", 7, model, ids, tokens, hidden, taps)
                make_drafter("dflash-noncausal", 7, model, ids, tokens, hidden, taps, is_causal=False)
            if name == "qwen35" and "dflash2" in wanted:
                # As published, but for the sizes: more taps than sides, more groups than channels in one.
                make_drafter("dflash2", 31, model, ids, tokens, hidden, [1, 3, 6], dflash2_reference, **DFLASH2,
                             is_causal=False, dflash_config={"conv_kernel_size": 3, "conv_group_size": 5,
                                                             "selector_rank": 6, "selector_top_k": 7})
            if name == "gemma4" and "dflash-gemma4" in wanted:
                make_drafter("dflash-gemma4", 8, model, ids, tokens, hidden, [0, 2, 4])
            if name == "gemma4" and "dflash2-gemma4" in wanted:
                # Its own factors and bound, none of them the target's; and it leaves out that it sees both ways.
                make_drafter("dflash2-gemma4", 35, model, ids, tokens, hidden, [0, 2, 4], dflash2_reference, **DFLASH2,
                             dflash_config={"conv_kernel_size": 2, "conv_group_size": 11, "selector_rank": 5,
                                            "selector_top_k": 9, "input_embedding_scale": 5.0, "output_multiplier": 0.7,
                                            "final_logit_softcapping": 2.5})
            for one in assistants:
                make_assistant(one, model, tokens, norm)


if __name__ == "__main__":
    main()
