//! PCI functions as FreeBSD has them. Kernel functions are called directly;
//! what is a method or inline is in the shim's ppt.c.

use core::ffi::{CStr, c_char, c_int, c_uint, c_void};
use core::ptr::{self, NonNull};

use vmm_core::iommu::pci::capability;
use vmm_hw::ept::Prot;

use super::bar::{Bar, Kind};
use super::vector::{Vector, fired};
use crate::errno;
use crate::iommu::remap::Message;

/// What begins a `struct pci_map` (dev/pci/pcivar.h).
#[repr(C)]
struct PciMap {
    /// The register.
    value: u64,
    /// Binary logarithm of the length.
    size: u64,
}

unsafe extern "C" {
    fn vmm_host_ppt_config(dev: *mut c_void, at: c_int, write: *const u32) -> u32;
    static vmm_host_unsafe_groups: c_int;
    fn vmm_host_ppt_msi(dev: *mut c_void, n: *mut c_int, msix: c_int) -> c_int;

    // sys/systm.h
    fn kern_getenv(name: *const c_char) -> *mut c_char;
    fn freeenv(value: *mut c_char);

    // dev/pci/pcivar.h
    fn pci_find_bar(dev: *mut c_void, register: c_int) -> *const PciMap;
    fn pci_save_state(dev: *mut c_void);
    fn pci_restore_state(dev: *mut c_void);
    fn pcie_get_max_completion_timeout(dev: *mut c_void) -> c_int;
    fn pcie_flr(dev: *mut c_void, max_delay: c_uint, force: bool) -> bool;
    fn pci_power_reset(dev: *mut c_void) -> c_int;

    fn pci_find_bsf(bus: u8, slot: u8, func: u8) -> *mut c_void;

    // contrib/dev/acpica/include/acpixf.h, vm/pmap.h
    /// Finds and maps a table of the firmware's; 0 if it is there.
    #[link_name = "AcpiGetTable"]
    pub fn get_table(signature: *const c_char, n: u32, table: *mut *const u8) -> u32;
    fn pmap_mapdev(pa: u64, len: usize) -> *mut u8;
    fn pmap_unmapdev(va: *mut u8, len: usize);

    // sys/bus.h
    fn device_is_attached(dev: *mut c_void) -> c_int;
    fn bus_alloc_resource(
        dev: *mut c_void,
        kind: c_int,
        rid: *mut c_int,
        start: u64,
        end: u64,
        count: u64,
        flags: c_uint,
    ) -> *mut c_void;
    fn bus_release_resource(
        dev: *mut c_void,
        kind: c_int,
        rid: c_int,
        resource: *mut c_void,
    ) -> c_int;
    fn bus_setup_intr(
        dev: *mut c_void,
        resource: *mut c_void,
        flags: c_int,
        filter: extern "C" fn(*mut c_void) -> c_int,
        handler: *const c_void,
        arg: *mut c_void,
        cookie: *mut *mut c_void,
    ) -> c_int;
    fn bus_teardown_intr(dev: *mut c_void, resource: *mut c_void, cookie: *mut c_void) -> c_int;
}

/// PCIR_BARS.
const BAR0: c_int = 0x10;
const SYS_RES_IRQ: c_int = 1;
const SYS_RES_MEMORY: c_int = 3;
const RF_ACTIVE: c_uint = 2;
/// INTR_TYPE_NET | INTR_MPSAFE.
const INTR_FLAGS: c_int = 4 | 512;

/// The command register (PCI Local Bus 3.0 §6.2.2), and two bits of it.
const COMMAND: u16 = 4;
const BUS_MASTER: u32 = 1 << 2;
const NO_INTX: u32 = 1 << 10;
/// Capability IDs.
const MSI: u8 = 0x5;
const MSIX: u8 = 0x11;

/// FreeBSD gives functions other messages whenever an interrupt changes its CPU,
/// and tells nobody.
pub const FOLLOWS_MESSAGES: bool = false;

/// FreeBSD's lock of a VT-d unit's queue is one that a thread may sleep with.
pub const CAN_BE_ALONE: bool = false;

/// No unit is one that needs it.
///
/// # Safety
/// None is needed.
pub unsafe fn alone(
    _f: extern "C" fn(*mut c_void) -> c_int,
    _arg: *mut c_void,
    _cpus: *const c_void,
) {
}

/// FILTER_HANDLED: the interrupt is the device's own.
pub const HANDLED: c_int = 2;

/// Whether pptdevs, pptdevs2 or pptdevs3 names the function, as "bus/slot/func".
pub fn wanted(rid: u16) -> bool {
    [c"pptdevs", c"pptdevs2", c"pptdevs3"].iter().any(|name| {
        // SAFETY: the name ends with NUL.
        let value = unsafe { kern_getenv(name.as_ptr()) };
        if value.is_null() {
            return false;
        }
        // SAFETY: a string of the kernel's, freed after its last use.
        let text = unsafe { CStr::from_ptr(value) }.to_bytes();
        let named = super::listed(text, super::Rid(rid));
        // SAFETY: as above.
        unsafe { freeenv(value) };
        named
    })
}

/// Maps registers, uncached.
pub fn map_registers(pa: u64, len: usize) -> Option<NonNull<u8>> {
    // SAFETY: what the firmware says is a unit's registers.
    NonNull::new(unsafe { pmap_mapdev(pa, len) })
}

/// Undoes `map_registers`.
pub fn unmap_registers(va: *mut u8, len: usize) {
    // SAFETY: pairs with `map_registers`.
    unsafe { pmap_unmapdev(va, len) }
}

/// Four bytes of the configuration space of any function that there is.
pub fn config(rid: u16, at: u16) -> Option<u32> {
    // SAFETY: there is the function.
    find(rid).map(|dev| unsafe { vmm_host_ppt_config(dev.as_ptr(), c_int::from(at), ptr::null()) })
}

/// Writes them.
pub fn config_write(rid: u16, at: u16, value: u32) {
    if let Some(dev) = find(rid) {
        // SAFETY: there is the function.
        unsafe { vmm_host_ppt_config(dev.as_ptr(), c_int::from(at), &value) };
    }
}

fn find(rid: u16) -> Option<NonNull<c_void>> {
    // SAFETY: any number may be asked for; what is there stays.
    NonNull::new(unsafe { pci_find_bsf((rid >> 8) as u8, (rid >> 3 & 31) as u8, (rid & 7) as u8) })
}

/// Whether a driver has it, be it ppt.
pub fn used(rid: u16) -> bool {
    // SAFETY: there is the function.
    find(rid).is_some_and(|dev| unsafe { device_is_attached(dev.as_ptr()) != 0 })
}

/// Whether functions may be passed that reach others of the host's.
pub fn groups_allowed() -> bool {
    // SAFETY: an int that the kernel may write, like any sysctl.
    unsafe { (&raw const vmm_host_unsafe_groups).read_volatile() != 0 }
}

/// A function that ppt holds.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Device(*mut c_void);

// SAFETY: the kernel's own functions lock what they touch.
unsafe impl Send for Device {}

/// Functions that the host's IOMMU driver cannot tell apart: there is none.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Group {}

/// What is to be kept of vectors that are on: BARs in use.
#[derive(Default)]
pub struct Tables([Option<(c_int, *mut c_void)>; 2]);

/// Where a function keeps the messages of its vectors: see `FOLLOWS_MESSAGES`.
pub enum Slots {}

impl Slots {
    /// None.
    pub fn get(&self, _n: usize) -> Slot {
        match *self {}
    }
}

/// Where a function keeps a message: likewise.
#[derive(Clone, Copy)]
pub enum Slot {}

impl Slot {
    /// Nothing to be done.
    pub fn write(&self, _message: Message) {
        match *self {}
    }
}

/// An interrupt that is set up.
pub struct Irq {
    resource: *mut c_void,
    cookie: *mut c_void,
}

extern "C" fn filter(arg: *mut c_void) -> c_int {
    // SAFETY: `setup` gave it.
    unsafe { fired(arg) }
}

impl Device {
    /// # Safety
    /// A device that stays attached until ppt's detach method; the other
    /// arguments mean nothing here.
    pub unsafe fn new(dev: *mut c_void, _: *mut c_void, _: *const c_void, _: usize) -> Self {
        Device(dev)
    }

    /// Whether it is the one that the host calls so.
    pub fn is(&self, dev: *mut c_void) -> bool {
        self.0 == dev
    }

    /// Four bytes of configuration space; all ones if the function has gone.
    pub fn config(&self, at: u16) -> u32 {
        // SAFETY: `self` is attached.
        unsafe { vmm_host_ppt_config(self.0, c_int::from(at), ptr::null()) }
    }

    /// A BAR, as the host has set it up.
    pub fn bar(&self, n: usize) -> Option<Bar> {
        // SAFETY: `self` is attached; the map stays as long as it is.
        let map = unsafe { pci_find_bar(self.0, BAR0 + n as c_int * 4).as_ref() }?;
        let (base, kind) = match (map.value & 1, map.value & 8) {
            (0, 0) => (map.value & !0xf, Kind::Memory),
            (0, _) => (map.value & !0xf, Kind::Prefetchable),
            _ => (map.value & !3, Kind::Io),
        };
        let len = 1_u64.checked_shl(u32::try_from(map.size).ok()?)?;
        (base != 0).then_some(Bar { base, len, kind })
    }

    /// Makes it do nothing by itself.
    pub fn hold(&self) -> Result<(), i32> {
        self.stop();
        Ok(())
    }

    /// Undoes `hold`.
    pub fn release(&self) {}

    /// Bus mastering off, which MSI is a part of, and INTx.
    pub fn stop(&self) {
        // Zeroes do nothing to the status in the upper half.
        let command = self.config(COMMAND) & 0xffff & !BUS_MASTER | NO_INTX;
        // SAFETY: `self` is attached.
        unsafe { vmm_host_ppt_config(self.0, COMMAND.into(), &command) };
    }

    /// A function-level reset, or through a power state; configuration space is
    /// as before. ENODEV: there is no way.
    pub fn reset(&self, _removing: bool) -> Result<(), i32> {
        // SAFETY: `self` is attached, and nobody uses it now.
        unsafe {
            pci_save_state(self.0);
            let wait = (pcie_get_max_completion_timeout(self.0) / 1000).max(10);
            let done = pcie_flr(self.0, wait as c_uint, true) || pci_power_reset(self.0) == 0;
            pci_restore_state(self.0);
            if done { Ok(()) } else { Err(errno::ENODEV) }
        }
    }

    fn capability(&self, id: u8) -> Option<u16> {
        capability(|at| self.config(at), id)
    }

    /// How many vectors the function has (§6.8.1.3, §6.8.2.3).
    pub fn vectors(&self, msix: bool) -> usize {
        let control = |id| self.capability(id).map(|at| self.config(at) >> 16);
        if msix {
            control(MSIX).map_or(0, |c| (c as usize & 0x7ff) + 1)
        } else {
            control(MSI).map_or(0, |c| 1 << (c >> 1 & 7).min(5))
        }
    }

    /// Turns MSI or MSI-X on with `n` vectors. ENOSPC.
    pub fn alloc_vectors(&self, n: usize, msix: bool) -> Result<Tables, i32> {
        let wanted = c_int::try_from(n).map_err(|_| errno::EINVAL)?;
        let mut got = wanted;
        let tables = if msix {
            self.tables()
        } else {
            Tables::default()
        };
        // SAFETY: `self` is attached.
        let error = unsafe { vmm_host_ppt_msi(self.0, &mut got, c_int::from(msix)) };
        if error == 0 && got == wanted {
            return Ok(tables);
        }
        self.free_vectors(tables);
        if error == errno::ENOMEM {
            Err(error)
        } else {
            Err(errno::ENOSPC)
        }
    }

    /// Takes the BARs with MSI-X's table and pending bits: the bus wants to see
    /// them in use.
    fn tables(&self) -> Tables {
        let Some(at) = self.capability(MSIX) else {
            return Tables::default();
        };
        let rid = |at| BAR0 + (self.config(at) & 7) as c_int * 4;
        let (table, pending) = (rid(at + 4), rid(at + 8));
        let take = |mut rid| {
            // SAFETY: `self` is attached.
            let resource = unsafe {
                bus_alloc_resource(self.0, SYS_RES_MEMORY, &mut rid, 0, u64::MAX, 1, RF_ACTIVE)
            };
            (!resource.is_null()).then_some((rid, resource))
        };
        Tables([
            take(table),
            (pending != table).then(|| take(pending)).flatten(),
        ])
    }

    /// ENXIO.
    pub fn slots(&self, _n: usize, _msix: bool) -> Result<Slots, i32> {
        Err(errno::ENXIO)
    }

    /// Turns both off.
    pub fn free_vectors(&self, tables: Tables) {
        // SAFETY: every vector has been torn down; what was taken is given back.
        unsafe {
            vmm_host_ppt_msi(self.0, ptr::null_mut(), 0);
            for (rid, resource) in tables.0.into_iter().flatten() {
                bus_release_resource(self.0, SYS_RES_MEMORY, rid, resource);
            }
        }
    }

    /// Has interrupts of vector `nr` delivered to `to`.
    pub fn setup(&self, nr: usize, to: &Vector, _name: &[u8]) -> Result<Irq, i32> {
        let mut rid = nr as c_int + 1;
        let mut cookie = ptr::null_mut();
        // SAFETY: `to` lives until `teardown`, which its owner calls; nobody
        // else uses this vector.
        unsafe {
            let resource =
                bus_alloc_resource(self.0, SYS_RES_IRQ, &mut rid, 0, u64::MAX, 1, RF_ACTIVE);
            if resource.is_null() {
                return Err(errno::ENOSPC);
            }
            let error = bus_setup_intr(
                self.0,
                resource,
                INTR_FLAGS,
                filter,
                ptr::null(),
                ptr::from_ref(to).cast_mut().cast(),
                &mut cookie,
            );
            if error != 0 {
                bus_release_resource(self.0, SYS_RES_IRQ, rid, resource);
                return Err(error);
            }
            Ok(Irq { resource, cookie })
        }
    }

    /// Undoes `setup`; the handler has ended when this returns.
    pub fn teardown(&self, irq: Irq, nr: usize, _to: &Vector) {
        // SAFETY: pairs with `setup`.
        unsafe {
            bus_teardown_intr(self.0, irq.resource, irq.cookie);
            bus_release_resource(self.0, SYS_RES_IRQ, nr as c_int + 1, irq.resource);
        }
    }

    /// Its group under the host's own IOMMU driver, which FreeBSD offers to
    /// none but its own vmm.ko.
    pub fn group(&self) -> Option<Group> {
        None
    }

    /// FreeBSD sets MSI up without remapping, which its own vmm.ko finds good
    /// enough: a guest can send the host interrupts.
    pub fn interrupts_safe(&self) -> bool {
        true
    }
}

/// An address space of the host's own driver: there is none.
pub enum Domain {}

impl Domain {
    /// ENXIO.
    pub fn new(_device: &Device) -> Result<Self, i32> {
        Err(errno::ENXIO)
    }

    /// See `iommu::Domain`.
    pub fn map(&mut self, _gpa: u64, _hpa: u64, _len: u64, _prot: Prot) -> Result<(), i32> {
        match *self {}
    }

    /// See `iommu::Domain`.
    pub fn attach(&self, group: &Group) -> Result<(), i32> {
        match *group {}
    }

    /// See `iommu::Domain`.
    pub fn detach(&self, group: &Group) {
        match *group {}
    }
}
