//! The keys and values of a file, in its order, and getters that know what they want.
//!
//! Converters disagree about integer widths, so a getter takes an integer of any width and sign that holds a number in its
//! range. A getter gives `Ok(None)` for a missing key, its `require_` form an error; a value of another type is always an
//! error, one that names file and key.

use std::collections::HashMap;

use crate::{Array, Error, Strings, Value};

const WRONG_TYPE: &str = "convert the model again, or report the program that wrote it";
const INCOMPLETE: &str =
    "the file does not hold a complete model of this kind: convert it again with a newer converter";

/// Metadata of a GGUF file.
#[derive(Clone, Debug)]
pub struct Metadata {
    file: String,
    entries: Vec<(String, Value)>,
    index: HashMap<String, usize>,
}

impl Default for Metadata {
    fn default() -> Metadata {
        Metadata::new()
    }
}

/// Equal when the same keys hold the same values in the same order, whatever the file is called.
impl PartialEq for Metadata {
    fn eq(&self, other: &Metadata) -> bool {
        self.entries == other.entries
    }
}

/// Declares a getter and its `require_` form from what is expected and how to take it from a value.
macro_rules! getters {
    ($($(#[$doc:meta])* $name:ident, $require:ident -> $out:ty, $expected:literal, $take:expr;)*) => {
        impl Metadata {$(
            $(#[$doc])*
            pub fn $name(&self, key: &str) -> Result<Option<$out>, Error> {
                self.read(key, $expected, $take)
            }

            #[doc = concat!("As [`", stringify!($name), "`](Self::", stringify!($name), "); the key must be there.")]
            pub fn $require(&self, key: &str) -> Result<$out, Error> {
                self.$name(key)?.ok_or_else(|| self.missing(key, $expected))
            }
        )*}
    };
}

getters! {
    /// A u32.
    u32, require_u32 -> u32, "u32", |value| value.as_int()?.try_into().ok();
    /// An i32.
    i32, require_i32 -> i32, "i32", |value| value.as_int()?.try_into().ok();
    /// A u64.
    u64, require_u64 -> u64, "u64", |value| value.as_int()?.try_into().ok();
    /// A float; integers are taken too.
    f32, require_f32 -> f32, "f32", Value::as_f32;
    /// A bool; the integers 0 and 1 are taken too.
    bool, require_bool -> bool, "bool", Value::as_bool;
    /// Text.
    str, require_str -> &str, "string in UTF-8", |value| std::str::from_utf8(value.as_bytes()?).ok();
    /// An array of integers that are all in the range of u32.
    u32_array, require_u32_array -> Vec<u32>, "array of u32", |value| ints(value.as_array()?);
    /// An array of integers that are all in the range of i32.
    i32_array, require_i32_array -> Vec<i32>, "array of i32", |value| ints(value.as_array()?);
    /// An array of floats; integers are taken too.
    f32_array, require_f32_array -> Vec<f32>, "array of f32", |value| each(value.as_array()?, Value::as_f32);
    /// An array of bools; the integers 0 and 1 are taken too.
    bool_array, require_bool_array -> Vec<bool>, "array of bool", |value| each(value.as_array()?, Value::as_bool);
    /// An array of strings, as bytes.
    bytes_array, require_bytes_array -> &Strings, "array of string", |value| match value.as_array()? {
        Array::String(strings) => Some(strings),
        _ => None,
    };
}

fn each<T>(array: &Array, take: impl Fn(&Value) -> Option<T>) -> Option<Vec<T>> {
    // An empty array says nothing about its type. Strings never convert, so they are not copied to find that out.
    match array {
        Array::String(strings) if !strings.is_empty() => None,
        _ => array.iter().map(|x| take(&x)).collect(),
    }
}

fn ints<T: TryFrom<i128>>(array: &Array) -> Option<Vec<T>> {
    each(array, |x| x.as_int()?.try_into().ok())
}

impl Metadata {
    /// No keys.
    pub fn new() -> Metadata {
        Metadata::for_file("metadata")
    }

    /// No keys yet, of the file that messages shall name.
    pub fn for_file(file: &str) -> Metadata {
        Metadata { file: file.into(), entries: Vec::new(), index: HashMap::new() }
    }

    /// The file that messages name.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.index.get(key).map(|&i| &self.entries[i].1)
    }

    /// Whether `key` is there.
    pub fn contains(&self, key: &str) -> bool {
        self.index.contains_key(key)
    }

    /// Sets `key`: in place if it is there, else at the end.
    pub fn insert(&mut self, key: impl Into<String>, value: impl Into<Value>) {
        let (key, value) = (key.into(), value.into());
        match self.index.get(&key) {
            Some(&i) => self.entries[i].1 = value,
            None => {
                self.index.insert(key.clone(), self.entries.len());
                self.entries.push((key, value));
            }
        }
    }

    /// Takes `key` out; the others keep their order.
    pub fn remove(&mut self, key: &str) -> Option<Value> {
        let i = self.index.remove(key)?;
        self.index.values_mut().filter(|at| **at > i).for_each(|at| *at -= 1);
        Some(self.entries.remove(i).1)
    }

    /// How many keys.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Keys in the order of the file.
    pub fn keys(&self) -> impl ExactSizeIterator<Item = &str> {
        self.entries.iter().map(|(key, _)| key.as_str())
    }

    /// Keys and values in the order of the file.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// `n` numbers, one per layer: from an array of `n`, or one number for all.
    pub fn u32_or_array(&self, key: &str, n: usize) -> Result<Option<Vec<u32>>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let numbers = match value {
            Value::Array(array) if array.len() == n => ints(array),
            scalar => scalar.as_int().and_then(|x| x.try_into().ok()).map(|x| vec![x; n]),
        };
        match numbers {
            Some(numbers) => Ok(Some(numbers)),
            None => {
                let expected = format!("u32, or array of {n} u32, one per layer");
                Err(Error::key(&self.file, key, expected, value.describe(), WRONG_TYPE))
            }
        }
    }

    /// As [`u32_or_array`](Self::u32_or_array); the key must be there.
    pub fn require_u32_or_array(&self, key: &str, n: usize) -> Result<Vec<u32>, Error> {
        self.u32_or_array(key, n)?.ok_or_else(|| self.missing(key, "u32 or array of u32"))
    }

    fn read<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        take: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match take(value) {
            Some(x) => Ok(Some(x)),
            None => Err(Error::key(&self.file, key, expected, value.describe(), WRONG_TYPE)),
        }
    }

    fn missing(&self, key: &str, expected: &str) -> Error {
        Error::key(&self.file, key, expected, "no such key", INCOMPLETE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Metadata {
        let mut metadata = Metadata::for_file("m.gguf");
        metadata.insert("name", "Tiny");
        metadata.insert("layers", 3u64);
        metadata.insert("minus", -1i8);
        metadata.insert("eps", 1e-6f64);
        metadata.insert("heads", vec![4u32, 2, 4]);
        metadata.insert("swa", vec![1u8, 0, 1]);
        metadata.insert("tokens", vec![vec![0xffu8], b"a".to_vec()]);
        metadata.insert("yes", true);
        metadata.insert("nothing", Vec::<f32>::new());
        metadata
    }

    #[test]
    fn getters_are_lenient_about_widths() {
        let m = sample();
        assert_eq!(m.u32("layers").unwrap(), Some(3));
        assert_eq!(m.u64("layers").unwrap(), Some(3));
        assert_eq!(m.i32("minus").unwrap(), Some(-1));
        assert_eq!(m.f32("layers").unwrap(), Some(3.0));
        assert_eq!(m.f32("eps").unwrap(), Some(1e-6));
        assert_eq!(m.str("name").unwrap(), Some("Tiny"));
        assert_eq!(m.bool("yes").unwrap(), Some(true));
        assert_eq!(m.i32_array("heads").unwrap(), Some(vec![4, 2, 4]));
        assert_eq!(m.bool_array("swa").unwrap(), Some(vec![true, false, true]));
        assert_eq!(m.f32_array("heads").unwrap(), Some(vec![4.0, 2.0, 4.0]));
        assert_eq!(&m.bytes_array("tokens").unwrap().unwrap()[0], [0xff]);
        assert_eq!(m.u32_array("nothing").unwrap(), Some(vec![]));
        assert_eq!(m.u32_or_array("heads", 3).unwrap(), Some(vec![4, 2, 4]));
        assert_eq!(m.u32_or_array("layers", 2).unwrap(), Some(vec![3, 3]));
        assert_eq!(m.u32("absent").unwrap(), None);
        assert_eq!(m.u32_or_array("absent", 2).unwrap(), None);
    }

    #[test]
    fn messages_name_file_key_expected_and_found() {
        let m = sample();
        let check = |error: Error, want: &str| {
            let message = error.to_string();
            assert!(message.starts_with(&format!("m.gguf: key {want}; ")), "{message}");
        };
        check(m.u32("name").unwrap_err(), "`name`: expected u32, found string \"Tiny\"");
        check(m.u32("minus").unwrap_err(), "`minus`: expected u32, found i8 -1");
        check(m.u32("eps").unwrap_err(), "`eps`: expected u32, found f64 0.000001");
        check(m.bool("layers").unwrap_err(), "`layers`: expected bool, found u64 3");
        check(m.str("heads").unwrap_err(), "`heads`: expected string in UTF-8, found array of 3 u32");
        check(m.f32_array("tokens").unwrap_err(), "`tokens`: expected array of f32, found array of 2 string");
        check(m.u32_array("layers").unwrap_err(), "`layers`: expected array of u32, found u64 3");
        check(
            m.u32_or_array("heads", 4).unwrap_err(),
            "`heads`: expected u32, or array of 4 u32, one per layer, found array of 3 u32",
        );
        check(m.require_u32("absent").unwrap_err(), "`absent`: expected u32, found no such key");
        check(
            m.require_bytes_array("absent").unwrap_err(),
            "`absent`: expected array of string, found no such key",
        );
    }

    #[test]
    fn insert_replaces_in_place_and_remove_keeps_order() {
        let mut m = Metadata::new();
        m.insert("a", 1u32);
        m.insert("b", 2u32);
        m.insert("c", 3u32);
        m.insert("a", 4u32);
        assert_eq!(m.keys().collect::<Vec<_>>(), ["a", "b", "c"]);
        assert_eq!(m.remove("b"), Some(Value::U32(2)));
        assert_eq!(m.remove("b"), None);
        assert_eq!(m.keys().collect::<Vec<_>>(), ["a", "c"]);
        assert_eq!((m.u32("a").unwrap(), m.u32("c").unwrap()), (Some(4), Some(3)));
    }
}
