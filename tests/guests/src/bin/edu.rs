//! QEMU's teaching device, passed through: registers, MSI, DMA, and DMA to where the
//! guest has no memory.
//!
//! Prints `edu: interrupt MINIMUM MEAN`, ticks of the TSC from the register that asks
//! for it to the handler. With `guest.wait=1` it goes on with DMA until it is killed,
//! with `guest.poll=1` likewise, whether interrupts come or not; with `guest.reset=1` it resets the machine while the device is at it.
#![no_std]
#![no_main]

use core::sync::atomic::{AtomicU64, Ordering};
use guests::apic::{self, Apic, register};
use guests::memory::{mmio_read, mmio_write, physical};
use guests::report::Report;
use guests::trap::{self, Frame};
use guests::{cpu, memory, preload, println};

const VECTOR: u8 = 0x50;
const TIMER: u8 = 0x51;
/// Vendor and device.
const EDU: u32 = 0x11e8_1234;

/// Registers.
const IDENTITY: u64 = 0x00;
const LIVE: u64 = 0x04;
const FACTORIAL: u64 = 0x08;
const STATUS: u64 = 0x20;
const IRQ_STATUS: u64 = 0x24;
const IRQ_RAISE: u64 = 0x60;
const IRQ_ACK: u64 = 0x64;
const DMA_FROM: u64 = 0x80;
const DMA_TO: u64 = 0x88;
const DMA_COUNT: u64 = 0x90;
const DMA_COMMAND: u64 = 0x98;
/// Where DMA sees the device's 4 KiB.
const BUFFER: u64 = 0x4_0000;
/// Bytes of a transfer. QEMU's device ends QEMU at one that reaches its buffer's end.
const LENGTH: usize = 4096 - 64;
const START: u32 = 1;
const TO_MEMORY: u32 = 2;
const AND_INTERRUPT: u32 = 4;

/// Beyond the guest's 128 MiB, within what the device can name.
const NOWHERE: u64 = 0x0a00_0000;

static FIRED: AtomicU64 = AtomicU64::new(0);
static AT: AtomicU64 = AtomicU64::new(0);
static BAR: AtomicU64 = AtomicU64::new(0);

#[repr(align(4096))]
struct Buffer {
    _bytes: [u8; 4096],
}
static mut MEMORY: Buffer = Buffer { _bytes: [0; 4096] };

fn config(slot: u32, register: u32) {
    cpu::outl(0xcf8, 0x8000_0000 | slot << 11 | register);
}

fn config_read(slot: u32, register: u32) -> u32 {
    config(slot, register);
    cpu::inl(0xcfc)
}

fn config_write(slot: u32, register: u32, value: u32) {
    config(slot, register);
    cpu::outl(0xcfc, value);
}

fn read(register: u64) -> u32 {
    mmio_read(BAR.load(Ordering::Relaxed) + register)
}

fn write(register: u64, value: u32) {
    mmio_write(BAR.load(Ordering::Relaxed) + register, value);
}

fn on_interrupt(_: &mut Frame) {
    AT.store(cpu::rdtsc(), Ordering::SeqCst);
    write(IRQ_ACK, read(IRQ_STATUS));
    FIRED.fetch_add(1, Ordering::SeqCst);
    Apic::current().eoi();
}

/// Waits until one more interrupt has come; false if it does not.
fn another(before: u64) -> bool {
    (0..50_000_000_u64).any(|_| {
        cpu::pause();
        FIRED.load(Ordering::SeqCst) != before
    })
}

fn interrupts(r: &mut Report, count: u64) {
    cpu::enable_interrupts();
    let (mut minimum, mut sum, mut came) = (u64::MAX, 0, 0);
    for _ in 0..count {
        let before = FIRED.load(Ordering::SeqCst);
        let start = cpu::rdtsc();
        write(IRQ_RAISE, 1);
        if another(before) {
            let took = AT.load(Ordering::SeqCst) - start;
            minimum = minimum.min(took);
            sum += took;
            came += 1;
        }
    }
    println!("edu: interrupt {minimum} {}", sum / count);
    r.equal("every interrupt comes", came, count);
    cpu::disable_interrupts();
}

/// Begins a transfer, which takes 100 ms.
fn begin(from: u64, to: u64, command: u32) {
    for (register, value) in [(DMA_FROM, from), (DMA_TO, to)] {
        write(register, value as u32);
        write(register + 4, 0);
    }
    write(DMA_COUNT, LENGTH as u32);
    write(DMA_COUNT + 4, 0);
    write(DMA_COMMAND, START | AND_INTERRUPT | command);
}

/// A transfer, asleep until its interrupt; false if it is not done then.
fn dma(from: u64, to: u64, command: u32) -> bool {
    let before = FIRED.load(Ordering::SeqCst);
    begin(from, to, command);
    while FIRED.load(Ordering::SeqCst) == before {
        cpu::enable_and_halt();
        cpu::disable_interrupts();
    }
    read(DMA_COMMAND) & START == 0
}

fn fill(value: impl Fn(usize) -> u8) {
    let memory = (&raw mut MEMORY).cast::<u8>();
    for i in 0..LENGTH {
        // SAFETY: LENGTH is within MEMORY, which only this CPU names; the device writes it.
        unsafe { memory.add(i).write_volatile(value(i)) }
    }
}

fn differing(value: impl Fn(usize) -> u8) -> u64 {
    let memory = (&raw const MEMORY).cast::<u8>();
    let differs = |i: &usize| {
        // SAFETY: as in `fill`.
        unsafe { memory.add(*i).read_volatile() != value(*i) }
    };
    (0..LENGTH).filter(differs).count() as u64
}

fn transfers(r: &mut Report) {
    let here = physical(&raw const MEMORY);
    let pattern = |i: usize| (i * 7 + i / 256) as u8;
    fill(pattern);
    r.check("DMA from memory ends", dma(here, BUFFER, 0));
    fill(|_| 0);
    r.check("DMA to memory ends", dma(BUFFER, here, TO_MEMORY));
    r.equal("what comes back is the same", differing(pattern), 0);
    // Where there is no memory of ours somebody else's may be.
    r.check("DMA to nowhere ends", dma(BUFFER, NOWHERE, TO_MEMORY));
    r.check("DMA from nowhere ends", dma(NOWHERE, BUFFER, 0));
    fill(|_| 0x5a);
    r.check("DMA to memory works still", dma(BUFFER, here, TO_MEMORY));
    // The device's buffer has what it had, or ones, or zeroes: nothing of others.
    let strange = differing(pattern)
        .min(differing(|_| 0xff))
        .min(differing(|_| 0));
    r.equal("and brings nothing", strange, 0);
}

fn capability(id: u32) -> Option<u32> {
    let mut at = config_read(5, 0x34) & 0xfc;
    for _ in 0..48 {
        if at == 0 {
            return None;
        }
        let header = config_read(5, at);
        if header & 0xff == id {
            return Some(at);
        }
        at = header >> 8 & 0xfc;
    }
    None
}

#[unsafe(no_mangle)]
extern "C" fn guest_main() -> ! {
    let mut r = Report::new("edu");
    trap::init();
    memory::init();
    trap::handle(VECTOR, on_interrupt);
    trap::handle(0xff, |_| {});
    let apic = Apic::current();
    apic.enable();
    if !r.equal("slot 5 has it", config_read(5, 0).into(), EDU.into()) {
        r.finish();
    }
    BAR.store(u64::from(config_read(5, 0x10) & !0xf), Ordering::Relaxed);
    config_write(5, 4, 6);
    r.equal("it says who it is", read(IDENTITY).into(), 0x0100_00ed);
    write(LIVE, 0x1234_5678);
    r.equal("it inverts", read(LIVE).into(), !0x1234_5678_u32 as u64);
    write(FACTORIAL, 10);
    while read(STATUS) & 1 != 0 {
        cpu::pause();
    }
    r.equal("it multiplies", read(FACTORIAL).into(), 3_628_800);
    // The BAR elsewhere, and gone while decoding is off.
    let moved = 0xd000_0000;
    config_write(5, 0x10, moved as u32);
    BAR.store(moved, Ordering::Relaxed);
    r.equal("its BAR moves", read(LIVE).into(), !0x1234_5678_u32 as u64);
    config_write(5, 4, 4);
    r.equal("and hides", read(LIVE).into(), 0xffff_ffff);
    config_write(5, 4, 6);
    r.equal("and comes back", read(LIVE).into(), !0x1234_5678_u32 as u64);
    let Some(msi) = capability(5) else {
        r.check("it has MSI", false);
        r.finish();
    };
    config_write(5, msi + 4, 0xfee0_0000 | apic.id() << 12);
    config_write(5, msi + 8, 0);
    config_write(5, msi + 12, VECTOR.into());
    config_write(5, msi, config_read(5, msi) | 1 << 16);
    if preload::variable("guest.wait").is_some() {
        let here = physical(&raw const MEMORY);
        println!("edu: busy");
        loop {
            dma(BUFFER, here, TO_MEMORY);
        }
    }
    if preload::variable("guest.poll").is_some() {
        let here = physical(&raw const MEMORY);
        println!("edu: busy");
        // Every 100 ms of the APIC's 128 MHz.
        trap::handle(TIMER, |_| Apic::current().eoi());
        apic.write(register::DIVIDE, 0xb);
        apic.write(register::LVT_TIMER, apic::PERIODIC | u32::from(TIMER));
        apic.write(register::INITIAL_COUNT, 12_800_000);
        loop {
            begin(BUFFER, here, TO_MEMORY);
            while read(DMA_COMMAND) & START != 0 {
                cpu::enable_and_halt();
                cpu::disable_interrupts();
            }
        }
    }
    if preload::variable("guest.reset").is_some() {
        println!("edu: reset");
        begin(BUFFER, physical(&raw const MEMORY), TO_MEMORY);
        // Reset control: all of it (RST_CPU, SYS_RST).
        cpu::outb(0xcf9, 6);
        loop {
            cpu::halt();
        }
    }
    interrupts(&mut r, 1000);
    transfers(&mut r);
    write(LIVE, 1);
    r.equal("it lives after all that", read(LIVE).into(), !1_u32 as u64);
    r.finish()
}
