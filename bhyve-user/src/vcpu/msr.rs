//! MSRs that the kernel leaves to userland: a few that guests touch without
//! asking and that may do nothing, by the host's vendor as in bhyve(8).

use std::collections::BTreeSet;
use std::sync::Mutex;

use vmmapi::{RegName, Result};

use super::ops::VcpuOps;
use super::{GP, Next};
use crate::lock;

/// Whose MSRs the guest expects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// GenuineIntel.
    Intel,
    /// AuthenticAMD and HygonGenuine.
    Amd,
}

impl Vendor {
    /// The host's.
    pub fn host() -> Vendor {
        let leaf = std::arch::x86_64::__cpuid(0);
        // "Genu" or "Auth" and "Hygo".
        if leaf.ebx == 0x756e_6547 {
            Vendor::Intel
        } else {
            Vendor::Amd
        }
    }
}

const PLATFORM_ID: u32 = 0x17;
const BIOS_UPDT_TRIG: u32 = 0x79;
const BIOS_SIGN: u32 = 0x8b;
const RAPL_POWER_UNIT: u32 = 0x606;
const HWCR: u32 = 0xc001_0015;

fn read(vendor: Vendor, msr: u32) -> Option<u64> {
    match (vendor, msr) {
        (_, BIOS_SIGN) => Some(0),
        // Package, DRAM, PP0 and PP1 energy.
        (Vendor::Intel, PLATFORM_ID | 0x611 | 0x619 | 0x639 | 0x641) => Some(0),
        // The default of SDM Vol. 3B §14.10.1.
        (Vendor::Intel, RAPL_POWER_UNIT) => Some(0x000a_1003),
        // Its reset value, with MONITOR and MWAIT off.
        (Vendor::Amd, HWCR) => Some(0x0100_0010 | 1 << 9),
        // NB_CFG1, LS_CFG, IC_CFG, event selects and counters, SMM address and
        // mask, P-states.
        (
            Vendor::Amd,
            0xc001_001f
            | 0xc001_1020
            | 0xc001_1021
            | 0xc001_0000..=0xc001_0007
            | 0xc001_0112
            | 0xc001_0113
            | 0xc001_0061..=0xc001_0064,
        ) => Some(0),
        // Erratum 721 is worked around.
        (Vendor::Amd, 0xc001_1029) => Some(1),
        _ => None,
    }
}

fn write_ignored(vendor: Vendor, msr: u32) -> bool {
    match vendor {
        // Uncore counters of Sandy Bridge among them.
        Vendor::Intel => matches!(msr, 0xd04 | 0xc24 | BIOS_UPDT_TRIG | BIOS_SIGN),
        Vendor::Amd => matches!(
            msr,
            HWCR | 0xc001_001f | 0xc001_1020 | 0xc001_1021 | 0xc001_0000
                ..=0xc001_0007 | 0xc001_0062
        ),
    }
}

/// The rules, and which unknown MSRs have been spoken of.
pub struct Msrs {
    vendor: Vendor,
    strict: bool,
    named: Mutex<BTreeSet<(u32, bool)>>,
}

impl Msrs {
    /// With `strict`, an unknown MSR is a #GP for the guest; without, it reads
    /// as zero and ignores writes.
    pub fn new(vendor: Vendor, strict: bool) -> Msrs {
        Msrs {
            vendor,
            strict,
            named: Mutex::default(),
        }
    }

    /// Names an unknown MSR, once: a guest must not fill the host's log.
    fn name(&self, msr: u32, write: Option<u64>, vcpu: &impl VcpuOps) -> Result<bool> {
        if lock(&self.named).insert((msr, write.is_some())) {
            let then = if self.strict {
                "the guest gets #GP; with -w it is ignored"
            } else {
                "ignored"
            };
            match write {
                Some(value) => eprintln!("WRMSR {msr:#x} ({value:#x}): {then}\r"),
                None => eprintln!("RDMSR {msr:#x}: {then}\r"),
            }
        }
        if self.strict {
            vcpu.inject_fault(GP, Some(0))?;
        }
        Ok(self.strict)
    }

    /// RDMSR.
    pub fn read(&self, vcpu: &impl VcpuOps, msr: u32) -> Result<Next> {
        let value = match read(self.vendor, msr) {
            Some(v) => v,
            None if self.name(msr, None, vcpu)? => return Ok(Next::Run),
            None => 0,
        };
        vcpu.set_register(RegName::Rax, value & 0xffff_ffff)?;
        vcpu.set_register(RegName::Rdx, value >> 32)?;
        Ok(Next::Run)
    }

    /// WRMSR.
    pub fn write(&self, vcpu: &impl VcpuOps, msr: u32, value: u64) -> Result<Next> {
        if !write_ignored(self.vendor, msr) {
            self.name(msr, Some(value), vcpu)?;
        }
        Ok(Next::Run)
    }
}

#[cfg(test)]
mod tests {
    use super::super::ops::fake::Fake;
    use super::*;

    #[test]
    fn an_unknown_msr_is_the_guests_fault_and_not_its_end() {
        let m = Msrs::new(Vendor::Intel, true);
        let cpu = Fake::new();
        assert_eq!(m.read(&cpu, 0x1234).unwrap(), Next::Run);
        assert_eq!(m.write(&cpu, 0x1234, 1).unwrap(), Next::Run);
        assert_eq!(*cpu.faults.borrow(), [(13, Some(0)), (13, Some(0))]);
        assert!(cpu.regs.borrow().is_empty());
    }

    #[test]
    fn without_strictness_it_reads_as_zero() {
        let m = Msrs::new(Vendor::Intel, false);
        let cpu = Fake::new();
        m.read(&cpu, 0x1234).unwrap();
        m.write(&cpu, 0x1234, 1).unwrap();
        assert!(cpu.faults.borrow().is_empty());
        assert_eq!(
            (cpu.get(RegName::Rax), cpu.get(RegName::Rdx)),
            (Some(0), Some(0))
        );
    }

    #[test]
    fn vendors_differ() {
        let cpu = Fake::new();
        Msrs::new(Vendor::Intel, true).read(&cpu, 0x606).unwrap();
        assert_eq!(cpu.get(RegName::Rax), Some(0x000a_1003));
        Msrs::new(Vendor::Amd, true).read(&cpu, HWCR).unwrap();
        assert_eq!(cpu.get(RegName::Rax), Some(0x0100_0210));
        assert!(cpu.faults.borrow().is_empty());
        Msrs::new(Vendor::Amd, true).read(&cpu, 0x606).unwrap();
        assert_eq!(cpu.faults.borrow().len(), 1);
    }
}
