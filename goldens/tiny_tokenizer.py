"""A byte-level BPE tokenizer of about 110 entries, as the directories of `make.py` need one.

The base alphabet is printable ASCII, space and newline (other bytes have no entry: this tokenizer is for
tests). A dozen merges follow, then the special tokens, as in the published Qwen and Llama files. The model's
embedding has more rows than the tokenizer has entries, as in those files too.
"""
import json
import pathlib

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

# The published pre-tokenizer patterns, exactly as they stand in the tokenizer.json files.
PATTERNS = {
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
             r"\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen35": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|"
              r"\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
                 r"\s*[\r\n]+|\s+(?!\S)|\s+",
}
MERGES = ["t h", "th e", "Ġ the", "a n", "an d", "Ġ and", "i n", "Ġ a", "r e", "l l", "Ġ s", "h e"]
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|MASK|>"]
LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHATML_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}")
LLAMA3_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}")

GEMMA_SPECIALS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", "<|tool_response>", "<|channel>"]
GEMMA_MERGES = ["t h", "th e", "\u2581 the", "a n", "an d", "\u2581 and", "\n \n", "\u2581 a"]
GEMMA_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|turn>' + message.role + '\\n' + message.content + '<turn|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|turn>model\\n' }}{%- endif %}")


def build_gemma(folder: pathlib.Path) -> dict[str, int]:
    """As `build`, for Gemma: BPE over characters, a space being U+2581, with a few of the byte tokens."""
    alphabet = [chr(c) for c in range(0x21, 0x7F)] + ["\u2581", "\n"]
    bytes_ = ["<0x09>", "<0x0D>", "<0xC3>", "<0xA9>"]
    texts = GEMMA_SPECIALS + bytes_ + alphabet + [m.replace(" ", "") for m in GEMMA_MERGES]
    tok = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(texts)}, unk_token="<unk>", byte_fallback=True,
                               fuse_unk=True, merges=[tuple(m.split(" ")) for m in GEMMA_MERGES]))
    tok.normalizer = normalizers.Replace(" ", "\u2581")
    tok.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tok.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tok.add_tokens([AddedToken(s, normalized=False, special=True) for s in GEMMA_SPECIALS])
    folder.mkdir(parents=True, exist_ok=True)
    tok.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, "bos_token": "<bos>",
              "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>",
              "clean_up_tokenization_spaces": False}
    (folder / "chat_template.jinja").write_text(GEMMA_TEMPLATE)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    return {s: tok.token_to_id(s) for s in GEMMA_SPECIALS}


def build(pre: str, folder: pathlib.Path) -> dict[str, int]:
    """Writes tokenizer.json, tokenizer_config.json (and a chat template); returns the special tokens' ids."""
    if pre == "gemma4":
        return build_gemma(folder)
    llama = pre == "llama-bpe"
    alphabet = [chr(c) for c in range(0x21, 0x7F)] + ["Ġ", "Ċ"]
    vocab = {t: i for i, t in enumerate(alphabet + [m.replace(" ", "") for m in MERGES])}
    merges = [tuple(m.split(" ")) for m in MERGES]
    tok = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=llama))
    if not llama:
        tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERNS[pre]), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    specials = LLAMA3 if llama else CHATML
    # "<think>" is an added token but not a special one: it is shown in the output.
    tok.add_tokens([AddedToken(s, normalized=False, special="think" not in s) for s in specials])
    folder.mkdir(parents=True, exist_ok=True)
    tok.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, "unk_token": None,
              "clean_up_tokenization_spaces": False}
    if llama:
        config |= {"add_bos_token": True, "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
        (folder / "chat_template.jinja").write_text(LLAMA3_TEMPLATE)
    else:
        config |= {"add_bos_token": False, "bos_token": None, "eos_token": "<|im_end|>",
                   "pad_token": {"__type": "AddedToken", "content": "<|endoftext|>"},
                   "chat_template": CHATML_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    return {s: tok.token_to_id(s) for s in specials}
