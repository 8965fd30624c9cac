//! The file that `--kl-divergence-base` writes: what a model said about a text, to hold others against it.
//!
//! ```text
//! "PACEKLD1" │ n_vocab n_ctx n_chunk 0: u32 │ digest of the vocabulary u64 │ tokens: n_chunk × n_ctx × u32
//! then for each window, for each token from n_ctx/2 to the last but one: n_vocab × f32, the logits behind it
//! ```
//!
//! All little-endian; the length follows from the head and is checked. Logits are kept as they are, not rounded to 16 bits as in
//! the files of llama-perplexity, whose step of some 0.0002 would hide what Q8_0 cells change. The file appears when it is
//! complete.

use std::{
    fs::File,
    io::{BufReader, BufWriter, Read, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};

const MAGIC: &[u8; 8] = b"PACEKLD1";
const LLAMA_MAGIC: &[u8; 8] = b"_logits_";
const HEAD_BYTES: u64 = 8 + 4 * 4 + 8;

/// What a reference speaks of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Tokens of the vocabulary.
    pub n_vocab: usize,
    /// Digest of their texts.
    pub vocab: u64,
    /// Tokens of a window.
    pub n_ctx: usize,
    /// Windows.
    pub n_chunk: usize,
}

impl Shape {
    /// The first token of a window behind which a prediction is scored.
    pub fn first_scored(&self) -> usize {
        self.n_ctx / 2
    }

    fn file_bytes(&self) -> Option<u64> {
        let n_row = self.n_chunk as u64 * (self.n_ctx - 1 - self.first_scored()) as u64;
        let logits = n_row.checked_mul(self.n_vocab as u64)?.checked_mul(4)?;
        logits.checked_add(HEAD_BYTES + 4 * self.n_chunk as u64 * self.n_ctx as u64)
    }
}

/// Writes one.
pub struct ReferenceWriter {
    path: PathBuf,
    temporary: PathBuf,
    out: Option<BufWriter<File>>,
}

impl ReferenceWriter {
    /// Begins with the head and the tokens.
    pub fn create(path: &Path, shape: &Shape, tokens: &[u32]) -> Result<ReferenceWriter> {
        let mut name =
            path.file_name().with_context(|| format!("{}: expected a file", path.display()))?.to_owned();
        name.push(format!(".{}.part", std::process::id()));
        let temporary = path.with_file_name(name);
        let file =
            File::create(&temporary).with_context(|| format!("{}: can't write", temporary.display()))?;
        let mut out = BufWriter::with_capacity(1 << 20, file);
        let sizes = [shape.n_vocab, shape.n_ctx, shape.n_chunk, 0];
        let mut head = MAGIC.to_vec();
        head.extend(sizes.iter().flat_map(|&n| (n as u32).to_le_bytes()));
        head.extend(shape.vocab.to_le_bytes());
        head.extend(tokens.iter().flat_map(|t| t.to_le_bytes()));
        out.write_all(&head).with_context(|| format!("{}: can't write", temporary.display()))?;
        Ok(ReferenceWriter { path: path.to_owned(), temporary, out: Some(out) })
    }

    /// Adds rows.
    pub fn put(&mut self, rows: &[f32]) -> Result<()> {
        let out = self.out.as_mut().expect("not finished");
        let bytes: Vec<u8> = rows.iter().flat_map(|x| x.to_le_bytes()).collect();
        out.write_all(&bytes).with_context(|| format!("{}: can't write", self.temporary.display()))
    }

    /// Gives the file its name.
    pub fn finish(mut self) -> Result<()> {
        let out = self.out.take().expect("not finished");
        let failed = || format!("{}: can't write", self.path.display());
        out.into_inner().map_err(|e| e.into_error()).and_then(|file| file.sync_all()).with_context(failed)?;
        std::fs::rename(&self.temporary, &self.path).with_context(failed)
    }
}

impl Drop for ReferenceWriter {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.temporary); // after the rename there is none
    }
}

/// Reads one, row by row.
#[derive(Debug)]
pub struct Reference {
    name: String,
    shape: Shape,
    tokens: Vec<u32>,
    file: BufReader<File>,
    rows: Vec<f32>,
}

impl Reference {
    /// Opens a file and reads the head.
    pub fn open(path: &Path) -> Result<Reference> {
        let name = path.display().to_string();
        let file = File::open(path).with_context(|| format!("{name}: can't read"))?;
        let n_bytes = file.metadata().with_context(|| format!("{name}: can't read"))?.len();
        let mut file = BufReader::with_capacity(1 << 20, file);
        let mut head = [0; HEAD_BYTES as usize];
        let is_short = file.read_exact(&mut head).is_err();
        if head.starts_with(LLAMA_MAGIC) {
            bail!(
                "{name}: expected logits of paceline perplexity, found those of llama-perplexity\nhint: make them again with --kl-divergence-base"
            );
        }
        ensure!(
            !is_short && head.starts_with(MAGIC),
            "{name}: expected logits of paceline perplexity ({})",
            MAGIC.escape_ascii()
        );
        let size = |at: usize| u32::from_le_bytes(*head[at..].first_chunk().expect("in the head")) as usize;
        let vocab = u64::from_le_bytes(*head[24..].first_chunk().expect("in the head"));
        let shape = Shape { n_vocab: size(8), vocab, n_ctx: size(12), n_chunk: size(16) };
        let expected = Some(shape)
            .filter(|s| s.n_ctx >= 4 && s.n_chunk > 0 && s.n_vocab > 0)
            .and_then(|s| s.file_bytes());
        ensure!(
            expected == Some(n_bytes),
            "{name}: expected {} bytes, found {n_bytes}\nhint: the file is damaged, make it again",
            expected.unwrap_or(0)
        );
        let mut tokens = vec![0; 4 * shape.n_ctx * shape.n_chunk];
        file.read_exact(&mut tokens).with_context(|| format!("{name}: can't read"))?;
        let tokens = tokens.as_chunks().0.iter().map(|t| u32::from_le_bytes(*t)).collect();
        let reference = Reference { name, shape, tokens, file, rows: Vec::new() };
        ensure!(
            reference.tokens.iter().all(|&t| (t as usize) < shape.n_vocab),
            "{}: a token that its vocabulary has not\nhint: the file is damaged, make it again",
            reference.name
        );
        Ok(reference)
    }

    /// For messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it speaks of.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Its windows.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Whether a run of this shape over these tokens may be held against it.
    pub fn check(&self, shape: &Shape, tokens: &[u32]) -> Result<()> {
        let name = &self.name;
        ensure!(
            (shape.n_vocab, shape.vocab) == (self.shape.n_vocab, self.shape.vocab),
            "{name}: its vocabulary ({} tokens) is not the model's ({} tokens)",
            self.shape.n_vocab,
            shape.n_vocab
        );
        ensure!(
            tokens == self.tokens,
            "{name}: its text is another one, or cut elsewhere ({} windows of {})\nhint: leave -f out to use the text in it",
            self.shape.n_chunk,
            self.shape.n_ctx
        );
        Ok(())
    }

    /// The next `n` logits.
    pub fn next(&mut self, n: usize) -> Result<&[f32]> {
        let mut bytes = vec![0; 4 * n];
        self.file.read_exact(&mut bytes).with_context(|| format!("{}: can't read", self.name))?;
        self.rows.clear();
        self.rows.extend(bytes.as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)));
        Ok(&self.rows)
    }
}
