//! safetensors: exact layout, folders, and damaged files with the message that each earns.

use std::fs;
use std::path::Path;

use paceline_gguf::safetensors::{DType, SafeTensors, to_bytes};
use proptest::prelude::*;
use tempfile::TempDir;

const DAMAGED: &str = "the file is damaged: download or convert it again";

/// A file with this header and `n_data` bytes of data.
fn file(json: &str, n_data: usize) -> Vec<u8> {
    let mut out = (json.len() as u64).to_le_bytes().to_vec();
    out.extend(json.bytes());
    out.resize(out.len() + n_data, 0);
    out
}

fn message(bytes: Vec<u8>) -> String {
    SafeTensors::from_bytes("x.safetensors", bytes).expect_err("the file must be refused").to_string()
}

#[test]
fn layout_of_a_file() {
    let json = r#"{"b":{"dtype":"BF16","shape":[2,1],"data_offsets":[0,4]},"#.to_string()
        + r#""__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[],"data_offsets":[4,8]}}"#;
    let mut bytes = file(&json, 0);
    bytes.extend([0x80, 0x3f, 0x00, 0xc0]);
    bytes.extend(0.5f32.to_le_bytes());
    let all = SafeTensors::from_bytes("x.safetensors", bytes).unwrap();
    assert_eq!(all.names().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(all.metadata()["format"], "pt");
    let b = all.tensor("b").unwrap();
    assert_eq!((b.dtype, b.shape, b.n_elements(), b.data.len()), (DType::BF16, &[2u64, 1][..], 2, 4));
    assert_eq!(b.to_f32().unwrap(), [1.0, -2.0]);
    assert_eq!(all.to_f32("a").unwrap(), [0.5]);
    assert!(all.tensor("c").is_none());
    assert_eq!(
        all.to_f32("c").unwrap_err().to_string(),
        "x.safetensors: tensor `c`: expected this tensor, found no such name; \
         the checkpoint is incomplete, or of another architecture"
    );
}

/// The file and what it holds are in `goldens/make.py`.
#[test]
fn a_file_of_the_reference_writer() {
    let all = SafeTensors::open(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/reference.safetensors"))
        .unwrap();
    assert_eq!(all.names().collect::<Vec<_>>(), ["bf16", "bool", "empty", "f16", "f32", "f64", "f8", "i64"]);
    for name in ["bf16", "f16", "f32", "f64"] {
        assert_eq!(all.tensor(name).unwrap().shape, [2, 3], "{name}");
        assert_eq!(all.to_f32(name).unwrap(), [-1.5, 0.0, 0.5, 1.0, 2.25, 1024.0], "{name}");
    }
    assert_eq!(all.tensor("i64").unwrap().data, (-3i64).to_le_bytes());
    assert_eq!(all.tensor("bool").unwrap().data, [1, 0]);
    assert_eq!((all.tensor("empty").unwrap().shape, all.to_f32("empty").unwrap()), (&[0u64, 4][..], vec![]));
    assert_eq!(
        all.to_f32("f8").unwrap_err().to_string(),
        "reference.safetensors: tensor `f8`: expected floats (F16, BF16, F32 or F64), found F8_E4M3; \
         this dtype can't be converted: use a checkpoint in BF16"
    );
}

#[test]
fn damaged_headers() {
    let check =
        |bytes: Vec<u8>, want: &str| assert_eq!(message(bytes), format!("x.safetensors: {want}; {DAMAGED}"));
    let one = |entry: &str| file(&format!("{{\"t\":{{{entry}}}}}"), 16);
    check(
        vec![1, 0, 0],
        "length of the header: expected 8 bytes at offset 0, found 3 bytes to the end of the file",
    );
    check(
        file("{}", 0)[..9].to_vec(),
        "header: expected 2 bytes at offset 8, found 1 bytes to the end of the file",
    );
    check(
        [&u64::MAX.to_le_bytes()[..], b"{}"].concat(),
        "length of the header: expected at most 100000000 bytes, found 18446744073709551615",
    );
    check(
        file("{\"t\":1}", 0),
        "header: expected JSON of tensors, found invalid type: integer `1`, \
         expected an object with dtype, shape and data_offsets at line 1 column 6",
    );
    check(
        one(r#""dtype":"F32","shape":[2],"data_offsets":[0,9]"#),
        "tensor `t`: expected 8 bytes for shape [2] of F32, found data_offsets [0, 9]",
    );
    check(
        one(r#""dtype":"F32","shape":[2],"data_offsets":[8,0]"#),
        "tensor `t`: expected 8 bytes for shape [2] of F32, found data_offsets [8, 0]",
    );
    check(
        one(r#""dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]"#),
        "tensor `t`: expected a size below 2^64 bytes, found shape [4294967296, 4294967296] of F32",
    );
    check(
        one(r#""dtype":"U8","shape":[1],"data_offsets":[18446744073709551614,18446744073709551615]"#),
        "tensor `t`: expected an end below 2^64, found data_offsets [18446744073709551614, 18446744073709551615]",
    );
    let entry = |name: &str, begin, end| {
        format!(r#""{name}":{{"dtype":"U8","shape":[{}],"data_offsets":[{begin},{end}]}}"#, end - begin)
    };
    let header = format!("{{{},{}}}", entry("a", 0, 5), entry("b", 4, 8));
    let start = 8 + header.len();
    check(
        file(&header, 8),
        &format!("tensor `b`: expected its data to begin at {}, behind `a`, found {}", start + 5, start + 4),
    );
    let twice = format!("{{{},{}}}", entry("a", 0, 4), entry("a", 4, 8));
    let twice = message(file(&twice, 8));
    assert!(
        twice.starts_with("x.safetensors: header: expected JSON of tensors, found tensor `a` twice at "),
        "{twice}"
    );
}

#[test]
fn foreign_dtypes_files_and_short_data() {
    let check = |bytes: Vec<u8>, want: &str| assert_eq!(message(bytes), format!("x.safetensors: {want}"));
    check(
        file(r#"{"t":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}"#, 1),
        "tensor `t`: expected a known dtype, found \"F4\"; use a checkpoint in BF16",
    );
    check(
        file(r#"{"t":{"dtype":"F32","shape":[1000000],"data_offsets":[0,4000000]}}"#, 500),
        "tensor `t`: header implies 4.0 MB, file has 574 bytes: truncated download? fetch it again",
    );
    check(
        b"PK\x03\x04 and so on".to_vec(),
        "expected a safetensors file, found a zip archive (a PyTorch checkpoint?); \
         convert the model, or download it as GGUF",
    );
    check(
        b"GGUF\x03\0\0\0{\0\0\0\0\0\0\0".to_vec(), // 123 tensors: the byte where JSON would begin
        "expected a safetensors file, found a GGUF file; give it where a GGUF file is expected",
    );
    check(
        b"version https://git-lfs.github.com/spec/v1\n".to_vec(),
        "expected a safetensors file, found a Git LFS pointer, not the file it points to; run `git lfs pull`",
    );
}

/// A file with one tensor of two bytes.
fn small(tensor: &str) -> Vec<u8> {
    to_bytes(&[(tensor, [2u64], DType::U8, [1u8, 2])])
}

fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    files.iter().for_each(|(name, bytes)| fs::write(dir.path().join(name), bytes).unwrap());
    dir
}

#[test]
fn folders() {
    let (a, b) = (small("a"), small("b"));
    let check = |files: &[(&str, &[u8])], want: &[&str]| {
        let dir = folder(files);
        let all = SafeTensors::open(dir.path()).unwrap();
        assert_eq!(all.names().collect::<Vec<_>>(), want);
    };
    check(&[("model.safetensors", &a), ("other.safetensors", &b)], &["a"]);
    check(&[("drafter.safetensors", &a), ("config.json", b"{}")], &["a"]);
    check(
        &[
            ("dflash_draft_model-00001-of-00002.safetensors", &a),
            ("dflash_draft_model-00002-of-00002.safetensors", &b),
        ],
        &["a", "b"],
    );
    let index =
        br#"{"metadata":{"total_size":4},"weight_map":{"a":"one.safetensors","b":"two.safetensors"}}"#;
    for name in ["model.safetensors.index.json", "dflash_draft_model.safetensors.index.json"] {
        check(
            &[(name, index), ("one.safetensors", &a), ("two.safetensors", &b), ("x.safetensors", &a)],
            &["a", "b"],
        );
    }
}

#[test]
fn folders_that_hold_no_checkpoint() {
    let (a, b) = (small("a"), small("b"));
    let check = |files: &[(&str, &[u8])], want: &str| {
        let dir = folder(files);
        let message = SafeTensors::open(dir.path()).unwrap_err().to_string();
        assert_eq!(message.replace(&dir.path().display().to_string(), "DIR"), want);
    };
    let one = "give the path of one file, or keep one checkpoint per folder";
    check(
        &[("config.json", b"{}")],
        "DIR: expected a folder with *.safetensors files, found none; \
         give the folder that holds the model's config.json and weights",
    );
    check(
        &[("a.safetensors", &a), ("b.safetensors", &b)],
        &format!("DIR: expected one checkpoint, found a.safetensors, b.safetensors; {one}"),
    );
    check(
        &[("m-00001-of-00001.safetensors", &a), ("z.safetensors", &b)],
        &format!("DIR: expected one checkpoint, found m-00001-of-00001.safetensors, z.safetensors; {one}"),
    );
    check(
        &[("m-00001-of-00002.safetensors", &a)],
        "m-00001-of-00002.safetensors: expected 2 shards in one folder, found 1, \
         missing m-00002-of-00002.safetensors; download the missing ones into the same folder",
    );
    check(
        &[("m-00001-of-00002.safetensors", &a), ("m-00002-of-00002.safetensors", &a)],
        &format!(
            "m-00002-of-00002.safetensors: tensor `a`: expected each name once, \
             found it in m-00001-of-00002.safetensors too; {DAMAGED}"
        ),
    );
    let name = "model.safetensors.index.json";
    let index = br#"{"weight_map":{"a":"one.safetensors","b":"two.safetensors"}}"#;
    check(
        &[(name, index), ("one.safetensors", &a)],
        "model.safetensors.index.json: expected 2 files in its folder, found 1, missing two.safetensors; \
         download the missing ones into the same folder",
    );
    check(
        &[(name, index), ("one.safetensors", &a), ("two.safetensors", &small("c"))],
        &format!(
            "two.safetensors: tensor `b`: expected this tensor, as model.safetensors.index.json says, \
             found no such name; {DAMAGED}"
        ),
    );
    check(
        &[(name, br#"{"weight_map":{"a":"../../etc/passwd"}}"#)],
        &format!(
            "model.safetensors.index.json: weight_map: expected names of files in this folder, \
             found \"../../etc/passwd\"; {DAMAGED}"
        ),
    );
    let missing = SafeTensors::open(Path::new("no/such/folder")).unwrap_err().to_string();
    assert_eq!(missing, "no/such/folder: can't open: No such file or directory (os error 2)");
}

fn valid() -> Vec<u8> {
    let data: Vec<u8> = (0..64).collect();
    to_bytes(&[
        ("model.embed", vec![2u64, 4], DType::F32, &data[..32]),
        ("norm", vec![3], DType::BF16, &data[..6]),
        ("n", vec![], DType::I64, &data[..8]),
    ])
}

#[test]
fn truncated_anywhere_it_is_refused() {
    let bytes = valid();
    assert!(SafeTensors::from_bytes("x.safetensors", bytes.clone()).is_ok());
    for len in 0..bytes.len() {
        assert!(message(bytes[..len].to_vec()).starts_with("x.safetensors: "), "{len}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn changed_bytes_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
        let mut bytes = valid();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Ok(all) = SafeTensors::from_bytes("x.safetensors", bytes) {
            for tensor in all.iter() {
                prop_assert_eq!(tensor.data.len() as u64, tensor.n_elements() * tensor.dtype.n_bytes() as u64);
                let _ = tensor.to_f32();
            }
        }
    }
}
