//! Reads the header front to back and never past its end.

/// Why reading stopped; the caller knows which part of the file it was reading and says so.
#[derive(Debug)]
pub(crate) enum Fault {
    /// The file ends too early. `needs` is None when the number of bytes overflows.
    Short { at: usize, needs: Option<u64>, left: usize },
    /// The bytes are there and make no sense.
    Bad { expected: String, found: String },
}

impl Fault {
    pub(crate) fn bad(expected: impl Into<String>, found: impl Into<String>) -> Fault {
        Fault::Bad { expected: expected.into(), found: found.into() }
    }

    /// Says what was being read, in which file.
    pub(crate) fn at(self, file: &str, what: impl Into<String>) -> crate::Error {
        let (expected, found) = match self {
            Fault::Bad { expected, found } => (expected, found),
            Fault::Short { at, needs: Some(needs), left } => {
                (format!("{needs} bytes at offset {at}"), format!("{left} bytes to the end of the file"))
            }
            Fault::Short { at, needs: None, left } => (
                format!("a size below 2^64 at offset {at}"),
                format!("more, with {left} bytes to the end of the file"),
            ),
        };
        crate::Error::header(file, what, expected, found)
    }
}

/// A place in the bytes of a file.
pub(crate) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Cursor<'a> {
        Cursor { bytes, at: 0 }
    }

    /// Bytes read so far.
    pub(crate) fn at(&self) -> usize {
        self.at
    }

    /// Fails unless `n` more bytes are there; None stands for a number too large for 64 bits.
    pub(crate) fn expect_left(&self, needs: Option<u64>) -> Result<(), Fault> {
        let left = self.bytes.len() - self.at;
        match needs {
            Some(n) if n <= left as u64 => Ok(()),
            _ => Err(Fault::Short { at: self.at, needs, left }),
        }
    }

    pub(crate) fn take(&mut self, n: u64) -> Result<&'a [u8], Fault> {
        self.expect_left(Some(n))?;
        let taken = &self.bytes[self.at..self.at + n as usize];
        self.at += n as usize;
        Ok(taken)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        let taken = self.take(N as u64)?;
        Ok(taken.try_into().expect("take returned N bytes"))
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Fault> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Fault> {
        self.array().map(u64::from_le_bytes)
    }

    /// Length and bytes.
    pub(crate) fn string(&mut self) -> Result<&'a [u8], Fault> {
        let len = self.u64()?;
        self.take(len)
    }

    /// A string that must be text: keys and tensor names.
    pub(crate) fn text(&mut self) -> Result<&'a str, Fault> {
        let bytes = self.string()?;
        std::str::from_utf8(bytes).map_err(|_| {
            let start = String::from_utf8_lossy(&bytes[..bytes.len().min(40)]).into_owned();
            Fault::bad("a name in UTF-8", format!("{start:?}"))
        })
    }
}
