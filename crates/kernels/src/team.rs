//! The thread team: a few persistent threads that share the tiles of one op after the other.
//!
//! A forward is some hundred short regions in a row, so entering and leaving one has to cost about
//! a microsecond. The caller opens a region and takes tiles itself; workers that are awake join
//! in; everybody takes the next tile from one atomic counter, so a slow thread simply takes fewer.
//! Which thread computes a tile never changes its value (see the crate documentation).
//!
//! Everything that must agree is one atomic word, so there is nothing to get out of step:
//!
//! ```text
//!  63                    33   32   31                       0
//! ┌────────────────────────┬──────┬──────────────────────────┐
//! │ number of the region   │ open │ workers inside it        │
//! └────────────────────────┴──────┴──────────────────────────┘
//! ```
//!
//! A worker joins by adding one to the word it saw open, and leaves by subtracting one. The caller
//! ends the region by clearing `open`, after which no join can succeed, and waits for the workers
//! inside only. A worker that the system has not scheduled is therefore never waited for: on an
//! overloaded machine the team gets slower by the share of the missing thread, not stuck on it.
//!
//! An idle worker spins for about 20 µs, which covers the gap between two regions of a forward,
//! then parks.

use std::any::Any;
use std::cell::UnsafeCell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long an idle worker looks for a new region before it parks.
const SPIN: Duration = Duration::from_micros(20);

const OPEN: u64 = 1 << 32;
const INSIDE: u64 = OPEN - 1;
const REGION: u64 = 1 << 33;

type Tile<'a> = dyn Fn(usize) + Sync + 'a;
type Payload = Box<dyn Any + Send>;

/// Persistent threads that work through the tiles of a region together with their caller.
pub struct Team {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

/// What the caller and the workers share.
struct Shared {
    /// The word of the module documentation.
    state: AtomicU64,
    /// The work of the open region. Written only while no region is open and nobody is inside.
    job: UnsafeCell<Option<Job>>,
    /// The tiles that nobody has taken yet: a run for each thread, the caller's first.
    runs: Box<[Run]>,
    /// A region is running: a second one, nested or of another thread, runs inline instead.
    busy: AtomicBool,
    stop: AtomicBool,
    /// The first panic of the region.
    panic: Mutex<Option<Payload>>,
    /// Workers that are parked or about to; counted under `park`.
    sleepers: AtomicUsize,
    park: Mutex<()>,
    wake: Condvar,
}

/// Tiles that are to be taken, `next` in the lower half and `end` in the upper; on a cache line of its own.
#[repr(align(128))]
#[derive(Default)]
struct Run(AtomicU64);

impl Run {
    fn set(&self, next: usize, end: usize) {
        self.0.store((end as u64) << 32 | next as u64, Ordering::Relaxed);
    }

    fn len(&self) -> usize {
        let (next, end) = Self::parts(self.0.load(Ordering::Relaxed));
        end - next
    }

    fn parts(word: u64) -> (usize, usize) {
        (word as u32 as usize, (word >> 32) as usize)
    }

    /// Takes the first quarter of the tiles, at least one: each time costs a locked instruction, which waits for all memory
    /// accesses before it, so that a sweep over memory has to start anew.
    fn first(&self) -> Option<Range<usize>> {
        let take = |word| {
            let (next, end) = Self::parts(word);
            (next < end).then(|| word + (end - next).div_ceil(4) as u64)
        };
        let (next, end) = Self::parts(self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).ok()?);
        Some(next..next + (end - next).div_ceil(4))
    }

    /// Takes the last tile.
    fn last(&self) -> Option<Range<usize>> {
        let take = |word| (Self::parts(word).0 < Self::parts(word).1).then(|| word - (1 << 32));
        let (_, end) = Self::parts(self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).ok()?);
        Some(end - 1..end)
    }
}

/// A region's work. The lifetime of the closure is erased; `for_each` does not return before the
/// last worker has left the region.
#[derive(Clone, Copy)]
struct Job {
    tile: *const Tile<'static>,
}

// SAFETY: `job` is the only field that is not `Sync` by itself. It is written by the holder of
// `busy` while no worker is inside, and read between joining and leaving a region; joining
// (acquire) comes after the opening store (release) and opening after the last leave.
unsafe impl Sync for Shared {}
// SAFETY: the closure behind `Job::tile` is `Sync`, so that a thread may call it through a
// reference; nothing else in here is tied to a thread.
unsafe impl Send for Shared {}

impl Team {
    /// A team of `n_threads`, the caller included: `n_threads - 1` threads are started.
    ///
    /// If the system refuses a thread, the team is smaller; [`n_threads`](Self::n_threads) says
    /// what it has.
    ///
    /// # Panics
    /// If `n_threads` is zero.
    pub fn new(n_threads: usize) -> Self {
        assert!(n_threads > 0, "a team has at least one thread, the caller");
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            runs: (0..n_threads).map(|_| Run::default()).collect(),
            busy: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
            sleepers: AtomicUsize::new(0),
            park: Mutex::new(()),
            wake: Condvar::new(),
        });
        let workers = (1..n_threads)
            .map_while(|i| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new()
                    .name(format!("paceline-team-{i}"))
                    .spawn(move || shared.work(i))
                    .ok()
            })
            .collect();
        Self { shared, workers }
    }

    /// Threads that take tiles, the caller included.
    pub fn n_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `tile(i)` once for each `i` in `0..n_tiles` and returns when all calls have ended.
    ///
    /// A region of one tile, a call from inside a tile, and a call while another thread uses the
    /// team run on the calling thread alone.
    ///
    /// # Panics
    /// If there are 2^32 tiles or more. With the first tile's panic, after all the other tiles have ended. The team stays usable.
    pub fn for_each(&self, n_tiles: usize, tile: &Tile<'_>) {
        assert!(u32::try_from(n_tiles).is_ok(), "{n_tiles} tiles");
        let alone = n_tiles <= 1 || self.workers.is_empty();
        if alone || self.shared.busy.swap(true, Ordering::Acquire) {
            return run_inline(n_tiles, tile);
        }
        let panic = self.shared.run_region(n_tiles, tile, self.workers.len());
        self.shared.busy.store(false, Ordering::Release);
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        drop(lock(&self.shared.park)); // a worker between its last look and its wait has the lock
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // A worker catches its tiles' panics, and nothing else in its loop panics.
            let _ = worker.join();
        }
    }
}

/// All tiles on this thread, with the same treatment of panics as in a shared region.
fn run_inline(n_tiles: usize, tile: &Tile<'_>) {
    let mut panic = None;
    for i in 0..n_tiles {
        if let Err(payload) = catch_unwind(AssertUnwindSafe(|| tile(i))) {
            panic.get_or_insert(payload);
        }
    }
    if let Some(payload) = panic {
        resume_unwind(payload);
    }
}

impl Shared {
    /// Opens a region, takes part in it, ends it. The caller of this holds `busy`.
    fn run_region(&self, n_tiles: usize, tile: &Tile<'_>, n_workers: usize) -> Option<Payload> {
        // SAFETY: only the lifetime changes. The pointer is used between a join and a leave of
        // this region, and this function returns after the last leave.
        let tile = unsafe { std::mem::transmute::<*const Tile<'_>, *const Tile<'static>>(tile) };
        // SAFETY: the previous region is closed and left by all, and `busy` is ours.
        unsafe { *self.job.get() = Some(Job { tile }) };
        let n_runs = n_workers + 1;
        let start = |run: usize| run * n_tiles / n_runs;
        self.runs[..n_runs].iter().enumerate().for_each(|(i, run)| run.set(start(i), start(i + 1)));
        let closed = self.state.load(Ordering::Relaxed);
        debug_assert_eq!(closed & (OPEN | INSIDE), 0, "the last region was left by all");
        self.state.store(closed.wrapping_add(REGION) | OPEN, Ordering::SeqCst);
        self.wake_sleepers(n_workers.min(n_tiles - 1));

        self.take_tiles(Job { tile }, 0);

        self.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spin = Spin::start();
        while self.state.load(Ordering::Acquire) & INSIDE != 0 {
            if spin.is_over() {
                std::thread::yield_now();
            }
        }
        lock(&self.panic).take()
    }

    /// Takes tiles until there are none: thread `me`'s own, then the last of whoever has most left.
    fn take_tiles(&self, job: Job, me: usize) {
        loop {
            let tiles = self.runs[me].first().or_else(|| {
                // Somebody may be faster, so look again until all runs are empty.
                loop {
                    let most = self.runs.iter().max_by_key(|run| run.len()).filter(|run| run.len() > 0)?;
                    if let Some(tile) = most.last() {
                        return Some(tile);
                    }
                }
            });
            let Some(tiles) = tiles else { return };
            // SAFETY: `for_each` borrows the closure until this region has been left by all.
            let tile = unsafe { &*job.tile };
            for i in tiles {
                if let Err(payload) = catch_unwind(AssertUnwindSafe(|| tile(i))) {
                    lock(&self.panic).get_or_insert(payload);
                }
            }
        }
    }

    fn wake_sleepers(&self, n_useful: usize) {
        // Sequentially consistent with the store of `state` before and the two accesses in
        // `park_until_called`: either the sleeper sees the region or we see the sleeper.
        let n = self.sleepers.load(Ordering::SeqCst).min(n_useful);
        if n > 0 {
            drop(lock(&self.park)); // it counted itself, but may not have reached its wait yet
            (0..n).for_each(|_| self.wake.notify_one());
        }
    }

    /// A worker's life.
    fn work(&self, me: usize) {
        let mut last_region = 0;
        let mut spin = Spin::start();
        while !self.stop.load(Ordering::Relaxed) {
            let seen = self.state.load(Ordering::Acquire);
            if !is_new(seen, last_region) {
                if spin.is_over() {
                    self.park_until_called(last_region);
                    spin = Spin::start();
                }
                continue;
            }
            let joined = self.state.compare_exchange(seen, seen + 1, Ordering::AcqRel, Ordering::Relaxed);
            if joined.is_ok() {
                last_region = seen / REGION;
                // SAFETY: joined, and the job is not written before we leave.
                let job = unsafe { *self.job.get() };
                self.take_tiles(job.expect("an open region has a job"), me);
                self.state.fetch_sub(1, Ordering::Release);
                spin = Spin::start();
            }
        }
    }

    fn park_until_called(&self, last_region: u64) {
        let mut guard = lock(&self.park);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        while !self.stop.load(Ordering::SeqCst) && !is_new(self.state.load(Ordering::SeqCst), last_region) {
            guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Whether the state shows an open region that a worker has not been in yet.
fn is_new(state: u64, last_region: u64) -> bool {
    state & OPEN != 0 && state / REGION != last_region
}

/// Locks, whatever became of the thread that held the lock last: nothing behind these locks can
/// be left half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A busy wait that knows when it has lasted long enough.
struct Spin {
    start: Instant,
}

impl Spin {
    fn start() -> Self {
        Self { start: Instant::now() }
    }

    /// Waits for a moment; true once `SPIN` has passed.
    fn is_over(&mut self) -> bool {
        for _ in 0..4 {
            std::hint::spin_loop();
        }
        self.start.elapsed() > SPIN
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    /// Every tile runs exactly once.
    fn check(team: &Team, n_tiles: usize) {
        let counts: Vec<AtomicU32> = (0..n_tiles).map(|_| AtomicU32::new(0)).collect();
        team.for_each(n_tiles, &|i| {
            counts[i].fetch_add(1, Ordering::Relaxed);
        });
        for (i, count) in counts.iter().enumerate() {
            assert_eq!(count.load(Ordering::Relaxed), 1, "tile {i} of {n_tiles}");
        }
    }

    #[test]
    fn every_tile_runs_once() {
        for n_threads in [1, 2, 3, 8] {
            let team = Team::new(n_threads);
            assert_eq!(team.n_threads(), n_threads);
            for n_tiles in [0, 1, 2, 3, 7, 64, 1000] {
                check(&team, n_tiles);
            }
        }
    }

    #[test]
    fn many_short_regions_with_and_without_time_to_park() {
        let team = Team::new(4);
        for round in 0..5000 {
            check(&team, round % 9);
            if round % 500 == 0 {
                std::thread::sleep(SPIN * 5);
            }
        }
    }

    #[test]
    fn parked_workers_take_part() {
        let team = Team::new(2);
        std::thread::sleep(Duration::from_millis(5));
        // Each of the two tiles waits for the other, so two threads must run them.
        let arrived = AtomicU32::new(0);
        team.for_each(2, &|_| {
            arrived.fetch_add(1, Ordering::SeqCst);
            while arrived.load(Ordering::SeqCst) < 2 {
                std::thread::yield_now();
            }
        });
    }

    #[test]
    fn each_thread_begins_with_its_own_run() {
        let team = Team::new(2);
        let caller = std::thread::current().id();
        for n_tiles in [2, 5, 8] {
            let taken = [Mutex::new(Vec::new()), Mutex::new(Vec::new())];
            let arrived = AtomicU32::new(0);
            team.for_each(n_tiles, &|i| {
                let mut taken = lock(&taken[usize::from(std::thread::current().id() != caller)]);
                taken.push(i);
                if taken.len() == 1 {
                    arrived.fetch_add(1, Ordering::SeqCst);
                    while arrived.load(Ordering::SeqCst) < 2 {
                        std::thread::yield_now();
                    }
                }
            });
            let [ours, theirs] = taken.map(|taken| taken.into_inner().expect("no panic"));
            assert_eq!([ours[0], theirs[0]], [0, n_tiles / 2], "of {n_tiles}");
            // The own run upwards, then those of the other from its end downwards.
            let own = |tiles: &[usize], run: Range<usize>| {
                tiles.iter().copied().filter(|i| run.contains(i)).collect()
            };
            let upwards: [Vec<usize>; 2] = [own(&ours, 0..n_tiles / 2), own(&theirs, n_tiles / 2..n_tiles)];
            assert!(upwards.iter().all(|tiles| tiles.is_sorted()), "{ours:?} {theirs:?}");
            assert_eq!(ours.len() + theirs.len(), n_tiles);
        }
    }

    #[test]
    fn the_caller_waits_for_the_last_tile() {
        let team = Team::new(2);
        let caller = std::thread::current().id();
        for _ in 0..20 {
            let (arrived, done) = (AtomicU32::new(0), AtomicU32::new(0));
            team.for_each(2, &|_| {
                arrived.fetch_add(1, Ordering::SeqCst);
                while arrived.load(Ordering::SeqCst) < 2 {
                    std::thread::yield_now();
                }
                if std::thread::current().id() != caller {
                    std::thread::sleep(Duration::from_millis(1));
                }
                done.fetch_add(1, Ordering::SeqCst);
            });
            assert_eq!(done.into_inner(), 2);
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_after_all_tiles_and_the_team_stays_usable() {
        for n_threads in [1, 3] {
            let team = Team::new(n_threads);
            for round in 0..50 {
                let done = AtomicU32::new(0);
                let outcome = catch_unwind(AssertUnwindSafe(|| {
                    team.for_each(20, &|i| {
                        done.fetch_add(1, Ordering::Relaxed);
                        if i == round % 20 {
                            resume_unwind(Box::new(format!("tile {i}"))); // a panic, but quiet
                        }
                    });
                }));
                let payload = outcome.expect_err("the tile's panic");
                assert_eq!(payload.downcast_ref(), Some(&format!("tile {}", round % 20)));
                assert_eq!(done.load(Ordering::Relaxed), 20, "the other tiles ran");
                check(&team, 20);
            }
        }
    }

    #[test]
    fn a_call_from_inside_a_tile_runs_inline() {
        let team = Team::new(3);
        let sum = AtomicUsize::new(0);
        team.for_each(10, &|i| {
            team.for_each(10, &|j| {
                sum.fetch_add(i * 10 + j, Ordering::Relaxed);
            });
        });
        assert_eq!(sum.into_inner(), 4950);
    }

    #[test]
    fn two_callers_may_meet() {
        let team = Team::new(3);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| (0..500).for_each(|round| check(&team, round % 17)));
            }
        });
    }
}
