//! The memory of a segment, which FreeBSD has as a VM object.

use core::ffi::c_uint;
use core::ptr::NonNull;

use vmm_core::host::Hpa;

use crate::ffi;
use crate::sync::NoMemory;

/// Host memory that is allocated at first use.
pub struct Store(NonNull<ffi::Memseg>);

// SAFETY: the object locks itself.
unsafe impl Send for Store {}

impl Store {
    /// Room for `len` bytes.
    pub fn new(len: u64) -> Result<Self, NoMemory> {
        // SAFETY: no preconditions; NULL is checked.
        NonNull::new(unsafe { ffi::vmm_host_memseg_create(len) })
            .map(Store)
            .ok_or(NoMemory)
    }

    /// The page at `off`, allocated if need be, and the order of the contiguous
    /// run around it. EFAULT: behind the end. ENOMEM.
    pub fn page(&self, off: u64) -> Result<(Hpa, u32), i32> {
        let mut pa = 0;
        let mut order: c_uint = 0;
        // SAFETY: the object lives as long as self.
        match unsafe { ffi::vmm_host_memseg_page(self.0.as_ptr(), off, &mut pa, &mut order) } {
            0 => Ok((pa, order)),
            e => Err(e),
        }
    }

    /// Bytes allocated so far.
    pub fn resident(&self) -> u64 {
        // SAFETY: the object lives as long as self.
        unsafe { ffi::vmm_host_memseg_resident(self.0.as_ptr()) }
    }

    /// The host's own segment; it lives as long as this one.
    pub fn raw(&self) -> NonNull<ffi::Memseg> {
        self.0
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: nothing of ours maps the segment any more: the VM is being freed.
        unsafe { ffi::vmm_host_memseg_destroy(self.0.as_ptr()) }
    }
}
