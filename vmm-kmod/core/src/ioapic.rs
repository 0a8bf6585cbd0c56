//! I/O APIC (82093AA, and the EOI register of its successors).

use crate::apicbus::{ApicMessage, DeliveryMode, Destination, IrqSink};

/// Guest-physical address of the registers.
pub const BASE: u64 = 0xfec0_0000;
/// Input pins: 16 ISA, 16 PCI.
pub const PINS: usize = 32;

const VERSION: u32 = 0x20;

const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
const DIRECTED_EOI: u64 = 0x40;

const DELIVERY_STATUS: u32 = 1 << 12;
const REMOTE_IRR: u32 = 1 << 14;
const LEVEL: u32 = 1 << 15;
const MASKED: u32 = 1 << 16;
const READ_ONLY: u32 = DELIVERY_STATUS | REMOTE_IRR;
/// Bits of the low half that exist.
const LOW_BITS: u32 = 0x1_ffff;

/// A redirection-table entry (82093AA §3.2.4) and what drives its pin.
#[derive(Clone, Copy, Debug)]
struct Pin {
    low: u32,
    high: u32,
    /// How many of those that share the line hold it up.
    asserted: u32,
}

/// The I/O APIC.
#[derive(Debug)]
pub struct IoApic {
    id: u32,
    select: u32,
    pins: [Pin; PINS],
}

impl Default for IoApic {
    fn default() -> Self {
        Self::new()
    }
}

impl IoApic {
    /// All pins masked.
    pub const fn new() -> Self {
        IoApic {
            id: 0,
            select: 0,
            pins: [Pin {
                low: MASKED,
                high: 0,
                asserted: 0,
            }; PINS],
        }
    }

    /// RESET. The lines are outside and stay as they are.
    pub fn reset(&mut self) {
        self.id = 0;
        self.select = 0;
        for pin in &mut self.pins {
            pin.low = MASKED;
            pin.high = 0;
        }
    }

    /// Number of pins (`VM_IOAPIC_PINCOUNT`).
    pub const fn pin_count(&self) -> usize {
        PINS
    }

    /// A read of `size` bytes at an offset from `BASE`. Registers are 32 bits
    /// wide; anything else reads 0.
    pub fn read(&self, offset: u64, size: u8) -> u64 {
        if size != 4 {
            return 0;
        }
        match offset {
            SELECT => u64::from(self.select),
            WINDOW => u64::from(self.register()),
            _ => 0,
        }
    }

    fn register(&self) -> u32 {
        match self.select {
            0 | 2 => self.id,
            1 => VERSION | (PINS as u32 - 1) << 16,
            n => match self.entry(n) {
                Some((index, high)) => self
                    .pins
                    .get(index)
                    .map_or(0, |pin| if high { pin.high } else { pin.low }),
                None => 0,
            },
        }
    }

    /// Pin and half of a redirection-table register.
    fn entry(&self, register: u32) -> Option<(usize, bool)> {
        let n = register.checked_sub(0x10)?;
        let index = usize::try_from(n / 2).ok()?;
        (index < PINS).then_some((index, n & 1 != 0))
    }

    /// A write of `size` bytes at an offset from `BASE`.
    pub fn write<S: IrqSink>(&mut self, offset: u64, size: u8, value: u64, sink: &mut S) {
        if size != 4 {
            return;
        }
        let value = value as u32;
        match offset {
            SELECT => self.select = value & 0xff,
            WINDOW => self.write_register(value, sink),
            DIRECTED_EOI => self.eoi(value as u8, sink),
            _ => {}
        }
    }

    fn write_register<S: IrqSink>(&mut self, value: u32, sink: &mut S) {
        if self.select == 0 {
            self.id = value & 0x0f00_0000;
            return;
        }
        let Some((index, high)) = self.entry(self.select) else {
            return;
        };
        let Some(pin) = self.pins.get_mut(index) else {
            return;
        };
        if high {
            pin.high = value & 0xff00_0000;
        } else {
            pin.low = (value & LOW_BITS & !READ_ONLY) | (pin.low & REMOTE_IRR);
            if pin.low & LEVEL == 0 {
                // An edge-triggered pin has no interrupt under way: guests
                // switch to edge and back to clear a stuck one.
                pin.low &= !REMOTE_IRR;
            }
        }
        pin.level(sink);
    }

    /// The line of a pin goes up, as far as one of its drivers is concerned.
    /// False if there is no such pin.
    pub fn assert<S: IrqSink>(&mut self, index: usize, sink: &mut S) -> bool {
        let Some(pin) = self.pins.get_mut(index) else {
            return false;
        };
        pin.asserted = pin.asserted.saturating_add(1);
        if pin.asserted == 1 {
            pin.rise(sink);
        }
        true
    }

    /// One of the drivers of a pin lets go.
    pub fn deassert(&mut self, index: usize) -> bool {
        let Some(pin) = self.pins.get_mut(index) else {
            return false;
        };
        pin.asserted = pin.asserted.saturating_sub(1);
        true
    }

    /// Up and down again: an edge.
    pub fn pulse<S: IrqSink>(&mut self, index: usize, sink: &mut S) -> bool {
        self.assert(index, sink) && self.deassert(index)
    }

    /// The end of an interrupt, from a local APIC's broadcast or the EOI
    /// register: pins with this vector whose line is still up ask again.
    pub fn eoi<S: IrqSink>(&mut self, vector: u8, sink: &mut S) {
        for pin in &mut self.pins {
            if pin.low & REMOTE_IRR != 0 && pin.low as u8 == vector {
                pin.low &= !REMOTE_IRR;
                pin.level(sink);
            }
        }
    }

    /// Whether an edge on this pin would go anywhere.
    pub fn masked(&self, index: usize) -> bool {
        self.pins.get(index).is_none_or(|pin| pin.low & MASKED != 0)
    }
}

impl Pin {
    fn rise<S: IrqSink>(&mut self, sink: &mut S) {
        if self.low & LEVEL != 0 {
            self.level(sink);
        } else if self.low & MASKED == 0 {
            self.send(sink);
        }
    }

    /// Sends if the pin is level-triggered and its level asks for it.
    fn level<S: IrqSink>(&mut self, sink: &mut S) {
        if self.low & (LEVEL | MASKED | REMOTE_IRR) == LEVEL
            && self.asserted != 0
            && self.send(sink)
        {
            // Set when a local APIC accepts (82093AA §3.2.4, bit 14).
            self.low |= REMOTE_IRR;
        }
    }

    /// Returns whether an end of interrupt will come back.
    fn send<S: IrqSink>(&self, sink: &mut S) -> bool {
        let Some(mode) = DeliveryMode::from_field(self.low >> 8) else {
            return false;
        };
        if mode == DeliveryMode::StartUp {
            return false;
        }
        let fixed = matches!(mode, DeliveryMode::Fixed | DeliveryMode::LowestPriority);
        let taken = sink.message(&ApicMessage {
            dest: Destination::from_field(self.high >> 24, self.low & (1 << 11) != 0, false),
            mode,
            vector: self.low as u8,
            level: fixed && self.low & LEVEL != 0,
        });
        taken && fixed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    #[derive(Default)]
    struct Log {
        sent: Vec<ApicMessage>,
        nobody: bool,
    }

    impl IrqSink for Log {
        fn message(&mut self, message: &ApicMessage) -> bool {
            self.sent.push(*message);
            !self.nobody
        }
        fn lint0(&mut self) {}
    }

    impl Log {
        fn vectors(&mut self) -> Vec<u8> {
            self.sent.drain(..).map(|m| m.vector).collect()
        }
    }

    fn get(io: &mut IoApic, reg: u32) -> u32 {
        io.write(0, 4, u64::from(reg), &mut Log::default());
        io.read(0x10, 4) as u32
    }

    fn set(io: &mut IoApic, reg: u32, value: u32, log: &mut Log) {
        io.write(0, 4, u64::from(reg), log);
        io.write(0x10, 4, u64::from(value), log);
    }

    const RTE14: u32 = 0x10 + 14 * 2;

    #[test]
    fn identification_registers() {
        let mut io = IoApic::new();
        let log = &mut Log::default();
        let version = get(&mut io, 1);
        assert_eq!(version, 0x001f_0020);
        set(&mut io, 1, !version, log);
        assert_eq!(get(&mut io, 1), version);
        set(&mut io, 0, u32::MAX, log);
        assert_eq!(get(&mut io, 0), 0x0f00_0000);
        assert_eq!(get(&mut io, 2), 0x0f00_0000);
        set(&mut io, 2, 0, log);
        assert_eq!(get(&mut io, 2), 0x0f00_0000);
        assert_eq!(get(&mut io, 0x10 + 2 * 32), 0);
        assert_eq!(io.read(0x10, 1), 0);
        assert_eq!(get(&mut io, RTE14), 0x1_0000);
    }

    #[test]
    fn edges_are_sent_once_and_lost_while_masked() {
        let mut io = IoApic::new();
        let log = &mut Log::default();
        set(&mut io, RTE14 + 1, 0x0300_0000, log);
        set(&mut io, RTE14, 0x0876, log);
        io.assert(14, log);
        assert_eq!(
            log.sent,
            [ApicMessage {
                dest: Destination::Logical(3),
                mode: DeliveryMode::Fixed,
                vector: 0x76,
                level: false
            }]
        );
        io.assert(14, log);
        io.deassert(14);
        io.deassert(14);
        assert_eq!(log.vectors(), [0x76]);
        set(&mut io, RTE14, 0x1_0076, log);
        io.pulse(14, log);
        set(&mut io, RTE14, 0x76, log);
        assert_eq!(log.vectors(), [0u8; 0]);
        io.pulse(14, log);
        assert_eq!(log.vectors(), [0x76]);
        assert!(!io.pulse(32, log) && !io.deassert(99));
    }

    #[test]
    fn a_level_is_sent_again_after_its_eoi_while_it_lasts() {
        let mut io = IoApic::new();
        let log = &mut Log::default();
        set(&mut io, RTE14, 0x8098, log);
        io.assert(14, log);
        assert_eq!(get(&mut io, RTE14), 0xc098);
        assert!(log.sent[0].level);
        // Down and up while the interrupt is in service: one interrupt.
        io.deassert(14);
        io.assert(14, log);
        assert_eq!(log.vectors(), [0x98]);
        io.eoi(0x97, log);
        assert_eq!(log.vectors(), [0u8; 0]);
        io.eoi(0x98, log);
        assert_eq!(log.vectors(), [0x98]);
        io.deassert(14);
        io.write(0x40, 4, 0x98, log);
        assert_eq!(get(&mut io, RTE14), 0x8098);
        assert_eq!(log.vectors(), [0u8; 0]);
    }

    #[test]
    fn a_shared_level_lasts_until_the_last_driver_lets_go() {
        let mut io = IoApic::new();
        let log = &mut Log::default();
        set(&mut io, RTE14, 0x8050, log);
        io.assert(14, log);
        io.assert(14, log);
        io.deassert(14);
        io.eoi(0x50, log);
        assert_eq!(log.vectors(), [0x50, 0x50]);
        io.deassert(14);
        io.deassert(14);
        io.eoi(0x50, log);
        assert_eq!(log.vectors(), [0u8; 0]);
    }

    #[test]
    fn unmasking_looks_at_the_level() {
        let mut io = IoApic::new();
        let log = &mut Log::default();
        set(&mut io, RTE14, 0x1_8082, log);
        io.assert(14, log);
        assert_eq!(log.vectors(), [0u8; 0]);
        set(&mut io, RTE14, 0x8082, log);
        assert_eq!(log.vectors(), [0x82]);
        // Masked in service: the EOI counts, unmasking sends again.
        set(&mut io, RTE14, 0x1_8082, log);
        io.eoi(0x82, log);
        assert_eq!(log.vectors(), [0u8; 0]);
        set(&mut io, RTE14, 0x8082, log);
        assert_eq!(log.vectors(), [0x82]);
        // To edge and back clears remote IRR.
        set(&mut io, RTE14, 0x1_0082, log);
        set(&mut io, RTE14, 0x1_8082, log);
        assert_eq!(get(&mut io, RTE14), 0x1_8082);
    }

    #[test]
    fn nobody_there_leaves_no_remote_irr() {
        let mut io = IoApic::new();
        let log = &mut Log {
            nobody: true,
            ..Log::default()
        };
        set(&mut io, RTE14, 0x8082, log);
        io.assert(14, log);
        assert_eq!(get(&mut io, RTE14), 0x8082);
        log.nobody = false;
        set(&mut io, RTE14 + 1, 0x0100_0000, log);
        assert_eq!(get(&mut io, RTE14), 0xc082);
        io.reset();
        assert_eq!(get(&mut io, RTE14), 0x1_0000);
    }

    #[test]
    fn other_delivery_modes() {
        let mut io = IoApic::new();
        let log = &mut Log::default();
        for (field, mode) in [
            (4, Some(DeliveryMode::Nmi)),
            (7, Some(DeliveryMode::ExtInt)),
            (3, None),
            (6, None),
        ] {
            set(&mut io, RTE14, 0x8000 | field << 8, log);
            io.pulse(14, log);
            assert_eq!(log.sent.pop().map(|m| m.mode), mode);
            assert_eq!(get(&mut io, RTE14) & 0x4000, 0);
        }
    }
}
