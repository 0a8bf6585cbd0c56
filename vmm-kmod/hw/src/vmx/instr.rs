//! Privileged instructions, one function each.
//!
//! All need CPL 0; the VMX ones need VMX operation (SDM Vol. 3C chapter 30).
//! Reads and writes of the current VMCS do not check for failure: whoever
//! calls them has made a VMCS current, and the encodings are constants.

use core::arch::asm;
use vmm_core::host::Hpa;

/// Why a VMX instruction failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmFail {
    /// VMfailInvalid: no current VMCS, or VMXON refused.
    Invalid,
    /// VMfailValid: the VM-instruction error field says why.
    Valid,
}

/// Turns CF and ZF after a VMX instruction into a result (SDM Vol. 3C §30.2).
fn outcome(cf: u8, zf: u8) -> Result<(), VmFail> {
    match (cf, zf) {
        (0, 0) => Ok(()),
        (0, _) => Err(VmFail::Valid),
        _ => Err(VmFail::Invalid),
    }
}

macro_rules! vmx_mem_op {
    ($(#[$doc:meta])* $name:ident, $op:literal) => {
        $(#[$doc])*
        ///
        /// # Safety
        /// CPL 0, VMX enabled in CR4, and `pa` is a VMX region that this
        /// hypervisor owns and that is in use nowhere else.
        pub unsafe fn $name(pa: Hpa) -> Result<(), VmFail> {
            let (cf, zf): (u8, u8);
            // SAFETY: by the caller's promise; the operand is a local.
            unsafe {
                asm!(
                    concat!($op, " qword ptr [{pa}]"),
                    "setc {cf}",
                    "setz {zf}",
                    pa = in(reg) &pa,
                    cf = out(reg_byte) cf,
                    zf = out(reg_byte) zf,
                    options(nostack),
                );
            }
            outcome(cf, zf)
        }
    };
}

vmx_mem_op!(
    /// VMXON.
    vmxon, "vmxon");
vmx_mem_op!(
    /// VMCLEAR.
    vmclear, "vmclear");
vmx_mem_op!(
    /// VMPTRLD.
    vmptrld, "vmptrld");

/// VMXOFF.
///
/// # Safety
/// CPL 0 in VMX root operation, with no VMCS left active on this CPU.
pub unsafe fn vmxoff() -> Result<(), VmFail> {
    let (cf, zf): (u8, u8);
    // SAFETY: by the caller's promise.
    unsafe {
        asm!("vmxoff", "setc {0}", "setz {1}", out(reg_byte) cf, out(reg_byte) zf, options(nostack));
    }
    outcome(cf, zf)
}

/// VMREAD of a field of the current VMCS.
///
/// # Safety
/// CPL 0 in VMX root operation with a current VMCS.
#[inline(always)]
pub unsafe fn vmread(field: u32) -> u64 {
    let value: u64;
    // SAFETY: by the caller's promise; no memory is touched.
    unsafe {
        asm!("vmread {0}, {1}", out(reg) value, in(reg) u64::from(field), options(nomem, nostack));
    }
    value
}

/// VMREAD of a field that the CPU may not have; `None` then.
///
/// # Safety
/// As [`vmread`].
pub unsafe fn try_vmread(field: u32) -> Option<u64> {
    let value: u64;
    let (cf, zf): (u8, u8);
    // SAFETY: by the caller's promise; no memory is touched.
    unsafe {
        asm!("vmread {0}, {1}", "setc {2}", "setz {3}", out(reg) value, in(reg) u64::from(field),
             out(reg_byte) cf, out(reg_byte) zf, options(nomem, nostack));
    }
    outcome(cf, zf).ok().map(|()| value)
}

/// VMWRITE of a field of the current VMCS.
///
/// # Safety
/// As [`vmread`]; the value is one that keeps the host safe.
#[inline(always)]
pub unsafe fn vmwrite(field: u32, value: u64) {
    // SAFETY: by the caller's promise; no ordinary memory is touched.
    unsafe {
        asm!("vmwrite {0}, {1}", in(reg) u64::from(field), in(reg) value, options(nomem, nostack));
    }
}

/// INVEPT, single-context (SDM Vol. 3C §30.3).
///
/// # Safety
/// CPL 0 in VMX root operation; the CPU has single-context INVEPT.
pub unsafe fn invept_context(eptp: u64) -> Result<(), VmFail> {
    // SAFETY: by the caller's promise.
    unsafe { invept(1, eptp) }
}

/// INVEPT, all contexts.
///
/// # Safety
/// CPL 0 in VMX root operation; the CPU has all-context INVEPT.
pub unsafe fn invept_all() -> Result<(), VmFail> {
    // SAFETY: by the caller's promise.
    unsafe { invept(2, 0) }
}

unsafe fn invept(kind: u64, eptp: u64) -> Result<(), VmFail> {
    let desc: [u64; 2] = [eptp, 0];
    let (cf, zf): (u8, u8);
    // SAFETY: by the caller's promise; the descriptor is a local.
    unsafe {
        asm!(
            "invept {kind}, xmmword ptr [{desc}]", "setc {cf}", "setz {zf}",
            kind = in(reg) kind, desc = in(reg) &desc,
            cf = out(reg_byte) cf, zf = out(reg_byte) zf, options(nostack),
        );
    }
    outcome(cf, zf)
}

/// INVVPID of one VPID, or of all when `vpid` is `None`.
///
/// # Safety
/// CPL 0 in VMX root operation; the CPU has the INVVPID type.
pub unsafe fn invvpid(vpid: Option<u16>) -> Result<(), VmFail> {
    let (kind, id) = match vpid {
        Some(v) => (1u64, u64::from(v)),
        None => (2, 0),
    };
    let desc: [u64; 2] = [id, 0];
    let (cf, zf): (u8, u8);
    // SAFETY: by the caller's promise; the descriptor is a local.
    unsafe {
        asm!(
            "invvpid {kind}, xmmword ptr [{desc}]", "setc {cf}", "setz {zf}",
            kind = in(reg) kind, desc = in(reg) &desc,
            cf = out(reg_byte) cf, zf = out(reg_byte) zf, options(nostack),
        );
    }
    outcome(cf, zf)
}

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
