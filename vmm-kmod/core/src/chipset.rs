//! The devices of a PC's south bridge that interrupt, and how they are wired.
//!
//! All of it sits under one lock of the VM's, held for one short call.

use crate::apicbus::IrqSink;
use crate::atpic::AtPic;
use crate::atpit::AtPit;
use crate::hpet::{self, Hpet};
use crate::ioapic::{self, IoApic};
use crate::pmtmr::PmTimer;
use crate::rtc::{Rtc, RtcError};
use crate::time::Clock;

/// IRQ 0 of the 8259 is pin 2 of the IOAPIC; the MADT says so.
const PIT_IRQ: (u8, u8) = (0, 2);
const RTC_IRQ: (u8, u8) = (8, 8);

/// There is no such interrupt line, or it cannot have that trigger mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidIrq;

/// The interrupt controllers, as the timers see them.
pub struct Wires<'a, S: IrqSink> {
    /// 8259 pair.
    pub pic: &'a mut AtPic,
    /// I/O APIC.
    pub ioapic: &'a mut IoApic,
    /// The local APICs.
    pub sink: &'a mut S,
}

impl<S: IrqSink> Wires<'_, S> {
    /// INTR is wired to LINT0 and to pin 0 of the IOAPIC (MultiProcessor
    /// Specification 1.4 §3.6.2).
    fn intr(&mut self, rose: bool) {
        if rose {
            self.sink.lint0();
            self.ioapic.pulse(0, self.sink);
        }
    }

    /// An edge on a line that goes to both controllers.
    pub fn isa_pulse(&mut self, irq: u8, pin: u8) {
        let rose = self.pic.pulse(irq);
        self.intr(rose);
        self.ioapic.pulse(usize::from(pin), self.sink);
    }
}

/// The chipset of one VM.
#[derive(Debug)]
pub struct Chipset {
    /// 8259 pair.
    pub pic: AtPic,
    /// I/O APIC.
    pub ioapic: IoApic,
    /// 8254.
    pub pit: AtPit,
    /// HPET.
    pub hpet: Hpet,
    /// MC146818A.
    pub rtc: Rtc,
    /// ACPI PM timer.
    pub pmtmr: PmTimer,
}

/// Ports of the devices, a bit each: every IN and OUT asks.
#[expect(clippy::indexing_slicing, reason = "evaluated by the compiler")]
const CLAIMED: [u64; 20] = {
    let mut claimed = [0; 20];
    let mut port = 0u16;
    while port < 64 * 20 {
        let ours = AtPic::claims(port)
            || AtPit::claims(port)
            || Rtc::claims(port)
            || PmTimer::claims(port);
        if ours {
            claimed[(port >> 6) as usize] |= 1 << (port & 63);
        }
        port += 1;
    }
    claimed
};

impl Chipset {
    /// A chipset at `now`, host TSC ticks, with its clock at `wall` seconds
    /// since 1970.
    pub fn new(clock: &Clock, now: u64, wall: i64) -> Self {
        Chipset {
            pic: AtPic::new(),
            ioapic: IoApic::new(),
            pit: AtPit::new(clock, now),
            hpet: Hpet::new(clock),
            rtc: Rtc::new(clock, now, wall),
            pmtmr: PmTimer::new(clock, now),
        }
    }

    /// RESET of the machine. The time of day goes on.
    pub fn reset<S: IrqSink>(&mut self, now: u64, sink: &mut S) {
        let mut wires = Wires {
            pic: &mut self.pic,
            ioapic: &mut self.ioapic,
            sink,
        };
        self.hpet.reset(&mut wires);
        self.pic.reset();
        self.ioapic.reset();
        self.pit.reset(now);
        self.rtc.reset(now);
    }

    fn wires<'a, S: IrqSink>(&'a mut self, sink: &'a mut S) -> Wires<'a, S> {
        Wires {
            pic: &mut self.pic,
            ioapic: &mut self.ioapic,
            sink,
        }
    }

    // ---- time ----

    /// Host TSC at which `service` should be called. Timers whose interrupt
    /// is masked everywhere ask for nothing; they catch up when someone looks.
    pub fn next_deadline(&self) -> Option<u64> {
        let legacy = self.hpet.legacy();
        let heard = |(irq, pin): (u8, u8)| {
            !legacy && (!self.pic.masked(irq) || !self.ioapic.masked(usize::from(pin)))
        };
        let pit = if heard(PIT_IRQ) {
            self.pit.next_deadline()
        } else {
            None
        };
        let rtc = if heard(RTC_IRQ) {
            self.rtc.next_deadline()
        } else {
            None
        };
        [pit, rtc, self.hpet.next_deadline()]
            .into_iter()
            .flatten()
            .min()
    }

    /// Delivers what has become due by `now`.
    pub fn service<S: IrqSink>(&mut self, now: u64, sink: &mut S) {
        let legacy = self.hpet.legacy();
        let mut wires = Wires {
            pic: &mut self.pic,
            ioapic: &mut self.ioapic,
            sink,
        };
        if self.pit.service(now) && !legacy {
            wires.isa_pulse(PIT_IRQ.0, PIT_IRQ.1);
        }
        if self.rtc.service(now) && !legacy {
            wires.isa_pulse(RTC_IRQ.0, RTC_IRQ.1);
        }
        self.hpet.service(now, &mut wires);
    }

    // ---- ports ----

    /// Whether a port is one of ours.
    #[inline]
    pub fn claims_port(port: u16) -> bool {
        CLAIMED
            .get(usize::from(port >> 6))
            .is_some_and(|word| word >> (port & 63) & 1 != 0)
    }

    /// IN of 1, 2 or 4 bytes. Wider than a device's registers, it is a byte
    /// access to each port.
    pub fn io_read<S: IrqSink>(&mut self, port: u16, size: u8, now: u64, sink: &mut S) -> u32 {
        if PmTimer::claims(port) {
            return self.pmtmr.io_read(port, now) & mask(size);
        }
        if !Self::is_counter_port(port, size) {
            self.service(now, sink);
        }
        let mut value = 0;
        for n in 0..u16::from(size.min(4)) {
            value |= u32::from(self.byte_read(port.wrapping_add(n), now)) << (8 * n);
        }
        value
    }

    fn byte_read(&mut self, port: u16, now: u64) -> u8 {
        if AtPic::claims(port) {
            self.pic.read(port)
        } else if AtPit::claims(port) {
            self.pit.read(port, now)
        } else if Rtc::claims(port) {
            self.rtc.read(port, now)
        } else {
            0xff
        }
    }

    /// OUT of 1, 2 or 4 bytes. `next_deadline` may have changed.
    pub fn io_write<S: IrqSink>(
        &mut self,
        port: u16,
        size: u8,
        value: u32,
        now: u64,
        sink: &mut S,
    ) {
        if !Self::is_latch(port, size, value) {
            self.service(now, sink);
        }
        for n in 0..u16::from(size.min(4)) {
            self.byte_write(port.wrapping_add(n), (value >> (8 * n)) as u8, now, sink);
        }
    }

    fn byte_write<S: IrqSink>(&mut self, port: u16, value: u8, now: u64, sink: &mut S) {
        if AtPic::claims(port) {
            let rose = self.pic.write(port, value);
            self.wires(sink).intr(rose);
        } else if AtPit::claims(port) {
            self.pit.write(port, value, now);
        } else if Rtc::claims(port) && self.rtc.write(port, value, now) && !self.hpet.legacy() {
            self.wires(sink).isa_pulse(RTC_IRQ.0, RTC_IRQ.1);
        }
    }

    // ---- memory-mapped registers ----

    /// Whether a guest-physical address is one of ours.
    pub const fn claims_gpa(gpa: u64) -> bool {
        (gpa >= ioapic::BASE && gpa < ioapic::BASE + 0x1000)
            || (gpa >= hpet::BASE && gpa < hpet::BASE + hpet::SIZE)
    }

    /// Whether an IN there moves no deadline and finds nothing that is due:
    /// the 8254's counters, which guests without a better clock poll.
    pub const fn is_counter_port(port: u16, size: u8) -> bool {
        size == 1 && AtPit::claims(port)
    }

    /// Whether an OUT only latches a count of the 8254, or several and their
    /// status (82C54 data sheet, "Counter Latch Command", "Read-Back Command").
    pub const fn is_latch(port: u16, size: u8, value: u32) -> bool {
        port == 0x43 && size == 1 && (value & 0x30 == 0 || value & 0xc0 == 0xc0)
    }

    /// Whether a read there changes nothing: the HPET's counter, which is all
    /// that is read often.
    pub const fn is_counter(gpa: u64) -> bool {
        gpa & !7 == hpet::BASE + 0xf0
    }

    /// A read of 1, 2, 4 or 8 bytes.
    pub fn mmio_read<S: IrqSink>(&mut self, gpa: u64, size: u8, now: u64, sink: &mut S) -> u64 {
        if let Some(offset) = gpa.checked_sub(hpet::BASE) {
            if !Self::is_counter(gpa) {
                self.service(now, sink);
            }
            return self.hpet.read(offset, size, now);
        }
        self.ioapic.read(gpa.wrapping_sub(ioapic::BASE), size)
    }

    /// A write of 1, 2, 4 or 8 bytes. `next_deadline` may have changed.
    pub fn mmio_write<S: IrqSink>(
        &mut self,
        gpa: u64,
        size: u8,
        value: u64,
        now: u64,
        sink: &mut S,
    ) {
        self.service(now, sink);
        if let Some(offset) = gpa.checked_sub(hpet::BASE) {
            let mut wires = Wires {
                pic: &mut self.pic,
                ioapic: &mut self.ioapic,
                sink,
            };
            self.hpet.write(offset, size, value, now, &mut wires);
        } else {
            self.ioapic
                .write(gpa.wrapping_sub(ioapic::BASE), size, value, sink);
        }
    }

    /// A local APIC has ended a level-triggered interrupt.
    pub fn eoi<S: IrqSink>(&mut self, vector: u8, sink: &mut S) {
        self.ioapic.eoi(vector, sink);
    }

    // ---- lines ----

    /// `VM_ISA_ASSERT_IRQ`: an IRQ of the 8259s and, if given, the IOAPIC pin
    /// that the same line is wired to.
    pub fn isa_assert<S: IrqSink>(
        &mut self,
        irq: u8,
        pin: Option<u8>,
        sink: &mut S,
    ) -> Result<(), InvalidIrq> {
        check(irq, pin)?;
        let rose = self.pic.assert(irq);
        self.wires(sink).intr(rose);
        if let Some(pin) = pin {
            self.ioapic.assert(usize::from(pin), sink);
        }
        Ok(())
    }

    /// `VM_ISA_DEASSERT_IRQ`.
    pub fn isa_deassert<S: IrqSink>(
        &mut self,
        irq: u8,
        pin: Option<u8>,
        sink: &mut S,
    ) -> Result<(), InvalidIrq> {
        check(irq, pin)?;
        let rose = self.pic.deassert(irq);
        self.wires(sink).intr(rose);
        if let Some(pin) = pin {
            self.ioapic.deassert(usize::from(pin));
        }
        Ok(())
    }

    /// `VM_ISA_PULSE_IRQ`.
    pub fn isa_pulse<S: IrqSink>(
        &mut self,
        irq: u8,
        pin: Option<u8>,
        sink: &mut S,
    ) -> Result<(), InvalidIrq> {
        check(irq, pin)?;
        let rose = self.pic.pulse(irq);
        self.wires(sink).intr(rose);
        if let Some(pin) = pin {
            self.ioapic.pulse(usize::from(pin), sink);
        }
        Ok(())
    }

    /// `VM_ISA_SET_IRQ_TRIGGER`.
    pub fn set_irq_trigger(&mut self, irq: u8, level: bool) -> Result<(), InvalidIrq> {
        if self.pic.set_trigger(irq, level) {
            Ok(())
        } else {
            Err(InvalidIrq)
        }
    }

    /// `VM_IOAPIC_ASSERT_IRQ`.
    pub fn ioapic_assert<S: IrqSink>(&mut self, pin: u32, sink: &mut S) -> Result<(), InvalidIrq> {
        valid(self.ioapic.assert(pin_index(pin), sink))
    }

    /// `VM_IOAPIC_DEASSERT_IRQ`.
    pub fn ioapic_deassert(&mut self, pin: u32) -> Result<(), InvalidIrq> {
        valid(self.ioapic.deassert(pin_index(pin)))
    }

    /// `VM_IOAPIC_PULSE_IRQ`.
    pub fn ioapic_pulse<S: IrqSink>(&mut self, pin: u32, sink: &mut S) -> Result<(), InvalidIrq> {
        valid(self.ioapic.pulse(pin_index(pin), sink))
    }

    // ---- the clock, from outside ----

    /// `VM_RTC_READ`.
    pub fn rtc_read(&mut self, offset: i32, now: u64) -> Result<u8, RtcError> {
        self.rtc
            .peek(u32::try_from(offset).map_err(|_| RtcError::Offset)?, now)
    }

    /// `VM_RTC_WRITE`.
    pub fn rtc_write(&mut self, offset: i32, value: u8, _now: u64) -> Result<(), RtcError> {
        self.rtc
            .poke(u32::try_from(offset).map_err(|_| RtcError::Offset)?, value)
    }

    /// `VM_RTC_SETTIME`: seconds since 1970.
    pub fn rtc_settime(&mut self, secs: i64, now: u64) -> Result<(), RtcError> {
        self.rtc.set_time(secs, now)
    }

    /// `VM_RTC_GETTIME`: seconds since 1970; -1 while the guest sets it.
    pub fn rtc_gettime(&self, now: u64) -> i64 {
        self.rtc.time(now).unwrap_or(-1)
    }

    // ---- interrupt acknowledge ----

    /// Whether the 8259s have an interrupt for the CPU.
    #[inline]
    pub fn extint_pending(&self) -> bool {
        self.pic.intr()
    }

    /// Interrupt acknowledge by the CPU: the vector, if the request is still
    /// there, and whether another follows at once (for `Lapic::extint_done`).
    pub fn extint_acknowledge(&mut self) -> (Option<u8>, bool) {
        if !self.pic.intr() {
            return (None, false);
        }
        let vector = self.pic.acknowledge();
        (Some(vector), self.pic.intr())
    }

    /// LINT0 has been unmasked: tell it again if INTR is up.
    pub fn refresh_lint0<S: IrqSink>(&mut self, sink: &mut S) {
        if self.pic.intr() {
            sink.lint0();
        }
    }
}

fn mask(size: u8) -> u32 {
    match size {
        1 => 0xff,
        2 => 0xffff,
        _ => u32::MAX,
    }
}

fn check(irq: u8, pin: Option<u8>) -> Result<(), InvalidIrq> {
    valid(irq < 16 && pin.is_none_or(|pin| usize::from(pin) < ioapic::PINS))
}

fn valid(ok: bool) -> Result<(), InvalidIrq> {
    if ok { Ok(()) } else { Err(InvalidIrq) }
}

fn pin_index(pin: u32) -> usize {
    usize::try_from(pin).unwrap_or(usize::MAX)
}

#[cfg(test)]
pub(crate) mod tests;
