//! Idle: HLT sleeps until something is due, wakes for it, and wakes promptly.
//!
//! Prints `hlt: WHAT late MEAN`, in ticks of the TSC.
#![no_std]
#![no_main]

use core::sync::atomic::{AtomicU64, Ordering};
use guests::apic::{self, Apic, register};
use guests::report::Report;
use guests::trap::{self, Frame};
use guests::{cpu, memory, preload, println, smp};

const TIMER: u8 = 0x40;
const POKE: u8 = 0x41;
const PIT: u8 = 0x30;

static FIRED: AtomicU64 = AtomicU64::new(0);
static AT: AtomicU64 = AtomicU64::new(0);

fn on_interrupt(_: &mut Frame) {
    AT.store(cpu::rdtsc(), Ordering::SeqCst);
    FIRED.fetch_add(1, Ordering::SeqCst);
    Apic::current().eoi();
}

fn on_pit(_: &mut Frame) {
    FIRED.fetch_add(1, Ordering::SeqCst);
    cpu::outb(0x20, 0x20);
}

/// Halts until an interrupt has come, and says how many times HLT ended.
fn halt_until_one() -> u64 {
    let before = FIRED.load(Ordering::SeqCst);
    let mut wakes = 0;
    while FIRED.load(Ordering::SeqCst) == before {
        cpu::enable_and_halt();
        cpu::disable_interrupts();
        wakes += 1;
    }
    wakes
}

fn one_shot(r: &mut Report, apic: Apic) {
    apic.write(register::DIVIDE, 0xb);
    apic.write(register::LVT_TIMER, u32::from(TIMER));
    let mut once = true;
    for _ in 0..20 {
        apic.write(register::INITIAL_COUNT, 100_000);
        once &= halt_until_one() == 1;
    }
    r.check("the APIC timer ends HLT, and nothing else does", once);
    apic.write(register::LVT_TIMER, apic::MASKED | u32::from(TIMER));
}

fn deadline(r: &mut Report, apic: Apic) {
    if !apic::has_deadline() {
        r.skip("deadline", "CPUID does not offer it");
        return;
    }
    apic.write(register::LVT_TIMER, apic::DEADLINE | u32::from(TIMER));
    // Short waits, where a hypervisor may poll, and long ones, where it sleeps.
    for ahead in [20_000u64, 2_000_000, 50_000_000] {
        let (mut late, mut early) = (0, false);
        for _ in 0..10 {
            let due = cpu::rdtsc() + ahead;
            // SAFETY: arms a timer whose handler is set.
            unsafe { cpu::wrmsr(apic::TSC_DEADLINE, due) };
            halt_until_one();
            let at = AT.load(Ordering::SeqCst);
            early |= at < due;
            late += at.saturating_sub(due);
        }
        println!("hlt: deadline {ahead} late {}", late / 10);
        r.check("a deadline ends HLT, and not too early", !early);
    }
    apic.write(register::LVT_TIMER, apic::MASKED | u32::from(TIMER));
}

/// The rate of the TSC, by the ACPI PM timer (24 bits, 3.579545 MHz), if it is asked for.
fn rate(r: &mut Report) {
    const PM_TIMER: u16 = 0x408;
    const TENTH: u32 = 357_954;
    let Some(wanted) = preload::variable("guest.tsc_khz").and_then(|v| v.parse::<u64>().ok())
    else {
        return;
    };
    let (from, began) = (cpu::inl(PM_TIMER), cpu::rdtsc());
    while cpu::inl(PM_TIMER).wrapping_sub(from) & 0xff_ffff < TENTH {}
    let khz = (cpu::rdtsc() - began) / 100;
    println!("hlt: the TSC has {khz} kHz, by the PM timer");
    r.check(
        "the TSC's rate is the one asked for",
        khz.abs_diff(wanted) <= wanted / 100,
    );
    let timing = cpu::cpuid(0x4000_0010, 0);
    if cpu::cpuid(0x4000_0000, 0).eax >= 0x4000_0010 && timing.eax != 0 {
        r.equal("CPUID says it", timing.eax.into(), wanted);
    }
}

fn pending(r: &mut Report, apic: Apic) {
    let before = FIRED.load(Ordering::SeqCst);
    apic.ipi(apic.id(), u32::from(POKE));
    // The IPI is pending already: HLT must not sleep.
    let wakes = halt_until_one();
    r.equal("an interrupt that is pending ends HLT at once", wakes, 1);
    r.equal("it came once", FIRED.load(Ordering::SeqCst), before + 1);
    // STI takes effect after the next instruction: STI; CLI lets nothing in.
    apic.ipi(apic.id(), u32::from(POKE));
    // SAFETY: changes RFLAGS.IF only.
    unsafe { core::arch::asm!("sti", "cli") };
    r.equal(
        "STI; CLI lets nothing in",
        FIRED.load(Ordering::SeqCst),
        before + 1,
    );
    cpu::enable_interrupts();
    cpu::disable_interrupts();
    r.equal("STI; NOP does", FIRED.load(Ordering::SeqCst), before + 2);
}

fn pit(r: &mut Report, apic: Apic) {
    trap::handle(PIT, on_pit);
    // The 8259s at 0x30 and 0x38, IRQ 0 open; LINT0 takes what they send (ExtINT).
    for (port, value) in [
        (0x20u16, 0x11u8),
        (0x21, PIT),
        (0x21, 4),
        (0x21, 1),
        (0xa0, 0x11),
        (0xa1, 0x38),
        (0xa1, 2),
        (0xa1, 1),
        (0xa1, 0xff),
        (0x21, 0xfe),
    ] {
        cpu::outb(port, value);
    }
    apic.write(register::LVT_LINT0, 0x700);
    // 8254 counter 0, mode 2 (rate generator), 1193 Hz.
    for (port, value) in [(0x43u16, 0x34u8), (0x40, 0xe8), (0x40, 0x03)] {
        cpu::outb(port, value);
    }
    let before = FIRED.load(Ordering::SeqCst);
    for _ in 0..10 {
        halt_until_one();
    }
    cpu::outb(0x21, 0xff);
    apic.write(register::LVT_LINT0, apic::MASKED);
    r.check(
        "the 8254 ends HLT ten times",
        FIRED.load(Ordering::SeqCst) >= before + 10,
    );
}

/// The other CPU sleeps, and answers a poke with a poke.
fn other(_: u32) -> ! {
    let apic = Apic::current();
    apic.enable();
    loop {
        cpu::enable_and_halt();
        cpu::disable_interrupts();
        apic.ipi(0, u32::from(TIMER));
    }
}

#[unsafe(no_mangle)]
extern "C" fn guest_main() -> ! {
    let mut r = Report::new("hlt");
    trap::init();
    let cr3 = memory::init();
    trap::handle(TIMER, on_interrupt);
    trap::handle(POKE, on_interrupt);
    trap::handle(0xff, |_| {});
    let apic = Apic::current();
    apic.enable();
    pending(&mut r, apic);
    rate(&mut r);
    one_shot(&mut r, apic);
    deadline(&mut r, apic);
    pit(&mut r, apic);
    smp::prepare(cr3, other);
    if smp::start(apic, 1) {
        cpu::delay(1_000_000);
        let start = cpu::rdtsc();
        for _ in 0..20 {
            apic.ipi(1, u32::from(POKE));
            halt_until_one();
        }
        println!("hlt: ping-pong late {}", (cpu::rdtsc() - start) / 20);
        r.check("two sleeping CPUs wake each other 20 times", true);
    } else if smp::promised() {
        r.check("the other CPU starts", false);
    } else {
        r.skip("two CPUs", "no other CPU answers");
    }
    r.finish()
}
