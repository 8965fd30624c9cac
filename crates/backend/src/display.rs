//! A plan as text, one line an op, for bug reports and for reading what a model recorded.
//!
//! ```text
//! 4 ops in 4 waves, 4 buffers; values a row: 8 batch, 12 output
//! wave 0
//!   b0[4] = embed w0
//! wave 1
//!   b1[4] = rms_norm b0, w1, groups of 4, eps 1e-6
//! wave 2
//!   b2[4 out] = select_outputs b1
//! wave 3
//!   b3[8 out] = matmul w2 b2    -> output
//! ```

use std::fmt;

use crate::{
    op::{BlockMask, Factor, HeadMap, Op},
    plan::{Buf, Plan, Rows, StateId, WeightId},
};

impl fmt::Display for Buf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "b{}", self.0)
    }
}

impl fmt::Display for WeightId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "w{}", self.0)
    }
}

impl fmt::Display for StateId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s{}", self.0)
    }
}

impl fmt::Display for BlockMask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            BlockMask::Causal => "causal",
            BlockMask::Full => "full",
            BlockMask::Past => "past",
        })
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (n_op, n_wave, n_buf) = (self.ops.len(), self.waves.len(), self.bufs.len());
        let [batch, output] = self.arena_width;
        writeln!(
            f,
            "{n_op} ops in {n_wave} waves, {n_buf} buffers; values a row: {batch} batch, {output} output"
        )?;
        for (i, wave) in self.waves.iter().enumerate() {
            writeln!(f, "wave {i}")?;
            for op in &self.ops[wave.clone()] {
                writeln!(f, "  {}", self.line(op).trim_end())?;
            }
        }
        Ok(())
    }
}

impl Plan {
    fn line(&self, op: &Op) -> String {
        let kept = |buf: Buf| match buf {
            _ if self.output == Some(buf) => "    -> output",
            _ if self.taps == Some(buf) => "    -> taps",
            _ => "",
        };
        let to = |buf: Buf, what: String| format!("{} = {what}{}", self.shape(buf), kept(buf));
        let or = |id: Option<WeightId>, what: &str| id.map_or(String::new(), |id| format!(", {what} {id}"));
        match op {
            Op::Embed { table, dst, scale } if *scale == 1.0 => to(*dst, format!("embed {table}")),
            Op::Embed { table, dst, scale } => to(*dst, format!("embed {table}, scale {scale}")),
            Op::Input { dst } => to(*dst, "input".into()),
            Op::MatMul { weight, bias, src, dst } => {
                to(*dst, format!("matmul {weight} {src}{}", or(*bias, "bias")))
            }
            Op::Router { logits, spec, ids, weights } => format!(
                "{}, {} = router {logits}, {:?}, {}scale {}{}",
                self.shape(*ids),
                self.shape(*weights),
                spec.score,
                if spec.normalise { "normalised, " } else { "" },
                spec.scale,
                or(spec.expert_scale, "expert scale")
            ),
            Op::ExpertMatMul { weight, n_expert, ids, src, dst, .. } => {
                to(*dst, format!("expert_matmul {weight} {src}, {n_expert} experts, ids {ids}"))
            }
            Op::WeightedSum { src, weights, dst } => {
                to(*dst, format!("weighted_sum {src}, weights {weights}"))
            }
            Op::RmsNorm { src, weight, dst, eps, group } => {
                to(*dst, format!("rms_norm {src}{}, groups of {group}, eps {eps:e}", or(*weight, "weight")))
            }
            Op::GatedRmsNorm { src, gate, weight, dst, eps, group } => to(
                *dst,
                format!("gated_rms_norm {src}, gate {gate}, weight {weight}, groups of {group}, eps {eps:e}"),
            ),
            Op::Rope { src, dst, head_dim, rope } => to(
                *dst,
                format!(
                    "rope {src}, {} of {head_dim}, base {:e}, {:?}{}",
                    rope.n_rot,
                    rope.base,
                    rope.pairing,
                    or(rope.factors, "factors")
                ),
            ),
            Op::KvAppend { state, k, v } => {
                format!("{state} <- kv_append {}, {}", self.shape(*k), self.shape(*v))
            }
            Op::Attention(op) => {
                let window = op.window.map_or(String::new(), |window| format!(", window {window}"));
                to(
                    op.dst,
                    format!(
                        "attention {}, {}, {} heads, scale {}, {}{window}{}",
                        op.state,
                        op.q,
                        op.n_head,
                        op.scale,
                        op.mask,
                        or(op.sinks, "sinks")
                    ),
                )
            }
            Op::ShortConv { state, weight, src, dst } => {
                to(*dst, format!("short_conv {state}, {weight} {src}"))
            }
            Op::LocalConv { base, delta, side, n_tap, src, dst } => {
                to(*dst, format!("local_conv {base} of {n_tap}, side {side}, {src}, delta {delta}"))
            }
            Op::DeltaGates { alpha, b, dt_bias, a, decay, beta } => format!(
                "{}, {} = delta_gates {alpha}, {b}, dt_bias {dt_bias}, a {a}",
                self.shape(*decay),
                self.shape(*beta)
            ),
            Op::DeltaRule { state, qkv, decay, beta, dst, heads, eps } => {
                let heads = match heads {
                    HeadMap::Tiled => "tiled",
                    HeadMap::Grouped => "grouped",
                };
                to(
                    *dst,
                    format!("delta_rule {state}, {qkv}, decay {decay}, beta {beta}, {heads}, eps {eps:e}"),
                )
            }
            Op::SiluMul { gate, up, dst } => to(*dst, format!("silu_mul {gate}, {up}")),
            Op::GeluMul { gate, up, dst } => to(*dst, format!("gelu_mul {gate}, {up}")),
            Op::Softcap { src, cap, dst } => to(*dst, format!("softcap {src}, cap {cap}")),
            Op::Scale { src, factor: Factor::Constant(by), dst } => to(*dst, format!("scale {src}, by {by}")),
            Op::Scale { src, factor: Factor::Weight(id), dst } => to(*dst, format!("scale {src}, by {id}")),
            Op::SigmoidMul { src, gate, dst } => to(*dst, format!("sigmoid_mul {src}, gate {gate}")),
            Op::Add { a, b, dst } => to(*dst, format!("add {a}, {b}")),
            Op::Columns { src, dst, group, offset, len } => {
                to(*dst, format!("columns {offset}..{} of every {group} of {src}", offset + len))
            }
            Op::Place { src, dst, column } => {
                to(*dst, format!("place {src} at {column}..{}", column + self.width(*src)))
            }
            Op::SelectOutputs { src, dst } => to(*dst, format!("select_outputs {src}")),
        }
    }

    /// A buffer with its width, and with its rows where those are not the batch's.
    fn shape(&self, buf: Buf) -> String {
        match self.rows(buf) {
            Rows::Batch => format!("{buf}[{}]", self.width(buf)),
            Rows::Output => format!("{buf}[{} out]", self.width(buf)),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::{AttentionOp, BlockMask, Matrix, PlanBuilder, StateId, Tap, Vector, WeightId};

    #[test]
    fn a_plan_reads_as_the_model_that_recorded_it() {
        let matrix = |id, n_in, n_out| Matrix { id: WeightId(id), n_in, n_out };
        let mut p = PlanBuilder::new(&[Tap::Layer(0)]);
        let x = p.embed(&matrix(0, 4, 9), 1.0);
        let h = p.rms_norm(x, &Vector { id: WeightId(1), len: 4 }, 1e-6);
        let [q, k, v] = p.matmuls(h, [&matrix(2, 4, 4), &matrix(3, 4, 2), &matrix(4, 4, 2)]);
        p.kv_append(StateId(0), k, v);
        let y = p.attention(|dst| AttentionOp {
            state: StateId(0),
            q,
            dst,
            n_head: 2,
            scale: 0.5,
            mask: BlockMask::Causal,
            window: Some(8),
            sinks: Some(WeightId(5)),
        });
        let x = p.add(x, y);
        p.tap(0, x);
        let x = p.select_outputs(x);
        let logits = p.matmul(x, &matrix(0, 4, 9));
        let plan = p.finish(Some(logits));
        let want = "\
11 ops in 8 waves, 10 buffers; values a row: 16 batch, 13 output
wave 0
  b0[4] = embed w0
wave 1
  b1[4] = rms_norm b0, weight w1, groups of 4, eps 1e-6
wave 2
  b2[4] = matmul w2 b1
  b3[2] = matmul w3 b1
  b4[2] = matmul w4 b1
wave 3
  s0 <- kv_append b3[2], b4[2]
wave 4
  b5[4] = attention s0, b2, 2 heads, scale 0.5, causal, window 8, sinks w5
wave 5
  b6[4] = add b0, b5
wave 6
  b7[4] = place b6 at 0..4    -> taps
  b8[4 out] = select_outputs b6
wave 7
  b9[9 out] = matmul w0 b8    -> output
";
        assert_eq!(plan.to_string(), want, "\n{plan}");
    }
}
