//! The JSON in front of the data of one file, checked against the file's real length.

use std::collections::BTreeMap;
use std::collections::btree_map;
use std::fmt;
use std::ops::Range;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use super::{DType, FORMAT};
use crate::cursor::Cursor;
use crate::error::FETCH_AGAIN;
use crate::{Error, foreign};

/// The limit that the format sets, against headers that only exhaust memory.
const HEADER_MAX_BYTES: u64 = 100_000_000;

/// A tensor's entry; `range` counts from the start of the file.
pub(super) struct Entry {
    pub(super) dtype: DType,
    pub(super) shape: Vec<u64>,
    pub(super) range: Range<usize>,
}

pub(super) struct Header {
    pub(super) entries: BTreeMap<String, Entry>,
    pub(super) metadata: BTreeMap<String, String>,
}

/// Reads and checks the header of the file `file`, whose content is `bytes`.
pub(super) fn parse(file: &str, bytes: &[u8]) -> Result<Header, Error> {
    let mut cursor = Cursor::new(bytes);
    // No magic number: a header is a plausible length and then a brace. All else is something else.
    let is_gguf = bytes.starts_with(crate::header::MAGIC); // its ninth byte is a brace if it has 123 tensors
    if is_gguf || (bytes.len() >= 9 && bytes[8] != b'{') {
        let (found, hint) = foreign::identify(bytes);
        return Err(Error::Foreign { file: file.into(), expected: FORMAT, found, hint });
    }
    let len = cursor.u64().map_err(|fault| fault.at(file, "length of the header"))?;
    if len > HEADER_MAX_BYTES {
        let expected = format!("at most {HEADER_MAX_BYTES} bytes");
        return Err(Error::header(file, "length of the header", expected, len.to_string()));
    }
    let json = cursor.take(len).map_err(|fault| fault.at(file, "header"))?;
    let raw: RawHeader = serde_json::from_slice(json)
        .map_err(|error| Error::header(file, "header", "JSON of tensors", error.to_string()))?;

    let mut entries = BTreeMap::new();
    for (name, tensor) in raw.tensors {
        let entry = check_entry(file, &name, tensor, cursor.at() as u64, bytes.len() as u64)?;
        entries.insert(name, entry);
    }
    check_overlap(file, &entries)?;
    Ok(Header { entries, metadata: raw.metadata })
}

fn check_entry(
    file: &str,
    name: &str,
    raw: RawEntry,
    data_start: u64,
    file_bytes: u64,
) -> Result<Entry, Error> {
    let wrong = |expected: String, found: String| Error::tensor(file, name, expected, found, FETCH_AGAIN);
    let RawEntry { dtype, shape, data_offsets: (begin, end) } = raw;
    let Some(dtype) = DType::from_name(&dtype) else {
        let hint = "use a checkpoint in BF16";
        return Err(Error::tensor(file, name, "a known dtype", format!("{dtype:?}"), hint));
    };
    let n_bytes = shape.iter().try_fold(dtype.n_bytes() as u64, |n, &dim| n.checked_mul(dim));
    let Some(n_bytes) = n_bytes else {
        return Err(wrong("a size below 2^64 bytes".into(), format!("shape {shape:?} of {dtype}")));
    };
    if end.checked_sub(begin) != Some(n_bytes) {
        let expected = format!("{n_bytes} bytes for shape {shape:?} of {dtype}");
        return Err(wrong(expected, format!("data_offsets [{begin}, {end}]")));
    }
    match data_start.checked_add(end) {
        Some(file_end) if file_end <= file_bytes => {
            let range = (data_start + begin) as usize..file_end as usize;
            Ok(Entry { dtype, shape, range })
        }
        Some(implied) => Err(Error::short(file, name, implied, file_bytes)),
        None => Err(wrong("an end below 2^64".into(), format!("data_offsets [{begin}, {end}]"))),
    }
}

fn check_overlap(file: &str, entries: &BTreeMap<String, Entry>) -> Result<(), Error> {
    let mut by_start: Vec<_> = entries.iter().filter(|(_, entry)| !entry.range.is_empty()).collect();
    by_start.sort_by_key(|(_, entry)| entry.range.start);
    for pair in by_start.windows(2) {
        let ((first, before), (name, after)) = (pair[0], pair[1]);
        if before.range.end > after.range.start {
            let expected = format!("its data to begin at {}, behind `{first}`", before.range.end);
            return Err(Error::tensor(file, name, expected, after.range.start.to_string(), FETCH_AGAIN));
        }
    }
    Ok(())
}

#[derive(Deserialize)]
#[serde(expecting = "an object with dtype, shape and data_offsets")]
struct RawEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// Deserialized by hand: a map type of serde_json would let the last of two equal names win in silence.
struct RawHeader {
    tensors: BTreeMap<String, RawEntry>,
    metadata: BTreeMap<String, String>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<RawHeader, D::Error> {
        struct HeaderVisitor;

        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut header = RawHeader { tensors: BTreeMap::new(), metadata: BTreeMap::new() };
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        header.metadata = map.next_value()?;
                        continue;
                    }
                    match header.tensors.entry(name) {
                        btree_map::Entry::Vacant(entry) => entry.insert(map.next_value()?),
                        btree_map::Entry::Occupied(entry) => {
                            return Err(A::Error::custom(format!("tensor `{}` twice", entry.key())));
                        }
                    };
                }
                Ok(header)
            }
        }

        deserializer.deserialize_map(HeaderVisitor)
    }
}
