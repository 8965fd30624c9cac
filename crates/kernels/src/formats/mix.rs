//! Mixes: which type each tensor of a model gets when it is quantised to "q4_k_m".
//!
//! A mix has one type for most weights and spends extra bits where errors cost most: on the head, which every token goes
//! through, on the values that attention averages, and on what returns from the FFN's inner space to the residual
//! stream, there in the first and last eighth of the layers and in every third layer between.
//!
//! ```text
//! keep as it is:   vectors, norms, the MoE router, convolutions, what is not named `….weight`
//! head             output; token_embd and per_layer_token_embd if there is no output
//! attn_v           attn_v, attn_qkv           counted in file order
//! ffn_down         ffn_down, _exps, _shexp    by layer
//! attn_output      attn_output
//! base             everything else
//! ```
//!
//! The rules and the names are those of llama.cpp's `llama-quantize`, so that a file of ours has the same types, tensor for
//! tensor, as one of theirs; some rules differ where an importance matrix is used ([`Model::with_importance`]).
//!
//! [`Assignment`] walks the tensors of one model in file order:
//!
//! ```
//! # use paceline_gguf::GgmlType;
//! # use paceline_kernels::formats::mix::{Assignment, Model, mix};
//! let tensors: [(&str, &[u64]); 2] = [("token_embd.weight", &[512, 1000]), ("output_norm.weight", &[512])];
//! let model = Model::new(tensors.iter().map(|(name, _)| *name), 1, 8, 2);
//! let mut assignment = Assignment::new(mix("q4_k_m").unwrap(), model);
//! assert_eq!(assignment.next(tensors[0].0, tensors[0].1), Some(GgmlType::Q6_K));
//! assert_eq!(assignment.next(tensors[1].0, tensors[1].1), None); // stays as it is
//! ```

use paceline_gguf::GgmlType::{self, *};

/// A named choice of types.
#[derive(Debug)]
pub struct Mix {
    /// The name that flags take, in lower case.
    pub name: &'static str,
    /// `general.file_type` of a file in this mix.
    pub file_type: u32,
    base: GgmlType,
    head: GgmlType,
    attn_v: Rule,
    ffn_down: Rule,
    attn_output: GgmlType,
    /// The type of 3-D tensors (the experts of a MoE), if they differ from all others.
    experts: Option<GgmlType>,
}

/// When the tensor number `i` of `n` gets a better type than the rest of its group.
#[derive(Clone, Copy, Debug)]
enum Rule {
    /// Never: the base type.
    Base,
    /// Always this one.
    All(GgmlType),
    /// In the first and the last eighth and every third between; base elsewhere.
    Spread(GgmlType),
    /// The first so many; then the second type.
    First(usize, GgmlType, GgmlType),
    /// The first of so many equal parts; then the second type.
    FirstPart(usize, GgmlType, GgmlType),
    /// The first of so many equal parts, unless an importance matrix takes care of it; base elsewhere.
    FirstPartPlain(usize, GgmlType),
    /// The first of so many equal parts, where there is an importance matrix: told what to care for in these layers, the
    /// base type errs wildly in the rest. Base elsewhere.
    FirstPartWeighted(usize, GgmlType),
    /// If at least four heads share a KV head, for then the tensor is small; else the second type.
    Shared(GgmlType, GgmlType),
}

impl Mix {
    /// All weights in one type.
    const fn uniform(name: &'static str, file_type: u32, ty: GgmlType) -> Mix {
        let (base, head, attn_output) = (ty, ty, ty);
        Mix {
            name,
            file_type,
            base,
            head,
            attn_v: Rule::Base,
            ffn_down: Rule::Base,
            attn_output,
            experts: None,
        }
    }

    /// The type of most weights.
    pub fn base(&self) -> GgmlType {
        self.base
    }

    /// All weights in one type but the head in Q6_K.
    const fn plain(name: &'static str, file_type: u32, ty: GgmlType) -> Mix {
        Mix { head: Q6_K, ..Mix::uniform(name, file_type, ty) }
    }
}

/// Every mix.
pub const MIXES: &[Mix] = &[
    Mix::uniform("f32", 0, F32),
    Mix::uniform("f16", 1, F16),
    Mix::uniform("bf16", 32, BF16),
    Mix::uniform("q8_0", 7, Q8_0),
    Mix { experts: Some(MXFP4), ..Mix::uniform("mxfp4_moe", 38, Q8_0) },
    Mix::uniform("q6_k", 18, Q6_K),
    Mix { attn_v: Rule::Spread(Q6_K), ffn_down: Rule::Spread(Q6_K), ..Mix::plain("q5_k_m", 17, Q5_K) },
    Mix::plain("q5_k_s", 16, Q5_K),
    Mix { attn_v: Rule::Spread(Q6_K), ffn_down: Rule::Spread(Q6_K), ..Mix::plain("q4_k_m", 15, Q4_K) },
    Mix {
        attn_v: Rule::First(4, Q5_K, Q4_K),
        ffn_down: Rule::FirstPart(8, Q5_K, Q4_K),
        ..Mix::plain("q4_k_s", 14, Q4_K)
    },
    Mix {
        attn_v: Rule::Shared(Q5_K, IQ4_NL),
        ffn_down: Rule::FirstPartPlain(8, Q5_K),
        ..Mix::plain("iq4_nl", 25, IQ4_NL)
    },
    Mix {
        attn_v: Rule::Shared(Q5_K, IQ4_XS),
        ffn_down: Rule::FirstPartPlain(8, Q5_K),
        ..Mix::plain("iq4_xs", 30, IQ4_XS)
    },
    Mix {
        attn_v: Rule::All(Q5_K),
        ffn_down: Rule::All(Q5_K),
        attn_output: Q5_K,
        ..Mix::plain("q3_k_l", 13, Q3_K)
    },
    Mix {
        attn_v: Rule::First(2, Q5_K, Q4_K),
        ffn_down: Rule::FirstPart(16, Q5_K, Q4_K),
        attn_output: Q4_K,
        ..Mix::plain("q3_k_m", 12, Q3_K)
    },
    Mix::plain("q3_k_s", 11, Q3_K),
    Mix {
        attn_v: Rule::Shared(Q4_K, Q3_K),
        ffn_down: Rule::All(Q3_K),
        attn_output: Q3_K,
        ..Mix::plain("q2_k", 10, Q2_K)
    },
    Mix::plain("q5_1", 9, Q5_1),
    Mix { ffn_down: Rule::FirstPartWeighted(8, Q5_1), ..Mix::plain("q5_0", 8, Q5_0) },
    Mix::plain("q4_1", 3, Q4_1),
    Mix { ffn_down: Rule::FirstPartWeighted(8, Q4_1), ..Mix::plain("q4_0", 2, Q4_0) },
];

/// The mix of this name, in any case. `q4_k` is short for `q4_k_m`, likewise `q3_k` and `q5_k`; the number of a file type is a
/// name too.
pub fn mix(name: &str) -> Option<&'static Mix> {
    let medium = format!("{name}_m");
    let named = |wanted: &str| MIXES.iter().find(|mix| mix.name.eq_ignore_ascii_case(wanted));
    let numbered = || MIXES.iter().find(|mix| Ok(mix.file_type) == name.parse());
    named(name).or_else(|| named(&medium)).or_else(numbered)
}

/// What the rules must know of a model before its first tensor.
#[derive(Clone, Copy, Debug)]
pub struct Model {
    n_layer: usize,
    heads_per_kv_head: usize,
    /// How many tensors the rule for `attn_v` counts.
    n_attn_v: usize,
    tied: bool,
    moe: bool,
    weighted: bool,
}

impl Model {
    /// From the names of all tensors, the number of layers in the file (MTP layers included), and the heads of layer 0.
    pub fn new<'a>(
        names: impl IntoIterator<Item = &'a str>,
        n_layer: usize,
        n_head: usize,
        n_head_kv: usize,
    ) -> Model {
        let heads_per_kv_head = n_head / n_head_kv.max(1);
        let mut model =
            Model { n_layer, heads_per_kv_head, n_attn_v: 0, tied: true, moe: false, weighted: false };
        for name in names {
            model.n_attn_v += usize::from(Group::of(name) == Group::AttnV);
            model.tied &= name != "output.weight";
            model.moe |= name.contains("_exps.");
        }
        model
    }

    /// The same, to be quantised with an importance matrix.
    pub fn with_importance(self) -> Model {
        Model { weighted: true, ..self }
    }
}

/// The groups of tensors that have a rule of their own.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Group {
    Output,
    Embedding,
    AttnV,
    FfnDown,
    AttnOutput,
    Other,
}

impl Group {
    fn of(name: &str) -> Group {
        match name.strip_suffix(".weight").map(|stem| stem.rsplit('.').next().unwrap_or(stem)) {
            Some("output") => Group::Output,
            Some("token_embd" | "per_layer_token_embd") => Group::Embedding,
            Some("attn_v" | "attn_qkv") => Group::AttnV,
            Some("ffn_down" | "ffn_down_exps" | "ffn_down_shexp") => Group::FfnDown,
            Some("attn_output") => Group::AttnOutput,
            _ => Group::Other,
        }
    }
}

/// Gives the tensors of one model their types, in file order.
#[derive(Debug)]
pub struct Assignment {
    mix: &'static Mix,
    model: Model,
    n_attn_v_seen: usize,
    n_ffn_down_seen: usize,
}

impl Assignment {
    /// Before the first tensor.
    pub fn new(mix: &'static Mix, model: Model) -> Assignment {
        Assignment { mix, model, n_attn_v_seen: 0, n_ffn_down_seen: 0 }
    }

    /// The type of the next tensor (`shape` with ne0 first), or `None` if it stays as it is in the source.
    pub fn next(&mut self, name: &str, shape: &[u64]) -> Option<GgmlType> {
        self.next_wanted(name, shape).map(|wanted| fitting(wanted, shape[0]))
    }

    /// As [`next`](Self::next), whether its rows are whole blocks or not ([`fitting`]).
    pub fn next_wanted(&mut self, name: &str, shape: &[u64]) -> Option<GgmlType> {
        if keeps_its_type(name, shape) {
            return None;
        }
        let wanted = self.wanted(name);
        Some(self.mix.experts.filter(|_| shape.len() == 3).unwrap_or(wanted))
    }

    fn wanted(&mut self, name: &str) -> GgmlType {
        match Group::of(name) {
            Group::Output => self.mix.head,
            Group::Embedding if self.model.tied => self.mix.head,
            Group::AttnV => {
                self.n_attn_v_seen += 1;
                self.apply(self.mix.attn_v, self.n_attn_v_seen - 1, self.model.n_attn_v)
            }
            Group::FfnDown => {
                self.n_ffn_down_seen += 1;
                // A MoE layer may have several of these (experts, shared expert, a dense one): they go together.
                let i = if self.model.moe { layer(name) } else { None };
                self.apply(self.mix.ffn_down, i.unwrap_or(self.n_ffn_down_seen - 1), self.model.n_layer)
            }
            Group::AttnOutput => self.mix.attn_output,
            Group::Embedding | Group::Other => self.mix.base,
        }
    }

    fn apply(&self, rule: Rule, i: usize, n: usize) -> GgmlType {
        match rule {
            Rule::Base => self.mix.base,
            Rule::All(ty) => ty,
            Rule::Spread(ty) if is_spread(i, n) => ty,
            Rule::Spread(_) => self.mix.base,
            Rule::First(count, ty, rest) => {
                if i < count {
                    ty
                } else {
                    rest
                }
            }
            Rule::FirstPart(parts, ty, rest) => {
                if i < n / parts {
                    ty
                } else {
                    rest
                }
            }
            Rule::FirstPartPlain(parts, ty) if !self.model.weighted && i < n / parts => ty,
            Rule::FirstPartWeighted(parts, ty) if self.model.weighted && i < n / parts => ty,
            Rule::FirstPartPlain(..) | Rule::FirstPartWeighted(..) => self.mix.base,
            Rule::Shared(ty, rest) => {
                if self.model.heads_per_kv_head >= 4 {
                    ty
                } else {
                    rest
                }
            }
        }
    }
}

/// Whether number `i` of `n` lies in the first eighth, in the last, or on every third place between.
fn is_spread(i: usize, n: usize) -> bool {
    i < n / 8 || i >= 7 * n / 8 || (i - n / 8) % 3 == 2
}

/// The layer in `blk.<layer>.…`.
fn layer(name: &str) -> Option<usize> {
    name.strip_prefix("blk.")?.split('.').next()?.parse().ok()
}

/// Small tensors that decide much, and whatever is not a matrix.
fn keeps_its_type(name: &str, shape: &[u64]) -> bool {
    // Trailing axes of one are no axes.
    shape.iter().skip(1).all(|&n| n == 1)
        || !name.ends_with("weight")
        || name.ends_with("_norm.weight")
        || name.ends_with("ffn_gate_inp.weight")
        || name.ends_with("ssm_conv1d.weight")
        || name.ends_with("shortconv.conv.weight")
        || name.contains("altup")
        || name.contains("laurel")
        || name.contains("per_layer_model_proj")
}

/// `ty`, or the nearest type whose blocks fit rows of `ne0` values.
pub fn fitting(ty: GgmlType, ne0: u64) -> GgmlType {
    let fits = |ty: GgmlType| ne0.is_multiple_of(ty.block_len() as u64);
    if fits(ty) {
        return ty;
    }
    let smaller_blocks = match ty {
        Q2_K | Q3_K => Q4_0,
        Q4_K => Q5_0,
        Q5_K => Q5_1,
        Q6_K => Q8_0,
        IQ4_XS => IQ4_NL,
        _ => F16,
    };
    if fits(smaller_blocks) { smaller_blocks } else { F16 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    type Tensors = Vec<(String, Vec<u64>)>;

    fn add(tensors: &mut Tensors, prefix: &str, list: &[(&str, &[u64])]) {
        tensors.extend(list.iter().map(|(name, shape)| (format!("{prefix}{name}"), shape.to_vec())));
    }

    /// The 26B-A4B model (mixture of experts) or the 12B (dense), all types of layer norms included.
    fn gemma4(moe: bool) -> Tensors {
        let (n_layer, h, f) = if moe { (30, 2816, 2112) } else { (48, 3840, 15360) };
        let mut tensors = Tensors::new();
        add(&mut tensors, "", &[("token_embd.weight", &[h, 262144]), ("output_norm.weight", &[h])]);
        add(&mut tensors, "", &[("rope_freqs.weight", &[256])]);
        for il in 0..n_layer {
            let prefix = format!("blk.{il}.");
            let full = (il + 1) % 6 == 0;
            let d = if full { 512 } else { 256 };
            add(&mut tensors, &prefix, &[("attn_norm.weight", &[h]), ("attn_q.weight", &[h, d * 16])]);
            add(
                &mut tensors,
                &prefix,
                &[("attn_k.weight", &[h, d * 8]), ("attn_output.weight", &[d * 16, h])],
            );
            if !full {
                add(&mut tensors, &prefix, &[("attn_v.weight", &[h, d * 8])]);
            }
            for norm in ["attn_q_norm", "attn_k_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"] {
                add(&mut tensors, &prefix, &[(&format!("{norm}.weight"), &[h])]);
            }
            add(&mut tensors, &prefix, &[("ffn_gate.weight", &[h, f]), ("ffn_up.weight", &[h, f])]);
            add(&mut tensors, &prefix, &[("ffn_down.weight", &[f, h]), ("layer_output_scale.weight", &[1])]);
            if moe {
                add(
                    &mut tensors,
                    &prefix,
                    &[("ffn_gate_inp.weight", &[h, 128]), ("ffn_gate_inp.scale", &[h])],
                );
                for norm in ["pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2"] {
                    add(&mut tensors, &prefix, &[(&format!("{norm}.weight"), &[h])]);
                }
                add(&mut tensors, &prefix, &[("ffn_gate_up_exps.weight", &[h, 1408, 128])]);
                add(&mut tensors, &prefix, &[("ffn_down_exps.weight", &[704, h, 128])]);
                add(&mut tensors, &prefix, &[("ffn_down_exps.scale", &[128])]);
            }
        }
        tensors
    }

    /// The 35B-A3B model (mixture of experts) or the 27B (dense), without MTP layers.
    fn qwen35(moe: bool) -> Tensors {
        let (n_layer, h, inner, n_head_v, conv) =
            if moe { (40, 2048, 4096, 32, 8192) } else { (64, 5120, 6144, 48, 10240) };
        let mut tensors = Tensors::new();
        add(&mut tensors, "", &[("token_embd.weight", &[h, 248320]), ("output_norm.weight", &[h])]);
        add(&mut tensors, "", &[("output.weight", &[h, 248320])]);
        for il in 0..n_layer {
            let prefix = format!("blk.{il}.");
            add(&mut tensors, &prefix, &[("attn_norm.weight", &[h]), ("post_attention_norm.weight", &[h])]);
            if (il + 1) % 4 == 0 {
                add(&mut tensors, &prefix, &[("attn_q.weight", &[h, 12288]), ("attn_k.weight", &[h, 1024])]);
                add(
                    &mut tensors,
                    &prefix,
                    &[("attn_v.weight", &[h, 1024]), ("attn_output.weight", &[6144, h])],
                );
                add(&mut tensors, &prefix, &[("attn_q_norm.weight", &[256]), ("attn_k_norm.weight", &[256])]);
            } else {
                add(
                    &mut tensors,
                    &prefix,
                    &[("attn_qkv.weight", &[h, conv]), ("attn_gate.weight", &[h, inner])],
                );
                add(&mut tensors, &prefix, &[("ssm_alpha.weight", &[h, n_head_v])]);
                add(&mut tensors, &prefix, &[("ssm_beta.weight", &[h, n_head_v]), ("ssm_a", &[n_head_v])]);
                add(
                    &mut tensors,
                    &prefix,
                    &[("ssm_dt.bias", &[n_head_v]), ("ssm_conv1d.weight", &[4, conv])],
                );
                add(&mut tensors, &prefix, &[("ssm_norm.weight", &[128]), ("ssm_out.weight", &[inner, h])]);
            }
            if moe {
                add(&mut tensors, &prefix, &[("ffn_gate_inp.weight", &[h, 256])]);
                add(&mut tensors, &prefix, &[("ffn_gate_inp_shexp.weight", &[h])]);
                for name in ["gate", "up", "down"] {
                    // F = H/4: which way round the matrix lies does not matter to the rules.
                    add(&mut tensors, &prefix, &[(&format!("ffn_{name}_exps.weight"), &[512, 2048, 256])]);
                    add(&mut tensors, &prefix, &[(&format!("ffn_{name}_shexp.weight"), &[512, 2048])]);
                }
            } else {
                for name in ["gate", "up", "down"] {
                    add(&mut tensors, &prefix, &[(&format!("ffn_{name}.weight"), &[5120, 17408])]);
                }
            }
        }
        tensors
    }

    fn check(
        name: &str,
        tensors: &Tensors,
        n_layer: usize,
        heads: (usize, usize),
        expected: &[(&str, usize)],
    ) {
        let model = Model::new(tensors.iter().map(|(name, _)| name.as_str()), n_layer, heads.0, heads.1);
        check_model(name, tensors, model, expected);
    }

    fn check_model(name: &str, tensors: &Tensors, model: Model, expected: &[(&str, usize)]) {
        let mut assignment = Assignment::new(mix(name).unwrap(), model);
        let mut counts = BTreeMap::new();
        for (name, shape) in tensors {
            let ty = assignment.next(name, shape).map_or("kept", GgmlType::name);
            *counts.entry(ty).or_insert(0) += 1;
        }
        assert_eq!(counts, expected.iter().copied().collect(), "{name}");
    }

    #[test]
    fn counts_of_published_files() {
        check(
            "Q4_K_M",
            &gemma4(true),
            30,
            (16, 8),
            &[("kept", 392), ("q5_0", 32), ("q8_0", 28), ("q4_k", 192), ("q6_k", 14)],
        );
        check("q4_k_m", &gemma4(false), 48, (16, 8), &[("kept", 338), ("q4_k", 284), ("q6_k", 45)]);
        check("q4_k_m", &qwen35(false), 64, (24, 4), &[("kept", 353), ("q4_k", 433), ("q6_k", 65)]);
    }

    /// The published file of this mix was made with an importance matrix: `ffn_down` then needs no better type in the first
    /// eighth (two tensors in each of five layers).
    #[test]
    fn an_importance_matrix_changes_some_rules() {
        let tensors = qwen35(true);
        let model = Model::new(tensors.iter().map(|(name, _)| name.as_str()), 40, 16, 2);
        let told = model.with_importance();
        let expected = [("kept", 301), ("q5_k", 40 + 10), ("q6_k", 1), ("iq4_xs", 391 - 10)];
        check_model("iq4_xs", &tensors, model, &expected);
        check_model("iq4_xs", &tensors, told, &[("kept", 301), ("q5_k", 40), ("q6_k", 1), ("iq4_xs", 391)]);
        check_model("q4_0", &tensors, model, &[("kept", 301), ("q4_0", 431), ("q6_k", 1)]);
        check_model("q4_0", &tensors, told, &[("kept", 301), ("q4_0", 421), ("q4_1", 10), ("q6_k", 1)]);
        check_model("q4_k_m", &tensors, told, &[("kept", 301), ("q4_k", 371), ("q6_k", 61)]);
    }

    #[test]
    fn mixes_have_short_names_and_numbers() {
        let check = |name: &str, expected: &str| assert_eq!(mix(name).map(|mix| mix.name), Some(expected));
        check("Q4_K", "q4_k_m");
        check("q3_k", "q3_k_m");
        check("Q6_K", "q6_k");
        check("q2_k", "q2_k");
        check("15", "q4_k_m");
        check("2", "q4_0");
        assert!(mix("4_k").is_none() && mix("").is_none() && mix("4").is_none());
    }

    #[test]
    fn other_mixes() {
        let dense = qwen35(false);
        check("q8_0", &dense, 64, (24, 4), &[("kept", 353), ("q8_0", 498)]);
        check("bf16", &dense, 64, (24, 4), &[("kept", 353), ("bf16", 498)]);
        // 64 of attn_v and attn_qkv, 64 ffn_down, 16 attn_output, the head; the rest is base.
        check("q4_k_s", &dense, 64, (24, 4), &[("kept", 353), ("q5_k", 4 + 8), ("q6_k", 1), ("q4_k", 485)]);
        let q3_k_m = [("kept", 353), ("q5_k", 2 + 4), ("q4_k", 62 + 60 + 16), ("q6_k", 1), ("q3_k", 353)];
        check("q3_k_m", &dense, 64, (24, 4), &q3_k_m);
        check("q5_k_m", &dense, 64, (24, 4), &[("kept", 353), ("q5_k", 433), ("q6_k", 65)]);
        check("mxfp4_moe", &qwen35(true), 40, (16, 2), &[("kept", 301), ("mxfp4", 120), ("q8_0", 312)]);
    }

    #[test]
    fn rows_that_are_not_whole_blocks() {
        let check = |ty, ne0, expected| assert_eq!(fitting(ty, ne0), expected, "{ty} {ne0}");
        check(Q4_K, 704, Q5_0);
        check(Q5_K, 704, Q5_1);
        check(Q6_K, 2112, Q8_0);
        check(IQ4_XS, 704, IQ4_NL);
        check(Q2_K, 32, Q4_0);
        check(Q3_K, 32, Q4_0);
        check(Q4_K, 512, Q4_K);
        check(Q4_K, 4, F16);
        check(Q8_0, 100, F16);
        check(NVFP4, 32, F16);
        check(BF16, 3, BF16);
    }

    #[test]
    fn every_mix_names_itself_once_and_is_supported() {
        for (i, a) in MIXES.iter().enumerate() {
            assert_eq!(mix(&a.name.to_uppercase()).unwrap().name, a.name);
            assert!(MIXES[..i].iter().all(|b| a.name != b.name && a.file_type != b.file_type), "{}", a.name);
            assert!(super::super::format(a.base).is_some() && super::super::format(a.head).is_some());
        }
        assert!(mix("q9_z").is_none());
    }
}
