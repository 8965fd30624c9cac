"""DFlash v1 in plain torch, twice: once as formulas over the whole context, once with a cache and loops.

Follows the published drafters ("DFlash", arXiv 2602.06036; tensor names of the z-lab checkpoints).
`H` hidden, `D` head size, `n` committed positions, `R` rows of the block.

The target's tapped hidden states become context rows once, `ctx = RMSNorm(fc · features; hidden_norm)`; each layer
projects them with the same k/v matrices, k norm and rotation as the block's own rows. Row 0 of the block is the anchor
at position n, rows 1.. are mask tokens. Position p sees a context key c if the layer is full or p - c < W; it sees all
rows of the block, except that a sliding layer is causal inside the block, unless `is_causal` says otherwise for all
layers.
"""
import torch


def shapes(c) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a drafter's checkpoint."""
    h, d, f = c["hidden_size"], c["head_dim"], c["intermediate_size"]
    nh, nkv = c["num_attention_heads"], c["num_key_value_heads"]
    out = {"fc.weight": (h, h * len(c["dflash_config"]["target_layer_ids"])), "hidden_norm.weight": (h,),
           "norm.weight": (h,)}
    for i in range(c["num_hidden_layers"]):
        p = f"layers.{i}."
        out |= {p + "input_layernorm.weight": (h,), p + "post_attention_layernorm.weight": (h,),
                p + "self_attn.q_proj.weight": (nh * d, h), p + "self_attn.k_proj.weight": (nkv * d, h),
                p + "self_attn.v_proj.weight": (nkv * d, h), p + "self_attn.o_proj.weight": (h, nh * d),
                p + "self_attn.q_norm.weight": (d,), p + "self_attn.k_norm.weight": (d,),
                p + "mlp.gate_proj.weight": (f, h), p + "mlp.up_proj.weight": (f, h), p + "mlp.down_proj.weight": (h, f)}
    return out


def rms(x, w, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * w


def rope(x, pos, theta):
    """x [rows, heads, D]; the pair of dimension i is i + D/2."""
    d = x.shape[-1]
    angle = pos.to(x.dtype)[:, None] * theta ** (-torch.arange(0, d, 2, dtype=x.dtype) / d)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x[..., :d // 2], x[..., d // 2:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Drafter:
    """The weights, and the dense form."""

    # Whether all layers are causal inside the block, where the config does not say; none if each as its kind.
    all_causal = None

    def __init__(self, config, weights, embedding, head, cap=None, factor=1.0):
        self.c, self.w, self.embedding, self.head = config, weights, embedding, head
        self.factor = factor
        self.eps = config["rms_norm_eps"]
        self.cap = cap

    def fuse(self, features):
        return rms(features @ self.w["fc.weight"].T, self.w["hidden_norm.weight"], self.eps)

    def layer(self, il, name):
        return self.w[f"layers.{il}.{name}.weight"]

    def window(self, il):
        return self.c["sliding_window"] if self.c["layer_types"][il] == "sliding_attention" else None

    def causal(self, il):
        explicit = self.c.get("is_causal", self.all_causal)
        return self.window(il) is not None if explicit is None else explicit

    def embed(self, anchor, n_row):
        ids = torch.full((n_row,), self.c["dflash_config"]["mask_token_id"])
        ids[0] = anchor
        return self.embedding[ids]

    def keys(self, il, x, pos):
        k = (x @ self.layer(il, "self_attn.k_proj").T).view(len(x), -1, self.c["head_dim"])
        return rope(rms(k, self.layer(il, "self_attn.k_norm"), self.eps), pos, self.c["rope_theta"])

    def values(self, il, x):
        return (x @ self.layer(il, "self_attn.v_proj").T).view(len(x), -1, self.c["head_dim"])

    def queries(self, il, x, pos):
        q = (x @ self.layer(il, "self_attn.q_proj").T).view(len(x), -1, self.c["head_dim"])
        return rope(rms(q, self.layer(il, "self_attn.q_norm"), self.eps), pos, self.c["rope_theta"])

    def around(self, il, part, u):
        """What goes into a sublayer in place of `u`, and what is done to what comes out of it: nothing in version 1."""
        return u, lambda y: y

    def mlp(self, il, x):
        v, finish = self.around(il, "mlp", rms(x, self.layer(il, "post_attention_layernorm"), self.eps))
        gate, up = v @ self.layer(il, "mlp.gate_proj").T, v @ self.layer(il, "mlp.up_proj").T
        return finish((torch.nn.functional.silu(gate) * up) @ self.layer(il, "mlp.down_proj").T)

    def finish(self, states):
        out = {f"layer.{il}": x for il, x in enumerate(states)}
        out["final_norm"] = rms(states[-1], self.w["norm.weight"], self.eps)
        logits = self.factor * (out["final_norm"] @ self.head.T)
        out["logits"] = logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)
        return out

    def mask(self, il, n, n_row):
        """[n_row, n + n_row], True where the query of a row may look."""
        pos = torch.arange(n + n_row)
        query, key = pos[n:, None], pos[None]
        see = torch.ones(n_row, n + n_row, dtype=torch.bool)
        if (w := self.window(il)) is not None:
            see &= (query - key < w)
        if self.causal(il):
            see &= key <= query
        return see

    def dense(self, ctx, anchor, n_row):
        n = len(ctx)
        pos = torch.arange(n + n_row)
        x, states = self.embed(anchor, n_row), []
        group = self.c["num_attention_heads"] // self.c["num_key_value_heads"]
        for il in range(self.c["num_hidden_layers"]):
            u, finish = self.around(il, "attention", rms(x, self.layer(il, "input_layernorm"), self.eps))
            both = torch.cat([ctx, u])
            q = self.queries(il, u, pos[n:])
            k = self.keys(il, both, pos).repeat_interleave(group, 1)
            v = self.values(il, both).repeat_interleave(group, 1)
            score = torch.einsum("rhd,khd->hrk", q, k) / self.c["head_dim"] ** 0.5
            score = score.masked_fill(~self.mask(il, n, n_row), -torch.inf)
            o = torch.einsum("hrk,khd->rhd", score.softmax(-1), v).reshape(n_row, -1)
            x = x + finish(o @ self.layer(il, "self_attn.o_proj").T)
            x = x + self.mlp(il, x)
            states.append(x)
        return self.finish(states)


class Cache:
    """The incremental form: rotated keys and values of committed positions, visibility decided key by key."""

    def __init__(self, drafter):
        self.m, self.n = drafter, 0
        self.kv = [[] for _ in range(drafter.c["num_hidden_layers"])]  # per layer: (position, k, v)

    def extend(self, features, chunk):
        for i in range(0, len(features), chunk):
            ctx = self.m.fuse(features[i:i + chunk])
            pos = torch.arange(self.n, self.n + len(ctx))
            for il, rows in enumerate(self.kv):
                rows += zip(pos.tolist(), self.m.keys(il, ctx, pos), self.m.values(il, ctx))
            self.n += len(ctx)

    def rows(self):
        for rows in self.kv:
            yield torch.stack([k for _, k, _ in rows]).flatten(1), torch.stack([v for _, _, v in rows]).flatten(1)

    def visible(self, il, p, key, in_block):
        w = self.m.window(il)
        if in_block and not self.m.causal(il):
            return True
        if in_block and key > p:
            return False
        return w is None or p - key < w

    def draft(self, anchor, n_row):
        m, n = self.m, self.n
        group = m.c["num_attention_heads"] // m.c["num_key_value_heads"]
        pos = torch.arange(n, n + n_row)
        x, states = m.embed(anchor, n_row), []
        for il in range(m.c["num_hidden_layers"]):
            u, finish = m.around(il, "attention", rms(x, m.layer(il, "input_layernorm"), m.eps))
            q = m.queries(il, u, pos)
            own = list(zip(pos.tolist(), m.keys(il, u, pos), m.values(il, u)))
            out = torch.zeros_like(q)
            for r in range(n_row):
                p = n + r
                seen = [(k, v) for c, k, v in self.kv[il] if self.visible(il, p, c, False)]
                seen += [(k, v) for c, k, v in own if self.visible(il, p, c, True)]
                for h in range(m.c["num_attention_heads"]):
                    score = torch.stack([q[r, h] @ k[h // group] for k, _ in seen]) / m.c["head_dim"] ** 0.5
                    out[r, h] = sum(weight * v[h // group] for weight, (_, v) in zip(score.softmax(0), seen))
            x = x + finish(out.flatten(1) @ m.layer(il, "self_attn.o_proj").T)
            x = x + m.mlp(il, x)
            states.append(x)
        return m.finish(states)
