//! The element types of safetensors.

use std::fmt;

use half::{bf16, f16};

/// One line per type: its name in the file and its size.
macro_rules! dtypes {
    ($($variant:ident, $name:literal, $n_bytes:literal;)*) => {
        /// The type of a tensor's elements.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[allow(non_camel_case_types, reason = "the names that the format uses")]
        pub enum DType {
            $(#[doc = concat!("`", $name, "`, ", $n_bytes, " bytes")] $variant,)*
        }

        impl DType {
            /// Every type.
            pub const ALL: &[DType] = &[$(DType::$variant),*];

            /// The name in the file.
            pub const fn name(self) -> &'static str {
                match self { $(DType::$variant => $name,)* }
            }

            /// Bytes of an element.
            pub const fn n_bytes(self) -> usize {
                match self { $(DType::$variant => $n_bytes,)* }
            }
        }
    };
}

dtypes! {
    F64, "F64", 8;
    F32, "F32", 4;
    F16, "F16", 2;
    BF16, "BF16", 2;
    F8_E4M3, "F8_E4M3", 1;
    F8_E5M2, "F8_E5M2", 1;
    I64, "I64", 8;
    I32, "I32", 4;
    I16, "I16", 2;
    I8, "I8", 1;
    U64, "U64", 8;
    U32, "U32", 4;
    U16, "U16", 2;
    U8, "U8", 1;
    Bool, "BOOL", 1;
}

impl DType {
    pub(crate) fn from_name(name: &str) -> Option<DType> {
        DType::ALL.iter().copied().find(|dtype| dtype.name() == name)
    }

    /// Elements as f32; None for what is no float that we decode.
    pub(super) fn to_f32(self, data: &[u8]) -> Option<Vec<f32>> {
        Some(match self {
            DType::F32 => data.as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect(),
            DType::F64 => data.as_chunks().0.iter().map(|x| f64::from_le_bytes(*x) as f32).collect(),
            DType::F16 => data.as_chunks().0.iter().map(|x| f16::from_le_bytes(*x).to_f32()).collect(),
            DType::BF16 => data.as_chunks().0.iter().map(|x| bf16::from_le_bytes(*x).to_f32()).collect(),
            _ => return None,
        })
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.pad(self.name())
    }
}
