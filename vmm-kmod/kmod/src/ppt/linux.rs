//! PCI functions and the IOMMU as Linux has them. Kernel functions that are
//! exported as such are called directly; macros and inline functions are in
//! the shim's ppt.c.

use core::ffi::{c_char, c_int, c_uint, c_ulong, c_void};
use core::ptr::{self, NonNull};

use vmm_core::iommu::pci::capability;
use vmm_hw::ept::Prot;

use super::bar::{Bar, Kind};
use super::vector::{Vector, fired};
use crate::errno;
use crate::iommu::remap::Message;

unsafe extern "C" {
    fn vmm_host_interrupts_safe(dev: *mut c_void, group: *mut c_void) -> c_int;
    fn vmm_host_domain(dev: *mut c_void) -> *mut c_void;
    fn vmm_host_watch_msi(
        irq: c_uint,
        written: unsafe extern "C" fn(*mut c_void, *mut c_void),
        vector: *mut c_void,
    );
    static vmm_host_unsafe_groups: c_int;

    // linux/pci.h
    fn pci_read_config_dword(pdev: *const c_void, at: c_int, value: *mut u32) -> c_int;
    fn pci_write_config_dword(pdev: *const c_void, at: c_int, value: u32) -> c_int;
    fn pci_write_config_word(pdev: *const c_void, at: c_int, value: u16) -> c_int;
    fn pci_enable_device(pdev: *mut c_void) -> c_int;
    fn pci_disable_device(pdev: *mut c_void);
    fn pci_clear_master(pdev: *mut c_void);
    fn pci_intx(pdev: *mut c_void, enable: c_int);
    fn pci_try_reset_function(pdev: *mut c_void) -> c_int;
    fn pci_reset_function_locked(pdev: *mut c_void) -> c_int;
    fn pci_msi_vec_count(pdev: *mut c_void) -> c_int;
    fn pci_msix_vec_count(pdev: *mut c_void) -> c_int;
    fn pci_alloc_irq_vectors_affinity(
        pdev: *mut c_void,
        min: c_uint,
        max: c_uint,
        flags: c_uint,
        affinity: *mut c_void,
    ) -> c_int;
    fn pci_free_irq_vectors(pdev: *mut c_void);
    fn pci_irq_vector(pdev: *mut c_void, nr: c_uint) -> c_int;

    // linux/msi.h
    fn get_cached_msi_msg(irq: c_uint, message: *mut MsiMessage);

    // linux/interrupt.h
    fn request_threaded_irq(
        irq: c_uint,
        handler: extern "C" fn(c_int, *mut c_void) -> c_int,
        thread: *const c_void,
        flags: c_ulong,
        name: *const c_char,
        arg: *mut c_void,
    ) -> c_int;
    fn free_irq(irq: c_uint, arg: *mut c_void) -> *const c_void;

    // linux/iommu.h
    fn iommu_group_get(dev: *mut c_void) -> *mut c_void;
    fn iommu_group_put(group: *mut c_void);
    fn iommu_group_claim_dma_owner(group: *mut c_void, owner: *mut c_void) -> c_int;
    fn iommu_group_release_dma_owner(group: *mut c_void);
    fn iommu_attach_group(domain: *mut c_void, group: *mut c_void) -> c_int;
    fn iommu_detach_group(domain: *mut c_void, group: *mut c_void);
    fn iommu_domain_free(domain: *mut c_void);
    // The last argument came with 6.3; before, nobody looks at it.
    fn iommu_map(
        domain: *mut c_void,
        iova: c_ulong,
        pa: u64,
        size: usize,
        prot: c_int,
        gfp: c_uint,
    ) -> c_int;

    fn pci_dev_driver(pdev: *const c_void) -> *const c_void;
    fn pci_get_domain_bus_and_slot(domain: c_int, bus: c_uint, devfn: c_uint) -> *mut c_void;
    fn pci_dev_put(pdev: *mut c_void);

    // acpi/acpixf.h, linux/io.h
    /// Finds and maps a table of the firmware's; 0 if it is there.
    #[link_name = "acpi_get_table"]
    pub fn get_table(signature: *const c_char, n: u32, table: *mut *const u8) -> u32;
    fn ioremap(pa: u64, len: c_ulong) -> *mut u8;
    fn iounmap(va: *mut u8);

    // linux/stop_machine.h
    /// Calls `f(arg)`, which does not sleep, with interrupts off while all other CPUs
    /// stand still with theirs off: between two instructions of a thread, not in an
    /// interrupt. `cpus`: null. Process context, not where a CPU comes or goes.
    #[link_name = "stop_machine"]
    pub fn alone(
        f: extern "C" fn(*mut c_void) -> c_int,
        arg: *mut c_void,
        cpus: *const c_void,
    ) -> c_int;

    // linux/delay.h
    fn msleep(ms: c_uint);
}

const IOMMU_READ: c_int = 1;
const IOMMU_WRITE: c_int = 2;
const IOMMU_CACHE: c_int = 4;
/// GFP_KERNEL: may sleep, reclaim, do I/O.
const GFP_KERNEL: c_uint = 0xcc0;

/// Linux tells of the messages that it gives a function.
pub const FOLLOWS_MESSAGES: bool = true;

/// Whether there is `alone`.
pub const CAN_BE_ALONE: bool = true;

/// Capability IDs.
const MSI: u8 = 0x5;
const MSIX: u8 = 0x11;
/// Bytes of an MSI-X table's entry; the bit of its last word that masks it.
const ENTRY: usize = 16;
const MASKED: u32 = 1;

const PCI_IRQ_MSI: c_uint = 1 << 1;
const PCI_IRQ_MSIX: c_uint = 1 << 2;

const IORESOURCE_IO: c_ulong = 0x100;
const IORESOURCE_MEM: c_ulong = 0x200;
const IORESOURCE_PREFETCH: c_ulong = 0x2000;

const EAGAIN: c_int = 11;
/// Linux's own, of which no number reaches userland.
const ENOTTY: c_int = 25;

/// `struct msi_msg` (linux/msi.h).
#[repr(C)]
#[derive(Default)]
struct MsiMessage {
    low: u32,
    high: u32,
    data: u32,
}

/// What begins a `struct resource` (linux/ioport.h).
#[repr(C)]
struct Resource {
    start: u64,
    end: u64,
    name: *const c_char,
    flags: c_ulong,
}

/// Maps registers, uncached.
pub fn map_registers(pa: u64, len: usize) -> Option<NonNull<u8>> {
    // SAFETY: what the firmware says is a unit's registers.
    NonNull::new(unsafe { ioremap(pa, len as c_ulong) })
}

/// Undoes `map_registers`.
pub fn unmap_registers(va: *mut u8, _len: usize) {
    // SAFETY: pairs with `map_registers`.
    unsafe { iounmap(va) }
}

/// What `look` finds at any function, None: there is no such function.
fn at<T>(rid: u16, look: impl FnOnce(*mut c_void) -> T) -> Option<T> {
    // SAFETY: any number may be asked for; the reference is given back.
    unsafe {
        let pdev = pci_get_domain_bus_and_slot(0, c_uint::from(rid >> 8), c_uint::from(rid & 0xff));
        if pdev.is_null() {
            return None;
        }
        let found = look(pdev);
        pci_dev_put(pdev);
        Some(found)
    }
}

/// Four bytes of the configuration space of any function that there is.
pub fn config(rid: u16, offset: u16) -> Option<u32> {
    at(rid, |pdev| {
        let mut value = u32::MAX;
        // SAFETY: there is the function, `value` is writable.
        unsafe { pci_read_config_dword(pdev, c_int::from(offset), &mut value) };
        value
    })
}

/// Writes them.
pub fn config_write(rid: u16, offset: u16, value: u32) {
    at(rid, |pdev| {
        // SAFETY: there is the function.
        unsafe { pci_write_config_dword(pdev, c_int::from(offset), value) };
    });
}

/// Whether a driver has it, be it ppt.
pub fn used(rid: u16) -> bool {
    // SAFETY: there is the function.
    at(rid, |pdev| unsafe { !pci_dev_driver(pdev).is_null() }) == Some(true)
}

/// Whether functions may be passed that reach others of the host's.
pub fn groups_allowed() -> bool {
    // SAFETY: an int that the kernel may write, like any parameter.
    unsafe { (&raw const vmm_host_unsafe_groups).read_volatile() != 0 }
}

/// Linux has no tunables for this: driver_override names the function's driver.
pub fn wanted(_rid: u16) -> bool {
    false
}

/// A function that ppt holds.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Device {
    pci: *mut c_void,
    generic: *mut c_void,
    resources: *const c_void,
    stride: usize,
}

// SAFETY: the kernel's own functions lock what they touch.
unsafe impl Send for Device {}

/// Functions that an IOMMU cannot tell apart, or that reach each other without
/// asking it (ACS).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Group(NonNull<c_void>);

// SAFETY: as for `Device`.
unsafe impl Send for Group {}

/// What is to be kept of vectors that are on: nothing.
pub struct Tables;

/// What is to be kept of an interrupt that is set up: nothing.
pub struct Irq;

/// IRQ_HANDLED: the interrupt is the device's own.
pub const HANDLED: c_int = 1;

extern "C" fn handler(_irq: c_int, arg: *mut c_void) -> c_int {
    // SAFETY: `setup` gave it.
    unsafe { fired(arg) }
}

/// Linux has given the function a message for a vector that is watched, or none.
///
/// # Safety
/// `vector` is one that is set up, or is about to be.
unsafe extern "C" fn written(_desc: *mut c_void, vector: *mut c_void) {
    // SAFETY: by the caller's word.
    let vector = unsafe { &*vector.cast::<Vector>() };
    let Some(irq) = vector.watched() else {
        return;
    };
    let mut message = MsiMessage::default();
    // SAFETY: the vector's interrupt; `message` is writable.
    unsafe { get_cached_msi_msg(irq, &mut message) };
    let MsiMessage { low, high, data } = message;
    vector.follow((u64::from(high) << 32 | u64::from(low), data));
}

/// Where a function keeps the messages of its vectors.
pub enum Slots {
    /// In its MSI capability, here. There is one: Linux gives out more only where
    /// its own IOMMU drivers are at work.
    Msi(Slot),
    /// In its MSI-X table, mapped, of so many bytes.
    Msix(NonNull<u8>, usize),
}

impl Slots {
    /// The one of vector `n`, which is one of those asked for.
    pub fn get(&self, n: usize) -> Slot {
        match self {
            Slots::Msi(slot) => *slot,
            Slots::Msix(table, _) => Slot::Msix(table.as_ptr().wrapping_add(n * ENTRY).cast()),
        }
    }
}

impl Drop for Slots {
    fn drop(&mut self) {
        if let Slots::Msix(table, len) = self {
            unmap_registers(table.as_ptr(), *len);
        }
    }
}

/// Where a function keeps a message.
#[derive(Clone, Copy)]
pub enum Slot {
    /// Of which function, where its address is, and its data.
    Msi(*mut c_void, c_int, c_int),
    /// The table's entry.
    Msix(*mut u32),
}

impl Slot {
    /// Puts our message in the place of the host's (any context). The upper half
    /// of its address is 0 in both.
    pub fn write(&self, (address, data): Message) {
        match *self {
            // SAFETY: the function is ppt's; MSI is what is there.
            Slot::Msi(pci, to, what) => unsafe {
                pci_write_config_dword(pci, to, address as u32);
                pci_write_config_word(pci, what, data as u16);
            },
            // It must not be used while it is written (PCI Local Bus 3.0 §6.8.2).
            // SAFETY: an entry of a table that is mapped as long as there are vectors.
            Slot::Msix(entry) => unsafe {
                let control = entry.add(3).read_volatile();
                entry.add(3).write_volatile(control | MASKED);
                entry.write_volatile(address as u32);
                entry.add(2).write_volatile(data);
                entry.add(3).write_volatile(control);
                // They have arrived when this has come.
                let _ = entry.read_volatile();
            },
        }
    }
}

fn check(result: c_int) -> Result<(), i32> {
    if result < 0 { Err(-result) } else { Ok(()) }
}

impl Device {
    /// # Safety
    /// A `struct pci_dev`, its `struct device` and its resources, good until
    /// the driver's remove() returns.
    pub unsafe fn new(
        pci: *mut c_void,
        generic: *mut c_void,
        resources: *const c_void,
        stride: usize,
    ) -> Self {
        Device {
            pci,
            generic,
            resources,
            stride,
        }
    }

    /// Whether it is the one that the host calls so.
    pub fn is(&self, pci: *mut c_void) -> bool {
        self.pci == pci
    }

    /// Four bytes of configuration space; all ones if the function has gone.
    pub fn config(&self, at: u16) -> u32 {
        let mut value = u32::MAX;
        // SAFETY: `self` is alive, `value` is writable.
        unsafe { pci_read_config_dword(self.pci, c_int::from(at), &mut value) };
        value
    }

    /// A BAR, as the host has set it up.
    pub fn bar(&self, n: usize) -> Option<Bar> {
        // SAFETY: by `new`'s contract there are at least six.
        let r = unsafe {
            &*self
                .resources
                .cast::<u8>()
                .add(n * self.stride)
                .cast::<Resource>()
        };
        let kind = if r.flags & IORESOURCE_IO != 0 {
            Kind::Io
        } else if r.flags & IORESOURCE_MEM == 0 {
            return None;
        } else if r.flags & IORESOURCE_PREFETCH != 0 {
            Kind::Prefetchable
        } else {
            Kind::Memory
        };
        let len = r.end.checked_sub(r.start)?.checked_add(1)?;
        (r.start != 0).then_some(Bar {
            base: r.start,
            len,
            kind,
        })
    }

    /// Makes it answer to its BARs, and do nothing by itself.
    pub fn hold(&self) -> Result<(), i32> {
        // SAFETY: called from probe().
        check(unsafe { pci_enable_device(self.pci) })?;
        self.stop();
        Ok(())
    }

    /// Undoes `hold`.
    pub fn release(&self) {
        // SAFETY: pairs with `hold`.
        unsafe { pci_disable_device(self.pci) }
    }

    /// Bus mastering off, which MSI is a part of, and INTx.
    pub fn stop(&self) {
        // SAFETY: `self` is alive.
        unsafe {
            pci_clear_master(self.pci);
            pci_intx(self.pci, 0);
        }
    }

    /// A function-level reset, or what else the kernel knows for this one;
    /// configuration space is as before. `removing`: in the driver's remove().
    /// ENODEV: there is no way. EIO.
    pub fn reset(&self, removing: bool) -> Result<(), i32> {
        let mut tries = 0;
        loop {
            // Whoever removes the driver holds the device's lock, and then wants
            // ppt's, which is held here.
            // SAFETY: `self` is alive.
            let r = unsafe {
                if removing {
                    pci_reset_function_locked(self.pci)
                } else {
                    pci_try_reset_function(self.pci)
                }
            };
            if r != -EAGAIN || tries == 100 {
                return match -r {
                    ENOTTY => Err(errno::ENODEV),
                    0 => Ok(()),
                    _ => Err(errno::EIO),
                };
            }
            tries += 1;
            // SAFETY: process context.
            unsafe { msleep(10) };
        }
    }

    /// How many vectors the function has.
    pub fn vectors(&self, msix: bool) -> usize {
        // SAFETY: `self` is alive.
        let n = unsafe {
            if msix {
                pci_msix_vec_count(self.pci)
            } else {
                pci_msi_vec_count(self.pci)
            }
        };
        usize::try_from(n).unwrap_or(0)
    }

    /// Turns MSI or MSI-X on with `n` vectors. ENOSPC.
    pub fn alloc_vectors(&self, n: usize, msix: bool) -> Result<Tables, i32> {
        let flags = if msix { PCI_IRQ_MSIX } else { PCI_IRQ_MSI };
        let n = c_uint::try_from(n).map_err(|_| errno::EINVAL)?;
        // SAFETY: `self` is alive; no affinity is asked for.
        let got = unsafe { pci_alloc_irq_vectors_affinity(self.pci, n, n, flags, ptr::null_mut()) };
        check(got)
            .map(|()| Tables)
            .map_err(|e| if e == errno::ENOMEM { e } else { errno::ENOSPC })
    }

    /// Where the function keeps the messages of `n` vectors. ENXIO, ENOSPC.
    pub fn slots(&self, n: usize, msix: bool) -> Result<Slots, i32> {
        let id = if msix { MSIX } else { MSI };
        let at = capability(|at| self.config(at), id).ok_or(errno::ENXIO)?;
        if !msix {
            if n > 1 {
                return Err(errno::ENOSPC);
            }
            // PCI Local Bus 3.0 §6.8.1.
            let wide = self.config(at) >> 23 & 1 != 0;
            let (to, what) = (at + 4, if wide { at + 12 } else { at + 8 });
            let slot = Slot::Msi(self.pci, to.into(), what.into());
            return Ok(Slots::Msi(slot));
        }
        // §6.8.2: the BAR, and the offset in it.
        let place = self.config(at + 4);
        let bar = self.bar(place as usize & 7).ok_or(errno::ENXIO)?;
        let (offset, len) = (u64::from(place & !7), n * ENTRY);
        let base = bar.base.checked_add(offset).ok_or(errno::ENXIO)?;
        if !bar.has(base, len as u64) {
            return Err(errno::ENXIO);
        }
        let table = map_registers(base, len).ok_or(errno::ENOMEM)?;
        Ok(Slots::Msix(table, len))
    }

    /// Turns both off.
    pub fn free_vectors(&self, _tables: Tables) {
        // SAFETY: every vector has been torn down.
        unsafe { pci_free_irq_vectors(self.pci) }
    }

    /// Has interrupts of vector `nr` delivered to `to`; `name` ends with NUL.
    pub fn setup(&self, nr: usize, to: &Vector, name: &[u8]) -> Result<Irq, i32> {
        // SAFETY: `to` and `name` live until `teardown`, which their owner
        // calls; nobody else uses this vector.
        check(unsafe {
            let irq = pci_irq_vector(self.pci, nr as c_uint);
            check(irq)?;
            if to.watch(irq as c_uint) {
                vmm_host_watch_msi(irq as c_uint, written, ptr::from_ref(to).cast_mut().cast());
            }
            request_threaded_irq(
                irq as c_uint,
                handler,
                ptr::null(),
                0,
                name.as_ptr().cast(),
                ptr::from_ref(to).cast_mut().cast(),
            )
        })?;
        Ok(Irq)
    }

    /// Undoes `setup`; the handler has ended when this returns.
    pub fn teardown(&self, _irq: Irq, nr: usize, to: &Vector) {
        // SAFETY: pairs with `setup`.
        unsafe {
            let irq = pci_irq_vector(self.pci, nr as c_uint);
            free_irq(irq as c_uint, ptr::from_ref(to).cast_mut().cast());
        }
    }

    /// Its IOMMU group, None: no IOMMU has it.
    pub fn group(&self) -> Option<Group> {
        // SAFETY: `self` is alive.
        let group = NonNull::new(unsafe { iommu_group_get(self.generic) })?;
        // The group lives as long as the function is in it.
        // SAFETY: gives back the reference.
        unsafe { iommu_group_put(group.as_ptr()) };
        Some(Group(group))
    }

    /// Whether the host's driver keeps it from sending other interrupts than its
    /// own, or nobody need.
    pub fn interrupts_safe(&self) -> bool {
        let group = self.group().map_or(ptr::null_mut(), |g| g.0.as_ptr());
        // SAFETY: both are alive; no group is NULL.
        unsafe { vmm_host_interrupts_safe(self.generic, group) != 0 }
    }
}

/// An address space of the IOMMU.
pub struct Domain(NonNull<c_void>);

// SAFETY: as for `Device`.
unsafe impl Send for Domain {}

impl Domain {
    /// An empty one that fits `device`. ENXIO.
    pub fn new(device: &Device) -> Result<Self, i32> {
        // SAFETY: `device` is alive.
        NonNull::new(unsafe { vmm_host_domain(device.generic) })
            .map(Domain)
            .ok_or(errno::ENXIO)
    }

    /// Maps memory; all three are multiples of 4 KiB. ENOMEM.
    pub fn map(&mut self, gpa: u64, hpa: u64, len: u64, prot: Prot) -> Result<(), i32> {
        let mut flags = IOMMU_READ | IOMMU_CACHE;
        if prot.contains(Prot::WRITE) {
            flags |= IOMMU_WRITE;
        }
        // SAFETY: the domain is ours; what is mapped is the guest's memory,
        // which stays where it is as long as the domain does.
        check(unsafe { iommu_map(self.0.as_ptr(), gpa, hpa, len as usize, flags, GFP_KERNEL) })
    }

    /// Puts a group under it. EBUSY: a driver of the host uses part of it.
    pub fn attach(&self, group: &Group) -> Result<(), i32> {
        let (domain, group) = (self.0.as_ptr(), group.0.as_ptr());
        // SAFETY: the group is alive; the domain, whose address is the owner's
        // mark, outlives the attachment.
        unsafe {
            check(iommu_group_claim_dma_owner(group, domain)).map_err(|_| errno::EBUSY)?;
            if check(iommu_attach_group(domain, group)).is_err() {
                iommu_group_release_dma_owner(group);
                return Err(errno::ENXIO);
            }
        }
        Ok(())
    }

    /// Takes a group away from it.
    pub fn detach(&self, group: &Group) {
        // SAFETY: pairs with `attach`.
        unsafe {
            iommu_detach_group(self.0.as_ptr(), group.0.as_ptr());
            iommu_group_release_dma_owner(group.0.as_ptr());
        }
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // SAFETY: no group is under it any more.
        unsafe { iommu_domain_free(self.0.as_ptr()) }
    }
}
