//! What of `host.h` FreeBSD's kernel has functions for, with other names or
//! arguments.

use core::ffi::{CStr, c_char, c_int, c_ulong, c_void};
use core::ptr;
use core::sync::atomic::{AtomicU32, Ordering};

use vmm_hw::instr;

use super::{HostMutex, Sleeper, Timer, vmm_host_alloc_pages, vmm_host_free_pages};

/// Where a lock was taken, for the kernel's own checks.
const FILE: &CStr = c"vmm";

unsafe extern "C" {
    fn _sx_xlock(sx: *mut HostMutex, opts: c_int, file: *const c_char, line: c_int) -> c_int;
    fn sx_try_xlock_(sx: *mut HostMutex, file: *const c_char, line: c_int) -> c_int;
    fn _sx_xunlock(sx: *mut HostMutex, file: *const c_char, line: c_int);
    fn spinlock_enter();
    fn spinlock_exit();
    fn kern_yield(priority: c_int);
    /// An int or a bool, by the kernel's version.
    fn sched_runnable() -> u8;
    /// The last argument is gone since.
    fn _callout_stop_safe(callout: *mut Timer, flags: c_int, drain: *mut c_void) -> c_int;
    fn malloc(size: usize, kind: *mut c_void, flags: c_int) -> *mut c_void;
    fn free(p: *mut c_void, kind: *mut c_void);
    fn vmm_can_sleep() -> bool;
    fn ppsratecheck(last: *mut [i64; 2], count: *mut c_int, most: c_int) -> c_int;
    fn printf(format: *const c_char, ...) -> c_int;
    static time_second: i64;
    static mut M_VMM: [u8; 0];
}

/// malloc(9)'s flags.
const M_NOWAIT: c_int = 1;
const M_WAITOK: c_int = 2;
const M_ZERO: c_int = 0x100;
const PAGE: usize = 4096;
/// kern_yield(9): the thread's own priority in userland.
const PRI_USER: c_int = -2;
/// Messages a second, of each level.
const LOG_RATE: c_int = 10;
const LOG_LEVELS: usize = 3;
const LOG_FORMAT: &CStr = c"vmm: %.*s\n";

/// Whole pages are taken from the direct map, where the CPU is told of them.
fn is_page(size: usize, align: usize) -> bool {
    align == PAGE && size <= PAGE
}

pub unsafe fn vmm_host_alloc(size: usize, align: usize) -> *mut c_void {
    if is_page(size, align) {
        // SAFETY: there is room for the address, which is not needed.
        return unsafe { vmm_host_alloc_pages(0, &mut 0) };
    }
    if align > PAGE {
        return ptr::null_mut();
    }
    // malloc(9) aligns a power of two to its size.
    let size = if align > 16 && size < PAGE {
        size.max(align).next_power_of_two()
    } else {
        size
    };
    // SAFETY: it sleeps only where that is allowed.
    unsafe {
        let wait = if vmm_can_sleep() { M_WAITOK } else { M_NOWAIT };
        malloc(size, (&raw mut M_VMM).cast(), wait | M_ZERO)
    }
}

pub unsafe fn vmm_host_free(p: *mut c_void, size: usize, align: usize) {
    // SAFETY: by the caller's word it was allocated so.
    unsafe {
        if is_page(size, align) {
            vmm_host_free_pages(p, 0);
        } else {
            free(p, (&raw mut M_VMM).cast());
        }
    }
}

pub unsafe fn vmm_host_give_way() {
    // SAFETY: process context.
    unsafe { kern_yield(PRI_USER) }
}

pub unsafe fn vmm_host_alone() -> bool {
    // SAFETY: any context.
    unsafe { sched_runnable() == 0 }
}

pub unsafe fn vmm_host_timer_disarm(t: *mut Timer) {
    // SAFETY: by the caller's word; the callout is what comes first in it.
    unsafe { _callout_stop_safe(t, 0, ptr::null_mut()) };
}

pub unsafe fn vmm_host_set_vmxe(on: c_int) {
    const VMXE: u64 = 1 << 13;
    // SAFETY: CPL 0, interrupts off; the kernel keeps no other books of it.
    unsafe {
        let cr4 = instr::read_cr4();
        instr::write_cr4(if on != 0 { cr4 | VMXE } else { cr4 & !VMXE });
    }
}

pub unsafe fn vmm_host_log(level: c_int, msg: *const u8, len: usize) {
    static mut LAST: [[i64; 2]; LOG_LEVELS] = [[0; 2]; LOG_LEVELS];
    static mut COUNT: [c_int; LOG_LEVELS] = [0; LOG_LEVELS];
    // SAFETY: the kernel's own functions; where several CPUs log at once, it
    // may count wrong, as it does for itself. The index is inside.
    unsafe {
        let wanted = match usize::try_from(level) {
            Ok(n) if n < LOG_LEVELS => {
                let last = (&raw mut LAST).cast::<[i64; 2]>().add(n);
                let count = (&raw mut COUNT).cast::<c_int>().add(n);
                ppsratecheck(last, count, LOG_RATE) != 0
            }
            _ => false,
        };
        if wanted {
            printf(LOG_FORMAT.as_ptr(), len as c_int, msg);
        }
    }
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
