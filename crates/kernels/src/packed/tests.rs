//! What holds for every packed format, instruction set and shape.

use std::sync::atomic::{AtomicUsize, Ordering};

use paceline_gguf::GgmlType;
use proptest::prelude::*;

use super::*;
use crate::formats::{format as file_format, quantize_rows};
use crate::{SharedMut, Team};

/// Numbers between -1 and 1 that look random, some of them ten times larger.
fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next() * if next() > 0.9 { 10.0 } else { 1.0 }).collect()
}

/// Weights `[n_out, n_in]` of any format, cheaply: random bytes under scales of about `2^-6`.
fn random_weights(ty: GgmlType, n_in: usize, n_out: usize, seed: u64) -> Vec<u8> {
    let values = noise(n_in * n_out, seed);
    if !ty.is_quantized() {
        return quantize_rows(ty, n_in, &values);
    }
    let mut bytes = vec![0; n_in * n_out / ty.block_len() * ty.block_bytes()];
    let mut bits = values.iter().map(|x| x.to_bits() >> 3);
    for block in bytes.chunks_exact_mut(ty.block_bytes()) {
        block.iter_mut().for_each(|byte| *byte = bits.next().unwrap_or(0x5a) as u8);
        let halves: &[usize] = match ty {
            GgmlType::Q6_K => &[208],
            GgmlType::Q4_K | GgmlType::Q5_K => &[0, 2],
            _ => &[0],
        };
        // Exponents 2^-7 and 2^-6, any mantissa, any sign.
        halves.iter().for_each(|at| block[at + 1] = block[at + 1] & 0x87 | 0x20);
    }
    bytes
}

struct Case {
    ty: GgmlType,
    n_in: usize,
    n_out: usize,
    bytes: Vec<u8>,
    packed: PackedMatrix,
    x: Vec<f32>,
}

impl Case {
    /// `n_in` is rounded up to whole quant blocks.
    fn new(ty: GgmlType, n_in: usize, n_out: usize, n: usize, seed: u64) -> Self {
        let n_in = n_in.next_multiple_of(ty.block_len());
        let bytes = random_weights(ty, n_in, n_out, seed);
        let packed = pack(ty, &bytes, n_in, n_out, &Team::new(2), &|_| ()).unwrap().unwrap();
        Self { ty, n_in, n_out, bytes, packed, x: noise(n * n_in, seed + 1) }
    }

    fn rows(&self, table: &PackedTable, x: &[f32]) -> QuantRows {
        let mut rows = QuantRows::new();
        rows.quantize_rows(table, self.packed.grain(), x, x.len() / self.n_in, self.n_in);
        rows
    }

    fn product(&self, table: &PackedTable, x: &[f32]) -> Vec<f32> {
        let rows = self.rows(table, x);
        let mut out = vec![f32::NAN; rows.n() * self.n_out];
        table.product(&self.packed, 0..self.packed.n_groups(), &rows, &mut out);
        out
    }

    /// Every instruction set gives the scalar twin's bits, whatever number of columns and rows take part.
    fn check_bits(&self, n_columns: impl IntoIterator<Item = usize>) {
        let scalar = &PackedTable::available()[0];
        let want = self.product(scalar, &self.x);
        let n_columns: Vec<usize> = n_columns.into_iter().collect();
        for table in &PackedTable::available()[1..] {
            let at = |n: usize| format!("{} {} [{}, {}] n {n}", table.isa, self.ty, self.n_out, self.n_in);
            for &n in &n_columns {
                let got = self.product(table, &self.x[..n * self.n_in]);
                assert_same(&got, &want[..n * self.n_out], &at(n));
            }
            let rows = self.rows(table, &self.x);
            let n_groups = self.packed.n_groups();
            for (start, end) in [(0, n_groups / 2), (n_groups / 2, n_groups), (n_groups - 1, n_groups)] {
                let m = (32 * end).min(self.n_out) - 32 * start;
                let mut out = vec![f32::NAN; rows.n() * m];
                table.product(&self.packed, start..end, &rows, &mut out);
                for (c, out) in out.chunks(m.max(1)).enumerate() {
                    let want = &want[c * self.n_out + 32 * start..][..m];
                    assert_same(out, want, &at(rows.n()));
                }
            }
        }
    }

    /// The product with the values that the quantised activations stand for, in f64.
    fn check_values(&self) {
        let scalar = &PackedTable::available()[0];
        let rows = self.rows(scalar, &self.x);
        let got = self.product(scalar, &self.x);
        let (mut w, mut x) = (vec![0.0; self.n_in * self.n_out], vec![0.0; self.n_in]);
        (file_format(self.ty).unwrap().dequantize)(&self.bytes, &mut w);
        for c in 0..rows.n() {
            rows.dequantize_row(c, &mut x);
            for (r, w) in w.chunks(self.n_in).enumerate() {
                let widest = w.iter().fold(0.0f32, |max, w| max.max(w.abs()));
                let products = w.iter().zip(&x).map(|(w, x)| f64::from(*w) * f64::from(*x));
                let size: f64 = x.iter().map(|x| f64::from(x.abs() * widest)).sum();
                let (want, got): (f64, f64) = (products.sum(), got[c * self.n_out + r].into());
                assert!((want - got).abs() <= 2e-6 * size, "{} out {c} {r}: {got} != {want}", self.ty);
            }
        }
    }
}

#[track_caller]
fn assert_same(got: &[f32], want: &[f32], at: &str) {
    assert_eq!(got.len(), want.len(), "{at}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!(got.to_bits() == want.to_bits(), "{at}: output {i} is {got}, not {want}");
    }
}

#[test]
fn every_number_of_columns_gives_the_scalar_bits() {
    for (seed, format) in FORMATS.iter().enumerate() {
        Case::new(format.ty, 300, 69, 33, seed as u64).check_bits(1..=33);
    }
}

#[test]
fn many_columns_and_many_groups() {
    for (seed, format) in FORMATS.iter().enumerate() {
        let case = Case::new(format.ty, 520, 32 * 9 + 1, 70, seed as u64);
        let n_near = (1..=9).filter(|n| n * case.packed.group_bytes() <= 256 << 10).count();
        assert!(n_near > 1, "several groups, several sweeps");
        case.check_bits([34, 64, 65, 70]);
    }
}

#[test]
fn every_format_matches_f64() {
    for (seed, format) in FORMATS.iter().enumerate() {
        for (n_in, n_out, n) in [(32, 1, 1), (256, 16, 2), (1000, 51, 3)] {
            Case::new(format.ty, n_in, n_out, n, seed as u64).check_values();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn any_shape(
        format in 0..FORMATS.len(), n_in in 1..700usize, n_out in 1..120usize, n in 1..12usize, seed: u32
    ) {
        let case = Case::new(FORMATS[format].ty, n_in, n_out, n, seed.into());
        case.check_bits([1, n]);
        case.check_values();
    }

    #[test]
    fn codes_are_the_nearest_and_the_same_on_every_instruction_set(
        n_in in 1..600usize, scale in -30..30i32, seed: u32
    ) {
        let x: Vec<f32> = noise(2 * n_in, seed.into()).iter().map(|x| x * 2f32.powi(scale)).collect();
        for grain in [Grain::F32, Grain::Per32, Grain::Per256] {
            let quantized = |table| {
                let mut rows = QuantRows::new();
                rows.quantize_rows(table, grain, &x, 2, n_in);
                rows
            };
            let scalar = quantized(&PackedTable::available()[0]);
            for table in PackedTable::available() {
                let same = quantized(table).blocks().iter().zip(scalar.blocks()).all(|(a, b)| a.0 == b.0);
                prop_assert!(same, "{} {grain:?}", table.isa);
            }
            let len = match grain { Grain::F32 => 1, Grain::Per32 => 32, Grain::Per256 => 256 };
            let mut values = vec![0.0; n_in];
            for (row, x) in x.chunks(n_in).enumerate() {
                scalar.dequantize_row(row, &mut values);
                for (x, values) in x.chunks(len).zip(values.chunks(len)) {
                    let d = x.iter().fold(0.0f32, |max, x| max.max(x.abs())) / 127.0;
                    let bound = if grain == Grain::F32 { 0.0 } else { 0.50001 * d };
                    let near = x.iter().zip(values).all(|(x, value)| (x - value).abs() <= bound);
                    prop_assert!(near, "{grain:?} {x:?} {values:?}");
                }
            }
        }
    }
}

/// The notes of a block are those of its codes.
#[test]
fn sums_in_blocks_are_right() {
    let x = noise(256, 3);
    let mut rows = QuantRows::new();
    let sum = |block: &ActBlock, range: std::ops::Range<usize>| range.map(|i| block.code(i)).sum::<i32>();
    for grain in [Grain::Per32, Grain::Per256] {
        rows.quantize_rows(&PackedTable::available()[0], grain, &x, 1, 256);
        let block = &rows.blocks()[0];
        for s in 0..8 {
            let sum_32 = sum(block, 32 * s..32 * s + 32);
            assert_eq!(block.0[rows::MINUS_128 + s] as i32, -128 * sum_32);
            if grain == Grain::Per32 {
                assert_eq!(block.0[rows::MINUS_8 + s] as i32, -8 * sum_32);
            } else {
                assert_eq!((block.0[rows::SUMS + s / 2] >> (16 * (s % 2))) as i16, sum_32 as i16);
                for i in [2 * s, 2 * s + 1] {
                    assert_eq!(block.0[rows::MINUS_32 + i] as i32, -32 * sum(block, 16 * i..16 * i + 16));
                }
            }
        }
    }
}

/// The largest codes and the smallest, all of one sign: no sum on its way may run out of bits.
#[test]
fn extreme_codes_are_summed_exactly() {
    for ty in FORMATS.iter().map(|format| format.ty).filter(|ty| ty.is_quantized()) {
        for byte in [0xff, 0x80, 0x7f, 0x00] {
            let mut case = Case::new(ty, 512, 33, 5, 1);
            for (block, random) in case
                .bytes
                .chunks_exact_mut(ty.block_bytes())
                .zip(random_weights(ty, 512, 33, 2).chunks_exact(ty.block_bytes()))
            {
                block.fill(byte);
                // Ordinary scales in half precision; where others would be is of no matter.
                let ends = if ty == GgmlType::Q6_K { 208..210 } else { 0..2 };
                block[ends.clone()].copy_from_slice(&random[ends]);
                if matches!(ty, GgmlType::Q4_K | GgmlType::Q5_K) {
                    block[2..4].copy_from_slice(&random[2..4]);
                }
            }
            case.packed = pack(ty, &case.bytes, 512, 33, &Team::new(1), &|_| ()).unwrap().unwrap();
            for x in [1.0, -1.0] {
                case.x.fill(x);
                case.check_bits([1, 2, 3, 5]);
                case.check_values();
            }
        }
    }
}

#[test]
fn nan_and_infinity_reach_the_outputs_of_their_column_and_no_other() {
    for format in FORMATS {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut case = Case::new(format.ty, 512, 20, 3, 1);
            let clean = case.x.clone();
            let at = case.n_in + 300;
            case.x[at] = bad;
            for table in PackedTable::available() {
                let (good, got) = (case.product(table, &clean), case.product(table, &case.x));
                for (c, (got, good)) in got.chunks(20).zip(good.chunks(20)).enumerate() {
                    if c == 1 {
                        assert!(got.iter().all(|y| !y.is_finite()), "{} {} {bad}", table.isa, format.ty);
                    } else {
                        assert_same(got, good, table.isa);
                    }
                }
            }
        }
    }
}

#[test]
fn extreme_rows_stay_finite() {
    for x in [[0.0f32; 64], [1e-40; 64], [f32::MIN_POSITIVE; 64], [1e30; 64]] {
        for grain in [Grain::Per32, Grain::Per256] {
            let (mut rows, mut values) = (QuantRows::new(), [1.0; 64]);
            rows.quantize_rows(&PackedTable::available()[0], grain, &x, 1, 64);
            rows.dequantize_row(0, &mut values);
            assert!(values.iter().all(|value| (value - x[0]).abs() <= 1e-36 + x[0] * 1e-6), "{values:?}");
        }
    }
}

#[test]
fn gathered_rows_are_the_rows() {
    let case = Case::new(GgmlType::Q6_K, 512, 20, 5, 9);
    let table = PackedTable::available().last().unwrap();
    let all = case.product(table, &case.x);
    let mut picked = QuantRows::new();
    picked.gather(&case.rows(table, &case.x), [4, 0, 4].into_iter());
    let mut out = vec![f32::NAN; 60];
    table.product(&case.packed, 0..1, &picked, &mut out);
    for (out, row) in out.chunks(20).zip([4, 0, 4]) {
        assert_same(out, &all[20 * row..20 * row + 20], "gathered");
    }
}

#[test]
fn outputs_go_where_they_are_wanted() {
    let case = Case::new(GgmlType::Q8_0, 64, 40, 3, 5);
    for table in PackedTable::available() {
        let want = case.product(table, &case.x);
        let mut out = vec![7.0; 5 + 3 * 100];
        let shared = SharedMut::new(&mut out);
        let rows = case.rows(table, &case.x);
        for groups in [1..2, 0..1] {
            // SAFETY: nobody else has a part of it.
            unsafe { table.product_into(&case.packed, groups, &rows, &shared, 5, 100) };
        }
        for c in 0..3 {
            assert_same(&out[5 + 100 * c..][..40], &want[40 * c..][..40], table.isa);
        }
        assert_eq!(out.iter().filter(|y| **y == 7.0).count(), 5 + 3 * 60);
    }
}

#[test]
fn packing_reports_every_byte_and_leaves_other_types_alone() {
    let (n_in, n_out) = (512, 333);
    let bytes = random_weights(GgmlType::Q4_K, n_in, n_out, 1);
    let read = AtomicUsize::new(0);
    let count = |n: usize| _ = read.fetch_add(n, Ordering::Relaxed);
    let packed = pack(GgmlType::Q4_K, &bytes, n_in, n_out, &Team::new(3), &count).unwrap().unwrap();
    assert_eq!(read.into_inner(), bytes.len());
    assert_eq!((packed.n_in(), packed.n_out(), packed.n_groups()), (n_in, n_out, 11));
    assert_eq!(packed.bytes(), 11 * 2 * 2 * 37 * 64);

    let bytes = vec![0; GgmlType::Q3_K.block_bytes()];
    assert!(pack(GgmlType::Q3_K, &bytes, 256, 1, &Team::new(1), &|_| ()).unwrap().is_none());
    assert_eq!((grain(GgmlType::Q3_K), grain(GgmlType::Q8_0)), (None, Some(Grain::Per32)));
}

#[test]
fn tables_follow_the_instruction_set_that_was_chosen() {
    for table in crate::KernelTable::available() {
        let packed = PackedTable::of(table).isa;
        assert!(packed == table.isa || packed.starts_with("avx2"), "{} for {}", packed, table.isa);
    }
    assert_eq!(PackedTable::of(&crate::scalar::TABLE).isa, "scalar");
}

#[test]
fn no_columns_is_no_output() {
    let case = Case::new(GgmlType::Q4_0, 64, 40, 0, 5);
    for table in PackedTable::available() {
        assert!(case.product(table, &[]).is_empty());
    }
}

/// Why formats of 32 get scales for 32: the activations of a model have channels far larger than the rest.
#[test]
fn finer_scales_are_worth_it_where_there_are_outliers() {
    let error = |grain, outlier: f32| {
        // Sums of eight uniform numbers are close to Gaussian ones.
        let uniform = noise(8 * 256 * 64, 7).into_iter().map(|x| if x.abs() > 1.0 { x / 10.0 } else { x });
        let uniform: Vec<f32> = uniform.collect();
        let sums = uniform.chunks(8).map(|x| x.iter().sum::<f32>()).enumerate();
        let x: Vec<f32> = sums.map(|(i, x)| if i % 100 == 0 { x * outlier } else { x }).collect();
        let (mut rows, mut values) = (QuantRows::new(), vec![0.0; x.len()]);
        rows.quantize_rows(&PackedTable::available()[0], grain, &x, 1, x.len());
        rows.dequantize_row(0, &mut values);
        let square = |x: f32| f64::from(x) * f64::from(x);
        let error: f64 = x.iter().zip(&values).map(|(x, y)| square(x - y)).sum();
        (error / x.iter().map(|x| square(*x)).sum::<f64>()).sqrt()
    };
    let check = |outlier, fine: f64, coarse: f64| {
        let got = (error(Grain::Per32, outlier), error(Grain::Per256, outlier));
        let near = |got: f64, want: f64| (got / want - 1.0).abs() < 0.1;
        assert!(near(got.0, fine) && near(got.1, coarse), "outliers of {outlier}: {got:?}");
    };
    check(1.0, 0.0053, 0.0069);
    check(20.0, 0.0113, 0.0266);
}

#[test]
#[should_panic(expected = "inputs of a packed q4_k matrix")]
fn inputs_of_another_grain_are_refused() {
    let case = Case::new(GgmlType::Q4_K, 256, 3, 1, 1);
    let mut rows = QuantRows::new();
    rows.quantize_rows(&PackedTable::available()[0], Grain::Per32, &case.x, 1, 256);
    PackedTable::available()[0].product(&case.packed, 0..1, &rows, &mut [0.0; 3]);
}

#[test]
#[should_panic(expected = "bytes of q8_0 weights [2, 64]")]
fn weights_of_another_shape_are_refused() {
    let _ = pack(GgmlType::Q8_0, &[0; 68], 64, 2, &Team::new(1), &|_| ());
}

#[test]
fn slabs_are_the_matrices_one_by_one() {
    for (ty, n_in, n_out, n_slab) in [
        (GgmlType::Q4_K, 512, 33, 5),
        (GgmlType::Q8_0, 96, 64, 3),
        (GgmlType::IQ4_NL, 32, 7, 4),
        (GgmlType::F32, 77, 40, 2),
        (GgmlType::BF16, 5, 1, 6),
    ] {
        let team = Team::new(2);
        let read = AtomicUsize::new(0);
        let bytes = random_weights(ty, n_in, n_out * n_slab, 9);
        let count = |n| _ = read.fetch_add(n, Ordering::Relaxed);
        let slabs = pack_slabs(ty, &bytes, [n_in, n_out, n_slab], &team, &count).unwrap().unwrap();
        assert_eq!(read.into_inner(), bytes.len(), "{ty}");
        let table = PackedTable::available().last().unwrap();
        let mut x = QuantRows::new();
        x.quantize_rows(table, slabs.grain(), &noise(3 * n_in, 10), 3, n_in);
        let n_groups = n_out.div_ceil(32);
        assert_eq!(slabs.n_groups(), n_slab * n_groups);
        for (slab, bytes) in bytes.chunks_exact(bytes.len() / n_slab).enumerate() {
            let alone = pack(ty, bytes, n_in, n_out, &team, &|_| ()).unwrap().unwrap();
            let mut want = vec![f32::NAN; 3 * n_out];
            table.product(&alone, 0..n_groups, &x, &mut want);
            let groups = slab * n_groups..(slab + 1) * n_groups;
            let width = slabs.rows(groups.clone()).len();
            let mut got = vec![f32::NAN; 3 * width];
            table.product(&slabs, groups, &x, &mut got);
            for (got, want) in got.chunks_exact(width).zip(want.chunks_exact(n_out)) {
                assert_eq!(&got[..n_out], want, "{ty} slab {slab}");
                assert!(got[n_out..].iter().all(|x| *x == 0.0), "{ty} slab {slab}: rows that fill up");
            }
        }
    }
}
