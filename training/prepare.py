"""Train the tokenizer and encode the corpus.

Tokenizer: byte-level BPE, Qwen2 pre-tokenizer, NFC normaliser, --vocab entries
(4096), the last 8 of which are special tokens (as in the real Qwen files, the
specials come after the BPE part).  <|MASK|> is the DFlash mask token.

The corpus is DIR/synthetic.txt (gen_synthetic.py) and, with --data, the texts of another folder: *.txt with
documents separated by <|endoftext|>, *.jsonl with one {"q": question, "a": answer} per line.

    python prepare.py --out out [--data DIR]   ->  out/tokenizer/, out/train.bin, out/val.bin (uint16)
"""
import argparse
import json
import pathlib
import random
import re

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>",
            "<|MASK|>"]
QWEN2_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
               r"\s*[\r\n]+|\s+(?!\S)|\s+")
CHAT_TEMPLATE = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}")


def stories(path: pathlib.Path) -> list[str]:
    return [d.strip() for d in path.read_text().split("<|endoftext|>") if d.strip()]


def documents(out: pathlib.Path, data: pathlib.Path | None) -> list[str]:
    docs = []
    for path in sorted(data.iterdir()) if data else []:
        if path.suffix == ".txt":
            docs += stories(path)
        elif path.suffix == ".jsonl":
            for line in path.read_text().splitlines():
                r = json.loads(line)
                docs.append(f"<|im_start|>user\n{r['q']}<|im_end|>\n<|im_start|>assistant\n{r['a']}<|im_end|>")
    return docs + stories(out / "synthetic.txt")


def train_tokenizer(docs, n_vocab):
    tok = Tokenizer(models.BPE(byte_fallback=False, fuse_unk=False))
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated", invert=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    tok.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(vocab_size=n_vocab - len(SPECIALS), special_tokens=[], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    strip = lambda d: re.sub(r"<\|[a-z_]+\|>|</?think>|</?tool_call>", " ", d)
    tok.train_from_iterator((strip(d) for d in docs), trainer)
    # Little text has fewer things to merge; the special tokens keep their ids all the same.
    gap = range(tok.get_vocab_size(), n_vocab - len(SPECIALS))
    tok.add_special_tokens([AddedToken(f"<|unused_{i}|>", normalized=False, special=True) for i in gap])
    tok.add_special_tokens([AddedToken(s, normalized=False, special=not s.strip("</>").startswith(("think", "tool")))
                            for s in SPECIALS])
    assert tok.get_vocab_size() == n_vocab, tok.get_vocab_size()
    return tok


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", type=pathlib.Path, default="out", help="folder of this run")
    ap.add_argument("--data", type=pathlib.Path, help="folder of further texts")
    ap.add_argument("--vocab", type=int, default=4096, help="entries of the tokenizer, 8 of them special tokens")
    a = ap.parse_args()
    docs = documents(a.out, a.data)
    random.Random(7).shuffle(docs)
    t = train_tokenizer(docs[::3], a.vocab)
    d = a.out / "tokenizer"
    d.mkdir(exist_ok=True, parents=True)
    t.save(str(d / "tokenizer.json"))
    ids = {s: t.token_to_id(s) for s in SPECIALS}
    (d / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False, "add_prefix_space": False, "bos_token": None,
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None, "errors": "replace",
        "clean_up_tokenization_spaces": False, "split_special_tokens": False, "model_max_length": 4096,
        "chat_template": CHAT_TEMPLATE,
        "added_tokens_decoder": {str(i): {"content": s, "lstrip": False, "normalized": False, "rstrip": False,
                                          "single_word": False,
                                          "special": not s.strip("</>").startswith(("think", "tool"))}
                                 for s, i in ids.items()}}, indent=1))
    # the older two-file form some converters read
    full = json.loads((d / "tokenizer.json").read_text())
    (d / "vocab.json").write_text(json.dumps(full["model"]["vocab"], ensure_ascii=False))
    merges = [m if isinstance(m, str) else " ".join(m) for m in full["model"]["merges"]]
    (d / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    eot = ids["<|endoftext|>"]
    enc, nbytes = [], sum(len(x.encode()) for x in docs)
    for i in range(0, len(docs), 4096):
        for e in t.encode_batch(docs[i:i + 4096], add_special_tokens=False):
            enc.append(np.array(e.ids + [eot], dtype=np.uint16))
    nval = max(1, len(enc) // 100)
    for name, part in (("val", enc[:nval]), ("train", enc[nval:])):
        ids_of_part = np.concatenate(part)
        ids_of_part.tofile(a.out / f"{name}.bin")
        print(name, len(part), "documents", len(ids_of_part), "tokens")
    total = sum(map(len, enc))
    print("bytes/token", round(nbytes / total, 3), "specials", ids)


if __name__ == "__main__":
    main()
