//! Guest memory in the terms of the `vm-memory` crate.

use super::{GuestMemory, Reservation};
use std::sync::Arc;
use vm_memory::bitmap::BS;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes,
    GuestUsize, MemoryRegionAddress, VolatileSlice,
};

/// One contiguous part of guest memory: below 3 GiB, or above 4 GiB.
#[derive(Clone, Debug)]
pub struct Region {
    map: Arc<Reservation>,
    gpa: u64,
    len: u64,
}

impl Region {
    pub(super) fn new(map: Arc<Reservation>, gpa: u64, len: u64) -> Self {
        Region { map, gpa, len }
    }
}

impl GuestMemoryRegion for Region {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.len
    }

    fn start_addr(&self) -> GuestAddress {
        GuestAddress(self.gpa)
    }

    fn bitmap(&self) {}

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_, BS<'_, ()>>, GuestMemoryError> {
        match offset.0.checked_add(count as u64) {
            Some(end) if end <= self.len => {}
            _ => return Err(GuestMemoryError::InvalidBackendAddress),
        }
        // SAFETY: [offset, offset + count) was just checked to lie in this
        // region, all of which is mapped for as long as `self.map` lives, which
        // the slice borrows; every other access in this process is volatile.
        Ok(unsafe {
            let at = self.map.base.add((self.gpa + offset.0) as usize);
            VolatileSlice::new(at, count)
        })
    }
}

impl GuestMemoryRegionBytes for Region {}

impl GuestMemoryBackend for GuestMemory {
    type R = Region;

    fn iter(&self) -> impl Iterator<Item = &Region> {
        self.regions.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn vm_memory_sees_the_same_bytes_and_the_same_hole() {
        let m = GuestMemory::anonymous((3 << 30) + (4 << 20)).unwrap();
        m.write(0x1000, &0x1122_3344u32).unwrap();
        assert_eq!(
            m.read_obj::<u32>(GuestAddress(0x1000)).unwrap(),
            0x1122_3344
        );
        m.write_obj(7u64, GuestAddress(4 << 30)).unwrap();
        assert_eq!(m.read::<u64>(4 << 30).unwrap(), 7);
        assert_eq!(m.num_regions(), 2);
        let last = (4 << 30) + (4 << 20) - 1;
        assert_eq!(GuestMemoryBackend::last_addr(&m), GuestAddress(last));
        for hole in [3 << 30, (4 << 30) - 1, last + 1] {
            assert!(m.read_obj::<u8>(GuestAddress(hole)).is_err());
        }
        assert!(m.write_obj(0u64, GuestAddress((3 << 30) - 4)).is_err());
    }
}
