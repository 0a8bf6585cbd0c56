//! Page tables of our own: 4 GiB mapped to themselves, and KERNBASE.
//!
//! The loader's tables alias every GiB to the first, so device memory cannot be
//! reached through them.

use crate::{KERNBASE, cpu};

#[repr(C, align(4096))]
struct Table([u64; 512]);

const EMPTY: Table = Table([0; 512]);
const PRESENT: u64 = 1;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const UNCACHED: u64 = 1 << 4;
const LARGE: u64 = 1 << 7;

static mut PML4: Table = EMPTY;
static mut LOW: Table = EMPTY;
static mut HIGH: Table = EMPTY;
static mut DIRECTORIES: [Table; 4] = [EMPTY; 4];

/// Physical address of something linked into the guest.
pub fn physical<T>(place: *const T) -> u64 {
    place as u64 - KERNBASE
}

/// Switches to our page tables and returns their address for CR3.
pub fn init() -> u64 {
    let pml4 = &raw mut PML4;
    let low = &raw mut LOW;
    let high = &raw mut HIGH;
    let directories = &raw mut DIRECTORIES;
    // SAFETY: called before a second CPU runs, and nothing else names these tables;
    // the new tables map all that the old ones did of the image and the stack.
    unsafe {
        (*pml4).0[0] = physical(low) | PRESENT | WRITE | USER;
        (*pml4).0[511] = physical(high) | PRESENT | WRITE;
        for gib in 0..4 {
            let directory = &mut (*directories)[gib];
            let device = if gib == 3 { UNCACHED } else { 0 };
            for (i, entry) in directory.0.iter_mut().enumerate() {
                let address = (gib as u64) << 30 | (i as u64) << 21;
                *entry = address | PRESENT | WRITE | LARGE | device;
            }
            let directory = physical(directory) | PRESENT | WRITE;
            (*low).0[gib] = directory;
            if gib < 2 {
                (*high).0[510 + gib] = directory;
            }
        }
        cpu::set_cr3(physical(pml4));
    }
    physical(pml4)
}

/// Reads a 32-bit device register.
#[inline(always)]
pub fn mmio_read(address: u64) -> u32 {
    // SAFETY: `init` mapped all of the first 4 GiB; a device register is no Rust object.
    unsafe { (address as *const u32).read_volatile() }
}

/// Writes a 32-bit device register.
#[inline(always)]
pub fn mmio_write(address: u64, value: u32) {
    // SAFETY: as mmio_read; callers name device registers only.
    unsafe { (address as *mut u32).write_volatile(value) }
}
