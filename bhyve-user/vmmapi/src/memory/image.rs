//! A file as the host has it in memory, read without a system call.
//!
//! The file is mapped, and what is resident is copied. Two things can go wrong with
//! a mapped file, and neither may end a VM: a page that is not in memory would make
//! the reader wait, so mincore(2) is asked before a stretch is touched for the first
//! time; and a file that somebody makes shorter, or that the host cannot read, is a
//! SIGBUS, whose handler here puts a page of zeroes in the place and leaves word: the
//! copy ends, is not believed, and the file is not read in this way again.
//!
//! Pages that are mapped count as this process's. No more than [`MOST`] stretches
//! are, and then all are let go of at once.

use super::GuestMemory;
use std::arch::asm;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Files that can be mapped in the life of the process.
const FILES: usize = 128;
/// Bytes of a stretch: what Linux maps around a page that is touched.
const STRETCH: u64 = 64 << 10;
/// Stretches that are mapped at most: 1 MiB.
const MOST: usize = 16;
/// Reads from this size on are worth touching a stretch for; shorter ones if they
/// come back to it.
const LONG: u64 = 16 << 10;
const PAGE: usize = 4096;

/// What the handler of SIGBUS needs to know of a mapped file. Never another's
/// afterwards: the handler reads one field after the other.
struct Place {
    base: AtomicUsize,
    len: AtomicUsize,
    /// Something was not there.
    hit: AtomicBool,
}

static PLACES: [Place; FILES] = [const {
    Place {
        base: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        hit: AtomicBool::new(false),
    }
}; FILES];

/// What was done at SIGBUS before.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// Puts a page of zeroes where a mapped file has none. Only calls mmap(2) and
/// sigaction(2), which a handler may.
extern "C" fn on_sigbus(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo, and for SIGBUS it has an address.
    let at = unsafe { (*info).si_addr() } as usize;
    for place in &PLACES {
        let base = place.base.load(Ordering::Acquire);
        if base == 0 || at.wrapping_sub(base) >= place.len.load(Ordering::Acquire) {
            continue;
        }
        let page = (at & !(PAGE - 1)) as *mut libc::c_void;
        let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: the page is within a mapping that belongs to an `Image`, which
        // nothing has a reference into; errno is put back.
        let done = unsafe {
            let errno = *libc::__errno_location();
            let done = libc::mmap(page, PAGE, libc::PROT_READ, flags, -1, 0) == page;
            *libc::__errno_location() = errno;
            done
        };
        if done {
            place.hit.store(true, Ordering::Release);
            return;
        }
    }
    // Not ours: the access is repeated, and then it is as it was before.
    let before: *const libc::sigaction = BEFORE.get().map_or(ptr::null(), |b| b);
    // SAFETY: a disposition that sigaction gave, or nothing, which changes nothing;
    // without one the default is asked for.
    unsafe {
        if before.is_null() {
            libc::signal(libc::SIGBUS, libc::SIG_DFL);
        } else {
            libc::sigaction(libc::SIGBUS, before, ptr::null_mut());
        }
    }
}

fn handle_sigbus() -> io::Result<()> {
    static DONE: OnceLock<bool> = OnceLock::new();
    let done = DONE.get_or_init(|| {
        // SAFETY: all zeroes is a valid sigaction, and the handler has the
        // signature that SA_SIGINFO asks for.
        unsafe {
            let mut before: libc::sigaction = std::mem::zeroed();
            if libc::sigaction(libc::SIGBUS, ptr::null(), &mut before) != 0 {
                return false;
            }
            let _ = BEFORE.set(before);
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_sigbus as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigaction(libc::SIGBUS, &action, ptr::null_mut()) == 0
        }
    });
    match done {
        true => Ok(()),
        false => Err(io::Error::from_raw_os_error(libc::EINVAL)),
    }
}

/// A new mapping of `len` bytes: of a file, at `at`, or nobody's, anywhere.
///
/// # Safety
/// For a file, `at` and `len` bytes from it on are the caller's, who has no
/// reference into them.
unsafe fn map_pages(
    at: *mut libc::c_void,
    len: usize,
    protection: libc::c_int,
    file: Option<&File>,
) -> io::Result<*mut libc::c_void> {
    let (kind, fd) = match file {
        Some(file) => (libc::MAP_SHARED | libc::MAP_FIXED, file.as_raw_fd()),
        None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1),
    };
    let flags = kind | libc::MAP_NORESERVE;
    // SAFETY: with MAP_FIXED the place is the caller's, else the kernel's choice.
    let place = unsafe { libc::mmap(at, len, protection, flags, fd, 0) };
    if place == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(place)
}

/// A mapped file.
#[derive(Debug)]
pub struct Image {
    base: *mut u8,
    len: usize,
    /// All that is to be unmapped.
    room: (*mut u8, usize),
    place: usize,
    /// Stretches of which something is mapped, and whether all of it was resident.
    touched: Vec<(u64, bool)>,
    /// The stretch that the last short read was in vain for.
    wanted: u64,
    /// The stretch behind the last one that was looked at, if its first page was there
    /// then: who reads on need not ask for it. If it has gone since, which takes a
    /// host that is short of memory, the read waits for it.
    next: Option<u64>,
}

// SAFETY: the mapping is only read, by copies from raw pointers, and belongs to
// nobody else.
unsafe impl Send for Image {}

/// What became of a read from an [`Image`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapped {
    /// All of it was copied.
    Done,
    /// The host does not have all of it in memory, or it is not worth it;
    /// nothing was copied.
    Absent,
    /// The file is not what it was: the image is to be used no more.
    Broken,
}

impl Image {
    /// Maps the first `len` bytes of a regular file. To be told what is in memory
    /// one must be allowed to write the file (mincore(2)).
    ///
    /// # Errors
    /// Too many files, or what the host says.
    pub fn map(file: &File, len: u64) -> io::Result<Image> {
        let wide = || io::Error::from_raw_os_error(libc::EFBIG);
        let len = usize::try_from(len).map_err(|_| wide())?;
        handle_sigbus()?;
        // Linux maps around a page by addresses, so stretches start at multiples of
        // their size there too.
        let room = len.checked_add(STRETCH as usize).ok_or_else(wide)?;
        // SAFETY: a new mapping, which the kernel puts where there is room.
        let start = unsafe { map_pages(ptr::null_mut(), room, libc::PROT_NONE, None) }?;
        let base = start.wrapping_byte_add(start.cast::<u8>().align_offset(STRETCH as usize));
        // SAFETY: `base` and `len` bytes from it on lie in the room just made.
        let mapped = unsafe { map_pages(base, len, libc::PROT_READ, Some(file)) };
        if let Err(e) = mapped {
            // SAFETY: the mapping is ours, and nothing uses it.
            unsafe { libc::munmap(start, room) };
            return Err(e);
        }
        // Else the host notes at each page that is let go of that it was in use: half of
        // what letting go costs. Its own reads by read(2) tell it as much.
        // SAFETY: the mapping is ours; refused advice changes nothing.
        unsafe { libc::madvise(base, len, libc::MADV_SEQUENTIAL) };
        let claim = |p: &Place| {
            let free = (0, base as usize);
            let (order, fail) = (Ordering::AcqRel, Ordering::Relaxed);
            p.base.compare_exchange(free.0, free.1, order, fail).is_ok()
        };
        let Some(place) = PLACES.iter().position(claim) else {
            // SAFETY: the mapping is ours, and nothing uses it.
            unsafe { libc::munmap(start, room) };
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        };
        PLACES[place].len.store(len, Ordering::Release);
        Ok(Image {
            base: base.cast(),
            len,
            room: (start.cast(), room),
            place,
            touched: Vec::with_capacity(MOST),
            wanted: u64::MAX,
            next: None,
        })
    }

    /// Whether all of a stretch can be read without waiting.
    fn is_resident(&mut self, stretch: u64, long: bool) -> bool {
        let known = self.touched.iter().position(|(s, _)| *s == stretch);
        if known.is_some_and(|n| self.touched[n].1) {
            return true;
        }
        if !long && self.wanted != stretch {
            self.wanted = stretch;
            return false;
        }
        let at = (stretch * STRETCH) as usize;
        let known = match known {
            Some(n) => n,
            None => {
                if self.next.take() != Some(stretch) && self.resident_pages(at, 1) == 0 {
                    return false;
                }
                if self.touched.len() == MOST {
                    // SAFETY: the mapping is ours; what is dropped is read from the file
                    // again.
                    unsafe { libc::madvise(self.base.cast(), self.len, libc::MADV_DONTNEED) };
                    self.touched.clear();
                }
                // The host maps what it has of the stretch together with this page, and
                // then knows of the others at a glance.
                // SAFETY: within the mapping, where the handler mends what is not there.
                unsafe { self.base.add(at).read_volatile() };
                self.touched.push((stretch, false));
                self.touched.len() - 1
            }
        };
        let count = (self.len - at).min(STRETCH as usize).div_ceil(PAGE);
        let found = self.resident_pages(at, count + 1);
        let whole = found >= count;
        self.next = (found > count).then_some(stretch + 1);
        self.touched[known].1 = whole;
        whole
    }

    /// How many pages from page `at` on are in memory one after the other (mincore(2)):
    /// at most `count`, which is a stretch's and one, and as many as there are.
    fn resident_pages(&self, at: usize, count: usize) -> usize {
        let mut pages = [0_u8; STRETCH as usize / PAGE + 1];
        let count = count.min(pages.len()).min((self.len - at).div_ceil(PAGE));
        // SAFETY: the range is within the mapping, and the array has a byte for
        // each of its pages.
        let r = unsafe {
            let len = count * PAGE;
            libc::mincore(self.base.add(at).cast(), len, pages.as_mut_ptr())
        };
        if r != 0 {
            return 0;
        }
        pages
            .iter()
            .take(count)
            .take_while(|&&p| p & 1 != 0)
            .count()
    }

    fn was_hit(&self) -> bool {
        PLACES[self.place].hit.load(Ordering::Acquire)
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // Nobody reads it any more, so no SIGBUS can come from it; and once it is
        // unmapped the address may be anybody's. The place stays taken.
        PLACES[self.place].len.store(0, Ordering::Release);
        // SAFETY: the mapping is ours.
        unsafe { libc::munmap(self.room.0.cast(), self.room.1) };
    }
}

impl GuestMemory {
    /// Copies `len` bytes from `offset` of an image on into pieces of guest memory,
    /// (address, bytes), which hold as many.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] where a piece is not guest memory; some may
    /// be filled.
    pub fn read_mapped(
        &self,
        image: &mut Image,
        offset: u64,
        len: u64,
        pieces: impl IntoIterator<Item = (u64, u32)>,
    ) -> io::Result<Mapped> {
        let end = offset.checked_add(len);
        let Some(end) = end.filter(|&e| len > 0 && e <= image.len as u64) else {
            return Ok(Mapped::Absent);
        };
        for stretch in offset / STRETCH..=(end - 1) / STRETCH {
            if !image.is_resident(stretch, len >= LONG) {
                return Ok(Mapped::Absent);
            }
        }
        let mut from = offset;
        for (gpa, n) in pieces {
            let at = self
                .offset(gpa, n as usize)
                .map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
            let next = from + u64::from(n);
            if next > end {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            // SAFETY: [at, at + n) is guest memory, and [from, next) lies within the
            // image, whose pages are there or are put there by the handler. Both may
            // change at any time; `copy` knows no more of them than a device would.
            unsafe {
                copy(
                    self.map.base.add(at),
                    image.base.add(from as usize),
                    n as usize,
                );
            }
            from = next;
        }
        Ok(match (image.was_hit(), from == end) {
            (true, _) => Mapped::Broken,
            (false, true) => Mapped::Done,
            (false, false) => Mapped::Absent,
        })
    }
}

/// Copies bytes that others may read and write meanwhile. With AVX 32 at a time: the
/// instruction for it is slow where a CPU's fast strings are off, as in an emulator.
///
/// # Safety
/// Both ranges are mapped, and do not overlap.
unsafe fn copy(to: *mut u8, from: *const u8, len: usize) {
    const BLOCK: usize = 256;
    let wide = if std::arch::is_x86_feature_detected!("avx") {
        len / BLOCK * BLOCK
    } else {
        0
    };
    if wide > 0 {
        // SAFETY: reads and writes [0, wide) of both, which is within `len`; AVX is
        // there and the system saves its registers. The upper halves are left clean.
        unsafe {
            asm!(
                "2:",
                "vmovdqu ymm0, [{from} + {n}]",
                "vmovdqu ymm1, [{from} + {n} + 32]",
                "vmovdqu ymm2, [{from} + {n} + 64]",
                "vmovdqu ymm3, [{from} + {n} + 96]",
                "vmovdqu ymm4, [{from} + {n} + 128]",
                "vmovdqu ymm5, [{from} + {n} + 160]",
                "vmovdqu ymm6, [{from} + {n} + 192]",
                "vmovdqu ymm7, [{from} + {n} + 224]",
                "vmovdqu [{to} + {n}], ymm0",
                "vmovdqu [{to} + {n} + 32], ymm1",
                "vmovdqu [{to} + {n} + 64], ymm2",
                "vmovdqu [{to} + {n} + 96], ymm3",
                "vmovdqu [{to} + {n} + 128], ymm4",
                "vmovdqu [{to} + {n} + 160], ymm5",
                "vmovdqu [{to} + {n} + 192], ymm6",
                "vmovdqu [{to} + {n} + 224], ymm7",
                "add {n}, 256",
                "jnz 2b",
                "vzeroupper",
                from = in(reg) from.add(wide),
                to = in(reg) to.add(wide),
                n = inout(reg) -(wide as isize) => _,
                out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _,
                out("ymm4") _, out("ymm5") _, out("ymm6") _, out("ymm7") _,
                // By VZEROUPPER.
                out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _,
                out("ymm12") _, out("ymm13") _, out("ymm14") _, out("ymm15") _,
                options(nostack),
            );
        }
    }
    // SAFETY: the rest of both; MOVSB goes upwards, for the direction flag is clear.
    unsafe {
        asm!(
            "rep movsb",
            inout("rcx") len - wide => _,
            inout("rsi") from.add(wide) => _,
            inout("rdi") to.add(wide) => _,
            options(nostack, preserves_flags),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(content: &[u8]) -> File {
        use std::os::fd::FromRawFd;
        // SAFETY: a new descriptor, which the file owns from here on.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"image".as_ptr(), 0)) };
        std::os::unix::fs::FileExt::write_all_at(&file, content, 0).unwrap();
        file
    }

    fn pattern(len: u32) -> Vec<u8> {
        (0..len).map(|i| (i * 7 + i / 4096) as u8).collect()
    }

    #[test]
    fn what_is_in_memory_is_copied_whatever_its_shape() {
        let content = pattern(300_000);
        let file = file(&content);
        let m = GuestMemory::anonymous(1 << 20).unwrap();
        let mut image = Image::map(&file, content.len() as u64).unwrap();
        // Odd sizes and places, over the borders of stretches.
        for (offset, sizes) in [
            (0_u64, &[65536_u32][..]),
            (65000, &[4096, 1, 255, 256, 257, 20000]),
            (131_071, &[100_003]),
            (300_000 - 16384, &[16384]),
        ] {
            let mut at = 0x1003;
            let pieces: Vec<(u64, u32)> = sizes
                .iter()
                .map(|&n| {
                    at += 77;
                    let gpa = at;
                    at += u64::from(n);
                    (gpa, n)
                })
                .collect();
            let len: u64 = sizes.iter().map(|&n| u64::from(n)).sum();
            m.fill(0, 1 << 20, 0xee).unwrap();
            let r = m.read_mapped(&mut image, offset, len, pieces.iter().copied());
            assert_eq!(r.unwrap(), Mapped::Done);
            let mut from = offset as usize;
            for (gpa, n) in pieces {
                let mut back = vec![0; n as usize + 2];
                m.read_bytes(gpa - 1, &mut back).unwrap();
                assert_eq!(back[0], 0xee);
                assert!(back[1..=n as usize] == content[from..from + n as usize]);
                assert_eq!(back[n as usize + 1], 0xee);
                from += n as usize;
            }
        }
        // What is written to the file is seen.
        std::os::unix::fs::FileExt::write_all_at(&file, &[0x11; 512], 1024).unwrap();
        let r = m.read_mapped(&mut image, 1024, 512, [(0, 512)]);
        assert_eq!(r.unwrap(), Mapped::Done);
        assert_eq!(m.read::<[u8; 512]>(0).unwrap(), [0x11; 512]);
        // Neither beyond the end nor beyond the memory.
        let r = m.read_mapped(&mut image, 299_999, 2, [(0, 2)]);
        assert_eq!(r.unwrap(), Mapped::Absent);
        let r = m.read_mapped(&mut image, 0, 16384, [((1 << 20) - 1, 16384)]);
        assert_eq!(r.unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn holes_are_left_to_the_host() {
        let file = file(b"data");
        file.set_len(1 << 20).unwrap();
        let m = GuestMemory::anonymous(1 << 20).unwrap();
        let mut image = Image::map(&file, 1 << 20).unwrap();
        let r = m.read_mapped(&mut image, 1 << 19, 65536, [(0, 65536)]);
        assert_eq!(r.unwrap(), Mapped::Absent);
        // Neither is one behind what is there, however often it is looked at.
        for _ in 0..2 {
            let r = m.read_mapped(&mut image, 0, 65536, [(0, 65536)]);
            assert_eq!(r.unwrap(), Mapped::Absent);
            assert_eq!(image.touched, [(0, false)]);
        }
        use std::os::unix::fs::MetadataExt;
        assert_eq!(file.metadata().unwrap().blocks(), 8, "a page, and no more");
        // Nor is one that follows on a stretch that is there.
        let file = self::file(&pattern(1 << 16));
        file.set_len(1 << 20).unwrap();
        let mut image = Image::map(&file, 1 << 20).unwrap();
        for (offset, wanted) in [(0, Mapped::Done), (1 << 16, Mapped::Absent)] {
            let r = m.read_mapped(&mut image, offset, 65536, [(0, 65536)]);
            assert_eq!(r.unwrap(), wanted);
        }
        assert_eq!(file.metadata().unwrap().blocks(), 128);
    }

    #[test]
    fn short_reads_map_what_they_come_back_to() {
        let file = file(&pattern(4 << 20));
        let m = GuestMemory::anonymous(1 << 20).unwrap();
        let mut image = Image::map(&file, 4 << 20).unwrap();
        let mut read = |at| m.read_mapped(&mut image, at, 4096, [(0, 4096)]).unwrap();
        assert_eq!(read(0), Mapped::Absent);
        assert_eq!(read(1 << 20), Mapped::Absent);
        assert_eq!(read((1 << 20) + 4096), Mapped::Done);
        assert_eq!(read(0), Mapped::Absent);
        // All stretches of the file, which is more than stay mapped.
        for stretch in 0..64 {
            let r = m.read_mapped(&mut image, stretch * STRETCH, STRETCH, [(0, 65536)]);
            assert_eq!(r.unwrap(), Mapped::Done);
            assert!(image.touched.len() <= MOST);
        }
    }

    #[test]
    fn a_file_that_becomes_shorter_ends_nothing_but_the_image() {
        let content = pattern(1 << 20);
        let file = file(&content);
        let m = GuestMemory::anonymous(1 << 20).unwrap();
        let mut image = Image::map(&file, 1 << 20).unwrap();
        let mut other = Image::map(&file, 1 << 20).unwrap();
        let read = |image: &mut Image| {
            let r = m.read_mapped(image, 1 << 19, 65536, [(0, 65536)]);
            r.unwrap()
        };
        // It is known to be there, and goes.
        assert_eq!(read(&mut image), Mapped::Done);
        file.set_len((1 << 19) + 4096).unwrap();
        assert_eq!(read(&mut image), Mapped::Broken);
        assert_eq!(read(&mut image), Mapped::Broken, "for good");
        drop(image);
        // Its place is nobody else's.
        let third = Image::map(&file, 1 << 20).unwrap();
        assert!(!third.was_hit());
        // Who had not looked sees what is there now.
        assert_eq!(read(&mut other), Mapped::Absent);
        let r = m.read_mapped(&mut other, 0, 65536, [(0, 65536)]);
        assert_eq!(r.unwrap(), Mapped::Done);
    }
}
