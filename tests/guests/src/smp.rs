//! Starting another CPU: INIT, SIPI, and a trampoline from real mode.

use crate::apic::Apic;
use crate::{KERNBASE, cpu, memory, preload, trap};
use core::arch::global_asm;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Where the trampoline goes: SIPI vector 8.
const TRAMPOLINE: u64 = 0x8000;
const VECTOR: u32 = 8;

/// What a started CPU runs. Its argument is its APIC ID.
pub type Body = fn(u32) -> !;

static BODY: AtomicU64 = AtomicU64::new(0);
static STARTED: AtomicU32 = AtomicU32::new(0);

#[repr(C, align(16))]
struct Stack([u8; 32768]);
static mut STACK: Stack = Stack([0; 32768]);

unsafe extern "C" {
    static ap_start: u8;
    static ap_end: u8;
    static ap_cr3: u8;
    static ap_stack: u8;
}

/// How many CPUs have been started.
pub fn started() -> u32 {
    STARTED.load(Ordering::SeqCst)
}

/// Puts the trampoline in place. [`memory::init`] must have been called.
pub fn prepare(cr3: u64, body: Body) {
    BODY.store(body as usize as u64, Ordering::SeqCst);
    let start = &raw const ap_start;
    let length = &raw const ap_end as usize - start as usize;
    let offset = |label: *const u8| label as u64 - start as u64;
    // SAFETY: the page at 0x8000 belongs to nobody, and is mapped to itself.
    unsafe {
        core::ptr::copy_nonoverlapping(start, TRAMPOLINE as *mut u8, length);
        ((TRAMPOLINE + offset(&raw const ap_cr3)) as *mut u32).write_unaligned(cr3 as u32);
        ((TRAMPOLINE + offset(&raw const ap_stack)) as *mut u64)
            .write_unaligned(&raw const STACK as u64 + 32768);
    }
}

/// Whether the VM was started with `-e guest.cpus=N`, N above 1: then another CPU
/// must start. CPUID does not tell, as the CPUs may be packages of their own.
pub fn promised() -> bool {
    preload::variable("guest.cpus")
        .and_then(|n| n.parse::<u32>().ok())
        .is_some_and(|n| n > 1)
}

/// Sends INIT and two SIPIs to a CPU (SDM Vol. 3A §9.4.4.1); true once it runs.
pub fn start(apic: Apic, id: u32) -> bool {
    let before = started();
    apic.ipi(id, 0x4500);
    cpu::delay(2_000_000);
    for _ in 0..2 {
        apic.ipi(id, 0x4600 | VECTOR);
        for _ in 0..200 {
            if started() != before {
                return true;
            }
            cpu::delay(100_000);
        }
    }
    false
}

#[unsafe(no_mangle)]
extern "C" fn ap_main() -> ! {
    trap::load_idt();
    let body = BODY.load(Ordering::SeqCst) as usize;
    // SAFETY: `prepare` stored a Body.
    let body: Body = unsafe { core::mem::transmute(body) };
    let id = Apic::current().id();
    STARTED.fetch_add(1, Ordering::SeqCst);
    body(id)
}

/// The highest address the trampoline may not exceed; for a check.
pub fn trampoline_fits() -> bool {
    let length = &raw const ap_end as u64 - &raw const ap_start as u64;
    length <= 4096 && memory::physical(&raw const ap_start) + KERNBASE == &raw const ap_start as u64
}

global_asm!(
    ".pushsection .data",
    ".balign 16",
    ".globl ap_start, ap_end, ap_cr3, ap_stack",
    "ap_start:",
    ".code16",
    "cli",
    "cld",
    "movw %cs, %ax",
    "movw %ax, %ds",
    "lgdtl ap_gdtr - ap_start",
    "movl %cr0, %eax",
    "orb $1, %al",
    "movl %eax, %cr0",
    "ljmpl $24, $(0x8000 + ap_32 - ap_start)",
    ".code32",
    "ap_32:",
    "movw $16, %ax",
    "movw %ax, %ds",
    "movw %ax, %es",
    "movw %ax, %ss",
    "movl %cr4, %eax",
    "orl $0x20, %eax",
    "movl %eax, %cr4",
    "movl (0x8000 + ap_cr3 - ap_start), %eax",
    "movl %eax, %cr3",
    "movl $0xc0000080, %ecx",
    "rdmsr",
    "orl $0x100, %eax",
    "wrmsr",
    "movl %cr0, %eax",
    "orl $0x80000020, %eax",
    "movl %eax, %cr0",
    "ljmpl $8, $(0x8000 + ap_64 - ap_start)",
    ".code64",
    "ap_64:",
    "movq (0x8000 + ap_stack - ap_start), %rsp",
    "xorl %ebp, %ebp",
    "movabsq $ap_main, %rax",
    "callq *%rax",
    "ud2",
    ".balign 8",
    "ap_gdt:",
    ".quad 0",
    ".quad 0x00209b0000000000",
    ".quad 0x00cf93000000ffff",
    ".quad 0x00cf9b000000ffff",
    "ap_gdtr:",
    ".word 31",
    ".long 0x8000 + ap_gdt - ap_start",
    ".balign 8",
    "ap_cr3: .long 0",
    ".long 0",
    "ap_stack: .quad 0",
    "ap_end:",
    ".popsection",
    options(att_syntax)
);
