//! Weights as they lie in the mapped file.

use std::sync::{Arc, OnceLock};

use paceline_gguf::Gguf;
use paceline_kernels::{
    WeightRows,
    formats::{FORMATS, Format, format},
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

    /// Rows `first .. first + n`.
    pub fn rows(&self, first: usize, n: usize) -> WeightRows<'_> {
        let row_bytes = self.format.ty.row_bytes(self.n_in);
        let data = self.file.data(&self.file.tensors()[self.tensor]);
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
            let data = self.file.data(&self.file.tensors()[self.tensor]);
            (self.format.dequantize)(data, &mut out);
            out
        })
    }
}
