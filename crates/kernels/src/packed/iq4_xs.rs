//! IQ4_XS, packed: the nibbles of IQ4_NL under signed bytes as scales of sub-blocks. 4.375 bits a weight, 4.25 in the file.

use paceline_gguf::GgmlType;

use super::Grain;
use super::format::{IntFormat, PackedFormat, RowBlocks, SUB};
#[cfg(target_arch = "x86_64")]
use super::isa::Isa;
use super::{iq4_nl, planes, q4_0};

pub const FORMAT: PackedFormat = PackedFormat::of::<Iq4Xs>();

struct Iq4Xs;

impl IntFormat for Iq4Xs {
    const TY: GgmlType = GgmlType::IQ4_XS;
    const GRAIN: Grain = Grain::Per256;
    const STEP: usize = 32;
    const MAX: u8 = 255;
    const OFFSET: i32 = 128;
    const SUB_BYTES: usize = planes::NIBBLES;
    const MINS: bool = false;

    fn read(source: &[u8], row: &mut RowBlocks) {
        let [d0, d1, h0, h1, low @ ..] = source.first_chunk::<136>().expect("a block");
        row.d[0] = [*d0, *d1];
        let high = u16::from_le_bytes([*h0, *h1]);
        let (low, codes) = low.split_at(4);
        for s in 0..8 {
            let scale = (low[s / 2] >> (s % 2 * 4) & 15) | ((high >> (2 * s) & 3) << 4) as u8;
            row.scales[s] = scale as i8 - 32;
            row.codes[s] = q4_0::halves(&codes[16 * s..]);
        }
    }

    fn put(codes: &[u8; SUB], row: usize, lines: &mut [u8]) {
        planes::put_nibbles(codes, row, lines);
    }

    fn code(lines: &[u8], row: usize, n: usize) -> i32 {
        iq4_nl::level(lines, row, n)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn operand<V: Isa>(lines: *const u8, i: usize) -> V::Int {
        // SAFETY: by contract.
        unsafe { iq4_nl::level_operand::<V>(lines, i) }
    }
}
