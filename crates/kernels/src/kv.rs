//! Cells of the KV cache: where a head's keys and values lie, and how a row gets there.
//!
//! A page holds some cells; a cell holds, for each KV head, a slice of `head_dim` values:
//!
//! ```text
//! cell c, head h  =  data[c · stride + offset ..][.. head_dim]        offset = h · head_dim
//! ```
//!
//! Any layout with a constant distance between cells fits. Values are f32, or f16 at half the
//! bytes, rounded to nearest even; everything that reads f16 widens it first.

use half::f16;
use half::slice::HalfFloatSliceExt;

/// The storage of one page's keys or values.
#[derive(Clone, Copy, Debug)]
pub enum KvData<'a> {
    /// Full precision.
    F32(&'a [f32]),
    /// Half precision.
    F16(&'a [f16]),
}

/// One head's keys, or values, of all cells of a page.
#[derive(Clone, Copy, Debug)]
pub struct KvRows<'a> {
    /// The page.
    pub data: KvData<'a>,
    /// Elements from one cell to the next.
    pub stride: usize,
    /// Elements from the start of a cell to the head.
    pub offset: usize,
}

/// Storage to write a row to.
#[derive(Debug)]
pub enum KvDataMut<'a> {
    /// Full precision.
    F32(&'a mut [f32]),
    /// Half precision.
    F16(&'a mut [f16]),
}

/// Writes a row to the cell's storage, which has its length.
pub fn write_row(row: &[f32], cell: KvDataMut<'_>) {
    match cell {
        KvDataMut::F32(cell) => cell.copy_from_slice(row),
        KvDataMut::F16(cell) => cell.convert_from_f32_slice(row),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_written_as_they_are_or_to_nearest_even() {
        // 1 + 2^-11 lies between two halves, the even one is 1; the rest is exact or overflows.
        let row = [1.0 + 0.5f32.powi(11), 1.0 + 3.0 * 0.5f32.powi(11), -0.1, 65504.0, 1e6];
        let mut exact = [0.0; 5];
        write_row(&row, KvDataMut::F32(&mut exact));
        assert_eq!(exact, row);
        let mut halves = [f16::ZERO; 5];
        write_row(&row, KvDataMut::F16(&mut halves));
        assert_eq!(halves.map(f16::to_bits), [0x3c00, 0x3c02, 0xae66, 0x7bff, 0x7c00]);
    }
}
