//! Pages and slots in memory.
//!
//! A page holds, for each KV state in turn, its keys and then its values, `page_len` cells of each:
//!
//! ```text
//! page = [ k of state 0 | v of state 0 | k of state 1 | … ]      cell c of a part at c · width
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
//! Everything grows when a page or slot is first used.

use std::{
    any::Any,
    collections::HashMap,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard},
};

use paceline_kernels::{
    KernelTable, SharedMut, Team,
    delta::{DeltaToken, delta_advance},
    f16,
    kv::{KvData, KvDataMut},
};

use crate::{KvType, PageId, SavedId, SlotId, StateConfig, StateDecl, States};

/// Storage of one page.
pub(super) enum PageData {
    F32(Vec<f32>),
    F16(Vec<f16>),
}

impl PageData {
    fn new(kv_type: KvType, len: usize) -> PageData {
        match kv_type {
            KvType::F32 => PageData::F32(vec![0.0; len]),
            KvType::F16 => PageData::F16(vec![f16::ZERO; len]),
        }
    }

    /// Values `start .. start + len`, to read.
    pub fn read(&self, start: usize, len: usize) -> KvData<'_> {
        match self {
            PageData::F32(data) => KvData::F32(&data[start..start + len]),
            PageData::F16(data) => KvData::F16(&data[start..start + len]),
        }
    }

    /// Values `start .. start + len`, to write.
    pub fn write(&mut self, start: usize, len: usize) -> KvDataMut<'_> {
        match self {
            PageData::F32(data) => KvDataMut::F32(&mut data[start..start + len]),
            PageData::F16(data) => KvDataMut::F16(&mut data[start..start + len]),
        }
    }

    fn copy_from(&mut self, other: &PageData) {
        match (self, other) {
            (PageData::F32(to), PageData::F32(from)) => to.copy_from_slice(from),
            (PageData::F16(to), PageData::F16(from)) => to.copy_from_slice(from),
            _ => unreachable!("all pages of a store have one type"),
        }
    }

    fn export(&self, out: &mut Vec<u8>) {
        match self {
            PageData::F32(data) => put(out, data, |x| x.to_le_bytes()),
            PageData::F16(data) => put(out, data, |x| x.to_bits().to_le_bytes()),
        }
    }

    /// Only for as many bytes as an export gives.
    fn import(&mut self, bytes: &[u8]) {
        match self {
            PageData::F32(data) => take(data, bytes, f32::from_le_bytes),
            PageData::F16(data) => take(data, bytes, |x| f16::from_bits(u16::from_le_bytes(x))),
        }
    }
}

/// Appends values as bytes.
fn put<T: Copy, const N: usize>(out: &mut Vec<u8>, values: &[T], bytes: impl Fn(T) -> [u8; N]) {
    out.reserve(values.len() * N);
    values.iter().for_each(|&x| out.extend_from_slice(&bytes(x)));
}

/// Fills values from as many bytes as they have.
fn take<T, const N: usize>(values: &mut [T], bytes: &[u8], value: impl Fn([u8; N]) -> T) {
    let (chunks, rest) = bytes.as_chunks::<N>();
    assert!(
        chunks.len() == values.len() && rest.is_empty(),
        "{} bytes for {} values",
        bytes.len(),
        values.len()
    );
    values.iter_mut().zip(chunks).for_each(|(x, bytes)| *x = value(*bytes));
}

/// What grows and changes.
#[derive(Default)]
pub(super) struct Inner {
    pub pages: Vec<Option<PageData>>,
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
    /// First value of each KV state in a page.
    offsets: Vec<usize>,
    page_width: usize,
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
        let (mut page_width, mut slot_width, mut window_width) = (0, 0, 0);
        let mut offsets = Vec::with_capacity(decls.len());
        let mut layouts = Vec::with_capacity(decls.len());
        for decl in decls {
            offsets.push(page_width);
            layouts.push(SlotLayout {
                start: slot_width,
                len: decl.slot_width(),
                slot_width: 0,
                row_start: window_width,
                row_len: decl.window_width(),
                window_width: 0,
            });
            page_width += decl.cell_width() * config.page_len;
            slot_width += decl.slot_width();
            window_width += decl.window_width() * config.n_tentative_max;
        }
        for layout in &mut layouts {
            (layout.slot_width, layout.window_width) = (slot_width, window_width);
        }
        CpuStates(Arc::new(Shared {
            decls: decls.to_vec(),
            config,
            offsets,
            page_width,
            slot_width,
            window_width,
            layouts,
            inner: Mutex::default(),
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

    /// First value of a KV state's keys in a page; its values follow.
    pub fn page_offset(&self, state: usize) -> usize {
        self.0.offsets[state]
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

    fn page_bytes(&self) -> usize {
        self.0.page_width * self.0.config.kv_type.bytes()
    }

    fn slot_bytes(&self) -> usize {
        size_of::<f32>() * (self.0.slot_width + self.0.window_width)
    }

    fn page_alloc(&self, page: PageId) {
        let mut inner = self.lock();
        let at = page.0 as usize;
        if inner.pages.len() <= at {
            inner.pages.resize_with(at + 1, || None);
        }
        inner.pages[at] = Some(PageData::new(self.0.config.kv_type, self.0.page_width));
    }

    fn page_release(&self, page: PageId) {
        self.lock().pages[page.0 as usize] = None;
    }

    fn page_copy(&self, from: PageId, to: PageId) {
        let mut inner = self.lock();
        match inner.pages.get_disjoint_mut([from.0 as usize, to.0 as usize]) {
            Ok([Some(source), Some(target)]) => target.copy_from(source),
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
                        for row in window.chunks_exact(layout.row_len) {
                            let token = parts.token(row, head);
                            delta_advance(self.0.table, state, &token);
                        }
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
            Some(Some(data)) => data.export(out),
            _ => panic!("export of {page:?}, which has no storage"),
        }
    }

    fn page_import(&self, page: PageId, bytes: &[u8]) -> bool {
        if bytes.len() != self.page_bytes() {
            return false;
        }
        match self.lock().pages.get_mut(page.0 as usize) {
            Some(Some(data)) => data.import(bytes),
            _ => panic!("import into {page:?}, which has no storage"),
        }
        true
    }

    fn saved_export(&self, saved: SavedId, out: &mut Vec<u8>) {
        match self.lock().saved.get(&saved) {
            Some(values) => put(out, values, f32::to_le_bytes),
            None => panic!("export of {saved:?}, which has no storage"),
        }
    }

    fn saved_import(&self, saved: SavedId, bytes: &[u8]) -> bool {
        if bytes.len() != self.saved_bytes() {
            return false;
        }
        let mut values = vec![0.0; self.0.slot_width];
        take(&mut values, bytes, f32::from_le_bytes);
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

    fn token<'a>(&self, row: &'a [f32], head: usize) -> DeltaToken<'a> {
        let (k, v, gates) = self.parts(head);
        DeltaToken::new(&row[k..k + self.dim_k], &row[v..v + self.dim_v], row[gates], row[gates + 1])
    }
}
