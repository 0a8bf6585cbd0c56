//! A triple fault: an exception while there is no IDT at all.
#![no_std]
#![no_main]

use core::arch::asm;
use guests::println;
use guests::report::Report;

#[unsafe(no_mangle)]
extern "C" fn guest_main() -> ! {
    let r = Report::new("triple");
    println!("triple: now");
    let empty = [0u16; 5];
    // SAFETY: the end of this guest is what it is for.
    unsafe {
        asm!("lidt [{}]", "ud2", in(reg) &empty);
    }
    println!("triple: UD2 without an IDT went on");
    r.finish()
}
