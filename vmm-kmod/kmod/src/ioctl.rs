//! The requests of /dev/vmm/NAME and /dev/vmmctl.

mod registers;

use core::sync::atomic::Ordering;

use vmm_abi::layout::*;
use vmm_abi::request as req;
use vmm_abi::{CpusetWhich, IntrTrigger, X2apicState};
use vmm_core::chipset::Chipset;
use vmm_core::cpu::{Gpr, Reg};
use vmm_core::rtc::RtcError;
use vmm_hw::backend::ApicMode;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::errno;
use crate::memory::Map;
use crate::os;
use crate::ppt;
use crate::regs;
use crate::run;
use crate::vcpu::{Inner, Vcpu};
use crate::vm::{Sink, Vm};

/// The request's structure, in place.
fn arg<T: FromBytes + IntoBytes + KnownLayout + Immutable>(data: &mut [u8]) -> Result<&mut T, i32> {
    T::mut_from_bytes(data).map_err(|_| errno::EINVAL)
}

/// A request on the control device.
pub fn ctl(cmd: u32, data: &mut [u8]) -> Result<(), i32> {
    match cmd {
        req::VMMCTL_VM_CREATE => {
            let a: &mut VmmctlVm = arg(data)?;
            Vm::create(c_name(&a.name).ok_or(errno::EINVAL)?)
        }
        req::VMMCTL_VM_DESTROY => {
            let a: &mut VmmctlVm = arg(data)?;
            Vm::destroy(c_name(&a.name).ok_or(errno::EINVAL)?)
        }
        req::VM_EXT_VERSION => ext_version(data),
        _ => Err(errno::ENOTTY),
    }
}

fn ext_version(data: &mut [u8]) -> Result<(), i32> {
    let a: &mut VmExtVersion = arg(data)?;
    let bells = if crate::global::get().events {
        EXT_F_DOORBELL
    } else {
        0
    };
    let seek = if crate::global::get().run_by_seek {
        EXT_F_RUN_SEEK
    } else {
        0
    };
    *a = VmExtVersion {
        abi_version: EXT_ABI_VERSION,
        features: EXT_F_RUN
            | EXT_F_CONSTANT_PORT
            | EXT_F_RUN_PAGE
            | EXT_F_RUN_GPRS
            | EXT_F_OUT_RING
            | EXT_F_PV
            | EXT_F_TSC
            | EXT_F_RELEASE
            | bells
            | seek,
    };
    Ok(())
}

/// VM_EXT_RUN_PAGE.
#[inline(always)]
pub fn run_page(vm: &Vm, arg: u32) -> Result<(), i32> {
    let flags = arg >> EXT_RUN_SHIFT;
    if flags & !(EXT_RUN_RAX | EXT_RUN_MSI | EXT_RUN_GPRS) != 0 {
        return Err(errno::EINVAL);
    }
    let id = arg & ((1 << EXT_RUN_SHIFT) - 1);
    let vcpu = vm.vcpu(id as usize).ok_or(errno::EINVAL)?;
    if flags & EXT_RUN_MSI != 0 {
        for (address, data) in vcpu.run_page.msis() {
            // A guest that chose a wrong address gets no interrupt.
            if let Ok(message) = vmm_core::apicbus::ApicMessage::from_msi(address, data) {
                vm.deliver(&message);
            }
        }
    }
    let mut inner = vcpu.freeze();
    if flags & EXT_RUN_RAX != 0 {
        inner.hw.set_gpr(Gpr::Rax, vcpu.run_page.rax());
    }
    if flags & EXT_RUN_GPRS != 0 {
        take_registers(vcpu, &mut inner)?;
    }
    run::run(vm, vcpu, &mut inner)?;
    vcpu.run_page.put(&inner.exit);
    Ok(())
}

/// Sets the registers that an instruction changed which userland has emulated.
/// EINVAL: there is no such register.
#[inline(never)]
#[optimize(speed)]
fn take_registers(vcpu: &Vcpu, inner: &mut Inner) -> Result<(), i32> {
    // VT-x keeps these two in the VMCS.
    const IN_VMCS: u64 = 1 << Gpr::Rsp as u8 | EXT_RUN_CHANGED_RFLAGS;
    let changed = vcpu.run_page.changed();
    if changed >> EXT_RUN_GPR_COUNT & !(EXT_RUN_CHANGED_RFLAGS >> EXT_RUN_GPR_COUNT) != 0 {
        return Err(errno::EINVAL);
    }
    for (r, value) in vcpu.run_page.gprs(changed & !IN_VMCS) {
        inner.hw.set_gpr(r, value);
    }
    if changed & IN_VMCS != 0 {
        let page = &vcpu.run_page;
        let rflags = page.rflags();
        regs::with_current(inner, |inner| {
            for (r, value) in page.gprs(changed & IN_VMCS) {
                inner.hw.set_gpr(r, value);
            }
            if changed & EXT_RUN_CHANGED_RFLAGS != 0 {
                inner.hw.set_reg(Reg::Rflags, rflags);
            }
        });
    }
    Ok(())
}

/// A request on a VM's device.
pub fn vm(vm: &Vm, cmd: u32, data: &mut [u8]) -> Result<(), i32> {
    if vm.dying() {
        return Err(errno::ENXIO);
    }
    if cmd == req::VM_RUN {
        let a: &mut VmRun = arg(data)?;
        let vcpu = existing(vm, a.cpuid)?;
        let mut inner = vcpu.freeze();
        run::run(vm, vcpu, &mut inner)?;
        a.vm_exit = inner.exit;
        return Ok(());
    }
    match cmd {
        req::VM_EXT_RUN => {
            let a: &mut VmExtRun = arg(data)?;
            if a.flags & !EXT_RUN_RAX != 0 {
                return Err(errno::EINVAL);
            }
            let vcpu = existing(vm, a.cpuid)?;
            let mut inner = vcpu.freeze();
            if a.flags & EXT_RUN_RAX != 0 {
                inner.hw.set_gpr(Gpr::Rax, a.rax);
            }
            run::run(vm, vcpu, &mut inner)?;
            a.vm_exit = inner.exit;
            Ok(())
        }
        req::VM_EXT_RUN_PAGE => {
            let a: &mut i32 = arg(data)?;
            // SAFETY: the VM is alive.
            match unsafe {
                crate::vmm_rust_vm_run(core::ptr::from_ref(vm).cast_mut().cast(), *a as u32)
            } {
                0 => Ok(()),
                error => Err(error),
            }
        }
        req::VM_EXT_CONSTANT_PORT => {
            let a: &mut VmExtConstantPort = arg(data)?;
            let value = match a.on {
                0 => None,
                1 => Some(u8::try_from(a.value).map_err(|_| errno::EINVAL)?),
                _ => return Err(errno::EINVAL),
            };
            vm.constant_ports.set(a.port, value)
        }
        req::VM_EXT_DOORBELL => {
            let a: &mut VmExtDoorbell = arg(data)?;
            if a.flags & !(DOORBELL_ON | DOORBELL_VALUE) != 0 || a._pad0 != 0 {
                return Err(errno::EINVAL);
            }
            let value = (a.flags & DOORBELL_VALUE != 0).then_some(a.value);
            let event = if a.flags & DOORBELL_ON != 0 {
                Some(crate::sync::Event::of(a.fd).ok_or(errno::EINVAL)?)
            } else {
                None
            };
            vm.doorbells.set(a.port, value, event)
        }
        req::VM_EXT_PV => {
            let a: &mut VmExtPv = arg(data)?;
            vm.set_tsc(a.tsc_khz)?;
            vm.set_pv(a.features);
            Ok(())
        }
        req::VM_EXT_OUT_RING => {
            let a: &mut VmExtOutRing = arg(data)?;
            let port = match a.on {
                0 => None,
                1 => Some(a.port),
                _ => return Err(errno::EINVAL),
            };
            vm.out_rings.set(a.ring as usize, port)
        }
        req::VM_RUN_14 => {
            let a: &mut VmRun14 = arg(data)?;
            let vcpu = existing(vm, a.cpuid)?;
            let mut inner = vcpu.freeze();
            run::run(vm, vcpu, &mut inner)?;
            let exit = inner.exit;
            drop(inner);
            os::copyout(exit.as_bytes(), a.vm_exit)
        }
        req::VM_SUSPEND => {
            let a: &mut VmSuspend = arg(data)?;
            vm.suspend(a.how)
        }
        req::VM_REINIT => vm.reinit(),
        req::VM_EXT_VERSION => ext_version(data),
        _ => match registers::registers(vm, cmd, data) {
            Err(NOT_MINE) => match interrupts(vm, cmd, data) {
                Err(NOT_MINE) => match guest_memory(vm, cmd, data) {
                    Err(NOT_MINE) => match settings(vm, cmd, data) {
                        Err(NOT_MINE) => Err(errno::ENOTTY),
                        r => r,
                    },
                    r => r,
                },
                r => r,
            },
            r => r,
        },
    }
}

/// A group of requests does not know this one. Each is a function of its own, with a
/// frame that small offsets reach.
const NOT_MINE: i32 = -1;

fn existing(vm: &Vm, id: i32) -> Result<&Vcpu, i32> {
    usize::try_from(id)
        .ok()
        .and_then(|id| vm.vcpu(id))
        .ok_or(errno::EINVAL)
}

/// Does `f` with the vCPU out of the guest and its VMCS current.
fn stopped<R>(vm: &Vm, id: i32, f: impl FnOnce(&mut Inner) -> Result<R, i32>) -> Result<R, i32> {
    let vcpu = vm.ensure_vcpu(id)?;
    let mut inner = vcpu.freeze();
    regs::with_current(&mut inner, f)
}

#[inline(never)]
fn interrupts(vm: &Vm, cmd: u32, data: &mut [u8]) -> Result<(), i32> {
    match cmd {
        req::VM_INJECT_NMI => {
            let a: &mut VmNmi = arg(data)?;
            let vcpu = vm.ensure_vcpu(a.cpuid)?;
            vcpu.mailbox.post_nmi();
            vcpu.kick();
            Ok(())
        }
        req::VM_LAPIC_IRQ => {
            let a: &mut VmLapicIrq = arg(data)?;
            let vector = u8::try_from(a.vector).map_err(|_| errno::EINVAL)?;
            if vector < 16 {
                return Err(errno::EINVAL);
            }
            let vcpu = existing(vm, a.cpuid)?;
            vcpu.mailbox.post(vector, false);
            vcpu.kick();
            Ok(())
        }
        req::VM_LAPIC_LOCAL_IRQ => {
            let a: &mut VmLapicIrq = arg(data)?;
            let lvt = u32::try_from(a.vector)
                .ok()
                .and_then(vmm_core::lapic::Lvt::from_index)
                .ok_or(errno::EINVAL)?;
            let post = |v: &Vcpu| {
                v.mailbox.post_local(lvt);
                v.kick();
            };
            if a.cpuid == -1 {
                vm.vcpus().for_each(post);
            } else {
                post(existing(vm, a.cpuid)?);
            }
            Ok(())
        }
        req::VM_LAPIC_MSI => {
            let a: &mut VmLapicMsi = arg(data)?;
            let message = vmm_core::apicbus::ApicMessage::from_msi(a.addr, a.msg)
                .map_err(|_| errno::EINVAL)?;
            vm.deliver(&message);
            Ok(())
        }
        req::VM_IOAPIC_ASSERT_IRQ
        | req::VM_IOAPIC_DEASSERT_IRQ
        | req::VM_IOAPIC_PULSE_IRQ
        | req::VM_ISA_ASSERT_IRQ
        | req::VM_ISA_DEASSERT_IRQ
        | req::VM_ISA_PULSE_IRQ
        | req::VM_ISA_SET_IRQ_TRIGGER => {
            vm.with_chipset(|chipset, _, sink| pin(chipset, sink, cmd, data))
        }
        req::VM_IOAPIC_PINCOUNT => {
            let a: &mut i32 = arg(data)?;
            *a = vm.chipset.lock().ioapic.pin_count() as i32;
            Ok(())
        }
        _ => Err(NOT_MINE),
    }
}

/// One of the requests about an input of the interrupt controllers.
fn pin(c: &mut Chipset, sink: &mut Sink<'_>, cmd: u32, data: &mut [u8]) -> Result<(), i32> {
    match cmd {
        req::VM_IOAPIC_ASSERT_IRQ | req::VM_IOAPIC_DEASSERT_IRQ | req::VM_IOAPIC_PULSE_IRQ => {
            let a: &mut VmIoapicIrq = arg(data)?;
            let pin = u32::try_from(a.irq).map_err(|_| errno::EINVAL)?;
            match cmd {
                req::VM_IOAPIC_ASSERT_IRQ => c.ioapic_assert(pin, sink),
                req::VM_IOAPIC_DEASSERT_IRQ => c.ioapic_deassert(pin),
                _ => c.ioapic_pulse(pin, sink),
            }
        }
        req::VM_ISA_SET_IRQ_TRIGGER => {
            let a: &mut VmIsaIrqTrigger = arg(data)?;
            let level = match IntrTrigger::from_raw(a.trigger) {
                Some(IntrTrigger::Level) => true,
                Some(IntrTrigger::Edge) => false,
                None => return Err(errno::EINVAL),
            };
            let irq = u8::try_from(a.atpic_irq).map_err(|_| errno::EINVAL)?;
            c.set_irq_trigger(irq, level)
        }
        _ => {
            let a: &mut VmIsaIrq = arg(data)?;
            let irq = u8::try_from(a.atpic_irq).map_err(|_| errno::EINVAL)?;
            let pin = match a.ioapic_irq {
                -1 => None,
                pin => Some(u8::try_from(pin).map_err(|_| errno::EINVAL)?),
            };
            match cmd {
                req::VM_ISA_ASSERT_IRQ => c.isa_assert(irq, pin, sink),
                req::VM_ISA_DEASSERT_IRQ => c.isa_deassert(irq, pin, sink),
                _ => c.isa_pulse(irq, pin, sink),
            }
        }
    }
    .map_err(|_| errno::EINVAL)
}

#[inline(never)]
fn guest_memory(vm: &Vm, cmd: u32, data: &mut [u8]) -> Result<(), i32> {
    match cmd {
        req::VM_ALLOC_MEMSEG => {
            let a: &mut VmMemseg = arg(data)?;
            vm.alloc_memseg(a.segid, a.len, &a.name)
        }
        req::VM_ALLOC_MEMSEG_13 => {
            let a: &mut VmMemseg13 = arg(data)?;
            vm.alloc_memseg(a.segid, a.len, &a.name)
        }
        req::VM_ALLOC_MEMSEG_15 => {
            let a: &mut VmMemseg15 = arg(data)?;
            vm.alloc_memseg(a.segid, a.len, &a.name)
        }
        req::VM_GET_MEMSEG => {
            let a: &mut VmMemseg = arg(data)?;
            a.len = vm.get_memseg(a.segid, &mut a.name)?;
            Ok(())
        }
        req::VM_GET_MEMSEG_13 => {
            let a: &mut VmMemseg13 = arg(data)?;
            a.len = vm.get_memseg(a.segid, &mut a.name)?;
            Ok(())
        }
        req::VM_GET_MEMSEG_15 => {
            let a: &mut VmMemseg15 = arg(data)?;
            a.len = vm.get_memseg(a.segid, &mut a.name)?;
            Ok(())
        }
        req::VM_EXT_RELEASE => {
            let a: &mut VmExtRelease = arg(data)?;
            a.released = vm.release_memory(a.gpa, a.len)?;
            Ok(())
        }
        req::VM_MMAP_MEMSEG => {
            let a: &mut VmMemmap = arg(data)?;
            let map = Map {
                gpa: a.gpa,
                len: a.len,
                segid: usize::try_from(a.segid).map_err(|_| errno::EINVAL)?,
                segoff: u64::try_from(a.segoff).map_err(|_| errno::EINVAL)?,
                prot: a.prot,
                flags: a.flags,
            };
            vm.mmap_memseg(map)
        }
        req::VM_MMAP_GETNEXT => {
            let a: &mut VmMemmap = arg(data)?;
            let m = vm.mem.lock().map.next(a.gpa).ok_or(errno::ENOENT)?;
            *a = VmMemmap {
                gpa: m.gpa,
                segid: m.segid as i32,
                segoff: m.segoff as i64,
                len: m.len,
                prot: m.prot,
                flags: m.flags,
                ..VmMemmap::default()
            };
            Ok(())
        }
        req::VM_MUNMAP_MEMSEG => {
            let a: &mut VmMunmap = arg(data)?;
            vm.munmap_memseg(a.gpa, a.len)
        }
        req::VM_GET_GPA_PMAP => {
            let a: &mut VmGpaPte = arg(data)?;
            let mem = vm.mem.lock();
            let (ptes, n) = mem.nested.walk(a.gpa);
            a.pte = ptes;
            a.ptenum = n as i32;
            Ok(())
        }
        _ => Err(NOT_MINE),
    }
}

#[inline(never)]
fn settings(vm: &Vm, cmd: u32, data: &mut [u8]) -> Result<(), i32> {
    match cmd {
        req::VM_SET_X2APIC_STATE => {
            let a: &mut VmX2apic = arg(data)?;
            let on = match X2apicState::from_raw(a.state) {
                Some(X2apicState::Enabled) => true,
                Some(X2apicState::Disabled) => false,
                None => return Err(errno::EINVAL),
            };
            let vcpu = vm.ensure_vcpu(a.cpuid)?;
            let mut inner = vcpu.freeze();
            inner.lapic.offer_x2apic(on);
            inner.config_gen = 0;
            inner.cpuid_gen = 0;
            let mode = inner.lapic_mode();
            regs::with_current(&mut inner, |i| i.hw.set_apic_mode(mode));
            vm.apic_mode_changed(vcpu.id as usize, mode == ApicMode::XApic)
        }
        req::VM_GET_X2APIC_STATE => {
            let a: &mut VmX2apic = arg(data)?;
            let vcpu = vm.ensure_vcpu(a.cpuid)?;
            let on = vcpu.freeze().lapic.x2apic_offered();
            a.state = if on {
                X2apicState::Enabled
            } else {
                X2apicState::Disabled
            }
            .raw();
            Ok(())
        }
        req::VM_GET_HPET_CAPABILITIES => {
            let a: &mut VmHpetCap = arg(data)?;
            a.capabilities = vm.chipset.lock().hpet.capabilities() as u32;
            Ok(())
        }
        req::VM_SET_TOPOLOGY => {
            let a: &mut VmCpuTopology = arg(data)?;
            vm.set_topology(a)
        }
        req::VM_GET_TOPOLOGY => {
            let a: &mut VmCpuTopology = arg(data)?;
            let t = vm.topology();
            *a = VmCpuTopology {
                sockets: t.sockets,
                cores: t.cores,
                threads: t.threads,
                maxcpus: crate::cpuset::MAX_VCPUS as u16,
            };
            Ok(())
        }
        req::VM_ACTIVATE_CPU => {
            let a: &mut VmActivateCpu = arg(data)?;
            vm.activate(a.vcpuid)
        }
        req::VM_SUSPEND_CPU => {
            let a: &mut VmActivateCpu = arg(data)?;
            vm.debug_cpu(a.vcpuid, true)
        }
        req::VM_RESUME_CPU => {
            let a: &mut VmActivateCpu = arg(data)?;
            vm.debug_cpu(a.vcpuid, false)
        }
        req::VM_GET_CPUS => {
            let a: &mut VmCpuset = arg(data)?;
            let set = match CpusetWhich::from_raw(a.which as u32) {
                Some(CpusetWhich::Active) => &vm.active,
                Some(CpusetWhich::Suspended) => &vm.suspended,
                Some(CpusetWhich::Debug) => &vm.debug,
                _ => return Err(errno::EINVAL),
            };
            let mut bytes = [0; crate::cpuset::MAX_VCPUS / 8];
            let size = usize::try_from(a.cpusetsize).map_err(|_| errno::ERANGE)?;
            if size < set.bytes_needed().max(8) {
                return Err(errno::ERANGE);
            }
            let bytes = bytes.get_mut(..size).ok_or(errno::ERANGE)?;
            set.bytes(bytes);
            os::copyout(bytes, a.cpus)
        }
        req::VM_RTC_READ | req::VM_RTC_WRITE | req::VM_RTC_SETTIME | req::VM_RTC_GETTIME => {
            vm.with_chipset(|chipset, now, _| rtc(chipset, now, cmd, data))
        }
        req::VM_STATS => {
            let a: &mut VmStats = arg(data)?;
            (a.num_entries, a.tv) = vm.stats(a.cpuid, 0, &mut a.statbuf)?;
            Ok(())
        }
        req::VM_STATS_14 => {
            let a: &mut VmStats14 = arg(data)?;
            let first = usize::try_from(a.index).map_err(|_| errno::EINVAL)?;
            (a.num_entries, a.tv) = vm.stats(a.cpuid, first, &mut a.statbuf)?;
            Ok(())
        }
        req::VM_STAT_DESC => {
            let a: &mut VmStatDesc = arg(data)?;
            let index = usize::try_from(a.index).map_err(|_| errno::EINVAL)?;
            let text = vmm_core::stats::description(index).ok_or(errno::EINVAL)?;
            if set_c_name(&mut a.desc, text.as_bytes()) {
                Ok(())
            } else {
                Err(errno::EINVAL)
            }
        }
        _ => passthrough(vm, cmd, data),
    }
}

/// One of the requests about the clock.
fn rtc(c: &mut Chipset, now: u64, cmd: u32, data: &mut [u8]) -> Result<(), i32> {
    match cmd {
        req::VM_RTC_READ => {
            let a: &mut VmRtcData = arg(data)?;
            a.value = c.rtc_read(a.offset, now).map_err(|_| errno::EINVAL)?;
        }
        req::VM_RTC_WRITE => {
            let a: &mut VmRtcData = arg(data)?;
            c.rtc_write(a.offset, a.value, now)
                .map_err(|_| errno::EINVAL)?;
        }
        req::VM_RTC_SETTIME => {
            let a: &mut VmRtcTime = arg(data)?;
            c.rtc_settime(a.secs, now).map_err(|e| match e {
                RtcError::Busy => errno::EBUSY,
                _ => errno::EINVAL,
            })?;
        }
        _ => {
            let a: &mut VmRtcTime = arg(data)?;
            a.secs = c.rtc_gettime(now);
        }
    }
    Ok(())
}

#[inline(never)]
fn passthrough(vm: &Vm, cmd: u32, data: &mut [u8]) -> Result<(), i32> {
    match cmd {
        req::VM_BIND_PPTDEV => {
            let a: &mut VmPptdev = arg(data)?;
            ppt::bind(vm, ppt::rid(a.bus, a.slot, a.func)?)
        }
        req::VM_UNBIND_PPTDEV => {
            let a: &mut VmPptdev = arg(data)?;
            ppt::unbind(vm, ppt::rid(a.bus, a.slot, a.func)?)
        }
        req::VM_MAP_PPTDEV_MMIO => {
            let a: &mut VmPptdevMmio = arg(data)?;
            let rid = ppt::rid(a.bus, a.slot, a.func)?;
            ppt::map_mmio(vm, rid, a.gpa, a.hpa, a.len)
        }
        req::VM_UNMAP_PPTDEV_MMIO => {
            let a: &mut VmPptdevMmio = arg(data)?;
            let rid = ppt::rid(a.bus, a.slot, a.func)?;
            ppt::unmap_mmio(vm, rid, a.gpa, a.len)
        }
        req::VM_PPTDEV_MSI => {
            let a: &mut VmPptdevMsi = arg(data)?;
            let rid = ppt::rid(a.bus, a.slot, a.func)?;
            ppt::msi(vm, rid, a.numvec, a.addr, a.msg)
        }
        req::VM_PPTDEV_MSIX => {
            let a: &mut VmPptdevMsix = arg(data)?;
            let rid = ppt::rid(a.bus, a.slot, a.func)?;
            let index = usize::try_from(a.idx).map_err(|_| errno::EINVAL)?;
            let masked = a.vector_control & 1 != 0;
            ppt::msix(vm, rid, index, (!masked).then_some((a.addr, a.msg)))
        }
        req::VM_PPTDEV_DISABLE_MSIX => {
            let a: &mut VmPptdev = arg(data)?;
            ppt::disable_msix(vm, ppt::rid(a.bus, a.slot, a.func)?)
        }
        _ => Err(NOT_MINE),
    }
}

impl Vm {
    fn set_topology(&self, a: &VmCpuTopology) -> Result<(), i32> {
        // As FreeBSD: maxcpus cannot be set.
        if a.maxcpus != 0 || a.sockets == 0 || a.cores == 0 || a.threads == 0 {
            return Err(errno::EINVAL);
        }
        let total = usize::from(a.sockets)
            .checked_mul(usize::from(a.cores))
            .and_then(|n| n.checked_mul(usize::from(a.threads)));
        if total.is_none_or(|n| n > crate::cpuset::MAX_VCPUS) {
            return Err(errno::EINVAL);
        }
        self.store_topology(a.sockets, a.cores, a.threads);
        self.config_gen.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }

    fn activate(&self, id: i32) -> Result<(), i32> {
        let vcpu = self.ensure_vcpu(id)?;
        if self.set_active(vcpu.id as usize) {
            Ok(())
        } else {
            Err(errno::EBUSY)
        }
    }

    fn debug_cpu(&self, id: i32, stop: bool) -> Result<(), i32> {
        if id == -1 {
            for v in self.vcpus() {
                if stop && self.active.contains(v.id as usize) {
                    self.debug.set(v.id as usize);
                    self.set_stop();
                } else {
                    self.debug.clear(v.id as usize);
                }
                v.poke();
            }
            return Ok(());
        }
        let vcpu = existing(self, id)?;
        let n = vcpu.id as usize;
        if !self.active.contains(n) {
            return Err(errno::EINVAL);
        }
        if stop {
            self.debug.set(n);
            self.set_stop();
            vcpu.poke();
        } else if !self.debug.clear(n) {
            return Err(errno::EINVAL);
        }
        Ok(())
    }

    fn stats(&self, id: i32, first: usize, to: &mut [u64]) -> Result<(i32, Timeval), i32> {
        let vcpu = self.ensure_vcpu(id)?;
        // What the VM holds is told with vCPU 0, as FreeBSD does.
        let resident = if vcpu.id == 0 {
            self.mem.lock().map.resident()
        } else {
            0
        };
        let mut n = 0;
        for (i, slot) in to.iter_mut().enumerate() {
            let Some(value) = vcpu.stats.value(first.saturating_add(i), resident) else {
                break;
            };
            *slot = value;
            n += 1;
        }
        Ok((
            n,
            Timeval {
                tv_sec: os::wallclock(),
                tv_usec: 0,
            },
        ))
    }
}
