//! Q4_K, packed: nibbles, scales and offsets of sub-blocks widened from six bits to bytes. 4.625 bits a weight, 4.5 in the
//! file.

use paceline_gguf::GgmlType;

use super::Grain;
use super::format::{IntFormat, PackedFormat, RowBlocks, SUB};
#[cfg(target_arch = "x86_64")]
use super::isa::Isa;
use super::planes;
use crate::formats::q4_k::unpack_scales;

pub const FORMAT: PackedFormat = PackedFormat::of::<Q4K>();

struct Q4K;

impl IntFormat for Q4K {
    const TY: GgmlType = GgmlType::Q4_K;
    const GRAIN: Grain = Grain::Per256;
    const STEP: usize = 32;
    const MAX: u8 = 15;
    const OFFSET: i32 = 0;
    const SUB_BYTES: usize = planes::NIBBLES;
    const MINS: bool = true;

    fn read(source: &[u8], row: &mut RowBlocks) {
        let codes = read_scales(source, row);
        read_nibbles(codes, row);
    }

    fn put(codes: &[u8; SUB], row: usize, lines: &mut [u8]) {
        planes::put_nibbles(codes, row, lines);
    }

    fn code(lines: &[u8], row: usize, n: usize) -> i32 {
        i32::from(planes::nibble(lines, row, n))
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn operand<V: Isa>(lines: *const u8, i: usize) -> V::Int {
        // SAFETY: by contract.
        unsafe { planes::nibble_operand::<V>(lines, i) }
    }
}

/// The scales at the head of a block, which Q5_K has too; the bytes after them.
pub fn read_scales<'a>(source: &'a [u8], row: &mut RowBlocks) -> &'a [u8] {
    let ([d0, d1, m0, m1, packed @ ..], codes) = source.split_first_chunk::<16>().expect("a block");
    row.d[0] = [*d0, *d1];
    row.d_min = [*m0, *m1];
    let (scales, mins) = unpack_scales(packed);
    row.scales[..8].copy_from_slice(&scales.map(|scale| scale as i8)); // six bits
    row.mins = mins;
    codes
}

/// The low four bits: 32 bytes hold two sub-blocks.
pub fn read_nibbles(qs: &[u8], row: &mut RowBlocks) {
    for (qs, codes) in qs.as_chunks::<32>().0.iter().zip(row.codes.as_chunks_mut::<2>().0) {
        *codes = [planes::bits(qs, 0, 15), planes::bits(qs, 4, 15)];
    }
}
