//! What an exit costs: the TSC around one instruction, 1000 times.
//!
//! Prints `exitcost NAME MINIMUM mean MEAN`, less what the two reads of the TSC
//! cost by themselves. Under Bochs the TSC counts instructions, so the numbers are
//! instructions of the host.
#![no_std]
#![no_main]

use core::arch::asm;
use core::hint::black_box;
use core::sync::atomic::{AtomicU64, Ordering};
use guests::apic::{self, Apic, register};
use guests::report::Report;
use guests::trap::{self, Frame};
use guests::{cpu, memory, preload, println};

const ROUNDS: u64 = 1000;
const IA32_PAT: u32 = 0x277;
const IA32_APIC_BASE: u32 = 0x1b;
const IA32_TSC_AUX: u32 = 0xc000_0103;
const HPET: u64 = 0xfed0_0000;
const HPET_COUNTER: u64 = HPET + 0xf0;
/// No device of bhyve claims it: below the PCI range at 0x2000, above the ISA ones.
const UNCLAIMED: u16 = 0x1ee0;
/// Bus 0, slot 0, function 0 in PCI's memory-mapped configuration space, which
/// userland answers for.
const PCI_CONFIGURATION: u64 = 0xe000_0000;
const TIMER_VECTOR: u8 = 0x40;
const IPI_VECTOR: u8 = 0x41;

struct Cost {
    least: u64,
    mean: u64,
}

#[inline(always)]
fn sample(mut operation: impl FnMut()) -> Cost {
    // The first few fill caches, page tables and the decoder's tables.
    for _ in 0..8 {
        operation();
    }
    let (mut least, mut sum) = (u64::MAX, 0);
    for _ in 0..ROUNDS {
        let start = cpu::rdtsc();
        operation();
        let ticks = cpu::rdtsc() - start;
        least = least.min(ticks);
        sum += ticks;
    }
    Cost {
        least,
        mean: sum / ROUNDS,
    }
}

struct Meter {
    overhead: u64,
}

impl Meter {
    #[inline(always)]
    fn measure(&self, name: &str, operation: impl FnMut()) {
        let cost = sample(operation);
        self.print(name, &cost);
    }

    fn print(&self, name: &str, cost: &Cost) {
        println!(
            "exitcost {name} {} mean {}",
            cost.least.saturating_sub(self.overhead),
            cost.mean.saturating_sub(self.overhead)
        );
    }
}

/// CPUID with nothing around it but what RBX needs.
#[inline(always)]
fn bare_cpuid(leaf: u32) {
    // SAFETY: changes only the registers named, and RBX is put back.
    unsafe {
        asm!("push rbx", "cpuid", "pop rbx", inout("eax") leaf => _, inout("ecx") 0 => _, out("edx") _);
    }
}

static WOKEN_AT: AtomicU64 = AtomicU64::new(0);

fn on_timer(_: &mut Frame) {
    WOKEN_AT.store(cpu::rdtsc(), Ordering::SeqCst);
    Apic::current().eoi();
}

/// An IPI of the CPU to itself. Interrupts are off: it stays pending, one bit
/// however often it is sent.
fn ipi(meter: &Meter, r: &mut Report, name: &str) {
    let apic = Apic::current();
    let me = apic.id();
    let vector = u32::from(IPI_VECTOR);
    meter.measure(name, || apic.ipi(me, vector));
    r.check(
        "an IPI to itself is pending",
        apic.bit(register::IRR, IPI_VECTOR),
    );
    cpu::enable_interrupts();
    for _ in 0..1000 {
        // STI holds interrupts off for one more instruction.
        cpu::pause();
        if !apic.bit(register::IRR, IPI_VECTOR) {
            break;
        }
    }
    cpu::disable_interrupts();
    r.check("and is delivered", !apic.bit(register::IRR, IPI_VECTOR));
}

/// Instructions on memory that userland answers for: what they read, and the flags
/// that they set, arrive in the registers named and in no others.
fn registers_of_mmio(r: &mut Report) {
    let at = PCI_CONFIGURATION;
    let id = memory::mmio_read(at) as u32;
    let (high, low, same, other): (u64, u64, u8, u8);
    let kept: u64;
    // SAFETY: reads of configuration space; only the registers named change.
    unsafe {
        asm!(
            "mov r12, -1",
            "mov r13, -1",
            "mov r13d, [{at}]",
            "movzx r14d, byte ptr [{at}]",
            "cmp [{at}], {id:e}",
            "setz {same}",
            "cmp [{at}], {wrong:e}",
            "setz {other}",
            at = in(reg) at,
            id = in(reg) id,
            wrong = in(reg) !id,
            same = out(reg_byte) same,
            other = out(reg_byte) other,
            out("r12") kept,
            out("r13") high,
            out("r14") low,
        );
    }
    r.check(
        "MMIO reads into any register",
        high == u64::from(id) && low == u64::from(id & 0xff),
    );
    r.check("and into no other", kept == u64::MAX);
    r.check("MMIO sets flags", same == 1 && other == 0);
}

/// From the deadline of a timer, `ahead` ticks off, to the first instruction of its
/// handler, with the CPU halted in between.
fn halt_wake(meter: &Meter, r: &mut Report, name: &str, ahead: u64) {
    const WAKES: u64 = 50;
    let apic = Apic::current();
    trap::handle(TIMER_VECTOR, on_timer);
    apic.write(
        register::LVT_TIMER,
        apic::DEADLINE | u32::from(TIMER_VECTOR),
    );
    let (mut least, mut sum) = (u64::MAX, 0);
    for _ in 0..WAKES {
        WOKEN_AT.store(0, Ordering::SeqCst);
        let deadline = cpu::rdtsc() + ahead;
        // SAFETY: arms the timer, whose handler is set.
        unsafe { cpu::wrmsr(apic::TSC_DEADLINE, deadline) };
        cpu::enable_and_halt();
        cpu::disable_interrupts();
        let late = WOKEN_AT.load(Ordering::SeqCst).saturating_sub(deadline);
        least = least.min(late);
        sum += late;
    }
    r.check(
        "HLT ends with the timer",
        WOKEN_AT.load(Ordering::SeqCst) != 0,
    );
    let cost = Cost {
        least,
        mean: sum / WAKES,
    };
    meter.print(name, &cost);
}

/// The first touch of guest memory, 2 MiB apart.
fn first_touch(meter: &Meter) {
    let map = preload::find(0, preload::kind::SMAP).map_or(&[][..], |r| r.data);
    let mut length = [0; 8];
    for (to, from) in length.iter_mut().zip(map.get(28..36).unwrap_or(&[])) {
        *to = *from;
    }
    let end = (0x10_0000 + u64::from_le_bytes(length)).min(1 << 30);
    let (mut least, mut sum, mut count) = (u64::MAX, 0, 0);
    let mut at = 64 << 20;
    while at + 8 <= end && count < 32 {
        let start = cpu::rdtsc();
        black_box(memory::mmio_read(at));
        let ticks = cpu::rdtsc() - start;
        least = least.min(ticks);
        sum += ticks;
        count += 1;
        at += 2 << 20;
    }
    if let Some(mean) = sum.checked_div(count) {
        meter.print("EPT_FIRST_TOUCH", &Cost { least, mean });
    }
}

#[unsafe(no_mangle)]
extern "C" fn guest_main() -> ! {
    let mut r = Report::new("exitcost");
    trap::init();
    memory::init();
    let apic = Apic::current();
    apic.enable();

    let overhead = sample(|| {}).least;
    println!("exitcost OVERHEAD {overhead}");
    let meter = Meter { overhead };
    first_touch(&meter);
    meter.measure("CPUID", || bare_cpuid(0));
    meter.measure("CPUID_1", || bare_cpuid(1));
    meter.measure("RDMSR_PAT", || {
        black_box(cpu::rdmsr(IA32_PAT));
    });
    meter.measure("RDMSR_APIC_BASE", || {
        black_box(cpu::rdmsr(IA32_APIC_BASE));
    });
    let pat = cpu::rdmsr(IA32_PAT);
    meter.measure("WRMSR_PAT", || {
        // SAFETY: writes back what was there.
        unsafe { cpu::wrmsr(IA32_PAT, pat) }
    });
    if cpu::cpuid(0x8000_0001, 0).edx & 1 << 27 != 0 {
        meter.measure("RDMSR_TSC_AUX", || {
            black_box(cpu::rdmsr(IA32_TSC_AUX));
        });
    }
    let cr4 = cpu::cr4();
    meter.measure("MOV_CR4", || {
        // SAFETY: writes back what was there.
        unsafe { cpu::set_cr4(cr4) }
    });
    let cr3 = cpu::cr3();
    meter.measure("MOV_CR3", || {
        // SAFETY: writes back what was there.
        unsafe { cpu::set_cr3(cr3) }
    });
    meter.measure("OUT_UNCLAIMED", || cpu::outb(UNCLAIMED, 0));
    meter.measure("IN_UNCLAIMED", || {
        black_box(cpu::inb(UNCLAIMED));
    });
    // Handled in the kernel: the mask of the second 8259, latching the 8254, the PM timer.
    meter.measure("OUT_8259_MASK", || cpu::outb(0xa1, 0xff));
    meter.measure("OUT_8254_LATCH", || cpu::outb(0x43, 0));
    meter.measure("IN_PM_TIMER", || {
        black_box(cpu::inl(0x408));
    });
    // Handled in userland: the status register of COM1.
    meter.measure("IN_COM1_STATUS", || {
        black_box(cpu::inb(0x3fd));
    });
    meter.measure("MMIO_LAPIC_READ", || {
        black_box(memory::mmio_read(apic::BASE + u64::from(register::ID)));
    });
    meter.measure("MMIO_LAPIC_WRITE", || {
        memory::mmio_write(
            apic::BASE + u64::from(register::LVT_ERROR),
            apic::MASKED | 0xfe,
        );
    });
    meter.measure("MMIO_HPET_READ", || {
        black_box(memory::mmio_read(HPET_COUNTER));
    });
    meter.measure("MMIO_PCI_READ", || {
        black_box(memory::mmio_read(PCI_CONFIGURATION));
    });
    registers_of_mmio(&mut r);
    trap::handle(IPI_VECTOR, |_| Apic::current().eoi());
    meter.measure("APIC_EOI", || apic.eoi());
    ipi(&meter, &mut r, "APIC_IPI");

    if apic::has_x2apic() {
        apic::enter_x2apic();
        let apic = Apic::current();
        r.check("x2APIC mode", apic.x2());
        apic.enable();
        meter.measure("X2APIC_READ_ID", || {
            black_box(apic.id());
        });
        meter.measure("X2APIC_TPR", || apic.write(register::TPR, 0));
        meter.measure("X2APIC_EOI", || apic.eoi());
        ipi(&meter, &mut r, "X2APIC_ICR");
    } else {
        r.skip("x2APIC", "CPUID does not offer it");
    }
    if apic::has_deadline() {
        let apic = Apic::current();
        apic.write(
            register::LVT_TIMER,
            apic::DEADLINE | apic::MASKED | u32::from(TIMER_VECTOR),
        );
        meter.measure("TSC_DEADLINE", || {
            // SAFETY: a masked timer that is far off.
            unsafe { cpu::wrmsr(apic::TSC_DEADLINE, u64::MAX >> 1) }
        });
        // SAFETY: disarms it.
        unsafe { cpu::wrmsr(apic::TSC_DEADLINE, 0) };
        halt_wake(&meter, &mut r, "HLT_WAKE", 200_000);
        // So near that sleep does not pay: 0.1 ms of a machine of 50 MHz.
        halt_wake(&meter, &mut r, "HLT_SOON", 5_000);
    } else {
        r.skip("TSC deadline", "CPUID does not offer it");
    }
    r.check("all was measured", true);
    r.finish()
}
