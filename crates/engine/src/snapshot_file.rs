//! A snapshot as bytes, for files that outlive the process.
//!
//! ```text
//! head    "PACELINE SNAP 2\n" | n_head u64 | pair u64 | n_file u64 | n u64, tokens u32…
//!         | n u64, of each drafter: n u64, name, has_part u8 | sum of the head u64
//! body    n u64, target's memory | of each drafter: n u64, memory
//! end     sum of all that precedes it u64
//! ```
//!
//! Little-endian. `pair` is a digest of everything that the contents depend on: all models, how states are stored, what the
//! numbers are computed with. `n_head` and `n_file` are the bytes of the head and of all. The memories' parts are opaque here;
//! a drafter that has none has one of length 0. The head alone says for whom a file is good, and has a sum of its own, so that
//! many files are looked through without being read. A file that was cut, or changed anywhere, is noticed before anything of it
//! is used.

use paceline_memory::{Memory, SeqId};

use crate::Token;

/// Format and version; a reader takes no other.
const MAGIC: &[u8; 16] = b"PACELINE SNAP 2\n";

/// Bytes of a head that say how long it is.
const N_PREFIX: usize = MAGIC.len() + size_of::<u64>();

/// No head is longer: tokens of a context of 16 M.
const N_HEAD_MAX: usize = 64 << 20;

/// A drafter's name and its part of a file, empty if it has none.
pub(crate) type Part = (&'static str, Vec<u8>);

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
        "it was written for another target, drafter or cache type, or by a build or on a machine that computes other bits: \
         expected digest {expected:016x}, found {found:016x}"
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

fn damaged(what: &str) -> RestoreError {
    RestoreError::Damaged(what.to_string())
}

/// What a file says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotHead {
    /// For which models and settings.
    pub pair: u64,
    /// Bytes of the whole file.
    pub n_file: u64,
    /// The tokens whose states it holds.
    pub tokens: Vec<Token>,
    /// Name of each drafter, and whether it has a part.
    pub drafters: Vec<(String, bool)>,
}

impl SnapshotHead {
    /// How many bytes to read for [`read`](Self::read), as the first bytes of a file say.
    pub fn n_byte(first: &[u8]) -> Result<usize, RestoreError> {
        let Some(rest) = first.strip_prefix(MAGIC) else {
            let found = String::from_utf8_lossy(&first[..first.len().min(MAGIC.len())]).into_owned();
            return Err(RestoreError::Foreign { found });
        };
        let (&n, _) = rest.split_first_chunk().ok_or_else(|| damaged("it ends too early"))?;
        let n = usize::try_from(u64::from_le_bytes(n)).ok();
        n.filter(|n| (N_PREFIX..=N_HEAD_MAX).contains(n)).ok_or_else(|| damaged("its head has no length"))
    }

    /// The head that `bytes`, a file or the beginning of one, begin with.
    pub fn read(bytes: &[u8]) -> Result<SnapshotHead, RestoreError> {
        let n = SnapshotHead::n_byte(bytes)?;
        let cut = || damaged("it ends too early");
        let head = bytes.get(..n).ok_or_else(cut)?;
        let (head, sum) = head.split_last_chunk().ok_or_else(cut)?;
        if digest(head) != u64::from_le_bytes(*sum) {
            return Err(damaged("the checksum of its head does not match its contents"));
        }
        let mut rest = head.get(N_PREFIX..).ok_or_else(cut)?;
        let (pair, n_file) = (number(&mut rest)?, number(&mut rest)?);
        let tokens = part(&mut rest, size_of::<Token>())?;
        let tokens = tokens.as_chunks().0.iter().map(|&token| Token::from_le_bytes(token)).collect();
        let n_drafter = number(&mut rest)?;
        let mut drafters = Vec::new();
        for _ in 0..n_drafter {
            let name = std::str::from_utf8(part(&mut rest, 1)?)
                .map_err(|_| damaged("the name of a drafter is no text"))?;
            let (&has_part, tail) = rest.split_first().ok_or_else(cut)?;
            rest = tail;
            drafters.push((name.to_string(), has_part != 0));
        }
        if !rest.is_empty() {
            return Err(damaged("its head is longer than what is in it"));
        }
        Ok(SnapshotHead { pair, n_file, tokens, drafters })
    }

    fn write(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(MAGIC);
        out.extend((self.n_head() as u64).to_le_bytes());
        out.extend(self.pair.to_le_bytes());
        out.extend(self.n_file.to_le_bytes());
        out.extend((self.tokens.len() as u64).to_le_bytes());
        self.tokens.iter().for_each(|token| out.extend(token.to_le_bytes()));
        out.extend((self.drafters.len() as u64).to_le_bytes());
        for (name, has_part) in &self.drafters {
            out.extend((name.len() as u64).to_le_bytes());
            out.extend_from_slice(name.as_bytes());
            out.push(u8::from(*has_part));
        }
        let sum = digest(&out[start..]);
        out.extend(sum.to_le_bytes());
    }

    fn n_head(&self) -> usize {
        let names: usize = self.drafters.iter().map(|(name, _)| 8 + name.len() + 1).sum();
        N_PREFIX + 8 + 8 + 8 + size_of::<Token>() * self.tokens.len() + 8 + names + 8
    }
}

fn number(rest: &mut &[u8]) -> Result<u64, RestoreError> {
    let (&n, tail) = rest.split_first_chunk().ok_or_else(|| damaged("it ends too early"))?;
    *rest = tail;
    Ok(u64::from_le_bytes(n))
}

/// As many items of `width` bytes as the number before them says.
fn part<'a>(rest: &mut &'a [u8], width: usize) -> Result<&'a [u8], RestoreError> {
    let n = usize::try_from(number(rest)?).ok().and_then(|n| n.checked_mul(width));
    let (part, tail) =
        n.and_then(|n| rest.split_at_checked(n)).ok_or_else(|| damaged("it ends too early"))?;
    *rest = tail;
    Ok(part)
}

/// The contents of a file whose checksum is right. Made where time is: reading all of a large file takes longer than a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckedSnapshot(Vec<u8>);

impl CheckedSnapshot {
    /// The contents, if they are those that were written.
    pub fn new(bytes: Vec<u8>) -> Result<CheckedSnapshot, RestoreError> {
        let n_head = SnapshotHead::n_byte(&bytes)?;
        let cut = || damaged("it ends too early");
        let (all, sum) = bytes.split_last_chunk().filter(|_| bytes.len() > n_head).ok_or_else(cut)?;
        if digest(all) != u64::from_le_bytes(*sum) {
            return Err(damaged("its checksum does not match its contents"));
        }
        Ok(CheckedSnapshot(bytes))
    }
}

/// What a file of a snapshot holds.
#[derive(Debug, PartialEq)]
pub(crate) struct SnapshotFile<'a> {
    pub tokens: Vec<Token>,
    pub target: &'a [u8],
    /// Name and memory of each drafter, in order; empty where one has nothing.
    pub drafters: Vec<(String, &'a [u8])>,
}

impl<'a> SnapshotFile<'a> {
    pub fn read(file: &'a CheckedSnapshot, pair: u64) -> Result<SnapshotFile<'a>, RestoreError> {
        let bytes = &file.0[..];
        let head = SnapshotHead::read(bytes)?;
        if head.pair != pair {
            return Err(RestoreError::OtherPair { expected: pair, found: head.pair });
        }
        if head.n_file != bytes.len() as u64 {
            return Err(damaged("it has another length than it says"));
        }
        let mut rest = &bytes[head.n_head()..bytes.len() - size_of::<u64>()];
        let target = part(&mut rest, 1)?;
        let mut drafters = Vec::new();
        for (name, has_part) in head.drafters {
            let memory = part(&mut rest, 1)?;
            if has_part == memory.is_empty() {
                return Err(damaged("its head and its parts do not agree"));
            }
            drafters.push((name, memory));
        }
        if !rest.is_empty() {
            return Err(damaged("something follows its last part"));
        }
        Ok(SnapshotFile { tokens: head.tokens, target, drafters })
    }
}

/// Writes the file of a snapshot a bit at a time, since all of it at once may take longer than a step.
#[derive(Debug)]
pub(crate) struct SnapshotWriter {
    /// What the file says about itself.
    pub head: SnapshotHead,
    seq: SeqId,
    drafters: Vec<Part>,
    sum: Digest,
    n_written: u64,
    /// Head, parts of the target's memory, end.
    stage: Stage,
}

#[derive(Clone, Copy, Debug)]
enum Stage {
    Head,
    Target(usize),
    Done,
}

impl SnapshotWriter {
    /// For `seq`, which rests until all is written, and whose tokens are these.
    pub fn new(
        pair: u64,
        tokens: Vec<Token>,
        seq: SeqId,
        memory: &Memory,
        drafters: Vec<Part>,
    ) -> SnapshotWriter {
        let names = drafters.iter().map(|(name, part)| (name.to_string(), !part.is_empty())).collect();
        let mut head = SnapshotHead { pair, n_file: 0, tokens, drafters: names };
        let parts: usize = drafters.iter().map(|(_, part)| 8 + part.len()).sum();
        head.n_file = (head.n_head() + 8 + memory.export_bytes(seq) + parts + 8) as u64;
        SnapshotWriter { head, seq, drafters, sum: Digest::new(), n_written: 0, stage: Stage::Head }
    }

    /// The sequence whose memory is written.
    pub fn seq(&self) -> SeqId {
        self.seq
    }

    /// Appends the next bytes to `out`, a page or so. False once nothing follows.
    pub fn next(&mut self, memory: &Memory, out: &mut Vec<u8>) -> bool {
        let start = out.len();
        match self.stage {
            Stage::Head => {
                self.head.write(out);
                out.extend((memory.export_bytes(self.seq) as u64).to_le_bytes());
                self.stage = Stage::Target(0);
            }
            Stage::Target(part) if memory.export_part(self.seq, part, out) => {
                self.stage = Stage::Target(part + 1);
            }
            Stage::Target(_) => {
                for (_, part) in &self.drafters {
                    out.extend((part.len() as u64).to_le_bytes());
                    out.extend_from_slice(part);
                }
                self.sum.add(&out[start..]);
                out.extend(self.sum.finish().to_le_bytes());
                self.n_written += (out.len() - start) as u64;
                assert_eq!(self.n_written, self.head.n_file, "a file of another length than was said");
                self.stage = Stage::Done;
                return false;
            }
            Stage::Done => return false,
        }
        self.sum.add(&out[start..]);
        self.n_written += (out.len() - start) as u64;
        true
    }

    /// All of the file.
    pub fn all(mut self, memory: &Memory) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.head.n_file as usize);
        while self.next(memory, &mut out) {}
        out
    }
}

/// A 64-bit digest that notices every change of a single word, in four lanes so that it is read at memory's speed. No
/// defence against people who want two texts with one digest.
pub fn digest(bytes: &[u8]) -> u64 {
    let mut all = Digest::new();
    all.add(bytes);
    all.finish()
}

/// [`digest`] of bytes that come one after the other.
#[derive(Clone, Debug)]
struct Digest {
    lanes: [u64; 4],
    /// What does not fill a block yet.
    rest: [u8; Digest::N_BLOCK],
    n_byte: u64,
}

impl Digest {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
    const N_BLOCK: usize = 32;

    /// Each step is reversible, so lanes that differ once stay different unless a second change mends them.
    fn step(h: u64, word: u64) -> u64 {
        (h ^ word).wrapping_mul(Digest::ODD).rotate_left(29)
    }

    fn new() -> Digest {
        let lanes = [1, 2, 3, 4].map(|lane| Digest::step(Digest::ODD, lane));
        Digest { lanes, rest: [0; Digest::N_BLOCK], n_byte: 0 }
    }

    fn n_rest(&self) -> usize {
        (self.n_byte % Digest::N_BLOCK as u64) as usize
    }

    fn add(&mut self, mut bytes: &[u8]) {
        let have = self.n_rest();
        self.n_byte += bytes.len() as u64;
        if have > 0 {
            let n = bytes.len().min(Digest::N_BLOCK - have);
            self.rest[have..have + n].copy_from_slice(&bytes[..n]);
            bytes = &bytes[n..];
            if have + n < Digest::N_BLOCK {
                return;
            }
            let block = self.rest;
            self.blocks(&[block]);
        }
        let (blocks, rest) = bytes.as_chunks();
        self.blocks(blocks);
        self.rest[..rest.len()].copy_from_slice(rest);
    }

    fn blocks(&mut self, blocks: &[[u8; Digest::N_BLOCK]]) {
        for block in blocks {
            for (lane, &word) in self.lanes.iter_mut().zip(block.as_chunks::<8>().0) {
                *lane = Digest::step(*lane, u64::from_le_bytes(word));
            }
        }
    }

    fn finish(&self) -> u64 {
        let rest = self.rest[..self.n_rest()].chunks(8);
        let rest = rest.map(|chunk| chunk.iter().rev().fold(0, |word, &b| word << 8 | u64::from(b)));
        let h = self.lanes.into_iter().chain(rest).chain([self.n_byte]).fold(0, Digest::step);
        Digest::step(h ^ (h >> 32), 0)
    }
}

#[cfg(test)]
mod tests {
    use paceline_backend::StateConfig;
    use paceline_testkit::{HashKind, HashModel};

    use super::*;

    fn file(pair: u64, drafters: Vec<Part>) -> Vec<u8> {
        let states = HashModel::new(1, HashKind::Hybrid).states(StateConfig::default());
        let mut memory = Memory::new(states, 64);
        let seq = memory.create();
        let fork = memory.fork(seq);
        SnapshotWriter::new(pair, (0..9).collect(), fork, &memory, drafters).all(&memory)
    }

    fn parts() -> Vec<Part> {
        vec![("a", vec![1, 2, 3]), ("b", Vec::new())]
    }

    fn read(bytes: &[u8], pair: u64) -> Result<(), RestoreError> {
        let checked = CheckedSnapshot::new(bytes.to_vec())?;
        SnapshotFile::read(&checked, pair).map(|_| ())
    }

    #[test]
    fn what_is_written_is_read() {
        let bytes = CheckedSnapshot::new(file(5, parts())).unwrap();
        let read = SnapshotFile::read(&bytes, 5).unwrap();
        assert_eq!(read.tokens, (0..9).collect::<Vec<_>>());
        assert_eq!(read.drafters, [("a".to_string(), &[1, 2, 3][..]), ("b".to_string(), &[][..])]);
        let none = CheckedSnapshot::new(file(5, Vec::new())).unwrap();
        assert_eq!(SnapshotFile::read(&none, 5).unwrap().drafters, []);
        let other = SnapshotFile::read(&none, 6).unwrap_err();
        assert_eq!(other, RestoreError::OtherPair { expected: 6, found: 5 });
        let head = SnapshotHead::read(&bytes.0).unwrap();
        assert_eq!((head.pair, head.n_file), (5, bytes.0.len() as u64));
        assert_eq!(head.drafters, [("a".to_string(), true), ("b".to_string(), false)]);
        let n = SnapshotHead::n_byte(&bytes.0).unwrap();
        assert_eq!(SnapshotHead::read(&bytes.0[..n]), Ok(head), "the beginning is enough");
    }

    /// Every bit and every length.
    #[test]
    fn no_damage_is_overlooked() {
        let bytes = file(5, parts());
        let n_head = SnapshotHead::n_byte(&bytes).unwrap();
        for bit in 0..8 * bytes.len() {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(read(&bad, 5).is_err(), "bit {bit}");
            assert_eq!(SnapshotHead::read(&bad).is_err(), bit / 8 < n_head, "bit {bit}, head");
        }
        for n in 0..bytes.len() {
            assert!(read(&bytes[..n], 5).is_err(), "{n} bytes");
            assert!(read(&[&bytes[..n], &bytes[n + 1..]].concat(), 5).is_err(), "without byte {n}");
        }
        assert!(read(&[&bytes[..], &[0]].concat(), 5).is_err());
        let foreign = read(b"GGUF and more than that", 5).unwrap_err().to_string();
        assert!(foreign.contains("\"PACELINE SNAP 2\"") && foreign.contains("GGUF and"), "{foreign}");
    }

    #[test]
    fn a_digest_does_not_depend_on_how_bytes_come() {
        let bytes: Vec<u8> = (0..200).map(|i| (i * 37) as u8).collect();
        for n in [0, 1, 31, 32, 33, 64, 150] {
            for m in [0, 1, 7, 50] {
                let mut parts = Digest::new();
                [&bytes[..n], &bytes[n..n + m], &bytes[n + m..]].iter().for_each(|part| parts.add(part));
                assert_eq!(parts.finish(), digest(&bytes), "{n} and {m}");
            }
        }
    }
}
