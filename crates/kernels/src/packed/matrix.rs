//! A weight matrix in tiles: `tiles [n_out / 32, n_in / 256]`, one behind the other, in memory of its own.
//!
//! The memory is one anonymous mapping, in huge pages where the system grants them (a core reads those 8 to 27 % faster).
//! The last group of rows is filled up with rows of zeros, whose products nobody sees; the last tile of a row is shorter
//! where the row is not whole blocks of 256 (96 for formats of floats).

use std::ops::Range;

use memmap2::MmapMut;
use paceline_gguf::GgmlType;

use super::format::{PackedFormat, ROWS};
use super::{Grain, format};
use crate::shared::SharedMut;
use crate::team::Team;

/// Why a matrix could not be packed.
#[derive(Debug, thiserror::Error)]
#[error(
    "packing a matrix [{n_out}, {n_in}]: no memory for {bytes} bytes of tiles: {source}; unpacked weights need none"
)]
pub struct PackError {
    /// Rows of the matrix.
    pub n_out: usize,
    /// Its inner dimension.
    pub n_in: usize,
    /// Bytes that it takes.
    pub bytes: usize,
    /// What the system says.
    pub source: std::io::Error,
}

/// A weight matrix `[n_out, n_in]` in tiles of 32 rows.
pub struct PackedMatrix {
    format: &'static PackedFormat,
    n_in: usize,
    n_out: usize,
    tile_bytes: usize,
    group_bytes: usize,
    memory: MmapMut,
    /// Where the tiles begin in `memory`.
    start: usize,
}

/// Packs the rows of a tensor, in parallel; `progress` is told how many bytes of it have been read, piece by piece, by
/// several threads. `None` if the type has no packed form.
///
/// # Panics
/// If the bytes are not those of whole rows.
pub fn pack(
    ty: GgmlType,
    bytes: &[u8],
    n_in: usize,
    n_out: usize,
    team: &Team,
    progress: &(dyn Fn(usize) + Sync),
) -> Result<Option<PackedMatrix>, PackError> {
    pack_slabs(ty, bytes, [n_in, n_out, 1], team, progress)
}

/// [`pack`] of `n_slab` matrices `[n_out, n_in]` that lie one behind the other, as the experts of a mixture do: `dims` is
/// `[n_in, n_out, n_slab]`. They become one matrix in one mapping (huge pages are granted to large ones only), and each
/// begins with a group: slab `s` has the groups from `s · n_out.div_ceil(32)` on. Rows of zeros fill up its last group.
///
/// # Panics
/// As [`pack`].
pub fn pack_slabs(
    ty: GgmlType,
    bytes: &[u8],
    [n_in, n_out, n_slab]: [usize; 3],
    team: &Team,
    progress: &(dyn Fn(usize) + Sync),
) -> Result<Option<PackedMatrix>, PackError> {
    let Some(format) = format(ty) else { return Ok(None) };
    assert!(n_in > 0 && n_in.is_multiple_of(ty.block_len()), "a row of {n_in} in {} blocks", ty.name());
    let row_bytes = n_in / ty.block_len() * ty.block_bytes();
    let n_rows = n_out * n_slab;
    assert_eq!(bytes.len(), n_rows * row_bytes, "bytes of {} weights [{n_rows}, {n_in}]", ty.name());

    let slab_groups = n_out.div_ceil(ROWS);
    // The last slab's last group stays short, as that of a single matrix does.
    let n_out_padded = (n_slab - 1) * slab_groups * ROWS + n_out;
    let mut packed = PackedMatrix::zeroed(format, n_in, n_out_padded)
        .map_err(|(bytes, source)| PackError { n_out: n_rows, n_in, bytes, source })?;
    let (tile_bytes, group_bytes) = (packed.tile_bytes, packed.group_bytes);
    let tile_len = format.grain.block_len();
    let tile_source_bytes = tile_len / ty.block_len() * ty.block_bytes();
    let (start, n_groups) = (packed.start, packed.n_groups());
    let memory = SharedMut::new(&mut packed.memory);
    team.for_each(n_groups, &|group| {
        // SAFETY: each group is visited once, and groups do not overlap.
        let tiles = unsafe { memory.range(start + group * group_bytes..start + (group + 1) * group_bytes) };
        let (slab, first) = (group / slab_groups, group % slab_groups * ROWS);
        let rows = slab * n_out + first..slab * n_out + n_out.min(first + ROWS);
        for (row, r) in rows.clone().enumerate() {
            let source = &bytes[r * row_bytes..(r + 1) * row_bytes];
            let sources = source.chunks(tile_source_bytes);
            for ((k, source), tile) in
                (0..n_in).step_by(tile_len).zip(sources).zip(tiles.chunks_mut(tile_bytes))
            {
                (format.pack_row)(source, tile_len.min(n_in - k), row, tile);
            }
        }
        progress(rows.len() * row_bytes);
    });
    Ok(Some(packed))
}

impl PackedMatrix {
    /// Tiles of zeros; else the bytes that were asked for and the system's answer.
    fn zeroed(
        format: &'static PackedFormat,
        n_in: usize,
        n_out: usize,
    ) -> Result<Self, (usize, std::io::Error)> {
        const HUGE_PAGE: usize = 2 << 20;
        let tile_len = format.grain.block_len();
        let tile_bytes = (format.tile_bytes)(tile_len);
        let tail = match n_in % tile_len {
            0 => 0,
            n_inputs => (format.tile_bytes)(n_inputs),
        };
        let group_bytes = n_in / tile_len * tile_bytes + tail;
        let bytes = n_out.div_ceil(ROWS) * group_bytes;
        // Huge pages lie on multiples of their size, and the system may put the mapping elsewhere.
        let slack = if bytes >= HUGE_PAGE { HUGE_PAGE } else { 0 };
        let memory = MmapMut::map_anon((bytes + slack).max(1)).map_err(|source| (bytes, source))?;
        #[cfg(target_os = "linux")]
        if slack > 0 {
            // A wish: a system without huge pages refuses, and nothing but speed depends on it.
            let _ = memory.advise(memmap2::Advice::HugePage);
        }
        let start = if slack > 0 { memory.as_ptr().align_offset(HUGE_PAGE) } else { 0 };
        debug_assert!(memory[start..].as_ptr().addr().is_multiple_of(64), "tiles begin on a line");
        Ok(Self { format, n_in, n_out, tile_bytes, group_bytes, memory, start })
    }

    /// The type it was packed from.
    pub fn ty(&self) -> GgmlType {
        self.format.ty
    }

    /// The activations that it multiplies.
    pub fn grain(&self) -> Grain {
        self.format.grain
    }

    /// Inner dimension.
    pub fn n_in(&self) -> usize {
        self.n_in
    }

    /// Number of rows.
    pub fn n_out(&self) -> usize {
        self.n_out
    }

    /// Groups of 32 rows, the unit in which threads share the work; the last may be short of rows.
    pub fn n_groups(&self) -> usize {
        self.n_out.div_ceil(ROWS)
    }

    /// The rows of some groups.
    pub fn rows(&self, groups: Range<usize>) -> Range<usize> {
        self.n_out.min(groups.start * ROWS)..self.n_out.min(groups.end * ROWS)
    }

    /// Bytes of all tiles: what one product reads.
    pub fn bytes(&self) -> usize {
        self.n_groups() * self.group_bytes
    }

    /// The tiles of some groups: what a product with them reads.
    ///
    /// # Panics
    /// If there are no such groups.
    pub fn tiles(&self, groups: Range<usize>) -> &[u8] {
        assert!(groups.end <= self.n_groups(), "groups {groups:?} of {}", self.n_groups());
        &self.memory[self.start..][groups.start * self.group_bytes..groups.end * self.group_bytes]
    }

    pub(super) fn format(&self) -> &'static PackedFormat {
        self.format
    }

    pub(super) fn tile_bytes(&self) -> usize {
        self.tile_bytes
    }

    pub(super) fn group_bytes(&self) -> usize {
        self.group_bytes
    }
}
