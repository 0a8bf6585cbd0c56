//! Guest memory of ours as a KVM VM's, for the benchmark that compares the
//! two kernels (tests/bench).

use crate::memory::GuestMemory;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use std::io;
use std::mem::forget;

/// Makes `memory` the memory of `vm`; it stays mapped until the process ends.
///
/// # Errors
/// KVM's.
pub fn set_memory(vm: &VmFd, memory: &GuestMemory) -> io::Result<()> {
    for (slot, region) in (0..).zip(memory.host_ranges()) {
        let (guest_phys_addr, host, len) = region;
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr,
            memory_size: len,
            userspace_addr: host as u64,
        };
        // A vCPU can outlive every handle that we have on the memory.
        forget(memory.clone());
        // SAFETY: the range is mapped, belongs to guest memory, which nobody
        // has references into, and is never unmapped: its owner was forgotten.
        unsafe { vm.set_user_memory_region(region) }
            .map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
    }
    Ok(())
}
