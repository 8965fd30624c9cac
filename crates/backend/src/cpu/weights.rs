//! Weights as they lie in the mapped file, and packed for products.

use std::sync::{Arc, OnceLock};

use paceline_gguf::{Gguf, TensorInfo};
use paceline_kernels::{
    Team, WeightRows,
    formats::{FORMATS, Format, format},
    packed::{self, PackedMatrix, TileMemory},
};

use crate::{Error, WeightSource};

/// A tensor that the kernels can read, row by row.
pub(super) struct Weight {
    file: Arc<Gguf>,
    tensor: usize,
    format: &'static Format,
    n_in: usize,
    n_rows: usize,
    floats: OnceLock<Vec<f32>>,
    packed: OnceLock<PackedMatrix>,
}

impl Weight {
    pub fn new(source: &WeightSource) -> Result<Weight, Error> {
        let tensor = &source.file.tensors()[source.tensor];
        let Some(format) = format(tensor.ty) else {
            return Err(Error::UnsupportedType {
                file: source.file.name().to_string(),
                tensor: tensor.name.clone(),
                ty: tensor.ty,
                supported: FORMATS.iter().map(|f| f.ty.name()).collect::<Vec<_>>().join(", "),
            });
        };
        let n_in = tensor.n_cols() as usize;
        Ok(Weight {
            n_rows: tensor.n_elements() as usize / n_in,
            n_in,
            format,
            tensor: source.tensor,
            file: source.file.clone(),
            floats: OnceLock::new(),
            packed: OnceLock::new(),
        })
    }

    /// Number of rows.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Width of a row.
    pub fn n_in(&self) -> usize {
        self.n_in
    }

    fn tensor(&self) -> &TensorInfo {
        &self.file.tensors()[self.tensor]
    }

    /// Bytes in the file.
    pub fn file_bytes(&self) -> usize {
        self.tensor().n_bytes as usize
    }

    /// Bytes of the packed matrix, or of `n_expert` ones, if the format has a packed form and nobody has packed it yet.
    pub fn to_pack(&self, n_expert: usize) -> Option<usize> {
        let bytes = packed::packed_bytes(self.format.ty, [self.n_in, self.n_rows / n_expert, n_expert])?;
        self.packed.get().is_none().then_some(bytes)
    }

    /// The packed matrix, or the `n_expert` matrices that it is made of; the file's pages are given back to the system, and who
    /// reads rows finds them again. `progress` is told how many bytes were read, by several threads.
    pub fn pack(
        &self,
        n_expert: usize,
        memory: &mut TileMemory,
        team: &Team,
        progress: &(dyn Fn(usize) + Sync),
    ) -> Option<PackedMatrix> {
        let tensor = self.tensor();
        let (ty, data) = (self.format.ty, self.file.data(tensor));
        let dims = [self.n_in, self.n_rows / n_expert, n_expert];
        let packed = packed::pack_into(memory, ty, data, dims, team, progress);
        self.file.release(tensor);
        packed
    }

    /// From now on products read this.
    pub fn set_packed(&self, packed: PackedMatrix) {
        // Whoever was first has packed the same.
        let _ = self.packed.set(packed);
    }

    /// The matrix in the form that products want, if it has been packed.
    pub fn packed(&self) -> Option<&PackedMatrix> {
        self.packed.get()
    }

    /// Rows `first .. first + n`.
    pub fn rows(&self, first: usize, n: usize) -> WeightRows<'_> {
        let row_bytes = self.format.ty.row_bytes(self.n_in);
        let data = self.file.data(self.tensor());
        WeightRows {
            dequantize: self.format.dequantize,
            bytes: &data[first * row_bytes..(first + n) * row_bytes],
            n_rows: n,
            n_in: self.n_in,
        }
    }

    /// All values, for the small weights that ops read directly: norms, biases, convolutions.
    pub fn floats(&self) -> &[f32] {
        self.floats.get_or_init(|| {
            let mut out = vec![0.0; self.n_in * self.n_rows];
            (self.format.dequantize)(self.file.data(self.tensor()), &mut out);
            out
        })
    }
}
