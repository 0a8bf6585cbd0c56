//! Where the loader enters, and the state it left.

use core::arch::global_asm;

/// The registers at entry, before a single one was changed.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
#[allow(missing_docs)]
pub struct State {
    pub rsp: u64,
    pub rflags: u64,
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    pub cs: u16,
    pub ds: u16,
    pub es: u16,
    pub ss: u16,
    pub gdtr: [u16; 5],
    pub return_address: u32,
    pub modulep: u32,
    pub kernend: u32,
}

#[unsafe(no_mangle)]
static mut ENTRY_STATE: State = State {
    rsp: 0,
    rflags: 0,
    cr0: 0,
    cr3: 0,
    cr4: 0,
    efer: 0,
    cs: 0,
    ds: 0,
    es: 0,
    ss: 0,
    gdtr: [0; 5],
    return_address: 0,
    modulep: 0,
    kernend: 0,
};

/// What the loader left.
pub fn state() -> State {
    // SAFETY: written once, in assembly, before any Rust code ran.
    unsafe { (&raw const ENTRY_STATE).read() }
}

impl State {
    /// Base of the GDT at entry.
    pub fn gdt_base(&self) -> u64 {
        let [_, a, b, c, d] = self.gdtr.map(u64::from);
        a | b << 16 | c << 32 | d << 48
    }

    /// Limit of the GDT at entry.
    pub fn gdt_limit(&self) -> u16 {
        self.gdtr[0]
    }
}

// The first push goes below the loader's RSP, as FreeBSD's own first push does
// (sys/amd64/amd64/locore.S).
global_asm!(
    ".pushsection .text.entry, \"ax\"",
    ".globl _start",
    "_start:",
    "lea rbx, [rip + ENTRY_STATE]",
    "mov [rbx + 0], rsp",
    "pushfq",
    "pop [rbx + 8]",
    "cli",
    "cld",
    "mov rax, cr0",
    "mov [rbx + 16], rax",
    "mov rax, cr3",
    "mov [rbx + 24], rax",
    "mov rax, cr4",
    "mov [rbx + 32], rax",
    "mov ecx, 0xc0000080",
    "rdmsr",
    "mov [rbx + 40], eax",
    "mov [rbx + 44], edx",
    "mov [rbx + 48], cs",
    "mov [rbx + 50], ds",
    "mov [rbx + 52], es",
    "mov [rbx + 54], ss",
    "sgdt [rbx + 56]",
    "mov eax, [rsp]",
    "mov [rbx + 68], eax",
    "mov eax, [rsp + 4]",
    "mov [rbx + 72], eax",
    "mov eax, [rsp + 8]",
    "mov [rbx + 76], eax",
    "lea rsp, [rip + BOOT_STACK_END]",
    "xor ebp, ebp",
    "call guest_main",
    "2: hlt",
    "jmp 2b",
    ".popsection",
    ".pushsection .bss, \"aw\", @nobits",
    ".balign 16",
    ".space 65536",
    "BOOT_STACK_END:",
    ".popsection",
);
