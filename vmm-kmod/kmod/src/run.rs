//! VM_RUN: the loop that enters the guest, takes its exits and leaves for
//! userland when somebody there is needed.

use core::sync::atomic::Ordering::SeqCst;

use vmm_abi::{Exit as UserExit, SuspendHow, VmExit};
use vmm_core::cpu::{Exit, Reg};
use vmm_core::host::Host;
use vmm_core::lapic::Changes;
use vmm_core::stats::Stat;
use vmm_hw::backend::{ApicVirt, Reset, RunCpu, VirtualCpu};
use vmm_hw::cr::Controls;
use vmm_hw::svm;

use crate::emulate::Found;
use crate::errno;
use crate::ffi;
use crate::os::{self, ThreadFlags};
use crate::vcpu::{Inner, Kind, Vcpu, Wait};
use crate::vm::Vm;

mod halt;

/// Why the inner loop ended.
#[derive(Clone, Copy)]
pub enum Todo {
    /// The host wants the CPU, or something has to be looked at outside.
    Yield,
    /// To let another thread have the CPU, if one wants it.
    GiveWay,
    /// The exit in `inner.exit` is for userland.
    User,
    /// HLT.
    Halt,
    /// INIT or SIPI was sent, perhaps to vCPUs that do not run yet.
    Spinup,
    /// What `Runner::later` put by.
    Later,
}

/// What is done outside the inner loop, with what is needed for it.
pub enum Later {
    /// Nothing.
    Nothing,
    /// A guest-physical access that the nested tables do not allow.
    Fault(crate::emulate::Fault),
    /// Access to the local APIC's page that the CPU did not virtualize.
    ApicAccess {
        /// Guest-physical address.
        gpa: u64,
    },
    /// A MOV to CR0 or CR4 that needs the PDPTEs from memory.
    LoadPdptes(Controls),
    /// The local APIC has changed its mode.
    ApicMode {
        /// It is reached through the APIC-access page.
        virtualized: bool,
    },
    /// The vCPU's state could not be made this CPU's.
    NotLoaded(vmm_hw::error::Error),
    /// WRMSR of the paravirtual interface's.
    PvMsr {
        /// Which.
        msr: u32,
        /// What is written.
        value: u64,
    },
    /// The paravirtual clock has to follow the TSC.
    PvClock,
    /// A doorbell; the exit that it stands for is in place.
    #[cfg(feature = "freebsd")]
    Ring(crate::sync::Event),
    /// Where the guest may have noted an end of interrupt is to be found again.
    PvEoi,
    /// An exit of which the CPU does not tell enough, and whose instruction
    /// could not be had with interrupts off.
    Instruction(Exit),
}

/// A vCPU, its VM and the thread that runs it.
pub struct Runner<'a, C: ?Sized> {
    /// The VM.
    pub vm: &'a Vm,
    /// What others see of the vCPU.
    pub vcpu: &'a Vcpu,
    /// What this thread has to itself.
    pub inner: &'a mut Inner<C>,
    flags: ThreadFlags,
    preemption_timer: bool,
    account: bool,
}

/// What a run of a vCPU has still to do.
pub struct Unfinished {
    /// PDPTEs for a MOV to CR0 or CR4 that is to be completed.
    pub pdptes: Option<([u64; 4], Controls)>,
    /// An exit that was completed with its instruction, to be handled.
    pub completed: Option<Exit>,
    /// With [`Todo::Later`].
    later: Later,
    /// The host has work for this CPU that needs the window closed.
    pub host_work: bool,
}

impl Unfinished {
    /// Nothing.
    pub const fn new() -> Self {
        Unfinished {
            pdptes: None,
            completed: None,
            later: Later::Nothing,
            host_work: false,
        }
    }
}

/// Runs the vCPU until `inner.exit` has something for userland.
///
/// EINVAL: not active, or suspended. ENXIO: the VM was destroyed. ENOMEM: no
/// memory for the guest.
#[inline(never)]
#[optimize(speed)]
pub fn run(vm: &Vm, vcpu: &Vcpu, inner: &mut Inner) -> Result<(), i32> {
    // One function from here to the guest, as every one in between is paid for by
    // each exit to userland; but not both kinds of CPU in one.
    match inner.kind() {
        Kind::Vmx(inner) => run_on(vm, vcpu, inner),
        Kind::Svm(inner) => run_on_svm(vm, vcpu, inner),
    }
}

#[inline(never)]
#[optimize(size)]
fn run_on_svm(vm: &Vm, vcpu: &Vcpu, inner: &mut Inner<svm::Vcpu<os::Os>>) -> Result<(), i32> {
    run_on(vm, vcpu, inner)
}

#[inline(always)]
fn run_on<C: RunCpu + 'static>(vm: &Vm, vcpu: &Vcpu, inner: &mut Inner<C>) -> Result<(), i32> {
    if !inner.may_run {
        if !vm.active.contains(vcpu.id as usize) {
            return Err(errno::EINVAL);
        }
        inner.may_run = true;
    }
    if inner.config_gen != vm.config_gen.load(core::sync::atomic::Ordering::Acquire) {
        vm.ensure_topology()?;
        inner.refresh_config(vm, vcpu.id);
        if inner.scaling.is_some() || vm.tsc_scaling().is_some() {
            crate::regs::with_current(inner, |i| i.scale_tsc(vm));
        }
    }
    // Userland may have loaded secrets into the caches since the last run.
    inner.hw.request_l1d_flush();
    // Of an earlier run that did not get to it: the guest executes that again.
    inner.unfinished.pdptes = None;
    inner.unfinished.completed = None;
    let preemption_timer = inner.hw.has_preemption_timer();
    Runner {
        vm,
        vcpu,
        inner,
        flags: ThreadFlags::current(),
        preemption_timer,
        account: crate::global::at_once().account,
    }
    .outer()
}

impl<C: RunCpu + 'static> Runner<'_, C> {
    #[inline(always)]
    fn outer(&mut self) -> Result<(), i32> {
        loop {
            if self.must_leave()? {
                return Ok(());
            }
            match self.inner.wait {
                Wait::No => {}
                Wait::Halt => {
                    if self.cold().halt()? {
                        return Ok(());
                    }
                    continue;
                }
                Wait::Sipi => {
                    self.cold().wait_for_sipi();
                    continue;
                }
            }
            match self.window() {
                Todo::Yield => {}
                Todo::GiveWay => os::give_way(),
                Todo::User => {
                    self.vcpu.stats.inc(Stat::UserExits);
                    return Ok(());
                }
                Todo::Halt => self.inner.wait = Wait::Halt,
                Todo::Spinup => self.cold().collect_spinups(),
                Todo::Later => {
                    if self.do_later()? {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Does what was put by. True: an exit for userland is in place.
    #[inline(never)]
    fn do_later(&mut self) -> Result<bool, i32> {
        match core::mem::replace(&mut self.inner.unfinished.later, Later::Nothing) {
            Later::Instruction(exit) => {
                self.inner.unfinished.completed = self.instruction_of(exit)?;
                Ok(false)
            }
            other => self.cold().do_any(other),
        }
    }

    /// Whether userland has to be told something before the guest goes on.
    #[inline]
    fn must_leave(&mut self) -> Result<bool, i32> {
        if !self.vm.may_stop() && self.vcpu.reqidle.load(SeqCst) == 0 && !self.flags.work() {
            return Ok(false);
        }
        self.cold().has_to_leave()
    }

    /// The same for what is not worth compiling for each kind of CPU.
    #[inline]
    pub fn cold(&mut self) -> Runner<'_, dyn VirtualCpu> {
        Runner {
            vm: self.vm,
            vcpu: self.vcpu,
            inner: self.inner,
            flags: self.flags,
            preemption_timer: self.preemption_timer,
            account: self.account,
        }
    }

    /// One stay with preemption and interrupts off. A part of `outer`, which is its
    /// only caller: every exit to userland goes through both.
    #[inline(always)]
    fn window(&mut self) -> Todo {
        // SAFETY: undone by guest_end below; nothing in between sleeps.
        let fpu_live = unsafe { ffi::vmm_host_guest_begin() };
        // SAFETY: guest_begin turned interrupts off and told whose state the FPU
        // holds; the vCPU's lock is held.
        let loaded = unsafe { self.inner.hw.load(fpu_live != 0) };
        let todo = match loaded {
            Err(error) => self.later(Later::NotLoaded(error)),
            Ok(cpu) => {
                self.vcpu.enter_guest_mode(cpu);
                if let Some(rip) = self.inner.next_rip.take() {
                    self.inner.hw.set_reg(Reg::Rip, rip);
                }
                let active = self.vm.active_count();
                if active != self.inner.active_seen {
                    self.inner.active_seen = active;
                    self.inner.forget_spinning();
                }
                if let Some((ptes, new)) = self.inner.unfinished.pdptes.take() {
                    self.cold().complete_cr(ptes, &new);
                }
                // Only where it can be: `handle` is part of the inner loop, and stays so
                // while that is its only caller.
                let done = if C::DESCRIBES_EXITS {
                    None
                } else {
                    self.inner
                        .unfinished
                        .completed
                        .take()
                        .and_then(|exit| self.handle(exit))
                };
                let todo = match done {
                    Some(todo) => todo,
                    None => self.inner_loop(),
                };
                self.vcpu.leave_guest_mode();
                // SAFETY: loaded above, on this CPU.
                unsafe { self.inner.hw.unload() };
                todo
            }
        };
        // SAFETY: pairs with guest_begin.
        unsafe { ffi::vmm_host_guest_end(fpu_live) };
        todo
    }

    #[inline]
    fn inner_loop(&mut self) -> Todo {
        let mut stays = 0u32;
        loop {
            if (self.inner.lapic.sync() || self.inner.attention)
                && let Some(todo) = self.before_entry()
            {
                return todo;
            }
            if self.flags.work() {
                return Todo::Yield;
            }
            if !self.set_timer() {
                continue;
            }
            if !C::DESCRIBES_EXITS && self.inner.hw.take_immediate_exit() {
                // SAFETY: works in any context; interrupts are off, so that
                // it waits for the guest.
                unsafe { ffi::vmm_host_kick_cpu(os::Os::cpu()) };
            }
            let exit = if self.account {
                // SAFETY: as below.
                unsafe { self.enter_counted() }
            } else {
                // SAFETY: between load and unload, interrupts off.
                unsafe { self.inner.hw.enter() }
            };
            self.vcpu.stats.inc(Stat::Exits);
            // A guest that polls what the kernel answers may never let the
            // preemption timer run out; the host's interrupts get their turn.
            stays = stays.wrapping_add(1);
            if stays & 0xff == 0 {
                self.host_interrupts(None);
            }
            if let Some(event) = self.inner.hw.pending_vectoring() {
                self.inner.vectoring = Some(event);
                self.inner.attention = true;
            }
            let exit = if C::DESCRIBES_EXITS || !self.inner.hw.wants_instruction() {
                exit
            } else {
                match self.instruction_at_once(exit) {
                    Found::Exit(exit) => exit,
                    Found::Again => continue,
                    Found::Later => return self.later(Later::Instruction(exit)),
                }
            };
            if let Some(todo) = self.handle(exit) {
                return todo;
            }
        }
    }

    /// # Safety
    /// As [`RunCpu::enter`].
    #[cold]
    #[inline(never)]
    #[optimize(size)]
    unsafe fn enter_counted(&mut self) -> Exit {
        let before = os::rdtsc();
        // SAFETY: by the caller's word.
        let exit = unsafe { self.inner.hw.enter() };
        self.vcpu.stats.add(Stat::Runtime, os::rdtsc() - before);
        exit
    }

    /// Sees to it that the local APIC's timer ends the guest's stay in time;
    /// false if it is due now.
    #[inline]
    fn set_timer(&mut self) -> bool {
        let Some(deadline) = self.inner.lapic.timer_deadline() else {
            if self.preemption_timer {
                self.inner.hw.set_preemption_timer(None);
            }
            return true;
        };
        let now = os::rdtsc();
        if deadline <= now {
            self.inner.lapic.timer_tick(now);
            self.inner.attention = true;
            return false;
        }
        if self.preemption_timer {
            self.inner.hw.set_preemption_timer(Some(deadline - now));
        } else if self.inner.timer_armed != deadline || self.vcpu.take_timer_fired() {
            // The host's clock and the TSC do not agree to the last tick: a
            // timer that fired too early is armed again.
            self.inner.timer_armed = deadline;
            self.vcpu
                .arm_timer(self.vm.clock.to_ns.apply_up(deadline - now));
        }
        true
    }

    /// Injects what is due. Some: the guest cannot be entered now.
    #[cold]
    #[inline(never)]
    #[optimize(speed)]
    fn before_entry(&mut self) -> Option<Todo> {
        use core::sync::atomic::Ordering::Relaxed;
        if core::mem::take(&mut self.inner.unfinished.host_work)
            || self.vm.suspend.load(Relaxed) != 0
            || self.vm.dying()
            || self.vcpu.reqidle.load(Relaxed) != 0
            || self.vm.debug.contains(self.vcpu.id as usize)
        {
            // The mailbox is empty now: what was in it, or the poke, is not to be
            // forgotten.
            self.inner.attention = true;
            return Some(Todo::Yield);
        }
        if !self.take_eoi() {
            self.inner.attention = true;
            return Some(self.later(Later::PvEoi));
        }
        let inner = &mut *self.inner;
        if inner.lapic.take_init() {
            // The bootstrap processor would go to its firmware, of which
            // there is none.
            if self.vcpu.id != 0 {
                inner.hw.reset(Reset::Init);
                inner.lapic.init();
                inner.pv.init();
                inner.vectoring = None;
                inner.exception = None;
                inner.wait = Wait::Sipi;
                let later = if C::DESCRIBES_EXITS {
                    None
                } else {
                    self.cold().routes_changed()
                };
                return Some(later.unwrap_or(Todo::Yield));
            }
        }
        // A start-up IPI to a CPU that runs is ignored (SDM Vol. 3A §8.4.3).
        let _ = inner.lapic.take_sipi();
        // Of AVIC, which only AMD-V has.
        if !C::DESCRIBES_EXITS
            && inner.lapic.take_routes_changed()
            && let Some(todo) = self.cold().routes_changed()
        {
            return Some(todo);
        }
        self.inject();
        None
    }

    #[optimize(speed)]
    fn inject(&mut self) {
        let inner = &mut *self.inner;
        // An interrupted delivery first, then exceptions, NMI, interrupts
        // (SDM Vol. 3A §6.9).
        let mut busy = inner.hw.entry_event().is_some();
        if !busy && let Some(event) = inner.vectoring.take() {
            inner.hw.inject(event);
            busy = true;
        }
        if !busy && let Some(event) = inner.exception.take() {
            if event.is_fault() {
                // Event injection pushes RFLAGS as it is.
                let rflags = inner.hw.reg(Reg::Rflags);
                inner
                    .hw
                    .set_reg(Reg::Rflags, rflags | vmm_core::cpu::RFLAGS_RF);
            }
            inner.hw.inject(event);
            busy = true;
        }
        let mut nmi_window = false;
        if inner.lapic.nmi_pending() {
            let can = !busy && inner.hw.nmi_interruptible();
            if can && inner.lapic.take_nmi(false) {
                inner.hw.inject(vmm_core::cpu::Event {
                    kind: vmm_core::cpu::EventKind::Nmi,
                    vector: 2,
                    error_code: None,
                    inst_len: 0,
                });
                busy = true;
            }
            if inner.hw.nmi_blocked() {
                // Only one stays latched meanwhile.
                let _ = inner.lapic.take_nmi(true);
            }
            nmi_window = inner.lapic.nmi_pending();
        }
        let mut window = false;
        if inner.lapic.extint_pending() {
            if !busy && inner.hw.interruptible() {
                let (vector, more) = self.vm.acknowledge_extint();
                inner.lapic.extint_done(more);
                if let Some(vector) = vector {
                    inner.hw.inject(external(vector));
                    busy = true;
                }
            }
            window = inner.lapic.extint_pending();
        }
        let virt = inner.hw.apic_virt();
        if virt.contains(ApicVirt::INTERRUPTS) {
            let changes = if C::TAKES_APIC_STATE {
                inner.lapic.take_changes()
            } else {
                Changes::empty()
            };
            if changes.contains(Changes::IRR) {
                inner.hw.set_rvi(inner.lapic.rvi());
            }
            if changes.contains(Changes::ISR) {
                inner.hw.set_svi(inner.lapic.svi());
            }
            if changes.contains(Changes::TMR) {
                inner.hw.set_eoi_exit_bitmap(inner.lapic.eoi_exit_bitmap());
            }
        } else if let Some(vector) = inner.lapic.pending() {
            if !busy && inner.hw.interruptible() {
                inner.lapic.accept(vector);
                inner.hw.inject(external(vector));
                self.offer_eoi(vector);
                window |= self.inner.lapic.pending().is_some();
            } else {
                window = true;
            }
        }
        let inner = &mut *self.inner;
        if C::TAKES_APIC_STATE
            && virt & (ApicVirt::TPR_SHADOW | ApicVirt::INTERRUPTS) == ApicVirt::TPR_SHADOW
        {
            inner
                .hw
                .set_tpr_threshold(inner.lapic.tpr_threshold() as u8);
        }
        inner.hw.set_interrupt_window(window);
        inner.hw.set_nmi_window(nmi_window);
        // What could not be injected for a planned event comes next time.
        inner.attention =
            window || nmi_window || inner.vectoring.is_some() || inner.exception.is_some();
    }
}

impl<C: VirtualCpu + ?Sized> Runner<'_, C> {
    /// Puts something by until the inner loop is left.
    #[cold]
    #[inline(never)]
    pub fn later(&mut self, what: Later) -> Todo {
        self.inner.unfinished.later = what;
        Todo::Later
    }
}

impl Runner<'_, dyn VirtualCpu> {
    fn do_any(&mut self, what: Later) -> Result<bool, i32> {
        match what {
            Later::Nothing | Later::Instruction(_) => {}
            Later::Fault(fault) => return self.fault(fault),
            Later::ApicAccess { gpa } => return self.emulate(gpa, None),
            Later::LoadPdptes(new) => self.load_pdptes(&new),
            #[cfg(feature = "freebsd")]
            Later::Ring(event) => {
                if !event.signal() {
                    self.vcpu.stats.inc(Stat::UserExits);
                    return Ok(true);
                }
                // It is complete, as the next instruction sees it.
                crate::regs::with_current(self.inner, |inner| {
                    inner.next_rip = None;
                    let len = inner.hw.inst_len();
                    inner.hw.advance(len);
                });
            }
            Later::ApicMode { virtualized } => {
                self.vm
                    .apic_mode_changed(self.vcpu.id as usize, virtualized)?;
            }
            Later::PvMsr { msr, value } => self.pv_msr(msr, value),
            Later::PvClock => self.pv_clock_moved(),
            Later::PvEoi => self.settle_eoi(),
            Later::NotLoaded(error) => return Ok(self.not_loaded(error)),
        }
        Ok(false)
    }

    #[cold]
    #[inline(never)]
    fn has_to_leave(&mut self) -> Result<bool, i32> {
        if self.vm.dying() {
            return Err(errno::ENXIO);
        }
        if self.vm.suspend.load(SeqCst) != 0 {
            // Userland knows.
            if self.vm.suspended.contains(self.vcpu.id as usize) {
                return Err(errno::EINVAL);
            }
            return self.suspended().map(|()| true);
        }
        if let Some((vcpu, vector)) = self.vm.next_spinup() {
            let rip = u64::from(vector) << 12;
            self.leave_with(UserExit::SpinupAp { vcpu, rip });
            return Ok(true);
        }
        let stop = if self.vm.debug.contains(self.vcpu.id as usize) {
            UserExit::Debug
        } else if self.vcpu.reqidle.load(SeqCst) != 0 {
            UserExit::Reqidle
        } else if self.flags.work() && os::yield_now() {
            UserExit::Bogus
        } else {
            self.vm.look_whether_to_stop();
            return Ok(false);
        };
        self.leave_with(stop);
        Ok(true)
    }

    /// An exit that no instruction caused: the guest goes on where it is.
    fn leave_with(&mut self, exit: UserExit) {
        let rip = self.rip_outside();
        self.inner.exit = VmExit {
            rip,
            inst_length: 0,
            exit,
        }
        .to_raw();
        self.vcpu.stats.inc(Stat::UserExits);
    }

    /// RIP while the VMCS may not be current.
    fn rip_outside(&mut self) -> u64 {
        match self.inner.next_rip {
            Some(rip) => rip,
            None => crate::regs::with_current(self.inner, |inner| inner.hw.reg(Reg::Rip)),
        }
    }

    /// The VM stops: waits until all active vCPUs know it.
    fn suspended(&mut self) -> Result<(), i32> {
        let how =
            SuspendHow::from_raw(self.vm.suspend.load(SeqCst)).unwrap_or(SuspendHow::Poweroff);
        self.vm.suspended.set(self.vcpu.id as usize);
        for v in self.vm.vcpus() {
            v.poke();
        }
        while !self.vm.active.subset_of(&self.vm.suspended) {
            if self.vm.dying() {
                return Err(errno::ENXIO);
            }
            let _ = self.inner.lapic.sync();
            let vm = self.vm;
            // Poked by whoever comes next; the time limit covers a vCPU
            // whose thread never comes back from userland.
            let signal = self.vcpu.sleep(1_000_000_000, || {
                vm.active.subset_of(&vm.suspended) || vm.dying()
            });
            if signal && os::yield_now() {
                break;
            }
        }
        self.leave_with(UserExit::Suspended(how));
        Ok(())
    }

    /// Sees to it that the next `load` works. True: it never will, and an
    /// exit for userland is in place.
    #[cold]
    fn not_loaded(&mut self, error: vmm_hw::error::Error) -> bool {
        use vmm_hw::error::Error;
        let inst_error = match error {
            Error::NeedsMigration => {
                self.inner.hw.prepare_migration();
                return false;
            }
            Error::NoCpu => {
                // VMX is off here: the CPU goes offline, and the thread that
                // takes it down must get it first.
                if os::yield_now() {
                    self.leave_with(UserExit::Bogus);
                    return true;
                }
                return false;
            }
            Error::Vmcs(number) => number as i32,
            _ => 0,
        };
        crate::klog!(Error, "vCPU {}: {error}", self.vcpu.id);
        self.inner.exit = VmExit {
            // The VMCS holds it, and cannot be read.
            rip: self.inner.next_rip.unwrap_or(0),
            inst_length: 0,
            exit: UserExit::Vmx(vmm_abi::exit::Vmx {
                status: 1,
                exit_reason: 0,
                qualification: 0,
                inst_type: 0,
                inst_error,
            }),
        }
        .to_raw();
        self.vcpu.stats.inc(Stat::UserExits);
        true
    }

    /// Looks which vCPUs that userland has not started yet got a start-up
    /// IPI: their own threads cannot.
    pub fn collect_spinups(&mut self) {
        for v in self.vm.vcpus() {
            let id = v.id as usize;
            if id == self.vcpu.id as usize || self.vm.active.contains(id) {
                continue;
            }
            let Some(mut inner) = v.try_freeze() else {
                continue;
            };
            inner.lapic.sync();
            if inner.lapic.take_init() {
                crate::regs::with_current(&mut inner, |i| i.hw.reset(Reset::Init));
                inner.lapic.init();
                inner.pv.init();
            }
            if let Some(vector) = inner.lapic.take_sipi() {
                drop(inner);
                self.vm.add_spinup(v.id, vector);
            }
        }
    }
}

fn external(vector: u8) -> vmm_core::cpu::Event {
    vmm_core::cpu::Event {
        kind: vmm_core::cpu::EventKind::External,
        vector,
        error_code: None,
        inst_len: 0,
    }
}
