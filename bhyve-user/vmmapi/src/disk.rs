//! What FreeBSD's disks are asked for beyond reads and writes (disk(4)).

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// `_IO('d', 135)`.
const DIOCGFLUSH: libc::c_ulong = 0x2000_6487;
/// `_IOW('d', 136, off_t[2])`.
const DIOCGDELETE: libc::c_ulong = 0x8010_6488;
/// `_IOWR('d', 142, struct diocgattr_arg)`.
const DIOCGATTR: libc::c_ulong = 0xc148_648e;

/// `struct diocgattr_arg`: 328 bytes.
#[repr(C)]
struct Attribute {
    name: [u8; 64],
    len: i32,
    value: [u64; 32],
}

fn done(r: libc::c_int) -> io::Result<()> {
    if r < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Has a disk write down what it has in its cache.
///
/// # Errors
/// ENOTTY: no disk. EOPNOTSUPP: it has none. And what the disk says.
pub fn flush(disk: impl AsFd) -> io::Result<()> {
    // SAFETY: the request takes no argument.
    done(unsafe { libc::ioctl(disk.as_fd().as_raw_fd(), DIOCGFLUSH) })
}

/// Tells a disk that the bytes in a range of whole sectors are not needed any more.
///
/// # Errors
/// As [`flush`]; EINVAL for a range that the disk does not have.
pub fn delete(disk: impl AsFd, offset: u64, len: u64) -> io::Result<()> {
    let wide = |n: u64| i64::try_from(n).map_err(|_| io::ErrorKind::InvalidInput);
    let range = [wide(offset)?, wide(len)?];
    // SAFETY: the kernel reads two off_t.
    done(unsafe { libc::ioctl(disk.as_fd().as_raw_fd(), DIOCGDELETE, range.as_ptr()) })
}

/// Whether [`delete`] is of use.
pub fn can_delete(disk: impl AsFd) -> bool {
    let mut attribute = Attribute {
        name: [0; 64],
        len: 4,
        value: [0; 32],
    };
    let name = b"GEOM::candelete";
    attribute.name[..name.len()].copy_from_slice(name);
    // SAFETY: the kernel reads and writes a whole `struct diocgattr_arg`.
    let r = unsafe { libc::ioctl(disk.as_fd().as_raw_fd(), DIOCGATTR, &raw mut attribute) };
    r == 0 && attribute.value[0] as u32 != 0
}

const _: () = assert!(size_of::<Attribute>() == 328);
