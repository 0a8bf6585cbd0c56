//! The host's side of a disk: a raw file or a block device.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::libc;
use vmmapi::GuestMemory;
#[cfg(target_os = "linux")]
use vmmapi::memory::Mapped;

use super::SECTOR;
use super::options::Options;
use crate::virtio::queue::{Buffer, total};

/// Writes return when the data is on the disk.
#[cfg(target_os = "linux")]
const SYNC: i32 = libc::O_DSYNC;
/// FreeBSD knows O_DSYNC from 13 on only.
#[cfg(not(target_os = "linux"))]
const SYNC: i32 = libc::O_SYNC;
/// What qcow2 images start with.
const QCOW2: [u8; 4] = *b"QFI\xfb";
/// Alignment and size of the buffer that I/O past the cache goes through.
const ALIGN: usize = 4096;
const BOUNCE: usize = 128 << 10;
/// Most attempts at reading cached data that are left out in a row.
const MOST_PAUSED: u32 = 63;
/// Zeroes are written so many at a time.
const ZEROES: usize = 64 << 10;

/// Why a disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host says no.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Neither file nor block device.
    #[error("neither a file nor a block device")]
    Kind,
    /// qcow2.
    #[error("a qcow2 image; only raw images are read (qemu-img convert -O raw makes one)")]
    Qcow2,
    /// Another thread cannot have it.
    #[error("it cannot be opened again for another queue: {0}")]
    Again(io::Error),
    /// Another file is where it was.
    #[error("another file has come in its place while it was opened for each queue")]
    Replaced,
    /// Empty or odd-sized.
    #[error("its size of {0} bytes is not a positive multiple of {1}")]
    Size(u64, u32),
}

/// How to read what the host has in memory, and nothing else.
#[derive(Clone, Copy)]
enum AtOnce {
    /// Not at all.
    Never,
    /// The file system is in memory.
    Always,
    /// By asking for it (RWF_NOWAIT).
    Ask {
        /// Attempts to leave out, since the last ones were in vain.
        pause: u32,
        /// How many that were after the last one.
        paused: u32,
    },
}

/// An open disk, for one thread: [`Backend::share`] makes another.
pub struct Backend {
    /// Nobody else has this description: a host that could not write its cache
    /// back tells each of them so, once.
    file: File,
    /// How it was opened: where, and with which flags.
    path: PathBuf,
    flags: i32,
    /// A flush has failed: what was written before is lost, and the host says so
    /// once only.
    lost: Arc<AtomicBool>,
    size: u64,
    read_only: bool,
    /// Every write is to be durable by itself,
    sync: bool,
    /// and is so because of how the file was opened.
    by_flag: bool,
    can_discard: bool,
    /// What reads that must not wait are worth trying.
    at_once: AtOnce,
    /// The file as the host has it in memory, for those reads, and whether there
    /// can be one.
    image: Option<host::Image>,
    can_map: bool,
    /// For `nocache`: guest memory is device memory to the host's kernel,
    /// which does no direct I/O on it, and may be unaligned.
    bounce: Option<Vec<u8>>,
}

impl Backend {
    /// Opens what `options` names.
    ///
    /// # Errors
    /// [`Error`].
    pub fn open(options: &Options) -> Result<Backend, Error> {
        let mut flags = 0;
        if options.sync {
            flags |= SYNC;
        }
        // The image's kind is looked at without O_DIRECT, which wants
        // aligned reads.
        let mut probe = File::open(&options.path)?;
        let kind = probe.metadata()?.file_type();
        // FreeBSD's disks are character devices.
        let device = kind.is_block_device() || host::DISKS_ARE_CHARACTERS && kind.is_char_device();
        if !kind.is_file() && !device {
            return Err(Error::Kind);
        }
        // Which take whole sectors only.
        let mut start = [0; ALIGN];
        let read = probe.read(&mut start)?;
        if start.get(..read).is_some_and(|s| s.starts_with(&QCOW2)) {
            return Err(Error::Qcow2);
        }
        if options.nocache {
            flags |= libc::O_DIRECT;
        }
        let mut file = open(&options.path, options.read_only, flags)?;
        // A device has no size in its metadata.
        let size = file.seek(SeekFrom::End(0))?;
        let unit = options.sector_size.map_or(SECTOR as u32, |(l, _)| l);
        if size == 0 || !size.is_multiple_of(unit.into()) {
            return Err(Error::Size(size, unit));
        }
        let can_discard =
            !options.read_only && !options.no_delete && host::can_discard(&file, device, size);
        let at_once = if options.nocache {
            AtOnce::Never
        } else if host::is_in_memory(&file) {
            AtOnce::Always
        } else {
            AtOnce::Ask {
                pause: 0,
                paused: 0,
            }
        };
        crate::sandbox::limit(&file, crate::sandbox::Purpose::Disk)?;
        Ok(Backend {
            image: None,
            can_map: kind.is_file() && !options.read_only && !options.nocache,
            file,
            path: options.path.clone(),
            flags,
            lost: Arc::default(),
            at_once,
            size,
            read_only: options.read_only,
            sync: options.sync,
            // Character devices do not know of O_SYNC.
            by_flag: options.sync && !(host::DISKS_ARE_CHARACTERS && device),
            can_discard,
            bounce: options.nocache.then(|| vec![0; BOUNCE + ALIGN]),
        })
    }

    /// The same disk for another thread: a flush of one makes durable what any
    /// of them has written. The file is opened again, for of threads that flush
    /// through one description at the same time the host tells one only that data
    /// is lost. Before the sandbox.
    ///
    /// # Errors
    /// [`Error::Again`], [`Error::Replaced`].
    pub fn share(&self) -> Result<Backend, Error> {
        let again = || {
            let file = open(&self.path, self.read_only, self.flags)?;
            let (new, old) = (file.metadata()?, self.file.metadata()?);
            let same = (new.dev(), new.ino()) == (old.dev(), old.ino());
            crate::sandbox::limit(&file, crate::sandbox::Purpose::Disk)?;
            Ok(same.then_some(file))
        };
        let file = again().map_err(Error::Again)?.ok_or(Error::Replaced)?;
        Ok(Backend {
            file,
            path: self.path.clone(),
            image: None,
            lost: Arc::clone(&self.lost),
            bounce: self.bounce.as_ref().map(|b| vec![0; b.len()]),
            ..*self
        })
    }

    /// Puts another file in the disk's place.
    #[cfg(test)]
    pub fn replace_file(&mut self, file: File) {
        self.file = file;
        self.image = None;
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }
    /// Nothing can be written.
    pub fn read_only(&self) -> bool {
        self.read_only
    }
    /// Whether space can be given back to the host.
    pub fn can_discard(&self) -> bool {
        self.can_discard
    }

    /// Whether [`Backend::read_at_once`] is worth a try.
    pub fn reads_at_once(&self) -> bool {
        !matches!(self.at_once, AtOnce::Never)
    }

    /// Makes [`Backend::read_at_once`] cheaper, where the host can.
    pub fn map(&mut self) {
        if self.can_map && self.reads_at_once() {
            self.image = host::map(&self.file, self.size);
        }
    }

    /// Reads from `offset` on into `buffers`, which hold `len` bytes, if the
    /// host has all of it in memory. Where not, `buffers` may have changed.
    pub fn read_at_once(
        &mut self,
        memory: &GuestMemory,
        buffers: &[Buffer],
        offset: u64,
        len: u64,
    ) -> bool {
        let pieces = buffers.iter().map(|b| (b.addr, b.len));
        #[cfg(target_os = "linux")]
        if let Some(image) = &mut self.image {
            match memory.read_mapped(image, offset, len, pieces.clone()) {
                Ok(Mapped::Done) => return true,
                Ok(Mapped::Absent) | Err(_) => {}
                Ok(Mapped::Broken) => self.image = None,
            }
        }
        match &mut self.at_once {
            AtOnce::Never => false,
            AtOnce::Always => memory
                .read_from_file_vectored(&self.file, offset, pieces)
                .is_ok_and(|n| n == len),
            AtOnce::Ask { pause, paused } => {
                if *pause > 0 {
                    *pause -= 1;
                    return false;
                }
                let got = memory.read_cached(&self.file, offset, pieces);
                if got.as_ref().is_ok_and(|n| *n == len) {
                    *paused = 0;
                    return true;
                }
                if got.is_err_and(|e| e.raw_os_error() == Some(libc::EOPNOTSUPP)) {
                    self.at_once = AtOnce::Never;
                    return false;
                }
                // The worse it works the less it is tried.
                *paused = (2 * *paused + 1).min(MOST_PAUSED);
                *pause = *paused;
                false
            }
        }
    }

    /// Reads from `offset` on into `buffers`.
    ///
    /// # Errors
    /// What the host says; [`ErrorKind::UnexpectedEof`] where the file has
    /// become shorter.
    pub fn read(
        &mut self,
        memory: &GuestMemory,
        buffers: &[Buffer],
        mut offset: u64,
    ) -> io::Result<()> {
        let Some(bounce) = &mut self.bounce else {
            let pieces = buffers.iter().map(|b| (b.addr, b.len));
            let n = memory.read_from_file_vectored(&self.file, offset, pieces)?;
            if n < total(buffers) {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            return Ok(());
        };
        for b in buffers {
            for (at, part) in parts(b) {
                let space = aligned(bounce, part)?;
                self.file.read_exact_at(space, offset + at)?;
                let to = b.addr + at;
                memory.write_bytes(to, space).map_err(io::Error::other)?;
            }
            offset += u64::from(b.len);
        }
        Ok(())
    }

    /// Writes `buffers` from `offset` on. With `durable` the data is on the
    /// disk when this returns, which else is so with `sync` only.
    ///
    /// # Errors
    /// What the host says, such as ENOSPC.
    pub fn write(
        &mut self,
        memory: &GuestMemory,
        buffers: &[Buffer],
        mut offset: u64,
        durable: bool,
    ) -> io::Result<()> {
        let Some(bounce) = &mut self.bounce else {
            let pieces = buffers.iter().map(|b| (b.addr, b.len));
            let n = memory.write_to_file_vectored(&self.file, offset, pieces)?;
            if n < total(buffers) {
                return Err(ErrorKind::WriteZero.into());
            }
            return self.settle(durable);
        };
        for b in buffers {
            for (at, part) in parts(b) {
                let space = aligned(bounce, part)?;
                let from = b.addr + at;
                memory.read_bytes(from, space).map_err(io::Error::other)?;
                self.file.write_all_at(space, offset + at)?;
            }
            offset += u64::from(b.len);
        }
        self.settle(durable)
    }

    fn settle(&self, durable: bool) -> io::Result<()> {
        if (durable || self.sync) && !self.by_flag {
            return self.flush();
        }
        Ok(())
    }

    /// Makes all writes so far durable.
    ///
    /// # Errors
    /// What the host says; and for ever after, for a host that could not write
    /// its cache back has forgotten about it when it is asked again.
    pub fn flush(&self) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        if self.lost.load(Ordering::Acquire) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        host::flush(&self.file).inspect_err(|_| self.lost.store(true, Ordering::Release))
    }

    /// Gives space back; what is read there later is anything.
    ///
    /// # Errors
    /// What the host says.
    pub fn discard(&self, offset: u64, len: u64, durable: bool) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        host::punch(&self.file, offset, len)?;
        self.settle_space(durable)
    }

    /// Makes a range read as zeroes, by a hole where `may_unmap` allows it and
    /// the host can.
    ///
    /// # Errors
    /// What the host says.
    pub fn write_zeroes(
        &mut self,
        offset: u64,
        len: u64,
        may_unmap: bool,
        durable: bool,
    ) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let hole = host::HOLES_ARE_ZEROES
            && may_unmap
            && self.can_discard
            && host::punch(&self.file, offset, len).is_ok();
        if !hole && host::zero(&self.file, offset, len).is_err() {
            let mut zeroes = vec![0; ZEROES + ALIGN];
            let mut done = 0;
            while done < len {
                let n = (len - done).min(ZEROES as u64) as usize;
                let space = aligned(&mut zeroes, n)?;
                self.file.write_all_at(space, offset + done)?;
                done += n as u64;
            }
        }
        self.settle_space(durable)
    }

    /// As [`Backend::settle`], of what is not written: how the file was opened says
    /// nothing of that.
    fn settle_space(&self, durable: bool) -> io::Result<()> {
        if durable || self.sync {
            return self.flush();
        }
        Ok(())
    }
}

fn open(path: &Path, read_only: bool, flags: i32) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(!read_only).custom_flags(flags);
    options.open(path)
}

/// A buffer in parts that fit the bounce buffer: offset in it, length.
fn parts(b: &Buffer) -> impl Iterator<Item = (u64, usize)> + use<> {
    let len = b.len as usize;
    (0..len)
        .step_by(BOUNCE)
        .map(move |at| (at as u64, (len - at).min(BOUNCE)))
}

/// `len` aligned bytes of a buffer that has [`ALIGN`] more than it needs.
fn aligned(buffer: &mut [u8], len: usize) -> io::Result<&mut [u8]> {
    let skip = buffer.as_ptr().align_offset(ALIGN);
    skip.checked_add(len)
        .and_then(|end| buffer.get_mut(skip..end))
        .ok_or_else(|| ErrorKind::InvalidInput.into())
}

#[cfg(target_os = "linux")]
mod host {
    //! Holes, by fallocate(2); what a file system is.
    use nix::fcntl::{FallocateFlags as Flags, fallocate};
    use nix::sys::statfs::{FsType, HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs};
    use std::fs::File;
    use std::io;

    pub const DISKS_ARE_CHARACTERS: bool = false;
    /// What was punched reads as zeroes: of files and of block devices.
    pub const HOLES_ARE_ZEROES: bool = true;

    pub use vmmapi::memory::Image;

    /// A writable file as the host has it in memory, if that can be looked at.
    pub fn map(file: &File, size: u64) -> Option<Image> {
        // Its pages are larger than a SIGBUS can be mended by.
        let huge = fstatfs(file).is_ok_and(|s| s.filesystem_type() == HUGETLBFS_MAGIC);
        (!huge).then(|| Image::map(file, size).ok()).flatten()
    }

    pub fn flush(file: &File) -> io::Result<()> {
        file.sync_data()
    }

    fn call(file: &File, flags: Flags, offset: u64, len: u64) -> io::Result<()> {
        let wide = || io::Error::from(io::ErrorKind::InvalidInput);
        let offset = i64::try_from(offset).map_err(|_| wide())?;
        let len = i64::try_from(len).map_err(|_| wide())?;
        Ok(fallocate(file, flags, offset, len)?)
    }

    pub fn punch(file: &File, offset: u64, len: u64) -> io::Result<()> {
        let flags = Flags::FALLOC_FL_PUNCH_HOLE | Flags::FALLOC_FL_KEEP_SIZE;
        call(file, flags, offset, len)
    }

    pub fn zero(file: &File, offset: u64, len: u64) -> io::Result<()> {
        let flags = Flags::FALLOC_FL_ZERO_RANGE | Flags::FALLOC_FL_KEEP_SIZE;
        call(file, flags, offset, len)
    }

    /// Whether a file's data is in memory by nature. (Such file systems do not
    /// know of RWF_NOWAIT.)
    pub fn is_in_memory(file: &File) -> bool {
        // statfs(2).
        const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);
        fstatfs(file).is_ok_and(|s| [TMPFS_MAGIC, RAMFS_MAGIC].contains(&s.filesystem_type()))
    }

    /// A file is asked by a hole behind its end, which changes nothing; a
    /// device that cannot will say so each time.
    pub fn can_discard(file: &File, device: bool, size: u64) -> bool {
        device || punch(file, size.next_multiple_of(4096), 4096).is_ok()
    }
}

#[cfg(target_os = "freebsd")]
mod host {
    //! Disks, by disk(4). Files have no holes here: zeroes are written, and space
    //! is not given back.
    use std::fs::File;
    use std::io;
    use std::os::unix::fs::FileTypeExt;

    pub const DISKS_ARE_CHARACTERS: bool = true;
    /// A disk may keep what it was told to delete.
    pub const HOLES_ARE_ZEROES: bool = false;

    /// There is none: reads that must not wait are not tried.
    pub enum Image {}

    pub fn map(_: &File, _: u64) -> Option<Image> {
        None
    }

    fn is_device(file: &File) -> bool {
        file.metadata()
            .is_ok_and(|m| m.file_type().is_char_device())
    }

    pub fn flush(file: &File) -> io::Result<()> {
        if !is_device(file) {
            return file.sync_data();
        }
        match vmmapi::disk::flush(file) {
            // Without a cache of its own.
            Err(e) if e.raw_os_error() == Some(nix::libc::EOPNOTSUPP) => Ok(()),
            done => done,
        }
    }
    pub fn punch(file: &File, offset: u64, len: u64) -> io::Result<()> {
        vmmapi::disk::delete(file, offset, len)
    }
    pub fn zero(_: &File, _: u64, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    pub fn can_discard(file: &File, device: bool, _: u64) -> bool {
        device && vmmapi::disk::can_delete(file)
    }
    pub fn is_in_memory(_: &File) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::rig::{Image, fleeting, pattern};

    fn open(image: &Image, options: &str) -> Backend {
        let text = format!("{}{options}", image.0.display());
        Backend::open(&text.parse().unwrap()).unwrap()
    }

    #[test]
    fn each_thread_has_a_description_of_its_own() {
        let image = Image::new(&pattern(8192));
        for options in ["", ",sync", ",ro"] {
            let mut one = open(&image, options);
            let mut other = one.share().unwrap();
            one.file.seek(SeekFrom::Start(512)).unwrap();
            other.file.seek(SeekFrom::Start(1024)).unwrap();
            assert_eq!(one.file.stream_position().unwrap(), 512);
            let flags = |b: &Backend| nix::fcntl::fcntl(&b.file, nix::fcntl::F_GETFL).unwrap();
            assert_eq!(flags(&one), flags(&other));
        }
        // What one has lost is lost to all.
        let mut one = open(&image, "");
        let other = one.share().unwrap();
        other.flush().unwrap();
        one.replace_file(fleeting());
        one.flush().unwrap_err();
        other.flush().unwrap_err();
    }

    #[test]
    fn another_file_in_the_disks_place_is_not_the_disk() {
        let image = Image::new(&pattern(8192));
        let one = open(&image, "");
        let other = Image::new(&pattern(8192));
        std::fs::rename(&other.0, &image.0).unwrap();
        assert!(matches!(one.share(), Err(Error::Replaced)));
        std::fs::remove_file(&image.0).unwrap();
        assert!(matches!(one.share(), Err(Error::Again(_))));
    }

    #[test]
    fn with_sync_all_is_durable_or_fails() {
        let image = Image::new(&pattern(8192));
        let memory = GuestMemory::anonymous(1 << 20).unwrap();
        let (addr, len) = (0, 512);
        let write = |b: &mut Backend| b.write(&memory, &[Buffer { addr, len }], 0, false);
        // As on a device that does not know of O_SYNC.
        let mut b = open(&image, ",sync");
        b.by_flag = false;
        write(&mut b).unwrap();
        b.replace_file(fleeting());
        write(&mut b).unwrap_err();
        // What is not written no flag makes durable.
        for (options, fails) in [(",sync", true), ("", false)] {
            let mut b = open(&image, options);
            b.lost.store(true, Ordering::Release);
            write(&mut b).unwrap();
            assert_eq!(b.write_zeroes(0, 4096, true, false).is_err(), fails);
            if b.can_discard() {
                assert_eq!(b.discard(0, 4096, false).is_err(), fails);
            }
        }
    }
}
