//! Devices in the kernel: interrupt controllers, clocks, and those of the host that
//! were given to the VM.

use super::Vm;
use crate::error::Result;
use crate::host_pci::PciAddress;
use vmm_abi::layout::*;
use vmm_abi::names::IntrTrigger;
use vmm_abi::request::*;

impl Vm {
    /// Delivers an MSI (SDM Vol. 3A §10.11).
    ///
    /// # Errors
    /// EINVAL for an address that is none of the local APICs'.
    pub fn lapic_msi(&self, addr: u64, msg: u64) -> Result<()> {
        self.request(VM_LAPIC_MSI, &mut VmLapicMsi { msg, addr })
    }

    /// Delivers an MSI, when the thread that calls this runs a vCPU of the VM
    /// next ([`crate::Runner`]), or at once if it is no vCPU's. What has a wrong
    /// address goes nowhere.
    pub fn post_msi(&self, addr: u64, msg: u64) {
        if !crate::runner::defer_msi(self, addr, msg) {
            let _ = self.lapic_msi(addr, msg);
        }
    }

    /// Raises a pin of the IOAPIC.
    ///
    /// # Errors
    /// EINVAL for a pin that it lacks.
    pub fn ioapic_assert(&self, pin: u32) -> Result<()> {
        self.request(VM_IOAPIC_ASSERT_IRQ, &mut VmIoapicIrq { irq: pin as i32 })
    }

    /// Lowers a pin of the IOAPIC.
    ///
    /// # Errors
    /// EINVAL for a pin that it lacks.
    pub fn ioapic_deassert(&self, pin: u32) -> Result<()> {
        self.request(VM_IOAPIC_DEASSERT_IRQ, &mut VmIoapicIrq { irq: pin as i32 })
    }

    /// Raises and lowers a pin of the IOAPIC.
    ///
    /// # Errors
    /// EINVAL for a pin that it lacks.
    pub fn ioapic_pulse(&self, pin: u32) -> Result<()> {
        self.request(VM_IOAPIC_PULSE_IRQ, &mut VmIoapicIrq { irq: pin as i32 })
    }

    /// Number of pins of the IOAPIC.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn ioapic_pincount(&self) -> Result<u32> {
        let mut pins = 0i32;
        self.request(VM_IOAPIC_PINCOUNT, &mut pins)?;
        self.answer(VM_IOAPIC_PINCOUNT, pins)
    }

    /// Raises an ISA line: of the 8259 pair, and of the IOAPIC where a pin is
    /// given.
    ///
    /// # Errors
    /// EINVAL for lines that do not exist.
    pub fn isa_assert(&self, atpic_irq: u32, ioapic_pin: Option<u32>) -> Result<()> {
        self.request(VM_ISA_ASSERT_IRQ, &mut isa(atpic_irq, ioapic_pin))
    }

    /// Lowers an ISA line.
    ///
    /// # Errors
    /// EINVAL for lines that do not exist.
    pub fn isa_deassert(&self, atpic_irq: u32, ioapic_pin: Option<u32>) -> Result<()> {
        self.request(VM_ISA_DEASSERT_IRQ, &mut isa(atpic_irq, ioapic_pin))
    }

    /// Raises and lowers an ISA line.
    ///
    /// # Errors
    /// EINVAL for lines that do not exist.
    pub fn isa_pulse(&self, atpic_irq: u32, ioapic_pin: Option<u32>) -> Result<()> {
        self.request(VM_ISA_PULSE_IRQ, &mut isa(atpic_irq, ioapic_pin))
    }

    /// Sets the trigger mode of an ISA line.
    ///
    /// # Errors
    /// EINVAL for lines whose mode is fixed.
    pub fn isa_set_trigger(&self, atpic_irq: u32, trigger: IntrTrigger) -> Result<()> {
        let mut arg = VmIsaIrqTrigger {
            atpic_irq: atpic_irq as i32,
            trigger: trigger.raw(),
        };
        self.request(VM_ISA_SET_IRQ_TRIGGER, &mut arg)
    }

    /// Raises an LVT entry of every vCPU's local APIC.
    ///
    /// # Errors
    /// EINVAL for an entry that does not exist.
    pub fn lapic_local_irq_all(&self, lvt: i32) -> Result<()> {
        self.request(
            VM_LAPIC_LOCAL_IRQ,
            &mut VmLapicIrq {
                cpuid: -1,
                vector: lvt,
            },
        )
    }

    /// Low half of the HPET's capabilities register.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn hpet_capabilities(&self) -> Result<u32> {
        let mut arg = VmHpetCap::default();
        self.request(VM_GET_HPET_CAPABILITIES, &mut arg)?;
        Ok(arg.capabilities)
    }

    /// Writes a byte of the RTC's memory.
    ///
    /// # Errors
    /// EINVAL for offsets that hold the time.
    pub fn rtc_write(&self, offset: u32, value: u8) -> Result<()> {
        let mut arg = VmRtcData {
            offset: offset as i32,
            value,
            ..VmRtcData::default()
        };
        self.request(VM_RTC_WRITE, &mut arg)
    }

    /// Reads a byte of the RTC's memory.
    ///
    /// # Errors
    /// EINVAL for an offset beyond it.
    pub fn rtc_read(&self, offset: u32) -> Result<u8> {
        let mut arg = VmRtcData {
            offset: offset as i32,
            ..VmRtcData::default()
        };
        self.request(VM_RTC_READ, &mut arg)?;
        Ok(arg.value)
    }

    /// Sets the RTC, seconds since the epoch.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn rtc_settime(&self, secs: i64) -> Result<()> {
        self.request(VM_RTC_SETTIME, &mut VmRtcTime { secs })
    }

    /// Reads the RTC, seconds since the epoch.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn rtc_gettime(&self) -> Result<i64> {
        let mut arg = VmRtcTime::default();
        self.request(VM_RTC_GETTIME, &mut arg)?;
        Ok(arg.secs)
    }

    /// Gives a host PCI function to the VM.
    ///
    /// # Errors
    /// ENOENT or ENXIO where it is not set aside for passthrough.
    pub fn bind_pptdev(&self, bus: i32, slot: i32, func: i32) -> Result<()> {
        self.request(VM_BIND_PPTDEV, &mut VmPptdev { bus, slot, func })
    }

    /// Takes it back.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn unbind_pptdev(&self, bus: i32, slot: i32, func: i32) -> Result<()> {
        self.request(VM_UNBIND_PPTDEV, &mut VmPptdev { bus, slot, func })
    }

    /// Shows the guest part of a memory BAR of a function that it was given:
    /// `len` bytes of the host's memory at `hpa`, whole pages.
    ///
    /// # Errors
    /// EINVAL for what lies in no BAR of the function, or over other memory of
    /// the guest's; ENOSPC when there are too many.
    pub fn map_pptdev_mmio(&self, at: PciAddress, gpa: u64, hpa: u64, len: u64) -> Result<()> {
        self.request(VM_MAP_PPTDEV_MMIO, &mut mmio(at, gpa, hpa, len))
    }

    /// Takes it away again (FreeBSD 13 and later).
    ///
    /// # Errors
    /// ENOENT where nothing was mapped just so; ENOTTY from a FreeBSD 12 kernel.
    pub fn unmap_pptdev_mmio(&self, at: PciAddress, gpa: u64, hpa: u64, len: u64) -> Result<()> {
        self.request(VM_UNMAP_PPTDEV_MMIO, &mut mmio(at, gpa, hpa, len))
    }

    /// Has the function's MSI arrive as `count` messages, the first of them `data`
    /// to `address`; none with 0.
    ///
    /// # Errors
    /// EINVAL for more than it can have.
    pub fn pptdev_msi(&self, at: PciAddress, address: u64, data: u64, count: u32) -> Result<()> {
        let (bus, slot, func) = at.numbers();
        let mut arg = VmPptdevMsi {
            bus,
            slot,
            func,
            numvec: i32::try_from(count).unwrap_or(i32::MAX),
            msg: data,
            addr: address,
            ..VmPptdevMsi::default()
        };
        self.request(VM_PPTDEV_MSI, &mut arg)
    }

    /// Sets an entry of the function's MSI-X table. `control` is the entry's last
    /// word: bit 0 masks it.
    ///
    /// # Errors
    /// EINVAL for an entry that it lacks, ENOSPC where the host has too few vectors.
    pub fn pptdev_msix(
        &self,
        at: PciAddress,
        index: u16,
        address: u64,
        data: u64,
        control: u32,
    ) -> Result<()> {
        let (bus, slot, func) = at.numbers();
        let mut arg = VmPptdevMsix {
            bus,
            slot,
            func,
            idx: index.into(),
            msg: data,
            vector_control: control,
            addr: address,
            ..VmPptdevMsix::default()
        };
        self.request(VM_PPTDEV_MSIX, &mut arg)
    }

    /// Switches the function's MSI-X off (FreeBSD 13 and later).
    ///
    /// # Errors
    /// ENOTTY from a FreeBSD 12 kernel.
    pub fn pptdev_disable_msix(&self, at: PciAddress) -> Result<()> {
        let (bus, slot, func) = at.numbers();
        self.request(VM_PPTDEV_DISABLE_MSIX, &mut VmPptdev { bus, slot, func })
    }
}

fn mmio(at: PciAddress, gpa: u64, hpa: u64, len: u64) -> VmPptdevMmio {
    let (bus, slot, func) = at.numbers();
    VmPptdevMmio {
        bus,
        slot,
        func,
        gpa,
        hpa,
        len,
        ..VmPptdevMmio::default()
    }
}

fn isa(atpic_irq: u32, ioapic_pin: Option<u32>) -> VmIsaIrq {
    VmIsaIrq {
        atpic_irq: atpic_irq as i32,
        ioapic_irq: ioapic_pin.map_or(-1, |p| p as i32),
    }
}
