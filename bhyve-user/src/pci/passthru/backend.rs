//! The host's function, and what the kernel does with it for the VM.

use vmmapi::host_pci::{HostBar, HostFunction, PciAddress, Registers};

use super::msix::Entry;
use crate::sandbox;

/// What the guest's side of a passed function needs of the host.
pub trait Backend: Send + Sync {
    /// Its place, for messages.
    fn name(&self) -> String;
    /// Its BARs.
    fn bars(&self) -> Vec<HostBar>;
    /// Reads 1, 2 or 4 bytes of configuration space; ones where that fails, as a
    /// device that has gone reads.
    fn config_read(&self, offset: u16, size: u8) -> u32;
    /// Writes them.
    fn config_write(&self, offset: u16, size: u8, value: u32);
    /// Reads 1, 2 or 4 bytes of a BAR of ports.
    fn port_read(&self, bar: usize, offset: u64, size: u8) -> u32;
    /// Writes them.
    fn port_write(&self, bar: usize, offset: u64, size: u8, value: u32);
    /// Makes `[offset, offset + len)` of a memory BAR reachable by
    /// [`Backend::register_read`]. Before the sandbox.
    ///
    /// # Errors
    /// The host's reason.
    fn open_registers(&mut self, bar: usize, offset: u64, len: u64) -> Result<(), String>;
    /// Reads 1, 2 or 4 aligned bytes of a memory BAR; 0 where it is not open.
    fn register_read(&self, bar: usize, offset: u64, size: u8) -> u32;
    /// Writes them.
    fn register_write(&self, bar: usize, offset: u64, size: u8, value: u32);
    /// Shows `len` bytes of the host's memory at `hpa` to the guest at `gpa`.
    ///
    /// # Errors
    /// The kernel's reason.
    fn map(&self, gpa: u64, hpa: u64, len: u64) -> vmmapi::Result<()>;
    /// Takes them away.
    ///
    /// # Errors
    /// The kernel's reason.
    fn unmap(&self, gpa: u64, hpa: u64, len: u64) -> vmmapi::Result<()>;
    /// Has MSI arrive as `count` messages; 0 switches it off.
    ///
    /// # Errors
    /// The kernel's reason.
    fn msi(&self, address: u64, data: u64, count: u32) -> vmmapi::Result<()>;
    /// Sets an entry of MSI-X, which is on from then on.
    ///
    /// # Errors
    /// The kernel's reason.
    fn msix(&self, index: u16, entry: Entry) -> vmmapi::Result<()>;
    /// Switches MSI-X off.
    ///
    /// # Errors
    /// The kernel's reason.
    fn msix_off(&self) -> vmmapi::Result<()>;
}

/// Registers that are reached by exits.
struct Open {
    bar: usize,
    offset: u64,
    len: u64,
    registers: Registers,
}

/// A function that the VM has.
pub struct Host {
    vm: vmmapi::Vm,
    function: HostFunction,
    open: Vec<Open>,
}

/// Why a function cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The kernel says no.
    #[error(transparent)]
    Kernel(#[from] vmmapi::Error),
    /// The host's files of it.
    #[error("{0}")]
    Files(std::io::Error),
}

impl Host {
    /// Gives a function to a VM.
    ///
    /// # Errors
    /// It is not there, not to be had, or not to be used.
    pub fn bind(vm: vmmapi::Vm, at: PciAddress) -> Result<Host, BindError> {
        vm.bind_pptdev(at.bus.into(), at.slot.into(), at.func.into())?;
        // After it: the kernel has reset the device.
        let opened = HostFunction::open(at).and_then(|function| {
            for (fd, requests) in function.descriptors() {
                sandbox::limit(fd, sandbox::Purpose::Control(requests))?;
            }
            Ok(function)
        });
        match opened {
            Ok(function) => Ok(Host {
                vm,
                function,
                open: Vec::new(),
            }),
            Err(e) => {
                // The reason is more than what could be said of this.
                let _ = vm.unbind_pptdev(at.bus.into(), at.slot.into(), at.func.into());
                Err(BindError::Files(e))
            }
        }
    }

    fn registers(&self, bar: usize, offset: u64) -> Option<(&Registers, u64)> {
        let mut open = self.open.iter().filter(|o| o.bar == bar);
        open.find_map(|o| {
            let at = offset.checked_sub(o.offset)?;
            (at < o.len).then_some((&o.registers, at))
        })
    }
}

impl Backend for Host {
    fn name(&self) -> String {
        self.function.at().to_string()
    }
    fn bars(&self) -> Vec<HostBar> {
        self.function.bars().to_vec()
    }
    fn config_read(&self, offset: u16, size: u8) -> u32 {
        let read = self.function.config_read(offset, size);
        read.unwrap_or(crate::bus::ones(size) as u32)
    }
    fn config_write(&self, offset: u16, size: u8, value: u32) {
        // A device that has gone hears nothing.
        let _ = self.function.config_write(offset, size, value);
    }
    fn port_read(&self, bar: usize, offset: u64, size: u8) -> u32 {
        let read = self.function.port_read(bar, offset, size);
        read.unwrap_or(crate::bus::ones(size) as u32)
    }
    fn port_write(&self, bar: usize, offset: u64, size: u8, value: u32) {
        let _ = self.function.port_write(bar, offset, size, value);
    }
    fn open_registers(&mut self, bar: usize, offset: u64, len: u64) -> Result<(), String> {
        let map = self.function.map(bar, offset, len);
        let registers = map.map_err(|e| {
            format!("the registers beside the MSI-X table in BAR {bar} cannot be mapped: {e}")
        })?;
        self.open.push(Open {
            bar,
            offset,
            len,
            registers,
        });
        Ok(())
    }
    fn register_read(&self, bar: usize, offset: u64, size: u8) -> u32 {
        let open = self.registers(bar, offset);
        open.and_then(|(r, at)| r.read(at, size)).unwrap_or(0)
    }
    fn register_write(&self, bar: usize, offset: u64, size: u8, value: u32) {
        if let Some((r, at)) = self.registers(bar, offset) {
            r.write(at, size, value);
        }
    }
    fn map(&self, gpa: u64, hpa: u64, len: u64) -> vmmapi::Result<()> {
        self.vm.map_pptdev_mmio(self.function.at(), gpa, hpa, len)
    }
    fn unmap(&self, gpa: u64, hpa: u64, len: u64) -> vmmapi::Result<()> {
        self.vm.unmap_pptdev_mmio(self.function.at(), gpa, hpa, len)
    }
    fn msi(&self, address: u64, data: u64, count: u32) -> vmmapi::Result<()> {
        self.vm.pptdev_msi(self.function.at(), address, data, count)
    }
    fn msix(&self, index: u16, e: Entry) -> vmmapi::Result<()> {
        let at = self.function.at();
        let control = u32::from(e.masked);
        self.vm
            .pptdev_msix(at, index, e.address, e.data.into(), control)
    }
    fn msix_off(&self) -> vmmapi::Result<()> {
        self.vm.pptdev_disable_msix(self.function.at())
    }
}
