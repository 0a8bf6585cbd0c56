//! A new VMCS, and the guest's state after power-on, INIT and SIPI.

use super::apicv::{ApicMode, ApicVirt};
use super::caps::Features;
use super::cr::{CR0_GUEST_OWNED, CR4_GUEST_OWNED};
use super::entry::exit_from_guest;
use super::fields::{entry_ctl, exit_ctl, msr, pin, vmcs};
use super::instr::{self, rdmsr, vmwrite};
use super::vcpu::Vcpu;
pub use crate::backend::{PAT_POWER_ON, Reset};
use vmm_core::cpu::{CpuState, Gpr, Reg, Seg, SegDesc};
use vmm_core::host::Host;

/// Exceptions that exit: #DB and #AC, whose delivery a guest can make an
/// endless loop inside the CPU (CVE-2015-8104, CVE-2015-5307), and #MC, which
/// is the host's.
const EXCEPTIONS: u64 = 1 << 1 | 1 << 17 | 1 << 18;

impl<H: Host> Vcpu<H> {
    /// Fills a new VMCS. It is current.
    pub(super) fn init_vmcs(&mut self) {
        let caps = self.backend.caps;
        let (p1, p2) = self.initial_controls();
        let timer = caps.features.contains(Features::PREEMPTION_TIMER);
        let timer_bit = if timer { pin::PREEMPTION_TIMER } else { 0 };
        self.pin = caps
            .pin
            .adjust(pin::EXTERNAL_INTERRUPT | pin::NMI | pin::VIRTUAL_NMI | timer_bit);
        self.proc1 = caps.proc1.adjust(p1);
        self.proc2 = caps.proc2.adjust(p2);
        self.entry_ctl = caps
            .entry
            .adjust(entry_ctl::LOAD_DEBUG | entry_ctl::LOAD_PAT | entry_ctl::LOAD_EFER);
        let exit = caps.exit.adjust(
            exit_ctl::SAVE_DEBUG
                | exit_ctl::HOST_64BIT
                | exit_ctl::SAVE_PAT
                | exit_ctl::LOAD_PAT
                | exit_ctl::SAVE_EFER
                | exit_ctl::LOAD_EFER
                | if self.apic_virt.contains(ApicVirt::POSTED) {
                    exit_ctl::ACK_INTERRUPT
                } else {
                    0
                },
        );
        self.msrs.set_present(
            caps.features.contains(Features::RDTSCP),
            caps.features.contains(Features::XSAVES),
        );
        let host_entry = exit_from_guest as unsafe extern "sysv64" fn() as usize as u64;
        // SAFETY: our VMCS is current. Controls were fitted to what the CPU
        // allows, addresses are pages that live as long as the vCPU, and the
        // host state is this host's own.
        unsafe {
            for (field, value) in [
                (vmcs::PIN_CONTROLS, u64::from(self.pin)),
                (vmcs::PROC_CONTROLS, u64::from(self.proc1)),
                (vmcs::PROC2_CONTROLS, u64::from(self.proc2)),
                (vmcs::ENTRY_CONTROLS, u64::from(self.entry_ctl)),
                (vmcs::EXIT_CONTROLS, u64::from(exit)),
                (vmcs::EXCEPTION_BITMAP, EXCEPTIONS),
                (vmcs::PF_ERROR_MASK, 0),
                (vmcs::PF_ERROR_MATCH, 0),
                (vmcs::CR3_TARGET_COUNT, 0),
                (vmcs::EXIT_MSR_STORE_COUNT, 0),
                (vmcs::EXIT_MSR_LOAD_COUNT, 0),
                (vmcs::ENTRY_MSR_LOAD_COUNT, 0),
                (vmcs::ENTRY_INTERRUPTION_INFO, 0),
                (vmcs::EPTP, self.eptp),
                (vmcs::MSR_BITMAP, self.msr_bitmap.pa()),
                (vmcs::TSC_OFFSET, 0),
                (vmcs::CR0_MASK, !CR0_GUEST_OWNED),
                (vmcs::CR4_MASK, !(CR4_GUEST_OWNED & caps.cr4_fixed1)),
                (vmcs::VMCS_LINK, u64::MAX),
                (vmcs::HOST_CS_SEL, u64::from(instr::read_cs() & !7)),
                (vmcs::HOST_SS_SEL, u64::from(instr::read_ss() & !7)),
                (vmcs::HOST_DS_SEL, 0),
                (vmcs::HOST_ES_SEL, 0),
                (vmcs::HOST_FS_SEL, 0),
                (vmcs::HOST_GS_SEL, 0),
                (vmcs::HOST_TR_SEL, u64::from(instr::read_tr())),
                (vmcs::HOST_PAT, rdmsr(msr::PAT)),
                (vmcs::HOST_EFER, rdmsr(msr::EFER)),
                (vmcs::HOST_RIP, host_entry),
                // What `load` writes only when it changes starts as its cache
                // does.
                (vmcs::HOST_CR0, 0),
                (vmcs::HOST_CR3, 0),
                (vmcs::HOST_CR4, 0),
                (vmcs::HOST_FS_BASE, 0),
                (vmcs::HOST_GS_BASE, 0),
                (vmcs::HOST_TR_BASE, 0),
                (vmcs::HOST_GDTR_BASE, 0),
                (vmcs::HOST_IDTR_BASE, 0),
                (vmcs::HOST_SYSENTER_CS, 0),
                (vmcs::HOST_SYSENTER_ESP, 0),
                (vmcs::HOST_SYSENTER_EIP, 0),
                (vmcs::HOST_RSP, 0),
            ] {
                vmwrite(field, value);
            }
            if self.vpid != 0 {
                vmwrite(vmcs::VPID, u64::from(self.vpid));
            }
            if timer {
                self.preemption_ticks = self.longest_stay;
                vmwrite(vmcs::PREEMPTION_TIMER, u64::from(self.longest_stay));
            }
            if caps.features.contains(Features::XSAVES) {
                vmwrite(vmcs::XSS_EXITING, 0);
            }
            if self.virtual_apic != 0 && caps.features.contains(Features::TPR_SHADOW) {
                vmwrite(vmcs::VIRTUAL_APIC, self.virtual_apic);
                vmwrite(vmcs::TPR_THRESHOLD, 0);
            }
            if self.apic_access != 0 && caps.features.contains(Features::APIC_ACCESSES) {
                vmwrite(vmcs::APIC_ACCESS, self.apic_access);
            }
            if self.apic_virt.contains(ApicVirt::POSTED) {
                let (descriptor, vector) = self.posted;
                vmwrite(vmcs::POSTED_DESCRIPTOR, descriptor);
                vmwrite(vmcs::POSTED_VECTOR, u64::from(vector));
            }
            if caps.features.contains(Features::VIRTUAL_INTERRUPTS) {
                vmwrite(vmcs::GUEST_INTERRUPT_STATUS, 0);
                for field in [
                    vmcs::EOI_EXIT0,
                    vmcs::EOI_EXIT1,
                    vmcs::EOI_EXIT2,
                    vmcs::EOI_EXIT3,
                ] {
                    vmwrite(field, 0);
                }
            }
        }
        for (n, read, write) in [
            (msr::FS_BASE, true, true),
            (msr::GS_BASE, true, true),
            (msr::KERNEL_GS_BASE, true, true),
            (msr::SYSENTER_CS, true, true),
            (msr::SYSENTER_ESP, true, true),
            (msr::SYSENTER_EIP, true, true),
            // Their values are known in memory because writes exit.
            (msr::STAR, true, false),
            (msr::LSTAR, true, false),
            (msr::CSTAR, true, false),
            (msr::SFMASK, true, false),
            (msr::EFER, true, false),
            (msr::PAT, true, false),
            (msr::TSC, true, false),
            (
                msr::TSC_AUX,
                caps.features.contains(Features::RDTSCP),
                false,
            ),
            // A barrier hurts nobody but who asks for it.
            (msr::PRED_CMD, false, caps.mitigations.ibpb),
        ] {
            self.msr_bitmap.pass(n, read, write);
        }
        self.set_apic_mode(ApicMode::XApic);
        self.reset(Reset::PowerOn);
    }

    /// Registers as after power-on or INIT. The VMCS is current; for power-on
    /// the vCPU is not loaded (its FPU state must be in memory). The APIC's
    /// mode, TSC and MTRRs are not touched.
    #[cfg_attr(target_os = "none", optimize(size))]
    pub fn reset(&mut self, kind: Reset) {
        self.regs.gpr = [0; 16];
        // Family 6, as CPUID leaf 1 of every CPU with VT-x says.
        self.set_gpr(Gpr::Rdx, 0x600);
        for seg in [Seg::Es, Seg::Ss, Seg::Ds, Seg::Fs, Seg::Gs] {
            self.set_selector(seg, 0);
            self.set_seg(
                seg,
                SegDesc {
                    base: 0,
                    limit: 0xffff,
                    access: 0x93,
                },
            );
        }
        self.set_selector(Seg::Cs, 0xf000);
        self.set_seg(
            Seg::Cs,
            SegDesc {
                base: 0xffff_0000,
                limit: 0xffff,
                access: 0x93,
            },
        );
        self.set_selector(Seg::Ldtr, 0);
        self.set_seg(
            Seg::Ldtr,
            SegDesc {
                base: 0,
                limit: 0xffff,
                access: 0x82,
            },
        );
        self.set_selector(Seg::Tr, 0);
        self.set_seg(
            Seg::Tr,
            SegDesc {
                base: 0,
                limit: 0xffff,
                access: 0x8b,
            },
        );
        for (reg, value) in [
            (Reg::Efer, 0),
            (Reg::Cr0, 0x6000_0010),
            (Reg::Cr2, 0),
            (Reg::Cr3, 0),
            (Reg::Cr4, 0),
            (Reg::Rip, 0xfff0),
            (Reg::Rflags, 2),
            (Reg::Dr0, 0),
            (Reg::Dr1, 0),
            (Reg::Dr2, 0),
            (Reg::Dr3, 0),
            (Reg::Dr6, 0xffff_0ff0),
            (Reg::Dr7, 0x400),
            (Reg::GdtrBase, 0),
            (Reg::GdtrLimit, 0xffff),
            (Reg::IdtrBase, 0),
            (Reg::IdtrLimit, 0xffff),
            (Reg::Pdpte0, 0),
            (Reg::Pdpte1, 0),
            (Reg::Pdpte2, 0),
            (Reg::Pdpte3, 0),
        ] {
            self.set_reg(reg, value);
        }
        // SAFETY: our VMCS is current; all are defined values.
        unsafe {
            vmwrite(vmcs::GUEST_RSP, 0);
            vmwrite(vmcs::GUEST_INTERRUPTIBILITY, 0);
            vmwrite(vmcs::GUEST_ACTIVITY, 0);
            vmwrite(vmcs::GUEST_PENDING_DEBUG, 0);
            vmwrite(vmcs::GUEST_DEBUGCTL, 0);
        }
        self.cancel_event();
        self.idt_vectoring = 0;
        if kind == Reset::PowerOn {
            self.reset_msrs();
            self.fpu.power_on();
        }
    }

    #[cfg_attr(target_os = "none", optimize(size))]
    fn reset_msrs(&mut self) {
        for (n, value) in [
            (msr::STAR, 0),
            (msr::LSTAR, 0),
            (msr::CSTAR, 0),
            (msr::SFMASK, 0),
            (msr::KERNEL_GS_BASE, 0),
            (msr::TSC_AUX, 0),
            (msr::SYSENTER_CS, 0),
            (msr::SYSENTER_ESP, 0),
            (msr::SYSENTER_EIP, 0),
            (msr::PAT, PAT_POWER_ON),
            (msr::XSS, 0),
            (msr::SPEC_CTRL, 0),
        ] {
            // MSRs that this CPU lacks are left out.
            let _ = self.set_msr(n, value);
        }
    }

    /// Start-up IPI: real mode at `vector << 12` (SDM Vol. 3A §8.4.3). The
    /// vCPU is in the state after INIT.
    pub fn sipi(&mut self, vector: u8) {
        self.set_selector(Seg::Cs, u16::from(vector) << 8);
        self.set_seg(
            Seg::Cs,
            SegDesc {
                base: u64::from(vector) << 12,
                limit: 0xffff,
                access: 0x93,
            },
        );
        self.set_reg(Reg::Rip, 0);
    }
}
