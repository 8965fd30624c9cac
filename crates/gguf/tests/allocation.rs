//! What a file claims never decides how much is allocated: memory stays within a small multiple of what is really there.
//!
//! One test alone in its process, because it watches the process's allocator.

mod raw;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use paceline_gguf::Gguf;
use paceline_gguf::safetensors::SafeTensors;

/// Counts the bytes in use and the most there ever were.
struct Watched;

static IN_USE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to `System` unchanged, so its guarantees are ours; the counters allocate nothing.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let in_use = IN_USE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(in_use, Ordering::Relaxed);
        // SAFETY: our caller's promises about `layout` are those that `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: `ptr` came from `alloc` above with this layout, hence from `System`.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Watched = Watched;

/// The most that `work` had allocated at once.
fn peak_of(work: impl FnOnce()) -> usize {
    let before = IN_USE.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    work();
    PEAK.load(Ordering::Relaxed) - before
}

#[test]
fn memory_follows_the_file_and_not_its_claims() {
    let mut worst: f64 = 0.0;
    let mut check = |what: &str, bytes: Vec<u8>, open: &dyn Fn(Vec<u8>)| {
        let len = bytes.len();
        let peak = peak_of(|| open(bytes));
        assert!(peak <= 16 * 1024 + 24 * len, "{what}: {peak} bytes allocated for a file of {len}");
        worst = worst.max(peak as f64 / len as f64);
    };
    let gguf = |bytes| drop(Gguf::from_bytes("x.gguf", bytes));
    let many = 100_000;
    for n in [1u64 << 20, 1 << 31, 1 << 40, 1 << 60, u64::MAX / 8, u64::MAX] {
        check("n_keys", raw::file(3, 0, n, &[vec![0; 500]], 0), &gguf);
        check("n_tensors", raw::file(3, n, 0, &[vec![0; 500]], 0), &gguf);
        check("key length", raw::file(3, 0, 1, &[n.to_le_bytes().into(), vec![0; 500]], 0), &gguf);
        for ty in 0..13 {
            let key = raw::key("a", 9, raw::array(ty, n, vec![0; 500]));
            check("array length", raw::file(3, 0, 1, &[key], 0), &gguf);
        }
        check("shape", raw::file(3, 1, 0, &[raw::tensor("t", &[n, 1], 0, 0)], 500), &gguf);
        check("safetensors header", [&n.to_le_bytes()[..], b"{\"a\":", &[b'['; 500]].concat(), &|bytes| {
            drop(SafeTensors::from_bytes("x.safetensors", bytes));
        });
    }
    // True claims too: the smallest entries there are, many of them.
    let keys: Vec<_> = (0..many).map(|i: u32| raw::key(i.to_string(), 0, [0])).collect();
    check("many keys", raw::file(3, 0, many.into(), &keys, 0), &gguf);
    let empty_strings = raw::key("a", 9, raw::array(8, many.into(), vec![0; 8 * many as usize]));
    check("many strings", raw::file(3, 0, 1, &[empty_strings], 0), &gguf);
    let tensors: Vec<_> = (0..many).map(|i| raw::tensor(i.to_string(), &[8], 0, u64::from(i) * 32)).collect();
    check("many tensors", raw::file(3, many.into(), 0, &tensors, many as usize * 32), &gguf);
    let shape = format!(
        "{{\"a\":{{\"dtype\":\"F32\",\"shape\":[0{}],\"data_offsets\":[0,0]}}}}",
        ",0".repeat(1 << 20)
    );
    let file = [&(shape.len() as u64).to_le_bytes()[..], shape.as_bytes()].concat();
    check("many dimensions", file, &|bytes| drop(SafeTensors::from_bytes("x.safetensors", bytes)));
    assert!(worst > 0.5, "the watch saw nothing: {worst}");
}
