//! A new VMCB, and the guest's state after power-on, INIT and SIPI.

use super::caps::Features;
use super::vcpu::{NmiState, Vcpu};
use super::vmcb::{EFER_SVME, clean, misc1, misc2, misc3, msr, virq};
use crate::backend::{PAT_POWER_ON, Reset};
use vmm_core::cpu::{CpuState, Gpr, Reg, Seg, SegDesc};
use vmm_core::host::Host;

/// Exceptions that exit: #DB and #AC, whose delivery a guest can make an
/// endless loop inside the CPU (CVE-2015-8104, CVE-2015-5307), and #MC, which
/// is the host's.
const EXCEPTIONS: u32 = 1 << 1 | 1 << 17 | 1 << 18;

/// Writes of CR4, whose bits are not all for guests, and CR8 both ways: the
/// local APIC's TPR is not the CPU's.
const CR: u32 = 1 << 8 | 1 << (16 + 4) | 1 << (16 + 8);

/// What exits besides. All that belongs to AMD-V is here, so that none of it
/// runs in a guest.
const MISC1: u32 = misc1::INTR
    | misc1::NMI
    | misc1::SMI
    | misc1::INIT
    | misc1::CR0_SELECTIVE
    | misc1::RDPMC
    | misc1::CPUID
    | misc1::RSM
    | misc1::INVD
    | misc1::HLT
    | misc1::INVLPGA
    | misc1::IOIO
    | misc1::MSR
    | misc1::TASK_SWITCH
    | misc1::FERR_FREEZE
    | misc1::SHUTDOWN;
const MISC2: u32 = misc2::VMRUN
    | misc2::VMMCALL
    | misc2::VMLOAD
    | misc2::VMSAVE
    | misc2::STGI
    | misc2::CLGI
    | misc2::SKINIT
    | misc2::WBINVD
    | misc2::MONITOR
    | misc2::MWAIT
    | misc2::MWAIT_ARMED
    | misc2::XSETBV;

impl<H: Host> Vcpu<H> {
    /// Fills a new VMCB.
    pub(super) fn init_vmcb(&mut self) {
        let mut misc2 = MISC2;
        if !self.has(Features::RDTSCP) {
            misc2 |= misc2::RDTSCP;
        }
        if self.has(Features::RDPRU) {
            misc2 |= misc2::RDPRU;
        }
        // Until userland wants it.
        let misc3 = if self.has(Features::INVPCID) {
            misc3::INVPCID
        } else {
            0
        };
        let io = self.backend.io_permissions.pa();
        let msrs = self.msr_permissions.pa();
        let n_cr3 = self.n_cr3;
        let control = &mut self.vmcb_mut().control;
        control.intercept_cr = CR;
        control.intercept_dr = u32::MAX;
        control.intercept_exceptions = EXCEPTIONS;
        control.intercept_misc1 = MISC1;
        control.intercept_misc2 = misc2;
        control.intercept_misc3 = misc3;
        control.iopm_base_pa = io;
        control.msrpm_base_pa = msrs;
        control.virtual_interrupt = virq::MASKING;
        control.nested_control = 1;
        control.n_cr3 = n_cr3;
        // VMLOAD and VMSAVE switch them; the CPU checks what is written.
        for n in [
            msr::FS_BASE,
            msr::GS_BASE,
            msr::KERNEL_GS_BASE,
            msr::STAR,
            msr::LSTAR,
            msr::CSTAR,
            msr::SFMASK,
            msr::SYSENTER_CS,
            msr::SYSENTER_ESP,
            msr::SYSENTER_EIP,
        ] {
            self.msr_permissions.pass(n, true, true);
        }
        let rdtscp = self.has(Features::RDTSCP);
        self.msr_permissions.pass(msr::TSC_AUX, rdtscp, false);
        // A barrier hurts nobody but who asks for it.
        let ibpb = self.backend.caps.mitigations.ibpb;
        self.msr_permissions.pass(msr::PRED_CMD, false, ibpb);
        self.reset(Reset::PowerOn);
    }

    /// Whether INVPCID works in the guest (otherwise #UD). False if the CPU
    /// cannot.
    pub fn set_invpcid(&mut self, on: bool) -> bool {
        let can = self.has(Features::INVPCID);
        if can {
            let control = &mut self.touch(clean::INTERCEPTS).control;
            control.intercept_misc3 = if on { 0 } else { misc3::INVPCID };
        }
        can
    }

    /// Registers as after power-on or INIT; for power-on the vCPU is not
    /// loaded. The APIC's mode, TSC and MTRRs are not touched.
    #[cfg_attr(target_os = "none", optimize(size))]
    pub fn reset(&mut self, kind: Reset) {
        self.regs.gpr = [0; 16];
        // Family, model and stepping, as CPUID leaf 1 has them.
        self.set_gpr(Gpr::Rdx, u64::from(crate::instr::cpuid(1, 0)[0]));
        self.set_gpr(Gpr::Rsp, 0);
        let flat = |access| SegDesc {
            base: 0,
            limit: 0xffff,
            access,
        };
        for (seg, selector, desc) in [
            (Seg::Es, 0, flat(0x93)),
            (Seg::Ss, 0, flat(0x93)),
            (Seg::Ds, 0, flat(0x93)),
            (Seg::Fs, 0, flat(0x93)),
            (Seg::Gs, 0, flat(0x93)),
            (
                Seg::Cs,
                0xf000,
                SegDesc {
                    base: 0xffff_0000,
                    ..flat(0x9b)
                },
            ),
            (Seg::Ldtr, 0, flat(0x82)),
            (Seg::Tr, 0, flat(0x8b)),
        ] {
            self.set_selector(seg, selector);
            self.set_seg(seg, desc);
        }
        self.touch(clean::CRX).state.efer = EFER_SVME;
        for (reg, value) in [
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
        ] {
            self.set_reg(reg, value);
        }
        let control = &mut self.vmcb_mut().control;
        control.interrupt_shadow = 0;
        control.event_inj = 0;
        control.exit_int_info = 0;
        self.nmi = NmiState::Open;
        self.intercept1(misc1::IRET, false);
        self.set_interrupt_window(false);
        self.leave_at_once = false;
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
            (msr::SPEC_CTRL, 0),
        ] {
            // MSRs that this CPU lacks are left out.
            let _ = self.set_msr(n, value);
        }
    }

    /// Start-up IPI: real mode at `vector << 12` (APM Vol. 2 §14.1.3). The
    /// vCPU is in the state after INIT.
    pub fn sipi(&mut self, vector: u8) {
        self.set_selector(Seg::Cs, u16::from(vector) << 8);
        self.set_seg(
            Seg::Cs,
            SegDesc {
                base: u64::from(vector) << 12,
                limit: 0xffff,
                access: 0x9b,
            },
        );
        self.set_reg(Reg::Rip, 0);
    }
}
