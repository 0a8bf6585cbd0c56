//! SIGTERM presses the power button; a second one, or half a minute, pulls the
//! plug.

use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};

use crate::boot;
use crate::ending::{ERROR, Ending};
use crate::machine::{Machine, Suspend};
use crate::pause;
use crate::pm::Pm;

/// How long a guest may take to shut down.
const GRACE: Duration = Duration::from_secs(30);
/// How long the kernel may take to stop every vCPU.
const STOP: Duration = Duration::from_secs(10);

fn set() -> SigSet {
    let mut set = SigSet::empty();
    for s in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        set.add(s);
    }
    set
}

/// Blocks the signals that [`listen`] takes; to be called before any thread is
/// made, for threads inherit it.
pub fn block() -> nix::Result<()> {
    set().thread_block()
}

/// Takes signals for the rest of the process's life.
pub fn listen(pm: Arc<Pm>, machine: Arc<dyn Machine>, ending: Arc<Ending>) {
    let is_child = boot::is_child();
    std::thread::spawn(move || {
        let mut pressed = false;
        while let Ok(signal) = set().wait() {
            // What comes from the terminal reaches the parent, too, which sends
            // SIGTERM for it: not to be taken for two.
            if is_child && signal != Signal::SIGTERM {
                continue;
            }
            let hears = !pressed && pm.press_power_button();
            if hears {
                pressed = true;
                let (machine, ending) = (Arc::clone(&machine), Arc::clone(&ending));
                std::thread::spawn(move || {
                    pause::sleep(GRACE);
                    power_off(&*machine, &ending);
                });
            } else {
                power_off(&*machine, &ending);
            }
        }
    });
}

fn power_off(machine: &dyn Machine, ending: &Ending) {
    machine.suspend(Suspend::PowerOff);
    pause::sleep(STOP);
    eprintln!("the VM does not stop; giving up\r");
    ending.end(ERROR);
}
