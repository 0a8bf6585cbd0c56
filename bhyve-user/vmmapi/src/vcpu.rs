//! A vCPU. Each has a thread of its own that calls [`Vcpu::run`]; the rest may
//! be called from anywhere.

use crate::error::Result;
use crate::memory::GuestMemory;
use crate::sys;
use crate::vm::{Stat, Vm};
use std::io;
use vmm_abi::layout::*;
use vmm_abi::limits::PROT_READ;
use vmm_abi::names::{Capability, CpuMode, PagingMode, RegName, X2apicState};
use vmm_abi::raw_exit::VmExitRaw;
use vmm_abi::request::*;
use vmm_abi::{Exit, VmExit};

/// A handle on a vCPU.
#[derive(Clone, Debug)]
pub struct Vcpu {
    vm: Vm,
    id: i32,
}

/// Registers with their values.
pub type RegisterSet = Vec<(RegName, u64)>;

impl Vcpu {
    pub(crate) fn new(vm: Vm, id: u32) -> Self {
        // A number beyond i32 cannot exist; the kernel refuses what this becomes.
        Vcpu {
            vm,
            id: i32::try_from(id).unwrap_or(i32::MAX),
        }
    }

    /// Its number.
    pub fn id(&self) -> u32 {
        self.id.unsigned_abs()
    }

    /// The VM that it belongs to.
    pub fn vm(&self) -> &Vm {
        &self.vm
    }

    /// Activates it, once.
    ///
    /// # Errors
    /// EBUSY where it is active, EINVAL beyond the number of vCPUs.
    pub fn activate(&self) -> Result<()> {
        self.request(VM_ACTIVATE_CPU, &mut VmActivateCpu { vcpuid: self.id })
    }

    /// Runs it until something needs userland. A signal that interrupts it is
    /// [`Exit::Bogus`]. The next run goes on behind the instruction that
    /// caused this exit, unless [`Vcpu::restart_instruction`] is called or RIP
    /// is set.
    ///
    /// # Errors
    /// EBUSY where another thread runs it; ENXIO while the VM is destroyed.
    pub fn run(&self) -> Result<VmExit> {
        let mut arg = VmRun {
            cpuid: self.id,
            ..VmRun::default()
        };
        let result = sys::ioctl(self.vm.fd(), VM_RUN, &mut arg);
        self.ran(VM_RUN, result, &arg.vm_exit)
    }

    /// Completes the IN that the last exit was with this value of RAX, and
    /// runs the vCPU on. One request where the kernel piece is ours, two
    /// where it is FreeBSD's own.
    ///
    /// # Errors
    /// As [`Vcpu::run`].
    pub fn run_with_rax(&self, rax: u64) -> Result<VmExit> {
        if !self.vm.has(EXT_F_RUN) {
            self.set_register(RegName::Rax, rax)?;
            return self.run();
        }
        let mut arg = VmExtRun {
            cpuid: self.id,
            flags: EXT_RUN_RAX,
            rax,
            ..VmExtRun::default()
        };
        let result = sys::ioctl(self.vm.fd(), VM_EXT_RUN, &mut arg);
        self.ran(VM_EXT_RUN, result, &arg.vm_exit)
    }

    #[inline]
    fn ran(&self, request: u32, result: io::Result<()>, exit: &VmExitRaw) -> Result<VmExit> {
        match result {
            Ok(()) => Ok(VmExit::from_raw(exit)),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(VmExit {
                rip: 0,
                inst_length: 0,
                exit: Exit::Bogus,
            }),
            Err(e) => Err(self.vm.error(request, Some(self.id), e)),
        }
    }

    /// Executes the current instruction again.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn restart_instruction(&self) -> Result<()> {
        self.request(VM_RESTART_INSTRUCTION, &mut { self.id })
    }

    /// A register.
    ///
    /// # Errors
    /// EINVAL for one that the kernel does not offer.
    pub fn register(&self, reg: RegName) -> Result<u64> {
        let mut arg = VmRegister {
            cpuid: self.id,
            regnum: number(reg),
            regval: 0,
        };
        self.request(VM_GET_REGISTER, &mut arg)?;
        Ok(arg.regval)
    }

    /// A field of the VMCS or VMCB, by the number that
    /// [`vmcs_field`](vmm_abi::limits::vmcs_field) or
    /// [`vmcb_field`](vmm_abi::limits::vmcb_field) gives; `None` where the
    /// kernel does not show it.
    ///
    /// # Errors
    /// What the kernel says, other than EINVAL.
    pub fn hardware_field(&self, number: u32) -> Result<Option<u64>> {
        let mut arg = VmRegister {
            cpuid: self.id,
            regnum: number as i32,
            regval: 0,
        };
        match self.request(VM_GET_REGISTER, &mut arg) {
            Ok(()) => Ok(Some(arg.regval)),
            Err(e) if e.errno() == Some(libc::EINVAL) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Sets a register.
    ///
    /// # Errors
    /// EINVAL for one that the kernel does not offer, or a value it refuses.
    pub fn set_register(&self, reg: RegName, regval: u64) -> Result<()> {
        let mut arg = VmRegister {
            cpuid: self.id,
            regnum: number(reg),
            regval,
        };
        self.request(VM_SET_REGISTER, &mut arg)
    }

    /// Several registers in one request.
    ///
    /// # Errors
    /// As [`Vcpu::register`].
    pub fn registers(&self, regs: &[RegName]) -> Result<Vec<u64>> {
        let numbers: Vec<i32> = regs.iter().copied().map(number).collect();
        let mut values = vec![0; numbers.len()];
        sys::retry(|| sys::get_register_set(self.vm.fd(), self.id, &numbers, &mut values))
            .map_err(|e| self.vm.error(VM_GET_REGISTER_SET, Some(self.id), e))?;
        Ok(values)
    }

    /// Sets several registers in one request, in the order given.
    ///
    /// # Errors
    /// As [`Vcpu::set_register`].
    pub fn set_registers(&self, regs: &[(RegName, u64)]) -> Result<()> {
        let numbers: Vec<i32> = regs.iter().map(|r| number(r.0)).collect();
        let values: Vec<u64> = regs.iter().map(|r| r.1).collect();
        sys::retry(|| sys::set_register_set(self.vm.fd(), self.id, &numbers, &values))
            .map_err(|e| self.vm.error(VM_SET_REGISTER_SET, Some(self.id), e))
    }

    /// A segment descriptor.
    ///
    /// # Errors
    /// EINVAL where `reg` has none.
    pub fn desc(&self, reg: RegName) -> Result<SegDesc> {
        let mut arg = VmSegDesc {
            cpuid: self.id,
            regnum: number(reg),
            desc: SegDesc::default(),
        };
        self.request(VM_GET_SEGMENT_DESCRIPTOR, &mut arg)?;
        Ok(arg.desc)
    }

    /// Sets a segment descriptor.
    ///
    /// # Errors
    /// EINVAL where `reg` has none.
    pub fn set_desc(&self, reg: RegName, desc: SegDesc) -> Result<()> {
        let mut arg = VmSegDesc {
            cpuid: self.id,
            regnum: number(reg),
            desc,
        };
        self.request(VM_SET_SEGMENT_DESCRIPTOR, &mut arg)
    }

    /// Injects an exception. `fault`: RIP stays at the instruction.
    ///
    /// # Errors
    /// EINVAL for what is no exception, EBUSY where one is pending.
    pub fn inject_exception(&self, vector: u8, error_code: Option<u32>, fault: bool) -> Result<()> {
        let mut arg = VmException {
            cpuid: self.id,
            vector: i32::from(vector),
            error_code: error_code.unwrap_or(0),
            error_code_valid: i32::from(error_code.is_some()),
            restart_instruction: i32::from(fault),
        };
        self.request(VM_INJECT_EXCEPTION, &mut arg)
    }

    /// Injects an NMI.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn inject_nmi(&self) -> Result<()> {
        self.request(VM_INJECT_NMI, &mut VmNmi { cpuid: self.id })
    }

    /// Pending events: (interrupted delivery, exception to inject), format
    /// `VM_INTINFO_*`.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn intinfo(&self) -> Result<(u64, u64)> {
        let mut arg = VmIntinfo {
            vcpuid: self.id,
            ..VmIntinfo::default()
        };
        self.request(VM_GET_INTINFO, &mut arg)?;
        Ok((arg.info1, arg.info2))
    }

    /// Sets the interrupted event.
    ///
    /// # Errors
    /// EINVAL for a malformed one.
    pub fn set_intinfo(&self, info1: u64) -> Result<()> {
        let mut arg = VmIntinfo {
            vcpuid: self.id,
            info1,
            ..VmIntinfo::default()
        };
        self.request(VM_SET_INTINFO, &mut arg)
    }

    /// Raises a vector in its local APIC.
    ///
    /// # Errors
    /// EINVAL for vectors below 16.
    pub fn lapic_irq(&self, vector: u8) -> Result<()> {
        let mut arg = VmLapicIrq {
            cpuid: self.id,
            vector: i32::from(vector),
        };
        self.request(VM_LAPIC_IRQ, &mut arg)
    }

    /// Raises an LVT entry of its local APIC.
    ///
    /// # Errors
    /// EINVAL for an entry that does not exist.
    pub fn lapic_local_irq(&self, lvt: i32) -> Result<()> {
        self.request(
            VM_LAPIC_LOCAL_IRQ,
            &mut VmLapicIrq {
                cpuid: self.id,
                vector: lvt,
            },
        )
    }

    /// A capability.
    ///
    /// # Errors
    /// ENOENT where the CPU or the kernel lacks it.
    pub fn capability(&self, cap: Capability) -> Result<i32> {
        let mut arg = VmCapability {
            cpuid: self.id,
            captype: cap.raw(),
            ..VmCapability::default()
        };
        self.request(VM_GET_CAPABILITY, &mut arg)?;
        Ok(arg.capval)
    }

    /// Sets a capability.
    ///
    /// # Errors
    /// ENOENT where the CPU or the kernel lacks it.
    pub fn set_capability(&self, cap: Capability, capval: i32) -> Result<()> {
        let mut arg = VmCapability {
            cpuid: self.id,
            captype: cap.raw(),
            capval,
            allcpus: 0,
        };
        self.request(VM_SET_CAPABILITY, &mut arg)
    }

    /// Whether the guest may switch to x2APIC mode.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn x2apic_state(&self) -> Result<X2apicState> {
        let mut arg = VmX2apic {
            cpuid: self.id,
            state: 0,
        };
        self.request(VM_GET_X2APIC_STATE, &mut arg)?;
        self.vm.answer(VM_GET_X2APIC_STATE, arg.state)
    }

    /// Allows or forbids x2APIC mode.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn set_x2apic_state(&self, state: X2apicState) -> Result<()> {
        self.request(
            VM_SET_X2APIC_STATE,
            &mut VmX2apic {
                cpuid: self.id,
                state: state.raw(),
            },
        )
    }

    /// Stops it for a debugger.
    ///
    /// # Errors
    /// EINVAL where it is not active.
    pub fn suspend(&self) -> Result<()> {
        self.request(VM_SUSPEND_CPU, &mut VmActivateCpu { vcpuid: self.id })
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// EINVAL where it is not stopped.
    pub fn resume(&self) -> Result<()> {
        self.request(VM_RESUME_CPU, &mut VmActivateCpu { vcpuid: self.id })
    }

    /// Its statistics, with what they count.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn stats(&self) -> Result<Vec<Stat>> {
        let values = self.vm.stat_values(self.id)?;
        let mut stats = Vec::with_capacity(values.len());
        for (index, value) in (0u32..).zip(values) {
            let desc = self
                .vm
                .stat_desc(index)?
                .unwrap_or_else(|| format!("statistic {index}"));
            stats.push(Stat { desc, value });
        }
        Ok(stats)
    }

    /// Its paging state, read from its registers.
    ///
    /// # Errors
    /// As [`Vcpu::registers`].
    pub fn paging(&self) -> Result<GuestPaging> {
        use RegName::{Cr0, Cr3, Cr4, Cs, Efer, Ss};
        let values = self.registers(&[Cr0, Cr3, Cr4, Efer])?;
        let [cr0, cr3, cr4, efer] = values[..] else {
            return Ok(GuestPaging::default());
        };
        let long_code = self.desc(Cs)?.access & 1 << 13 != 0;
        let cpl = (self.desc(Ss)?.access >> 5 & 3) as i32;
        let (cpu_mode, paging_mode) = modes(cr0, cr4, efer, long_code);
        Ok(GuestPaging {
            cr3,
            cpl,
            cpu_mode: cpu_mode.raw(),
            paging_mode: paging_mode.raw(),
            _pad0: 0,
        })
    }

    /// Translates a guest-linear address for an access of kind `prot`
    /// (`PROT_READ`, `PROT_WRITE`); `None` if it faults. The guest notices
    /// nothing.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn gla2gpa(&self, paging: &GuestPaging, gla: u64, prot: i32) -> Result<Option<u64>> {
        self.translate(VM_GLA2GPA_NOFAULT, paging, gla, prot)
    }

    /// The same, but a fault is injected into the guest.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn gla2gpa_or_fault(
        &self,
        paging: &GuestPaging,
        gla: u64,
        prot: i32,
    ) -> Result<Option<u64>> {
        self.translate(VM_GLA2GPA, paging, gla, prot)
    }

    fn translate(
        &self,
        request: u32,
        paging: &GuestPaging,
        gla: u64,
        prot: i32,
    ) -> Result<Option<u64>> {
        let mut arg = VmGla2gpa {
            vcpuid: self.id,
            prot,
            gla,
            paging: *paging,
            ..VmGla2gpa::default()
        };
        self.request(request, &mut arg)?;
        Ok((arg.fault == 0).then_some(arg.gpa))
    }

    /// Bytes at a guest-linear address, for messages: as many of `max` as can
    /// be read.
    pub fn peek(&self, memory: &GuestMemory, gla: u64, max: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        let Ok(paging) = self.paging() else {
            return bytes;
        };
        while bytes.len() < max {
            let at = gla.wrapping_add(bytes.len() as u64);
            let Ok(Some(gpa)) = self.gla2gpa(&paging, at, PROT_READ) else {
                break;
            };
            let n = (0x1000 - (at & 0xfff) as usize).min(max - bytes.len());
            let mut page = vec![0; n];
            if memory.read_bytes(gpa, &mut page).is_err() {
                break;
            }
            bytes.append(&mut page);
        }
        bytes
    }

    fn request<T: sys::Plain>(&self, request: u32, arg: &mut T) -> Result<()> {
        self.vm.request_cpu(request, self.id, arg)
    }
}

fn number(reg: RegName) -> i32 {
    reg.raw() as i32
}

/// CPU and paging mode (SDM Vol. 3A §2.2, §4.1.1).
fn modes(cr0: u64, cr4: u64, efer: u64, long_code: bool) -> (CpuMode, PagingMode) {
    const CR0_PE: u64 = 1;
    const CR0_PG: u64 = 1 << 31;
    const CR4_PAE: u64 = 1 << 5;
    const CR4_LA57: u64 = 1 << 12;
    const EFER_LME: u64 = 1 << 8;
    const EFER_LMA: u64 = 1 << 10;
    let cpu = if cr0 & CR0_PE == 0 {
        CpuMode::Real
    } else if efer & EFER_LMA == 0 {
        CpuMode::Protected
    } else if long_code {
        CpuMode::Bits64
    } else {
        CpuMode::Compatibility
    };
    let paging = if cr0 & CR0_PG == 0 {
        PagingMode::Flat
    } else if cr4 & CR4_PAE == 0 {
        PagingMode::Bits32
    } else if efer & EFER_LME == 0 {
        PagingMode::Pae
    } else if cr4 & CR4_LA57 == 0 {
        PagingMode::Bits64
    } else {
        PagingMode::Bits64La57
    };
    (cpu, paging)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_follow_the_control_registers() {
        assert_eq!(modes(0x10, 0, 0, false), (CpuMode::Real, PagingMode::Flat));
        assert_eq!(
            modes(0x11, 0, 0, true),
            (CpuMode::Protected, PagingMode::Flat)
        );
        assert_eq!(
            modes(0x8000_0011, 0, 0, false),
            (CpuMode::Protected, PagingMode::Bits32)
        );
        assert_eq!(
            modes(0x8000_0011, 0x20, 0, false),
            (CpuMode::Protected, PagingMode::Pae)
        );
        assert_eq!(
            modes(0x8000_0011, 0x20, 0x500, false),
            (CpuMode::Compatibility, PagingMode::Bits64)
        );
        assert_eq!(
            modes(0x8000_0011, 0x20, 0x500, true),
            (CpuMode::Bits64, PagingMode::Bits64)
        );
        assert_eq!(
            modes(0x8000_0011, 0x1020, 0x500, true),
            (CpuMode::Bits64, PagingMode::Bits64La57)
        );
    }
}
