//! FreeBSD's capability mode and rights of descriptors; other hosts have nothing.

use crate::{Error, Needs, Purpose, Report};
use std::io;
use std::os::fd::BorrowedFd;

pub fn enter(needs: &Needs, _refused: Box<dyn Fn(&str) + Send>) -> Result<Report, Error> {
    let mut report = Report::default();
    // Addresses and paths are global names; capability mode knows none.
    if needs.network || needs.unix || needs.names() {
        report
            .lacking
            .push("no capability mode: sockets or files are still to be opened by name".into());
        return Ok(report);
    }
    #[cfg(target_os = "freebsd")]
    match vmmapi::confine::enter_capability_mode() {
        Ok(()) => {}
        Err(e) => report.lacking.push(format!("no capability mode: {e}")),
    }
    #[cfg(not(target_os = "freebsd"))]
    report.lacking.push("no sandbox on this host".into());
    Ok(report)
}

pub fn join() -> Result<(), Error> {
    Ok(())
}

#[cfg(target_os = "freebsd")]
pub fn limit(fd: BorrowedFd<'_>, purpose: Purpose<'_>) -> io::Result<()> {
    use vmmapi::confine::*;

    const TERMINAL: [u64; 3] = [libc::TIOCGETA, libc::TIOCSETA, libc::TIOCGWINSZ];
    const SOCKET: [u64; 1] = [libc::FIONBIO];
    // disk(4): DIOCGDELETE, DIOCGFLUSH, DIOCGMEDIASIZE, DIOCGSECTORSIZE, DIOCGATTR.
    const DISK: [u64; 5] = [
        0x8010_6488,
        0x2000_6487,
        0x4008_6481,
        0x4004_6480,
        0xc148_648e,
    ];
    let owned: Vec<u64>;
    let (rights, requests): (&[u64], &[u64]) = match purpose {
        Purpose::Vm(requests) => {
            owned = requests.iter().map(|r| u64::from(*r)).collect();
            (&[CAP_IOCTL, CAP_MMAP_RW, CAP_SEEK], &owned)
        }
        Purpose::Control(requests) => {
            owned = requests.iter().map(|r| u64::from(*r)).collect();
            (&[CAP_IOCTL], &owned)
        }
        Purpose::Terminal => (
            &[CAP_READ, CAP_WRITE, CAP_EVENT, CAP_FSTAT, CAP_IOCTL],
            &TERMINAL,
        ),
        Purpose::Output => (&[CAP_WRITE, CAP_EVENT, CAP_FSTAT, CAP_IOCTL], &TERMINAL),
        Purpose::Disk => (
            &[
                CAP_PREAD, CAP_PWRITE, CAP_FSYNC, CAP_FSTAT, CAP_EVENT, CAP_IOCTL,
            ],
            &DISK,
        ),
        Purpose::Image => (&[CAP_PREAD, CAP_FSTAT], &[]),
        Purpose::Folder => (
            &[CAP_LOOKUP, CAP_PREAD, CAP_FSTAT, CAP_FSTATFS, CAP_FCNTL],
            &[],
        ),
        Purpose::Packets => (&[CAP_READ, CAP_WRITE, CAP_EVENT], &[]),
        // Whoever is accepted has the same rights.
        Purpose::Listener => (
            &[
                CAP_ACCEPT,
                CAP_READ,
                CAP_WRITE,
                CAP_EVENT,
                CAP_FCNTL,
                CAP_GETSOCKOPT,
                CAP_SETSOCKOPT,
                CAP_SHUTDOWN,
                CAP_IOCTL,
            ],
            &SOCKET,
        ),
    };
    let limited = limit_rights(fd, rights).and_then(|()| {
        if requests.is_empty() {
            return Ok(());
        }
        limit_ioctls(fd, requests)
    });
    match limited {
        // A kernel without Capsicum; `enter` tells of it.
        Err(e) if e.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
        other => other,
    }
}

#[cfg(not(target_os = "freebsd"))]
pub fn limit(_: BorrowedFd<'_>, _: Purpose<'_>) -> io::Result<()> {
    Ok(())
}
