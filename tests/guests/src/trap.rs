//! Exceptions and interrupts.

use crate::{cpu, println};
use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// What a handler finds on the stack.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub struct Frame {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rbp: u64,
    pub rdi: u64,
    pub rsi: u64,
    pub rdx: u64,
    pub rcx: u64,
    pub rbx: u64,
    pub rax: u64,
    pub vector: u64,
    pub error: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

/// A handler of one vector.
pub type Handler = fn(&mut Frame);

static HANDLERS: [AtomicUsize; 256] = [const { AtomicUsize::new(0) }; 256];

/// Where [`catch!`](crate::catch) goes on after an exception; 0 for nowhere.
#[doc(hidden)]
pub static RECOVER: AtomicU64 = AtomicU64::new(0);
static CAUGHT: AtomicU64 = AtomicU64::new(NOTHING);
static CAUGHT_ERROR: AtomicU64 = AtomicU64::new(0);
const NOTHING: u64 = u64::MAX;

/// An exception that [`catch!`](crate::catch) caught.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exception {
    /// Its vector.
    pub vector: u64,
    /// Its error code, 0 for those without.
    pub error: u64,
}

/// What the last [`catch!`](crate::catch) caught.
pub fn caught() -> Option<Exception> {
    RECOVER.store(0, Ordering::SeqCst);
    let error = CAUGHT_ERROR.load(Ordering::SeqCst);
    match CAUGHT.swap(NOTHING, Ordering::SeqCst) {
        NOTHING => None,
        vector => Some(Exception { vector, error }),
    }
}

/// Runs assembly that may raise an exception, and yields the exception.
///
/// RAX is used up beforehand; the assembly must leave the stack as it was at the
/// instruction that faults.
#[macro_export]
macro_rules! catch {
    ($($line:literal),+ $(; $($operands:tt)*)?) => {{
        core::arch::asm!(
            "push rax",
            "lea rax, [rip + 77f]",
            "mov [rip + {recover}], rax",
            "pop rax",
            $($line,)+
            "77:",
            recover = sym $crate::trap::RECOVER,
            $($($operands)*)?
        );
        $crate::trap::caught()
    }};
}

/// Sets the handler of a vector.
pub fn handle(vector: u8, handler: Handler) {
    HANDLERS[usize::from(vector)].store(handler as usize, Ordering::SeqCst);
}

#[unsafe(no_mangle)]
extern "C" fn trap_entry(frame: &mut Frame) {
    let vector = frame.vector as usize & 0xff;
    let handler = HANDLERS[vector].load(Ordering::SeqCst);
    if handler != 0 {
        // SAFETY: only `handle` stores here, and it stores a Handler.
        let handler: Handler = unsafe { core::mem::transmute(handler) };
        handler(frame);
        return;
    }
    let recover = RECOVER.swap(0, Ordering::SeqCst);
    if vector < 32 && recover != 0 {
        CAUGHT.store(frame.vector, Ordering::SeqCst);
        CAUGHT_ERROR.store(frame.error, Ordering::SeqCst);
        frame.rip = recover;
        return;
    }
    println!(
        "unexpected trap {vector} error {:#x} at {:#x}, cr2 {:#x}",
        frame.error,
        frame.rip,
        cpu::cr2()
    );
    println!("{frame:x?}");
    println!("FAIL");
    crate::power_off();
}

#[repr(C, align(16))]
struct Idt([[u64; 2]; 256]);
static mut IDT: Idt = Idt([[0; 2]; 256]);

/// Our GDT: null, 64-bit code (8) and data (16) as the loader's, then a 32-bit
/// code segment for trampolines (24), user data (32), user code (40), and a TSS (48).
#[repr(C, align(16))]
struct Gdt([u64; 8]);
static mut GDT: Gdt = Gdt([
    0,
    0x0020_9b00_0000_0000,
    0x0000_9300_0000_0000,
    0x00cf_9b00_0000_ffff,
    0x0000_f300_0000_0000,
    0x0020_fb00_0000_0000,
    0,
    0,
]);

#[repr(C, packed(4))]
struct Tss {
    reserved: u32,
    rsp: [u64; 3],
    reserved_2: u64,
    ist: [u64; 7],
    reserved_3: u64,
    reserved_4: u16,
    io_map: u16,
}
static mut TSS: Tss = Tss {
    reserved: 0,
    rsp: [0; 3],
    reserved_2: 0,
    ist: [0; 7],
    reserved_3: 0,
    reserved_4: 0,
    io_map: 104,
};
#[repr(C, align(16))]
struct Stack([u8; 16384]);
static mut IST_STACK: Stack = Stack([0; 16384]);
static mut RING0_STACK: Stack = Stack([0; 16384]);

#[repr(C, packed)]
struct Pointer {
    limit: u16,
    base: u64,
}

unsafe extern "C" {
    static trap_stubs: [[u8; 16]; 256];
}

/// Loads our GDT, TSS and IDT, and masks the 8259s, which firmware may have left
/// at vector 8. Double faults (8) have a stack of their own.
pub fn init() {
    cpu::outb(0x21, 0xff);
    cpu::outb(0xa1, 0xff);
    let idt = &raw mut IDT;
    let gdt = &raw mut GDT;
    let tss = &raw mut TSS;
    // SAFETY: called once, on the boot CPU with interrupts off; nothing else names
    // these tables, and they stay for ever.
    unsafe {
        for (vector, gate) in (*idt).0.iter_mut().enumerate() {
            let stub = (&raw const trap_stubs[vector]) as u64;
            let ist = u64::from(vector == 8);
            // 3 may be raised by user code; the others not.
            let dpl: u64 = if vector == 3 { 3 } else { 0 };
            *gate = [
                stub & 0xffff
                    | 8 << 16
                    | ist << 32
                    | (0x8e | dpl << 5) << 40
                    | (stub >> 16 & 0xffff) << 48,
                stub >> 32,
            ];
        }
        (*tss).rsp[0] = (&raw const RING0_STACK) as u64 + 16384;
        (*tss).ist[0] = (&raw const IST_STACK) as u64 + 16384;
        let base = tss as u64;
        (*gdt).0[6] = 103 | (base & 0xff_ffff) << 16 | 0x89 << 40 | (base >> 24 & 0xff) << 56;
        (*gdt).0[7] = base >> 32;
        let pointer = Pointer {
            limit: 63,
            base: gdt as u64,
        };
        asm!(
            "lgdt [{}]",
            "push 8",
            "lea {t}, [rip + 2f]",
            "push {t}",
            "retfq",
            "2:",
            "mov ds, {d:x}",
            "mov es, {d:x}",
            "mov ss, {d:x}",
            "ltr {s:x}",
            in(reg) &pointer,
            t = out(reg) _,
            d = in(reg) 16,
            s = in(reg) 48,
        );
        load_idt();
    }
}

/// Loads the IDT that [`init`] made; for further CPUs.
pub fn load_idt() {
    let pointer = Pointer {
        limit: 4095,
        base: (&raw const IDT) as u64,
    };
    // SAFETY: the table is complete before the first call.
    unsafe { asm!("lidt [{}]", in(reg) &pointer) };
}

/// Base and limit of our GDT, for further CPUs.
pub fn gdt() -> (u64, u16) {
    ((&raw const GDT) as u64, 63)
}

// One stub of 16 bytes a vector: those without an error code push a 0 first.
global_asm!(
    ".balign 16",
    ".globl trap_stubs",
    "trap_stubs:",
    ".set vector, 0",
    ".rept 256",
    ".balign 16",
    ".if (vector == 8) || ((vector >= 10) && (vector <= 14)) || (vector == 17) || (vector == 21)",
    ".else",
    "push 0",
    ".endif",
    "push vector",
    "jmp trap_common",
    ".set vector, vector + 1",
    ".endr",
    ".balign 16",
    "trap_common:",
    "push rax",
    "push rbx",
    "push rcx",
    "push rdx",
    "push rsi",
    "push rdi",
    "push rbp",
    "push r8",
    "push r9",
    "push r10",
    "push r11",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "cld",
    "mov rdi, rsp",
    "mov rbp, rsp",
    "and rsp, -16",
    "call trap_entry",
    "mov rsp, rbp",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop r11",
    "pop r10",
    "pop r9",
    "pop r8",
    "pop rbp",
    "pop rdi",
    "pop rsi",
    "pop rdx",
    "pop rcx",
    "pop rbx",
    "pop rax",
    "add rsp, 16",
    "iretq",
);
