//! Running the binary.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use paceline_gguf::{GgmlType, Gguf, Metadata, TensorInfo, to_bytes};

/// What a run left behind.
pub struct Ran {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Ran {
    /// Standard output of a run that must have gone well.
    pub fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "stderr: {}", self.err);
        self.out
    }

    /// Standard output, which must be one JSON value.
    pub fn json(self) -> serde_json::Value {
        let out = self.ok();
        serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}"))
    }

    /// Standard error of a run that must have failed, with all of `parts` in it.
    pub fn fails_with(self, parts: &[&str]) -> String {
        assert!(self.code.is_some_and(|code| code != 0), "exit {:?}, stdout: {}", self.code, self.out);
        for part in parts {
            assert!(self.err.contains(part), "expected {part:?} in: {}", self.err);
        }
        assert!(!self.err.contains("panicked"), "{}", self.err);
        self.err
    }
}

/// The binary, deaf to the environment of whoever runs the tests.
pub fn command(args: &[impl AsRef<OsStr>]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_paceline"));
    command.args(args).stdin(Stdio::null());
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy().to_ascii_uppercase();
        if ["LLAMA_", "HF_", "RUST_LOG", "PACELINE_"].iter().any(|prefix| text.starts_with(prefix))
            || text.ends_with("_PROXY")
        {
            command.env_remove(name);
        }
    }
    command
}

/// Runs it to its end.
pub fn paceline(args: &[impl AsRef<OsStr>]) -> Ran {
    finish(command(args))
}

/// Runs a prepared command to its end.
pub fn finish(mut command: Command) -> Ran {
    let Output { status, stdout, stderr } = command.output().expect("the binary can be started");
    Ran {
        code: status.code(),
        out: String::from_utf8(stdout).expect("standard output is UTF-8"),
        err: String::from_utf8_lossy(&stderr).into_owned(),
    }
}

/// A path of the repository.
pub fn repo(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
}

/// The same as text.
pub fn repo_str(path: &str) -> String {
    repo(path).to_str().expect("a path of UTF-8").to_string()
}

/// A copy of a file of the repository in `dir`, its metadata edited.
pub fn edited(file: &str, dir: &Path, name: &str, edit: &dyn Fn(&mut Metadata)) -> String {
    rewritten(file, dir, name, edit, &mut |tensor, data| (tensor.ty, data.to_vec()))
}

/// Gives a tensor its type and data in place of its own.
pub type EditTensor<'a> = dyn FnMut(&TensorInfo, &[u8]) -> (GgmlType, Vec<u8>) + 'a;

/// The same, its tensors edited too.
pub fn rewritten(
    file: &str,
    dir: &Path,
    name: &str,
    edit: &dyn Fn(&mut Metadata),
    tensor: &mut EditTensor<'_>,
) -> String {
    let gguf = Gguf::open(repo(file)).unwrap();
    let mut metadata = gguf.metadata().clone();
    edit(&mut metadata);
    let tensors: Vec<_> = (gguf.tensors().iter())
        .map(|info| {
            let (ty, data) = tensor(info, gguf.data(info));
            (&info.name, &info.shape, ty, data)
        })
        .collect();
    let path = dir.join(name);
    std::fs::write(&path, to_bytes(&metadata, &tensors).unwrap()).unwrap();
    path.to_str().unwrap().to_string()
}
