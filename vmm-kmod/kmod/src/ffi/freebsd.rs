//! What of `host.h` FreeBSD's kernel has functions for, with other names or
//! arguments.

use core::ffi::{CStr, c_char, c_int, c_ulong};
use core::sync::atomic::{AtomicU32, Ordering};

use super::{HostMutex, Sleeper, vmm_host_alloc, vmm_host_free};

/// Where a lock was taken, for the kernel's own checks.
const FILE: &CStr = c"vmm";

unsafe extern "C" {
    fn _sx_xlock(sx: *mut HostMutex, opts: c_int, file: *const c_char, line: c_int) -> c_int;
    fn sx_try_xlock_(sx: *mut HostMutex, file: *const c_char, line: c_int) -> c_int;
    fn _sx_xunlock(sx: *mut HostMutex, file: *const c_char, line: c_int);
    fn spinlock_enter();
    fn spinlock_exit();
    static time_second: i64;
}

pub unsafe fn vmm_host_mutex_lock(m: *mut HostMutex) {
    // SAFETY: by the caller's word; the lock is what comes first in it.
    unsafe { _sx_xlock(m, 0, FILE.as_ptr(), 0) };
}

pub unsafe fn vmm_host_mutex_trylock(m: *mut HostMutex) -> c_int {
    // SAFETY: as above.
    unsafe { sx_try_xlock_(m, FILE.as_ptr(), 0) }
}

pub unsafe fn vmm_host_mutex_unlock(m: *mut HostMutex) {
    // SAFETY: as above.
    unsafe { _sx_xunlock(m, FILE.as_ptr(), 0) }
}

/// A spin section, not only CLI: a thread that is made runnable meanwhile must
/// not be switched to before the end of it.
pub unsafe fn vmm_host_irq_save() -> c_ulong {
    // SAFETY: any context.
    unsafe { spinlock_enter() };
    0
}

pub unsafe fn vmm_host_irq_restore(_: c_ulong) {
    // SAFETY: pairs with `vmm_host_irq_save`.
    unsafe { spinlock_exit() }
}

/// A sleeper is its address, and the word there whether it was woken.
pub unsafe fn vmm_host_sleeper_create() -> *mut Sleeper {
    // SAFETY: no preconditions.
    unsafe { vmm_host_alloc(size_of::<AtomicU32>(), align_of::<AtomicU32>()).cast() }
}

pub unsafe fn vmm_host_sleeper_destroy(s: *mut Sleeper) {
    // SAFETY: it was made by the function above.
    unsafe { vmm_host_free(s.cast(), size_of::<AtomicU32>(), align_of::<AtomicU32>()) }
}

pub unsafe fn vmm_host_sleep_prepare(s: *mut Sleeper) {
    // SAFETY: as above; the looks that follow are ordered behind it.
    unsafe { AtomicU32::from_ptr(s.cast()).swap(0, Ordering::SeqCst) };
}

pub unsafe fn vmm_host_wallclock() -> i64 {
    // SAFETY: the kernel's own, written by its clock.
    unsafe { (&raw const time_second).read_volatile() }
}
