"""Qwen3.5's prediction head ("NextN", multi-token prediction) in plain torch, from the formulas.

transformers ignores the head's weights (`mtp.*`), so this is written from the layout of the checkpoints: one decoder layer
with full attention behind a projection of the pair (token, state). `H` hidden size, `D` head size, `n` committed tokens.

Row i of a sequence is (token i, the target's normed state of position i - 1), for i = 1..n-1; position 0 has no state
before it and no row. A draft goes on with (anchor, state n - 1) at position n, and then with its own choice and its own
normed state, each row at the next position and seeing all rows before it.
"""
import torch


def shapes(c) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of the head."""
    h, d = c["hidden_size"], c["head_dim"]
    nh, nkv = c["num_attention_heads"], c["num_key_value_heads"]
    p = "mtp.layers.0."
    return {"mtp.fc.weight": (h, 2 * h), "mtp.pre_fc_norm_embedding.weight": (h,), "mtp.pre_fc_norm_hidden.weight": (h,),
            "mtp.norm.weight": (h,), p + "input_layernorm.weight": (h,), p + "post_attention_layernorm.weight": (h,),
            # Each head has its query rows and then its gate rows.
            p + "self_attn.q_proj.weight": (2 * nh * d, h), p + "self_attn.k_proj.weight": (nkv * d, h),
            p + "self_attn.v_proj.weight": (nkv * d, h), p + "self_attn.o_proj.weight": (h, nh * d),
            p + "self_attn.q_norm.weight": (d,), p + "self_attn.k_norm.weight": (d,)} | mlp_shapes(c, p + "mlp.")


def mlp_shapes(c, p) -> dict[str, tuple[int, ...]]:
    h = c["hidden_size"]
    one = lambda q, f: {q + "gate_proj.weight": (f, h), q + "up_proj.weight": (f, h), q + "down_proj.weight": (h, f)}
    if "num_experts" not in c:
        return one(p, c["intermediate_size"])
    n, f = c["num_experts"], c["moe_intermediate_size"]
    return {p + "gate.weight": (n, h), p + "experts.gate_up_proj": (n, 2 * f, h), p + "experts.down_proj": (n, h, f),
            p + "shared_expert_gate.weight": (1, h)} | one(p + "shared_expert.", c["shared_expert_intermediate_size"])


class Head:
    def __init__(self, config, weights, embedding, lm_head):
        self.c, self.w, self.embedding, self.lm_head = config, weights, embedding, lm_head
        self.eps = config["rms_norm_eps"]
        # The least by which an expert was chosen before another.
        self.margin = float("inf")

    def norm(self, x, name):
        """Weights are stored as their distance from 1."""
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps) * (1 + self.w[name])

    def rope(self, x, pos):
        """x [rows, heads, D]; the first part of a head turns, dimension i with i + half of that part."""
        rot = int(self.c["head_dim"] * self.c["rope_parameters"]["partial_rotary_factor"])
        theta = self.c["rope_parameters"]["rope_theta"]
        angle = pos.to(x.dtype)[:, None] * theta ** (-torch.arange(0, rot, 2, dtype=x.dtype) / rot)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        a, b, rest = x[..., :rot // 2], x[..., rot // 2:rot], x[..., rot:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    def mlp(self, m, p):
        """SwiGLU; or the sum of the experts that a router likes best, each by its share of their softmax, and of an expert
        for every row behind a gate."""
        def one(x, gate, up, down):
            return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

        parts = lambda q: [self.w[f"{q}{part}_proj.weight"] for part in ["gate", "up", "down"]]
        if "num_experts" not in self.c:
            return one(m, *parts(p))
        n, f = self.c["num_experts_per_tok"], self.c["moe_intermediate_size"]
        rows = []
        for x in m:
            top = (self.w[p + "gate.weight"] @ x).softmax(0).topk(n + 1)
            self.margin = min(self.margin, (top.values[n - 1].log() - top.values[n].log()).item())
            share = top.values[:n] / top.values[:n].sum()
            experts = zip(self.w[p + "experts.gate_up_proj"][top.indices[:n]],
                          self.w[p + "experts.down_proj"][top.indices[:n]], share)
            rows.append(sum(s * one(x, gate_up[:f], gate_up[f:], down) for gate_up, down, s in experts))
        shared = (m @ self.w[p + "shared_expert_gate.weight"].T).sigmoid() * one(m, *parts(p + "shared_expert."))
        return torch.stack(rows) + shared

    def forward(self, tokens, hidden, pos):
        """Rows of (token, state before it) at ascending positions -> normed states, logits. Row r sees rows 0..=r."""
        c, d, p = self.c, self.c["head_dim"], "mtp.layers.0."
        w = lambda name: self.w[p + name + ".weight"]
        e = self.norm(self.embedding[tokens], "mtp.pre_fc_norm_embedding.weight")
        x = torch.cat([e, self.norm(hidden, "mtp.pre_fc_norm_hidden.weight")], -1) @ self.w["mtp.fc.weight"].T
        u = self.norm(x, p + "input_layernorm.weight")
        q, gate = (u @ w("self_attn.q_proj").T).view(len(u), -1, 2, d).unbind(2)
        k = (u @ w("self_attn.k_proj").T).view(len(u), -1, d)
        v = (u @ w("self_attn.v_proj").T).view(len(u), -1, d)
        q = self.rope(self.norm(q, p + "self_attn.q_norm.weight"), pos)
        k = self.rope(self.norm(k, p + "self_attn.k_norm.weight"), pos)
        group = c["num_attention_heads"] // c["num_key_value_heads"]
        score = torch.einsum("rhd,khd->hrk", q, k.repeat_interleave(group, 1)) / d ** 0.5
        score = score.masked_fill(torch.ones(len(u), len(u)).triu(1).bool(), -torch.inf)
        o = torch.einsum("hrk,khd->rhd", score.softmax(-1), v.repeat_interleave(group, 1)) * gate.sigmoid()
        x = x + o.flatten(1) @ w("self_attn.o_proj").T
        m = self.norm(x, p + "post_attention_layernorm.weight")
        x = x + self.mlp(m, p + "mlp.")
        hn = self.norm(x, "mtp.norm.weight")
        return hn, hn @ self.lm_head.T

    def draft(self, tokens, hidden, anchor, n_draft):
        """A greedy draft behind `tokens` `[n]`, whose normed target states are `hidden`: logits of each step."""
        n, logits = len(tokens), []
        rows, states = [*tokens[1:].tolist(), anchor], [*hidden]  # state i goes with token i + 1
        for _ in range(n_draft):
            pos = torch.arange(1, len(rows) + 1)
            hn, out = self.forward(torch.tensor(rows), torch.stack(states), pos)
            logits.append(out[-1])
            rows.append(int(out[-1].argmax()))
            states.append(hn[-1])
        assert len(rows) == n + n_draft
        return torch.stack(logits)
