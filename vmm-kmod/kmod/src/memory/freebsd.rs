//! The memory of a segment, which FreeBSD has as a VM object.

use core::ffi::c_uint;
use core::ptr::{self, NonNull};

use vmm_core::host::Hpa;

use super::CHUNK;
use crate::ffi;
use crate::os;
use crate::sync::NoMemory;

/// Times that others get to finish what they do with a segment.
const TRIES: u32 = 3;

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

    /// Takes the chunk at `off`, which is all the segment's, out of it and of the
    /// calling process's memory. EBUSY: another process has the segment mapped, or
    /// this one has it wired.
    pub fn detach(&self, off: u64) -> Result<Chunk, i32> {
        let mut chunk = Chunk {
            pages: ptr::null_mut(),
            bytes: 0,
        };
        let (pages, bytes) = (&mut chunk.pages, &mut chunk.bytes);
        let mut tries = 0;
        loop {
            // SAFETY: process context; the object lives as long as self.
            match unsafe { ffi::vmm_host_memseg_detach(self.0.as_ptr(), off, CHUNK, pages, bytes) }
            {
                0 => return Ok(chunk),
                // It may be a page fault of another thread.
                _ if tries < TRIES => os::give_way(),
                e => return Err(e),
            }
            tries += 1;
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

/// Memory that was a chunk's, which goes back to the host when this is dropped.
pub struct Chunk {
    /// A list.
    pages: *mut ffi::Pages,
    bytes: u64,
}

impl Chunk {
    /// Bytes of the host's.
    pub fn resident(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        // SAFETY: nobody else has the list, which may be empty.
        unsafe { ffi::vmm_host_pages_free(self.pages) }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: nothing of ours maps the segment any more: the VM is being freed.
        unsafe { ffi::vmm_host_memseg_destroy(self.0.as_ptr()) }
    }
}
