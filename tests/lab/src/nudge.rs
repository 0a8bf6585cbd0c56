//! Wakes a QEMU that has lost an interrupt.
//!
//! QEMU 7.2's AMD-V (`helper_vmrun` and `do_vmexit` of its svm_helper.c) changes
//! the CPU's pending interrupts without the lock under which its devices do. Once
//! in some millions of exits the local APIC timer's interrupt gets lost that way,
//! and a host that sleeps until then sleeps for ever. Any later interrupt brings
//! the lost one along: a key that nobody looks at.

use anyhow::{Context, Result};
use std::io::{self, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Silence after which an interrupt may have been lost, and the time between keys.
pub const QUIET: Duration = Duration::from_secs(2);

/// A QEMU's monitor, to which all of its consoles talk.
#[derive(Debug, Clone)]
pub struct Nudge(Arc<Mutex<Keys>>);

#[derive(Debug)]
struct Keys {
    monitor: TcpStream,
    last: Instant,
}

impl Nudge {
    /// QEMU has connected its monitor.
    ///
    /// # Errors
    /// There are no more descriptors.
    pub fn new(monitor: TcpStream) -> Result<Self> {
        let mut answers = monitor.try_clone().context("the monitor's other half")?;
        // A monitor that nobody reads would stop QEMU. Its end is no news: the
        // consoles close with it.
        thread::spawn(move || io::copy(&mut answers, &mut io::sink()));
        Ok(Self(Arc::new(Mutex::new(Keys {
            monitor,
            last: Instant::now(),
        }))))
    }

    /// The console is silent: presses the key, unless it just has been.
    pub fn silent(&self) {
        let mut keys = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if keys.last.elapsed() >= QUIET {
            keys.last = Instant::now();
            // Whoever waits on a console learns from that if QEMU has ended.
            let _ended = keys.monitor.write_all(b"sendkey shift\n");
        }
    }
}
