//! What VT-x and AMD-V have in common for their users: the traits that the run
//! loop and the ioctls are written against, and the machine's backend.
//!
//! The run loop is generic over [`RunCpu`] and compiled once for each kind of
//! CPU, so that an exit costs no dispatch; whoever touches a vCPU that does
//! not run goes through `dyn` [`VirtualCpu`].

use crate::cr::Controls;
use crate::ept::Generation;
use crate::error::Error;
use crate::mitigation::Mitigations;
use crate::msr::MsrWrite;
use crate::nested::NestedTables;
use crate::{svm, vmx};
use alloc::sync::Arc;
use alloc::vec::Vec;
use bitflags::bitflags;
use core::fmt;
use vmm_core::cpu::{CpuState, Event, Exit};
use vmm_core::host::{Host, Hpa};

bitflags! {
    /// Parts of APIC virtualization that the local APIC's owner wants
    /// (SDM Vol. 3C chapter 29). AMD-V's AVIC is the first four at once.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct ApicVirt: u8 {
        /// TPR shadow: CR8 (and offset 80H of the APIC page) without exits
        /// above the threshold.
        const TPR_SHADOW = 1;
        /// APIC-access page: MMIO accesses exit as APIC accesses with their
        /// offset, or are virtualized.
        const ACCESS_PAGE = 2;
        /// Reads come from the virtual-APIC page; writes exit after they are
        /// done.
        const REGISTERS = 4;
        /// Virtual-interrupt delivery: RVI/SVI, EOI without exits.
        const INTERRUPTS = 8;
        /// The same for x2APIC MSRs.
        const X2APIC = 16;
        /// Posted interrupts: the CPU takes them from [`Config::posted`] at a
        /// notification, without an exit.
        const POSTED = 32;
    }
}

/// Mode of the guest's local APIC (IA32_APIC_BASE bits 11 and 10).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApicMode {
    /// Globally disabled.
    Disabled,
    /// Reached at its memory page.
    XApic,
    /// Reached through MSRs.
    X2Apic,
}

/// Kinds of reset (SDM Vol. 3A table 9-1, APM Vol. 2 §14.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reset {
    /// Power-on: everything.
    PowerOn,
    /// INIT: caches, FPU and most MSRs keep their contents.
    Init,
}

/// When PAUSE exits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PauseExiting {
    /// Never.
    Off,
    /// Each time.
    Every,
    /// When a loop of PAUSEs, each within `gap` TSC ticks of the last, has
    /// run for about `window` ticks (SDM Vol. 3C §25.1.3, APM Vol. 2
    /// §15.14.4).
    Loop {
        /// Most ticks between two PAUSEs of one loop.
        gap: u32,
        /// Ticks until the exit.
        window: u32,
    },
}

/// IA32_PAT after power-on (SDM Vol. 3A §11.12.4, APM Vol. 2 §7.8.1).
pub const PAT_POWER_ON: u64 = 0x0007_0406_0007_0406;

/// What a vCPU is made of.
#[derive(Clone)]
pub struct Config {
    /// The VM's number from [`Backend::new_vm_id`].
    pub vm: u64,
    /// [`NestedTables::root`].
    pub nested_root: u64,
    /// [`NestedTables::generation`].
    pub generation: Arc<Generation>,
    /// Physical address of the vCPU's virtual-APIC page; without it no part
    /// of APIC virtualization but the APIC-access page is used.
    pub virtual_apic: Option<Hpa>,
    /// Physical address of the APIC-access page, which the nested page table
    /// maps at the guest's APIC base; without it accesses there are nested
    /// faults.
    pub apic_access: Option<Hpa>,
    /// Physical address of the vCPU's posted-interrupt descriptor (64 bytes, so
    /// aligned) and the notification vector, which is the host's for nothing
    /// else; without it none are posted.
    pub posted: Option<(Hpa, u8)>,
    /// AVIC is to be used, with these tables.
    pub avic: Option<svm::avic::Place>,
    /// Parts of APIC virtualization wanted; what the CPU lacks is left out.
    pub apic_virt: ApicVirt,
    /// TSC ticks after which a guest is left even if nothing else makes it
    /// leave, where the CPU has a preemption timer. Bochs keeps
    /// the host's interrupts waiting in a guest that was entered, and stays,
    /// with RFLAGS.IF = 0: this is then all that ends its stay.
    pub longest_stay: u64,
    /// Fill the return-stack buffer after each exit (Spectre v2 and its kin),
    /// as the host decides for itself.
    pub fill_rsb: bool,
    /// TR's base may change from one thread of the host to the next, not only
    /// from CPU to CPU.
    pub thread_tss: bool,
}

/// A virtual CPU. The registers of [`CpuState`] and most methods are for use
/// between [`RunCpu::load`] and [`RunCpu::unload`], or after
/// [`VirtualCpu::make_current`] with interrupts off.
pub trait VirtualCpu: CpuState {
    /// Brings state that another CPU has cached back to memory. Call with
    /// interrupts on, before [`RunCpu::load`] or [`VirtualCpu::make_current`];
    /// cheap when there is nothing to do.
    fn prepare_migration(&mut self);
    /// Makes the registers accessible on this CPU. `NeedsMigration`: see
    /// [`VirtualCpu::prepare_migration`]. `NoCpu`: virtualization is off here.
    ///
    /// # Safety
    /// Interrupts are off, and nobody else runs this vCPU.
    unsafe fn make_current(&mut self) -> Result<(), Error>;

    /// Delivers `event` with the next entry, in place of any other.
    fn inject(&mut self, event: Event);
    /// The event that the next entry delivers.
    fn entry_event(&self) -> Option<Event>;
    /// The event whose delivery the last exit interrupted; it must be injected
    /// again, or merged with the fault that interrupted it. Valid until the
    /// next entry.
    fn pending_vectoring(&self) -> Option<Event>;
    /// Whether the guest takes an external interrupt at the next instruction:
    /// RFLAGS.IF, no STI or MOV SS shadow, no event planned.
    fn interruptible(&self) -> bool;
    /// Whether the guest takes an NMI at the next instruction.
    fn nmi_interruptible(&self) -> bool;
    /// Exit (`InterruptWindow`) as soon as the guest can take an interrupt.
    fn set_interrupt_window(&mut self, on: bool);
    /// Exit (`NmiWindow`) as soon as the guest can take an NMI.
    fn set_nmi_window(&mut self, on: bool);

    /// Exit after one instruction. False if the CPU cannot.
    fn set_mtf(&mut self, on: bool) -> bool;
    /// Whether INVPCID works in the guest (otherwise #UD). False if the CPU
    /// cannot.
    fn set_invpcid(&mut self, on: bool) -> bool;
    /// When PAUSE exits. False if the CPU cannot do that.
    fn set_pause_exiting(&mut self, when: PauseExiting) -> bool;
    /// What is added to the host's TSC (after scaling) to give the guest's.
    fn set_tsc_offset(&mut self, offset: i64);
    /// What the host's TSC is multiplied by, of [`Backend::tsc_fraction`] bits of
    /// fraction, or 0; the vCPU is not loaded.
    fn set_tsc_multiplier(&mut self, multiplier: u64);
    /// The CPU has a timer that ends a guest's stay.
    fn has_preemption_timer(&self) -> bool;
    /// RDTSCP and TSC_AUX work in the guest.
    fn has_rdtscp(&self) -> bool;

    /// The parts of APIC virtualization in use.
    fn apic_virt(&self) -> ApicVirt;
    /// Switches to the mode of the guest's APIC.
    fn set_apic_mode(&mut self, mode: ApicMode);

    /// CR0, CR3, CR4, EFER and CS.L, for the checks of MOV CR.
    fn controls(&self) -> Controls;
    /// Whether the guest may load `new` into CR4; #GP(0) otherwise. `allowed`
    /// are the bits of the features that the guest's CPUID shows.
    fn check_cr4(&self, new: u64, allowed: u64) -> bool;
    /// Value of an MSR that the backend keeps: the SYSCALL and SYSENTER MSRs,
    /// segment bases, PAT, EFER, TSC_AUX, XSS, SPEC_CTRL. `None` for others.
    fn msr(&self, n: u32) -> Option<u64>;
    /// Sets an MSR that the backend keeps, as WRMSR would, but for the checks
    /// of EFER, which the caller makes.
    fn set_msr(&mut self, n: u32, value: u64) -> MsrWrite;
    /// The guest's XCR0.
    fn xcr0(&self) -> u64;
    /// XSETBV of XCR0; false for #GP(0). The caller has checked CPL and
    /// CR4.OSXSAVE.
    fn set_xcr0(&mut self, value: u64) -> bool;

    /// Registers as after power-on or INIT. For power-on the vCPU is not
    /// loaded. The APIC's mode, TSC and MTRRs are not touched.
    fn reset(&mut self, kind: Reset);
    /// Start-up IPI: real mode at `vector << 12`. The vCPU is in the state
    /// after INIT.
    fn sipi(&mut self, vector: u8);

    /// Raw reason of the last exit.
    fn exit_reason(&self) -> u32;
    /// A field of the CPU's own structure by its number (VT-x: encoding of a
    /// VMCS field), for those who look into a VM; `None` if there is none.
    fn field(&self, number: u16) -> Option<u64>;
    /// Everything that can explain a refused entry.
    fn dump(&self, f: &mut dyn fmt::Write) -> fmt::Result;
}

/// What the run loop needs besides, with static dispatch.
pub trait RunCpu: VirtualCpu + Sized {
    /// The CPU says of every exit which instruction caused it and how long it
    /// is. Otherwise [`RunCpu::wants_instruction`] is to be asked.
    const DESCRIBES_EXITS: bool;
    /// The CPU has to be told RVI, SVI, the EOI-exit bitmap and the TPR threshold;
    /// otherwise it knows all of the local APIC from its page.
    const TAKES_APIC_STATE: bool;

    /// Makes this vCPU's state the CPU's, and says which that is. With `fpu_live` the FPU's registers hold
    /// the calling thread's state, which `unload` puts back.
    ///
    /// # Safety
    /// Interrupts off; no preemption and no other use of the FPU until `unload`;
    /// the host's FPU state is saved, unless `fpu_live`; CR0.TS is clear; nobody
    /// else runs this vCPU.
    unsafe fn load(&mut self, fpu_live: bool) -> Result<u32, Error>;
    /// Puts the host's state back.
    ///
    /// # Safety
    /// After `load` on the same CPU, interrupts off.
    unsafe fn unload(&mut self);
    /// One entry, and what ended it. Host NMIs and machine checks that ended
    /// it have been handed to the host when this returns.
    ///
    /// # Safety
    /// Between `load` and `unload`, on the same CPU, with interrupts off.
    unsafe fn enter(&mut self) -> Exit;

    /// Whether the exit is complete only with the instruction that caused it.
    fn wants_instruction(&self) -> bool {
        false
    }
    /// Completes the last exit if `bytes` start with an instruction without
    /// prefixes or operands that causes such an exit.
    fn complete_plain(&mut self, exit: Exit, bytes: [u8; 3]) -> bool {
        let _ = (exit, bytes);
        false
    }
    /// Completes the last exit with the instruction that `bytes` start with.
    fn complete(&mut self, exit: Exit, bytes: &[u8]) -> Completed {
        let _ = bytes;
        Completed::Exit(exit)
    }

    /// Whether an interrupt of the host's, sent to this CPU now, is to end the
    /// next stay before its first instruction.
    fn take_immediate_exit(&mut self) -> bool {
        false
    }

    /// The host's interrupt that ended the last stay, if the CPU has acknowledged
    /// it: nobody else handles it.
    fn acknowledged(&self) -> Option<u8> {
        None
    }

    /// Asks for an L1 data-cache flush with the next entry, if the CPU needs
    /// it: after a return from userland, or a switch of VM (L1TF).
    fn request_l1d_flush(&mut self);
    /// Exit (`PreemptionTimer`) once `delta` more TSC ticks have passed in the
    /// guest, and after [`Config::longest_stay`] in any case. To be set again
    /// before each entry. Only for CPUs that have the timer.
    fn set_preemption_timer(&mut self, delta: Option<u64>);
    /// Requesting virtual interrupt, with [`ApicVirt::INTERRUPTS`].
    fn set_rvi(&mut self, rvi: u8);
    /// Servicing virtual interrupt, with [`ApicVirt::INTERRUPTS`].
    fn set_svi(&mut self, svi: u8);
    /// Vectors whose EOI exits: 256 bits, lowest first.
    fn set_eoi_exit_bitmap(&mut self, bitmap: [u64; 4]);
    /// TPR below which (bits 7:4 compared) a `TprBelowThreshold` exit comes.
    fn set_tpr_threshold(&mut self, threshold: u8);
}

/// What became of [`RunCpu::complete`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completed {
    /// The exit, complete.
    Exit(Exit),
    /// Not an instruction that causes such an exit: the guest's code has
    /// changed meanwhile, and it is to be entered again.
    Changed,
    /// Nothing that the decoder knows, or not all of it.
    Undecoded,
}

/// What guests can be offered, as far as the CPU decides it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offer {
    /// INVPCID.
    pub invpcid: bool,
    /// CR4.PCIDE.
    pub pcid: bool,
    /// RDTSCP and TSC_AUX.
    pub rdtscp: bool,
    /// XCR0 bits that are switched; 0 without XSAVE.
    pub xcr0: u64,
    /// XSAVES and XRSTORS.
    pub xsaves: bool,
}

/// Why virtualization cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EnableError {
    /// Neither VT-x nor AMD-V.
    Neither,
    /// The host is out of memory.
    NoMemory,
    /// VT-x's reason.
    Vmx(vmx::EnableError),
    /// AMD-V's reason.
    Svm(svm::EnableError),
}

impl EnableError {
    /// Another hypervisor holds the CPU.
    pub fn in_use(self) -> bool {
        matches!(
            self,
            EnableError::Vmx(vmx::EnableError::InUse) | EnableError::Svm(svm::EnableError::InUse)
        )
    }
}

impl fmt::Display for EnableError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            EnableError::Neither => f.write_str("this CPU has neither VT-x nor AMD-V"),
            EnableError::NoMemory => f.write_str("out of memory"),
            EnableError::Vmx(e) => write!(f, "VT-x cannot be used: {e}"),
            EnableError::Svm(e) => write!(f, "AMD-V cannot be used: {e}"),
        }
    }
}

/// `Arc::new` after a trial that there is memory for it.
fn counted<T>(value: T) -> Result<Arc<T>, EnableError> {
    let mut trial: Vec<u8> = Vec::new();
    match trial.try_reserve_exact(size_of::<T>() + 64) {
        Ok(()) => drop(trial),
        Err(_) => return Err(EnableError::NoMemory),
    }
    Ok(Arc::new(value))
}

/// The machine's backend. One exists while the module is loaded.
pub enum Backend<H: Host> {
    /// Intel's.
    Vmx(Arc<vmx::Backend<H>>),
    /// AMD's.
    Svm(Arc<svm::Backend<H>>),
}

impl<H: Host> Backend<H> {
    /// Probes the CPU. Virtualization is still off: call [`Backend::cpu_on`]
    /// on every CPU.
    ///
    /// # Safety
    /// CPL 0 on a machine whose CPUs are alike.
    pub unsafe fn new() -> Result<Self, EnableError> {
        if svm::present() {
            // SAFETY: by the caller's promise.
            let backend = unsafe { svm::Backend::new() }.map_err(EnableError::Svm)?;
            return counted(backend).map(Backend::Svm);
        }
        if !vmx::present() {
            return Err(EnableError::Neither);
        }
        // SAFETY: by the caller's promise.
        let backend = unsafe { vmx::Backend::new() }.map_err(EnableError::Vmx)?;
        counted(backend).map(Backend::Vmx)
    }

    /// Bits of fraction of what a guest's TSC can be multiplied by. `None`: the CPU
    /// cannot.
    pub fn tsc_fraction(&self) -> Option<u32> {
        match self {
            Backend::Vmx(b) => {
                let can = b.caps.features.contains(vmx::Features::TSC_SCALING);
                can.then_some(48)
            }
            Backend::Svm(b) => {
                let can = b.caps.features.contains(svm::Features::TSC_RATIO);
                can.then_some(32)
            }
        }
    }

    /// Turns virtualization on, on this CPU. `set_vmxe` sets (true) or clears
    /// CR4.VMXE in the host kernel's own way, which may keep a shadow of CR4.
    ///
    /// # Safety
    /// CPL 0, interrupts off; `set_vmxe` does what it says.
    pub unsafe fn cpu_on(&self, set_vmxe: impl Fn(bool)) -> Result<(), EnableError> {
        // SAFETY: by the caller's promise.
        unsafe {
            match self {
                Backend::Vmx(b) => b.cpu_on(set_vmxe).map_err(EnableError::Vmx),
                Backend::Svm(b) => b.cpu_on().map_err(EnableError::Svm),
            }
        }
    }

    /// Turns virtualization off, on this CPU.
    ///
    /// # Safety
    /// As [`Backend::cpu_on`]; no vCPU is between `load` and `unload` here.
    pub unsafe fn cpu_off(&self, set_vmxe: impl Fn(bool)) {
        // SAFETY: by the caller's promise.
        unsafe {
            match self {
                Backend::Vmx(b) => b.cpu_off(set_vmxe),
                Backend::Svm(b) => b.cpu_off(),
            }
        }
    }

    /// AMD's conventions (CPUID leaves, MSRs) rather than Intel's.
    pub fn is_amd(&self) -> bool {
        matches!(self, Backend::Svm(_))
    }

    /// A number that tells VMs apart (for barriers between VMs).
    pub fn new_vm_id(&self) -> u64 {
        match self {
            Backend::Vmx(b) => b.new_vm_id(),
            Backend::Svm(b) => b.new_vm_id(),
        }
    }

    /// What the CPU's weaknesses ask for.
    pub fn mitigations(&self) -> &Mitigations {
        match self {
            Backend::Vmx(b) => &b.caps.mitigations,
            Backend::Svm(b) => &b.caps.mitigations,
        }
    }

    /// What guests can be offered.
    pub fn offer(&self) -> Offer {
        match self {
            Backend::Vmx(b) => b.caps.offer(),
            Backend::Svm(b) => b.caps.offer(),
        }
    }

    /// Whether AVIC is to be used: as said, or as the CPU is.
    pub fn use_avic(&self, wanted: Option<bool>) -> bool {
        match self {
            Backend::Vmx(_) => false,
            Backend::Svm(b) => b.caps.use_avic(wanted),
        }
    }

    /// Parts of VT-x's APIC virtualization that the CPU has.
    pub fn apic_virt(&self) -> ApicVirt {
        match self {
            Backend::Vmx(b) => vmx::apicv::supported(&b.caps),
            Backend::Svm(_) => ApicVirt::empty(),
        }
    }

    /// An empty guest-physical address space.
    pub fn nested_tables(&self) -> Result<NestedTables<H>, Error> {
        match self {
            Backend::Vmx(b) => NestedTables::ept(b.caps.ept_options()),
            Backend::Svm(b) => NestedTables::npt(b.caps.npt_options(), b.caps.la57),
        }
    }
}
