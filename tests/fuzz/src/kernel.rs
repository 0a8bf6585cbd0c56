//! The kernel piece: instructions of a guest, and the devices that the kernel
//! emulates.

use arbitrary::{Arbitrary, Unstructured};
use vmm_core::apicbus::{ApicMessage, IrqSink};
use vmm_core::chipset::Chipset;
use vmm_core::cpu::{Access, CpuState, EFER_LMA, EFER_LME, Gpr, Reg, Seg, SegDesc};
use vmm_core::inst::{Bus, BusError, CodeMode, decode, emulate};
use vmm_core::paging::{PageFault, WalkError};
use vmm_core::time::Clock;

const STEPS: usize = 256;
/// A page that faults.
const ABSENT: u64 = 0x9000;

#[derive(Arbitrary, Debug)]
struct Start {
    mode: u8,
    cpl3: bool,
    gprs: [u64; 16],
    rflags: u64,
    bases: [u32; 2],
    code: [u8; 15],
}

struct Cpu {
    gprs: [u64; 16],
    rip: u64,
    rflags: u64,
    cr0: u64,
    efer: u64,
    segs: [SegDesc; 8],
}

impl CpuState for Cpu {
    fn gpr(&self, r: Gpr) -> u64 {
        self.gprs[r as usize]
    }
    fn set_gpr(&mut self, r: Gpr, v: u64) {
        self.gprs[r as usize] = v;
    }
    fn reg(&self, r: Reg) -> u64 {
        match r {
            Reg::Rip => self.rip,
            Reg::Rflags => self.rflags,
            Reg::Cr0 => self.cr0,
            Reg::Efer => self.efer,
            _ => 0,
        }
    }
    fn set_reg(&mut self, r: Reg, v: u64) {
        match r {
            Reg::Rip => self.rip = v,
            Reg::Rflags => self.rflags = v,
            _ => {}
        }
    }
    fn seg(&self, s: Seg) -> SegDesc {
        self.segs[s as usize]
    }
    fn set_seg(&mut self, s: Seg, d: SegDesc) {
        self.segs[s as usize] = d;
    }
    fn selector(&self, _: Seg) -> u16 {
        0
    }
    fn set_selector(&mut self, _: Seg, _: u16) {}
    fn inst_len(&self) -> u8 {
        0
    }
    fn interrupt_shadow(&self) -> bool {
        false
    }
    fn set_interrupt_shadow(&mut self, _: bool) {}
    fn nmi_blocked(&self) -> bool {
        false
    }
}

/// A device everywhere but on [`ABSENT`]; counts what it is asked.
struct Device {
    accesses: u64,
}

impl Bus for Device {
    fn translate(&mut self, gla: u64, _: Access) -> Result<u64, WalkError> {
        if gla & !0xfff == ABSENT {
            return Err(WalkError::Fault(PageFault {
                error_code: 0,
                cr2: gla,
            }));
        }
        Ok(gla)
    }
    fn read(&mut self, gpa: u64, size: u8) -> Result<u64, BusError> {
        assert!(matches!(size, 1 | 2 | 4 | 8) && (gpa & 0xfff) + u64::from(size) <= 0x1000);
        self.accesses += 1;
        Ok(gpa.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }
    fn write(&mut self, gpa: u64, size: u8, _: u64) -> Result<(), BusError> {
        assert!(matches!(size, 1 | 2 | 4 | 8) && (gpa & 0xfff) + u64::from(size) <= 0x1000);
        self.accesses += 1;
        Ok(())
    }
}

/// Any 15 bytes in any state: decoded within their length, and executed within
/// the limit of one call.
pub fn instruction(data: &[u8]) {
    let Ok(start) = Start::arbitrary(&mut Unstructured::new(data)) else {
        return;
    };
    let mut segs = [SegDesc {
        base: 0,
        limit: !0,
        access: if start.cpl3 { 0xc0f3 } else { 0xc093 },
    }; 8];
    segs[Seg::Fs as usize].base = u64::from(start.bases[0]) << 16;
    segs[Seg::Gs as usize].base = start.bases[1].into();
    segs[Seg::Cs as usize].access = match start.mode % 3 {
        0 => 0x9b,
        1 => 0xc09b,
        _ => 0xa09b,
    } | if start.cpl3 { 0x60 } else { 0 };
    let mut cpu = Cpu {
        gprs: start.gprs,
        rip: 0x1000,
        rflags: start.rflags,
        cr0: if start.mode % 3 == 0 && start.mode & 0x80 != 0 {
            0x10
        } else {
            0x8000_0011
        },
        efer: if start.mode % 3 == 2 {
            EFER_LMA | EFER_LME
        } else {
            0
        },
        segs,
    };
    let Ok(inst) = decode(&start.code, CodeMode::of(&cpu)) else {
        return;
    };
    assert!((1..=15).contains(&inst.len));
    let mut bus = Device { accesses: 0 };
    let _ = emulate(&inst, &mut cpu, &mut bus, None);
    // Two a REP iteration, eight bytes of a page-crossing operand each.
    assert!(bus.accesses <= 16 * vmm_core::inst::REP_LIMIT);
}

#[derive(Arbitrary, Debug)]
enum ChipsetStep {
    In(u8, u8),
    Out(u8, u8, u32),
    Read(u16, bool),
    Write(u16, bool, u64),
    Raise(u8, u8),
    Lower(u8, u8),
    Pulse(u8, u8),
    Eoi(u8),
    Wait(u32),
    Acknowledge,
    Reset,
}

struct Sink;

impl IrqSink for Sink {
    fn message(&mut self, _: &ApicMessage) -> bool {
        true
    }
    fn lint0(&mut self) {}
}

/// 8259s, 8254, RTC, PM timer, I/O APIC, HPET: no panic, and no timer that is
/// due when it has just been served.
pub fn chipset(data: &[u8]) {
    const PORTS: [u16; 20] = [
        0x20, 0x21, 0x40, 0x41, 0x42, 0x43, 0x61, 0x70, 0x71, 0xa0, 0xa1, 0x408, 0x409, 0x40a,
        0x40b, 0x4d0, 0x4d1, 0x72, 0x73, 0x44,
    ];
    let port = |n: u8| PORTS[usize::from(n) % PORTS.len()];
    let size = |s: u8| 1_u8 << (s % 3);
    // The I/O APIC's window, then HPET's.
    let gpa = |n: u16| match n & 0x8000 {
        0 => 0xfec0_0000 + u64::from(n & 0xff),
        _ => 0xfed0_0000 + u64::from(n & 0x3ff),
    };
    let clock = Clock::new(2_399_999_871);
    let mut now = 1 << 40;
    let mut sink = Sink;
    let mut chipset = Chipset::new(&clock, now, 1_600_000_000);
    let mut input = Unstructured::new(data);
    for _ in 0..STEPS {
        if input.is_empty() {
            return;
        }
        let Ok(step) = ChipsetStep::arbitrary(&mut input) else {
            return;
        };
        now += 1000;
        match step {
            ChipsetStep::In(n, s) => drop(chipset.io_read(port(n), size(s), now, &mut sink)),
            ChipsetStep::Out(n, s, value) => {
                chipset.io_write(port(n), size(s), value, now, &mut sink);
            }
            ChipsetStep::Read(at, wide) => {
                let size = if wide { 8 } else { 4 };
                let _ = chipset.mmio_read(gpa(at), size, now, &mut sink);
            }
            ChipsetStep::Write(at, wide, value) => {
                let size = if wide { 8 } else { 4 };
                chipset.mmio_write(gpa(at), size, value, now, &mut sink);
            }
            ChipsetStep::Raise(irq, pin) => drop(chipset.isa_assert(irq, Some(pin), &mut sink)),
            ChipsetStep::Lower(irq, pin) => drop(chipset.isa_deassert(irq, Some(pin), &mut sink)),
            ChipsetStep::Pulse(irq, pin) => drop(chipset.isa_pulse(irq, Some(pin), &mut sink)),
            ChipsetStep::Eoi(vector) => chipset.eoi(vector, &mut sink),
            ChipsetStep::Wait(ticks) => now += u64::from(ticks) << 8,
            ChipsetStep::Acknowledge => drop(chipset.extint_acknowledge()),
            ChipsetStep::Reset => chipset.reset(now, &mut sink),
        }
        chipset.service(now, &mut sink);
        if let Some(due) = chipset.next_deadline() {
            assert!(due > now, "due {due} at {now}");
        }
    }
}
