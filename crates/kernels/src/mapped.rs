//! Memory for what is read from end to end in every step: weights and KV pages.
//!
//! An anonymous mapping of its own, in huge pages where the system grants them. With ordinary pages a core reads half as fast on
//! some machines: what fetches ahead in hardware stops at the end of each.

use std::io;

use memmap2::{MmapMut, MmapRaw};

const HUGE_PAGE: usize = 2 << 20;

/// Bytes of a cache line.
pub const LINE: usize = 64;

/// Zeroed memory that begins on a cache line.
#[derive(Debug)]
pub(crate) struct Mapped {
    mapping: MmapRaw,
    /// Where it begins in the mapping.
    start: usize,
    len: usize,
}

impl Mapped {
    /// `len` bytes. The system commits them page by page, when they are first touched.
    pub fn zeroed(len: usize) -> io::Result<Mapped> {
        // Huge pages lie on multiples of their size, and the system may put the mapping elsewhere.
        let slack = if len >= HUGE_PAGE { HUGE_PAGE } else { 0 };
        let mapping = MmapRaw::from(MmapMut::map_anon((len + slack).max(1))?);
        #[cfg(target_os = "linux")]
        if slack > 0 {
            // A wish: a system without huge pages refuses, and nothing but speed depends on it.
            let _ = mapping.advise(memmap2::Advice::HugePage);
        }
        let start = if slack > 0 { mapping.as_ptr().align_offset(HUGE_PAGE) } else { 0 };
        debug_assert!(mapping.as_ptr().addr().is_multiple_of(LINE), "mappings begin on a page");
        Ok(Mapped { mapping, start, len })
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// The first of `len` readable and writable bytes.
    pub fn as_ptr(&self) -> *mut u8 {
        // SAFETY: the slack has room for the start.
        unsafe { self.mapping.as_mut_ptr().add(self.start) }
    }
}
