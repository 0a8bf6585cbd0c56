//! What exists once while the module is loaded.

use core::cell::UnsafeCell;
use core::mem::MaybeUninit;
use core::sync::atomic::{AtomicBool, Ordering};

use vmm_core::cpuid::CpuidCaps;
use vmm_core::host::Host;
use vmm_hw::backend::{ApicVirt, Backend};
use vmm_hw::instr;

use crate::ffi::HostInfo;
use crate::os::Os;

/// The CPU backend and constants of the host.
pub struct Global {
    /// VT-x or AMD-V.
    pub backend: Backend<Os>,
    /// Host's TSC frequency, Hz.
    pub tsc_hz: u64,
    /// What guests are offered.
    pub cpuid_caps: CpuidCaps,
    /// Parts of APIC virtualization to use.
    pub apic_virt: ApicVirt,
    /// The host's vector that notifies a CPU of posted interrupts; 0 where they
    /// are not used.
    pub posted_vector: u8,
    /// Whether large EPT pages are not executable.
    pub split_executable: bool,
    /// AVIC is used.
    pub avic: bool,
    /// Whether vCPUs count the TSC ticks that they spend in the guest.
    pub account: bool,
    /// Whether VM exits fill the return-stack buffer.
    pub fill_rsb: bool,
    /// Threads of the host may have a TSS of their own.
    pub thread_tss: bool,
    /// The host has events that userland waits for by a descriptor.
    pub events: bool,
    /// The host's VM nodes take lseek(2) as VM_EXT_RUN_PAGE.
    pub run_by_seek: bool,
    /// All CPUs in HLT with interrupts off end the VM.
    pub halt_detection: bool,
    /// How long HLT is waited out awake at most, TSC ticks; 0: not at all.
    pub halt_poll: u64,
    /// Microcode revision.
    pub microcode: u32,
    /// IA32_ARCH_CAPABILITIES of the host; 0 if it has none.
    pub arch_capabilities: u64,
    /// Forms of XSAVE that the host trusts (CPUID.0DH.1:EAX).
    pub xsave_forms: u32,
}

struct Slot(UnsafeCell<MaybeUninit<Global>>);
// SAFETY: written once before READY, read only after.
unsafe impl Sync for Slot {}

static GLOBAL: Slot = Slot(UnsafeCell::new(MaybeUninit::uninit()));
static READY: AtomicBool = AtomicBool::new(false);

/// Sets it, at load.
///
/// # Safety
/// Called once before anything else of the module runs.
#[inline(never)]
pub unsafe fn set(g: Global) {
    // SAFETY: nobody reads before READY.
    unsafe { (*GLOBAL.0.get()).write(g) };
    READY.store(true, Ordering::Release);
}

/// Drops it, at unload.
///
/// # Safety
/// Nothing else of the module runs any more.
pub unsafe fn unset() {
    if READY.swap(false, Ordering::AcqRel) {
        // SAFETY: it was set, and by the caller's word nobody uses it.
        unsafe { (*GLOBAL.0.get()).assume_init_drop() };
    }
}

/// The global state. The module's entry points run only after `set`.
///
/// Its fields are reached by its address, of which the compiler knows nothing: each mention
/// of a field's own address would be one more for the module's loader, of 24 bytes.
#[inline]
#[expect(
    clippy::pointers_in_nomem_asm_block,
    reason = "nothing is read or written there"
)]
pub fn get() -> &'static Global {
    let mut at = GLOBAL.0.get();
    // SAFETY: no instruction.
    unsafe {
        core::arch::asm!("/* {0} */", inout(reg) at, options(pure, nomem, nostack, preserves_flags));
    }
    // SAFETY: set before any device node or hotplug callback exists.
    unsafe { (*at).assume_init_ref() }
}

/// The same without an instruction for the address, for what each run goes through.
#[inline(always)]
pub fn at_once() -> &'static Global {
    // SAFETY: as above.
    unsafe { (*GLOBAL.0.get()).assume_init_ref() }
}

/// The global state, if it is there.
pub fn try_get() -> Option<&'static Global> {
    READY.load(Ordering::Acquire).then(get)
}

/// The host's own CPUID.
#[inline(never)]
pub fn cpuid(leaf: u32, sub: u32) -> [u32; 4] {
    let r = core::arch::x86_64::__cpuid_count(leaf, sub);
    [r.eax, r.ebx, r.ecx, r.edx]
}

/// The host's CPUID as guests' is made of: without the forms of XSAVE that
/// the host has turned off.
pub fn trusted_cpuid(leaf: u32, sub: u32) -> [u32; 4] {
    let [a, b, c, d] = cpuid(leaf, sub);
    if (leaf, sub) == (0xd, 1) {
        return [a & get().xsave_forms, b, c, d];
    }
    [a, b, c, d]
}

/// What guests can be offered, from what the CPU and the host have.
pub fn caps(backend: &Backend<Os>, info: &HostInfo) -> CpuidCaps {
    let cpu = backend.offer();
    let m = backend.mitigations();
    CpuidCaps {
        invpcid: cpu.invpcid,
        pcid: cpu.pcid,
        rdtscp: cpu.rdtscp,
        tsc_deadline: true,
        tsc_adjust: true,
        invariant_tsc: info.tsc_invariant != 0,
        gib_pages: cpuid(0x8000_0001, 0)[3] & (1 << 26) != 0,
        xcr0: cpu.xcr0,
        xsaves: cpu.xsaves && info.xsave_forms & 8 != 0,
        spec_ctrl: m.spec_ctrl,
        ssbd: m.spec_ctrl
            && if backend.is_amd() {
                cpuid(0x8000_0008, 0)[1] & (1 << 24) != 0
            } else {
                cpuid(7, 0)[3] & (1 << 31) != 0
            },
        arch_capabilities: cpuid(7, 0)[3] & (1 << 29) != 0,
        l1d_flush: false,
        ext_dest_id: false,
    }
}

/// Physical address of memory from the host's heap that lies in the direct
/// map (never larger than a page here).
pub fn virt_to_phys(va: usize) -> u64 {
    (va as u64).wrapping_sub(Os::phys_to_virt(0) as u64)
}

/// Microcode revision (SDM Vol. 3A §9.11.7.1: write 0, CPUID, read; AMD's
/// PATCH_LEVEL is there without ado).
///
/// # Safety
/// CPL 0 on a CPU with VT-x or, if `amd`, AMD-V.
pub unsafe fn microcode(amd: bool) -> u32 {
    // SAFETY: the MSR exists on every such CPU.
    unsafe {
        if amd {
            return instr::rdmsr(0x8b) as u32;
        }
        instr::wrmsr(0x8b, 0);
        let _ = cpuid(1, 0);
        (instr::rdmsr(0x8b) >> 32) as u32
    }
}

/// IA32_ARCH_CAPABILITIES, 0 where it does not exist.
///
/// # Safety
/// CPL 0.
pub unsafe fn arch_capabilities() -> u64 {
    if cpuid(0, 0)[0] < 7 || cpuid(7, 0)[3] & (1 << 29) == 0 {
        return 0;
    }
    // SAFETY: CPUID says that the MSR exists.
    unsafe { instr::rdmsr(0x10a) }
}
