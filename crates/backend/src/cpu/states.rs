//! Pages and slots in memory.
//!
//! A page holds, for each KV state of its class in turn, its keys and then its values, `page_len` cells of each, head by head:
//!
//! ```text
//! page = [ k of state 0 | v of state 0 | k of state 1 | … ]      each part begins on a cache line
//! part = [ cells of head 0 | cells of head 1 | … ]               as `kernels::kv` says
//! ```
//!
//! A slot holds its recurrent states side by side in one vector, and their tentative windows in another:
//!
//! ```text
//! slot   = [ state 1 | state 2 | … ]                             committed
//! window = [ rows of state 1 | rows of state 2 | … ]             n_tentative_max rows of each
//! ```
//!
//! Saved states are copies of slots, without a window, each with storage of its own: there may be many, they come and
//! go, and nobody computes with them.
//!
//! Everything grows when a page or slot is first used. Where layers have a window a sequence gives a page back whenever it takes
//! one, so a few of those are kept rather than returned to the system and asked for again.

use std::{
    any::Any,
    cell::RefCell,
    collections::HashMap,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard},
};

use paceline_kernels::{
    KernelTable, SharedMut, Team,
    delta::{DeltaRun, delta_run},
    kv::{KvBytes, LINE},
};

use crate::{PageClasses, PageId, SavedId, SlotId, StateConfig, StateDecl, StateId, States};

/// Bytes of pages that are kept for the next to ask; one page is kept if it is larger.
const SPARE_BYTES: usize = 64 << 20;

/// Appends values as bytes.
fn put(out: &mut Vec<u8>, values: &[f32]) {
    out.reserve(size_of_val(values));
    values.iter().for_each(|x| out.extend(x.to_le_bytes()));
}

/// Fills values from as many bytes as they have.
fn take(values: &mut [f32], bytes: &[u8]) {
    let (chunks, rest) = bytes.as_chunks();
    assert!(
        chunks.len() == values.len() && rest.is_empty(),
        "{} bytes for {} values",
        bytes.len(),
        values.len()
    );
    values.iter_mut().zip(chunks).for_each(|(x, bytes)| *x = f32::from_le_bytes(*bytes));
}

/// What grows and changes.
#[derive(Default)]
pub(super) struct Inner {
    pub pages: Vec<Option<KvBytes>>,
    /// The class of each page.
    class_of: Vec<usize>,
    /// Pages that were given back, by class.
    spare: Vec<Vec<KvBytes>>,
    /// The committed states of every slot.
    pub slots: Vec<f32>,
    /// What the tentative rows of the last step left behind, of every slot.
    pub windows: Vec<f32>,
    /// Tentative rows of the last step, by slot.
    pub n_tentative: Vec<usize>,
    /// Committed states of slots, copied.
    saved: HashMap<SavedId, Vec<f32>>,
}

/// Where the parts of a recurrent state lie.
#[derive(Clone, Copy)]
pub(super) struct SlotLayout {
    /// First value of the state in a slot, and its length.
    start: usize,
    len: usize,
    /// Values of a slot.
    slot_width: usize,
    /// First value of the state's rows in a window, and the length of a row.
    row_start: usize,
    row_len: usize,
    /// Values of a window.
    window_width: usize,
}

impl SlotLayout {
    /// The state in [`Inner::slots`].
    pub fn state(&self, slot: SlotId) -> Range<usize> {
        let start = slot.0 as usize * self.slot_width + self.start;
        start..start + self.len
    }

    /// Tentative row `i` of the state in [`Inner::windows`]; the rows lie one behind the other.
    pub fn row(&self, slot: SlotId, i: usize) -> Range<usize> {
        let start = slot.0 as usize * self.window_width + self.row_start + i * self.row_len;
        start..start + self.row_len
    }
}

struct Shared {
    decls: Vec<StateDecl>,
    config: StateConfig,
    classes: PageClasses,
    /// First bytes of each KV state's keys and values in a page of its class.
    offsets: Vec<[usize; 2]>,
    /// Of each class.
    page_bytes: Vec<usize>,
    slot_width: usize,
    window_width: usize,
    /// Of each state; empty ranges for KV.
    layouts: Vec<SlotLayout>,
    inner: Mutex<Inner>,
    team: Arc<Team>,
    table: &'static KernelTable,
}

/// The CPU's store; clones are handles of the same store.
pub(super) struct CpuStates(Arc<Shared>);

impl CpuStates {
    pub fn new(
        decls: &[StateDecl],
        config: StateConfig,
        team: Arc<Team>,
        table: &'static KernelTable,
    ) -> CpuStates {
        let classes = PageClasses::of(decls);
        let mut page_bytes = vec![0; classes.len()];
        let (mut slot_width, mut window_width) = (0, 0);
        let mut offsets = Vec::with_capacity(decls.len());
        let mut layouts = Vec::with_capacity(decls.len());
        for (at, decl) in decls.iter().enumerate() {
            offsets.push([0, 1].map(|part| match (decl, classes.class(StateId(at as u32))) {
                (&StateDecl::Kv { n_head, head_dim, .. }, Some(class)) => {
                    let start = page_bytes[class];
                    let bytes = n_head * config.kv.head_bytes(head_dim, config.page_len)[part];
                    page_bytes[class] += bytes.next_multiple_of(LINE);
                    start
                }
                _ => 0,
            }));
            layouts.push(SlotLayout {
                start: slot_width,
                len: decl.slot_width(),
                slot_width: 0,
                row_start: window_width,
                row_len: decl.window_width(),
                window_width: 0,
            });
            slot_width += decl.slot_width();
            window_width += decl.window_width() * config.n_tentative_max;
        }
        for layout in &mut layouts {
            (layout.slot_width, layout.window_width) = (slot_width, window_width);
        }
        let inner = Inner { spare: vec![Vec::new(); page_bytes.len()], ..Inner::default() };
        let inner = Mutex::new(inner);
        CpuStates(Arc::new(Shared {
            decls: decls.to_vec(),
            config,
            classes,
            offsets,
            page_bytes,
            slot_width,
            window_width,
            layouts,
            inner,
            team,
            table,
        }))
    }

    pub fn handle(&self) -> CpuStates {
        CpuStates(self.0.clone())
    }

    /// The store, for the length of a step. After a panic in a step its sequences are dropped by whoever caught
    /// it, so a poisoned lock hides nothing.
    pub fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.inner.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The class of a KV state, and the first bytes of its keys and values in a page.
    pub fn page_place(&self, state: usize) -> (usize, [usize; 2]) {
        match self.0.classes.class(StateId(state as u32)) {
            Some(class) => (class, self.0.offsets[state]),
            None => panic!("{:?} is no KV state", self.0.decls[state]),
        }
    }

    /// Where the recurrent state `state` lies.
    pub fn layout(&self, state: usize) -> SlotLayout {
        self.0.layouts[state]
    }

    fn grow(&self, inner: &mut Inner, slot: SlotId) {
        let n_slot = slot.0 as usize + 1;
        if inner.n_tentative.len() >= n_slot {
            return;
        }
        inner.n_tentative.resize(n_slot, 0);
        inner.slots.resize(n_slot * self.0.slot_width, 0.0);
        inner.windows.resize(n_slot * self.0.window_width, 0.0);
    }
}

impl States for CpuStates {
    fn decls(&self) -> &[StateDecl] {
        &self.0.decls
    }

    fn config(&self) -> StateConfig {
        self.0.config
    }

    fn page_bytes(&self, class: usize) -> usize {
        self.0.page_bytes[class]
    }

    fn slot_bytes(&self) -> usize {
        size_of::<f32>() * (self.0.slot_width + self.0.window_width)
    }

    fn page_alloc(&self, page: PageId, class: usize) {
        let mut inner = self.lock();
        let at = page.0 as usize;
        if inner.pages.len() <= at {
            inner.pages.resize_with(at + 1, || None);
            inner.class_of.resize(at + 1, 0);
        }
        inner.class_of[at] = class;
        let spare = inner.spare[class].pop();
        inner.pages[at] = Some(spare.unwrap_or_else(|| KvBytes::new(self.0.page_bytes[class])));
    }

    fn page_release(&self, page: PageId) {
        let mut inner = self.lock();
        let inner = &mut *inner;
        let at = page.0 as usize;
        let (data, class) = (inner.pages[at].take(), inner.class_of[at]);
        let (spare, n_byte) = (&mut inner.spare[class], self.0.page_bytes[class]);
        let is_kept = spare.is_empty() || (spare.len() + 1) * n_byte <= SPARE_BYTES;
        if self.0.classes.windows()[class].is_some() && is_kept {
            spare.extend(data);
        }
    }

    fn page_copy(&self, from: PageId, to: PageId) {
        let mut inner = self.lock();
        match inner.pages.get_disjoint_mut([from.0 as usize, to.0 as usize]) {
            Ok([Some(source), Some(target)]) => target.bytes_mut().copy_from_slice(source.bytes()),
            _ => panic!("page_copy {from:?} -> {to:?} without storage"),
        }
    }

    fn slot_reset(&self, slot: SlotId) {
        let mut inner = self.lock();
        self.grow(&mut inner, slot);
        let (s, width) = (slot.0 as usize, self.0.slot_width);
        inner.n_tentative[s] = 0;
        inner.slots[s * width..(s + 1) * width].fill(0.0);
    }

    fn slot_save(&self, slot: SlotId, saved: SavedId) {
        let mut inner = self.lock();
        self.grow(&mut inner, slot);
        let (start, width) = (slot.0 as usize * self.0.slot_width, self.0.slot_width);
        let copy = inner.slots[start..start + width].to_vec();
        let old = inner.saved.insert(saved, copy);
        assert!(old.is_none(), "{saved:?} has storage already");
    }

    fn slot_load(&self, saved: SavedId, slot: SlotId) {
        let mut inner = self.lock();
        self.grow(&mut inner, slot);
        let inner = &mut *inner;
        let Some(copy) = inner.saved.get(&saved) else { panic!("{saved:?} has no storage") };
        inner.n_tentative[slot.0 as usize] = 0;
        let (start, width) = (slot.0 as usize * self.0.slot_width, self.0.slot_width);
        inner.slots[start..start + width].copy_from_slice(copy);
    }

    fn slot_commit(&self, slot: SlotId, n_rows: usize) {
        let mut inner = self.lock();
        let inner = &mut *inner;
        let n_tentative = std::mem::take(&mut inner.n_tentative[slot.0 as usize]);
        assert!(n_rows <= n_tentative, "commit of {n_rows} tentative rows of {n_tentative}");
        if n_rows == 0 {
            return;
        }
        for (layout, decl) in self.0.layouts.iter().zip(&self.0.decls) {
            let data = &mut inner.slots[layout.state(slot)];
            let window = &inner.windows[layout.row(slot, 0).start..layout.row(slot, n_rows).start];
            match *decl {
                StateDecl::Kv { .. } => {}
                StateDecl::ConvTail { channels, .. } => shift_in(data, window, channels),
                StateDecl::Delta { n_head_v, dim_k, dim_v, .. } => {
                    let parts = DeltaWindow { n_head_v, dim_k, dim_v };
                    let head_len = dim_k * dim_v;
                    let data = SharedMut::new(data);
                    self.0.team.for_each(n_head_v, &|head| {
                        // SAFETY: each tile takes its own head's matrix.
                        let state = unsafe { data.range(head * head_len..(head + 1) * head_len) };
                        TOKENS.with_borrow_mut(|tokens| {
                            tokens.gather(parts, head, window.chunks_exact(layout.row_len));
                            delta_run(self.0.table, state, &tokens.run(dim_k), &[], &mut []);
                        });
                    });
                }
            }
        }
    }

    fn saved_bytes(&self) -> usize {
        size_of::<f32>() * self.0.slot_width
    }

    fn saved_release(&self, saved: SavedId) {
        self.lock().saved.remove(&saved);
    }

    fn page_export(&self, page: PageId, out: &mut Vec<u8>) {
        match self.lock().pages.get(page.0 as usize) {
            Some(Some(data)) => out.extend_from_slice(data.bytes()),
            _ => panic!("export of {page:?}, which has no storage"),
        }
    }

    fn page_import(&self, page: PageId, bytes: &[u8]) -> bool {
        match self.lock().pages.get_mut(page.0 as usize) {
            Some(Some(data)) if data.bytes().len() != bytes.len() => return false,
            Some(Some(data)) => data.bytes_mut().copy_from_slice(bytes),
            _ => panic!("import into {page:?}, which has no storage"),
        }
        true
    }

    fn saved_export(&self, saved: SavedId, out: &mut Vec<u8>) {
        match self.lock().saved.get(&saved) {
            Some(values) => put(out, values),
            None => panic!("export of {saved:?}, which has no storage"),
        }
    }

    fn saved_import(&self, saved: SavedId, bytes: &[u8]) -> bool {
        if bytes.len() != self.saved_bytes() {
            return false;
        }
        let mut values = vec![0.0; self.0.slot_width];
        take(&mut values, bytes);
        let old = self.lock().saved.insert(saved, values);
        assert!(old.is_none(), "{saved:?} has storage already");
        true
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Moves `rows` into a tail of the same width, oldest first.
pub(super) fn shift_in(tail: &mut [f32], rows: &[f32], width: usize) {
    let (n_tail, n_rows) = (tail.len() / width, rows.len() / width);
    if n_rows >= n_tail {
        tail.copy_from_slice(&rows[(n_rows - n_tail) * width..]);
    } else {
        tail.copy_within(n_rows * width.., 0);
        tail[(n_tail - n_rows) * width..].copy_from_slice(rows);
    }
}

/// What a tentative row of a delta rule leaves in the window: for every value head its key, already
/// normalised, its value, the logarithm of the decay, and beta. Heads that share a key store it once each: a few
/// values more, and a commit that needs no head map.
#[derive(Clone, Copy)]
pub(super) struct DeltaWindow {
    pub n_head_v: usize,
    pub dim_k: usize,
    pub dim_v: usize,
}

thread_local! {
    static TOKENS: RefCell<Tokens> = RefCell::default();
}

/// One head's part of the rows of a window, side by side. Keeps its memory.
#[derive(Default)]
struct Tokens {
    k: Vec<f32>,
    v: Vec<f32>,
    decay: Vec<f32>,
    beta: Vec<f32>,
}

impl Tokens {
    fn gather<'a>(&mut self, parts: DeltaWindow, head: usize, rows: impl Iterator<Item = &'a [f32]>) {
        let (k, v, gates) = parts.parts(head);
        let all = [&mut self.k, &mut self.v, &mut self.decay, &mut self.beta];
        all.into_iter().for_each(Vec::clear);
        for row in rows {
            self.k.extend_from_slice(&row[k..k + parts.dim_k]);
            self.v.extend_from_slice(&row[v..v + parts.dim_v]);
            self.decay.push(row[gates].exp());
            self.beta.push(row[gates + 1]);
        }
    }

    fn run(&self, dim_k: usize) -> DeltaRun<'_> {
        DeltaRun { dim_k, k: &self.k, v: &self.v, decay: &self.decay, beta: &self.beta }
    }
}

impl DeltaWindow {
    /// Values of the committed state, all heads.
    pub fn state_len(&self) -> usize {
        self.n_head_v * self.dim_k * self.dim_v
    }

    /// Where value head `head` keeps its parts in a row: key, value, decay and beta.
    pub fn parts(&self, head: usize) -> (usize, usize, usize) {
        let keys = self.n_head_v * self.dim_k;
        (head * self.dim_k, keys + head * self.dim_v, keys + self.n_head_v * self.dim_v + 2 * head)
    }
}
