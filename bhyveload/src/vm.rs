//! A [`LoadTarget`] that is a VM.

use crate::target::{Descriptor, LoadTarget, Register, TargetError, TargetResult};
use vmmapi::{Capability, GuestMemory, MemFlags, RegName, SegDesc, Vcpu, Vm};

/// vCPU 0 and the memory of a VM.
#[derive(Debug)]
pub struct VmTarget {
    vm: Vm,
    boot_cpu: Vcpu,
    memory: GuestMemory,
    fresh: bool,
}

impl From<vmmapi::Error> for TargetError {
    fn from(error: vmmapi::Error) -> Self {
        Self {
            what: error.to_string(),
        }
    }
}

impl VmTarget {
    /// Gives a VM `size` bytes of memory; unless it has just been `created` it is
    /// reset before.
    ///
    /// # Errors
    /// There is no such memory, or the VM is running.
    pub fn prepare(vm: Vm, created: bool, size: u64, flags: MemFlags) -> TargetResult<Self> {
        if !created {
            vm.reinit()?;
        }
        let memory = vm.setup_memory(size, flags)?;
        Ok(Self {
            boot_cpu: vm.vcpu(0),
            vm,
            memory,
            fresh: created,
        })
    }
}

const fn reg_name(register: Register) -> RegName {
    match register {
        Register::Rax => RegName::Rax,
        Register::Rbx => RegName::Rbx,
        Register::Rcx => RegName::Rcx,
        Register::Rdx => RegName::Rdx,
        Register::Rsi => RegName::Rsi,
        Register::Rdi => RegName::Rdi,
        Register::Rbp => RegName::Rbp,
        Register::Rsp => RegName::Rsp,
        Register::Rip => RegName::Rip,
        Register::Rflags => RegName::Rflags,
        Register::Cr0 => RegName::Cr0,
        Register::Cr3 => RegName::Cr3,
        Register::Cr4 => RegName::Cr4,
        Register::Efer => RegName::Efer,
        Register::Cs => RegName::Cs,
        Register::Ds => RegName::Ds,
        Register::Es => RegName::Es,
        Register::Fs => RegName::Fs,
        Register::Gs => RegName::Gs,
        Register::Ss => RegName::Ss,
        Register::Tr => RegName::Tr,
        Register::Ldtr => RegName::Ldtr,
        Register::Gdtr => RegName::Gdtr,
        Register::Idtr => RegName::Idtr,
    }
}

impl LoadTarget for VmTarget {
    fn low_memory(&self) -> u64 {
        self.memory.low_size()
    }

    fn high_memory(&self) -> u64 {
        self.memory.high_size()
    }

    fn write(&mut self, gpa: u64, data: &[u8]) -> TargetResult<()> {
        Ok(self.memory.write_bytes(gpa, data)?)
    }

    fn read(&self, gpa: u64, data: &mut [u8]) -> TargetResult<()> {
        Ok(self.memory.read_bytes(gpa, data)?)
    }

    fn zero(&mut self, gpa: u64, len: u64) -> TargetResult<()> {
        if self.fresh && self.memory.contains(gpa, len) {
            return Ok(());
        }
        Ok(self.memory.fill(gpa, len, 0)?)
    }

    fn set_register(&mut self, register: Register, value: u64) -> TargetResult<()> {
        Ok(self.boot_cpu.set_register(reg_name(register), value)?)
    }

    fn set_descriptor(&mut self, register: Register, descriptor: Descriptor) -> TargetResult<()> {
        let desc = SegDesc {
            base: descriptor.base,
            limit: descriptor.limit,
            access: descriptor.access,
        };
        Ok(self.boot_cpu.set_desc(reg_name(register), desc)?)
    }

    fn enable_unrestricted_guest(&mut self) -> TargetResult<()> {
        Ok(self
            .boot_cpu
            .set_capability(Capability::UnrestrictedGuest, 1)?)
    }

    fn has_tsc_leaf(&self) -> bool {
        // FreeBSD's own vmm hides leaf 0x15; ours, which is known by its
        // extension range, answers it where the host's CPU could have it: not on
        // AMD's, whose conventions the guest's CPUID follows.
        self.vm.ext_version().is_some() && !host_is_amd()
    }
}

/// The host's CPU is AMD's, or Hygon's.
fn host_is_amd() -> bool {
    let leaf = core::arch::x86_64::__cpuid(0);
    matches!(&leaf.ebx.to_le_bytes(), b"Auth" | b"Hygo")
}
