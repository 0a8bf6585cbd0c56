//! Privileged instructions that VT-x and AMD-V backends share, one function
//! each. All need CPL 0.

use crate::mitigation::ret;
use core::arch::{asm, naked_asm};

/// RDMSR.
///
/// # Safety
/// CPL 0, and the MSR exists.
#[inline(always)]
pub unsafe fn rdmsr(msr: u32) -> u64 {
    let (lo, hi): (u32, u32);
    // SAFETY: by the caller's promise.
    unsafe {
        asm!("rdmsr", in("ecx") msr, out("eax") lo, out("edx") hi, options(nomem, nostack, preserves_flags));
    }
    u64::from(hi) << 32 | u64::from(lo)
}

/// WRMSR.
///
/// # Safety
/// CPL 0; the MSR exists, takes the value, and the host can bear it.
#[inline(always)]
pub unsafe fn wrmsr(msr: u32, value: u64) {
    // SAFETY: by the caller's promise. Not `nomem`: some MSRs order memory.
    unsafe {
        asm!("wrmsr", in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32,
             options(nostack, preserves_flags));
    }
}

/// CPUID.
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let r = core::arch::x86_64::__cpuid_count(leaf, subleaf);
    [r.eax, r.ebx, r.ecx, r.edx]
}

/// RDTSC.
pub fn rdtsc() -> u64 {
    // SAFETY: RDTSC is always there in long mode and has no effect.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// XGETBV of XCR0.
///
/// # Safety
/// CR4.OSXSAVE is set.
pub unsafe fn xgetbv0() -> u64 {
    let (lo, hi): (u32, u32);
    // SAFETY: by the caller's promise.
    unsafe {
        asm!("xgetbv", in("ecx") 0, out("eax") lo, out("edx") hi, options(nomem, nostack, preserves_flags));
    }
    u64::from(hi) << 32 | u64::from(lo)
}

/// XSETBV of XCR0.
///
/// # Safety
/// CPL 0, CR4.OSXSAVE set, and the value is one the CPU takes.
pub unsafe fn xsetbv0(value: u64) {
    // SAFETY: by the caller's promise.
    unsafe {
        asm!("xsetbv", in("ecx") 0, in("eax") value as u32, in("edx") (value >> 32) as u32,
             options(nomem, nostack, preserves_flags));
    }
}

macro_rules! register {
    ($($read:ident, $write:ident, $reg:literal;)*) => { $(
        #[doc = concat!("Reads ", $reg, ".")]
        ///
        /// # Safety
        /// CPL 0.
        #[inline(always)]
        pub unsafe fn $read() -> u64 {
            let v: u64;
            // SAFETY: by the caller's promise.
            unsafe { asm!(concat!("mov {}, ", $reg), out(reg) v, options(nomem, nostack, preserves_flags)); }
            v
        }
        #[doc = concat!("Writes ", $reg, ".")]
        ///
        /// # Safety
        /// CPL 0, and the host can bear the value.
        #[inline(always)]
        pub unsafe fn $write(v: u64) {
            // SAFETY: by the caller's promise.
            unsafe { asm!(concat!("mov ", $reg, ", {}"), in(reg) v, options(nostack, preserves_flags)); }
        }
    )* };
}

register! {
    read_cr0, write_cr0, "cr0";
    read_cr2, write_cr2, "cr2";
    read_cr3, write_cr3, "cr3";
    read_cr4, write_cr4, "cr4";
    read_dr0, write_dr0, "dr0";
    read_dr1, write_dr1, "dr1";
    read_dr2, write_dr2, "dr2";
    read_dr3, write_dr3, "dr3";
    read_dr6, write_dr6, "dr6";
    read_dr7, write_dr7, "dr7";
}

macro_rules! selector {
    ($($read:ident, $op:literal;)*) => { $(
        #[doc = concat!("`", $op, "`: a selector.")]
        pub fn $read() -> u16 {
            let v: u64;
            // SAFETY: reading a selector has no effect.
            unsafe { asm!(concat!($op, " {0:r}"), out(reg) v, options(nomem, nostack, preserves_flags)); }
            v as u16
        }
    )* };
}

macro_rules! mov_selector {
    ($($read:ident, $reg:literal;)*) => { $(
        #[doc = concat!("The selector in ", $reg, ".")]
        pub fn $read() -> u16 {
            let v: u64;
            // SAFETY: reading a selector has no effect.
            unsafe { asm!(concat!("mov {0:e}, ", $reg), out(reg) v, options(nomem, nostack, preserves_flags)); }
            v as u16
        }
    )* };
}

mov_selector! {
    read_cs, "cs"; read_ss, "ss"; read_ds, "ds"; read_es, "es"; read_fs, "fs"; read_gs, "gs";
}
selector! { read_ldtr, "sldt"; read_tr, "str"; }

/// Contents of GDTR or IDTR.
#[repr(C, packed)]
#[derive(Clone, Copy, Debug, Default)]
pub struct TableRegister {
    /// Limit in bytes.
    pub limit: u16,
    /// Linear address.
    pub base: u64,
}

/// SGDT.
pub fn sgdt() -> TableRegister {
    let mut t = TableRegister::default();
    // SAFETY: writes the ten bytes of `t`.
    unsafe { asm!("sgdt [{}]", in(reg) &mut t, options(nostack, preserves_flags)) };
    t
}

/// SIDT.
pub fn sidt() -> TableRegister {
    let mut t = TableRegister::default();
    // SAFETY: writes the ten bytes of `t`.
    unsafe { asm!("sidt [{}]", in(reg) &mut t, options(nostack, preserves_flags)) };
    t
}

/// LGDT.
///
/// # Safety
/// CPL 0; `t` describes the host's own GDT.
pub unsafe fn lgdt(t: &TableRegister) {
    // SAFETY: by the caller's promise.
    unsafe { asm!("lgdt [{}]", in(reg) t, options(nostack, preserves_flags)) };
}

/// LLDT.
///
/// # Safety
/// CPL 0; `sel` names the host's LDT descriptor, or is 0.
pub unsafe fn lldt(sel: u16) {
    // SAFETY: by the caller's promise.
    unsafe { asm!("lldt {:x}", in(reg) sel, options(nostack, preserves_flags)) };
}

/// Loads DS and ES.
///
/// # Safety
/// Both were in those registers before, so that their descriptors exist.
pub unsafe fn load_ds_es(ds: u16, es: u16) {
    // SAFETY: by the caller's promise.
    unsafe {
        asm!("mov ds, {0:e}", "mov es, {1:e}", in(reg) u32::from(ds), in(reg) u32::from(es),
             options(nostack, preserves_flags));
    }
}

/// Loads FS; clobbers its base.
///
/// # Safety
/// As [`load_ds_es`]; the caller restores the base.
pub unsafe fn load_fs(sel: u16) {
    // SAFETY: by the caller's promise.
    unsafe { asm!("mov fs, {:e}", in(reg) u32::from(sel), options(nostack, preserves_flags)) };
}

/// Loads the GS selector while the kernel's GS base stays in place; clobbers
/// IA32_KERNEL_GS_BASE.
///
/// # Safety
/// CPL 0 with interrupts off; the caller restores IA32_KERNEL_GS_BASE.
pub unsafe fn load_gs_index(sel: u16) {
    // SAFETY: by the caller's promise. Between the two SWAPGS the user's base
    // is in GS, and the kernel's in KERNEL_GS_BASE, as at a kernel entry, so
    // that even an NMI finds its way.
    unsafe {
        asm!("swapgs", "mov gs, {:e}", "mfence", "swapgs", in(reg) u32::from(sel),
             options(nostack, preserves_flags));
    }
}

/// Hands an NMI that ended the guest to the host's handler.
///
/// # Safety
/// CPL 0 with interrupts off and the host's IDT loaded.
pub unsafe fn host_nmi() {
    // SAFETY: vector 2 is the host's NMI handler, which returns by IRET and so
    // also ends the blocking of NMIs that the VM exit left.
    unsafe { asm!("int 2") };
}

/// Hands a machine check that ended the guest to the host's handler.
///
/// # Safety
/// As [`host_nmi`].
pub unsafe fn host_machine_check() {
    // SAFETY: vector 18 is the host's machine-check handler.
    unsafe { asm!("int 18") };
}

/// Hands an interrupt that a VM exit has acknowledged to the host's handler, as the CPU
/// would have: by the gate in its IDT, with the frame of an interrupt at CPL 0 (SDM
/// Vol. 3A §6.14.2). Gates of interrupts from outside have no stack of their own.
///
/// # Safety
/// CPL 0 with interrupts off and the host's IDT loaded, through which it delivers
/// interrupts (not by FRED); the interrupt is in service at this CPU's local APIC.
pub unsafe fn host_interrupt(vector: u8) {
    let gate = (sidt().base + u64::from(vector) * 16) as *const u64;
    // SAFETY: the table has a gate of 16 bytes for every vector that is delivered.
    let (low, high) = unsafe { (gate.read(), gate.add(1).read()) };
    let handler = low & 0xffff | low >> 32 & 0xffff_0000 | high << 32;
    // SAFETY: as the caller promises, the handler expects it. It returns by IRET, with all
    // registers as they were.
    unsafe { call_handler(handler) }
}

/// The frame of an interrupt, and a jump to its handler.
///
/// # Safety
/// As [`host_interrupt`].
#[unsafe(naked)]
unsafe extern "sysv64" fn call_handler(handler: u64) {
    naked_asm!(
        "push rbp",
        "mov rbp, rsp",
        "and rsp, -16",
        "mov eax, ss",
        "push rax",
        "push rbp",
        "pushfq",
        "mov eax, cs",
        "push rax",
        call_with_frame!(),
        // Where IRET has put RSP already, of which objtool does not know.
        "mov rsp, rbp",
        "pop rbp",
        ret!(),
    )
}

/// Assembly: a CALL of what RDI points to, which pops the address behind it. The kernel's
/// thunk makes of it what the CPU needs. The handler begins with an ENDBR where the CPU looks
/// for one, as it is reached through a gate as well. The prefix makes room for all that the
/// kernel may put in the CALL's place.
#[cfg(thunks)]
macro_rules! call_with_frame {
    () => {
        "mov r11, rdi
         .byte 0x2e
         call __x86_indirect_thunk_r11"
    };
}
/// By a RET that is predicted to go nowhere: no indirect branch that could be trained.
#[cfg(not(thunks))]
macro_rules! call_with_frame {
    () => {
        "lea rax, [rip + 4f]
         push rax
         call 3f
         2:
         pause
         lfence
         jmp 2b
         3:
         mov [rsp], rdi
         ret
         4:"
    };
}
use call_with_frame;
