//! The element types of tensors, and the sizes that follow from them.
//!
//! A type packs `block_len` elements into `block_bytes` bytes; plain numbers are blocks of one. A row of `n` elements
//! needs `n % block_len == 0` and takes `n / block_len * block_bytes` bytes; rows follow one another without padding.
//! Ids are those of the ggml project. Being listed here means that the size is known, not that a kernel exists.

use std::fmt;
use std::str::FromStr;

use crate::Error;

/// One line per type: its place in the file format and its block.
macro_rules! ggml_types {
    ($($variant:ident = $id:literal, $name:literal, $block_len:literal, $block_bytes:literal;)*) => {
        /// The element type of a tensor.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[allow(non_camel_case_types, reason = "the names that the format uses")]
        #[repr(u32)]
        pub enum GgmlType {
            $(#[doc = concat!("`", $name, "`: ", $block_len, " elements in ", $block_bytes, " bytes.")] $variant = $id,)*
        }

        impl GgmlType {
            /// Every type, by id.
            pub const ALL: &[GgmlType] = &[$(GgmlType::$variant),*];

            /// (name, block_len, block_bytes)
            const fn row(self) -> (&'static str, usize, usize) {
                match self { $(GgmlType::$variant => ($name, $block_len, $block_bytes),)* }
            }
        }
    };
}

ggml_types! {
    F32     =  0, "f32",       1,   4;
    F16     =  1, "f16",       1,   2;
    Q4_0    =  2, "q4_0",     32,  18;
    Q4_1    =  3, "q4_1",     32,  20;
    Q5_0    =  6, "q5_0",     32,  22;
    Q5_1    =  7, "q5_1",     32,  24;
    Q8_0    =  8, "q8_0",     32,  34;
    Q8_1    =  9, "q8_1",     32,  36;
    Q2_K    = 10, "q2_k",    256,  84;
    Q3_K    = 11, "q3_k",    256, 110;
    Q4_K    = 12, "q4_k",    256, 144;
    Q5_K    = 13, "q5_k",    256, 176;
    Q6_K    = 14, "q6_k",    256, 210;
    Q8_K    = 15, "q8_k",    256, 292;
    IQ2_XXS = 16, "iq2_xxs", 256,  66;
    IQ2_XS  = 17, "iq2_xs",  256,  74;
    IQ3_XXS = 18, "iq3_xxs", 256,  98;
    IQ1_S   = 19, "iq1_s",   256,  50;
    IQ4_NL  = 20, "iq4_nl",   32,  18;
    IQ3_S   = 21, "iq3_s",   256, 110;
    IQ2_S   = 22, "iq2_s",   256,  82;
    IQ4_XS  = 23, "iq4_xs",  256, 136;
    I8      = 24, "i8",        1,   1;
    I16     = 25, "i16",       1,   2;
    I32     = 26, "i32",       1,   4;
    I64     = 27, "i64",       1,   8;
    F64     = 28, "f64",       1,   8;
    IQ1_M   = 29, "iq1_m",   256,  56;
    BF16    = 30, "bf16",      1,   2;
    TQ1_0   = 34, "tq1_0",   256,  54;
    TQ2_0   = 35, "tq2_0",   256,  66;
    MXFP4   = 39, "mxfp4",    32,  17;
    NVFP4   = 40, "nvfp4",    64,  36;
    Q1_0    = 41, "q1_0",    128,  18;
}

impl GgmlType {
    /// The type with this id in the file format, None for ids that were removed or never given.
    pub fn from_id(id: u32) -> Option<GgmlType> {
        GgmlType::ALL.iter().copied().find(|ty| ty.id() == id)
    }

    /// The id in the file format.
    pub const fn id(self) -> u32 {
        self as u32
    }

    /// The name in lower case, as flags take it: `q4_k`.
    pub const fn name(self) -> &'static str {
        self.row().0
    }

    /// Elements in a block; 1 for plain numbers.
    pub const fn block_len(self) -> usize {
        self.row().1
    }

    /// Bytes of a block.
    pub const fn block_bytes(self) -> usize {
        self.row().2
    }

    /// Whether elements share a block, so that a row can't be cut anywhere.
    pub const fn is_quantized(self) -> bool {
        self.block_len() > 1
    }

    /// Bytes of a row of `n` elements.
    ///
    /// # Panics
    /// If `n` is no multiple of the block length. For tensors of a file that has been checked.
    pub const fn row_bytes(self, n: usize) -> usize {
        assert!(n.is_multiple_of(self.block_len()), "a row must be whole blocks");
        n / self.block_len() * self.block_bytes()
    }

    /// Bits that an element takes, its share of the block's scales included.
    pub const fn bits_per_weight(self) -> f64 {
        (self.block_bytes() * 8) as f64 / self.block_len() as f64
    }

    /// Bytes of a tensor of this shape (ne0 first), None if they overflow or ne0 is not whole blocks.
    pub fn tensor_bytes(self, shape: &[u64]) -> Option<u64> {
        let (&ne0, slower) = shape.split_first()?;
        if !ne0.is_multiple_of(self.block_len() as u64) {
            return None;
        }
        let row_bytes = (ne0 / self.block_len() as u64).checked_mul(self.block_bytes() as u64)?;
        slower.iter().try_fold(row_bytes, |n_bytes, &ne| n_bytes.checked_mul(ne))
    }

    /// What is known about an id that is no type, for messages.
    pub(crate) fn describe_unknown(id: u32) -> String {
        let history = match id {
            4 | 5 | 31..=33 | 36..=38 => "removed from the format",
            _ => "of a fork or newer than this program",
        };
        format!("type id {id} ({history})")
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.pad(self.name())
    }
}

impl fmt::Debug for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for GgmlType {
    type Err = Error;

    fn from_str(name: &str) -> Result<GgmlType, Error> {
        let found = GgmlType::ALL.iter().copied().find(|ty| ty.name().eq_ignore_ascii_case(name));
        found.ok_or_else(|| {
            let known: Vec<_> = GgmlType::ALL.iter().map(|ty| ty.name()).collect();
            Error::UnknownType { name: name.into(), known: known.join(", ") }
        })
    }
}

impl serde::Serialize for GgmlType {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_names_come_back() {
        for &ty in GgmlType::ALL {
            assert_eq!(GgmlType::from_id(ty.id()), Some(ty));
            assert_eq!(ty.name().parse::<GgmlType>().unwrap(), ty);
            assert_eq!(ty.name().to_uppercase().parse::<GgmlType>().unwrap(), ty);
        }
        let gaps: Vec<u32> = (0..50).filter(|&id| GgmlType::from_id(id).is_none()).collect();
        assert_eq!(gaps, [4, 5, 31, 32, 33, 36, 37, 38, 42, 43, 44, 45, 46, 47, 48, 49]);
    }

    #[test]
    fn sizes_follow_from_blocks() {
        let check =
            |ty: GgmlType, shape: &[u64], want| assert_eq!(ty.tensor_bytes(shape), want, "{ty} {shape:?}");
        check(GgmlType::F32, &[3], Some(12));
        check(GgmlType::Q4_K, &[512, 3], Some(2 * 144 * 3));
        check(GgmlType::MXFP4, &[64, 2, 5], Some(2 * 17 * 10));
        check(GgmlType::Q8_0, &[48, 2], None);
        check(GgmlType::F32, &[1 << 40, 1 << 40], None);
        check(GgmlType::F64, &[1 << 62], None);
        check(GgmlType::F32, &[], None);
        assert_eq!(GgmlType::Q6_K.row_bytes(512), 420);
        assert_eq!(GgmlType::Q4_K.bits_per_weight(), 4.5);
        assert_eq!(format!("[{:<6}]", GgmlType::Q4_K), "[q4_k  ]");
    }

    #[test]
    fn an_unknown_name_lists_the_known_ones() {
        let message = "q9_z".parse::<GgmlType>().unwrap_err().to_string();
        assert!(message.starts_with("tensor type `q9_z` is unknown; known: f32, f16, q4_0, "), "{message}");
    }

    #[test]
    #[should_panic(expected = "whole blocks")]
    fn half_a_block_is_a_bug() {
        let _ = GgmlType::Q8_0.row_bytes(16);
    }
}
