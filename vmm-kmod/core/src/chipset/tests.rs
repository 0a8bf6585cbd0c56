use super::*;
use crate::apicbus::ApicMessage;
use crate::time::PIT_HZ;
use alloc::vec::Vec;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    Message(ApicMessage),
    Lint0,
}

#[derive(Default)]
pub(crate) struct Log(Vec<Sent>);

impl IrqSink for Log {
    fn message(&mut self, message: &ApicMessage) -> bool {
        self.0.push(Sent::Message(*message));
        true
    }
    fn lint0(&mut self) {
        self.0.push(Sent::Lint0);
    }
}

impl Log {
    fn vectors(&mut self) -> Vec<u8> {
        self.0
            .drain(..)
            .filter_map(|s| match s {
                Sent::Message(m) => Some(m.vector),
                Sent::Lint0 => None,
            })
            .collect()
    }
    fn lint0s(&mut self) -> usize {
        self.0.drain(..).filter(|s| *s == Sent::Lint0).count()
    }
}

/// Interrupt controllers for the tests of the timers.
pub(crate) struct Board {
    pic: AtPic,
    ioapic: IoApic,
    log: Log,
}

impl Board {
    pub(crate) fn new() -> Self {
        Board {
            pic: AtPic::new(),
            ioapic: IoApic::new(),
            log: Log::default(),
        }
    }
    pub(crate) fn wires(&mut self) -> Wires<'_, Log> {
        Wires {
            pic: &mut self.pic,
            ioapic: &mut self.ioapic,
            sink: &mut self.log,
        }
    }
    pub(crate) fn route(&mut self, pin: u64, low: u64) {
        self.ioapic.write(0, 4, 0x10 + 2 * pin, &mut self.log);
        self.ioapic.write(0x10, 4, low, &mut self.log);
    }
    pub(crate) fn eoi(&mut self, vector: u8) {
        self.ioapic.eoi(vector, &mut self.log);
    }
    pub(crate) fn sent(&mut self) -> Vec<Sent> {
        self.log.0.drain(..).collect()
    }
}

fn chipset() -> Chipset {
    Chipset::new(&Clock::new(PIT_HZ), 0, 0)
}

fn init_pic(c: &mut Chipset, log: &mut Log, mask: u8) {
    for (port, v) in [
        (0x20, 0x11),
        (0x21, 0x30),
        (0x21, 4),
        (0x21, 1),
        (0xa0, 0x11),
        (0xa1, 0x38),
        (0xa1, 2),
        (0xa1, 1),
        (0x21, mask),
    ] {
        c.io_write(port, 1, u32::from(v), 0, log);
    }
}

fn route(c: &mut Chipset, log: &mut Log, pin: u64, low: u64, now: u64) {
    c.mmio_write(0xfec0_0000, 4, 0x10 + 2 * pin, now, log);
    c.mmio_write(0xfec0_0010, 4, low, now, log);
}

#[test]
fn the_tick_reaches_lint0_and_pin_2() {
    let (mut c, log) = (chipset(), &mut Log::default());
    assert_eq!(c.next_deadline(), None, "nobody listens");
    init_pic(&mut c, log, 0xfb);
    assert_eq!(c.next_deadline(), None);
    c.io_write(0x21, 1, 0xfa, 0, log);
    assert!(c.next_deadline().unwrap().abs_diff(65_536) <= 1);
    c.service(65_540, log);
    assert_eq!(log.lint0s(), 1);
    assert!(c.extint_pending());
    assert_eq!(c.extint_acknowledge(), (Some(0x30), false));
    assert_eq!(c.extint_acknowledge(), (None, false));
    c.io_write(0x20, 1, 0x20, 65_600, log);
    c.io_write(0x21, 1, 0xff, 65_600, log);
    route(&mut c, log, 2, 0x40, 65_600);
    c.service(131_080, log);
    assert_eq!(log.vectors(), [0x40]);
}

#[test]
fn a_tick_that_was_masked_is_there_when_unmasked() {
    let (mut c, log) = (chipset(), &mut Log::default());
    init_pic(&mut c, log, 0xff);
    c.io_write(0x21, 1, 0xfe, 70_000, log);
    assert_eq!(log.lint0s(), 1);
    // LINT0 was masked at the time: it asks again.
    c.refresh_lint0(log);
    assert_eq!(log.lint0s(), 1);
    assert_eq!(c.extint_acknowledge().0, Some(0x30));
    c.refresh_lint0(log);
    assert_eq!(log.lint0s(), 0);
}

#[test]
fn more_than_one_request_is_acknowledged_in_turn() {
    let (mut c, log) = (chipset(), &mut Log::default());
    init_pic(&mut c, log, 0);
    c.isa_pulse(4, Some(4), log).unwrap();
    c.isa_pulse(3, Some(3), log).unwrap();
    assert_eq!(log.lint0s(), 1);
    assert_eq!(c.extint_acknowledge(), (Some(0x33), false));
    c.isa_pulse(1, None, log).unwrap();
    assert_eq!(c.extint_acknowledge(), (Some(0x31), false));
    c.io_write(0x20, 1, 0x20, 0, log);
    c.io_write(0x20, 1, 0x20, 0, log);
    assert_eq!(c.extint_acknowledge(), (Some(0x34), false));
    assert_eq!(log.lint0s(), 2);
}

#[test]
fn lines_that_do_not_exist_are_refused() {
    let (mut c, log) = (chipset(), &mut Log::default());
    assert_eq!(c.isa_assert(16, None, log), Err(InvalidIrq));
    assert_eq!(c.isa_deassert(1, Some(32), log), Err(InvalidIrq));
    assert_eq!(c.ioapic_pulse(32, log), Err(InvalidIrq));
    assert_eq!(c.ioapic_assert(u32::MAX, log), Err(InvalidIrq));
    assert_eq!(c.set_irq_trigger(8, true), Err(InvalidIrq));
    assert_eq!(c.set_irq_trigger(9, true), Ok(()));
}

#[test]
fn levels_through_both_controllers() {
    let (mut c, log) = (chipset(), &mut Log::default());
    route(&mut c, log, 14, 0x8099, 0);
    c.isa_assert(14, Some(14), log).unwrap();
    assert_eq!(log.vectors(), [0x99]);
    c.isa_deassert(14, Some(14), log).unwrap();
    c.eoi(0x99, log);
    c.isa_assert(14, Some(14), log).unwrap();
    assert_eq!(log.vectors(), [0x99]);
}

#[test]
fn legacy_replacement_silences_the_pit() {
    let (mut c, log) = (chipset(), &mut Log::default());
    route(&mut c, log, 2, 0x40, 0);
    c.mmio_write(0xfed0_0100, 4, 4, 0, log);
    c.mmio_write(0xfed0_0010, 4, 3, 0, log);
    c.service(70_000, log);
    assert_eq!(log.vectors(), [0u8; 0]);
    c.mmio_write(0xfed0_0108, 8, 16_000_000, 70_000, log);
    c.service(PIT_HZ + 2, log);
    assert_eq!(log.vectors(), [0x40]);
}

#[test]
fn ports_by_width() {
    let (mut c, log) = (chipset(), &mut Log::default());
    assert!(
        Chipset::claims_port(0x43) && Chipset::claims_port(0x71) && Chipset::claims_port(0x4d1)
    );
    assert!(
        !Chipset::claims_port(0x60) && !Chipset::claims_port(0x44) && !Chipset::claims_port(0x40c)
    );
    c.io_write(0x4d0, 2, 0xffff, 0, log);
    assert_eq!(c.io_read(0x4d0, 2, 0, log), 0xdef8);
    let t = c.io_read(0x408, 4, PIT_HZ, log);
    assert!(t.abs_diff(3_579_545) <= 1);
    assert_eq!(c.io_read(0x409, 1, PIT_HZ, log), t >> 8 & 0xff);
    assert!(Chipset::claims_gpa(0xfec0_0040) && Chipset::claims_gpa(0xfed0_03ff));
    assert!(!Chipset::claims_gpa(0xfed0_0400) && !Chipset::claims_gpa(0xfebf_ffff));
}

#[test]
fn the_clock_from_outside() {
    let (mut c, log) = (chipset(), &mut Log::default());
    assert_eq!(c.rtc_settime(1_600_000_000, 0), Ok(()));
    assert_eq!(c.rtc_gettime(PIT_HZ * 3 + 9), 1_600_000_003);
    assert_eq!(c.rtc_read(0, PIT_HZ * 3 + 9), Ok(0x43));
    assert_eq!(c.rtc_read(-1, 0), Err(RtcError::Offset));
    assert_eq!(c.rtc_write(0x35, 7, 0), Ok(()));
    assert_eq!(c.rtc_write(-1, 7, 0), Err(RtcError::Offset));
    c.io_write(0x70, 2, 0x820b, 0, log);
    assert_eq!(c.rtc_gettime(0), -1, "one word: index, then data");
    assert_eq!(c.rtc_settime(5, 0), Err(RtcError::Busy));
}

#[test]
fn the_rtc_interrupts_by_irq_8() {
    let (mut c, log) = (chipset(), &mut Log::default());
    route(&mut c, log, 8, 0x48, 0);
    c.io_write(0x70, 1, 0xb, 0, log);
    c.io_write(0x71, 1, 0x12, 0, log);
    assert!(c.next_deadline().unwrap().abs_diff(PIT_HZ) <= 2);
    c.service(PIT_HZ + 2, log);
    assert_eq!(log.vectors(), [0x48]);
    c.service(PIT_HZ * 3, log);
    assert_eq!(log.vectors(), [0u8; 0], "until register C is read");
    c.io_write(0x70, 1, 0xc, PIT_HZ * 3, log);
    assert_eq!(c.io_read(0x71, 1, PIT_HZ * 3, log) & 0x90, 0x90);
    c.service(PIT_HZ * 4 + 2, log);
    assert_eq!(log.vectors(), [0x48]);
}
