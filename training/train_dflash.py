"""Train a DFlash drafter for out/<family>/hf; resumable.

Recipe (arXiv 2602.06036): random anchors in each sequence; a block is the
anchor token followed by block-1 mask tokens; it sees the target's fused
features of the positions before the anchor and itself; cross-entropy on the
masked positions with weights exp(-(k-1)/gamma); the target, its embedding and
its head stay frozen.  Sequences come from the target's own samples
(gen_data.py, made here if missing) mixed with the corpus; with --rows 0 they are
the corpus alone, which saves the sampling and fits almost as well where the
target has learned its text.

    python train_dflash.py --family hybrid --steps 1800
"""
import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import torch

import dflash
import models
import train_target as tt

GAMMA = {16: 7.0, 10: 5.0, 8: 4.0}


def sequences(out, family, bs, seq, seed, corpus_part=0.2):
    if not (out / family / "gen.bin").exists():
        yield from tt.batches(out / "train.bin", bs, seq - 1, seed)
    gen = np.memmap(out / family / "gen.bin", dtype=np.uint16, mode="r").reshape(-1, seq)
    rng, nc = np.random.default_rng(seed), int(bs * corpus_part)
    corpus = tt.batches(out / "train.bin", max(1, nc), seq - 1, seed)
    while True:
        g = torch.from_numpy(gen[rng.integers(0, len(gen), bs - nc)].astype(np.int64))
        yield torch.cat([g, next(corpus)], 0) if nc else g


def blocks(x, n_anchor, model, gen):
    """Block inputs, positions, attention masks and labels for a batch of sequences."""
    b, t = x.shape
    block = model.block_size
    dev = x.device
    anchor = torch.rand(b, t - block - 8, generator=gen).topk(n_anchor, 1).indices.to(dev) + 8     # [b, a], distinct
    pos = anchor[:, :, None] + torch.arange(block, device=dev)                                      # [b, a, block]
    tok = x.gather(1, pos.view(b, -1)).view(b, n_anchor, block)
    inp = torch.full_like(tok, model.mask_id)
    inp[:, :, 0] = tok[:, :, 0]
    return inp.view(b, -1), pos.view(b, -1), model.masks(anchor, t), tok


class Kept:
    """`n` sequences whose features are computed once and used again and again, each time with other anchors: where the
    target is most of a step's work, this halves it."""

    def __init__(self, source, n, feats_of):
        rows, feats = [], []
        while sum(map(len, rows)) < n:
            rows.append(next(source))
            feats.append(feats_of(rows[-1]).half())
        self.rows, self.feats = torch.cat(rows), torch.cat(feats)

    def draw(self, bs, gen):
        i = torch.randint(len(self.rows), (bs,), generator=gen)
        return self.rows[i], self.feats[i].float()


def forward_loss(model, target, feats, x, n_anchor, gen, gamma):
    B = model.block_size
    inp, pos, masks, tok = blocks(x, n_anchor, model, gen)
    with torch.no_grad():
        emb = target.model.embed_tokens(inp)
    pc = torch.arange(x.shape[1], device=x.device)[None].expand(x.shape[0], -1)
    h = model(emb, feats, pos, pc, masks).view(x.shape[0], n_anchor, B, -1)[:, :, 1:]
    y = tok[:, :, 1:]
    w = torch.exp(-torch.arange(B - 1, device=x.device) / gamma).expand_as(y)
    hf, yf, wf = h.reshape(-1, h.shape[-1]), y.reshape(-1), w.reshape(-1).contiguous()
    if x.device.type == "cpu":
        loss = tt.HeadLoss.apply(hf, target.lm_head.weight, yf, wf)
    else:
        z = torch.nn.functional.cross_entropy(target.lm_head(hf).float(), yf, reduction="none")
        loss = (z * wf).sum() / wf.sum()
    return loss, h.detach(), y


@torch.no_grad()
def accept_estimate(model, target, feats_of, out, family, gen):
    """Mean accepted draft tokens per block on held-out target samples (last rows of gen.bin), or held-out text."""
    if (out / family / "gen.bin").exists():
        rows = np.memmap(out / family / "gen.bin", dtype=np.uint16, mode="r").reshape(-1, 256)[-48:]
        x = torch.from_numpy(rows.astype(np.int64))
    else:
        x = next(tt.batches(out / "val.bin", 48, 255, 99))
    x = x.to(next(model.parameters()).device)
    _, h, y = forward_loss(model, target, feats_of(x), x, 12, gen, 7.0)
    ok = target.lm_head(h).argmax(-1) == y
    run = ok.long().cumprod(-1).sum(-1).float()
    per_temp = [run[i::3].mean().item() for i in range(3)]  # rows cycle through greedy, 0.6, 1.0
    return [round(v, 2) for v in per_temp], [round(v, 3) for v in ok.float().mean((0, 1)).tolist()]


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", type=pathlib.Path, default="out", help="folder of this run, as prepare.py left it")
    ap.add_argument("--family", default="hybrid")
    ap.add_argument("--steps", type=int, default=1800)
    ap.add_argument("--bs", type=int, default=12)
    ap.add_argument("--seq", type=int, default=256)
    ap.add_argument("--anchors", type=int, default=14)
    ap.add_argument("--block", type=int, default=16)
    ap.add_argument("--layers", type=int, default=3)
    ap.add_argument("--ff", type=int, default=512)
    ap.add_argument("--window", type=int, help="of all layers but the last")
    ap.add_argument("--lr", type=float, default=3e-3)
    ap.add_argument("--adam-lr", type=float, default=2e-3)
    ap.add_argument("--rows", type=int, default=3072)
    ap.add_argument("--keep", type=int, default=0, help="sequences whose features are kept; 0 takes new ones every step")
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--device", default="cpu")
    ap.add_argument("--save-every", type=float, default=240)
    ap.add_argument("--bench", type=int, default=0)
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    models.open_run(a.out)
    d = a.out / f"{a.family}-dflash"
    d.mkdir(parents=True, exist_ok=True)
    if a.rows and not (a.out / a.family / "gen.bin").exists():
        subprocess.run([sys.executable, str(pathlib.Path(__file__).parent / "gen_data.py"), "--out", str(a.out), "--family", a.family,
                        "--rows", str(a.rows), "--threads", str(a.threads), "--device", a.device], check=True)
    if a.device == "cpu" and a.family.startswith("hybrid"):
        import gdr_cpu
        gdr_cpu.install()
    target = models.from_dir(a.out / a.family / "hf").to(a.device).eval()
    torch.manual_seed(1)
    model = dflash.DFlash(dflash.make_config(target.config, a.layers, block=a.block, n_ff=a.ff, window=a.window)).to(a.device)
    feats_of = dflash.Features(target, model.target_layer_ids)
    opts = tt.optimisers(model, a.lr, a.adam_lr, 0.02)
    base = [[g["lr"] for g in o.param_groups] for o in opts]
    gen, gamma, step, ck = torch.Generator().manual_seed(3), GAMMA.get(a.block, a.block / 2.3), 0, d / "ckpt.pt"
    if ck.exists() and not a.bench:
        s = torch.load(ck, map_location=a.device)
        model.load_state_dict(s["model"])
        for o, x in zip(opts, s["opts"]):
            o.load_state_dict(x)
        step = s["step"]
    it = sequences(a.out, a.family, a.bs, a.seq, 50 + step)
    n = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"drafter {n:.2f} M parameters, layers {model.target_layer_ids}, {a.steps} steps from {step}", flush=True)

    kept = Kept(it, a.keep, feats_of) if a.keep else None

    def save():
        tmp = ck.with_suffix(".tmp")
        torch.save({"model": model.state_dict(), "opts": [o.state_dict() for o in opts], "step": step}, tmp)
        os.replace(tmp, ck)
        model.save(d / "hf")

    t0 = tsave = time.time()
    c0, acc = time.process_time(), []
    while step < a.steps:
        k = tt.schedule(step, a.steps)
        for o, b in zip(opts, base):
            for g, lr in zip(o.param_groups, b):
                g["lr"] = lr * k
        if a.keep:
            x, feats = kept.draw(a.bs, gen)
        else:
            x = next(it).to(a.device)
            feats = feats_of(x)
        loss, _, _ = forward_loss(model, target, feats, x, a.anchors, gen, gamma)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in opts:
            o.step()
            o.zero_grad(set_to_none=True)
        step += 1
        acc.append(loss.item())
        if a.bench and step == a.bench:
            print(f"{(time.time() - t0) / step:.2f} s/step wall, {(time.process_time() - c0) / step:.2f} CPU s/step")
            return
        if step % 25 == 0:
            rec = {"step": step, "loss": round(sum(acc) / len(acc), 4), "elapsed": round(time.time() - t0),
                   "s_per_step": round((time.time() - t0) / step, 2)}
            if step % 100 == 0:
                rec["accepted"], rec["per_position"] = accept_estimate(model, target, feats_of, a.out, a.family,
                                                                       torch.Generator().manual_seed(9))
            acc = []
            with open(d / "log.jsonl", "a") as f:
                f.write(json.dumps(rec) + "\n")
            print(rec, flush=True)
            if time.time() - tsave > a.save_every:
                save()
                tsave = time.time()
            if (d / "STOP").exists():
                break
    save()


if __name__ == "__main__":
    main()
