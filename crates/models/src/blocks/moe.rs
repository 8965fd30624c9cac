//! A mixture of experts in place of the feed-forward layer: a router chooses a few of many small SwiGLU layers for each
//! row ("Outrageously Large Neural Networks", Shazeer et al.), and some models add one that every row goes through.
//!
//! ```text
//! w = top_k(softmax(Wr x)), divided by its sum
//! y = Σ_e w_e · down_e(silu(gate_e x) * up_e x)   [+ sigmoid(wg · x) · mlp_shared(x)]
//! ```

use paceline_backend::{Buf, Experts, Matrix, PlanBuilder, RouterScore, RouterSpec, Routes};

use crate::{
    Error, Hparams, Weights,
    blocks::{Act, Mlp},
};

/// Sizes of a mixture of experts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MoeShape {
    /// Width of the input.
    pub n_embd: usize,
    /// Experts.
    pub n_expert: usize,
    /// Width of one expert.
    pub n_ff: usize,
    /// Width of the expert that every row goes through, where a layer has one.
    pub n_ff_shared: usize,
    /// How experts are chosen.
    pub router: RouterSpec,
    /// What the gate of an expert goes through.
    pub act: Act,
}

impl MoeShape {
    /// Reads the `expert_*` keys; none if the file has no experts.
    pub fn read(w: &Weights, hp: &Hparams) -> Result<Option<MoeShape>, Error> {
        let meta = w.metadata();
        let read = |suffix: &str| meta.u32(&w.key(suffix)).map(|n| n.unwrap_or(0) as usize);
        let (n_expert, n_used) = (read("expert_count")?, read("expert_used_count")?);
        if n_expert == 0 {
            return Ok(None);
        }
        if n_used == 0 || n_used > n_expert || n_expert > 1 << 16 {
            let expected = format!("1 to the {n_expert} experts (of at most 65,536)");
            return Err(w.hparam(&w.key("expert_used_count"), expected, n_used));
        }
        let n_ff = read("expert_feed_forward_length")?;
        let key = w.key("expert_gating_func");
        let score = match meta.u32(&key)?.unwrap_or(1) {
            1 => RouterScore::Softmax,
            2 => RouterScore::Sigmoid,
            other => return Err(w.hparam(&key, "1 (softmax) or 2 (sigmoid)", other)),
        };
        let key = w.key("expert_weights_scale");
        let scale = meta.f32(&key)?.unwrap_or(1.0);
        if !scale.is_finite() || scale < 0.0 {
            return Err(w.hparam(&key, "a number from 0 on", scale));
        }
        let router = RouterSpec {
            n_used,
            score,
            normalise: meta.bool(&w.key("expert_weights_norm"))?.unwrap_or(true),
            // Files say 0 for none.
            scale: if scale == 0.0 { 1.0 } else { scale },
            expert_scale: None,
        };
        let n_ff_shared = read("expert_shared_feed_forward_length")?;
        Ok(Some(MoeShape { n_embd: hp.n_embd, n_expert, n_ff, n_ff_shared, router, act: Act::Silu }))
    }
}

/// A mixture of experts.
pub struct Moe {
    router: Matrix,
    spec: RouterSpec,
    act: Act,
    gate_up: GateUp,
    down: Experts,
    shared: Option<Shared>,
}

/// The first two projections as the file has them.
enum GateUp {
    Split([Experts; 2]),
    /// The gate's rows of each expert, then the other's.
    Fused(Experts),
}

/// The expert that every row goes through.
struct Shared {
    gate: Matrix,
    mlp: Mlp,
}

impl Moe {
    /// Loads `{prefix}ffn_gate_inp`, the `ffn_*_exps`, and the `ffn_*_shexp` where the layer has them.
    pub fn load(w: &Weights, prefix: &str, shape: &MoeShape) -> Result<Moe, Error> {
        let &MoeShape { n_embd, n_expert, n_ff, n_ff_shared, router, act } = shape;
        let name = |part: &str| format!("{prefix}{part}.weight");
        let experts = |part: &str, n_in: usize, n_out: usize, meaning: &str| {
            w.experts(&name(part), [n_in, n_out, n_expert], meaning)
        };
        let gate_up = if w.has(&name("ffn_gate_up_exps")) {
            GateUp::Fused(experts("ffn_gate_up_exps", n_embd, 2 * n_ff, "n_embd, gate|up rows, n_expert")?)
        } else {
            GateUp::Split([
                experts("ffn_gate_exps", n_embd, n_ff, "n_embd, n_ff of an expert, n_expert")?,
                experts("ffn_up_exps", n_embd, n_ff, "n_embd, n_ff of an expert, n_expert")?,
            ])
        };
        let gate = name("ffn_gate_inp_shexp");
        let shared = match w.has(&gate) {
            true => Some(Shared {
                gate: w.matrix(&gate, [n_embd, 1], "n_embd, 1")?,
                mlp: Mlp::load_named(w, prefix, "_shexp", n_embd, n_ff_shared)?,
            }),
            false => None,
        };
        Ok(Moe {
            router: w.matrix(&name("ffn_gate_inp"), [n_embd, n_expert], "n_embd, n_expert")?,
            spec: router,
            act,
            gate_up,
            down: experts("ffn_down_exps", n_ff, n_embd, "n_ff of an expert, n_embd, n_expert")?,
            shared,
        })
    }

    /// `[n, n_embd] -> [n, n_embd]`.
    pub fn forward(&self, p: &mut PlanBuilder<'_>, x: Buf) -> Buf {
        let routes = self.route(p, x);
        let y = self.experts(p, x, routes);
        let Some(shared) = &self.shared else { return y };
        let gate = p.matmul(x, &shared.gate);
        let h = shared.mlp.forward(p, x);
        let h = p.sigmoid_mul(h, gate);
        p.add(y, h)
    }

    /// `[n, n_embd] ->` the experts of each row.
    pub fn route(&self, p: &mut PlanBuilder<'_>, x: Buf) -> Routes {
        let logits = p.matmul(x, &self.router);
        p.router(logits, self.spec)
    }

    /// `[n, n_embd] -> [n, n_embd]`: what those experts make of the rows, weighted and added.
    pub fn experts(&self, p: &mut PlanBuilder<'_>, x: Buf, routes: Routes) -> Buf {
        // From here on a row has a part for each of its experts.
        let [gate, up] = match &self.gate_up {
            GateUp::Split(weights) => weights.map(|w| p.expert_matmul(x, routes, &w)),
            GateUp::Fused(w) => {
                let both = p.expert_matmul(x, routes, w);
                [0, w.n_out / 2].map(|first| p.columns(both, w.n_out, first, w.n_out / 2))
            }
        };
        let h = self.act.mul(p, gate, up);
        let h = p.expert_matmul(h, routes, &self.down);
        p.weighted_sum(h, routes)
    }
}
