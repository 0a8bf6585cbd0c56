//! Instructions that touch memory-mapped devices.

use vmm_core::cpu::{Access, Event};
use vmm_core::inst::{self, CodeMode, DecodeError, Hint, Outcome, decode};
use vmm_core::paging::WalkError;
use vmmapi::abi::limits::{PROT_READ, PROT_WRITE};
use vmmapi::{GuestMemory, GuestPaging, InstEmul, RegName, Result, Runner, Vcpu, VmExit};

use crate::bus::{MmioBus, ones};
use crate::vcpu::Next;
use crate::vcpu::ops::VcpuOps;
use crate::vcpu::regfile::RegFile;

/// Guest memory and devices, as one instruction sees them.
struct View<'a, V> {
    vcpu: &'a V,
    memory: &'a GuestMemory,
    devices: &'a MmioBus,
    paging: GuestPaging,
    /// The kernel has given the guest a page fault.
    faulted: bool,
    error: Option<vmmapi::Error>,
}

impl<V: VcpuOps> inst::Bus for View<'_, V> {
    fn translate(&mut self, gla: u64, access: Access) -> std::result::Result<u64, WalkError> {
        let prot = if access.contains(Access::WRITE) {
            PROT_WRITE
        } else {
            PROT_READ
        };
        match self.vcpu.translate(&self.paging, gla, prot) {
            Ok(Some(gpa)) => return Ok(gpa),
            Ok(None) => self.faulted = true,
            Err(e) => self.error = Some(e),
        }
        // The emulator stops; `faulted` or `error` says what happened.
        Err(WalkError::NoMemory(gla))
    }

    fn read(&mut self, gpa: u64, size: u8) -> std::result::Result<u64, inst::BusError> {
        let mut bytes = [0; 8];
        if self.memory.contains(gpa, size.into())
            && let Some(b) = bytes.get_mut(..usize::from(size))
            && self.memory.read_bytes(gpa, b).is_ok()
        {
            return Ok(u64::from_le_bytes(bytes));
        }
        // Where nobody answers, a bus reads as ones.
        let device = self.devices.get(gpa, size);
        Ok(device.map_or(u64::MAX, |d| d.mmio_read(gpa, size)) & ones(size))
    }

    fn write(&mut self, gpa: u64, size: u8, value: u64) -> std::result::Result<(), inst::BusError> {
        let bytes = value.to_le_bytes();
        if self.memory.contains(gpa, size.into())
            && let Some(b) = bytes.get(..usize::from(size))
            && self.memory.write_bytes(gpa, b).is_ok()
        {
            return Ok(());
        }
        if let Some(d) = self.devices.get(gpa, size) {
            d.mmio_write(gpa, size, value & ones(size));
        }
        Ok(())
    }
}

fn code_mode(e: &InstEmul) -> CodeMode {
    match (e.paging.cpu_mode == vmmapi::CpuMode::Bits64.raw(), e.cs_d) {
        (true, _) => CodeMode::Bits64,
        (_, true) => CodeMode::Bits32,
        _ => CodeMode::Bits16,
    }
}

/// Emulates the instruction of an exit.
pub fn emulate(
    devices: &MmioBus,
    memory: &GuestMemory,
    vcpu: &Vcpu,
    runner: &mut Runner,
    exit: &VmExit,
    e: &InstEmul,
) -> Result<Next> {
    let mut fetched = Vec::new();
    let mut bytes = e.bytes();
    if bytes.is_empty() {
        // The CPU gave no bytes.
        fetched = vcpu.peek(memory, e.cs_base.wrapping_add(exit.rip), 15);
        bytes = &fetched;
    }
    let inst = match decode(bytes, code_mode(e)) {
        Ok(inst) => inst,
        Err(DecodeError::TooLong) => {
            vcpu.inject_fault(crate::vcpu::GP, Some(0))?;
            return Ok(Next::Run);
        }
        Err(why) => return Ok(Next::Fail(unsupported(e.gpa, bytes, &format!("{why:?}")))),
    };
    let mut regs = RegFile::new(vcpu, exit.rip, e.paging, runner.registers())?;
    let mut view = View {
        vcpu,
        memory,
        devices,
        paging: e.paging,
        faulted: false,
        error: None,
    };
    // 0 is also what there is for a CPU that does not tell.
    let hint = (e.gla != 0).then_some(Hint {
        gla: e.gla,
        gpa: e.gpa,
    });
    let outcome = inst::emulate(&inst, &mut regs, &mut view, hint);
    if let Some(error) = view.error {
        return Err(error);
    }
    match outcome {
        Outcome::Done => {
            regs.write_back(runner)?;
            if exit.inst_length != inst.len {
                vcpu.set_register(RegName::Rip, exit.rip.wrapping_add(inst.len.into()))?;
            }
        }
        Outcome::Restart => {
            regs.write_back(runner)?;
            vcpu.restart_instruction()?;
        }
        // The registers say how far a string instruction came; the kernel has
        // put the page fault on its way.
        _ if view.faulted => regs.write_back(runner)?,
        Outcome::Fault(Event {
            vector, error_code, ..
        }) => {
            regs.write_back(runner)?;
            vcpu.inject_fault(vector, error_code)?;
        }
        Outcome::NotHere | Outcome::Unsupported => {
            return Ok(Next::Fail(unsupported(
                e.gpa,
                bytes,
                &format!("{:?}", inst.op),
            )));
        }
    }
    drop(fetched);
    Ok(Next::Run)
}

fn unsupported(gpa: u64, bytes: &[u8], what: &str) -> String {
    format!(
        "the instruction {bytes:02x?} ({what}) cannot be emulated on device memory at guest-physical {gpa:#x}; \
         please report these bytes"
    )
}
