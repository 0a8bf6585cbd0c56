//! The PC's pair of 8259A interrupt controllers, with the ELCR of EISA.

/// Command and data ports of the master.
pub const MASTER: u16 = 0x20;
/// Command and data ports of the slave.
pub const SLAVE: u16 = 0xa0;
/// Edge/level control registers, one of 8 bits for each controller.
pub const ELCR: u16 = 0x4d0;

const CASCADE: u8 = 2;
/// IRQs 0, 1, 2, 8 and 13 are edge-triggered for good.
const ELCR_WRITABLE: [u8; 2] = [0xf8, 0xde];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Init {
    Uninitialized,
    Icw2,
    Icw3,
    Icw4,
    Ready,
}

/// One 8259A.
#[derive(Clone, Copy, Debug)]
struct Pic {
    init: Init,
    /// ICW1: ICW4 will come; no ICW3 will come.
    want_icw4: bool,
    single: bool,
    base: u8,
    irr: u8,
    isr: u8,
    imr: u8,
    /// Lines that are up, and how many hold each up.
    lines: u8,
    asserted: [u32; 8],
    /// 1 = level-triggered.
    elcr: u8,
    lowest: u8,
    read_isr: bool,
    poll: bool,
    special_mask: bool,
    special_nested: bool,
    auto_eoi: bool,
    auto_rotate: bool,
}

impl Pic {
    const fn new() -> Self {
        Pic {
            init: Init::Uninitialized,
            want_icw4: false,
            single: false,
            base: 0,
            irr: 0,
            isr: 0,
            imr: 0,
            lines: 0,
            asserted: [0; 8],
            elcr: 0,
            lowest: 7,
            read_isr: false,
            poll: false,
            special_mask: false,
            special_nested: false,
            auto_eoi: false,
            auto_rotate: false,
        }
    }

    /// Distance of a bit from the highest priority, 0 to 7, of the first of
    /// `bits`; 8 if none is set.
    fn rank(&self, bits: u8) -> u32 {
        bits.rotate_right((u32::from(self.lowest) + 1) & 7)
            .trailing_zeros()
            .min(8)
    }

    fn pin_of(&self, rank: u32) -> u8 {
        ((u32::from(self.lowest) + 1 + rank) & 7) as u8
    }

    /// The request that the priority resolver lets through.
    fn highest(&self) -> Option<u8> {
        if self.init != Init::Ready {
            return None;
        }
        let requests = self.irr & !self.imr;
        if requests == 0 {
            return None;
        }
        let blocking = if self.special_mask {
            self.isr & !self.imr
        } else if self.special_nested {
            // A slave in service may interrupt again (8259A, "special fully
            // nested mode"): only what ranks above the cascade blocks it.
            self.isr & !(1 << CASCADE)
        } else {
            self.isr
        };
        let rank = self.rank(requests);
        (rank < self.rank(blocking)).then(|| self.pin_of(rank))
    }

    fn set_line(&mut self, pin: u8, up: bool) {
        let bit = 1u8 << (pin & 7);
        let rising = up && self.lines & bit == 0;
        if up {
            self.lines |= bit;
        } else {
            self.lines &= !bit;
        }
        if rising {
            self.irr |= bit;
        }
        self.follow_levels();
    }

    /// Level-triggered requests are what their lines say; edges stay latched.
    fn follow_levels(&mut self) {
        self.irr = (self.irr & !self.elcr) | (self.lines & self.elcr);
    }

    fn acknowledge(&mut self, pin: u8) {
        let bit = 1u8 << (pin & 7);
        if self.elcr & bit == 0 {
            self.irr &= !bit;
        }
        if self.auto_eoi {
            if self.auto_rotate {
                self.lowest = pin & 7;
            }
        } else {
            self.isr |= bit;
        }
    }

    fn icw1(&mut self, value: u8) {
        let (lines, asserted, elcr) = (self.lines, self.asserted, self.elcr);
        *self = Pic::new();
        self.init = Init::Icw2;
        self.want_icw4 = value & 1 != 0;
        self.single = value & 2 != 0;
        self.lines = lines;
        self.asserted = asserted;
        self.elcr = elcr;
        // The edge sense circuit is reset: only a new edge will be seen.
        self.follow_levels();
    }

    fn ocw2(&mut self, value: u8) {
        let specific = value & 7;
        match value >> 5 {
            0 => self.auto_rotate = false,
            4 => self.auto_rotate = true,
            6 => self.lowest = specific,
            command @ (1 | 5) => {
                let candidates = if self.special_mask {
                    self.isr & !self.imr
                } else {
                    self.isr
                };
                let rank = self.rank(candidates);
                if rank < 8 {
                    let pin = self.pin_of(rank);
                    self.isr &= !(1 << pin);
                    if command == 5 {
                        self.lowest = pin;
                    }
                }
            }
            command @ (3 | 7) => {
                self.isr &= !(1 << specific);
                if command == 7 {
                    self.lowest = specific;
                }
            }
            _ => {}
        }
    }

    fn ocw3(&mut self, value: u8) {
        if value & 0x40 != 0 {
            self.special_mask = value & 0x20 != 0;
        }
        if value & 4 != 0 {
            self.poll = true;
        } else if value & 2 != 0 {
            self.read_isr = value & 1 != 0;
        }
    }

    fn write(&mut self, data_port: bool, value: u8) {
        if !data_port {
            if value & 0x10 != 0 {
                self.icw1(value);
            } else if self.init == Init::Ready {
                if value & 8 != 0 {
                    self.ocw3(value);
                } else {
                    self.ocw2(value);
                }
            }
            return;
        }
        match self.init {
            Init::Icw2 => {
                self.base = value & 0xf8;
                self.init = match (self.single, self.want_icw4) {
                    (false, _) => Init::Icw3,
                    (true, true) => Init::Icw4,
                    (true, false) => Init::Ready,
                };
            }
            // The cascade is wired; what ICW3 says of it is not needed.
            Init::Icw3 => {
                self.init = if self.want_icw4 {
                    Init::Icw4
                } else {
                    Init::Ready
                }
            }
            Init::Icw4 => {
                self.auto_eoi = value & 2 != 0;
                self.special_nested = value & 0x10 != 0;
                self.init = Init::Ready;
            }
            Init::Uninitialized | Init::Ready => self.imr = value,
        }
    }
}

/// Both controllers. Methods that may change the INTR output return whether
/// it went up (or, after an acknowledge, is still up).
#[derive(Debug)]
pub struct AtPic {
    master: Pic,
    slave: Pic,
    intr: bool,
}

impl Default for AtPic {
    fn default() -> Self {
        Self::new()
    }
}

impl AtPic {
    /// Not initialised: deaf until the guest has written the ICWs.
    pub const fn new() -> Self {
        AtPic {
            master: Pic::new(),
            slave: Pic::new(),
            intr: false,
        }
    }

    /// RESET; the lines stay as they are.
    pub fn reset(&mut self) {
        for pic in [&mut self.master, &mut self.slave] {
            let (lines, asserted) = (pic.lines, pic.asserted);
            *pic = Pic::new();
            pic.lines = lines;
            pic.asserted = asserted;
        }
        self.intr = false;
    }

    /// Whether a port is one of ours.
    pub const fn claims(port: u16) -> bool {
        matches!(port, 0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1)
    }

    /// The INTR output, after working out the cascade. True on its rise.
    fn resolve(&mut self) -> bool {
        self.cascade();
        let intr = self.master.highest().is_some();
        let rose = intr && !self.intr;
        self.intr = intr;
        rose
    }

    fn cascade(&mut self) {
        // The slave's INT is a level on the master's IR2.
        if self.slave.highest().is_some() {
            self.master.irr |= 1 << CASCADE;
        } else {
            self.master.irr &= !(1 << CASCADE);
        }
    }

    /// The INTR output.
    #[inline]
    pub fn intr(&self) -> bool {
        self.intr
    }

    fn pic(&mut self, irq: u8) -> Option<(&mut Pic, u8)> {
        match irq {
            CASCADE => None,
            0..=7 => Some((&mut self.master, irq)),
            8..=15 => Some((&mut self.slave, irq - 8)),
            _ => None,
        }
    }

    /// One driver of an IRQ line pulls it up. True if INTR went up.
    pub fn assert(&mut self, irq: u8) -> bool {
        if let Some((pic, pin)) = self.pic(irq)
            && let Some(count) = pic.asserted.get_mut(usize::from(pin))
        {
            *count = count.saturating_add(1);
            pic.set_line(pin, true);
        }
        self.resolve()
    }

    /// One driver of an IRQ line lets go.
    pub fn deassert(&mut self, irq: u8) -> bool {
        if let Some((pic, pin)) = self.pic(irq)
            && let Some(count) = pic.asserted.get_mut(usize::from(pin))
        {
            *count = count.saturating_sub(1);
            if *count == 0 {
                pic.set_line(pin, false);
            }
        }
        self.resolve()
    }

    /// Up and down again. A latched edge outlives it.
    pub fn pulse(&mut self, irq: u8) -> bool {
        let up = self.assert(irq);
        self.deassert(irq) || up
    }

    /// Sets the trigger mode of an IRQ (`VM_ISA_SET_IRQ_TRIGGER`). False for
    /// those that are edge-triggered for good, and for no IRQ at all.
    pub fn set_trigger(&mut self, irq: u8, level: bool) -> bool {
        if irq > 15 {
            return false;
        }
        let index = usize::from(irq >> 3);
        let bit = 1u8 << (irq & 7);
        if level && ELCR_WRITABLE.get(index).is_none_or(|w| w & bit == 0) {
            return false;
        }
        let pic = if index == 0 {
            &mut self.master
        } else {
            &mut self.slave
        };
        pic.elcr = if level {
            pic.elcr | bit
        } else {
            pic.elcr & !bit
        };
        pic.follow_levels();
        true
    }

    /// Whether an edge on this IRQ would be heard now.
    pub fn masked(&self, irq: u8) -> bool {
        let pic = if irq < 8 { &self.master } else { &self.slave };
        pic.init != Init::Ready || pic.imr & (1 << (irq & 7)) != 0
    }

    /// Interrupt acknowledge: the vector; a spurious IRQ 7 if the request has
    /// gone away. Afterwards `intr` says whether there is more.
    pub fn acknowledge(&mut self) -> u8 {
        let vector = match self.master.highest() {
            Some(CASCADE) => {
                self.master.acknowledge(CASCADE);
                match self.slave.highest() {
                    Some(pin) => {
                        self.slave.acknowledge(pin);
                        self.slave.base | pin
                    }
                    None => self.slave.base | 7,
                }
            }
            Some(pin) => {
                self.master.acknowledge(pin);
                self.master.base | pin
            }
            None => self.master.base | 7,
        };
        self.resolve();
        vector
    }

    /// A byte read from a port. A poll is an acknowledge.
    pub fn read(&mut self, port: u16) -> u8 {
        if port & !1 == ELCR {
            return if port & 1 == 0 {
                self.master.elcr
            } else {
                self.slave.elcr
            };
        }
        let pic = if port & !1 == SLAVE {
            &mut self.slave
        } else {
            &mut self.master
        };
        if pic.poll {
            pic.poll = false;
            let value = match pic.highest() {
                Some(pin) => {
                    pic.acknowledge(pin);
                    0x80 | pin
                }
                None => 0,
            };
            self.resolve();
            return value;
        }
        match (port & 1 != 0, pic.read_isr) {
            (true, _) => pic.imr,
            (false, true) => pic.isr,
            (false, false) => pic.irr,
        }
    }

    /// A byte written to a port. True if INTR went up.
    pub fn write(&mut self, port: u16, value: u8) -> bool {
        match port & !1 {
            ELCR => {
                let (pic, writable) = match (port & 1, ELCR_WRITABLE) {
                    (0, [w, _]) => (&mut self.master, w),
                    (_, [_, w]) => (&mut self.slave, w),
                };
                pic.elcr = value & writable;
                pic.follow_levels();
            }
            SLAVE => self.slave.write(port & 1 != 0, value),
            _ => self.master.write(port & 1 != 0, value),
        }
        self.resolve()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    fn ready() -> AtPic {
        let mut p = AtPic::new();
        for (port, value) in [
            (0x20, 0x11),
            (0x21, 0x30),
            (0x21, 4),
            (0x21, 1),
            (0xa0, 0x11),
            (0xa1, 0x38),
            (0xa1, 2),
            (0xa1, 1),
        ] {
            assert!(!p.write(port, value));
        }
        p
    }

    #[test]
    fn deaf_until_initialised() {
        let mut p = AtPic::new();
        assert!(!p.pulse(0));
        assert!(!p.intr());
        let mut p = ready();
        assert!(p.pulse(0));
        assert_eq!(p.acknowledge(), 0x30);
    }

    #[test]
    fn nested_by_priority_until_eoi() {
        let mut p = ready();
        assert!(p.pulse(4));
        assert_eq!(p.acknowledge(), 0x34);
        assert!(!p.pulse(5), "lower than what is served");
        assert!(p.pulse(1), "higher");
        assert_eq!(p.acknowledge(), 0x31);
        p.write(0x20, 0x0b);
        assert_eq!(p.read(0x20), 0x12);
        assert!(!p.write(0x20, 0x20));
        assert!(p.write(0x20, 0x20), "5 is heard now");
        assert_eq!(p.acknowledge(), 0x35);
        p.write(0x20, 0x65);
        assert_eq!(p.read(0x20), 0);
    }

    #[test]
    fn the_slave_comes_through_ir2() {
        let mut p = ready();
        assert!(p.pulse(12));
        p.write(0x20, 0x0a);
        assert_eq!(p.read(0x20), 4);
        assert_eq!(p.acknowledge(), 0x3c);
        assert!(!p.intr());
        assert!(!p.pulse(8), "needs the master's EOI as well");
        assert!(!p.write(0xa0, 0x20));
        assert!(p.write(0x20, 0x20));
        assert_eq!(p.acknowledge(), 0x38);
        // Masking the cascade silences the slave.
        p.write(0xa0, 0x20);
        p.write(0x20, 0x20);
        p.write(0x21, 4);
        assert!(!p.pulse(9));
        assert!(p.write(0x21, 0));
    }

    #[test]
    fn levels_last_and_edges_are_latched() {
        let mut p = ready();
        p.write(0x4d0, 0xff);
        p.write(0x4d1, 0xff);
        assert_eq!((p.read(0x4d0), p.read(0x4d1)), (0xf8, 0xde));
        assert!(p.assert(5));
        assert_eq!(p.acknowledge(), 0x35);
        assert!(p.write(0x20, 0x20), "still up");
        assert_eq!(p.acknowledge(), 0x35);
        p.deassert(5);
        assert!(!p.write(0x20, 0x20));
        // A level that goes away before its acknowledge is spurious.
        assert!(p.assert(6));
        p.deassert(6);
        assert_eq!(p.acknowledge(), 0x37);
        p.write(0x20, 0x0b);
        assert_eq!(p.read(0x20), 0, "and not in service");
        assert!(!p.set_trigger(8, true) && !p.set_trigger(16, false));
        assert!(p.set_trigger(5, false));
        assert_eq!(p.read(0x4d0), 0xd8);
    }

    #[test]
    fn masked_requests_wait() {
        let mut p = ready();
        p.write(0x21, 0xff);
        assert!(!p.pulse(3));
        assert!(p.masked(3));
        assert!(p.write(0x21, 0xf7));
        assert_eq!(p.acknowledge(), 0x33);
    }

    #[test]
    fn rotation_special_mask_and_auto_eoi() {
        let mut p = ready();
        p.write(0x20, 0xc4); // 4 is lowest: order 5 6 7 0 1 2 3 4
        p.pulse(0);
        p.pulse(5);
        assert_eq!(p.acknowledge(), 0x35);
        p.write(0x20, 0xa0); // Rotate on EOI: 5 is lowest.
        assert_eq!(p.acknowledge(), 0x30);
        p.write(0x20, 0x20);
        let order: Vec<u8> = {
            for irq in [0, 1, 3, 4, 5, 6, 7] {
                p.pulse(irq);
            }
            (0..7)
                .map(|_| {
                    let v = p.acknowledge();
                    p.write(0x20, 0x20);
                    v & 7
                })
                .collect()
        };
        assert_eq!(order, [6, 7, 0, 1, 3, 4, 5]);

        let mut p = ready();
        p.pulse(1);
        p.acknowledge();
        p.write(0x20, 0x68);
        assert!(!p.pulse(4));
        assert!(p.write(0x21, 2), "special mask lets lower levels through");
        assert_eq!(p.acknowledge(), 0x34);

        let mut p = ready();
        for (port, v) in [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 3)] {
            p.write(port, v);
        }
        p.pulse(3);
        p.acknowledge();
        assert!(p.pulse(3));
        p.write(0x20, 0x0b);
        assert_eq!(p.read(0x20), 0);
    }

    #[test]
    fn poll_acknowledges() {
        let mut p = ready();
        p.pulse(10);
        p.write(0xa0, 0x0c);
        assert_eq!(p.read(0xa0), 0x82);
        p.write(0xa0, 0x0b);
        assert_eq!(p.read(0xa0), 4);
        p.write(0xa0, 0x0c);
        assert_eq!(p.read(0xa0), 0);
    }

    #[test]
    fn a_shared_line_is_up_until_all_let_go() {
        let mut p = ready();
        p.write(0x4d1, 4);
        p.assert(10);
        p.assert(10);
        assert_eq!(p.acknowledge(), 0x3a);
        p.deassert(10);
        p.write(0xa0, 0x20);
        assert!(p.write(0x20, 0x20));
        p.deassert(10);
        assert!(!p.intr());
    }
}
