//! Which files of a folder make up its checkpoint.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use crate::Error;
use crate::shards::{ShardName, file_name};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The files of a checkpoint, and the index that named them if there is one.
pub(super) struct Checkpoint {
    pub(super) paths: Vec<PathBuf>,
    pub(super) index: Option<Index>,
}

/// Which tensor is in which file.
pub(super) struct Index {
    /// The index's own file name.
    pub(super) name: String,
    pub(super) weight_map: BTreeMap<String, String>,
}

/// Finds the checkpoint of a folder; the order of preference is documented at `SafeTensors::open_dir`.
pub(super) fn find(dir: &Path) -> Result<Checkpoint, Error> {
    let names = list(dir)?;
    let no_index = |paths| Ok(Checkpoint { paths, index: None });
    if names.contains(SINGLE) {
        return no_index(vec![dir.join(SINGLE)]);
    }
    let indices: Vec<&String> =
        names.iter().filter(|name| name.ends_with(".safetensors.index.json")).collect();
    if names.contains(INDEX) {
        return read_index(dir, INDEX);
    }
    match indices[..] {
        [] => (),
        [index] => return read_index(dir, index),
        _ => return Err(ambiguous(dir, &indices)),
    }
    let files: Vec<&String> = names.iter().filter(|name| name.ends_with(".safetensors")).collect();
    let Some(first) = files.first() else {
        return Err(Error::Shards {
            file: dir.display().to_string(),
            expected: "a folder with *.safetensors files".into(),
            found: "none".into(),
            hint: "give the folder that holds the model's config.json and weights",
        });
    };
    if let Some(shard) = ShardName::of(&dir.join(first)) {
        let all = shard.all()?;
        let in_set = |name: &&String| all.iter().any(|path| file_name(path) == **name);
        return if files.iter().all(in_set) { no_index(all) } else { Err(ambiguous(dir, &files)) };
    }
    match files[..] {
        [file] => no_index(vec![dir.join(file)]),
        _ => Err(ambiguous(dir, &files)),
    }
}

fn list(dir: &Path) -> Result<BTreeSet<String>, Error> {
    let failed = |source| Error::io(dir, "list", source);
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        // A name that is not UTF-8 is none that we look for.
        if let Ok(name) = entry.map_err(failed)?.file_name().into_string() {
            names.insert(name);
        }
    }
    Ok(names)
}

fn ambiguous(dir: &Path, names: &[&String]) -> Error {
    const N_NAMED: usize = 4;
    let mut named: Vec<&str> = names.iter().take(N_NAMED).map(|name| name.as_str()).collect();
    if names.len() > N_NAMED {
        named.push("…");
    }
    Error::Shards {
        file: dir.display().to_string(),
        expected: "one checkpoint".into(),
        found: named.join(", "),
        hint: "give the path of one file, or keep one checkpoint per folder",
    }
}

fn read_index(dir: &Path, name: &str) -> Result<Checkpoint, Error> {
    #[derive(Deserialize)]
    #[serde(expecting = "an object with a weight_map")]
    struct RawIndex {
        weight_map: BTreeMap<String, String>,
    }

    let path = dir.join(name);
    let json = fs::read(&path).map_err(|source| Error::io(&path, "read", source))?;
    let RawIndex { weight_map } = serde_json::from_slice(&json)
        .map_err(|error| Error::header(name, "index", "JSON with a weight_map", error.to_string()))?;

    let files: BTreeSet<&String> = weight_map.values().collect();
    for file in &files {
        // An index from the net must not lead us out of its folder.
        let mut parts = Path::new(file).components();
        if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
            return Err(Error::header(
                name,
                "weight_map",
                "names of files in this folder",
                format!("{file:?}"),
            ));
        }
    }
    let missing: Vec<&str> =
        files.iter().filter(|file| !dir.join(file).exists()).map(|file| file.as_str()).collect();
    if !missing.is_empty() {
        return Err(Error::Shards {
            file: name.into(),
            expected: format!("{} files in its folder", files.len()),
            found: format!("{}, missing {}", files.len() - missing.len(), missing.join(", ")),
            hint: "download the missing ones into the same folder",
        });
    }
    let paths = files.iter().map(|file| dir.join(file)).collect();
    Ok(Checkpoint { paths, index: Some(Index { name: name.into(), weight_map }) })
}
