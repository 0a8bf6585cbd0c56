//! Memory segments and where they are mapped.

use super::{Mapping, MemSegment, Vm};
use crate::error::{Error, Result};
use vmm_abi::layout::*;
use vmm_abi::request::*;

impl Vm {
    /// Makes a memory segment; `name` is for device memory.
    ///
    /// # Errors
    /// EEXIST, EINVAL; [`Error::Name`] where the name does not fit.
    pub fn alloc_memseg(&self, segid: i32, len: u64, name: Option<&str>) -> Result<()> {
        let mut arg = VmMemseg {
            segid,
            len,
            ..VmMemseg::default()
        };
        if !set_c_name(&mut arg.name, name.unwrap_or("").as_bytes()) {
            return Err(Error::Name {
                vm: name.unwrap_or("").into(),
            });
        }
        self.request(VM_ALLOC_MEMSEG, &mut arg)
    }

    /// Describes a memory segment; `None` where there is none.
    ///
    /// # Errors
    /// EINVAL for a number that no segment can have.
    pub fn memseg(&self, segid: i32) -> Result<Option<MemSegment>> {
        let mut arg = VmMemseg {
            segid,
            ..VmMemseg::default()
        };
        self.request(VM_GET_MEMSEG, &mut arg)?;
        if arg.len == 0 {
            return Ok(None);
        }
        let name = c_name(&arg.name).unwrap_or(&arg.name);
        let name = (!name.is_empty()).then(|| String::from_utf8_lossy(name).into_owned());
        Ok(Some(MemSegment { len: arg.len, name }))
    }

    /// Maps part of a segment into guest-physical memory.
    ///
    /// # Errors
    /// EINVAL for ranges out of bounds, ENOSPC when there are too many.
    pub fn mmap_memseg(&self, m: &Mapping) -> Result<()> {
        let mut arg = VmMemmap {
            gpa: m.gpa,
            segid: m.segid,
            _pad0: 0,
            segoff: m.segoff as i64,
            len: m.len,
            prot: m.prot,
            flags: m.flags,
        };
        self.request(VM_MMAP_MEMSEG, &mut arg)
    }

    /// Unmaps guest memory (FreeBSD 13 and later).
    ///
    /// # Errors
    /// EINVAL where that is no mapping.
    pub fn munmap_memseg(&self, gpa: u64, len: u64) -> Result<()> {
        self.request(VM_MUNMAP_MEMSEG, &mut VmMunmap { gpa, len })
    }

    /// The first mapping at or above an address; `None` where there is none.
    ///
    /// # Errors
    /// What the kernel says, other than ENOENT.
    pub fn mmap_getnext(&self, gpa: u64) -> Result<Option<Mapping>> {
        let mut arg = VmMemmap {
            gpa,
            ..VmMemmap::default()
        };
        match self.request(VM_MMAP_GETNEXT, &mut arg) {
            Ok(()) => Ok(Some(Mapping {
                gpa: arg.gpa,
                segid: arg.segid,
                segoff: arg.segoff as u64,
                len: arg.len,
                prot: arg.prot,
                flags: arg.flags,
            })),
            Err(e) if e.errno() == Some(libc::ENOENT) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// All mappings, by address.
    ///
    /// # Errors
    /// As [`Vm::mmap_getnext`].
    pub fn mappings(&self) -> Result<Vec<Mapping>> {
        let mut all = Vec::new();
        let mut gpa = 0;
        while let Some(m) = self.mmap_getnext(gpa)? {
            all.push(m);
            match m.gpa.checked_add(m.len) {
                Some(next) if next > gpa => gpa = next,
                _ => break,
            }
        }
        Ok(all)
    }

    /// Nested page-table entries of a page, from the top level down.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn gpa_pmap(&self, gpa: u64) -> Result<Vec<u64>> {
        let mut arg = VmGpaPte {
            gpa,
            ..VmGpaPte::default()
        };
        self.request(VM_GET_GPA_PMAP, &mut arg)?;
        let n = usize::try_from(arg.ptenum).unwrap_or(0).min(arg.pte.len());
        Ok(arg.pte[..n].to_vec())
    }
}
