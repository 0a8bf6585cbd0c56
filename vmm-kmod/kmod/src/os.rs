//! The host kernel's services as safe Rust: allocation, time, log, threads.

use core::alloc::{GlobalAlloc, Layout};
use core::ffi::c_void;
use core::fmt::{self, Write};
use core::sync::atomic::{AtomicU64, Ordering};

use vmm_core::host::{Host, HostPage, Hpa, LogLevel};

use crate::ffi;

/// The host that the module was loaded into.
pub struct Os;

static DIRECT_MAP: AtomicU64 = AtomicU64::new(0);
static MAX_CPUS: AtomicU64 = AtomicU64::new(1);
static THREAD_FLAGS: AtomicU64 = AtomicU64::new(0);

/// Keeps what the host told at load.
pub fn init(info: &ffi::HostInfo) {
    DIRECT_MAP.store(info.direct_map, Ordering::Relaxed);
    MAX_CPUS.store(u64::from(info.max_cpus), Ordering::Relaxed);
    THREAD_FLAGS.store(info.thread_flags, Ordering::Relaxed);
}

impl Host for Os {
    fn alloc_page() -> Option<HostPage> {
        Self::alloc_pages(0)
    }

    fn alloc_pages(order: u32) -> Option<HostPage> {
        let mut pa = 0;
        // SAFETY: `pa` outlives the call; the result is checked for NULL.
        let va = unsafe { ffi::vmm_host_alloc_pages(order, &mut pa) };
        if va.is_null() {
            None
        } else {
            Some(HostPage {
                va: va as usize,
                pa,
            })
        }
    }

    fn free_pages(page: HostPage, order: u32) {
        // SAFETY: the caller gives back what `alloc_pages` gave it.
        unsafe { ffi::vmm_host_free_pages(page.va as *mut c_void, order) }
    }

    // Not inlined: each place would have a relocation.
    #[inline(never)]
    #[optimize(speed)]
    fn phys_to_virt(pa: Hpa) -> usize {
        DIRECT_MAP.load(Ordering::Relaxed).wrapping_add(pa) as usize
    }

    fn cpu() -> u32 {
        // SAFETY: no preconditions.
        unsafe { ffi::vmm_host_cpu() }
    }

    fn max_cpus() -> u32 {
        MAX_CPUS.load(Ordering::Relaxed) as u32
    }

    fn run_on_cpu(cpu: u32, f: extern "C" fn(*mut c_void), arg: *mut c_void) -> bool {
        // SAFETY: `f` is called with `arg` before this returns.
        unsafe { ffi::vmm_host_run_on_cpu(cpu, f, arg) != 0 }
    }

    fn run_on_all_cpus(f: extern "C" fn(*mut c_void), arg: *mut c_void) {
        // SAFETY: `f` is called with `arg` before this returns.
        unsafe { ffi::vmm_host_run_on_all(f, arg) }
    }

    fn log(level: LogLevel, args: fmt::Arguments<'_>) {
        let mut line = Line::new();
        // A line that does not fit is cut: `Line` never fails.
        let _ = line.write_fmt(args);
        let level = match level {
            LogLevel::Error => 0,
            LogLevel::Warning => 1,
            LogLevel::Info => 2,
        };
        // SAFETY: `buf` holds at least `len` bytes.
        unsafe { ffi::vmm_host_log(level, line.buf.as_ptr(), line.len) }
    }
}

/// A log line on the stack; what does not fit is cut.
pub struct Line {
    buf: [u8; 240],
    len: usize,
}

impl Line {
    /// An empty line.
    pub const fn new() -> Self {
        Line {
            buf: [0; 240],
            len: 0,
        }
    }

    /// What was written.
    pub fn bytes(&self) -> &[u8] {
        self.buf.get(..self.len).unwrap_or_default()
    }
}

impl Write for Line {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        for b in s.bytes() {
            if let Some(slot) = self.buf.get_mut(self.len) {
                *slot = b;
                self.len += 1;
            }
        }
        Ok(())
    }
}

/// Text that goes to the log line by line, as errors.
pub struct LogLines(Line);

impl LogLines {
    /// Nothing yet.
    pub const fn new() -> Self {
        LogLines(Line::new())
    }

    /// Logs what has been written since the last line end.
    pub fn flush(&mut self) {
        let text = self.0.bytes();
        if !text.is_empty() {
            // SAFETY: `text` is readable for its length.
            unsafe { ffi::vmm_host_log(0, text.as_ptr(), text.len()) }
        }
        self.0 = Line::new();
    }
}

impl Write for LogLines {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        let mut lines = vmm_core::text::parts(s, b'\n');
        if let Some(first) = lines.next() {
            self.0.write_str(first)?;
        }
        for line in lines {
            self.flush();
            self.0.write_str(line)?;
        }
        Ok(())
    }
}

/// Logs one line; the first argument is a `LogLevel` variant.
#[macro_export]
macro_rules! klog {
    ($level:ident, $($arg:tt)*) => {
        <$crate::os::Os as vmm_core::host::Host>::log(
            vmm_core::host::LogLevel::$level,
            format_args!($($arg)*),
        )
    };
}

/// The module's heap: the host's own allocator.
pub struct HostAllocator;

// SAFETY: the host's allocator returns memory of the size and alignment asked
// for, or NULL, and nobody else has it.
unsafe impl GlobalAlloc for HostAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: no preconditions.
        unsafe { ffi::vmm_host_alloc(layout.size(), layout.align()).cast() }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the host's memory comes zeroed.
        unsafe { self.alloc(layout) }
    }

    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        // SAFETY: `p` came from `alloc` with the same layout.
        unsafe { ffi::vmm_host_free(p.cast(), layout.size(), layout.align()) }
    }
}

/// The host's TSC, ticks.
#[inline(always)]
pub fn rdtsc() -> u64 {
    // SAFETY: RDTSC has no side effects.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// The calling thread's reasons to leave the inner loop.
#[derive(Clone, Copy)]
pub struct ThreadFlags {
    flags: *const core::ffi::c_ulong,
    mask: u64,
}

impl ThreadFlags {
    /// Those of the calling thread; must not outlive it.
    #[inline(always)]
    pub fn current() -> Self {
        ThreadFlags {
            // SAFETY: no preconditions.
            flags: unsafe { ffi::vmm_host_thread_flags() },
            mask: THREAD_FLAGS.load(Ordering::Relaxed),
        }
    }

    /// Whether the host wants this thread to reschedule or take a signal.
    #[inline(always)]
    pub fn work(&self) -> bool {
        // SAFETY: points into the calling thread's own structure, which lives
        // as long as it runs; other CPUs write it, hence volatile.
        unsafe { self.flags.read_volatile() & self.mask != 0 }
    }
}

/// Gives way; true when the calling thread has to return to userland: a
/// signal waits for it, or other work that is done there.
pub fn yield_now() -> bool {
    // SAFETY: process context, no lock held that forbids sleeping.
    unsafe { ffi::vmm_host_yield() != 0 }
}

/// Lets another thread that wants this CPU have it, though nobody asks for it.
pub fn give_way() {
    // SAFETY: process context, no lock held that forbids sleeping.
    unsafe { ffi::vmm_host_give_way() }
}

/// Whether no other thread wants this CPU.
#[inline]
pub fn alone() -> bool {
    // SAFETY: no preconditions.
    unsafe { ffi::vmm_host_alone() }
}

/// Seconds since 1970 UTC.
pub fn wallclock() -> i64 {
    // SAFETY: no preconditions.
    unsafe { ffi::vmm_host_wallclock() }
}

/// Copies a slice of plain bytes from the calling process.
pub fn copyin(user: u64, to: &mut [u8]) -> Result<(), i32> {
    // SAFETY: `to` is writable for its length; the host checks `user`.
    match unsafe { ffi::vmm_host_copyin(user, to.as_mut_ptr().cast(), to.len()) } {
        0 => Ok(()),
        e => Err(e),
    }
}

/// Copies a slice of plain bytes to the calling process.
pub fn copyout(from: &[u8], user: u64) -> Result<(), i32> {
    // SAFETY: `from` is readable for its length; the host checks `user`.
    match unsafe { ffi::vmm_host_copyout(from.as_ptr().cast(), user, from.len()) } {
        0 => Ok(()),
        e => Err(e),
    }
}
