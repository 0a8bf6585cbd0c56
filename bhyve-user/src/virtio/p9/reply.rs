//! How a message is answered.

use nix::errno::Errno;
use nix::sys::stat::{FileStat, SFlag};
use nix::sys::statvfs::Statvfs;

use super::request::{HEADER, kind};

/// The basic attributes (P9_GETATTR_BASIC).
const GETATTR_BASIC: u64 = 0x7ff;
/// What Linux calls a 9P file system (V9FS_MAGIC).
const MAGIC: u32 = 0x0102_1997;

/// A file's identity: type, version, path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Qid {
    kind: u8,
    version: u32,
    path: u64,
}

/// The type bits of a qid.
fn qid_kind(format: SFlag) -> u8 {
    match format {
        SFlag::S_IFDIR => 0x80,
        SFlag::S_IFLNK => 0x02,
        _ => 0,
    }
}

/// The format bits of a mode, which are the same on all hosts.
pub fn format(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT
}

/// A number for a file that no other file has: its inode number, and for
/// other file systems than the folder's own, something of theirs with it.
pub fn path_of(ino: u64, dev: u64, root_dev: u64) -> u64 {
    ino ^ dev
        .wrapping_sub(root_dev)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

impl Qid {
    /// Of a file.
    #[allow(clippy::useless_conversion, clippy::unnecessary_cast)]
    pub fn of(stat: &FileStat, root_dev: u64) -> Qid {
        let version = stat.st_mtime as u64 ^ (stat.st_mtime_nsec as u64) << 8;
        Qid {
            kind: qid_kind(format(stat)),
            version: version as u32,
            path: path_of(u64::from(stat.st_ino), stat.st_dev as u64, root_dev),
        }
    }

    /// Of a folder's entry, whose type may be unknown.
    pub fn of_entry(kind: Option<nix::dir::Type>, path: u64) -> Qid {
        let kind = match kind {
            Some(nix::dir::Type::Directory) => 0x80,
            Some(nix::dir::Type::Symlink) => 0x02,
            _ => 0,
        };
        Qid {
            kind,
            version: 0,
            path,
        }
    }
}

/// A message that grows. The header is filled in at the end.
#[derive(Debug, Default)]
pub struct Reply(Vec<u8>);

impl Reply {
    /// Starts over; the body comes next.
    pub fn start(&mut self) {
        self.0.clear();
        self.0.resize(HEADER, 0);
    }

    /// Fills the header in, for `extra` bytes that are in place already;
    /// returns the message before those.
    pub fn finish(&mut self, kind: u8, tag: u16, extra: u32) -> &[u8] {
        let size = (self.0.len() as u32).saturating_add(extra).to_le_bytes();
        let tag = tag.to_le_bytes();
        let bytes = size.into_iter().chain([kind]).chain(tag);
        for (to, from) in self.0.iter_mut().zip(bytes) {
            *to = from;
        }
        &self.0
    }

    /// Replaces the body by an error (Rlerror).
    pub fn error(&mut self, tag: u16, error: Errno) -> &[u8] {
        self.start();
        self.u32(wire(error));
        self.finish(kind::RLERROR, tag, 0)
    }

    /// Bytes so far, header included.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Nothing but the header.
    pub fn is_empty(&self) -> bool {
        self.0.len() <= HEADER
    }

    /// Appends.
    pub fn u8(&mut self, v: u8) {
        self.0.push(v);
    }
    /// Appends.
    pub fn u16(&mut self, v: u16) {
        self.bytes(&v.to_le_bytes());
    }
    /// Appends.
    pub fn u32(&mut self, v: u32) {
        self.bytes(&v.to_le_bytes());
    }
    /// Appends.
    pub fn u64(&mut self, v: u64) {
        self.bytes(&v.to_le_bytes());
    }
    /// Appends.
    pub fn bytes(&mut self, v: &[u8]) {
        self.0.extend_from_slice(v);
    }
    /// Appends a string; names are never longer than it can be.
    pub fn string(&mut self, v: &[u8]) {
        self.u16(v.len() as u16);
        self.bytes(v);
    }
    /// Appends.
    pub fn qid(&mut self, q: Qid) {
        self.u8(q.kind);
        self.u32(q.version);
        self.u64(q.path);
    }
    /// Puts `v` where a 32-bit number was reserved.
    pub fn patch_u32(&mut self, at: usize, v: u32) {
        if let Some(to) = self.0.get_mut(at..at.saturating_add(4)) {
            to.copy_from_slice(&v.to_le_bytes());
        }
    }

    /// The body of Rgetattr.
    #[allow(clippy::useless_conversion, clippy::unnecessary_cast)]
    pub fn attributes(&mut self, s: &FileStat, root_dev: u64) {
        self.u64(GETATTR_BASIC);
        self.qid(Qid::of(s, root_dev));
        self.u32(u32::from(s.st_mode));
        self.u32(s.st_uid);
        self.u32(s.st_gid);
        for v in [
            s.st_nlink as u64,
            s.st_rdev as u64,
            s.st_size as u64,
            s.st_blksize as u64,
            s.st_blocks as u64,
            s.st_atime as u64,
            s.st_atime_nsec as u64,
            s.st_mtime as u64,
            s.st_mtime_nsec as u64,
            s.st_ctime as u64,
            s.st_ctime_nsec as u64,
        ] {
            self.u64(v);
        }
        // Time of birth, generation and data version are not told.
        for _ in 0..4 {
            self.u64(0);
        }
    }

    /// The body of Rstatfs.
    #[allow(clippy::useless_conversion, clippy::unnecessary_cast)]
    pub fn file_system(&mut self, s: &Statvfs) {
        self.u32(MAGIC);
        // The unit of the block counts.
        self.u32(u32::try_from(s.fragment_size()).unwrap_or(4096));
        for v in [
            s.blocks() as u64,
            s.blocks_free() as u64,
            s.blocks_available() as u64,
            s.files() as u64,
            s.files_free() as u64,
            s.filesystem_id() as u64,
        ] {
            self.u64(v);
        }
        self.u32(u32::try_from(s.name_max()).unwrap_or(255));
    }
}

/// Linux's number of an error, which is what the protocol has.
#[cfg(target_os = "linux")]
fn wire(error: Errno) -> u32 {
    error as u32
}

/// Linux's number of an error, which is what the protocol has. Up to 34 the
/// numbers are the same, but for one.
#[cfg(not(target_os = "linux"))]
fn wire(error: Errno) -> u32 {
    match error {
        Errno::EAGAIN => 11,
        Errno::ENAMETOOLONG => 36,
        Errno::ENOSYS => 38,
        Errno::ENOTEMPTY => 39,
        Errno::ELOOP => 40,
        // FreeBSD's answer to O_NOFOLLOW.
        Errno::EMLINK => 40,
        Errno::EOVERFLOW => 75,
        Errno::EOPNOTSUPP => 95,
        Errno::ESTALE => 116,
        Errno::EDQUOT => 122,
        e => match u32::try_from(e as i32) {
            Ok(n @ 1..=34) if n != 11 => n,
            // EIO
            _ => 5,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_linux_numbers() {
        for (e, n) in [
            (Errno::ENOENT, 2),
            (Errno::EROFS, 30),
            (Errno::ENAMETOOLONG, 36),
            (Errno::ENOTEMPTY, 39),
            (Errno::EOPNOTSUPP, 95),
        ] {
            assert_eq!(wire(e), n);
        }
        let mut r = Reply::default();
        let want = [11, 0, 0, 0, 7, 0x34, 0x12, 2, 0, 0, 0];
        assert_eq!(r.error(0x1234, Errno::ENOENT), want);
    }
}
