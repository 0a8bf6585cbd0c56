//! A virtual CPU: what its own thread has to itself, and what others may do
//! to it meanwhile.

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::ffi::c_void;
use core::ops::Deref;
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};

use vmm_abi::raw_exit::VmExitRaw;
use vmm_core::cpu::Event;
use vmm_core::cpuid::{CpuidConfig, CpuidTable, Vendor, lapic_timer_hz};
use vmm_core::haltpoll::HaltPoll;
use vmm_core::host::Host;
use vmm_core::lapic::{DEFAULT_BASE, Lapic, LapicConfig, LapicPage, Mailbox};
use vmm_core::msr::{MsrConfig, MsrState};
use vmm_core::stats::Stats;
use vmm_core::time::{Ratio, Scaling};
use vmm_hw::backend::{ApicMode, ApicVirt, Backend, Config, Reset, VirtualCpu};
use vmm_hw::svm::avic::MAX_ID;
use vmm_hw::{svm, vmx};

use crate::ffi;
use crate::global;
use crate::klog;
use crate::os::Os;
use crate::pv::Pv;
use crate::regs;
use crate::run::Unfinished;
use crate::run_page::RunPage;
use crate::sync::{self, Mutex, MutexGuard, NoMemory, RawMutex, Sleeper, Timer};
use crate::tlb;
use crate::vm::Vm;

/// The vCPU's thread is not in the guest; it looks before it enters.
const OUTSIDE: u32 = 0;
/// In the inner loop on CPU `cpu`: an interrupt there makes it look.
const GUEST: u32 = 1;
/// Asleep, or about to be.
const ASLEEP: u32 = 2;

/// Points to a vCPU's mailbox from the vCPU's own local APIC.
#[derive(Clone, Copy)]
pub struct MailboxRef(*const Mailbox);

impl Deref for MailboxRef {
    type Target = Mailbox;
    #[inline(always)]
    fn deref(&self) -> &Mailbox {
        // SAFETY: the mailbox is in the `Vcpu` that owns the local APIC that
        // owns this pointer, and that `Vcpu` never moves.
        unsafe { &*self.0 }
    }
}

/// What a vCPU that is not running waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Nothing: it runs.
    No,
    /// An interrupt, after HLT.
    Halt,
    /// A start-up IPI, after INIT.
    Sipi,
}

/// The part of a vCPU that belongs to whoever holds its lock: its thread
/// while it runs, an ioctl while it does not.
///
/// Generic over the kind of CPU: the run loop is compiled for each, all others
/// see any.
pub struct Inner<C: ?Sized = dyn VirtualCpu> {
    /// Local APIC.
    pub lapic: Lapic<MailboxRef>,
    /// What the guest uses of the paravirtual interface.
    pub pv: Pv,
    /// CPUID answers.
    pub cpuid: Box<CpuidTable>,
    /// Emulated MSRs.
    pub msr: MsrState,
    /// Version of the VM's settings that were last seen; 0 = none.
    pub config_gen: u32,
    /// The `config_gen` of the VM that `cpuid` was made of.
    pub cpuid_gen: u32,
    /// The exit last given to userland.
    pub exit: VmExitRaw,
    /// Where the next run begins, if not where the guest stopped.
    pub next_rip: Option<u64>,
    /// Event whose delivery was interrupted; goes first.
    pub vectoring: Option<Event>,
    /// Exception to deliver.
    pub exception: Option<Event>,
    /// Something may have to be injected, or a window is open.
    pub attention: bool,
    /// What it waits for.
    pub wait: Wait,
    /// Extra TSC offset of this vCPU (IA32_TSC and IA32_TSC_ADJUST writes).
    pub tsc_adjust: u64,
    /// The guest's TSC has another rate than the host's.
    pub scaling: Option<Scaling>,
    /// It is among the active vCPUs.
    pub may_run: bool,
    /// Leave the guest on HLT even to userland? (VM_CAP_HALT_EXIT as set.)
    pub halt_exit: bool,
    /// VM_CAP_PAUSE_EXIT as set.
    pub pause_exit: bool,
    /// VM_CAP_MTRAP_EXIT as set.
    pub mtrap_exit: bool,
    /// VM_CAP_ENABLE_INVPCID as set.
    pub invpcid: bool,
    /// Patience with PAUSE loops, TSC ticks; 0 = without limit.
    pub pause_window: u32,
    /// Active vCPUs when it was last looked.
    pub active_seen: u32,
    /// Deadline that the host's timer was last armed for, host TSC.
    pub timer_armed: u64,
    /// How long HLT is waited out awake.
    pub halt_poll: HaltPoll,
    /// Where instructions were that had to be fetched.
    pub code: tlb::Code,
    /// Device memory that they reached.
    pub data: tlb::Data,
    /// What its run loop has put by.
    pub unfinished: Unfinished,
    /// The CPU's structures and the guest's registers.
    pub hw: C,
}

/// A vCPU's inner part as what it is.
pub enum Kind<'a> {
    /// With VT-x.
    Vmx(&'a mut Inner<vmx::Vcpu<Os>>),
    /// With AMD-V.
    Svm(&'a mut Inner<svm::Vcpu<Os>>),
}

impl Inner {
    /// The inner part as what it is.
    #[inline]
    pub fn kind(&mut self) -> Kind<'_> {
        let this = ptr::from_mut(self);
        match global::get().backend {
            // SAFETY: `Vcpu::new` makes every vCPU with the machine's backend,
            // of which there is one.
            Backend::Vmx(_) => Kind::Vmx(unsafe { &mut *this.cast() }),
            // SAFETY: as above.
            Backend::Svm(_) => Kind::Svm(unsafe { &mut *this.cast() }),
        }
    }
}

/// A virtual CPU.
pub struct Vcpu {
    /// First, so that it is dropped first: its callback uses all the rest.
    timer: Option<Timer>,
    /// Where others leave interrupts.
    pub mailbox: Box<Mailbox>,
    mode: AtomicU32,
    cpu: AtomicU32,
    /// The host's timer has fired since this was last asked.
    timer_fired: AtomicBool,
    /// A hypercall ends the next HLT, or this one.
    unhalt: AtomicBool,
    /// Threads that wait for the vCPU to leave the guest and stay out.
    pub reqidle: AtomicU32,
    /// Number.
    pub id: u32,
    sleeper: Sleeper,
    /// Shared with userland (VM_EXT_RUN_PAGE).
    pub run_page: RunPage,
    /// Counters, written by the vCPU's thread.
    pub stats: Stats,
    inner: Box<Mutex<Inner>>,
}

fn no_vcpu(id: u32, e: &vmm_hw::error::Error) -> NoMemory {
    klog!(Error, "no vCPU {id}: {e}");
    NoMemory
}

impl Vcpu {
    /// A vCPU in power-on state.
    pub fn new(vm: &Vm, id: u32) -> Result<Box<Vcpu>, NoMemory> {
        // One after the other: the table and the vCPU each need much of a
        // kernel's stack while they are made.
        let generation = vm.config_gen.load(Ordering::Acquire);
        let cpuid = cpuid_table(vm, id)?;
        let vcpu = Self::with_cpuid(vm, id, cpuid)?;
        vcpu.freeze().cpuid_gen = generation;
        Ok(vcpu)
    }

    #[inline(never)]
    fn with_cpuid(vm: &Vm, id: u32, cpuid: Box<CpuidTable>) -> Result<Box<Vcpu>, NoMemory> {
        let g = global::get();
        let mailbox = sync::try_box(Mailbox::new(id))?;
        let to_mailbox = MailboxRef(ptr::from_ref::<Mailbox>(&mailbox));
        // SAFETY: a page of zeroed atomics is a valid page.
        let page: Box<LapicPage> = unsafe { sync::try_box_zeroed()? };
        let page_pa = global::virt_to_phys(ptr::from_ref::<LapicPage>(&page) as usize);
        let lapic_hz = lapic_timer_hz(g.tsc_hz);
        let config = LapicConfig {
            to_apic: Ratio::new(lapic_hz, g.tsc_hz),
            from_apic: Ratio::new(g.tsc_hz, lapic_hz),
            min_interval: g.tsc_hz / MAX_TIMER_HZ,
            phys_bits: cpuid.phys_bits(),
            x2apic: false,
            bsp: id == 0,
        };
        let hw_config = Config {
            vm: vm.hw_id,
            nested_root: vm.nested_root,
            generation: Arc::clone(&vm.generation),
            virtual_apic: Some(page_pa),
            apic_access: Some(vm.apic_access_pa()),
            posted: (g.posted_vector != 0).then(|| {
                let mailbox = ptr::from_ref::<Mailbox>(&mailbox) as usize;
                (global::virt_to_phys(mailbox), g.posted_vector)
            }),
            avic: vm.avic_place(id),
            apic_virt: g.apic_virt,
            longest_stay: g.tsc_hz / LEAVES_PER_SECOND,
            fill_rsb: g.fill_rsb,
            thread_tss: g.thread_tss,
        };
        let lapic = Lapic::new(page, to_mailbox, config);
        let inner = match &g.backend {
            Backend::Vmx(b) => Self::vmx(id, Arc::clone(b), hw_config, lapic, cpuid)?,
            Backend::Svm(b) => Self::svm(id, Arc::clone(b), hw_config, lapic, cpuid)?,
        };
        let (sleeper, run_page) = (Sleeper::new()?, RunPage::new()?);
        let mut vcpu = sync::try_box_with(|| Vcpu {
            timer: None,
            mailbox,
            mode: AtomicU32::new(OUTSIDE),
            cpu: AtomicU32::new(0),
            timer_fired: AtomicBool::new(false),
            unhalt: AtomicBool::new(false),
            reqidle: AtomicU32::new(0),
            id,
            sleeper,
            run_page,
            stats: Stats::new(),
            inner,
        })?;
        {
            let mut inner = vcpu.freeze();
            regs::with_current(&mut inner, |i| {
                i.apply_tsc(vm);
                i.watch_pause_loops();
            });
        }
        let target = ptr::from_mut::<Vcpu>(&mut vcpu)
            .cast::<u8>()
            .wrapping_add(1);
        vcpu.timer = Some(Timer::new(target.cast::<c_void>())?);
        Ok(vcpu)
    }

    /// The part that only one at a time may touch. Of either kind it is made in a
    /// frame of its own, and off the stack again when the rest is made.
    #[inline(never)]
    #[optimize(speed)]
    fn vmx(
        id: u32,
        backend: Arc<vmx::Backend<Os>>,
        config: Config,
        lapic: Lapic<MailboxRef>,
        cpuid: Box<CpuidTable>,
    ) -> Result<Box<Mutex<Inner>>, NoMemory> {
        let lock = RawMutex::new()?;
        let hw = vmx::Vcpu::new(backend, config).map_err(|e| no_vcpu(id, &e))?;
        let inner = sync::try_box(Mutex::of(lock, Inner::new(hw, lapic, cpuid)))?;
        Ok(inner)
    }

    /// As `vmx`.
    #[inline(never)]
    fn svm(
        id: u32,
        backend: Arc<svm::Backend<Os>>,
        config: Config,
        lapic: Lapic<MailboxRef>,
        cpuid: Box<CpuidTable>,
    ) -> Result<Box<Mutex<Inner>>, NoMemory> {
        let lock = RawMutex::new()?;
        let hw = svm::Vcpu::new(backend, config).map_err(|e| no_vcpu(id, &e))?;
        let inner = sync::try_box(Mutex::of(lock, Inner::new(hw, lapic, cpuid)))?;
        Ok(inner)
    }

    /// Has the vCPU to oneself; it is made to leave the guest if it runs.
    #[inline]
    pub fn freeze(&self) -> MutexGuard<'_, Inner> {
        match self.inner.try_lock() {
            Some(inner) => inner,
            None => self.make_idle(),
        }
    }

    #[cold]
    #[inline(never)]
    fn make_idle(&self) -> MutexGuard<'_, Inner> {
        self.reqidle.fetch_add(1, Ordering::SeqCst);
        self.poke();
        let inner = self.inner.lock();
        self.reqidle.fetch_sub(1, Ordering::SeqCst);
        inner
    }

    /// As `freeze`, unless somebody has it.
    pub fn try_freeze(&self) -> Option<MutexGuard<'_, Inner>> {
        self.inner.try_lock()
    }

    /// After something was put into the mailbox: makes the vCPU look.
    #[inline]
    pub fn kick(&self) {
        self.kick_unless(|| false);
    }

    /// The same; where the vCPU is in the guest on another CPU, `told` may have
    /// told it already.
    #[inline]
    pub fn kick_unless(&self, told: impl FnOnce() -> bool) {
        fence(Ordering::SeqCst);
        match self.mode.load(Ordering::SeqCst) {
            GUEST => {
                let cpu = self.cpu.load(Ordering::Relaxed);
                // On the same CPU the guest is not running now, and the
                // mailbox is looked at before it runs again.
                if cpu != Os::cpu() && !told() {
                    self.interrupt(cpu);
                }
            }
            ASLEEP => self.sleeper.wake(),
            _ => {}
        }
    }

    /// Interrupts the CPU that runs it: what that can take without an exit comes by its
    /// own vector, which does nothing where the guest is not in.
    #[inline(never)]
    #[optimize(speed)]
    fn interrupt(&self, cpu: u32) {
        let posted = global::at_once().posted_vector != 0 && !self.mailbox.signalled();
        // SAFETY: both work in any context.
        unsafe {
            if posted {
                ffi::vmm_host_notify_cpu(cpu);
            } else {
                ffi::vmm_host_kick_cpu(cpu);
            }
        }
    }

    /// Makes the vCPU look at everything.
    pub fn poke(&self) {
        self.mailbox.poke();
        self.kick();
    }

    /// The inner loop begins on this CPU, of that number (interrupts are off); what is put
    /// into the mailbox from here on comes with a kick.
    #[inline]
    pub fn enter_guest_mode(&self, cpu: u32) {
        self.cpu.store(cpu, Ordering::Relaxed);
        self.mode.store(GUEST, Ordering::Release);
        // Before the first look into the mailbox.
        fence(Ordering::SeqCst);
    }

    /// The inner loop is over. Who still sees the vCPU in it kicks in vain.
    #[inline]
    pub fn leave_guest_mode(&self) {
        self.mode.store(OUTSIDE, Ordering::Release);
    }

    /// Sleeps until kicked, `ns` nanoseconds have passed, or a signal came
    /// (true); not at all if `ready` finds a reason.
    pub fn sleep(&self, ns: u64, ready: impl FnOnce() -> bool) -> bool {
        self.sleeper.prepare();
        self.mode.store(ASLEEP, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let signal = if self.mailbox.pending() || ready() {
            false
        } else {
            self.sleeper.sleep(ns)
        };
        self.mode.store(OUTSIDE, Ordering::SeqCst);
        signal
    }

    /// Ends the vCPU's HLT, or its next one, whatever its RFLAGS.IF.
    pub fn unhalt(&self) {
        self.unhalt.store(true, Ordering::SeqCst);
        self.kick();
    }

    /// Whether `unhalt` was called and has not had its effect.
    pub fn unhalted(&self) -> bool {
        self.unhalt.load(Ordering::SeqCst)
    }

    /// The same, and now it has.
    pub fn take_unhalt(&self) -> bool {
        self.unhalted() && self.unhalt.swap(false, Ordering::SeqCst)
    }

    /// Arms the timer that kicks the vCPU, for CPUs without a preemption
    /// timer.
    pub fn arm_timer(&self, ns: u64) {
        if let Some(t) = &self.timer {
            t.arm(ns);
        }
    }

    /// Whether the timer has fired since this was last asked.
    #[inline]
    pub fn take_timer_fired(&self) -> bool {
        self.timer_fired.load(Ordering::Relaxed) && self.timer_fired.swap(false, Ordering::SeqCst)
    }

    /// The timer has fired (interrupt context).
    pub fn timer_fired(&self) {
        self.timer_fired.store(true, Ordering::SeqCst);
        self.poke();
    }
}

impl<C: VirtualCpu> Inner<C> {
    // Not inlined, for the stack's sake.
    #[inline(never)]
    #[optimize(speed)]
    fn new(hw: C, mut lapic: Lapic<MailboxRef>, cpuid: Box<CpuidTable>) -> Self {
        // With AVIC other CPUs set IRR whether it is on here or not.
        let delivers = hw.apic_virt().contains(ApicVirt::INTERRUPTS) || global::get().avic;
        lapic.use_virtual_delivery(delivers);
        Inner {
            lapic,
            pv: Pv::default(),
            msr: MsrState::new(&msr_config(global::get().tsc_hz), &cpuid),
            cpuid,
            config_gen: 0,
            cpuid_gen: 0,
            exit: VmExitRaw::default(),
            next_rip: None,
            vectoring: None,
            exception: None,
            attention: true,
            wait: Wait::No,
            tsc_adjust: 0,
            scaling: None,
            may_run: false,
            halt_exit: false,
            pause_exit: false,
            mtrap_exit: false,
            invpcid: false,
            pause_window: 0,
            active_seen: 1,
            timer_armed: 0,
            halt_poll: HaltPoll::new(global::get().halt_poll),
            code: tlb::Code::new(),
            data: tlb::Data::new(),
            unfinished: Unfinished::new(),
            hw,
        }
    }
}

impl<C: VirtualCpu + ?Sized> Inner<C> {
    /// Makes the CPUID table anew if the VM's settings have changed.
    // Not inlined: a table is put together on the stack, and `run` stays
    // there for long.
    #[cold]
    #[inline(never)]
    pub fn refresh_config(&mut self, vm: &Vm, id: u32) {
        let generation = vm.config_gen.load(Ordering::Acquire);
        if self.cpuid_gen != generation {
            let cfg = cpuid_config(vm, id, self.lapic.x2apic_offered());
            *self.cpuid = CpuidTable::blank();
            self.cpuid.fill(&cfg, global::trusted_cpuid);
            self.cpuid_gen = generation;
        }
        self.config_gen = generation;
    }

    /// The guest's TSC goes as the VM's is to; the VMCS is current.
    pub fn scale_tsc(&mut self, vm: &Vm) {
        self.scaling = vm.tsc_scaling();
        self.msr.set_tsc_hz(vm.tsc_hz.load(Ordering::Relaxed));
        self.hw
            .set_tsc_multiplier(self.scaling.map_or(0, |s| s.multiplier));
        self.apply_tsc(vm);
    }

    /// How the CPU is to virtualize the local APIC in its present mode.
    #[inline]
    pub fn lapic_mode(&self) -> ApicMode {
        lapic_mode(&self.lapic)
    }

    /// Brings the vCPU back to power-on state (VM_REINIT).
    pub fn reset(&mut self, vm: &Vm) {
        self.hw.reset(Reset::PowerOn);
        self.hw.set_apic_mode(ApicMode::XApic);
        self.lapic.reset();
        self.pv = Pv::default();
        self.msr = MsrState::new(&msr_config(vm.tsc_hz.load(Ordering::Relaxed)), &self.cpuid);
        self.exit = VmExitRaw::default();
        self.next_rip = None;
        self.vectoring = None;
        self.exception = None;
        self.attention = true;
        self.wait = Wait::No;
        self.tsc_adjust = 0;
        self.may_run = false;
        self.apply_tsc(vm);
    }

    /// Tells the CPU the guest's TSC offset.
    pub fn apply_tsc(&mut self, vm: &Vm) {
        let offset = self.guest_tsc(vm, 0);
        self.hw.set_tsc_offset(offset as i64);
    }

    /// The guest's TSC when the host's is this.
    pub fn guest_tsc(&self, vm: &Vm, host: u64) -> u64 {
        let since = match &self.scaling {
            None => host.wrapping_sub(vm.tsc_base),
            Some(s) => s.apply(host).wrapping_sub(s.apply(vm.tsc_base)),
        };
        since.wrapping_add(self.tsc_adjust)
    }

    /// The host's TSC at the guest's, as seen at `now`.
    pub fn host_tsc(&self, vm: &Vm, guest: u64, now: u64) -> u64 {
        match &self.scaling {
            // The difference is constant.
            None => guest
                .wrapping_sub(self.tsc_adjust)
                .wrapping_add(vm.tsc_base),
            Some(s) => scaled_host_tsc(s, guest, self.guest_tsc(vm, now), now),
        }
    }
}

/// The host's TSC at a guest's scaled one, which is `guest_now` at `now`.
#[cold]
#[inline(never)]
fn scaled_host_tsc(s: &Scaling, guest: u64, guest_now: u64, now: u64) -> u64 {
    match guest.checked_sub(guest_now) {
        Some(ticks) => now.saturating_add(s.back(ticks)),
        None => now,
    }
}

#[inline(never)]
fn lapic_mode(lapic: &Lapic<MailboxRef>) -> ApicMode {
    if global::get().avic && (lapic.virtual_wire() || lapic.id() > u32::from(MAX_ID)) {
        return ApicMode::Disabled;
    }
    if lapic.x2apic() {
        ApicMode::X2Apic
    } else if lapic.mmio() && lapic.base_gpa() == DEFAULT_BASE {
        ApicMode::XApic
    } else {
        // Off, or at an address where the APIC-access page is not
        // mapped: nested faults reach it.
        ApicMode::Disabled
    }
}

/// Shortest period of a local APIC timer: more often than that it would
/// keep a host CPU busy.
const MAX_TIMER_HZ: u64 = 50_000;

/// How often a busy guest is left at least; the host's own ticks mostly come
/// first.
const LEAVES_PER_SECOND: u64 = 100;

// Not inlined, for the stack's sake.
#[inline(never)]
fn cpuid_table(vm: &Vm, id: u32) -> Result<Box<CpuidTable>, NoMemory> {
    let mut table = sync::try_box_with(CpuidTable::blank)?;
    table.fill(&cpuid_config(vm, id, false), global::trusted_cpuid);
    Ok(table)
}

fn cpuid_config(vm: &Vm, id: u32, x2apic: bool) -> CpuidConfig {
    let g = global::get();
    CpuidConfig {
        vendor: vendor(),
        vcpu_id: id,
        apic_id: id,
        topology: vm.topology(),
        tsc_hz: vm.tsc_hz.load(Ordering::Relaxed),
        lapic_hz: lapic_timer_hz(g.tsc_hz),
        x2apic,
        hypervisor: true,
        kvm: Some(vm.pv_features()),
        phys_bits: 0,
        caps: g.cpuid_caps,
    }
}

fn msr_config(tsc_hz: u64) -> MsrConfig {
    let g = global::get();
    MsrConfig {
        vendor: vendor(),
        microcode: g.microcode,
        arch_capabilities: g.arch_capabilities,
        tsc_hz,
    }
}

/// Whose conventions the guest's CPUID and MSRs follow: the host's.
fn vendor() -> Vendor {
    if global::get().backend.is_amd() {
        Vendor::Amd
    } else {
        Vendor::Intel
    }
}
