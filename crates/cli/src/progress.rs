//! Bars on stderr; nothing at all where stderr is no terminal.

use indicatif::{ProgressBar, ProgressStyle};

const BYTES: &str = "{msg:24!} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
const WORDS: &str = "{spinner} {msg}";

/// A bar that counts bytes.
pub fn bytes(total: u64) -> ProgressBar {
    let bar = ProgressBar::new(total);
    if let Ok(style) = ProgressStyle::with_template(BYTES) {
        bar.set_style(style);
    }
    bar
}

/// A line that says what is going on, and goes away.
pub fn words(first: &'static str) -> ProgressBar {
    let line = ProgressBar::new_spinner().with_message(first);
    if let Ok(style) = ProgressStyle::with_template(WORDS) {
        line.set_style(style);
    }
    line.enable_steady_tick(std::time::Duration::from_millis(120));
    line
}
