"""Faster CPU training path for the gated delta rule (see gdr_cpu.cpp).

`install()` replaces the pure-torch fallback inside transformers' Qwen3.5 modules
for calls without a cache; calls with a state go to the original function.
"""
import ctypes
import pathlib
import subprocess

import torch

HERE = pathlib.Path(__file__).parent
D, SEG = 64, 32


def _lib():
    so = HERE / "build" / f"gdr_cpu_{D}.so"
    src = HERE / "gdr_cpu.cpp"
    if not so.exists() or so.stat().st_mtime < src.stat().st_mtime:
        so.parent.mkdir(exist_ok=True)
        subprocess.run(["g++", "-O3", "-march=native", "-ffast-math", "-mprefer-vector-width=512", "-shared", "-fPIC",
                        f"-DD={D}", f"-DSEG={SEG}", str(src), "-o", str(so)], check=True)
    return ctypes.CDLL(str(so))


LIB = None


def _p(t):
    return ctypes.c_void_p(t.data_ptr())


class GDR(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, g, beta):
        n, T, d = q.shape
        o = torch.empty_like(v)
        ck = torch.empty(n, (T + SEG - 1) // SEG, d, d)
        LIB.gdr_forward(n, T, _p(q), _p(k), _p(v), _p(g), _p(beta), _p(o), _p(ck))
        ctx.save_for_backward(q, k, v, g, beta, ck)
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, g, beta, ck = ctx.saved_tensors
        n, T, d = q.shape
        do = do.contiguous()
        dq, dk, dv, dg, db = (torch.empty_like(x) for x in (q, k, v, g, beta))
        LIB.gdr_backward(n, T, _p(q), _p(k), _p(v), _p(g), _p(beta), _p(ck), _p(do), _p(dq), _p(dk), _p(dv), _p(dg),
                         _p(db))
        return dq, dk, dv, dg, db


@torch.compiler.disable
def _apply(*a):
    return GDR.apply(*a)


def fast(query, key, value, g, beta, **kw):
    """Same arguments and result as torch_chunk_gated_delta_rule, no cache, head size D."""
    b, T, hk, d = key.shape
    hv = value.shape[2]
    norm = lambda x: x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)
    query, key = norm(query.float()) * d ** -0.5, norm(key.float())
    if hk != hv:
        query, key = (x.repeat_interleave(hv // hk, dim=2) for x in (query, key))
    flat = lambda x: x.float().transpose(1, 2).contiguous().view(b * hv, T, *x.shape[3:])
    o = _apply(flat(query), flat(key), flat(value), flat(g), flat(beta))
    return o.view(b, hv, T, d).transpose(1, 2).to(value.dtype), None


def install():
    global LIB
    LIB = _lib()
    from transformers.models.qwen3_5 import modeling_qwen3_5 as a
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as b
    for m in (a, b):
        orig = m.torch_chunk_gated_delta_rule

        def pick(query, key, value, g, beta, initial_state=None, output_final_state=False,
                 use_qk_l2norm_in_kernel=False, _orig=orig, **kw):
            ok = (initial_state is None and not output_final_state and use_qk_l2norm_in_kernel
                  and key.device.type == "cpu" and key.shape[-1] == value.shape[-1] == D)
            if ok:
                return fast(query, key, value, g, beta)
            return _orig(query, key, value, g=g, beta=beta, initial_state=initial_state,
                         output_final_state=output_final_state, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, **kw)

        m.torch_chunk_gated_delta_rule = pick


if __name__ == "__main__":  # self-test against the reference, with gradients
    import time
    from transformers.models.qwen3_5 import modeling_qwen3_5 as a
    ref = a.torch_chunk_gated_delta_rule
    LIB = _lib()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    B, T = 16, 256
    xs = [torch.randn(B, T, 2, D), torch.randn(B, T, 2, D), torch.randn(B, T, 4, D), -torch.rand(B, T, 4) * 2,
          torch.rand(B, T, 4)]
    w = torch.randn(B, T, 4, D)
    grads = []
    for f in (ref, fast):
        ys = [x.clone().requires_grad_() for x in xs]
        t = time.time()
        o, _ = f(ys[0], ys[1], ys[2], g=ys[3], beta=ys[4], use_qk_l2norm_in_kernel=True)
        t1 = time.time()
        (o * w).sum().backward()
        print("forward", round(t1 - t, 3), "backward", round(time.time() - t1, 3))
        grads.append([o.detach()] + [y.grad for y in ys])
    for n, x, y in zip(("o", "dq", "dk", "dv", "dg", "dbeta"), *grads):
        print(n, ((x - y).norm() / x.norm()).item())
