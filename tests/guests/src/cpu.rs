//! Instructions.

use core::arch::asm;
use core::arch::x86_64::__cpuid_count;
pub use core::arch::x86_64::CpuidResult;

/// CPUID.
#[inline(always)]
pub fn cpuid(leaf: u32, subleaf: u32) -> CpuidResult {
    __cpuid_count(leaf, subleaf)
}

/// Writes a byte to a port.
#[inline(always)]
pub fn outb(port: u16, value: u8) {
    // SAFETY: a guest owns its machine; no port write touches Rust's memory.
    unsafe {
        asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags))
    }
}

/// Writes a word to a port.
#[inline(always)]
pub fn outw(port: u16, value: u16) {
    // SAFETY: as outb.
    unsafe {
        asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack, preserves_flags))
    }
}

/// Writes a doubleword to a port.
#[inline(always)]
pub fn outl(port: u16, value: u32) {
    // SAFETY: as outb.
    unsafe {
        asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack, preserves_flags))
    }
}

/// Reads a byte from a port.
#[inline(always)]
pub fn inb(port: u16) -> u8 {
    let value: u8;
    // SAFETY: as outb.
    unsafe {
        asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags))
    };
    value
}

/// Reads a word from a port.
#[inline(always)]
pub fn inw(port: u16) -> u16 {
    let value: u16;
    // SAFETY: as outb.
    unsafe {
        asm!("in ax, dx", in("dx") port, out("ax") value, options(nomem, nostack, preserves_flags))
    };
    value
}

/// Reads a doubleword from a port.
#[inline(always)]
pub fn inl(port: u16) -> u32 {
    let value: u32;
    // SAFETY: as outb.
    unsafe {
        asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack, preserves_flags))
    };
    value
}

/// Reads an MSR that is known to be there.
#[inline(always)]
pub fn rdmsr(msr: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reading an MSR changes nothing; one that is not there traps and ends the guest.
    unsafe {
        asm!("rdmsr", in("ecx") msr, out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags))
    };
    u64::from(high) << 32 | u64::from(low)
}

/// Writes an MSR.
///
/// # Safety
/// The value must not take away what Rust's code stands on (EFER, FS and GS base,
/// the APIC's page).
#[inline(always)]
pub unsafe fn wrmsr(msr: u32, value: u64) {
    // SAFETY: the caller's.
    unsafe {
        asm!("wrmsr", in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack, preserves_flags));
    }
}

/// The TSC, after all earlier instructions.
#[inline(always)]
pub fn rdtsc() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reads a counter.
    unsafe {
        asm!("lfence", "rdtsc", out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags))
    };
    u64::from(high) << 32 | u64::from(low)
}

/// HLT.
#[inline(always)]
pub fn halt() {
    // SAFETY: waits.
    unsafe { asm!("hlt", options(nostack)) }
}

/// STI and HLT, with no interrupt in between.
#[inline(always)]
pub fn enable_and_halt() {
    // SAFETY: handlers keep every register; the IDT is set up before.
    unsafe { asm!("sti", "hlt", options(nostack)) }
}

/// STI, and one instruction for it to take effect.
#[inline(always)]
pub fn enable_interrupts() {
    // SAFETY: as enable_and_halt.
    unsafe { asm!("sti", "nop", options(nostack)) }
}

/// CLI.
#[inline(always)]
pub fn disable_interrupts() {
    // SAFETY: touches only RFLAGS.IF.
    unsafe { asm!("cli", options(nostack)) }
}

/// PAUSE.
#[inline(always)]
pub fn pause() {
    core::hint::spin_loop();
}

macro_rules! control {
    ($read:ident, $write:ident, $name:literal) => {
        #[doc = concat!("Reads ", $name, ".")]
        #[inline(always)]
        pub fn $read() -> u64 {
            let value: u64;
            // SAFETY: reads a register.
            unsafe { asm!(concat!("mov {}, ", $name), out(reg) value, options(nomem, nostack, preserves_flags)) };
            value
        }

        #[doc = concat!("Writes ", $name, ".")]
        ///
        /// # Safety
        /// The value must keep the running code mapped and its mode.
        #[inline(always)]
        pub unsafe fn $write(value: u64) {
            // SAFETY: the caller's.
            unsafe { asm!(concat!("mov ", $name, ", {}"), in(reg) value, options(nostack, preserves_flags)) };
        }
    };
}

control!(cr0, set_cr0, "cr0");
control!(cr2, set_cr2, "cr2");
control!(cr3, set_cr3, "cr3");
control!(cr4, set_cr4, "cr4");

/// Waits about so many TSC ticks.
pub fn delay(ticks: u64) {
    let start = rdtsc();
    while rdtsc().wrapping_sub(start) < ticks {
        pause();
    }
}
