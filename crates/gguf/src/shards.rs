//! Names of split models: `name-00001-of-00003.gguf` is the first of three, counted from 1.

use std::path::{Path, PathBuf};

use crate::Error;

/// The place of a file in a split model, by its name.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ShardName {
    dir: PathBuf,
    /// What is in front of `-00001-of-00003`.
    prefix: String,
    extension: String,
    /// From 1.
    pub(crate) no: usize,
    pub(crate) count: usize,
}

impl ShardName {
    /// None if the name is not one of a shard.
    pub(crate) fn of(path: &Path) -> Option<ShardName> {
        let (stem, extension) = path.file_name()?.to_str()?.rsplit_once('.')?;
        let (rest, count) = stem.rsplit_once("-of-")?;
        let (prefix, no) = rest.rsplit_once('-')?;
        let number = |digits: &str| -> Option<usize> {
            let five = digits.len() == 5 && digits.bytes().all(|byte| byte.is_ascii_digit());
            if five { digits.parse().ok() } else { None }
        };
        let (no, count) = (number(no)?, number(count)?);
        let dir = path.parent().unwrap_or(Path::new("")).to_path_buf();
        let shard = ShardName { dir, prefix: prefix.into(), extension: extension.into(), no, count };
        (1..=count).contains(&no).then_some(shard)
    }

    fn path(&self, no: usize) -> PathBuf {
        self.dir.join(format!("{}-{no:05}-of-{:05}.{}", self.prefix, self.count, self.extension))
    }

    /// The paths of all shards, in order; an error that names the missing ones if there are any.
    pub(crate) fn all(&self) -> Result<Vec<PathBuf>, Error> {
        let paths: Vec<PathBuf> = (1..=self.count).map(|no| self.path(no)).collect();
        let missing: Vec<&PathBuf> = paths.iter().filter(|path| !path.exists()).collect();
        if missing.is_empty() {
            return Ok(paths);
        }
        const N_NAMED: usize = 4;
        let mut names: Vec<String> = missing.iter().take(N_NAMED).map(|path| file_name(path)).collect();
        if missing.len() > N_NAMED {
            names.push("…".into());
        }
        Err(Error::Shards {
            file: file_name(&self.path(self.no)),
            expected: format!("{} shards in one folder", self.count),
            found: format!("{}, missing {}", paths.len() - missing.len(), names.join(", ")),
            hint: "download the missing ones into the same folder",
        })
    }
}

/// The last part of a path, as messages name files.
pub(crate) fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shard_names() {
        let check = |path: &str, want: Option<(&str, usize, usize)>| {
            let shard = ShardName::of(Path::new(path));
            let got = shard.as_ref().map(|shard| (shard.prefix.as_str(), shard.no, shard.count));
            assert_eq!(got, want, "{path}");
            if let Some(shard) = shard {
                assert_eq!(shard.path(shard.no), Path::new(path));
            }
        };
        check("m/Qwen-00002-of-00003.gguf", Some(("Qwen", 2, 3)));
        check("a-of-b-00001-of-00001.gguf", Some(("a-of-b", 1, 1)));
        check("model-00001-of-00002.safetensors", Some(("model", 1, 2)));
        check("m-00004-of-00003.gguf", None);
        check("m-00000-of-00003.gguf", None);
        check("m-1-of-3.gguf", None);
        check("m-+0001-of-00003.gguf", None);
        check("m.gguf", None);
        check("-of-.gguf", None);
    }
}
