//! Code that is written to fresh memory, executed, changed and executed again: what a
//! hypervisor has in large pages that are not executable has to become executable then.
#![no_std]
#![no_main]

use core::ptr;
use guests::report::Report;
use guests::{memory, trap};

/// Above what the loader has put into 128 MiB.
const FIRST: u64 = 64 << 20;
const LARGE: u64 = 2 << 20;
const AREAS: u64 = 8;
/// From one function to the next within an area: to other small pages.
const STRIDE: u64 = 5 << 12;
const FUNCTIONS: u64 = 3;

/// Writes MOV EAX, `value`; RET to `address` and calls it.
fn run(address: u64, value: u32) -> u32 {
    let [a, b, c, d] = value.to_le_bytes();
    let code = [0xb8, a, b, c, d, 0xc3];
    // SAFETY: nothing else is in this memory, which `memory::init` mapped to itself, and
    // the function keeps to the calling convention. A call after a write to the code is
    // serialized where the address is the same (SDM Vol. 3A §8.1.3).
    unsafe {
        for (i, byte) in code.into_iter().enumerate() {
            ptr::write_volatile((address as *mut u8).add(i), byte);
        }
        let function: extern "sysv64" fn() -> u32 =
            core::mem::transmute::<u64, extern "sysv64" fn() -> u32>(address);
        function()
    }
}

#[unsafe(no_mangle)]
extern "C" fn guest_main() -> ! {
    let mut r = Report::new("fetch");
    trap::init();
    memory::init();
    for (what, more) in [("code that was written", 0_u32), ("the same, changed", 100)] {
        let mut right = true;
        for area in 0..AREAS {
            for function in 0..FUNCTIONS {
                let value = (area * FUNCTIONS + function) as u32 + more;
                let address = FIRST + area * LARGE + function * STRIDE;
                right &= run(address, value) == value;
            }
        }
        r.check(what, right);
    }
    r.finish()
}
