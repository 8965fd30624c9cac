//! Q5_K, packed: the nibbles of Q4_K and a line of fifth bits for each sub-block. 5.625 bits a weight, 5.5 in the file.

use paceline_gguf::GgmlType;

use super::Grain;
use super::format::{IntFormat, PackedFormat, RowBlocks, SUB};
#[cfg(target_arch = "x86_64")]
use super::isa::Isa;
use super::{planes, q4_k};

pub const FORMAT: PackedFormat = PackedFormat::of::<Q5K>();

struct Q5K;

impl IntFormat for Q5K {
    const TY: GgmlType = GgmlType::Q5_K;
    const GRAIN: Grain = Grain::Per256;
    const STEP: usize = 32;
    const MAX: u8 = 31;
    const OFFSET: i32 = 0;
    const SUB_BYTES: usize = planes::NIBBLES + 64;
    const MINS: bool = true;

    fn read(source: &[u8], row: &mut RowBlocks) {
        let (high, low) = q4_k::read_scales(source, row).split_at(32);
        q4_k::read_nibbles(low, row);
        for (s, codes) in row.codes.iter_mut().enumerate() {
            *codes = planes::join(*codes, planes::bits(high, s, 1));
        }
    }

    fn put(codes: &[u8; SUB], row: usize, lines: &mut [u8]) {
        let (low, high) = lines.split_at_mut(planes::NIBBLES);
        planes::put_nibbles(codes, row, low);
        planes::put_one_bit(codes, row, high);
    }

    fn code(lines: &[u8], row: usize, n: usize) -> i32 {
        let (low, high) = lines.split_at(planes::NIBBLES);
        i32::from(planes::nibble(low, row, n) | planes::one_bit(high, row, n))
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn operand<V: Isa>(lines: *const u8, i: usize) -> V::Int {
        // SAFETY: by contract.
        unsafe {
            V::or(
                planes::nibble_operand::<V>(lines, i),
                planes::one_bit_operand::<V>(lines.add(planes::NIBBLES), i),
            )
        }
    }
}
