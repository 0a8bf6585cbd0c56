//! The local APIC: its timer in all modes, IPIs to itself and to another CPU, and
//! how that one is started; first as xAPIC, then as x2APIC.
#![no_std]
#![no_main]

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use guests::apic::{self, Apic, register};
use guests::report::Report;
use guests::trap::{self, Frame};
use guests::{cpu, memory, smp};

const TIMER: u8 = 0x40;
const SELF: u8 = 0x41;
const LOW: u8 = 0x50;
const HIGH: u8 = 0x70;
const TO_AP: u8 = 0x60;
const FROM_AP: u8 = 0x61;
/// So many ticks of the TSC are enough for whatever is waited for.
const PATIENCE: u64 = 200_000_000;

static COUNT: [AtomicU32; 256] = [const { AtomicU32::new(0) }; 256];
static FIRED_AT: AtomicU64 = AtomicU64::new(0);
static ORDER: AtomicU64 = AtomicU64::new(0);
static NMIS: AtomicU32 = AtomicU32::new(0);
/// What the other CPU says: bit 31 once it runs, its APIC ID below.
static AP_ID: AtomicU32 = AtomicU32::new(0);
static AP_X2: AtomicU32 = AtomicU32::new(0);

fn count(vector: u8) -> u32 {
    COUNT[usize::from(vector)].load(Ordering::SeqCst)
}

fn on_interrupt(frame: &mut Frame) {
    FIRED_AT.store(cpu::rdtsc(), Ordering::SeqCst);
    let seen = ORDER.load(Ordering::SeqCst);
    ORDER.store(seen << 8 | frame.vector, Ordering::SeqCst);
    COUNT[frame.vector as usize & 0xff].fetch_add(1, Ordering::SeqCst);
    Apic::current().eoi();
}

fn on_nmi(_: &mut Frame) {
    NMIS.fetch_add(1, Ordering::SeqCst);
}

fn wait(done: impl Fn() -> bool) -> bool {
    let start = cpu::rdtsc();
    while !done() {
        if cpu::rdtsc() - start > PATIENCE {
            return false;
        }
        cpu::pause();
    }
    true
}

/// Waits with interrupts on, and leaves them off.
fn wait_open(done: impl Fn() -> bool) -> bool {
    cpu::enable_interrupts();
    let good = wait(done);
    cpu::disable_interrupts();
    good
}

fn timer(r: &mut Report, apic: Apic) {
    apic.write(register::DIVIDE, 0xb);
    apic.write(register::LVT_TIMER, apic::MASKED | u32::from(TIMER));
    apic.write(register::INITIAL_COUNT, 1_000_000);
    let first = apic.read(register::CURRENT_COUNT);
    cpu::delay(10_000);
    let second = apic.read(register::CURRENT_COUNT);
    r.check(
        "timer: the count runs down",
        second < first && first <= 1_000_000,
    );
    let before = count(TIMER);
    apic.write(register::INITIAL_COUNT, 1000);
    r.check(
        "timer: a one-shot count ends at 0",
        wait(|| apic.read(register::CURRENT_COUNT) == 0),
    );
    cpu::enable_interrupts();
    cpu::delay(1000);
    cpu::disable_interrupts();
    r.check(
        "timer: masked, it interrupts nobody",
        count(TIMER) == before,
    );

    apic.write(register::LVT_TIMER, u32::from(TIMER));
    apic.write(register::INITIAL_COUNT, 100_000);
    r.check("timer: one shot fires", wait_open(|| count(TIMER) > before));
    cpu::enable_interrupts();
    cpu::delay(1_000_000);
    cpu::disable_interrupts();
    r.equal(
        "timer: and only once",
        u64::from(count(TIMER)),
        u64::from(before) + 1,
    );

    let before = count(TIMER);
    apic.write(register::LVT_TIMER, apic::PERIODIC | u32::from(TIMER));
    apic.write(register::INITIAL_COUNT, 100_000);
    r.check(
        "timer: periodic fires ten times",
        wait_open(|| count(TIMER) >= before + 10),
    );
    apic.write(register::INITIAL_COUNT, 0);
    r.equal(
        "timer: stopped, its count is 0",
        u64::from(apic.read(register::CURRENT_COUNT)),
        0,
    );
    // One that was due already may still come.
    cpu::enable_interrupts();
    cpu::delay(10_000);
    let stopped = count(TIMER);
    cpu::delay(2_000_000);
    cpu::disable_interrupts();
    r.equal(
        "timer: stopped, it stays silent",
        u64::from(count(TIMER)),
        u64::from(stopped),
    );
    apic.write(register::LVT_TIMER, apic::MASKED | u32::from(TIMER));
}

fn deadline(r: &mut Report, apic: Apic) {
    if !apic::has_deadline() {
        r.skip("deadline timer", "CPUID does not offer it");
        return;
    }
    apic.write(register::LVT_TIMER, apic::DEADLINE | u32::from(TIMER));
    let before = count(TIMER);
    let due = cpu::rdtsc() + 1_000_000;
    // SAFETY: arms a timer whose handler is set.
    unsafe { cpu::wrmsr(apic::TSC_DEADLINE, due) };
    r.equal(
        "deadline: it can be read back",
        cpu::rdmsr(apic::TSC_DEADLINE),
        due,
    );
    r.check("deadline: it fires", wait_open(|| count(TIMER) > before));
    r.check(
        "deadline: and not too early",
        FIRED_AT.load(Ordering::SeqCst) >= due,
    );
    r.equal(
        "deadline: it is 0 afterwards",
        cpu::rdmsr(apic::TSC_DEADLINE),
        0,
    );
    // SAFETY: as before; this one is long past.
    unsafe { cpu::wrmsr(apic::TSC_DEADLINE, 1) };
    r.check(
        "deadline: one in the past fires at once",
        wait_open(|| count(TIMER) > before + 1),
    );
    let before = count(TIMER);
    // SAFETY: as before.
    unsafe {
        cpu::wrmsr(apic::TSC_DEADLINE, cpu::rdtsc() + 500_000);
        cpu::wrmsr(apic::TSC_DEADLINE, 0);
    }
    cpu::enable_interrupts();
    cpu::delay(2_000_000);
    cpu::disable_interrupts();
    r.equal(
        "deadline: disarmed, it stays silent",
        u64::from(count(TIMER)),
        u64::from(before),
    );
    apic.write(register::LVT_TIMER, apic::MASKED | u32::from(TIMER));
}

fn to_itself(r: &mut Report, apic: Apic) {
    let me = apic.id();
    let before = count(SELF);
    apic.ipi(me, u32::from(SELF));
    r.check(
        "IPI: with interrupts off it is pending",
        apic.bit(register::IRR, SELF),
    );
    r.check(
        "IPI: and comes when they are on",
        wait_open(|| count(SELF) == before + 1),
    );
    r.check(
        "IPI: it is in service no more",
        !apic.bit(register::ISR, SELF),
    );
    const TO_SELF: u32 = 1 << 18;
    apic.ipi(0, TO_SELF | u32::from(SELF));
    r.check(
        "IPI: by the shorthand self",
        wait_open(|| count(SELF) == before + 2),
    );
    if apic.x2() {
        apic.write(register::SELF_IPI, u32::from(SELF));
        r.check(
            "IPI: by the self IPI register",
            wait_open(|| count(SELF) == before + 3),
        );
    }

    ORDER.store(0, Ordering::SeqCst);
    apic.ipi(me, u32::from(LOW));
    apic.ipi(me, u32::from(HIGH));
    wait_open(|| ORDER.load(Ordering::SeqCst) >> 8 != 0);
    let wanted = u64::from(HIGH) << 8 | u64::from(LOW);
    r.equal(
        "priority: the higher vector comes first",
        ORDER.load(Ordering::SeqCst),
        wanted,
    );

    let before = count(LOW);
    apic.write(register::TPR, 0x50);
    apic.ipi(me, u32::from(LOW));
    cpu::enable_interrupts();
    cpu::delay(100_000);
    cpu::disable_interrupts();
    r.equal(
        "TPR: it holds back its own class",
        u64::from(count(LOW)),
        u64::from(before),
    );
    r.equal(
        "TPR: PPR follows it",
        u64::from(apic.read(register::PPR)),
        0x50,
    );
    apic.write(register::TPR, 0x40);
    r.check(
        "TPR: lowered, the interrupt comes",
        wait_open(|| count(LOW) == before + 1),
    );
    apic.write(register::TPR, 0);
}

fn error_status(r: &mut Report, apic: Apic) {
    const TO_SELF: u32 = 1 << 18;
    /// Send (5) or receive (6): an IPI to itself is both (SDM Vol. 3A §11.5.3).
    const ILLEGAL_VECTOR: u32 = 1 << 5 | 1 << 6;
    apic.write(register::ESR, 0);
    apic.ipi(0, TO_SELF | 3);
    apic.write(register::ESR, 0);
    let status = apic.read(register::ESR);
    r.check(
        "ESR: an illegal vector is noted",
        status & ILLEGAL_VECTOR != 0,
    );
    apic.write(register::ESR, 0);
    r.equal(
        "ESR: and forgotten by the next write",
        u64::from(apic.read(register::ESR)),
        0,
    );
}

/// The other CPU: answers every TO_AP with a FROM_AP.
fn other(id: u32) -> ! {
    let apic = Apic::current();
    apic.enable();
    AP_ID.store(1 << 31 | id, Ordering::SeqCst);
    let mut answered = 0;
    let mut switched = false;
    loop {
        cpu::enable_and_halt();
        cpu::disable_interrupts();
        if AP_X2.load(Ordering::SeqCst) == 1 && !switched {
            apic::enter_x2apic();
            Apic::current().enable();
            switched = true;
            AP_X2.store(2, Ordering::SeqCst);
        }
        while answered != count(TO_AP) {
            answered += 1;
            Apic::current().ipi(0, u32::from(FROM_AP));
        }
    }
}

fn with_the_other(r: &mut Report, apic: Apic, id: u32) {
    let (sent, back) = (count(TO_AP), count(FROM_AP));
    for i in 0..20 {
        apic.ipi(id, u32::from(TO_AP));
        if !wait_open(|| count(FROM_AP) == back + i + 1) {
            break;
        }
    }
    r.equal(
        "SMP: 20 IPIs arrive",
        u64::from(count(TO_AP)),
        u64::from(sent) + 20,
    );
    r.equal(
        "SMP: and are answered",
        u64::from(count(FROM_AP)),
        u64::from(back) + 20,
    );
    const ALL_BUT_SELF: u32 = 3 << 18;
    apic.ipi(0, ALL_BUT_SELF | u32::from(TO_AP));
    r.check(
        "SMP: by the shorthand all but self",
        wait_open(|| count(FROM_AP) == back + 21),
    );
    let nmis = NMIS.load(Ordering::SeqCst);
    apic.ipi(id, 0x4400);
    r.check(
        "SMP: an NMI arrives",
        wait(|| NMIS.load(Ordering::SeqCst) == nmis + 1),
    );
}

#[unsafe(no_mangle)]
extern "C" fn guest_main() -> ! {
    let mut r = Report::new("apic");
    trap::init();
    let cr3 = memory::init();
    for vector in [TIMER, SELF, LOW, HIGH, TO_AP, FROM_AP] {
        trap::handle(vector, on_interrupt);
    }
    trap::handle(2, on_nmi);
    trap::handle(0xff, |_| {});

    let apic = Apic::current();
    r.check("the APIC comes up as an xAPIC", !apic.x2());
    r.check(
        "IA32_APIC_BASE: enabled, boot CPU",
        cpu::rdmsr(apic::APIC_BASE) & 0x900 == 0x900,
    );
    r.equal("its page", cpu::rdmsr(apic::APIC_BASE) & !0xfff, apic::BASE);
    r.equal(
        "version",
        u64::from(apic.read(register::VERSION) & 0xf0),
        0x10,
    );
    r.equal(
        "ID is CPUID's",
        u64::from(apic.id()),
        u64::from(cpu::cpuid(1, 0).ebx >> 24),
    );
    apic.enable();
    timer(&mut r, apic);
    deadline(&mut r, apic);
    to_itself(&mut r, apic);
    error_status(&mut r, apic);

    r.check("the trampoline fits into its page", smp::trampoline_fits());
    smp::prepare(cr3, other);
    // With one CPU nobody answers.
    let running = smp::start(apic, 1) && wait(|| AP_ID.load(Ordering::SeqCst) != 0);
    if running {
        r.equal(
            "SMP: the other CPU's ID",
            u64::from(AP_ID.load(Ordering::SeqCst)),
            1 << 31 | 1,
        );
        with_the_other(&mut r, apic, 1);
    } else if smp::promised() {
        r.check("SMP: the other CPU starts", false);
    } else {
        r.skip("SMP", "no other CPU answers");
    }

    if apic::has_x2apic() {
        apic::enter_x2apic();
        let apic = Apic::current();
        r.check("x2APIC mode", apic.x2());
        r.equal(
            "x2APIC: ID",
            u64::from(apic.id()),
            u64::from(cpu::cpuid(0xb, 0).edx),
        );
        let id = apic.id();
        let logical = id >> 4 << 16 | 1 << (id & 15);
        r.equal(
            "x2APIC: LDR is made of the ID",
            u64::from(apic.read(register::LDR)),
            u64::from(logical),
        );
        apic.enable();
        timer(&mut r, apic);
        deadline(&mut r, apic);
        to_itself(&mut r, apic);
        error_status(&mut r, apic);
        if running {
            AP_X2.store(1, Ordering::SeqCst);
            apic.ipi(1, u32::from(TO_AP));
            r.check(
                "SMP: the other CPU follows to x2APIC",
                wait(|| AP_X2.load(Ordering::SeqCst) == 2),
            );
            wait_open(|| count(FROM_AP) == count(TO_AP));
            with_the_other(&mut r, apic, 1);
        }
    } else {
        r.skip("x2APIC", "CPUID does not offer it");
    }
    r.finish()
}
