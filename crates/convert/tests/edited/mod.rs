//! A copy of a golden checkpoint that a test changes before it is converted.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::fs;
use std::path::{Path, PathBuf};

use paceline_convert::{ConvertOptions, Error, Report, convert};
use paceline_gguf::Gguf;
use paceline_gguf::safetensors::{DType, SafeTensors, to_bytes};
use serde_json::Value;
use tempfile::TempDir;

/// (name, shape, dtype, data) of a tensor.
pub type Tensor = (String, Vec<u64>, DType, Vec<u8>);

pub struct Edited {
    dir: TempDir,
    pub options: ConvertOptions,
}

/// A copy of `goldens/<name>`.
pub fn edited(name: &str) -> Edited {
    let source = golden(name);
    let dir = tempfile::tempdir().unwrap();
    let hf = dir.path().join("hf");
    fs::create_dir(&hf).unwrap();
    for entry in fs::read_dir(&source).unwrap() {
        let path = entry.unwrap().path();
        let file = path.file_name().unwrap().to_str().unwrap();
        if file != "golden.safetensors" {
            fs::copy(&path, hf.join(file)).unwrap();
        }
    }
    let options = ConvertOptions::new(hf, dir.path().join("out.gguf"));
    Edited { dir, options }
}

pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../goldens").join(name)
}

impl Edited {
    pub fn path(&self, file: &str) -> PathBuf {
        self.options.hf_dir.join(file)
    }

    /// Changes a JSON file, which need not be there yet.
    pub fn json(self, file: &str, edit: impl FnOnce(&mut Value)) -> Edited {
        let path = self.path(file);
        let text = fs::read(&path).unwrap_or_else(|_| b"{}".to_vec());
        let mut json = serde_json::from_slice(&text).unwrap();
        edit(&mut json);
        fs::write(path, serde_json::to_vec(&json).unwrap()).unwrap();
        self
    }

    pub fn config(self, edit: impl FnOnce(&mut Value)) -> Edited {
        self.json("config.json", edit)
    }

    /// Sets a key of the config.
    pub fn set(self, key: &str, value: impl Into<Value>) -> Edited {
        self.config(|config| config[key] = value.into())
    }

    pub fn tensors(self, edit: impl FnOnce(&mut Vec<Tensor>)) -> Edited {
        let path = self.path("model.safetensors");
        let mut tensors: Vec<Tensor> = SafeTensors::open_file(&path)
            .unwrap()
            .iter()
            .map(|tensor| (tensor.name.into(), tensor.shape.to_vec(), tensor.dtype, tensor.data.to_vec()))
            .collect();
        edit(&mut tensors);
        fs::remove_file(&path).unwrap();
        fs::write(path, to_bytes(&tensors)).unwrap();
        self
    }

    /// Adds a tensor of zeros.
    pub fn add(self, name: &str, shape: &[u64]) -> Edited {
        let data = vec![0; 4 * shape.iter().product::<u64>() as usize];
        self.tensors(|tensors| tensors.push((name.into(), shape.to_vec(), DType::F32, data)))
    }

    pub fn rename(self, edit: impl Fn(&str) -> String) -> Edited {
        self.tensors(|tensors| tensors.iter_mut().for_each(|(name, ..)| *name = edit(name)))
    }

    pub fn remove(self, file: &str) -> Edited {
        fs::remove_file(self.path(file)).unwrap();
        self
    }

    pub fn write(self, file: &str, text: &str) -> Edited {
        fs::write(self.path(file), text).unwrap();
        self
    }

    pub fn options(mut self, edit: impl FnOnce(&mut ConvertOptions)) -> Edited {
        edit(&mut self.options);
        self
    }

    pub fn convert(&self) -> Result<Report, Error> {
        convert(&self.options, |_| {})
    }

    /// The file, of a conversion that works.
    pub fn file(&self) -> Gguf {
        self.convert().unwrap_or_else(|error| panic!("{error}"));
        Gguf::open(&self.options.out).unwrap()
    }

    /// Names of what is beside the input.
    pub fn beside(&self) -> Vec<String> {
        let entries = fs::read_dir(self.dir.path()).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}
