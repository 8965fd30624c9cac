//! Q4_0, packed: nibbles. 4.5 bits a weight.

use paceline_gguf::GgmlType;

use super::Grain;
use super::format::{IntFormat, PackedFormat, RowBlocks, SUB};
#[cfg(target_arch = "x86_64")]
use super::isa::Isa;
use super::planes;

pub const FORMAT: PackedFormat = PackedFormat::of::<Q4_0>();

struct Q4_0;

impl IntFormat for Q4_0 {
    const TY: GgmlType = GgmlType::Q4_0;
    const GRAIN: Grain = Grain::Per32;
    const STEP: usize = 32;
    const MAX: u8 = 15;
    const OFFSET: i32 = 8;
    const SUB_BYTES: usize = planes::NIBBLES;
    const MINS: bool = false;

    fn read(source: &[u8], row: &mut RowBlocks) {
        for (s, block) in source.as_chunks::<18>().0.iter().enumerate() {
            row.d[s] = [block[0], block[1]];
            row.codes[s] = halves(&block[2..]);
        }
    }

    fn put(codes: &[u8; SUB], row: usize, lines: &mut [u8]) {
        planes::put_nibbles(codes, row, lines);
    }

    fn code(lines: &[u8], row: usize, n: usize) -> i32 {
        i32::from(planes::nibble(lines, row, n)) - 8
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn operand<V: Isa>(lines: *const u8, i: usize) -> V::Int {
        // SAFETY: by contract.
        unsafe { planes::nibble_operand::<V>(lines, i) }
    }
}

/// The 32 nibbles of a block of this format and its relatives: the low halves of sixteen bytes, then the high ones.
pub fn halves(qs: &[u8]) -> [u8; 32] {
    let mut codes = [0; 32];
    codes[..16].copy_from_slice(&planes::bits::<16>(qs, 0, 15));
    codes[16..].copy_from_slice(&planes::bits::<16>(qs, 4, 15));
    codes
}
