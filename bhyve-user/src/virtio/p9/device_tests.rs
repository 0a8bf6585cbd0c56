use super::*;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

static NEXT: AtomicU32 = AtomicU32::new(0);

const ENOENT: u32 = 2;
const EBADF: u32 = 9;
const ENXIO: u32 = 6;
const EPERM: u32 = 1;
const EBUSY: u32 = 16;
const ENOTDIR: u32 = 20;
const EISDIR: u32 = 21;
const EINVAL: u32 = 22;
const EROFS: u32 = 30;
const EMSGSIZE: u32 = 90;
const EOPNOTSUPP: u32 = 95;

/// `outer/share` is shared, `outer/secret` is not.
struct Rig {
    outer: PathBuf,
    p9: P9,
    memory: GuestMemory,
}

impl Drop for Rig {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.outer);
    }
}

fn rig_with(read_only: bool) -> Rig {
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    let outer = std::env::temp_dir().join(format!("bhyve-9p-{}-{n}", std::process::id()));
    let path = outer.join("share");
    fs::create_dir_all(path.join("sub/deep")).unwrap();
    fs::write(outer.join("secret"), b"secret").unwrap();
    fs::write(path.join("file"), b"the host was here").unwrap();
    fs::write(path.join("sub/deep/leaf"), b"leaf").unwrap();
    let options = Options {
        tag: "share".into(),
        path,
        read_only,
    };
    let (identity, p9) = P9::open(&options).unwrap();
    assert_eq!(identity.config, b"\x05\0share");
    let memory = GuestMemory::anonymous(1 << 20).unwrap();
    let mut rig = Rig { outer, p9, memory };
    let version = [&65536_u32.to_le_bytes()[..], &string("9P2000.L")].concat();
    let reply = rig.call(kind::VERSION, &version).unwrap();
    assert_eq!(reply, version);
    rig.attach(0);
    rig
}

fn rig() -> Rig {
    rig_with(false)
}

fn string(s: &str) -> Vec<u8> {
    let mut v = (s.len() as u16).to_le_bytes().to_vec();
    v.extend(s.as_bytes());
    v
}

/// Numbers and strings in a row.
macro_rules! body {
    ($($part:expr),*) => { [$(&Part::bytes(&$part)[..]),*].concat() };
}

trait Part {
    fn bytes(&self) -> Vec<u8>;
}
impl Part for u16 {
    fn bytes(&self) -> Vec<u8> {
        self.to_le_bytes().to_vec()
    }
}
impl Part for u32 {
    fn bytes(&self) -> Vec<u8> {
        self.to_le_bytes().to_vec()
    }
}
impl Part for u64 {
    fn bytes(&self) -> Vec<u8> {
        self.to_le_bytes().to_vec()
    }
}
impl Part for &str {
    fn bytes(&self) -> Vec<u8> {
        string(self)
    }
}

const DATA: u64 = 0x8_0000;

impl Rig {
    /// Sends a message in odd pieces; the answer's body or error.
    fn send(&mut self, kind: u8, body: &[u8], size: u32, room: u32) -> Result<Vec<u8>, u32> {
        let mut bytes = size.to_le_bytes().to_vec();
        bytes.extend([kind, 0xcd, 0xab]);
        bytes.extend(body);
        self.memory.write_bytes(0x1000, &bytes).unwrap();
        self.memory.fill(DATA, 0x10000, 0xee).unwrap();
        let n = bytes.len() as u32;
        let cut = n.min(5);
        let mut chain = Chain::default();
        let buffer = |addr, len| Buffer { addr, len };
        let halves = |at: u64, n: u32, cut: u32| {
            let list = [buffer(at, cut), buffer(at + u64::from(cut), n - cut)];
            list.into_iter().filter(|b| b.len > 0)
        };
        chain.readable.extend(halves(0x1000, n, cut));
        chain.writable.extend(halves(DATA, room, room.min(9)));
        let used = self.p9.serve(0, &mut chain, &self.memory, 0).unwrap();
        let mut reply = vec![0; used as usize];
        self.memory.read_bytes(DATA, &mut reply).unwrap();
        let size = u32::from_le_bytes(reply[..4].try_into().unwrap());
        assert_eq!((size, &reply[5..7]), (used, &[0xcd, 0xab][..]));
        assert!(used <= room);
        match reply[4] {
            kind::RLERROR => Err(u32::from_le_bytes(reply[7..].try_into().unwrap())),
            k => {
                assert_eq!(k, kind + 1);
                Ok(reply.split_off(7))
            }
        }
    }
    fn call(&mut self, kind: u8, body: &[u8]) -> Result<Vec<u8>, u32> {
        self.send(kind, body, body.len() as u32 + 7, 0x10000)
    }
    fn attach(&mut self, fid: u32) {
        let body = body!(fid, u32::MAX, "root", "", u32::MAX);
        self.call(kind::ATTACH, &body).unwrap();
    }
    fn walk(&mut self, fid: u32, new: u32, names: &[&str]) -> Result<usize, u32> {
        let mut body = body!(fid, new, names.len() as u16);
        for n in names {
            body.extend(string(n));
        }
        let reply = self.call(kind::WALK, &body)?;
        let n = usize::from(u16::from_le_bytes(reply[..2].try_into().unwrap()));
        assert_eq!(reply.len(), 2 + 13 * n);
        Ok(n)
    }
    fn open(&mut self, fid: u32, flags: u32) -> Result<(), u32> {
        self.call(kind::LOPEN, &body!(fid, flags)).map(drop)
    }
    fn read(&mut self, fid: u32, offset: u64, count: u32) -> Result<Vec<u8>, u32> {
        let mut reply = self.call(kind::READ, &body!(fid, offset, count))?;
        let data = reply.split_off(4);
        let n = u32::from_le_bytes(reply.try_into().unwrap());
        assert_eq!(n as usize, data.len());
        Ok(data)
    }
    fn write(&mut self, fid: u32, offset: u64, data: &[u8]) -> Result<u32, u32> {
        let mut body = body!(fid, offset, data.len() as u32);
        body.extend(data);
        let reply = self.call(kind::WRITE, &body)?;
        Ok(u32::from_le_bytes(reply.try_into().unwrap()))
    }
    fn clunk(&mut self, fid: u32) {
        self.call(kind::CLUNK, &body!(fid)).unwrap();
    }
    /// Names of a folder, with answers of at most `count` bytes.
    fn names(&mut self, fid: u32, count: u32) -> Vec<String> {
        let (mut names, mut offset) = (Vec::new(), 0_u64);
        loop {
            let reply = self
                .call(kind::READDIR, &body!(fid, offset, count))
                .unwrap();
            let mut rest = &reply[4..];
            assert!(rest.len() <= count as usize);
            if rest.is_empty() {
                names.sort();
                return names;
            }
            while !rest.is_empty() {
                offset = u64::from_le_bytes(rest[13..21].try_into().unwrap());
                let n = usize::from(u16::from_le_bytes(rest[22..24].try_into().unwrap()));
                names.push(String::from_utf8(rest[24..24 + n].to_vec()).unwrap());
                rest = &rest[24 + n..];
            }
        }
    }
    fn share(&self) -> PathBuf {
        self.outer.join("share")
    }
}

#[test]
fn files_are_read_written_made_and_removed() {
    let mut r = rig();
    assert_eq!(r.walk(0, 1, &["file"]), Ok(1));
    r.open(1, 0).unwrap();
    assert_eq!(r.read(1, 4, 100).unwrap(), b"host was here");
    assert_eq!(r.read(1, 0, 3).unwrap(), b"the");
    assert_eq!(r.read(1, 1000, 3).unwrap(), b"");
    assert_eq!(r.write(1, 0, b"x"), Err(EBADF), "open for reading");
    r.clunk(1);
    assert_eq!(r.walk(0, 1, &[]), Ok(0));
    let create = body!(1_u32, "new", 0o101_u32, 0o664_u32, 0_u32);
    r.call(kind::LCREATE, &create).unwrap();
    let data: Vec<u8> = (0..20000_u32).map(|i| i as u8).collect();
    assert_eq!(r.write(1, 1, &data), Ok(20000));
    let path = r.share().join("new");
    let content = fs::read(&path).unwrap();
    assert_eq!((content[0], &content[1..]), (0, &data[..]));
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o664, "whatever the host's umask");
    r.call(kind::FSYNC, &body!(1_u32, 0_u32)).unwrap();
    // An open file outlives its name.
    r.call(kind::UNLINKAT, &body!(0_u32, "new", 0_u32)).unwrap();
    assert!(!path.exists());
    assert_eq!(r.write(1, 0, b"!"), Ok(1));
    let attributes = r.call(kind::GETATTR, &body!(1_u32, u64::MAX)).unwrap();
    assert_eq!(attributes.len(), 153);
    assert_eq!(attributes[49..57], 20001_u64.to_le_bytes());
}

#[test]
fn attributes_are_set_and_told() {
    let mut r = rig();
    r.walk(0, 1, &["file"]).unwrap();
    let path = r.share().join("file");
    let set = |valid: u32, mode: u32, size: u64, atime: u64, mtime: u64| {
        body!(
            1_u32, valid, mode, 0_u32, 0_u32, size, atime, 5_u64, mtime, 6_u64
        )
    };
    // Mode, size, and both times to given values.
    r.call(kind::SETATTR, &set(0x1b9, 0o4751, 7, 1000, 2000))
        .unwrap();
    let m = fs::metadata(&path).unwrap();
    assert_eq!(m.len(), 7);
    assert_eq!(m.mode() & 0o7777, 0o751, "no set-user-ID from a guest");
    assert_eq!((m.atime(), m.mtime(), m.mtime_nsec()), (1000, 2000, 6));
    let a = r.call(kind::GETATTR, &body!(1_u32, 0_u64)).unwrap();
    let at = |i: usize| u64::from_le_bytes(a[i..i + 8].try_into().unwrap());
    assert_eq!(at(0), 0x7ff);
    assert_eq!(u32::from_le_bytes(a[21..25].try_into().unwrap()), m.mode());
    assert_eq!((at(49), at(73), at(89)), (7, 1000, 2000));
    assert_eq!(
        r.call(kind::SETATTR, &set(8, 0, u64::MAX, 0, 0)),
        Err(27),
        "EFBIG"
    );
    let stat = r.call(kind::STATFS, &body!(1_u32)).unwrap();
    assert_eq!(
        (stat.len(), &stat[..4]),
        (60, &[0x97, 0x19, 0x02, 0x01][..])
    );
}

#[test]
fn nothing_outside_of_the_share_is_reachable() {
    let mut r = rig();
    let share = r.share();
    symlink("../secret", share.join("out")).unwrap();
    symlink("..", share.join("up")).unwrap();
    symlink("/", share.join("slash")).unwrap();
    // Links are seen, and never followed.
    assert_eq!(r.walk(0, 1, &["out"]), Ok(1));
    assert_eq!(r.open(1, 0), Err(ENXIO));
    let target = r.call(kind::READLINK, &body!(1_u32)).unwrap();
    assert_eq!(target, string("../secret"));
    let set = body!(
        1_u32, 9_u32, 0o777_u32, 0_u32, 0_u32, 0_u64, 0_u64, 0_u64, 0_u64, 0_u64
    );
    assert!(r.call(kind::SETATTR, &set).is_err());
    for way in [&["up", "secret"][..], &["slash", "etc"]] {
        assert_eq!(r.walk(0, 2, way), Ok(1), "as far as the link");
        assert_eq!(r.open(2, 0), Err(EBADF), "and no fid");
    }
    r.walk(0, 2, &["up"]).unwrap();
    assert_eq!(r.walk(2, 3, &["secret"]), Err(ENOTDIR));
    assert_eq!(
        r.call(kind::LCREATE, &body!(2_u32, "x", 1_u32, 0_u32, 0_u32)),
        Err(ENOTDIR)
    );
    // A file that is made through a link's name is not made behind it.
    r.walk(0, 4, &[]).unwrap();
    let create = body!(4_u32, "out", 0o1001_u32, 0o644_u32, 0_u32);
    assert_eq!(r.call(kind::LCREATE, &create), Err(ENXIO));
    // Above the share is the share.
    for (new, way) in [(5, &[".."][..]), (6, &["sub", "..", "..", ".."])] {
        assert_eq!(r.walk(0, new, way), Ok(way.len()));
        assert_eq!(r.walk(new, 20 + new, &["file"]), Ok(1));
        assert_eq!(r.walk(new, 30 + new, &["secret"]), Err(ENOENT));
    }
    assert_eq!(r.walk(0, 7, &["sub", "deep", "..", "deep", "leaf"]), Ok(5));
    // A folder that leaves the share takes nobody along.
    r.walk(0, 8, &["sub", "deep"]).unwrap();
    r.walk(8, 9, &["leaf"]).unwrap();
    fs::rename(share.join("sub/deep"), r.outer.join("deep")).unwrap();
    assert_eq!(r.walk(8, 10, &[".."]), Err(116), "ESTALE");
    assert_eq!(fs::read(r.outer.join("secret")).unwrap(), b"secret");
}

#[test]
fn pipes_and_devices_are_not_opened_and_devices_not_made() {
    let mut r = rig();
    let mknod = |name: &str, mode: u32| body!(0_u32, name, mode, 1_u32, 3_u32, 0_u32);
    for mode in [0o20666, 0o60666, 0o140666, 0o40777, 0] {
        assert_eq!(r.call(kind::MKNOD, &mknod("dev", mode)), Err(EPERM));
    }
    r.call(kind::MKNOD, &mknod("pipe", 0o10644)).unwrap();
    r.walk(0, 1, &["pipe"]).unwrap();
    for flags in [0, 1, 2] {
        assert_eq!(r.open(1, flags), Err(ENXIO), "and it does not wait");
    }
    r.call(kind::MKNOD, &mknod("plain", 0o100604)).unwrap();
    let m = fs::metadata(r.share().join("plain")).unwrap();
    assert_eq!(m.mode() & 0o7777, 0o604);
}

#[test]
fn folders_are_listed_in_answers_of_any_size() {
    let mut r = rig();
    for i in 0..200 {
        fs::write(r.share().join(format!("sub/file-{i:03}")), b"").unwrap();
    }
    r.walk(0, 1, &["sub"]).unwrap();
    r.open(1, 0o200000).unwrap();
    let all = r.names(1, 60000);
    assert_eq!(all.len(), 203);
    assert_eq!((all[0].as_str(), all[2].as_str()), (".", "deep"));
    assert_eq!(r.names(1, 40), all);
    let small = r.call(kind::READDIR, &body!(1_u32, 0_u64, 10_u32));
    assert_eq!(small, Err(EINVAL));
    let beyond = r.call(kind::READDIR, &body!(1_u32, u64::MAX, 1000_u32));
    assert_eq!(beyond, Ok(vec![0; 4]));
    assert_eq!(r.read(1, 0, 10), Err(EISDIR));
}

#[test]
fn names_change_and_fids_follow() {
    let mut r = rig();
    r.call(kind::MKDIR, &body!(0_u32, "dir", 0o770_u32, 0_u32))
        .unwrap();
    r.walk(0, 1, &["file"]).unwrap();
    r.walk(0, 2, &["dir"]).unwrap();
    r.walk(0, 3, &["sub"]).unwrap();
    r.walk(3, 4, &["deep", "leaf"]).unwrap();
    r.call(kind::RENAME, &body!(1_u32, 2_u32, "moved")).unwrap();
    r.call(kind::RENAMEAT, &body!(0_u32, "sub", 2_u32, "bus"))
        .unwrap();
    r.open(1, 0).unwrap();
    assert_eq!(r.read(1, 0, 3).unwrap(), b"the");
    assert_eq!(r.walk(3, 5, &["deep", "leaf"]), Ok(2));
    r.open(4, 0).unwrap();
    assert_eq!(r.read(4, 0, 9).unwrap(), b"leaf");
    let link = body!(0_u32, 5_u32, "hard");
    r.call(kind::LINK, &link).unwrap();
    assert_eq!(fs::read(r.share().join("hard")).unwrap(), b"leaf");
    r.call(kind::SYMLINK, &body!(0_u32, "soft", "hard", 0_u32))
        .unwrap();
    assert_eq!(fs::read(r.share().join("soft")).unwrap(), b"leaf");
    r.call(kind::REMOVE, &body!(5_u32)).unwrap();
    assert!(!r.share().join("dir/bus/deep/leaf").exists());
    assert_eq!(r.call(kind::CLUNK, &body!(5_u32)), Err(EBADF));
    r.attach(9);
    assert_eq!(r.call(kind::REMOVE, &body!(9_u32)), Err(EBUSY));
}

#[test]
fn a_read_only_share_stays_as_it_is() {
    let mut r = rig_with(true);
    r.walk(0, 1, &["file"]).unwrap();
    r.walk(0, 2, &[]).unwrap();
    assert_eq!(r.open(1, 1), Err(EROFS));
    assert_eq!(r.open(1, 0o1000), Err(EROFS));
    r.open(1, 0).unwrap();
    assert_eq!(r.read(1, 0, 3).unwrap(), b"the");
    let set = body!(
        1_u32, 8_u32, 0_u32, 0_u32, 0_u32, 0_u64, 0_u64, 0_u64, 0_u64, 0_u64
    );
    for (kind, body) in [
        (
            kind::LCREATE,
            body!(2_u32, "a", 0o102_u32, 0o644_u32, 0_u32),
        ),
        (kind::MKDIR, body!(2_u32, "a", 0o755_u32, 0_u32)),
        (kind::SYMLINK, body!(2_u32, "a", "b", 0_u32)),
        (
            kind::MKNOD,
            body!(2_u32, "a", 0o100644_u32, 0_u32, 0_u32, 0_u32),
        ),
        (kind::LINK, body!(2_u32, 1_u32, "a")),
        (kind::RENAME, body!(1_u32, 2_u32, "a")),
        (kind::RENAMEAT, body!(2_u32, "file", 2_u32, "a")),
        (kind::UNLINKAT, body!(2_u32, "file", 0_u32)),
        (kind::SETATTR, set),
        (kind::REMOVE, body!(1_u32)),
    ] {
        assert_eq!(r.call(kind, &body), Err(EROFS), "{kind}");
    }
    let content = fs::read(r.share().join("file")).unwrap();
    assert_eq!(content, b"the host was here");
}

#[test]
fn messages_that_make_no_sense_are_errors() {
    let mut r = rig();
    let clunk = body!(7_u32);
    // Sizes that are not the message's.
    for size in [0, 6, 7, 10, 12, u32::MAX] {
        assert_eq!(
            r.send(kind::CLUNK, &clunk, size, 100),
            Err(EINVAL),
            "{size}"
        );
    }
    assert_eq!(r.call(kind::CLUNK, &clunk), Err(EBADF));
    for unknown in [0, 6, 7, 30, 32, 102, 124, 255] {
        assert_eq!(r.call(unknown, &clunk), Err(EOPNOTSUPP));
    }
    assert_eq!(r.call(kind::VERSION, &[0; 70_000]), Err(EMSGSIZE));
    // An answer that does not fit.
    let getattr = body!(0_u32, 0_u64);
    assert_eq!(r.send(kind::GETATTR, &getattr, 19, 20), Err(EMSGSIZE));
    // A write that claims more than there is.
    r.walk(0, 1, &["file"]).unwrap();
    r.open(1, 2).unwrap();
    let mut write = body!(1_u32, 0_u64, 100_u32);
    write.extend(b"few");
    assert_eq!(r.call(kind::WRITE, &write), Err(EINVAL));
    assert_eq!(r.write(1, u64::MAX, b"far"), Err(75), "EOVERFLOW");
    let other = body!(65536_u32, "9P2000.u");
    let reply = r.call(kind::VERSION, &other).unwrap();
    assert_eq!(reply[4..], string("unknown"));
    assert_eq!(r.walk(0, 1, &[]), Err(EBADF), "a new session has no fids");

    let mut chain = Chain::default();
    chain.readable.push(Buffer {
        addr: 0x1000,
        len: 6,
    });
    chain.writable.push(Buffer { addr: 0, len: 100 });
    let short = r.p9.serve(0, &mut chain, &r.memory, 0);
    assert_eq!(short, Err(Malformed::Request));
    chain.readable = vec![Buffer {
        addr: 0x1000,
        len: 100,
    }];
    chain.writable = vec![Buffer { addr: 0, len: 10 }];
    let no_room = r.p9.serve(0, &mut chain, &r.memory, 0);
    assert_eq!(no_room, Err(Malformed::Request));
}
