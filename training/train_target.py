"""Train one tiny target model on the corpus of prepare.py; resumable.

    python train_target.py --family hybrid --tokens 24e6 --threads 1

Matrices inside the layers are trained with Muon, everything else with AdamW.
A prediction head learns together with its target: a third of its own loss is
added. So is a hundredth of what keeps the experts equally busy.
Writes out/<family>/ckpt.pt (weights, optimiser, step) every --save-every
seconds together with out/<family>/hf/ (a normal Hugging Face directory with
the tokenizer), and out/<family>/log.jsonl.  `touch out/<family>/STOP` ends a
run early.
"""
import argparse
import json
import math
import os
import pathlib
import shutil
import time

import numpy as np
import torch
import torch.nn.functional as F

import models


def batches(path, bs, seq, seed):
    """Endless random windows [bs, seq + 1]."""
    data = np.memmap(path, dtype=np.uint16, mode="r")
    rng = np.random.default_rng(seed)
    while True:
        i = rng.integers(0, len(data) - seq - 1, bs)
        yield torch.from_numpy(np.stack([data[j:j + seq + 1] for j in i]).astype(np.int64))


class HeadLoss(torch.autograd.Function):
    """Mean (or weighted mean) cross-entropy through a linear head, in slices that stay in cache."""

    @staticmethod
    def forward(ctx, h, w, y, wt):
        n = h.shape[0]
        dh, dw = torch.empty_like(h), torch.zeros_like(w)
        total = h.new_zeros(())
        norm = float(n) if wt is None else float(wt.sum())
        for i in range(0, n, 512):
            hs, ys = h[i:i + 512], y[i:i + 512]
            z = hs @ w.t()
            z -= z.logsumexp(-1, keepdim=True)
            nll = -z.gather(1, ys[:, None])[:, 0]
            z.exp_()
            z[torch.arange(len(ys)), ys] -= 1
            if wt is not None:
                ws = wt[i:i + 512]
                nll = nll * ws
                z *= ws[:, None]
            total += nll.sum()
            dh[i:i + 512] = z @ w
            dw.addmm_(z.t(), hs)
        ctx.save_for_backward(dh.div_(norm), dw.div_(norm))
        return total / norm

    @staticmethod
    def backward(ctx, g):
        dh, dw = ctx.saved_tensors
        return dh * g, dw * g if ctx.needs_input_grad[1] else None, None, None


def head_loss(model, h, y):
    return HeadLoss.apply(h.flatten(0, 1), model.lm_head.weight, y.flatten(), None)


def mtp_loss(model, h, x):
    """Of the prediction head: from the token at i + 1 and the state at i to the token at i + 2."""
    return head_loss(model, model.mtp(model.model, x[:, 1:-1], h[:, :-1]), x[:, 2:])


class Balance:
    """Collects what the routers of a forward say; `loss` is 1 if all experts are equally busy ("Switch Transformers",
    arXiv 2101.03961)."""

    def __init__(self, model):
        self.seen = []
        for m in model.modules():
            if type(m).__name__.endswith("TopKRouter"):
                m.register_forward_hook(lambda _m, _i, out: self.seen.append((out[0], out[2])))

    def loss(self):
        total = 0.0
        for logits, chosen in self.seen:
            n = logits.shape[-1]
            part = F.one_hot(chosen, n).float().mean((0, 1))
            total = total + n * (part * logits.softmax(-1).mean(0)).sum() / len(self.seen)
        self.seen.clear()
        return total


def loss_of(model, x):
    if hasattr(model, "mtp"):
        h = model.model(input_ids=x[:, :-1], use_cache=False).last_hidden_state
        loss = head_loss(model, h, x[:, 1:])
        return loss + mtp_loss(model, h, x) / 3 if model.training else loss
    if getattr(model.config, "final_logit_softcapping", None) or x.device.type != "cpu":
        logits = model(input_ids=x[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), x[:, 1:].flatten())
    h = model.model(input_ids=x[:, :-1], use_cache=False).last_hidden_state
    return head_loss(model, h, x[:, 1:])


def optimisers(model, lr, adam_lr, wd):
    mats, experts, rest = [], [], []
    for n, p in model.named_parameters():
        if not p.requires_grad:
            continue
        hidden = p.ndim == 2 and "embed" not in n and "lm_head" not in n and min(p.shape) >= 32
        (mats if hidden else experts if p.ndim == 3 and ".experts." in n else rest).append(p)
    return [torch.optim.Muon(mats, lr=lr, weight_decay=wd, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
            # Stacked experts are matrices too, which AdamW moves further in a step than Muon.
            torch.optim.AdamW([{"params": rest}, {"params": experts, "lr": adam_lr / 4}], lr=adam_lr, betas=(0.9, 0.95),
                              weight_decay=0.0)]


def schedule(step, total, warm=100, final=0.05):
    """Warm-up, flat, then linear to `final` over the last 40 %."""
    if step < warm:
        return (step + 1) / warm
    cut = 0.6 * total
    return 1.0 if step < cut else final + (1 - final) * max(0.0, (total - step) / (total - cut))


@torch.no_grad()
def evaluate(model, data, seq, n=48):
    model.eval()
    it = batches(data / "val.bin", 16, seq, 99)
    dev = next(model.parameters()).device
    v = [loss_of(model, next(it).to(dev)).item() for _ in range(n // 16)]
    model.train()
    return sum(v) / len(v)


@torch.no_grad()
def mtp_right(model, data, seq):
    """How often the prediction head's first choice is the next token of held-out text, where it drafts one token."""
    model.eval()
    x = next(batches(data / "val.bin", 16, seq, 99)).to(next(model.parameters()).device)
    h = model.model(input_ids=x[:, :-1], use_cache=False).last_hidden_state
    z = model.lm_head(model.mtp(model.model, x[:, 1:-1], h[:, :-1]))
    model.train()
    return (z.argmax(-1) == x[:, 2:]).float().mean().item()


def export(model, tokenizer, dest):
    dest.mkdir(parents=True, exist_ok=True)
    weights = model.state_dict()
    if model.config.tie_word_embeddings:
        # No text has the mask token, so as a row of the head its embedding was pushed far away from all states. A drafter's
        # masked rows begin with it and would have to push it back first.
        rows = weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
        rows[models.MASK] *= 0.05
        weights["lm_head.weight"] = rows
    model.save_pretrained(dest, state_dict=weights)
    for f in tokenizer.iterdir():
        shutil.copy(f, dest / f.name)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", type=pathlib.Path, default="out", help="folder of this run, as prepare.py left it")
    ap.add_argument("--family", default="hybrid", choices=models.FAMILIES)
    ap.add_argument("--tokens", type=float, default=24e6)
    ap.add_argument("--bs", type=int, default=16)
    ap.add_argument("--seq", type=int, default=256)
    ap.add_argument("--lr", type=float, default=4e-3)
    ap.add_argument("--adam-lr", type=float, default=4e-3)
    ap.add_argument("--wd", type=float, default=0.05)
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--save-every", type=float, default=240)
    ap.add_argument("--compile", action="store_true")
    ap.add_argument("--bf16", action="store_true")
    ap.add_argument("--device", default="cpu")
    ap.add_argument("--bench", type=int, default=0, help="run this many steps, print the speed, write nothing")
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    if a.device == "cpu" and a.family.startswith("hybrid"):
        import gdr_cpu
        gdr_cpu.install()
    models.open_run(a.out)
    model = models.build(a.family).to(a.device)
    model.train()
    balance = Balance(model)
    npar = sum(p.numel() for p in model.parameters())
    opts = optimisers(model, a.lr, a.adam_lr, a.wd)
    base = [[g["lr"] for g in o.param_groups] for o in opts]
    d = a.out / a.family
    ck = d / "ckpt.pt"
    total = int(a.tokens // (a.bs * a.seq))
    step = 0
    if not a.bench:
        d.mkdir(parents=True, exist_ok=True)
        if ck.exists():
            s = torch.load(ck, map_location=a.device)
            model.load_state_dict(s["model"])
            for o, x in zip(opts, s["opts"]):
                o.load_state_dict(x)
            step = s["step"]
    run = model
    if a.compile:
        for layer in model.model.layers:
            layer.forward = torch.compile(layer.forward)
    it = batches(a.out / "train.bin", a.bs, a.seq, 1000 + step)
    print(f"{a.family}: {npar / 1e6:.2f} M parameters, {total} steps of {a.bs}x{a.seq}, from step {step}", flush=True)

    def save():
        tmp = ck.with_suffix(".tmp")
        torch.save({"model": model.state_dict(), "opts": [o.state_dict() for o in opts], "step": step}, tmp)
        os.replace(tmp, ck)

    t0 = tsave = time.time()
    mark, mstep, acc = t0, step, []
    while step < total:
        k = schedule(step, total)
        for o, b in zip(opts, base):
            for g, lr in zip(o.param_groups, b):
                g["lr"] = lr * k
        x = next(it).to(a.device)
        with torch.autocast(a.device, dtype=torch.bfloat16, enabled=a.bf16):
            loss = loss_of(run, x)
        (loss + 0.01 * balance.loss()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in opts:
            o.step()
            o.zero_grad(set_to_none=True)
        step += 1
        acc.append(loss.item())
        if not math.isfinite(acc[-1]):
            raise SystemExit(f"loss is {acc[-1]} at step {step}")
        if a.bench and step >= a.bench:
            dt = time.time() - mark
            n = (step - mstep) * a.bs * a.seq
            print(f"{n / dt:.0f} tokens/s wall, {n / (time.process_time() - cpu0):.0f} tokens per CPU second, "
                  f"loss {acc[-1]:.3f}")
            return
        if a.bench and step == 3:
            mark, mstep, cpu0 = time.time(), step, time.process_time()
        if not a.bench and step % 25 == 0:
            now = time.time()
            rec = {"step": step, "tokens": step * a.bs * a.seq, "loss": round(sum(acc) / len(acc), 4),
                   "tok_s": round((step - mstep) * a.bs * a.seq / (now - mark)), "elapsed": round(now - t0)}
            rec["eta_min"] = round((total - step) * a.bs * a.seq / max(1, rec["tok_s"]) / 60)
            if step % 250 == 0:
                rec["val"] = round(evaluate(model, a.out, a.seq), 4)
                if hasattr(model, "mtp"):
                    rec["mtp_right"] = round(mtp_right(model, a.out, a.seq), 3)
                balance.seen.clear()
            mark, mstep, acc = now, step, []
            with open(d / "log.jsonl", "a") as f:
                f.write(json.dumps(rec) + "\n")
            print(rec, flush=True)
            if now - tsave > a.save_every:
                save()
                export(model, a.out / "tokenizer", d / "hf")
                tsave = now
            if (d / "STOP").exists():
                break
    save()
    export(model, a.out / "tokenizer", d / "hf")
    print("final validation loss", evaluate(model, a.out, a.seq, 160), flush=True)


if __name__ == "__main__":
    main()
