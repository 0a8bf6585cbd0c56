//! How long a vCPU in HLT stays awake for what may wake it.
//!
//! To sleep and be woken costs the host more than a short wait does, and whoever
//! wakes a sleeper pays too. So a vCPU whose last waits were short waits for the
//! next one with its eyes open; after one long wait it sleeps at once again, so
//! that an idle guest costs what it did.

/// A wait that would have been worth staying awake for makes the next one begin
/// with at least the limit divided by this.
const FIRST: u64 = 16;

/// What a vCPU has learned from its waits. All times are TSC ticks.
#[derive(Clone, Copy, Debug)]
pub struct HaltPoll {
    limit: u64,
    window: u64,
}

impl HaltPoll {
    /// For waits of at most `limit`; 0: never.
    pub const fn new(limit: u64) -> Self {
        HaltPoll { limit, window: 0 }
    }

    /// Until when a HLT at `now` is waited out awake, `deadline` being the
    /// timer's; `now` or earlier: not at all.
    pub fn until(&self, now: u64, deadline: Option<u64>) -> u64 {
        let window = now.saturating_add(self.window);
        match deadline {
            // That it comes is known, and when; it need not have been learned.
            Some(d) if d.saturating_sub(now) <= self.limit => d,
            // Nothing else may come before it, but it will not be seen awake.
            _ => window,
        }
    }

    /// The vCPU slept, and the whole of the wait was `ticks`.
    pub fn slept(&mut self, ticks: u64) {
        self.window = if ticks > self.limit {
            0
        } else {
            (self.window * 2).clamp(self.limit / FIRST, self.limit)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: u64 = 1600;

    #[test]
    fn short_waits_are_learned_and_one_long_one_ends_it() {
        let mut p = HaltPoll::new(LIMIT);
        assert_eq!(p.until(5000, None), 5000, "asleep at first");
        p.slept(900);
        assert_eq!(p.until(5000, None), 5100);
        for _ in 0..3 {
            p.slept(900);
        }
        assert_eq!(p.until(5000, None), 5800);
        p.slept(900);
        p.slept(900);
        assert_eq!(p.until(5000, None), 5000 + LIMIT, "the limit is one");
        p.slept(LIMIT + 1);
        assert_eq!(p.until(5000, None), 5000);
    }

    #[test]
    fn a_timer_that_is_near_is_waited_for() {
        let p = HaltPoll::new(LIMIT);
        assert_eq!(p.until(5000, Some(5000 + LIMIT)), 5000 + LIMIT);
        assert_eq!(p.until(5000, Some(5001 + LIMIT)), 5000);
        assert!(p.until(5000, Some(4000)) <= 5000, "it is due");
    }

    #[test]
    fn without_a_limit_there_is_no_waiting() {
        let mut p = HaltPoll::new(0);
        p.slept(0);
        assert_eq!(p.until(5000, None), 5000);
        assert_eq!(p.until(5000, Some(5001)), 5000);
        p.slept(10);
        assert_eq!(p.until(5000, None), 5000);
    }

    #[test]
    fn no_time_is_too_late() {
        let mut p = HaltPoll::new(u64::MAX / 4);
        p.slept(1);
        assert_eq!(p.until(u64::MAX, None), u64::MAX);
    }
}
