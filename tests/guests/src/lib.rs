//! What the guests share: entry, console, traps, page tables, APIC, power-off.
//!
//! A guest is a program of its own in `src/bin`, linked and entered as a FreeBSD
//! amd64 kernel. It prints `NAME: check ... ok` or `FAIL` lines on COM1, then
//! `PASS` or `FAIL`, and powers the VM off.
#![no_std]

pub mod apic;
pub mod cpu;
pub mod entry;
pub mod memory;
pub mod preload;
pub mod report;
pub mod serial;
pub mod smp;
pub mod trap;

/// The host's CPU is QEMU's TCG (`-e guest.tcg=1`), which in AMD-V lacks a few
/// checks that every real CPU makes.
pub fn tcg() -> bool {
    preload::variable("guest.tcg") == Some("1")
}

use core::panic::PanicInfo;

/// Virtual address of physical address 0, as the loader and [`memory::init`] map it.
pub const KERNBASE: u64 = 0xffff_ffff_8000_0000;

/// Powers the VM off through ACPI: SLP_TYP 5 and SLP_EN in PM1a_CNT, which bhyve
/// has at port 0x404 (ACPI 6.5 §4.8.3.2.1).
pub fn power_off() -> ! {
    const PM1A_CNT: u16 = 0x404;
    const SLP_TYP_5: u16 = 5 << 10;
    const SLP_EN: u16 = 1 << 13;
    // A bare emulator has its PM1a_CNT elsewhere; QEMU's microvm and q35 at 0x604.
    cpu::outw(PM1A_CNT, SLP_TYP_5 | SLP_EN);
    loop {
        cpu::disable_interrupts();
        cpu::halt();
    }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    println!("panic: {info}");
    println!("FAIL");
    power_off()
}
