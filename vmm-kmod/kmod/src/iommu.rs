//! What a VM's PCI functions see of its memory: through the host's own IOMMU
//! driver where that is at work, otherwise through ours (VT-d and AMD-Vi).

use alloc::vec::Vec;
use core::ffi::CStr;
use core::fmt;
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicU64, Ordering};

use vmm_hw::acpi_table::Malformed;
use vmm_hw::dmar::{self, Structure};
use vmm_hw::ept::{AmdviFormat, Ept, MemType, Options, Prot, VtdFormat};
use vmm_hw::ivrs::{self, Block, Serves};
use vmm_hw::vtd::{Fault, Refusal, Registers};
use vmm_hw::{amdvi, vtd};

use crate::errno;
use crate::klog;
use crate::os::Os;
use crate::ppt::host::{self, Device};
use crate::ppt::{self, Rid};
use crate::sync::{SpinLock, Timer};

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

// SAFETY: the lock of `UNITS` lets one CPU at a time use them.
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

    fn attach(&mut self, rid: Rid, root: u64, domain: u16) -> Result<(), Refusal> {
        each!(self, u => u.attach(rid.0, root, domain))
    }

    fn block(&mut self, rid: Rid) -> Result<(), Refusal> {
        each!(self, u => u.block(rid.0))
    }

    fn pass_on(&mut self, rid: Rid) -> Result<(), Refusal> {
        each!(self, u => u.pass_on(rid.0))
    }

    fn resume(&self) -> Result<(), Refusal> {
        each!(self, u => u.resume())
    }

    fn faults(&self, f: impl FnMut(Fault)) {
        each!(self, u => u.faults(f));
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

    /// Lets a unit see what is mapped.
    fn publish(&self, unit: &Unit, number: u16) -> Result<(), Refusal> {
        match (self, unit) {
            (Tables::Intel(t), Unit::Intel(u)) => {
                t.each_table(&mut |pa| u.publish(pa));
                u.invalidate()
            }
            (Tables::Amd(_), Unit::Amd(u)) => u.invalidate(number),
            _ => Ok(()),
        }
    }
}

/// A unit that is on, by the address of its registers.
struct On {
    base: u64,
    unit: Unit,
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

/// Domain numbers in use, from 2.
static DOMAINS: AtomicU64 = AtomicU64::new(3);

impl Units {
    fn of(&mut self, base: u64) -> Option<&mut Unit> {
        let on = self.list.iter_mut().find(|on| on.base == base)?;
        Some(&mut on.unit)
    }
}

/// A table of the firmware's, if there is one. It stays mapped.
fn acpi(signature: &CStr) -> Option<&'static [u8]> {
    let mut table: *const u8 = ptr::null();
    // SAFETY: the signature ends with NUL, `table` is writable.
    let status = unsafe { host::get_table(signature.as_ptr(), 1, &mut table) };
    if status != 0 || table.is_null() {
        return None;
    }
    // SAFETY: an ACPI table begins with its signature and its length, and is
    // mapped as a whole; nobody writes it.
    unsafe {
        let len = table.add(4).cast::<u32>().read_unaligned();
        Some(core::slice::from_raw_parts(table, len as usize))
    }
}

/// The unit that serves a function, and whether it is AMD's. ENXIO.
fn unit_of(rid: Rid) -> Result<(u64, bool), i32> {
    let found = match (acpi(c"DMAR"), acpi(c"IVRS")) {
        (Some(table), _) => intel(table, rid).map(|base| (base, false)),
        (None, Some(table)) => amd(table, rid).map(|base| (base, true)),
        (None, None) => Err(Excuse::Nothing),
    };
    found.map_err(|why| {
        klog!(Error, "ppt {rid}: {why}");
        errno::ENXIO
    })
}

/// Why no unit serves a function.
enum Excuse {
    Nothing,
    Table(Malformed),
    Firmware,
    Alias(u16),
    Unserved,
}

impl fmt::Display for Excuse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Excuse::Nothing => {
                f.write_str("no IOMMU: the firmware describes none (is VT-d or AMD-Vi off there?)")
            }
            Excuse::Table(e) => e.fmt(f),
            Excuse::Firmware => f.write_str(
                "the firmware uses memory through it (RMRR, IVMD): it has to stay with the host",
            ),
            Excuse::Alias(bridge) => write!(
                f,
                "its DMA comes in the name of the bridge {}, and that of others too",
                Rid(*bridge)
            ),
            Excuse::Unserved => f.write_str("no IOMMU serves it"),
        }
    }
}

/// Secondary and subordinate bus of a bridge.
fn buses(rid: u16) -> Option<(u8, u8)> {
    let value = host::config(rid, 0x18)?;
    Some(((value >> 8) as u8, (value >> 16) as u8))
}

/// The bridge that a bus is behind, if it is no root bus.
fn bridge_to(bus: u8) -> Option<u16> {
    const HEADER: u16 = 0xc;
    // A bridge's own bus comes before those behind it.
    (0..u16::from(bus) << 8).find(|rid| {
        host::config(*rid, HEADER).is_some_and(|h| h >> 16 & 0x7f == 1)
            && buses(*rid).is_some_and(|(secondary, _)| secondary == bus)
    })
}

/// Device and port type of a PCI Express function (PCI Express 6.0 §7.5.3.2).
fn express(rid: u16) -> Option<u32> {
    const EXPRESS: u8 = 0x10;
    let config = |at| host::config(rid, at).unwrap_or(u32::MAX);
    ppt::capability(config, EXPRESS).map(|at| config(at) >> 20 & 0xf)
}

/// Whether all DMA of a function comes with its own requester ID: what
/// conventional PCI sends comes with that of a bridge, or of its bus, whose
/// context would let it pass.
fn own_name(Rid(rid): Rid) -> Result<(), Excuse> {
    /// PCI Express to PCI, and back.
    const TO_PCI: [u32; 2] = [7, 8];
    let mut at = rid;
    let mut kind = express(rid);
    while let Some(bridge) = bridge_to((at >> 8) as u8) {
        // Whatever is below is told from others only on PCI Express.
        if kind.is_none() {
            return Err(Excuse::Alias(bridge));
        }
        kind = express(bridge);
        if kind.is_none_or(|k| TO_PCI.contains(&k)) {
            return Err(Excuse::Alias(bridge));
        }
        at = bridge;
    }
    Ok(())
}

fn intel(table: &[u8], rid: Rid) -> Result<u64, Excuse> {
    let (mut named, mut rest) = (None, None);
    for s in dmar::structures(table) {
        match s.map_err(Excuse::Table)? {
            Structure::Reserved { segment: 0, scopes } if scopes.has(rid.0, buses) => {
                return Err(Excuse::Firmware);
            }
            Structure::Unit {
                segment: 0,
                base,
                rest: others,
                scopes,
            } => {
                if scopes.has(rid.0, buses) {
                    named = Some(base);
                } else if others {
                    rest = Some(base);
                }
            }
            _ => {}
        }
    }
    named.or(rest).ok_or(Excuse::Unserved)
}

fn amd(table: &[u8], rid: Rid) -> Result<u64, Excuse> {
    let mut found = Err(Excuse::Unserved);
    for b in ivrs::blocks(table) {
        match b.map_err(Excuse::Table)? {
            Block::Reserved { first, last } if (first..=last).contains(&rid.0) => {
                return Err(Excuse::Firmware);
            }
            Block::Unit {
                segment: 0,
                base,
                entries,
            } => match entries.serves(rid.0) {
                Serves::Yes => found = Ok(base),
                Serves::As(other) if other == rid.0 => found = Ok(base),
                Serves::As(other) => return Err(Excuse::Alias(other)),
                Serves::No => {}
            },
            _ => {}
        }
    }
    found
}

/// Turns the unit at `base` on, unless it is. ENXIO. Under ppt's lock.
fn turn_on(rid: Rid, (base, amd): (u64, bool)) -> Result<(), i32> {
    let count = {
        let mut units = UNITS.lock();
        if units.of(base).is_some() {
            return Ok(());
        }
        units.list.len()
    };
    // No memory comes or goes with `UNITS` locked, nor does a timer.
    let mut list = Vec::new();
    list.try_reserve_exact(count + 1)
        .map_err(|_| errno::ENOMEM)?;
    let mut timer = Some(Timer::new(ptr::null_mut()).map_err(|_| errno::ENOMEM)?);
    let registers = host::map_registers(base, REGISTERS).ok_or(errno::ENXIO)?;
    let unit = if amd {
        amdvi::Unit::new(Mmio(registers)).map(Unit::Amd)
    } else {
        vtd::Unit::new(Mmio(registers)).map(Unit::Intel)
    };
    let unit = unit.map_err(|e| {
        klog!(Error, "ppt {rid}: the IOMMU at {base:#x}: {e}");
        errno::ENXIO
    })?;
    let on = On { base, unit };
    {
        let mut units = UNITS.lock();
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
    if !device.interrupts_safe() {
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

/// A function goes back to the host: its DMA passes as it is.
pub fn release(device: &Device, rid: Rid) {
    if device.group().is_some() || UNITS.lock().list.is_empty() {
        return;
    }
    if let Ok((base, _)) = unit_of(rid)
        && let Some(unit) = UNITS.lock().of(base)
        && let Err(e) = unit.pass_on(rid)
    {
        klog!(Error, "ppt {rid}: the IOMMU: {e}");
    }
}

/// Looks for faults (interrupt context).
pub fn poll() {
    let units = UNITS.lock();
    for on in &units.list {
        on.unit.faults(|f| {
            let what = if f.write { "write to" } else { "read from" };
            klog!(
                Error,
                "ppt {}: DMA {what} {:#x} is not allowed (fault reason {})",
                Rid(f.source),
                f.address,
                f.reason
            );
        });
    }
    if let (Some(timer), 1..) = (&units.timer, units.users) {
        timer.arm(FAULT_POLL);
    }
}

/// After the host has slept, on one CPU, interrupts off: units have lost all.
pub fn resume() {
    for on in &UNITS.lock().list {
        if let Err(e) = on.unit.resume() {
            klog!(Error, "the IOMMU at {:#x}: {e}", on.base);
        }
    }
}

/// The module ends: all units off.
pub fn exit() {
    let (list, timer) = {
        let mut units = UNITS.lock();
        (core::mem::take(&mut units.list), units.timer.take())
    };
    drop(timer);
    drop(list);
}

/// Second-level tables of ours, and their number.
pub struct Own {
    tables: Tables,
    base: u64,
    number: u16,
    attached: AtomicU64,
}

impl Own {
    fn new(rid: Rid) -> Result<Self, i32> {
        let (base, _) = unit_of(rid)?;
        let shape = {
            let mut units = UNITS.lock();
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
            tables,
            base,
            number: number as u16,
            attached: AtomicU64::new(0),
        })
    }

    fn map(&mut self, gpa: u64, hpa: u64, len: u64, prot: Prot) -> Result<(), i32> {
        self.tables.map(gpa, hpa, len, prot)?;
        if self.attached.load(Ordering::Relaxed) != 0 {
            self.publish()?;
        }
        Ok(())
    }

    /// Lets the unit see what is mapped.
    fn publish(&self) -> Result<(), i32> {
        let mut units = UNITS.lock();
        let unit = units.of(self.base).ok_or(errno::ENXIO)?;
        self.tables
            .publish(unit, self.number)
            .map_err(|_| errno::EIO)
    }

    fn attach(&mut self, rid: Rid) -> Result<(), i32> {
        if unit_of(rid)?.0 != self.base {
            klog!(
                Error,
                "ppt {rid}: another IOMMU serves it than the VM's other functions"
            );
            return Err(errno::ENXIO);
        }
        let levels = {
            let mut units = UNITS.lock();
            let unit = units.of(self.base).ok_or(errno::ENXIO)?;
            unit.levels()
        };
        let root = self.tables.root_of(levels)?;
        self.publish()?;
        let mut units = UNITS.lock();
        let unit = units.of(self.base).ok_or(errno::ENXIO)?;
        unit.attach(rid, root, self.number)
            .map_err(|_| errno::EIO)?;
        self.attached.fetch_add(1, Ordering::Relaxed);
        units.users += 1;
        if let Some(timer) = &units.timer {
            timer.arm(FAULT_POLL);
        }
        Ok(())
    }

    fn detach(&self, rid: Rid) {
        {
            let mut units = UNITS.lock();
            if let Some(unit) = units.of(self.base)
                && let Err(e) = unit.block(rid)
            {
                klog!(Error, "ppt {rid}: the IOMMU: {e}");
            }
            units.users = units.users.saturating_sub(1);
        }
        self.attached.fetch_sub(1, Ordering::Relaxed);
        // What happened at the end.
        poll();
    }
}

impl Drop for Own {
    fn drop(&mut self) {
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

    /// Maps memory; all three are multiples of 4 KiB. ENOMEM.
    pub fn map(&mut self, gpa: u64, hpa: u64, len: u64, prot: Prot) -> Result<(), i32> {
        match self {
            Domain::Host(d) => d.map(gpa, hpa, len, prot),
            Domain::Own(d) => d.map(gpa, hpa, len, prot),
        }
    }

    /// Puts a group under it. EBUSY: a driver of the host uses part of it.
    /// ENXIO, ENOMEM.
    pub fn attach(&mut self, group: &Group) -> Result<(), i32> {
        match (self, group) {
            (Domain::Host(d), Group::Host(g)) => d.attach(g),
            (Domain::Own(d), Group::Own(rid)) => d.attach(*rid),
            _ => Err(errno::ENXIO),
        }
    }

    /// Takes a group away from it: its DMA is blocked.
    pub fn detach(&self, group: &Group) {
        match (self, group) {
            (Domain::Host(d), Group::Host(g)) => d.detach(g),
            (Domain::Own(d), Group::Own(rid)) => d.detach(*rid),
            _ => {}
        }
    }
}
