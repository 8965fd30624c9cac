//! A weight matrix in tiles: `tiles [n_out / 32, n_in / 256]`, one behind the other, in memory of its own.
//!
//! The memory is a part of [`TileMemory`], one mapping for all matrices of a model: a matrix alone may be smaller than a huge page.
//! The last group of rows is filled up with rows of zeros, whose products nobody sees; the last tile of a row is shorter
//! where the row is not whole blocks of 256 (96 for formats of floats).

use std::ops::Range;

use std::sync::Arc;

use paceline_gguf::GgmlType;

use super::format::{PackedFormat, ROWS};
use super::{Ahead, Grain, format};
use crate::mapped::{LINE, Mapped};
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
    /// All groups of tiles.
    tiles: Region,
    ahead: Ahead,
}

/// Memory for the tiles of some matrices, which are read in the order in which they are packed into it.
///
/// Pages are committed when a matrix is packed, so a reservation costs nothing before that.
pub struct TileMemory {
    memory: Arc<Mapped>,
    /// The part that no matrix has yet.
    free: Range<usize>,
}

/// A part of a mapping that belongs to one matrix.
struct Region {
    memory: Arc<Mapped>,
    range: Range<usize>,
}

impl Region {
    fn bytes(&self) -> &[u8] {
        // SAFETY: inside the memory, which lives as long as this; `TileMemory` gives each byte to one region, and only
        // `bytes_mut` writes it.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr().add(self.range.start), self.range.len()) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed mutably.
        unsafe {
            std::slice::from_raw_parts_mut(self.memory.as_ptr().add(self.range.start), self.range.len())
        }
    }
}

impl TileMemory {
    /// Room for matrices of these sizes, as [`packed_bytes`] gives them. Regions lie on lines, as vectors are loaded from them.
    ///
    /// # Errors
    /// What the system says if it has no memory.
    pub fn reserve(sizes: impl Iterator<Item = usize>) -> std::io::Result<TileMemory> {
        let bytes = sizes.map(|size| size.next_multiple_of(LINE)).sum();
        Ok(TileMemory { memory: Arc::new(Mapped::zeroed(bytes)?), free: 0..bytes })
    }

    /// The next `bytes`, all zero.
    fn take(&mut self, bytes: usize) -> Region {
        let range = self.free.start..self.free.start + bytes;
        assert!(range.end <= self.free.end, "{bytes} bytes of {:?} reserved ones", self.free);
        self.free.start = range.end.next_multiple_of(LINE).min(self.free.end);
        Region { memory: self.memory.clone(), range }
    }
}

/// Bytes that `n_slab` matrices `[n_out, n_in]` take in [`TileMemory`], or `None` if the type has no packed form. `dims` as for
/// [`pack_into`].
pub fn packed_bytes(ty: GgmlType, [n_in, n_out, n_slab]: [usize; 3]) -> Option<usize> {
    format(ty).map(|format| n_slab * n_out.div_ceil(ROWS) * group_bytes(format, n_in))
}

/// Bytes of a group of tiles: whole tiles, and a shorter one at the end.
fn group_bytes(format: &PackedFormat, n_in: usize) -> usize {
    let tile_len = format.grain.block_len();
    let tail = match n_in % tile_len {
        0 => 0,
        n_inputs => (format.tile_bytes)(n_inputs),
    };
    n_in / tile_len * (format.tile_bytes)(tile_len) + tail
}

/// [`pack_into`] memory of its own.
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

/// [`pack_into`] memory of its own: several matrices, one behind the other.
///
/// # Panics
/// If the bytes are not those of whole rows.
pub fn pack_slabs(
    ty: GgmlType,
    bytes: &[u8],
    dims: [usize; 3],
    team: &Team,
    progress: &(dyn Fn(usize) + Sync),
) -> Result<Option<PackedMatrix>, PackError> {
    let Some(size) = packed_bytes(ty, dims) else { return Ok(None) };
    let [n_in, n_out, n_slab] = dims;
    let mut memory = TileMemory::reserve([size].into_iter()).map_err(|source| PackError {
        n_out: n_out * n_slab,
        n_in,
        bytes: size,
        source,
    })?;
    Ok(pack_into(&mut memory, ty, bytes, dims, team, progress))
}

/// Packs the rows of a tensor, in parallel; `progress` is told how many bytes of it have been read, piece by piece, by
/// several threads. `None` if the type has no packed form.
///
/// `dims` is `[n_in, n_out, n_slab]`: `n_slab` matrices `[n_out, n_in]` that lie one behind the other, as the experts of a mixture
/// do, become one. Each begins with a group: slab `s` has the groups from `s · n_out.div_ceil(32)` on. Rows of zeros fill up
/// its last group.
///
/// # Panics
/// If the bytes are not those of whole rows, or less than [`packed_bytes`] of memory is left.
pub fn pack_into(
    memory: &mut TileMemory,
    ty: GgmlType,
    bytes: &[u8],
    [n_in, n_out, n_slab]: [usize; 3],
    team: &Team,
    progress: &(dyn Fn(usize) + Sync),
) -> Option<PackedMatrix> {
    let format = format(ty)?;
    assert!(n_in > 0 && n_in.is_multiple_of(ty.block_len()), "a row of {n_in} in {} blocks", ty.name());
    let row_bytes = n_in / ty.block_len() * ty.block_bytes();
    let n_rows = n_out * n_slab;
    assert_eq!(bytes.len(), n_rows * row_bytes, "bytes of {} weights [{n_rows}, {n_in}]", ty.name());

    let (tile_bytes, group_bytes) =
        ((format.tile_bytes)(format.grain.block_len()), group_bytes(format, n_in));
    let slab_groups = n_out.div_ceil(ROWS);
    let n_groups = n_slab * slab_groups;
    let mut tiles = memory.take(n_groups * group_bytes);
    let tile_len = format.grain.block_len();
    let tile_source_bytes = tile_len / ty.block_len() * ty.block_bytes();
    let shared = SharedMut::new(tiles.bytes_mut());
    team.for_each(n_groups, &|group| {
        // SAFETY: each group is visited once, and groups do not overlap.
        let tiles = unsafe { shared.range(group * group_bytes..(group + 1) * group_bytes) };
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
    // The last slab's last group stays short, as that of a single matrix does.
    let n_out = (n_slab - 1) * slab_groups * ROWS + n_out;
    Some(PackedMatrix { format, n_in, n_out, tile_bytes, group_bytes, tiles, ahead: Ahead::DEFAULT })
}

impl PackedMatrix {
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
        &self.tiles.bytes()[groups.start * self.group_bytes..groups.end * self.group_bytes]
    }

    /// How far ahead its products ask for it.
    pub fn ahead(&self) -> &Ahead {
        &self.ahead
    }

    pub(super) fn set_ahead(&mut self, ahead: Ahead) {
        self.ahead = ahead;
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
