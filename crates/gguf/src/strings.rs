//! A list of byte strings in two allocations: a vocabulary has 250,000 tokens and twice as many merges.

use std::fmt;
use std::ops::Index;

/// An array of strings. Bytes, because a token's text need not be valid UTF-8.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct Strings {
    bytes: Vec<u8>,
    /// `ends[i]` is where string `i` ends in `bytes` and string `i + 1` begins.
    ends: Vec<usize>,
}

impl Strings {
    /// No strings.
    pub fn new() -> Strings {
        Strings::default()
    }

    /// Appends one.
    pub fn push(&mut self, string: impl AsRef<[u8]>) {
        self.bytes.extend_from_slice(string.as_ref());
        self.ends.push(self.bytes.len());
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The string at `i`.
    pub fn get(&self, i: usize) -> Option<&[u8]> {
        let end = *self.ends.get(i)?;
        let start = if i == 0 { 0 } else { self.ends[i - 1] };
        Some(&self.bytes[start..end])
    }

    /// All, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &[u8]> + DoubleEndedIterator + Clone {
        (0..self.len()).map(|i| &self[i])
    }
}

impl Index<usize> for Strings {
    type Output = [u8];

    fn index(&self, i: usize) -> &[u8] {
        self.get(i).unwrap_or_else(|| panic!("string {i} of {}", self.len()))
    }
}

impl<S: AsRef<[u8]>> FromIterator<S> for Strings {
    fn from_iter<I: IntoIterator<Item = S>>(strings: I) -> Strings {
        let mut all = Strings::new();
        strings.into_iter().for_each(|string| all.push(string));
        all
    }
}

impl fmt::Debug for Strings {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_list().entries(self.iter().map(String::from_utf8_lossy)).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_what_was_pushed() {
        let strings: Strings = ["a", "", "Ġb"].into_iter().collect();
        assert_eq!(strings.len(), 3);
        assert_eq!(strings.iter().collect::<Vec<_>>(), ["a".as_bytes(), b"", "Ġb".as_bytes()]);
        assert_eq!(&strings[2], "Ġb".as_bytes());
        assert_eq!(strings.get(3), None);
        assert!(Strings::new().is_empty());
    }
}
