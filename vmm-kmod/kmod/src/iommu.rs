//! What a VM's PCI functions see of its memory: through the host's own IOMMU
//! driver where that is at work, otherwise through ours (VT-d and AMD-Vi).

pub mod place;
pub mod remap;

use alloc::vec::Vec;
use core::ffi::{c_int, c_void};
use core::mem::ManuallyDrop;
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vmm_core::iommu::acs::Ids;
use vmm_hw::ept::{AmdviFormat, Ept, MemType, Options, Prot, VtdFormat};
use vmm_hw::vtd::{Fault, Refusal, Registers};
use vmm_hw::{amdvi, vtd};

use self::place::{own_name, unit_of};
use self::remap::Remap;
use crate::errno;
use crate::klog;
use crate::os::Os;
use crate::ppt::Rid;
use crate::ppt::host::{self, Device};
use crate::sync::{SpinGuard, SpinLock, Timer};

/// How often faults are looked for, ns.
const FAULT_POLL: u64 = 500_000_000;

/// Functions that an IOMMU puts under one domain, whatever else is wished.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// As the host's driver has them.
    Host(host::Group),
    /// One function under our own driver.
    Own(Rid),
}

/// A unit's registers, mapped.
struct Mmio(NonNull<u8>);

// SAFETY: registers are the machine's, not a CPU's. Who changes something holds the lock
// of `UNITS`, or is alone (module load and unload); where the host has the unit too, all
// its CPUs stand still.
unsafe impl Send for Mmio {}

impl Mmio {
    fn at<T>(&self, at: usize) -> *mut T {
        self.0.as_ptr().wrapping_add(at).cast()
    }
}

impl Registers for Mmio {
    fn read32(&self, at: usize) -> u32 {
        // SAFETY: `hw` stays within what the unit says that it has, which
        // `REGISTERS` covers; volatile, as these are registers.
        unsafe { self.at::<u32>(at).read_volatile() }
    }
    fn read64(&self, at: usize) -> u64 {
        // SAFETY: as above.
        unsafe { self.at::<u64>(at).read_volatile() }
    }
    fn write32(&self, at: usize, value: u32) {
        // SAFETY: as above.
        unsafe { self.at::<u32>(at).write_volatile(value) }
    }
    fn write64(&self, at: usize, value: u64) {
        // SAFETY: as above.
        unsafe { self.at::<u64>(at).write_volatile(value) }
    }
}

impl Drop for Mmio {
    fn drop(&mut self) {
        host::unmap_registers(self.0.as_ptr(), REGISTERS);
    }
}

/// Offsets in the capability registers reach this far (10 bits of 16 bytes, and
/// 256 fault records).
const REGISTERS: usize = 0x4000 + 0x1000;

/// A unit of either kind.
enum Unit {
    Intel(vtd::Unit<Os, Mmio>),
    Amd(amdvi::Unit<Os, Mmio>),
}

macro_rules! each {
    ($self:expr, $u:ident => $e:expr) => {
        match $self {
            Unit::Intel($u) => $e,
            Unit::Amd($u) => $e,
        }
    };
}

impl Unit {
    /// What of it decides on tables, whose making takes memory: not with
    /// `UNITS` locked.
    fn shape(&self) -> Shape {
        let (amd, pages_2m, pages_1g, domains) = match self {
            Unit::Intel(u) => {
                let c = u.capabilities();
                (false, c.pages_2m, c.pages_1g, c.domains.min(64))
            }
            Unit::Amd(_) => (true, true, true, 64),
        };
        Shape {
            amd,
            options: Options {
                pages_2m,
                pages_1g,
                accessed_dirty: false,
            },
            domains,
        }
    }

    /// Levels of tables.
    fn levels(&self) -> u8 {
        match self {
            Unit::Intel(u) => u.capabilities().levels,
            Unit::Amd(u) => u.levels(),
        }
    }

    fn attach(
        &mut self,
        rid: Rid,
        root: u64,
        domain: u16,
        remap: Option<u64>,
    ) -> Result<(), Refusal> {
        match self {
            Unit::Intel(u) => u.attach(rid.0, root, domain),
            Unit::Amd(u) => u.attach(rid.0, root, domain, remap),
        }
    }

    fn block(&mut self, rid: Rid) -> Result<(), Refusal> {
        each!(self, u => u.block(rid.0))
    }

    fn let_pass(&mut self, rid: u16, pass: bool) -> Result<(), Refusal> {
        each!(self, u => u.let_pass(rid, pass))
    }

    fn forget_passed(&self) -> Result<(), Refusal> {
        each!(self, u => u.forget_passed())
    }

    fn resume(&self) -> Result<(), Refusal> {
        each!(self, u => u.resume())
    }

    /// AMD's has nothing that Linux would turn off together with it.
    #[cfg(not(feature = "freebsd"))]
    fn suspend(&self) -> Result<(), Refusal> {
        match self {
            Unit::Intel(u) => u.suspend(),
            Unit::Amd(_) => Ok(()),
        }
    }

    /// Has it forget what it knows of a domain.
    fn invalidate(&self, number: u16) -> Result<(), Refusal> {
        match self {
            Unit::Intel(u) => u.invalidate(),
            Unit::Amd(u) => u.invalidate(number),
        }
    }

    /// Whether the host has its queue.
    fn shared(&self) -> bool {
        matches!(self, Unit::Intel(u) if u.shared())
    }

    /// Whether there was no room for some.
    fn faults(&self, f: impl FnMut(Fault)) -> bool {
        each!(self, u => u.faults(f))
    }
}

/// What tables a unit walks.
struct Shape {
    amd: bool,
    options: Options,
    /// Numbers of domains, 64 at most.
    domains: u32,
}

/// Tables of either kind.
enum Tables {
    Intel(Ept<Os, VtdFormat>),
    Amd(Ept<Os, AmdviFormat>),
}

impl Tables {
    /// Those that a unit walks.
    fn new(Shape { amd, options, .. }: Shape) -> Result<Self, i32> {
        if amd {
            Ept::new(options).map(Tables::Amd)
        } else {
            Ept::new(options).map(Tables::Intel)
        }
        .map_err(|_| errno::ENOMEM)
    }

    fn map(&mut self, gpa: u64, hpa: u64, len: u64, prot: Prot) -> Result<(), i32> {
        match self {
            Tables::Intel(t) => t.map(gpa, hpa, len, prot, MemType::WriteBack),
            Tables::Amd(t) => t.map(gpa, hpa, len, prot, MemType::WriteBack),
        }
        .map(|_| ())
        .map_err(|_| errno::ENOMEM)
    }

    fn root_of(&mut self, levels: u8) -> Result<u64, i32> {
        match self {
            Tables::Intel(t) => t.root_of(levels),
            Tables::Amd(t) => t.root_of(levels),
        }
        .map_err(|_| errno::ENOMEM)
    }

    /// Writes back to memory what a unit does not see otherwise.
    fn publish(&self, unit: &Unit) {
        if let (Tables::Intel(t), Unit::Intel(u)) = (self, unit) {
            t.each_table(&mut |pa| u.publish(pa));
        }
    }
}

/// A unit that is on, by the address of its registers.
struct On {
    base: u64,
    unit: Unit,
    /// It did not come back from sleep: whatever it does now, no function is a
    /// guest's under it any more.
    dead: bool,
}

struct Units {
    list: Vec<On>,
    timer: Option<Timer>,
    /// Functions under a domain.
    users: usize,
}

static UNITS: SpinLock<Units> = SpinLock::new(Units {
    list: Vec::new(),
    timer: None,
    users: 0,
});

// Once, not inlined: each mention of the lock's address is one more for the loader.
#[inline(never)]
fn locked() -> SpinGuard<'static, Units> {
    UNITS.lock()
}

/// Domain numbers in use, from 2.
static DOMAINS: AtomicU64 = AtomicU64::new(3);

impl Units {
    fn of(&mut self, base: u64) -> Option<&mut Unit> {
        let on = self.list.iter_mut().find(|on| on.base == base)?;
        Some(&mut on.unit)
    }
}

/// What is asked of a unit.
enum Order {
    Start,
    /// A function under tables, of a number, its interrupts through a table.
    Attach(Rid, u64, u16, Option<u64>),
    Block(Rid),
    ForgetPassed,
    /// It forgets what it knows of a domain.
    Invalidate(u16),
}

/// An order to the unit at an address, or to one that is in no list yet.
struct Job<'a> {
    base: u64,
    new: Option<&'a mut Unit>,
    order: Order,
    done: Result<(), Refusal>,
}

extern "C" fn carry_out(job: *mut c_void) -> c_int {
    // SAFETY: `ask` gives one, which nobody else uses before this returns.
    let job = unsafe { &mut *job.cast::<Job>() };
    let mut units = locked();
    if let Some(unit) = job.new.take().or_else(|| units.of(job.base)) {
        job.done = match job.order {
            Order::Start => unit.resume(),
            Order::Attach(rid, root, number, remap) => unit.attach(rid, root, number, remap),
            Order::Block(rid) => unit.block(rid),
            Order::ForgetPassed => unit.forget_passed(),
            Order::Invalidate(number) => unit.invalidate(number),
        };
    }
    0
}

/// Gives a unit an order. Where the host has the unit's queue it has to keep away from
/// that, by a lock that it shows nobody: it holds it with interrupts off until the unit is
/// done, and so does not hold it while all CPUs stand still.
///
/// Process context, no spin lock held, nor a VM's memory (`Domain::publish`).
fn ask(base: u64, new: Option<&mut Unit>, order: Order) -> Result<(), Refusal> {
    let shared = match &new {
        Some(unit) => unit.shared(),
        None => locked().of(base).is_some_and(|unit| unit.shared()),
    };
    let mut job = Job {
        base,
        new,
        order,
        done: Err(Refusal::Stuck),
    };
    let arg = (&raw mut job).cast();
    if shared {
        // SAFETY: process context; the job lives until this returns.
        unsafe { host::alone(carry_out, arg, ptr::null()) };
    } else {
        carry_out(arg);
    }
    job.done
}

/// Whether the host has an Intel unit remap interrupts.
fn remaps(base: u64) -> bool {
    host::map_registers(base, REGISTERS).is_some_and(|r| vtd::remaps(&Mmio(r)))
}

/// ENXIO: the unit at `base` is dead.
fn alive(units: &Units, base: u64) -> Result<(), i32> {
    if units.list.iter().any(|on| on.base == base && on.dead) {
        klog!(Error, "the IOMMU at {base:#x} did not resume");
        return Err(errno::ENXIO);
    }
    Ok(())
}

/// Whether the unit of a function, which is ours, has come back from every sleep.
/// ENXIO.
pub fn serves(rid: Rid) -> Result<(), i32> {
    let (base, _) = unit_of(rid)?;
    alive(&locked(), base)
}

/// Turns the unit at `base` on, unless it is. ENXIO. Under ppt's lock.
fn turn_on(rid: Rid, (base, amd): (u64, bool)) -> Result<(), i32> {
    let count = {
        let mut units = locked();
        if units.of(base).is_some() {
            return alive(&units, base);
        }
        units.list.len()
    };
    // No memory comes or goes with `UNITS` locked, nor does a timer.
    let mut list = Vec::new();
    list.try_reserve_exact(count + 1)
        .map_err(|_| errno::ENOMEM)?;
    let mut timer = Some(Timer::new(ptr::null_mut()).map_err(|_| errno::ENOMEM)?);
    let registers = host::map_registers(base, REGISTERS).ok_or(errno::ENXIO)?;
    let mut unit = if amd {
        amdvi::Unit::new(Mmio(registers)).map(Unit::Amd)
    } else {
        vtd::Unit::new(Mmio(registers), host::CAN_BE_ALONE).map(Unit::Intel)
    };
    let started = match &mut unit {
        Ok(unit) => ask(base, Some(unit), Order::Start),
        Err(e) => Err(*e),
    };
    if let Err(e) = started {
        klog!(Error, "ppt {rid}: the IOMMU at {base:#x}: {e}");
        return Err(errno::ENXIO);
    }
    let unit = unit.map_err(|_| errno::ENXIO)?;
    let on = On {
        base,
        unit,
        dead: false,
    };
    {
        let mut units = locked();
        // They are as many as before: ppt's lock is held.
        list.append(&mut units.list);
        list.push(on);
        core::mem::swap(&mut units.list, &mut list);
        if units.timer.is_none() {
            units.timer = timer.take();
        }
    }
    klog!(Info, "the IOMMU at {base:#x} is on");
    Ok(())
}

/// The group of a function. ENXIO: no IOMMU serves it, or none that keeps it
/// from sending any interrupt.
pub fn group(device: &Device, rid: Rid) -> Result<Group, i32> {
    let (group, own) = match device.group() {
        Some(group) => (Group::Host(group), None),
        None => {
            let unit = unit_of(rid)?;
            own_name(rid).map_err(|why| {
                klog!(Error, "ppt {rid}: {why}");
                errno::ENXIO
            })?;
            (Group::Own(rid), Some(unit))
        }
    };
    let remapped = own.is_some_and(|(base, amd)| remap::possible(amd) || !amd && remaps(base));
    if !remapped && !device.interrupts_safe() {
        klog!(
            Error,
            "ppt {rid}: no interrupt remapping: a guest could send the host any interrupt"
        );
        return Err(errno::ENXIO);
    }
    if let Some(base) = own {
        turn_on(rid, base)?;
    }
    Ok(group)
}

/// As [`group`], for a function that a VM has.
pub fn group_again(device: &Device, rid: Rid) -> Group {
    device.group().map_or(Group::Own(rid), Group::Host)
}

/// Whether a unit of ours is on that may serve a function.
pub fn is_ours(device: &Device) -> bool {
    device.group().is_none() && !locked().list.is_empty()
}

/// Lets the DMA of requester IDs of a function's device, none of which is under a
/// domain, pass as it is, or blocks it. EIO, ENXIO.
#[inline(never)]
pub fn let_pass(rid: Rid, ids: &Ids, pass: bool) -> Result<(), i32> {
    let (base, _) = unit_of(rid)?;
    let done = {
        let mut units = locked();
        let unit = units.of(base).ok_or(errno::ENXIO)?;
        ids.each(|id| unit.let_pass(id, pass))
    };
    done.and_then(|()| ask(base, None, Order::ForgetPassed))
        .map_err(|e| said(rid, e))
}

#[cold]
#[inline(never)]
fn said(rid: Rid, why: Refusal) -> i32 {
    klog!(Error, "ppt {rid}: the IOMMU: {why}");
    errno::EIO
}

/// Looks for faults (interrupt context).
pub fn poll() {
    let units = locked();
    for on in &units.list {
        let lost = on.unit.faults(|f| {
            let Fault {
                source,
                access,
                reason,
            } = f;
            klog!(
                Error,
                "ppt {}: {access} is not allowed (fault reason {reason})",
                Rid(source)
            );
        });
        if lost {
            klog!(
                Error,
                "the IOMMU at {:#x} had no room for more faults",
                on.base
            );
        }
    }
    if let (Some(timer), 1..) = (&units.timer, units.users) {
        timer.arm(FAULT_POLL);
    }
}

/// After the host has slept, on one CPU, interrupts off: units have lost all, or the
/// host, which knew nothing of it, has turned translation off. It has set its queues up
/// again before.
pub fn resume() {
    for on in &mut locked().list {
        if let Err(e) = on.unit.resume() {
            klog!(Error, "the IOMMU at {:#x}: {e}", on.base);
            on.dead = true;
        }
    }
}

/// Before the host sleeps, on one CPU, interrupts off; bus mastering of all that guests
/// have is off. Linux writes what it knows of a unit, which is not translation: that
/// goes off first, by itself.
#[cfg(not(feature = "freebsd"))]
pub fn suspend() {
    for on in &locked().list {
        if let Err(e) = on.unit.suspend() {
            klog!(Error, "the IOMMU at {:#x}: {e}", on.base);
        }
    }
}

/// The module ends: all units off.
pub fn exit() {
    let (list, timer) = {
        let mut units = locked();
        (core::mem::take(&mut units.list), units.timer.take())
    };
    drop(timer);
    drop(list);
}

/// Second-level tables of ours, and their number.
pub struct Own {
    tables: ManuallyDrop<Tables>,
    /// The unit has not confirmed that it does what it was told last: neither the
    /// tables nor their number are anyone else's any more.
    stuck: AtomicBool,
    base: u64,
    number: u16,
    attached: AtomicU64,
}

impl Own {
    fn new(rid: Rid) -> Result<Self, i32> {
        let (base, _) = unit_of(rid)?;
        let shape = {
            let mut units = locked();
            units.of(base).ok_or(errno::ENXIO)?.shape()
        };
        let limit = shape.domains;
        let tables = Tables::new(shape)?;
        let number = DOMAINS
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |used| {
                let free = used.trailing_ones();
                (free < limit).then(|| used | 1 << free)
            })
            .map_err(|_| errno::ENOSPC)?
            .trailing_ones();
        Ok(Own {
            tables: ManuallyDrop::new(tables),
            stuck: AtomicBool::new(false),
            base,
            number: number as u16,
            attached: AtomicU64::new(0),
        })
    }

    fn map(&mut self, gpa: u64, hpa: u64, len: u64, prot: Prot) -> Result<(), i32> {
        self.tables.map(gpa, hpa, len, prot)
    }

    /// Lets the unit see what is mapped.
    fn publish(&self) -> Result<(), i32> {
        if let Some(unit) = locked().of(self.base) {
            self.tables.publish(unit);
        }
        ask(self.base, None, Order::Invalidate(self.number)).map_err(|_| errno::EIO)
    }

    fn attach(&mut self, rid: Rid, remap: Option<&Remap>) -> Result<(), i32> {
        if unit_of(rid)?.0 != self.base {
            klog!(
                Error,
                "ppt {rid}: another IOMMU serves it than the VM's other functions"
            );
            return Err(errno::ENXIO);
        }
        let levels = {
            let mut units = locked();
            let unit = units.of(self.base).ok_or(errno::ENXIO)?;
            unit.levels()
        };
        let root = self.tables.root_of(levels)?;
        self.publish()?;
        let remap = remap.map(Remap::table);
        let order = Order::Attach(rid, root, self.number, remap);
        ask(self.base, None, order).map_err(|e| self.stick(rid, e))?;
        self.attached.fetch_add(1, Ordering::Relaxed);
        let mut units = locked();
        units.users += 1;
        if let Some(timer) = &units.timer {
            timer.arm(FAULT_POLL);
        }
        Ok(())
    }

    /// EIO: the unit may still look at what was given to `attach`.
    fn detach(&self, rid: Rid) -> Result<(), i32> {
        let done = ask(self.base, None, Order::Block(rid));
        {
            let mut units = locked();
            units.users = units.users.saturating_sub(1);
        }
        self.attached.fetch_sub(1, Ordering::Relaxed);
        // What happened at the end.
        poll();
        done.map_err(|e| self.stick(rid, e))
    }

    fn stick(&self, rid: Rid, why: Refusal) -> i32 {
        self.stuck.store(true, Ordering::Relaxed);
        said(rid, why)
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        if *self.stuck.get_mut() {
            return;
        }
        // SAFETY: once, and nobody uses them after this.
        unsafe { ManuallyDrop::drop(&mut self.tables) };
        DOMAINS.fetch_and(!(1 << self.number), Ordering::AcqRel);
    }
}

/// An address space for PCI functions.
pub enum Domain {
    /// Of the host's driver.
    Host(host::Domain),
    /// Of ours.
    Own(Own),
}

impl Domain {
    /// An empty one for functions like this one. ENXIO, ENOMEM.
    pub fn new(device: &Device, group: &Group) -> Result<Self, i32> {
        match group {
            Group::Host(_) => host::Domain::new(device).map(Domain::Host),
            Group::Own(rid) => Own::new(*rid).map(Domain::Own),
        }
    }

    /// Maps memory; all three are multiples of 4 KiB. Functions that are under it
    /// already see it after [`Domain::publish`]. ENOMEM.
    pub fn map(&mut self, gpa: u64, hpa: u64, len: u64, prot: Prot) -> Result<(), i32> {
        match self {
            Domain::Host(d) => d.map(gpa, hpa, len, prot),
            Domain::Own(d) => d.map(gpa, hpa, len, prot),
        }
    }

    /// Lets functions see what has been mapped. It may have to wait until all CPUs
    /// stand still (`ask`), so a lock that is wanted where a process's memory, or a
    /// coming or going of CPUs, is locked must not be held: a VM's memory is such a
    /// one. The same holds for `attach` and `detach`. EIO.
    pub fn publish(&self) -> Result<(), i32> {
        match self {
            Domain::Own(d) if d.attached.load(Ordering::Relaxed) != 0 => d.publish(),
            _ => Ok(()),
        }
    }

    /// Puts a group under it; under our own driver its interrupts go through
    /// `remap`. EBUSY: a driver of the host uses part of it. ENXIO, ENOMEM.
    pub fn attach(&mut self, group: &Group, remap: Option<&Remap>) -> Result<(), i32> {
        match (self, group) {
            (Domain::Host(d), Group::Host(g)) => d.attach(g),
            (Domain::Own(d), Group::Own(rid)) => d.attach(*rid, remap),
            _ => Err(errno::ENXIO),
        }
    }

    /// Takes a group away from it: its DMA is blocked. EIO: the unit has not said
    /// so.
    pub fn detach(&self, group: &Group) -> Result<(), i32> {
        match (self, group) {
            (Domain::Host(d), Group::Host(g)) => {
                d.detach(g);
                Ok(())
            }
            (Domain::Own(d), Group::Own(rid)) => d.detach(*rid),
            _ => Ok(()),
        }
    }
}
