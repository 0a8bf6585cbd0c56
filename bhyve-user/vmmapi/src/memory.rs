//! Guest memory in this process: where it lies, and bounds-checked access to it.
//!
//! Below 3 GiB guest-physical memory starts at 0; what does not fit starts at
//! 4 GiB, so that the gap can hold devices. Both parts come from one segment
//! whose offsets are the guest-physical addresses.
//!
//! [`GuestMemory`] also is a `vm_memory::GuestMemoryBackend`, so that crates of
//! rust-vmm (virtio-queue, linux-loader) work on it.

mod file;
#[cfg(target_os = "linux")]
mod image;
mod regions;
mod size;

#[cfg(target_os = "linux")]
pub use image::{Image, Mapped};
pub use regions::Region;
pub use size::parse_memsize;

use crate::error::{Error, Result};
use crate::vm::{Mapping, MemSegment, Vm};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use vmm_abi::limits::{HIGHMEM_BASE, LOWMEM_LIMIT, PROT_ALL, VM_MEMMAP_F_WIRED, VM_SYSMEM};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Unmapped bytes before and behind guest memory, so that a stray access of the
/// host faults.
const GUARD: usize = 4 << 20;
/// Alignment of guest memory in this process, so that both page tables can use
/// 2 MiB pages.
const ALIGN: usize = 2 << 20;

/// How guest memory is held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemFlags {
    /// Wired: never paged out (`-S`); needed for passthrough.
    pub wired: bool,
    /// In core dumps of this process (`-C`).
    pub in_core: bool,
}

/// The guest's system memory. Clones share the mapping, which lasts as long as
/// any of them.
#[derive(Clone, Debug)]
pub struct GuestMemory {
    map: Arc<Reservation>,
    low: u64,
    high: u64,
    regions: Arc<[Region]>,
}

/// A memory segment of a device (frame buffer, boot ROM).
#[derive(Clone, Debug)]
pub struct Segment {
    map: Arc<Reservation>,
    len: u64,
}

/// Address space that is ours, with guard regions at both ends.
#[derive(Debug)]
struct Reservation {
    start: *mut u8,
    total: usize,
    /// First byte behind the front guard.
    base: *mut u8,
    /// Bytes from `base` that may be mapped.
    len: usize,
}

// SAFETY: the region is plain memory that belongs to nobody else in this
// process; all access goes through volatile copies of raw pointers.
unsafe impl Send for Reservation {}
// SAFETY: as above; concurrent access is what guest memory is for, and no
// reference into it exists.
unsafe impl Sync for Reservation {}

impl Reservation {
    fn new(len: usize) -> io::Result<Self> {
        let total = len
            .checked_next_multiple_of(ALIGN)
            .and_then(|n| n.checked_add(2 * GUARD + ALIGN))
            .ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANON;
        #[cfg(target_os = "linux")]
        let flags = flags | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), total, libc::PROT_NONE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = start.cast::<u8>();
        let skip = GUARD + (start as usize + GUARD).wrapping_neg() % ALIGN;
        // SAFETY: `skip` is below GUARD + ALIGN, so inside the mapping.
        let base = unsafe { start.add(skip) };
        Ok(Reservation {
            start,
            total,
            base,
            len,
        })
    }

    /// Maps `len` bytes of `dev` at `dev_offset` to `base + at`.
    fn map(
        &self,
        at: u64,
        len: u64,
        dev: &impl AsRawFd,
        dev_offset: u64,
        core: bool,
    ) -> io::Result<()> {
        let einval = || io::Error::from_raw_os_error(libc::EINVAL);
        let (at, len) = (usize::try_from(at).map_err(|_| einval())?, len as usize);
        if at.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(einval());
        }
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        #[cfg(target_os = "freebsd")]
        let flags = if core {
            flags
        } else {
            flags | libc::MAP_NOCORE
        };
        let offset = libc::off_t::try_from(dev_offset).map_err(|_| einval())?;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: [at, at + len) was just checked to lie inside our own
        // reservation, so MAP_FIXED replaces nothing else.
        let p = unsafe {
            libc::mmap(
                self.base.add(at).cast(),
                len,
                prot,
                flags,
                dev.as_raw_fd(),
                offset,
            )
        };
        if p == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        #[cfg(target_os = "linux")]
        if !core {
            // SAFETY: advice about the mapping just made. It may be refused for
            // device mappings, which Linux does not dump in any case.
            unsafe { libc::madvise(p, len, libc::MADV_DONTDUMP) };
        }
        Ok(())
    }

    fn read(&self, at: usize, dst: &mut [u8]) {
        debug_assert!(at + dst.len() <= self.len);
        let mut i = 0;
        while i < dst.len() {
            // SAFETY: callers check that [at, at + dst.len()) is mapped. Each
            // access is aligned to its size; the bytes may change at any time,
            // hence volatile.
            unsafe {
                let p = self.base.add(at + i);
                let left = dst.len() - i;
                if left >= 8 && (p as usize).is_multiple_of(8) {
                    let v = p.cast::<u64>().read_volatile();
                    dst[i..i + 8].copy_from_slice(&v.to_ne_bytes());
                    i += 8;
                } else if left >= 4 && (p as usize).is_multiple_of(4) {
                    let v = p.cast::<u32>().read_volatile();
                    dst[i..i + 4].copy_from_slice(&v.to_ne_bytes());
                    i += 4;
                } else if left >= 2 && (p as usize).is_multiple_of(2) {
                    let v = p.cast::<u16>().read_volatile();
                    dst[i..i + 2].copy_from_slice(&v.to_ne_bytes());
                    i += 2;
                } else {
                    dst[i] = p.read_volatile();
                    i += 1;
                }
            }
        }
    }

    fn write(&self, at: usize, src: &[u8]) {
        debug_assert!(at + src.len() <= self.len);
        let mut rest = src;
        let mut at = at;
        while !rest.is_empty() {
            // SAFETY: callers check that [at, at + src.len()) is mapped. Each
            // access is aligned to its size; the guest may look at any time,
            // hence volatile.
            let n = unsafe {
                let p = self.base.add(at);
                let addr = p as usize;
                if let (Some(b), 0) = (rest.first_chunk(), addr % 8) {
                    p.cast::<u64>().write_volatile(u64::from_ne_bytes(*b));
                    8
                } else if let (Some(b), 0) = (rest.first_chunk(), addr % 4) {
                    p.cast::<u32>().write_volatile(u32::from_ne_bytes(*b));
                    4
                } else if let (Some(b), 0) = (rest.first_chunk(), addr % 2) {
                    p.cast::<u16>().write_volatile(u16::from_ne_bytes(*b));
                    2
                } else {
                    p.write_volatile(rest[0]);
                    1
                }
            };
            at += n;
            rest = &rest[n..];
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // SAFETY: the whole of our own mapping, which nothing uses any more.
        unsafe { libc::munmap(self.start.cast(), self.total) };
    }
}

/// Sizes below 3 GiB and above 4 GiB for a total in bytes.
fn split(size: u64) -> (u64, u64) {
    (size.min(LOWMEM_LIMIT), size.saturating_sub(LOWMEM_LIMIT))
}

impl Vm {
    /// Gives the VM `size` bytes of memory and maps them into this process. A
    /// VM that has exactly that memory already (from the loader) keeps it.
    ///
    /// # Errors
    /// [`Error::MemoryMismatch`]; [`Error::Map`]; what the kernel says.
    pub fn setup_memory(&self, size: u64, flags: MemFlags) -> Result<GuestMemory> {
        let (low, high) = split(size);
        let segment = if high > 0 {
            HIGHMEM_BASE.saturating_add(high)
        } else {
            low
        };
        match self.memseg(VM_SYSMEM)? {
            None => self.alloc_memseg(VM_SYSMEM, segment, None)?,
            Some(MemSegment { len, .. }) if len == segment => {}
            Some(MemSegment { len, .. }) => {
                return Err(
                    self.mismatch(format!("{} MiB", len >> 20), format!("{} MiB", size >> 20))
                );
            }
        }
        for (gpa, len) in [(0, low), (HIGHMEM_BASE, high)] {
            if len > 0 {
                self.ensure_mapping(gpa, len, flags.wired)?;
            }
        }
        self.attach(low, high, flags)
    }

    /// Maps the memory that the VM has into this process.
    ///
    /// # Errors
    /// [`Error::Map`]; what the kernel says.
    pub fn attach_memory(&self, flags: MemFlags) -> Result<GuestMemory> {
        let maps = self.mappings()?;
        let len_at = |gpa| {
            maps.iter()
                .find(|m| m.segid == VM_SYSMEM && m.gpa == gpa)
                .map_or(0, |m| m.len)
        };
        self.attach(len_at(0), len_at(HIGHMEM_BASE), flags)
    }

    fn attach(&self, low: u64, high: u64, flags: MemFlags) -> Result<GuestMemory> {
        let end = if high > 0 {
            HIGHMEM_BASE.saturating_add(high)
        } else {
            low
        };
        let fail = |gpa, len| {
            move |source| Error::Map {
                vm: self.name().to_owned(),
                gpa,
                len,
                source,
            }
        };
        let map = Reservation::new(end as usize).map_err(fail(0, end))?;
        for (gpa, len) in [(0, low), (HIGHMEM_BASE, high)] {
            if len > 0 {
                map.map(gpa, len, &self.fd(), gpa, flags.in_core)
                    .map_err(fail(gpa, len))?;
            }
        }
        Ok(GuestMemory::new(map, low, high))
    }

    fn ensure_mapping(&self, gpa: u64, len: u64, wired: bool) -> Result<()> {
        let want = Mapping {
            gpa,
            segid: VM_SYSMEM,
            segoff: gpa,
            len,
            prot: PROT_ALL,
            flags: if wired { VM_MEMMAP_F_WIRED } else { 0 },
        };
        match self.mmap_getnext(gpa)? {
            Some(have) if have.gpa == gpa => {
                // The kernel adds flags of its own.
                let have = Mapping {
                    flags: have.flags & VM_MEMMAP_F_WIRED,
                    ..have
                };
                if have == want {
                    Ok(())
                } else {
                    Err(self.mismatch(show(&have), show(&want)))
                }
            }
            _ => self.mmap_memseg(&want),
        }
    }

    fn mismatch(&self, have: String, want: String) -> Error {
        Error::MemoryMismatch {
            vm: self.name().into(),
            have,
            want,
        }
    }

    /// Makes (or finds) a segment of device memory and maps it into this
    /// process. Mapping it into the guest is [`Vm::mmap_memseg`]'s business.
    ///
    /// # Errors
    /// [`Error::MemoryMismatch`]; [`Error::Open`]; [`Error::Map`].
    pub fn create_devmem(&self, segid: i32, name: &str, len: u64) -> Result<Segment> {
        match self.memseg(segid)? {
            None => self.alloc_memseg(segid, len, Some(name))?,
            Some(s) if s.len == len && s.name.as_deref() == Some(name) => {}
            Some(s) => {
                return Err(self.mismatch(format!("{s:?}"), format!("{len} bytes of {name}")));
            }
        }
        let path = format!("/dev/vmm.io/{}.{name}", self.name());
        let dev = crate::sys::open(&path).map_err(|source| Error::Open { path, source })?;
        let fail = |source| Error::Map {
            vm: self.name().to_owned(),
            gpa: 0,
            len,
            source,
        };
        let map = Reservation::new(len as usize).map_err(fail)?;
        map.map(0, len, &dev, 0, false).map_err(fail)?;
        Ok(Segment {
            map: Arc::new(map),
            len,
        })
    }
}

fn show(m: &Mapping) -> String {
    let wired = if m.flags & VM_MEMMAP_F_WIRED != 0 {
        "wired"
    } else {
        "not wired"
    };
    format!("{} MiB at {:#x} ({wired})", m.len >> 20, m.gpa)
}

impl GuestMemory {
    fn new(map: Reservation, low: u64, high: u64) -> Self {
        let map = Arc::new(map);
        let regions = [(0, low), (HIGHMEM_BASE, high)]
            .into_iter()
            .filter(|r| r.1 > 0)
            .map(|(gpa, len)| Region::new(map.clone(), gpa, len))
            .collect();
        GuestMemory {
            map,
            low,
            high,
            regions,
        }
    }

    /// Bytes below the hole for devices.
    pub fn low_size(&self) -> u64 {
        self.low
    }

    /// Bytes from 4 GiB on.
    pub fn high_size(&self) -> u64 {
        self.high
    }

    /// All bytes.
    pub fn size(&self) -> u64 {
        self.low + self.high
    }

    /// Whether all of [gpa, gpa + len) is memory.
    pub fn contains(&self, gpa: u64, len: u64) -> bool {
        gpa.checked_add(len).is_some_and(|end| {
            end <= self.low || gpa >= HIGHMEM_BASE && end - HIGHMEM_BASE <= self.high
        })
    }

    fn offset(&self, gpa: u64, len: usize) -> Result<usize> {
        if self.contains(gpa, len as u64) {
            Ok(gpa as usize)
        } else {
            Err(Error::NotMemory {
                gpa,
                len: len as u64,
            })
        }
    }

    /// Copies bytes out of guest memory.
    ///
    /// # Errors
    /// [`Error::NotMemory`], and nothing was copied.
    pub fn read_bytes(&self, gpa: u64, dst: &mut [u8]) -> Result<()> {
        let at = self.offset(gpa, dst.len())?;
        self.map.read(at, dst);
        Ok(())
    }

    /// Copies bytes into guest memory.
    ///
    /// # Errors
    /// [`Error::NotMemory`], and nothing was copied.
    pub fn write_bytes(&self, gpa: u64, src: &[u8]) -> Result<()> {
        let at = self.offset(gpa, src.len())?;
        self.map.write(at, src);
        Ok(())
    }

    /// Fills guest memory with one byte.
    ///
    /// # Errors
    /// [`Error::NotMemory`], and nothing was written.
    pub fn fill(&self, gpa: u64, len: u64, byte: u8) -> Result<()> {
        if !self.contains(gpa, len) {
            return Err(Error::NotMemory { gpa, len });
        }
        let chunk = [byte; 4096];
        let mut done = 0;
        while done < len {
            let n = (len - done).min(chunk.len() as u64) as usize;
            self.map.write((gpa + done) as usize, &chunk[..n]);
            done += n as u64;
        }
        Ok(())
    }

    /// Reads a value. A naturally aligned integer of up to 8 bytes is read in
    /// one access.
    ///
    /// # Errors
    /// [`Error::NotMemory`].
    pub fn read<T: FromBytes + IntoBytes>(&self, gpa: u64) -> Result<T> {
        let mut value = T::new_zeroed();
        self.read_bytes(gpa, value.as_mut_bytes())?;
        Ok(value)
    }

    /// Writes a value. A naturally aligned integer of up to 8 bytes is written
    /// in one access.
    ///
    /// # Errors
    /// [`Error::NotMemory`].
    pub fn write<T: IntoBytes + Immutable>(&self, gpa: u64, value: &T) -> Result<()> {
        self.write_bytes(gpa, value.as_bytes())
    }

    /// Guest-physical address, address in this process and bytes of each part.
    #[cfg(all(feature = "kvm", target_os = "linux"))]
    pub(crate) fn host_ranges(&self) -> impl Iterator<Item = (u64, usize, u64)> {
        [(0, self.low), (HIGHMEM_BASE, self.high)]
            .into_iter()
            .filter(|(_, len)| *len > 0)
            .map(|(gpa, len)| (gpa, self.map.base as usize + gpa as usize, len))
    }

    /// Memory without a VM, for tests of code that uses guest memory.
    ///
    /// # Errors
    /// Out of memory.
    pub fn anonymous(size: u64) -> io::Result<Self> {
        let (low, high) = split(size);
        let end = if high > 0 { HIGHMEM_BASE + high } else { low };
        let map = Reservation::new(end as usize)?;
        for (gpa, len) in [(0usize, low), (HIGHMEM_BASE as usize, high)] {
            // SAFETY: inside our own reservation, which nobody uses yet.
            let r = unsafe {
                libc::mprotect(
                    map.base.add(gpa).cast(),
                    len as usize,
                    libc::PROT_READ | libc::PROT_WRITE,
                )
            };
            if len > 0 && r != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(GuestMemory::new(map, low, high))
    }
}

impl Segment {
    /// Length, bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn offset(&self, at: u64, len: usize) -> Result<usize> {
        match at.checked_add(len as u64) {
            Some(end) if end <= self.len => Ok(at as usize),
            _ => Err(Error::NotMemory {
                gpa: at,
                len: len as u64,
            }),
        }
    }

    /// Copies bytes out of the segment.
    ///
    /// # Errors
    /// [`Error::NotMemory`] beyond its end.
    pub fn read_bytes(&self, at: u64, dst: &mut [u8]) -> Result<()> {
        let at = self.offset(at, dst.len())?;
        self.map.read(at, dst);
        Ok(())
    }

    /// Copies bytes into the segment.
    ///
    /// # Errors
    /// [`Error::NotMemory`] beyond its end.
    pub fn write_bytes(&self, at: u64, src: &[u8]) -> Result<()> {
        let at = self.offset(at, src.len())?;
        self.map.write(at, src);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_any_size_and_alignment_come_back_as_written() {
        let m = GuestMemory::anonymous(1 << 20).unwrap();
        for at in 0..16u64 {
            for len in 0..40usize {
                let bytes: Vec<u8> = (0..len)
                    .map(|i| (i as u8).wrapping_mul(7) ^ at as u8)
                    .collect();
                m.fill(0, 64, 0xee).unwrap();
                m.write_bytes(at, &bytes).unwrap();
                let mut back = vec![0; len];
                m.read_bytes(at, &mut back).unwrap();
                assert_eq!(back, bytes);
                assert_eq!(m.read::<u8>(at + len as u64).unwrap(), 0xee);
                if at > 0 {
                    assert_eq!(m.read::<u8>(at - 1).unwrap(), 0xee);
                }
            }
        }
        m.write(0x1003, &0x1122_3344_5566_7788u64).unwrap();
        assert_eq!(m.read::<u32>(0x1003).unwrap(), 0x5566_7788);
    }

    #[test]
    fn nothing_outside_is_reachable() {
        let m = GuestMemory::anonymous(1 << 20).unwrap();
        let top = 1 << 20;
        assert!(m.write(top - 4, &1u32).is_ok());
        for (gpa, len) in [
            (top - 3, 4),
            (top, 1),
            (u64::MAX, 1),
            (u64::MAX - 3, 8),
            (3 << 30, 1),
        ] {
            let e = m.read_bytes(gpa, &mut vec![0; len]).unwrap_err();
            assert!(matches!(e, Error::NotMemory { .. }), "{gpa:#x}");
            assert!(m.write_bytes(gpa, &vec![0; len]).is_err());
            assert!(m.fill(gpa, len as u64, 0).is_err());
        }
        assert!(m.fill(0x1000, u64::MAX, 0).is_err());
        assert!(m.read_bytes(top, &mut []).is_ok());
    }

    #[test]
    fn memory_beyond_3_gib_continues_at_4_gib() {
        assert_eq!(split(256 << 20), (256 << 20, 0));
        assert_eq!(split(5 << 30), (3 << 30, 2 << 30));
        let m = GuestMemory::anonymous((3 << 30) + (8 << 20)).unwrap();
        assert_eq!((m.low_size(), m.high_size()), (3 << 30, 8 << 20));
        m.write((3 << 30) - 8, &1u64).unwrap();
        m.write((4 << 30) + (8 << 20) - 8, &2u64).unwrap();
        assert!(m.write(3 << 30, &1u8).is_err());
        assert!(m.write((4 << 30) - 1, &1u16).is_err());
        assert!(m.write((4 << 30) + (8 << 20) - 7, &1u64).is_err());
    }
}
