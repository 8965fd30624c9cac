//! Which type each tensor gets: the rules of a mix, applied in the file's order, and what a person says of some tensors by
//! itself. Whoever writes tensors asks here, converting, making up or quantising.

use paceline_gguf::{GgmlType, Metadata};
use paceline_kernels::formats::mix::{Assignment, MIXES, Mix, Model, fitting, mix};
use regex_lite::Regex;

use crate::Error;

/// The mix that a person named.
pub(crate) fn find(name: &str) -> Result<&'static Mix, Error> {
    mix(name).ok_or_else(|| {
        let known: Vec<_> = MIXES.iter().map(|mix| mix.name).collect();
        Error::UnknownType { name: name.into(), known: known.join(", ") }
    })
}

/// A mix, and where it shall not be followed. Only tensors that a mix would quantise at all are asked for.
#[derive(Debug)]
pub(crate) struct Types {
    /// The rules.
    pub(crate) mix: &'static Mix,
    /// The mix's base type for all, in place of its rules.
    pub(crate) pure: bool,
    /// There will be importances.
    pub(crate) weighted: bool,
    /// `output.weight`; the embedding where it is the head too.
    pub(crate) output: Option<GgmlType>,
    /// `token_embd.weight` and the embeddings per layer.
    pub(crate) embedding: Option<GgmlType>,
    /// Tensors by name, the first that matches; these go before all rules.
    pub(crate) by_name: Vec<(Regex, GgmlType)>,
    /// `output.weight` stays as it is.
    pub(crate) leaves_output: bool,
}

/// What a tensor gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chosen {
    /// The type.
    pub(crate) ty: GgmlType,
    /// What it would be if its rows were whole blocks of that.
    pub(crate) wanted: GgmlType,
}

impl Types {
    /// The mix and nothing else.
    pub(crate) fn of(mix: &'static Mix) -> Types {
        let by_name = Vec::new();
        Types {
            mix,
            pure: false,
            weighted: false,
            output: None,
            embedding: None,
            by_name,
            leaves_output: false,
        }
    }

    /// The type of each tensor, given as name and shape in their order, or none where it stays as it is; `metadata` is that of
    /// their file.
    pub(crate) fn assign<'a>(
        &self,
        metadata: &Metadata,
        tensors: impl Iterator<Item = (&'a str, &'a [u64])> + Clone,
    ) -> Result<Vec<Option<Chosen>>, Error> {
        let model = model(metadata, tensors.clone().map(|(name, _)| name))?;
        let model = if self.weighted { model.with_importance() } else { model };
        let tied = tensors.clone().all(|(name, _)| name != OUTPUT);
        let mut assignment = Assignment::new(self.mix, model);
        Ok(tensors
            .map(|(name, shape)| {
                // Asked for each, for the rules count.
                let by_mix = assignment.next_wanted(name, shape)?;
                if name == OUTPUT && self.leaves_output {
                    return None;
                }
                let by_mix = if self.pure { self.mix.base() } else { by_mix };
                let wanted = self.by_person(name, tied).unwrap_or(by_mix);
                Some(Chosen { ty: fitting(wanted, shape[0]), wanted })
            })
            .collect())
    }

    fn by_person(&self, name: &str, tied: bool) -> Option<GgmlType> {
        let named = self.by_name.iter().find(|(pattern, _)| pattern.is_match(name)).map(|(_, ty)| *ty);
        let by_role = match name {
            OUTPUT => self.output,
            EMBEDDING if tied => self.embedding.or(self.output),
            EMBEDDING | LAYER_EMBEDDING => self.embedding,
            _ => None,
        };
        named.or(by_role)
    }
}

const OUTPUT: &str = "output.weight";
const EMBEDDING: &str = "token_embd.weight";
const LAYER_EMBEDDING: &str = "per_layer_token_embd.weight";

/// The type that a mix gives each tensor; what it leaves alone (norms, vectors, convolutions) is F32.
pub(crate) fn assign<'a>(
    mix: &'static Mix,
    metadata: &Metadata,
    tensors: impl Iterator<Item = (&'a str, &'a [u64])> + Clone,
) -> Result<Vec<GgmlType>, Error> {
    let chosen = Types::of(mix).assign(metadata, tensors)?;
    Ok(chosen.into_iter().map(|chosen| chosen.map_or(GgmlType::F32, |chosen| chosen.ty)).collect())
}

/// What the rules must know. Keys may be absent: a file that no server runs can still be quantised.
fn model<'a>(metadata: &Metadata, names: impl Iterator<Item = &'a str> + Clone) -> Result<Model, Error> {
    let arch = metadata.str("general.architecture")?.unwrap_or("");
    let layers = names.clone().filter_map(|name| name.strip_prefix("blk.")?.split('.').next()?.parse().ok());
    let n_in_names = layers.max().map_or(0, |il: usize| il + 1);
    let n_layer = metadata.u32(&format!("{arch}.block_count"))?.map_or(n_in_names, |n| n as usize);
    // Where layers differ, the first one speaks for all.
    let heads = |key: &str| -> Result<Option<usize>, Error> {
        let n = metadata.u32_or_array(&format!("{arch}.attention.{key}"), n_layer)?;
        Ok(n.and_then(|n| n.first().map(|&n| n as usize)))
    };
    let n_head = heads("head_count")?.unwrap_or(1);
    Ok(Model::new(names, n_layer, n_head, heads("head_count_kv")?.unwrap_or(n_head)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use GgmlType::{BF16, F16, Q4_0, Q4_K, Q5_0, Q6_K, Q8_0};

    const TENSORS: &[(&str, &[u64])] = &[
        ("token_embd.weight", &[256, 1000]),
        ("output_norm.weight", &[256]),
        ("blk.0.attn_q.weight", &[256, 256]),
        ("blk.0.attn_k_norm.weight", &[256, 2]),
        ("blk.0.ffn_up.weight", &[96, 256]),
        ("blk.0.attn_conv_base", &[256, 2, 2]),
        ("blk.0.ssm_out.weight", &[20, 256]),
        ("blk.1.attn_q.weight", &[256, 256]),
    ];

    /// The types of `TENSORS` but the norms and the convolution, which always stay.
    fn check(types: &Types, more: &[(&'static str, &'static [u64])], expected: &[Option<GgmlType>]) {
        let tensors: Vec<_> = TENSORS.iter().chain(more).copied().collect();
        let chosen = types.assign(&Metadata::new(), tensors.iter().copied()).unwrap();
        let (mut kept, mut got) = (Vec::new(), Vec::new());
        for ((name, _), chosen) in tensors.iter().zip(chosen) {
            let list = if name.contains("norm") || name.contains("conv") { &mut kept } else { &mut got };
            list.push(chosen.map(|chosen| chosen.ty));
        }
        assert_eq!((kept, &got[..]), (vec![None; 3], expected));
    }

    #[test]
    fn a_person_may_know_better_than_the_mix() {
        let of = |name: &str| Types::of(find(name).unwrap());
        let output: &[(&str, &[u64])] = &[("output.weight", &[256, 1000])];
        check(&of("q4_k_m"), &[], &[Some(Q6_K), Some(Q4_K), Some(Q5_0), Some(F16), Some(Q4_K)]);
        let pure = Types { pure: true, ..of("q4_k_m") };
        check(&pure, &[], &[Some(Q4_K), Some(Q4_K), Some(Q5_0), Some(F16), Some(Q4_K)]);
        let head = Types { output: Some(Q8_0), ..of("q4_k_m") };
        check(&head, &[], &[Some(Q8_0), Some(Q4_K), Some(Q5_0), Some(F16), Some(Q4_K)]);
        check(&head, output, &[Some(Q4_K), Some(Q4_K), Some(Q5_0), Some(F16), Some(Q4_K), Some(Q8_0)]);
        let ends = Types { embedding: Some(BF16), leaves_output: true, ..of("q4_k_m") };
        check(&ends, output, &[Some(BF16), Some(Q4_K), Some(Q5_0), Some(F16), Some(Q4_K), None]);
        let pattern = |text: &str| Regex::new(text).unwrap();
        let by_name = vec![(pattern(r"blk\.(1|2)\.attn"), Q8_0), (pattern("attn"), Q4_0)];
        let named = Types { by_name, ..of("q4_k_m") };
        check(&named, &[], &[Some(Q6_K), Some(Q4_0), Some(Q5_0), Some(F16), Some(Q8_0)]);
    }

    #[test]
    fn a_fallback_is_known_as_one() {
        let types = Types::of(find("q4_k_m").unwrap());
        let chosen = types.assign(&Metadata::new(), TENSORS.iter().copied()).unwrap();
        assert_eq!(chosen[4], Some(Chosen { ty: Q5_0, wanted: Q4_K }));
        assert_eq!(chosen[2], Some(Chosen { ty: Q4_K, wanted: Q4_K }));
    }
}
