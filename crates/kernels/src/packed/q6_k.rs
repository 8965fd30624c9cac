//! Q6_K, packed: nibbles, two lines with the other two bits, signed scales for sixteen weights. 6.625 bits a weight, 6.5625 in
//! the file.

use paceline_gguf::GgmlType;

use super::Grain;
use super::format::{IntFormat, PackedFormat, RowBlocks, SUB};
#[cfg(target_arch = "x86_64")]
use super::isa::Isa;
use super::planes;

pub const FORMAT: PackedFormat = PackedFormat::of::<Q6K>();

struct Q6K;

impl IntFormat for Q6K {
    const TY: GgmlType = GgmlType::Q6_K;
    const GRAIN: Grain = Grain::Per256;
    const STEP: usize = 16;
    const MAX: u8 = 63;
    const OFFSET: i32 = 32;
    const SUB_BYTES: usize = planes::NIBBLES + 128;
    const MINS: bool = false;

    fn read(source: &[u8], row: &mut RowBlocks) {
        let block: &[u8; 210] = source.first_chunk().expect("a block");
        row.d[0] = [block[208], block[209]];
        for (scale, byte) in row.scales.iter_mut().zip(&block[192..208]) {
            *scale = *byte as i8;
        }
        for (s, codes) in row.codes.iter_mut().enumerate() {
            let (half, k) = (s / 4, s % 4);
            let low = planes::bits(&block[64 * half + 32 * (k % 2)..], k / 2 * 4, 15);
            *codes = planes::join(low, planes::bits(&block[128 + 32 * half..], 2 * k, 3));
        }
    }

    fn put(codes: &[u8; SUB], row: usize, lines: &mut [u8]) {
        let (low, high) = lines.split_at_mut(planes::NIBBLES);
        planes::put_nibbles(codes, row, low);
        planes::put_two_bits(codes, row, high);
    }

    fn code(lines: &[u8], row: usize, n: usize) -> i32 {
        let (low, high) = lines.split_at(planes::NIBBLES);
        i32::from(planes::nibble(low, row, n) | planes::two_bits(high, row, n)) - 32
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn operand<V: Isa>(lines: *const u8, i: usize) -> V::Int {
        // SAFETY: by contract.
        unsafe {
            V::or(
                planes::nibble_operand::<V>(lines, i),
                planes::two_bits_operand::<V>(lines.add(planes::NIBBLES), i),
            )
        }
    }
}
