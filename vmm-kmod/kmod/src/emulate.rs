//! Nested faults: memory is brought in, instructions that touch devices are
//! emulated here or handed to userland.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use vmm_abi::ExitCode;
use vmm_abi::exit::{Exit as UserExit, VmExit};
use vmm_abi::layout::VmGla2gpa;
use vmm_abi::raw_exit::{InstEmulRaw, Vie, VmExitRaw};
use vmm_core::apicbus::DeliveryMode;
use vmm_core::chipset::Chipset;
use vmm_core::cpu::{Access, CpuState, Event, Exit, Reg, Seg};
use vmm_core::inst::{self, Bus, BusError, CodeMode, DecodeError, Hint, Inst, Outcome};
use vmm_core::lapic::{Effect, Lapic};
use vmm_core::paging::{self, GuestPhys, Paging, WalkError};
use vmm_core::stats::Stat;
use vmm_hw::backend::{Completed, RunCpu, VirtualCpu};

use crate::errno;
use crate::memory::{self, GuestMemory};
use crate::os;
use crate::regs;
use crate::run::{Runner, Todo};
use crate::snapshot::Snapshot;
use crate::vcpu::{Inner, MailboxRef, Vcpu};
use crate::vm::Vm;

/// A guest-physical access that the nested page tables did not allow.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// Guest-physical address.
    pub gpa: u64,
    /// Guest-linear address, if the CPU told it.
    pub gla: Option<u64>,
    /// What was tried.
    pub access: Access,
    /// In a walk of the guest's page tables.
    pub during_walk: bool,
}

/// Where an access went.
struct Where {
    gpa: u64,
    gla: Option<u64>,
}

/// What became of the search for the instruction that caused an exit.
pub enum Found {
    /// The exit, complete.
    Exit(Exit),
    /// The guest's code or page tables have changed under the instruction: it
    /// is to be executed again.
    Again,
    /// Guest memory is needed that cannot be had with interrupts off.
    Later,
}

/// Whether a device of the kernel's answered.
enum Done {
    Yes,
    NotHere,
}

/// Memory and the kernel's devices.
struct KernelBus<'a> {
    vm: &'a Vm,
    lapic: &'a mut Lapic<MailboxRef>,
    mem: GuestMemory<'a>,
    walk: Paging,
    spinup: bool,
    apic_touched: bool,
}

impl KernelBus<'_> {
    fn in_apic(&self, gpa: u64) -> bool {
        self.lapic.mmio() && gpa & !0xfff == self.lapic.base_gpa()
    }
}

impl Bus for KernelBus<'_> {
    fn translate(&mut self, gla: u64, access: Access) -> Result<u64, WalkError> {
        paging::translate(&self.mem, &self.walk, gla, access)
    }

    fn read(&mut self, gpa: u64, size: u8) -> Result<u64, BusError> {
        if self.in_apic(gpa) {
            self.apic_touched = true;
            return Ok(u64::from(
                self.lapic.read((gpa & 0xfff) as u16, os::rdtsc()),
            ));
        }
        if Chipset::is_counter(gpa) {
            return Ok(self
                .vm
                .look_at_chipset(|c, now, sink| c.mmio_read(gpa, size, now, sink)));
        }
        if Chipset::claims_gpa(gpa) {
            return Ok(self
                .vm
                .with_chipset(|c, now, sink| c.mmio_read(gpa, size, now, sink)));
        }
        let mut bytes = [0; 8];
        let part = bytes
            .get_mut(..usize::from(size))
            .ok_or(BusError::NotHere)?;
        if self.mem.read(gpa, part) {
            Ok(u64::from_le_bytes(bytes))
        } else {
            Err(BusError::NotHere)
        }
    }

    fn write(&mut self, gpa: u64, size: u8, value: u64) -> Result<(), BusError> {
        if self.in_apic(gpa) {
            self.apic_touched = true;
            let effect = self
                .lapic
                .write((gpa & 0xfff) as u16, value as u32, os::rdtsc());
            self.spinup |= apply(self.vm, effect);
            return Ok(());
        }
        if Chipset::claims_gpa(gpa) {
            self.vm
                .with_chipset(|c, now, sink| c.mmio_write(gpa, size, value, now, sink));
            return Ok(());
        }
        let bytes = value.to_le_bytes();
        let part = bytes.get(..usize::from(size)).ok_or(BusError::NotHere)?;
        if self.mem.write(gpa, part) {
            Ok(())
        } else {
            Err(BusError::NotHere)
        }
    }
}

/// Does what a write of a local APIC's register asks of the rest of the VM;
/// true if it was INIT or a start-up IPI, which vCPUs that userland has not
/// started cannot take themselves.
#[optimize(speed)]
pub fn apply(vm: &Vm, effect: Effect) -> bool {
    match effect {
        Effect::None | Effect::TimerChanged | Effect::ModeChanged => false,
        Effect::Ipi(message) => {
            vm.deliver(&message);
            matches!(message.mode, DeliveryMode::StartUp | DeliveryMode::Init)
        }
        Effect::Eoi(vector) => {
            vm.with_chipset(|c, _, sink| c.eoi(vector, sink));
            false
        }
        Effect::ExtintUnmasked => {
            vm.with_chipset(|c, _, sink| c.refresh_lint0(sink));
            false
        }
    }
}

impl GuestPhys for GuestMemory<'_> {
    fn read(&self, gpa: u64, buf: &mut [u8]) -> bool {
        GuestMemory::read(self, gpa, buf)
    }

    fn read_u32(&self, gpa: u64) -> Option<u32> {
        let va = self.word(gpa, 4, memory::PROT_READ)?;
        // SAFETY: an aligned word of guest memory in the direct map, kept by
        // its segment; guest and host both access it atomically.
        let word = unsafe { AtomicU32::from_ptr(va as *mut u32) };
        Some(word.load(Ordering::Relaxed))
    }

    fn read_u64(&self, gpa: u64) -> Option<u64> {
        let va = self.word(gpa, 8, memory::PROT_READ)?;
        // SAFETY: as above.
        let word = unsafe { AtomicU64::from_ptr(va as *mut u64) };
        Some(word.load(Ordering::Relaxed))
    }

    fn cmpxchg_u32(&self, gpa: u64, old: u32, new: u32) -> Option<bool> {
        let va = self.word(gpa, 4, memory::PROT_WRITE)?;
        // SAFETY: as above.
        let word = unsafe { AtomicU32::from_ptr(va as *mut u32) };
        Some(
            word.compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok(),
        )
    }

    fn cmpxchg_u64(&self, gpa: u64, old: u64, new: u64) -> Option<bool> {
        let va = self.word(gpa, 8, memory::PROT_WRITE)?;
        // SAFETY: as above.
        let word = unsafe { AtomicU64::from_ptr(va as *mut u64) };
        Some(
            word.compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok(),
        )
    }
}

impl<C: RunCpu + 'static> Runner<'_, C> {
    /// Completes an exit with the instruction that caused it: for CPUs that do
    /// not tell its length or its operands.
    #[inline]
    pub fn instruction_at_once(&mut self, exit: Exit) -> Found {
        let walk = self.paging(&self.inner.hw);
        let at = code_address(&self.inner.hw, self.inner.hw.reg(Reg::Rip));
        let generation = self.vm.generation.current();
        if let Some(bytes) = self.inner.code.bytes(&walk, at, generation)
            && self.inner.hw.complete_plain(exit, bytes)
        {
            return Found::Exit(exit);
        }
        self.fetch_at_once(exit, &walk, at, generation)
    }

    #[cold]
    fn fetch_at_once(&mut self, exit: Exit, walk: &Paging, at: u64, generation: u64) -> Found {
        let Some(mem) = self.vm.mem.try_lock() else {
            return Found::Later;
        };
        let guest = mem.map.guest_known();
        let fetched = self.inner.code.fetch(&guest, walk, at, generation);
        drop(mem);
        self.complete(exit, &fetched)
    }

    /// The same outside the inner loop. None: the guest is to be entered
    /// again.
    pub fn instruction_of(&mut self, exit: Exit) -> Result<Option<Exit>, i32> {
        let cpu = snapshot(self.inner);
        let walk = self.paging(&cpu);
        let mem = self.vm.mem.lock();
        let at = code_address(&cpu, cpu.reg(Reg::Rip));
        let fetched = paging::fetch_instruction(&mem.map.guest(), &walk, at);
        drop(mem);
        Ok(match self.complete(exit, &fetched) {
            Found::Exit(exit) => Some(exit),
            Found::Again | Found::Later => None,
        })
    }

    fn complete(&mut self, exit: Exit, fetched: &paging::Fetched) -> Found {
        match self.inner.hw.complete(exit, fetched.bytes()) {
            Completed::Exit(exit) => Found::Exit(exit),
            Completed::Changed => Found::Again,
            Completed::Undecoded if fetched.stop.is_some() => Found::Later,
            Completed::Undecoded => {
                self.inner.exception = Some(Event::UD);
                self.inner.attention = true;
                Found::Again
            }
        }
    }
}

impl<C: VirtualCpu + ?Sized> Runner<'_, C> {
    fn is_device(&self, gpa: u64) -> bool {
        Chipset::claims_gpa(gpa)
            || self.inner.lapic.mmio() && gpa & !0xfff == self.inner.lapic.base_gpa()
    }

    fn paging(&self, cpu: &(impl CpuState + ?Sized)) -> Paging {
        let gib = self.inner.cpuid.ext1()[3] & (1 << 26) != 0;
        Paging::of(cpu, self.inner.cpuid.phys_bits(), gib)
    }
}

impl Runner<'_, dyn VirtualCpu> {
    /// An instruction touched `gpa`, perhaps a register of the kernel's
    /// devices: does it at once, with interrupts off and the VMCS current.
    /// None: it is not such a one, or needs memory that may have to be
    /// brought in first.
    #[optimize(speed)]
    pub fn device_at_once(&mut self, gpa: u64, gla: Option<u64>) -> Option<Option<Todo>> {
        if !self.is_device(gpa) || self.inner.vectoring.is_some() {
            return None;
        }
        let _ = self.take_eoi();
        let mem = self.vm.mem.try_lock()?;
        if mem.map.is_mapped(gpa) {
            return None;
        }
        let walk = self.paging(&self.inner.hw);
        let inner = &mut *self.inner;
        let guest = mem.map.guest_known();
        let at = code_address(&inner.hw, inner.hw.reg(Reg::Rip));
        let generation = self.vm.generation.current();
        let fetched = inner.code.fetch(&guest, &walk, at, generation);
        let inst = inst::decode(fetched.bytes(), CodeMode::of(&inner.hw)).ok()?;
        let gla = gla.or_else(|| operand_at(inner, &guest, &walk, &inst, gpa, generation));
        let mut bus = KernelBus {
            vm: self.vm,
            lapic: &mut inner.lapic,
            mem: guest,
            walk,
            spinup: false,
            apic_touched: false,
        };
        let hint = gla.map(|gla| Hint { gla, gpa });
        // One emulator for all kinds of CPU and for snapshots: it is a tenth of the module.
        let cpu: &mut dyn CpuState = &mut inner.hw;
        let outcome = inst::emulate(&inst, cpu, &mut bus, hint);
        let spinup = bus.spinup;
        inner.attention |= bus.apic_touched;
        drop(mem);
        match outcome {
            Outcome::Done => inner.hw.advance(inst.len),
            Outcome::Restart => {}
            Outcome::Fault(event) => {
                inner.exception = Some(event);
                inner.attention = true;
            }
            // Registers are as before, or as after the last iteration.
            Outcome::NotHere | Outcome::Unsupported => return None,
        }
        self.vcpu.stats.inc(Stat::InstEmul);
        self.vcpu.stats.inc(Stat::MmioKernel);
        Some(spinup.then_some(Todo::Spinup))
    }

    /// An instruction touched `gpa`, where neither memory is nor a device of the
    /// kernel's: hands it to userland with interrupts off and the VMCS current. None: it
    /// is not such a one, or cannot be read so.
    #[cold]
    #[inline(never)]
    #[optimize(speed)]
    pub fn user_at_once(&mut self, gpa: u64, gla: Option<u64>) -> Option<Todo> {
        if self.is_device(gpa) || self.inner.vectoring.is_some() {
            return None;
        }
        let mem = self.vm.mem.try_lock()?;
        if mem.map.is_mapped(gpa) {
            return None;
        }
        let walk = self.paging(&self.inner.hw);
        let inner = &mut *self.inner;
        let guest = mem.map.guest_known();
        let at = code_address(&inner.hw, inner.hw.reg(Reg::Rip));
        let generation = self.vm.generation.current();
        let fetched = inner.code.fetch(&guest, &walk, at, generation);
        let inst = inst::decode(fetched.bytes(), CodeMode::of(&inner.hw)).ok()?;
        let gla = gla.or_else(|| operand_at(inner, &guest, &walk, &inst, gpa, generation));
        drop(mem);
        let inner = &mut *self.inner;
        self.vcpu.stats.inc(Stat::InstEmul);
        self.vcpu.stats.inc(Stat::MmioUser);
        self.vcpu.run_page.put_registers(&inner.hw);
        let (vie, len) = inst::vie(fetched.bytes(), Some(&inst));
        let rip = inner.hw.reg(Reg::Rip);
        inst_emul(&mut inner.exit, (rip, len), &inner.hw, gpa, gla, vie);
        inner.next_rip = Some(regs::behind(&inner.hw, rip, len));
        Some(Todo::User)
    }

    /// Resolves a nested fault. True: an exit for userland is in place.
    pub fn fault(&mut self, f: Fault) -> Result<bool, i32> {
        let mut mem = self.vm.mem.lock();
        match mem.map.backing(f.gpa)? {
            Some(b) if memory::allows(b.prot, f.access) => {
                self.vcpu.stats.inc(Stat::NestedFault);
                mem.enter(f.gpa, &b, f.access.contains(Access::EXEC))?;
                Ok(false)
            }
            Some(_) => {
                drop(mem);
                self.paging_exit(f);
                Ok(true)
            }
            None if f.during_walk => {
                drop(mem);
                self.paging_exit(f);
                Ok(true)
            }
            None => {
                drop(mem);
                self.emulate(f.gpa, f.gla)
            }
        }
    }

    /// A fault that neither memory nor a device explains.
    fn paging_exit(&mut self, f: Fault) {
        let fault_type = i32::from(f.access.bits());
        self.user_outside(
            0,
            UserExit::Paging {
                gpa: f.gpa,
                fault_type,
            },
        );
    }

    fn user_outside(&mut self, len: u8, exit: UserExit) {
        regs::with_current(self.inner, |inner| {
            let rip = inner.next_rip.unwrap_or_else(|| inner.hw.reg(Reg::Rip));
            inner.exit = VmExit {
                rip,
                inst_length: len,
                exit,
            }
            .to_raw();
            inner.next_rip = Some(regs::behind(&inner.hw, rip, len));
        });
        self.vcpu.stats.inc(Stat::UserExits);
    }

    /// An instruction touched `gpa`, where there is no memory. True: an exit
    /// for userland is in place.
    pub fn emulate(&mut self, gpa: u64, gla: Option<u64>) -> Result<bool, i32> {
        self.vcpu.stats.inc(Stat::InstEmul);
        let mut cpu = snapshot(self.inner);
        let walk = self.paging(&cpu);
        let mem = self.vm.mem.lock();
        let at = code_address(&cpu, cpu.reg(Reg::Rip));
        let fetched = paging::fetch_instruction(&mem.map.guest(), &walk, at);
        drop(mem);
        let decoded = inst::decode(fetched.bytes(), CodeMode::of(&cpu));
        if let (Err(DecodeError::Truncated), Some(WalkError::Fault(fault))) =
            (&decoded, fetched.stop)
        {
            // The guest changed its page tables under the instruction: let it
            // see the fault that fetching it now gives.
            cpu.set_reg(Reg::Cr2, fault.cr2);
            self.finish_emulation(&cpu, Some(fault.event()));
            return Ok(false);
        }
        if let (Ok(inst), true) = (&decoded, self.is_device(gpa)) {
            self.vcpu.stats.inc(Stat::MmioKernel);
            self.settle_eoi();
            if let Done::Yes = self.device(&mut cpu, inst, Where { gpa, gla }, walk)? {
                return Ok(false);
            }
        }
        self.vcpu.stats.inc(Stat::MmioUser);
        let (vie, len) = inst::vie(fetched.bytes(), decoded.as_ref().ok());
        self.vcpu.run_page.put_registers(&cpu);
        let inner = &mut *self.inner;
        let rip = cpu.reg(Reg::Rip);
        inst_emul(&mut inner.exit, (rip, len), &cpu, gpa, gla, vie);
        inner.next_rip = Some(regs::behind(&cpu, rip, len));
        self.vcpu.stats.inc(Stat::UserExits);
        Ok(true)
    }

    /// The instruction touches a device of the kernel's.
    fn device(
        &mut self,
        cpu: &mut Snapshot,
        inst: &Inst,
        at: Where,
        walk: Paging,
    ) -> Result<Done, i32> {
        let mem = self.vm.mem.lock();
        let mut bus = KernelBus {
            vm: self.vm,
            lapic: &mut self.inner.lapic,
            mem: mem.map.guest(),
            walk,
            spinup: false,
            apic_touched: false,
        };
        let hint = at.gla.map(|gla| Hint { gla, gpa: at.gpa });
        let outcome = inst::emulate(inst, cpu as &mut dyn CpuState, &mut bus, hint);
        let spinup = bus.spinup;
        drop(mem);
        match outcome {
            Outcome::Done => {
                cpu.advance(inst.len);
                self.finish_emulation(cpu, None);
            }
            Outcome::Restart => self.finish_emulation(cpu, None),
            Outcome::Fault(event) => self.finish_emulation(cpu, Some(event)),
            // A REP that left the device after some iterations: what it did
            // counts, and the rest is another access.
            Outcome::NotHere | Outcome::Unsupported if cpu.is_changed() => {
                self.finish_emulation(cpu, None);
            }
            Outcome::NotHere | Outcome::Unsupported => return Ok(Done::NotHere),
        }
        if spinup {
            self.collect_spinups();
        }
        Ok(Done::Yes)
    }

    fn finish_emulation(&mut self, cpu: &Snapshot, event: Option<Event>) {
        regs::with_current(self.inner, |inner| {
            inner.next_rip = None;
            cpu.put(&mut inner.hw);
        });
        if event.is_some() {
            self.inner.exception = event;
        }
        self.inner.attention = true;
    }

    /// Loads the PDPTEs that a MOV to CR0 or CR4 needs, then completes it.
    pub fn load_pdptes(&mut self, new: &vmm_hw::cr::Controls) {
        let mem = self.vm.mem.lock();
        let guest = mem.map.guest();
        let mut ptes = [0u64; 4];
        let base = new.cr3 & 0xffff_ffe0;
        let reserved = 0x1e6 | !0u64 << self.inner.cpuid.phys_bits();
        let mut ok = true;
        for (n, pte) in (0u64..).zip(&mut ptes) {
            *pte = guest.read_u64(base + 8 * n).unwrap_or(0);
            ok &= *pte & 1 == 0 || *pte & reserved == 0;
        }
        drop(mem);
        if !ok {
            self.inner.exception = Some(Event::GP0);
            self.inner.attention = true;
            return;
        }
        self.inner.unfinished.pdptes = Some((ptes, *new));
    }
}

/// An instruction that userland is to emulate, its address and its length in bytes. Written
/// without the enum on the way, as an IN or OUT is.
#[optimize(speed)]
fn inst_emul(
    exit: &mut VmExitRaw,
    (rip, len): (u64, u8),
    cpu: &dyn CpuState,
    gpa: u64,
    gla: Option<u64>,
    vie: Vie,
) {
    let cs = cpu.seg(Seg::Cs);
    exit.exitcode = ExitCode::InstEmul.raw();
    exit.inst_length = i32::from(len);
    exit.rip = rip;
    exit.u = zerocopy::transmute!(InstEmulRaw {
        gpa,
        gla: gla.unwrap_or(0),
        cs_base: cs.base,
        cs_d: i32::from(cs.default32()),
        _pad0: 0,
        paging: regs::paging(cpu),
        vie,
    });
}

/// Linear address by which an instruction reached `gpa`, for CPUs that do not tell: that
/// of its operand, if the guest's page tables lead from there to `gpa`.
#[optimize(speed)]
fn operand_at(
    inner: &mut Inner,
    guest: &GuestMemory<'_>,
    walk: &Paging,
    inst: &Inst,
    gpa: u64,
    generation: u64,
) -> Option<u64> {
    let (gla, access) = inst::operand(inst, &inner.hw)?;
    let page = inner.data.page(guest, walk, gla, access, generation)?;
    (page == gpa & !0xfff).then_some(gla)
}

/// The vCPU's registers, as they are while it does not run.
#[inline(never)]
fn snapshot(inner: &mut Inner) -> Snapshot {
    let mut cpu = Snapshot::new();
    regs::with_current(inner, |i| cpu.take(&i.hw, i.next_rip));
    cpu
}

/// Linear address of the instruction at `rip`.
fn code_address(cpu: &(impl CpuState + ?Sized), rip: u64) -> u64 {
    if cpu.long_mode_code() {
        rip
    } else {
        cpu.seg(Seg::Cs).base.wrapping_add(rip) & 0xffff_ffff
    }
}

/// VM_GLA2GPA and VM_GLA2GPA_NOFAULT.
pub fn gla2gpa(vm: &Vm, vcpu: &Vcpu, a: &mut VmGla2gpa, inject: bool) -> Result<(), i32> {
    // READ | WRITE is what bhyve's task switches ask for.
    let access = memory::access(a.prot).ok_or(errno::EINVAL)?;
    let mut inner = vcpu.freeze();
    let cpu = snapshot(&mut inner);
    let gib = inner.cpuid.ext1()[3] & (1 << 26) != 0;
    let mut walk = Paging::of(&cpu, inner.cpuid.phys_bits(), gib);
    walk.cr3 = a.paging.cr3;
    walk.cpl = a.paging.cpl as u8 & 3;
    let mem = vm.mem.lock();
    let r = if inject {
        paging::translate(&mem.map.guest(), &walk, a.gla, access)
    } else {
        paging::translate_nofault(&mem.map.guest(), &walk, a.gla, access)
    };
    drop(mem);
    match r {
        Ok(gpa) => {
            a.gpa = gpa;
            a.fault = 0;
            Ok(())
        }
        Err(WalkError::NoMemory(_)) => Err(errno::EFAULT),
        Err(WalkError::Fault(fault)) => {
            a.fault = 1;
            if inject {
                regs::with_current(&mut inner, |i| i.hw.set_reg(Reg::Cr2, fault.cr2));
                inner.exception = Some(fault.event());
                inner.restart_instruction();
                inner.attention = true;
            }
            Ok(())
        }
    }
}
