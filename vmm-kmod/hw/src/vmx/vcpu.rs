//! One virtual CPU: its VMCS, what the VMCS does not hold, and its life.

use super::apicv::{self, ApicVirt};
use super::caps::Features;
use super::enable::{Backend, VmcsNode};
use super::entry::{Regs, VERW};
use super::fields::{proc1, proc2, vmcs};
use super::host_state::{GuestMsrs, HostState};
use super::inject::preemption_ticks;
use super::instr;
use super::msrbitmap::MsrBitmap;
pub use crate::backend::Config;
use crate::ept::Generation;
use crate::error::Error;
use crate::fpu::Fpu;
use alloc::boxed::Box;
use alloc::sync::Arc;
use core::ffi::c_void;
use core::mem::ManuallyDrop;
use vmm_core::host::{Host, Hpa, LogLevel};

/// What is due before the next entry.
pub(super) mod work {
    /// RIP was changed.
    pub const RIP: u32 = 1 << 0;
    /// INVVPID.
    pub const FLUSH_VPID: u32 = 1 << 1;
    /// L1 data-cache flush.
    pub const FLUSH_L1D: u32 = 1 << 2;
    /// The guest uses IA32_SPEC_CTRL.
    pub const SPEC_CTRL: u32 = 1 << 3;
    /// What stays due.
    pub const STICKY: u32 = SPEC_CTRL;
}

/// A virtual CPU. The registers of [`vmm_core::cpu::CpuState`] and most
/// methods reach the VMCS, so they are for use between [`Vcpu::load`] and
/// [`Vcpu::unload`], or inside [`Vcpu::with_current`].
pub struct Vcpu<H: Host> {
    // What every exit touches comes first.
    pub(super) regs: Regs,
    pub(super) rip: u64,
    pub(super) ept_seen: u64,
    pub(super) work: u32,
    pub(super) exit_reason: u32,
    pub(super) idt_vectoring: u32,
    pub(super) entry_info: u32,
    pub(super) entry_flags: u32,
    pub(super) inst_len: u8,
    pub(super) tpr_threshold: u8,
    pub(super) loaded: bool,
    pub(super) drs_loaded: bool,
    pub(super) thread_tss: bool,
    /// The guest has IA32_SPEC_CTRL for itself.
    pub(super) spec_ctrl_used: bool,
    pub(super) vpid: u16,
    /// CPU of the last `load`.
    pub(super) cpu: u32,
    pub(super) pin: u32,
    pub(super) proc1: u32,
    pub(super) proc2: u32,
    pub(super) entry_ctl: u32,
    /// What the preemption timer counts down from, and the most it may.
    pub(super) preemption_ticks: u32,
    pub(super) longest_stay: u32,
    pub(super) generation: Arc<Generation>,
    pub(super) node: ManuallyDrop<Box<VmcsNode<H>>>,
    pub(super) backend: Arc<Backend<H>>,
    pub(super) host: HostState,
    pub(super) msrs: GuestMsrs,
    pub(super) spec_ctrl: u64,
    pub(super) host_spec_ctrl: u64,
    /// DR0 to DR3, DR6 of the guest.
    pub(super) dr: [u64; 4],
    pub(super) dr6: u64,
    pub(super) dr7: u64,
    pub(super) tsc_offset: i64,
    pub(super) eoi_exit: [u64; 4],
    pub(super) eptp: u64,
    pub(super) vm: u64,
    pub(super) apic_virt: ApicVirt,
    pub(super) virtual_apic: Hpa,
    pub(super) apic_access: Hpa,
    pub(super) posted: (Hpa, u8),
    pub(super) msr_bitmap: MsrBitmap<H>,
    pub(super) fpu: Fpu<H>,
}

struct InitArg<H: Host> {
    vcpu: *mut Vcpu<H>,
    result: Result<(), Error>,
}

extern "C" fn init_thunk<H: Host>(arg: *mut c_void) {
    // SAFETY: `Vcpu::new` passes an InitArg that outlives the call and whose
    // vCPU nobody else has; interrupts are off.
    unsafe {
        let arg = &mut *arg.cast::<InitArg<H>>();
        let vcpu = &mut *arg.vcpu;
        arg.result = vcpu.with_current(Vcpu::init_vmcs);
    }
}

impl<H: Host> Vcpu<H> {
    /// A vCPU in power-on state (SDM Vol. 3A §9.1.1). Interrupts must be on;
    /// VMX must be on, on this CPU.
    pub fn new(backend: Arc<Backend<H>>, config: Config) -> Result<Self, Error> {
        let caps = &backend.caps;
        let mut apic_virt = config.apic_virt & apicv::supported(caps);
        if config.virtual_apic.is_none() {
            apic_virt &= ApicVirt::ACCESS_PAGE;
        }
        if config.apic_access.is_none() {
            apic_virt.remove(ApicVirt::ACCESS_PAGE);
        }
        if config.posted.is_none() {
            apic_virt.remove(ApicVirt::POSTED);
        }
        let node = VmcsNode::new(caps.revision)?;
        let msr_bitmap = MsrBitmap::new()?;
        let fpu = Fpu::new(caps.xcr0)?;
        let vpid = if caps.features.contains(Features::VPID) {
            backend.vpids.alloc().unwrap_or(0)
        } else {
            0
        };
        let entry_flags = if caps.mitigations.verw { VERW } else { 0 };
        let mut vcpu = Vcpu {
            regs: Regs {
                gpr: [0; 16],
                cr2: 0,
                host_rsp: 0,
                verw: instr::read_ss(),
                fill_rsb: u16::from(config.fill_rsb),
            },
            rip: 0,
            ept_seen: 0,
            work: 0,
            exit_reason: 0,
            idt_vectoring: 0,
            entry_info: 0,
            entry_flags,
            inst_len: 0,
            tpr_threshold: 0,
            loaded: false,
            drs_loaded: false,
            thread_tss: config.thread_tss,
            spec_ctrl_used: false,
            vpid,
            cpu: u32::MAX,
            pin: 0,
            proc1: 0,
            proc2: 0,
            entry_ctl: 0,
            preemption_ticks: 0,
            longest_stay: preemption_ticks(config.longest_stay, caps.preemption_rate),
            generation: config.generation,
            node: ManuallyDrop::new(node),
            backend,
            host: HostState::default(),
            msrs: GuestMsrs::default(),
            spec_ctrl: 0,
            host_spec_ctrl: 0,
            dr: [0; 4],
            dr6: 0,
            dr7: 0,
            tsc_offset: 0,
            eoi_exit: [0; 4],
            eptp: config.nested_root,
            vm: config.vm,
            apic_virt: apic_virt.closed(),
            virtual_apic: config.virtual_apic.unwrap_or(0),
            apic_access: config.apic_access.unwrap_or(0),
            posted: config.posted.unwrap_or((0, 0)),
            msr_bitmap,
            fpu,
        };
        // The thread may move while it asks for its CPU; any CPU will do.
        for _ in 0..3 {
            let mut arg = InitArg {
                vcpu: &raw mut vcpu,
                result: Err(Error::NoCpu),
            };
            H::run_on_cpu(H::cpu(), init_thunk::<H>, (&raw mut arg).cast());
            match arg.result {
                Ok(()) => return Ok(vcpu),
                Err(Error::NoCpu | Error::NeedsMigration) => {}
                Err(e) => return Err(e),
            }
        }
        Err(Error::NoCpu)
    }

    #[inline(always)]
    pub(super) fn vmread(&self, field: u32) -> u64 {
        // SAFETY: the VMCS is current wherever the methods of a vCPU are used
        // (see the type's description).
        unsafe { instr::vmread(field) }
    }

    /// The guest's MSR bitmap, for what the defaults intercept.
    pub fn msr_bitmap(&mut self) -> &mut MsrBitmap<H> {
        &mut self.msr_bitmap
    }

    /// What the machine can do.
    pub fn backend(&self) -> &Arc<Backend<H>> {
        &self.backend
    }

    /// The VPID in use, 0 if none.
    pub fn vpid(&self) -> u16 {
        self.vpid
    }

    /// Writes back a VMCS that is cached on another CPU. Call with interrupts
    /// on, before [`Vcpu::with_current`] and after a [`Vcpu::load`] that asks
    /// for it; cheap when there is nothing to do.
    #[inline(never)]
    pub fn prepare_migration(&mut self) {
        let cpu = H::cpu();
        if self.node.elsewhere(cpu).is_some() {
            self.backend.clear(&self.node, Some(cpu));
        }
    }

    /// Runs `f` with the VMCS current, for register access while the vCPU
    /// does not run. `NeedsMigration`: see [`Vcpu::prepare_migration`].
    ///
    /// # Safety
    /// Interrupts (or preemption, where no interrupt handler uses VMX) are
    /// off, and nobody else runs this vCPU.
    pub unsafe fn with_current<R>(&mut self, f: impl FnOnce(&mut Self) -> R) -> Result<R, Error> {
        // SAFETY: by the caller's promise; the node is boxed, so it stays
        // where it is until `drop` has cleared it.
        unsafe { self.backend.make_current(&self.node)? };
        Ok(f(self))
    }

    pub(super) fn initial_controls(&self) -> (u32, u32) {
        let f = self.backend.caps.features;
        let mut p2 = proc2::EPT | proc2::UNRESTRICTED_GUEST;
        for (feature, bit) in [
            (Features::RDTSCP, proc2::RDTSCP),
            (Features::INVPCID, proc2::INVPCID),
            (Features::XSAVES, proc2::XSAVES),
            (Features::WBINVD_EXITING, proc2::WBINVD),
        ] {
            if f.contains(feature) {
                p2 |= bit;
            }
        }
        if self.vpid != 0 {
            p2 |= proc2::VPID;
        }
        let p1 = proc1::TSC_OFFSETTING
            | proc1::HLT
            | proc1::MWAIT
            | proc1::RDPMC
            | proc1::MOV_DR
            | proc1::UNCONDITIONAL_IO
            | proc1::MSR_BITMAPS
            | proc1::MONITOR
            | proc1::SECONDARY;
        (p1, p2)
    }

    /// Any field of the VMCS by its encoding (SDM Vol. 3D appendix B), for
    /// those who look into a VM; `None` if the CPU has no such field.
    pub fn field(&self, encoding: u16) -> Option<u64> {
        // SAFETY: the VMCS is current.
        unsafe { instr::try_vmread(u32::from(encoding)) }
    }

    /// General statistics of the last exit, raw: (reason, qualification,
    /// instruction length, interruption info).
    pub fn raw_exit(&self) -> (u32, u64, u32, u32) {
        (
            self.exit_reason,
            self.vmread(vmcs::EXIT_QUALIFICATION),
            self.vmread(vmcs::EXIT_INST_LEN) as u32,
            self.vmread(vmcs::EXIT_INTERRUPTION_INFO) as u32,
        )
    }
}

impl<H: Host> Drop for Vcpu<H> {
    fn drop(&mut self) {
        if self.backend.clear(&self.node, None) {
            // SAFETY: nothing uses the node after this.
            unsafe { ManuallyDrop::drop(&mut self.node) };
        } else {
            // The CPU may still write to the region: losing a page is better.
            H::log(
                LogLevel::Error,
                format_args!("vmm: a VMCS is stuck on an unreachable CPU; its page is lost"),
            );
        }
        if self.vpid != 0 {
            self.backend.vpids.free(self.vpid);
        }
    }
}

// SAFETY: the raw pointers inside (pages, list links) are owned or touched
// only on the CPU they belong to; everything else is plain data.
unsafe impl<H: Host> Send for Vcpu<H> {}
