"""Speculative greedy decoding with a target and its drafter, or its prediction
head, without caches (slow, simple, exact): checks that the output equals plain
greedy decoding and prints the mean number of tokens per target pass.  --dump
writes the rounds as JSON, a reference for other implementations.

    python eval_drafter.py --family hybrid [--dump out/hybrid-dflash/golden.json]
"""
import argparse
import json
import pathlib

import torch
from tokenizers import Tokenizer

import dflash
import models

PROMPTS = ["Once upon a time, there was a little girl named Lily.",
           "One day, Tom went to the park with his dog.",
           "<|im_start|>user\nWrite a story about a lost kite.<|im_end|>\n<|im_start|>assistant\n",
           "<|im_start|>user\nWrite JSON for a cat named Luna.<|im_end|>\n<|im_start|>assistant\n",
           "<|im_start|>user\nCount from 3 in steps of 4, 12 numbers.<|im_end|>\n<|im_start|>assistant\n",
           "<|im_start|>user\nWrite a Python function add.<|im_end|>\n<|im_start|>assistant\n"]


@torch.no_grad()
def head_draft(target, states, seq, n):
    """`n` tokens behind `seq`, whose last has no state yet, of the target's prediction head."""
    tokens, states = seq[1:], states[:, :len(seq) - 1]
    for _ in range(n):
        h = target.mtp(target.model, torch.tensor([tokens]), states)[:, -1:]
        tokens, states = tokens + [target.lm_head(h)[0, 0].argmax().item()], torch.cat([states, h], 1)
    return tokens[-n:]


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", type=pathlib.Path, default="out", help="folder of this run, as prepare.py left it")
    ap.add_argument("--family", default="hybrid")
    ap.add_argument("--new", type=int, default=96)
    ap.add_argument("--draft", type=int, default=3, help="tokens that a prediction head drafts")
    ap.add_argument("--dump")
    a = ap.parse_args()
    torch.set_num_threads(1)
    models.open_run(a.out)
    tok = Tokenizer.from_file(str(a.out / "tokenizer" / "tokenizer.json"))
    if a.family.startswith("hybrid"):
        import gdr_cpu
        gdr_cpu.install()
    target = models.from_dir(a.out / a.family / "hf").eval()
    dd = a.out / f"{a.family}-dflash" / "hf"
    model = dflash.DFlash.load(dd).eval() if dd.exists() else None
    if model:
        run = dflash.Features(target, model.target_layer_ids)
        guess = lambda feats, seq: dflash.draft(model, feats, target, seq[-1], len(seq) - 1).tolist()
    elif hasattr(target, "mtp"):
        # It reads the normed states, which hooks on layers don't see.
        def run(x, logits):
            h = target.model(input_ids=x, use_cache=False).last_hidden_state
            return h, target.lm_head(h)
        guess = lambda feats, seq: head_draft(target, feats, seq, a.draft)
    else:
        guess = None
    golden = []
    for p in PROMPTS:
        x = torch.tensor([tok.encode(p, add_special_tokens=False).ids])
        n0 = x.shape[1]
        with torch.no_grad():
            y = x
            while y.shape[1] < n0 + a.new and y[0, -1] != models.IM_END and y[0, -1] != models.EOT:
                y = torch.cat([y, target(input_ids=y, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        if guess is None:
            print(repr(tok.decode(y[0].tolist(), skip_special_tokens=False)))
            continue
        with torch.no_grad():
            feats, logits = run(x, logits=True)
        seq = x[0].tolist() + [logits[0, -1].argmax().item()]
        rounds = []
        while len(seq) < y.shape[1]:
            start = len(seq) - 1
            d = guess(feats, seq)
            with torch.no_grad():
                feats, logits = run(torch.tensor([seq + d]), logits=True)
            want = logits[0, start:].argmax(-1).tolist()
            k = 0
            while k < len(d) and d[k] == want[k]:
                k += 1
            rounds.append({"start": start, "draft": d, "accepted": k})
            seq += d[:k] + [want[k]]
        same = seq[:y.shape[1]] == y[0].tolist()
        mean = sum(r["accepted"] + 1 for r in rounds) / max(1, len(rounds))
        golden.append({"prompt": p, "tokens": y[0].tolist(), "prompt_len": n0, "rounds": rounds})
        print(f"same as greedy: {same}; {mean:.2f} tokens per pass over {len(rounds)} passes\n"
              f"{tok.decode(y[0].tolist(), skip_special_tokens=False)!r}\n", flush=True)
    if a.dump:
        pathlib.Path(a.dump).write_text(json.dumps(golden))


if __name__ == "__main__":
    main()
