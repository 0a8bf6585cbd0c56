//! Owned host pages.

use crate::error::Error;
use core::marker::PhantomData;
use vmm_core::host::{Host, HostPage, Hpa};

/// `1 << order` contiguous zeroed host pages, freed on drop.
pub struct Pages<H: Host> {
    page: HostPage,
    order: u32,
    host: PhantomData<fn() -> H>,
}

impl<H: Host> Pages<H> {
    /// Allocates `1 << order` zeroed pages.
    pub fn new(order: u32) -> Result<Self, Error> {
        let page = if order == 0 {
            H::alloc_page()
        } else {
            H::alloc_pages(order)
        };
        match page {
            Some(page) => Ok(Pages {
                page,
                order,
                host: PhantomData,
            }),
            None => Err(Error::NoMemory),
        }
    }

    /// Pages enough for `bytes`.
    pub fn for_bytes(bytes: usize) -> Result<Self, Error> {
        Self::new(
            bytes
                .max(1)
                .div_ceil(4096)
                .next_power_of_two()
                .trailing_zeros(),
        )
    }

    /// Physical address of the first byte.
    pub fn pa(&self) -> Hpa {
        self.page.pa
    }

    /// Kernel virtual address of the first byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.page.va as *mut u8
    }

    /// Bytes owned.
    pub fn len(&self) -> usize {
        4096 << self.order
    }

    /// Never: there is at least one page.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The contents.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the pages are ours alone, mapped, initialized (zeroed) and
        // `len` bytes long; the borrow of self excludes another slice.
        unsafe { core::slice::from_raw_parts_mut(self.as_ptr(), self.len()) }
    }
}

impl<H: Host> Drop for Pages<H> {
    fn drop(&mut self) {
        H::free_pages(self.page, self.order);
    }
}
