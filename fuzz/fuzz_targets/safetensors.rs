//! Any bytes: the safetensors parser refuses them or every tensor that it then offers can be used.
//!
//! `cargo +nightly fuzz run safetensors -- -rss_limit_mb=512`; a good first corpus is `crates/gguf/tests/goldens`.

#![no_main]

use libfuzzer_sys::fuzz_target;
use paceline_gguf::safetensors::SafeTensors;

fuzz_target!(|bytes: &[u8]| {
    let Ok(all) = SafeTensors::from_bytes("fuzz.safetensors", bytes.to_vec()) else { return };
    for tensor in all.iter() {
        assert_eq!(tensor.data.len() as u64, tensor.n_elements() * tensor.dtype.n_bytes() as u64);
        if let Ok(elements) = tensor.to_f32() {
            assert_eq!(elements.len() as u64, tensor.n_elements());
        }
        assert!(all.tensor(tensor.name).is_some());
    }
});
