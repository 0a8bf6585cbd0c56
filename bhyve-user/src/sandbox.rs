//! What this process gives up when the machine is made and before the guest runs.
//!
//! Files, sockets and devices that are open stay so. A device that opens
//! something while the guest runs says so by [`need`] when it is made; its
//! threads begin with [`join`].

use std::io;
use std::os::fd::AsFd;
use std::sync::{Condvar, Mutex, PoisonError};

pub use bhyve_sandbox::Purpose;
use bhyve_sandbox::{Error, Mode, Needs, Report};

use crate::lock;

/// How far it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    /// There is none, or not yet and nobody has announced it.
    #[default]
    None,
    /// It is to come: threads wait for it.
    Announced,
    /// It is there.
    Confined,
}

static NEEDS: Mutex<Option<Needs>> = Mutex::new(None);
static STAGE: Mutex<Stage> = Mutex::new(Stage::None);
static ARRIVED: Condvar = Condvar::new();

/// Takes down what the process will go on needing, for example
/// `need(|n| _ = n.write.insert(folder))`. Without effect once it is confined.
pub fn need(what: impl FnOnce(&mut Needs)) {
    what(lock(&NEEDS).get_or_insert_default());
}

/// Announces the sandbox, before any device is made.
pub fn announce(mode: Mode) {
    if mode != Mode::Off {
        *lock(&STAGE) = Stage::Announced;
    }
}

/// Takes the rights from a descriptor that its purpose does not need, where there
/// is to be a sandbox.
///
/// # Errors
/// The host says no.
pub fn limit(fd: impl AsFd, purpose: Purpose<'_>) -> io::Result<()> {
    if *lock(&STAGE) == Stage::None {
        return Ok(());
    }
    bhyve_sandbox::limit(fd, purpose)
}

/// To be called by a thread before it deals with anything of the guest's: waits
/// for the sandbox, if there is to be one, and comes under its rules.
pub fn join() {
    let mut stage = lock(&STAGE);
    while *stage == Stage::Announced {
        stage = ARRIVED.wait(stage).unwrap_or_else(PoisonError::into_inner);
    }
    let confined = *stage == Stage::Confined;
    drop(stage);
    if confined && let Err(e) = bhyve_sandbox::join() {
        // The filter of system calls holds all the same.
        eprintln!("bhyve: {e}\r");
    }
}

/// Confines the process. `refused` is told of each system call that is refused.
///
/// # Errors
/// The host has a sandbox, but it could not be set up.
pub fn enter(mode: Mode, refused: impl Fn(&str) + Send + 'static) -> Result<Report, Error> {
    let needs = lock(&NEEDS).clone().unwrap_or_default();
    let report = bhyve_sandbox::enter(mode, &needs, refused)?;
    *lock(&STAGE) = if mode == Mode::Off {
        Stage::None
    } else {
        Stage::Confined
    };
    ARRIVED.notify_all();
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::mac::Mac;
    use crate::net::user::{UserNet, options::Options};

    /// A fuzzer that made networks by the million had its memory used up.
    #[test]
    fn what_two_devices_need_is_taken_down_once() {
        let known = || lock(&NEEDS).as_ref().map_or(0, |n| n.read.len());
        let make = || UserNet::new(&Options::default(), Mac([2; 6]), 1500).unwrap();
        let _first = make();
        let before = known();
        let _second = make();
        assert!(before > 0);
        assert_eq!(known(), before);
    }
}
