//! A host of plain memory for tests: physical addresses are virtual ones.

use core::cell::Cell;
use core::ffi::c_void;
use std::alloc::{Layout, alloc_zeroed, dealloc};
use vmm_core::host::{Host, HostPage, Hpa, LogLevel};

std::thread_local! {
    static LIVE: Cell<i64> = const { Cell::new(0) };
    static LIMIT: Cell<i64> = const { Cell::new(i64::MAX) };
}

/// The host.
pub struct TestHost;

impl TestHost {
    /// Pages in use by this thread's test.
    pub fn live() -> i64 {
        LIVE.get()
    }
    /// Makes allocation fail once `n` pages are in use.
    pub fn set_limit(n: i64) {
        LIMIT.set(n);
    }
}

fn layout(order: u32) -> Layout {
    Layout::from_size_align(4096 << order, 4096 << order).unwrap()
}

impl Host for TestHost {
    fn alloc_page() -> Option<HostPage> {
        Self::alloc_pages(0)
    }
    fn alloc_pages(order: u32) -> Option<HostPage> {
        if LIVE.get() + (1 << order) > LIMIT.get() {
            return None;
        }
        LIVE.set(LIVE.get() + (1 << order));
        // SAFETY: the layout is not empty.
        let p = unsafe { alloc_zeroed(layout(order)) };
        assert!(!p.is_null());
        Some(HostPage {
            va: p as usize,
            pa: p as Hpa,
        })
    }
    fn free_pages(page: HostPage, order: u32) {
        LIVE.set(LIVE.get() - (1 << order));
        // SAFETY: allocated above with the same layout.
        unsafe { dealloc(page.va as *mut u8, layout(order)) };
    }
    fn phys_to_virt(pa: Hpa) -> usize {
        pa as usize
    }
    fn cpu() -> u32 {
        0
    }
    fn max_cpus() -> u32 {
        2
    }
    fn run_on_cpu(_: u32, f: extern "C" fn(*mut c_void), arg: *mut c_void) -> bool {
        f(arg);
        true
    }
    fn run_on_all_cpus(f: extern "C" fn(*mut c_void), arg: *mut c_void) {
        f(arg);
    }
    fn log(_: LogLevel, args: core::fmt::Arguments<'_>) {
        std::println!("{args}");
    }
}
