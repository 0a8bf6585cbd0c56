//! What the guest wrote: one 9P2000.L message, parsed without touching the
//! folder. Integers are little-endian; a string is a 16-bit length and bytes.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use nix::errno::Errno;

/// Bytes of a message's header: size, type, tag.
pub const HEADER: usize = 7;
/// Bytes of a write's fixed part behind the header: fid, offset, count.
pub const WRITE: usize = 16;
/// Most names in one walk.
pub const MAX_WALK: usize = 16;
/// Longest name.
const MAX_NAME: usize = 255;

/// The type of a message; a reply's is one more.
pub mod kind {
    #![allow(missing_docs)]
    pub const RLERROR: u8 = 7;
    pub const STATFS: u8 = 8;
    pub const LOPEN: u8 = 12;
    pub const LCREATE: u8 = 14;
    pub const SYMLINK: u8 = 16;
    pub const MKNOD: u8 = 18;
    pub const RENAME: u8 = 20;
    pub const READLINK: u8 = 22;
    pub const GETATTR: u8 = 24;
    pub const SETATTR: u8 = 26;
    pub const READDIR: u8 = 40;
    pub const FSYNC: u8 = 50;
    pub const LOCK: u8 = 52;
    pub const GETLOCK: u8 = 54;
    pub const LINK: u8 = 70;
    pub const MKDIR: u8 = 72;
    pub const RENAMEAT: u8 = 74;
    pub const UNLINKAT: u8 = 76;
    pub const VERSION: u8 = 100;
    pub const ATTACH: u8 = 104;
    pub const FLUSH: u8 = 108;
    pub const WALK: u8 = 110;
    pub const READ: u8 = 116;
    pub const WRITE: u8 = 118;
    pub const CLUNK: u8 = 120;
    pub const REMOVE: u8 = 122;
}

/// Bits of [`Attributes::valid`].
pub mod valid {
    #![allow(missing_docs)]
    pub const MODE: u32 = 1;
    pub const UID: u32 = 2;
    pub const GID: u32 = 4;
    pub const SIZE: u32 = 8;
    pub const ATIME: u32 = 0x10;
    pub const MTIME: u32 = 0x20;
    pub const CTIME: u32 = 0x40;
    pub const ATIME_SET: u32 = 0x80;
    pub const MTIME_SET: u32 = 0x100;
}

/// What setattr sets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Which of the following count.
    pub valid: u32,
    /// Permissions.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes.
    pub size: u64,
    /// Seconds and nanoseconds.
    pub atime: (u64, u64),
    /// Seconds and nanoseconds.
    pub mtime: (u64, u64),
}

/// One component of a path: neither empty nor `.` nor `..`, without slash and
/// NUL.
pub type Name<'a> = &'a OsStr;

/// A message. `fid` is always the first that it names.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Request<'a> {
    Version {
        msize: u32,
        version: &'a [u8],
    },
    Attach {
        fid: u32,
        uid: u32,
    },
    Flush,
    /// A step is `None` for `..`.
    Walk {
        fid: u32,
        new: u32,
        steps: Vec<Option<Name<'a>>>,
    },
    Read {
        fid: u32,
        offset: u64,
        count: u32,
    },
    /// The data follow in the chain.
    Write {
        fid: u32,
        offset: u64,
        count: u32,
    },
    Clunk {
        fid: u32,
    },
    Remove {
        fid: u32,
    },
    Statfs {
        fid: u32,
    },
    Lopen {
        fid: u32,
        flags: u32,
    },
    Lcreate {
        fid: u32,
        name: Name<'a>,
        flags: u32,
        mode: u32,
        gid: u32,
    },
    Symlink {
        fid: u32,
        name: Name<'a>,
        target: &'a OsStr,
        gid: u32,
    },
    Mknod {
        fid: u32,
        name: Name<'a>,
        mode: u32,
        gid: u32,
    },
    Rename {
        fid: u32,
        dir: u32,
        name: Name<'a>,
    },
    Readlink {
        fid: u32,
    },
    Getattr {
        fid: u32,
    },
    Setattr {
        fid: u32,
        set: Attributes,
    },
    Readdir {
        fid: u32,
        offset: u64,
        count: u32,
    },
    Fsync {
        fid: u32,
        data_only: bool,
    },
    Lock {
        fid: u32,
    },
    Getlock {
        fid: u32,
        /// All behind the lock's type, which the answer repeats.
        rest: &'a [u8],
    },
    Link {
        /// The folder that it goes into.
        dir: u32,
        fid: u32,
        name: Name<'a>,
    },
    Mkdir {
        fid: u32,
        name: Name<'a>,
        mode: u32,
        gid: u32,
    },
    Renameat {
        fid: u32,
        name: Name<'a>,
        new_dir: u32,
        new_name: Name<'a>,
    },
    Unlinkat {
        fid: u32,
        name: Name<'a>,
        dir: bool,
    },
}

/// A header: size of the whole message, type, tag.
pub fn header(bytes: [u8; HEADER]) -> (u32, u8, u16) {
    let [a, b, c, d, kind, e, f] = bytes;
    (
        u32::from_le_bytes([a, b, c, d]),
        kind,
        u16::from_le_bytes([e, f]),
    )
}

struct Reader<'a>(&'a [u8]);

type Parsed<T> = Result<T, Errno>;

impl<'a> Reader<'a> {
    fn bytes(&mut self, n: usize) -> Parsed<&'a [u8]> {
        let (now, later) = self.0.split_at_checked(n).ok_or(Errno::EINVAL)?;
        self.0 = later;
        Ok(now)
    }
    fn array<const N: usize>(&mut self) -> Parsed<[u8; N]> {
        self.bytes(N)?.try_into().map_err(|_| Errno::EINVAL)
    }
    fn u8(&mut self) -> Parsed<u8> {
        self.array::<1>().map(|[b]| b)
    }
    fn u16(&mut self) -> Parsed<u16> {
        self.array().map(u16::from_le_bytes)
    }
    fn u32(&mut self) -> Parsed<u32> {
        self.array().map(u32::from_le_bytes)
    }
    fn u64(&mut self) -> Parsed<u64> {
        self.array().map(u64::from_le_bytes)
    }
    fn string(&mut self) -> Parsed<&'a [u8]> {
        let n = self.u16()?;
        self.bytes(n.into())
    }
    fn name(&mut self) -> Parsed<Name<'a>> {
        component(self.string()?)
    }
    /// Nothing may follow.
    fn end<T>(self, value: T) -> Parsed<T> {
        if self.0.is_empty() {
            Ok(value)
        } else {
            Err(Errno::EINVAL)
        }
    }
}

/// Checks that a name stays where it is looked up.
fn component(name: &[u8]) -> Parsed<Name<'_>> {
    match name {
        b"" | b"." | b".." => Err(Errno::EINVAL),
        _ if name.len() > MAX_NAME => Err(Errno::ENAMETOOLONG),
        _ if name.iter().any(|&b| b == b'/' || b == 0) => Err(Errno::EINVAL),
        _ => Ok(OsStr::from_bytes(name)),
    }
}

/// Parses the message of type `kind` whose bytes behind the header are `body`
/// (a write's: the first [`WRITE`] of them).
///
/// # Errors
/// EINVAL: it is too short, too long or names something impossible;
/// ENAMETOOLONG; EOPNOTSUPP: no such message here.
pub fn parse(kind: u8, body: &[u8]) -> Parsed<Request<'_>> {
    let mut r = Reader(body);
    let request = match kind {
        kind::VERSION => Request::Version {
            msize: r.u32()?,
            version: r.string()?,
        },
        kind::ATTACH => {
            let (fid, _afid) = (r.u32()?, r.u32()?);
            let (_uname, _aname) = (r.string()?, r.string()?);
            Request::Attach { fid, uid: r.u32()? }
        }
        kind::FLUSH => {
            r.u16()?;
            Request::Flush
        }
        kind::WALK => {
            let (fid, new, count) = (r.u32()?, r.u32()?, usize::from(r.u16()?));
            if count > MAX_WALK {
                return Err(Errno::EINVAL);
            }
            let mut steps = Vec::with_capacity(count);
            for _ in 0..count {
                steps.push(match r.string()? {
                    b".." => None,
                    name => Some(component(name)?),
                });
            }
            Request::Walk { fid, new, steps }
        }
        kind::READ => Request::Read {
            fid: r.u32()?,
            offset: r.u64()?,
            count: r.u32()?,
        },
        kind::WRITE => Request::Write {
            fid: r.u32()?,
            offset: r.u64()?,
            count: r.u32()?,
        },
        kind::CLUNK => Request::Clunk { fid: r.u32()? },
        kind::REMOVE => Request::Remove { fid: r.u32()? },
        kind::STATFS => Request::Statfs { fid: r.u32()? },
        kind::LOPEN => Request::Lopen {
            fid: r.u32()?,
            flags: r.u32()?,
        },
        kind::LCREATE => Request::Lcreate {
            fid: r.u32()?,
            name: r.name()?,
            flags: r.u32()?,
            mode: r.u32()?,
            gid: r.u32()?,
        },
        kind::SYMLINK => {
            let (fid, name, target) = (r.u32()?, r.name()?, r.string()?);
            if target.is_empty() || target.contains(&0) {
                return Err(Errno::EINVAL);
            }
            Request::Symlink {
                fid,
                name,
                target: OsStr::from_bytes(target),
                gid: r.u32()?,
            }
        }
        kind::MKNOD => {
            let (fid, name, mode) = (r.u32()?, r.name()?, r.u32()?);
            let (_major, _minor) = (r.u32()?, r.u32()?);
            Request::Mknod {
                fid,
                name,
                mode,
                gid: r.u32()?,
            }
        }
        kind::RENAME => Request::Rename {
            fid: r.u32()?,
            dir: r.u32()?,
            name: r.name()?,
        },
        kind::READLINK => Request::Readlink { fid: r.u32()? },
        kind::GETATTR => {
            let fid = r.u32()?;
            r.u64()?;
            Request::Getattr { fid }
        }
        kind::SETATTR => Request::Setattr {
            fid: r.u32()?,
            set: Attributes {
                valid: r.u32()?,
                mode: r.u32()?,
                uid: r.u32()?,
                gid: r.u32()?,
                size: r.u64()?,
                atime: (r.u64()?, r.u64()?),
                mtime: (r.u64()?, r.u64()?),
            },
        },
        kind::READDIR => Request::Readdir {
            fid: r.u32()?,
            offset: r.u64()?,
            count: r.u32()?,
        },
        kind::FSYNC => Request::Fsync {
            fid: r.u32()?,
            // Old clients do not say.
            data_only: !r.0.is_empty() && r.u32()? != 0,
        },
        kind::LOCK => {
            let fid = r.u32()?;
            let (_type, _flags) = (r.u8()?, r.u32()?);
            let (_start, _length, _pid) = (r.u64()?, r.u64()?, r.u32()?);
            r.string()?;
            Request::Lock { fid }
        }
        kind::GETLOCK => {
            let (fid, _type) = (r.u32()?, r.u8()?);
            let rest = r.0;
            let (_start, _length, _pid) = (r.u64()?, r.u64()?, r.u32()?);
            r.string()?;
            Request::Getlock { fid, rest }
        }
        kind::LINK => Request::Link {
            dir: r.u32()?,
            fid: r.u32()?,
            name: r.name()?,
        },
        kind::MKDIR => Request::Mkdir {
            fid: r.u32()?,
            name: r.name()?,
            mode: r.u32()?,
            gid: r.u32()?,
        },
        kind::RENAMEAT => Request::Renameat {
            fid: r.u32()?,
            name: r.name()?,
            new_dir: r.u32()?,
            new_name: r.name()?,
        },
        kind::UNLINKAT => Request::Unlinkat {
            fid: r.u32()?,
            name: r.name()?,
            // AT_REMOVEDIR as the protocol has it.
            dir: r.u32()? & 0x200 != 0,
        },
        _ => return Err(Errno::EOPNOTSUPP),
    };
    r.end(request)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn string(s: &[u8]) -> Vec<u8> {
        let mut v = (s.len() as u16).to_le_bytes().to_vec();
        v.extend(s);
        v
    }

    fn walk(names: &[&[u8]]) -> Vec<u8> {
        let mut v = [1_u32.to_le_bytes(), 2_u32.to_le_bytes()].concat();
        v.extend((names.len() as u16).to_le_bytes());
        for n in names {
            v.extend(string(n));
        }
        v
    }

    #[test]
    fn names_are_one_component() {
        let good = walk(&[b"a", b"..", b"...", b"b c\xff"]);
        let Ok(Request::Walk { fid, new, steps }) = parse(kind::WALK, &good) else {
            panic!();
        };
        assert_eq!((fid, new), (1, 2));
        let name = |b| Some(OsStr::from_bytes(b));
        assert_eq!(steps, [name(b"a"), None, name(b"..."), name(b"b c\xff")]);
        for bad in [&b""[..], b".", b"/", b"a/b", b"/etc", b"a\0", b"../x"] {
            assert_eq!(parse(kind::WALK, &walk(&[bad])), Err(Errno::EINVAL));
        }
        let long = [b'x'; 256];
        let long = walk(&[&long]);
        assert_eq!(parse(kind::WALK, &long), Err(Errno::ENAMETOOLONG));
        assert!(parse(kind::WALK, &walk(&[&b"x"[..]; 17])).is_err());
        // Only a walk knows "..".
        let mut mkdir = 1_u32.to_le_bytes().to_vec();
        mkdir.extend(string(b".."));
        mkdir.extend([0; 8]);
        assert_eq!(parse(kind::MKDIR, &mkdir), Err(Errno::EINVAL));
    }

    #[test]
    fn every_message_has_its_length_and_no_other() {
        let mut body = vec![0_u8; 600];
        for kind in 0..=u8::MAX {
            let mut fits = Vec::new();
            for n in 0..body.len() {
                if parse(kind, &body[..n]).is_ok() {
                    fits.push(n);
                }
            }
            let most = if kind == kind::FSYNC { 2 } else { 1 };
            assert!(fits.len() <= most, "{kind}: {fits:?}");
        }
        // Strings that claim more than there is.
        body.fill(0xff);
        for kind in 0..=u8::MAX {
            for n in 0..body.len() {
                let parsed = parse(kind, &body[..n]);
                if let Ok(r) = &parsed {
                    assert!(!matches!(
                        r,
                        Request::Walk { .. } | Request::Mkdir { .. } | Request::Version { .. }
                    ));
                }
            }
        }
    }
}
