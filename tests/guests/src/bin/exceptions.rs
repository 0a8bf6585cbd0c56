//! Exceptions: each arrives with its vector, error code and address, and the
//! guest goes on after it.
#![no_std]
#![no_main]

use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};
use guests::report::Report;
use guests::trap::{self, Exception, Frame};
use guests::{catch, cpu, memory};

static HITS: AtomicU64 = AtomicU64::new(0);
static RIP: AtomicU64 = AtomicU64::new(0);
static CR2: AtomicU64 = AtomicU64::new(0);
static DR6: AtomicU64 = AtomicU64::new(0);

/// Not mapped: between the identity map and the canonical hole.
const UNMAPPED: u64 = 0x0000_7000_0000_0000;
const NOT_CANONICAL: u64 = 0x8000_0000_0000_0000;

fn is(r: &mut Report, what: &str, got: Option<Exception>, vector: u64, error: u64) {
    let wanted = Exception { vector, error };
    if got != Some(wanted) {
        guests::println!("exceptions: {what}: got {got:?}");
    }
    r.check(what, got == Some(wanted));
}

fn on_trap(frame: &mut Frame) {
    HITS.fetch_add(1, Ordering::SeqCst);
    RIP.store(frame.rip, Ordering::SeqCst);
    // A single step or breakpoint must not repeat for ever.
    frame.rflags &= !(1 << 8);
}

fn on_debug(frame: &mut Frame) {
    let dr6: u64;
    // SAFETY: reads and resets the debug status.
    unsafe {
        asm!("mov {}, dr6", out(reg) dr6);
        asm!("mov dr6, {}", in(reg) 0xffff_0ff0u64);
    }
    DR6.store(dr6, Ordering::SeqCst);
    on_trap(frame);
}

fn on_fault_fix(frame: &mut Frame) {
    HITS.fetch_add(1, Ordering::SeqCst);
    CR2.store(cpu::cr2(), Ordering::SeqCst);
    frame.rip += 3;
}

fn faults(r: &mut Report) {
    // SAFETY: every one of these faults before it changes anything.
    unsafe {
        let e = catch!("xor edx, edx", "xor ecx, ecx", "mov eax, 1", "div ecx";
            out("eax") _, out("ecx") _, out("edx") _);
        is(r, "#DE by DIV", e, 0, 0);
        is(r, "#UD by UD2", catch!("ud2"), 6, 0);
        let e = catch!("mov [rcx], al"; in("rcx") NOT_CANONICAL, in("al") 0u8);
        is(r, "#GP by a non-canonical address", e, 13, 0);
        let e = catch!("mov ds, {v:x}"; v = in(reg) 0x1230u64);
        is(r, "#GP with the selector as error code", e, 13, 0x1230);
        let e = catch!("rdmsr"; in("ecx") 0x1234_5678u32, out("eax") _, out("edx") _);
        is(r, "#GP by RDMSR of nothing", e, 13, 0);
        let e = catch!("mov cr4, {v}"; v = in(reg) 1u64 << 63);
        is(r, "#GP by a reserved bit of CR4", e, 13, 0);
        let e = catch!("mov cr0, {v}"; v = in(reg) cpu::cr0() & !1);
        is(r, "#GP by PG without PE", e, 13, 0);
        let e = catch!("mov rdx, [rcx]"; in("rcx") UNMAPPED, out("rdx") _);
        is(r, "#PF by a read", e, 14, 0);
        r.equal("CR2 has its address", cpu::cr2(), UNMAPPED);
        let e = catch!("mov [rcx + 8], al"; in("rcx") UNMAPPED, in("al") 0u8);
        is(r, "#PF by a write", e, 14, 2);
        r.equal("CR2 has its address", cpu::cr2(), UNMAPPED + 8);
        let e = catch!("push rbp", "mov rbp, {v}", "mov al, [rbp]", "pop rbp"; v = in(reg) 0u64, out("al") _);
        r.check("address 0 is mapped, and reads", e.is_none());
        let e = catch!("mov dr7, {v}"; v = in(reg) 1u64 << 32);
        is(r, "#GP by a reserved bit of DR7", e, 13, 0);
        let e =
            catch!("clts", "mov {v}, cr0", "or {v}, 8", "mov cr0, {v}", "fninit"; v = out(reg) _);
        is(r, "#NM by FNINIT with TS", e, 7, 0);
        asm!("clts");
    }
}

fn on_int_60(_: &mut Frame) {
    HITS.fetch_add(1, Ordering::SeqCst);
}

fn software_interrupts(r: &mut Report) {
    trap::handle(0x60, on_int_60);
    let before = HITS.load(Ordering::SeqCst);
    // SAFETY: the handler returns.
    unsafe { asm!("int 0x60") };
    r.equal(
        "INT n arrives once",
        HITS.load(Ordering::SeqCst),
        before + 1,
    );

    trap::handle(3, on_trap);
    let after: u64;
    // SAFETY: the handler returns.
    unsafe { asm!("int3", "lea {}, [rip + 0]", "2:", out(reg) after) };
    // INT3 is a trap: RIP is behind it. LEA has 7 bytes.
    r.equal(
        "#BP has the next instruction's address",
        RIP.load(Ordering::SeqCst),
        after - 7,
    );
}

fn debug(r: &mut Report) {
    trap::handle(1, on_debug);
    let before = HITS.load(Ordering::SeqCst);
    // SAFETY: the handler clears TF.
    unsafe { asm!("pushfq", "or qword ptr [rsp], 0x100", "popfq", "nop", "nop") };
    r.equal(
        "#DB by a single step",
        HITS.load(Ordering::SeqCst),
        before + 1,
    );
    r.check("DR6 says BS", DR6.load(Ordering::SeqCst) & 1 << 14 != 0);

    // Over an instruction that exits to the VMM as well.
    let before = HITS.load(Ordering::SeqCst);
    // SAFETY: as before; RBX is put back.
    unsafe {
        asm!("push rbx", "xor eax, eax", "pushfq", "or qword ptr [rsp], 0x100", "popfq",
            "cpuid", "nop", "pop rbx", out("eax") _, out("ecx") _, out("edx") _);
    }
    r.equal(
        "#DB by a single step over CPUID",
        HITS.load(Ordering::SeqCst),
        before + 1,
    );

    static WATCHED: AtomicU64 = AtomicU64::new(0);
    let place = (&raw const WATCHED) as u64;
    let before = HITS.load(Ordering::SeqCst);
    // SAFETY: watches 8 bytes for writes, and stops watching.
    unsafe {
        asm!("mov dr0, {}", in(reg) place);
        asm!("mov dr7, {}", in(reg) 0x9_0402u64);
        asm!("mov qword ptr [{}], 1", in(reg) place);
        asm!("mov dr7, {}", in(reg) 0x400u64);
    }
    if guests::tcg() {
        r.skip("#DB by a data breakpoint", "the emulated VMRUN sets none");
    } else {
        r.equal(
            "#DB by a data breakpoint",
            HITS.load(Ordering::SeqCst),
            before + 1,
        );
        r.check("DR6 says B0", DR6.load(Ordering::SeqCst) & 1 != 0);
    }
    let dr0: u64;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, dr0", out(reg) dr0) };
    r.equal("DR0 keeps its value", dr0, place);
}

fn page_fault_resumes(r: &mut Report) {
    trap::handle(14, on_fault_fix);
    let before = HITS.load(Ordering::SeqCst);
    // SAFETY: MOV AL, [RCX + disp8] has 3 bytes, which the handler skips.
    unsafe {
        asm!(".byte 0x8a, 0x41, 0x10", in("rcx") UNMAPPED, out("al") _);
    }
    r.equal(
        "#PF: the handler may skip the instruction",
        HITS.load(Ordering::SeqCst),
        before + 1,
    );
    r.equal("#PF: CR2", CR2.load(Ordering::SeqCst), UNMAPPED + 16);
}

fn double_fault(r: &mut Report) {
    static SEEN: AtomicU64 = AtomicU64::new(0);
    fn on_double(frame: &mut Frame) {
        SEEN.store(1 << 32 | frame.error, Ordering::SeqCst);
        let recover = trap::RECOVER.swap(0, Ordering::SeqCst);
        frame.rip = recover;
        // The stack that could not be used is replaced by what it was.
        frame.rsp = RSP.load(Ordering::SeqCst);
    }
    static RSP: AtomicU64 = AtomicU64::new(0);
    trap::handle(8, on_double);
    // SAFETY: UD2 on a stack that is not there makes #UD's delivery raise #PF, and
    // so a double fault, whose handler has a stack of its own and puts RSP back.
    unsafe {
        asm!(
            "lea {t}, [rip + 2f]",
            "mov [rip + {recover}], {t}",
            "mov [rip + {rsp}], rsp",
            "mov rsp, {bad}",
            "ud2",
            "2:",
            t = out(reg) _,
            bad = in(reg) UNMAPPED,
            recover = sym trap::RECOVER,
            rsp = sym RSP,
        );
    }
    r.equal(
        "#DF: a fault while delivering a fault",
        SEEN.load(Ordering::SeqCst),
        1 << 32,
    );
}

#[unsafe(no_mangle)]
extern "C" fn guest_main() -> ! {
    let mut r = Report::new("exceptions");
    trap::init();
    memory::init();
    software_interrupts(&mut r);
    faults(&mut r);
    debug(&mut r);
    double_fault(&mut r);
    page_fault_resumes(&mut r);
    r.finish()
}
