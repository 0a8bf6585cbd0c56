//! What emulation does to a vCPU, so that tests can stand in for the kernel.

use vmmapi::{GuestPaging, RegName, Result, Vcpu};

/// The part of a vCPU that emulation needs.
pub trait VcpuOps {
    /// Sets a register.
    fn set_register(&self, reg: RegName, value: u64) -> Result<()>;
    /// Several registers, in the order asked for.
    fn registers(&self, regs: &[RegName]) -> Result<Vec<u64>>;
    /// Executes the current instruction again.
    fn restart_instruction(&self) -> Result<()>;
    /// Injects an exception; RIP stays at the instruction.
    fn inject_fault(&self, vector: u8, error_code: Option<u32>) -> Result<()>;
    /// Translates a guest-linear address; a fault is injected and `None`.
    fn translate(&self, paging: &GuestPaging, gla: u64, prot: i32) -> Result<Option<u64>>;
}

impl VcpuOps for Vcpu {
    fn set_register(&self, reg: RegName, value: u64) -> Result<()> {
        Vcpu::set_register(self, reg, value)
    }
    fn registers(&self, regs: &[RegName]) -> Result<Vec<u64>> {
        Vcpu::registers(self, regs)
    }
    fn restart_instruction(&self) -> Result<()> {
        Vcpu::restart_instruction(self)
    }
    fn inject_fault(&self, vector: u8, error_code: Option<u32>) -> Result<()> {
        self.inject_exception(vector, error_code, true)
    }
    fn translate(&self, paging: &GuestPaging, gla: u64, prot: i32) -> Result<Option<u64>> {
        self.gla2gpa_or_fault(paging, gla, prot)
    }
}

/// Guest memory as emulation needs it.
pub trait Memory {
    /// Reads bytes; false where there is no memory.
    fn read(&self, gpa: u64, bytes: &mut [u8]) -> bool;
    /// Writes bytes; false where there is no memory.
    fn write(&self, gpa: u64, bytes: &[u8]) -> bool;
}

impl Memory for vmmapi::GuestMemory {
    fn read(&self, gpa: u64, bytes: &mut [u8]) -> bool {
        self.read_bytes(gpa, bytes).is_ok()
    }
    fn write(&self, gpa: u64, bytes: &[u8]) -> bool {
        self.write_bytes(gpa, bytes).is_ok()
    }
}

#[cfg(test)]
pub(crate) mod fake {
    use super::*;
    use std::cell::RefCell;
    use std::collections::BTreeMap;

    /// A vCPU whose linear addresses are physical, with 64 KiB of memory, in
    /// which page 0xf is not mapped.
    #[derive(Default)]
    pub struct Fake {
        pub regs: RefCell<BTreeMap<u32, u64>>,
        pub restarted: RefCell<bool>,
        pub faults: RefCell<Vec<(u8, Option<u32>)>>,
        pub memory: RefCell<Vec<u8>>,
    }

    impl Fake {
        pub fn new() -> Fake {
            Fake {
                memory: RefCell::new(vec![0; 0x1_0000]),
                ..Fake::default()
            }
        }
        pub fn get(&self, reg: RegName) -> Option<u64> {
            self.regs.borrow().get(&reg.raw()).copied()
        }
    }

    impl VcpuOps for Fake {
        fn set_register(&self, reg: RegName, value: u64) -> Result<()> {
            self.regs.borrow_mut().insert(reg.raw(), value);
            Ok(())
        }
        fn registers(&self, regs: &[RegName]) -> Result<Vec<u64>> {
            Ok(regs.iter().map(|r| self.get(*r).unwrap_or(0)).collect())
        }
        fn restart_instruction(&self) -> Result<()> {
            *self.restarted.borrow_mut() = true;
            Ok(())
        }
        fn inject_fault(&self, vector: u8, error_code: Option<u32>) -> Result<()> {
            self.faults.borrow_mut().push((vector, error_code));
            Ok(())
        }
        fn translate(&self, _: &GuestPaging, gla: u64, _: i32) -> Result<Option<u64>> {
            if gla >> 12 == 0xf {
                self.faults.borrow_mut().push((14, Some(0)));
                return Ok(None);
            }
            Ok(Some(gla))
        }
    }

    impl Memory for Fake {
        fn read(&self, gpa: u64, bytes: &mut [u8]) -> bool {
            let m = self.memory.borrow();
            let Some(from) = m.get(gpa as usize..gpa as usize + bytes.len()) else {
                return false;
            };
            bytes.copy_from_slice(from);
            true
        }
        fn write(&self, gpa: u64, bytes: &[u8]) -> bool {
            let mut m = self.memory.borrow_mut();
            let Some(to) = m.get_mut(gpa as usize..gpa as usize + bytes.len()) else {
                return false;
            };
            to.copy_from_slice(bytes);
            true
        }
    }
}
