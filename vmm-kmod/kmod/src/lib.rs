//! The kernel piece: what stands between `host.h` and the portable core.
//!
//! `vmm-hw` knows the CPU, `vmm-core` the devices and the meaning of exits;
//! here are locks, timers, the life of VMs and vCPUs, the run loop and the
//! ioctls. Everything a host kernel must offer is in `host.h`.
//!
//! Everything is compiled for size; what stands between two entries of a guest, and says so
//! with `optimize(speed)`, is not.
#![no_std]
#![feature(optimize_attribute)]

extern crate alloc;

mod avic;
#[cfg(feature = "freebsd")]
mod capabilities;
#[cfg(not(feature = "freebsd"))]
mod copied;
mod cpuset;
mod doorbells;
mod emulate;
pub mod errno;
mod exit;
mod ffi;
mod global;
mod ioctl;
mod iommu;
mod memory;
mod os;
mod ports;
mod ppt;
mod pv;
mod regs;
mod rings;
mod run;
mod run_page;
mod snapshot;
mod state;
mod sync;
mod tlb;
mod vcpu;
mod vm;
mod vm_memory;

use core::ffi::{c_int, c_uint, c_void};
#[cfg(feature = "freebsd")]
use core::slice;

use vmm_core::host::Host;

use crate::vcpu::Vcpu;
use crate::vm::Vm;

#[global_allocator]
static HEAP: os::HostAllocator = os::HostAllocator;

/// Never called: the module is compiled so that what would panic is an invalid opcode,
/// which either kernel reports with the function that it is in, and stops for.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// At load: probes the CPU. The host calls `vmm_rust_cpu_online` on every CPU
/// afterwards.
///
/// # Safety
/// Called once, with a valid `info`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmm_rust_init(info: *const ffi::HostInfo) -> c_int {
    // SAFETY: by the caller's word.
    let info = unsafe { &*info };
    os::init(info);
    if info.tsc_hz == 0 {
        klog!(
            Error,
            "the host's TSC frequency is unknown: its TSC is not usable"
        );
        return errno::ENXIO;
    }
    // SAFETY: CPL 0; CPUs of one machine are alike.
    let backend = match unsafe { vmm_hw::backend::Backend::<os::Os>::new() } {
        Ok(b) => b,
        Err(e) => {
            klog!(Error, "{e}");
            return errno::ENXIO;
        }
    };
    let split_executable = match info.nx_huge_pages {
        2 => backend.mitigations().itlb_multihit,
        wanted => wanted != 0,
    };
    warn_of_holes(backend.mitigations(), split_executable);
    let g = global::Global {
        cpuid_caps: global::caps(&backend, info),
        // SAFETY: CPL 0; the MSRs are those of every CPU with VT-x or AMD-V, or
        // announced by CPUID.
        microcode: unsafe { global::microcode(backend.is_amd()) },
        // SAFETY: as above.
        arch_capabilities: unsafe { global::arch_capabilities() },
        tsc_hz: info.tsc_hz,
        account: info.account != 0,
        fill_rsb: info.fill_rsb != 0,
        thread_tss: info.thread_tss != 0,
        events: info.events != 0,
        run_by_seek: info.run_by_seek != 0,
        halt_detection: info.no_halt_detection == 0,
        halt_poll: halt_poll(info),
        xsave_forms: info.xsave_forms,
        posted_vector: posted_vector(&backend, info),
        split_executable,
        apic_virt: if info.use_apic_vid != 0 {
            vmm_hw::backend::ApicVirt::all()
        } else {
            vmm_hw::backend::ApicVirt::all().difference(vmm_hw::backend::ApicVirt::INTERRUPTS)
        },
        avic: backend.use_avic(match info.use_avic {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        }),
        backend,
    };
    #[cfg(feature = "freebsd")]
    capabilities::tell(&g);
    // SAFETY: the first thing that happens.
    unsafe { global::set(g) };
    0
}

/// How long HLT is waited out awake, TSC ticks: at most ten milliseconds, whatever
/// the host says.
fn halt_poll(info: &ffi::HostInfo) -> u64 {
    let us = u64::from(info.halt_poll_us.min(10_000));
    (info.tsc_hz / 1_000_000).saturating_mul(us)
}

/// The vector of posted interrupts: where the CPU has them, virtual-interrupt
/// delivery is in use, and the host's interrupts go through its IDT, which they do
/// not with FRED (Intel, "Flexible Return and Event Delivery", §5).
fn posted_vector(backend: &vmm_hw::backend::Backend<os::Os>, info: &ffi::HostInfo) -> u8 {
    use vmm_hw::backend::ApicVirt;
    const CR4_FRED: u64 = 1 << 32;
    // SAFETY: CPL 0.
    let fred = unsafe { vmm_hw::instr::read_cr4() } & CR4_FRED != 0;
    if info.use_apic_vid == 0 || fred || !backend.apic_virt().contains(ApicVirt::POSTED) {
        return 0;
    }
    u8::try_from(info.posted_vector).unwrap_or(0)
}

/// Has the host's handler of an interrupt run that the CPU has acknowledged.
///
/// # Safety
/// Interrupts are off; the vector is that of an interrupt that a VM exit has
/// just acknowledged on this CPU.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmm_rust_interrupt(vector: c_uint) {
    if let Ok(vector) = u8::try_from(vector) {
        // SAFETY: by the caller's word.
        unsafe { vmm_hw::instr::host_interrupt(vector) };
    }
}

/// Says which weaknesses of the CPU guests can use.
fn warn_of_holes(m: &vmm_hw::mitigation::Mitigations, split_executable: bool) {
    for (open, text) in [
        (
            m.l1tf_without_flush,
            "L1TF: this CPU's microcode offers no L1D flush; guests may read host memory",
        ),
        (
            m.mds_without_clear,
            "MDS: this CPU's microcode lacks MD_CLEAR; guests may read host data",
        ),
        (
            m.itlb_multihit && !split_executable,
            "iTLB multihit (CVE-2018-12207): a malicious guest can bring this CPU down",
        ),
    ] {
        if open {
            klog!(Warning, "{text}");
        }
    }
}

/// At unload, after every CPU went through `vmm_rust_cpu_offline`.
///
/// # Safety
/// No VM exists and no other entry point runs.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmm_rust_exit() {
    // SAFETY: by the caller's word.
    unsafe { global::unset() };
    ppt::exit();
    iommu::exit();
}

fn set_vmxe(on: bool) {
    // SAFETY: interrupts are off, as in both callers' contracts.
    unsafe { ffi::vmm_host_set_vmxe(c_int::from(on)) }
}

/// VT-x or AMD-V on, on this CPU.
///
/// # Safety
/// The thread stays on this CPU.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmm_rust_cpu_online() -> c_int {
    let Some(g) = global::try_get() else {
        return errno::ENXIO;
    };
    // SAFETY: restored below; CPL 0 with interrupts off.
    let on = unsafe {
        let flags = ffi::vmm_host_irq_save();
        let on = g.backend.cpu_on(set_vmxe);
        ffi::vmm_host_irq_restore(flags);
        on
    };
    match on {
        Ok(()) => 0,
        Err(e) => {
            klog!(Error, "CPU {}: {e}", os::Os::cpu());
            if e.in_use() {
                errno::EBUSY
            } else {
                errno::ENXIO
            }
        }
    }
}

/// The host has slept.
#[unsafe(no_mangle)]
pub extern "C" fn vmm_rust_resume() {
    iommu::resume();
}

/// The host is about to sleep.
#[cfg(not(feature = "freebsd"))]
#[unsafe(no_mangle)]
pub extern "C" fn vmm_rust_suspend() {
    iommu::suspend();
}

/// VT-x or AMD-V off, on this CPU.
///
/// # Safety
/// The thread stays on this CPU; no vCPU in the guest here.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmm_rust_cpu_offline() {
    if let Some(g) = global::try_get() {
        // SAFETY: restored at once, and by the caller's word.
        unsafe {
            let flags = ffi::vmm_host_irq_save();
            g.backend.cpu_off(set_vmxe);
            ffi::vmm_host_irq_restore(flags);
        }
    }
}

/// A timer has fired.
///
/// # Safety
/// `arg` is what `Timer::new` got.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmm_rust_timer(arg: *mut c_void) {
    let p = arg.cast::<u8>();
    if p.is_null() {
        iommu::poll();
    } else if p as usize & 1 != 0 {
        // SAFETY: odd pointers are one past a vCPU, which owns the timer.
        unsafe { (*p.wrapping_sub(1).cast::<Vcpu>()).timer_fired() }
    } else {
        // SAFETY: even ones are a VM, which owns the timer.
        unsafe { (*p.cast::<Vm>()).timer_fired() }
    }
}

/// One more open file.
///
/// # Safety
/// `vm` is alive.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmm_rust_vm_get(vm: *mut c_void) {
    // SAFETY: by the caller's word.
    unsafe { Vm::get(vm.cast()) }
}

/// One open file less.
///
/// # Safety
/// Pairs with `vmm_rust_vm_get`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmm_rust_vm_put(vm: *mut c_void) {
    // SAFETY: by the caller's word.
    unsafe { Vm::put(vm.cast()) }
}

/// A request on /dev/vmm/NAME, or on /dev/vmmctl (`vm` is NULL), whose structure
/// is at `user`.
///
/// # Safety
/// `vm` is alive, if any.
#[cfg(not(feature = "freebsd"))]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmm_rust_ioctl(vm: *mut c_void, cmd: u32, user: u64) -> c_int {
    let unmap = |from, len| {
        // SAFETY: by the caller's word; whatever it unmaps comes back as needed.
        unsafe { ffi::vmm_host_unmap(vm, from, len) }
    };
    // SAFETY: by the caller's word.
    let vm = unsafe { vm.cast::<Vm>().as_ref() };
    copied::ioctl(vm, cmd, user, unmap).err().unwrap_or(0)
}

/// A request on /dev/vmmctl.
///
/// # Safety
/// `data` is writable for `len` bytes.
#[cfg(feature = "freebsd")]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmm_rust_ctl_ioctl(cmd: u32, data: *mut u8, len: usize) -> c_int {
    // SAFETY: by the caller's word.
    let data = unsafe { slice::from_raw_parts_mut(data, len) };
    ioctl::ctl(cmd, data).err().unwrap_or(0)
}

/// A request on /dev/vmm/NAME.
///
/// # Safety
/// `vm` is alive; `data` is writable for `len` bytes.
#[cfg(feature = "freebsd")]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmm_rust_vm_ioctl(
    vm: *mut c_void,
    cmd: u32,
    data: *mut u8,
    len: usize,
) -> c_int {
    // SAFETY: by the caller's word.
    let (vm, data) = unsafe { (&*vm.cast::<Vm>(), slice::from_raw_parts_mut(data, len)) };
    ioctl::vm(vm, cmd, data).err().unwrap_or(0)
}

/// VM_EXT_RUN_PAGE with its argument, for hosts that can tell it from the
/// other requests early: it is the one that has to be fast.
///
/// # Safety
/// `vm` is alive.
#[unsafe(no_mangle)]
#[optimize(speed)]
pub unsafe extern "C" fn vmm_rust_vm_run(vm: *mut c_void, arg: u32) -> c_int {
    // SAFETY: by the caller's word.
    let vm = unsafe { &*vm.cast::<Vm>() };
    ioctl::run_page(vm, arg).err().unwrap_or(0)
}

/// The page behind an address of a VM's memory, for mapping it.
///
/// # Safety
/// `vm` is alive; `pa` is writable.
#[cfg(feature = "freebsd")]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmm_rust_vm_page(
    vm: *mut c_void,
    segid: c_int,
    off: u64,
    pa: *mut u64,
) -> c_int {
    // SAFETY: by the caller's word.
    let (vm, pa) = unsafe { (&*vm.cast::<Vm>(), &mut *pa) };
    match vm.with_page(segid, off, Ok) {
        Ok(hpa) => {
            *pa = hpa;
            0
        }
        Err(e) => e,
    }
}

/// Has the page behind an address of a VM's memory mapped: where memory can be
/// released, it has to stay there until it is.
///
/// # Safety
/// `vm` is alive; `fault` is what `vmm_host_map_page` wants.
#[cfg(not(feature = "freebsd"))]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmm_rust_vm_fault(
    vm: *mut c_void,
    segid: c_int,
    off: u64,
    fault: *mut c_void,
) -> c_int {
    // SAFETY: by the caller's word.
    let vm = unsafe { &*vm.cast::<Vm>() };
    // SAFETY: by the caller's word; the page is the VM's.
    let map = |hpa| match unsafe { ffi::vmm_host_map_page(fault, hpa) } {
        0 => Ok(()),
        e => Err(e),
    };
    vm.with_page(segid, off, map).err().unwrap_or(0)
}

/// Whether a stretch of a VM's memory can be mapped.
///
/// # Safety
/// `vm` is alive.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmm_rust_vm_mmap_ok(
    vm: *mut c_void,
    segid: c_int,
    off: u64,
    len: u64,
) -> c_int {
    // SAFETY: by the caller's word.
    let vm = unsafe { &*vm.cast::<Vm>() };
    vm.mmap_ok(segid, off, len).err().unwrap_or(0)
}

/// The segment behind a stretch of a VM's memory, and where in it that starts:
/// for a host that maps segments as a whole. The segment lives as long as the VM.
///
/// # Safety
/// `vm` is alive; `seg` and `seg_off` are writable.
#[cfg(feature = "freebsd")]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmm_rust_vm_segment(
    vm: *mut c_void,
    segid: c_int,
    off: u64,
    len: u64,
    seg: *mut *mut ffi::Memseg,
    seg_off: *mut u64,
) -> c_int {
    // SAFETY: by the caller's word.
    let vm = unsafe { &*vm.cast::<Vm>() };
    match vm.segment_at(segid, off, len) {
        Ok((raw, at)) => {
            // SAFETY: by the caller's word.
            unsafe {
                seg.write(raw.as_ptr());
                seg_off.write(at);
            }
            0
        }
        Err(e) => e,
    }
}

/// ppt got a PCI function.
///
/// # Safety
/// The pointers are the host's own for it, and stay good until
/// `vmm_rust_ppt_remove`; `resources` are those that host.h speaks of.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmm_rust_ppt_add(
    device: *mut c_void,
    generic: *mut c_void,
    resources: *const c_void,
    stride: usize,
    rid: u32,
) -> c_int {
    // SAFETY: by the caller's word.
    let host = unsafe { ppt::host::Device::new(device, generic, resources, stride) };
    ppt::add(host, rid as u16).err().unwrap_or(0)
}

/// Whether a tunable gives ppt a PCI function.
#[unsafe(no_mangle)]
pub extern "C" fn vmm_rust_ppt_wanted(rid: u32) -> c_int {
    c_int::from(ppt::host::wanted(rid as u16))
}

/// Whether a VM has a PCI function.
#[unsafe(no_mangle)]
pub extern "C" fn vmm_rust_ppt_busy(device: *mut c_void) -> c_int {
    c_int::from(ppt::busy(device))
}

/// The host is about to sleep, and ppt's function with it.
#[cfg(not(feature = "freebsd"))]
#[unsafe(no_mangle)]
pub extern "C" fn vmm_rust_ppt_suspend(device: *mut c_void) -> c_int {
    ppt::suspend(device);
    0
}

/// The host has slept, and ppt's function with it.
#[unsafe(no_mangle)]
pub extern "C" fn vmm_rust_ppt_resume(device: *mut c_void) -> c_int {
    ppt::resume(device);
    0
}

/// ppt loses a PCI function.
///
/// # Safety
/// Pairs with a `vmm_rust_ppt_add` that returned 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmm_rust_ppt_remove(device: *mut c_void) {
    ppt::remove(device);
}
