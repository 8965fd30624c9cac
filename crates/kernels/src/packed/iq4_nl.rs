//! IQ4_NL, packed: nibbles that index the levels, widened by a shuffle. 4.5 bits a weight.

use paceline_gguf::GgmlType;

use super::Grain;
use super::format::{IntFormat, PackedFormat, RowBlocks, SUB};
#[cfg(target_arch = "x86_64")]
use super::isa::Isa;
use super::{planes, q4_0};
use crate::formats::iq4_nl::LEVELS;

pub const FORMAT: PackedFormat = PackedFormat::of::<Iq4Nl>();

/// The level of each code, plus 128.
const OPERANDS: [u8; 16] = {
    let mut operands = [0; 16];
    let mut i = 0;
    while i < 16 {
        operands[i] = (LEVELS[i] + 128.0) as u8;
        i += 1;
    }
    operands
};

struct Iq4Nl;

impl IntFormat for Iq4Nl {
    const TY: GgmlType = GgmlType::IQ4_NL;
    const GRAIN: Grain = Grain::Per32;
    const STEP: usize = 32;
    const MAX: u8 = 255;
    const OFFSET: i32 = 128;
    const SUB_BYTES: usize = planes::NIBBLES;
    const MINS: bool = false;

    fn read(source: &[u8], row: &mut RowBlocks) {
        for (s, block) in source.as_chunks::<18>().0.iter().enumerate() {
            row.d[s] = [block[0], block[1]];
            row.codes[s] = q4_0::halves(&block[2..]);
        }
    }

    fn put(codes: &[u8; SUB], row: usize, lines: &mut [u8]) {
        planes::put_nibbles(codes, row, lines);
    }

    fn code(lines: &[u8], row: usize, n: usize) -> i32 {
        level(lines, row, n)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn operand<V: Isa>(lines: *const u8, i: usize) -> V::Int {
        // SAFETY: by contract.
        unsafe { level_operand::<V>(lines, i) }
    }
}

/// The level of code `n` of a row of a sub-block.
pub fn level(lines: &[u8], row: usize, n: usize) -> i32 {
    LEVELS[usize::from(planes::nibble(lines, row, n))] as i32
}

/// Operand `i` of a sub-block: levels plus 128.
///
/// # Safety
/// As for [`IntFormat::operand`].
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub unsafe fn level_operand<V: Isa>(lines: *const u8, i: usize) -> V::Int {
    // SAFETY: by contract.
    unsafe { V::look_up(&OPERANDS, planes::nibble_operand::<V>(lines, i)) }
}
