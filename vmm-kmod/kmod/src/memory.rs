//! Guest memory: segments, where they stand in the guest's physical address
//! space, and the nested page tables that are filled from them as the guest
//! touches it.

#[cfg_attr(feature = "freebsd", path = "memory/freebsd.rs")]
#[cfg_attr(not(feature = "freebsd"), path = "memory/linux.rs")]
pub mod store;

use alloc::boxed::Box;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};

use vmm_core::cpu::Access;
use vmm_core::host::{Gpa, Host, Hpa};
use vmm_hw::ept::Prot;

use crate::errno;
use crate::ffi;
use crate::os::Os;
use crate::sync::NoMemory;
use store::{Chunk, Store};

/// Segments a VM can have: system memory, boot ROM, frame buffer, and room.
pub const MAX_SEGS: usize = 8;
/// Mappings a VM can have.
pub const MAX_MAPS: usize = 16;
/// Longest name of a device-memory segment, bytes without the NUL.
pub const SEG_NAME_MAX: usize = 63;

const PAGE: u64 = 4096;
/// Piece of a segment whose place the host is asked for once.
pub const CHUNK: u64 = 2 << 20;
const CHUNK_ORDER: u32 = CHUNK.trailing_zeros() - PAGE.trailing_zeros();

/// PROT_READ, PROT_WRITE, PROT_EXEC as both hosts number them.
pub const PROT_READ: i32 = 1;
/// See [`PROT_READ`].
pub const PROT_WRITE: i32 = 2;
/// See [`PROT_READ`].
pub const PROT_EXEC: i32 = 4;
const PROT_ALL: i32 = PROT_READ | PROT_WRITE | PROT_EXEC;

/// Mapping is wired (VM_MEMMAP_F_WIRED).
pub const MAP_WIRED: i32 = 1;
/// A piece of memory that can be mapped into the guest.
pub struct Segment {
    /// The host's memory.
    pub store: Store,
    /// Where the host has put each chunk, as far as that is known and the
    /// chunk is contiguous: physical address | order << 1 | 1. Pages stay
    /// where they are until the segment goes, or they are released.
    chunks: Box<[AtomicU64]>,
    /// Bytes.
    pub len: u64,
    /// System memory, or device memory with a node of its own.
    pub sysmem: bool,
    /// Name of device memory, empty for system memory.
    pub name: [u8; SEG_NAME_MAX + 1],
    /// `/dev/vmm.io/VM.NAME` of device memory.
    pub node: Option<NonNull<ffi::Node>>,
}

// SAFETY: the node is only used to remove it.
unsafe impl Send for Segment {}

impl Segment {
    fn new(len: u64, sysmem: bool, name: [u8; SEG_NAME_MAX + 1]) -> Result<Self, NoMemory> {
        let count = usize::try_from(len.div_ceil(CHUNK)).map_err(|_| NoMemory)?;
        let chunks = crate::sync::try_slice(count, |_| AtomicU64::new(0))?;
        Ok(Segment {
            store: Store::new(len)?,
            chunks,
            len,
            sysmem,
            name,
            node: None,
        })
    }

    /// The page at `off`, allocated if need be, and the order of the
    /// contiguous run it is in.
    pub fn page(&self, off: u64) -> Result<(Hpa, u32), i32> {
        if off < self.len
            && let Some(known) = self.known(off)
        {
            return Ok(known);
        }
        let (pa, order) = self.store.page(off)?;
        if order >= CHUNK_ORDER
            && let Some(chunk) = self.chunks.get((off / CHUNK) as usize)
        {
            let base = pa & !(CHUNK - 1);
            chunk.store(base | u64::from(order) << 1 | 1, Ordering::Relaxed);
        }
        Ok((pa, order))
    }

    /// As [`Segment::page`], without asking the host: None if that would be
    /// needed.
    #[inline]
    fn known(&self, off: u64) -> Option<(Hpa, u32)> {
        let chunk = self.chunks.get((off / CHUNK) as usize)?;
        let v = chunk.load(Ordering::Relaxed);
        if v == 0 {
            return None;
        }
        let in_chunk = off & (CHUNK - 1) & !(PAGE - 1);
        Some((v & !(CHUNK - 1) | in_chunk, (v & (CHUNK - 1)) as u32 >> 1))
    }

    /// Takes the host memory of the chunk at `off` out of the segment. EBUSY.
    fn detach(&self, off: u64) -> Result<Chunk, i32> {
        if let Some(known) = self.chunks.get((off / CHUNK) as usize) {
            known.store(0, Ordering::Relaxed);
        }
        self.store.detach(off)
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        if let Some(node) = self.node {
            // SAFETY: the node is this segment's and is removed once.
            unsafe { ffi::vmm_host_node_destroy(node.as_ptr()) }
        }
    }
}

/// A stretch of guest-physical addresses backed by a segment.
#[derive(Clone, Copy, Debug)]
pub struct Map {
    /// First guest-physical address.
    pub gpa: Gpa,
    /// Bytes.
    pub len: u64,
    /// Segment.
    pub segid: usize,
    /// Offset into the segment.
    pub segoff: u64,
    /// PROT_* bits.
    pub prot: i32,
    /// MAP_* bits.
    pub flags: i32,
}

impl Map {
    fn end(&self) -> u64 {
        self.gpa.saturating_add(self.len)
    }

    /// Whether it has any of `[off, off + len)` of a segment.
    fn shows(&self, segid: usize, off: u64, len: u64) -> bool {
        self.segid == segid
            && off < self.segoff.saturating_add(self.len)
            && self.segoff < off.saturating_add(len)
    }

    fn contains(&self, gpa: Gpa) -> bool {
        gpa >= self.gpa && gpa < self.end()
    }
}

/// What is at a guest-physical address.
#[derive(Clone, Copy, Debug)]
pub struct Backing {
    /// Host-physical address of the 4 KiB page.
    pub hpa: Hpa,
    /// PROT_* bits.
    pub prot: i32,
    /// Largest page size (bytes) that one nested mapping around it may have.
    pub size: u64,
}

/// Segments and mappings of a VM.
#[derive(Default)]
pub struct MemMap {
    segs: [Option<Box<Segment>>; MAX_SEGS],
    maps: [Option<Map>; MAX_MAPS],
    /// No slot of `maps` from here on is taken.
    maps_end: usize,
}

impl MemMap {
    /// Makes a segment.
    ///
    /// EINVAL for an impossible id or length or a different segment of that
    /// id, EEXIST if it is there already, ENOMEM.
    pub fn alloc_segment(
        &mut self,
        segid: i32,
        len: u64,
        name: Option<[u8; SEG_NAME_MAX + 1]>,
    ) -> Result<&mut Segment, i32> {
        let slot = usize::try_from(segid)
            .ok()
            .and_then(|i| self.segs.get_mut(i))
            .ok_or(errno::EINVAL)?;
        if len == 0 || len & (PAGE - 1) != 0 {
            return Err(errno::EINVAL);
        }
        if let Some(old) = slot {
            let same = old.len == len && old.sysmem == name.is_none();
            return Err(if same { errno::EEXIST } else { errno::EINVAL });
        }
        let sysmem = name.is_none();
        let seg = Segment::new(len, sysmem, name.unwrap_or([0; SEG_NAME_MAX + 1]))
            .and_then(crate::sync::try_box)
            .map_err(|_| errno::ENOMEM)?;
        Ok(slot.insert(seg))
    }

    /// Takes back a segment that could not be given a node.
    pub fn free_segment(&mut self, segid: i32) {
        if let Some(slot) = usize::try_from(segid)
            .ok()
            .and_then(|i| self.segs.get_mut(i))
        {
            *slot = None;
        }
    }

    /// Takes the nodes of all segments away from them.
    pub fn take_nodes(&mut self) -> impl Iterator<Item = NonNull<ffi::Node>> {
        self.segs.iter_mut().flatten().filter_map(|s| s.node.take())
    }

    /// Removes the mappings of device memory, which a guest may have moved;
    /// calls `f` with where each was. System memory stays where it is.
    pub fn unmap_devices(&mut self, mut f: impl FnMut(Gpa, u64)) {
        let segs = &self.segs;
        for slot in &mut self.maps {
            let device = slot
                .as_ref()
                .filter(|m| matches!(segs.get(m.segid), Some(Some(s)) if !s.sysmem));
            if let Some(m) = device {
                f(m.gpa, m.len);
                *slot = None;
            }
        }
    }

    /// A segment by its number.
    pub fn segment(&self, segid: usize) -> Option<&Segment> {
        self.segs.get(segid).and_then(|s| s.as_deref())
    }

    /// All bytes that the host holds for the guest, and those that are wired.
    pub fn resident(&self) -> u64 {
        self.segs.iter().flatten().map(|s| s.store.resident()).sum()
    }

    /// Maps part of a segment into the guest, as VM_MMAP_MEMSEG does.
    pub fn map(&mut self, map: Map) -> Result<(), i32> {
        if map.prot == 0 || map.prot & !PROT_ALL != 0 || map.flags & !MAP_WIRED != 0 {
            return Err(errno::EINVAL);
        }
        let seg = self.segment(map.segid).ok_or(errno::EINVAL)?;
        let last = map.segoff.checked_add(map.len).ok_or(errno::EINVAL)?;
        let end = map.gpa.checked_add(map.len).ok_or(errno::EINVAL)?;
        if map.len == 0 || last > seg.len || (map.segoff | map.len | map.gpa) & (PAGE - 1) != 0 {
            return Err(errno::EINVAL);
        }
        // The nested page tables have four levels: 48 bits.
        if end > 1 << 48 {
            return Err(errno::EINVAL);
        }
        if self.overlaps(map.gpa, map.len) {
            return Err(errno::EFAULT);
        }
        let (n, slot) = self
            .maps
            .iter_mut()
            .enumerate()
            .find(|(_, m)| m.is_none())
            .ok_or(errno::ENOSPC)?;
        *slot = Some(map);
        self.maps_end = self.maps_end.max(n + 1);
        Ok(())
    }

    /// Whether a mapping has any of `[gpa, gpa + len)`.
    pub fn overlaps(&self, gpa: Gpa, len: u64) -> bool {
        let end = gpa.saturating_add(len);
        self.maps
            .iter()
            .flatten()
            .any(|m| gpa < m.end() && m.gpa < end)
    }

    /// The mappings of system memory.
    pub fn system(&self) -> impl Iterator<Item = &Map> {
        self.maps
            .iter()
            .flatten()
            .filter(|m| self.segment(m.segid).is_some_and(|s| s.sysmem))
    }

    /// Undoes exactly one earlier mapping (FreeBSD 13's VM_MUNMAP_MEMSEG).
    pub fn unmap(&mut self, gpa: Gpa, len: u64) -> Result<(), i32> {
        let slot = self
            .maps
            .iter_mut()
            .find(|m| m.is_some_and(|m| m.gpa == gpa && m.len == len))
            .ok_or(errno::EINVAL)?;
        *slot = None;
        Ok(())
    }

    /// The first mapping at or above `gpa`.
    pub fn next(&self, gpa: Gpa) -> Option<Map> {
        self.maps
            .iter()
            .flatten()
            .filter(|m| m.gpa >= gpa)
            .min_by_key(|m| m.gpa)
            .copied()
    }

    /// Segment and offset of [gpa, gpa + len), if one mapping has all of it.
    pub fn locate(&self, gpa: Gpa, len: u64) -> Option<(usize, u64)> {
        let map = self.find(gpa)?;
        let into = gpa.checked_sub(map.gpa)?;
        let end = into.checked_add(len)?;
        (end <= map.len).then_some((map.segid, map.segoff.checked_add(into)?))
    }

    /// Whether all of `[gpa, gpa + len)` is system memory.
    pub fn covers(&self, gpa: Gpa, len: u64) -> bool {
        let Some(end) = gpa.checked_add(len) else {
            return false;
        };
        let mut at = gpa;
        while at < end {
            match self.find(at) {
                Some(m) if self.segment(m.segid).is_some_and(|s| s.sysmem) => at = m.end(),
                _ => return false,
            }
        }
        len != 0
    }

    /// Takes the host memory at `gpa`, a chunk of system memory as a whole,
    /// away. EINVAL: it is not that. EBUSY: it is wired, as all memory is
    /// that a device reaches by itself, or the guest has it elsewhere too.
    pub fn release(&self, gpa: Gpa) -> Result<Chunk, i32> {
        let (id, off) = self.locate(gpa, CHUNK).ok_or(errno::EINVAL)?;
        let seg = self.segment(id).ok_or(errno::EINVAL)?;
        if !seg.sysmem || off % CHUNK != 0 {
            return Err(errno::EINVAL);
        }
        // `gpa` is all that the caller has unmapped: no second mapping may lead
        // to the same chunk.
        let mut users = self
            .maps
            .iter()
            .flatten()
            .filter(|m| m.shows(id, off, CHUNK));
        let wired = users.next().is_none_or(|m| m.flags & MAP_WIRED != 0);
        if wired || users.next().is_some() {
            return Err(errno::EBUSY);
        }
        seg.detach(off)
    }

    #[optimize(speed)]
    fn find(&self, gpa: Gpa) -> Option<&Map> {
        let maps = self.maps.get(..self.maps_end).unwrap_or_default();
        maps.iter().flatten().find(|m| m.contains(gpa))
    }

    /// Finds, allocating if need be, the memory at `gpa`. `Ok(None)`: no
    /// memory there. ENOMEM when the host has none left.
    pub fn backing(&self, gpa: Gpa) -> Result<Option<Backing>, i32> {
        let Some(map) = self.find(gpa) else {
            return Ok(None);
        };
        let Some(seg) = self.segment(map.segid) else {
            return Ok(None);
        };
        let page = gpa & !(PAGE - 1);
        let off = page - map.gpa + map.segoff;
        let (hpa, order) = seg.page(off)?;
        // The run may be mapped as one page only if the mapping covers it
        // and the guest address is aligned like the host's.
        let mut size = PAGE;
        for larger in [2 << 20, 1 << 30_u64] {
            let start = page & !(larger - 1);
            let fits = (PAGE << order) >= larger
                && (page ^ hpa) & (larger - 1) == 0
                && start >= map.gpa
                && start.checked_add(larger).is_some_and(|e| e <= map.end());
            if fits {
                size = larger;
            }
        }
        Ok(Some(Backing {
            hpa,
            prot: map.prot,
            size,
        }))
    }

    /// Whether memory is mapped at `gpa`, there already or not.
    #[optimize(speed)]
    pub fn is_mapped(&self, gpa: Gpa) -> bool {
        self.find(gpa).is_some()
    }

    /// The guest's memory, brought in as it is accessed; may sleep.
    pub fn guest(&self) -> GuestMemory<'_> {
        GuestMemory {
            map: self,
            sleep: true,
        }
    }

    /// The guest's memory as far as it is known to be there: accesses never
    /// sleep, and fail where they would have to.
    pub fn guest_known(&self) -> GuestMemory<'_> {
        GuestMemory {
            map: self,
            sleep: false,
        }
    }
}

/// Access to the contents of guest memory.
#[derive(Clone, Copy)]
pub struct GuestMemory<'a> {
    map: &'a MemMap,
    sleep: bool,
}

impl GuestMemory<'_> {
    /// Host address of the byte at `gpa`, if it allows all of `need`.
    #[inline]
    fn byte(&self, gpa: Gpa, need: i32) -> Option<usize> {
        let map = self.map.find(gpa)?;
        if map.prot & need != need {
            return None;
        }
        let seg = self.map.segment(map.segid)?;
        let off = gpa - map.gpa + map.segoff;
        let (hpa, _) = match seg.known(off) {
            Some(known) => known,
            None if self.sleep => seg.page(off & !(PAGE - 1)).ok()?,
            None => return None,
        };
        Some(Os::phys_to_virt(hpa) + (gpa & (PAGE - 1)) as usize)
    }

    /// Calls `f` with each piece of host memory behind `[gpa, gpa + len)`;
    /// false if part of it is not memory (pieces before that were visited).
    fn for_each_piece(
        &self,
        gpa: Gpa,
        len: usize,
        need: i32,
        mut f: impl FnMut(usize, usize, usize),
    ) -> bool {
        let mut done = 0;
        while done < len {
            let Some(at) = gpa.checked_add(done as u64) else {
                return false;
            };
            let Some(va) = self.byte(at, need) else {
                return false;
            };
            let n = ((PAGE - (at & (PAGE - 1))) as usize).min(len - done);
            f(va, done, n);
            done += n;
        }
        true
    }

    /// Copies out of guest memory; false if part of it is not memory.
    #[optimize(speed)]
    pub fn read(&self, gpa: Gpa, to: &mut [u8]) -> bool {
        let len = to.len();
        let to = to.as_mut_ptr();
        self.for_each_piece(gpa, len, PROT_READ, |va, off, n| {
            // SAFETY: `va` is guest memory of at least `n` bytes in the
            // direct map, kept by the segment; the guest may write it at the
            // same time, so the bytes are whatever they are, copied once.
            unsafe { core::ptr::copy_nonoverlapping(va as *const u8, to.add(off), n) }
        })
    }

    /// Copies into guest memory; false if part of it is not writable memory.
    pub fn write(&self, gpa: Gpa, from: &[u8]) -> bool {
        let src = from.as_ptr();
        self.for_each_piece(gpa, from.len(), PROT_WRITE, |va, off, n| {
            // SAFETY: as for `read`, in the other direction.
            unsafe { core::ptr::copy_nonoverlapping(src.add(off), va as *mut u8, n) }
        })
    }

    /// Host address of an aligned guest word that allows `need`, for atomic
    /// access.
    #[inline]
    pub fn word(&self, gpa: Gpa, size: u64, need: i32) -> Option<usize> {
        if gpa & (size - 1) != 0 {
            return None;
        }
        self.byte(gpa, need)
    }
}

/// The access that PROT_* bits speak of; `None` if they are none or others.
pub fn access(prot: i32) -> Option<Access> {
    let mut a = Access::empty();
    a.set(Access::READ, prot & PROT_READ != 0);
    a.set(Access::WRITE, prot & PROT_WRITE != 0);
    a.set(Access::EXEC, prot & PROT_EXEC != 0);
    (prot & !PROT_ALL == 0 && !a.is_empty()).then_some(a)
}

/// Whether PROT_* bits allow an access.
pub fn allows(prot: i32, access: Access) -> bool {
    !(access.contains(Access::READ) && prot & PROT_READ == 0
        || access.contains(Access::WRITE) && prot & PROT_WRITE == 0
        || access.contains(Access::EXEC) && prot & PROT_EXEC == 0)
}

/// PROT_* bits as the nested page tables' rights.
pub fn ept_prot(prot: i32) -> Prot {
    let mut p = Prot::empty();
    p.set(Prot::READ, prot & PROT_READ != 0);
    p.set(Prot::WRITE, prot & PROT_WRITE != 0);
    p.set(Prot::EXEC, prot & PROT_EXEC != 0);
    p
}
