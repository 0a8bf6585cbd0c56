//! A virtual machine, and the list of all of them.

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::ffi::{c_char, c_void};
use core::ops::Deref;
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};

use vmm_core::apicbus::{self, ApicMessage, IrqSink};
use vmm_core::chipset::Chipset;
use vmm_core::cpuid::Topology;
use vmm_core::lapic::{Lvt, Mailbox};
use vmm_core::pmtmr::PmTimer;
use vmm_core::time::{Clock, Scaling};
use vmm_hw::backend::ApicVirt;
use vmm_hw::ept::{Generation, Invalidation, Prot};
use vmm_hw::page::Pages;
use vmm_hw::svm::avic;

use crate::avic::ring;
use crate::cpuset::{CpuSet, MAX_VCPUS};
use crate::doorbells::Doorbells;
use crate::errno;
use crate::ffi;
use crate::global;
use crate::memory::MemMap;
use crate::os::{self, Os};
use crate::ports::ConstantPorts;
use crate::rings::OutRings;
use crate::sync::{self, Mutex, NoMemory, RawMutex, SpinLock, Timer};
use crate::vcpu::Vcpu;
use crate::vm_memory::Memory;

/// Longest name, bytes without the NUL (FreeBSD 13's VM_MAX_NAMELEN).
pub const NAME_MAX: usize = 229;

/// Longest name of a file, bytes without the NUL.
pub const FILE_NAME_MAX: usize = 255;

/// vCPUs that can wait at once to be started by userland: all there are.
const MAX_SPINUPS: usize = MAX_VCPUS;

/// A reference to a vCPU, or to none, as interrupt routing sees it.
pub struct Slot(AtomicPtr<Vcpu>);

static NOBODY: Mailbox = Mailbox::new(u32::MAX);

impl AsRef<Mailbox> for Slot {
    #[inline]
    fn as_ref(&self) -> &Mailbox {
        self.get().map_or(&NOBODY, |v| &v.mailbox)
    }
}

impl Slot {
    #[inline]
    fn get(&self) -> Option<&Vcpu> {
        let p = self.0.load(Ordering::Acquire);
        // SAFETY: a vCPU, once published here, lives as long as its VM.
        unsafe { p.as_ref() }
    }
}

/// A virtual machine.
pub struct Vm {
    refs: AtomicUsize,
    next: AtomicPtr<Vm>,
    name: [u8; NAME_MAX + 1],
    name_len: usize,
    node: AtomicPtr<ffi::Node>,
    dying: AtomicBool,
    /// How TSC ticks relate to other clocks.
    pub clock: Clock,
    /// Host TSC at which the guest's TSC is 0.
    pub tsc_base: u64,
    /// Guest memory.
    pub mem: Mutex<Memory>,
    /// PCI functions that the VM has.
    pub functions: AtomicU32,
    /// What tells a CPU where the nested page tables are.
    pub nested_root: u64,
    /// Which generation of them the CPUs have seen.
    pub generation: Arc<Generation>,
    /// Devices that are not a vCPU's own.
    pub chipset: Box<SpinLock<Chipset>>,
    /// The chipset's PM timer, to be read without its lock.
    pub pm_timer: PmTimer,
    /// Ports that userland has answered in advance.
    pub constant_ports: ConstantPorts,
    /// What OUTs to some ports ring.
    pub doorbells: Box<Doorbells>,
    /// Where the bytes of OUTs to some ports go.
    pub out_rings: OutRings,
    chipset_timer: Option<Timer>,
    slots: Box<[Slot]>,
    nslots: AtomicUsize,
    /// Serializes the making of vCPUs.
    making: Mutex<()>,
    /// Sockets, cores and threads, 16 bits each from the lowest up.
    topology: AtomicU64,
    /// `vmm_core::pv::Features` that the guest may have.
    pub(crate) pv_wanted: AtomicU32,
    /// The guest's TSC frequency, Hz.
    pub(crate) tsc_hz: AtomicU64,
    /// Changes whenever `topology`, `pv_wanted` or `tsc_hz` does.
    pub config_gen: AtomicU32,
    /// Whose turn it is among equals in lowest-priority arbitration.
    turn: AtomicU32,
    /// Page behind the local APIC's address while the CPU virtualizes it; its
    /// contents are never used.
    pub(crate) apic_access: Pages<Os>,
    pub(crate) apic_page_used: bool,
    /// AVIC's tables, where it is used, and whether `apic_access` is mapped for it.
    pub(crate) avic: Option<avic::Tables<Os>>,
    pub(crate) avic_mapped: AtomicBool,
    /// vCPUs whose local APIC is not reached through that page.
    pub(crate) no_apic_page: CpuSet,
    /// Number that tells VMs apart for the CPU backend.
    pub hw_id: u64,
    /// Odd: something of what `Runner::must_leave` looks for may be there. The rest
    /// tells one time that it was set from another.
    stop: AtomicU32,
    /// SuspendHow, 0 while the VM runs.
    pub suspend: AtomicU32,
    /// vCPUs that may run.
    pub active: CpuSet,
    active_count: AtomicU32,
    /// vCPUs that have seen `suspend`.
    pub suspended: CpuSet,
    /// vCPUs that a debugger stopped.
    pub debug: CpuSet,
    /// vCPUs that executed HLT with interrupts off.
    halted: CpuSet,
    /// How often one of them was taken out again.
    unhalted: AtomicU32,
    /// vCPUs that a SIPI asks userland to start, with their vectors in the
    /// low 8 bits and the vCPU above; 0 = free.
    spinups: Box<[AtomicU32]>,
    spinup_count: AtomicU32,
}

// SAFETY: fields that are not atomic or locked are constant once the VM has
// been published; `chipset_timer` is the host's, which locks itself.
unsafe impl Sync for Vm {}
// SAFETY: as above.
unsafe impl Send for Vm {}

struct List(*mut Vm);
// SAFETY: the list is only touched under its lock.
unsafe impl Send for List {}

static VMS: SpinLock<List> = SpinLock::new(List(ptr::null_mut()));

/// A counted reference to a VM.
pub struct VmRef(NonNull<Vm>);

impl Deref for VmRef {
    type Target = Vm;
    fn deref(&self) -> &Vm {
        // SAFETY: the reference is counted.
        unsafe { self.0.as_ref() }
    }
}

impl Drop for VmRef {
    fn drop(&mut self) {
        // SAFETY: gives back this reference.
        unsafe { Vm::put(self.0.as_ptr()) }
    }
}

impl Vm {
    /// Makes a VM and its device node.
    ///
    /// EINVAL for a name that no node can have, EEXIST, ENOMEM.
    pub fn create(name: &[u8]) -> Result<(), i32> {
        check_name(name)?;
        let vm = Self::build(name).map_err(|_| errno::ENOMEM)?;
        let vm = Box::into_raw(vm);
        {
            let mut list = VMS.lock();
            if !list.find(name).is_null() {
                drop(list);
                // SAFETY: never published; this is the only pointer.
                drop(unsafe { Box::from_raw(vm) });
                return Err(errno::EEXIST);
            }
            // SAFETY: `vm` is valid; the list lock is held.
            unsafe { (*vm).next.store(list.0, Ordering::Relaxed) };
            list.0 = vm;
        }
        let mut node = ptr::null_mut();
        // SAFETY: `vm` lives while it is on the list; the name ends with NUL.
        let error = unsafe {
            ffi::vmm_host_node_create(
                (*vm).name.as_ptr().cast::<c_char>(),
                vm.cast(),
                -1,
                &mut node,
            )
        };
        if error != 0 {
            VMS.lock().remove(vm);
            // SAFETY: gives back the list's reference.
            unsafe { Vm::put(vm) };
            return Err(error);
        }
        // SAFETY: as above.
        unsafe { (*vm).node.store(node, Ordering::Release) };
        Ok(())
    }

    // Not inlined: a VM is put together on the stack, which a host's device
    // layer, called next, needs for itself.
    #[inline(never)]
    fn build(name: &[u8]) -> Result<Box<Vm>, NoMemory> {
        let g = global::get();
        let clock = Clock::new(g.tsc_hz);
        let now = os::rdtsc();
        let wall = os::wallclock();
        let chipset = sync::try_box_with(|| SpinLock::new(Chipset::new(&clock, now, wall)))?;
        let pm_timer = chipset.lock().pmtmr;
        let nested = g.backend.nested_tables().map_err(|_| NoMemory)?;
        let nested_root = nested.root();
        let generation = nested.generation();
        let apic_access = Pages::new(0).map_err(|_| NoMemory)?;
        let avic = match g.avic {
            true => Some(avic::Tables::new().map_err(|_| NoMemory)?),
            false => None,
        };
        let apic_page_used = g.avic || g.backend.apic_virt().contains(ApicVirt::ACCESS_PAGE);
        let mut stored = [0; NAME_MAX + 1];
        for (to, from) in stored.iter_mut().zip(name) {
            *to = *from;
        }
        let lock = RawMutex::new()?;
        let mut vm = sync::try_box(Vm {
            refs: AtomicUsize::new(1),
            next: AtomicPtr::new(ptr::null_mut()),
            name: stored,
            name_len: name.len(),
            node: AtomicPtr::new(ptr::null_mut()),
            dying: AtomicBool::new(false),
            clock,
            tsc_base: now,
            mem: Mutex::of(
                lock,
                Memory {
                    map: MemMap::default(),
                    nested,
                    iommu: None,
                    dma: false,
                },
            ),
            functions: AtomicU32::new(0),
            nested_root,
            generation,
            chipset,
            pm_timer,
            constant_ports: ConstantPorts::new(),
            doorbells: sync::try_box_with(Doorbells::new)?,
            out_rings: OutRings::new()?,
            chipset_timer: None,
            // SAFETY: null pointers.
            slots: unsafe { sync::try_slice_zeroed::<Slot>(MAX_VCPUS)? },
            nslots: AtomicUsize::new(0),
            making: Mutex::new(())?,
            topology: AtomicU64::new(1 | 1 << 16 | 1 << 32),
            pv_wanted: AtomicU32::new(u32::MAX),
            tsc_hz: AtomicU64::new(g.tsc_hz),
            config_gen: AtomicU32::new(1),
            turn: AtomicU32::new(0),
            apic_access,
            apic_page_used,
            avic,
            avic_mapped: AtomicBool::new(false),
            no_apic_page: CpuSet::new(),
            hw_id: g.backend.new_vm_id(),
            stop: AtomicU32::new(0),
            suspend: AtomicU32::new(0),
            active: CpuSet::new(),
            active_count: AtomicU32::new(0),
            suspended: CpuSet::new(),
            debug: CpuSet::new(),
            halted: CpuSet::new(),
            unhalted: AtomicU32::new(0),
            // SAFETY: zeroes, atomic.
            spinups: unsafe { sync::try_slice_zeroed::<AtomicU32>(MAX_SPINUPS)? },
            spinup_count: AtomicU32::new(0),
        })?;
        if vm.avic.is_none() {
            let mut mem = vm.mem.lock();
            vm.map_apic_page(&mut mem.nested, Prot::READ | Prot::WRITE)
                .map_err(|_| NoMemory)?;
        }
        let target = ptr::from_mut::<Vm>(&mut vm).cast::<c_void>();
        vm.chipset_timer = Some(Timer::new(target)?);
        Ok(vm)
    }

    /// Finds a VM by name.
    pub fn lookup(name: &[u8]) -> Option<VmRef> {
        let list = VMS.lock();
        let vm = NonNull::new(list.find(name))?;
        // SAFETY: on the list, so alive.
        unsafe { vm.as_ref() }.refs.fetch_add(1, Ordering::Relaxed);
        Some(VmRef(vm))
    }

    /// Takes the VM's nodes and name away and makes every vCPU leave; its
    /// memory goes with the last open file. EINVAL: no such VM, or somebody
    /// else is at it, as FreeBSD's hw.vmm.destroy has it.
    pub fn destroy(name: &[u8]) -> Result<(), i32> {
        let vm = Self::lookup(name).ok_or(errno::EINVAL)?;
        let node = vm.node.swap(ptr::null_mut(), Ordering::AcqRel);
        if node.is_null() {
            return Err(errno::EINVAL);
        }
        vm.dying.store(true, Ordering::SeqCst);
        vm.set_stop();
        // The segments' nodes first. They lead to the VM as well, so none may
        // be left once the list's reference has been given back; `dying`
        // sees to it that no new ones come.
        for node in vm.mem.lock().map.take_nodes() {
            // SAFETY: taken out of its segment, so removed once.
            unsafe { ffi::vmm_host_node_destroy(node.as_ptr()) };
        }
        // SAFETY: whoever got the node out of `node` removes it.
        unsafe { ffi::vmm_host_node_destroy(node) };
        vm.kick_all();
        VMS.lock().remove(vm.0.as_ptr());
        // SAFETY: gives back the list's reference.
        unsafe { Vm::put(vm.0.as_ptr()) };
        Ok(())
    }

    /// Adds a reference.
    ///
    /// # Safety
    /// `vm` is alive.
    pub unsafe fn get(vm: *mut Vm) {
        // SAFETY: by the caller's word.
        unsafe { (*vm).refs.fetch_add(1, Ordering::Relaxed) };
    }

    /// Gives a reference back.
    ///
    /// # Safety
    /// The caller has one.
    pub unsafe fn put(vm: *mut Vm) {
        // SAFETY: by the caller's word it is alive as long as the caller's
        // reference has not been given back.
        let refs = unsafe { &(*vm).refs };
        let mut n = refs.load(Ordering::Acquire);
        loop {
            if n == 2 {
                // Nobody has it open any more, so that nobody looks after its
                // PCI functions.
                // SAFETY: as above.
                crate::ppt::quiesce(unsafe { &*vm });
            }
            match refs.compare_exchange(n, n - 1, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => break,
                Err(now) => n = now,
            }
        }
        if n == 1 {
            // SAFETY: that was the last reference.
            drop(unsafe { Box::from_raw(vm) });
        }
    }

    /// Physical address of the APIC-access page.
    pub fn apic_access_pa(&self) -> u64 {
        self.apic_access.pa()
    }

    /// The VM's name.
    pub fn name(&self) -> &[u8] {
        self.name.get(..self.name_len).unwrap_or_default()
    }

    /// Whether the VM has been destroyed.
    #[inline]
    pub fn dying(&self) -> bool {
        self.dying.load(Ordering::SeqCst)
    }

    /// The vCPU, if it has been made.
    #[inline]
    pub fn vcpu(&self, id: usize) -> Option<&Vcpu> {
        self.slots.get(id)?.get()
    }

    /// The vCPUs that have been made.
    pub fn vcpus(&self) -> impl Iterator<Item = &Vcpu> {
        self.slots().iter().filter_map(Slot::get)
    }

    /// Slots up to the highest vCPU that has been made.
    #[inline]
    pub fn slots(&self) -> &[Slot] {
        self.slots
            .get(..self.nslots.load(Ordering::Acquire))
            .unwrap_or_default()
    }

    /// The vCPU, made if need be. EINVAL: no such number. ENOMEM.
    pub fn ensure_vcpu(&self, id: i32) -> Result<&Vcpu, i32> {
        let id = usize::try_from(id).map_err(|_| errno::EINVAL)?;
        let slot = self.slots.get(id).ok_or(errno::EINVAL)?;
        if let Some(v) = slot.get() {
            return Ok(v);
        }
        let making = self.making.lock();
        if slot.get().is_none() {
            let vcpu = Vcpu::new(self, id as u32).map_err(|_| errno::ENOMEM)?;
            slot.0.store(Box::into_raw(vcpu), Ordering::Release);
            self.nslots.fetch_max(id + 1, Ordering::AcqRel);
        }
        drop(making);
        slot.get().ok_or(errno::EINVAL)
    }

    /// Makes every vCPU look at the VM's state.
    pub fn kick_all(&self) {
        for v in self.vcpus() {
            v.poke();
        }
    }

    /// Notes that userland is to start a vCPU.
    pub fn add_spinup(&self, vcpu: u32, vector: u8) {
        let value = 1 << 31 | vcpu << 8 | u32::from(vector);
        for slot in self.spinups.iter() {
            if slot
                .compare_exchange(0, value, Ordering::SeqCst, Ordering::SeqCst)
                .is_ok()
            {
                self.spinup_count.fetch_add(1, Ordering::SeqCst);
                self.set_stop();
                return;
            }
        }
    }

    /// The next vCPU that userland is to start, and where.
    #[inline]
    pub fn next_spinup(&self) -> Option<(i32, u8)> {
        if self.spinup_count.load(Ordering::Relaxed) == 0 {
            return None;
        }
        self.spinups.iter().find_map(|slot| {
            let value = slot.swap(0, Ordering::SeqCst);
            (value != 0).then(|| {
                self.spinup_count.fetch_sub(1, Ordering::SeqCst);
                (((value & !(1 << 31)) >> 8) as i32, value as u8)
            })
        })
    }

    /// Makes one vCPU look.
    #[inline]
    pub fn kick(&self, id: usize) {
        if let Some(v) = self.vcpu(id) {
            v.kick_unless(|| self.avic.as_ref().is_some_and(|tables| ring(tables, v)));
        }
    }

    /// Routes an interrupt message to the vCPUs that it addresses. INIT and
    /// start-up messages included.
    #[optimize(speed)]
    pub fn deliver(&self, message: &ApicMessage) -> usize {
        apicbus::deliver(self.slots(), message, &self.turn, |id| self.kick(id))
    }

    /// Puts a vCPU among the active ones; false if it was one.
    pub fn set_active(&self, id: usize) -> bool {
        if self.active.set(id) {
            return false;
        }
        self.active_count.fetch_add(1, Ordering::SeqCst);
        true
    }

    /// Notes that a vCPU may not be in HLT with interrupts off any more; to be
    /// called before it takes what may have woken it.
    pub fn not_halted(&self, id: usize) {
        if self.halted.contains(id) {
            self.halted.clear(id);
            self.unhalted.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Notes that a vCPU is in HLT with interrupts off. True: all are, and nobody is
    /// left to wake one.
    // Not inlined: it would be a part of the run loop.
    #[cold]
    #[inline(never)]
    pub fn halt(&self, id: usize) -> bool {
        self.halted.set(id);
        let before = self.unhalted.load(Ordering::SeqCst);
        self.active.subset_of(&self.halted)
            && !self.woken()
            // One that was found halted may have been on its way out, and have taken
            // what woke it before that was looked for.
            && self.unhalted.load(Ordering::SeqCst) == before
    }

    /// Whether an active vCPU has been sent something that it has not looked at:
    /// by one that went to sleep itself since.
    fn woken(&self) -> bool {
        self.vcpus()
            .any(|v| self.active.contains(v.id as usize) && (v.unhalted() || v.mailbox.pending()))
    }

    /// How many vCPUs are active.
    #[inline]
    pub fn active_count(&self) -> u32 {
        self.active_count.load(Ordering::Relaxed)
    }

    /// Acknowledges the 8259 pair: the vector, if it still wants one taken,
    /// and whether there is more.
    pub fn acknowledge_extint(&self) -> (Option<u8>, bool) {
        self.with_chipset(|c, _, _| c.extint_acknowledge())
    }

    /// Sockets, cores, threads.
    pub fn topology(&self) -> Topology {
        let t = self.topology.load(Ordering::Acquire);
        Topology {
            sockets: t as u16,
            cores: (t >> 16) as u16,
            threads: (t >> 32) as u16,
        }
    }

    /// Sets them; vCPUs take it over when they run next.
    pub fn store_topology(&self, sockets: u16, cores: u16, threads: u16) {
        let t = u64::from(sockets) | u64::from(cores) << 16 | u64::from(threads) << 32;
        self.topology.store(t, Ordering::Release);
    }

    /// Makes every vCPU that the topology names, so that messages to all
    /// reach those that userland has not started yet.
    pub fn ensure_topology(&self) -> Result<(), i32> {
        let t = self.topology();
        let n = usize::from(t.sockets) * usize::from(t.cores) * usize::from(t.threads);
        for id in 0..n.min(MAX_VCPUS) {
            self.ensure_vcpu(id as i32)?;
        }
        Ok(())
    }

    /// Brings the VM back to power-on state. EBUSY while vCPUs run.
    pub fn reinit(&self) -> Result<(), i32> {
        if !self.active.same(&self.suspended) {
            return Err(errno::EBUSY);
        }
        crate::ppt::quiesce(self);
        for v in self.vcpus() {
            let mut inner = v.freeze();
            crate::regs::with_current(&mut inner, |i| i.reset(self));
            let _ = v.take_unhalt();
        }
        for v in self.vcpus() {
            self.apic_mode_changed(v.id as usize, true)?;
        }
        let mut mem = self.mem.lock();
        let Memory { map, nested, .. } = &mut *mem;
        let mut unmapped = Ok(Invalidation::None);
        map.unmap_devices(|gpa, len| {
            // Every vCPU is out of the guest, and invalidates on its way back.
            unmapped = unmapped.and(nested.unmap(gpa, len));
        });
        drop(mem);
        let _ = unmapped.map_err(|_| errno::ENOMEM)?;
        self.with_chipset(|c, now, sink| c.reset(now, sink));
        self.constant_ports.clear();
        self.out_rings.clear();
        self.doorbells.clear();
        self.suspend.store(0, Ordering::SeqCst);
        self.active.zero();
        self.active_count.store(0, Ordering::SeqCst);
        self.suspended.zero();
        self.halted.zero();
        while self.next_spinup().is_some() {}
        self.debug.zero();
        Ok(())
    }

    /// How the CPU makes the guest's TSC of the host's, where they are not the same.
    #[cold]
    pub fn tsc_scaling(&self) -> Option<Scaling> {
        let (from, to) = (self.clock.tsc_hz, self.tsc_hz.load(Ordering::Relaxed));
        if from == to {
            return None;
        }
        let fraction = global::get().backend.tsc_fraction()?;
        Scaling::new(from, to, fraction)
    }

    /// VM_EXT_PV: the guest's TSC frequency from its first run on. EOPNOTSUPP, EBUSY.
    pub fn set_tsc(&self, khz: u32) -> Result<(), i32> {
        let (host, hz) = (self.clock.tsc_hz, u64::from(khz) * 1000);
        // Two calibrations of one clock differ by as much.
        let hz = if hz.abs_diff(host) <= host / 10_000 || khz == 0 {
            host
        } else {
            hz
        };
        let old = self.tsc_hz.swap(hz, Ordering::Relaxed);
        let bad = if old == hz {
            return Ok(());
        } else if !self.active.is_empty() {
            errno::EBUSY
        } else if hz != host && self.tsc_scaling().is_none() {
            errno::EOPNOTSUPP
        } else {
            return Ok(());
        };
        self.tsc_hz.store(old, Ordering::Relaxed);
        Err(bad)
    }

    /// Does `f` with the chipset; interrupts that come of it are delivered
    /// and the chipset's timer follows.
    #[inline]
    pub fn with_chipset<R>(&self, f: impl FnOnce(&mut Chipset, u64, &mut Sink<'_>) -> R) -> R {
        let (mut f, mut done) = (Some(f), None);
        loop {
            self.change_chipset(&mut |c, now, sink| done = f.take().map(|f| f(c, now, sink)));
            if let Some(done) = done.take() {
                return done;
            }
        }
    }

    // Not generic: there are two dozen uses.
    #[inline(never)]
    #[optimize(speed)]
    fn change_chipset(&self, f: &mut dyn FnMut(&mut Chipset, u64, &mut Sink<'_>)) {
        let now = os::rdtsc();
        let mut chipset = self.chipset.lock();
        let before = chipset.next_deadline();
        f(&mut chipset, now, &mut Sink(self));
        let after = chipset.next_deadline();
        if after != before {
            self.arm(after, now);
        }
    }

    /// As [`Vm::with_chipset`], for what moves no deadline.
    #[optimize(speed)]
    pub fn look_at_chipset<R>(&self, f: impl FnOnce(&mut Chipset, u64, &mut Sink<'_>) -> R) -> R {
        let now = os::rdtsc();
        f(&mut self.chipset.lock(), now, &mut Sink(self))
    }

    fn arm(&self, deadline: Option<u64>, now: u64) {
        let Some(timer) = &self.chipset_timer else {
            return;
        };
        match deadline {
            Some(at) => timer.arm(self.clock.to_ns.apply_up(at.saturating_sub(now))),
            None => timer.disarm(),
        }
    }

    /// The chipset's timer has fired (interrupt context).
    pub fn timer_fired(&self) {
        let now = os::rdtsc();
        let mut chipset = self.chipset.lock();
        chipset.service(now, &mut Sink(self));
        let next = chipset.next_deadline();
        self.arm(next, os::rdtsc());
    }

    /// Stops all vCPUs for the given reason. EINVAL, EALREADY.
    pub fn suspend(&self, how: u32) -> Result<(), i32> {
        if how == 0 || how > 4 {
            return Err(errno::EINVAL);
        }
        self.suspend
            .compare_exchange(0, how, Ordering::SeqCst, Ordering::SeqCst)
            .map_err(|_| errno::EALREADY)?;
        self.set_stop();
        self.kick_all();
        Ok(())
    }

    /// Whether something of what `Runner::must_leave` looks for may be there.
    #[inline]
    pub fn may_stop(&self) -> bool {
        self.stop.load(Ordering::SeqCst) & 1 != 0
    }

    /// Sees to it that `may_stop` is true; to be called with the reason in place,
    /// before anybody is poked for it.
    pub fn set_stop(&self) {
        // From here on nobody takes it back who has not seen the reason.
        self.stop.fetch_add(2, Ordering::SeqCst);
        self.stop.fetch_or(1, Ordering::SeqCst);
    }

    /// Takes that back unless there is a reason for it.
    pub fn look_whether_to_stop(&self) {
        let seen = self.stop.load(Ordering::SeqCst);
        if self.dying()
            || self.suspend.load(Ordering::SeqCst) != 0
            || self.spinup_count.load(Ordering::SeqCst) != 0
            || !self.debug.is_empty()
        {
            return;
        }
        // At no moment is it false with a reason there: a vCPU may have used up its
        // poke and be just about to look. Who set it meanwhile keeps it set.
        let _ = self
            .stop
            .compare_exchange(seen, seen & !1, Ordering::SeqCst, Ordering::SeqCst);
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // PCI functions and the timer first: their interrupts use the chipset
        // and the vCPUs.
        crate::ppt::unbind_all(self);
        self.chipset_timer = None;
        for slot in &self.slots {
            let v = slot.0.swap(ptr::null_mut(), Ordering::AcqRel);
            if !v.is_null() {
                // SAFETY: made by `ensure_vcpu`; nobody runs it any more, as
                // every thread inside holds a reference to the VM.
                drop(unsafe { Box::from_raw(v) });
            }
        }
    }
}

impl List {
    fn find(&self, name: &[u8]) -> *mut Vm {
        let mut at = self.0;
        // SAFETY: everything on the list is alive.
        while let Some(vm) = unsafe { at.as_ref() } {
            // Not by `==`: it would be the only use of memcmp.
            if vm.name().iter().eq(name) {
                return at;
            }
            at = vm.next.load(Ordering::Relaxed);
        }
        ptr::null_mut()
    }

    fn remove(&mut self, vm: *mut Vm) {
        // SAFETY: `vm` and everything on the list is alive.
        let next = unsafe { (*vm).next.load(Ordering::Relaxed) };
        if self.0 == vm {
            self.0 = next;
            return;
        }
        let mut at = self.0;
        // SAFETY: as above.
        while let Some(prev) = unsafe { at.as_ref() } {
            let following = prev.next.load(Ordering::Relaxed);
            if following == vm {
                prev.next.store(next, Ordering::Relaxed);
                return;
            }
            at = following;
        }
    }
}

/// Whether a VM or a segment can have this name, which becomes a file's.
/// EINVAL, ENAMETOOLONG.
pub fn check_name(name: &[u8]) -> Result<(), i32> {
    // The name becomes a file's: no separator (nor what devtmpfs takes for
    // one), nothing unprintable, not a directory's own name.
    let bad = |b: &u8| !b.is_ascii_graphic() || matches!(b, b'/' | b'!' | b'\\');
    if name.is_empty()
        || name.len() > NAME_MAX
        || name.iter().any(bad)
        || name == b"."
        || name == b".."
    {
        return Err(errno::EINVAL);
    }
    Ok(())
}

/// Where the chipset's interrupts go.
pub struct Sink<'a>(pub &'a Vm);

impl IrqSink for Sink<'_> {
    fn message(&mut self, message: &ApicMessage) -> bool {
        self.0.deliver(message) != 0
    }

    fn lint0(&mut self) {
        if let Some(v) = self.0.vcpu(0) {
            v.mailbox.post_local(Lvt::Lint0);
            v.kick();
        }
    }
}
