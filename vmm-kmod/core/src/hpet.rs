//! High-precision event timers (IA-PC HPET specification 1.0a): one 64-bit
//! counter, eight comparators.

use crate::apicbus::{ApicMessage, IrqSink};
use crate::chipset::Wires;
use crate::time::{Clock, Ratio};

/// Guest-physical address of the registers.
pub const BASE: u64 = 0xfed0_0000;
/// Bytes of the register block.
pub const SIZE: u64 = 0x400;
/// Comparators.
pub const TIMERS: usize = 8;
/// Rate of the main counter. Its period, 62.5 ns, is a whole number of
/// femtoseconds, so that what guests compute from it is exact.
pub const HZ: u64 = 16_000_000;

/// General capabilities: period, vendor, legacy replacement, 64-bit counter,
/// timers, revision (`VM_GET_HPET_CAPABILITIES`).
pub const CAPABILITIES: u64 = (1_000_000_000_000_000 / HZ) << 32
    | 0x8086 << 16
    | 1 << 15
    | 1 << 13
    | (TIMERS as u64 - 1) << 8
    | 1;

const ENABLE: u64 = 1;
const LEGACY: u64 = 2;

// Timer configuration (§2.3.8).
const LEVEL: u64 = 1 << 1;
const INT_ENABLE: u64 = 1 << 2;
const PERIODIC: u64 = 1 << 3;
const PERIODIC_CAPABLE: u64 = 1 << 4;
const SIZE_64: u64 = 1 << 5;
const VALUE_SET: u64 = 1 << 6;
const MODE_32: u64 = 1 << 8;
const ROUTE: u64 = 0x1f << 9;
const FSB_ENABLE: u64 = 1 << 14;
const FSB_CAPABLE: u64 = 1 << 15;
const WRITABLE: u64 = LEVEL | INT_ENABLE | PERIODIC | VALUE_SET | MODE_32 | ROUTE | FSB_ENABLE;
/// IOAPIC pins that a timer may be routed to: 24 to 31.
const ROUTES: u64 = 0xff00_0000;

/// Interrupts of a periodic timer come no faster than this, counter ticks
/// (50 µs): a guest cannot make the host's timer storm.
const MIN_PERIOD: u64 = HZ / 20_000;

#[derive(Clone, Copy, Debug)]
struct Timer {
    config: u64,
    comparator: u64,
    period: u64,
    fsb: u64,
    /// Counter ticks since the counter's base at which it is due.
    due: Option<u64>,
    /// The pin that its level-triggered interrupt holds up.
    holds: Option<u8>,
}

impl Timer {
    const fn new() -> Self {
        Timer {
            config: ROUTES << 32 | FSB_CAPABLE | SIZE_64 | PERIODIC_CAPABLE,
            comparator: u64::MAX,
            period: 0,
            fsb: 0,
            due: None,
            holds: None,
        }
    }

    const fn width(&self) -> u64 {
        if self.config & MODE_32 != 0 {
            u32::MAX as u64
        } else {
            u64::MAX
        }
    }
}

/// The timer block. Times are host TSC ticks.
#[derive(Debug)]
pub struct Hpet {
    to_hpet: Ratio,
    from_hpet: Ratio,
    config: u64,
    status: u64,
    /// Counter value at `epoch`, or where it stands.
    base: u64,
    epoch: u64,
    timers: [Timer; TIMERS],
    /// The earliest `due`, or `u64::MAX`.
    next: u64,
    /// The same as host TSC, which is asked for often.
    deadline: Option<u64>,
}

fn merge(old: u64, value: u64, mask: u64) -> u64 {
    (old & !mask) | (value & mask)
}

impl Hpet {
    /// Stopped at 0.
    pub fn new(clock: &Clock) -> Self {
        let (to_hpet, from_hpet) = clock.ratios(HZ);
        Hpet {
            to_hpet,
            from_hpet,
            config: 0,
            status: 0,
            base: 0,
            epoch: 0,
            timers: [Timer::new(); TIMERS],
            next: u64::MAX,
            deadline: None,
        }
    }

    /// RESET.
    pub fn reset<S: IrqSink>(&mut self, wires: &mut Wires<'_, S>) {
        for timer in &mut self.timers {
            if let Some(pin) = timer.holds.take() {
                wires.ioapic.deassert(usize::from(pin));
            }
            *timer = Timer::new();
        }
        self.config = 0;
        self.status = 0;
        self.base = 0;
        self.find_next();
    }

    /// The capabilities register.
    pub const fn capabilities(&self) -> u64 {
        CAPABILITIES
    }

    /// Whether timers 0 and 1 have taken over IRQ 0 and IRQ 8 (§2.3.5).
    #[inline]
    pub fn legacy(&self) -> bool {
        self.config & (LEGACY | ENABLE) == LEGACY | ENABLE
    }

    fn running(&self) -> bool {
        self.config & ENABLE != 0
    }

    fn elapsed(&self, now: u64) -> u64 {
        self.to_hpet.apply(now.saturating_sub(self.epoch))
    }

    fn counter(&self, now: u64) -> u64 {
        if self.running() {
            self.base.wrapping_add(self.elapsed(now))
        } else {
            self.base
        }
    }

    /// Host TSC at which `service` should be called.
    #[inline]
    pub fn next_deadline(&self) -> Option<u64> {
        self.deadline
    }

    fn find_next(&mut self) {
        self.next = self
            .timers
            .iter()
            .filter(|t| t.config & INT_ENABLE != 0)
            .filter_map(|t| t.due)
            .min()
            .unwrap_or(u64::MAX);
        self.deadline = (self.next != u64::MAX).then(|| {
            self.epoch
                .saturating_add(self.from_hpet.apply_up(self.next))
        });
    }

    /// Works out when a timer will match, from its comparator.
    fn arm(&mut self, n: usize, now: u64) {
        let (running, elapsed, base) = (self.running(), self.elapsed(now), self.base);
        let Some(timer) = self.timers.get_mut(n) else {
            return;
        };
        let counter = base.wrapping_add(elapsed);
        timer.due = running.then(|| {
            let distance = timer.comparator.wrapping_sub(counter) & timer.width();
            // A comparator just written with the present value waits for the
            // counter to come round, like one in the past.
            elapsed.saturating_add(if distance == 0 {
                timer.width().saturating_add(1)
            } else {
                distance
            })
        });
    }

    fn arm_all(&mut self, now: u64) {
        for n in 0..TIMERS {
            self.catch_up(n, now);
            self.arm(n, now);
        }
        self.find_next();
    }

    /// Brings the comparator of a periodic timer in front of the counter.
    fn catch_up(&mut self, n: usize, now: u64) {
        let counter = self.counter(now);
        let Some(timer) = self.timers.get_mut(n) else {
            return;
        };
        if timer.config & PERIODIC != 0 && timer.period != 0 {
            let width = timer.width();
            let behind = counter.wrapping_sub(timer.comparator) & width;
            // More than half the range behind is in front.
            if behind <= width / 2 {
                let step = (behind / timer.period + 1).wrapping_mul(timer.period);
                timer.comparator = timer.comparator.wrapping_add(step) & width;
            }
        }
    }

    /// Fires what is due. Missed periods are one interrupt.
    pub fn service<S: IrqSink>(&mut self, now: u64, wires: &mut Wires<'_, S>) {
        if self.next == u64::MAX {
            return;
        }
        let elapsed = self.elapsed(now);
        if elapsed < self.next {
            return;
        }
        for n in 0..TIMERS {
            let due = self.timers.get(n).and_then(|t| t.due);
            if due.is_none_or(|due| elapsed < due) {
                continue;
            }
            self.fire(n, wires);
            self.catch_up(n, now);
            self.arm(n, now);
            if let Some(timer) = self.timers.get_mut(n)
                && timer.config & PERIODIC != 0
            {
                timer.due = timer
                    .due
                    .map(|due| due.max(elapsed.saturating_add(MIN_PERIOD)));
            }
        }
        self.find_next();
    }

    fn fire<S: IrqSink>(&mut self, n: usize, wires: &mut Wires<'_, S>) {
        let legacy = self.legacy();
        let Some(timer) = self.timers.get_mut(n) else {
            return;
        };
        if timer.config & INT_ENABLE == 0 {
            return;
        }
        if timer.config & FSB_ENABLE != 0 {
            if let Ok(message) = ApicMessage::from_msi(timer.fsb >> 32, timer.fsb & 0xffff_ffff) {
                wires.sink.message(&message);
            }
            return;
        }
        if legacy && n < 2 {
            if n == 0 {
                wires.isa_pulse(0, 2)
            } else {
                wires.isa_pulse(8, 8)
            }
            return;
        }
        let Some(pin) = route(timer.config) else {
            return;
        };
        if timer.config & LEVEL == 0 {
            wires.ioapic.pulse(usize::from(pin), wires.sink);
        } else if timer.holds.is_none() {
            self.status |= 1 << n;
            timer.holds = Some(pin);
            wires.ioapic.assert(usize::from(pin), wires.sink);
        }
    }

    /// A read of `size` bytes at an offset from `BASE`.
    pub fn read(&self, offset: u64, size: u8, now: u64) -> u64 {
        let Some(shift) = lane(offset, size) else {
            return 0;
        };
        let value = match offset & !7 {
            0x000 => CAPABILITIES,
            0x010 => self.config,
            0x020 => self.status,
            0x0f0 => self.counter(now),
            _ => match self.timer_register(offset) {
                Some((n, register)) => self.timers.get(n).map_or(0, |t| match register {
                    0x00 => t.config,
                    0x08 => t.comparator,
                    0x10 => t.fsb,
                    _ => 0,
                }),
                None => 0,
            },
        };
        if size == 4 {
            value >> shift & 0xffff_ffff
        } else {
            value
        }
    }

    /// Timer number and register (0x00, 0x08, 0x10 or 0x18).
    fn timer_register(&self, offset: u64) -> Option<(usize, u64)> {
        let n = usize::try_from((offset & !7).checked_sub(0x100)? / 0x20).ok()?;
        (n < TIMERS).then_some((n, offset & 0x18))
    }

    /// A write of `size` bytes at an offset from `BASE`. `next_deadline` may
    /// have changed.
    pub fn write<S: IrqSink>(
        &mut self,
        offset: u64,
        size: u8,
        value: u64,
        now: u64,
        wires: &mut Wires<'_, S>,
    ) {
        let Some(shift) = lane(offset, size) else {
            return;
        };
        let mask = if size == 8 {
            u64::MAX
        } else {
            0xffff_ffff << shift
        };
        let value = value << shift;
        // What became due before the write happens before it.
        self.service(now, wires);
        match offset & !7 {
            0x010 => {
                let config = merge(self.config, value, mask) & (ENABLE | LEGACY);
                if (config ^ self.config) & ENABLE != 0 {
                    self.base = self.counter(now);
                    self.epoch = now;
                }
                let changed = config != self.config;
                self.config = config;
                if changed {
                    self.arm_all(now);
                }
            }
            0x020 => {
                for n in 0..TIMERS {
                    if value & mask & self.status & (1 << n) != 0 {
                        self.let_go(n, wires);
                    }
                }
            }
            0x0f0 => {
                self.base = merge(self.counter(now), value, mask);
                self.epoch = now;
                self.arm_all(now);
            }
            _ => {
                if let Some((n, register)) = self.timer_register(offset) {
                    self.write_timer(n, register, value, mask, now, wires);
                }
            }
        }
    }

    fn let_go<S: IrqSink>(&mut self, n: usize, wires: &mut Wires<'_, S>) {
        self.status &= !(1 << n);
        if let Some(pin) = self.timers.get_mut(n).and_then(|t| t.holds.take()) {
            wires.ioapic.deassert(usize::from(pin));
        }
    }

    fn write_timer<S: IrqSink>(
        &mut self,
        n: usize,
        register: u64,
        value: u64,
        mask: u64,
        now: u64,
        wires: &mut Wires<'_, S>,
    ) {
        let Some(timer) = self.timers.get_mut(n) else {
            return;
        };
        match register {
            0x00 => {
                let mut config = merge(timer.config, value, mask & WRITABLE);
                if config & ROUTE != 0 && route(config).is_none() {
                    config &= !ROUTE;
                }
                timer.config = config;
                if config & MODE_32 != 0 {
                    timer.comparator &= 0xffff_ffff;
                    timer.period &= 0xffff_ffff;
                }
                if config & PERIODIC == 0 {
                    timer.period = 0;
                }
                // A level must not outlive what would take it back.
                let level = config & (INT_ENABLE | LEVEL | FSB_ENABLE) == INT_ENABLE | LEVEL;
                if timer.holds.is_some() && (!level || timer.holds != route(config)) {
                    self.let_go(n, wires);
                }
            }
            0x08 => {
                let width = timer.width();
                if timer.config & PERIODIC != 0 {
                    // §2.3.9.2.2: the comparator itself only with VAL_SET.
                    timer.period = merge(timer.period, value, mask) & width;
                    if timer.config & VALUE_SET != 0 {
                        timer.comparator = merge(timer.comparator, value, mask) & width;
                    }
                } else {
                    timer.comparator = merge(timer.comparator, value, mask) & width;
                }
                timer.config &= !VALUE_SET;
            }
            0x10 => {
                timer.fsb = merge(timer.fsb, value, mask);
                return;
            }
            _ => return,
        }
        self.catch_up(n, now);
        self.arm(n, now);
        self.find_next();
    }
}

/// The IOAPIC pin that a timer is routed to.
fn route(config: u64) -> Option<u8> {
    let pin = (config & ROUTE) >> 9;
    (ROUTES & (1 << pin) != 0).then_some(pin as u8)
}

/// Bit position of an access; registers are 64 bits wide and take naturally
/// aligned accesses of 4 and 8 bytes.
fn lane(offset: u64, size: u8) -> Option<u32> {
    match size {
        8 if offset & 7 == 0 => Some(0),
        4 if offset & 3 == 0 => Some(if offset & 4 != 0 { 32 } else { 0 }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chipset::tests::{Board, Sent};

    // One TSC tick is one counter tick.
    struct Bench {
        hpet: Hpet,
        board: Board,
    }

    impl Bench {
        fn new() -> Self {
            let mut b = Bench {
                hpet: Hpet::new(&Clock::new(HZ)),
                board: Board::new(),
            };
            b.board.route(24, 0x60);
            b.board.route(25, 0x8061);
            b.board.route(2, 0x62);
            b.board.route(8, 0x68);
            b
        }
        fn w(&mut self, offset: u64, size: u8, value: u64, now: u64) {
            self.hpet
                .write(offset, size, value, now, &mut self.board.wires());
        }
        fn vectors(&mut self, from: u64, to: u64) -> Vec<(u64, u8)> {
            let mut out = Vec::new();
            for t in from..to {
                self.hpet.service(t, &mut self.board.wires());
                out.extend(self.board.sent().into_iter().filter_map(|s| match s {
                    Sent::Message(m) => Some((t, m.vector)),
                    Sent::Lint0 => None,
                }));
            }
            out
        }
    }

    use alloc::vec::Vec;

    const PIN24: u64 = 24 << 9;

    #[test]
    fn capabilities_and_counter() {
        let mut b = Bench::new();
        assert_eq!(b.hpet.read(4, 4, 0), 62_500_000);
        assert_eq!(b.hpet.read(0, 4, 0), 0x8086_a701);
        b.w(0xf0, 8, 0xffff_fffe, 5);
        assert_eq!(b.hpet.read(0xf0, 8, 100), 0xffff_fffe, "stands still");
        b.w(0x10, 4, 1, 100);
        assert_eq!(b.hpet.read(0xf0, 8, 103), 0x1_0000_0001);
        assert_eq!(b.hpet.read(0xf4, 4, 103), 1);
        b.w(0x10, 4, 0, 110);
        assert_eq!(b.hpet.read(0xf0, 8, 999), 0x1_0000_0008);
        assert_eq!(b.hpet.read(0xf0, 2, 999), 0);
        assert_eq!(b.hpet.read(0xf2, 4, 999), 0);
    }

    #[test]
    fn one_shot_fires_on_match_and_again_after_a_32_bit_wrap() {
        let mut b = Bench::new();
        b.w(0x100, 4, INT_ENABLE | MODE_32 | PIN24, 0);
        b.w(0x10, 4, 1, 0);
        b.w(0x108, 4, 500, 0);
        assert_eq!(b.vectors(0, 2000), [(500, 0x60)]);
        assert_eq!(
            b.vectors(0x1_0000_01f0, 0x1_0000_0200),
            [(0x1_0000_01f4, 0x60)]
        );
        // A comparator in the past waits for the wrap.
        b.w(0x108, 4, 0x100, 0x1_0000_0200);
        assert_eq!(b.vectors(0x1_0000_0200, 0x1_0000_1000), []);
        b.w(0x100, 4, MODE_32 | PIN24, 0x1_0000_1000);
        assert_eq!(b.hpet.next_deadline(), None);
    }

    #[test]
    fn periodic_keeps_its_grid() {
        let mut b = Bench::new();
        b.w(0x10, 4, 1, 0);
        b.w(0x100, 4, INT_ENABLE | PERIODIC | VALUE_SET | PIN24, 0);
        b.w(0x108, 8, 1000, 0);
        assert_eq!(
            b.vectors(0, 3500),
            [(1000, 0x60), (2000, 0x60), (3000, 0x60)]
        );
        // First match and period apart, as Linux sets it.
        b.w(0x100, 4, INT_ENABLE | PERIODIC | VALUE_SET | PIN24, 3500);
        b.w(0x108, 8, 4100, 3500);
        b.w(0x108, 8, 900, 3500);
        assert_eq!(
            b.vectors(3500, 6000),
            [(4100, 0x60), (5000, 0x60), (5900, 0x60)]
        );
        // Late: once.
        assert_eq!(b.vectors(100_000, 100_001).len(), 1);
        assert_eq!(b.vectors(100_001, 100_410), []);
        assert_eq!(b.hpet.read(0x108, 8, 100_001) % 900, 500);
    }

    #[test]
    fn a_level_lasts_until_its_status_is_cleared() {
        let mut b = Bench::new();
        b.w(0x10, 4, 1, 0);
        b.w(0x120, 4, INT_ENABLE | LEVEL | 25 << 9, 0);
        b.w(0x128, 8, 50, 0);
        assert_eq!(b.vectors(0, 100), [(50, 0x61)]);
        assert_eq!(b.hpet.read(0x20, 4, 100), 2);
        b.board.eoi(0x61);
        assert_eq!(b.vectors(100, 101), [(100, 0x61)], "still up");
        b.w(0x20, 4, 2, 101);
        b.board.eoi(0x61);
        assert_eq!(b.vectors(101, 102), []);
        assert_eq!(b.hpet.read(0x20, 4, 100), 0);
        // Disabling takes the level back, too.
        b.w(0x128, 8, 150, 102);
        b.vectors(102, 160);
        b.w(0x120, 4, LEVEL | 25 << 9, 160);
        b.board.eoi(0x61);
        assert_eq!(b.vectors(160, 162), []);
    }

    #[test]
    fn fsb_messages_and_forbidden_routes() {
        let mut b = Bench::new();
        b.w(0x10, 4, 1, 0);
        b.w(0x150, 8, 0xfee0_1000 << 32 | 0x4071, 0);
        b.w(0x140, 4, INT_ENABLE | FSB_ENABLE, 0);
        b.w(0x148, 8, 70, 0);
        assert_eq!(b.vectors(0, 100), [(70, 0x71)]);
        b.w(0x160, 4, INT_ENABLE | 5 << 9, 100);
        assert_eq!(b.hpet.read(0x160, 4, 100) & ROUTE, 0);
        b.w(0x168, 8, 200, 100);
        assert_eq!(b.vectors(100, 300), []);
    }

    #[test]
    fn legacy_replacement_uses_irq_0_and_8() {
        let mut b = Bench::new();
        b.w(0x100, 4, INT_ENABLE, 0);
        b.w(0x120, 4, INT_ENABLE, 0);
        b.w(0x108, 8, 10, 0);
        b.w(0x128, 8, 20, 0);
        b.w(0x10, 4, 3, 0);
        assert!(b.hpet.legacy());
        assert_eq!(b.vectors(0, 100), [(10, 0x62), (20, 0x68)]);
        b.hpet.reset(&mut b.board.wires());
        assert!(!b.hpet.legacy());
        assert_eq!(b.hpet.next_deadline(), None);
    }

    #[test]
    fn a_tiny_period_is_stretched() {
        let mut b = Bench::new();
        b.w(0x10, 4, 1, 0);
        b.w(0x100, 4, INT_ENABLE | PERIODIC | VALUE_SET | PIN24, 0);
        b.w(0x108, 8, 1, 0);
        assert!(b.vectors(0, 8000).len() <= 11);
    }
}
