//! What this machine can do at best, to hold kernels against: how fast threads read memory, and how fast they multiply with
//! the instructions that the kernels of an instruction set use.
//!
//! A product of few rows reads each weight once and can't be faster than memory; one of many rows computes and can't be
//! faster than the multipliers. Figures of kernels mean something as shares of these two ("Roofline", Williams et al., 2009).
//!
//! Everything is repeated some times in short pieces, and the best piece counts: what others do on the machine can only make it slower.
//! Reading is like that of the kernels: one sweep, in huge pages where they are granted, with the prefetch distance of packed
//! tiles.

use std::hint::black_box;
use std::sync::Barrier;
use std::time::Instant;

use memmap2::MmapMut;

use crate::packed::PackedTable;
use crate::table::KernelTable;

/// How often something happened in a second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    /// In the best repeat.
    pub best: f64,
    /// In the median one: how far it is from the best says how quiet the machine was.
    pub median: f64,
}

impl Rate {
    fn of(mut rates: Vec<f64>) -> Rate {
        rates.sort_by(f64::total_cmp);
        let median = rates.get(rates.len() / 2).copied().unwrap_or(0.0);
        Rate { best: rates.last().copied().unwrap_or(0.0), median }
    }
}

/// What so many threads reach together.
#[derive(Clone, Copy, Debug)]
pub struct Point {
    /// Threads.
    pub n_threads: usize,
    /// Bytes read from memory in a second.
    pub read: Rate,
    /// Products of 8-bit integers added up in a second.
    pub dot: Rate,
    /// Products of floats added up in a second.
    pub fma: Rate,
}

/// What an instruction set reaches on this machine.
#[derive(Clone, Debug)]
pub struct Roofline {
    /// The instruction set, as the packed kernels call it.
    pub isa: &'static str,
    /// The instruction that multiplies 8-bit integers.
    pub dot: &'static str,
    /// The one that multiplies floats.
    pub fma: &'static str,
    /// Bytes that the sweep went over, to be far more than caches hold.
    pub n_bytes: usize,
    /// One for each number of threads that was asked for.
    pub points: Vec<Point>,
}

impl Roofline {
    /// The point of so many threads, or the last one below.
    ///
    /// # Panics
    /// If nothing was measured.
    pub fn at(&self, n_threads: usize) -> &Point {
        let below = self.points.iter().rev().find(|point| point.n_threads <= n_threads);
        below.or(self.points.first()).expect("at least one number of threads was measured")
    }
}

/// A loop over independent sums of one instruction's products.
struct Probe {
    name: &'static str,
    /// Products of one round of the loop.
    macs: usize,
    /// Runs so many rounds.
    run: fn(usize),
}

/// Measures with the instructions that `table` and its packed kernels use, for each of these numbers of threads.
///
/// `scale` shortens repeats and memory, for tests; 1 is what figures are worth reporting from.
pub fn measure(table: &KernelTable, n_threads: &[usize], n_repeat: usize, scale: f64) -> Roofline {
    let packed = PackedTable::of(table);
    let (dot, fma) = probes(packed.isa);
    let memory = Memory::new(((sweep_bytes() as f64 * scale) as usize).max(PIECE));
    let n_rounds = ((N_ROUND as f64 * scale) as usize).max(1);
    let points = (n_threads.iter())
        .map(|&n| Point {
            n_threads: n,
            read: read_rate(&memory, n, n_repeat),
            dot: product_rate(&dot, n_rounds, n, n_repeat),
            fma: product_rate(&fma, n_rounds, n, n_repeat),
        })
        .collect();
    Roofline { isa: packed.isa, dot: dot.name, fma: fma.name, n_bytes: memory.n_bytes, points }
}

/// Rounds of a probe in a repeat: about two milliseconds.
const N_ROUND: usize = 1 << 19;
/// Threads take the memory in pieces of this.
const PIECE: usize = 1 << 20;
/// As far ahead as packed tiles are prefetched.
const PREFETCH_BYTES: usize = 4096;

/// 512 MiB, or four times the last cache where that is more; up to 4 GiB.
fn sweep_bytes() -> usize {
    let cache = || {
        let text = std::fs::read_to_string("/sys/devices/system/cpu/cpu0/cache/index3/size").ok()?;
        text.trim().strip_suffix('K')?.parse::<usize>().ok()
    };
    (4 * 1024 * cache().unwrap_or(0)).clamp(512 << 20, 4 << 30)
}

struct Memory {
    map: MmapMut,
    start: usize,
    n_bytes: usize,
}

impl Memory {
    /// Memory behind which there are pages.
    fn new(n_bytes: usize) -> Memory {
        const HUGE_PAGE: usize = 2 << 20;
        let mut map = MmapMut::map_anon(n_bytes + HUGE_PAGE).expect("memory to measure with");
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage); // a wish, as for packed weights
        let start = map.as_ptr().align_offset(HUGE_PAGE);
        map.fill(1);
        Memory { map, start, n_bytes }
    }

    /// The part of thread `i` of `n`.
    fn part(&self, i: usize, n: usize) -> &[u8] {
        let (first, last) = (self.n_bytes / n * i, self.n_bytes / n * (i + 1));
        &self.map[self.start + first / 64 * 64..self.start + last / 64 * 64]
    }
}

/// All threads sweep their parts at the same time; what counts is when the last one is done.
fn read_rate(memory: &Memory, n_threads: usize, n_repeat: usize) -> Rate {
    let times = together(n_threads, n_repeat, |i| {
        black_box(read(memory.part(i, n_threads)));
    });
    let n_bytes: usize = (0..n_threads).map(|i| memory.part(i, n_threads).len()).sum();
    let rate = |repeat: usize| {
        let begin = times.iter().map(|spans| spans[repeat].0).min().expect("a thread");
        let end = times.iter().map(|spans| spans[repeat].1).max().expect("a thread");
        n_bytes as f64 / (end - begin).as_secs_f64().max(1e-9)
    };
    Rate::of((0..n_repeat).map(rate).collect())
}

/// All threads multiply at the same time; each has its own speed.
fn product_rate(probe: &Probe, n_rounds: usize, n_threads: usize, n_repeat: usize) -> Rate {
    let times = together(n_threads, n_repeat, |_| (probe.run)(n_rounds));
    let macs = (probe.macs * n_rounds) as f64;
    let rate = |repeat: usize| {
        let of_thread =
            |spans: &Vec<Span>| macs / (spans[repeat].1 - spans[repeat].0).as_secs_f64().max(1e-9);
        times.iter().map(of_thread).sum()
    };
    Rate::of((0..n_repeat).map(rate).collect())
}

type Span = (Instant, Instant);

/// Begin and end of each thread's repeats.
fn together(n_threads: usize, n_repeat: usize, work: impl Fn(usize) + Sync) -> Vec<Vec<Span>> {
    let barrier = Barrier::new(n_threads);
    let one = |i: usize| {
        let repeat = |_| {
            barrier.wait();
            let begin = Instant::now();
            work(i);
            (begin, Instant::now())
        };
        (0..n_repeat).map(repeat).collect()
    };
    std::thread::scope(|scope| {
        let one = &one;
        let others: Vec<_> = (1..n_threads).map(|i| scope.spawn(move || one(i))).collect();
        let mut times = vec![one(0)];
        times.extend(others.into_iter().map(|thread| thread.join().expect("a measuring thread")));
        times
    })
}

/// Reads the bytes and does nothing else with them.
fn read(bytes: &[u8]) -> u64 {
    #[inline(always)]
    fn body(bytes: &[u8]) -> u64 {
        let mut sums = [0u64; 8];
        for line in bytes.as_chunks::<64>().0 {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a hint, without effect on memory and without faults whatever the address; every x86-64 has it.
            unsafe {
                use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
                _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().wrapping_add(PREFETCH_BYTES).cast());
            }
            for (sum, word) in sums.iter_mut().zip(line.as_chunks::<8>().0) {
                *sum ^= u64::from_ne_bytes(*word);
            }
        }
        sums.iter().fold(0, |all, sum| all ^ sum)
    }

    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        #[target_feature(enable = "avx2")]
        fn avx2(bytes: &[u8]) -> u64 {
            body(bytes)
        }
        // SAFETY: the CPU has just been found to have AVX2.
        return unsafe { avx2(bytes) };
    }
    body(bytes)
}

/// The probes of a set of packed kernels: of 8-bit integers, and of floats.
fn probes(isa: &str) -> (Probe, Probe) {
    #[cfg(target_arch = "x86_64")]
    match isa {
        "avx512" => return (x86::DOT_512, x86::FMA_512),
        "avx2-vnni" => return (x86::DOT_VNNI, x86::FMA_256),
        "avx2" => return (x86::DOT_MADDUBS, x86::FMA_256),
        _ => {}
    }
    let _ = isa;
    (
        Probe { name: "scalar", macs: N_SUM, run: scalar_dot },
        Probe { name: "scalar", macs: N_SUM, run: scalar_fma },
    )
}

/// Independent sums, so that none waits for the one before: more than latency times throughput, and few enough for sixteen registers.
const N_SUM: usize = 12;

fn scalar_dot(n: usize) {
    let (x, y) = black_box((3i32, 5i32));
    let mut sums = [0i32; N_SUM];
    for _ in 0..n {
        sums.iter_mut().for_each(|sum| *sum = black_box(*sum).wrapping_add(x * y));
    }
    black_box(sums);
}

fn scalar_fma(n: usize) {
    let (x, y) = black_box((0.5f32, 1.0f32));
    let mut sums = [0f32; N_SUM];
    for _ in 0..n {
        sums.iter_mut().for_each(|sum| *sum = black_box(*sum) * x + y);
    }
    black_box(sums);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{N_SUM, Probe, black_box};

    /// A probe that adds `$step` of `$x` and `$y` to each sum, and the safe function around it.
    macro_rules! probe {
        ($name:ident, $label:literal, $features:literal, $macs:literal, $zero:expr, $x:expr, $y:expr, $step:expr) => {
            pub(super) const $name: Probe = Probe {
                name: $label,
                macs: $macs * N_SUM,
                run: |n| {
                    #[target_feature(enable = $features)]
                    fn with_features(n: usize) {
                        let (x, y) = black_box(($x, $y));
                        let mut sums = [$zero; N_SUM];
                        for _ in 0..n {
                            for sum in &mut sums {
                                *sum = $step(*sum, x, y);
                            }
                        }
                        black_box(sums);
                    }
                    // SAFETY: `probes` gives this out only for a table of packed kernels that needs these features,
                    // and such a table exists only where they were detected.
                    unsafe { with_features(n) }
                },
            };
        };
    }

    probe!(
        DOT_512,
        "vpdpbusd zmm",
        "avx512f,avx512vnni",
        64,
        _mm512_setzero_si512(),
        _mm512_set1_epi8(3),
        _mm512_set1_epi8(1),
        |sum, x, y| _mm512_dpbusd_epi32(sum, x, y)
    );
    probe!(
        FMA_512,
        "vfmadd zmm",
        "avx512f",
        16,
        _mm512_setzero_ps(),
        _mm512_set1_ps(0.5),
        _mm512_set1_ps(1.0),
        |sum, x, y| _mm512_fmadd_ps(sum, x, y)
    );
    probe!(
        DOT_VNNI,
        "vpdpbusd ymm",
        "avx2,avxvnni",
        32,
        _mm256_setzero_si256(),
        _mm256_set1_epi8(3),
        _mm256_set1_epi8(1),
        |sum, x, y| _mm256_dpbusd_avx_epi32(sum, x, y)
    );
    // The sum goes in as an operand, or the compiler would multiply once for the whole loop.
    probe!(
        DOT_MADDUBS,
        "vpmaddubsw and vpmaddwd ymm",
        "avx2",
        32,
        _mm256_setzero_si256(),
        _mm256_set1_epi8(3),
        _mm256_set1_epi16(1),
        |sum, x, y| _mm256_add_epi32(sum, _mm256_madd_epi16(y, _mm256_maddubs_epi16(x, sum)))
    );
    probe!(
        FMA_256,
        "vfmadd ymm",
        "avx2,fma",
        8,
        _mm256_setzero_ps(),
        _mm256_set1_ps(0.5),
        _mm256_set1_ps(1.0),
        |sum, x, y| _mm256_fmadd_ps(sum, x, y)
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_instruction_set_is_measured() {
        for table in KernelTable::available() {
            let roofline = measure(table, &[1, 2], 3, 0.01);
            assert_eq!(roofline.points.len(), 2, "{}", table.isa);
            for point in &roofline.points {
                for (what, rate) in [("read", point.read), ("dot", point.dot), ("fma", point.fma)] {
                    assert!(
                        rate.median > 0.0 && rate.best >= rate.median && rate.best.is_finite(),
                        "{} {what}: {rate:?}",
                        table.isa
                    );
                }
            }
            assert_eq!(roofline.at(7).n_threads, 2);
            assert_eq!(roofline.at(1).n_threads, 1);
        }
    }

    #[test]
    fn parts_cover_the_memory() {
        let memory = Memory::new(3 * PIECE);
        for n in [1, 2, 3] {
            let covered: usize = (0..n).map(|i| memory.part(i, n).len()).sum();
            assert!(covered > 3 * PIECE - 64 * n && covered <= 3 * PIECE, "{covered} in {n} parts");
        }
    }

    #[test]
    fn the_sweep_reads_every_byte() {
        let mut bytes = vec![0u8; 4096];
        let zero = read(&bytes);
        for at in [0, 7, 63, 64, 4095] {
            bytes[at] = 1;
            assert_ne!(read(&bytes), zero, "byte {at}");
            bytes[at] = 0;
        }
    }
}
