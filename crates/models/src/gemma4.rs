//! Gemma 4: a decoder whose layers look back through a window or in full, each kind with heads of its own width, and with
//! norms on both sides of every part. Forms of it differ in what the file has: values that are the keys' projection
//! (31B, 12B), experts beside the dense layer (26B-A4B), embeddings of each layer's own and last layers that read the keys
//! and values of earlier ones (E2B, E4B).
//!
//! ```text
//! x = √n_embd · embedding
//! a = x + norm(attention(norm x))        scale 1; v normed without a weight
//! x = a + norm(geglu(norm a))            or norm(norm(geglu(norm a)) + norm(experts(norm a)))
//! x = (x + per-layer input) · layer_output_scale
//! logits = cap · tanh(head(norm x) / cap)
//! ```

use paceline_backend::{Buf, Pairing, PlanBuilder, RopeScaling, RopeSpec, StateDecl, StateId, Vector};

use crate::{
    Arch, Error, Hparams, Model, SharedWeights, Weights,
    blocks::{
        Act, Attention, AttentionShape, Ends, Moe, MoeShape, PerLayerEmbedding, PerLayerInput, Sandwich,
        SandwichShape, Values,
    },
    hparams::per_layer,
};

/// The architecture.
pub const ARCH: Arch = Arch { name: "gemma4", load: |w| Ok(Box::new(Gemma4::load(w)?)) };

struct Gemma4 {
    hparams: Hparams,
    states: Vec<StateDecl>,
    ends: Ends,
    per_layer: Option<PerLayerEmbedding>,
    layers: Vec<Layer>,
}

struct Layer {
    parts: Sandwich,
    experts: Option<Experts>,
    input: Option<PerLayerInput>,
}

impl Gemma4 {
    fn load(w: &Weights) -> Result<Gemma4, Error> {
        let meta = w.metadata();
        let hp = Hparams::read(w)?;
        let (n_embd, n_layer) = (hp.n_embd, hp.n_layer);
        let shapes = attention_shapes(w, &hp)?;
        let n_reader = meta.u32(&w.key("attention.shared_kv_layers"))?.unwrap_or(0) as usize;
        let n_ff = per_layer(w, "feed_forward_length", n_layer)?.unwrap_or(vec![hp.n_ff; n_layer]);
        let moe = MoeShape::read(w, &hp)?;
        let width = meta.u32(&w.key("embedding_length_per_layer_input"))?.unwrap_or(0) as usize;
        let cap = meta.f32(&w.key("final_logit_softcapping"))?.filter(|&cap| cap != 0.0);
        if let Some(cap) = cap.filter(|cap| !(cap.is_finite() && *cap > 0.0)) {
            return Err(w.hparam(&w.key("final_logit_softcapping"), "a positive number", cap));
        }
        let mut states: Vec<StateDecl> = Vec::new();
        // The states of the layers that have one, with their window.
        let mut owners: Vec<(Option<usize>, StateId)> = Vec::new();
        let mut layers = Vec::with_capacity(n_layer);
        for (il, shape) in shapes.into_iter().enumerate() {
            let prefix = format!("blk.{il}.");
            let attention = if il + n_reader < n_layer {
                let state = StateId(states.len() as u32);
                states.push(shape.state());
                owners.push((shape.window, state));
                Attention::load(w, &prefix, shape, state)?
            } else {
                // The last layer of its kind that has keys and values.
                let source = owners.iter().rev().find(|(window, _)| *window == shape.window);
                let Some(&(_, state)) = source.filter(|(_, s)| states[s.0 as usize] == shape.state()) else {
                    let expected =
                        format!("a layer before them like layer {il}, whose keys and values it reads");
                    return Err(w.hparam(&w.key("attention.shared_kv_layers"), expected, n_reader));
                };
                Attention::load_reader(w, &prefix, shape, state)?
            };
            let sizes = SandwichShape { n_embd, n_ff: n_ff[il], eps: hp.eps };
            layers.push(Layer {
                parts: Sandwich::load(w, &prefix, sizes, attention)?,
                experts: moe.as_ref().map(|moe| Experts::load(w, &prefix, moe)).transpose()?,
                input: (width > 0).then(|| PerLayerInput::load(w, &hp, il, width)).transpose()?,
            });
        }
        Ok(Gemma4 {
            ends: Ends::load(w, &hp)?.scaled((n_embd as f32).sqrt(), cap),
            per_layer: (width > 0).then(|| PerLayerEmbedding::load(w, &hp, width)).transpose()?,
            hparams: hp,
            states,
            layers,
        })
    }
}

/// The attention of each layer. Full layers turn few dimensions: the others' angles have a divisor that leaves nothing of
/// them, so that pairs lie half a head apart and frequencies follow the whole head.
fn attention_shapes(w: &Weights, hp: &Hparams) -> Result<Vec<AttentionShape>, Error> {
    let meta = w.metadata();
    let key = w.key("attention.sliding_window_pattern");
    let sliding = meta.require_bool_array(&key)?;
    if sliding.len() != hp.n_layer {
        return Err(w.hparam(&key, format!("one value for each of {} layers", hp.n_layer), sliding.len()));
    }
    let n_head_kv =
        per_layer(w, "attention.head_count_kv", hp.n_layer)?.unwrap_or(vec![hp.n_head_kv; hp.n_layer]);
    let common = AttentionShape { scale: 1.0, values: Values::Normed, ..AttentionShape::of(hp) };
    let factors = w.vector_opt("rope_freqs.weight", hp.n_rot / 2, "n_rot / 2")?;
    let full = AttentionShape {
        rope: RopeSpec { factors: factors.map(|f| f.id), ..common.rope.clone() },
        ..common.clone()
    };
    let window = if sliding.contains(&true) {
        let key = w.key("attention.sliding_window");
        match meta.require_u32(&key)? {
            0 => return Err(w.hparam(&key, "at least 1", 0)),
            window => Some(window as usize),
        }
    } else {
        None
    };
    let read = |suffix: &str, other| meta.u32(&w.key(suffix)).map(|n| n.map_or(other, |n| n as usize));
    let head_dim = read("attention.key_length_swa", hp.head_dim)?;
    let n_rot = read("rope.dimension_count_swa", head_dim)?;
    if read("attention.value_length_swa", head_dim)? != head_dim
        || head_dim == 0
        || n_rot > head_dim
        || n_rot % 2 != 0
    {
        let expected =
            "an even width of heads, the same for keys and values, and no more dimensions that turn";
        return Err(w.hparam(&w.key("attention.key_length_swa"), expected, head_dim));
    }
    let base = meta.f32(&w.key("rope.freq_base_swa"))?.unwrap_or(10_000.0);
    let near = AttentionShape {
        head_dim,
        window,
        // A longer context does not reach through a window.
        rope: RopeSpec {
            n_rot,
            base,
            pairing: Pairing::HalfSplit,
            factors: None,
            scaling: RopeScaling::None,
        },
        ..common
    };
    let shape =
        |(is_near, n_head_kv)| AttentionShape { n_head_kv, ..if is_near { &near } else { &full }.clone() };
    Ok(sliding.into_iter().zip(n_head_kv).map(shape).collect())
}

/// The experts beside a layer's dense part, with the norms that both go through.
///
/// Router and experts see the residual stream through norms of their own, not what the dense part sees.
struct Experts {
    router_norm: Vector,
    norm: Vector,
    moe: Moe,
    dense_post_norm: Vector,
    post_norm: Vector,
}

impl Experts {
    fn load(w: &Weights, prefix: &str, shape: &MoeShape) -> Result<Experts, Error> {
        let vector = |name: &str| w.vector(&format!("{prefix}{name}"), shape.n_embd, "n_embd");
        let scale = w.vector_opt(&format!("{prefix}ffn_down_exps.scale"), shape.n_expert, "n_expert")?;
        let mut shape = MoeShape { act: Act::Gelu, ..*shape };
        shape.router.expert_scale = scale.map(|scale| scale.id);
        Ok(Experts {
            router_norm: vector("ffn_gate_inp.scale")?,
            norm: vector("pre_ffw_norm_2.weight")?,
            moe: Moe::load(w, prefix, &shape)?,
            dense_post_norm: vector("post_ffw_norm_1.weight")?,
            post_norm: vector("post_ffw_norm_2.weight")?,
        })
    }

    /// The residual stream and what the dense part made of it -> both parts' sum.
    fn forward(&self, p: &mut PlanBuilder<'_>, a: Buf, dense: Buf, hp: &Hparams) -> Buf {
        let h = p.rms_norm(a, &self.router_norm, hp.eps);
        let h = p.scale(h, 1.0 / (hp.n_embd as f32).sqrt());
        let routes = self.moe.route(p, h);
        let h = p.rms_norm(a, &self.norm, hp.eps);
        let h = self.moe.experts(p, h, routes);
        let h = p.rms_norm(h, &self.post_norm, hp.eps);
        let dense = p.rms_norm(dense, &self.dense_post_norm, hp.eps);
        p.add(dense, h)
    }
}

impl Model for Gemma4 {
    fn hparams(&self) -> &Hparams {
        &self.hparams
    }

    fn states(&self) -> &[StateDecl] {
        &self.states
    }

    fn shared(&self) -> SharedWeights {
        self.ends.shared()
    }

    fn record(&self, p: &mut PlanBuilder<'_>) -> Buf {
        let mut x = self.ends.embed(p); // [n, n_embd]
        let inputs = self.per_layer.as_ref().map(|embedding| embedding.forward(p, x));
        for (il, layer) in self.layers.iter().enumerate() {
            x = layer.parts.forward(p, x, |p, a, dense| match &layer.experts {
                Some(experts) => experts.forward(p, a, dense, &self.hparams),
                None => dense,
            });
            if let (Some(input), Some(all)) = (&layer.input, inputs) {
                x = input.forward(p, x, all);
            }
            x = layer.parts.scale(p, x);
            // What the next layer reads: behind the layer's own input and scale.
            p.tap(il, x);
        }
        self.ends.logits(p, x)
    }
}
