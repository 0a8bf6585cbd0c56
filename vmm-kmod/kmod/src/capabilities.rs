//! What VT-x has, for the sysctls of FreeBSD's own vmm.ko.

use core::ffi::c_int;
use core::sync::atomic::{AtomicI32, Ordering};

use vmm_hw::backend::ApicVirt;
use vmm_hw::instr;
use vmm_hw::vmx::fields::{msr, proc1, proc2};

use crate::global::Global;

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
    // A control can be set if its bit is in the upper half (SDM Vol. 3D appendix A.3).
    // SAFETY: CPL 0, and the backend is VT-x.
    let [primary, secondary] = unsafe {
        [
            (instr::rdmsr(msr::VMX_PROCBASED) >> 32) as u32,
            (instr::rdmsr(msr::VMX_PROCBASED2) >> 32) as u32,
        ]
    };
    let values = [
        true,
        primary & proc1::HLT != 0,
        primary & proc1::PAUSE != 0,
        primary & proc1::MTF != 0,
        secondary & proc2::UNRESTRICTED_GUEST != 0,
        secondary & proc2::INVPCID != 0,
        secondary & proc2::VIRTUAL_INTERRUPT_DELIVERY != 0
            && g.apic_virt.contains(ApicVirt::INTERRUPTS),
        g.posted_vector != 0,
    ];
    for (slot, value) in vmm_rust_capabilities.iter().zip(values) {
        slot.store(c_int::from(value), Ordering::Relaxed);
    }
}
