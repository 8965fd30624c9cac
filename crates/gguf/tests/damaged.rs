//! Files that are damaged or something else entirely, and the exact message that each earns.

mod raw;

use std::fs;

use paceline_gguf::{Array, Error, GgmlType, Gguf, Metadata, Strings, Value, to_bytes};
use proptest::prelude::*;

const DAMAGED: &str = "the file is damaged: download or convert it again";

fn message(bytes: Vec<u8>) -> String {
    Gguf::from_bytes("x.gguf", bytes).expect_err("the file must be refused").to_string()
}

/// The message for `bytes` is `x.gguf: {what}; the file is damaged: …`.
fn check(bytes: Vec<u8>, what: &str) {
    assert_eq!(message(bytes), format!("x.gguf: {what}; {DAMAGED}"));
}

#[test]
fn counts_are_bounded_by_the_file() {
    check(
        raw::file(3, 0, u64::MAX, &[], 0),
        "count of keys, 18446744073709551615: expected a size below 2^64 at offset 24, \
         found more, with 0 bytes to the end of the file",
    );
    check(
        raw::file(3, 1 << 40, 0, &[vec![0; 100]], 0),
        "count of tensors, 1099511627776: expected 35184372088832 bytes at offset 24, \
         found 104 bytes to the end of the file",
    );
    check(
        raw::file(
            3,
            0,
            2,
            &[raw::key("a", 4, 7u32.to_le_bytes()), 100u64.to_le_bytes().into(), vec![0; 5]],
            0,
        ),
        "key 2 of 2: expected 100 bytes at offset 49, found 5 bytes to the end of the file",
    );
}

#[test]
fn keys() {
    let one = |key: Vec<u8>| raw::file(3, 0, 1, &[key, vec![0; 8]], 0);
    check(one(raw::key("a", 13, [])), "value of key `a`: expected a value type id from 0 to 12, found 13");
    check(one(raw::key("a", 7, [2])), "value of key `a`: expected a bool (0 or 1), found 2");
    check(
        one(raw::key("a", 9, raw::array(9, 1, raw::array(4, 0, [])))),
        "value of key `a`: expected a flat array, found an array of arrays",
    );
    check(
        one(raw::key("a", 9, raw::array(10, 1 << 62, []))),
        "value of key `a`: expected a size below 2^64 at offset 49, found more, with 8 bytes to the end of the file",
    );
    check(
        one(raw::key("a", 9, raw::array(8, 5, []))),
        "value of key `a`: expected 40 bytes at offset 49, found 8 bytes to the end of the file",
    );
    check(
        one(raw::key("a", 8, 1000u64.to_le_bytes())),
        "value of key `a`: expected 1000 bytes at offset 45, found 8 bytes to the end of the file",
    );
    check(one(raw::key([b'k', 0xff], 0, [1])), "key 1 of 1: expected a name in UTF-8, found \"k\u{fffd}\"");
    check(
        raw::file(3, 0, 2, &[raw::key("a", 0, [1]), raw::key("a", 0, [2])], 0),
        "key `a`: expected each key once, found it twice",
    );
    let alignment = |n: u32| one(raw::key("general.alignment", 4, n.to_le_bytes()));
    for n in [0, 1, 4, 24] {
        check(
            alignment(n),
            &format!("key `general.alignment`: expected a power of two from 8 on, found {n}"),
        );
    }
    let wrong_type = message(one(raw::key("general.alignment", 8, raw::string("32"))));
    assert!(wrong_type.starts_with("x.gguf: key `general.alignment`: expected u32, found string \"32\"; "));
}

#[test]
fn tensors() {
    let one = |entry: Vec<u8>, n_data| raw::file(3, 1, 0, &[entry], n_data);
    let check_one = |shape: &[u64], ty, offset, what: &str| {
        check(one(raw::tensor("t", shape, ty, offset), 64), &format!("tensor `t`: expected {what}"));
    };
    check_one(&[], 0, 0, "1 to 4 dimensions, found 0");
    check_one(&[1; 5], 0, 0, "1 to 4 dimensions, found 5");
    check_one(&[4, 0], 0, 0, "dimensions above 0, found shape [4, 0]");
    check_one(&[48, 2], 8, 0, "rows of whole q8_0 blocks of 32 elements, found shape [48, 2]");
    check_one(
        &[1 << 32, 1 << 32],
        0,
        0,
        "a size below 2^63 bytes, found shape [4294967296, 4294967296] of f32",
    );
    check_one(&[1 << 61], 0, 0, "a size below 2^63 bytes, found shape [2305843009213693952] of f32");
    check_one(&[4], 0, 8, "an offset aligned to 32, found 8");
    check_one(&[16], 0, u64::MAX - 95, "an end below 2^64, found offset 18446744073709551520 for 64 bytes");
    check_one(&[4], 0, u64::MAX - 31, "an end below 2^64, found offset 18446744073709551584 for 16 bytes");

    let twice = [raw::tensor("t", &[4], 0, 0), raw::tensor("t", &[4], 0, 32)];
    check(raw::file(3, 2, 0, &twice, 64), "tensor `t`: expected each name once, found it twice");
    let over = [raw::tensor("b", &[4], 0, 32), raw::tensor("a", &[9], 0, 0)];
    check(
        raw::file(3, 2, 0, &over, 64),
        "tensor `b`: expected its data to begin at 132, behind `a`, found 128",
    );
    check(
        one(raw::tensor([0xc3], &[4], 0, 0), 64),
        "tensor 1 of 1: expected a name in UTF-8, found \"\u{fffd}\"",
    );
}

#[test]
fn types_that_are_gone_or_foreign_are_named() {
    let hint = "download another quantization of the model, or convert it again";
    for (id, history) in [
        (4, "removed from the format"),
        (31, "removed from the format"),
        (38, "removed from the format"),
        (42, "of a fork or newer than this program"),
        (u32::MAX, "of a fork or newer than this program"),
    ] {
        assert_eq!(
            message(raw::file(3, 1, 0, &[raw::tensor("blk.0.w", &[256], id, 0)], 64)),
            format!(
                "x.gguf: tensor `blk.0.w`: expected a known tensor type, found type id {id} ({history}); {hint}"
            )
        );
    }
}

#[test]
fn a_short_file_is_told_both_sizes() {
    let check = |bytes, sizes| {
        let way_out = "truncated download? fetch it again";
        assert_eq!(message(bytes), format!("x.gguf: tensor `big`: header implies {sizes}: {way_out}"));
    };
    let entries = [
        raw::tensor("a", &[8], 0, 0),
        raw::tensor("big", &[1 << 30, 4], 0, 32),
        raw::tensor("last", &[1 << 30], 0, 32 + (1 << 34)),
    ];
    check(raw::file(3, 3, 0, &entries, 1500), "21.5 GB, file has 1.7 kB");
    let just_short = raw::file(3, 1, 0, &[raw::tensor("big", &[1000], 0, 0)], 3999);
    check(just_short, "4064 bytes, file has 4063 bytes");
    assert!(
        Gguf::from_bytes("x.gguf", raw::file(3, 1, 0, &[raw::tensor("big", &[1000], 0, 0)], 4000)).is_ok()
    );
}

#[test]
fn versions_and_byte_orders() {
    let check = |start: &[u8], want: &str| {
        let got = message([start, &[0; 64]].concat());
        assert_eq!(got, format!("x.gguf: expected a GGUF file, found {want}"));
    };
    let order = "a big-endian GGUF file; download or convert it as little-endian";
    check(b"GGUF\0\0\0\x03", order);
    check(b"FUGG\x03\0\0\0", order);
    check(b"GGUF\x01\0\0\0", "GGUF version 1; versions 2 and 3 are read: download or convert it again");
    for version in [0u8, 4] {
        check(
            &[b"GGUF".as_slice(), &[version, 0, 0, 0]].concat(),
            &format!(
                "GGUF version {version}; versions 2 and 3 are read: a newer program may know it, or the file is damaged"
            ),
        );
    }
    assert_eq!(Gguf::from_bytes("x.gguf", raw::file(2, 0, 0, &[], 0)).unwrap().version(), 2);
}

#[test]
fn foreign_files_are_recognised() {
    let check = |bytes: &[u8], found: &str| {
        let got = message(bytes.to_vec());
        assert!(got.starts_with(&format!("x.gguf: expected a GGUF file, found {found}; ")), "{got}");
    };
    check(b"", "an empty file");
    check(b"lmgg\x01\0\0\0", "an old ggml file");
    check(b"tjgg\x03\0\0\0", "an old ggjt file");
    check(b"PK\x03\x04\x14\0", "a zip archive (a PyTorch checkpoint?)");
    check(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "a PNG image");
    check(b"\n  <!DOCTYPE html><html>", "an HTML page");
    check(b"<HTML><head>", "an HTML page");
    check(b"<?xml version=\"1.0\"?><Error>", "an XML document");
    check(b"\x7fELF\x02\x01\x01", "a program or library (ELF)");
    check(b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer, not the file it points to");
    check(b"\x10\0\0\0\0\0\0\0{\"a\":{}}", "a safetensors file");
    check(b"{\"error\": \"not found\"}", "a JSON document");
    check(&[0; 4096], "zero bytes at its start");
    check(b"GGU", "a file that starts with \"GGU\"");
    check(b"hello\xff world", "a file that starts with \"hello\\xff w\"");
}

#[test]
fn paths_that_are_no_files() {
    let dir = tempfile::tempdir().unwrap();
    let check = |path: &std::path::Path, want: &str| {
        let got = Gguf::open(path).unwrap_err().to_string();
        assert_eq!(got, format!("{}: {want}", path.display()));
    };
    check(dir.path(), "expected a GGUF file, found a directory; give the path of a file in it");
    let empty = dir.path().join("empty.gguf");
    fs::write(&empty, b"").unwrap();
    check(&empty, "expected a GGUF file, found an empty file; download or convert it again");
    check(&dir.path().join("none.gguf"), "can't open: No such file or directory (os error 2)");
}

/// A valid file with every kind of value and several types of tensors.
fn valid() -> Vec<u8> {
    let mut metadata = Metadata::new();
    metadata.insert("general.architecture", "tiny");
    metadata.insert("general.alignment", 64u32);
    metadata.insert("u8", 1u8);
    metadata.insert("i8", -1i8);
    metadata.insert("u16", 2u16);
    metadata.insert("i16", -2i16);
    metadata.insert("i32", -3i32);
    metadata.insert("f32", 0.5f32);
    metadata.insert("bool", true);
    metadata.insert("u64", 4u64);
    metadata.insert("i64", -4i64);
    metadata.insert("f64", 0.25f64);
    metadata.insert("tokens", vec![b"a".to_vec(), vec![0xff, 0xfe], vec![]]);
    metadata.insert("scores", vec![1.0f32, -1.0]);
    metadata.insert("flags", vec![true, false, true]);
    let data: Vec<u8> = (0..=255).collect();
    let tensors = [
        ("embd", vec![4u64, 3], GgmlType::F32, &data[..48]),
        ("norm", vec![5], GgmlType::F16, &data[..10]),
        ("w", vec![32, 1, 2], GgmlType::Q8_0, &data[..68]),
        ("k", vec![256], GgmlType::Q4_K, &data[..144]),
        ("odd", vec![256, 1, 1, 1], GgmlType::IQ1_S, &data[..50]),
    ];
    to_bytes(&metadata, &tensors).unwrap()
}

#[test]
fn truncated_anywhere_it_is_refused() {
    let bytes = valid();
    let gguf = Gguf::from_bytes("x.gguf", bytes.clone()).unwrap();
    let end =
        gguf.tensors().iter().map(|tensor| tensor.file_offset() + tensor.n_bytes).max().unwrap() as usize;
    for len in 0..end {
        let message = message(bytes[..len].to_vec());
        assert!(message.starts_with("x.gguf: "), "{len}: {message}");
    }
    // Only the padding behind the last tensor may be missing: nothing is lost with it.
    assert!(end < bytes.len());
    assert!(Gguf::from_bytes("x.gguf", bytes[..end].to_vec()).is_ok());
}

/// Uses all that a file which opened has to offer.
fn use_all(gguf: &Gguf) {
    for (key, value) in gguf.metadata().iter() {
        let _ = value.to_string();
        let metadata = gguf.metadata();
        let _ =
            (metadata.u32(key), metadata.str(key), metadata.f32_array(key), metadata.u32_or_array(key, 2));
    }
    let mut tensors = Vec::new();
    for tensor in gguf.tensors() {
        let data = gguf.data(tensor);
        assert_eq!(data.len() as u64, tensor.n_bytes);
        assert_eq!(data.len(), tensor.row_bytes() * tensor.n_rows() as usize);
        assert_eq!(data.as_ptr().align_offset(8), 0);
        tensors.push((&tensor.name, &tensor.shape, tensor.ty, data));
    }
    if gguf.alignment() > 4096 {
        return; // padding on that scale is legal, and of no interest
    }
    let Ok(again) = to_bytes(gguf.metadata(), &tensors) else { return }; // a name may be too long to write
    assert_eq!(Gguf::from_bytes("y.gguf", again).unwrap().tensors().len(), tensors.len());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn changed_bytes_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let mut bytes = valid();
        for (at, byte) in changes {
            // The header is where it hurts: data is a third of this file.
            let at = at.index(bytes.len() * 2 / 3);
            bytes[at] = byte;
        }
        if let Ok(gguf) = Gguf::from_bytes("x.gguf", bytes) {
            use_all(&gguf);
        }
    }

    #[test]
    fn large_numbers_never_panic(at in any::<prop::sample::Index>(), shift in 0u32..64, less in 0u64..2) {
        let mut bytes = valid();
        let at = at.index(bytes.len() - 8);
        bytes[at..at + 8].copy_from_slice(&(1u64 << shift).wrapping_sub(less).to_le_bytes());
        if let Ok(gguf) = Gguf::from_bytes("x.gguf", bytes) {
            use_all(&gguf);
        }
    }

    #[test]
    fn noise_never_panics(noise in prop::collection::vec(any::<u8>(), 0..300)) {
        let noise = [b"GGUF\x03\0\0\0\x01\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0".as_slice(), &noise].concat();
        if let Ok(gguf) = Gguf::from_bytes("x.gguf", noise) {
            use_all(&gguf);
        }
    }
}

#[test]
fn errors_are_small_and_shareable() {
    fn shareable<T: Send + Sync + 'static>() {}
    shareable::<Error>();
    shareable::<Gguf>();
    assert!(size_of::<Error>() <= 128);
    // The public value types are what a test of another crate builds a file from.
    let strings: Strings = ["a"].into_iter().collect();
    assert_eq!(Value::from(strings.clone()), Value::Array(Array::String(strings)));
}
