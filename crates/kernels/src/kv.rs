//! Cells of the KV cache: their storage types, and how a row gets there and back.
//!
//! A page holds some cells of every KV head, keys and values apart, each head's cells together, so that reading one head is one stream.
//! A cell's value, and a key of a quantised type, is a row of its own: plain floats, or whole quant blocks of 32 in the layout of the
//! GGUF type of the same name. Keys of plain floats lie in groups of [`KEY_GROUP`] cells, dimension by dimension:
//!
//! ```text
//! value of cell c           =  values[c · row_bytes ..][.. row_bytes]
//! dimension d of its key    =  keys[((c / 16) · head_dim + d) · 16 + c % 16]
//! ```
//!
//! for then the scores of a group are the lanes of a vector, and no sum has to cross lanes. What reads a row widens it to f32 first, exactly.
//!
//! Rows are quantised as they arrive, so scales come from the largest value of a block and from no search.

use crate::formats::float::f32_to_f16;
use crate::formats::{self, Format, iq4_nl, q5_0};
use crate::mapped::Mapped;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use paceline_gguf::GgmlType;
use std::fmt;
use std::ops::Range;
use std::str::FromStr;

/// Storage type of keys or of values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvType {
    /// 4 bytes a value, what goldens are compared with.
    F32,
    /// 2 bytes a value, the default.
    F16,
    /// 2 bytes a value, with the range of F32.
    Bf16,
    /// 8.5 bits a value.
    Q8_0,
    /// 5.5 bits a value.
    Q5_0,
    /// 4.5 bits a value.
    Q4_0,
    /// 5 bits a value.
    Q4_1,
    /// 4.5 bits a value, levels closer near zero.
    Iq4Nl,
}

impl KvType {
    /// All types, widest first.
    pub const ALL: [KvType; 8] = [
        KvType::F32,
        KvType::F16,
        KvType::Bf16,
        KvType::Q8_0,
        KvType::Q5_0,
        KvType::Q4_1,
        KvType::Q4_0,
        KvType::Iq4Nl,
    ];

    /// The name that flags take.
    pub fn name(self) -> &'static str {
        match self {
            KvType::F32 => "f32",
            KvType::F16 => "f16",
            KvType::Bf16 => "bf16",
            KvType::Q8_0 => "q8_0",
            KvType::Q5_0 => "q5_0",
            KvType::Q4_0 => "q4_0",
            KvType::Q4_1 => "q4_1",
            KvType::Iq4Nl => "iq4_nl",
        }
    }

    /// The tensor type of the same layout.
    pub fn ggml(self) -> GgmlType {
        match self {
            KvType::F32 => GgmlType::F32,
            KvType::F16 => GgmlType::F16,
            KvType::Bf16 => GgmlType::BF16,
            KvType::Q8_0 => GgmlType::Q8_0,
            KvType::Q5_0 => GgmlType::Q5_0,
            KvType::Q4_0 => GgmlType::Q4_0,
            KvType::Q4_1 => GgmlType::Q4_1,
            KvType::Iq4Nl => GgmlType::IQ4_NL,
        }
    }

    /// Whether heads of this width are whole blocks.
    pub fn fits(self, head_dim: usize) -> bool {
        head_dim.is_multiple_of(self.ggml().block_len())
    }

    /// Bytes of `n` values, which are whole blocks.
    pub fn row_bytes(self, n: usize) -> usize {
        debug_assert!(self.fits(n));
        n / self.ggml().block_len() * self.ggml().block_bytes()
    }

    /// The names of these types, for messages.
    pub fn names(types: impl IntoIterator<Item = KvType>) -> String {
        types.into_iter().map(KvType::name).collect::<Vec<_>>().join(", ")
    }

    fn format(self) -> &'static Format {
        formats::format(self.ggml()).expect("every KV type is a tensor format")
    }

    /// Writes a head's row, or several, to bytes of their length.
    pub fn write(self, row: &[f32], bytes: &mut [u8]) {
        assert_eq!(bytes.len(), self.row_bytes(row.len()), "bytes of {} values of {self}", row.len());
        match self {
            KvType::F16 => typed_mut::<f16>(bytes).convert_from_f32_slice(row),
            KvType::F32 | KvType::Bf16 | KvType::Q8_0 => (self.format().quantize)(row, bytes),
            KvType::Q5_0 => each_block::<22>(row, bytes, |x, block| {
                let (d, inv) = signed_scale(x, 16.0);
                block[..2].copy_from_slice(&d);
                block[2..].copy_from_slice(&q5_0::pack(&x.map(|x| code(x * inv + 16.0, 31.0))));
            }),
            KvType::Q4_0 => each_block::<18>(row, bytes, |x, block| {
                let (d, inv) = signed_scale(x, 8.0);
                block[..2].copy_from_slice(&d);
                nibbles(&x.map(|x| code(x * inv + 8.0, 15.0)), &mut block[2..]);
            }),
            KvType::Q4_1 => each_block::<20>(row, bytes, |x, block| {
                let min = x.iter().fold(f32::INFINITY, |a, &b| if b < a { b } else { a });
                let max = x.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
                let d = f32_to_f16((max - min) / 15.0);
                let m = f32_to_f16(min);
                let (inv, min) = (inverse(read_f16(d)), read_f16(m));
                block[..2].copy_from_slice(&d);
                block[2..4].copy_from_slice(&m);
                nibbles(&x.map(|x| code((x - min) * inv, 15.0)), &mut block[4..]);
            }),
            KvType::Iq4Nl => each_block::<18>(row, bytes, |x, block| {
                let (d, inv) = signed_scale(x, -iq4_nl::LEVELS[0]);
                block[..2].copy_from_slice(&d);
                nibbles(&x.map(|x| iq4_nl::nearest_code(x * inv)), &mut block[2..]);
            }),
        }
    }

    /// Widens a head's row, or several.
    pub fn read(self, bytes: &[u8], row: &mut [f32]) {
        assert_eq!(bytes.len(), self.row_bytes(row.len()), "bytes of {} values of {self}", row.len());
        match self {
            KvType::F32 => row.copy_from_slice(typed(bytes)),
            KvType::F16 => typed::<f16>(bytes).convert_to_f32_slice(row),
            _ => (self.format().dequantize)(bytes, row),
        }
    }
}

impl fmt::Display for KvType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for KvType {
    type Err = String;

    fn from_str(name: &str) -> Result<KvType, String> {
        KvType::ALL
            .into_iter()
            .find(|ty| ty.name().eq_ignore_ascii_case(name))
            .ok_or_else(|| format!("expected one of {}, found `{name}`", KvType::names(KvType::ALL)))
    }
}

/// Cells whose keys lie together, dimension by dimension.
pub const KEY_GROUP: usize = 16;

/// How keys lie in a page.
impl KvType {
    /// Whether keys lie dimension by dimension in groups of [`KEY_GROUP`] cells, and not row by row.
    pub fn groups_keys(self) -> bool {
        matches!(self, KvType::F32 | KvType::F16 | KvType::Bf16)
    }

    /// Bytes of one head's keys in a page: whole groups.
    pub fn key_bytes(self, head_dim: usize, page_len: usize) -> usize {
        let n_cell = if self.groups_keys() { page_len.next_multiple_of(KEY_GROUP) } else { page_len };
        n_cell * self.row_bytes(head_dim)
    }

    /// Widens the key of cell `cell` of grouped keys to every [`KEY_GROUP`]th place of `out`.
    pub(crate) fn read_grouped(self, keys: &[u8], head_dim: usize, cell: usize, out: &mut [f32]) {
        let first = cell / KEY_GROUP * KEY_GROUP * head_dim + cell % KEY_GROUP;
        let places = out.iter_mut().step_by(KEY_GROUP).take(head_dim);
        match self {
            KvType::F32 => {
                places.zip(typed(keys)[first..].iter().step_by(KEY_GROUP)).for_each(|(out, x)| *out = *x)
            }
            KvType::F16 => {
                let keys = typed::<f16>(keys)[first..].iter().step_by(KEY_GROUP);
                places.zip(keys).for_each(|(out, x)| *out = x.to_f32());
            }
            KvType::Bf16 => {
                let keys = typed::<bf16>(keys)[first..].iter().step_by(KEY_GROUP);
                places.zip(keys).for_each(|(out, x)| *out = x.to_f32());
            }
            _ => unreachable!("keys of {self} lie row by row"),
        }
    }

    /// Writes the key of cell `cell` among one head's keys in a page.
    pub fn write_key(self, key: &[f32], cell: usize, keys: &mut [u8]) {
        match self {
            KvType::F32 => put_key(key, |x| x, cell, typed_mut(keys)),
            KvType::F16 => {
                // As many at once as there are instructions for.
                let mut half = [f16::ZERO; 64];
                let keys = &mut typed_mut::<f16>(keys)
                    [cell / KEY_GROUP * KEY_GROUP * key.len() + cell % KEY_GROUP..];
                for (i, key) in key.chunks(half.len()).enumerate() {
                    let half = &mut half[..key.len()];
                    half.convert_from_f32_slice(key);
                    let places = keys.iter_mut().step_by(KEY_GROUP).skip(64 * i);
                    places.zip(half).for_each(|(place, x)| *place = *x);
                }
            }
            KvType::Bf16 => put_key(key, bf16::from_f32, cell, typed_mut(keys)),
            _ => {
                let row = self.row_bytes(key.len());
                self.write(key, &mut keys[cell * row..(cell + 1) * row]);
            }
        }
    }
}

/// Panics unless both are the keys of a group.
pub(crate) fn check_group(rows: &[f32], out: &[f32]) {
    assert!(
        rows.len() == out.len() && rows.len().is_multiple_of(KEY_GROUP),
        "{} keys of a group, {}",
        rows.len(),
        out.len()
    );
}

fn put_key<T: Copy>(key: &[f32], narrow: impl Fn(f32) -> T, cell: usize, keys: &mut [T]) {
    let first = cell / KEY_GROUP * KEY_GROUP * key.len() + cell % KEY_GROUP;
    let places = keys[first..].iter_mut().step_by(KEY_GROUP);
    places.zip(key).for_each(|(place, x)| *place = narrow(*x));
}

/// Storage types of keys and of values, which need not be the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvTypes {
    /// Of keys.
    pub k: KvType,
    /// Of values.
    pub v: KvType,
}

impl KvTypes {
    /// Bytes of one head's keys, and of its values, in a page.
    pub fn head_bytes(self, head_dim: usize, page_len: usize) -> [usize; 2] {
        [self.k.key_bytes(head_dim, page_len), page_len * self.v.row_bytes(head_dim)]
    }

    /// Bytes of `n` values of a key and `n` of a value.
    pub fn cell_bytes(self, n: usize) -> usize {
        self.k.row_bytes(n) + self.v.row_bytes(n)
    }
}

impl From<KvType> for KvTypes {
    fn from(both: KvType) -> KvTypes {
        KvTypes { k: both, v: both }
    }
}

impl fmt::Display for KvTypes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.k == self.v { self.k.fmt(f) } else { write!(f, "{} keys, {} values", self.k, self.v) }
    }
}

pub use crate::mapped::LINE;

/// Bytes that begin on a cache line: the storage of pages.
#[derive(Debug)]
pub struct KvBytes(Mapped);

impl KvBytes {
    /// Zeros, `n` bytes rounded up to whole lines.
    ///
    /// # Panics
    /// If the system has no memory.
    pub fn new(n: usize) -> KvBytes {
        let n = n.next_multiple_of(LINE);
        KvBytes(
            Mapped::zeroed(n).unwrap_or_else(|error| panic!("no memory for a KV page of {n} bytes: {error}")),
        )
    }

    /// All bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: mapped as long as this lives; nobody writes meanwhile, by the contract of `part_mut`.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr(), self.0.len()) }
    }

    /// All bytes, to write.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_ptr(), self.0.len()) }
    }

    /// Some bytes, to write while others write others.
    ///
    /// # Panics
    /// If `range` reaches past the end.
    ///
    /// # Safety
    /// While the slice lives, nobody reads from this, and no other slice of this overlaps `range`.
    #[allow(clippy::mut_from_ref)] // that is the point; the contract above replaces the borrow
    pub unsafe fn part_mut(&self, range: Range<usize>) -> &mut [u8] {
        let n = self.0.len();
        assert!(range.start <= range.end && range.end <= n, "bytes {range:?} of {n}");
        // SAFETY: inside the mapping, which no reference covers; the rest is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_ptr().add(range.start), range.end - range.start) }
    }
}

impl Clone for KvBytes {
    fn clone(&self) -> KvBytes {
        let mut copy = KvBytes::new(self.bytes().len());
        copy.bytes_mut().copy_from_slice(self.bytes());
        copy
    }
}

/// Elements for which every pattern of bits is a value.
pub(crate) trait Plain: Copy {}
impl Plain for f32 {}
impl Plain for f16 {}
impl Plain for bf16 {}

/// Bytes of a page as elements. Pages are aligned and rows of floats are whole elements, so nothing is cut.
pub(crate) fn typed<T: Plain>(bytes: &[u8]) -> &[T] {
    // SAFETY: every pattern of bits is a `T`.
    let (before, data, after) = unsafe { bytes.align_to() };
    assert!(before.is_empty() && after.is_empty(), "elements begin where rows do");
    data
}

fn typed_mut<T: Plain>(bytes: &mut [u8]) -> &mut [T] {
    // SAFETY: every pattern of bits is a `T`, and bytes take any.
    let (before, data, after) = unsafe { bytes.align_to_mut() };
    assert!(before.is_empty() && after.is_empty(), "elements begin where rows do");
    data
}

#[inline]
fn each_block<const N: usize>(row: &[f32], bytes: &mut [u8], quantize: impl Fn(&[f32; 32], &mut [u8; N])) {
    for (x, block) in row.as_chunks::<32>().0.iter().zip(bytes.as_chunks_mut::<N>().0) {
        // As in the tensor formats: NaN becomes zero, infinities the largest finite value.
        let x = x.map(|x| if x.is_nan() { 0.0 } else { x.clamp(f32::MIN, f32::MAX) });
        quantize(&x, block);
    }
}

/// The scale that puts the value farthest from zero on level `-levels`, as stored, and its inverse as read back: the
/// grid has one level more on that side.
fn signed_scale(x: &[f32; 32], levels: f32) -> ([u8; 2], f32) {
    let far = x.iter().fold(0.0f32, |far, &x| if x.abs() > far.abs() { x } else { far });
    let d = f32_to_f16(far / -levels);
    (d, inverse(read_f16(d)))
}

fn read_f16(bytes: [u8; 2]) -> f32 {
    f16::from_le_bytes(bytes).to_f32()
}

/// A scale of zero makes all codes those of zero.
fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

fn code(x: f32, max: f32) -> u8 {
    // The cast cuts, so half a step more rounds to nearest.
    (x + 0.5).clamp(0.0, max) as u8
}

fn nibbles(q: &[u8; 32], out: &mut [u8]) {
    for n in 0..16 {
        out[n] = q[n] | q[16 + n] << 4;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip(ty: KvType, row: &[f32]) -> Vec<f32> {
        let mut bytes = KvBytes::new(ty.row_bytes(row.len()));
        let bytes = &mut bytes.bytes_mut()[..ty.row_bytes(row.len())];
        ty.write(row, bytes);
        let mut back = vec![f32::NAN; row.len()];
        ty.read(bytes, &mut back);
        back
    }

    #[test]
    fn rows_are_written_as_they_are_or_to_nearest_even() {
        // 1 + 2^-11 lies between two halves, the even one is 1; the rest is exact or overflows.
        let row = [1.0 + 0.5f32.powi(11), 1.0 + 3.0 * 0.5f32.powi(11), -0.1, 65504.0, 1e6];
        assert_eq!(round_trip(KvType::F32, &row), row);
        let bits: Vec<u16> =
            round_trip(KvType::F16, &row).iter().map(|x| f16::from_f32(*x).to_bits()).collect();
        assert_eq!(bits, [0x3c00, 0x3c02, 0xae66, 0x7bff, 0x7c00]);
        assert_eq!(round_trip(KvType::Bf16, &[1.0, 1e30, -3.0]), [1.0, bf16::from_f32(1e30).to_f32(), -3.0]);
    }

    /// No value is farther off than half a step of its block's grid, and a little for the scale's rounding.
    #[test]
    fn quantised_rows_are_within_half_a_step() {
        let rows: [Vec<f32>; 3] = [
            (0..96).map(|i| (i as f32 * 12.9898).sin() * 3.0).collect(),
            (0..96).map(|i| 100.0 + (i as f32 * 0.7).cos()).collect(),
            (0..96).map(|i| if i == 40 { -7.0 } else { 1e-3 * i as f32 }).collect(),
        ];
        for row in &rows {
            for (ty, step) in [
                (KvType::Q8_0, 1.0 / 127.0),
                (KvType::Q5_0, 1.0 / 15.0),
                (KvType::Q4_0, 1.0 / 7.0),
                (KvType::Iq4Nl, 24.0 / 113.0),
            ] {
                for (x, back) in row.chunks(32).zip(round_trip(ty, row).chunks(32)) {
                    let most = x.iter().fold(0.0f32, |most, x| most.max(x.abs()));
                    for (x, back) in x.iter().zip(back) {
                        // Half a step inside the grid, and a whole one at the short end of a grid with an odd level.
                        let odd = if x.abs() > 0.8 * most { 1.0 } else { 0.51 };
                        assert!((x - back).abs() <= odd * step * most, "{ty}: {x} came back as {back}");
                    }
                }
            }
            for (x, back) in row.chunks(32).zip(round_trip(KvType::Q4_1, row).chunks(32)) {
                let (min, max) = x.iter().fold((f32::MAX, f32::MIN), |(a, b), x| (a.min(*x), b.max(*x)));
                let off = (max - min) / 15.0 * 0.51 + 1e-3 * max.abs().max(min.abs());
                assert!(x.iter().zip(back).all(|(x, back)| (x - back).abs() <= off), "q4_1: {x:?} {back:?}");
            }
        }
    }

    #[test]
    fn zeros_stay_and_what_is_not_finite_does_not_spread() {
        for ty in KvType::ALL {
            assert_eq!(round_trip(ty, &[0.0; 32]), [0.0; 32], "{ty}");
        }
        for ty in KvType::ALL.into_iter().filter(|ty| ty.ggml().block_len() > 1) {
            let mut row = [0.5; 32];
            (row[3], row[4]) = (f32::NAN, f32::INFINITY);
            assert!(round_trip(ty, &row).iter().all(|x| x.is_finite()), "{ty}");
        }
    }

    #[test]
    fn names_are_read_back_and_others_list_them() {
        for ty in KvType::ALL {
            assert_eq!(ty.to_string().parse(), Ok(ty));
        }
        let error = "q3_k".parse::<KvType>().unwrap_err();
        assert_eq!(error, "expected one of f32, f16, bf16, q8_0, q5_0, q4_1, q4_0, iq4_nl, found `q3_k`");
    }
}
