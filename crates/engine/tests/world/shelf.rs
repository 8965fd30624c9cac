//! A shelf in memory, with the delays and the damage that files have.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard},
};

use paceline_engine::{CheckedSnapshot, Shelf, ShelfId, ShelfNews, SnapshotHead, Stocked};
use paceline_testkit::Rng;

#[derive(Default)]
struct Inner {
    /// By time of last use.
    files: BTreeMap<ShelfId, (u64, Vec<u8>)>,
    now: u64,
}

/// What outlives an engine. Clones are the same folder.
#[derive(Clone, Default)]
pub struct Folder(Arc<Mutex<Inner>>);

impl Folder {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap()
    }

    pub fn n_file(&self) -> usize {
        self.lock().files.len()
    }

    pub fn bytes(&self) -> usize {
        self.lock().files.values().map(|(_, bytes)| bytes.len()).sum()
    }

    /// Changes a byte of each file, not of its head.
    pub fn damage(&self) {
        for (_, bytes) in self.lock().files.values_mut() {
            let n = SnapshotHead::n_byte(bytes).unwrap();
            let at = n + (bytes.len() - n) / 2;
            bytes[at] ^= 4;
        }
    }

    /// A shelf over it, with delays that follow `seed`. One write and one read in `n_fault` fails; 0 is none.
    pub fn shelf(&self, seed: u64, n_fault: usize) -> Box<dyn Shelf> {
        Box::new(TestShelf {
            folder: self.clone(),
            open: None,
            news: VecDeque::new(),
            rng: Mutex::new(Rng::new(seed)),
            n_fault,
        })
    }
}

struct TestShelf {
    folder: Folder,
    open: Option<(ShelfId, Vec<u8>)>,
    news: VecDeque<ShelfNews>,
    rng: Mutex<Rng>,
    n_fault: usize,
}

impl TestShelf {
    fn fails(&self) -> bool {
        self.n_fault > 0 && self.rng.lock().unwrap().range(0..self.n_fault) == 0
    }
}

impl Shelf for TestShelf {
    fn stock(&mut self) -> Vec<Stocked> {
        let inner = self.folder.lock();
        let mut files: Vec<_> = inner.files.iter().collect();
        files.sort_by_key(|(_, (used, _))| *used);
        let head = |bytes: &[u8]| SnapshotHead::read(bytes).unwrap();
        files.into_iter().map(|(&id, (_, bytes))| Stocked { id, head: head(bytes) }).collect()
    }

    fn has_room(&self) -> bool {
        self.rng.lock().unwrap().chance(0.7)
    }

    fn put(&mut self, id: ShelfId, bytes: Vec<u8>, is_last: bool) {
        match &mut self.open {
            Some((open, all)) if *open == id => all.extend(bytes),
            open => *open = Some((id, bytes)),
        }
        if is_last && let Some((id, bytes)) = self.open.take() {
            if self.fails() {
                return self.news.push_back(ShelfNews::NotStored(id));
            }
            CheckedSnapshot::new(bytes.clone()).expect("what is written is whole");
            let mut inner = self.folder.lock();
            inner.now += 1;
            let now = inner.now;
            inner.files.insert(id, (now, bytes));
            self.news.push_back(ShelfNews::Stored(id));
        }
    }

    fn fetch(&mut self, id: ShelfId) {
        let bytes = self.folder.lock().files.get(&id).map(|(_, bytes)| bytes.clone());
        let checked = bytes.filter(|_| !self.fails()).and_then(|bytes| CheckedSnapshot::new(bytes).ok());
        self.news.push_back(match checked {
            Some(file) => ShelfNews::Fetched(id, file),
            None => ShelfNews::NotFetched(id),
        });
    }

    fn touch(&mut self, id: ShelfId) {
        let mut inner = self.folder.lock();
        inner.now += 1;
        let now = inner.now;
        if let Some((used, _)) = inner.files.get_mut(&id) {
            *used = now;
        }
    }

    fn remove(&mut self, id: ShelfId) {
        self.folder.lock().files.remove(&id);
    }

    fn news(&mut self) -> Option<ShelfNews> {
        let is_due = self.rng.lock().unwrap().chance(0.3);
        if is_due { self.news.pop_front() } else { None }
    }
}
