//! FreeBSD: /dev/bpf (bpf(4)).

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use super::Records;
use crate::sys::ioctl;
use crate::tap::{HEADER, TapError};
use vmm_abi::ioccom::{ior, iow, iowr};

const DEVICE: &str = "/dev/bpf";
/// Longest name of an interface, its end included.
const IFNAMSIZ: usize = 16;
/// Bytes of a read at most, and of each of the kernel's buffers; the kernel gives
/// less where `net.bpf.maxbufsize` says so.
const BUFFER: u32 = 128 << 10;
/// An Ethernet (net/dlt.h).
const DLT_EN10MB: u32 = 1;
/// Only what comes in is seen: not what is written here or by the host.
const BPF_D_IN: u32 = 0;

/// `struct ifreq`.
type Ifreq = [u8; 32];

const BIOCSBLEN: u32 = iowr::<u32>(b'B', 102);
const BIOCPROMISC: u32 = vmm_abi::ioccom::io(b'B', 105);
const BIOCGDLT: u32 = ior::<u32>(b'B', 106);
const BIOCSETIF: u32 = iow::<Ifreq>(b'B', 108);
const BIOCIMMEDIATE: u32 = iow::<u32>(b'B', 112);
const BIOCSHDRCMPLT: u32 = iow::<u32>(b'B', 117);
const BIOCSDIRECTION: u32 = iow::<u32>(b'B', 119);
const BIOCLOCK: u32 = vmm_abi::ioccom::io(b'B', 122);

/// An open interface.
#[derive(Debug)]
pub struct Bpf {
    file: File,
    buffer: Vec<u8>,
    records: Records,
}

impl Bpf {
    /// Opens the interface `name`, promiscuously; nothing about it can be changed
    /// through the descriptor any more.
    ///
    /// # Errors
    /// [`TapError`].
    pub fn open(name: &str) -> Result<Bpf, TapError> {
        let fits = (1..IFNAMSIZ).contains(&name.len())
            && name.bytes().all(|b| b.is_ascii_graphic() && b != b'/');
        if !fits {
            let why = "1 to 15 characters, none of them a space or '/'";
            return Err(TapError::Name(name.into(), why));
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(DEVICE)
            .map_err(|e| match e.raw_os_error() {
                Some(libc::ENOENT | libc::ENXIO) => TapError::NoDriver(
                    DEVICE,
                    "the kernel needs \"device bpf\" (GENERIC has it), a jail a devfs rule for it",
                ),
                Some(libc::EACCES | libc::EPERM) => TapError::Permission(
                    DEVICE.into(),
                    "run as root, or let the user read and write it (devfs.conf(5))".into(),
                ),
                _ => TapError::Host(DEVICE.into(), e),
            })?;
        let host = |what: &str, e: io::Error| TapError::Host(format!("{name}: {what}"), e);
        let fd = file.as_fd();
        // Before the interface: after it the size is fixed.
        let mut size = BUFFER;
        ioctl(fd, BIOCSBLEN, &mut size).map_err(|e| host("the size of the buffer", e))?;
        let mut request: Ifreq = [0; 32];
        for (to, from) in request.iter_mut().zip(name.bytes()) {
            *to = from;
        }
        ioctl(fd, BIOCSETIF, &mut request).map_err(|e| refused(name, e))?;
        let mut kind = 0_u32;
        ioctl(fd, BIOCGDLT, &mut kind).map_err(|e| host("its kind", e))?;
        if kind != DLT_EN10MB {
            return Err(TapError::NotEthernet(name.into()));
        }
        for (what, request, mut value) in [
            ("packets at once", BIOCIMMEDIATE, 1_u32),
            ("the sender's address", BIOCSHDRCMPLT, 1),
            ("its direction", BIOCSDIRECTION, BPF_D_IN),
        ] {
            ioctl(fd, request, &mut value).map_err(|e| host(what, e))?;
        }
        for (what, request) in [("promiscuous mode", BIOCPROMISC), ("BIOCLOCK", BIOCLOCK)] {
            crate::sys::ioctl_void(fd, request).map_err(|e| host(what, e))?;
        }
        Ok(Bpf {
            file,
            buffer: vec![0; size as usize],
            records: Records::default(),
        })
    }

    /// Sends a packet, header first; false where the host had no room for it or
    /// the interface is down.
    ///
    /// # Errors
    /// The interface is gone.
    pub fn send(&self, packet: &[u8]) -> io::Result<bool> {
        match (&self.file).write(packet.get(HEADER..).unwrap_or_default()) {
            Ok(_) => Ok(true),
            Err(e) if gone(&e) => Err(e),
            // Full, down, or larger than the interface's MTU: the packet is lost,
            // as on a wire.
            Err(_) => Ok(false),
        }
    }

    /// Receives a packet into `into`, header first; its length.
    ///
    /// # Errors
    /// The interface is gone.
    pub fn receive(&mut self, into: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            while let Some(frame) = self.records.next(&self.buffer) {
                let frame = self.buffer.get(frame).unwrap_or_default();
                let whole = into.split_at_mut_checked(HEADER);
                if let Some((head, rest)) = whole
                    && let Some(rest) = rest.get_mut(..frame.len())
                {
                    head.fill(0);
                    if let Some(count) = head.get_mut(10) {
                        *count = 1;
                    }
                    rest.copy_from_slice(frame);
                    return Ok(Some(HEADER + frame.len()));
                }
            }
            match (&self.file).read(&mut self.buffer) {
                Ok(0) => return Ok(None),
                Ok(n) => self.records = Records::new(n),
                Err(e) if gone(&e) => return Err(e),
                Err(_) => return Ok(None),
            }
        }
    }

    /// Whether there are packets that were read already, of which [`Bpf::fd`] does
    /// not tell any more.
    pub fn pending(&self) -> bool {
        !self.records.is_empty()
    }

    /// Readable when packets wait.
    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl AsFd for Bpf {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn refused(name: &str, e: io::Error) -> TapError {
    match e.raw_os_error() {
        Some(libc::ENXIO) => {
            let pair = name.trim_end_matches(['a', 'b']);
            let recipe = format!(
                "kldload if_epair; ifconfig {pair} create; ifconfig {pair}a up; ifconfig {pair}b up"
            );
            TapError::NoSuchTap(name.into(), recipe)
        }
        _ => TapError::Host(name.into(), e),
    }
}

/// Whether an error says that the interface was removed.
fn gone(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ENXIO | libc::EBADF))
}
