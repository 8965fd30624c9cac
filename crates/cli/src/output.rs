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

/// An error with its causes, except those that its message already quotes.
pub fn in_full(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(|cause| cause.to_string()) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// True if `error` is only that the reader of our output has gone, as in `paceline run … | head`.
pub fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error.chain().filter_map(|e| e.downcast_ref::<io::Error>()).any(|e| e.kind() == io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_said_once() {
        let error =
            anyhow::anyhow!("no such file").context("a.gguf: can't open: no such file").context("loading");
        assert_eq!(in_full(&error), "loading: a.gguf: can't open: no such file");
    }

    #[test]
    fn a_closed_pipe_is_recognised_behind_contexts() {
        let error = anyhow::Error::from(io::Error::from(io::ErrorKind::BrokenPipe)).context("writing");
        assert!(is_closed_pipe(&error));
        assert!(!is_closed_pipe(&anyhow::anyhow!("Broken pipe")));
    }
}
