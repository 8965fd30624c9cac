//! A snapshot as bytes, for files that outlive the process.
//!
//! ```text
//! "PACELINE SNAP 1\n" | pair u64 | n u64, tokens u32… | n u64, target's memory | of each drafter: n u64, name | n u64, memory | checksum u64
//! ```
//!
//! Little-endian. `pair` is a digest of everything that the contents depend on: all models, how states are stored, the
//! build. The memories' parts are opaque here. A drafter that has none has one of length 0. The checksum is of all that precedes
//! it, so a file that was cut, or changed anywhere, is noticed before anything of it is used.

use crate::Token;

/// Format and version; a reader takes no other.
const MAGIC: &[u8; 16] = b"PACELINE SNAP 1\n";

/// What a file of a snapshot holds.
#[derive(Debug, PartialEq)]
pub(crate) struct SnapshotFile<'a> {
    pub tokens: Vec<Token>,
    pub target: &'a [u8],
    /// Name and memory of each drafter, in order; empty where one has nothing.
    pub drafters: Vec<(&'a str, &'a [u8])>,
}

/// Why a snapshot can't be restored. Nothing has changed then.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// It is something else, or of another version.
    #[error("it is no snapshot of this version: expected it to begin with {:?}, found {found:?}", String::from_utf8_lossy(MAGIC).trim_end())]
    Foreign {
        /// What it begins with.
        found: String,
    },
    /// Something is missing or was changed.
    #[error("it is damaged: {0}")]
    Damaged(String),
    /// It fits other models or settings.
    #[error(
        "it was written for another target, drafter, cache type or build: expected digest {expected:016x}, found {found:016x}"
    )]
    OtherPair {
        /// Of what is loaded.
        expected: u64,
        /// In the file.
        found: u64,
    },
    /// Nobody could use it.
    #[error("it would not be used: {0}")]
    Useless(String),
}

impl<'a> SnapshotFile<'a> {
    pub fn write(&self, pair: u64) -> Vec<u8> {
        let parts = self.drafters.iter().flat_map(|(name, memory)| [name.as_bytes(), memory]);
        let parts: Vec<&[u8]> = std::iter::once(self.target).chain(parts).collect();
        let n_byte: usize = parts.iter().map(|part| 8 + part.len()).sum();
        let mut out = Vec::with_capacity(64 + 4 * self.tokens.len() + n_byte);
        out.extend_from_slice(MAGIC);
        out.extend(pair.to_le_bytes());
        out.extend((self.tokens.len() as u64).to_le_bytes());
        self.tokens.iter().for_each(|token| out.extend(token.to_le_bytes()));
        for part in parts {
            out.extend((part.len() as u64).to_le_bytes());
            out.extend_from_slice(part);
        }
        let sum = digest(&out);
        out.extend(sum.to_le_bytes());
        out
    }

    pub fn read(bytes: &'a [u8], pair: u64) -> Result<SnapshotFile<'a>, RestoreError> {
        let Some(rest) = bytes.strip_prefix(MAGIC) else {
            let found = String::from_utf8_lossy(&bytes[..bytes.len().min(MAGIC.len())]).into_owned();
            return Err(RestoreError::Foreign { found });
        };
        let damaged = |what: &str| RestoreError::Damaged(what.to_string());
        let cut = || damaged("it ends too early");
        let (rest, sum) = rest.split_last_chunk().ok_or_else(cut)?;
        let found = digest(&bytes[..bytes.len() - size_of::<u64>()]);
        if found != u64::from_le_bytes(*sum) {
            return Err(damaged("its checksum does not match its contents"));
        }
        let (&found, mut rest) = rest.split_first_chunk().ok_or_else(cut)?;
        let found = u64::from_le_bytes(found);
        if found != pair {
            return Err(RestoreError::OtherPair { expected: pair, found });
        }
        let part = |rest: &mut &'a [u8], width: usize| {
            let (&n, tail) = rest.split_first_chunk().ok_or_else(cut)?;
            let n = usize::try_from(u64::from_le_bytes(n)).ok().and_then(|n| n.checked_mul(width));
            let (part, tail) = n.and_then(|n| tail.split_at_checked(n)).ok_or_else(cut)?;
            *rest = tail;
            Ok(part)
        };
        let (tokens, target) = (part(&mut rest, size_of::<Token>())?, part(&mut rest, 1)?);
        let mut drafters = Vec::new();
        while !rest.is_empty() {
            let name = part(&mut rest, 1)?;
            let name = std::str::from_utf8(name).map_err(|_| damaged("the name of a drafter is no text"))?;
            drafters.push((name, part(&mut rest, 1)?));
        }
        let tokens = tokens.as_chunks().0.iter().map(|&token| Token::from_le_bytes(token)).collect();
        Ok(SnapshotFile { tokens, target, drafters })
    }
}

/// A 64-bit digest that notices every change of a single word, in four lanes so that it is read at memory's speed. No
/// defence against people who want two texts with one digest.
pub fn digest(bytes: &[u8]) -> u64 {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
    // Each step is reversible, so lanes that differ once stay different unless a second change mends them.
    let step = |h: u64, word: u64| (h ^ word).wrapping_mul(ODD).rotate_left(29);
    let mut lanes = [1, 2, 3, 4].map(|lane| step(ODD, lane));
    let (blocks, rest) = bytes.as_chunks::<32>();
    for block in blocks {
        for (lane, &word) in lanes.iter_mut().zip(block.as_chunks::<8>().0) {
            *lane = step(*lane, u64::from_le_bytes(word));
        }
    }
    let rest = rest.chunks(8).map(|chunk| chunk.iter().rev().fold(0, |word, &b| word << 8 | u64::from(b)));
    let all = lanes.into_iter().chain(rest).chain([bytes.len() as u64]);
    let h = all.fold(0, step);
    step(h ^ (h >> 32), 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> Vec<u8> {
        let tokens = (0..9).collect();
        SnapshotFile { tokens, target: &[7; 70], drafters: vec![("a", &[1, 2, 3]), ("b", &[])] }.write(5)
    }

    #[test]
    fn what_is_written_is_read() {
        let bytes = file();
        let read = SnapshotFile::read(&bytes, 5).unwrap();
        assert_eq!((read.tokens.len(), read.target), (9, &[7; 70][..]));
        assert_eq!(read.drafters, [("a", &[1, 2, 3][..]), ("b", &[][..])]);
        let none = SnapshotFile { drafters: Vec::new(), ..read }.write(5);
        assert_eq!(SnapshotFile::read(&none, 5).unwrap().drafters, []);
        assert_eq!(SnapshotFile::read(&none, 6), Err(RestoreError::OtherPair { expected: 6, found: 5 }));
    }

    /// Every bit and every length.
    #[test]
    fn no_damage_is_overlooked() {
        let bytes = file();
        for bit in 0..8 * bytes.len() {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(SnapshotFile::read(&bad, 5).is_err(), "bit {bit}");
        }
        for n in 0..bytes.len() {
            assert!(SnapshotFile::read(&bytes[..n], 5).is_err(), "{n} bytes");
            assert!(
                SnapshotFile::read(&[&bytes[..n], &bytes[n + 1..]].concat(), 5).is_err(),
                "without byte {n}"
            );
        }
        assert!(SnapshotFile::read(&[&bytes[..], &[0]].concat(), 5).is_err());
        let foreign = SnapshotFile::read(b"GGUF and more than that", 5).unwrap_err().to_string();
        assert!(foreign.contains("\"PACELINE SNAP 1\"") && foreign.contains("GGUF and"), "{foreign}");
    }
}
