//! PCI passthrough: functions that the host's ppt driver holds, and the VMs
//! that have them.
//!
//! One lock holds the list, and is taken before a VM's memory and its vCPUs.
//! A function that a VM has is under the VM's IOMMU domain, which has all of
//! the VM's memory and nothing else, from before its bus mastering can be
//! turned on until after its reset.

mod bar;
#[cfg_attr(feature = "freebsd", path = "ppt/freebsd.rs")]
#[cfg_attr(not(feature = "freebsd"), path = "ppt/linux.rs")]
pub mod host;
mod vector;

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ffi::c_void;
use core::fmt::{self, Write};
use core::mem;
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

use vmm_core::iommu::acs;
use vmm_core::iommu::pci::{Bridges, Config};
use vmm_hw::ept::MemType;

use self::bar::{Bar, Kind};
use self::host::Device;
use self::vector::{MAX_MSI, Vectors};
use crate::errno;
use crate::iommu::place::Pci;
use crate::iommu::remap::Remap;
use crate::iommu::{self, Domain, Group};
use crate::klog;
use crate::sync::{Mutex, MutexGuard, try_box, try_slice};
use crate::vm::Vm;

/// BARs of an endpoint.
const BARS: usize = 6;
/// Stretches of a function's memory that a guest can see: MSI-X tables leave
/// holes in BARs.
const MAX_MMIO: usize = 16;

/// Header type (PCI Local Bus 3.0 §6.2.1), the third byte of this word.
const HEADER: u16 = 0xc;
const VENDOR: u16 = 0;
const COMMAND: u16 = 4;
const BUS_MASTER: u32 = 1 << 2;

/// A requester ID, as `bus/slot/func`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Rid(pub u16);

impl fmt::Display for Rid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Rid(rid) = self;
        write!(f, "{}/{}/{}", rid >> 8, rid >> 3 & 31, rid & 7)
    }
}

/// The function that a request names. ENOENT: there can be none.
pub fn rid(bus: i32, slot: i32, func: i32) -> Result<Rid, i32> {
    match (bus, slot, func) {
        (0..=255, 0..=31, 0..=7) => Ok(Rid((bus << 8 | slot << 3 | func) as u16)),
        _ => Err(errno::ENOENT),
    }
}

/// Whether a list of "bus/slot/func" with blanks between has this one.
#[cfg(feature = "freebsd")]
fn listed(list: &[u8], Rid(wanted): Rid) -> bool {
    list.split(|b| *b == b' ').any(|item| {
        let mut numbers = item.split(|b| *b == b'/').map(|n| {
            core::str::from_utf8(n)
                .ok()
                .and_then(|n| n.parse::<i32>().ok())
        });
        let mut next = || numbers.next().flatten();
        match (next(), next(), next(), numbers.next()) {
            (Some(bus), Some(slot), Some(func), None) => {
                rid(bus, slot, func).is_ok_and(|Rid(r)| r == wanted)
            }
            _ => false,
        }
    })
}

#[derive(Clone, Copy)]
struct Mmio {
    gpa: u64,
    len: u64,
}

/// A function that ppt holds.
pub struct Function {
    device: Device,
    rid: Rid,
    /// "ppt 05:00.0", with a NUL, for the host's interrupts: Linux makes a
    /// directory of it, so no slashes.
    name: Box<[u8]>,
    bars: [Option<Bar>; BARS],
    vm: *const Vm,
    mmio: [Option<Mmio>; MAX_MMIO],
    vectors: Vectors,
    /// Where its interrupts go through while a VM has it, if they do: after
    /// `vectors`, which know it.
    remap: Option<Box<Remap>>,
    /// Bus mastering was on when the host went to sleep.
    master: bool,
    /// Nothing keeps it to the VM's memory any more: the guest gets nothing of it.
    lost: bool,
}

// SAFETY: `vm` is that of a VM which gives its functions back, under the list's
// lock, before it goes.
unsafe impl Send for Function {}

/// The domain that was taken out of a VM's memory is there again; it goes if the VM
/// has no function, and gets none.
fn give_back(vm: &Vm, domain: Domain, more: bool) {
    let mut memory = vm.mem.lock();
    memory.dma = more || !none(vm);
    if memory.dma {
        memory.iommu = Some(domain);
    }
}

/// All of them.
#[derive(Default)]
pub struct Functions(Vec<Function>);

impl Functions {
    fn position(&self, rid: Rid) -> Result<usize, i32> {
        self.0
            .iter()
            .position(|f| f.rid == rid)
            .ok_or(errno::ENOENT)
    }

    /// The function, which is the VM's. ENOENT, EBUSY. EIO: it is lost.
    fn of(&mut self, vm: &Vm, rid: Rid) -> Result<&mut Function, i32> {
        let at = self.position(rid)?;
        let f = self.0.get_mut(at).ok_or(errno::ENOENT)?;
        if !ptr::eq(f.vm, vm) {
            Err(errno::EBUSY)
        } else if f.lost {
            Err(errno::EIO)
        } else {
            Ok(f)
        }
    }

    /// A VM that has a function of this group, other than `rid`.
    fn has_group(&self, group: &Group, rid: Rid) -> Option<*const Vm> {
        self.0
            .iter()
            .find(|f| {
                f.rid != rid && !f.vm.is_null() && iommu::group_again(&f.device, f.rid) == *group
            })
            .map(|f| f.vm)
    }

    /// Whether all functions that this one can reach without asking the IOMMU
    /// are the VM's, or nobody's. EBUSY.
    fn alone(&self, pci: &impl Config, vm: &Vm, rid: Rid) -> Result<(), i32> {
        for mate in acs::members(pci, rid.0) {
            if mate == rid.0 || Pci.buses(mate).is_some() {
                continue;
            }
            let who = match self.0.iter().find(|f| f.rid.0 == mate) {
                Some(f) if f.vm.is_null() || ptr::eq(f.vm, vm) => continue,
                Some(_) => "another VM",
                None if host::used(mate) => "a driver of the host",
                None => continue,
            };
            klog!(
                Warning,
                "ppt {rid}: without the IOMMU's knowing it reaches {}, which {who} has: no access control services (ACS)",
                Rid(mate)
            );
            if !host::groups_allowed() {
                return Err(errno::EBUSY);
            }
        }
        Ok(())
    }

    /// Whether one is kept for guests.
    fn holds(&self, id: u16) -> bool {
        self.0.iter().any(|f| f.rid.0 == id)
    }

    /// A function is the host's again: its DMA passes as it is, and that of what may
    /// come on its bus, unless all that is there is kept for guests.
    fn pass_on(&self, device: &Device, rid: Rid) {
        if !iommu::is_ours(device) {
            return;
        }
        let ids = acs::returned(&Bridges::new(Pci), rid.0, &|id| self.holds(id));
        // The log has it.
        let _ = iommu::let_pass(rid, &ids, true);
    }

    fn bind(&mut self, vm: &Vm, rid: Rid) -> Result<(), i32> {
        let at = self.position(rid)?;
        let f = self.0.get_mut(at).ok_or(errno::ENOENT)?;
        if ptr::eq(f.vm, vm) {
            // A new bhyve, which will show the BARs where it has them.
            f.hide(vm);
            return f.quiesce(false);
        }
        if !f.vm.is_null() {
            return Err(errno::EBUSY);
        }
        if f.device.config(VENDOR) == u32::MAX {
            klog!(Error, "ppt {rid} does not answer");
            return Err(errno::EIO);
        }
        let group = iommu::group(&f.device, rid)?;
        if matches!(group, Group::Own(_)) {
            // What can be told apart, before `quiesce` sees to it that it is.
            let pci = Bridges::new(Pci);
            self.alone(&pci, vm, rid)?;
            if let Some(strays) = acs::strays(&pci, rid.0, &|id| self.holds(id)) {
                iommu::let_pass(rid, &strays, false)?;
            }
        }
        // The group is under the VM's domain already if it has another of it.
        let attached = match self.has_group(&group, rid) {
            Some(other) if ptr::eq(other, vm) => true,
            Some(_) => {
                klog!(Error, "ppt {rid}: another VM has part of its IOMMU group");
                return Err(errno::EBUSY);
            }
            None => false,
        };
        let remap = Remap::new(&group)?
            .map(try_box)
            .transpose()
            .map_err(|_| errno::ENOMEM)?;
        let f = self.0.get_mut(at).ok_or(errno::ENOENT)?;
        f.quiesce(false)?;
        let mut memory = vm.mem.lock();
        let mut domain = match memory.iommu.take() {
            Some(domain) => domain,
            None => {
                let mut domain = Domain::new(&f.device, &group)?;
                memory.fill(&mut domain).inspect_err(|e| {
                    if *e == errno::EINVAL {
                        klog!(Error, "ppt {rid}: the VM's memory is not wired");
                    }
                })?;
                domain
            }
        };
        // None of it goes, and none comes without this lock.
        memory.dma = true;
        drop(memory);
        let done = if attached {
            Ok(())
        } else {
            domain.attach(&group, remap.as_deref())
        };
        give_back(vm, domain, done.is_ok());
        if let Err(e) = done {
            match e {
                errno::EBUSY => klog!(
                    Error,
                    "ppt {rid}: a driver of the host uses a function of the same IOMMU group"
                ),
                _ => klog!(Error, "ppt {rid}: the IOMMU does not take it"),
            }
            if e == errno::EIO {
                // The unit may know where the table is.
                mem::forget(remap);
            }
            return Err(e);
        }
        f.vm = vm;
        f.remap = remap;
        vm.functions.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Takes a function away from the VM that has it.
    fn unbind(&mut self, at: usize, removing: bool) {
        let Some(f) = self.0.get_mut(at) else {
            return;
        };
        // SAFETY: see the type; no VM is NULL.
        let Some(vm) = (unsafe { f.vm.as_ref() }) else {
            return;
        };
        // The guest's way to its registers first: it could set DMA going again
        // after the reset.
        f.hide(vm);
        // It goes all the same; the log has why it is not as new.
        let _ = f.quiesce(removing);
        f.vm = ptr::null();
        let device = f.device;
        // Until the unit does not look at it any more.
        let remap = f.remap.take();
        let (rid, group) = (f.rid, iommu::group_again(&f.device, f.rid));
        let last = self.has_group(&group, rid).is_none();
        let domain = vm.mem.lock().iommu.take();
        if let (true, Some(domain)) = (last, &domain)
            && domain.detach(&group).is_err()
        {
            // Nobody knows when it stops looking.
            mem::forget(remap);
        }
        // Some hosts let DMA pass as it is from here on.
        device.stop();
        vm.functions.fetch_sub(1, Ordering::Relaxed);
        if let Some(domain) = domain {
            give_back(vm, domain, false);
        }
    }
}

impl Function {
    /// No BAR is in the guest's memory any more.
    fn hide(&mut self, vm: &Vm) {
        for m in self.mmio.iter_mut().filter_map(Option::take) {
            if vm.unmap_mmio(m.gpa, m.len).is_err() {
                klog!(Error, "ppt {}: no memory to unmap its BARs", self.rid);
            }
        }
    }

    /// Has what the function sends come to the IOMMU, whose group is of this one
    /// alone: a reset, and sleep, turn that off, which no host undoes by itself.
    /// EIO. ENXIO: the IOMMU is gone.
    fn enclose(&self) -> Result<(), i32> {
        let group = iommu::group_again(&self.device, self.rid);
        if !matches!(group, Group::Own(_)) {
            return Ok(());
        }
        iommu::serves(self.rid)?;
        acs::enable(&Bridges::new(Pci), self.rid.0, host::config_write)
            .map_err(|which| {
                klog!(
                    Error,
                    "ppt {}: access control services (ACS) of {} do not turn on",
                    self.rid,
                    Rid(which)
                );
                errno::EIO
            })
            .or_else(|e| {
                if host::groups_allowed() {
                    Ok(())
                } else {
                    Err(e)
                }
            })
    }

    /// No DMA, no interrupts, reset. EIO: the reset failed, all else is done.
    fn quiesce(&mut self, removing: bool) -> Result<(), i32> {
        self.device.stop();
        self.vectors.free(&self.device);
        let reset = self.device.reset(removing);
        // The reset brought configuration space back as it was, without.
        self.device.stop();
        let enclosed = if removing { Ok(()) } else { self.enclose() };
        self.lost = removing || enclosed.is_err();
        match reset {
            Ok(()) => enclosed,
            Err(errno::ENODEV) => {
                klog!(
                    Warning,
                    "ppt {}: it cannot be reset: its state goes from its last user to the next",
                    self.rid
                );
                enclosed
            }
            Err(e) => {
                klog!(Error, "ppt {}: its reset fails", self.rid);
                Err(e)
            }
        }
    }
}

/// The list, once there is a function: a host may have some before it starts
/// the rest of the module, and after it has ended that.
static LIST: AtomicPtr<Mutex<Functions>> = AtomicPtr::new(ptr::null_mut());

/// `exit` has run.
static ENDED: AtomicBool = AtomicBool::new(false);

/// ENOENT: there has never been a function.
fn lock() -> Result<MutexGuard<'static, Functions>, i32> {
    let list = LIST.load(Ordering::Acquire);
    // SAFETY: once made, it stays until `exit`, or beyond.
    unsafe { list.as_ref() }
        .map(Mutex::lock)
        .ok_or(errno::ENOENT)
}

/// No function comes to a VM or goes from it while this is held.
pub fn hold() -> Option<MutexGuard<'static, Functions>> {
    lock().ok()
}

/// The list, made at need. ENOMEM.
fn made() -> Result<MutexGuard<'static, Functions>, i32> {
    if LIST.load(Ordering::Acquire).is_null() {
        let new = Mutex::new(Functions::default())
            .and_then(try_box)
            .map_err(|_| errno::ENOMEM)?;
        let new = Box::into_raw(new);
        let old = LIST.compare_exchange(ptr::null_mut(), new, Ordering::AcqRel, Ordering::Acquire);
        if old.is_err() {
            // SAFETY: nobody has seen it.
            drop(unsafe { Box::from_raw(new) });
        }
    }
    lock()
}

/// The module ends: no VM is left.
pub fn exit() {
    ENDED.store(true, Ordering::Release);
    end();
}

/// Frees the list if the module has ended and the host has all its functions
/// back; FreeBSD takes them from ppt after the rest of the module.
fn end() {
    if ENDED.load(Ordering::Acquire) && lock().is_ok_and(|list| list.0.is_empty()) {
        let list = LIST.swap(ptr::null_mut(), Ordering::AcqRel);
        // SAFETY: the host's ppt has given back all it had, and gets no more.
        drop(unsafe { Box::from_raw(list) });
    }
}

/// A function comes from the host. ENODEV: a bridge. ENOMEM.
pub fn add(device: Device, rid: u16) -> Result<(), i32> {
    if device.config(HEADER) >> 16 & 0x7f != 0 {
        return Err(errno::ENODEV);
    }
    let rid = Rid(rid);
    let mut name = crate::os::Line::new();
    // Shorter than what fits.
    let Rid(n) = rid;
    let _ = write!(name, "ppt {:02x}:{:02x}.{}", n >> 8, n >> 3 & 31, n & 7);
    let text = name.bytes();
    let name = try_slice(text.len() + 1, |n| text.get(n).copied().unwrap_or(0))
        .map_err(|_| errno::ENOMEM)?;
    let f = Function {
        device,
        rid,
        name,
        bars: core::array::from_fn(|n| device.bar(n)),
        vm: ptr::null(),
        mmio: [None; MAX_MMIO],
        vectors: Vectors::default(),
        remap: None,
        master: false,
        lost: false,
    };
    let mut list = made()?;
    list.0.try_reserve(1).map_err(|_| errno::ENOMEM)?;
    device.hold()?;
    list.0.push(f);
    Ok(())
}

/// A function goes back to the host, whoever has it.
pub fn remove(device: *mut c_void) {
    let Ok(mut list) = lock() else {
        return;
    };
    let Some(at) = list.0.iter().position(|f| f.device.is(device)) else {
        return;
    };
    if list.0.get(at).is_some_and(|f| !f.vm.is_null()) {
        klog!(Warning, "a VM's PCI function is taken away from it");
        list.unbind(at, true);
    }
    let f = list.0.swap_remove(at);
    f.device.release();
    list.pass_on(&f.device, f.rid);
    drop(list);
    end();
}

/// The host is about to sleep: no DMA until `resume`.
#[cfg(not(feature = "freebsd"))]
pub fn suspend(device: *mut c_void) {
    if let Ok(mut list) = lock()
        && let Some(f) = list.0.iter_mut().find(|f| f.device.is(device))
    {
        f.master = f.device.config(COMMAND) & BUS_MASTER != 0;
        f.device.stop();
    }
}

/// The host has slept, or has not after all: what a VM has, and all above it, keeps to
/// the IOMMU again, and goes on as it was, of which the guest has not heard; or it is
/// reset, and lost for the VM. The log has why.
pub fn resume(device: *mut c_void) {
    let Ok(mut list) = lock() else {
        return;
    };
    let Some(f) = list.0.iter_mut().find(|f| f.device.is(device)) else {
        return;
    };
    // SAFETY: see the type; no VM is NULL.
    let Some(vm) = (unsafe { f.vm.as_ref() }) else {
        return;
    };
    if f.lost || f.enclose().is_err() {
        f.hide(vm);
        // As in remove(), the host has the device's lock.
        let _ = f.quiesce(true);
    } else if mem::take(&mut f.master) {
        // Zeroes do nothing to the status in the upper half.
        let command = f.device.config(COMMAND) & 0xffff | BUS_MASTER;
        host::config_write(f.rid.0, COMMAND, command);
    }
}

/// Whether a VM has it.
pub fn busy(device: *mut c_void) -> bool {
    lock().is_ok_and(|list| {
        list.0
            .iter()
            .any(|f| f.device.is(device) && !f.vm.is_null())
    })
}

/// VM_BIND_PPTDEV.
pub fn bind(vm: &Vm, rid: Rid) -> Result<(), i32> {
    lock()?.bind(vm, rid)
}

/// VM_UNBIND_PPTDEV.
pub fn unbind(vm: &Vm, rid: Rid) -> Result<(), i32> {
    let mut list = lock()?;
    match list.of(vm, rid) {
        Err(e) if e != errno::EIO => return Err(e),
        _ => {}
    }
    let at = list.position(rid)?;
    list.unbind(at, false);
    Ok(())
}

/// Whether the VM has functions. It is the VM's own business that this does not
/// change at once.
fn none(vm: &Vm) -> bool {
    vm.functions.load(Ordering::Relaxed) == 0
}

/// Stops and resets all functions of a VM, which keeps them.
pub fn quiesce(vm: &Vm) {
    if none(vm) {
        return;
    }
    let Ok(mut list) = lock() else {
        return;
    };
    for f in &mut list.0 {
        if ptr::eq(f.vm, vm) {
            // Who goes on with it binds it again, and hears of it then.
            let _ = f.quiesce(false);
        }
    }
}

/// Takes all functions from a VM that goes.
pub fn unbind_all(vm: &Vm) {
    // With the lock even if it has none: `remove` may still be busy with the
    // VM's memory after the last was counted off.
    let Ok(mut list) = lock() else {
        return;
    };
    for at in 0..list.0.len() {
        if list.0.get(at).is_some_and(|f| ptr::eq(f.vm, vm)) {
            list.unbind(at, false);
        }
    }
}

/// VM_MAP_PPTDEV_MMIO.
pub fn map_mmio(vm: &Vm, rid: Rid, gpa: u64, hpa: u64, len: u64) -> Result<(), i32> {
    let mut list = lock()?;
    list.of(vm, rid)?;
    if len == 0 || (gpa | hpa | len) & 0xfff != 0 {
        return Err(errno::EINVAL);
    }
    let end = gpa.checked_add(len).ok_or(errno::EINVAL)?;
    // Not over what another function of the VM has there.
    let taken = list
        .0
        .iter()
        .filter(|f| ptr::eq(f.vm, vm))
        .flat_map(|f| f.mmio.iter().flatten())
        .any(|m| gpa < m.gpa.saturating_add(m.len) && m.gpa < end);
    if taken {
        return Err(errno::EINVAL);
    }
    let f = list.of(vm, rid)?;
    let bar = f.bars.iter().flatten().find(|b| b.has(hpa, len));
    let kind = match bar.ok_or(errno::EINVAL)?.kind {
        Kind::Prefetchable => MemType::UncacheableMinus,
        _ => MemType::Uncacheable,
    };
    let slot = f
        .mmio
        .iter_mut()
        .find(|m| m.is_none())
        .ok_or(errno::ENOSPC)?;
    vm.map_mmio(gpa, hpa, len, kind)?;
    *slot = Some(Mmio { gpa, len });
    Ok(())
}

/// VM_UNMAP_PPTDEV_MMIO.
pub fn unmap_mmio(vm: &Vm, rid: Rid, gpa: u64, len: u64) -> Result<(), i32> {
    let mut list = lock()?;
    let slot = list
        .of(vm, rid)?
        .mmio
        .iter_mut()
        .find(|m| m.is_some_and(|m| (m.gpa, m.len) == (gpa, len)))
        .ok_or(errno::ENOENT)?;
    vm.unmap_mmio(gpa, len)?;
    *slot = None;
    Ok(())
}

/// VM_PPTDEV_MSI.
pub fn msi(vm: &Vm, rid: Rid, count: i32, address: u64, data: u64) -> Result<(), i32> {
    let mut list = lock()?;
    let f = list.of(vm, rid)?;
    let count = usize::try_from(count).map_err(|_| errno::EINVAL)?;
    if count > MAX_MSI || count > f.device.vectors(false) {
        if f.device.vectors(false) == 0 {
            klog!(Error, "ppt {rid}: it has no MSI, and INTx is not passed on");
        }
        return Err(errno::EINVAL);
    }
    if count == 0 {
        if f.vectors.count(false) != 0 {
            f.vectors.free(&f.device);
        }
        return Ok(());
    }
    if f.vectors.count(false) != count {
        f.vectors
            .alloc(&f.device, (vm, f.remap.as_deref()), count, false)?;
    }
    for n in 0..count {
        let message = (address, data.wrapping_add(n as u64));
        if let Err(e) = f.vectors.route(&f.device, n, message, &f.name) {
            f.vectors.free(&f.device);
            return Err(e);
        }
    }
    Ok(())
}

/// VM_PPTDEV_MSIX: entry `index` of the table, None: masked.
pub fn msix(vm: &Vm, rid: Rid, index: usize, message: Option<(u64, u64)>) -> Result<(), i32> {
    let mut list = lock()?;
    let f = list.of(vm, rid)?;
    let count = f.device.vectors(true);
    if index >= count {
        return Err(errno::EINVAL);
    }
    if f.vectors.count(true) == 0 {
        f.vectors
            .alloc(&f.device, (vm, f.remap.as_deref()), count, true)?;
    }
    match message {
        Some(m) => f.vectors.route(&f.device, index, m, &f.name),
        None => {
            f.vectors.mask(&f.device, index);
            Ok(())
        }
    }
}

/// VM_PPTDEV_DISABLE_MSIX.
pub fn disable_msix(vm: &Vm, rid: Rid) -> Result<(), i32> {
    let mut list = lock()?;
    let f = list.of(vm, rid)?;
    if f.vectors.count(true) != 0 {
        f.vectors.free(&f.device);
    }
    Ok(())
}
