"""Text sampled from a target, for drafter training (the drafter must learn what
the target says, not what the corpus says).  A third of the rows greedy, a
third at temperature 0.6, a third at 1.0; the prompts are corpus beginnings.

    python gen_data.py --family hybrid --rows 8192   ->  out/<family>/gen.bin ([rows, 256] uint16)
"""
import argparse
import pathlib
import time

import numpy as np
import torch

import models


@torch.no_grad()
def generate(model, prompt, length, temp):
    out = model(input_ids=prompt, use_cache=True)
    cache, rows = out.past_key_values, [prompt]
    n = prompt.shape[1]
    for i in range(length - n):
        z = out.logits[:, -1].float()
        z[:, models.MASK] = -1e9
        t = torch.where((temp > 0)[:, None], z / temp.clamp(min=1e-3)[:, None], z)
        g = -torch.empty_like(t).exponential_().log()
        nxt = torch.where((temp > 0)[:, None], t + g, z).argmax(-1, keepdim=True)
        rows.append(nxt)
        if i + n + 1 < length:
            out = model(input_ids=nxt, past_key_values=cache, use_cache=True)
    return torch.cat(rows, 1)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", type=pathlib.Path, default="out", help="folder of this run, as prepare.py left it")
    ap.add_argument("--family", default="hybrid")
    ap.add_argument("--rows", type=int, default=8192)
    ap.add_argument("--length", type=int, default=256)
    ap.add_argument("--bs", type=int, default=192)
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--device", default="cpu")
    ap.add_argument("--seed", type=int, default=5)
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    models.open_run(a.out)
    torch.manual_seed(a.seed)
    model = models.from_dir(a.out / a.family / "hf").to(a.device).eval()
    data = np.memmap(a.out / "train.bin", dtype=np.uint16, mode="r")
    starts = np.flatnonzero(np.asarray(data) == models.EOT)[:-1] + 1
    rng = np.random.default_rng(a.seed)
    path, done, t0 = a.out / a.family / "gen.bin", 0, time.time()
    with open(path, "wb") as f:
        while done < a.rows:
            n = int(rng.integers(6, 40))
            s = rng.choice(starts[starts < len(data) - 64], a.bs)
            prompt = torch.from_numpy(np.stack([data[i:i + n] for i in s]).astype(np.int64)).to(a.device)
            temp = torch.tensor([0.0, 0.6, 1.0], device=a.device).repeat(a.bs // 3 + 1)[:a.bs]
            x = generate(model, prompt, a.length, temp)
            f.write(x.cpu().numpy().astype(np.uint16).tobytes())
            done += a.bs
            print(f"{done} rows, {done * a.length / (time.time() - t0):.0f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
