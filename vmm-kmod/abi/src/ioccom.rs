//! FreeBSD's encoding of ioctl requests (`sys/ioccom.h`): bits 31..29 say which
//! way the argument is copied, bits 28..16 its length in bytes, bits 15..8 the
//! group, bits 7..0 the number.

/// No argument.
pub const IOC_VOID: u32 = 0x2000_0000;
/// The kernel copies the argument out.
pub const IOC_OUT: u32 = 0x4000_0000;
/// The kernel copies the argument in.
pub const IOC_IN: u32 = 0x8000_0000;
/// Both.
pub const IOC_INOUT: u32 = IOC_IN | IOC_OUT;
/// Longest argument, bytes (the length field has 13 bits).
pub const IOCPARM_MAX: usize = 1 << 13;

/// A request from its parts; `len` is in bytes and must be below
/// [`IOCPARM_MAX`].
pub const fn ioc(dir: u32, group: u8, num: u8, len: usize) -> u32 {
    assert!(len < IOCPARM_MAX);
    dir | (len as u32) << 16 | (group as u32) << 8 | num as u32
}

/// A request without an argument.
pub const fn io(group: u8, num: u8) -> u32 {
    ioc(IOC_VOID, group, num, 0)
}

/// A request whose argument is an `int`, passed by value (`_IOWINT`).
pub const fn iowint(group: u8, num: u8) -> u32 {
    ioc(IOC_VOID, group, num, size_of::<i32>())
}

/// A request that returns a `T`.
pub const fn ior<T>(group: u8, num: u8) -> u32 {
    ioc(IOC_OUT, group, num, size_of::<T>())
}

/// A request that passes a `T`.
pub const fn iow<T>(group: u8, num: u8) -> u32 {
    ioc(IOC_IN, group, num, size_of::<T>())
}

/// A request that passes and returns a `T`.
pub const fn iowr<T>(group: u8, num: u8) -> u32 {
    ioc(IOC_INOUT, group, num, size_of::<T>())
}

/// Length of the argument in bytes.
pub const fn ioc_len(request: u32) -> usize {
    ((request >> 16) & 0x1fff) as usize
}

/// Group of a request.
pub const fn ioc_group(request: u32) -> u8 {
    (request >> 8) as u8
}

/// Number of a request within its group.
pub const fn ioc_num(request: u32) -> u8 {
    request as u8
}

/// Whether the kernel copies the argument in before it acts.
pub const fn copies_in(request: u32) -> bool {
    request & IOC_IN != 0
}

/// Whether the kernel copies the argument out when it succeeded.
pub const fn copies_out(request: u32) -> bool {
    request & IOC_OUT != 0
}
