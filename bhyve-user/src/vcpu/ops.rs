//! What emulation does to a vCPU, so that tests can stand in for the kernel.

use vmmapi::{GuestMemory, GuestPaging, RegName, Result, Vcpu};

use crate::bus::MmioBus;

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

/// System memory, and devices where there is none.
pub struct Physical<'a> {
    /// System memory.
    pub memory: &'a GuestMemory,
    /// Devices.
    pub mmio: &'a MmioBus,
}

impl Memory for Physical<'_> {
    fn read(&self, gpa: u64, bytes: &mut [u8]) -> bool {
        if self.memory.read_bytes(gpa, bytes).is_ok() {
            return true;
        }
        let size = bytes.len() as u8;
        let Some(device) = self.mmio.get(gpa, size) else {
            return false;
        };
        let value = device.mmio_read(gpa, size);
        for (b, v) in bytes.iter_mut().zip(value.to_le_bytes()) {
            *b = v;
        }
        true
    }

    fn write(&self, gpa: u64, bytes: &[u8]) -> bool {
        if self.memory.write_bytes(gpa, bytes).is_ok() {
            return true;
        }
        let size = bytes.len() as u8;
        let Some(device) = self.mmio.get(gpa, size) else {
            return false;
        };
        let value = bytes.iter().rev().fold(0, |v, &b| v << 8 | u64::from(b));
        device.mmio_write(gpa, size, value);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::MmioDevice;
    use std::sync::{Arc, Mutex};

    struct Register(Mutex<u64>);

    impl MmioDevice for Register {
        fn mmio_read(&self, gpa: u64, size: u8) -> u64 {
            *crate::lock(&self.0) >> (8 * (gpa & 7)) & crate::bus::ones(size)
        }
        fn mmio_write(&self, gpa: u64, size: u8, value: u64) {
            *crate::lock(&self.0) = gpa << 32 | u64::from(size) << 24 | value;
        }
    }

    #[test]
    fn what_is_not_memory_is_a_device_or_nothing() {
        let memory = GuestMemory::anonymous(0x1000).unwrap();
        let mmio = MmioBus::default();
        let register = Arc::new(Register(Mutex::new(0x8877_6655_4433_2211)));
        mmio.map(0xff00_0000, 8, register.clone()).unwrap();
        let all = Physical {
            memory: &memory,
            mmio: &mmio,
        };
        let mut two = [0; 2];
        assert!(all.write(0xffe, &[1, 2]) && all.read(0xffe, &mut two));
        assert_eq!(two, [1, 2]);
        assert!(all.read(0xff00_0002, &mut two));
        assert_eq!(two, [0x33, 0x44]);
        assert!(all.write(0xff00_0004, &[0xaa, 0xbb]));
        assert_eq!(*register.0.lock().unwrap(), 0xff00_0004_0200_bbaa);
        assert!(!all.read(0x1000, &mut two) && !all.write(0xff00_0007, &two));
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
