//! AMD-V on each CPU: EFER.SVME, the host save area, and the ASIDs.
//!
//! Everything per CPU is changed only on that CPU with interrupts off, so
//! that no lock is needed.

use super::asid::{Asid, Asids};
use super::caps::{Capabilities, Missing};
use super::permission;
use super::vmcb::{EFER_SVME, msr};
use crate::instr::{rdmsr, wrmsr};
use crate::page::Pages;
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::cell::UnsafeCell;
use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use vmm_core::host::{Host, Hpa};

/// Why AMD-V could not be turned on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EnableError {
    /// Something is missing in the CPU or turned off.
    Missing(Missing),
    /// EFER.SVME is set already: another hypervisor owns it.
    InUse,
    /// The host is out of memory.
    NoMemory,
    /// The CPU's index is out of range.
    NoCpu,
}

impl fmt::Display for EnableError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            EnableError::Missing(m) => m.fmt(f),
            EnableError::InUse => f.write_str(
                "another hypervisor holds AMD-V on this CPU (EFER.SVME is set); unload it first, e.g. kvm_amd or VirtualBox's vboxdrv",
            ),
            EnableError::NoMemory => f.write_str("out of memory"),
            EnableError::NoCpu => f.write_str("CPU index out of range"),
        }
    }
}

struct PerCpu<H: Host> {
    /// Where VMRUN saves the host (VM_HSAVE_PA).
    save_area: Pages<H>,
    /// Where VMSAVE does: a VMCB of which nothing else is used.
    host_vmcb: Pages<H>,
    on: AtomicBool,
    /// VM whose vCPU ran here last, 0 if none.
    last_vm: AtomicU64,
    asids: UnsafeCell<Asids>,
}

/// AMD-V on this machine. One exists while the module is loaded; every vCPU
/// holds a reference.
pub struct Backend<H: Host> {
    /// What the CPUs can do.
    pub caps: Capabilities,
    /// The I/O permission map of all guests: every port exits.
    pub(super) io_permissions: Pages<H>,
    cpus: Box<[PerCpu<H>]>,
    next_vm: AtomicU64,
}

// SAFETY: what is not atomic belongs to a CPU and is touched only there, with
// interrupts off.
unsafe impl<H: Host> Sync for Backend<H> {}
// SAFETY: it is tied to no thread.
unsafe impl<H: Host> Send for Backend<H> {}

impl<H: Host> Backend<H> {
    /// Probes the CPU and prepares each CPU's save areas. AMD-V is still off:
    /// call [`Backend::cpu_on`] on every CPU.
    ///
    /// # Safety
    /// CPL 0 on a machine whose CPUs are alike and know AMD-V.
    pub unsafe fn new() -> Result<Self, EnableError> {
        // SAFETY: by the caller's promise.
        let caps = unsafe { Capabilities::probe() }.map_err(EnableError::Missing)?;
        let no_memory = |_| EnableError::NoMemory;
        let mut cpus = Vec::new();
        let n = H::max_cpus() as usize;
        cpus.try_reserve_exact(n)
            .map_err(|_| EnableError::NoMemory)?;
        for _ in 0..n {
            cpus.push(PerCpu {
                save_area: Pages::new(0).map_err(no_memory)?,
                host_vmcb: Pages::new(0).map_err(no_memory)?,
                on: AtomicBool::new(false),
                last_vm: AtomicU64::new(0),
                asids: UnsafeCell::new(Asids::new(caps.asids)),
            });
        }
        Ok(Backend {
            caps,
            io_permissions: permission::all_ports().map_err(no_memory)?,
            cpus: cpus.into_boxed_slice(),
            next_vm: AtomicU64::new(1),
        })
    }

    /// A number that tells VMs apart (for barriers between VMs).
    pub fn new_vm_id(&self) -> u64 {
        self.next_vm.fetch_add(1, Ordering::Relaxed)
    }

    /// Turns AMD-V on, on this CPU.
    ///
    /// # Safety
    /// CPL 0, interrupts off.
    pub unsafe fn cpu_on(&self) -> Result<(), EnableError> {
        let Some(per) = self.cpus.get(H::cpu() as usize) else {
            return Err(EnableError::NoCpu);
        };
        if per.on.load(Ordering::Relaxed) {
            return Ok(());
        }
        // SAFETY: CPL 0 with interrupts off; the MSRs exist where AMD-V does;
        // the save area is this CPU's own.
        unsafe {
            let efer = rdmsr(msr::EFER);
            if efer & EFER_SVME != 0 {
                return Err(EnableError::InUse);
            }
            wrmsr(msr::EFER, efer | EFER_SVME);
            wrmsr(msr::VM_HSAVE_PA, per.save_area.pa());
            // The first identifier of a generation flushes what an earlier
            // hypervisor left.
            (*per.asids.get()).restart();
        }
        per.last_vm.store(0, Ordering::Relaxed);
        per.on.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Turns AMD-V off, on this CPU. Does nothing where it is off.
    ///
    /// # Safety
    /// As [`Backend::cpu_on`]; no vCPU is between `load` and `unload` here.
    pub unsafe fn cpu_off(&self) {
        let Some(per) = self.cpus.get(H::cpu() as usize) else {
            return;
        };
        if !per.on.swap(false, Ordering::Relaxed) {
            return;
        }
        // SAFETY: CPL 0; AMD-V is on here, and it was us.
        unsafe {
            wrmsr(msr::VM_HSAVE_PA, 0);
            let efer = rdmsr(msr::EFER);
            wrmsr(msr::EFER, efer & !EFER_SVME);
        }
    }

    /// Physical address of this CPU's VMCB for the host's own state; `None`
    /// where AMD-V is off.
    pub(super) fn host_vmcb(&self, cpu: u32) -> Option<Hpa> {
        let per = self.cpus.get(cpu as usize)?;
        per.on.load(Ordering::Relaxed).then(|| per.host_vmcb.pa())
    }

    /// Whether `asid` is still good on CPU `cpu`.
    ///
    /// # Safety
    /// On that CPU, interrupts off.
    pub(super) unsafe fn asid_valid(&self, cpu: u32, asid: Asid) -> bool {
        self.cpus.get(cpu as usize).is_some_and(|per| {
            // SAFETY: by the caller's promise nobody else touches it.
            unsafe { (*per.asids.get()).valid(asid) }
        })
    }

    /// A new ASID of CPU `cpu`, and whether it begins a generation.
    ///
    /// # Safety
    /// On that CPU, interrupts off.
    pub(super) unsafe fn take_asid(&self, cpu: u32) -> Option<(Asid, bool)> {
        let per = self.cpus.get(cpu as usize)?;
        // SAFETY: by the caller's promise nobody else touches it.
        Some(unsafe { (*per.asids.get()).take() })
    }

    /// Notes that a vCPU of `vm` runs on this CPU; whether another VM's ran
    /// here before.
    pub(super) fn switch_vm(&self, cpu: u32, vm: u64) -> bool {
        match self.cpus.get(cpu as usize) {
            Some(p) if p.last_vm.load(Ordering::Relaxed) != vm => {
                p.last_vm.store(vm, Ordering::Relaxed);
                true
            }
            _ => false,
        }
    }
}
