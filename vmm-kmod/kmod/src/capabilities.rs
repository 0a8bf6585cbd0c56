//! What VT-x has, for the sysctls of FreeBSD's own vmm.ko.

use core::ffi::c_int;
use core::sync::atomic::{AtomicI32, Ordering};

use vmm_hw::backend::ApicVirt;
use vmm_hw::instr;

use crate::global::Global;

/// VMX capability MSRs (SDM Vol. 3D appendix A.3): a control can be set if its bit
/// is in the upper half.
const PROCBASED: u32 = 0x482;
const PROCBASED2: u32 = 0x48b;
const HLT: u32 = 7;
const MTF: u32 = 27;
const PAUSE: u32 = 30;
const UNRESTRICTED: u32 = 7;
const VID: u32 = 9;
const INVPCID: u32 = 12;

/// Whether VT-x is in use; exits by HLT and by PAUSE, monitor trap flag,
/// unrestricted guest, INVPCID; the use of virtual-interrupt delivery and of posted
/// interrupts. The host's shim reads these as int.
#[unsafe(no_mangle)]
#[allow(non_upper_case_globals)]
pub static vmm_rust_capabilities: [AtomicI32; 8] = [const { AtomicI32::new(0) }; 8];

/// Fills them, at load. All stay 0 on AMD-V.
pub fn tell(g: &Global) {
    if g.backend.is_amd() {
        return;
    }
    // SAFETY: CPL 0, and the backend is VT-x.
    let [primary, secondary] = unsafe {
        [
            instr::rdmsr(PROCBASED) >> 32,
            instr::rdmsr(PROCBASED2) >> 32,
        ]
    };
    let values = [
        1,
        primary >> HLT,
        primary >> PAUSE,
        primary >> MTF,
        secondary >> UNRESTRICTED,
        secondary >> INVPCID,
        secondary >> VID & u64::from(g.apic_virt.contains(ApicVirt::INTERRUPTS)),
        0,
    ];
    for (slot, value) in vmm_rust_capabilities.iter().zip(values) {
        slot.store((value & 1) as c_int, Ordering::Relaxed);
    }
}
