//! A step allocates nothing: after one of its size, the next ones find all their memory.
//!
//! One test alone in its process, because it watches the process's allocator; one thread, because a thread's own scratch grows
//! when it first takes a tile, whenever that is.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use paceline_backend::{Backend, KvType, PlanBuilder, StateConfig, Step, StepOut, Tap, cpu::CpuBackend};
use paceline_convert::{ConvertOptions, convert};
use paceline_gguf::Gguf;
use paceline_memory::Memory;
use paceline_testkit::goldens_dir;

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

fn check(name: &str, kv: KvType) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    convert(&ConvertOptions::new(goldens_dir().join(name), &path), |_| {}).unwrap();
    let file = Arc::new(Gguf::open(&path).unwrap());
    let backend: Arc<dyn Backend> = Arc::new(CpuBackend::new(1).unwrap());
    let model = paceline_models::load(&file, &backend).unwrap();
    let taps = [Tap::Layer(0)];
    let mut p = PlanBuilder::new(&taps);
    let logits = model.record(&mut p);
    let plan = Arc::new(p.finish(Some(logits)));
    let config = StateConfig { page_len: 16, kv: kv.into(), n_tentative_max: 16 };
    let states = backend.alloc_states(model.states(), config).unwrap();
    let mut exec = backend.compile(plan, &states).unwrap();
    let mut memory = Memory::new(states, 1024);
    let seqs = [memory.create(), memory.create()];
    let mut out = StepOut::default();
    // Two sequences, a certain row and some drafted ones each, nothing of which is kept but the first.
    let mut run = |n: usize| {
        for seq in seqs {
            memory.prepare(seq, n, 1).unwrap();
        }
        let past = seqs.map(|seq| memory.len(seq) as u32);
        let tokens: Vec<u32> = (0..2 * n as u32).map(|i| 5 + i * 7 % 90).collect();
        let positions: Vec<u32> = past.iter().flat_map(|&past| past..past + n as u32).collect();
        let outputs: Vec<u32> = (0..2 * n as u32).collect();
        let lanes = [memory.lane(seqs[0], 0), memory.lane(seqs[1], n)];
        let step =
            Step { tokens: &tokens, inputs: &[], positions: &positions, lanes: &lanes, outputs: &outputs };
        let before = COUNT.load(Ordering::Relaxed);
        exec.run(&step, &mut out);
        let n_allocation = COUNT.load(Ordering::Relaxed) - before;
        for seq in seqs {
            memory.commit(seq, 1);
        }
        n_allocation
    };
    assert!(run(8) > 0, "{name}: the first step has nothing yet");
    // Long enough for windows to leave pages behind and for others to take them.
    for n in [8, 1, 5, 8, 2, 8].into_iter().cycle().take(80) {
        assert_eq!(run(n), 0, "{name}: allocations of a step of twice {n} rows");
    }
}

#[test]
fn a_step_allocates_nothing() {
    check("qwen35", KvType::F32);
    check("qwen3", KvType::F16);
    check("llama", KvType::Bf16);
    check("qwen35moe", KvType::F16);
    check("gemma4-e", KvType::F32);
}
