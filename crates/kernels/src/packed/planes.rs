//! How the codes of sixteen rows share the 64-byte lines of a tile.
//!
//! A *sub-block* is 32 inputs of the sixteen rows. Kernels consume it as eight *operands*: operand `i` holds inputs
//! `4i..4i+4` in the four bytes of lane `r` for each row `r`. Codes of less than eight bits are cut into planes:
//!
//! * **nibbles**, four lines: the low halves of line `j` are operand `2j`, the high halves operand `2j+1`;
//! * **one more bit**, one line: bit `i` of each byte belongs to operand `i`;
//! * **two more bits**, two lines: bits `2p` and `2p+1` of line `l` belong to operand `4l+p`.

use super::format::SUB;
#[cfg(target_arch = "x86_64")]
use super::isa::Isa;

/// Bytes of the nibbles of a sub-block.
pub const NIBBLES: usize = 256;

/// `byte >> shift & mask` of each byte, eight at a time.
///
/// As a loop over bytes this is at the mercy of the vectoriser, which at times makes it ten times slower.
#[inline(always)]
pub fn bits<const N: usize>(bytes: &[u8], shift: usize, mask: u8) -> [u8; N] {
    const { assert!(N.is_multiple_of(8)) };
    let mut out = [0; N];
    let mask = u64::from_le_bytes([mask; 8]);
    for (out, bytes) in out.as_chunks_mut::<8>().0.iter_mut().zip(bytes[..N].as_chunks::<8>().0) {
        *out = (u64::from_le_bytes(*bytes) >> shift & mask).to_le_bytes();
    }
    out
}

/// `low | high << 4` of each byte; `high` has no bits above its low four.
#[inline(always)]
pub fn join(low: [u8; SUB], high: [u8; SUB]) -> [u8; SUB] {
    let mut out = low;
    for (out, high) in out.as_chunks_mut::<8>().0.iter_mut().zip(high.as_chunks::<8>().0) {
        *out = (u64::from_le_bytes(*out) | u64::from_le_bytes(*high) << 4).to_le_bytes();
    }
    out
}

/// Adds a row's codes to a sub-block of whole bytes: `codes[n]` in line `n/4`.
pub fn put_bytes(codes: &[u8; 32], row: usize, lines: &mut [u8]) {
    for (line, codes) in lines.as_chunks_mut::<64>().0.iter_mut().zip(codes.as_chunks::<4>().0) {
        line[4 * row..4 * row + 4].copy_from_slice(codes);
    }
}

/// Adds the low four bits of a row's codes.
pub fn put_nibbles(codes: &[u8; 32], row: usize, lines: &mut [u8]) {
    let words = words(codes).map(|word| word & 0x0f0f_0f0f);
    for (line, pair) in lines.as_chunks_mut::<64>().0.iter_mut().zip(words.as_chunks::<2>().0) {
        line[4 * row..4 * row + 4].copy_from_slice(&(pair[0] | pair[1] << 4).to_le_bytes());
    }
}

/// Adds bits 4 of a row's codes.
pub fn put_one_bit(codes: &[u8; 32], row: usize, lines: &mut [u8]) {
    let bits =
        words(codes).iter().enumerate().fold(0, |bits, (i, word)| bits | (word >> 4 & 0x0101_0101) << i);
    lines[4 * row..4 * row + 4].copy_from_slice(&bits.to_le_bytes());
}

/// Adds bits 4 and 5 of a row's codes.
pub fn put_two_bits(codes: &[u8; 32], row: usize, lines: &mut [u8]) {
    let words = words(codes);
    for (line, words) in lines.as_chunks_mut::<64>().0.iter_mut().zip(words.as_chunks::<4>().0) {
        let bits =
            words.iter().enumerate().fold(0, |bits, (p, word)| bits | (word >> 4 & 0x0303_0303) << (2 * p));
        line[4 * row..4 * row + 4].copy_from_slice(&bits.to_le_bytes());
    }
}

fn words(codes: &[u8; 32]) -> [u32; 8] {
    let words = codes.as_chunks::<4>().0;
    std::array::from_fn(|i| u32::from_le_bytes(words[i]))
}

/// Code `n` of a row in a sub-block of whole bytes.
pub fn byte(lines: &[u8], row: usize, n: usize) -> u8 {
    lines[64 * (n / 4) + 4 * row + n % 4]
}

/// The low four bits of code `n` of a row.
pub fn nibble(lines: &[u8], row: usize, n: usize) -> u8 {
    lines[64 * (n / 8) + 4 * row + n % 4] >> (n / 4 % 2 * 4) & 15
}

/// Bit 4 of code `n` of a row, in its place.
pub fn one_bit(lines: &[u8], row: usize, n: usize) -> u8 {
    (lines[4 * row + n % 4] >> (n / 4) & 1) << 4
}

/// Bits 4 and 5 of code `n` of a row, in their place.
pub fn two_bits(lines: &[u8], row: usize, n: usize) -> u8 {
    (lines[64 * (n / 16) + 4 * row + n % 4] >> (n / 4 % 4 * 2) & 3) << 4
}

/// Operand `i` of a sub-block of whole bytes.
///
/// # Safety
/// For this and the next three: this CPU has the instructions of `V`, and the lines of the sub-block are readable.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub unsafe fn byte_operand<V: Isa>(lines: *const u8, i: usize) -> V::Int {
    // SAFETY: `i` is below 8, so the line is one of the sub-block's; by contract.
    unsafe { V::load(lines.add(64 * i)) }
}

/// The nibbles of operand `i`.
///
/// # Safety
/// As for [`byte_operand`].
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub unsafe fn nibble_operand<V: Isa>(lines: *const u8, i: usize) -> V::Int {
    // SAFETY: by contract.
    unsafe {
        let line = V::load(lines.add(64 * (i / 2)));
        V::and(if i.is_multiple_of(2) { line } else { V::shift(line, -4) }, V::splat_8(15))
    }
}

/// Bit 4 of operand `i`, in its place.
///
/// # Safety
/// As for [`byte_operand`].
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub unsafe fn one_bit_operand<V: Isa>(lines: *const u8, i: usize) -> V::Int {
    // SAFETY: by contract. The shift moves 16-bit lanes; what crosses bytes is masked away.
    unsafe { V::and(V::shift(V::load(lines), 4 - i as i32), V::splat_8(1 << 4)) }
}

/// Bits 4 and 5 of operand `i`, in their place.
///
/// # Safety
/// As for [`byte_operand`].
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub unsafe fn two_bits_operand<V: Isa>(lines: *const u8, i: usize) -> V::Int {
    // SAFETY: by contract. As above.
    unsafe { V::and(V::shift(V::load(lines.add(64 * (i / 4))), 4 - 2 * (i as i32 % 4)), V::splat_8(3 << 4)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_those_of_each_byte() {
        let bytes: [u8; 32] = std::array::from_fn(|n| (n * 83 + 7) as u8);
        for (shift, mask) in [(0, 15), (4, 15), (7, 1), (6, 3), (2, 3)] {
            assert_eq!(bits::<32>(&bytes, shift, mask), bytes.map(|byte| byte >> shift & mask));
        }
        let (low, high) = (bits(&bytes, 0, 15), bits(&bytes, 3, 3));
        assert_eq!(join(low, high), std::array::from_fn(|n| low[n] | high[n] << 4));
    }

    #[test]
    fn what_is_put_is_found() {
        let code = |row: usize, n: usize| (row * 37 + n * 101 + n / 3) as u8;
        let (mut bytes, mut low, mut one, mut two) = ([0; 512], [0; 256], [0; 64], [0; 128]);
        for row in 0..16 {
            let codes = std::array::from_fn(|n| code(row, n));
            put_bytes(&codes, row, &mut bytes);
            put_nibbles(&codes, row, &mut low);
            put_one_bit(&codes, row, &mut one);
            put_two_bits(&codes, row, &mut two);
        }
        for (row, n) in (0..16).flat_map(|row| (0..32).map(move |n| (row, n))) {
            let code = code(row, n);
            assert_eq!(byte(&bytes, row, n), code);
            assert_eq!(nibble(&low, row, n), code & 15);
            assert_eq!(one_bit(&one, row, n), code & 16);
            assert_eq!(two_bits(&two, row, n), code & 48);
        }
    }
}
