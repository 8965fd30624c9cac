//! Random weights of any type, as fast as a file is written.
//!
//! Quantising noise for billions of weights would take minutes, so a few quant blocks are made for each kind of matrix, by the
//! quantiser itself from normal noise, and every row is a new draw of blocks from that pool. Rows differ from each other, and
//! the codes and scales of a block are those that real noise gets.

use paceline_gguf::{GgmlType, TensorSink, TensorSpec};
use paceline_kernels::formats::quantize_rows;

use super::tensors::Values;
use crate::Error;

/// What is drawn at once where the rows allow it, whatever the format: values.
const UNIT_LEN: usize = 256;
/// Units of a pool: with three or more of them in a row, rows are as good as unique.
const N_UNIT: usize = 1024;
/// Bytes written at once.
const CHUNK_BYTES: usize = 1 << 20;
/// The divisor that leaves nothing of an angle.
const STILL: f32 = 1e30;

/// The weights that follow from a seed.
pub(super) struct Noise {
    seed: u64,
    pools: Vec<Pool>,
}

/// Units to draw from.
struct Pool {
    ty: GgmlType,
    unit_len: usize,
    /// Bits of mean and deviation.
    values: [u32; 2],
    units: Vec<u8>,
}

impl Noise {
    pub(super) fn new(seed: u64) -> Noise {
        Noise { seed, pools: Vec::new() }
    }

    /// Writes a whole tensor. Its values depend on the seed, its name, type and shape, not on what was written before.
    pub(super) fn write(
        &mut self,
        spec: &TensorSpec,
        values: Values,
        sink: &mut TensorSink,
    ) -> Result<(), Error> {
        let n_in = spec.shape[0] as usize;
        let (mean, deviation) = match values {
            Values::Weights => (0.0, 1.0 / (n_in as f32).sqrt()),
            Values::Around(mean) => (mean, mean.abs() / 10.0),
            Values::Divisors(n_turned) => {
                let divisor = |i| if i < n_turned { 1.0f32 } else { STILL };
                let bytes: Vec<u8> = (0..n_in).flat_map(|i| divisor(i).to_le_bytes()).collect();
                return Ok(sink.put(&bytes)?);
            }
        };
        let unit_len = if n_in.is_multiple_of(UNIT_LEN) { UNIT_LEN } else { spec.ty.block_len() };
        let unit_bytes = spec.ty.row_bytes(unit_len);
        let mut random = Random::new(self.seed, spec.name.bytes());
        let units = self.pool(spec.ty, unit_len, [mean, deviation]);
        let mut chunk = Vec::with_capacity(CHUNK_BYTES + unit_bytes);
        for _ in 0..spec.n_bytes / unit_bytes as u64 {
            let unit = random.bits() as usize % N_UNIT * unit_bytes;
            chunk.extend_from_slice(&units[unit..unit + unit_bytes]);
            if chunk.len() >= CHUNK_BYTES {
                sink.put(&chunk)?;
                chunk.clear();
            }
        }
        Ok(sink.put(&chunk)?)
    }

    /// The pool of these units, made when first asked for.
    fn pool(&mut self, ty: GgmlType, unit_len: usize, [mean, deviation]: [f32; 2]) -> &[u8] {
        let values = [mean.to_bits(), deviation.to_bits()];
        let same = |pool: &Pool| pool.ty == ty && pool.unit_len == unit_len && pool.values == values;
        let at = match self.pools.iter().position(same) {
            Some(at) => at,
            None => {
                let mut random = Random::new(self.seed, ty.name().bytes());
                let noise: Vec<f32> =
                    (0..N_UNIT * unit_len).map(|_| mean + deviation * random.normal()).collect();
                self.pools.push(Pool { ty, unit_len, values, units: quantize_rows(ty, unit_len, &noise) });
                self.pools.len() - 1
            }
        };
        &self.pools[at].units
    }
}

/// SplitMix64 (Steele, Lea and Flood, 2014).
struct Random(u64);

impl Random {
    /// The generator of a seed and a name.
    fn new(seed: u64, name: impl Iterator<Item = u8>) -> Random {
        let mut random = Random(seed);
        for byte in name {
            random.0 = random.bits() ^ u64::from(byte);
        }
        random
    }

    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// About a standard normal number: the sum of four uniform ones, scaled.
    fn normal(&mut self) -> f32 {
        let bits = self.bits();
        let sum: f32 = (0..4).map(|i| (bits >> (16 * i) & 0xffff) as f32 / 65536.0).sum();
        (sum - 2.0) * 3.0f32.sqrt()
    }
}
