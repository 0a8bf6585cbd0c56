//! Interrupts of a PCI function on their way to the guest.

use alloc::boxed::Box;
use core::ffi::{c_int, c_void};
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use vmm_core::apicbus::ApicMessage;
use vmm_hw::amdvi::interrupts::ENTRIES;

use super::host::{self, Device, Irq, Slot, Slots, Tables};
use crate::errno;
use crate::iommu::remap::{Message, Remap};
use crate::sync::try_slice;
use crate::vm::Vm;

/// Longest list of MSI vectors (PCI Local Bus 3.0 §6.8.1.3).
pub const MAX_MSI: usize = 32;

/// A vector of the host and the guest's message that it stands for.
pub struct Vector {
    vm: *const Vm,
    /// Address in the low half, data in the high one.
    message: AtomicU64,
    remapped: Option<Remapped>,
}

/// Of a vector whose interrupts go through a table of ours.
struct Remapped {
    /// Of the function, which has it longer than its vectors.
    table: *const Remap,
    entry: usize,
    slot: Slot,
    /// The host's number of it.
    irq: AtomicU32,
    /// The table has a message for it.
    on: AtomicBool,
}

// SAFETY: `vm` and `table` are only used while the function is the VM's; what changes is
// atomic.
unsafe impl Send for Vector {}
// SAFETY: as above.
unsafe impl Sync for Vector {}

#[cfg_attr(
    feature = "freebsd",
    expect(dead_code, reason = "FreeBSD tells nobody of its messages")
)]
impl Vector {
    /// The host's number of the interrupt is to be; whether `follow` is to be
    /// told of its messages.
    pub fn watch(&self, irq: u32) -> bool {
        let Some(r) = &self.remapped else {
            return false;
        };
        r.irq.store(irq, Ordering::Relaxed);
        true
    }

    /// That number.
    pub fn watched(&self) -> Option<u32> {
        let r = self.remapped.as_ref()?;
        Some(r.irq.load(Ordering::Relaxed))
    }

    /// The host has given the function this message for the vector, or none
    /// (any context).
    pub fn follow(&self, message: Message) {
        let Some(r) = &self.remapped else {
            return;
        };
        // SAFETY: see the type.
        let Some(own) = (unsafe { &*r.table }).set(r.entry, message) else {
            r.on.store(false, Ordering::Relaxed);
            return;
        };
        r.slot.write(own);
        if r.on.swap(true, Ordering::Relaxed) {
            // What it sent between the host's message and ours went by the host's
            // data, which is a vector, as the number of an entry: it came as another
            // interrupt of this function's, or was blocked. One that is not due does
            // no harm, one that is missing may.
            self.deliver();
        }
    }
}

impl Vector {
    /// Sends the guest's message.
    fn deliver(&self) {
        let packed = self.message.load(Ordering::Acquire);
        if let Ok(message) = ApicMessage::from_msi(packed & 0xffff_ffff, packed >> 32) {
            // SAFETY: the VM gives its functions back before it goes.
            unsafe { &*self.vm }.deliver(&message);
        }
    }
}

/// Refuses what is no interrupt message. EINVAL.
fn packed(address: u64, data: u64) -> Result<u64, i32> {
    ApicMessage::from_msi(address, data).map_err(|_| errno::EINVAL)?;
    // The address is below 4 GiB, and no meaning beyond 16 bits of data is known.
    Ok(address & 0xffff_ffff | data << 32)
}

/// The function has sent the interrupt (interrupt context).
///
/// # Safety
/// `vector` is one that has been set up and not been torn down.
pub unsafe fn fired(vector: *mut c_void) -> c_int {
    // SAFETY: by the caller's word.
    let vector = unsafe { &*vector.cast::<Vector>() };
    vector.deliver();
    host::HANDLED
}

/// The vectors that a function has in use.
#[derive(Default)]
pub struct Vectors {
    msix: bool,
    /// Interrupts look at it: nobody else has it for himself as long as one is set up.
    list: Box<[Vector]>,
    /// Of each of the list, as it is set up.
    irqs: Box<[Option<Irq>]>,
    tables: Option<Tables>,
    slots: Option<Slots>,
}

impl Vectors {
    /// How many there are, of MSI or of MSI-X.
    pub fn count(&self, msix: bool) -> usize {
        if self.msix == msix {
            self.list.len()
        } else {
            0
        }
    }

    /// Allocates `n`, none of them set up; with a table their interrupts go
    /// through its entries. ENOMEM, ENOSPC.
    pub fn alloc(
        &mut self,
        device: &Device,
        (vm, remap): (&Vm, Option<&Remap>),
        n: usize,
        msix: bool,
    ) -> Result<(), i32> {
        self.free(device);
        let slots = match remap {
            Some(_) if n > ENTRIES => return Err(errno::ENOSPC),
            Some(_) => Some(device.slots(n, msix)?),
            None => None,
        };
        let list = try_slice(n, |entry| Vector {
            vm,
            message: AtomicU64::new(0),
            remapped: remap.zip(slots.as_ref()).map(|(table, slots)| Remapped {
                table,
                entry,
                slot: slots.get(entry),
                irq: AtomicU32::new(0),
                on: AtomicBool::new(false),
            }),
        })
        .map_err(|_| errno::ENOMEM)?;
        let irqs = try_slice(n, |_| None).map_err(|_| errno::ENOMEM)?;
        let tables = Some(device.alloc_vectors(n, msix)?);
        *self = Vectors {
            msix,
            list,
            irqs,
            tables,
            slots,
        };
        Ok(())
    }

    /// Has vector `n` deliver a message. EINVAL.
    pub fn route(
        &mut self,
        device: &Device,
        n: usize,
        (address, data): (u64, u64),
        name: &[u8],
    ) -> Result<(), i32> {
        let packed = packed(address, data)?;
        let vector = self.list.get(n).ok_or(errno::EINVAL)?;
        let irq = self.irqs.get_mut(n).ok_or(errno::EINVAL)?;
        vector.message.store(packed, Ordering::Release);
        if irq.is_none() {
            *irq = Some(device.setup(n, vector, name)?);
        }
        Ok(())
    }

    /// Masks vector `n`.
    pub fn mask(&mut self, device: &Device, n: usize) {
        if let Some(vector) = self.list.get(n)
            && let Some(irq) = self.irqs.get_mut(n).and_then(Option::take)
        {
            device.teardown(irq, n, vector);
        }
    }

    /// Gives all back to the host.
    pub fn free(&mut self, device: &Device) {
        if self.list.is_empty() {
            return;
        }
        for n in 0..self.list.len() {
            self.mask(device, n);
        }
        if let Some(tables) = self.tables.take() {
            device.free_vectors(tables);
        }
        self.list = Box::default();
        self.irqs = Box::default();
        self.slots = None;
    }
}
