//! `--cache-disk`: the shelf behind the prompt cache, as files in a folder.
//!
//! ```text
//!  engine's thread ──puts, removals──▶ writer ──▶ .ID.PID-N.part ── rename ──▶ ID.snapshot
//!        ▲         ──fetches────────▶ reader ──▶ read, checksum
//!        └───────────────news────────────┘
//! ```
//!
//! A file has its name only once it is complete. It is not forced to the device: what a crash spoils has a wrong checksum and
//! is dropped when it is found. Files that are no snapshots are left alone; so are those of other models, but for the room
//! that they take, which the engine counts. Several servers may share a folder: each knows what it found and wrote itself, and
//! a file that another one has removed is computed again.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    thread,
    time::{Duration, SystemTime},
};

use paceline_engine::{CheckedSnapshot, RestoreError, Shelf, ShelfId, ShelfNews, SnapshotHead, Stocked};

/// Bytes that may wait for the writer.
const N_BYTE_QUEUE: usize = 32 << 20;

/// A half-written file that nobody has touched for this long was left by a process that is gone.
const PART_AGE: Duration = Duration::from_secs(3600);

const SUFFIX: &str = ".snapshot";

enum Job {
    Put { id: ShelfId, bytes: Vec<u8>, is_last: bool },
    Touch(ShelfId),
    Remove(ShelfId),
}

/// The files of a folder.
pub struct DiskCache {
    stock: Vec<Stocked>,
    jobs: Sender<Job>,
    n_byte_queued: Arc<AtomicUsize>,
    fetches: Sender<ShelfId>,
    news: Receiver<ShelfNews>,
}

impl DiskCache {
    /// Looks at the heads of all files in `folder`, which is made if it is not there, and starts the threads.
    pub fn open(folder: &Path) -> io::Result<DiskCache> {
        fs::create_dir_all(folder)?;
        let stock = stock(folder)?;
        let (jobs, todo) = channel();
        let (fetches, wanted) = channel();
        let (tell, news) = channel();
        let n_byte_queued = Arc::new(AtomicUsize::new(0));
        let writer = Writer {
            folder: folder.to_owned(),
            open: None,
            n_byte_queued: n_byte_queued.clone(),
            news: tell.clone(),
        };
        thread::Builder::new().name("cache-write".into()).spawn(move || writer.run(&todo))?;
        let folder = folder.to_owned();
        thread::Builder::new().name("cache-read".into()).spawn(move || {
            while let Ok(id) = wanted.recv() {
                if tell.send(read(&folder, id)).is_err() {
                    return;
                }
            }
        })?;
        Ok(DiskCache { stock, jobs, n_byte_queued, fetches, news })
    }

    fn send(&self, job: Job) {
        // The writer ends only with us.
        let _ = self.jobs.send(job);
    }
}

impl Shelf for DiskCache {
    fn stock(&mut self) -> Vec<Stocked> {
        std::mem::take(&mut self.stock)
    }

    fn has_room(&self) -> bool {
        self.n_byte_queued.load(Ordering::Relaxed) < N_BYTE_QUEUE
    }

    fn put(&mut self, id: ShelfId, bytes: Vec<u8>, is_last: bool) {
        self.n_byte_queued.fetch_add(bytes.len(), Ordering::Relaxed);
        self.send(Job::Put { id, bytes, is_last });
    }

    fn fetch(&mut self, id: ShelfId) {
        let _ = self.fetches.send(id);
    }

    fn touch(&mut self, id: ShelfId) {
        self.send(Job::Touch(id));
    }

    fn remove(&mut self, id: ShelfId) {
        self.send(Job::Remove(id));
    }

    fn news(&mut self) -> Option<ShelfNews> {
        self.news.try_recv().ok()
    }
}

fn path_of(folder: &Path, id: ShelfId) -> PathBuf {
    folder.join(format!("{:016x}{SUFFIX}", id.0))
}

fn id_of(name: &str) -> Option<ShelfId> {
    let digits = name.strip_suffix(SUFFIX).filter(|digits| digits.len() == 16)?;
    u64::from_str_radix(digits, 16).ok().map(ShelfId)
}

/// What lies in a folder, the file that was used least lately first. Those of ours that are cut or damaged are removed.
fn stock(folder: &Path) -> io::Result<Vec<Stocked>> {
    let mut found: Vec<(SystemTime, Stocked)> = Vec::new();
    let mut foreign: Vec<String> = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let Ok(meta) = entry.metadata() else { continue };
        if name.starts_with('.') && name.ends_with(".part") {
            let age = meta.modified().ok().and_then(|then| then.elapsed().ok());
            if age.is_some_and(|age| age > PART_AGE) {
                let _ = fs::remove_file(entry.path());
            }
            continue;
        }
        let Some(id) = id_of(&name).filter(|_| meta.is_file()) else {
            foreign.push(name);
            continue;
        };
        match read_head(&entry.path()) {
            Ok(head) if head.n_file == meta.len() => {
                found.push((meta.modified().unwrap_or(SystemTime::UNIX_EPOCH), Stocked { id, head }));
            }
            Ok(_) => drop_broken(&entry.path(), "it is cut"),
            Err(Fault::File(RestoreError::Foreign { .. })) => foreign.push(name),
            Err(Fault::File(error)) => drop_broken(&entry.path(), &error.to_string()),
            Err(Fault::Io(error)) => {
                tracing::warn!("{}: can't be read, and is left alone: {error}", entry.path().display());
            }
        }
    }
    if let Some(first) = foreign.first() {
        tracing::warn!(
            "{}: {} files are no snapshots of this version and are left alone, `{first}` for one",
            folder.display(),
            foreign.len()
        );
    }
    found.sort_by_key(|(used, stocked)| (*used, stocked.id));
    Ok(found.into_iter().map(|(_, stocked)| stocked).collect())
}

fn drop_broken(path: &Path, why: &str) {
    tracing::warn!("{}: a cached prompt is dropped: {why}", path.display());
    if let Err(error) = fs::remove_file(path) {
        tracing::warn!("{}: can't be removed: {error}", path.display());
    }
}

enum Fault {
    File(RestoreError),
    Io(io::Error),
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Fault {
        Fault::Io(error)
    }
}

impl From<RestoreError> for Fault {
    fn from(error: RestoreError) -> Fault {
        Fault::File(error)
    }
}

/// Reads no more than the head.
fn read_head(path: &Path) -> Result<SnapshotHead, Fault> {
    let mut file = File::open(path)?;
    let mut bytes = Vec::new();
    (&mut file).take(64).read_to_end(&mut bytes)?;
    let n = SnapshotHead::n_byte(&bytes)?;
    file.take(n.saturating_sub(bytes.len()) as u64).read_to_end(&mut bytes)?;
    Ok(SnapshotHead::read(&bytes)?)
}

/// All of a file, checked.
fn read(folder: &Path, id: ShelfId) -> ShelfNews {
    let path = path_of(folder, id);
    let checked = fs::read(&path).map_err(Fault::from).and_then(|bytes| Ok(CheckedSnapshot::new(bytes)?));
    let why = match checked {
        Ok(file) => return ShelfNews::Fetched(id, file),
        Err(Fault::File(error)) => error.to_string(),
        Err(Fault::Io(error)) => error.to_string(),
    };
    tracing::warn!("{}: a cached prompt is computed again: {why}", path.display());
    ShelfNews::NotFetched(id)
}

/// The thread that writes.
struct Writer {
    folder: PathBuf,
    /// The file that is being written; without a file if that went wrong.
    open: Option<(ShelfId, Option<(File, PathBuf)>)>,
    n_byte_queued: Arc<AtomicUsize>,
    news: Sender<ShelfNews>,
}

impl Writer {
    fn run(mut self, jobs: &Receiver<Job>) {
        while let Ok(job) = jobs.recv() {
            match job {
                Job::Put { id, bytes, is_last } => {
                    self.put(id, &bytes, is_last);
                    self.n_byte_queued.fetch_sub(bytes.len(), Ordering::Relaxed);
                }
                Job::Touch(id) => {
                    let file = File::options().append(true).open(path_of(&self.folder, id));
                    let _ = file.and_then(|file| file.set_modified(SystemTime::now()));
                }
                Job::Remove(id) => {
                    let path = path_of(&self.folder, id);
                    // Whatever has our name by now and is not ours stays.
                    if !matches!(read_head(&path), Err(Fault::File(RestoreError::Foreign { .. }))) {
                        let _ = fs::remove_file(path);
                    }
                }
            }
        }
        self.abandon();
    }

    fn put(&mut self, id: ShelfId, bytes: &[u8], is_last: bool) {
        if self.open.as_ref().is_none_or(|(open, _)| *open != id) {
            self.abandon();
            let made = self.create(id).map_err(complain).ok();
            self.open = Some((id, made));
        }
        let Some((_, file)) = &mut self.open else { return };
        if let Some((open, part)) = file
            && let Err(error) = open.write_all(bytes)
        {
            complain(error);
            let _ = fs::remove_file(part);
            *file = None;
        }
        if is_last {
            let written = self.open.take().and_then(|(_, file)| file);
            let named = written.is_some_and(|(_, part)| {
                let named = fs::rename(&part, path_of(&self.folder, id)).map_err(complain);
                named.inspect_err(|()| _ = fs::remove_file(&part)).is_ok()
            });
            let _ = self.news.send(if named { ShelfNews::Stored(id) } else { ShelfNews::NotStored(id) });
        }
    }

    fn create(&self, id: ShelfId) -> io::Result<(File, PathBuf)> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = self.folder.join(format!(".{:016x}.{}-{n}.part", id.0, std::process::id()));
        Ok((File::create_new(&path)?, path))
    }

    /// Ends a file that nobody goes on with.
    fn abandon(&mut self) {
        if let Some((_, Some((_, part)))) = self.open.take() {
            let _ = fs::remove_file(part);
        }
    }
}

/// Says once that files can't be written: a full disk would fill the log too.
fn complain(error: io::Error) {
    static SAID: AtomicBool = AtomicBool::new(false);
    if !SAID.swap(true, Ordering::Relaxed) {
        tracing::warn!("--cache-disk: a cached prompt could not be written (this is said once): {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wait(shelf: &mut DiskCache) -> ShelfNews {
        for _ in 0..2000 {
            if let Some(news) = shelf.news() {
                return news;
            }
            thread::sleep(Duration::from_millis(5));
        }
        panic!("no news");
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn files_are_whole_or_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("new");
        let mut shelf = DiskCache::open(&folder).unwrap();
        let (a, b) = (ShelfId(1), ShelfId(2));
        shelf.put(a, vec![1; 10], false);
        // Another one before its end: it never was.
        shelf.put(b, vec![2; 10], false);
        shelf.put(b, vec![3; 10], true);
        assert!(matches!(wait(&mut shelf), ShelfNews::Stored(id) if id == b));
        assert_eq!(names(&folder), ["0000000000000002.snapshot"]);
        assert_eq!(fs::read(path_of(&folder, b)).unwrap(), [[2; 10], [3; 10]].concat());
        // It is no snapshot, so it is neither taken up nor removed.
        shelf.fetch(b);
        assert!(matches!(wait(&mut shelf), ShelfNews::NotFetched(id) if id == b));
        shelf.fetch(a);
        assert!(matches!(wait(&mut shelf), ShelfNews::NotFetched(id) if id == a));
        shelf.remove(b);
        shelf.put(a, vec![4; 10], true);
        assert!(matches!(wait(&mut shelf), ShelfNews::Stored(id) if id == a));
        assert_eq!(names(&folder).len(), 2);
        drop(shelf);
        let mut again = DiskCache::open(&folder).unwrap();
        assert_eq!((again.stock().len(), names(&folder).len()), (0, 2), "foreign files are left alone");
    }

    #[test]
    fn a_folder_that_is_gone_costs_files_only() {
        let dir = tempfile::tempdir().unwrap();
        let mut shelf = DiskCache::open(dir.path()).unwrap();
        fs::remove_dir(dir.path()).unwrap();
        shelf.put(ShelfId(1), vec![1; 10], true);
        assert!(matches!(wait(&mut shelf), ShelfNews::NotStored(ShelfId(1))));
        assert!(shelf.has_room());
    }
}
