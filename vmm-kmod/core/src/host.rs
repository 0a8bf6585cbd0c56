//! What the kernel piece asks of the host kernel it lives in.

/// Physical address of host memory, bytes.
pub type Hpa = u64;
/// Guest-physical address, bytes.
pub type Gpa = u64;

/// A zeroed page of host memory, always mapped in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostPage {
    /// Kernel virtual address.
    pub va: usize,
    /// Physical address.
    pub pa: Hpa,
}

/// Services of the host kernel that the CPU backends need. All are associated
/// functions: there is one host. `vmm-kmod` implements it over `host.h`;
/// tests implement it over plain memory.
pub trait Host: 'static {
    /// Allocates one zeroed 4 KiB page; `None` when memory is out. May be
    /// called with interrupts off.
    fn alloc_page() -> Option<HostPage>;
    /// Allocates `1 << order` zeroed, naturally aligned, physically
    /// contiguous pages.
    fn alloc_pages(order: u32) -> Option<HostPage>;
    /// Frees what `alloc_page` or `alloc_pages` gave.
    fn free_pages(page: HostPage, order: u32);
    /// Kernel virtual address of a physical address of memory that the host's
    /// kernel has (the direct map).
    fn phys_to_virt(pa: Hpa) -> usize;
    /// Index of the CPU that this code runs on; stable only with
    /// preemption or interrupts off.
    fn cpu() -> u32;
    /// Number of CPU slots (one more than the highest index).
    fn max_cpus() -> u32;
    /// Runs `f(arg)` on CPU `cpu` with interrupts off and waits for it; false
    /// if that CPU is offline.
    fn run_on_cpu(
        cpu: u32,
        f: extern "C" fn(*mut core::ffi::c_void),
        arg: *mut core::ffi::c_void,
    ) -> bool;
    /// Runs `f(arg)` on every online CPU, this one included, with interrupts
    /// off, and waits.
    fn run_on_all_cpus(f: extern "C" fn(*mut core::ffi::c_void), arg: *mut core::ffi::c_void);
    /// One line to the kernel's log.
    fn log(level: LogLevel, args: core::fmt::Arguments<'_>);
}

/// Severity of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum LogLevel {
    Error,
    Warning,
    Info,
}
