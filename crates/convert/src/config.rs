//! A JSON file of a checkpoint, read by key: an error names the file, the key, what was expected and what is there.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::Error;

/// A JSON object and where it came from.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    path: PathBuf,
    /// Dotted names of the objects around this one: `text_config.`
    prefix: String,
    json: Value,
}

impl Config {
    pub(crate) fn read(path: &Path) -> Result<Config, Error> {
        let text = fs::read(path).map_err(Error::io(path, "read"))?;
        let json =
            serde_json::from_slice(&text).map_err(|source| Error::Json { path: path.to_owned(), source })?;
        let config = Config { path: path.to_owned(), prefix: String::new(), json };
        match config.json {
            Value::Object(_) => Ok(config),
            _ => Err(config.error("", "a JSON object", "")),
        }
    }

    /// Reads a file that need not be there; without it, every key is absent.
    pub(crate) fn read_optional(path: &Path) -> Result<Config, Error> {
        if path.exists() { Config::read(path) } else { Ok(Config::empty(path)) }
    }

    fn empty(path: &Path) -> Config {
        Config { path: path.to_owned(), prefix: String::new(), json: Value::Null }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The value of a key; JSON's `null` counts as absent.
    pub(crate) fn get(&self, key: &str) -> Option<&Value> {
        self.json.get(key).filter(|value| !value.is_null())
    }

    /// The keys that are there.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &str> {
        self.json.as_object().into_iter().flatten().map(|(key, _)| key.as_str())
    }

    /// The object under `key`, if there is one.
    pub(crate) fn section(&self, key: &str) -> Option<Config> {
        let json = self.get(key)?.clone();
        Some(Config { path: self.path.clone(), prefix: format!("{}{key}.", self.prefix), json })
    }

    pub(crate) fn error(&self, key: &str, expected: impl Into<String>, hint: &'static str) -> Error {
        const MAX_CHARS: usize = 80;
        let found = match self.json.get(key) {
            None if key.is_empty() => "something else".to_string(),
            None => "nothing".to_string(),
            Some(value) => {
                let text = value.to_string();
                let more = if text.chars().count() > MAX_CHARS { "…" } else { "" };
                text.chars().take(MAX_CHARS).collect::<String>() + more
            }
        };
        Error::Config {
            path: self.path.clone(),
            key: format!("{}{key}", self.prefix),
            expected: expected.into(),
            found,
            hint,
        }
    }

    /// A positive integer below 2^31, so that it fits every key it may be written to and products of two fit 64 bits.
    pub(crate) fn opt_usize(&self, key: &str) -> Result<Option<usize>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64() {
            Some(n) if (1..1 << 31).contains(&n) => Ok(Some(n as usize)),
            _ => Err(self.error(key, "a positive integer below 2^31", "")),
        }
    }

    pub(crate) fn usize(&self, key: &str) -> Result<usize, Error> {
        self.opt_usize(key)?.ok_or_else(|| self.error(key, "a positive integer", ""))
    }

    pub(crate) fn opt_f32(&self, key: &str) -> Result<Option<f32>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64() {
            Some(x) if (x as f32).is_finite() => Ok(Some(x as f32)),
            _ => Err(self.error(key, "a finite number", "")),
        }
    }

    pub(crate) fn f32(&self, key: &str) -> Result<f32, Error> {
        self.opt_f32(key)?.ok_or_else(|| self.error(key, "a number", ""))
    }

    pub(crate) fn opt_bool(&self, key: &str) -> Result<Option<bool>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.error(key, "true or false", ""))
    }

    /// Whether a flag is set; absent means no.
    pub(crate) fn flag(&self, key: &str) -> Result<bool, Error> {
        Ok(self.opt_bool(key)?.unwrap_or(false))
    }

    pub(crate) fn opt_str(&self, key: &str) -> Result<Option<&str>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.error(key, "a string", ""))
    }

    /// An array of which every element passes `elem`.
    pub(crate) fn opt_array<'a, T>(
        &'a self,
        key: &str,
        what: &str,
        elem: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let elems = value.as_array().and_then(|elems| elems.iter().map(elem).collect());
        elems.map(Some).ok_or_else(|| self.error(key, format!("an array of {what}"), ""))
    }

    pub(crate) fn opt_strings(&self, key: &str) -> Result<Option<Vec<&str>>, Error> {
        self.opt_array(key, "strings", Value::as_str)
    }

    pub(crate) fn opt_ids(&self, key: &str) -> Result<Option<Vec<u32>>, Error> {
        self.opt_array(key, "ids", |value| value.as_u64()?.try_into().ok())
    }

    /// Fails if `key` asks for something that this converter leaves out.
    pub(crate) fn refuse(&self, key: &str, is_set: bool, without: &str) -> Result<(), Error> {
        if is_set { Err(self.error(key, without, "this variant is not supported yet")) } else { Ok(()) }
    }
}
