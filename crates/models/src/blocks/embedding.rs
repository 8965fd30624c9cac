//! Both ends of a model: the embedding table, the last norm, and the head.

use paceline_backend::{Buf, Matrix, PlanBuilder, Tap, Vector};

use crate::{Error, Hparams, SharedWeights, Weights};

/// Embedding, final norm and head.
pub struct Ends {
    tok_embd: Matrix,
    output_norm: Vector,
    output: Matrix,
    eps: f32,
}

impl Ends {
    /// Loads `token_embd`, `output_norm` and `output`; without the last, the head is tied to the embedding.
    pub fn load(w: &Weights, hp: &Hparams) -> Result<Ends, Error> {
        let dims = [hp.n_embd, hp.n_vocab];
        let tok_embd = w.matrix("token_embd.weight", dims, "n_embd, n_vocab")?;
        let output = w.matrix_opt("output.weight", dims, "n_embd, n_vocab")?.unwrap_or(tok_embd);
        let output_norm = w.vector("output_norm.weight", hp.n_embd, "n_embd")?;
        Ok(Ends { tok_embd, output_norm, output, eps: hp.eps })
    }

    /// Tokens `[n]` -> `[n, n_embd]`.
    pub fn embed(&self, p: &mut PlanBuilder<'_>) -> Buf {
        p.embed(&self.tok_embd, 1.0)
    }

    /// `[n, n_embd]` -> logits `[n_out, n_vocab]`. Rows are selected first: norm and head run for these alone,
    /// unless somebody taps the normed state, of all rows then.
    pub fn logits(&self, p: &mut PlanBuilder<'_>, x: Buf) -> Buf {
        let x = if p.is_tapped(Tap::FinalNorm) {
            let x = p.rms_norm(x, &self.output_norm, self.eps);
            p.tap(Tap::FinalNorm, x);
            p.select_outputs(x)
        } else {
            let x = p.select_outputs(x);
            p.rms_norm(x, &self.output_norm, self.eps)
        };
        p.matmul(x, &self.output)
    }

    /// What a drafter shares.
    pub fn shared(&self) -> SharedWeights {
        SharedWeights { tok_embd: self.tok_embd, embd_scale: 1.0, output: self.output }
    }
}
