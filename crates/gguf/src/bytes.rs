//! The bytes of a file in memory: mapped, so that loading a model copies nothing and the page cache is shared.

use std::fs::{self, File};
use std::ops::Range;
use std::path::Path;

use memmap2::{Mmap, MmapMut};

use crate::Error;

/// A file's bytes; starts on a page boundary, so an aligned offset is an aligned address.
pub(crate) struct Bytes {
    map: Mmap,
    /// Pages can be read from the file again.
    #[cfg_attr(not(unix), allow(dead_code))]
    of_file: bool,
}

impl Bytes {
    /// Maps a file.
    pub(crate) fn open(path: &Path, format: &'static str) -> Result<Bytes, Error> {
        let failed = |action| move |source| Error::io(path, action, source);
        let not_a_file = |found: &str, hint| Error::Foreign {
            file: path.display().to_string(),
            expected: format,
            found: found.into(),
            hint,
        };
        // Asked before opening: opening a pipe would wait for its writer.
        let kind = fs::metadata(path).map_err(failed("open"))?;
        if kind.is_dir() {
            return Err(not_a_file("a directory", "give the path of a file in it"));
        }
        if !kind.is_file() {
            return Err(not_a_file("a device or pipe", "give the path of a regular file"));
        }
        let file = File::open(path).map_err(failed("open"))?;
        let len = file.metadata().map_err(failed("read"))?.len();
        if len == 0 {
            return Err(not_a_file("an empty file", "download or convert it again"));
        }
        // SAFETY: the map is read-only, lives as long as every slice of it (`Bytes` owns it and lends `&self`), and is only
        // ever read as bytes, for which each value is valid. What no reader of maps can rule out is another process that
        // writes or cuts the file meanwhile; this crate's own writers replace files by renaming and never write in place.
        let map = unsafe { Mmap::map(&file) }.map_err(failed("map"))?;
        Ok(Bytes { map, of_file: true })
    }

    /// Takes bytes that are in memory already, moved to a page of their own for the alignment.
    pub(crate) fn from_vec(name: &str, bytes: &[u8]) -> Result<Bytes, Error> {
        let failed = |source| Error::io(Path::new(name), "map", source);
        let mut map = MmapMut::map_anon(bytes.len()).map_err(failed)?;
        map.copy_from_slice(bytes);
        let map = map.make_read_only().map_err(failed)?;
        Ok(Bytes { map, of_file: false })
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        &self.map
    }

    /// Gives the pages of `range` back to the system; whoever reads them again waits for the page cache or the disk.
    /// Does nothing where there is no file to read them from again.
    pub(crate) fn release(&self, range: Range<usize>) {
        assert!(
            range.start <= range.end && range.end <= self.map.len(),
            "{range:?} of {} bytes",
            self.map.len()
        );
        #[cfg(unix)]
        if self.of_file && !range.is_empty() {
            // SAFETY: the map is shared, of a file and never written through, so a dropped page comes back with the
            // file's bytes: the values behind lent slices stay the same. A neighbour in the first or last page, too.
            let dropped = unsafe {
                self.map.unchecked_advise_range(
                    memmap2::UncheckedAdvice::DontNeed,
                    range.start,
                    range.end - range.start,
                )
            };
            // A system that does not want the pages back keeps them.
            let _ = dropped;
        }
    }
}
