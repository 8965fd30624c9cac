//! A selector's walk allocates nothing: a draft of four rows costs as many allocations as one of a single row, which are those
//! of the lists that a step hands over.
//!
//! One test alone in its process, because it watches the process's allocator.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

#[path = "dflash/rig.rs"]
#[allow(dead_code, reason = "shared with the tests of what drafters say")]
mod rig;

use paceline_spec::DraftRequest;
use rig::{N_VOCAB, Rig, greedy, no_past};

/// Counts allocations.
struct Watched;

static COUNT: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to `System` unchanged, so its guarantees are ours; the counter allocates nothing.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: our caller's promises about `layout` are those that `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: `ptr` came from `alloc` above with this layout, hence from `System`.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Watched = Watched;

#[test]
fn a_walk_allocates_nothing() {
    let mut rig = Rig::new("dflash2");
    let seq = rig.sequence(40, 75);
    let mut sampler = greedy(N_VOCAB);
    let mut count = |n_max: usize| {
        let (sampler, past) = (&mut sampler, no_past());
        let mut requests = [DraftRequest { seq, anchor: 29, position: 40, n_max, past, sampler }];
        let before = COUNT.load(Ordering::Relaxed);
        let drafts = rig.drafter.draft(&mut requests);
        let n_allocation = COUNT.load(Ordering::Relaxed) - before;
        assert_eq!(drafts[0].tokens.len(), n_max);
        n_allocation
    };
    let first = count(4);
    let one = count(1);
    assert!(0 < one && one < first, "{one} after {first}");
    for n_max in [4, 2, 3, 1, 4] {
        assert_eq!(count(n_max), one, "{n_max} rows");
    }
}
