//! Request numbers, group `v`. `GROUP` and 0xC0 to 0xEF of it are ours.

use crate::ioccom::{io, ior, iow, iowint, iowr};
use crate::layout::*;

/// Group of the vmm device's requests.
pub const GROUP: u8 = b'v';
/// Group of the control device's requests.
pub const CTL_GROUP: u8 = b'V';
/// First number of our extension range.
pub const EXT_FIRST: u8 = 0xc0;
/// Last number of our extension range.
pub const EXT_LAST: u8 = 0xef;

macro_rules! requests {
    ($($(#[$m:meta])* $name:ident = $v:expr;)*) => {
        $($(#[$m])* pub const $name: u32 = $v;)*

        /// Every request with its name.
        pub const ALL: &[(u32, &str)] = &[$(($name, stringify!($name)),)*];
    };
}

requests! {
    /// Runs a vCPU until something needs userland.
    VM_RUN = iowr::<VmRun>(GROUP, 1);
    /// Stops the VM.
    VM_SUSPEND = iow::<VmSuspend>(GROUP, 4);
    /// Brings all vCPUs back to power-on state.
    VM_REINIT = io(GROUP, 5);
    /// Makes a memory segment.
    VM_ALLOC_MEMSEG = iow::<VmMemseg>(GROUP, 14);
    /// Describes a memory segment.
    VM_GET_MEMSEG = iowr::<VmMemseg>(GROUP, 15);
    /// Maps a segment into guest-physical memory.
    VM_MMAP_MEMSEG = iow::<VmMemmap>(GROUP, 16);
    /// Finds the mapping at or above an address.
    VM_MMAP_GETNEXT = iowr::<VmMemmap>(GROUP, 17);
    /// Sets a register.
    VM_SET_REGISTER = iow::<VmRegister>(GROUP, 20);
    /// Reads a register.
    VM_GET_REGISTER = iowr::<VmRegister>(GROUP, 21);
    /// Sets a segment descriptor.
    VM_SET_SEGMENT_DESCRIPTOR = iow::<VmSegDesc>(GROUP, 22);
    /// Reads a segment descriptor.
    VM_GET_SEGMENT_DESCRIPTOR = iowr::<VmSegDesc>(GROUP, 23);
    /// Sets several registers.
    VM_SET_REGISTER_SET = iow::<VmRegisterSet>(GROUP, 24);
    /// Reads several registers.
    VM_GET_REGISTER_SET = iowr::<VmRegisterSet>(GROUP, 25);
    /// Injects an exception.
    VM_INJECT_EXCEPTION = iow::<VmException>(GROUP, 30);
    /// Raises a vector in a local APIC.
    VM_LAPIC_IRQ = iow::<VmLapicIrq>(GROUP, 31);
    /// Raises an LVT entry.
    VM_LAPIC_LOCAL_IRQ = iow::<VmLapicIrq>(GROUP, 37);
    /// Delivers an MSI.
    VM_LAPIC_MSI = iow::<VmLapicMsi>(GROUP, 36);
    /// Raises a pin of the IOAPIC.
    VM_IOAPIC_ASSERT_IRQ = iow::<VmIoapicIrq>(GROUP, 33);
    /// Lowers a pin of the IOAPIC.
    VM_IOAPIC_DEASSERT_IRQ = iow::<VmIoapicIrq>(GROUP, 34);
    /// Pulses a pin of the IOAPIC.
    VM_IOAPIC_PULSE_IRQ = iow::<VmIoapicIrq>(GROUP, 35);
    /// Number of pins of the IOAPIC.
    VM_IOAPIC_PINCOUNT = ior::<i32>(GROUP, 38);
    /// Raises an ISA line.
    VM_ISA_ASSERT_IRQ = iow::<VmIsaIrq>(GROUP, 80);
    /// Lowers an ISA line.
    VM_ISA_DEASSERT_IRQ = iow::<VmIsaIrq>(GROUP, 81);
    /// Pulses an ISA line.
    VM_ISA_PULSE_IRQ = iow::<VmIsaIrq>(GROUP, 82);
    /// Sets the trigger mode of an ISA line.
    VM_ISA_SET_IRQ_TRIGGER = iow::<VmIsaIrqTrigger>(GROUP, 83);
    /// Sets a capability.
    VM_SET_CAPABILITY = iow::<VmCapability>(GROUP, 2);
    /// Reads a capability.
    VM_GET_CAPABILITY = iowr::<VmCapability>(GROUP, 3);
    /// Gives a host PCI function to the VM.
    VM_BIND_PPTDEV = iow::<VmPptdev>(GROUP, 40);
    /// Takes it back.
    VM_UNBIND_PPTDEV = iow::<VmPptdev>(GROUP, 41);
    /// Maps a BAR of it.
    VM_MAP_PPTDEV_MMIO = iow::<VmPptdevMmio>(GROUP, 42);
    /// Sets up its MSI.
    VM_PPTDEV_MSI = iow::<VmPptdevMsi>(GROUP, 43);
    /// Sets up a vector of its MSI-X.
    VM_PPTDEV_MSIX = iow::<VmPptdevMsix>(GROUP, 44);
    /// Injects an NMI.
    VM_INJECT_NMI = iow::<VmNmi>(GROUP, 32);
    /// Statistics of a vCPU.
    VM_STATS = iowr::<VmStats>(GROUP, 50);
    /// What a statistic counts.
    VM_STAT_DESC = iowr::<VmStatDesc>(GROUP, 51);
    /// Allows x2APIC mode.
    VM_SET_X2APIC_STATE = iow::<VmX2apic>(GROUP, 60);
    /// Whether x2APIC mode is allowed.
    VM_GET_X2APIC_STATE = iowr::<VmX2apic>(GROUP, 61);
    /// Capabilities of the HPET.
    VM_GET_HPET_CAPABILITIES = ior::<VmHpetCap>(GROUP, 62);
    /// Sets the topology of the vCPUs.
    VM_SET_TOPOLOGY = iow::<VmCpuTopology>(GROUP, 63);
    /// Topology of the vCPUs.
    VM_GET_TOPOLOGY = ior::<VmCpuTopology>(GROUP, 64);
    /// Nested page-table entries of a page.
    VM_GET_GPA_PMAP = iowr::<VmGpaPte>(GROUP, 12);
    /// Translates a linear address; injects the fault.
    VM_GLA2GPA = iowr::<VmGla2gpa>(GROUP, 13);
    /// Translates a linear address; only reports the fault.
    VM_GLA2GPA_NOFAULT = iowr::<VmGla2gpa>(GROUP, 18);
    /// Activates a vCPU.
    VM_ACTIVATE_CPU = iow::<VmActivateCpu>(GROUP, 90);
    /// Sets of vCPUs.
    VM_GET_CPUS = iow::<VmCpuset>(GROUP, 91);
    /// Stops a vCPU for a debugger.
    VM_SUSPEND_CPU = iow::<VmActivateCpu>(GROUP, 92);
    /// Lets it go on.
    VM_RESUME_CPU = iow::<VmActivateCpu>(GROUP, 93);
    /// Sets the interrupted event of a vCPU.
    VM_SET_INTINFO = iow::<VmIntinfo>(GROUP, 29);
    /// Pending events of a vCPU.
    VM_GET_INTINFO = iowr::<VmIntinfo>(GROUP, 28);
    /// Writes a byte of the RTC.
    VM_RTC_WRITE = iow::<VmRtcData>(GROUP, 101);
    /// Reads a byte of the RTC.
    VM_RTC_READ = iowr::<VmRtcData>(GROUP, 100);
    /// Sets the RTC.
    VM_RTC_SETTIME = iow::<VmRtcTime>(GROUP, 102);
    /// Reads the RTC.
    VM_RTC_GETTIME = ior::<VmRtcTime>(GROUP, 103);
    /// Executes the current instruction again.
    VM_RESTART_INSTRUCTION = iow::<i32>(GROUP, 39);

    /// Makes a memory segment (13 and 14).
    VM_ALLOC_MEMSEG_13 = iow::<VmMemseg13>(GROUP, 14);
    /// Describes a memory segment (13 and 14).
    VM_GET_MEMSEG_13 = iowr::<VmMemseg13>(GROUP, 15);
    /// Makes a memory segment (15).
    VM_ALLOC_MEMSEG_15 = iow::<VmMemseg15>(GROUP, 14);
    /// Describes a memory segment (15).
    VM_GET_MEMSEG_15 = iowr::<VmMemseg15>(GROUP, 15);
    /// Unmaps guest memory (13).
    VM_MUNMAP_MEMSEG = iow::<VmMunmap>(GROUP, 19);
    /// Reads from a device that the kernel emulates (13).
    VM_GET_KERNEMU_DEV = iowr::<VmKernemuDev>(GROUP, 26);
    /// Writes to a device that the kernel emulates (13).
    VM_SET_KERNEMU_DEV = iow::<VmKernemuDev>(GROUP, 27);
    /// Disables MSI-X of a passed-through function (13).
    VM_PPTDEV_DISABLE_MSIX = iow::<VmPptdev>(GROUP, 45);
    /// Unmaps a BAR of a passed-through function (13).
    VM_UNMAP_PPTDEV_MMIO = iow::<VmPptdevMmio>(GROUP, 46);
    /// Saves or restores kernel state (13).
    VM_SNAPSHOT_REQ_13 = iowr::<VmSnapshotMeta13>(GROUP, 113);
    /// Saves or restores kernel state (14).
    VM_SNAPSHOT_REQ = iowr::<VmSnapshotMeta14>(GROUP, 113);
    /// Sets the guest's clocks after a restore (13).
    VM_RESTORE_TIME = iowr::<i32>(GROUP, 115);
    /// Runs a vCPU (14).
    VM_RUN_14 = iow::<VmRun14>(GROUP, 1);
    /// Statistics of a vCPU, a page at a time (14).
    VM_STATS_14 = iowr::<VmStats14>(GROUP, 50);

    /// Makes a VM (control device, 15).
    VMMCTL_VM_CREATE = iowr::<VmmctlVm>(CTL_GROUP, 0);
    /// Destroys a VM (control device, 15).
    VMMCTL_VM_DESTROY = iowr::<VmmctlVm>(CTL_GROUP, 1);

    /// What this kernel piece has beyond FreeBSD's interface (ours; both
    /// devices answer it).
    VM_EXT_VERSION = ior::<VmExtVersion>(GROUP, EXT_FIRST);
    /// Completes an IN and runs the vCPU on (ours).
    VM_EXT_RUN = iowr::<VmExtRun>(GROUP, EXT_FIRST + 1);
    /// Makes the kernel answer INs from a port (ours).
    VM_EXT_CONSTANT_PORT = iow::<VmExtConstantPort>(GROUP, EXT_FIRST + 2);
    /// Runs a vCPU; exit and RAX are in its run page, which userland has
    /// mapped, so that nothing is copied (ours). The argument is the vCPU's
    /// number and, from bit [`EXT_RUN_SHIFT`] on, `EXT_RUN_*`.
    VM_EXT_RUN_PAGE = iowint(GROUP, EXT_FIRST + 3);
    /// Makes one-byte OUTs to a port complete in the kernel, which puts the
    /// bytes into a ring that userland has mapped (ours).
    VM_EXT_OUT_RING = iow::<VmExtOutRing>(GROUP, EXT_FIRST + 4);
    /// Makes OUTs to a port complete in the kernel, which signals an eventfd
    /// (ours; on hosts that have such a thing).
    VM_EXT_DOORBELL = iow::<VmExtDoorbell>(GROUP, EXT_FIRST + 5);
    /// Gives memory back to the host (ours).
    VM_EXT_RELEASE = iowr::<VmExtRelease>(GROUP, EXT_FIRST + 8);
    /// What the guest sees of the paravirtual interface (ours).
    VM_EXT_PV = iow::<VmExtPv>(GROUP, EXT_FIRST + 16);
}

/// Name of a request, for messages.
pub fn name(request: u32) -> Option<&'static str> {
    ALL.iter().find(|(r, _)| *r == request).map(|&(_, n)| n)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// What clang prints for the `_IO*` macros of FreeBSD 12.1's headers,
    /// compiled for amd64.
    const FROM_C: &[(u32, &str)] = &[
        (0x8004765a, "VM_ACTIVATE_CPU"),
        (0x8050760e, "VM_ALLOC_MEMSEG"),
        (0x800c7628, "VM_BIND_PPTDEV"),
        (0xc0107603, "VM_GET_CAPABILITY"),
        (0x8010765b, "VM_GET_CPUS"),
        (0xc030760c, "VM_GET_GPA_PMAP"),
        (0x4004763e, "VM_GET_HPET_CAPABILITIES"),
        (0xc018761c, "VM_GET_INTINFO"),
        (0xc050760f, "VM_GET_MEMSEG"),
        (0xc0107615, "VM_GET_REGISTER"),
        (0xc0187619, "VM_GET_REGISTER_SET"),
        (0xc0187617, "VM_GET_SEGMENT_DESCRIPTOR"),
        (0x40087640, "VM_GET_TOPOLOGY"),
        (0xc008763d, "VM_GET_X2APIC_STATE"),
        (0xc038760d, "VM_GLA2GPA"),
        (0xc0387612, "VM_GLA2GPA_NOFAULT"),
        (0x8014761e, "VM_INJECT_EXCEPTION"),
        (0x80047620, "VM_INJECT_NMI"),
        (0x80047621, "VM_IOAPIC_ASSERT_IRQ"),
        (0x80047622, "VM_IOAPIC_DEASSERT_IRQ"),
        (0x40047626, "VM_IOAPIC_PINCOUNT"),
        (0x80047623, "VM_IOAPIC_PULSE_IRQ"),
        (0x80087650, "VM_ISA_ASSERT_IRQ"),
        (0x80087651, "VM_ISA_DEASSERT_IRQ"),
        (0x80087652, "VM_ISA_PULSE_IRQ"),
        (0x80087653, "VM_ISA_SET_IRQ_TRIGGER"),
        (0x8008761f, "VM_LAPIC_IRQ"),
        (0x80087625, "VM_LAPIC_LOCAL_IRQ"),
        (0x80107624, "VM_LAPIC_MSI"),
        (0x8028762a, "VM_MAP_PPTDEV_MMIO"),
        (0xc0287611, "VM_MMAP_GETNEXT"),
        (0x80287610, "VM_MMAP_MEMSEG"),
        (0x8028762b, "VM_PPTDEV_MSI"),
        (0x8030762c, "VM_PPTDEV_MSIX"),
        (0x20007605, "VM_REINIT"),
        (0x80047627, "VM_RESTART_INSTRUCTION"),
        (0x8004765d, "VM_RESUME_CPU"),
        (0x40087667, "VM_RTC_GETTIME"),
        (0xc0087664, "VM_RTC_READ"),
        (0x80087666, "VM_RTC_SETTIME"),
        (0x80087665, "VM_RTC_WRITE"),
        (0xc0907601, "VM_RUN"),
        (0x80107602, "VM_SET_CAPABILITY"),
        (0x8018761d, "VM_SET_INTINFO"),
        (0x80107614, "VM_SET_REGISTER"),
        (0x80187618, "VM_SET_REGISTER_SET"),
        (0x80187616, "VM_SET_SEGMENT_DESCRIPTOR"),
        (0x8008763f, "VM_SET_TOPOLOGY"),
        (0x8008763c, "VM_SET_X2APIC_STATE"),
        (0xc2187632, "VM_STATS"),
        (0xc0847633, "VM_STAT_DESC"),
        (0x80047604, "VM_SUSPEND"),
        (0x8004765c, "VM_SUSPEND_CPU"),
        (0x800c7629, "VM_UNBIND_PPTDEV"),
    ];

    #[test]
    fn numbers_are_those_of_the_c_headers() {
        for &(number, name) in FROM_C {
            assert_eq!(super::name(number), Some(name), "{number:#x}");
        }
    }

    #[test]
    fn newer_layouts_have_numbers_of_their_own() {
        // FreeBSD 14's headers, same method.
        assert_eq!(VM_RUN_14, 0x8020_7601);
        assert_eq!(VM_ALLOC_MEMSEG_13, 0x8020_760e);
        assert_eq!(VM_STATS_14, 0xc220_7632);
        assert_eq!(VMMCTL_VM_CREATE, 0xc128_5600);
        assert_eq!(VMMCTL_VM_DESTROY, 0xc128_5601);
        let numbers: BTreeSet<u32> = ALL.iter().map(|r| r.0).collect();
        assert_eq!(numbers.len(), ALL.len());
    }
}
