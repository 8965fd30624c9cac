//! Bars on stderr; nothing at all where stderr is no terminal.

use std::sync::Mutex;

use indicatif::{ProgressBar, ProgressStyle};

const BYTES: &str = "{msg:24!} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
const WINDOWS: &str = "{msg} {wide_bar} {pos}/{len} {eta}";
const WORDS: &str = "{spinner} {msg}";

/// A bar that counts bytes.
pub fn bytes(total: u64) -> ProgressBar {
    let bar = ProgressBar::new(total);
    if let Ok(style) = ProgressStyle::with_template(BYTES) {
        bar.set_style(style);
    }
    bar
}

/// A bar that counts windows of a text.
pub fn windows(n: usize) -> ProgressBar {
    let bar = ProgressBar::new(n as u64);
    if let Ok(style) = ProgressStyle::with_template(WINDOWS) {
        bar.set_style(style);
    }
    bar
}

/// Shows how far packing is: a bar from the first report of `(done, all)` bytes to the last, for each plan anew.
pub fn packing() -> impl Fn(usize, usize) + Send + Sync {
    let current: Mutex<Option<ProgressBar>> = Mutex::default();
    move |done, all| {
        let Ok(mut current) = current.lock() else { return };
        let bar = current.get_or_insert_with(|| bytes(all as u64).with_message("packing weights"));
        bar.set_position(done as u64);
        if done >= all {
            bar.finish_and_clear();
            *current = None;
        }
    }
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
