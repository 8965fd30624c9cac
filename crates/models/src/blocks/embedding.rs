//! Both ends of a model: the embedding table, the last norm, and the head.

use paceline_backend::{Buf, Matrix, PlanBuilder, Tap, Vector};

use crate::{Error, Hparams, SharedWeights, Weights};

/// Embedding, final norm and head.
pub struct Ends {
    tok_embd: Matrix,
    output_norm: Vector,
    output: Matrix,
    eps: f32,
    embd_scale: f32,
    logit_cap: Option<f32>,
}

impl Ends {
    /// Loads `token_embd`, `output_norm` and `output`; without the last, the head is tied to the embedding.
    pub fn load(w: &Weights, hp: &Hparams) -> Result<Ends, Error> {
        let dims = [hp.n_embd, hp.n_vocab];
        let tok_embd = w.matrix("token_embd.weight", dims, "n_embd, n_vocab")?;
        let output = w.matrix_opt("output.weight", dims, "n_embd, n_vocab")?.unwrap_or(tok_embd);
        let output_norm = w.vector("output_norm.weight", hp.n_embd, "n_embd")?;
        Ok(Ends { tok_embd, output_norm, output, eps: hp.eps, embd_scale: 1.0, logit_cap: None })
    }

    /// The same ends with a factor on embedded rows and a bound on the logits, as Gemma has them.
    pub fn scaled(self, embd_scale: f32, logit_cap: Option<f32>) -> Ends {
        Ends { embd_scale, logit_cap, ..self }
    }

    /// Tokens `[n]` -> `[n, n_embd]`.
    pub fn embed(&self, p: &mut PlanBuilder<'_>) -> Buf {
        p.embed(&self.tok_embd, self.embd_scale)
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
        let logits = p.matmul(x, &self.output);
        match self.logit_cap {
            Some(cap) => p.softcap(logits, cap),
            None => logits,
        }
    }

    /// What a drafter shares.
    pub fn shared(&self) -> SharedWeights {
        let &Ends { tok_embd, embd_scale, output, logit_cap, .. } = self;
        SharedWeights { tok_embd, embd_scale, output, logit_cap }
    }
}
