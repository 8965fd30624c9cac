//! Activations in the form that packed matrices multiply.
//!
//! A row is cut into blocks of 384 bytes, an [`ActBlock`] each, that hold all the kernels need to know of its
//! inputs. The blocks of one range of inputs lie together for all rows, `blocks [n_blocks, n]`: a kernel finds its columns
//! at fixed distances from one address.
//!
//! ```text
//! words     Per32                                Per256                              F32
//!  0..64    256 codes, i8                        256 codes, i8                       96 values
//! 64..72    d[8], f32: one scale for 32 codes    d, f32 | 3 unused | Σ32[8], i16
//! 72..80    -128·Σ32[8], i32                     -128·Σ32[8], i32
//! 80..96    -8·Σ32[8], i32 | 8 unused            -32·Σ16[16], i32
//! ```
//!
//! A value is `d · code` with `d = max|x| / 127` and `code = x · (127 / max|x|)` rounded to nearest, ties to even; the codes past
//! the end of a row are zero. Σ32 and Σ16 are sums of successive codes. Kernels multiply *unsigned* weight codes;
//! the multiples are what has to be added to a sum because weight codes are stored with an offset.
//!
//! Which grain: formats with a scale for each 32 weights get one for each 32 activations, formats of 256 get one for 256, as in
//! the engines that those formats were made for. The relative rms error of Gaussian rows is 0.53 % and 0.69 %; with every 100th
//! value twenty times the others, as a model's hidden states have them, 1.1 % and 2.7 %. Eight-bit weights have an error of
//! 0.55 %, so for them coarse scales would be the larger error by far; four-bit ones have 7 %.
//!
//! A maximum below 2^-119 counts as zero: its reciprocal would overflow.

use crate::packed::PackedTable;
use crate::shared::SharedMut;

/// How finely activations are scaled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Grain {
    /// Not quantised: the values as they are.
    F32,
    /// 8-bit integers with a scale for 32 values.
    Per32,
    /// 8-bit integers with a scale for 256 values.
    Per256,
}

impl Grain {
    /// Number of inputs in a block.
    pub const fn block_len(self) -> usize {
        match self {
            Grain::F32 => N_FLOATS,
            Grain::Per32 | Grain::Per256 => 256,
        }
    }
}

/// Words of an [`ActBlock`].
const N_FLOATS: usize = 96;
/// Where a block has its scales, in words.
pub(super) const SCALES: usize = 64;
/// Where a block of [`Grain::Per256`] has the sums of 32 codes, in words of two.
pub(super) const SUMS: usize = 68;
/// Where a block has `-128·Σ32`.
pub(super) const MINUS_128: usize = 72;
/// Where a block of [`Grain::Per32`] has `-8·Σ32`.
pub(super) const MINUS_8: usize = 80;
/// Where a block of [`Grain::Per256`] has `-32·Σ16`.
pub(super) const MINUS_32: usize = 80;

/// A run of one row's activations, as the module documentation lays it out.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct ActBlock(pub(super) [u32; N_FLOATS]);

impl ActBlock {
    pub(super) const ZERO: Self = Self([0; N_FLOATS]);

    /// Code `i` of the block.
    pub(super) fn code(&self, i: usize) -> i32 {
        i32::from(self.0[i / 4].to_le_bytes()[i % 4] as i8)
    }

    /// Word `i` as a float: a scale, or one of the values of [`Grain::F32`].
    pub(super) fn float(&self, i: usize) -> f32 {
        f32::from_bits(self.0[i])
    }

    /// Fills the block with these values, the last of them being the last of a row if they do not fill it.
    #[inline(always)]
    pub(super) fn fill(&mut self, grain: Grain, x: &[f32]) {
        match grain {
            Grain::F32 => {
                assert!(x.len() <= N_FLOATS, "{} values in a block of {N_FLOATS}", x.len());
                self.0.iter_mut().zip(x).for_each(|(word, x)| *word = x.to_bits());
                self.0[x.len()..].fill(0);
            }
            Grain::Per32 | Grain::Per256 => {
                let mut padded = [0.0; 256];
                let x = whole(x, &mut padded);
                if grain == Grain::Per32 { self.fill_per_32(x) } else { self.fill_per_256(x) }
            }
        }
    }

    #[inline(always)]
    fn fill_per_32(&mut self, x: &[f32; 256]) {
        for (s, x) in x.as_chunks::<32>().0.iter().enumerate() {
            let (d, inverse) = scales(x);
            let sums = self.put_codes(s, x, inverse);
            self.0[SCALES + s] = d.to_bits();
            self.0[MINUS_128 + s] = (-128 * (sums[0] + sums[1])) as u32;
            self.0[MINUS_8 + s] = (-8 * (sums[0] + sums[1])) as u32;
        }
        self.0[MINUS_8 + 8..].fill(0);
    }

    #[inline(always)]
    fn fill_per_256(&mut self, x: &[f32; 256]) {
        let (d, inverse) = scales(x);
        self.0[SCALES..SUMS].copy_from_slice(&[d.to_bits(), 0, 0, 0]);
        let mut sums_of_32 = [0u32; 8];
        for (s, x) in x.as_chunks::<32>().0.iter().enumerate() {
            let sums = self.put_codes(s, x, inverse);
            let sum = sums[0] + sums[1];
            sums_of_32[s] = sum as u32 & 0xffff;
            self.0[MINUS_128 + s] = (-128 * sum) as u32;
            self.0[MINUS_32 + 2 * s] = (-32 * sums[0]) as u32;
            self.0[MINUS_32 + 2 * s + 1] = (-32 * sums[1]) as u32;
        }
        for pair in 0..4 {
            self.0[SUMS + pair] = sums_of_32[2 * pair] | sums_of_32[2 * pair + 1] << 16;
        }
    }

    /// Writes the codes of sub-block `s` and returns the sums of each half.
    #[inline(always)]
    fn put_codes(&mut self, s: usize, x: &[f32; 32], inverse: f32) -> [i32; 2] {
        /// Adding 1.5·2^23 leaves no bit for a fraction, and the integer in the low bits.
        const NO_FRACTION: f32 = (3u32 << 22) as f32;
        let codes: [i8; 32] = x.map(|x| (x * inverse + NO_FRACTION).to_bits() as i8);
        let words: &mut [u32; 8] = self.0[8 * s..].first_chunk_mut().expect("a block has eight sub-blocks");
        for (word, codes) in words.iter_mut().zip(codes.as_chunks::<4>().0) {
            *word = u32::from_le_bytes(codes.map(|code| code as u8));
        }
        let mut sums = [0; 2];
        for (sum, codes) in sums.iter_mut().zip(codes.as_chunks::<16>().0) {
            *sum = codes.iter().map(|code| i32::from(*code)).sum();
        }
        sums
    }
}

/// The values of a block, with zeros behind the last of a row.
#[inline(always)]
pub(super) fn whole<'a>(x: &'a [f32], padded: &'a mut [f32; 256]) -> &'a [f32; 256] {
    match x.try_into() {
        Ok(x) => x,
        Err(_) => {
            padded[..x.len()].copy_from_slice(x);
            padded
        }
    }
}

/// The scale of these values, and what to multiply them with.
#[inline(always)]
fn scales(x: &[f32]) -> (f32, f32) {
    // The bits of magnitudes order as the magnitudes do, NaN above all. Integers may be compared in any order.
    scale_of(x.iter().fold(0, |max: u32, x| max.max(x.to_bits() & 0x7fff_ffff)))
}

/// The same from the bits of the greatest magnitude.
#[inline(always)]
pub(super) fn scale_of(bits: u32) -> (f32, f32) {
    /// 2^-119; 127 over it is well inside the range of f32.
    const LEAST: u32 = 8 << 23;
    let max = f32::from_bits(bits);
    if bits < LEAST { (0.0, 0.0) } else { (max / 127.0, 127.0 / max) }
}

/// Activation rows `[n, n_in]`, quantised; see the module's source for the layout.
///
/// Kept between steps by its owner: [`reset`](Self::reset) allocates only when it has to grow.
#[derive(Clone)]
pub struct QuantRows {
    grain: Grain,
    n: usize,
    n_in: usize,
    blocks: Vec<ActBlock>,
}

impl Default for QuantRows {
    fn default() -> Self {
        Self::new()
    }
}

impl QuantRows {
    /// No rows.
    pub const fn new() -> Self {
        Self { grain: Grain::F32, n: 0, n_in: 1, blocks: Vec::new() }
    }

    /// Makes room for `n` rows of `n_in` values. What they hold is to be written next.
    ///
    /// # Panics
    /// If `n_in` is zero.
    pub fn reset(&mut self, grain: Grain, n: usize, n_in: usize) {
        assert!(n_in > 0, "rows of no values");
        (self.grain, self.n, self.n_in) = (grain, n, n_in);
        self.blocks.resize(n * n_in.div_ceil(grain.block_len()), ActBlock::ZERO);
    }

    /// Makes sure that a [`reset`](Self::reset) to this size allocates nothing.
    pub fn reserve(&mut self, grain: Grain, n: usize, n_in: usize) {
        let n_block = n * n_in.div_ceil(grain.block_len());
        self.blocks.reserve(n_block.saturating_sub(self.blocks.len()));
    }

    /// How the rows are scaled.
    pub fn grain(&self) -> Grain {
        self.grain
    }

    /// Number of rows.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Values in a row.
    pub fn n_in(&self) -> usize {
        self.n_in
    }

    /// All blocks, `[n_blocks, n]`.
    pub(super) fn blocks(&self) -> &[ActBlock] {
        &self.blocks
    }

    /// Quantises `x [n, n_in]` into these rows, each by itself.
    ///
    /// # Panics
    /// If `x` is not `n` whole rows.
    pub fn quantize_rows(&mut self, table: &PackedTable, grain: Grain, x: &[f32], n: usize, n_in: usize) {
        assert_eq!(x.len(), n * n_in, "x [{n}, {n_in}]");
        self.reset(grain, n, n_in);
        let writer = self.writer();
        for (row, x) in x.chunks_exact(n_in).enumerate() {
            // SAFETY: one row after the other, on this thread.
            unsafe { writer.quantize(table, row, x) };
        }
    }

    /// Takes over some rows of `from`, in this order: the rows that one expert works on, say.
    ///
    /// # Panics
    /// If `from` has no such row.
    pub fn gather(&mut self, from: &QuantRows, rows: impl ExactSizeIterator<Item = usize> + Clone) {
        self.reset(from.grain, rows.len(), from.n_in);
        let (n, n_from) = (self.n, from.n);
        if n == 0 {
            return;
        }
        assert!(rows.clone().all(|row| row < n_from), "rows to gather, of {n_from}");
        for (to, from) in self.blocks.chunks_exact_mut(n).zip(from.blocks.chunks_exact(n_from)) {
            to.iter_mut().zip(rows.clone()).for_each(|(to, row)| *to = from[row]);
        }
    }

    /// A handle through which several threads write a row each.
    pub fn writer(&mut self) -> RowWriter<'_> {
        let Self { grain, n, n_in, .. } = *self;
        RowWriter { grain, n, n_in, blocks: SharedMut::new(&mut self.blocks) }
    }

    /// The values that the codes of a row stand for.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.n && out.len() == self.n_in, "row {row} of [{}, {}]", self.n, self.n_in);
        let blocks = self.blocks.iter().skip(row).step_by(self.n);
        for (block, out) in blocks.zip(out.chunks_mut(self.grain.block_len())) {
            for (i, out) in out.iter_mut().enumerate() {
                *out = match self.grain {
                    Grain::F32 => block.float(i),
                    Grain::Per32 => block.float(SCALES + i / 32) * block.code(i) as f32,
                    Grain::Per256 => block.float(SCALES) * block.code(i) as f32,
                };
            }
        }
    }
}

/// Writes rows of a [`QuantRows`], from several threads if they like. A row's bits never depend on the others.
pub struct RowWriter<'a> {
    grain: Grain,
    n: usize,
    n_in: usize,
    blocks: SharedMut<'a, ActBlock>,
}

impl RowWriter<'_> {
    /// Quantises `x [n_in]` into row `row`.
    ///
    /// # Panics
    /// If there is no such row, or `x` has another length.
    ///
    /// # Safety
    /// No other thread may write this row at the same time.
    pub unsafe fn quantize(&self, table: &PackedTable, row: usize, x: &[f32]) {
        assert_eq!(x.len(), self.n_in, "a row of n_in values");
        let len = self.grain.block_len();
        // SAFETY: the row is the caller's by contract.
        unsafe {
            self.blocks_of(row, |k, block| {
                (table.fill)(block, self.grain, &x[k..self.n_in.min(k + len)]);
            });
        }
    }

    /// Values in a row.
    pub fn n_in(&self) -> usize {
        self.n_in
    }

    /// Calls `each` with the blocks of a row and the index of their first value.
    ///
    /// # Safety
    /// As for [`quantize`](Self::quantize).
    unsafe fn blocks_of(&self, row: usize, mut each: impl FnMut(usize, &mut ActBlock)) {
        assert!(row < self.n, "row {row} of {}", self.n);
        for (b, k) in (0..self.n_in).step_by(self.grain.block_len()).enumerate() {
            let at = b * self.n + row;
            // SAFETY: block `b` of this row, which is the caller's; the slice lives for one iteration.
            each(k, &mut unsafe { self.blocks.range(at..at + 1) }[0]);
        }
    }
}
