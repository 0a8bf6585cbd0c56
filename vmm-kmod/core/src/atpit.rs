//! 8254 programmable interval timer, and the bits of port 0x61 that belong
//! to it.
//!
//! Counters are not counted: what a guest reads is computed from the time
//! since the count was loaded.

use crate::time::{Clock, PIT_HZ, Ratio};

/// Ports of the three counters and the control word.
pub const BASE: u16 = 0x40;
/// NMI status and control: gate and output of counter 2.
pub const PORT_B: u16 = 0x61;

/// Interrupts of counter 0 come no faster than this, PIT ticks (50 µs): a
/// guest cannot make the host's timer storm.
const MIN_PERIOD: u64 = 60;
/// Counter 1 clocks the DRAM refresh: 15 µs.
const REFRESH: u64 = 18;

/// Byte order of counter accesses (control word bits 5:4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    Low = 1,
    High = 2,
    Both = 3,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Run {
    /// No count was written since the mode was set (or, for modes 1 and 5,
    /// no trigger has come).
    Idle,
    /// Since this PIT tick.
    Since(u64),
    /// Gate low; this many ticks had gone by.
    Held(u64),
}

#[derive(Clone, Copy, Debug)]
struct Counter {
    mode: u8,
    bcd: bool,
    access: Access,
    reload: u16,
    /// Low byte written, high byte to come.
    pending_low: Option<u8>,
    /// The next unlatched read gives the high byte.
    read_high: bool,
    /// Latched count and how many of its bytes are left to be read.
    latch: Option<(u16, Access)>,
    status_latch: Option<u8>,
    null_count: bool,
    gate: bool,
    run: Run,
}

impl Counter {
    const fn new(mode: u8, reload: u16, gate: bool, run: Run) -> Self {
        Counter {
            mode,
            bcd: false,
            access: Access::Both,
            reload,
            pending_low: None,
            read_high: false,
            latch: None,
            status_latch: None,
            null_count: false,
            gate,
            run,
        }
    }

    /// The count that was loaded: 0 is the largest.
    fn full(&self) -> u64 {
        match (self.reload, self.bcd) {
            (0, false) => 0x1_0000,
            (0, true) => 10_000,
            (n, false) => u64::from(n),
            (n, true) => u64::from(from_bcd(n)),
        }
    }

    fn wrap(&self) -> u64 {
        if self.bcd { 10_000 } else { 0x1_0000 }
    }

    fn elapsed(&self, ticks: u64) -> Option<u64> {
        match self.run {
            Run::Idle => None,
            Run::Since(start) => Some(ticks.saturating_sub(start)),
            Run::Held(elapsed) => Some(elapsed),
        }
    }

    fn count(&self, ticks: u64) -> u16 {
        let n = self.full();
        let value = match self.elapsed(ticks) {
            None => n,
            Some(e) => match self.mode {
                2 => n - e % n,
                // Counts by two, each half of the square wave.
                3 => n - (2 * (e % n)) % (n + (n & 1)),
                _ => {
                    let wrap = self.wrap();
                    (n + wrap - e % wrap) % wrap
                }
            },
        };
        let value = (value % self.wrap()) as u16;
        if self.bcd { to_bcd(value) } else { value }
    }

    fn out(&self, ticks: u64) -> bool {
        let n = self.full();
        let Some(e) = self.elapsed(ticks) else {
            return self.mode != 0;
        };
        match self.mode {
            0 | 1 => e >= n,
            2 => !self.gate || e % n != n - 1,
            3 => !self.gate || e % n < n.div_ceil(2),
            _ => e != n,
        }
    }

    fn set_mode(&mut self, mode: u8, access: Access, bcd: bool) {
        // 6 and 7 are 2 and 3.
        self.mode = if mode > 5 { mode - 4 } else { mode };
        self.access = access;
        self.bcd = bcd;
        self.pending_low = None;
        self.read_high = false;
        self.latch = None;
        self.status_latch = None;
        self.null_count = true;
        self.run = Run::Idle;
    }

    /// True if the count is complete and counting may start.
    fn write(&mut self, value: u8, ticks: u64) -> bool {
        let reload = match (self.access, self.pending_low.take()) {
            (Access::Low, _) => u16::from(value),
            (Access::High, _) => u16::from(value) << 8,
            (Access::Both, Some(low)) => u16::from(value) << 8 | u16::from(low),
            (Access::Both, None) => {
                self.pending_low = Some(value);
                if self.mode == 0 {
                    // The first byte stops the count and drives OUT low.
                    self.run = Run::Idle;
                }
                return false;
            }
        };
        self.reload = reload;
        self.null_count = false;
        self.read_high = false;
        // Modes 2 and 3 would finish the running period first; guests that
        // write a new count want it now.
        self.run = match (self.mode, self.gate) {
            (1 | 5, _) => Run::Idle,
            (_, true) => Run::Since(ticks),
            (_, false) => Run::Held(0),
        };
        true
    }

    fn set_gate(&mut self, gate: bool, ticks: u64) {
        if gate == self.gate {
            return;
        }
        self.gate = gate;
        self.run = match (self.mode, gate, self.run) {
            (1 | 5, true, _) if !self.null_count => Run::Since(ticks),
            (2 | 3, true, Run::Held(_)) => Run::Since(ticks),
            (0 | 4, true, Run::Held(e)) => Run::Since(ticks.saturating_sub(e)),
            (0 | 2 | 3 | 4, false, Run::Since(start)) => Run::Held(ticks.saturating_sub(start)),
            (_, _, run) => run,
        };
    }

    fn latch_count(&mut self, ticks: u64) {
        if self.latch.is_none() {
            self.latch = Some((self.count(ticks), self.access));
        }
    }

    fn latch_status(&mut self, ticks: u64) {
        if self.status_latch.is_none() {
            self.status_latch = Some(
                u8::from(self.out(ticks)) << 7
                    | u8::from(self.null_count) << 6
                    | (self.access as u8) << 4
                    | self.mode << 1
                    | u8::from(self.bcd),
            );
        }
    }

    fn read(&mut self, ticks: u64) -> u8 {
        if let Some(status) = self.status_latch.take() {
            return status;
        }
        if let Some((count, left)) = self.latch.take() {
            return match left {
                Access::Low => count as u8,
                Access::High => (count >> 8) as u8,
                Access::Both => {
                    self.latch = Some((count, Access::High));
                    count as u8
                }
            };
        }
        let count = self.count(ticks);
        let high = match self.access {
            Access::Low => false,
            Access::High => true,
            Access::Both => {
                self.read_high = !self.read_high;
                !self.read_high
            }
        };
        if high {
            (count >> 8) as u8
        } else {
            count as u8
        }
    }

    /// PIT ticks from the load to the rise of OUT, and from one to the next.
    fn rises(&self) -> Option<(u64, Option<u64>)> {
        let n = self.full();
        match self.mode {
            0 => Some((n, None)),
            2 | 3 => Some((n, Some(n.max(MIN_PERIOD)))),
            4 => Some((n + 1, None)),
            _ => None,
        }
    }
}

fn from_bcd(n: u16) -> u16 {
    (n >> 12 & 15) * 1000 + (n >> 8 & 15) * 100 + (n >> 4 & 15) * 10 + (n & 15)
}

fn to_bcd(n: u16) -> u16 {
    (n / 1000 % 10) << 12 | (n / 100 % 10) << 8 | (n / 10 % 10) << 4 | (n % 10)
}

/// The timer. Times are host TSC ticks.
#[derive(Debug)]
pub struct AtPit {
    to_pit: Ratio,
    from_pit: Ratio,
    epoch: u64,
    counters: [Counter; 3],
    /// Port 0x61 bits 3:0 as written.
    port_b: u8,
    /// PIT tick of the next rise of OUT 0.
    next: Option<u64>,
    /// The same as host TSC, which is asked for often.
    deadline: Option<u64>,
}

const fn firmware() -> [Counter; 3] {
    // As a PC's firmware leaves it: tick at 18.2 Hz, refresh, silence.
    [
        Counter::new(3, 0, true, Run::Since(0)),
        Counter::new(2, REFRESH as u16, true, Run::Since(0)),
        Counter::new(3, 0, false, Run::Idle),
    ]
}

impl AtPit {
    /// A timer that was set up by firmware at `now`.
    pub fn new(clock: &Clock, now: u64) -> Self {
        let (to_pit, from_pit) = clock.ratios(PIT_HZ);
        let mut pit = AtPit {
            to_pit,
            from_pit,
            epoch: now,
            counters: firmware(),
            port_b: 0,
            next: None,
            deadline: None,
        };
        pit.schedule(0);
        pit
    }

    /// Back to what firmware leaves.
    pub fn reset(&mut self, now: u64) {
        self.epoch = now;
        self.counters = firmware();
        self.port_b = 0;
        self.schedule(0);
    }

    /// Whether a port is one of ours.
    pub const fn claims(port: u16) -> bool {
        matches!(port, 0x40..=0x43 | PORT_B)
    }

    fn ticks(&self, now: u64) -> u64 {
        self.to_pit.apply(now.saturating_sub(self.epoch))
    }

    /// Sets `next` to the first rise of OUT 0 after `ticks`.
    fn schedule(&mut self, ticks: u64) {
        let [counter, ..] = &self.counters;
        self.next = match (counter.run, counter.rises()) {
            (Run::Since(start), Some((first, period))) => {
                let first = start.saturating_add(first);
                match period {
                    _ if ticks < first => Some(first),
                    Some(period) => Some(first + ((ticks - first) / period + 1) * period),
                    None => None,
                }
            }
            _ => None,
        };
        self.deadline = self
            .next
            .map(|next| self.epoch.saturating_add(self.from_pit.apply_up(next)));
    }

    /// Host TSC at which `service` should be called.
    #[inline]
    pub fn next_deadline(&self) -> Option<u64> {
        self.deadline
    }

    /// True if OUT 0 rose at or before `now`: an edge on IRQ 0. However many
    /// were missed, it is one.
    pub fn service(&mut self, now: u64) -> bool {
        let ticks = self.ticks(now);
        if self.next.is_none_or(|next| ticks < next) {
            return false;
        }
        self.schedule(ticks);
        true
    }

    /// A byte read from a port.
    pub fn read(&mut self, port: u16, now: u64) -> u8 {
        let ticks = self.ticks(now);
        if port == PORT_B {
            let [_, _, speaker] = &self.counters;
            // Bit 4 toggles with each refresh.
            let refresh = (ticks / REFRESH) as u8 & 1;
            return self.port_b | refresh << 4 | u8::from(speaker.out(ticks)) << 5;
        }
        match self.counters.get_mut(usize::from(port & 3)) {
            Some(counter) => counter.read(ticks),
            // The control word cannot be read.
            None => 0xff,
        }
    }

    /// A byte written to a port. `next_deadline` may have changed.
    pub fn write(&mut self, port: u16, value: u8, now: u64) {
        let ticks = self.ticks(now);
        if port == PORT_B {
            self.port_b = value & 0xf;
            let [_, _, speaker] = &mut self.counters;
            speaker.set_gate(value & 1 != 0, ticks);
            return;
        }
        match port & 3 {
            3 => self.control(value, ticks),
            n => {
                if let Some(counter) = self.counters.get_mut(usize::from(n)) {
                    let mode0 = counter.mode == 0;
                    if (counter.write(value, ticks) || mode0) && n == 0 {
                        self.schedule(ticks);
                    }
                }
            }
        }
    }

    fn control(&mut self, value: u8, ticks: u64) {
        let select = value >> 6;
        if select == 3 {
            for (n, counter) in self.counters.iter_mut().enumerate() {
                if value & (2 << n) == 0 {
                    continue;
                }
                if value & 0x20 == 0 {
                    counter.latch_count(ticks);
                }
                if value & 0x10 == 0 {
                    counter.latch_status(ticks);
                }
            }
            return;
        }
        let Some(counter) = self.counters.get_mut(usize::from(select)) else {
            return;
        };
        let access = match value >> 4 & 3 {
            0 => return counter.latch_count(ticks),
            1 => Access::Low,
            2 => Access::High,
            _ => Access::Both,
        };
        counter.set_mode(value >> 1 & 7, access, value & 1 != 0);
        if select == 0 {
            self.schedule(ticks);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    // One TSC tick is one PIT tick: what is tested is the timer.
    fn pit() -> AtPit {
        AtPit::new(&Clock::new(PIT_HZ), 0)
    }

    fn load(p: &mut AtPit, n: u16, control: u8, count: u16, now: u64) {
        p.write(0x43, control, now);
        p.write(0x40 + n, count as u8, now);
        p.write(0x40 + n, (count >> 8) as u8, now);
    }

    fn read16(p: &mut AtPit, n: u16, now: u64) -> u16 {
        let low = p.read(0x40 + n, now);
        u16::from(p.read(0x40 + n, now)) << 8 | u16::from(low)
    }

    fn latched(p: &mut AtPit, n: u16, now: u64) -> u16 {
        p.write(0x43, (n as u8) << 6, now);
        read16(p, n, now + 5000)
    }

    fn status(p: &mut AtPit, n: u16, now: u64) -> u8 {
        p.write(0x43, 0xe0 | 2 << n, now);
        p.read(0x40 + n, now + 99)
    }

    fn rises(p: &mut AtPit, from: u64, to: u64) -> Vec<u64> {
        (from..to).filter(|&t| p.service(t)).collect()
    }

    #[test]
    fn mode_0_interrupts_once_on_terminal_count() {
        let mut p = pit();
        load(&mut p, 0, 0x30, 1000, 100);
        assert_eq!(latched(&mut p, 0, 350), 750);
        assert_eq!(status(&mut p, 0, 1099), 0x30);
        assert_eq!(status(&mut p, 0, 1100), 0xb0);
        assert_eq!(rises(&mut p, 100, 5000), [1100]);
        assert_eq!(latched(&mut p, 0, 1101), 0xffff, "goes on below zero");
        assert_eq!(p.next_deadline(), None);
    }

    #[test]
    fn modes_2_and_3_interrupt_periodically() {
        for (control, mode) in [(0x34, 2), (0x36, 3), (0x3e, 3)] {
            let mut p = pit();
            load(&mut p, 0, control, 100, 50);
            assert_eq!(rises(&mut p, 50, 400), [150, 250, 350]);
            assert_eq!(status(&mut p, 0, 410) & 0x7f, 0x30 | mode << 1);
            // However late, one interrupt, and the grid stays.
            assert!(p.service(10_075));
            assert!(!p.service(10_075));
            assert_eq!(rises(&mut p, 10_076, 10_251), [10_150, 10_250]);
        }
    }

    #[test]
    fn counts_and_outputs_of_the_generators() {
        let mut p = pit();
        load(&mut p, 0, 0x34, 10, 0);
        assert_eq!(
            [0, 1, 9, 10, 11].map(|t| latched(&mut p, 0, t)),
            [10, 9, 1, 10, 9]
        );
        assert_eq!(
            [0, 8, 9, 10].map(|t| status(&mut p, 0, t) >> 7),
            [1, 1, 0, 1]
        );
        load(&mut p, 0, 0x36, 10, 0);
        assert_eq!(
            [0, 1, 4, 5, 6, 10].map(|t| latched(&mut p, 0, t)),
            [10, 8, 2, 10, 8, 10]
        );
        assert_eq!(
            [0, 4, 5, 9, 10].map(|t| status(&mut p, 0, t) >> 7),
            [1, 1, 0, 0, 1]
        );
    }

    #[test]
    fn mode_4_strobes_once() {
        let mut p = pit();
        load(&mut p, 0, 0x38, 200, 0);
        assert_eq!(
            [199, 200, 201].map(|t| status(&mut p, 0, t) >> 7),
            [1, 0, 1]
        );
        assert_eq!(rises(&mut p, 0, 1000), [201]);
    }

    #[test]
    fn latches_hold_until_read_and_status_comes_first() {
        let mut p = pit();
        load(&mut p, 0, 0x34, 0x1234, 0);
        p.write(0x43, 0xc2, 0x34);
        p.write(0x43, 0x00, 0x40);
        assert_eq!(p.read(0x40, 0x100), 0x80 | 0x34);
        assert_eq!(read16(&mut p, 0, 0x200), 0x1200);
        assert_eq!(
            read16(&mut p, 0, 0x200),
            0x1034,
            "follows the counter again"
        );
        p.write(0x43, 0x34, 0);
        p.write(0x40, 1, 0);
        assert_eq!(status(&mut p, 0, 0) & 0x40, 0x40, "half a count is none");
        assert_eq!(p.next_deadline(), None);
    }

    #[test]
    fn byte_access_and_bcd() {
        let mut p = pit();
        p.write(0x43, 0x14, 0);
        p.write(0x40, 200, 0);
        assert_eq!(p.read(0x40, 10), 190);
        assert_eq!(p.read(0x40, 11), 189);
        p.write(0x43, 0x24, 0);
        p.write(0x40, 2, 0);
        assert_eq!(p.read(0x40, 1), 1);
        load(&mut p, 0, 0x31, 0x1000, 0);
        assert_eq!(latched(&mut p, 0, 1), 0x0999);
        load(&mut p, 0, 0x31, 0, 0);
        assert_eq!(latched(&mut p, 0, 1), 0x9999);
    }

    #[test]
    fn channel_2_through_port_61() {
        let mut p = pit();
        p.write(0x61, 0, 0);
        load(&mut p, 2, 0xb0, 1000, 0);
        assert_eq!(p.read(0x61, 5000) & 0x21, 0, "gate low: stands still");
        p.write(0x61, 1, 5000);
        assert_eq!(p.read(0x61, 5999) & 0x21, 1);
        assert_eq!(p.read(0x61, 6000) & 0x21, 0x21);
        // A pause in the middle.
        load(&mut p, 2, 0xb0, 1000, 10_000);
        p.write(0x61, 0, 10_400);
        assert_eq!(latched(&mut p, 2, 20_000), 600);
        p.write(0x61, 1, 20_000);
        assert_eq!(p.read(0x61, 20_599) & 0x20, 0);
        assert_eq!(p.read(0x61, 20_600) & 0x20, 0x20);
        // Hardware one-shot: starts with the gate's rise, each time.
        load(&mut p, 2, 0xb2, 100, 30_000);
        assert_eq!(p.read(0x61, 30_500) & 0x20, 0x20);
        p.write(0x61, 0, 30_500);
        p.write(0x61, 1, 30_600);
        assert_eq!(p.read(0x61, 30_699) & 0x20, 0);
        assert_eq!(p.read(0x61, 30_700) & 0x20, 0x20);
        let toggles = (0..180)
            .map(|t| p.read(0x61, t) >> 4 & 1)
            .collect::<Vec<_>>();
        assert_eq!(toggles.windows(2).filter(|w| w[0] != w[1]).count(), 9);
    }

    #[test]
    fn firmware_ticks_at_18_hz_and_no_count_is_too_fast() {
        let mut p = pit();
        assert_eq!(rises(&mut p, 0, 200_000), [65_536, 131_072, 196_608]);
        load(&mut p, 0, 0x34, 1, 0);
        assert!(rises(&mut p, 0, 6000).len() <= 101);
        p.reset(7);
        assert_eq!(rises(&mut p, 7, 70_000), [65_543]);
    }
}
