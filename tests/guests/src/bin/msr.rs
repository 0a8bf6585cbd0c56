//! Model-specific registers: values at reset, what can be written and read back,
//! and what must raise #GP.
#![no_std]
#![no_main]

use core::arch::asm;
use guests::report::Report;
use guests::{catch, cpu, memory, trap};

const TSC: u32 = 0x10;
const APIC_BASE: u32 = 0x1b;
const TSC_ADJUST: u32 = 0x3b;
const MTRR_CAP: u32 = 0xfe;
const SYSENTER_CS: u32 = 0x174;
const SYSENTER_ESP: u32 = 0x175;
const SYSENTER_EIP: u32 = 0x176;
const MISC_ENABLE: u32 = 0x1a0;
const MTRR_PHYSBASE0: u32 = 0x200;
const PAT: u32 = 0x277;
const MTRR_DEF_TYPE: u32 = 0x2ff;
const EFER: u32 = 0xc000_0080;
const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const CSTAR: u32 = 0xc000_0083;
const SFMASK: u32 = 0xc000_0084;
const FS_BASE: u32 = 0xc000_0100;
const GS_BASE: u32 = 0xc000_0101;
const KERNEL_GS_BASE: u32 = 0xc000_0102;
const TSC_AUX: u32 = 0xc000_0103;

/// RDMSR that may fault.
fn read(msr: u32) -> Option<u64> {
    let (low, high): (u32, u32);
    // SAFETY: reading changes nothing, and a fault is caught.
    let e = unsafe {
        catch!("xor eax, eax", "xor edx, edx", "rdmsr"; in("ecx") msr, out("eax") low, out("edx") high)
    };
    match e {
        None => Some(u64::from(high) << 32 | u64::from(low)),
        Some(_) => None,
    }
}

/// WRMSR that may fault; true if it did with #GP(0).
fn write_faults(msr: u32, value: u64) -> bool {
    // SAFETY: callers write what is harmless or faults.
    let e = unsafe {
        catch!("wrmsr"; in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32)
    };
    matches!(e, Some(e) if e.vector == 13 && e.error == 0)
}

fn round_trip(r: &mut Report, what: &str, msr: u32, value: u64) {
    let Some(before) = read(msr) else {
        r.check(what, false);
        return;
    };
    let written = !write_faults(msr, value);
    let back = read(msr);
    write_faults(msr, before);
    r.check("it can be written", written);
    r.equal(what, back.unwrap_or(!value), value);
}

fn system_calls(r: &mut Report) {
    const HIGH: u64 = 0xffff_ffff_8123_4568;
    round_trip(r, "STAR", STAR, 0x0013_0008_0000_0000);
    round_trip(r, "LSTAR", LSTAR, HIGH);
    round_trip(r, "CSTAR", CSTAR, HIGH);
    round_trip(r, "SFMASK", SFMASK, 0x4_7700);
    round_trip(r, "SYSENTER_CS", SYSENTER_CS, 8);
    round_trip(r, "SYSENTER_ESP", SYSENTER_ESP, HIGH);
    round_trip(r, "SYSENTER_EIP", SYSENTER_EIP, HIGH);
    round_trip(r, "FS_BASE", FS_BASE, 0x1234_5678_9abc);
    round_trip(r, "GS_BASE", GS_BASE, HIGH);
    round_trip(r, "KERNEL_GS_BASE", KERNEL_GS_BASE, HIGH + 8);
    for msr in [LSTAR, FS_BASE, GS_BASE, KERNEL_GS_BASE, SYSENTER_EIP] {
        if guests::tcg() {
            r.skip(
                "#GP by a non-canonical address",
                "the emulated CPU does not check it",
            );
            break;
        }
        r.check("#GP by a non-canonical address", write_faults(msr, 1 << 63));
    }
    let before = cpu::rdmsr(GS_BASE);
    // SAFETY: nobody uses GS, and both bases come back.
    unsafe {
        cpu::wrmsr(KERNEL_GS_BASE, 0x1000);
        cpu::wrmsr(GS_BASE, 0x2000);
        asm!("swapgs");
    }
    r.equal("SWAPGS: GS_BASE", cpu::rdmsr(GS_BASE), 0x1000);
    r.equal("SWAPGS: KERNEL_GS_BASE", cpu::rdmsr(KERNEL_GS_BASE), 0x2000);
    // SAFETY: as above.
    unsafe { cpu::wrmsr(GS_BASE, before) };
}

fn efer(r: &mut Report) {
    let has_nx = cpu::cpuid(0x8000_0001, 0).edx & 1 << 20 != 0;
    r.equal("EFER: LMA|LME", cpu::rdmsr(EFER) & 0x500, 0x500);
    round_trip(r, "EFER: SCE can be set", EFER, cpu::rdmsr(EFER) | 1);
    if has_nx {
        round_trip(r, "EFER: NXE can be set", EFER, cpu::rdmsr(EFER) | 1 << 11);
    }
    r.check(
        "EFER: #GP by a reserved bit",
        write_faults(EFER, cpu::rdmsr(EFER) | 1 << 63),
    );
    r.check(
        "EFER: #GP by clearing LME with paging",
        write_faults(EFER, cpu::rdmsr(EFER) & !0x100),
    );
    r.equal("EFER: unchanged", cpu::rdmsr(EFER) & 0x500, 0x500);
}

fn memory_types(r: &mut Report) {
    r.equal("PAT at reset", cpu::rdmsr(PAT), 0x0007_0406_0007_0406);
    round_trip(r, "PAT", PAT, 0x0007_0406_0007_0106);
    r.check(
        "PAT: #GP by a reserved type",
        write_faults(PAT, 0x0007_0406_0007_0402),
    );
    if cpu::cpuid(1, 0).edx & 1 << 12 == 0 {
        r.skip("MTRRs", "CPUID does not offer them");
        return;
    }
    let ranges = cpu::rdmsr(MTRR_CAP) & 0xff;
    r.check("MTRRs: IA32_MTRRCAP names up to 10 ranges", ranges <= 10);
    round_trip(
        r,
        "MTRRs: default type",
        MTRR_DEF_TYPE,
        cpu::rdmsr(MTRR_DEF_TYPE) | 0x800,
    );
    if ranges > 0 {
        round_trip(r, "MTRRs: a range", MTRR_PHYSBASE0, 0x8000_0006);
    }
    r.check(
        "MTRRs: #GP by writing what is read-only",
        write_faults(MTRR_CAP, 0),
    );
}

fn time(r: &mut Report) {
    let first = cpu::rdmsr(TSC);
    let second = cpu::rdtsc();
    let third = cpu::rdmsr(TSC);
    r.check(
        "TSC: the MSR and RDTSC agree",
        first < second && second < third,
    );
    if cpu::cpuid(7, 0).ebx & 1 << 1 != 0 {
        let adjust = cpu::rdmsr(TSC_ADJUST);
        let ahead = 1 << 40;
        let before = cpu::rdtsc();
        // SAFETY: moves the TSC, and back.
        unsafe { cpu::wrmsr(TSC_ADJUST, adjust.wrapping_add(ahead)) };
        let after = cpu::rdtsc();
        // SAFETY: as above.
        unsafe { cpu::wrmsr(TSC_ADJUST, adjust) };
        r.check(
            "TSC_ADJUST: moves the TSC",
            after.wrapping_sub(before) >> 40 == 1,
        );
        r.check(
            "TSC_ADJUST: and back",
            cpu::rdtsc().wrapping_sub(before) < ahead,
        );
    } else {
        r.skip("TSC_ADJUST", "CPUID does not offer it");
    }
    if cpu::cpuid(0x8000_0001, 0).edx & 1 << 27 != 0 {
        round_trip(r, "TSC_AUX", TSC_AUX, 0x1234);
        // SAFETY: nobody uses TSC_AUX.
        unsafe { cpu::wrmsr(TSC_AUX, 77) };
        let aux: u32;
        // SAFETY: reads counters.
        unsafe { asm!("rdtscp", out("eax") _, out("edx") _, out("ecx") aux) };
        r.equal("RDTSCP gives TSC_AUX", u64::from(aux), 77);
    }
    if cpu::cpuid(0, 0).eax >= 0x15 {
        let leaf = cpu::cpuid(0x15, 0);
        if leaf.eax != 0 && leaf.ebx != 0 && leaf.ecx != 0 {
            let hz = u64::from(leaf.ecx) * u64::from(leaf.ebx) / u64::from(leaf.eax);
            guests::println!("msr: CPUID states a TSC of {hz} Hz");
            // Against the PM timer of 3.579545 MHz over about 10 ms.
            let ticks = |start: u32| cpu::inl(0x408).wrapping_sub(start) & 0xff_ffff;
            let start = cpu::inl(0x408);
            let from = cpu::rdtsc();
            let mut waited = 0;
            while waited < 35_795 && cpu::rdtsc() - from < hz {
                waited = ticks(start);
            }
            let passed = cpu::rdtsc() - from;
            let measured = passed * 3_579_545 / u64::from(waited.max(1));
            guests::println!("msr: measured {measured} Hz");
            r.check(
                "the TSC runs as CPUID states, within 2%",
                measured.abs_diff(hz) < hz / 50,
            );
        }
    }
}

#[unsafe(no_mangle)]
extern "C" fn guest_main() -> ! {
    let mut r = Report::new("msr");
    trap::init();
    memory::init();
    efer(&mut r);
    system_calls(&mut r);
    memory_types(&mut r);
    time(&mut r);
    r.check(
        "APIC_BASE: #GP by a reserved bit",
        write_faults(APIC_BASE, 1 << 63 | 0xfee0_0900),
    );
    // Kernels read it on every Intel CPU; bare Bochs has none.
    if cpu::cpuid(1, 0).ecx & 1 << 31 != 0 {
        r.check("MISC_ENABLE is there", read(MISC_ENABLE).is_some());
    }
    // VMX and SVM are not offered, and so neither are their MSRs.
    if cpu::cpuid(1, 0).ecx & 1 << 5 == 0 {
        r.check("#GP by IA32_VMX_BASIC without VMX", read(0x480).is_none());
        // SAFETY: setting VMXE where there is no VMX faults.
        let e = unsafe { catch!("mov cr4, {v}"; v = in(reg) cpu::cr4() | 1 << 13) };
        r.check(
            "#GP by CR4.VMXE without VMX",
            matches!(e, Some(e) if e.vector == 13),
        );
    }
    r.check("#GP by an MSR that no CPU has", read(0x1234_5678).is_none());
    r.finish()
}
