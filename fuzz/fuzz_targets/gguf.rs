//! Any bytes: the GGUF parser refuses them or all that it then offers can be used. Never a panic, never memory beyond a
//! small multiple of the input.
//!
//! `cargo +nightly fuzz run gguf -- -rss_limit_mb=512`; a good first corpus is `crates/gguf/tests/goldens`.

#![no_main]

use libfuzzer_sys::fuzz_target;
use paceline_gguf::{Gguf, to_bytes};

fuzz_target!(|bytes: &[u8]| {
    let Ok(gguf) = Gguf::from_bytes("fuzz.gguf", bytes.to_vec()) else { return };
    let metadata = gguf.metadata();
    for (key, value) in metadata.iter() {
        let _ = value.to_string();
        let _ =
            (metadata.u32(key), metadata.i32(key), metadata.u64(key), metadata.f32(key), metadata.bool(key));
        let _ =
            (metadata.str(key), metadata.u32_array(key), metadata.i32_array(key), metadata.f32_array(key));
        let _ = (metadata.bool_array(key), metadata.bytes_array(key), metadata.u32_or_array(key, 3));
    }
    let mut tensors = Vec::new();
    for tensor in gguf.tensors() {
        let data = gguf.data(tensor);
        assert_eq!(data.len(), tensor.row_bytes() * tensor.n_rows() as usize);
        assert_eq!(data.as_ptr().align_offset(8), 0);
        tensors.push((&tensor.name, &tensor.shape, tensor.ty, data));
    }
    // The writer may refuse a name that is too long for others to read; what it writes reads back the same. An alignment
    // may be as large as the input asks, and padding is no finding.
    if gguf.alignment() > 4096 {
        return;
    }
    let Ok(again) = to_bytes(metadata, &tensors) else { return };
    let again = Gguf::from_bytes("again.gguf", again).expect("what was written can be read");
    for (name, shape, ty, data) in tensors {
        let tensor = again.tensor(name).expect("every tensor is there");
        assert_eq!((&tensor.shape, tensor.ty, again.data(tensor)), (shape, ty, data));
    }
});
