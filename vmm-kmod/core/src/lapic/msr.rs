//! The x2APIC's registers as MSRs, and IA32_APIC_BASE.

use core::ops::Deref;

use super::registers::lvt_writable;
use super::{Effect, Lapic, Lvt, Mailbox, reg};

/// First MSR of the x2APIC range.
pub const MSR_X2APIC_FIRST: u32 = 0x800;
/// Last MSR of the x2APIC range.
pub const MSR_X2APIC_LAST: u32 = 0x8ff;

/// IA32_APIC_BASE: bootstrap processor.
pub const APIC_BASE_BSP: u64 = 1 << 8;
/// IA32_APIC_BASE: x2APIC mode.
pub const APIC_BASE_X2APIC: u64 = 1 << 10;
/// IA32_APIC_BASE: APIC enabled.
pub const APIC_BASE_ENABLE: u64 = 1 << 11;

/// The access is a #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gp0;

fn offset_of(msr: u32) -> Result<u16, Gp0> {
    match msr {
        MSR_X2APIC_FIRST..=0x83f => u16::try_from((msr - MSR_X2APIC_FIRST) << 4).map_err(|_| Gp0),
        _ => Err(Gp0),
    }
}

impl<M: Deref<Target = Mailbox>> Lapic<M> {
    /// RDMSR of 0x800 to 0x8ff (SDM Vol. 3A §10.12.1.2, table 10-6).
    pub fn rdmsr(&mut self, msr: u32, now: u64) -> Result<u64, Gp0> {
        if !self.x2apic() {
            return Err(Gp0);
        }
        let offset = offset_of(msr)?;
        match offset {
            reg::ICR_LOW => Ok(u64::from(self.page.get(reg::ICR_LOW))
                | u64::from(self.page.get(reg::ICR_HIGH)) << 32),
            reg::ID
            | reg::VERSION
            | reg::TPR
            | reg::PPR
            | reg::LDR
            | reg::SVR
            | 0x100..=0x270
            | reg::ESR
            | reg::LVT_CMCI
            | reg::LVT_TIMER..=reg::LVT_ERROR
            | reg::TIMER_ICR
            | reg::TIMER_CCR
            | reg::TIMER_DCR => Ok(u64::from(self.read_register(offset, now))),
            _ => Err(Gp0),
        }
    }

    /// WRMSR of 0x800 to 0x8ff. Reserved bits, read-only and absent registers
    /// are #GP (SDM Vol. 3A §10.12.1.3).
    pub fn wrmsr(&mut self, msr: u32, value: u64, now: u64) -> Result<Effect, Gp0> {
        if !self.x2apic() {
            return Err(Gp0);
        }
        let offset = offset_of(msr)?;
        if offset == reg::ICR_LOW {
            // Bit 12, the old delivery status, is let pass as CPUs do.
            if value & 0xfff3_2000 != 0 {
                return Err(Gp0);
            }
            self.page.set(reg::ICR_HIGH, (value >> 32) as u32);
            return Ok(self.write_icr(value as u32));
        }
        let value = u32::try_from(value).map_err(|_| Gp0)?;
        let allowed = match offset {
            reg::TPR | reg::SELF_IPI => 0xff,
            reg::EOI | reg::ESR => 0,
            reg::SVR => 0x3ff,
            reg::TIMER_ICR => u32::MAX,
            reg::TIMER_DCR => 0xb,
            reg::LVT_CMCI => lvt_msr_bits(Lvt::Cmci),
            reg::LVT_TIMER..=reg::LVT_ERROR => {
                lvt_msr_bits(Lvt::from_index(u32::from(offset - reg::LVT_TIMER) >> 4).ok_or(Gp0)?)
            }
            _ => return Err(Gp0),
        };
        if value & !allowed != 0 {
            return Err(Gp0);
        }
        Ok(self.write_register(offset, value, now))
    }

    /// IA32_APIC_BASE.
    pub fn apic_base(&self) -> u64 {
        self.base
    }

    /// Guest-physical address of the register page.
    pub fn base_gpa(&self) -> u64 {
        self.base & !0xfff
    }

    /// Whether the APIC is there at all (CPUID.1:EDX\[9\]).
    #[inline]
    pub fn present(&self) -> bool {
        self.base & APIC_BASE_ENABLE != 0
    }

    /// Whether it is in x2APIC mode.
    #[inline]
    pub fn x2apic(&self) -> bool {
        self.base & APIC_BASE_X2APIC != 0
    }

    /// Whether the register page answers to memory accesses.
    #[inline]
    pub fn mmio(&self) -> bool {
        self.present() && !self.x2apic()
    }

    /// WRMSR of IA32_APIC_BASE (SDM Vol. 3A §10.12.5, fig. 10-27): the legal
    /// steps are disabled - xAPIC - x2APIC - disabled and xAPIC - disabled.
    pub fn set_apic_base(&mut self, value: u64) -> Result<Effect, Gp0> {
        const MODE: u64 = APIC_BASE_ENABLE | APIC_BASE_X2APIC;
        let phys_bits = u32::from(self.config.phys_bits).clamp(32, 52);
        let mut allowed = ((1u64 << phys_bits) - 1) & !0xfff | APIC_BASE_BSP | APIC_BASE_ENABLE;
        if self.config.x2apic {
            allowed |= APIC_BASE_X2APIC;
        }
        if value & !allowed != 0 {
            return Err(Gp0);
        }
        let (old, new) = (self.base & MODE, value & MODE);
        let illegal = new == APIC_BASE_X2APIC
            || (old == 0 && new == MODE)
            || (old == MODE && new == APIC_BASE_ENABLE);
        if illegal {
            return Err(Gp0);
        }
        if self.base == value {
            return Ok(Effect::None);
        }
        self.base = value;
        if old != new {
            match new {
                0 => {
                    // CR8 goes on working without an APIC, and keeps its value.
                    let tpr = self.page.get(reg::TPR);
                    self.init_registers();
                    self.set_tpr(tpr);
                }
                _ => self.enter_mode(),
            }
        }
        Ok(Effect::ModeChanged)
    }

    /// `VM_SET_X2APIC_STATE`: offers x2APIC mode or does not, and puts the
    /// APIC into or out of it, before the vCPU has run.
    pub fn offer_x2apic(&mut self, on: bool) {
        self.config.x2apic = on;
        self.base = (self.base & !APIC_BASE_X2APIC)
            | if on {
                APIC_BASE_X2APIC | APIC_BASE_ENABLE
            } else {
                0
            };
        self.enter_mode();
    }

    /// Whether x2APIC mode is on offer (CPUID.1:ECX\[21\]).
    pub fn x2apic_offered(&self) -> bool {
        self.config.x2apic
    }
}

/// What WRMSR lets pass: the writable bits and the read-only status bits.
fn lvt_msr_bits(lvt: Lvt) -> u32 {
    lvt_writable(lvt)
        | 1 << 12
        | if matches!(lvt, Lvt::Lint0 | Lvt::Lint1) {
            1 << 14
        } else {
            0
        }
}
