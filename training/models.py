"""Tiny configurations of the supported families, as Hugging Face classes.

Every dimension is a multiple of 256 where a K-quant needs it (hidden and
feed-forward widths) and of 32 elsewhere, so that all GGUF types apply; only
the experts are narrower.
"""
import json

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.gemma4 import Gemma4ForCausalLM, Gemma4TextConfig
from transformers.models.llama import LlamaConfig, LlamaForCausalLM
from transformers.models.qwen3 import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3_5 import Qwen3_5ForCausalLM, Qwen3_5TextConfig
from transformers.models.qwen3_5_moe import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeDecoderLayer, Qwen3_5MoeRMSNorm


def use_vocab(n: int):
    """Sets the size of the vocabulary and the ids of its special tokens, which are its last eight."""
    global VOCAB, EOT, IM_START, IM_END, MASK, COMMON
    VOCAB, EOT, IM_START, IM_END, MASK = n, n - 8, n - 7, n - 6, n - 1
    COMMON = dict(vocab_size=VOCAB, max_position_embeddings=4096, pad_token_id=EOT, eos_token_id=IM_END,
                  bos_token_id=None, use_cache=True)


def open_run(out):
    """Takes the size of the vocabulary from the tokenizer that prepare.py left in `out`."""
    full = json.loads((out / "tokenizer" / "tokenizer.json").read_text())
    use_vocab(1 + max(t["id"] for t in full["added_tokens"]))


use_vocab(4096)


def hybrid():
    """Qwen3.5 / Qwen3.6 dense: 3 gated DeltaNet layers to 1 gated full-attention layer, untied head."""
    return Qwen3_5ForCausalLM(Qwen3_5TextConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=64,
        linear_value_head_dim=64, linear_conv_kernel_dim=4, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000000.0, "partial_rotary_factor": 0.25,
                         "mrope_interleaved": True, "mrope_section": [3, 3, 2]}, **COMMON))


class NextN(nn.Module):
    """Qwen3.5's prediction head, which transformers leaves out: one more full-attention layer behind the pair (token,
    the trunk's normed state of the position before it). Its parameters have the checkpoints' names under `mtp.`."""

    def __init__(self, c):
        super().__init__()
        norm = lambda: Qwen3_5MoeRMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.fc = nn.Linear(2 * c.hidden_size, c.hidden_size, bias=False)
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden, self.norm = norm(), norm(), norm()
        self.layers = nn.ModuleList([Qwen3_5MoeDecoderLayer(c, c.layer_types.index("full_attention"))])

    def forward(self, trunk, tokens, hidden, first=1):
        """Rows (tokens `[b, t]`, states before them `[b, t, h]`) at positions from `first` on -> normed states."""
        e, h = self.pre_fc_norm_embedding(trunk.embed_tokens(tokens)), self.pre_fc_norm_hidden(hidden)
        x = self.fc(torch.cat([e, h], -1))
        pos = torch.arange(first, first + tokens.shape[1], device=x.device)[None].expand(len(tokens), -1)
        turns = trunk.rotary_emb(x, pos[None].expand(3, -1, -1))
        return self.norm(self.layers[0](x, position_embeddings=turns, position_ids=pos))


def hybrid_moe():
    """Qwen3.5 / Qwen3.6 with experts: 3 gated DeltaNet layers to 1 gated full-attention layer, 2 of 8 experts and a
    shared one, and a prediction head that is trained with it."""
    model = Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(
        hidden_size=256, moe_intermediate_size=64, shared_expert_intermediate_size=64, num_experts=8,
        num_experts_per_tok=2, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=64, linear_value_head_dim=64,
        linear_conv_kernel_dim=4, tie_word_embeddings=False, mtp_num_hidden_layers=1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000000.0, "partial_rotary_factor": 0.25,
                         "mrope_interleaved": True, "mrope_section": [3, 3, 2]}, **COMMON))
    model.config._experts_implementation = "eager"
    model.mtp = NextN(model.config)
    model.mtp.apply(model._init_weights)
    return model


def gemma4():
    """Gemma 4 dense, as the 31B: 3 layers with a window to 1 that sees all, whose values are its keys; bounded logits."""
    model = Gemma4ForCausalLM(Gemma4TextConfig(
        hidden_size=256, intermediate_size=256, num_hidden_layers=8,
        layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * 2, sliding_window=64, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, global_head_dim=64, num_global_key_value_heads=1, attention_k_eq_v=True,
        hidden_size_per_layer_input=0, final_logit_softcapping=30.0, tie_word_embeddings=True, rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "proportional", "rope_theta": 1000000.0, "partial_rotary_factor": 0.25}},
        **COMMON))
    # A constant of the file that training leaves alone; away from 1, a reader that forgets it computes something else.
    for name, scalar in model.named_buffers():
        if name.endswith("layer_scalar"):
            scalar.fill_(0.8)
    return model


def qwen3():
    return Qwen3ForCausalLM(Qwen3Config(
        hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}, **COMMON))


def llama():
    return LlamaForCausalLM(LlamaConfig(
        hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, **COMMON))


FAMILIES = {"hybrid": hybrid, "hybrid-moe": hybrid_moe, "gemma4": gemma4, "qwen3": qwen3, "llama": llama}


def build(name: str, seed: int = 0):
    torch.manual_seed(seed)
    return FAMILIES[name]().float()


def from_dir(path):
    """A saved target, with its prediction head if it has one."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.config._experts_implementation = "eager"
    head = {n.removeprefix("mtp."): t for n, t in load_file(path / "model.safetensors").items() if n.startswith("mtp.")}
    if head:
        # Saved one by one, as checkpoints have them.
        mlp = "layers.0.mlp.experts"
        part = lambda e, name: head.pop(f"{mlp}.{e}.{name}_proj.weight")
        n = range(model.config.num_experts)
        head[f"{mlp}.gate_up_proj"] = torch.stack([torch.cat([part(e, "gate"), part(e, "up")]) for e in n])
        head[f"{mlp}.down_proj"] = torch.stack([part(e, "down") for e in n])
        model.mtp = NextN(model.config)
        model.mtp.load_state_dict(head)
    return model
