//! The local APIC's timer: one-shot, periodic and TSC-deadline (SDM Vol. 3A
//! §10.5.4).

use crate::time::Ratio;

/// LVT timer bits 18:17.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TimerMode {
    OneShot,
    Periodic,
    TscDeadline,
}

impl TimerMode {
    /// The mode that an LVT timer entry asks for; 3 is reserved and acts as
    /// one-shot.
    pub(super) fn of_lvt(lvt: u32) -> Self {
        match (lvt >> 17) & 3 {
            1 => TimerMode::Periodic,
            2 => TimerMode::TscDeadline,
            _ => TimerMode::OneShot,
        }
    }
}

const NEVER: u64 = u64::MAX;

/// Time is kept in ticks of the undivided APIC clock since `epoch`, so that a
/// periodic timer neither drifts nor rounds.
#[derive(Debug)]
pub(super) struct Timer {
    to_apic: Ratio,
    from_apic: Ratio,
    /// Shortest interval between two interrupts of a periodic timer, TSC
    /// ticks: what keeps a guest from burning the host.
    min_interval: u64,
    pub(super) mode: TimerMode,
    /// Initial count, as written.
    initial: u32,
    /// Divisor as a shift, 0 to 7.
    shift: u32,
    /// Host TSC at which the count was (re)based.
    epoch: u64,
    /// APIC ticks after `epoch` at which the count is next 0.
    next: u64,
    running: bool,
    /// Guest's IA32_TSC_DEADLINE, 0 when disarmed.
    tsc_deadline: u64,
    /// Host TSC at which something is due, or `NEVER`.
    due: u64,
}

impl Timer {
    pub(super) fn new(to_apic: Ratio, from_apic: Ratio, min_interval: u64) -> Self {
        Timer {
            to_apic,
            from_apic,
            min_interval,
            mode: TimerMode::OneShot,
            initial: 0,
            shift: 1,
            epoch: 0,
            next: 0,
            running: false,
            tsc_deadline: 0,
            due: NEVER,
        }
    }

    pub(super) fn reset(&mut self) {
        *self = Timer::new(self.to_apic, self.from_apic, self.min_interval);
    }

    #[inline]
    pub(super) fn due(&self) -> u64 {
        self.due
    }

    fn elapsed(&self, now: u64) -> u64 {
        self.to_apic.apply(now.saturating_sub(self.epoch))
    }

    fn period(&self) -> u64 {
        u64::from(self.initial) << self.shift
    }

    /// Host TSC of an APIC tick: the first at which `elapsed` has reached it.
    fn host(&self, ticks: u64) -> u64 {
        let down = self.from_apic.apply(ticks);
        let ticks_there = self.to_apic.apply(down);
        let exact = if ticks_there < ticks {
            self.from_apic.apply_up(ticks)
        } else {
            down
        };
        self.epoch.saturating_add(exact)
    }

    /// A write of the initial count: restarts, or stops if 0. Ignored in
    /// TSC-deadline mode. Returns the value to be read back.
    pub(super) fn set_initial(&mut self, value: u32, now: u64) -> u32 {
        if self.mode == TimerMode::TscDeadline {
            return 0;
        }
        self.initial = value;
        self.rebase(u64::from(value) << self.shift, now);
        value
    }

    /// A write of the divide configuration: the count goes on at the new rate.
    pub(super) fn set_divide(&mut self, dcr: u32, now: u64) {
        let count = self.count(now);
        self.shift = divide_shift(dcr);
        if self.mode != TimerMode::TscDeadline {
            self.rebase(u64::from(count) << self.shift, now);
        }
    }

    fn rebase(&mut self, ticks: u64, now: u64) {
        self.epoch = now;
        self.next = ticks;
        self.running = ticks != 0;
        self.due = if self.running {
            self.host(ticks)
        } else {
            NEVER
        };
    }

    /// A write of the LVT entry. Between one-shot and periodic the count goes
    /// on; into or out of TSC-deadline mode disarms. The caller has called
    /// `expire` before. Returns whether the timer was disarmed.
    pub(super) fn set_mode(&mut self, mode: TimerMode) -> bool {
        if mode == self.mode {
            return false;
        }
        let disarm = mode == TimerMode::TscDeadline || self.mode == TimerMode::TscDeadline;
        self.mode = mode;
        if disarm {
            self.initial = 0;
            self.running = false;
            self.tsc_deadline = 0;
            self.due = NEVER;
        }
        disarm
    }

    /// The current count.
    pub(super) fn count(&self, now: u64) -> u32 {
        if !self.running || self.mode == TimerMode::TscDeadline {
            return 0;
        }
        let elapsed = self.elapsed(now);
        let left = if elapsed < self.next {
            self.next - elapsed
        } else if self.mode == TimerMode::Periodic && self.period() != 0 {
            self.period() - (elapsed - self.next) % self.period()
        } else {
            0
        };
        // Rounded up: the count shows 0 only when it has run out.
        let round = (1u64 << self.shift) - 1;
        u32::try_from(left.saturating_add(round) >> self.shift).unwrap_or(u32::MAX)
    }

    pub(super) fn tsc_deadline(&self) -> u64 {
        if self.mode == TimerMode::TscDeadline {
            self.tsc_deadline
        } else {
            0
        }
    }

    /// Arms (or with a guest value of 0 disarms) the TSC deadline; ignored in
    /// the other modes.
    pub(super) fn set_tsc_deadline(&mut self, guest: u64, host: u64) {
        if self.mode == TimerMode::TscDeadline {
            self.tsc_deadline = guest;
            self.due = if guest == 0 {
                NEVER
            } else {
                host.min(NEVER - 1)
            };
        }
    }

    /// Whether the timer ran out at or before `now`; re-arms a periodic one
    /// for the first period that ends after `now`.
    pub(super) fn expire(&mut self, now: u64) -> bool {
        if now < self.due {
            return false;
        }
        match self.mode {
            TimerMode::TscDeadline => {
                self.tsc_deadline = 0;
                self.due = NEVER;
            }
            TimerMode::OneShot => {
                self.running = false;
                self.due = NEVER;
            }
            TimerMode::Periodic => {
                let period = self.period();
                if period == 0 {
                    self.running = false;
                    self.due = NEVER;
                    return true;
                }
                let elapsed = self.elapsed(now);
                let missed = elapsed.saturating_sub(self.next) / period;
                self.next = self.next.saturating_add(period.saturating_mul(missed + 1));
                self.due = self
                    .host(self.next)
                    .max(now.saturating_add(self.min_interval));
            }
        }
        true
    }
}

/// Divide configuration register to a shift (SDM Vol. 3A fig. 10-10).
fn divide_shift(dcr: u32) -> u32 {
    let code = (dcr & 3) | ((dcr >> 1) & 4);
    (code + 1) & 7
}
