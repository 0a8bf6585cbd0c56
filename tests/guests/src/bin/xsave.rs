//! FPU state: XSETBV's rules, SSE and AVX registers that survive exits, XSAVE and
//! XRSTOR.
#![no_std]
#![no_main]

use core::arch::asm;
use guests::report::Report;
use guests::{catch, cpu, memory, trap};

const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;
const CR4_OSXSAVE: u64 = 1 << 18;
const X87: u64 = 1;
const SSE: u64 = 2;
const AVX: u64 = 4;

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

#[unsafe(no_mangle)]
extern "C" fn guest_main() -> ! {
    let mut r = Report::new("xsave");
    trap::init();
    memory::init();
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
    r.finish()
}
