//! CPU maths: tensor formats, matrix products, attention and recurrences, the thread team

pub mod formats;
