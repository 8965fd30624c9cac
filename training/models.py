"""Tiny configurations of the supported families, as Hugging Face classes.

Every dimension is a multiple of 256 where a K-quant needs it (hidden and
feed-forward widths) and of 32 elsewhere, so that all GGUF types apply.
"""
import torch
from transformers.models.llama import LlamaConfig, LlamaForCausalLM
from transformers.models.qwen3 import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3_5 import Qwen3_5ForCausalLM, Qwen3_5TextConfig

VOCAB = 4096
EOT, IM_START, IM_END, MASK = 4088, 4089, 4090, 4095
COMMON = dict(vocab_size=VOCAB, max_position_embeddings=4096, pad_token_id=EOT, eos_token_id=IM_END, bos_token_id=None,
              use_cache=True)


def hybrid():
    """Qwen3.5 / Qwen3.6 dense: 3 gated DeltaNet layers to 1 gated full-attention layer, untied head."""
    return Qwen3_5ForCausalLM(Qwen3_5TextConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=64,
        linear_value_head_dim=64, linear_conv_kernel_dim=4, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000000.0, "partial_rotary_factor": 0.25,
                         "mrope_interleaved": True, "mrope_section": [3, 3, 2]}, **COMMON))


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


FAMILIES = {"hybrid": hybrid, "qwen3": qwen3, "llama": llama}


def build(name: str, seed: int = 0):
    torch.manual_seed(seed)
    return FAMILIES[name]().float()


def from_dir(path):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
