//! `host.h`, as Rust sees it. The functions' contracts are documented there.
#![allow(missing_docs)]

#[cfg(feature = "freebsd")]
mod freebsd;

#[cfg(feature = "freebsd")]
pub use freebsd::*;

use core::ffi::{c_char, c_int, c_uint, c_ulong, c_void};

#[repr(C)]
#[derive(Clone, Copy)]
pub struct HostInfo {
    pub tsc_hz: u64,
    pub direct_map: u64,
    pub thread_flags: u64,
    pub max_cpus: u32,
    pub tsc_invariant: u32,
    pub account: u32,
    pub use_apic_vid: u32,
    pub xsave_forms: u32,
    pub fill_rsb: u32,
    pub thread_tss: u32,
    pub events: u32,
    pub run_by_seek: u32,
    pub no_halt_detection: u32,
    pub halt_poll_us: u32,
    pub posted_vector: u32,
    pub nx_huge_pages: u32,
    pub use_avic: u32,
}

macro_rules! opaque {
    ($($name:ident),*) => { $(
        #[repr(C)]
        pub struct $name { _private: [u8; 0] }
    )* };
}
opaque!(HostMutex, Sleeper, Event, Timer, Node);
#[cfg(feature = "freebsd")]
opaque!(Memseg, Pages);

// Where a host's kernel has the very function, that one is called: its last
// arguments may be fewer.
unsafe extern "C" {
    #[cfg(not(feature = "freebsd"))]
    pub fn vmm_host_alloc(size: usize, align: usize) -> *mut c_void;
    #[cfg(not(feature = "freebsd"))]
    #[link_name = "kvfree"]
    pub fn vmm_host_free(p: *mut c_void, size: usize, align: usize);
    pub fn vmm_host_alloc_pages(order: c_uint, pa: *mut u64) -> *mut c_void;
    #[cfg_attr(not(feature = "freebsd"), link_name = "free_pages")]
    pub fn vmm_host_free_pages(va: *mut c_void, order: c_uint);

    #[cfg(feature = "freebsd")]
    pub fn vmm_host_memseg_create(len: u64) -> *mut Memseg;
    #[cfg(feature = "freebsd")]
    pub fn vmm_host_memseg_destroy(seg: *mut Memseg);
    #[cfg(feature = "freebsd")]
    pub fn vmm_host_memseg_page(
        seg: *mut Memseg,
        off: u64,
        pa: *mut u64,
        order: *mut c_uint,
    ) -> c_int;
    #[cfg(feature = "freebsd")]
    pub fn vmm_host_memseg_resident(seg: *mut Memseg) -> u64;
    #[cfg(feature = "freebsd")]
    pub fn vmm_host_memseg_detach(
        seg: *mut Memseg,
        off: u64,
        len: u64,
        pages: *mut *mut Pages,
        bytes: *mut u64,
    ) -> c_int;
    #[cfg(feature = "freebsd")]
    pub fn vmm_host_pages_free(pages: *mut Pages);

    #[cfg_attr(feature = "freebsd", link_name = "copyin")]
    pub fn vmm_host_copyin(user: u64, kernel: *mut c_void, len: usize) -> c_int;
    #[cfg_attr(feature = "freebsd", link_name = "copyout")]
    pub fn vmm_host_copyout(kernel: *const c_void, user: u64, len: usize) -> c_int;
    #[cfg(not(feature = "freebsd"))]
    pub fn vmm_host_map_page(fault: *mut c_void, pa: u64) -> c_int;
    #[cfg(not(feature = "freebsd"))]
    pub fn vmm_host_unmap(vm: *mut c_void, from: i64, len: i64);

    pub fn vmm_host_cpu() -> u32;
    pub fn vmm_host_run_on_cpu(cpu: u32, f: extern "C" fn(*mut c_void), arg: *mut c_void) -> c_int;
    pub fn vmm_host_run_on_all(f: extern "C" fn(*mut c_void), arg: *mut c_void);
    pub fn vmm_host_kick_cpu(cpu: u32);
    pub fn vmm_host_notify_cpu(cpu: u32);
    #[cfg(not(feature = "freebsd"))]
    pub fn vmm_host_set_vmxe(on: c_int);
    #[cfg(not(feature = "freebsd"))]
    pub fn vmm_host_irq_save() -> c_ulong;
    #[cfg(not(feature = "freebsd"))]
    pub fn vmm_host_irq_restore(flags: c_ulong);
    pub fn vmm_host_guest_begin() -> c_int;
    pub fn vmm_host_guest_end(fpu_live: c_int);
    pub fn vmm_host_irq_window(vector: c_uint) -> c_int;

    pub fn vmm_host_thread_flags() -> *const c_ulong;
    pub fn vmm_host_yield() -> c_int;
    #[cfg(not(feature = "freebsd"))]
    pub fn vmm_host_give_way();
    #[cfg(not(feature = "freebsd"))]
    #[link_name = "single_task_running"]
    pub fn vmm_host_alone() -> bool;

    pub fn vmm_host_mutex_create() -> *mut HostMutex;
    #[cfg_attr(not(feature = "freebsd"), link_name = "kfree")]
    pub fn vmm_host_mutex_destroy(m: *mut HostMutex);
    #[cfg(not(feature = "freebsd"))]
    pub fn vmm_host_mutex_lock(m: *mut HostMutex);
    #[cfg(not(feature = "freebsd"))]
    #[link_name = "mutex_trylock"]
    pub fn vmm_host_mutex_trylock(m: *mut HostMutex) -> c_int;
    #[cfg(not(feature = "freebsd"))]
    #[link_name = "mutex_unlock"]
    pub fn vmm_host_mutex_unlock(m: *mut HostMutex);

    #[cfg(not(feature = "freebsd"))]
    pub fn vmm_host_sleeper_create() -> *mut Sleeper;
    #[cfg(not(feature = "freebsd"))]
    #[link_name = "kfree"]
    pub fn vmm_host_sleeper_destroy(s: *mut Sleeper);
    #[cfg(not(feature = "freebsd"))]
    pub fn vmm_host_sleep_prepare(s: *mut Sleeper);
    pub fn vmm_host_sleep(s: *mut Sleeper, ns: u64) -> c_int;
    pub fn vmm_host_wake(s: *mut Sleeper);

    pub fn vmm_host_event_get(fd: c_int) -> *mut Event;
    #[cfg(not(feature = "freebsd"))]
    #[link_name = "eventfd_ctx_put"]
    pub fn vmm_host_event_put(e: *mut Event);
    #[cfg(not(feature = "freebsd"))]
    pub fn vmm_host_event_signal(e: *mut Event);
    #[cfg(feature = "freebsd")]
    pub fn vmm_host_event_signal(e: *mut Event) -> c_int;

    pub fn vmm_host_timer_create(arg: *mut c_void) -> *mut Timer;
    pub fn vmm_host_timer_destroy(t: *mut Timer);
    pub fn vmm_host_timer_arm(t: *mut Timer, ns: u64);
    #[cfg(not(feature = "freebsd"))]
    #[link_name = "hrtimer_try_to_cancel"]
    pub fn vmm_host_timer_disarm(t: *mut Timer);

    #[cfg(not(feature = "freebsd"))]
    #[link_name = "ktime_get_real_seconds"]
    pub fn vmm_host_wallclock() -> i64;

    pub fn vmm_host_node_create(
        name: *const c_char,
        vm: *mut c_void,
        segid: c_int,
        node: *mut *mut Node,
    ) -> c_int;
    pub fn vmm_host_node_destroy(node: *mut Node);
    #[cfg(not(feature = "freebsd"))]
    pub fn vmm_host_log(level: c_int, msg: *const u8, len: usize);
}
