//! Locks, sleepers and timers over the host's.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::cell::UnsafeCell;
use core::mem::ManuallyDrop;
use core::ops::{Deref, DerefMut};
use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, Ordering};

use crate::ffi;

/// The host is out of memory.
#[derive(Clone, Copy, Debug)]
pub struct NoMemory;

/// Moves a value to where it stays. What is compiled for size would be copied byte by byte,
/// were its size known.
///
/// # Safety
/// `to` is writable for a T.
unsafe fn put<T>(to: *mut T, value: T) {
    #[inline(never)]
    #[optimize(speed)]
    unsafe fn copy(to: *mut u8, from: *const u8, len: usize) {
        // SAFETY: by the caller's word.
        unsafe { core::ptr::copy_nonoverlapping(from, to, len) }
    }
    let value = ManuallyDrop::new(value);
    // SAFETY: by the caller's word; `value` is not used again.
    unsafe { copy(to.cast(), (&raw const value).cast(), size_of::<T>()) }
}

/// `Box::new` that returns an error instead of ending the kernel.
pub fn try_box<T>(value: T) -> Result<Box<T>, NoMemory> {
    let layout = core::alloc::Layout::new::<T>();
    if layout.size() == 0 {
        return Ok(Box::new(value));
    }
    // SAFETY: the layout has a size; the result is checked for NULL.
    let p = unsafe { alloc::alloc::alloc(layout) }.cast::<T>();
    let p = NonNull::new(p).ok_or(NoMemory)?;
    // SAFETY: `p` is fresh memory of T's layout from the global allocator,
    // which is what a Box owns.
    unsafe {
        put(p.as_ptr(), value);
        Ok(Box::from_raw(p.as_ptr()))
    }
}

/// `try_box` for what is large: the value is made after the allocation, in a
/// frame of its own, so that copies of it and the depth of the host's allocator
/// do not add up on the kernel's stack.
pub fn try_box_with<T>(make: impl FnOnce() -> T) -> Result<Box<T>, NoMemory> {
    #[inline(never)]
    fn fill<T>(to: &mut core::mem::MaybeUninit<T>, make: impl FnOnce() -> T) {
        // SAFETY: `to` is a place for one T.
        unsafe { put(to.as_mut_ptr(), make()) };
    }
    let layout = core::alloc::Layout::new::<T>();
    // SAFETY: every caller's T has a size; the result is checked for NULL.
    let p = unsafe { alloc::alloc::alloc(layout) }.cast::<core::mem::MaybeUninit<T>>();
    let mut p = NonNull::new(p).ok_or(NoMemory)?;
    // SAFETY: `p` is fresh memory of T's layout from the global allocator,
    // which is what a Box owns; `fill` makes it a T.
    unsafe {
        fill(p.as_mut(), make);
        Ok(Box::from_raw(p.as_ptr().cast()))
    }
}

/// A zero-filled `T` on the heap, never on the stack.
///
/// # Safety
/// All zeroes must be a valid `T`.
pub unsafe fn try_box_zeroed<T>() -> Result<Box<T>, NoMemory> {
    let layout = core::alloc::Layout::new::<T>();
    // SAFETY: every caller's T has a size; the result is checked for NULL.
    let p =
        NonNull::new(unsafe { alloc::alloc::alloc_zeroed(layout) }.cast::<T>()).ok_or(NoMemory)?;
    // SAFETY: fresh memory of T's layout, valid by the caller's word.
    Ok(unsafe { Box::from_raw(p.as_ptr()) })
}

/// `n` items on the heap.
pub fn try_slice<T>(n: usize, mut f: impl FnMut(usize) -> T) -> Result<Box<[T]>, NoMemory> {
    let mut v = Vec::new();
    v.try_reserve_exact(n).map_err(|_| NoMemory)?;
    for i in 0..n {
        v.push(f(i));
    }
    Ok(v.into_boxed_slice())
}

/// `n` items of zeroes on the heap.
///
/// # Safety
/// All zeroes must be a valid `T`, which has a size.
pub unsafe fn try_slice_zeroed<T>(n: usize) -> Result<Box<[T]>, NoMemory> {
    let layout = core::alloc::Layout::array::<T>(n).map_err(|_| NoMemory)?;
    if layout.size() == 0 {
        return Ok(Box::default());
    }
    // SAFETY: the layout has a size; the result is checked for NULL.
    let p = unsafe { alloc::alloc::alloc_zeroed(layout) }.cast::<T>();
    let p = NonNull::new(p).ok_or(NoMemory)?;
    // SAFETY: fresh memory of the layout of `n` items, valid by the caller's word.
    Ok(unsafe { Box::from_raw(core::ptr::slice_from_raw_parts_mut(p.as_ptr(), n)) })
}

/// A lock that is held for a few hundred instructions at most, with
/// interrupts off; timer callbacks may take it.
pub struct SpinLock<T> {
    locked: AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: the lock gives one thread at a time access to T.
unsafe impl<T: Send> Sync for SpinLock<T> {}
// SAFETY: owning the lock is owning T.
unsafe impl<T: Send> Send for SpinLock<T> {}

impl<T> SpinLock<T> {
    /// An unlocked lock.
    pub const fn new(value: T) -> Self {
        SpinLock {
            locked: AtomicBool::new(false),
            value: UnsafeCell::new(value),
        }
    }

    /// Takes the lock, turning interrupts off.
    #[inline(always)]
    pub fn lock(&self) -> SpinGuard<'_, T> {
        SpinGuard {
            lock: self,
            flags: acquire(&self.locked),
        }
    }
}

// Not inlined, nor is `release`: there are a hundred places.
#[inline(never)]
#[optimize(speed)]
fn acquire(locked: &AtomicBool) -> core::ffi::c_ulong {
    // SAFETY: paired with the restore in `release`.
    let flags = unsafe { ffi::vmm_host_irq_save() };
    while locked
        .compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed)
        .is_err()
    {
        core::hint::spin_loop();
    }
    flags
}

#[inline(never)]
#[optimize(speed)]
fn release(locked: &AtomicBool, flags: core::ffi::c_ulong) {
    locked.store(false, Ordering::Release);
    // SAFETY: `flags` came from the matching save.
    unsafe { ffi::vmm_host_irq_restore(flags) }
}

/// Holds a [`SpinLock`].
pub struct SpinGuard<'a, T> {
    lock: &'a SpinLock<T>,
    flags: core::ffi::c_ulong,
}

impl<T> Deref for SpinGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: the lock is held.
        unsafe { &*self.lock.value.get() }
    }
}

impl<T> DerefMut for SpinGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: the lock is held.
        unsafe { &mut *self.lock.value.get() }
    }
}

impl<T> Drop for SpinGuard<'_, T> {
    #[inline(always)]
    fn drop(&mut self) {
        release(&self.lock.locked, self.flags);
    }
}

/// The host's part of a [`Mutex`].
pub struct RawMutex(NonNull<ffi::HostMutex>);

impl RawMutex {
    /// An unlocked one.
    pub fn new() -> Result<Self, NoMemory> {
        // SAFETY: no preconditions.
        let raw = unsafe { ffi::vmm_host_mutex_create() };
        NonNull::new(raw).map(RawMutex).ok_or(NoMemory)
    }

    fn as_ptr(&self) -> *mut ffi::HostMutex {
        self.0.as_ptr()
    }
}

impl Drop for RawMutex {
    fn drop(&mut self) {
        // SAFETY: nobody holds or waits for a mutex that is being dropped.
        unsafe { ffi::vmm_host_mutex_destroy(self.as_ptr()) }
    }
}

/// A lock whose holder may sleep.
pub struct Mutex<T: ?Sized> {
    raw: RawMutex,
    value: UnsafeCell<T>,
}

// SAFETY: the lock gives one thread at a time access to T.
unsafe impl<T: Send + ?Sized> Sync for Mutex<T> {}
// SAFETY: owning the lock is owning T.
unsafe impl<T: Send + ?Sized> Send for Mutex<T> {}

impl<T> Mutex<T> {
    /// An unlocked mutex.
    pub fn new(value: T) -> Result<Self, NoMemory> {
        Ok(Self::of(RawMutex::new()?, value))
    }

    /// The same with the host's part already made: what is large is moved less often.
    pub fn of(raw: RawMutex, value: T) -> Self {
        Mutex {
            raw,
            value: UnsafeCell::new(value),
        }
    }
}

impl<T: ?Sized> Mutex<T> {
    /// Takes the lock, sleeping until it is free.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        // SAFETY: `raw` lives as long as self; callers are in process context.
        unsafe { ffi::vmm_host_mutex_lock(self.raw.as_ptr()) };
        MutexGuard { lock: self }
    }

    /// Takes the lock if it is free.
    #[inline]
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        // SAFETY: as for `lock`.
        let got = unsafe { ffi::vmm_host_mutex_trylock(self.raw.as_ptr()) } != 0;
        // Not then_some(): a guard made in vain would unlock what somebody else
        // holds.
        got.then(|| MutexGuard { lock: self })
    }
}

/// Holds a [`Mutex`].
pub struct MutexGuard<'a, T: ?Sized> {
    lock: &'a Mutex<T>,
}

impl<T: ?Sized> Deref for MutexGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: the lock is held.
        unsafe { &*self.lock.value.get() }
    }
}

impl<T: ?Sized> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: the lock is held.
        unsafe { &mut *self.lock.value.get() }
    }
}

impl<T: ?Sized> Drop for MutexGuard<'_, T> {
    fn drop(&mut self) {
        // SAFETY: this thread holds the lock.
        unsafe { ffi::vmm_host_mutex_unlock(self.lock.raw.as_ptr()) }
    }
}

/// A place for one thread to sleep.
pub struct Sleeper(NonNull<ffi::Sleeper>);

// SAFETY: the host's sleeper is made to be woken from anywhere.
unsafe impl Sync for Sleeper {}
// SAFETY: it is not tied to a thread.
unsafe impl Send for Sleeper {}

impl Sleeper {
    /// A sleeper with nobody asleep.
    pub fn new() -> Result<Self, NoMemory> {
        // SAFETY: no preconditions.
        NonNull::new(unsafe { ffi::vmm_host_sleeper_create() })
            .map(Sleeper)
            .ok_or(NoMemory)
    }

    /// To be called before looking for reasons not to sleep.
    pub fn prepare(&self) {
        // SAFETY: the sleeper lives as long as self.
        unsafe { ffi::vmm_host_sleep_prepare(self.0.as_ptr()) }
    }

    /// Sleeps until woken, `ns` nanoseconds have passed (`u64::MAX`: never),
    /// or a signal came (true).
    pub fn sleep(&self, ns: u64) -> bool {
        // SAFETY: process context; the sleeper lives as long as self.
        unsafe { ffi::vmm_host_sleep(self.0.as_ptr(), ns) != 0 }
    }

    /// Ends the sleep; works in any context.
    pub fn wake(&self) {
        // SAFETY: the sleeper lives as long as self.
        unsafe { ffi::vmm_host_wake(self.0.as_ptr()) }
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        // SAFETY: nobody sleeps on a sleeper that is being dropped.
        unsafe { ffi::vmm_host_sleeper_destroy(self.0.as_ptr()) }
    }
}

/// Something that userland waits for by a descriptor.
#[cfg_attr(feature = "freebsd", derive(Clone, Copy))]
pub struct Event(NonNull<ffi::Event>);

// SAFETY: the host's event is made to be signalled from anywhere.
unsafe impl Sync for Event {}
// SAFETY: it is not tied to a thread.
unsafe impl Send for Event {}

impl Event {
    /// What a descriptor of the calling process stands for, if that is an
    /// event and the host has such.
    pub fn of(fd: i32) -> Option<Event> {
        // SAFETY: process context; any number may be asked for.
        let event = NonNull::new(unsafe { ffi::vmm_host_event_get(fd) }).map(Event);
        // Only here it shows what the number stands for.
        #[cfg(feature = "freebsd")]
        let event = event.filter(Event::signal);
        event
    }

    /// Signals it; works in any context.
    #[cfg(not(feature = "freebsd"))]
    pub fn signal(&self) {
        // SAFETY: the event lives as long as self.
        unsafe { ffi::vmm_host_event_signal(self.0.as_ptr()) }
    }

    /// Signals it, if it is the calling process's and still there; may sleep.
    #[cfg(feature = "freebsd")]
    pub fn signal(&self) -> bool {
        // SAFETY: process context; an event is only a name.
        unsafe { ffi::vmm_host_event_signal(self.0.as_ptr()) == 0 }
    }
}

#[cfg(not(feature = "freebsd"))]
impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: gives back what `of` got.
        unsafe { ffi::vmm_host_event_put(self.0.as_ptr()) }
    }
}

/// A one-shot timer that ends in `vmm_rust_timer`.
pub struct Timer(NonNull<ffi::Timer>);

// SAFETY: arming and disarming work from any context.
unsafe impl Sync for Timer {}
// SAFETY: it is not tied to a thread.
unsafe impl Send for Timer {}

impl Timer {
    /// A timer whose callback gets `target`, which must outlive it.
    pub fn new(target: *mut core::ffi::c_void) -> Result<Self, NoMemory> {
        // SAFETY: no preconditions until the timer is armed.
        NonNull::new(unsafe { ffi::vmm_host_timer_create(target) })
            .map(Timer)
            .ok_or(NoMemory)
    }

    /// Fires once after `ns` nanoseconds; replaces an earlier setting.
    pub fn arm(&self, ns: u64) {
        // SAFETY: the timer lives as long as self.
        unsafe { ffi::vmm_host_timer_arm(self.0.as_ptr(), ns) }
    }

    /// Stops the timer; a callback that has begun may still run.
    pub fn disarm(&self) {
        // SAFETY: the timer lives as long as self.
        unsafe { ffi::vmm_host_timer_disarm(self.0.as_ptr()) }
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        // SAFETY: waits for a callback in progress.
        unsafe { ffi::vmm_host_timer_destroy(self.0.as_ptr()) }
    }
}
