//! What takes long is shown: a spinner on a terminal, plain lines elsewhere.

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Steps faster than this leave no plain line behind.
const QUIET_BELOW: Duration = Duration::from_millis(300);

/// Does `work` as a step called `name` and says how long it took.
///
/// # Errors
/// Those of `work`.
pub fn step<T>(name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let started = Instant::now();
    let bar = std::io::stderr().is_terminal().then(|| {
        let bar = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} [{elapsed}]") {
            bar.set_style(style);
        }
        bar.set_message(name.to_owned());
        bar.enable_steady_tick(Duration::from_millis(120));
        bar
    });
    let result = work();
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    let took = started.elapsed();
    if result.is_err() {
        eprintln!("==> {name}: failed after {:.1} s", took.as_secs_f64());
    } else if took >= QUIET_BELOW {
        eprintln!("==> {name}: {:.1} s", took.as_secs_f64());
    }
    result
}

/// Says one thing that is not a step.
pub fn say(text: &str) {
    eprintln!("==> {text}");
}
