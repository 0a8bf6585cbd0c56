//! The shared folder, as the host has it. Every access goes through a handle
//! of a folder and one name in it, and follows no symbolic link: so nothing
//! outside of the share is reachable, whatever names the guest finds and
//! whatever links it makes.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use nix::dir::{Dir as HostDir, Entry, OwningIter};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat, renameat};
use nix::sys::stat::{
    FchmodatFlags, FileStat, Mode, SFlag, UtimensatFlags, fchmod, fchmodat, fstat, fstatat,
    mkdirat, mknodat, utimensat,
};
use nix::sys::statvfs::{Statvfs, fstatvfs};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchownat, ftruncate, linkat, symlinkat, unlinkat};

use super::reply::format;
use super::request::{Attributes, valid};

type Result<T> = std::result::Result<T, Errno>;

/// How a folder is held: for looking things up only, where the host can.
#[cfg(target_os = "linux")]
const HOLD: OFlag = OFlag::O_PATH;
#[cfg(not(target_os = "linux"))]
const HOLD: OFlag = OFlag::O_RDONLY;
/// A folder's name for itself.
const SELF: &str = ".";
/// Most folders above one: deeper than any path that a client can name.
const MAX_DEPTH: usize = 4096;
/// No user (P9_NONUNAME).
const NOBODY: u32 = u32::MAX;
/// Permissions that a guest may give: set-user-ID and set-group-ID would be
/// the host's business, for it runs programs of the folder too.
const FILE_MODE: u32 = 0o1777;
/// A folder may hand its group down.
const DIR_MODE: u32 = 0o3777;

/// Flags of opening, as the protocol has them.
mod open {
    pub const ACCESS: u32 = 3;
    pub const EXCL: u32 = 0o200;
    pub const TRUNC: u32 = 0o1000;
    pub const DSYNC: u32 = 0o10000;
    pub const SYNC: u32 = 0o4000000;
}

/// A folder that is held open.
#[derive(Debug)]
pub struct Dir {
    fd: OwnedFd,
    id: (u64, u64),
}

/// A file's place: a folder and the name in it.
#[derive(Clone, Debug)]
pub struct Node {
    at: Arc<Dir>,
    name: OsString,
}

impl Node {
    /// Whether this is entry `name` of `dir`.
    pub fn is(&self, dir: &Dir, name: &OsStr) -> bool {
        self.at.id == dir.id && self.name == name
    }

    /// Puts it elsewhere, after a rename.
    pub fn moved(&mut self, dir: &Arc<Dir>, name: &OsStr) {
        self.at = Arc::clone(dir);
        self.name = name.to_owned();
    }

    /// The folder that it is in, and its name there. A folder that was
    /// reached from inside has no name.
    pub fn place(&self) -> Result<(&Arc<Dir>, &OsStr)> {
        if self.name == SELF {
            return Err(Errno::EBUSY);
        }
        Ok((&self.at, &self.name))
    }

    /// An entry of a folder.
    pub fn child(dir: &Arc<Dir>, name: &OsStr) -> Node {
        Node {
            at: Arc::clone(dir),
            name: name.to_owned(),
        }
    }
}

/// Who a request is made by.
#[derive(Clone, Copy, Debug)]
pub struct Owner {
    /// The user of the attach.
    pub uid: u32,
    /// The group that the request names.
    pub gid: u32,
}

/// A folder whose entries are being read.
pub struct Entries {
    dir: OwningIter,
    /// Entries that were read so far.
    at: u64,
    /// The last of them, if it was given back.
    kept: Option<Entry>,
    /// The device, for files' numbers.
    pub dev: u64,
}

/// The share.
pub struct Share {
    root: Arc<Dir>,
    read_only: bool,
    /// This process may give files away.
    privileged: bool,
}

#[allow(clippy::unnecessary_cast)]
fn id(stat: &FileStat) -> (u64, u64) {
    (stat.st_dev as u64, stat.st_ino as u64)
}

fn open_dir(at: impl AsFd, name: &OsStr) -> Result<Dir> {
    let flags = HOLD | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let fd = openat(at, name, flags, Mode::empty())?;
    let stat = fstat(&fd)?;
    Ok(Dir { fd, id: id(&stat) })
}

fn mode(bits: u32, mask: u32) -> Mode {
    Mode::from_bits_truncate((bits & mask) as nix::libc::mode_t)
}

impl Share {
    /// Shares the folder at `path`, which may be a symbolic link.
    ///
    /// # Errors
    /// What the host says; ENOTDIR.
    pub fn open(path: &Path, read_only: bool) -> Result<Share> {
        crate::sandbox::need(|n| {
            n.folders.insert((path.into(), !read_only));
        });
        let flags = HOLD | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let fd = nix::fcntl::open(path, flags, Mode::empty())?;
        let id = id(&fstat(&fd)?);
        Ok(Share {
            root: Arc::new(Dir { fd, id }),
            read_only,
            privileged: Uid::effective().is_root(),
        })
    }

    /// The folder itself.
    pub fn root(&self) -> Node {
        Node {
            at: Arc::clone(&self.root),
            name: SELF.into(),
        }
    }

    /// The device that the folder is on.
    pub fn root_dev(&self) -> u64 {
        self.root.id.0
    }

    /// EROFS for a share that cannot be changed.
    ///
    /// # Errors
    /// That.
    pub fn writable(&self) -> Result<()> {
        if self.read_only {
            Err(Errno::EROFS)
        } else {
            Ok(())
        }
    }

    /// # Errors
    /// What the host says.
    pub fn stat(&self, node: &Node) -> Result<FileStat> {
        fstatat(
            &node.at.fd,
            node.name.as_os_str(),
            AtFlags::AT_SYMLINK_NOFOLLOW,
        )
    }

    /// Holds a folder.
    ///
    /// # Errors
    /// ENOTDIR, also for a symbolic link; what the host says.
    pub fn enter(&self, node: &Node) -> Result<Arc<Dir>> {
        if node.name == SELF {
            return Ok(Arc::clone(&node.at));
        }
        match open_dir(&node.at.fd, &node.name) {
            Ok(dir) => Ok(Arc::new(dir)),
            // What O_NOFOLLOW says of a link differs between hosts.
            Err(Errno::ELOOP | Errno::EMLINK) => Err(Errno::ENOTDIR),
            Err(e) => Err(e),
        }
    }

    /// The folder above one; the share's own folder is above itself.
    ///
    /// # Errors
    /// ESTALE: somebody has moved it out of the share.
    pub fn parent(&self, dir: &Dir) -> Result<Node> {
        if dir.id == self.root.id {
            return Ok(self.root());
        }
        let up = OsStr::new("..");
        let parent = Arc::new(open_dir(&dir.fd, up)?);
        // What is above is followed until the share is found: the folder may
        // not be where it was when it was opened.
        let mut above = Arc::clone(&parent);
        for _ in 0..MAX_DEPTH {
            if above.id == self.root.id {
                return Ok(Node {
                    at: parent,
                    name: SELF.into(),
                });
            }
            let next = open_dir(&above.fd, up)?;
            if next.id == above.id {
                break;
            }
            above = Arc::new(next);
        }
        Err(Errno::ESTALE)
    }

    /// # Errors
    /// What the host says.
    pub fn statfs(&self, node: &Node) -> Result<Statvfs> {
        fstatvfs(&node.at.fd)
    }

    fn open_flags(&self, flags: u32) -> Result<OFlag> {
        let writes = flags & open::ACCESS != 0;
        if writes || flags & open::TRUNC != 0 {
            self.writable()?;
        }
        let mut o = match flags & open::ACCESS {
            0 => OFlag::O_RDONLY,
            1 => OFlag::O_WRONLY,
            _ => OFlag::O_RDWR,
        };
        for (bit, flag) in [
            (open::TRUNC, OFlag::O_TRUNC),
            (open::DSYNC, OFlag::O_SYNC),
            (open::SYNC, OFlag::O_SYNC),
        ] {
            if flags & bit != 0 {
                o |= flag;
            }
        }
        // Appending is the client's affair: it gives each write its place.
        // Never wait for the other end of a pipe.
        Ok(o | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY)
    }

    /// Opens a file. Pipes, sockets and devices are opened by the guest's
    /// kernel, not by the host's.
    ///
    /// # Errors
    /// EROFS; ENXIO: no plain file; what the host says.
    pub fn open_file(&self, node: &Node, flags: u32) -> Result<File> {
        let flags = self.open_flags(flags)?;
        let plain = |s: &FileStat| format(s) == SFlag::S_IFREG;
        if !plain(&self.stat(node)?) {
            return Err(Errno::ENXIO);
        }
        let file = openat(&node.at.fd, node.name.as_os_str(), flags, Mode::empty())?;
        // It may have been replaced meanwhile.
        if !plain(&fstat(&file)?) {
            return Err(Errno::ENXIO);
        }
        Ok(file.into())
    }

    /// Makes a file and opens it.
    ///
    /// # Errors
    /// EROFS; what the host says.
    pub fn create(
        &self,
        dir: &Arc<Dir>,
        name: &OsStr,
        flags: u32,
        permissions: u32,
        owner: Owner,
    ) -> Result<File> {
        self.writable()?;
        let o = self.open_flags(flags)? | OFlag::O_CREAT;
        let permissions = mode(permissions, FILE_MODE);
        // Exclusive first, so that it is known whether the file is new.
        let fd = match openat(&dir.fd, name, o | OFlag::O_EXCL, permissions) {
            Err(Errno::EEXIST) if flags & open::EXCL == 0 => {
                return self.open_file(&Node::child(dir, name), flags);
            }
            fd => fd?,
        };
        // This process has a umask, and the guest has applied its own.
        let done = self
            .give(dir, name, owner)
            .and_then(|()| fchmod(&fd, permissions));
        self.or_undo(done, dir, name, UnlinkatFlags::NoRemoveDir)?;
        Ok(fd.into())
    }

    /// Gives what was just made to who asked for it, where that can be done.
    fn give(&self, dir: &Dir, name: &OsStr, owner: Owner) -> Result<()> {
        if !self.privileged || owner.uid == NOBODY {
            return Ok(());
        }
        let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
        let flags = AtFlags::AT_SYMLINK_NOFOLLOW;
        fchownat(&dir.fd, name, Some(uid), Some(gid), flags)
    }

    /// Takes back what was made but could not be finished.
    fn or_undo(
        &self,
        done: Result<()>,
        dir: &Dir,
        name: &OsStr,
        flags: UnlinkatFlags,
    ) -> Result<()> {
        if done.is_err() {
            let _ = unlinkat(&dir.fd, name, flags);
        }
        done
    }

    /// # Errors
    /// EROFS; what the host says.
    pub fn mkdir(&self, dir: &Dir, name: &OsStr, permissions: u32, owner: Owner) -> Result<()> {
        self.writable()?;
        let permissions = mode(permissions, DIR_MODE);
        mkdirat(&dir.fd, name, permissions)?;
        let done = self
            .give(dir, name, owner)
            .and_then(|()| change_mode(dir, name, permissions));
        self.or_undo(done, dir, name, UnlinkatFlags::RemoveDir)
    }

    /// Makes a plain file or a named pipe.
    ///
    /// # Errors
    /// EROFS; EPERM for devices and sockets, which on the host would be the
    /// host's; what the host says.
    pub fn mknod(&self, dir: &Dir, name: &OsStr, bits: u32, owner: Owner) -> Result<()> {
        self.writable()?;
        let kind = SFlag::from_bits_truncate(bits as nix::libc::mode_t) & SFlag::S_IFMT;
        if kind != SFlag::S_IFREG && kind != SFlag::S_IFIFO {
            return Err(Errno::EPERM);
        }
        let permissions = mode(bits, FILE_MODE);
        if kind == SFlag::S_IFREG {
            let flags = OFlag::O_CREAT
                | OFlag::O_EXCL
                | OFlag::O_WRONLY
                | OFlag::O_NOFOLLOW
                | OFlag::O_CLOEXEC;
            drop(openat(&dir.fd, name, flags, permissions)?);
        } else {
            mknodat(&dir.fd, name, kind, permissions, 0)?;
        }
        let done = self
            .give(dir, name, owner)
            .and_then(|()| change_mode(dir, name, permissions));
        self.or_undo(done, dir, name, UnlinkatFlags::NoRemoveDir)
    }

    /// # Errors
    /// EROFS; what the host says.
    pub fn symlink(&self, dir: &Dir, name: &OsStr, target: &OsStr, owner: Owner) -> Result<()> {
        self.writable()?;
        symlinkat(target, &dir.fd, name)?;
        let done = self.give(dir, name, owner);
        self.or_undo(done, dir, name, UnlinkatFlags::NoRemoveDir)
    }

    /// # Errors
    /// What the host says.
    pub fn readlink(&self, node: &Node) -> Result<OsString> {
        readlinkat(&node.at.fd, node.name.as_os_str())
    }

    /// # Errors
    /// EROFS; what the host says.
    pub fn link(&self, node: &Node, dir: &Dir, name: &OsStr) -> Result<()> {
        self.writable()?;
        let (from, old) = node.place()?;
        linkat(&from.fd, old, &dir.fd, name, AtFlags::empty())
    }

    /// # Errors
    /// EROFS; what the host says.
    pub fn rename(&self, from: &Dir, old: &OsStr, to: &Dir, new: &OsStr) -> Result<()> {
        self.writable()?;
        renameat(&from.fd, old, &to.fd, new)
    }

    /// # Errors
    /// EROFS; what the host says.
    pub fn unlink(&self, dir: &Dir, name: &OsStr, folder: bool) -> Result<()> {
        self.writable()?;
        let flags = if folder {
            UnlinkatFlags::RemoveDir
        } else {
            UnlinkatFlags::NoRemoveDir
        };
        unlinkat(&dir.fd, name, flags)
    }

    /// Changes attributes; of an open file by `file`, which may have lost its
    /// name.
    ///
    /// # Errors
    /// EROFS; what the host says.
    pub fn set(&self, node: &Node, file: Option<&File>, set: &Attributes) -> Result<()> {
        self.writable()?;
        let (at, name) = (&*node.at, node.name.as_os_str());
        let has = |bit| set.valid & bit != 0;
        if has(valid::UID | valid::GID) {
            let uid = has(valid::UID).then(|| Uid::from_raw(set.uid));
            let gid = has(valid::GID).then(|| Gid::from_raw(set.gid));
            match file {
                Some(f) => nix::unistd::fchown(f, uid, gid)?,
                None => fchownat(&at.fd, name, uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW)?,
            }
        }
        if has(valid::MODE) {
            let mask = match format(&self.stat_of(node, file)?) {
                SFlag::S_IFDIR => DIR_MODE,
                _ => FILE_MODE,
            };
            match file {
                Some(f) => fchmod(f, mode(set.mode, mask))?,
                None => change_mode(at, name, mode(set.mode, mask))?,
            }
        }
        if has(valid::SIZE) {
            let size = i64::try_from(set.size).map_err(|_| Errno::EFBIG)?;
            // The open file may be open for reading only.
            match file.map(|f| ftruncate(f, size)) {
                Some(Ok(())) => {}
                _ => ftruncate(self.open_file(node, 1)?, size)?,
            }
        }
        if has(valid::ATIME | valid::MTIME) {
            let time = |bit, set_bit, (s, ns): (u64, u64)| -> Result<TimeSpec> {
                if !has(bit) {
                    return Ok(TimeSpec::UTIME_OMIT);
                }
                if !has(set_bit) {
                    return Ok(TimeSpec::UTIME_NOW);
                }
                let s = i64::try_from(s).map_err(|_| Errno::EINVAL)?;
                let ns = i64::try_from(ns).ok().filter(|n| *n < 1_000_000_000);
                Ok(TimeSpec::new(s, ns.ok_or(Errno::EINVAL)?))
            };
            let atime = time(valid::ATIME, valid::ATIME_SET, set.atime)?;
            let mtime = time(valid::MTIME, valid::MTIME_SET, set.mtime)?;
            match file {
                Some(f) => nix::sys::stat::futimens(f, &atime, &mtime)?,
                None => {
                    let flags = UtimensatFlags::NoFollowSymlink;
                    utimensat(&at.fd, name, &atime, &mtime, flags)?;
                }
            }
        }
        Ok(())
    }

    /// Attributes, of an open file by `file`.
    ///
    /// # Errors
    /// What the host says.
    pub fn stat_of(&self, node: &Node, file: Option<&File>) -> Result<FileStat> {
        file.map_or_else(|| self.stat(node), fstat)
    }

    /// Begins to read a folder.
    ///
    /// # Errors
    /// What the host says.
    pub fn entries(&self, node: &Node) -> Result<Entries> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = openat(&node.at.fd, node.name.as_os_str(), flags, Mode::empty())?;
        let dev = id(&fstat(&fd)?).0;
        Ok(Entries {
            dir: HostDir::from_fd(fd)?.into_iter(),
            at: 0,
            kept: None,
            dev,
        })
    }
}

/// Permissions of an entry that is no symbolic link.
fn change_mode(dir: &Dir, name: &OsStr, mode: Mode) -> Result<()> {
    match fchmodat(&dir.fd, name, mode, FchmodatFlags::NoFollowSymlink) {
        // Linux does it by way of /proc or by a new system call, which may be
        // out of reach.
        Err(_) => {
            let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
            let stat = fstatat(&dir.fd, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
            if ![SFlag::S_IFREG, SFlag::S_IFDIR].contains(&format(&stat)) {
                return Err(Errno::EOPNOTSUPP);
            }
            fchmod(openat(&dir.fd, name, flags, Mode::empty())?, mode)
        }
        done => done,
    }
}

impl Entries {
    /// Which entry comes next.
    pub fn position(&self) -> u64 {
        self.at
    }

    /// The next entry.
    ///
    /// # Errors
    /// What the host says.
    pub fn read(&mut self) -> Result<Option<Entry>> {
        let entry = match self.kept.take() {
            Some(e) => Some(e),
            None => self.dir.next().transpose()?,
        };
        self.at += u64::from(entry.is_some());
        Ok(entry)
    }

    /// Gives the last entry back: it comes again.
    pub fn keep(&mut self, entry: Entry) {
        self.at = self.at.saturating_sub(1);
        self.kept = Some(entry);
    }
}
