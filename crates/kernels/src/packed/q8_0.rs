//! Q8_0, packed: whole bytes, the code plus 128. 8.5 bits a weight.

use paceline_gguf::GgmlType;

use super::Grain;
use super::format::{IntFormat, PackedFormat, RowBlocks, SUB};
#[cfg(target_arch = "x86_64")]
use super::isa::Isa;
use super::planes;

pub const FORMAT: PackedFormat = PackedFormat::of::<Q8_0>();

struct Q8_0;

impl IntFormat for Q8_0 {
    const TY: GgmlType = GgmlType::Q8_0;
    const GRAIN: Grain = Grain::Per32;
    const STEP: usize = 32;
    const MAX: u8 = 255;
    const OFFSET: i32 = 128;
    const SUB_BYTES: usize = 512;
    const MINS: bool = false;

    fn read(source: &[u8], row: &mut RowBlocks) {
        for (s, block) in source.as_chunks::<34>().0.iter().enumerate() {
            let [d0, d1, codes @ ..] = block;
            row.d[s] = [*d0, *d1];
            row.codes[s] = codes.map(|code| code ^ 0x80);
        }
    }

    fn put(codes: &[u8; SUB], row: usize, lines: &mut [u8]) {
        planes::put_bytes(codes, row, lines);
    }

    fn code(lines: &[u8], row: usize, n: usize) -> i32 {
        i32::from(planes::byte(lines, row, n)) - 128
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn operand<V: Isa>(lines: *const u8, i: usize) -> V::Int {
        // SAFETY: by contract.
        unsafe { planes::byte_operand::<V>(lines, i) }
    }
}
