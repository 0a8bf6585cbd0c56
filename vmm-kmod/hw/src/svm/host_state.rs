//! Going to the guest's world and back: what is switched once per run rather
//! than once per exit.

use super::caps::Features;
use super::vcpu::{Vcpu, work};
use super::vmcb::{EFER_SVME, clean, msr};
use crate::error::Error;
use crate::instr::{self, rdmsr, wrmsr};
use crate::msr::{MsrWrite, canonical};
use core::arch::asm;
use vmm_core::cpu::{CpuState, Reg};
use vmm_core::host::{Host, Hpa};
use vmm_core::msr::pat_valid;

/// TSC_RATIO for the host's own rate: an 8.32 fixed-point number
/// (APM Vol. 2 §15.30.5).
pub const TSC_RATIO_ONE: u64 = 1 << 32;

/// VMSAVE: FS, GS, TR, LDTR, KernelGSBase, the SYSCALL and SYSENTER MSRs.
///
/// # Safety
/// CPL 0, AMD-V on; `vmcb` is a page of ours.
unsafe fn vmsave(vmcb: Hpa) {
    // SAFETY: by the caller's promise.
    unsafe { asm!("vmsave rax", in("rax") vmcb, options(nostack, preserves_flags)) }
}

impl<H: Host> Vcpu<H> {
    /// Makes this vCPU's state the CPU's: FPU, XCR0, debug registers, what the
    /// VMCB does not hold; and saves the host's.
    ///
    /// # Safety
    /// Interrupts off; no preemption and no other use of the FPU until `unload`;
    /// the host's FPU state is saved, unless `fpu_live`; CR0.TS is clear; nobody
    /// else runs this vCPU.
    pub unsafe fn load(&mut self, fpu_live: bool) -> Result<u32, Error> {
        let cpu = H::cpu();
        let Some(host_vmcb) = self.backend.host_vmcb(cpu) else {
            return Err(Error::NoCpu);
        };
        let new_cpu = cpu != self.cpu;
        if new_cpu {
            // Nothing that another CPU has cached of the VMCB is known here.
            self.cpu = cpu;
            self.clean = 0;
            self.regs.host_vmcb_pa = host_vmcb;
            self.new_asid();
        } else {
            // SAFETY: interrupts are off, on that CPU.
            let valid = unsafe { self.backend.asid_valid(cpu, self.asid) };
            if !valid {
                self.new_asid();
            }
        }
        let mitigations = self.backend.caps.mitigations;
        // SAFETY: CPL 0, interrupts off, AMD-V on; MSRs only where CPUID knows
        // them.
        unsafe {
            if self.backend.switch_vm(cpu, self.vm) && mitigations.ibpb {
                wrmsr(msr::PRED_CMD, 1);
            }
            vmsave(host_vmcb);
            if self.has(Features::RDTSCP) {
                self.host_tsc_aux = rdmsr(msr::TSC_AUX);
                if self.host_tsc_aux != self.tsc_aux {
                    wrmsr(msr::TSC_AUX, self.tsc_aux);
                }
            }
            if self.tsc_ratio != TSC_RATIO_ONE {
                wrmsr(msr::TSC_RATIO, self.tsc_ratio);
            }
            self.fpu.load(new_cpu, fpu_live);
            self.host_dr7 = instr::read_dr7();
            if self.host_dr7 & 0xff != 0 {
                self.host_dr = [
                    instr::read_dr0(),
                    instr::read_dr1(),
                    instr::read_dr2(),
                    instr::read_dr3(),
                ];
            }
        }
        self.loaded = true;
        self.drs_loaded = false;
        if !self.apic_virt.is_empty() {
            self.avic_running(true);
        }
        self.load_debug_registers();
        Ok(cpu)
    }

    /// Puts the host's state back, as far as each exit has not.
    ///
    /// # Safety
    /// After [`Vcpu::load`] on the same CPU, interrupts off.
    pub unsafe fn unload(&mut self) {
        // SAFETY: by the caller's promise; values are the host's own.
        unsafe {
            if self.host_dr7 & 0xff != 0 {
                let [a, b, c, d] = self.host_dr;
                instr::write_dr0(a);
                instr::write_dr1(b);
                instr::write_dr2(c);
                instr::write_dr3(d);
                instr::write_dr7(self.host_dr7);
            }
            self.fpu.take_xcr0();
            self.fpu.save();
            if self.tsc_ratio != TSC_RATIO_ONE {
                wrmsr(msr::TSC_RATIO, TSC_RATIO_ONE);
            }
            if self.has(Features::RDTSCP) && self.host_tsc_aux != self.tsc_aux {
                wrmsr(msr::TSC_AUX, self.host_tsc_aux);
            }
        }
        if !self.apic_virt.is_empty() {
            self.avic_running(false);
        }
        self.drs_loaded = false;
        self.loaded = false;
    }

    /// Puts DR0 to DR3 into the CPU when DR7 uses any of them.
    pub(super) fn load_debug_registers(&mut self) {
        if self.loaded && self.vmcb().state.dr7 & 0xff != 0 && !self.drs_loaded {
            let [a, b, c, d] = self.dr;
            // SAFETY: CPL 0; the host's own breakpoints were saved by `load`,
            // and are off while the vCPU is loaded. VMRUN loads the guest's
            // DR7.
            unsafe {
                instr::write_dr7(0x400);
                instr::write_dr0(a);
                instr::write_dr1(b);
                instr::write_dr2(c);
                instr::write_dr3(d);
            }
            self.drs_loaded = true;
        }
    }

    /// Value of an MSR that the backend keeps. `None` for others.
    #[cfg_attr(target_os = "none", optimize(size))]
    pub fn msr(&self, n: u32) -> Option<u64> {
        let s = &self.vmcb().state;
        Some(match n {
            msr::FS_BASE => s.fs.base,
            msr::GS_BASE => s.gs.base,
            msr::KERNEL_GS_BASE => s.kernel_gs_base,
            msr::STAR => s.star,
            msr::LSTAR => s.lstar,
            msr::CSTAR => s.cstar,
            msr::SFMASK => s.sfmask,
            msr::SYSENTER_CS => s.sysenter_cs,
            msr::SYSENTER_ESP => s.sysenter_esp,
            msr::SYSENTER_EIP => s.sysenter_eip,
            msr::PAT => s.g_pat,
            msr::EFER => s.efer & !EFER_SVME,
            msr::TSC_AUX if self.has(Features::RDTSCP) => self.tsc_aux,
            msr::XSS if self.has(Features::XSAVES) => 0,
            msr::SPEC_CTRL if self.backend.caps.mitigations.spec_ctrl => self.spec_ctrl,
            _ => return None,
        })
    }

    /// Sets an MSR that the backend keeps, as WRMSR would, but for the checks
    /// of EFER, which the caller makes.
    #[cfg_attr(target_os = "none", optimize(size))]
    pub fn set_msr(&mut self, n: u32, value: u64) -> MsrWrite {
        let ok = match n {
            msr::FS_BASE
            | msr::GS_BASE
            | msr::KERNEL_GS_BASE
            | msr::LSTAR
            | msr::CSTAR
            | msr::SYSENTER_ESP
            | msr::SYSENTER_EIP => canonical(value),
            msr::SFMASK | msr::TSC_AUX | msr::SYSENTER_CS => value >> 32 == 0,
            msr::PAT => pat_valid(value),
            // IBRS, STIBP, SSBD.
            msr::SPEC_CTRL => value & !7 == 0,
            // No supervisor state component is offered.
            msr::XSS => value == 0,
            _ => true,
        };
        if self.msr(n).is_none() {
            return MsrWrite::NotHere;
        }
        if !ok {
            return MsrWrite::Fault;
        }
        let s = &mut self.vmcb_mut().state;
        match n {
            msr::FS_BASE => s.fs.base = value,
            msr::GS_BASE => s.gs.base = value,
            msr::KERNEL_GS_BASE => s.kernel_gs_base = value,
            msr::STAR => s.star = value,
            msr::LSTAR => s.lstar = value,
            msr::CSTAR => s.cstar = value,
            msr::SFMASK => s.sfmask = value,
            msr::SYSENTER_CS => s.sysenter_cs = value,
            msr::SYSENTER_ESP => s.sysenter_esp = value,
            msr::SYSENTER_EIP => s.sysenter_eip = value,
            msr::PAT => {
                s.g_pat = value;
                // With nested paging (§15.15.4).
                self.clean &= !clean::NESTED;
            }
            msr::EFER => self.set_reg(Reg::Efer, value),
            msr::TSC_AUX => {
                self.tsc_aux = value;
                if self.loaded {
                    // SAFETY: the MSR exists and takes 32 bits; `unload` puts
                    // the host's back, for which they must differ.
                    unsafe { wrmsr(msr::TSC_AUX, value) };
                }
            }
            msr::SPEC_CTRL => {
                self.spec_ctrl = value;
                if value != 0 {
                    // From its first use on the guest has it for itself.
                    self.work |= work::SPEC_CTRL;
                    self.spec_ctrl_used = true;
                    self.msr_permissions.pass(msr::SPEC_CTRL, true, true);
                }
            }
            _ => {}
        }
        MsrWrite::Done
    }

    /// The guest's XCR0. It is the CPU's that counts while the vCPU is loaded:
    /// QEMU's TCG (7.2) lets XSETBV run in the guest although it is
    /// intercepted.
    pub fn xcr0(&self) -> u64 {
        if self.loaded {
            self.fpu.loaded_xcr0()
        } else {
            self.fpu.xcr0()
        }
    }

    /// XSETBV of XCR0; false for #GP(0). The caller has checked CPL and
    /// CR4.OSXSAVE.
    pub fn set_xcr0(&mut self, value: u64) -> bool {
        if !crate::fpu::check_xcr0(value, self.backend.caps.xcr0) {
            return false;
        }
        let loaded = self.loaded;
        self.fpu.set_xcr0(value, loaded);
        true
    }

    /// What is added to the host's TSC (after scaling) to give the guest's.
    pub fn set_tsc_offset(&mut self, offset: i64) {
        self.tsc_offset = offset;
        self.touch(clean::INTERCEPTS).control.tsc_offset = offset as u64;
    }

    /// The guest's TSC runs at `ratio / 2^32` of the host's (APM Vol. 2 §15.30.5),
    /// which the CPU can do, or at its rate (0). The vCPU is not loaded.
    pub fn set_tsc_multiplier(&mut self, ratio: u64) {
        self.tsc_ratio = match ratio {
            0 => TSC_RATIO_ONE,
            // Bits 63:40 are reserved.
            _ => ratio & 0xff_ffff_ffff,
        };
    }
}
