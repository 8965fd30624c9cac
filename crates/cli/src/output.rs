//! Standard output: data only, and a reader that has gone away is no failure.

use std::{
    fmt,
    io::{self, IsTerminal, Write},
};

use anyhow::Result;

/// Writes a line.
pub fn say(line: fmt::Arguments<'_>) -> Result<()> {
    let mut out = io::stdout().lock();
    Ok(writeln!(out, "{line}")?)
}

/// Writes a piece of text at once.
pub fn piece(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// Whether colours are welcome on standard output.
pub fn colours() -> bool {
    io::stdout().is_terminal() && plain_wish().is_none()
}

/// Whether colours are welcome on standard error.
pub fn error_colours() -> bool {
    io::stderr().is_terminal() && plain_wish().is_none()
}

fn plain_wish() -> Option<()> {
    std::env::var_os("NO_COLOR").filter(|value| !value.is_empty()).map(drop)
}

/// True if `error` is only that the reader of our output has gone, as in `paceline run … | head`.
pub fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error.chain().filter_map(|e| e.downcast_ref::<io::Error>()).any(|e| e.kind() == io::ErrorKind::BrokenPipe)
}
