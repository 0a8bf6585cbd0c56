//! A VM's memory: segments and mappings as the ioctls change them, and the
//! nested page tables behind them.

use core::ffi::c_char;
use core::ptr::{self, NonNull};

use vmm_abi::layout::{EXT_OUT_RINGS, EXT_RUN_PAGES, c_name, set_c_name};
use vmm_core::lapic::DEFAULT_BASE;
use vmm_hw::ept::{Invalidation, MemType, Prot};
use vmm_hw::nested::NestedTables;

use crate::errno;
use crate::ffi;
use crate::global;
use crate::iommu::Domain;
use crate::memory::{self, CHUNK, MemMap, SEG_NAME_MAX};
use crate::os::Os;
use crate::ppt;
use crate::vm::{FILE_NAME_MAX, NAME_MAX, Vm, check_name};

/// Guest memory and the tables that map it.
pub struct Memory {
    /// Segments and mappings.
    pub map: MemMap,
    /// Nested page tables.
    pub nested: NestedTables<Os>,
    /// What the VM's PCI functions see of its memory, while it has any. Who holds ppt's
    /// lock takes it out to do with it what this lock must not be held for.
    pub iommu: Option<Domain>,
    /// There is one, here or taken out.
    pub dma: bool,
}

impl Memory {
    /// Puts backing memory into the nested page tables, because the guest fetched an
    /// instruction there or for another reason. Where large pages are not to be executable,
    /// the 2 MiB around a fetch become small ones that are. Another access, by a CPU that
    /// waited meanwhile or elsewhere in a page of 1 GiB, puts the large one back, which is
    /// safe, and the next fetch splits it again.
    pub fn enter(&mut self, gpa: u64, b: &memory::Backing, fetch: bool) -> Result<(), i32> {
        let (mut size, mut step) = (b.size, b.size);
        let mut prot = memory::ept_prot(b.prot);
        if size > 4096 && global::get().split_executable {
            if fetch {
                (size, step) = (2 << 20, 4096);
            } else {
                prot.remove(Prot::EXEC);
            }
        }
        let start = gpa & !(size - 1);
        let offset = (b.hpa & !(size - 1)).wrapping_sub(start);
        let mut at = start;
        while at - start < size {
            // Rights that grow leave nothing wrong in a CPU's caches.
            let _ = self
                .nested
                .map(at, at.wrapping_add(offset), step, prot, MemType::WriteBack)
                .map_err(|_| errno::ENOMEM)?;
            at += step;
        }
        Ok(())
    }

    /// Whether PCI functions may access the guest's memory now, so that none
    /// of it can be taken away.
    pub fn dma(&self) -> bool {
        self.dma
    }

    /// Shows all of the guest's system memory to the PCI functions in `to`.
    /// EINVAL: part of it is not wired. ENOMEM.
    pub fn fill(&self, to: &mut Domain) -> Result<(), i32> {
        for m in self.map.system() {
            if m.flags & memory::MAP_WIRED == 0 {
                return Err(errno::EINVAL);
            }
            self.show(to, m)?;
        }
        Ok(())
    }

    /// Shows one mapping of wired system memory to PCI functions.
    fn show(&self, to: &mut Domain, m: &memory::Map) -> Result<(), i32> {
        let seg = self.map.segment(m.segid).ok_or(errno::EINVAL)?;
        let prot = memory::ept_prot(m.prot);
        let mut at = 0;
        while at < m.len {
            let (hpa, order) = seg.page(m.segoff + at)?;
            let run = 4096_u64 << order;
            // To the end of the host's contiguous run, or of the mapping.
            let len = (run - (hpa & (run - 1))).min(m.len - at);
            to.map(m.gpa + at, hpa, len, prot)?;
            at += len;
        }
        Ok(())
    }
}

impl Vm {
    /// VM_ALLOC_MEMSEG: makes a segment, with a node of its own if it has a
    /// name.
    pub fn alloc_memseg(&self, segid: i32, len: u64, name: &[u8]) -> Result<(), i32> {
        let name = c_name(name).ok_or(errno::EINVAL)?;
        let mut mem = self.mem.lock();
        // Nobody would remove its node any more.
        if self.dying() {
            return Err(errno::ENXIO);
        }
        if name.is_empty() {
            return mem.map.alloc_segment(segid, len, None).map(|_| ());
        }
        let mut stored = [0; SEG_NAME_MAX + 1];
        if !set_c_name(&mut stored, name) {
            return Err(errno::ENAMETOOLONG);
        }
        let seg = mem.map.alloc_segment(segid, len, Some(stored))?;
        match self.segment_node(name, segid) {
            Ok(node) => {
                seg.node = Some(node);
                Ok(())
            }
            Err(e) => {
                mem.map.free_segment(segid);
                Err(e)
            }
        }
    }

    /// VM_GET_MEMSEG: a segment's length, 0 if there is none, and its name.
    pub fn get_memseg(&self, segid: i32, name: &mut [u8]) -> Result<u64, i32> {
        let id = usize::try_from(segid).map_err(|_| errno::EINVAL)?;
        if id >= memory::MAX_SEGS {
            return Err(errno::EINVAL);
        }
        name.fill(0);
        let mem = self.mem.lock();
        let Some(seg) = mem.map.segment(id) else {
            return Ok(0);
        };
        if !seg.sysmem {
            let text = c_name(&seg.name).unwrap_or_default();
            if !set_c_name(name, text) {
                return Err(errno::ENAMETOOLONG);
            }
        }
        Ok(seg.len)
    }

    /// The node of a device-memory segment: `/dev/vmm.io/VM.SEGMENT`.
    pub fn segment_node(&self, segment: &[u8], segid: i32) -> Result<NonNull<ffi::Node>, i32> {
        let mut name = [0; NAME_MAX + crate::memory::SEG_NAME_MAX + 2];
        let parts = self.name().iter().chain(b".").chain(segment);
        for (to, from) in name.iter_mut().zip(parts) {
            *to = *from;
        }
        check_name(segment)?;
        if self.name().len() + 1 + segment.len() > FILE_NAME_MAX {
            return Err(errno::ENAMETOOLONG);
        }
        let mut node = ptr::null_mut();
        // SAFETY: this VM is alive, and a segment's node goes before it does;
        // the name ends with NUL, as it is one longer than what fits.
        let error = unsafe {
            ffi::vmm_host_node_create(
                name.as_ptr().cast::<c_char>(),
                ptr::from_ref(self).cast_mut().cast(),
                segid,
                &mut node,
            )
        };
        if error != 0 {
            return Err(error);
        }
        NonNull::new(node).ok_or(errno::ENOMEM)
    }

    /// Maps part of a segment into the guest.
    pub fn mmap_memseg(&self, map: crate::memory::Map) -> Result<(), i32> {
        // Nobody else has the domain.
        let wired = map.flags & memory::MAP_WIRED != 0;
        let _ppt = if wired { ppt::hold() } else { None };
        let mut mem = self.mem.lock();
        mem.map.map(map)?;
        let system = mem.map.segment(map.segid).is_some_and(|s| s.sysmem);
        if wired
            && system
            && let Some(mut domain) = mem.iommu.take()
        {
            let shown = mem.show(&mut domain, &map);
            // What is mapped stays while `dma` says so.
            drop(mem);
            let seen = domain.publish();
            mem = self.mem.lock();
            mem.iommu = Some(domain);
            shown.and(seen)?;
        }
        if wired {
            // Wired memory is there from the start.
            let mut at = 0;
            while at < map.len {
                let gpa = map.gpa + at;
                let Some(b) = mem.map.backing(gpa)? else {
                    break;
                };
                mem.enter(gpa, &b, false)?;
                at += b.size - (gpa & (b.size - 1));
            }
        }
        Ok(())
    }

    /// Takes a mapping away and makes every vCPU forget it.
    pub fn munmap_memseg(&self, gpa: u64, len: u64) -> Result<(), i32> {
        let mut mem = self.mem.lock();
        if mem.dma() && mem.map.covers(gpa, len) {
            return Err(errno::EBUSY);
        }
        mem.map.unmap(gpa, len)?;
        let stale = mem.nested.unmap(gpa, len).map_err(|_| errno::ENOMEM)?;
        drop(mem);
        self.forget(stale);
        Ok(())
    }

    /// Sees to it that no vCPU uses what was taken out of the nested page
    /// tables.
    fn forget(&self, stale: Invalidation) {
        if stale == Invalidation::Required {
            // Whoever has been stopped once has left the guest, and
            // invalidates on its way back. Then the tables can go.
            for v in self.vcpus() {
                drop(v.freeze());
            }
            self.mem.lock().nested.reclaim();
        }
    }

    /// Shows the guest a stretch of a PCI function's memory space. EINVAL:
    /// there is something else. ENOMEM.
    pub fn map_mmio(&self, gpa: u64, hpa: u64, len: u64, kind: MemType) -> Result<(), i32> {
        let end = gpa.checked_add(len).ok_or(errno::EINVAL)?;
        if end > 1 << 48 || gpa <= DEFAULT_BASE && DEFAULT_BASE < end {
            return Err(errno::EINVAL);
        }
        let mut mem = self.mem.lock();
        if mem.map.overlaps(gpa, len) {
            return Err(errno::EINVAL);
        }
        mem.nested
            .map(gpa, hpa, len, Prot::READ | Prot::WRITE, kind)
            .map(|_| ())
            .map_err(|_| errno::ENOMEM)
    }

    /// Takes it away again. ENOMEM.
    pub fn unmap_mmio(&self, gpa: u64, len: u64) -> Result<(), i32> {
        let stale = self.mem.lock().nested.unmap(gpa, len);
        self.forget(stale.map_err(|_| errno::ENOMEM)?);
        Ok(())
    }

    /// VM_EXT_RELEASE: gives the host the memory in a range back, as far as it
    /// is whole chunks of 2 MiB; who touches it later finds zeroes. Returns
    /// the bytes: what went before something stands in the way counts. EINVAL:
    /// not all of it is system memory, in whole pages. EBUSY: it is wired or
    /// mapped twice, or PCI functions access it by themselves; FreeBSD: a process
    /// besides the calling one has it mapped. ENOMEM.
    pub fn release_memory(&self, gpa: u64, len: u64) -> Result<u64, i32> {
        if (gpa | len) & 0xfff != 0 || !self.mem.lock().map.covers(gpa, len) {
            return Err(errno::EINVAL);
        }
        let mut bytes = 0;
        let mut at = gpa.checked_next_multiple_of(CHUNK).ok_or(errno::EINVAL)?;
        while at.checked_add(CHUNK).is_some_and(|end| end <= gpa + len) {
            match self.release_chunk(at) {
                Ok(n) => bytes += n,
                // Userland's mappings of what went have to go too: the host
                // takes them away only after success.
                Err(_) if bytes != 0 => break,
                Err(e) => return Err(e),
            }
            at += CHUNK;
        }
        Ok(bytes)
    }

    /// One chunk of them; with an error, nothing of it went.
    fn release_chunk(&self, at: u64) -> Result<u64, i32> {
        let mut mem = self.mem.lock();
        if mem.dma() {
            return Err(errno::EBUSY);
        }
        // One after the other under the lock: nobody can map in between
        // what is about to go.
        let stale = mem.nested.unmap(at, CHUNK).map_err(|_| errno::ENOMEM)?;
        let left = mem.map.release(at);
        drop(mem);
        let bytes = left.as_ref().map_or(0, |chunk| chunk.resident());
        if stale == Invalidation::Required || bytes != 0 {
            // Not all that is there was in the nested page tables: a vCPU
            // may know where a word of the guest's is (`Pv`).
            self.generation.raise();
            // As for munmap_memseg: whoever has been stopped forgets.
            for v in self.vcpus() {
                drop(v.freeze());
            }
            self.mem.lock().nested.reclaim();
        }
        // The memory goes with what was left.
        left.map(|_| bytes)
    }

    /// A vCPU's local APIC has changed its mode: the APIC-access page is
    /// mapped only while every vCPU's accesses to it are virtualized.
    /// Elsewhere they fault, and are emulated or found to hit nothing.
    pub fn apic_mode_changed(&self, vcpu: usize, virtualized: bool) -> Result<(), i32> {
        let changed = if virtualized {
            self.no_apic_page.clear(vcpu)
        } else {
            !self.no_apic_page.set(vcpu)
        };
        if let Some(tables) = &self.avic {
            return self.update_avic(tables);
        }
        if !changed {
            return Ok(());
        }
        let mut mem = self.mem.lock();
        let prot = if self.no_apic_page.is_empty() {
            Prot::READ | Prot::WRITE
        } else {
            Prot::empty()
        };
        self.map_apic_page(&mut mem.nested, prot)
    }

    /// Maps the APIC-access page, or with no rights takes it away.
    pub fn map_apic_page(&self, nested: &mut NestedTables<Os>, prot: Prot) -> Result<(), i32> {
        if self.apic_page_used {
            // Raises the generation; whoever still has the old mapping uses
            // it at most until the next exit, and it leads to a page of this
            // VM's own.
            let _ = nested
                .map(
                    DEFAULT_BASE,
                    self.apic_access.pa(),
                    4096,
                    prot,
                    MemType::WriteBack,
                )
                .map_err(|_| errno::ENOMEM)?;
        }
        Ok(())
    }

    /// Does `f` with the page behind an address of the guest's memory
    /// (`segid` < 0), or of a device segment, which stays there meanwhile.
    /// EFAULT: there is none. ENOMEM.
    pub fn with_page<R>(
        &self,
        segid: i32,
        off: u64,
        f: impl FnOnce(u64) -> Result<R, i32>,
    ) -> Result<R, i32> {
        if segid < 0 && off >= EXT_RUN_PAGES {
            return f(self.shared_page(off).ok_or(errno::EFAULT)?);
        }
        let mem = self.mem.lock();
        let hpa = match usize::try_from(segid) {
            Ok(id) => mem.map.segment(id).ok_or(errno::EFAULT)?.page(off)?.0,
            Err(_) => mem.map.backing(off)?.ok_or(errno::EFAULT)?.hpa,
        };
        f(hpa)
    }

    /// Whether a stretch of memory can be mapped by userland. EINVAL.
    pub fn mmap_ok(&self, segid: i32, off: u64, len: u64) -> Result<(), i32> {
        if segid < 0 && off >= EXT_RUN_PAGES {
            // One at a time.
            let ok = len == 4096 && self.shared_page(off).is_some();
            return if ok { Ok(()) } else { Err(errno::EINVAL) };
        }
        let mem = self.mem.lock();
        let ok = match usize::try_from(segid) {
            Ok(id) => mem
                .map
                .segment(id)
                .is_some_and(|s| off.checked_add(len).is_some_and(|end| end <= s.len)),
            Err(_) => mem.map.covers(off, len),
        };
        if ok { Ok(()) } else { Err(errno::EINVAL) }
    }

    /// Where the run page or ring that is mapped at `off` is, if it exists.
    fn shared_page(&self, off: u64) -> Option<u64> {
        if let Some(off) = off.checked_sub(EXT_OUT_RINGS) {
            return self.out_rings.pa(usize::try_from(off >> 12).ok()?);
        }
        let id = off.checked_sub(EXT_RUN_PAGES)? >> 12;
        self.vcpu(usize::try_from(id).ok()?)
            .map(|v| v.run_page.pa())
    }

    /// The one segment behind a stretch of memory, and the offset in it.
    /// EINVAL: there is none, or more than one.
    #[cfg(feature = "freebsd")]
    pub fn segment_at(
        &self,
        segid: i32,
        off: u64,
        len: u64,
    ) -> Result<(NonNull<ffi::Memseg>, u64), i32> {
        let mem = self.mem.lock();
        let (id, at) = match usize::try_from(segid) {
            Ok(id) => (id, off),
            Err(_) => mem.map.locate(off, len).ok_or(errno::EINVAL)?,
        };
        let seg = mem.map.segment(id).ok_or(errno::EINVAL)?;
        if at.checked_add(len).is_none_or(|end| end > seg.len) {
            return Err(errno::EINVAL);
        }
        Ok((seg.store.raw(), at))
    }
}
