//! Functions of the host's PCI bus, as a VM that is given one needs them:
//! configuration space, BARs, registers.
//!
//! On Linux these are files of sysfs, on FreeBSD `/dev/pci`, `/dev/io` and
//! `/dev/mem`. All are opened by [`HostFunction::open`] and [`HostFunction::map`].

#[cfg(target_os = "freebsd")]
#[path = "host_pci/freebsd.rs"]
mod host;
#[cfg(target_os = "linux")]
#[path = "host_pci/linux.rs"]
mod host;

#[cfg(target_os = "freebsd")]
pub use host::{Attached, attached, groups_allowed, iommu_wanted};

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;

/// BARs of a function.
pub const BARS: usize = 6;
/// Bytes of a page.
const PAGE: u64 = 4096;

/// Bus, slot and function on the host's first PCI segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    /// 0 to 255.
    pub bus: u8,
    /// 0 to 31.
    pub slot: u8,
    /// 0 to 7.
    pub func: u8,
}

impl PciAddress {
    pub(crate) fn numbers(self) -> (i32, i32, i32) {
        (self.bus.into(), self.slot.into(), self.func.into())
    }
}

/// As bhyve(8) writes it: `bus/slot/function`, decimal.
impl std::fmt::Display for PciAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}/{}", self.bus, self.slot, self.func)
    }
}

/// A BAR as the host has set it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostBar {
    /// 0 to 5.
    pub index: usize,
    /// Ports, not memory.
    pub io: bool,
    /// 64 bits: the next BAR is its upper half.
    pub wide: bool,
    /// Prefetchable memory.
    pub prefetchable: bool,
    /// First port, or physical address.
    pub base: u64,
    /// Bytes.
    pub size: u64,
}

/// A function of the host's, open.
#[derive(Debug)]
pub struct HostFunction {
    at: PciAddress,
    host: host::Function,
    bars: Vec<HostBar>,
}

impl HostFunction {
    /// Opens a function.
    ///
    /// # Errors
    /// It is not there, or the host does not give access; says to what.
    pub fn open(at: PciAddress) -> io::Result<HostFunction> {
        let host = host::Function::open(at)?;
        let bars = host.bars()?;
        Ok(HostFunction { at, host, bars })
    }

    /// Descriptors that stay open and are good for more than this function, each
    /// with the requests (ioctl(2)) that are made of it from now on: FreeBSD's
    /// `/dev/pci` and, where a BAR has ports, `/dev/io`. `/dev/mem` is closed when
    /// registers are mapped; Linux's files are the function's own.
    pub fn descriptors(&self) -> Vec<(BorrowedFd<'_>, &'static [u32])> {
        self.host.descriptors()
    }

    /// Where it is.
    pub fn at(&self) -> PciAddress {
        self.at
    }

    /// Its BARs that the host has given an address.
    pub fn bars(&self) -> &[HostBar] {
        &self.bars
    }

    fn bar(&self, index: usize, io: bool) -> io::Result<&HostBar> {
        let mut all = self.bars.iter();
        all.find(|b| b.index == index && b.io == io)
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Reads 1, 2 or 4 bytes of configuration space.
    ///
    /// # Errors
    /// What the host says.
    pub fn config_read(&self, offset: u16, size: u8) -> io::Result<u32> {
        self.host.config_read(offset, size)
    }

    /// Writes 1, 2 or 4 bytes of configuration space.
    ///
    /// # Errors
    /// What the host says.
    pub fn config_write(&self, offset: u16, size: u8, value: u32) -> io::Result<()> {
        self.host.config_write(offset, size, value)
    }

    /// Reads 1, 2 or 4 bytes of a BAR of ports.
    ///
    /// # Errors
    /// There is no such BAR, it is shorter, or what the host says.
    pub fn port_read(&self, bar: usize, offset: u64, size: u8) -> io::Result<u32> {
        let bar = self.bar(bar, true)?;
        inside(bar.size, offset, size)?;
        self.host.port_read(bar, offset, size)
    }

    /// Writes 1, 2 or 4 bytes of a BAR of ports.
    ///
    /// # Errors
    /// As for [`HostFunction::port_read`].
    pub fn port_write(&self, bar: usize, offset: u64, size: u8, value: u32) -> io::Result<()> {
        let bar = self.bar(bar, true)?;
        inside(bar.size, offset, size)?;
        self.host.port_write(bar, offset, size, value)
    }

    /// Maps the registers `[offset, offset + len)` of a memory BAR into this
    /// process.
    ///
    /// # Errors
    /// There is no such BAR, it is shorter, or what the host says.
    pub fn map(&self, bar: usize, offset: u64, len: u64) -> io::Result<Registers> {
        let bar = self.bar(bar, false)?;
        if offset.checked_add(len).is_none_or(|end| end > bar.size) || len == 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // A BAR may begin within a page; the file's pages are memory's.
        let within = bar.base % PAGE;
        let first = (within + offset) / PAGE * PAGE;
        let skip = within + offset - first;
        let (file, origin) = self.host.memory(bar)?;
        let pages = (skip + len).next_multiple_of(PAGE);
        Registers::map(&file, origin + first, pages, skip, len)
    }
}

/// An access of 1, 2 or 4 aligned bytes within `len`.
fn inside(len: u64, offset: u64, size: u8) -> io::Result<()> {
    let size = u64::from(size);
    let good = matches!(size, 1 | 2 | 4)
        && offset.is_multiple_of(size)
        && offset.checked_add(size).is_some_and(|end| end <= len);
    good.then_some(())
        .ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

/// Registers of a device, mapped.
#[derive(Debug)]
pub struct Registers {
    map: NonNull<u8>,
    map_len: usize,
    /// Where the first register is in the mapping.
    skip: usize,
    len: u64,
}

// SAFETY: a mapping belongs to the process; all access is volatile and in one
// piece, and what it means to the device is the guest's affair.
unsafe impl Send for Registers {}
// SAFETY: as above.
unsafe impl Sync for Registers {}

impl Registers {
    fn map(file: &File, at: u64, map_len: u64, skip: u64, len: u64) -> io::Result<Registers> {
        let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let map_len = usize::try_from(map_len).map_err(invalid)?;
        let at = libc::off_t::try_from(at).map_err(invalid)?;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let p = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                map_len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                at,
            )
        };
        if p == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Registers {
            map: NonNull::new(p.cast()).ok_or(io::ErrorKind::OutOfMemory)?,
            map_len,
            skip: usize::try_from(skip).map_err(invalid)?,
            len,
        })
    }

    fn pointer<T>(&self, offset: u64) -> Option<*mut T> {
        let size = size_of::<T>() as u8;
        inside(self.len, offset, size).ok()?;
        let at = self.skip.checked_add(usize::try_from(offset).ok()?)?;
        let p: *mut T = self.map.as_ptr().wrapping_add(at).cast();
        p.is_aligned().then_some(p)
    }

    /// Reads 1, 2 or 4 aligned bytes; `None` for anything else.
    pub fn read(&self, offset: u64, size: u8) -> Option<u32> {
        match size {
            // SAFETY: `pointer` gives aligned addresses within the mapping, which
            // lives as long as self.
            1 => Some(unsafe { self.pointer::<u8>(offset)?.read_volatile() }.into()),
            // SAFETY: as above.
            2 => Some(unsafe { self.pointer::<u16>(offset)?.read_volatile() }.into()),
            // SAFETY: as above.
            4 => Some(unsafe { self.pointer::<u32>(offset)?.read_volatile() }),
            _ => None,
        }
    }

    /// Writes 1, 2 or 4 aligned bytes; false for anything else.
    pub fn write(&self, offset: u64, size: u8, value: u32) -> bool {
        match size {
            1 => self.pointer::<u8>(offset).map(|p| {
                // SAFETY: as in `read`.
                unsafe { p.write_volatile(value as u8) }
            }),
            2 => self.pointer::<u16>(offset).map(|p| {
                // SAFETY: as in `read`.
                unsafe { p.write_volatile(value as u16) }
            }),
            4 => self.pointer::<u32>(offset).map(|p| {
                // SAFETY: as in `read`.
                unsafe { p.write_volatile(value) }
            }),
            _ => None,
        }
        .is_some()
    }
}

impl Drop for Registers {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nothing uses any more. Nothing can be
        // done about a failure.
        unsafe { libc::munmap(self.map.as_ptr().cast(), self.map_len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek, Write};

    /// A file of three pages stands for a device's memory.
    fn registers(skip: u64, len: u64) -> (File, Registers) {
        let path = std::env::temp_dir().join(format!("registers-{}-{skip}", std::process::id()));
        let mut file = File::options()
            .create(true)
            .truncate(true)
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        std::fs::remove_file(&path).unwrap();
        file.write_all(&[0; 3 * PAGE as usize]).unwrap();
        let pages = (skip + len).next_multiple_of(PAGE);
        let r = Registers::map(&file, PAGE, pages, skip, len).unwrap();
        (file, r)
    }

    #[test]
    fn accesses_stay_within_the_registers_and_keep_their_size() {
        let (mut file, r) = registers(0x100, 0x20);
        assert!(r.write(0x1c, 4, 0x1122_3344));
        assert!(r.write(1, 1, 0xabcd));
        assert_eq!(r.read(0x1e, 2), Some(0x1122));
        assert_eq!(r.read(0, 4), Some(0xcd00));
        for (offset, size) in [(0x1d, 4), (0x20, 1), (2, 4), (u64::MAX, 1), (0, 3), (0, 8)] {
            assert_eq!(r.read(offset, size), None, "{offset:#x}+{size}");
            assert!(!r.write(offset, size, 1), "{offset:#x}+{size}");
        }
        let mut bytes = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut bytes).unwrap();
        let set: Vec<usize> = (0..bytes.len()).filter(|&i| bytes[i] != 0).collect();
        assert_eq!(set, [0x1101, 0x111c, 0x111d, 0x111e, 0x111f]);
    }
}
