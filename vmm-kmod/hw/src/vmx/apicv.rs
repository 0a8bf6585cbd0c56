//! APIC virtualization (SDM Vol. 3C chapter 29): which parts are used, and
//! the controls that each APIC mode takes.

use super::caps::{Capabilities, Features};
use super::fields::{pin, proc1, proc2, vmcs};
use super::instr::vmwrite;
use super::vcpu::Vcpu;
pub use crate::backend::{ApicMode, ApicVirt};
use vmm_core::host::Host;

/// What the CPU can do of it.
pub fn supported(caps: &Capabilities) -> ApicVirt {
    let mut v = ApicVirt::empty();
    v.set(
        ApicVirt::TPR_SHADOW,
        caps.features.contains(Features::TPR_SHADOW),
    );
    v.set(
        ApicVirt::ACCESS_PAGE,
        caps.features.contains(Features::APIC_ACCESSES),
    );
    v.set(
        ApicVirt::REGISTERS,
        caps.features.contains(Features::APIC_REGISTER),
    );
    v.set(
        ApicVirt::INTERRUPTS,
        caps.features.contains(Features::VIRTUAL_INTERRUPTS),
    );
    v.set(ApicVirt::X2APIC, caps.features.contains(Features::X2APIC));
    v.set(
        ApicVirt::POSTED,
        caps.features.contains(Features::POSTED_INTERRUPTS),
    );
    v.closed()
}

impl ApicVirt {
    /// Without the parts whose prerequisites are not there
    /// (SDM Vol. 3C §26.2.1.1).
    pub fn closed(mut self) -> Self {
        if !self.contains(ApicVirt::TPR_SHADOW) {
            self &= ApicVirt::ACCESS_PAGE;
        }
        if !self.contains(ApicVirt::INTERRUPTS) {
            self.remove(ApicVirt::POSTED);
        }
        self
    }

    /// Primary and secondary control bits for a mode.
    pub(super) fn controls(self, mode: ApicMode) -> (u32, u32) {
        let shadow = self.contains(ApicVirt::TPR_SHADOW) && mode != ApicMode::Disabled;
        let primary = if shadow {
            proc1::TPR_SHADOW
        } else {
            proc1::CR8_LOAD | proc1::CR8_STORE
        };
        let mut secondary = 0;
        let mapped = match mode {
            ApicMode::Disabled => false,
            ApicMode::XApic => {
                if self.contains(ApicVirt::ACCESS_PAGE) {
                    secondary |= proc2::APIC_ACCESSES;
                }
                self.contains(ApicVirt::ACCESS_PAGE)
            }
            ApicMode::X2Apic => {
                if shadow && self.contains(ApicVirt::X2APIC) {
                    secondary |= proc2::X2APIC;
                }
                self.contains(ApicVirt::X2APIC)
            }
        };
        // Without the page or the MSRs virtualized, register virtualization
        // has nothing to act on.
        if shadow && mapped && self.contains(ApicVirt::REGISTERS) {
            secondary |= proc2::APIC_REGISTER;
        }
        if shadow && self.contains(ApicVirt::INTERRUPTS) {
            secondary |= proc2::VIRTUAL_INTERRUPT_DELIVERY;
        }
        (primary, secondary)
    }
}

const PRIMARY: u32 = proc1::TPR_SHADOW | proc1::CR8_LOAD | proc1::CR8_STORE;
const SECONDARY: u32 =
    proc2::APIC_ACCESSES | proc2::X2APIC | proc2::APIC_REGISTER | proc2::VIRTUAL_INTERRUPT_DELIVERY;

impl<H: Host> Vcpu<H> {
    /// The parts of APIC virtualization in use: what was asked for and the
    /// CPU has.
    pub fn apic_virt(&self) -> ApicVirt {
        self.apic_virt
    }

    /// Switches controls and MSR bitmap to the mode of the guest's APIC. The
    /// VMCS must be current.
    #[cfg_attr(target_os = "none", optimize(size))]
    pub fn set_apic_mode(&mut self, mode: ApicMode) {
        let (primary, secondary) = self.apic_virt.controls(mode);
        let p1 = self.proc1 & !PRIMARY | primary;
        self.set_proc1(p1);
        let p2 = self.proc2 & !SECONDARY | secondary;
        self.set_proc2(p2);
        // Goes with virtual-interrupt delivery (SDM Vol. 3C §26.2.1.1); without it a
        // notification is an interrupt of the host's as any.
        let posted = self.apic_virt.contains(ApicVirt::POSTED)
            && secondary & proc2::VIRTUAL_INTERRUPT_DELIVERY != 0;
        self.set_pin(
            self.pin & !pin::POSTED_INTERRUPTS | if posted { pin::POSTED_INTERRUPTS } else { 0 },
        );
        let x2 = secondary & proc2::X2APIC != 0;
        let registers = x2 && secondary & proc2::APIC_REGISTER != 0;
        let interrupts = x2 && secondary & proc2::VIRTUAL_INTERRUPT_DELIVERY != 0;
        self.msr_bitmap.set_x2apic(x2, registers, interrupts);
    }

    /// TPR below which (bits 7:4 compared) a `TprBelowThreshold` exit comes;
    /// 0 to 15. Ignored by the CPU with virtual-interrupt delivery.
    pub fn set_tpr_threshold(&mut self, threshold: u8) {
        let threshold = threshold & 15;
        if threshold != self.tpr_threshold && self.apic_virt.contains(ApicVirt::TPR_SHADOW) {
            self.tpr_threshold = threshold;
            // SAFETY: the VMCS is current; a 4-bit value is always valid.
            unsafe { vmwrite(vmcs::TPR_THRESHOLD, u64::from(threshold)) };
        }
    }

    /// Guest interrupt status: requesting (RVI) and servicing (SVI) virtual
    /// interrupt (SDM Vol. 3C §24.4.2). Without virtual-interrupt delivery
    /// nothing happens.
    pub fn set_interrupt_status(&mut self, rvi: u8, svi: u8) {
        let status = u16::from(svi) << 8 | u16::from(rvi);
        if self.apic_virt.contains(ApicVirt::INTERRUPTS) {
            // SAFETY: the VMCS is current; any value is valid.
            unsafe { vmwrite(vmcs::GUEST_INTERRUPT_STATUS, u64::from(status)) };
        }
    }

    /// RVI and SVI.
    pub fn interrupt_status(&self) -> (u8, u8) {
        if !self.apic_virt.contains(ApicVirt::INTERRUPTS) {
            return (0, 0);
        }
        let s = self.vmread(vmcs::GUEST_INTERRUPT_STATUS);
        (s as u8, (s >> 8) as u8)
    }

    /// Sets RVI alone. The virtual IRR bit must have been set before.
    pub fn set_rvi(&mut self, rvi: u8) {
        let (old, svi) = self.interrupt_status();
        if old != rvi {
            self.set_interrupt_status(rvi, svi);
        }
    }

    /// Sets SVI alone.
    pub fn set_svi(&mut self, svi: u8) {
        let (rvi, old) = self.interrupt_status();
        if old != svi {
            self.set_interrupt_status(rvi, svi);
        }
    }

    /// Vectors whose EOI exits: 256 bits, lowest first.
    pub fn set_eoi_exit_bitmap(&mut self, bitmap: [u64; 4]) {
        // Not by `==`, which is memcmp.
        let same = bitmap
            .iter()
            .zip(&self.eoi_exit)
            .fold(0, |sum, (new, old)| sum | (new ^ old))
            == 0;
        if !self.apic_virt.contains(ApicVirt::INTERRUPTS) || same {
            return;
        }
        self.eoi_exit = bitmap;
        let [a, b, c, d] = bitmap;
        // SAFETY: the VMCS is current; any value is valid.
        unsafe {
            vmwrite(vmcs::EOI_EXIT0, a);
            vmwrite(vmcs::EOI_EXIT1, b);
            vmwrite(vmcs::EOI_EXIT2, c);
            vmwrite(vmcs::EOI_EXIT3, d);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn controls_obey_the_entry_checks_in_every_combination() {
        for bits in 0..64 {
            let v = ApicVirt::from_bits_truncate(bits).closed();
            assert!(!v.contains(ApicVirt::POSTED) || v.contains(ApicVirt::INTERRUPTS));
            for mode in [ApicMode::Disabled, ApicMode::XApic, ApicMode::X2Apic] {
                let (p1, p2) = v.controls(mode);
                // SDM Vol. 3C §26.2.1.1.
                let shadow = p1 & proc1::TPR_SHADOW != 0;
                let needs =
                    proc2::X2APIC | proc2::APIC_REGISTER | proc2::VIRTUAL_INTERRUPT_DELIVERY;
                assert!(shadow || p2 & needs == 0, "{v:?} {mode:?}");
                assert!(
                    p2 & (proc2::X2APIC | proc2::APIC_ACCESSES)
                        != (proc2::X2APIC | proc2::APIC_ACCESSES)
                );
                assert_eq!(shadow, p1 & proc1::CR8_LOAD == 0);
            }
        }
    }
}
