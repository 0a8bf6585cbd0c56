//! The local APIC in both modes (SDM Vol. 3A §11).

use crate::cpu::{self, cpuid, rdmsr};
use crate::memory::{mmio_read, mmio_write};

/// Where the xAPIC's page is.
pub const BASE: u64 = 0xfee0_0000;
/// IA32_APIC_BASE.
pub const APIC_BASE: u32 = 0x1b;
/// IA32_TSC_DEADLINE.
pub const TSC_DEADLINE: u32 = 0x6e0;
const X2APIC_MSR: u32 = 0x800;
const X2APIC_ENABLE: u64 = 1 << 10;

/// Registers by their xAPIC offset (SDM Vol. 3A Table 11-1).
#[allow(missing_docs)]
pub mod register {
    pub const ID: u32 = 0x20;
    pub const VERSION: u32 = 0x30;
    pub const TPR: u32 = 0x80;
    pub const PPR: u32 = 0xa0;
    pub const EOI: u32 = 0xb0;
    pub const LDR: u32 = 0xd0;
    pub const SVR: u32 = 0xf0;
    pub const ISR: u32 = 0x100;
    pub const IRR: u32 = 0x200;
    pub const ESR: u32 = 0x280;
    pub const ICR: u32 = 0x300;
    pub const ICR_HIGH: u32 = 0x310;
    pub const LVT_TIMER: u32 = 0x320;
    pub const LVT_LINT0: u32 = 0x350;
    pub const LVT_ERROR: u32 = 0x370;
    pub const INITIAL_COUNT: u32 = 0x380;
    pub const CURRENT_COUNT: u32 = 0x390;
    pub const DIVIDE: u32 = 0x3e0;
    /// Self IPI, in x2APIC mode only.
    pub const SELF_IPI: u32 = 0x3f0;
}

/// LVT bit: masked.
pub const MASKED: u32 = 1 << 16;
/// Timer mode: periodic.
pub const PERIODIC: u32 = 1 << 17;
/// Timer mode: TSC deadline.
pub const DEADLINE: u32 = 2 << 17;

/// Whether the APIC is in x2APIC mode.
#[inline(always)]
pub fn is_x2apic() -> bool {
    rdmsr(APIC_BASE) & X2APIC_ENABLE != 0
}

/// Whether CPUID offers x2APIC mode.
pub fn has_x2apic() -> bool {
    cpuid(1, 0).ecx & 1 << 21 != 0
}

/// Whether CPUID offers the TSC-deadline timer.
pub fn has_deadline() -> bool {
    cpuid(1, 0).ecx & 1 << 24 != 0
}

/// Switches to x2APIC mode.
pub fn enter_x2apic() {
    // SAFETY: keeps the base address and the enable bit.
    unsafe { cpu::wrmsr(APIC_BASE, rdmsr(APIC_BASE) | X2APIC_ENABLE) }
}

/// One local APIC as seen in the mode it is in.
#[derive(Debug, Clone, Copy)]
pub struct Apic {
    x2: bool,
}

impl Apic {
    /// The APIC of the running CPU.
    pub fn current() -> Self {
        Self { x2: is_x2apic() }
    }

    /// Whether it is in x2APIC mode.
    pub fn x2(self) -> bool {
        self.x2
    }

    /// Reads a register.
    #[inline(always)]
    pub fn read(self, register: u32) -> u32 {
        if self.x2 {
            rdmsr(X2APIC_MSR + (register >> 4)) as u32
        } else {
            mmio_read(BASE + u64::from(register))
        }
    }

    /// Writes a register.
    #[inline(always)]
    pub fn write(self, register: u32, value: u32) {
        if self.x2 {
            // SAFETY: APIC registers do not touch memory.
            unsafe { cpu::wrmsr(X2APIC_MSR + (register >> 4), u64::from(value)) }
        } else {
            mmio_write(BASE + u64::from(register), value);
        }
    }

    /// The APIC's ID.
    pub fn id(self) -> u32 {
        let id = self.read(register::ID);
        if self.x2 { id } else { id >> 24 }
    }

    /// Enables the APIC with 0xff as its spurious vector.
    pub fn enable(self) {
        self.write(register::TPR, 0);
        self.write(register::SVR, 0x1ff);
    }

    /// Ends the interrupt in service.
    pub fn eoi(self) {
        self.write(register::EOI, 0);
    }

    /// Sends an IPI and waits until it has left.
    pub fn ipi(self, destination: u32, command: u32) {
        if self.x2 {
            let value = u64::from(destination) << 32 | u64::from(command);
            // SAFETY: an IPI goes to a CPU that waits for it.
            unsafe { cpu::wrmsr(X2APIC_MSR + (register::ICR >> 4), value) }
            return;
        }
        self.write(register::ICR_HIGH, destination << 24);
        self.write(register::ICR, command);
        for _ in 0..100_000 {
            if self.read(register::ICR) & 1 << 12 == 0 {
                break;
            }
            cpu::pause();
        }
    }

    /// Whether `vector` is set in the 256 bits from `base` (IRR, ISR).
    pub fn bit(self, base: u32, vector: u8) -> bool {
        let word = self.read(base + u32::from(vector / 32) * 16);
        word >> (vector % 32) & 1 != 0
    }
}
