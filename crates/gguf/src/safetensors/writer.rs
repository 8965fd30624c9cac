//! Writes small checkpoints, for tests.

use super::DType;

/// A file in memory: tensors are (name, shape slowest first, dtype, data). What is given is written, sound or not, so that
/// tests can make damaged files too.
pub fn to_bytes<N: AsRef<str>, S: AsRef<[u64]>, B: AsRef<[u8]>>(tensors: &[(N, S, DType, B)]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for (name, shape, dtype, bytes) in tensors {
        let begin = data.len();
        data.extend_from_slice(bytes.as_ref());
        let entry = serde_json::json!({
            "dtype": dtype.name(),
            "shape": shape.as_ref(),
            "data_offsets": [begin, data.len()],
        });
        header.insert(name.as_ref().into(), entry);
    }
    let mut json = serde_json::Value::Object(header).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut file = (json.len() as u64).to_le_bytes().to_vec();
    file.extend(json);
    file.extend(data);
    file
}
