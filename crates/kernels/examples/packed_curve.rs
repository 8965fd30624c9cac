//! What n columns of a packed matrix cost: `cargo run --release -p paceline-kernels --example packed_curve -- [TYPE…] [--isa ISA] [--near]`.
//!
//! Copies of a 9728 x 2560 matrix, together larger than any cache, are multiplied in pieces of about a megabyte on one
//! thread. A piece counts only if the thread was on a core all the time (CPU time = elapsed time); the cost of a column count is the
//! median of those pieces, and all column counts take turns, so that whatever else runs disturbs them alike. `read` is
//! the same sweep without arithmetic. With `--near` it is always the same piece, half the size, so that what remains is arithmetic
//! over tiles in the second-level cache.

use std::time::{Duration, Instant};

use paceline_gguf::GgmlType;
use paceline_kernels::packed::{PackedMatrix, PackedTable, QuantRows, pack};
use paceline_kernels::{KernelTable, Team};

const N: [usize; 11] = [1, 2, 3, 4, 5, 8, 12, 16, 24, 32, 128];
const N_IN: usize = 2560;
const N_OUT: usize = 9728;
const BYTES: usize = 400 << 20;
const ROUNDS: usize = 7;

fn main() {
    let mut types = Vec::new();
    let mut table = PackedTable::of(KernelTable::best().unwrap_or_else(|error| panic!("{error}")));
    let mut near = false;
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        if arg == "--isa" {
            let isa = args.next().expect("an instruction set after --isa");
            let found = PackedTable::available().iter().find(|table| table.isa == isa);
            table = found.unwrap_or_else(|| panic!("this machine has no {isa}"));
        } else if arg == "--near" {
            near = true;
        } else {
            let found = ALL.iter().find(|ty| ty.name() == arg);
            types.push(*found.unwrap_or_else(|| panic!("no packed form of {arg}")));
        }
    }
    if types.is_empty() {
        types.extend(ALL);
    }
    println!("# {}, [{N_OUT}, {N_IN}], one thread", table.isa);
    println!("type,n,ms,GB/s,share of read,GMAC/s,ratio to n=1,pieces");
    types.iter().for_each(|ty| curve(table, *ty, near));
}

const ALL: [GgmlType; 10] = [
    GgmlType::Q4_K,
    GgmlType::Q5_K,
    GgmlType::Q6_K,
    GgmlType::Q8_0,
    GgmlType::Q4_0,
    GgmlType::IQ4_NL,
    GgmlType::IQ4_XS,
    GgmlType::BF16,
    GgmlType::F16,
    GgmlType::F32,
];

fn curve(table: &PackedTable, ty: GgmlType, near: bool) {
    let team = Team::new(2);
    let row_bytes = N_IN / ty.block_len() * ty.block_bytes();
    let source: Vec<u8> =
        (0..N_OUT * row_bytes).map(|i| if i % 3 == 1 { 0x21 } else { ((i * 73) >> 2) as u8 }).collect();
    let start = Instant::now();
    let copies: Vec<PackedMatrix> = (0..BYTES.div_ceil(source.len()))
        .map(|_| pack(ty, &source, N_IN, N_OUT, &team, &|_| ()).expect("memory").expect("a packed form"))
        .collect();
    let packed: usize = copies.iter().map(PackedMatrix::bytes).sum();
    eprintln!("{}: {:.1} GB/s packed", ty.name(), packed as f64 / start.elapsed().as_secs_f64() / 1e9);

    let x: Vec<f32> = (0..128 * N_IN).map(|i| (i as f32 * 12.9898).sin()).collect();
    let w = &copies[0];
    let piece_bytes = if near { 1 << 19 } else { 1 << 20 };
    let groups_per_piece = (piece_bytes * w.n_groups() / w.bytes()).max(1);
    let mut out = vec![0.0; 128 * groups_per_piece * 32];
    let mut rows = QuantRows::new();
    let mut pieces: Vec<Vec<f64>> = vec![Vec::new(); N.len() + 1];
    for round in 0..ROUNDS {
        for (i, n) in [0].into_iter().chain(N).enumerate() {
            if n >= 32 && round >= 2 {
                continue;
            }
            rows.quantize_rows(table, w.grain(), &x[..n * N_IN], n, N_IN);
            for w in if near { &copies[..1] } else { &copies } {
                for first in (0..w.n_groups() / groups_per_piece).map(|piece| piece * groups_per_piece) {
                    let first = if near { 0 } else { first };
                    let groups = first..first + groups_per_piece;
                    let (cpu, start) = (cpu_time(), Instant::now());
                    if n == 0 {
                        std::hint::black_box(read(w.tiles(groups)));
                    } else {
                        table.product(w, groups, &rows, &mut out[..n * groups_per_piece * 32]);
                    }
                    let elapsed = start.elapsed();
                    if elapsed < (cpu_time() - cpu).mul_f64(1.05) + Duration::from_micros(2) {
                        pieces[i].push(elapsed.as_secs_f64());
                    }
                }
            }
        }
    }

    let n_pieces = w.n_groups() as f64 / groups_per_piece as f64;
    let seconds: Vec<f64> = pieces.iter_mut().map(|pieces| median(pieces) * n_pieces).collect();
    println!(
        "{},read,{:.3},{:.2},,,,{}",
        ty.name(),
        seconds[0] * 1e3,
        w.bytes() as f64 / seconds[0] / 1e9,
        pieces[0].len()
    );
    for (i, n) in N.iter().enumerate() {
        let s = seconds[i + 1];
        println!(
            "{},{n},{:.3},{:.2},{:.2},{:.1},{:.2},{}",
            ty.name(),
            s * 1e3,
            w.bytes() as f64 / s / 1e9,
            seconds[0] / s,
            (n * N_IN * N_OUT) as f64 / s / 1e9,
            s / seconds[1],
            pieces[i + 1].len()
        );
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Reads the bytes, and does nothing else with them.
fn read(bytes: &[u8]) -> u64 {
    let mut sums = [0; 8];
    for line in bytes.as_chunks::<64>().0 {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a hint; every x86-64 has it, and it never faults.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().wrapping_add(4096).cast());
        }
        for (sum, word) in sums.iter_mut().zip(line.as_chunks::<8>().0) {
            *sum ^= u64::from_ne_bytes(*word);
        }
    }
    sums.iter().fold(0, |all, sum| all ^ sum)
}

/// CPU time of this thread; the elapsed time where we do not know how to ask, so that every piece counts.
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
fn cpu_time() -> Duration {
    #[repr(C)]
    struct Timespec {
        seconds: i64,
        nanoseconds: i64,
    }
    unsafe extern "C" {
        fn clock_gettime(clock: i32, time: *mut Timespec) -> i32;
    }
    const THREAD_CPU_TIME: i32 = 3;
    let mut time = Timespec { seconds: 0, nanoseconds: 0 };
    // SAFETY: `time` has the layout of the C library's `timespec` on 64-bit Linux.
    let failed = unsafe { clock_gettime(THREAD_CPU_TIME, &mut time) };
    assert_eq!(failed, 0, "the clock of a thread");
    Duration::new(time.seconds as u64, time.nanoseconds as u32)
}

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
fn cpu_time() -> Duration {
    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    START.get_or_init(Instant::now).elapsed()
}
