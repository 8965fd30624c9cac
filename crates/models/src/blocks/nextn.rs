//! A prediction head ("NextN", "multi-token prediction"): one more decoder layer behind the target's own, which reads
//! the target's last hidden state and the token that was chosen from it, and predicts the token after that
//! ("DeepSeek-V3 Technical Report", section 2.2; tensor names of GGUF files).
//!
//! ```text
//! row (token at position p, h = the target's normed state at p - 1, or the head's own of the row before)
//! x  = eh_proj · [ rms(embed(token); enorm) ; rms(h; hnorm) ]        the embedding's half first
//! x  = x + attention(rms(x; attn_norm))                              at position p, with KV of its own
//! x  = x + ffn(rms(x; post_attention_norm))
//! hn = rms(x; shared_head_norm)      logits of position p + 1 = head · hn
//! ```

use paceline_backend::{Buf, Matrix, PlanBuilder, StateDecl, StateId, Tap, Vector};

use crate::{
    Error, Hparams, SharedWeights, Weights,
    blocks::{Attention, AttentionShape, Ffn},
};

/// A prediction head of one layer.
pub struct NextN {
    n_embd: usize,
    eps: f32,
    state: StateDecl,
    tok_embd: Matrix,
    embd_scale: f32,
    enorm: Vector,
    hnorm: Vector,
    eh_proj: Matrix,
    attn_norm: Vector,
    attention: Attention,
    ffn_norm: Vector,
    ffn: Ffn,
    output_norm: Vector,
    output: Matrix,
}

impl NextN {
    /// Loads `{prefix}nextn.*` and the layer around it. Embedding, head and last norm are the target's where the
    /// file has none for the head.
    pub fn load(
        w: &Weights,
        prefix: &str,
        hp: &Hparams,
        shared: SharedWeights,
        attention: AttentionShape,
        ffn: Ffn,
    ) -> Result<NextN, Error> {
        let n_embd = hp.n_embd;
        let name = |part: &str| format!("{prefix}{part}.weight");
        let norm = |part: &str| w.vector(&name(part), n_embd, "n_embd");
        let table = |part: &str, n_vocab| w.matrix_opt(&name(part), [n_embd, n_vocab], "n_embd, n_vocab");
        Ok(NextN {
            n_embd,
            eps: hp.eps,
            state: attention.state(),
            tok_embd: table("nextn.embed_tokens", shared.tok_embd.n_out)?.unwrap_or(shared.tok_embd),
            embd_scale: shared.embd_scale,
            enorm: norm("nextn.enorm")?,
            hnorm: norm("nextn.hnorm")?,
            eh_proj: w.matrix(&name("nextn.eh_proj"), [2 * n_embd, n_embd], "embedding|hidden, n_embd")?,
            attn_norm: norm("attn_norm")?,
            attention: Attention::load(w, prefix, attention, StateId(0))?,
            ffn_norm: norm("post_attention_norm")?,
            ffn,
            output_norm: match w.has(&name("nextn.shared_head_norm")) {
                true => norm("nextn.shared_head_norm")?,
                false => w.vector("output_norm.weight", n_embd, "n_embd")?,
            },
            output: table("nextn.shared_head_head", shared.output.n_out)?.unwrap_or(shared.output),
        })
    }

    /// Width of the hidden states that go in and come out.
    pub fn n_embd(&self) -> usize {
        self.n_embd
    }

    /// What it remembers of a sequence; state 0.
    pub fn state(&self) -> &StateDecl {
        &self.state
    }

    /// Records tokens `[n]` and states `[n, n_embd]` -> keys and values, nothing else: all that later rows read.
    pub fn record_absorb(&self, p: &mut PlanBuilder<'_>) {
        let x = self.fuse(p);
        let h = p.rms_norm(x, &self.attn_norm, self.eps);
        self.attention.append_only(p, h);
    }

    /// Records the same -> logits `[n_out, n_vocab]`; the normed states are offered as [`Tap::FinalNorm`].
    pub fn record(&self, p: &mut PlanBuilder<'_>) -> Buf {
        let x = self.fuse(p);
        let h = p.rms_norm(x, &self.attn_norm, self.eps);
        let h = self.attention.forward(p, h);
        let x = p.add(x, h);
        let h = p.rms_norm(x, &self.ffn_norm, self.eps);
        let h = self.ffn.forward(p, h);
        let x = p.add(x, h);
        let x = p.rms_norm(x, &self.output_norm, self.eps);
        p.tap(Tap::FinalNorm, x);
        let x = p.select_outputs(x);
        p.matmul(x, &self.output)
    }

    fn fuse(&self, p: &mut PlanBuilder<'_>) -> Buf {
        let e = p.embed(&self.tok_embd, self.embd_scale);
        let e = p.rms_norm(e, &self.enorm, self.eps);
        let h = p.input(self.n_embd);
        let h = p.rms_norm(h, &self.hnorm, self.eps);
        let both = p.concat(&[e, h]);
        p.matmul(both, &self.eh_proj)
    }
}
