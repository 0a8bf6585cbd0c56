//! VT-x's instructions, one function each (SDM Vol. 3C chapter 30), and with
//! them those of every CPU.
//!
//! All need CPL 0 and VMX operation.
//! Reads and writes of the current VMCS do not check for failure: whoever
//! calls them has made a VMCS current, and the encodings are constants.

use core::arch::asm;
use vmm_core::host::Hpa;

pub use crate::instr::*;

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
