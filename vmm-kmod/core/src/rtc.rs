//! Real-time clock and CMOS memory (MC146818A).
//!
//! The time of day is the host's plus what has passed on the TSC; nothing is
//! counted, registers are computed when someone looks.

mod calendar;

use crate::time::{Clock, Ratio};
use calendar::{Civil, MAX_SECS};

/// Index port; data is the port after it.
pub const PORT: u16 = 0x70;
/// Bytes of registers and memory.
pub const SIZE: usize = 128;

const SECONDS: u8 = 0;
const HOURS: u8 = 4;
const YEAR: u8 = 9;
const REG_A: u8 = 0x0a;
const REG_B: u8 = 0x0b;
const REG_C: u8 = 0x0c;
const REG_D: u8 = 0x0d;
const CENTURY: u8 = 0x32;

const A_UPDATE: u8 = 0x80;
const A_DIVIDER: u8 = 0x70;
const A_DIVIDER_RUNS: u8 = 0x20;

const B_SET: u8 = 0x80;
const B_PERIODIC: u8 = 0x40;
const B_ALARM: u8 = 0x20;
const B_UPDATE: u8 = 0x10;
const B_SQUARE_WAVE: u8 = 0x08;
const B_BINARY: u8 = 0x04;
const B_24H: u8 = 0x02;

const C_IRQ: u8 = 0x80;
/// Flags of register C are at the places of their enables in register B.
const EVENTS: u8 = B_PERIODIC | B_ALARM | B_UPDATE;

/// The base of the periodic interrupt, Hz.
const CRYSTAL: u64 = 32_768;
/// UIP is set this long before an update, 1/32768 s (244 µs, MC146818A
/// "update cycle").
const UIP_LEAD: u64 = 8;

/// Why a time or a byte was not set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RtcError {
    /// The guest has stopped updates (register B, SET): the time is its own.
    Busy,
    /// No such byte, or one that is the clock's.
    Offset,
    /// Not within 1970 to 9999.
    Time,
}

/// The clock. Times are host TSC ticks, or seconds since 1970.
#[derive(Debug)]
pub struct Rtc {
    to_crystal: Ratio,
    from_crystal: Ratio,
    index: u8,
    bytes: [u8; SIZE],
    /// The second that began at this TSC; `None` while the clock stands and
    /// the date's bytes are the guest's.
    run: Option<(i64, u64)>,
    /// Where the periodic interrupt's divider was reset.
    divider: u64,
    /// Up to where events have been found: crystal ticks since `divider`,
    /// and second.
    seen_ticks: u64,
    seen_second: i64,
}

impl Rtc {
    /// A clock that shows `wall` at `now`, in 24 h and BCD.
    pub fn new(clock: &Clock, now: u64, wall: i64) -> Self {
        let (to_crystal, from_crystal) = clock.ratios(CRYSTAL);
        let wall = wall.clamp(0, MAX_SECS);
        let mut rtc = Rtc {
            to_crystal,
            from_crystal,
            index: REG_D,
            bytes: [0; SIZE],
            run: Some((wall, now)),
            divider: now,
            seen_ticks: 0,
            seen_second: wall,
        };
        rtc.set(REG_A, A_DIVIDER_RUNS | 6);
        rtc.set(REG_B, B_24H);
        // Memory and time are valid.
        rtc.set(REG_D, 0x80);
        rtc.refresh(now);
        rtc
    }

    /// RESET: interrupts off; time and memory stay.
    pub fn reset(&mut self, now: u64) {
        self.set(REG_B, self.get(REG_B) & !(EVENTS | B_SQUARE_WAVE));
        self.find_events(now);
        self.set(REG_C, 0);
        self.index = REG_D;
    }

    /// Whether a port is one of ours.
    pub const fn claims(port: u16) -> bool {
        matches!(port, 0x70 | 0x71)
    }

    fn get(&self, offset: u8) -> u8 {
        self.bytes.get(usize::from(offset)).copied().unwrap_or(0)
    }

    fn set(&mut self, offset: u8, value: u8) {
        if let Some(byte) = self.bytes.get_mut(usize::from(offset)) {
            *byte = value;
        }
    }

    // ---- time ----

    fn crystal(&self, since: u64, now: u64) -> u64 {
        self.to_crystal.apply(now.saturating_sub(since))
    }

    /// The current second, if the clock runs.
    fn second(&self, now: u64) -> Option<i64> {
        let (secs, since) = self.run?;
        let passed = i64::try_from(self.crystal(since, now) / CRYSTAL).unwrap_or(i64::MAX);
        Some(secs.saturating_add(passed).min(MAX_SECS))
    }

    /// Host TSC at which `second` begins.
    fn begin_of(&self, second: i64) -> Option<u64> {
        let (secs, since) = self.run?;
        let ahead = u64::try_from(second.saturating_sub(secs)).ok()?;
        Some(since.saturating_add(self.from_crystal.apply_up(ahead.saturating_mul(CRYSTAL))))
    }

    fn updating(&self, now: u64) -> bool {
        self.run
            .is_some_and(|(_, since)| self.crystal(since, now) % CRYSTAL >= CRYSTAL - UIP_LEAD)
    }

    fn binary(&self) -> bool {
        self.get(REG_B) & B_BINARY != 0
    }

    /// Puts the current time into its bytes.
    fn refresh(&mut self, now: u64) {
        if let Some(second) = self.second(now) {
            self.encode(second);
        }
    }

    fn encode(&mut self, second: i64) {
        let t = Civil::from_secs(second);
        let (hour, pm) = match (self.get(REG_B) & B_24H != 0, t.hour) {
            (true, h) => (h, 0),
            (false, h) => (
                if h % 12 == 0 { 12 } else { h % 12 },
                if h >= 12 { 0x80 } else { 0 },
            ),
        };
        let binary = self.binary();
        let code = |v: u8| {
            if binary {
                v
            } else {
                ((v / 10) << 4) | (v % 10)
            }
        };
        self.set(SECONDS, code(t.second));
        self.set(2, code(t.minute));
        self.set(HOURS, code(hour) | pm);
        self.set(6, code(t.weekday + 1));
        self.set(7, code(t.day));
        self.set(8, code(t.month));
        self.set(YEAR, code((t.year % 100) as u8));
        self.set(CENTURY, code((t.year / 100) as u8));
    }

    fn number(&self, byte: u8) -> Option<u8> {
        if self.binary() {
            return Some(byte);
        }
        let (high, low) = (byte >> 4, byte & 15);
        (high <= 9 && low <= 9).then_some(high * 10 + low)
    }

    fn hour(&self, byte: u8) -> Option<u8> {
        if self.get(REG_B) & B_24H != 0 {
            return self.number(byte).filter(|h| *h < 24);
        }
        let hour = self.number(byte & 0x7f).filter(|h| (1..=12).contains(h))?;
        Some(hour % 12 + if byte & 0x80 != 0 { 12 } else { 0 })
    }

    /// The time that the bytes say, if they say one. The day of the week is
    /// not asked: guests set it wrong.
    fn decode(&self) -> Option<i64> {
        let n = |offset| self.number(self.get(offset));
        Civil {
            second: n(SECONDS)?,
            minute: n(2)?,
            hour: self.hour(self.get(HOURS))?,
            weekday: 0,
            day: n(7)?,
            month: n(8)?,
            year: u16::from(n(CENTURY)?) * 100 + u16::from(n(YEAR).filter(|y| *y < 100)?),
        }
        .to_secs()
    }

    /// `VM_RTC_GETTIME`: seconds since 1970; `None` while the guest sets it.
    pub fn time(&self, now: u64) -> Option<i64> {
        match self.second(now) {
            Some(second) => Some(second),
            None if self.get(REG_B) & B_SET != 0 => None,
            None => self.decode(),
        }
    }

    /// `VM_RTC_SETTIME`.
    pub fn set_time(&mut self, secs: i64, now: u64) -> Result<(), RtcError> {
        if self.get(REG_B) & B_SET != 0 {
            return Err(RtcError::Busy);
        }
        if !(0..=MAX_SECS).contains(&secs) {
            return Err(RtcError::Time);
        }
        self.encode(secs);
        self.start(now);
        Ok(())
    }

    /// Lets the clock run from what the bytes say, if it may.
    fn start(&mut self, now: u64) {
        let may = self.get(REG_B) & B_SET == 0 && self.get(REG_A) & A_DIVIDER == A_DIVIDER_RUNS;
        self.run = if may {
            self.decode().map(|secs| (secs, now))
        } else {
            None
        };
        if let Some((secs, _)) = self.run {
            self.seen_second = secs;
        }
    }

    // ---- interrupts ----

    /// Crystal ticks between two periodic events; `None` if there are none.
    fn period(&self) -> Option<u64> {
        let a = self.get(REG_A);
        if a & A_DIVIDER != A_DIVIDER_RUNS {
            return None;
        }
        match a & 15 {
            0 => None,
            // 1 and 2 are what 8 and 9 are (MC146818A table 5).
            rate @ (1 | 2) => Some(1 << (rate + 6)),
            rate => Some(1 << (rate - 1)),
        }
    }

    /// The first second after `after` at which the alarm matches.
    fn next_alarm(&self, after: i64) -> Option<i64> {
        // 0xc0 and up match anything.
        let field = |offset, decode: &dyn Fn(u8) -> Option<u8>, limit: u8| {
            let byte = self.get(offset);
            if byte >= 0xc0 {
                Some(None)
            } else {
                decode(byte).filter(|v| *v < limit).map(Some)
            }
        };
        let second = field(1, &|b| self.number(b), 60)?;
        let minute = field(3, &|b| self.number(b), 60)?;
        let hour = field(5, &|b| self.hour(b), 24)?;
        let matches = |field: Option<u8>, value: i64| field.is_none_or(|f| i64::from(f) == value);
        let mut t = after.saturating_add(1);
        // From hour to hour, then from minute to minute, then to the second.
        for _ in 0..24 + 60 + 60 {
            if !matches(hour, t / 3600 % 24) {
                t = (t / 3600 + 1) * 3600;
            } else if !matches(minute, t / 60 % 60) {
                t = (t / 60 + 1) * 60;
            } else if !matches(second, t % 60) {
                t += 1;
            } else {
                return Some(t);
            }
        }
        None
    }

    /// Sets the flags of what has happened up to `now`.
    fn find_events(&mut self, now: u64) {
        let mut flags = 0;
        let ticks = self.crystal(self.divider, now);
        if let Some(period) = self.period()
            && ticks / period != self.seen_ticks / period
        {
            flags |= B_PERIODIC;
        }
        self.seen_ticks = ticks;
        if let Some(second) = self.second(now)
            && second > self.seen_second
        {
            flags |= B_UPDATE;
            if self
                .next_alarm(self.seen_second)
                .is_some_and(|alarm| alarm <= second)
            {
                flags |= B_ALARM;
            }
            self.seen_second = second;
        }
        self.set(REG_C, self.get(REG_C) | flags);
    }

    /// Works out IRQF. True on its rise: an edge on IRQ 8.
    fn interrupt(&mut self) -> bool {
        let c = self.get(REG_C);
        let up = c & self.get(REG_B) & EVENTS != 0;
        self.set(REG_C, c & !C_IRQ | if up { C_IRQ } else { 0 });
        up && c & C_IRQ == 0
    }

    /// Finds what has happened by `now`; true if IRQ 8 has an edge.
    pub fn service(&mut self, now: u64) -> bool {
        self.find_events(now);
        self.interrupt()
    }

    /// Host TSC at which `service` should be called. Nothing is due while
    /// the last interrupt has not been looked at.
    pub fn next_deadline(&self) -> Option<u64> {
        let b = self.get(REG_B);
        if self.get(REG_C) & C_IRQ != 0 || b & EVENTS == 0 {
            return None;
        }
        let periodic = self.period().filter(|_| b & B_PERIODIC != 0).map(|period| {
            let next = (self.seen_ticks / period + 1) * period;
            self.divider
                .saturating_add(self.from_crystal.apply_up(next))
        });
        let second = if b & B_UPDATE != 0 {
            Some(self.seen_second.saturating_add(1))
        } else if b & B_ALARM != 0 {
            self.next_alarm(self.seen_second)
        } else {
            None
        };
        let second = second.and_then(|second| self.begin_of(second));
        [periodic, second].into_iter().flatten().min()
    }

    // ---- ports and memory ----

    /// A byte read from a port. The index cannot be read back.
    pub fn read(&mut self, port: u16, now: u64) -> u8 {
        if port & 1 == 0 {
            return 0xff;
        }
        self.find_events(now);
        self.refresh(now);
        let value = self.get(self.index);
        match self.index {
            REG_A if self.updating(now) => value | A_UPDATE,
            REG_C => {
                self.interrupt();
                let value = self.get(REG_C);
                self.set(REG_C, 0);
                value
            }
            _ => value,
        }
    }

    /// A byte written to a port; true if IRQ 8 has an edge. `next_deadline`
    /// may have changed.
    pub fn write(&mut self, port: u16, value: u8, now: u64) -> bool {
        if port & 1 == 0 {
            self.index = value & 0x7f;
            return false;
        }
        self.find_events(now);
        self.refresh(now);
        match self.index {
            REG_A => {
                let old = self.get(REG_A);
                self.set(REG_A, value & !A_UPDATE);
                if (old ^ value) & A_DIVIDER != 0 {
                    self.divider = now;
                    self.seen_ticks = 0;
                    self.start(now);
                }
            }
            REG_B => {
                let old = self.get(REG_B);
                // SET takes the update interrupt's enable away.
                self.set(
                    REG_B,
                    if value & B_SET != 0 {
                        value & !B_UPDATE
                    } else {
                        value
                    },
                );
                if (old ^ value) & B_SET != 0 {
                    self.start(now);
                }
            }
            REG_C | REG_D => {}
            index => {
                let value = if index == SECONDS {
                    value & 0x7f
                } else {
                    value
                };
                self.set(index, value);
                // Some guests set the time without stopping the clock.
                if matches!(index, 0 | 2 | 4 | 6..=9 | CENTURY) && self.run.is_some() {
                    self.adjust();
                }
            }
        }
        self.interrupt()
    }

    /// Takes a changed date over into the running clock, in its phase.
    fn adjust(&mut self) {
        let (Some(shown), Some((secs, since))) = (self.decode(), self.run) else {
            return;
        };
        let change = shown - self.seen_second;
        self.run = Some((secs + change, since));
        self.seen_second = shown;
    }

    /// `VM_RTC_READ`: any byte, without side effects.
    pub fn peek(&mut self, offset: u32, now: u64) -> Result<u8, RtcError> {
        let offset = u8::try_from(offset).map_err(|_| RtcError::Offset)?;
        if usize::from(offset) >= SIZE {
            return Err(RtcError::Offset);
        }
        self.refresh(now);
        Ok(self.get(offset))
    }

    /// `VM_RTC_WRITE`: memory only, not the clock's bytes.
    pub fn poke(&mut self, offset: u32, value: u8) -> Result<(), RtcError> {
        match u8::try_from(offset) {
            Ok(offset @ 14..=127) if offset != CENTURY => {
                self.set(offset, value);
                Ok(())
            }
            _ => Err(RtcError::Offset),
        }
    }
}

#[cfg(test)]
mod tests;
