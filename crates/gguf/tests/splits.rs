//! Split models: any shard opens all of them, and what is missing or mixed up is named.

use std::fs;
use std::path::PathBuf;

use paceline_gguf::{GgmlType, Gguf, Metadata, to_bytes};
use tempfile::TempDir;

/// A shard with one tensor `t{no}` of two floats, both `no`, and what it says about the split.
fn shard(no: u16, count: u16, n_tensors: i32, tensor: &str) -> Vec<u8> {
    let mut metadata = Metadata::new();
    if no == 0 {
        metadata.insert("general.architecture", "tiny");
    }
    metadata.insert("split.no", no);
    metadata.insert("split.count", count);
    metadata.insert("split.tensors.count", n_tensors);
    let data = [f32::from(no).to_le_bytes(); 2].concat();
    to_bytes(&metadata, &[(tensor, [2u64], GgmlType::F32, data)]).unwrap()
}

/// A folder with these files.
fn folder(files: &[(&str, Vec<u8>)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

fn three() -> [(&'static str, Vec<u8>); 3] {
    [
        ("m-00001-of-00003.gguf", shard(0, 3, 3, "t0")),
        ("m-00002-of-00003.gguf", shard(1, 3, 3, "t1")),
        ("m-00003-of-00003.gguf", shard(2, 3, 3, "t2")),
    ]
}

#[test]
fn any_shard_opens_the_whole_model() {
    let files = three();
    let dir = folder(&files);
    for (name, _) in &files {
        let gguf = Gguf::open(dir.path().join(name)).unwrap();
        assert_eq!(gguf.name(), "m-00001-of-00003.gguf");
        assert_eq!(gguf.file_names().collect::<Vec<_>>(), files.each_ref().map(|(name, _)| *name));
        assert_eq!(gguf.file_bytes() as usize, files.iter().map(|(_, bytes)| bytes.len()).sum::<usize>());
        for (no, tensor) in gguf.tensors().iter().enumerate() {
            assert_eq!((tensor.name.as_str(), tensor.shard()), (format!("t{no}").as_str(), no));
            assert_eq!(gguf.data(tensor), [(no as f32).to_le_bytes(); 2].concat());
        }
        assert_eq!(gguf.tensors().len(), 3);
        assert_eq!(gguf.metadata().keys().collect::<Vec<_>>(), ["general.architecture"]);
    }
}

/// Opening `name` among `files` fails with this message.
fn check(files: &[(&str, Vec<u8>)], name: &str, want: &str) {
    let dir = folder(files);
    assert_eq!(Gguf::open(dir.path().join(name)).unwrap_err().to_string(), want);
}

#[test]
fn a_missing_shard_is_named() {
    let [first, _, third] = three();
    check(
        &[first, third],
        "m-00003-of-00003.gguf",
        "m-00003-of-00003.gguf: expected 3 shards in one folder, found 2, missing m-00002-of-00003.gguf; \
         download the missing ones into the same folder",
    );
    check(
        &[("m-00001-of-99999.gguf", shard(0, 9, 9, "t"))],
        "m-00001-of-99999.gguf",
        "m-00001-of-99999.gguf: expected 99999 shards in one folder, found 1, missing m-00002-of-99999.gguf, \
         m-00003-of-99999.gguf, m-00004-of-99999.gguf, m-00005-of-99999.gguf, …; \
         download the missing ones into the same folder",
    );
}

#[test]
fn a_renamed_shard_is_told_apart() {
    let names = "give the shards back the names they were published with, name-00001-of-0000N.gguf";
    check(
        &[("model.gguf", shard(0, 3, 3, "t0"))],
        "model.gguf",
        &format!(
            "model.gguf: expected shard 1 of 1, as its name says, found metadata of shard 1 of 3; {names}"
        ),
    );
    let [first, second, third] = three();
    check(
        &[(first.0, first.1), (second.0, third.1), (third.0, second.1)],
        "m-00001-of-00003.gguf",
        &format!(
            "m-00002-of-00003.gguf: expected shard 2 of 3, as its name says, found metadata of shard 3 of 3; {names}"
        ),
    );
}

#[test]
fn shards_of_different_models_are_told_apart() {
    let two = |n_tensors, second: &str| {
        [
            ("m-00001-of-00002.gguf", shard(0, 2, n_tensors, "t0")),
            ("m-00002-of-00002.gguf", shard(1, 2, n_tensors, second)),
        ]
    };
    check(
        &two(5, "t1"),
        "m-00001-of-00002.gguf",
        "m-00001-of-00002.gguf: expected 5 tensors in 2 shards, found 2; \
         the shards are of different models or versions: download all of them again",
    );
    check(
        &two(2, "t0"),
        "m-00001-of-00002.gguf",
        "m-00002-of-00002.gguf: tensor `t0`: expected each name once, found it in m-00001-of-00002.gguf too; \
         the file is damaged: download or convert it again",
    );
}

#[test]
fn a_truncated_shard_is_named() {
    let [first, second, mut third] = three();
    third.1.truncate(third.1.len() - 32);
    let dir = folder(&[first, second, third]);
    let message = Gguf::open(dir.path().join("m-00001-of-00003.gguf")).unwrap_err().to_string();
    assert!(message.starts_with("m-00003-of-00003.gguf: tensor `t2`: header implies "), "{message}");
}

#[test]
fn a_single_file_may_say_so() {
    let dir = folder(&[("a.gguf", shard(0, 1, 1, "t")), ("b-00001-of-00001.gguf", shard(0, 1, 1, "t"))]);
    let open = |name: &str| Gguf::open(PathBuf::from(dir.path()).join(name)).unwrap();
    assert_eq!(open("a.gguf").tensors().len(), 1);
    assert_eq!(open("b-00001-of-00001.gguf").tensors().len(), 1);
}
