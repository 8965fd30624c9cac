//! Which type each tensor gets: the rules of a mix, applied in the file's order. What a mix leaves alone (norms, vectors,
//! convolutions) is F32, whatever it was in the checkpoint.

use paceline_gguf::{GgmlType, Metadata};
use paceline_kernels::formats::mix::{Assignment, MIXES, Mix, Model, mix};

use crate::Error;

/// The mix that a person named.
pub(crate) fn find(name: &str) -> Result<&'static Mix, Error> {
    mix(name).ok_or_else(|| {
        let known: Vec<_> = MIXES.iter().map(|mix| mix.name).collect();
        Error::UnknownType { name: name.into(), known: known.join(", ") }
    })
}

/// The type of each tensor, given as name and shape in their order; `metadata` is that of their file.
pub(crate) fn assign<'a>(
    mix: &'static Mix,
    metadata: &Metadata,
    tensors: impl Iterator<Item = (&'a str, &'a [u64])> + Clone,
) -> Result<Vec<GgmlType>, Error> {
    let arch = metadata.require_str("general.architecture")?;
    let size = |key: &str| metadata.require_u32(&format!("{arch}.{key}")).map(|n| n as usize);
    let names = tensors.clone().map(|(name, _)| name);
    let (n_layer, n_head) = (size("block_count")?, size("attention.head_count")?);
    // Where layers differ, the first one speaks for all.
    let n_head_kv = metadata.require_u32_or_array(&format!("{arch}.attention.head_count_kv"), n_layer)?;
    let n_head_kv = n_head_kv.first().map_or(n_head, |&n| n as usize);
    let mut assignment = Assignment::new(mix, Model::new(names, n_layer, n_head, n_head_kv));
    Ok(tensors.map(|(name, shape)| assignment.next(name, shape).unwrap_or(GgmlType::F32)).collect())
}
