//! Fields of the VMCS (SDM Vol. 3D appendix B) and the VMCB (APM Vol. 2
//! appendix B) that bhyvectl(8) shows.

use vmmapi::abi::limits::{vmcb_field, vmcs_field};

/// How a value is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// `0x%016lx`.
    Hex16,
    /// `0x%08x`.
    Hex8,
    /// `0x%04lx`.
    Hex4,
    /// `%#lx`.
    Alternate,
}

/// A field: what it is called, what stands between name and value.
pub(super) struct Field {
    pub(super) label: &'static str,
    tabs: &'static str,
    pub(super) number: u32,
    format: Format,
}

impl Field {
    pub(super) fn line(&self, cpu: u32, value: u64) -> String {
        let value = match self.format {
            Format::Hex16 => format!("0x{value:016x}"),
            Format::Hex8 => format!("0x{:08x}", value & 0xffff_ffff),
            Format::Hex4 => format!("0x{value:04x}"),
            Format::Alternate => alternate(value),
        };
        format!("{}[{cpu}]{}{value}", self.label, self.tabs)
    }

    pub(super) fn absent(&self, cpu: u32) -> String {
        format!("{}[{cpu}]{}n/a", self.label, self.tabs)
    }
}

/// `%#lx` of printf(3), which gives 0 no prefix.
pub(super) fn alternate(value: u64) -> String {
    if value == 0 {
        "0".into()
    } else {
        format!("{value:#x}")
    }
}

/// An option and what it shows on either kind of CPU.
pub(super) struct Group {
    pub(super) option: &'static str,
    intel: &'static [Field],
    amd: &'static [Field],
}

impl Group {
    /// Whether it has something to show on this kind of CPU.
    pub(super) fn is_of(&self, intel: bool) -> bool {
        if intel {
            !self.intel.is_empty()
        } else {
            !self.amd.is_empty()
        }
    }

    /// What it shows; for the other vendor's options, what it would show there,
    /// so that the kernel's refusal names the field.
    pub(super) fn fields_of(&self, intel: bool) -> &'static [Field] {
        if intel && !self.intel.is_empty() || self.amd.is_empty() {
            self.intel
        } else {
            self.amd
        }
    }
}

const fn vmcs(label: &'static str, tabs: &'static str, encoding: u16, format: Format) -> Field {
    Field {
        label,
        tabs,
        number: vmcs_field(encoding),
        format,
    }
}

const fn vmcb(
    label: &'static str,
    tabs: &'static str,
    offset: u16,
    bytes: u8,
    format: Format,
) -> Field {
    Field {
        label,
        tabs,
        number: vmcb_field(offset, bytes),
        format,
    }
}

use Format::{Alternate, Hex4, Hex8, Hex16};

macro_rules! groups {
    ($($option:literal intel [$($i:expr),*] amd [$($a:expr),*];)*) => {
        /// All options of this kind, in the order of output.
        pub(super) const GROUPS: &[Group] = &[$(
            Group { option: $option, intel: &[$($i),*], amd: &[$($a),*] },
        )*];
    };
}

groups! {
    "get-vmcs-cr0-mask" intel [vmcs("cr0_mask", "\t\t", 0x6000, Hex16)] amd [];
    "get-vmcs-cr0-shadow" intel [vmcs("cr0_shadow", "\t\t", 0x6004, Hex16)] amd [];
    "get-vmcs-cr4-mask" intel [vmcs("cr4_mask", "\t\t", 0x6002, Hex16)] amd [];
    "get-vmcs-cr4-shadow" intel [vmcs("cr4_shadow", "\t\t", 0x6006, Hex16)] amd [];
    "get-vmcs-cr3-targets" intel [
        vmcs("cr3_target_count", "\t", 0x400a, Hex16),
        vmcs("cr3_target0", "\t\t", 0x6008, Hex16),
        vmcs("cr3_target1", "\t\t", 0x600a, Hex16),
        vmcs("cr3_target2", "\t\t", 0x600c, Hex16),
        vmcs("cr3_target3", "\t\t", 0x600e, Hex16)
    ] amd [];
    "get-vmcs-pinbased-ctls" intel [vmcs("pinbased_ctls", "\t", 0x4000, Hex16)] amd [];
    "get-vmcs-procbased-ctls" intel [vmcs("procbased_ctls", "\t", 0x4002, Hex16)] amd [];
    "get-vmcs-procbased-ctls2" intel [vmcs("procbased_ctls2", "\t", 0x401e, Hex16)] amd [];
    "get-vmcs-guest-linear-address" intel [vmcs("gla", "\t\t", 0x640a, Hex16)] amd [];
    "get-vmcs-guest-physical-address" intel [vmcs("gpa", "\t\t", 0x2400, Hex16)] amd [];
    "get-vmcs-entry-interruption-info" intel [
        vmcs("entry_interruption_info", "\t", 0x4016, Hex16)
    ] amd [];
    "get-vmcs-tpr-threshold" intel [vmcs("tpr_threshold", "\t", 0x401c, Hex16)] amd [];
    "get-vmcs-instruction-error" intel [vmcs("instruction_error", "\t", 0x4400, Hex16)] amd [];
    "get-vmcs-exit-ctls" intel [vmcs("exit_ctls", "\t\t", 0x400c, Hex16)] amd [];
    "get-vmcs-entry-ctls" intel [vmcs("entry_ctls", "\t\t", 0x4012, Hex16)] amd [];
    "get-vmcs-host-pat" intel [vmcs("host_pat", "\t\t", 0x2c00, Hex16)] amd [];
    "get-vmcs-host-cr0" intel [vmcs("host_cr0", "\t\t", 0x6c00, Hex16)] amd [];
    "get-vmcs-host-cr3" intel [vmcs("host_cr3", "\t\t", 0x6c02, Hex16)] amd [];
    "get-vmcs-host-cr4" intel [vmcs("host_cr4", "\t\t", 0x6c04, Hex16)] amd [];
    "get-vmcs-host-rip" intel [vmcs("host_rip", "\t\t", 0x6c16, Hex16)] amd [];
    "get-vmcs-host-rsp" intel [vmcs("host_rsp", "\t\t", 0x6c14, Hex16)] amd [];
    "get-vmcs-link" intel [vmcs("vmcs_pointer", "\t", 0x2800, Hex16)] amd [];
    "get-vmcs-exit-interruption-info" intel [
        vmcs("vmcs_exit_interruption_info", "\t", 0x4404, Hex16)
    ] amd [];
    "get-vmcs-exit-interruption-error" intel [
        vmcs("vmcs_exit_interruption_error", "\t", 0x4406, Hex16)
    ] amd [];
    "get-vmcs-interruptibility" intel [
        vmcs("vmcs_guest_interruptibility", "\t", 0x4824, Hex16)
    ] amd [];
    "get-vmcs-exit-inst-length" intel [vmcs("vmcs_exit_inst_length", "\t", 0x440c, Hex8)] amd [];
    "get-vmcs-exit-qualification" intel [
        vmcs("vmcs_exit_qualification", "\t", 0x6400, Hex16)
    ] amd [];
    "get-vmcb-intercepts" intel [] amd [
        vmcb("cr_intercept", "\t", 0x0, 4, Hex8),
        vmcb("dr_intercept", "\t", 0x4, 4, Hex8),
        vmcb("exc_intercept", "\t", 0x8, 4, Hex8),
        vmcb("inst1_intercept", "\t", 0xc, 4, Hex8),
        vmcb("inst2_intercept", "\t", 0x10, 4, Hex8)
    ];
    "get-vmcb-tlb-ctrl" intel [] amd [vmcb("TLB ctrl", "\t", 0x5c, 4, Hex16)];
    "get-vmcb-exit-details" intel [] amd [
        vmcb("exitinfo1", "\t", 0x78, 8, Hex16),
        vmcb("exitinfo2", "\t", 0x80, 8, Hex16),
        vmcb("exitintinfo", "\t", 0x88, 8, Hex16)
    ];
    "get-vmcb-virq" intel [] amd [vmcb("v_irq/tpr", "\t", 0x60, 8, Hex16)];
    "get-apic-access-address" intel [vmcs("apic_access_address", "\t", 0x2014, Hex16)] amd [];
    "get-virtual-apic-address" intel [vmcs("virtual_apic_address", "\t", 0x2012, Hex16)] amd [];
    "get-avic-apic-bar" intel [] amd [vmcb("AVIC apic_bar", "\t", 0x98, 8, Hex16)];
    "get-avic-backing-page" intel [] amd [vmcb("AVIC backing page", "\t", 0xe0, 8, Hex16)];
    "get-avic-table" intel [] amd [
        vmcb("AVIC logical table", "\t", 0xf0, 8, Hex16),
        vmcb("AVIC physical table", "\t", 0xf8, 8, Hex16)
    ];
    "get-eptp" intel [vmcs("eptp", "\t\t", 0x201a, Hex16)]
        amd [vmcb("rvi/npt", "\t\t", 0xb0, 8, Hex16)];
    "get-exception-bitmap" intel [vmcs("exception_bitmap", "\t", 0x4004, Alternate)]
        amd [vmcb("exception_bitmap", "\t", 0x8, 4, Alternate)];
    "get-io-bitmap-address" intel [
        vmcs("io_bitmap_a", "\t", 0x2000, Alternate),
        vmcs("io_bitmap_b", "\t", 0x2002, Alternate)
    ] amd [vmcb("io_bitmap", "\t", 0x40, 8, Alternate)];
    "get-tsc-offset" intel [vmcs("tsc_offset", "\t", 0x2010, Hex16)]
        amd [vmcb("tsc_offset", "\t", 0x50, 8, Hex16)];
    "get-msr-bitmap-address" intel [vmcs("msr_bitmap", "\t\t", 0x2004, Alternate)]
        amd [vmcb("msr_bitmap", "\t\t", 0x48, 8, Alternate)];
    "get-vmcs-vpid" intel [vmcs("vpid", "\t\t", 0x0, Hex4)] amd [];
    "get-vmcb-asid" intel [] amd [vmcb("asid", "\t\t", 0x58, 4, Hex4)];
    "get-guest-pat" intel [vmcs("guest_pat", "\t\t", 0x2804, Hex16)]
        amd [vmcb("guest_pat", "\t\t", 0x668, 8, Hex16)];
    "get-guest-sysenter" intel [
        vmcs("guest_sysenter_cs", "\t", 0x482a, Alternate),
        vmcs("guest_sysenter_sp", "\t", 0x6824, Alternate),
        vmcs("guest_sysenter_ip", "\t", 0x6826, Alternate)
    ] amd [
        vmcb("guest_sysenter_cs", "\t", 0x628, 8, Alternate),
        vmcb("guest_sysenter_sp", "\t", 0x630, 8, Alternate),
        vmcb("guest_sysenter_ip", "\t", 0x638, 8, Alternate)
    ];
    "get-exit-reason" intel [vmcs("exit_reason", "\t", 0x4402, Alternate)]
        amd [vmcb("exit_reason", "\t", 0x70, 8, Alternate)];
}

/// Whether this machine's CPU has VT-x rather than AMD-V, by its vendor.
pub(super) fn host_is_intel() -> bool {
    let id = std::arch::x86_64::__cpuid(0);
    // "AuthenticAMD" and "HygonGenuine" in EBX.
    !matches!(id.ebx, 0x6874_7541 | 0x6f67_7948)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(option: &str) -> &'static Group {
        GROUPS.iter().find(|g| g.option == option).unwrap()
    }

    #[test]
    fn lines_are_those_of_stock_bhyvectl() {
        let line = |option, intel: bool, value| group(option).fields_of(intel)[0].line(1, value);
        assert_eq!(line("get-vmcs-vpid", true, 2), "vpid[1]\t\t0x0002");
        assert_eq!(
            line("get-eptp", true, 0x1000),
            "eptp[1]\t\t0x0000000000001000"
        );
        assert_eq!(
            line("get-eptp", false, 0x1000),
            "rvi/npt[1]\t\t0x0000000000001000"
        );
        assert_eq!(
            line("get-exception-bitmap", true, 0x60042),
            "exception_bitmap[1]\t0x60042"
        );
        assert_eq!(line("get-exit-reason", true, 0), "exit_reason[1]\t0");
        assert_eq!(
            line("get-vmcb-intercepts", false, !0),
            "cr_intercept[1]\t0xffffffff"
        );
    }

    #[test]
    fn numbers_are_those_of_the_kernel_interface() {
        assert_eq!(group("get-eptp").fields_of(true)[0].number, 0x8000_201a);
        assert_eq!(
            group("get-vmcb-asid").fields_of(false)[0].number,
            0x8004_0058
        );
    }

    #[test]
    fn an_option_of_the_other_vendor_still_names_its_field() {
        assert_eq!(group("get-vmcb-asid").fields_of(true)[0].label, "asid");
        assert_eq!(group("get-vmcs-vpid").fields_of(false)[0].label, "vpid");
        assert!(!group("get-vmcb-asid").is_of(true));
    }
}
