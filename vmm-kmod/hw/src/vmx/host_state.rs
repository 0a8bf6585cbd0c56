//! Going to the guest's world and back: what is switched once per run rather
//! than once per exit.

use super::caps::Features;
use super::fields::{msr, vmcs};
use super::instr::{self, TableRegister, rdmsr, vmwrite, wrmsr};
use super::vcpu::{Vcpu, work};
use crate::error::Error;
use crate::msr::canonical;
use core::arch::asm;

pub use crate::msr::MsrWrite;
use vmm_core::host::Host;
use vmm_core::msr::pat_valid;

/// What the host-state area of the VMCS holds, and what `unload` puts back.
#[derive(Default)]
pub(super) struct HostState {
    cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    fs_base: u64,
    gs_base: u64,
    tr_base: u64,
    gdtr_base: u64,
    idtr_base: u64,
    sysenter: [u64; 3],
    // Put back by `unload`.
    gdtr: TableRegister,
    /// Any of the selectors below is not null.
    selectors: bool,
    ldtr: u16,
    ds: u16,
    es: u16,
    fs: u16,
    gs: u16,
    kernel_gs_base: u64,
    debugctl: u64,
    dr7: u64,
    dr: [u64; 4],
}

/// Writes a VMCS field if it is not what the cache says.
///
/// # Safety
/// Our VMCS is current and the value is the host's own.
unsafe fn refresh(field: u32, cached: &mut u64, value: u64) {
    if *cached != value {
        *cached = value;
        // SAFETY: by the caller's promise.
        unsafe { vmwrite(field, value) };
    }
}

/// Base of the 64-bit TSS that `selector` names in the GDT
/// (SDM Vol. 3A figure 7-4).
///
/// # Safety
/// `gdt` is the GDT of this CPU and the selector one of its TSSs.
unsafe fn tss_base(gdt: u64, selector: u16) -> u64 {
    let p = (gdt + u64::from(selector & !7)) as *const u64;
    // SAFETY: a TSS descriptor is 16 bytes, within the GDT's limit.
    let (lo, hi) = unsafe { (p.read_unaligned(), p.add(1).read_unaligned()) };
    (lo >> 16) & 0xff_ffff | (lo >> 32) & 0xff00_0000 | hi << 32
}

/// Puts an MSR's value by: the halves go straight from where RDMSR has them.
///
/// # Safety
/// The MSR exists.
#[inline(always)]
unsafe fn save_msr<const MSR: u32>(to: &mut u64) {
    // SAFETY: by the caller's promise; `to` is 8 bytes.
    unsafe {
        asm!("rdmsr", "mov [{to}], eax", "mov [{to} + 4], edx", to = in(reg) to,
             in("ecx") MSR, out("eax") _, out("edx") _, options(nostack, preserves_flags));
    }
}

/// Loads an MSR likewise.
///
/// # Safety
/// The MSR exists, and takes that value.
#[inline(always)]
unsafe fn load_msr<const MSR: u32>(from: &u64) {
    // SAFETY: by the caller's promise; `from` is 8 bytes.
    unsafe {
        asm!("mov eax, [{from}]", "mov edx, [{from} + 4]", "wrmsr", from = in(reg) from,
             in("ecx") MSR, out("eax") _, out("edx") _, options(nostack, preserves_flags));
    }
}

impl HostState {
    /// CR3 and CR4 after the host changed them.
    #[cold]
    pub fn set_cr3_cr4(&mut self, cr3: u64, cr4: u64) {
        // SAFETY: called with the VMCS current, with the host's own values.
        unsafe {
            refresh(vmcs::HOST_CR3, &mut self.cr3, cr3);
            refresh(vmcs::HOST_CR4, &mut self.cr4, cr4);
        }
    }

    /// Everything of the host-state area that depends on thread or CPU.
    ///
    /// # Safety
    /// CPL 0, our VMCS current, preemption off.
    #[inline(always)]
    unsafe fn update(&mut self, new_cpu: bool, thread_tss: bool) {
        // SAFETY: reads of the host's own state; by the caller's promise.
        unsafe {
            refresh(vmcs::HOST_CR0, &mut self.cr0, instr::read_cr0());
            self.set_cr3_cr4(instr::read_cr3(), instr::read_cr4());
            refresh(vmcs::HOST_FS_BASE, &mut self.fs_base, rdmsr(msr::FS_BASE));
            if new_cpu || thread_tss {
                let gdtr = instr::sgdt();
                self.gdtr = gdtr;
                let tr = tss_base(gdtr.base, instr::read_tr());
                refresh(vmcs::HOST_TR_BASE, &mut self.tr_base, tr);
            }
            if new_cpu {
                let gdtr = self.gdtr;
                refresh(vmcs::HOST_GS_BASE, &mut self.gs_base, rdmsr(msr::GS_BASE));
                refresh(vmcs::HOST_GDTR_BASE, &mut self.gdtr_base, gdtr.base);
                let idtr = instr::sidt();
                refresh(vmcs::HOST_IDTR_BASE, &mut self.idtr_base, idtr.base);
                let [cs, esp, eip] = &mut self.sysenter;
                refresh(vmcs::HOST_SYSENTER_CS, cs, rdmsr(msr::SYSENTER_CS));
                refresh(vmcs::HOST_SYSENTER_ESP, esp, rdmsr(msr::SYSENTER_ESP));
                refresh(vmcs::HOST_SYSENTER_EIP, eip, rdmsr(msr::SYSENTER_EIP));
            }
            let (ldtr, ds, es) = (instr::read_ldtr(), instr::read_ds(), instr::read_es());
            let (fs, gs) = (instr::read_fs(), instr::read_gs());
            self.selectors = ldtr | ds | es | fs | gs != 0;
            if self.selectors {
                (self.ldtr, self.ds, self.es, self.fs, self.gs) = (ldtr, ds, es, fs, gs);
            }
        }
    }

    /// What VM exits clobbered and the VMCS does not restore
    /// (SDM Vol. 3C §27.5).
    ///
    /// # Safety
    /// After `update` on the same CPU, interrupts off.
    unsafe fn restore(&self) {
        // SAFETY: the values are the host's own, from `update`.
        unsafe {
            // The base is right, but VM exits set the limit to FFFFH.
            instr::lgdt(&self.gdtr);
            if self.selectors {
                if self.ldtr != 0 {
                    instr::lldt(self.ldtr);
                }
                if self.ds | self.es != 0 {
                    instr::load_ds_es(self.ds, self.es);
                }
                if self.fs != 0 {
                    instr::load_fs(self.fs);
                    wrmsr(msr::FS_BASE, self.fs_base);
                }
                if self.gs != 0 {
                    instr::load_gs_index(self.gs);
                }
            }
            load_msr::<{ msr::KERNEL_GS_BASE }>(&self.kernel_gs_base);
            if self.debugctl != 0 {
                wrmsr(msr::DEBUGCTL, self.debugctl);
            }
        }
    }
}

const SWITCHED: [u32; 6] = [
    msr::STAR,
    msr::LSTAR,
    msr::CSTAR,
    msr::SFMASK,
    msr::TSC_AUX,
    msr::XSS,
];

/// MSRs that the VMCS does not switch, and that the guest reads (and in the
/// case of KERNEL_GS_BASE writes) without exits.
#[derive(Default)]
pub(super) struct GuestMsrs {
    guest: [u64; SWITCHED.len()],
    host: [u64; SWITCHED.len()],
    /// Bit n: the CPU has `SWITCHED[n]`.
    present: u32,
    /// Bit n: guest and host differ in `SWITCHED[n]`, so it is switched.
    differ: u32,
    kernel_gs_base: u64,
}

impl GuestMsrs {
    pub fn set_present(&mut self, tsc_aux: bool, xss: bool) {
        self.present = 0xf | u32::from(tsc_aux) << 4 | u32::from(xss) << 5;
    }

    fn index(&self, msr: u32) -> Option<usize> {
        SWITCHED
            .iter()
            .position(|m| *m == msr)
            .filter(|i| self.present & 1 << i != 0)
    }

    /// Looks again which values differ.
    #[cold]
    fn compare(&mut self) {
        self.differ = 0;
        for (i, (guest, host)) in self.guest.iter().zip(&self.host).enumerate() {
            if guest != host {
                self.differ |= 1 << i & self.present;
            }
        }
    }

    fn set(&mut self, index: usize, value: u64) {
        if let Some(slot) = self.guest.get_mut(index) {
            *slot = value;
        }
        self.compare();
    }

    /// # Safety
    /// CPL 0, preemption off, on the CPU whose values `host` is to hold.
    #[cold]
    #[inline(never)]
    unsafe fn read_host(&mut self) {
        for (i, (msr, host)) in SWITCHED.into_iter().zip(&mut self.host).enumerate() {
            if self.present & 1 << i != 0 {
                // SAFETY: the MSR exists.
                *host = unsafe { rdmsr(msr) };
            }
        }
        self.compare();
    }

    /// Writes `values` where they differ. Unrolled: this happens twice at
    /// every exit to userland.
    ///
    /// # Safety
    /// CPL 0, preemption off; the values are the guest's, which were checked
    /// when they were set, or the host's own.
    #[inline(always)]
    unsafe fn write(differ: u32, values: &[u64; SWITCHED.len()]) {
        // What is so for a 64-bit kernel under another. The halves straight from
        // memory, where WRMSR wants them.
        if differ == 0b1011 {
            // SAFETY: these MSRs exist; the offsets are within the array.
            unsafe {
                asm!(
                    "mov ecx, {star}",
                    "mov eax, [{p}]",
                    "mov edx, [{p} + 4]",
                    "wrmsr",
                    "mov ecx, {lstar}",
                    "mov eax, [{p} + 8]",
                    "mov edx, [{p} + 12]",
                    "wrmsr",
                    "mov ecx, {sfmask}",
                    "mov eax, [{p} + 24]",
                    "mov edx, [{p} + 28]",
                    "wrmsr",
                    p = in(reg) values.as_ptr(),
                    star = const msr::STAR,
                    lstar = const msr::LSTAR,
                    sfmask = const msr::SFMASK,
                    out("eax") _, out("ecx") _, out("edx") _,
                    options(nostack, preserves_flags)
                );
            }
            return;
        }
        let [star, lstar, cstar, sfmask, tsc_aux, xss] = *values;
        // SAFETY: only MSRs that exist differ.
        unsafe {
            if differ & 1 != 0 {
                wrmsr(msr::STAR, star);
            }
            if differ & 2 != 0 {
                wrmsr(msr::LSTAR, lstar);
            }
            if differ & 4 != 0 {
                wrmsr(msr::CSTAR, cstar);
            }
            if differ & 8 != 0 {
                wrmsr(msr::SFMASK, sfmask);
            }
            if differ & 0x30 != 0 {
                if differ & 0x10 != 0 {
                    wrmsr(msr::TSC_AUX, tsc_aux);
                }
                if differ & 0x20 != 0 {
                    wrmsr(msr::XSS, xss);
                }
            }
        }
    }

    /// # Safety
    /// CPL 0, preemption off, on the CPU whose values `host` is to hold.
    #[inline(always)]
    unsafe fn load(&mut self, new_cpu: bool) {
        // SAFETY: by the caller's promise.
        unsafe {
            if new_cpu {
                self.read_host();
            }
            Self::write(self.differ, &self.guest);
        }
    }

    /// # Safety
    /// After `load`, on the same CPU.
    #[inline(always)]
    unsafe fn unload(&self) {
        // SAFETY: by the caller's promise.
        unsafe { Self::write(self.differ, &self.host) }
    }
}

impl<H: Host> Vcpu<H> {
    /// Makes this vCPU's state the CPU's: VMCS, FPU, MSRs, XCR0, debug
    /// registers. `NeedsMigration`: turn interrupts on, call
    /// [`Vcpu::prepare_migration`] and try again.
    ///
    /// # Safety
    /// Interrupts off; no preemption and no other use of the FPU until `unload`;
    /// the host's FPU state is saved, unless `fpu_live`; CR0.TS is clear; nobody
    /// else runs this vCPU.
    pub unsafe fn load(&mut self, fpu_live: bool) -> Result<u32, Error> {
        // SAFETY: by the caller's promise; the node is boxed.
        let (cpu, _) = unsafe { self.backend.make_current(&self.node)? };
        let new_cpu = cpu != self.cpu;
        if new_cpu {
            self.cpu = cpu;
            // What this CPU cached when the vCPU last ran here may be stale:
            // the guest invalidates only on the CPU that it runs on.
            self.work |= work::FLUSH_VPID;
            self.ept_seen = self.generation.seen(cpu);
        }
        let mitigations = self.backend.caps.mitigations;
        if self.backend.switch_vm(cpu, self.vm) {
            if mitigations.ibpb {
                // SAFETY: CPUID says that the MSR exists.
                unsafe { wrmsr(msr::PRED_CMD, 1) };
            }
            self.request_l1d_flush();
        }
        // SAFETY: CPL 0, our VMCS is current, interrupts are off.
        unsafe {
            self.host.update(new_cpu, self.thread_tss);
            if self.backend.caps.features.contains(Features::DEBUGCTL) {
                self.host.debugctl = rdmsr(msr::DEBUGCTL);
            }
            self.msrs.load(new_cpu);
            save_msr::<{ msr::KERNEL_GS_BASE }>(&mut self.host.kernel_gs_base);
            load_msr::<{ msr::KERNEL_GS_BASE }>(&self.msrs.kernel_gs_base);
            self.fpu.load(new_cpu, fpu_live);
            self.host.dr7 = instr::read_dr7();
            if self.host.dr7 & 0xff != 0 {
                self.host.dr = [
                    instr::read_dr0(),
                    instr::read_dr1(),
                    instr::read_dr2(),
                    instr::read_dr3(),
                ];
            }
        }
        self.take_launch_state();
        self.loaded = true;
        self.drs_loaded = false;
        self.load_debug_registers();
        Ok(cpu)
    }

    /// Puts the host's state back. The VMCS stays current.
    ///
    /// # Safety
    /// After [`Vcpu::load`] on the same CPU, interrupts off.
    #[inline(always)]
    pub unsafe fn unload(&mut self) {
        // SAFETY: by the caller's promise; values are the host's own.
        unsafe {
            if self.host.dr7 & 0xff != 0 {
                let [a, b, c, d] = self.host.dr;
                instr::write_dr0(a);
                instr::write_dr1(b);
                instr::write_dr2(c);
                instr::write_dr3(d);
                instr::write_dr7(self.host.dr7);
            }
            self.fpu.save();
            self.msrs.unload();
            save_msr::<{ msr::KERNEL_GS_BASE }>(&mut self.msrs.kernel_gs_base);
            self.host.restore();
        }
        self.drs_loaded = false;
        self.loaded = false;
    }

    /// Whether the vCPU is between `load` and `unload`.
    pub fn is_loaded(&self) -> bool {
        self.loaded
    }

    /// Puts DR0 to DR3 into the CPU when DR7 uses any of them.
    pub(super) fn load_debug_registers(&mut self) {
        if self.loaded && self.dr7 & 0xff != 0 && !self.drs_loaded {
            let [a, b, c, d] = self.dr;
            // SAFETY: CPL 0; DR7 is 400H in the host while the vCPU is
            // loaded and has run, and the entry loads the guest's; the host's
            // own breakpoints were saved by `load`. They are off meanwhile.
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

    /// Value of an MSR that the backend keeps: the SYSCALL and SYSENTER MSRs,
    /// segment bases, PAT, EFER, TSC_AUX, XSS, SPEC_CTRL. `None` for others.
    pub fn msr(&self, n: u32) -> Option<u64> {
        use vmm_core::cpu::{CpuState, Reg};
        Some(match n {
            msr::FS_BASE => self.vmread(vmcs::GUEST_FS_BASE),
            msr::GS_BASE => self.vmread(vmcs::GUEST_GS_BASE),
            msr::SYSENTER_CS => self.vmread(vmcs::GUEST_SYSENTER_CS),
            msr::SYSENTER_ESP => self.vmread(vmcs::GUEST_SYSENTER_ESP),
            msr::SYSENTER_EIP => self.vmread(vmcs::GUEST_SYSENTER_EIP),
            msr::PAT => self.vmread(vmcs::GUEST_PAT),
            msr::EFER => self.reg(Reg::Efer),
            // SAFETY: the MSR exists; loaded means that it is the guest's.
            msr::KERNEL_GS_BASE if self.loaded => unsafe { rdmsr(msr::KERNEL_GS_BASE) },
            msr::KERNEL_GS_BASE => self.msrs.kernel_gs_base,
            msr::SPEC_CTRL if self.backend.caps.mitigations.spec_ctrl => self.spec_ctrl,
            _ => *self.msrs.guest.get(self.msrs.index(n)?)?,
        })
    }

    /// Sets an MSR that the backend keeps, as WRMSR would, but for the checks
    /// of EFER, which the caller makes.
    #[cfg_attr(target_os = "none", optimize(speed))]
    pub fn set_msr(&mut self, n: u32, value: u64) -> MsrWrite {
        use vmm_core::cpu::{CpuState, Reg};
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
        let field = match n {
            msr::FS_BASE => vmcs::GUEST_FS_BASE,
            msr::GS_BASE => vmcs::GUEST_GS_BASE,
            msr::SYSENTER_CS => vmcs::GUEST_SYSENTER_CS,
            msr::SYSENTER_ESP => vmcs::GUEST_SYSENTER_ESP,
            msr::SYSENTER_EIP => vmcs::GUEST_SYSENTER_EIP,
            msr::PAT => vmcs::GUEST_PAT,
            msr::EFER => {
                self.set_reg(Reg::Efer, value);
                return MsrWrite::Done;
            }
            msr::KERNEL_GS_BASE if ok => {
                if self.loaded {
                    // SAFETY: canonical, and the guest's while loaded.
                    unsafe { wrmsr(msr::KERNEL_GS_BASE, value) };
                }
                self.msrs.kernel_gs_base = value;
                return MsrWrite::Done;
            }
            msr::KERNEL_GS_BASE => return MsrWrite::Fault,
            msr::SPEC_CTRL if self.backend.caps.mitigations.spec_ctrl => {
                if !ok {
                    return MsrWrite::Fault;
                }
                self.spec_ctrl = value;
                if value != 0 {
                    // From its first use on the guest has it for itself.
                    self.work |= work::SPEC_CTRL;
                    self.spec_ctrl_used = true;
                    self.msr_bitmap.pass(msr::SPEC_CTRL, true, true);
                }
                return MsrWrite::Done;
            }
            _ => {
                let Some(i) = self.msrs.index(n) else {
                    return MsrWrite::NotHere;
                };
                if !ok {
                    return MsrWrite::Fault;
                }
                self.msrs.set(i, value);
                if self.loaded {
                    // SAFETY: the MSR exists and the value was checked;
                    // `unload` puts the host's back.
                    unsafe { wrmsr(n, value) };
                }
                return MsrWrite::Done;
            }
        };
        if !ok {
            return MsrWrite::Fault;
        }
        // SAFETY: our VMCS is current, the value was checked.
        unsafe { vmwrite(field, value) };
        MsrWrite::Done
    }

    /// The guest's XCR0.
    pub fn xcr0(&self) -> u64 {
        self.fpu.xcr0()
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tss_base_is_put_together_from_its_four_pieces() {
        let gdt = [0u64, 0, 0x1200_8b56_789a_0067, 0x0000_0000_ffff_fe00];
        // SAFETY: selector 16 names the 16 bytes at the end of the array.
        let base = unsafe { tss_base(gdt.as_ptr() as u64, 16) };
        assert_eq!(base, 0xffff_fe00_1256_789a);
    }
}
