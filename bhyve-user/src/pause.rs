//! Sleeping for a time.

use std::time::Duration;

/// As `std::thread::sleep`, which on FreeBSD is clock_nanosleep(2): releases that
/// do not allow it in capability mode (12.1) fail it, and it panics.
pub fn sleep(time: Duration) {
    #[cfg(not(target_os = "freebsd"))]
    std::thread::sleep(time);
    #[cfg(target_os = "freebsd")]
    {
        let begun = std::time::Instant::now();
        // Parking ends early at times.
        while let Some(left) = time.checked_sub(begun.elapsed()).filter(|l| !l.is_zero()) {
            std::thread::park_timeout(left);
        }
    }
}
