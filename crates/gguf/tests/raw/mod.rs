//! GGUF bytes put together by hand, so that a test can write what the crate's own writer refuses to.

/// Preamble, then `parts` one after the other, zeros to the alignment of 32, and `n_data` bytes of data.
pub fn file(version: u32, n_tensors: u64, n_keys: u64, parts: &[Vec<u8>], n_data: usize) -> Vec<u8> {
    let mut out = b"GGUF".to_vec();
    out.extend(version.to_le_bytes());
    out.extend(n_tensors.to_le_bytes());
    out.extend(n_keys.to_le_bytes());
    parts.iter().for_each(|part| out.extend(part));
    if n_tensors > 0 {
        out.resize(out.len().next_multiple_of(32) + n_data, 0);
    }
    out
}

/// Length and bytes.
pub fn string(bytes: impl AsRef<[u8]>) -> Vec<u8> {
    let bytes = bytes.as_ref();
    [&(bytes.len() as u64).to_le_bytes(), bytes].concat()
}

/// A key, its value's type id, and the value's bytes.
pub fn key(name: impl AsRef<[u8]>, ty: u32, value: impl AsRef<[u8]>) -> Vec<u8> {
    [&string(name), &ty.to_le_bytes()[..], value.as_ref()].concat()
}

/// What follows the type id of an array: element type id, count, elements.
pub fn array(ty: u32, n: u64, elems: impl AsRef<[u8]>) -> Vec<u8> {
    [&ty.to_le_bytes()[..], &n.to_le_bytes(), elems.as_ref()].concat()
}

/// An entry of the directory.
pub fn tensor(name: impl AsRef<[u8]>, shape: &[u64], ty: u32, offset: u64) -> Vec<u8> {
    let mut out = string(name);
    out.extend((shape.len() as u32).to_le_bytes());
    shape.iter().for_each(|ne| out.extend(ne.to_le_bytes()));
    out.extend(ty.to_le_bytes());
    out.extend(offset.to_le_bytes());
    out
}
