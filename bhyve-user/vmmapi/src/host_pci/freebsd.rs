//! `/dev/pci` (pci(4)), `/dev/io` (io(4)) and `/dev/mem`.

use super::{BARS, HostBar, PciAddress};
use crate::sys::{self, Plain};
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use vmm_abi::ioccom::iowr;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

macro_rules! structure {
    ($(#[$doc:meta])* $name:ident { $($field:ident: $t:ty),* $(,)? }) => {
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
        struct $name { $($field: $t),* }
    };
}

structure! {
    /// `struct pcisel` of sys/pciio.h.
    Sel { domain: u32, bus: u8, dev: u8, func: u8, _pad: u8 }
}
structure! {
    /// `struct pci_io`.
    ConfigIo { sel: Sel, reg: i32, width: i32, data: u32 }
}
structure! {
    /// `struct pci_bar_io`.
    BarIo { sel: Sel, reg: i32, enabled: i32, base: u64, length: u64 }
}
structure! {
    /// `struct iodev_pio_req` of dev/io/iodev.h.
    Pio { access: u32, port: u32, width: u32, val: u32 }
}
structure! {
    /// `struct pci_conf`.
    Conf {
        sel: Sel, hdr: u8, _pad0: u8, subvendor: u16, subdevice: u16, vendor: u16, device: u16,
        class: u8, subclass: u8, progif: u8, revid: u8, name: [u8; 17], _pad1: u8, unit: u64,
    }
}
structure! {
    /// `struct pci_conf_io`. It has addresses in it: not [`Plain`].
    ConfIo {
        pat_buf_len: u32, num_patterns: u32, patterns: u64, match_buf_len: u32, num_matches: u32,
        matches: u64, offset: u32, generation: u32, status: u32, _pad: u32,
    }
}

impl Plain for ConfigIo {}
impl Plain for BarIo {}
impl Plain for Pio {}

const PCIOCREAD: u32 = iowr::<ConfigIo>(b'p', 2);
const PCIOCWRITE: u32 = iowr::<ConfigIo>(b'p', 3);
const PCIOCGETCONF: u32 = iowr::<ConfIo>(b'p', 5);
const PCIOCGETBAR: u32 = iowr::<BarIo>(b'p', 6);
const IODEV_PIO: u32 = iowr::<Pio>(b'I', 0);
const PIO_READ: u32 = 0;
const PIO_WRITE: u32 = 1;
/// `PCI_GETCONF_MORE_DEVS`.
const MORE: u32 = 2;

const PCI: &str = "/dev/pci";

#[derive(Debug)]
pub(super) struct Function {
    sel: Sel,
    pci: File,
    /// Where a BAR has ports.
    io: Option<File>,
}

fn open(path: &str) -> io::Result<File> {
    sys::open(path).map_err(|e| io::Error::new(e.kind(), format!("{path}: {e}")))
}

/// Opens `/dev/io` in a thread that ends with that. The kernel lets the thread
/// that opens it, and those that it starts later, execute IN and OUT on every port
/// of the host (io(4)); what is needed here is the request only.
fn open_ports() -> io::Result<File> {
    let opened = std::thread::scope(|s| s.spawn(|| open("/dev/io")).join());
    opened.unwrap_or_else(|_| Err(io::Error::other("/dev/io: the thread that opens it ended")))
}

impl Function {
    pub(super) fn open(at: PciAddress) -> io::Result<Function> {
        let mut function = Function {
            sel: Sel {
                bus: at.bus,
                dev: at.slot,
                func: at.func,
                ..Sel::default()
            },
            pci: open(PCI)?,
            io: None,
        };
        if function.bars()?.iter().any(|b| b.io) {
            function.io = Some(open_ports()?);
        }
        Ok(function)
    }

    pub(super) fn bars(&self) -> io::Result<Vec<HostBar>> {
        let mut all = Vec::new();
        let mut index = 0;
        while index < BARS {
            let mut arg = BarIo {
                sel: self.sel,
                reg: 0x10 + 4 * index as i32,
                ..BarIo::default()
            };
            // It refuses BARs that are not there.
            if sys::ioctl(self.pci.as_fd(), PCIOCGETBAR, &mut arg).is_err() || arg.length == 0 {
                index += 1;
                continue;
            }
            let io = arg.base & 1 != 0;
            let wide = !io && arg.base & 6 == 4;
            all.push(HostBar {
                index,
                io,
                wide,
                prefetchable: !io && arg.base & 8 != 0,
                base: arg.base & if io { !3 } else { !0xf },
                size: arg.length,
            });
            index += if wide { 2 } else { 1 };
        }
        Ok(all)
    }

    /// Those that stay open, each with the requests that are made of it. The
    /// kernel compares requests one after the other: frequent ones first.
    pub(super) fn descriptors(&self) -> Vec<(BorrowedFd<'_>, &'static [u32])> {
        let pci: (_, &'static [u32]) = (self.pci.as_fd(), &[PCIOCREAD, PCIOCWRITE]);
        let io = self.io.iter();
        let io = io.map(|f| (f.as_fd(), &[IODEV_PIO] as &'static [u32]));
        std::iter::once(pci).chain(io).collect()
    }

    fn config(&self, request: u32, offset: u16, size: u8, data: u32) -> io::Result<u32> {
        let mut arg = ConfigIo {
            sel: self.sel,
            reg: offset.into(),
            width: size.into(),
            data,
        };
        sys::ioctl(self.pci.as_fd(), request, &mut arg)?;
        Ok(arg.data)
    }

    pub(super) fn config_read(&self, offset: u16, size: u8) -> io::Result<u32> {
        self.config(PCIOCREAD, offset, size, 0)
    }

    pub(super) fn config_write(&self, offset: u16, size: u8, value: u32) -> io::Result<()> {
        self.config(PCIOCWRITE, offset, size, value).map(drop)
    }

    fn port(&self, access: u32, bar: &HostBar, offset: u64, size: u8, val: u32) -> io::Result<u32> {
        let io = self.io.as_ref().ok_or(io::ErrorKind::NotFound)?;
        let port = u32::try_from(bar.base + offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut arg = Pio {
            access,
            port,
            width: size.into(),
            val,
        };
        sys::ioctl(io.as_fd(), IODEV_PIO, &mut arg)?;
        Ok(arg.val)
    }

    pub(super) fn port_read(&self, bar: &HostBar, offset: u64, size: u8) -> io::Result<u32> {
        self.port(PIO_READ, bar, offset, size, 0)
    }

    pub(super) fn port_write(
        &self,
        bar: &HostBar,
        offset: u64,
        size: u8,
        value: u32,
    ) -> io::Result<()> {
        self.port(PIO_WRITE, bar, offset, size, value).map(drop)
    }

    /// The file that a memory BAR is mapped from, and where in it the page of the
    /// BAR's start is.
    pub(super) fn memory(&self, bar: &HostBar) -> io::Result<(File, u64)> {
        Ok((open("/dev/mem")?, bar.base / super::PAGE * super::PAGE))
    }
}

/// A function as the host's bus knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// PCI segment.
    pub segment: u32,
    /// Where it is in that.
    pub at: PciAddress,
    /// Vendor and device.
    pub id: (u16, u16),
    /// Class, subclass, programming interface.
    pub class: u32,
    /// Type of its configuration header: 0 for what is no bridge.
    pub header: u8,
    /// Driver and unit.
    pub driver: Option<(String, u64)>,
}

/// All functions of the host's.
///
/// # Errors
/// `/dev/pci` cannot be opened.
pub fn attached() -> io::Result<Vec<Attached>> {
    let pci = File::open(PCI).map_err(|e| io::Error::new(e.kind(), format!("{PCI}: {e}")))?;
    let mut all = Vec::new();
    loop {
        let mut buffer = [Conf::default(); 64];
        let mut arg = ConfIo {
            match_buf_len: size_of_val(&buffer) as u32,
            matches: buffer.as_mut_ptr() as u64,
            offset: all.len() as u32,
            ..ConfIo::default()
        };
        // SAFETY: `matches` is the address of `match_buf_len` bytes, which are ours
        // alone during the call; there are no patterns.
        let r = unsafe {
            libc::ioctl(
                pci.as_raw_fd(),
                PCIOCGETCONF as _,
                std::ptr::from_mut(&mut arg),
            )
        };
        if r < 0 {
            return Err(io::Error::last_os_error());
        }
        let found = usize::try_from(arg.num_matches).unwrap_or(0);
        all.extend(buffer.iter().take(found).map(from_conf));
        if arg.status != MORE || found == 0 {
            return Ok(all);
        }
    }
}

fn from_conf(c: &Conf) -> Attached {
    let name: Vec<u8> = c.name.iter().copied().take_while(|b| *b != 0).collect();
    Attached {
        segment: c.sel.domain,
        at: PciAddress {
            bus: c.sel.bus,
            slot: c.sel.dev,
            func: c.sel.func,
        },
        id: (c.vendor, c.device),
        class: u32::from(c.class) << 16 | u32::from(c.subclass) << 8 | u32::from(c.progif),
        header: c.hdr & 0x7f,
        driver: (!name.is_empty()).then(|| (String::from_utf8_lossy(&name).into_owned(), c.unit)),
    }
}

/// Whether vmm.ko may use an IOMMU; `None` where it is not loaded. Its ppt counts its
/// functions, whosever it is; FreeBSD's own can be told to use none.
pub fn iommu_wanted() -> Option<bool> {
    sysctl(c"hw.vmm.ppt.devices")?;
    Some(sysctl(c"hw.vmm.iommu.enable") != Some(0))
}

/// Whether vmm.ko passes functions that share a group with the host's: ours where it
/// is told to, others always.
pub fn groups_allowed() -> bool {
    sysctl(c"hw.vmm.ppt.unsafe_groups") != Some(0)
}

fn sysctl(name: &CStr) -> Option<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut len = size_of_val(&value);
    // SAFETY: the name is NUL-terminated, `value` is as long as `len` says, and
    // nothing is set.
    let r = unsafe {
        libc::sysctlbyname(
            name.as_ptr(),
            std::ptr::from_mut(&mut value).cast(),
            &raw mut len,
            std::ptr::null(),
            0,
        )
    };
    (r == 0).then_some(value)
}
