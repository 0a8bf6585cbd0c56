//! The pieces of a sandbox that only `unsafe` code can have: the handler of the
//! signal by which Linux tells of a refused system call, and FreeBSD's capability
//! mode and rights of descriptors.

#[cfg(target_os = "linux")]
mod linux {
    use std::io;
    use std::os::fd::{IntoRawFd, OwnedFd};
    use std::sync::atomic::{AtomicI32, Ordering};

    /// Where refused calls are written to.
    static REPORT: AtomicI32 = AtomicI32::new(-1);

    /// Makes a system call that a seccomp filter traps (`SECCOMP_RET_TRAP`) fail
    /// with EPERM, and writes its number to `report`, four bytes, host order.
    /// `report` is best a pipe: what is written at once arrives at once.
    ///
    /// # Errors
    /// The handler cannot be installed.
    pub fn on_refused_call(report: OwnedFd) -> io::Result<()> {
        REPORT.store(report.into_raw_fd(), Ordering::SeqCst);
        let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = refused;
        // SAFETY: an all-zero sigaction is a valid one, which is then filled in.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = handler as libc::sighandler_t;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
        // SAFETY: `action` is a valid action whose handler has the signature of
        // SA_SIGINFO and calls only async-signal-safe functions.
        let r = unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) };
        if r < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    extern "C" fn refused(_: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
        // SAFETY: the kernel hands an SA_SIGINFO handler a valid siginfo_t; for
        // SIGSYS the number of the call follows code and call address at offset
        // 24 on 64-bit machines, within the 128 bytes of the structure.
        let call = unsafe { info.cast::<i32>().add(6).read() };
        // SAFETY: and a valid ucontext_t, which is this thread's until it returns.
        let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
        registers[libc::REG_RAX as usize] = -i64::from(libc::EPERM);
        let bytes = call.to_ne_bytes();
        // SAFETY: write(2) is async-signal-safe, and the bytes are readable. errno
        // is put back: the interrupted code may be about to look at it.
        unsafe {
            let errno = libc::__errno_location();
            let saved = *errno;
            libc::write(
                REPORT.load(Ordering::SeqCst),
                bytes.as_ptr().cast(),
                bytes.len(),
            );
            *errno = saved;
        }
    }
}

#[cfg(target_os = "linux")]
pub use linux::on_refused_call;

#[cfg(target_os = "freebsd")]
mod freebsd {
    use std::io;
    use std::os::fd::{AsRawFd, BorrowedFd};

    pub use libc::{
        CAP_ACCEPT, CAP_EVENT, CAP_FCNTL, CAP_FSTAT, CAP_FSTATFS, CAP_FSYNC, CAP_GETSOCKOPT,
        CAP_IOCTL, CAP_LOOKUP, CAP_MMAP_RW, CAP_PREAD, CAP_PWRITE, CAP_READ, CAP_SEEK,
        CAP_SETSOCKOPT, CAP_SHUTDOWN, CAP_WRITE,
    };

    fn done(r: libc::c_int) -> io::Result<()> {
        if r < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Enters capability mode (capsicum(4)): no global name can be used by this
    /// process and its children ever after.
    ///
    /// # Errors
    /// The kernel has no capability mode.
    pub fn enter_capability_mode() -> io::Result<()> {
        // SAFETY: cap_enter takes nothing and only takes rights away.
        done(unsafe { libc::cap_enter() })
    }

    /// Leaves a descriptor these rights (`CAP_*`, rights(4)) of those that it has.
    ///
    /// # Errors
    /// ENOTCAPABLE: it lacks one of them. ENOSYS: the kernel has no Capsicum.
    pub fn limit_rights(fd: BorrowedFd<'_>, rights: &[u64]) -> io::Result<()> {
        // SAFETY: all-zero is a valid cap_rights_t, which is then initialised with
        // the version and no right, and given the rights one by one; a 0 ends
        // each list.
        let set = unsafe {
            let mut set: libc::cap_rights_t = std::mem::zeroed();
            libc::__cap_rights_init(libc::CAP_RIGHTS_VERSION, &raw mut set, 0_u64);
            for right in rights {
                libc::__cap_rights_set(&raw mut set, *right, 0_u64);
            }
            set
        };
        // SAFETY: `set` is an initialised set.
        done(unsafe { libc::cap_rights_limit(fd.as_raw_fd(), &raw const set) })
    }

    /// Leaves a descriptor these requests of ioctl(2). The kernel compares them one
    /// after the other: the most frequent ones belong in front.
    ///
    /// # Errors
    /// As [`limit_rights`].
    pub fn limit_ioctls(fd: BorrowedFd<'_>, requests: &[u64]) -> io::Result<()> {
        // SAFETY: the kernel reads as many requests as it is told of.
        let r =
            unsafe { libc::cap_ioctls_limit(fd.as_raw_fd(), requests.as_ptr(), requests.len()) };
        done(r)
    }
}

#[cfg(target_os = "freebsd")]
pub use freebsd::*;
