//! FreeBSD: /dev/tapN and /dev/vmnetN (tap(4), tuntap(4)).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;

use super::{TapError, TapOffloads};

/// Longest name of an interface, its end included.
const IFNAMSIZ: usize = 16;

pub fn open(name: &str, queues: usize) -> Result<(Vec<File>, bool), TapError> {
    let digits = name
        .strip_prefix("tap")
        .or_else(|| name.strip_prefix("vmnet"));
    let fits = digits.is_some_and(|d| d.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_'))
        && name.len() < IFNAMSIZ;
    if !fits {
        return Err(TapError::Name(
            name.into(),
            "bhyve's are tapN and vmnetN (slirp needs no interface)",
        ));
    }
    if queues > 1 {
        let why = "FreeBSD's taps have one queue".into();
        return Err(TapError::Queues(name.into(), why));
    }
    let path = format!("/dev/{name}");
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&path)
        .map_err(|e| match e.raw_os_error() {
            Some(libc::ENOENT | libc::ENXIO) => TapError::NoSuchTap(
                name.into(),
                format!("ifconfig {name} create up (kldload if_tap on FreeBSD 12 and earlier)"),
            ),
            Some(libc::EACCES | libc::EPERM) => TapError::Permission(
                path.clone(),
                "run as root, or sysctl net.link.tap.user_open=1 and chown the device".into(),
            ),
            Some(libc::EBUSY) => TapError::Busy(name.into()),
            _ => TapError::Host(path.clone(), e),
        })?;
    Ok((vec![file], false))
}

/// Nothing to set: 12's tap knows no header. 14's does (TAPSVNETHDR), but what
/// it then leaves undone is a matter of the interface's settings and not of
/// the guest's wishes, so that it is not used here.
pub fn set_offloads(_: &File, _: TapOffloads) -> io::Result<()> {
    Ok(())
}

pub fn attach_queue(_: &File, _: bool) -> io::Result<()> {
    Ok(())
}

/// Whether an error says that the interface was removed.
pub fn gone(e: &io::Error) -> bool {
    matches!(
        e.raw_os_error(),
        Some(libc::ENXIO | libc::EBADF | libc::ENODEV)
    )
}
