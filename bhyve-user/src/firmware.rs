//! `-l bootrom`: firmware in place of a loaded kernel. It is a ROM that ends at
//! 4 GiB, where the first CPU starts (SDM Vol. 3A §10.1.4), with the flash for its
//! variables below.

pub mod fwctl;
pub mod variables;

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vmmapi::abi::limits::VM_BOOTROM;
use vmmapi::{Capability, Mapping, Segment, Vm};

use self::fwctl::Fwctl;
use self::variables::Variables;
use crate::bus::{BusError, Buses, MmioDevice};
use crate::config::BootRom;

/// Where the ROM ends.
const TOP: u64 = 1 << 32;
/// Below lie the I/O APIC, HPET and local APICs.
const LARGEST: u64 = 16 << 20;
const PAGE: u64 = 4096;
/// The guest may read and execute it.
const PROT_READ_EXEC: i32 = 1 | 4;

/// Why there is no firmware.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("-l bootrom,{0}: {1}")]
    File(PathBuf, io::Error),
    /// It cannot be a ROM.
    #[error("-l bootrom,{0}: {1} bytes; a ROM has whole pages of 4096 bytes, and at most 16 MiB")]
    Size(PathBuf, u64),
    /// Something else is where it belongs.
    #[error("-l bootrom,{0}: {1}")]
    Bus(PathBuf, BusError),
    /// The kernel says no.
    #[error(transparent)]
    Vmm(#[from] vmmapi::Error),
}

/// Opens the VM, which is made if it is not there: firmware needs no loader.
///
/// # Errors
/// What the kernel says.
pub fn open(name: &str) -> Result<Vm, vmmapi::Error> {
    match Vm::create(name) {
        Err(e) if e.errno() == Some(nix::libc::EEXIST) => {
            let vm = Vm::open(name)?;
            // What an earlier run has left of its devices' state must go.
            vm.reinit()?;
            Ok(vm)
        }
        made => made,
    }
}

/// Puts the firmware into the VM and its first CPU to the reset vector; `cpus` is
/// what it can learn.
///
/// # Errors
/// See [`Error`].
pub fn install(vm: &Vm, buses: &Buses, firmware: &BootRom, cpus: u32) -> Result<(), Error> {
    let path = firmware.rom.as_path();
    if firmware.qemu {
        eprintln!(
            "-l bootrom,{},fwcfg=qemu: there is bhyve's own interface only; the firmware may do with it\r",
            path.display()
        );
    }
    let rom = read(path)?;
    let len = rom.len() as u64;
    let segment = vm.create_devmem(VM_BOOTROM, "bootrom", len)?;
    segment
        .write_bytes(0, &rom)
        .map_err(|e| Error::File(path.into(), io::Error::other(e)))?;
    let gpa = TOP - len;
    if vm.mmap_getnext(gpa)?.is_none_or(|m| m.gpa != gpa) {
        vm.mmap_memseg(&Mapping {
            gpa,
            segid: VM_BOOTROM,
            segoff: 0,
            len,
            prot: PROT_READ_EXEC,
            flags: 0,
        })?;
    }
    buses
        .mmio
        .map(gpa, len, Arc::new(Rom { segment, gpa }))
        .map_err(|e| Error::Bus(path.into(), e))?;
    if let Some(path) = &firmware.variables {
        let flash =
            Variables::open(path, gpa, LARGEST - len).map_err(|e| Error::File(path.into(), e))?;
        let (at, len) = flash.place();
        buses
            .mmio
            .map(at, len, Arc::new(flash))
            .map_err(|e| Error::Bus(path.into(), e))?;
    }
    Fwctl::attach(buses, cpus).map_err(|e| Error::Bus(path.into(), e))?;
    let bsp = vm.vcpu(0);
    bsp.reset()?;
    // It starts in real mode.
    bsp.set_capability(Capability::UnrestrictedGuest, 1)?;
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    let fail = |e| Error::File(path.into(), e);
    let file = File::open(path).map_err(fail)?;
    let len = file.metadata().map_err(fail)?.len();
    let mut rom = Vec::new();
    file.take(LARGEST + 1).read_to_end(&mut rom).map_err(fail)?;
    let got = rom.len() as u64;
    if got == 0 || got > LARGEST || !got.is_multiple_of(PAGE) {
        return Err(Error::Size(path.into(), len.max(got)));
    }
    Ok(rom)
}

/// The ROM for emulated instructions; others read it by themselves.
struct Rom {
    segment: Segment,
    gpa: u64,
}

impl MmioDevice for Rom {
    fn mmio_read(&self, gpa: u64, size: u8) -> u64 {
        let mut bytes = [0; 8];
        if let Some(part) = bytes.get_mut(..usize::from(size)) {
            // The bus lets nothing through that is outside.
            let _ = self.segment.read_bytes(gpa.wrapping_sub(self.gpa), part);
        }
        u64::from_le_bytes(bytes)
    }

    /// It is a ROM.
    fn mmio_write(&self, _gpa: u64, _size: u8, _value: u64) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_a_rom_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("fw.fd");
        assert!(matches!(read(&file), Err(Error::File(..))));
        for len in [0, 1, 4095, 4097, (16 << 20) + 4096] {
            std::fs::write(&file, vec![0; len]).unwrap();
            let e = read(&file).unwrap_err().to_string();
            assert!(e.contains("fw.fd") && e.contains("16 MiB"), "{len}: {e}");
        }
        for len in [4096, 16 << 20] {
            std::fs::write(&file, vec![0; len]).unwrap();
            assert_eq!(read(&file).unwrap().len(), len);
        }
    }
}
