//! VMX operation on each CPU, and which VMCSs are active there.
//!
//! Everything per CPU is changed only on that CPU with interrupts off, so
//! that the atomics here need no more than relaxed order and no lock.

use super::caps::{
    Capabilities, CpuInfo, FEATURE_CONTROL_LOCK, FEATURE_CONTROL_VMXON, Missing, ThisCpu,
};
use super::cr::{CR4_OSXSAVE, CR4_VMXE};
use super::fields::msr;
use super::instr;
use super::vpid::VpidAllocator;
use crate::error::Error;
use crate::page::Pages;
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ffi::c_void;
use core::fmt;
use core::ptr::{from_ref, null_mut};
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering};
use vmm_core::host::{Host, Hpa};

/// Why VMX could not be turned on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EnableError {
    /// Something is missing in the CPU or turned off.
    Missing(Missing),
    /// CR4.VMXE is set already: another hypervisor owns VMX.
    InUse,
    /// CR0 or CR4 has a value with which VMX operation is impossible.
    FixedBits,
    /// VMXON failed.
    VmxonFailed,
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
                "another hypervisor holds VT-x on this CPU (CR4.VMXE is set); unload it first, e.g. kvm_intel or VirtualBox's vboxdrv",
            ),
            EnableError::FixedBits => {
                f.write_str("the host's CR0 or CR4 has a value that VMX operation does not allow")
            }
            EnableError::VmxonFailed => f.write_str("VMXON failed"),
            EnableError::NoMemory => f.write_str("out of memory"),
            EnableError::NoCpu => f.write_str("CPU index out of range"),
        }
    }
}

const NO_CPU: u32 = u32::MAX;
/// How often to ask a CPU to give up a VMCS; more than one only while CPUs come
/// and go.
const TRIES: u32 = 16;

/// A VMCS and where it is active; part of a list that only that CPU touches.
pub(super) struct VmcsNode<H: Host> {
    pub(super) region: Pages<H>,
    /// CPU on which the VMCS is active, or `NO_CPU`.
    cpu: AtomicU32,
    /// Launch state (SDM Vol. 3C §24.1).
    pub(super) launched: AtomicBool,
    next: AtomicPtr<VmcsNode<H>>,
}

impl<H: Host> VmcsNode<H> {
    /// A VMCS region with its revision identifier; not yet VMCLEARed.
    pub(super) fn new(revision: u32) -> Result<Box<Self>, Error> {
        let mut region = Pages::new(0)?;
        write_revision(&mut region, revision);
        Ok(Box::new(VmcsNode {
            region,
            cpu: AtomicU32::new(NO_CPU),
            launched: AtomicBool::new(false),
            next: AtomicPtr::new(null_mut()),
        }))
    }

    fn pa(&self) -> Hpa {
        self.region.pa()
    }

    /// Whether it is active on a CPU other than `cpu`.
    pub(super) fn elsewhere(&self, cpu: u32) -> Option<u32> {
        let at = self.cpu.load(Ordering::Acquire);
        (at != NO_CPU && at != cpu).then_some(at)
    }

    fn active(&self) -> Option<u32> {
        let at = self.cpu.load(Ordering::Acquire);
        (at != NO_CPU).then_some(at)
    }
}

fn write_revision<H: Host>(region: &mut Pages<H>, revision: u32) {
    for (to, from) in region.bytes_mut().iter_mut().zip(revision.to_le_bytes()) {
        *to = from;
    }
}

struct PerCpu<H: Host> {
    vmxon: Pages<H>,
    on: AtomicBool,
    /// Physical address of the current VMCS, 0 if none.
    current: AtomicU64,
    /// VM whose vCPU ran here last, 0 if none.
    last_vm: AtomicU64,
    /// VMCSs that are active here.
    active: AtomicPtr<VmcsNode<H>>,
}

/// VT-x on this machine: capabilities, the CPUs, and the VPIDs. One exists
/// while the module is loaded; every vCPU holds a reference.
pub struct Backend<H: Host> {
    /// What the CPUs can do.
    pub caps: Capabilities,
    cpus: Box<[PerCpu<H>]>,
    pub(super) vpids: VpidAllocator,
    next_vm: AtomicU64,
}

impl<H: Host> Backend<H> {
    /// Probes the CPU and prepares a VMXON region for each. VMX is still off:
    /// call [`Backend::cpu_on`] on every CPU.
    ///
    /// # Safety
    /// CPL 0 on a machine whose CPUs are alike.
    pub unsafe fn new() -> Result<Self, EnableError> {
        // SAFETY: CPL 0; XCR0 is read only where CR4 says that it is on.
        let (cpu, xcr0) = unsafe {
            let on = instr::read_cr4() & CR4_OSXSAVE != 0;
            (ThisCpu::new(), if on { instr::xgetbv0() } else { 0 })
        };
        let caps = Capabilities::probe(&cpu, xcr0).map_err(EnableError::Missing)?;
        let mut cpus = Vec::new();
        let n = H::max_cpus() as usize;
        cpus.try_reserve_exact(n)
            .map_err(|_| EnableError::NoMemory)?;
        for _ in 0..n {
            let mut vmxon = Pages::new(0).map_err(|_| EnableError::NoMemory)?;
            write_revision(&mut vmxon, caps.revision);
            cpus.push(PerCpu {
                vmxon,
                on: AtomicBool::new(false),
                current: AtomicU64::new(0),
                last_vm: AtomicU64::new(0),
                active: AtomicPtr::new(null_mut()),
            });
        }
        Ok(Backend {
            caps,
            cpus: cpus.into_boxed_slice(),
            vpids: VpidAllocator::new(),
            next_vm: AtomicU64::new(1),
        })
    }

    /// A number that tells VMs apart (for barriers between VMs).
    pub fn new_vm_id(&self) -> u64 {
        self.next_vm.fetch_add(1, Ordering::Relaxed)
    }

    fn this_cpu(&self) -> Option<(u32, &PerCpu<H>)> {
        let cpu = H::cpu();
        self.cpus.get(cpu as usize).map(|p| (cpu, p))
    }

    /// Whether VMX is on, on that CPU.
    pub fn is_on(&self, cpu: u32) -> bool {
        self.cpus
            .get(cpu as usize)
            .is_some_and(|p| p.on.load(Ordering::Relaxed))
    }

    /// Enters VMX operation on this CPU. `set_vmxe` sets (true) or clears
    /// CR4.VMXE in the host kernel's own way, which may keep a shadow of CR4.
    ///
    /// # Safety
    /// CPL 0, interrupts off; `set_vmxe` does what it says.
    pub unsafe fn cpu_on(&self, set_vmxe: impl Fn(bool)) -> Result<(), EnableError> {
        let Some((_, per)) = self.this_cpu() else {
            return Err(EnableError::NoCpu);
        };
        if per.on.load(Ordering::Relaxed) {
            return Ok(());
        }
        let caps = &self.caps;
        // SAFETY: CPL 0 with interrupts off; the MSR exists where VMX does;
        // writing it happens only while it is unlocked; the VMXON region is
        // this CPU's own and carries the revision identifier.
        unsafe {
            if instr::read_cr4() & CR4_VMXE != 0 {
                return Err(EnableError::InUse);
            }
            let fc = ThisCpu::new().rdmsr(msr::FEATURE_CONTROL);
            if fc & FEATURE_CONTROL_LOCK == 0 {
                instr::wrmsr(
                    msr::FEATURE_CONTROL,
                    fc | FEATURE_CONTROL_LOCK | FEATURE_CONTROL_VMXON,
                );
            } else if fc & FEATURE_CONTROL_VMXON == 0 {
                return Err(EnableError::Missing(Missing::BIOS));
            }
            let cr0 = instr::read_cr0();
            let cr4 = instr::read_cr4() | CR4_VMXE;
            let fits = |v: u64, must1: u64, may1: u64| v & must1 == must1 && v & !may1 == 0;
            if !fits(cr0, caps.cr0_fixed0, caps.cr0_fixed1)
                || !fits(cr4, caps.cr4_fixed0, caps.cr4_fixed1)
            {
                return Err(EnableError::FixedBits);
            }
            set_vmxe(true);
            if instr::vmxon(per.vmxon.pa()).is_err() {
                set_vmxe(false);
                return Err(EnableError::VmxonFailed);
            }
            // Translations of an earlier hypervisor may still be cached under
            // the EPTPs and VPIDs that we are going to use. Where a type is
            // missing the first use of each EPTP invalidates it.
            let _ = instr::invept_all();
            if caps.features.contains(super::caps::Features::VPID) {
                let _ = instr::invvpid(None);
            }
        }
        per.current.store(0, Ordering::Relaxed);
        per.last_vm.store(0, Ordering::Relaxed);
        per.on.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Leaves VMX operation on this CPU; every VMCS that is active here is
    /// written back first. Does nothing where it is off.
    ///
    /// # Safety
    /// As [`Backend::cpu_on`]; no vCPU is between `load` and `unload` here.
    pub unsafe fn cpu_off(&self, set_vmxe: impl Fn(bool)) {
        let Some((_, per)) = self.this_cpu() else {
            return;
        };
        if !per.on.load(Ordering::Relaxed) {
            return;
        }
        loop {
            let head = per.active.load(Ordering::Relaxed);
            if head.is_null() {
                break;
            }
            // SAFETY: nodes in the list are alive: a vCPU takes its node out,
            // on this CPU, before it frees it. Interrupts are off.
            unsafe { self.clear_here(&*head) };
        }
        // SAFETY: in VMX operation by `on`, with no VMCS active.
        unsafe {
            let _ = instr::vmxoff();
        }
        per.on.store(false, Ordering::Relaxed);
        set_vmxe(false);
    }

    /// VMCLEARs a VMCS that is active on this CPU.
    ///
    /// # Safety
    /// Interrupts off, on the CPU on which it is active.
    unsafe fn clear_here(&self, node: &VmcsNode<H>) {
        let Some((cpu, per)) = self.this_cpu() else {
            return;
        };
        if node.active() != Some(cpu) {
            return;
        }
        // SAFETY: VMX is on where a VMCS is active; the region is ours.
        unsafe {
            let _ = instr::vmclear(node.pa());
        }
        let mut link = &per.active;
        loop {
            let at = link.load(Ordering::Relaxed);
            if at.is_null() {
                break;
            }
            if core::ptr::eq(at, node) {
                link.store(node.next.load(Ordering::Relaxed), Ordering::Relaxed);
                break;
            }
            // SAFETY: as in `cpu_off`: listed nodes are alive, and only this
            // CPU changes its list.
            link = unsafe { &(*at).next };
        }
        if per.current.load(Ordering::Relaxed) == node.pa() {
            per.current.store(0, Ordering::Relaxed);
        }
        node.launched.store(false, Ordering::Relaxed);
        node.cpu.store(NO_CPU, Ordering::Release);
    }

    /// VMCLEARs a VMCS wherever it is active, unless that is CPU `but`.
    /// Interrupts must be on (it may wait for another CPU). False if it is
    /// active still.
    #[inline(never)]
    pub(super) fn clear(&self, node: &VmcsNode<H>, but: Option<u32>) -> bool {
        for _ in 0..TRIES {
            let Some(cpu) = node.active() else {
                return true;
            };
            if Some(cpu) == but {
                return true;
            }
            let mut arg = ClearArg {
                backend: self,
                node,
            };
            // False means that the CPU went offline, and `cpu_off` cleared
            // the VMCS there: the next look at it tells.
            H::run_on_cpu(cpu, clear_thunk::<H>, (&raw mut arg).cast());
        }
        node.active().is_none()
    }

    /// Makes a VMCS current on this CPU. The CPU's index, and whether the
    /// VMCS had to be loaded.
    ///
    /// # Safety
    /// Preemption and interrupts off; `node` does not move until it is
    /// cleared.
    pub(super) unsafe fn make_current(&self, node: &VmcsNode<H>) -> Result<(u32, bool), Error> {
        let Some((cpu, per)) = self.this_cpu() else {
            return Err(Error::NoCpu);
        };
        let pa = node.pa();
        if per.current.load(Ordering::Relaxed) == pa {
            return Ok((cpu, false));
        }
        if !per.on.load(Ordering::Relaxed) {
            return Err(Error::NoCpu);
        }
        if node.elsewhere(cpu).is_some() {
            return Err(Error::NeedsMigration);
        }
        let fresh = node.active().is_none();
        // SAFETY: VMX is on; the region is ours and active on no other CPU.
        // A VMCS that is not active is VMCLEARed once more, which is harmless
        // and makes a new region's launch state "clear".
        unsafe {
            if fresh && instr::vmclear(pa).is_err() {
                return Err(Error::Vmcs(0));
            }
            if instr::vmptrld(pa).is_err() {
                return Err(Error::Vmcs(0));
            }
        }
        if fresh {
            node.launched.store(false, Ordering::Relaxed);
            node.next
                .store(per.active.load(Ordering::Relaxed), Ordering::Relaxed);
            per.active
                .store(from_ref(node).cast_mut(), Ordering::Relaxed);
            node.cpu.store(cpu, Ordering::Release);
        }
        per.current.store(pa, Ordering::Relaxed);
        Ok((cpu, true))
    }

    /// Notes that a vCPU of `vm` runs on this CPU; whether another VM's ran
    /// here before.
    #[inline(always)]
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

struct ClearArg<'a, H: Host> {
    backend: &'a Backend<H>,
    node: &'a VmcsNode<H>,
}

extern "C" fn clear_thunk<H: Host>(arg: *mut c_void) {
    // SAFETY: `clear` passes a ClearArg that outlives the call, and the host
    // calls this with interrupts off.
    unsafe {
        let arg = &*arg.cast::<ClearArg<'_, H>>();
        arg.backend.clear_here(arg.node);
    }
}
