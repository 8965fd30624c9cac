"""DFlash2 in plain torch, from the formulas: what it adds to `dflash_reference.py`.

Around each sublayer a convolution along the rows of the block ("two-tap grouped dynamic causal convolution"; the number of
taps is a parameter). With `u` the normed input of the sublayer, `G` groups of channels, `K` taps and row i of the block:

    delta_i = W_proj u_i                                          [2, K, G]
    conv_side(x)_i[c] = sum_t (base[side, t, c] + delta_i[side, t, c / (H / G)]) x_(i-t)[c],   x of rows before 0 is 0
    sublayer: x + conv_1(f(conv_0(u)))

Rows of the context are not convolved. Behind the head a selector walks from the anchor through the likeliest candidates of
each row, with h_i the normed state and z_i the logits, scaled and capped:

    score_i(c | p) = z_i[c] + sum_d A[p, d] (P h_i)_d B[c, d]
"""
import torch

import dflash_reference


def shapes(c) -> dict[str, tuple[int, ...]]:
    h, v, d = c["hidden_size"], c["vocab_size"], c["dflash_config"]
    k, g, r = d["conv_kernel_size"], h // d["conv_group_size"], d["selector_rank"]
    out = dflash_reference.shapes(c)
    for i in range(c["num_hidden_layers"]):
        for part in ["attention", "mlp"]:
            p = f"layers.{i}.{part}_conv."
            out |= {p + "base_kernel": (2, k, h), p + "kernel_projection.weight": (2 * k * g, h)}
    s = "candidate_selector."
    return out | {s + "predecessor_codebook": (v, r), s + "successor_codebook": (v, r),
                  s + "hidden_projection.weight": (r, h)}


def random(key, shape, noise):
    """A value for a parameter, or none if version 1 has it too: kernels that mix rows, a selector as loud as the logits."""
    if key.endswith("base_kernel"):
        noise = 0.4 * noise
        noise[:, 0] += 1
        return noise
    if key.endswith("kernel_projection.weight"):
        return 0.4 * noise / shape[1] ** 0.5
    if key.endswith("_codebook"):
        return 0.9 * noise
    return None


class Drafter(dflash_reference.Drafter):
    all_causal = False

    def around(self, il, part, u):
        name, d = f"layers.{il}.{part}_conv.", self.c["dflash_config"]
        base, n_tap, n_group = self.w[name + "base_kernel"], d["conv_kernel_size"], u.shape[1] // d["conv_group_size"]
        delta = (u @ self.w[name + "kernel_projection.weight"].T).view(len(u), 2, n_tap, n_group)

        def conv(side, x):
            wide = delta[:, side].repeat_interleave(d["conv_group_size"], -1)  # [rows, n_tap, H]
            past = torch.stack([torch.cat([0 * x[:t], x[:len(x) - t]]) for t in range(n_tap)], 1)
            out = ((base[side] + wide) * past).sum(1)
            # The same, number by number.
            for i in range(len(x)):
                for c in range(0, x.shape[1], 3):
                    one = sum((base[side, t, c] + delta[i, side, t, c // d["conv_group_size"]]) * x[i - t, c]
                              for t in range(min(n_tap, i + 1)))
                    assert (one - out[i, c]).abs() < 1e-12
            return out

        return conv(0, u), lambda y: conv(1, y)

    def walk(self, anchor, hidden, logits):
        """The greedy path of rows 1.., the log of each choice's share among its candidates, and the smallest lead by which
        a choice or a place among the candidates was had."""
        a, b = (self.w[f"candidate_selector.{which}_codebook"] for which in ["predecessor", "successor"])
        gate = hidden @ self.w["candidate_selector.hidden_projection.weight"].T
        k, path, log_q, lead = self.c["dflash_config"]["selector_top_k"], [], [], float("inf")
        p = anchor
        for i in range(1, len(hidden)):
            top = logits[i].topk(k + 1)
            ids = top.indices[:k]
            score = logits[i][ids] + (a[p] * gate[i] * b[ids]).sum(-1)
            best = score.topk(2)
            lead = min(lead, (best.values[0] - best.values[1]).item(), (top.values[k - 1] - top.values[k]).item())
            p = int(ids[best.indices[0]])
            path.append(p)
            log_q.append(score.log_softmax(0)[best.indices[0]])
        return torch.tensor(path, dtype=torch.int32), torch.stack(log_q), lead
