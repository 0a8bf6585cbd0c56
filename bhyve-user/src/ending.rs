//! How and when the process ends.

use std::sync::{Condvar, Mutex, PoisonError};

use vmmapi::SuspendHow;

use crate::lock;

/// Exit status for an error.
pub const ERROR: i32 = 4;

/// Exit status where the guest powered itself off.
pub const POWERED_OFF: i32 = 1;

/// Exit status of bhyve(8) for the way a VM stopped.
pub fn status(how: SuspendHow) -> i32 {
    match how {
        SuspendHow::Reset => 0,
        SuspendHow::Poweroff => POWERED_OFF,
        SuspendHow::Halt => 2,
        SuspendHow::TripleFault => 3,
        SuspendHow::None | SuspendHow::Destroy => ERROR,
    }
}

/// A vCPU failed, and why has been printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failed;

#[derive(Default)]
struct State {
    running: u32,
    status: Option<i32>,
    /// Nobody need be waited for.
    now: bool,
}

/// Counts running vCPUs and keeps the exit status.
#[derive(Default)]
pub struct Ending {
    state: Mutex<State>,
    changed: Condvar,
}

impl Ending {
    /// One more vCPU is about to run.
    pub fn started(&self) {
        lock(&self.state).running += 1;
    }

    /// A vCPU is done; errors end the process at once.
    pub fn ended(&self, result: Result<SuspendHow, Failed>) {
        let mut state = lock(&self.state);
        state.running = state.running.saturating_sub(1);
        match result {
            Ok(how) => {
                state.status.get_or_insert(status(how));
            }
            Err(Failed) => {
                state.status = Some(ERROR);
                state.now = true;
            }
        }
        self.changed.notify_all();
    }

    /// Ends the process with a status, whatever the vCPUs do.
    pub fn end(&self, status: i32) {
        let mut state = lock(&self.state);
        state.status = Some(status);
        state.now = true;
        self.changed.notify_all();
    }

    /// Waits for the last vCPU, or an error; returns the exit status.
    pub fn wait(&self) -> i32 {
        let mut state = lock(&self.state);
        while state.running > 0 && !state.now {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.status.unwrap_or(ERROR)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_those_of_bhyve_8() {
        use SuspendHow::*;
        assert_eq!(
            [Reset, Poweroff, Halt, TripleFault, Destroy].map(status),
            [0, 1, 2, 3, 4]
        );
    }

    #[test]
    fn the_last_vcpu_ends_it_and_the_first_says_how() {
        let e = Ending::default();
        e.started();
        e.started();
        std::thread::scope(|s| {
            let waiting = s.spawn(|| e.wait());
            e.ended(Ok(SuspendHow::Poweroff));
            std::thread::sleep(std::time::Duration::from_millis(20));
            assert!(!waiting.is_finished(), "one still runs");
            e.ended(Ok(SuspendHow::Reset));
            assert_eq!(waiting.join().unwrap(), 1);
        });
    }

    #[test]
    fn an_error_waits_for_nobody() {
        let e = Ending::default();
        e.started();
        e.started();
        e.ended(Err(Failed));
        assert_eq!(e.wait(), ERROR);
    }
}
