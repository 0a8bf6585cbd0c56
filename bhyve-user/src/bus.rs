//! Who answers at which port and at which guest-physical address.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

use crate::lock;

/// A device behind I/O ports. Ports are absolute; sizes are 1, 2 or 4 bytes.
pub trait PortDevice: Send + Sync {
    /// IN; `None` if the device does not answer this port with this size.
    fn port_read(&self, port: u16, size: u8) -> Option<u32>;
    /// OUT; false if the device does not answer.
    fn port_write(&self, port: u16, size: u8, value: u32) -> bool;
}

/// A device behind guest-physical addresses. Sizes are 1, 2, 4 or 8 bytes.
pub trait MmioDevice: Send + Sync {
    /// Read of `size` bytes at `gpa`.
    fn mmio_read(&self, gpa: u64, size: u8) -> u64;
    /// Write of `size` bytes at `gpa`.
    fn mmio_write(&self, gpa: u64, size: u8, value: u64);
}

/// Why a range could not be claimed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// Another device has a part of it.
    #[error("{0:#x}..={1:#x} overlaps another device")]
    Overlap(u64, u64),
    /// More devices than the port bus has slots (254).
    #[error("too many devices on the port bus")]
    Full,
}

/// Number of ports.
const PORTS: usize = 1 << 16;
/// Slots, the empty slot 0 included.
const SLOTS: usize = 255;

/// A device on the port bus; what [`PortBus::map`] needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortSlot(u8);

/// The port bus. A lookup is one byte load and one pointer load, without a
/// lock: most exits to userland end here.
pub struct PortBus {
    index: Box<[AtomicU8]>,
    devices: [OnceLock<Arc<dyn PortDevice>>; SLOTS],
    /// Serializes changes; holds the next free slot.
    next: Mutex<u8>,
}

impl Default for PortBus {
    fn default() -> Self {
        PortBus {
            index: (0..PORTS).map(|_| AtomicU8::new(0)).collect(),
            devices: [const { OnceLock::new() }; SLOTS],
            next: Mutex::new(1),
        }
    }
}

impl PortBus {
    /// The device at `port`, if any.
    #[inline]
    pub fn get(&self, port: u16) -> Option<&dyn PortDevice> {
        let slot = self.index.get(usize::from(port))?.load(Ordering::Acquire);
        if slot == 0 {
            return None;
        }
        Some(&**self.devices.get(usize::from(slot))?.get()?)
    }

    /// Adds a device without ports; [`PortBus::map`] gives it some.
    pub fn add(&self, device: Arc<dyn PortDevice>) -> Result<PortSlot, BusError> {
        let mut next = lock(&self.next);
        let slot = *next;
        let cell = self.devices.get(usize::from(slot)).ok_or(BusError::Full)?;
        cell.set(device).map_err(|_| BusError::Full)?;
        *next = slot.saturating_add(1);
        Ok(PortSlot(slot))
    }

    /// Adds a device and gives it `count` ports from `first` on.
    pub fn claim(
        &self,
        first: u16,
        count: u16,
        device: Arc<dyn PortDevice>,
    ) -> Result<PortSlot, BusError> {
        let slot = self.add(device)?;
        self.map(slot, first, count)?;
        Ok(slot)
    }

    /// Gives a device `count` more ports; ports beyond 0xffff do not exist.
    pub fn map(&self, slot: PortSlot, first: u16, count: u16) -> Result<(), BusError> {
        let _changing = lock(&self.next);
        let range = self.range(first, count);
        if range
            .iter()
            .any(|p| !matches!(p.load(Ordering::Relaxed), 0) && p.load(Ordering::Relaxed) != slot.0)
        {
            let last = u64::from(first) + u64::from(count).saturating_sub(1);
            return Err(BusError::Overlap(u64::from(first), last));
        }
        range
            .iter()
            .for_each(|p| p.store(slot.0, Ordering::Release));
        Ok(())
    }

    /// Takes ports away from a device; others' ports stay theirs.
    pub fn unmap(&self, slot: PortSlot, first: u16, count: u16) {
        let _changing = lock(&self.next);
        for p in self.range(first, count) {
            let _ = p.compare_exchange(slot.0, 0, Ordering::AcqRel, Ordering::Relaxed);
        }
    }

    fn range(&self, first: u16, count: u16) -> &[AtomicU8] {
        let first = usize::from(first);
        let end = (first + usize::from(count)).min(PORTS);
        self.index.get(first..end).unwrap_or_default()
    }
}

struct MmioRange {
    first: u64,
    last: u64,
    device: Arc<dyn MmioDevice>,
}

/// The memory-mapped half of the bus, sorted by address.
#[derive(Default)]
pub struct MmioBus {
    ranges: RwLock<Vec<MmioRange>>,
}

impl MmioBus {
    /// The device that answers all of `gpa..gpa + size`, if any. The bus is
    /// not locked when this returns: a device may move BARs.
    pub fn get(&self, gpa: u64, size: u8) -> Option<Arc<dyn MmioDevice>> {
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        let at = ranges.partition_point(|r| r.last < gpa);
        let end = gpa.checked_add(u64::from(size).saturating_sub(1))?;
        let range = ranges.get(at)?;
        (range.first <= gpa && end <= range.last).then(|| Arc::clone(&range.device))
    }

    /// Gives `size` bytes from `first` on to a device.
    pub fn map(&self, first: u64, size: u64, device: Arc<dyn MmioDevice>) -> Result<(), BusError> {
        let last = first.saturating_add(size.max(1) - 1);
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        let at = ranges.partition_point(|r| r.last < first);
        if ranges.get(at).is_some_and(|r| r.first <= last) {
            return Err(BusError::Overlap(first, last));
        }
        ranges.insert(
            at,
            MmioRange {
                first,
                last,
                device,
            },
        );
        Ok(())
    }

    /// Takes back the range that starts at `first` if `device` has it.
    pub fn unmap(&self, first: u64, device: &Arc<dyn MmioDevice>) {
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        ranges.retain(|r| r.first != first || !Arc::ptr_eq(&r.device, device));
    }
}

/// Both buses, shared by everything that claims or moves ranges.
#[derive(Default)]
pub struct Buses {
    /// I/O ports.
    pub ports: PortBus,
    /// Guest-physical memory.
    pub mmio: MmioBus,
}

/// All ones in `size` bytes: what a bus reads where nobody answers.
#[inline]
pub fn ones(size: u8) -> u64 {
    match size {
        1 => 0xff,
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Id(u32);
    impl PortDevice for Id {
        fn port_read(&self, _: u16, _: u8) -> Option<u32> {
            Some(self.0)
        }
        fn port_write(&self, _: u16, _: u8, _: u32) -> bool {
            true
        }
    }
    impl MmioDevice for Id {
        fn mmio_read(&self, _: u64, _: u8) -> u64 {
            u64::from(self.0)
        }
        fn mmio_write(&self, _: u64, _: u8, _: u64) {}
    }

    fn port(bus: &PortBus, p: u16) -> Option<u32> {
        bus.get(p).and_then(|d| d.port_read(p, 1))
    }

    #[test]
    fn ports_belong_to_the_device_that_claimed_them() {
        let bus = PortBus::default();
        bus.claim(0x3f8, 8, Arc::new(Id(1))).unwrap();
        let b = bus.claim(0xfff8, 8, Arc::new(Id(2))).unwrap();
        assert_eq!(
            (port(&bus, 0x3f7), port(&bus, 0x3f8), port(&bus, 0x3ff)),
            (None, Some(1), Some(1))
        );
        assert_eq!((port(&bus, 0x400), port(&bus, 0xffff)), (None, Some(2)));
        assert_eq!(bus.map(b, 0x3ff, 2), Err(BusError::Overlap(0x3ff, 0x400)));
        bus.unmap(b, 0x3f0, 0x20);
        assert_eq!(
            port(&bus, 0x3f8),
            Some(1),
            "a device cannot take another's ports away"
        );
    }

    #[test]
    fn the_port_bus_refuses_the_device_that_does_not_fit() {
        let bus = PortBus::default();
        let fitted = (0..300)
            .take_while(|_| bus.add(Arc::new(Id(0))).is_ok())
            .count();
        assert_eq!(fitted, 254);
    }

    #[test]
    fn mmio_ranges_do_not_overlap_and_accesses_do_not_straddle() {
        let bus = MmioBus::default();
        let a: Arc<dyn MmioDevice> = Arc::new(Id(1));
        bus.map(0x1000, 0x1000, a.clone()).unwrap();
        bus.map(0x3000, 0x10, Arc::new(Id(2))).unwrap();
        assert!(bus.map(0x1fff, 2, a.clone()).is_err());
        assert!(bus.map(0xfff, 2, a.clone()).is_err());
        assert!(bus.get(0x1ffc, 4).is_some());
        assert!(bus.get(0x1ffd, 4).is_none());
        assert_eq!(bus.get(0x3008, 8).unwrap().mmio_read(0x3008, 8), 2);
        assert!(bus.get(u64::MAX, 8).is_none());
        bus.unmap(0x1000, &a);
        assert!(bus.get(0x1000, 1).is_none());
    }
}
