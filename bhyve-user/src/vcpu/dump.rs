//! What is said when a guest cannot go on.

use std::fmt::Write as _;

use vmmapi::{Exit, GuestMemory, RegName, Vcpu, VmExit};

use crate::stats;

const GENERAL: [RegName; 18] = {
    use RegName::*;
    [
        Rax, Rbx, Rcx, Rdx, Rsi, Rdi, Rbp, Rsp, R8, R9, R10, R11, R12, R13, R14, R15, Rip, Rflags,
    ]
};
const CONTROL: [RegName; 6] = {
    use RegName::*;
    [Cr0, Cr2, Cr3, Cr4, Efer, Dr7]
};
const SEGMENTS: [RegName; 8] = {
    use RegName::*;
    [Cs, Ss, Ds, Es, Fs, Gs, Ldtr, Tr]
};
const TABLES: [RegName; 2] = [RegName::Gdtr, RegName::Idtr];

fn registers(out: &mut String, vcpu: &Vcpu, names: &[RegName]) {
    for (i, &reg) in names.iter().enumerate() {
        let name = format!("{reg:?}").to_uppercase();
        let value = vcpu
            .register(reg)
            .map_or_else(|_| "?".repeat(16), |v| format!("{v:016x}"));
        let end = if i % 3 == 2 || i + 1 == names.len() {
            "\r\n"
        } else {
            "  "
        };
        let _ = write!(out, "{name:>6} {value}{end}");
    }
}

/// Reason, registers and the bytes at RIP; lines end with CR LF, because the
/// terminal may be raw.
pub fn report(vcpu: &Vcpu, memory: &GuestMemory, exit: &VmExit, why: &str) -> String {
    let mut out = format!("\r\nvCPU {} cannot go on: {why}\r\n", vcpu.id());
    let _ = write!(
        out,
        "exit {} at rip {:#x}, instruction length {}\r\n",
        stats::kind(&exit.exit),
        exit.rip,
        exit.inst_length
    );
    if let Exit::InstEmul(e) = &exit.exit {
        let _ = write!(
            out,
            "guest-physical {:#x}, linear {:#x}, instruction {:02x?}\r\n",
            e.gpa,
            e.gla,
            e.bytes()
        );
    }
    registers(&mut out, vcpu, &GENERAL);
    registers(&mut out, vcpu, &CONTROL);
    for reg in SEGMENTS {
        let name = format!("{reg:?}").to_uppercase();
        let selector = vcpu.register(reg).unwrap_or(0);
        if let Ok(d) = vcpu.desc(reg) {
            let _ = write!(
                out,
                "{name:>6} {selector:04x}  base {:016x}  limit {:08x}  access {:05x}\r\n",
                d.base, d.limit, d.access
            );
        }
    }
    for reg in TABLES {
        let name = format!("{reg:?}").to_uppercase();
        if let Ok(d) = vcpu.desc(reg) {
            let _ = write!(
                out,
                "{name:>6}       base {:016x}  limit {:04x}\r\n",
                d.base, d.limit
            );
        }
    }
    let base = vcpu.desc(RegName::Cs).map_or(0, |d| d.base);
    let bytes = vcpu.peek(memory, exit.rip.wrapping_add(base), 16);
    let _ = write!(out, "bytes at RIP: {bytes:02x?}\r\n");
    let _ = write!(
        out,
        "The VM is still there: look into it with bhyvectl --get-all --vm={}, then bhyvectl --destroy --vm={}.\r\n",
        vcpu.vm().name(),
        vcpu.vm().name()
    );
    out
}
