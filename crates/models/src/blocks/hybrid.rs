//! The hybrid decoder of Qwen3-Next and its successors: three layers in four mix tokens with a gated delta rule, whose
//! state has a fixed size; every fourth attends over the KV cache, with a sigmoid gate on its output. Architectures differ
//! in the order of the value heads, and in what the file says of the feed-forward layers.
//!
//! The file's `post_attention_norm` is the norm before the feed-forward layer, despite its name. Blocks behind
//! the main layers are prediction heads: not part of this forward, but a drafter may ask for one.

use paceline_backend::{Buf, HeadMap, PlanBuilder, StateDecl, StateId, Vector};

use crate::{
    Error, Hparams, Model, SharedWeights, Weights,
    blocks::{Attention, AttentionShape, DeltaNet, DeltaNetShape, Ends, Ffn, FfnShape, NextN},
};

/// A hybrid decoder.
pub struct Hybrid {
    hparams: Hparams,
    states: Vec<StateDecl>,
    ends: Ends,
    layers: Vec<Layer>,
}

struct Layer {
    mixer_norm: Vector,
    mixer: Mixer,
    ffn_norm: Vector,
    ffn: Ffn,
}

enum Mixer {
    Attention(Attention),
    DeltaNet(DeltaNet),
}

impl Hybrid {
    /// Loads all layers; `heads` is the order of the value heads in the file.
    pub fn load(w: &Weights, heads: HeadMap) -> Result<Hybrid, Error> {
        let meta = w.metadata();
        let mut hp = Hparams::read(w)?;
        let n_block = hp.n_layer;
        let n_head_layers = meta.u32(&w.key("nextn_predict_layers"))?.unwrap_or(0) as usize;
        if n_head_layers >= n_block {
            return Err(w.hparam(
                &w.key("nextn_predict_layers"),
                format!("less than {n_block} blocks"),
                n_head_layers,
            ));
        }
        hp.n_layer -= n_head_layers;
        let recurrent = recurrent_layers(w, hp.n_layer)?;
        let (delta, ffn) = (delta_shape(w, &hp, heads)?, FfnShape::read(w, &hp)?);
        let attention = AttentionShape { gated: true, ..AttentionShape::of(&hp) };
        let mut states = Vec::new();
        let mut layers = Vec::with_capacity(hp.n_layer);
        for (il, recurrent) in recurrent.into_iter().enumerate() {
            let prefix = format!("blk.{il}.");
            let first = states.len() as u32;
            let mixer = if recurrent {
                states.extend(delta.states());
                Mixer::DeltaNet(DeltaNet::load(w, &prefix, delta, [StateId(first), StateId(first + 1)])?)
            } else {
                states.push(attention.state());
                Mixer::Attention(Attention::load(w, &prefix, attention.clone(), StateId(first))?)
            };
            layers.push(Layer {
                mixer_norm: w.vector(&format!("{prefix}attn_norm.weight"), hp.n_embd, "n_embd")?,
                mixer,
                ffn_norm: w.vector(&format!("{prefix}post_attention_norm.weight"), hp.n_embd, "n_embd")?,
                ffn: Ffn::load(w, &prefix, &ffn)?,
            });
        }
        Ok(Hybrid { ends: Ends::load(w, &hp)?, hparams: hp, states, layers })
    }
}

/// Which layers are recurrent: all but every `full_attention_interval`-th, unless the file lists them.
fn recurrent_layers(w: &Weights, n_layer: usize) -> Result<Vec<bool>, Error> {
    let key = w.key("attention.recurrent_layers");
    if let Some(list) = w.metadata().bool_array(&key)? {
        if list.len() < n_layer {
            return Err(w.hparam(&key, format!("one value for each of {n_layer} layers"), list.len()));
        }
        return Ok(list[..n_layer].to_vec());
    }
    let key = w.key("full_attention_interval");
    let interval = w.metadata().u32(&key)?.unwrap_or(4) as usize;
    if interval == 0 {
        return Err(w.hparam(&key, "at least 1", interval));
    }
    Ok((0..n_layer).map(|il| (il + 1) % interval != 0).collect())
}

fn delta_shape(w: &Weights, hp: &Hparams, heads: HeadMap) -> Result<DeltaNetShape, Error> {
    let meta = w.metadata();
    let read = |suffix: &str| meta.require_u32(&w.key(suffix)).map(|n| n as usize);
    let (n_head_k, n_head_v) = (read("ssm.group_count")?, read("ssm.time_step_rank")?);
    let (dim, inner, conv_width) =
        (read("ssm.state_size")?, read("ssm.inner_size")?, read("ssm.conv_kernel")?);
    if n_head_k == 0 || n_head_v == 0 || n_head_v % n_head_k != 0 {
        let expected = format!("a multiple of the {n_head_k} key heads");
        return Err(w.hparam(&w.key("ssm.time_step_rank"), expected, n_head_v));
    }
    if dim == 0 || inner != n_head_v * dim {
        return Err(w.hparam(&w.key("ssm.inner_size"), format!("{n_head_v} heads of {dim}"), inner));
    }
    if !(2..=16).contains(&conv_width) {
        return Err(w.hparam(&w.key("ssm.conv_kernel"), "2 to 16", conv_width));
    }
    Ok(DeltaNetShape {
        n_embd: hp.n_embd,
        n_head_k,
        n_head_v,
        dim_k: dim,
        dim_v: dim,
        conv_width,
        heads,
        eps: hp.eps,
    })
}

impl Model for Hybrid {
    fn hparams(&self) -> &Hparams {
        &self.hparams
    }

    fn states(&self) -> &[StateDecl] {
        &self.states
    }

    fn shared(&self) -> SharedWeights {
        self.ends.shared()
    }

    fn prediction_head(&self, w: &Weights) -> Result<Option<NextN>, Error> {
        let (hp, key) = (&self.hparams, w.key("nextn_predict_layers"));
        match w.metadata().u32(&key)?.unwrap_or(0) {
            0 => return Ok(None),
            1 => {}
            n => return Err(w.hparam(&key, "1 (chains of heads are not supported yet)", n)),
        }
        let prefix = format!("blk.{}.", hp.n_layer);
        let attention = AttentionShape { gated: true, ..AttentionShape::of(hp) };
        let ffn = Ffn::load(w, &prefix, &FfnShape::read(w, hp)?)?;
        NextN::load(w, &prefix, hp, self.shared(), attention, ffn).map(Some)
    }

    fn record(&self, p: &mut PlanBuilder<'_>) -> Buf {
        let mut x = self.ends.embed(p); // [n, n_embd]
        for (il, layer) in self.layers.iter().enumerate() {
            let h = p.rms_norm(x, &layer.mixer_norm, self.hparams.eps);
            let h = match &layer.mixer {
                Mixer::Attention(attention) => attention.forward(p, h),
                Mixer::DeltaNet(delta_net) => delta_net.forward(p, h),
            };
            x = p.add(x, h);
            let h = p.rms_norm(x, &layer.ffn_norm, self.hparams.eps);
            let h = layer.ffn.forward(p, h);
            x = p.add(x, h);
            p.tap(il, x);
        }
        self.ends.logits(p, x)
    }
}
