//! Metadata values: scalars, strings, and flat arrays of either.
//!
//! Strings are bytes: token texts need not be UTF-8. Arrays of arrays are in no known file and are refused.

use std::fmt;

use crate::Strings;
use crate::cursor::{Cursor, Fault};

/// Declares the scalar types once: variant, Rust type, id in the file.
macro_rules! scalars {
    ($($variant:ident, $rust:ty, $id:literal, $name:literal;)*) => {
        /// The type of a metadata value or of an array's elements.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum ValueType {
            $(#[doc = concat!("`", $name, "`")] $variant = $id,)*
            /// One byte, 0 or 1.
            Bool = 7,
            /// Length and bytes.
            String = 8,
            /// Element type, length and elements.
            Array = 9,
        }

        /// A metadata value.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Value {
            $(#[doc = concat!("`", $name, "`")] $variant($rust),)*
            /// True or false.
            Bool(bool),
            /// A string; bytes, because it need not be valid UTF-8.
            String(Vec<u8>),
            /// A flat array.
            Array(Array),
        }

        /// A metadata array; all elements have one type.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Array {
            $(#[doc = concat!("`", $name, "`")] $variant(Vec<$rust>),)*
            /// Trues and falses.
            Bool(Vec<bool>),
            /// Strings.
            String(Strings),
        }

        impl ValueType {
            fn from_id(id: u32) -> Option<ValueType> {
                match id {
                    $($id => Some(ValueType::$variant),)*
                    7 => Some(ValueType::Bool),
                    8 => Some(ValueType::String),
                    9 => Some(ValueType::Array),
                    _ => None,
                }
            }

            /// The name: `u32`, `string` …
            pub fn name(self) -> &'static str {
                match self {
                    $(ValueType::$variant => $name,)*
                    ValueType::Bool => "bool",
                    ValueType::String => "string",
                    ValueType::Array => "array",
                }
            }

            /// The fewest bytes that a value of this type takes in a file.
            fn min_bytes(self) -> u64 {
                match self {
                    $(ValueType::$variant => size_of::<$rust>() as u64,)*
                    ValueType::Bool => 1,
                    ValueType::String => 8,
                    ValueType::Array => 12,
                }
            }
        }

        impl Value {
            /// Its type.
            pub fn ty(&self) -> ValueType {
                match self {
                    $(Value::$variant(_) => ValueType::$variant,)*
                    Value::Bool(_) => ValueType::Bool,
                    Value::String(_) => ValueType::String,
                    Value::Array(_) => ValueType::Array,
                }
            }

            /// Reads the value that follows its type.
            pub(crate) fn read(cursor: &mut Cursor) -> Result<Value, Fault> {
                Ok(match value_type(cursor)? {
                    $(ValueType::$variant => Value::$variant(<$rust>::from_le_bytes(cursor.array()?)),)*
                    ValueType::Bool => Value::Bool(read_bool(cursor)?),
                    ValueType::String => Value::String(cursor.string()?.to_vec()),
                    ValueType::Array => Value::Array(Array::read(cursor)?),
                })
            }

            /// Writes the type and the value.
            pub(crate) fn write(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&(self.ty() as u32).to_le_bytes());
                match self {
                    $(Value::$variant(x) => out.extend_from_slice(&x.to_le_bytes()),)*
                    Value::Bool(x) => out.push(u8::from(*x)),
                    Value::String(bytes) => write_string(out, bytes),
                    Value::Array(array) => array.write(out),
                }
            }
        }

        impl Array {
            /// The type of its elements.
            pub fn elem_ty(&self) -> ValueType {
                match self {
                    $(Array::$variant(_) => ValueType::$variant,)*
                    Array::Bool(_) => ValueType::Bool,
                    Array::String(_) => ValueType::String,
                }
            }

            /// How many elements.
            pub fn len(&self) -> usize {
                match self {
                    $(Array::$variant(xs) => xs.len(),)*
                    Array::Bool(xs) => xs.len(),
                    Array::String(xs) => xs.len(),
                }
            }

            /// Whether it has no elements.
            pub fn is_empty(&self) -> bool {
                self.len() == 0
            }

            fn read(cursor: &mut Cursor) -> Result<Array, Fault> {
                let ty = value_type(cursor)?;
                let n = cursor.u64()?;
                // The vectors below can't outgrow the file by more than a small factor once this holds.
                cursor.expect_left(n.checked_mul(ty.min_bytes()))?;
                Ok(match ty {
                    $(ValueType::$variant => {
                        let bytes = cursor.take(n * size_of::<$rust>() as u64)?;
                        let (elems, _) = bytes.as_chunks::<{ size_of::<$rust>() }>();
                        Array::$variant(elems.iter().map(|elem| <$rust>::from_le_bytes(*elem)).collect())
                    })*
                    ValueType::Bool => Array::Bool((0..n).map(|_| read_bool(cursor)).collect::<Result<_, _>>()?),
                    ValueType::String => {
                        let mut strings = Strings::new();
                        for _ in 0..n {
                            strings.push(cursor.string()?);
                        }
                        Array::String(strings)
                    }
                    ValueType::Array => return Err(Fault::bad("a flat array", "an array of arrays")),
                })
            }

            fn write(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&(self.elem_ty() as u32).to_le_bytes());
                out.extend_from_slice(&(self.len() as u64).to_le_bytes());
                match self {
                    $(Array::$variant(xs) => xs.iter().for_each(|x| out.extend_from_slice(&x.to_le_bytes())),)*
                    Array::Bool(xs) => xs.iter().for_each(|x| out.push(u8::from(*x))),
                    Array::String(xs) => xs.iter().for_each(|x| write_string(out, x)),
                }
            }
        }

        $(
            impl From<$rust> for Value {
                fn from(x: $rust) -> Value {
                    Value::$variant(x)
                }
            }

            impl From<Vec<$rust>> for Value {
                fn from(xs: Vec<$rust>) -> Value {
                    Value::Array(Array::$variant(xs))
                }
            }
        )*
    };
}

scalars! {
    U8,   u8,  0, "u8";
    I8,   i8,  1, "i8";
    U16, u16,  2, "u16";
    I16, i16,  3, "i16";
    U32, u32,  4, "u32";
    I32, i32,  5, "i32";
    F32, f32,  6, "f32";
    U64, u64, 10, "u64";
    I64, i64, 11, "i64";
    F64, f64, 12, "f64";
}

fn value_type(cursor: &mut Cursor) -> Result<ValueType, Fault> {
    let id = cursor.u32()?;
    ValueType::from_id(id).ok_or_else(|| Fault::bad("a value type id from 0 to 12", id.to_string()))
}

fn read_bool(cursor: &mut Cursor) -> Result<bool, Fault> {
    match cursor.array::<1>()? {
        [0] => Ok(false),
        [1] => Ok(true),
        [other] => Err(Fault::bad("a bool (0 or 1)", other.to_string())),
    }
}

/// Length and bytes, as keys, names and string values are all written.
pub(crate) fn write_string(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
    out.extend_from_slice(bytes);
}

impl Value {
    /// The number in an integer of any width.
    pub fn as_int(&self) -> Option<i128> {
        Some(match *self {
            Value::U8(x) => x.into(),
            Value::I8(x) => x.into(),
            Value::U16(x) => x.into(),
            Value::I16(x) => x.into(),
            Value::U32(x) => x.into(),
            Value::I32(x) => x.into(),
            Value::U64(x) => x.into(),
            Value::I64(x) => x.into(),
            _ => return None,
        })
    }

    /// The nearest f32 of a float, or of an integer: converters write `10000` where they mean `10000.0`.
    pub fn as_f32(&self) -> Option<f32> {
        match *self {
            Value::F32(x) => Some(x),
            Value::F64(x) => Some(x as f32),
            _ => self.as_int().map(|x| x as f32),
        }
    }

    /// A bool, or an integer that is 0 or 1.
    pub fn as_bool(&self) -> Option<bool> {
        match *self {
            Value::Bool(x) => Some(x),
            _ => match self.as_int()? {
                0 => Some(false),
                1 => Some(true),
                _ => None,
            },
        }
    }

    /// A string's bytes.
    pub fn as_bytes(&self) -> Option<&[u8]> {
        match self {
            Value::String(bytes) => Some(bytes),
            _ => None,
        }
    }

    /// An array.
    pub fn as_array(&self) -> Option<&Array> {
        match self {
            Value::Array(array) => Some(array),
            _ => None,
        }
    }
}

impl Array {
    /// The element at `i`, as a value of its own.
    pub fn get(&self, i: usize) -> Option<Value> {
        Some(match self {
            Array::U8(xs) => Value::U8(*xs.get(i)?),
            Array::I8(xs) => Value::I8(*xs.get(i)?),
            Array::U16(xs) => Value::U16(*xs.get(i)?),
            Array::I16(xs) => Value::I16(*xs.get(i)?),
            Array::U32(xs) => Value::U32(*xs.get(i)?),
            Array::I32(xs) => Value::I32(*xs.get(i)?),
            Array::F32(xs) => Value::F32(*xs.get(i)?),
            Array::Bool(xs) => Value::Bool(*xs.get(i)?),
            Array::String(xs) => Value::String(xs.get(i)?.to_vec()),
            Array::U64(xs) => Value::U64(*xs.get(i)?),
            Array::I64(xs) => Value::I64(*xs.get(i)?),
            Array::F64(xs) => Value::F64(*xs.get(i)?),
        })
    }

    /// All elements in order, as values.
    pub fn iter(&self) -> impl Iterator<Item = Value> + '_ {
        (0..self.len()).map_while(|i| self.get(i))
    }
}

/// For people: `7`, `0.5`, `true`, the text of a string, and of an array its first elements and its length.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Value::F32(x) => write!(f, "{x}"),
            Value::F64(x) => write!(f, "{x}"),
            Value::Bool(x) => write!(f, "{x}"),
            Value::String(bytes) => write!(f, "{}", String::from_utf8_lossy(bytes)),
            Value::Array(array) => {
                const N_SHOWN: usize = 6;
                let shown: Vec<_> = array.iter().take(N_SHOWN).map(|x| x.to_string()).collect();
                let more = if array.len() > N_SHOWN { ", …" } else { "" };
                write!(f, "[{}{more}] ({} × {})", shown.join(", "), array.len(), array.elem_ty().name())
            }
            int => write!(f, "{}", int.as_int().expect("all that is left are integers")),
        }
    }
}

impl Value {
    /// Type and value in a few words, for messages.
    pub(crate) fn describe(&self) -> String {
        const MAX_CHARS: usize = 40;
        match self {
            Value::Array(array) => format!("array of {} {}", array.len(), array.elem_ty().name()),
            Value::String(bytes) => {
                let text = String::from_utf8_lossy(&bytes[..bytes.len().min(4 * MAX_CHARS)]);
                let more = if text.chars().count() > MAX_CHARS { "…" } else { "" };
                format!("string \"{}{more}\"", text.chars().take(MAX_CHARS).collect::<String>())
            }
            scalar => format!("{} {scalar}", scalar.ty().name()),
        }
    }
}

impl From<bool> for Value {
    fn from(x: bool) -> Value {
        Value::Bool(x)
    }
}

impl From<Vec<bool>> for Value {
    fn from(xs: Vec<bool>) -> Value {
        Value::Array(Array::Bool(xs))
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Value {
        Value::String(text.as_bytes().to_vec())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Value {
        Value::String(text.into_bytes())
    }
}

impl From<Strings> for Value {
    fn from(strings: Strings) -> Value {
        Value::Array(Array::String(strings))
    }
}

impl From<Vec<String>> for Value {
    fn from(strings: Vec<String>) -> Value {
        strings.into_iter().collect::<Strings>().into()
    }
}

impl From<Vec<&str>> for Value {
    fn from(strings: Vec<&str>) -> Value {
        strings.into_iter().collect::<Strings>().into()
    }
}

impl From<Vec<Vec<u8>>> for Value {
    fn from(strings: Vec<Vec<u8>>) -> Value {
        strings.into_iter().collect::<Strings>().into()
    }
}
