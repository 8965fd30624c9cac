//! What can be wrong with a model file. Every message says where, what was expected, what was found, and the way out.

use std::io;
use std::path::Path;

/// The way out when a file has been cut short or overwritten.
pub(crate) const FETCH_AGAIN: &str = "the file is damaged: download or convert it again";

/// Why a model file can't be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("{path}: can't {action}: {source}")]
    Io {
        /// The file as the user named it.
        path: String,
        /// What was tried: `open`, `read`, `write` …
        action: &'static str,
        /// The system's reason.
        source: io::Error,
    },

    /// Not a file of the expected format at all.
    #[error("{file}: expected {expected}, found {found}; {hint}")]
    Foreign {
        /// Which file.
        file: String,
        /// The format asked for.
        expected: &'static str,
        /// What it looks like.
        found: String,
        /// The way out.
        hint: &'static str,
    },

    /// A part of the header contradicts itself or the format.
    #[error("{file}: {what}: expected {expected}, found {found}; {hint}")]
    Header {
        /// Which file.
        file: String,
        /// Which part of it.
        what: String,
        /// What the format asks for.
        expected: String,
        /// What is there.
        found: String,
        /// The way out.
        hint: &'static str,
    },

    /// A metadata key is missing, or its value has the wrong type or range.
    #[error("{file}: key `{key}`: expected {expected}, found {found}; {hint}")]
    Key {
        /// Which file.
        file: String,
        /// Which key.
        key: String,
        /// The type or range asked for.
        expected: String,
        /// The value that is there.
        found: String,
        /// The way out.
        hint: &'static str,
    },

    /// A tensor is missing, or its type, shape or place is wrong.
    #[error("{file}: tensor `{tensor}`: expected {expected}, found {found}; {hint}")]
    Tensor {
        /// Which file.
        file: String,
        /// Which tensor.
        tensor: String,
        /// What was asked for.
        expected: String,
        /// What is there.
        found: String,
        /// The way out.
        hint: &'static str,
    },

    /// The tensor directory speaks of more bytes than the file has.
    #[error(
        "{file}: tensor `{tensor}`: header implies {implied}, file has {found}: truncated download? fetch it again"
    )]
    Short {
        /// Which file.
        file: String,
        /// The first tensor that does not fit.
        tensor: String,
        /// The size that the header implies, for people.
        implied: String,
        /// The size of the file, for people.
        found: String,
    },

    /// Shards of a split model are missing or belong to another one.
    #[error("{file}: expected {expected}, found {found}; {hint}")]
    Shards {
        /// The shard that was opened.
        file: String,
        /// What its name or metadata promise.
        expected: String,
        /// What is there.
        found: String,
        /// The way out.
        hint: &'static str,
    },

    /// A type name that a person typed.
    #[error("tensor type `{name}` is unknown; known: {known}")]
    UnknownType {
        /// What was typed.
        name: String,
        /// All names.
        known: String,
    },
}

impl Error {
    pub(crate) fn io(path: &Path, action: &'static str, source: io::Error) -> Error {
        Error::Io { path: path.display().to_string(), action, source }
    }

    /// A tensor that is not what its reader needs: for loaders that know more about a tensor than this crate.
    pub fn tensor(
        file: &str,
        tensor: &str,
        expected: impl Into<String>,
        found: impl Into<String>,
        hint: &'static str,
    ) -> Error {
        Error::Tensor {
            file: file.into(),
            tensor: tensor.into(),
            expected: expected.into(),
            found: found.into(),
            hint,
        }
    }

    /// A metadata value that is not what its reader needs: for loaders that know more about a key than this crate.
    pub fn key(
        file: &str,
        key: &str,
        expected: impl Into<String>,
        found: impl Into<String>,
        hint: &'static str,
    ) -> Error {
        Error::Key {
            file: file.into(),
            key: key.into(),
            expected: expected.into(),
            found: found.into(),
            hint,
        }
    }

    pub(crate) fn header(
        file: &str,
        what: impl Into<String>,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Error {
        Error::Header {
            file: file.into(),
            what: what.into(),
            expected: expected.into(),
            found: found.into(),
            hint: FETCH_AGAIN,
        }
    }

    pub(crate) fn short(file: &str, tensor: &str, implied: u64, found: u64) -> Error {
        let (implied, found) = two_sizes(implied, found);
        Error::Short { file: file.into(), tensor: tensor.into(), implied, found }
    }
}

/// Two sizes to compare: in bytes where rounding would make them look equal.
fn two_sizes(a: u64, b: u64) -> (String, String) {
    let (short_a, short_b) = (size(a), size(b));
    if short_a == short_b { (format!("{a} bytes"), format!("{b} bytes")) } else { (short_a, short_b) }
}

/// A size for people, in decimal units as download pages print them.
fn size(n_bytes: u64) -> String {
    const UNITS: [(&str, f64); 4] = [("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)];
    match UNITS.iter().find(|(_, unit)| n_bytes as f64 >= *unit) {
        Some((name, unit)) => format!("{:.1} {name}", n_bytes as f64 / unit),
        None => format!("{n_bytes} bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_like_a_download_page() {
        let check = |a, b, want: (&str, &str)| assert_eq!(two_sizes(a, b), (want.0.into(), want.1.into()));
        check(21_700_000_000, 1_500_000_000, ("21.7 GB", "1.5 GB"));
        check(1_500_000_032, 1_500_000_000, ("1500000032 bytes", "1500000000 bytes"));
        check(1_000, 999, ("1.0 kB", "999 bytes"));
        check(2_500_000_000_000, 0, ("2.5 TB", "0 bytes"));
    }
}
