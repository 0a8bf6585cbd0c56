//! Linux: /dev/net/tun (Documentation/networking/tuntap.rst).

use std::ffi::{c_int, c_long};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::{HEADER, TapError, TapOffloads};

const DEVICE: &str = "/dev/net/tun";
/// Flags of an interface, as /sys/class/net/NAME/tun_flags shows them.
const TAP: i32 = libc::IFF_TAP;
const MULTI_QUEUE: i32 = libc::IFF_MULTI_QUEUE;

/// A request to the tun driver with an address.
fn request<T>(file: &File, number: libc::Ioctl, arg: &mut T) -> io::Result<()> {
    // SAFETY: the callers below pass the structure that the request is defined
    // with, exclusively borrowed for the call; the driver keeps no address.
    let r = unsafe { libc::ioctl(file.as_raw_fd(), number, std::ptr::from_mut(arg)) };
    if r < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// A request with a number.
fn request_value(file: &File, number: libc::Ioctl, value: c_long) -> io::Result<()> {
    // SAFETY: the request's argument is a number, no address.
    let r = unsafe { libc::ioctl(file.as_raw_fd(), number, value) };
    if r < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn interface(name: &str, flags: i32) -> libc::ifreq {
    // SAFETY: all bytes of an ifreq may be zero.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as _;
    }
    request.ifr_ifru.ifru_flags = flags as _;
    request
}

/// How to make a tap of that name.
fn recipe(name: &str, queues: usize) -> String {
    let multi = if queues > 1 { " multi_queue" } else { "" };
    format!("ip tuntap add dev {name} mode tap{multi} user $USER; ip link set {name} up")
}

pub fn open(name: &str, queues: usize) -> Result<(Vec<File>, bool), TapError> {
    let fits = (1..libc::IFNAMSIZ).contains(&name.len())
        && name != "."
        && name != ".."
        && name
            .bytes()
            .all(|b| b.is_ascii_graphic() && !matches!(b, b'/' | b':' | b'%'));
    if !fits {
        return Err(TapError::Name(
            name.into(),
            "1 to 15 characters, none of them a space, '/', ':' or '%'",
        ));
    }
    if !Path::new(DEVICE).exists() {
        return Err(TapError::NoDriver(
            DEVICE,
            "load the driver with: modprobe tun",
        ));
    }
    let sys = Path::new("/sys/class/net").join(name);
    // Without /sys the driver itself has to say.
    if Path::new("/sys/class/net").exists() {
        if !sys.exists() {
            return Err(TapError::NoSuchTap(name.into(), recipe(name, queues)));
        }
        let flags = std::fs::read_to_string(sys.join("tun_flags")).unwrap_or_default();
        let flags = flags.trim().strip_prefix("0x").unwrap_or_default();
        let flags = i32::from_str_radix(flags, 16).unwrap_or(0);
        if flags & TAP == 0 {
            return Err(TapError::NotATap(name.into(), recipe("tap0", queues)));
        }
        if queues > 1 && flags & MULTI_QUEUE == 0 {
            let how = format!("it has one queue; make it with: {}", recipe(name, queues));
            return Err(TapError::Queues(name.into(), how));
        }
        // One that allows several wants to be asked for several.
        return attach(name, queues, queues > 1 || flags & MULTI_QUEUE != 0);
    }
    attach(name, queues, queues > 1)
}

fn attach(name: &str, queues: usize, multi: bool) -> Result<(Vec<File>, bool), TapError> {
    let mut files = Vec::with_capacity(queues);
    let mut header = false;
    for _ in 0..queues {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(DEVICE)
            .map_err(|e| match e.raw_os_error() {
                Some(libc::EACCES | libc::EPERM) => TapError::Permission(
                    DEVICE.into(),
                    "it should be for everyone: chmod 0666 /dev/net/tun, as root".into(),
                ),
                Some(libc::ENXIO | libc::ENODEV | libc::ENOENT) => {
                    TapError::NoDriver(DEVICE, "load the driver with: modprobe tun")
                }
                _ => TapError::Host(DEVICE.into(), e),
            })?;
        let mut can: c_int = 0;
        // A driver from before this request has no headers either.
        if request(&file, libc::TUNGETFEATURES, &mut can).is_err() {
            can = 0;
        }
        header = can & libc::IFF_VNET_HDR != 0;
        let mut flags = TAP | libc::IFF_NO_PI;
        if header {
            flags |= libc::IFF_VNET_HDR;
        }
        if multi {
            flags |= MULTI_QUEUE;
        }
        let mut wanted = interface(name, flags);
        request(&file, libc::TUNSETIFF, &mut wanted).map_err(|e| refused(name, e))?;
        if header {
            let mut size = HEADER as c_int;
            request(&file, libc::TUNSETVNETHDRSZ, &mut size)
                .map_err(|e| TapError::Host(format!("{name}: size of the header"), e))?;
        }
        files.push(file);
    }
    Ok((files, header))
}

fn refused(name: &str, e: io::Error) -> TapError {
    match e.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => TapError::Permission(
            name.into(),
            format!(
                "it belongs to another user; as root: ip tuntap del dev {name} mode tap; {}",
                recipe(name, 1)
            ),
        ),
        Some(libc::EBUSY) => TapError::Busy(name.into()),
        Some(libc::E2BIG) => TapError::Queues(name.into(), "it has no more queues".into()),
        Some(libc::EINVAL) => TapError::NotATap(name.into(), recipe("tap0", 1)),
        _ => TapError::Host(name.into(), e),
    }
}

pub fn set_offloads(file: &File, o: TapOffloads) -> io::Result<()> {
    let bits = [
        (o.csum, libc::TUN_F_CSUM),
        (o.csum && o.tso4, libc::TUN_F_TSO4),
        (o.csum && o.tso6, libc::TUN_F_TSO6),
        (o.csum && o.ecn && (o.tso4 || o.tso6), libc::TUN_F_TSO_ECN),
    ];
    let bits = bits.iter().filter(|(on, _)| *on);
    let bits = bits.fold(0, |all, (_, bit)| all | *bit as c_long);
    request_value(file, libc::TUNSETOFFLOAD, bits)
}

pub fn attach_queue(file: &File, on: bool) -> io::Result<()> {
    let flag = if on {
        libc::IFF_ATTACH_QUEUE
    } else {
        libc::IFF_DETACH_QUEUE
    };
    request(file, libc::TUNSETQUEUE, &mut interface("", flag))
}

/// Whether an error says that the interface was removed.
pub fn gone(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EBADFD | libc::ENODEV))
}
