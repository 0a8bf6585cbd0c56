//! FPU state: XSETBV's rules, SSE, AVX and AVX-512 registers that survive exits and
//! the host's switches between vCPUs, XSAVE and XRSTOR.
#![no_std]
#![no_main]

use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};
use guests::apic::Apic;
use guests::report::Report;
use guests::{catch, cpu, memory, smp, trap};

const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;
const CR4_OSXSAVE: u64 = 1 << 18;
const X87: u64 = 1;
const SSE: u64 = 2;
const AVX: u64 = 4;
/// Opmask, ZMM_Hi256, Hi16_ZMM.
const AVX512: u64 = 0xe0;
/// How long two CPUs hold their registers: many of the host's time slices.
const HOLD: u64 = 20_000_000;

#[repr(C, align(64))]
struct Area([u64; 1024]);
static mut SAVED: Area = Area([0; 1024]);

fn xgetbv() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reads XCR0.
    unsafe { asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high) };
    u64::from(high) << 32 | u64::from(low)
}

/// XSETBV; the vector it raised, if any.
fn xsetbv(index: u32, value: u64) -> Option<u64> {
    // SAFETY: no compiled code here uses these registers.
    let e = unsafe {
        catch!("xsetbv"; in("ecx") index, in("eax") value as u32, in("edx") (value >> 32) as u32)
    };
    e.map(|e| e.vector)
}

/// Fills XMM0 to XMM15 (or YMM) with numbers, makes exits, and reads them back.
fn survives(avx: bool) -> bool {
    let mut out = [0u64; 8];
    let pattern = [
        0x1111_2222_3333_4444u64,
        0x5555_6666_7777_8888,
        !0,
        0x0123_4567_89ab_cdef,
    ];
    // SAFETY: SSE (and AVX where asked for) is on; nothing else uses the registers.
    unsafe {
        if avx {
            asm!(
                "vmovdqu ymm0, [{p}]",
                "vmovdqu ymm15, [{p}]",
                "push rbx",
                "mov {n:e}, 50",
                "2:",
                "xor eax, eax",
                "xor ecx, ecx",
                "cpuid",
                "mov dx, 0x1ee0",
                "out dx, al",
                "dec {n:e}",
                "jnz 2b",
                "pop rbx",
                "vmovdqu [{o}], ymm0",
                "vmovdqu [{o} + 32], ymm15",
                p = in(reg) &pattern,
                o = in(reg) &mut out,
                n = out(reg) _,
                out("eax") _, out("ecx") _, out("edx") _,
            );
        } else {
            asm!(
                "movdqu xmm0, [{p}]",
                "movdqu xmm15, [{p} + 16]",
                "push rbx",
                "mov {n:e}, 50",
                "2:",
                "xor eax, eax",
                "xor ecx, ecx",
                "cpuid",
                "mov dx, 0x1ee0",
                "out dx, al",
                "dec {n:e}",
                "jnz 2b",
                "pop rbx",
                "movdqu [{o}], xmm0",
                "movdqu [{o} + 16], xmm15",
                p = in(reg) &pattern,
                o = in(reg) &mut out,
                n = out(reg) _,
                out("eax") _, out("ecx") _, out("edx") _,
            );
        }
    }
    if avx {
        out[..4] == pattern && out[4..] == pattern
    } else {
        out[..4] == pattern
    }
}

fn x87(r: &mut Report) {
    let mut control = 0u16;
    let mut value = 0f64.to_bits();
    // SAFETY: no compiled code here uses the x87.
    unsafe {
        asm!("fninit", "fnstcw [{}]", in(reg) &mut control);
        r.equal("x87: FNINIT's control word", u64::from(control), 0x37f);
        asm!("fldpi");
        cpu::outb(0x1ee0, 0);
        cpu::cpuid(0, 0);
        asm!("fstp qword ptr [{}]", in(reg) &mut value);
    }
    r.equal(
        "x87: pi survives exits",
        value,
        core::f64::consts::PI.to_bits(),
    );
}

fn xsave(r: &mut Report, features: u64) {
    let area = &raw mut SAVED;
    let (low, high) = (features as u32, (features >> 32) as u32);
    let pattern = [7u64, 8, 9, 10];
    let mut out = [0u64; 4];
    // SAFETY: the area is aligned and, as CPUID says, large enough.
    unsafe {
        (*area).0 = [0; 1024];
        if features & AVX != 0 {
            asm!("vmovdqu ymm3, [{}]", in(reg) &pattern);
        } else {
            asm!("movdqu xmm3, [{}]", in(reg) &pattern);
        }
        asm!("xsave64 [{}]", in(reg) area, in("eax") low, in("edx") high);
        asm!("pxor xmm3, xmm3");
        cpu::cpuid(0, 0);
        asm!("xrstor64 [{}]", in(reg) area, in("eax") low, in("edx") high);
        if features & AVX != 0 {
            asm!("vmovdqu [{}], ymm3", in(reg) &mut out);
        } else {
            asm!("movdqu [{}], xmm3", in(reg) &mut out);
        }
        // XSTATE_BV, behind the 512 bytes of FXSAVE.
        r.equal(
            "XSAVE: its header names what was saved",
            (*area).0[64] & SSE,
            SSE,
        );
    }
    let words = if features & AVX != 0 { 4 } else { 2 };
    r.check(
        "XRSTOR brings the registers back",
        out[..words] == pattern[..words],
    );
}

/// Loops until the TSC is at `until`, with an exit now and then.
macro_rules! hold {
    ($until:expr, [$($load:literal),*], [$($store:literal),*], $p:expr, $o:expr $(, $k:ident)?) => {
        asm!(
            $($load,)*
            "push rbx",
            "2:",
            "mov ecx, 500",
            "3:",
            "dec ecx",
            "jnz 3b",
            "xor eax, eax",
            "cpuid",
            "rdtsc",
            "shl rdx, 32",
            "or rax, rdx",
            "cmp rax, {u}",
            "jb 2b",
            "pop rbx",
            $($store,)*
            u = in(reg) $until,
            p = in(reg) $p,
            o = in(reg) $o,
            $(k = inout(reg) $k,)?
            out("rax") _, out("rcx") _, out("rdx") _,
        )
    };
}

/// Whether the registers of the widest kind that XCR0 has on are the same at `until`.
fn holds(seed: u64, until: u64) -> bool {
    let mut pattern = [0u64; 8];
    for (n, word) in pattern.iter_mut().enumerate() {
        *word = seed.rotate_left(8 * n as u32) ^ n as u64;
    }
    let mut out = [[0u64; 8]; 3];
    let mut mask = seed as u32 & 0xffff;
    let words = match xgetbv() {
        x if x & AVX512 == AVX512 => 8,
        x if x & AVX != 0 => 4,
        _ => 2,
    };
    let (p, o) = (&raw const pattern, &raw mut out);
    // SAFETY: XCR0 has the registers, which nothing else uses, and 192 bytes of room.
    unsafe {
        match words {
            8 => hold!(
                until,
                [
                    "vmovdqu64 zmm1, [{p}]",
                    "vmovdqu64 zmm15, [{p}]",
                    "vmovdqu64 zmm31, [{p}]",
                    "kmovw k1, {k:e}",
                    "xor {k:e}, {k:e}"
                ],
                [
                    "vmovdqu64 [{o}], zmm1",
                    "vmovdqu64 [{o} + 64], zmm15",
                    "vmovdqu64 [{o} + 128], zmm31",
                    "kmovw {k:e}, k1"
                ],
                p,
                o,
                mask
            ),
            4 => hold!(
                until,
                [
                    "vmovdqu ymm1, [{p}]",
                    "vmovdqu ymm8, [{p}]",
                    "vmovdqu ymm15, [{p}]"
                ],
                [
                    "vmovdqu [{o}], ymm1",
                    "vmovdqu [{o} + 64], ymm8",
                    "vmovdqu [{o} + 128], ymm15"
                ],
                p,
                o
            ),
            _ => hold!(
                until,
                [
                    "movdqu xmm1, [{p}]",
                    "movdqu xmm8, [{p}]",
                    "movdqu xmm15, [{p}]"
                ],
                [
                    "movdqu [{o}], xmm1",
                    "movdqu [{o} + 64], xmm8",
                    "movdqu [{o} + 128], xmm15"
                ],
                p,
                o
            ),
        }
    }
    mask == seed as u32 & 0xffff && out.iter().all(|o| o[..words] == pattern[..words])
}

/// Turns on all that CPUID offers; false if XSETBV does not take it.
fn all_on() -> bool {
    // SAFETY: turns the FPU and SSE on (EM off, MP on; OSFXSR), and XSAVE, which the
    // caller has found.
    unsafe {
        cpu::set_cr0(cpu::cr0() & !0xc | 2);
        cpu::set_cr4(cpu::cr4() | CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_OSXSAVE);
    }
    let leaf = cpu::cpuid(0xd, 0);
    let offered = u64::from(leaf.edx) << 32 | u64::from(leaf.eax);
    xsetbv(0, offered).is_none() && xgetbv() == offered
}

/// When the two CPUs may stop holding; 0 until the first one says.
static UNTIL: AtomicU64 = AtomicU64::new(0);
/// What the other CPU found: 1 good, 2 bad.
static OTHER: AtomicU64 = AtomicU64::new(0);

fn other(_: u32) -> ! {
    let on = all_on();
    while UNTIL.load(Ordering::SeqCst) == 0 {
        cpu::pause();
    }
    let good = on && holds(0xfedc_ba98_7654_3210, UNTIL.load(Ordering::SeqCst));
    OTHER.store(if good { 1 } else { 2 }, Ordering::SeqCst);
    loop {
        cpu::halt();
    }
}

/// Two CPUs hold different values in their registers at the same time.
fn two(r: &mut Report, cr3: u64) {
    let apic = Apic::current();
    apic.enable();
    smp::prepare(cr3, other);
    if !smp::start(apic, 1) {
        if smp::promised() {
            r.check("SMP: the other CPU starts", false);
        } else {
            r.skip("SMP", "no other CPU answers");
        }
        return;
    }
    let until = cpu::rdtsc() + HOLD;
    UNTIL.store(until, Ordering::SeqCst);
    r.check(
        "SMP: registers hold beside another CPU's",
        holds(0x0123_4567_89ab_cdef, until),
    );
    while OTHER.load(Ordering::SeqCst) == 0 && cpu::rdtsc() < until + 10 * HOLD {
        cpu::pause();
    }
    r.equal(
        "SMP: and so do the other's",
        OTHER.load(Ordering::SeqCst),
        1,
    );
}

#[unsafe(no_mangle)]
extern "C" fn guest_main() -> ! {
    let mut r = Report::new("xsave");
    trap::init();
    let cr3 = memory::init();
    // SAFETY: turns the FPU and SSE on (EM off, MP on; OSFXSR).
    unsafe {
        cpu::set_cr0(cpu::cr0() & !0xc | 2);
        cpu::set_cr4(cpu::cr4() | CR4_OSFXSR | CR4_OSXMMEXCPT);
    }
    x87(&mut r);
    r.check("SSE: XMM0 and XMM15 survive exits", survives(false));

    if cpu::cpuid(1, 0).ecx & 1 << 26 == 0 {
        r.skip("XSAVE", "CPUID does not offer it");
        // SAFETY: faults, as there is no such bit.
        let e = unsafe { catch!("mov cr4, {v}"; v = in(reg) cpu::cr4() | CR4_OSXSAVE) };
        r.check(
            "#GP by CR4.OSXSAVE without XSAVE",
            matches!(e, Some(e) if e.vector == 13),
        );
        r.finish();
    }
    r.check(
        "OSXSAVE is 0 in CPUID before CR4 has it",
        cpu::cpuid(1, 0).ecx & 1 << 27 == 0,
    );
    r.check(
        "#UD by XSETBV before CR4.OSXSAVE",
        xsetbv(0, X87) == Some(6),
    );
    // SAFETY: XSAVE is there.
    unsafe { cpu::set_cr4(cpu::cr4() | CR4_OSXSAVE) };
    r.check(
        "OSXSAVE is 1 in CPUID after",
        cpu::cpuid(1, 0).ecx & 1 << 27 != 0,
    );
    r.equal("XCR0 at reset", xgetbv(), X87);
    let leaf = cpu::cpuid(0xd, 0);
    let offered = u64::from(leaf.edx) << 32 | u64::from(leaf.eax);
    r.check("CPUID offers x87 and SSE state", offered & 3 == 3);
    r.equal("x87 state alone takes 576 bytes", u64::from(leaf.ebx), 576);

    r.check("#GP by XCR0 without x87", xsetbv(0, SSE) == Some(13));
    r.check("#GP by AVX without SSE", xsetbv(0, X87 | AVX) == Some(13));
    r.check(
        "#GP by what CPUID does not offer",
        xsetbv(0, offered | 1 << 62) == Some(13),
    );
    r.check("#GP by XCR1", xsetbv(1, X87) == Some(13));
    r.equal("XCR0 is unchanged", xgetbv(), X87);

    r.check("x87 and SSE can be enabled", xsetbv(0, X87 | SSE).is_none());
    xsave(&mut r, X87 | SSE);
    if offered & AVX != 0 {
        r.check("AVX can be enabled", xsetbv(0, X87 | SSE | AVX).is_none());
        r.equal("XCR0 has it", xgetbv(), X87 | SSE | AVX);
        r.equal(
            "CPUID's size follows XCR0",
            u64::from(cpu::cpuid(0xd, 0).ebx),
            832,
        );
        r.check("AVX: YMM0 and YMM15 survive exits", survives(true));
        xsave(&mut r, X87 | SSE | AVX);
    } else {
        r.skip("AVX", "CPUID does not offer it");
    }
    let most = u64::from(cpu::cpuid(0xd, 0).ecx);
    r.check(
        "the area for everything holds what is enabled",
        most >= u64::from(cpu::cpuid(0xd, 0).ebx),
    );
    if offered & AVX512 != 0 {
        r.check(
            "#GP by a part of AVX-512",
            xsetbv(0, X87 | SSE | AVX | AVX512 & !0x40) == Some(13),
        );
        r.check(
            "#GP by AVX-512 without AVX",
            xsetbv(0, X87 | SSE | AVX512) == Some(13),
        );
    } else {
        r.skip("AVX-512", "CPUID does not offer it");
    }
    r.check("all that is offered can be enabled", all_on());
    r.equal(
        "and takes what CPUID said",
        u64::from(cpu::cpuid(0xd, 0).ebx),
        most,
    );
    r.check(
        "registers hold for long",
        holds(0x5555_aaaa_3333_cccc, cpu::rdtsc() + HOLD / 4),
    );
    two(&mut r, cr3);
    r.finish()
}
