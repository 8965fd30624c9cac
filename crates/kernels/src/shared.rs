//! A slice that several workers fill at once, each its own part.
//!
//! A wave of the plan is cut into tiles, and the tiles of one op write disjoint parts of one
//! buffer. Where the parts are is arithmetic that the borrow checker cannot follow, so here the
//! caller vouches for it; what can be checked, the bounds, always is.

use std::marker::PhantomData;
use std::ops::Range;

/// A mutable slice shared by workers that take disjoint ranges of it.
///
/// The lifetime keeps the owner of the slice borrowed for as long as any worker may write to it.
pub struct SharedMut<'a, T> {
    data: *mut T,
    len: usize,
    owner: PhantomData<&'a mut [T]>,
}

// SAFETY: it is a `&mut [T]` whose parts go to other threads, which `T: Send` allows, and `get`
// lets several threads read one part, which `T: Sync` allows.
unsafe impl<T: Send + Sync> Send for SharedMut<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send + Sync> Sync for SharedMut<'_, T> {}

impl<'a, T> SharedMut<'a, T> {
    /// Shares `slice` until the borrow ends.
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { data: slice.as_mut_ptr(), len: slice.len(), owner: PhantomData }
    }

    /// Number of elements of the whole slice.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the slice has no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements of `range`, to write.
    ///
    /// # Panics
    /// If `range` is reversed or reaches past the end.
    ///
    /// # Safety
    /// While the returned slice lives, no other slice from [`range`](Self::range) or
    /// [`get`](Self::get), on this thread or another, may overlap `range`.
    #[allow(clippy::mut_from_ref)] // that is the point; the contract above replaces the borrow
    pub unsafe fn range(&self, range: Range<usize>) -> &mut [T] {
        let n = self.checked_len(&range);
        // SAFETY: inside the slice that `new` borrowed mutably (`checked_len`); the caller
        // promises that nothing else overlaps it.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(range.start), n) }
    }

    /// The elements of `range`, to read.
    ///
    /// # Panics
    /// If `range` is reversed or reaches past the end.
    ///
    /// # Safety
    /// While the returned slice lives, no slice from [`range`](Self::range) may overlap `range`.
    pub unsafe fn get(&self, range: Range<usize>) -> &[T] {
        let n = self.checked_len(&range);
        // SAFETY: inside the slice that `new` borrowed (`checked_len`); the caller promises that
        // nobody writes to it.
        unsafe { std::slice::from_raw_parts(self.data.add(range.start), n) }
    }

    fn checked_len(&self, range: &Range<usize>) -> usize {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "range {range:?} of a shared slice of {} elements",
            self.len
        );
        range.end - range.start
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disjoint_parts_are_written_from_several_threads() {
        let mut data = vec![0u32; 100];
        let shared = SharedMut::new(&mut data);
        std::thread::scope(|scope| {
            for part in 0..4 {
                let shared = &shared;
                scope.spawn(move || {
                    let start = part * 25;
                    // SAFETY: the four ranges of 25 do not overlap.
                    for (i, v) in unsafe { shared.range(start..start + 25) }.iter_mut().enumerate() {
                        *v = (start + i) as u32;
                    }
                });
            }
        });
        // SAFETY: the writers have been joined.
        assert_eq!(unsafe { shared.get(24..26) }, [24, 25]);
        assert_eq!(data, (0..100).collect::<Vec<u32>>());
    }

    #[test]
    #[should_panic(expected = "range 3..5 of a shared slice of 4 elements")]
    fn a_range_past_the_end_is_refused() {
        let mut data = [0u8; 4];
        let shared = SharedMut::new(&mut data);
        // SAFETY: the only slice taken, and it panics.
        unsafe { shared.range(3..5) };
    }

    #[test]
    #[should_panic(expected = "of a shared slice of 4 elements")]
    #[allow(clippy::reversed_empty_ranges)]
    fn a_reversed_range_is_refused() {
        let mut data = [0u8; 4];
        let shared = SharedMut::new(&mut data);
        // SAFETY: the only slice taken, and it panics.
        unsafe { shared.get(3..2) };
    }
}
