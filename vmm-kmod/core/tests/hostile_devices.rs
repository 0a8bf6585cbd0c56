//! A guest may do anything to its devices at any time: they neither panic
//! nor ask for a timer that is already due once it has been served.
#![forbid(unsafe_code)]

use std::sync::atomic::AtomicU32;

use vmm_core::apicbus::{ApicMessage, IrqSink, deliver};
use vmm_core::chipset::Chipset;
use vmm_core::lapic::{Effect, Lapic, LapicConfig, Lvt, Mailbox};
use vmm_core::time::{Clock, Ratio};

/// xorshift64*: the runs repeat.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    /// Values at the edges more often than others.
    fn value(&mut self) -> u64 {
        match self.below(6) {
            0 => 0,
            1 => u64::MAX,
            2 => 1 << self.below(64),
            3 => self.below(256),
            4 => self.next() & 0xffff_ffff,
            _ => self.next(),
        }
    }
    fn step(&mut self) -> u64 {
        let bits = self.below(44);
        self.next() >> (63 - bits)
    }
}

struct Bus<'a> {
    boxes: &'a [Mailbox],
    turn: AtomicU32,
    delivered: u64,
}

impl IrqSink for Bus<'_> {
    fn message(&mut self, message: &ApicMessage) -> bool {
        self.delivered += 1;
        deliver(self.boxes, message, &self.turn, |_| ()) != 0
    }
    fn lint0(&mut self) {
        self.boxes[0].post_local(Lvt::Lint0);
    }
}

fn run(seed: u64, tsc_hz: u64) -> u64 {
    let clock = Clock::new(tsc_hz);
    let boxes: Vec<Mailbox> = (0..3).map(Mailbox::new).collect();
    let config = LapicConfig {
        to_apic: Ratio::new(24_000_000, tsc_hz),
        from_apic: Ratio::new(tsc_hz, 24_000_000),
        min_interval: tsc_hz / 50_000,
        phys_bits: 46,
        x2apic: true,
        bsp: true,
    };
    let mut lapics: Vec<Lapic<&Mailbox>> = boxes
        .iter()
        .map(|m| Lapic::new(Box::default(), m, config))
        .collect();
    let mut bus = Bus {
        boxes: &boxes,
        turn: AtomicU32::new(0),
        delivered: 0,
    };
    let mut r = Random(seed);
    let mut now = r.next() >> 20;
    let mut c = Chipset::new(&clock, now, 1_600_000_000);

    for _ in 0..60_000 {
        now += r.step();
        let ports = [
            0x20, 0x21, 0x40, 0x43, 0x61, 0x70, 0x71, 0xa0, 0xa1, 0x408, 0x4d0, 0x4d1,
        ];
        let port = ports[r.below(12) as usize] + r.below(2) as u16;
        let size = 1 << r.below(3);
        let gpa = match r.below(3) {
            0 => 0xfec0_0000 + r.below(5) * 0x10,
            1 => 0xfed0_0000 + r.below(0x400),
            _ => 0xfed0_0000 + r.below(0x80) * 8,
        };
        match r.below(12) {
            0 | 1 => drop(c.io_read(port, size, now, &mut bus)),
            2..=4 => c.io_write(port, size, r.value() as u32, now, &mut bus),
            5 => drop(c.mmio_read(gpa, 4 << r.below(2), now, &mut bus)),
            6..=8 => c.mmio_write(gpa, 4 << r.below(2), r.value(), now, &mut bus),
            9 => {
                let (irq, pin) = (r.below(20) as u8, Some(r.below(40) as u8));
                let _ = match r.below(3) {
                    0 => c.isa_assert(irq, pin, &mut bus),
                    1 => c.isa_deassert(irq, pin, &mut bus),
                    _ => c.isa_pulse(irq, pin, &mut bus),
                };
            }
            10 => c.eoi(r.value() as u8, &mut bus),
            _ if r.below(200) == 0 => c.reset(now, &mut bus),
            _ => drop(c.extint_acknowledge()),
        }
        c.service(now, &mut bus);
        if let Some(due) = c.next_deadline() {
            assert!(due > now, "due {due} at {now}");
        }

        let n = r.below(3) as usize;
        let l = &mut lapics[n];
        let offset = (r.below(0x44) * 16) as u16;
        let value = r.value();
        let effect = match r.below(8) {
            0 => l
                .set_apic_base(0xfee0_0000 | r.below(16) << 8)
                .unwrap_or(Effect::None),
            1..=3 => l.write(offset, value as u32, now),
            4 => l
                .wrmsr(0x800 + r.below(0x44) as u32, value, now)
                .unwrap_or(Effect::None),
            5 => {
                l.read(offset, now);
                let _ = l.rdmsr(0x800 + r.below(0x44) as u32, now);
                Effect::None
            }
            6 => l.set_tsc_deadline(value, value, now),
            _ => {
                l.set_cr8(value);
                l.take_nmi(value & 1 != 0);
                l.extint_done(false);
                Effect::None
            }
        };
        match effect {
            Effect::Ipi(message) => drop(bus.message(&message)),
            Effect::Eoi(vector) => c.eoi(vector, &mut bus),
            Effect::ExtintUnmasked => c.refresh_lint0(&mut bus),
            _ => {}
        }
        let l = &mut lapics[n];
        l.sync();
        l.timer_tick(now);
        if let Some(due) = l.timer_deadline() {
            assert!(due > now, "due {due} at {now}");
        }
        if let Some(vector) = l.pending() {
            assert!(vector >= 16 && u32::from(vector) >> 4 > l.ppr() >> 4);
            l.accept(vector);
            assert_ne!(l.pending(), Some(vector));
        }
        if l.take_init() {
            l.init();
        }
        l.take_sipi();
    }
    bus.delivered
}

#[test]
fn whatever_a_guest_does() {
    for (seed, hz) in [
        (1, 1_000_000),
        (2, 50_000_000),
        (3, 2_399_999_871),
        (4, 4_700_000_000),
    ] {
        assert!(run(seed, hz) > 0);
    }
}
