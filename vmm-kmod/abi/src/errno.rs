//! Error numbers by meaning. What a host calls them in numbers is the host's
//! business (`vmm-kmod` maps them).

macro_rules! errnos {
    ($($(#[$m:meta])* $v:ident $freebsd:literal $linux:literal,)*) => {
        /// An error of the vmm interface, with FreeBSD's meaning.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Errno {
            $($(#[$m])* $v,)*
        }

        impl Errno {
            /// The symbol, such as `ENXIO`.
            pub const fn name(self) -> &'static str {
                match self { $(Errno::$v => stringify!($v),)* }
            }
            /// FreeBSD's number (`sys/errno.h`).
            pub const fn freebsd(self) -> i32 {
                match self { $(Errno::$v => $freebsd,)* }
            }
            /// Linux's number on amd64 (`asm-generic/errno.h`).
            pub const fn linux(self) -> i32 {
                match self { $(Errno::$v => $linux,)* }
            }
        }
    };
}

errnos! {
    /// Not permitted.
    EPERM 1 1,
    /// No such VM or object.
    ENOENT 2 2,
    /// Interrupted by a signal.
    EINTR 4 4,
    /// Input/output error.
    EIO 5 5,
    /// No such device: the CPU or the VM is gone or not there.
    ENXIO 6 6,
    /// Argument list too long.
    E2BIG 7 7,
    /// Out of memory.
    ENOMEM 12 12,
    /// Access denied.
    EACCES 13 13,
    /// A bad user address.
    EFAULT 14 14,
    /// Busy: a vCPU that must be idle is not, or a name is taken by a dying VM.
    EBUSY 16 16,
    /// It exists already.
    EEXIST 17 17,
    /// No such device.
    ENODEV 19 19,
    /// Invalid argument.
    EINVAL 22 22,
    /// Not an ioctl of this device.
    ENOTTY 25 25,
    /// Out of space.
    ENOSPC 28 28,
    /// Out of range.
    ERANGE 34 34,
    /// Would block.
    EAGAIN 35 11,
    /// In progress already.
    EALREADY 37 114,
    /// Not supported.
    EOPNOTSUPP 45 95,
    /// Timed out.
    ETIMEDOUT 60 110,
    /// Name too long.
    ENAMETOOLONG 63 36,
    /// Not implemented.
    ENOSYS 78 38,
    /// Restart the system call (in the kernel only; the number is what each
    /// kernel uses itself).
    ERESTART -1 512,
    /// Integrity check failed (what stock vmm answers to a bad state).
    EDOOFUS 88 71,
}
