//! The session: the guest's fids, and messages answered one by one.

use std::collections::{HashMap, hash_map};
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use nix::dir::{Entry, Type};
use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::SFlag;
use vmmapi::GuestMemory;

use super::Options;
use super::backend::{Dir, Entries, Node, Owner, Share};
use super::reply::{Qid, Reply, format, path_of};
use super::request::{HEADER, Name, Request, WRITE, header, kind, parse};
use crate::virtio::queue::{
    Buffer, Chain, Malformed, keep_front, put_front, skip_front, take_front, total,
};
use crate::virtio::{Device, Identity};

type Outcome<T> = Result<T, Errno>;

/// The configuration has a mount tag (virtio's 9P transport).
const F_MOUNT_TAG: u64 = 1;
/// Entries of the queue: more than the 128 buffers of Linux's longest request.
const QUEUE: u16 = 256;
/// Longest mount tag.
pub const MAX_TAG: usize = 255;
/// Bytes of the longest message, data included.
const MAX_MSIZE: u32 = 512 << 10;
/// What a client may use at least.
const MIN_MSIZE: u32 = 4096;
/// Longest message beside a write: names and links, none longer than 64 KiB.
const MAX_BODY: usize = 68 << 10;
/// Bytes before the data of an answer to a read: header and count.
const READ_HEAD: usize = HEADER + 4;
/// Bytes of an error.
const ERROR: u64 = HEADER as u64 + 4;
/// Bytes of a folder's entry beside its name.
const ENTRY: usize = 13 + 8 + 1 + 2;
/// Most fids.
const MAX_FIDS: usize = 1 << 16;
/// Answer to a lock, and the type of no lock.
const LOCK_SUCCESS: u8 = 0;
const F_UNLCK: u8 = 2;

enum Open {
    No,
    File(File),
    Dir(Entries),
}

struct Fid {
    node: Node,
    /// The node itself, if it is a folder that was walked through.
    dir: Option<Arc<Dir>>,
    open: Open,
    uid: u32,
}

impl Fid {
    fn new(node: Node, uid: u32) -> Fid {
        Fid {
            node,
            dir: None,
            open: Open::No,
            uid,
        }
    }

    fn file(&self) -> Option<&File> {
        match &self.open {
            Open::File(f) => Some(f),
            _ => None,
        }
    }

    fn owner(&self, gid: u32) -> Owner {
        Owner { uid: self.uid, gid }
    }
}

/// What an answer is made of besides the reply's bytes.
enum Answer {
    /// Nothing.
    Reply,
    /// So many bytes that are in the guest's memory already.
    Data(u32),
}

/// A shared folder.
pub struct P9 {
    share: Share,
    fids: HashMap<u32, Fid>,
    msize: u32,
    body: Vec<u8>,
    reply: Reply,
}

/// Lets this process have as many files open as it may.
fn raise_file_limit() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        // Without it the guest has fewer files open.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

fn host(e: &io::Error) -> Errno {
    e.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

impl P9 {
    /// Opens the folder.
    ///
    /// # Errors
    /// What the host says.
    pub fn open(options: &Options) -> Outcome<(Identity, P9)> {
        let share = Share::open(&options.path, options.read_only)?;
        raise_file_limit();
        let tag = options.tag.as_bytes();
        let mut config = (tag.len() as u16).to_le_bytes().to_vec();
        config.extend(tag);
        let identity = Identity {
            kind: 9,
            // Mass storage, other.
            class: (1, 0x80),
            features: F_MOUNT_TAG,
            queues: vec![QUEUE],
            config,
            writable: 0..0,
        };
        let device = P9 {
            share,
            fids: HashMap::new(),
            msize: MIN_MSIZE,
            body: Vec::new(),
            reply: Reply::default(),
        };
        Ok((identity, device))
    }

    fn fid(&self, fid: u32) -> Outcome<&Fid> {
        self.fids.get(&fid).ok_or(Errno::EBADF)
    }

    fn insert(&mut self, number: u32, fid: Fid) -> Outcome<()> {
        let full = self.fids.len() >= MAX_FIDS;
        match self.fids.entry(number) {
            hash_map::Entry::Occupied(_) => Err(Errno::EINVAL),
            hash_map::Entry::Vacant(_) if full => Err(Errno::EMFILE),
            hash_map::Entry::Vacant(v) => {
                v.insert(fid);
                Ok(())
            }
        }
    }

    /// The folder that a fid is, held.
    fn dir(&mut self, number: u32) -> Outcome<Arc<Dir>> {
        let fid = self.fids.get_mut(&number).ok_or(Errno::EBADF)?;
        if let Some(dir) = &fid.dir {
            return Ok(Arc::clone(dir));
        }
        let dir = self.share.enter(&fid.node)?;
        fid.dir = Some(Arc::clone(&dir));
        Ok(dir)
    }

    fn qid(&self, node: &Node) -> Outcome<Qid> {
        let stat = self.share.stat(node)?;
        Ok(Qid::of(&stat, self.share.root_dev()))
    }

    /// Answers with the identity of an entry that was just made.
    fn made(&mut self, dir: &Arc<Dir>, name: Name<'_>) -> Outcome<Answer> {
        let qid = self.qid(&Node::child(dir, name))?;
        self.reply.qid(qid);
        Ok(Answer::Reply)
    }

    fn walk(&mut self, number: u32, new: u32, steps: &[Option<Name<'_>>]) -> Outcome<Answer> {
        let from = self.fid(number)?;
        let (mut node, uid) = (from.node.clone(), from.uid);
        if new != number && self.fids.contains_key(&new) {
            return Err(Errno::EINVAL);
        }
        let mut held = from.dir.clone();
        let mut qids = Vec::with_capacity(steps.len());
        for (i, step) in steps.iter().enumerate() {
            let next = (|| {
                let dir = match held.take() {
                    Some(dir) => dir,
                    None if i == 0 => self.dir(number)?,
                    None => self.share.enter(&node)?,
                };
                let next = match step {
                    Some(name) => Node::child(&dir, name),
                    None => self.share.parent(&dir)?,
                };
                Ok((self.qid(&next)?, next))
            })();
            match next {
                Ok((qid, next)) => {
                    qids.push(qid);
                    node = next;
                }
                Err(e) if i == 0 => return Err(e),
                // What there is of the way is told, and no fid is made.
                Err(_) => break,
            }
        }
        if qids.len() == steps.len() {
            let fid = Fid {
                dir: held,
                ..Fid::new(node, uid)
            };
            if new == number {
                self.fids.insert(number, fid);
            } else {
                self.insert(new, fid)?;
            }
        }
        self.reply.u16(qids.len() as u16);
        for qid in qids {
            self.reply.qid(qid);
        }
        Ok(Answer::Reply)
    }

    fn lopen(&mut self, number: u32, flags: u32) -> Outcome<Answer> {
        let fid = self.fids.get_mut(&number).ok_or(Errno::EBADF)?;
        if !matches!(fid.open, Open::No) {
            return Err(Errno::EINVAL);
        }
        let stat = self.share.stat(&fid.node)?;
        fid.open = if format(&stat) == SFlag::S_IFDIR {
            Open::Dir(self.share.entries(&fid.node)?)
        } else {
            Open::File(self.share.open_file(&fid.node, flags)?)
        };
        self.reply.qid(Qid::of(&stat, self.share.root_dev()));
        // As much at once as fits a message.
        self.reply.u32(0);
        Ok(Answer::Reply)
    }

    /// Reads straight into the guest's buffers.
    fn read(
        &self,
        fid: u32,
        offset: u64,
        count: u32,
        chain: &Chain,
        memory: &GuestMemory,
    ) -> Outcome<Answer> {
        let file = match &self.fid(fid)?.open {
            Open::File(f) => f,
            Open::Dir(_) => return Err(Errno::EISDIR),
            Open::No => return Err(Errno::EBADF),
        };
        let most = self.msize.saturating_sub(READ_HEAD as u32).min(count);
        let mut data = chain.writable.clone();
        skip_front(&mut data, READ_HEAD as u64);
        keep_front(&mut data, most.into());
        let n = memory
            .read_from_file_vectored(file, offset, pieces(&data))
            .map_err(|e| host(&e))?;
        Ok(Answer::Data(n as u32))
    }

    /// Writes straight from the guest's buffers; `chain.readable` is the data.
    fn write(
        &mut self,
        fid: u32,
        offset: u64,
        count: u32,
        chain: &mut Chain,
        memory: &GuestMemory,
    ) -> Outcome<Answer> {
        if total(&chain.readable) < count.into() || count > self.msize {
            return Err(Errno::EINVAL);
        }
        keep_front(&mut chain.readable, count.into());
        let file = self.fid(fid)?.file().ok_or(Errno::EBADF)?;
        let n = memory
            .write_to_file_vectored(file, offset, pieces(&chain.readable))
            .map_err(|e| host(&e))?;
        self.reply.u32(n as u32);
        Ok(Answer::Reply)
    }

    fn readdir(&mut self, number: u32, offset: u64, room: usize) -> Outcome<Answer> {
        let share = &self.share;
        let fid = self.fids.get_mut(&number).ok_or(Errno::EBADF)?;
        let Open::Dir(entries) = &mut fid.open else {
            return Err(Errno::EBADF);
        };
        if offset < entries.position() {
            *entries = share.entries(&fid.node)?;
        }
        while entries.position() < offset && entries.read()?.is_some() {}
        let start = self.reply.len();
        self.reply.u32(0);
        let end = self.reply.len().saturating_add(room);
        while let Some(entry) = entries.read()? {
            let name = entry.file_name().to_bytes();
            if self.reply.len() + ENTRY + name.len() > end {
                if self.reply.len() == start + 4 {
                    return Err(Errno::EINVAL);
                }
                entries.keep(entry);
                break;
            }
            let path = path_of(entry.ino(), entries.dev, share.root_dev());
            self.reply.qid(Qid::of_entry(entry.file_type(), path));
            self.reply.u64(entries.position());
            self.reply.u8(entry_type(&entry));
            self.reply.string(name);
        }
        let n = self.reply.len() - start - 4;
        self.reply.patch_u32(start, n as u32);
        Ok(Answer::Reply)
    }

    /// Tells every fid of an entry where it is now.
    fn moved(&mut self, from: &Dir, old: Name<'_>, to: &Arc<Dir>, new: Name<'_>) {
        for fid in self.fids.values_mut() {
            if fid.node.is(from, old) {
                fid.node.moved(to, new);
            }
        }
    }

    fn rename(
        &mut self,
        from: &Arc<Dir>,
        old: Name<'_>,
        to: &Arc<Dir>,
        new: Name<'_>,
    ) -> Outcome<Answer> {
        self.share.rename(from, old, to, new)?;
        self.moved(from, old, to, new);
        Ok(Answer::Reply)
    }

    fn version(&mut self, msize: u32, version: &[u8]) -> Outcome<Answer> {
        // A session starts from nothing.
        self.fids.clear();
        if msize < MIN_MSIZE {
            return Err(Errno::EINVAL);
        }
        self.msize = msize.min(MAX_MSIZE);
        self.reply.u32(self.msize);
        let known = version.starts_with(b"9P2000.L");
        self.reply
            .string(if known { b"9P2000.L" } else { b"unknown" });
        Ok(Answer::Reply)
    }

    fn perform(
        &mut self,
        request: Request<'_>,
        chain: &mut Chain,
        memory: &GuestMemory,
    ) -> Outcome<Answer> {
        match request {
            Request::Version { msize, version } => return self.version(msize, version),
            Request::Attach { fid, uid } => {
                let root = self.share.root();
                let qid = self.qid(&root)?;
                self.insert(fid, Fid::new(root, uid))?;
                self.reply.qid(qid);
            }
            // Requests are answered in order: what is to be flushed is done.
            Request::Flush => {}
            Request::Walk { fid, new, steps } => return self.walk(fid, new, &steps),
            Request::Read { fid, offset, count } => {
                return self.read(fid, offset, count, chain, memory);
            }
            Request::Write { fid, offset, count } => {
                return self.write(fid, offset, count, chain, memory);
            }
            Request::Clunk { fid } => {
                self.fids.remove(&fid).ok_or(Errno::EBADF)?;
            }
            Request::Remove { fid } => {
                // The fid is gone in any case.
                let fid = self.fids.remove(&fid).ok_or(Errno::EBADF)?;
                let folder = format(&self.share.stat(&fid.node)?) == SFlag::S_IFDIR;
                let (dir, name) = fid.node.place()?;
                self.share.unlink(dir, name, folder)?;
            }
            Request::Statfs { fid } => {
                let stat = self.share.statfs(&self.fid(fid)?.node)?;
                self.reply.file_system(&stat);
            }
            Request::Lopen { fid, flags } => return self.lopen(fid, flags),
            Request::Lcreate {
                fid,
                name,
                flags,
                mode,
                gid,
            } => {
                if !matches!(self.fid(fid)?.open, Open::No) {
                    return Err(Errno::EINVAL);
                }
                let dir = self.dir(fid)?;
                let owner = self.fid(fid)?.owner(gid);
                let file = self.share.create(&dir, name, flags, mode, owner)?;
                let uid = owner.uid;
                let mut made = Fid::new(Node::child(&dir, name), uid);
                let stat = self.share.stat_of(&made.node, Some(&file))?;
                made.open = Open::File(file);
                self.fids.insert(fid, made);
                self.reply.qid(Qid::of(&stat, self.share.root_dev()));
                self.reply.u32(0);
            }
            Request::Symlink {
                fid,
                name,
                target,
                gid,
            } => {
                let dir = self.dir(fid)?;
                let owner = self.fid(fid)?.owner(gid);
                self.share.symlink(&dir, name, target, owner)?;
                return self.made(&dir, name);
            }
            Request::Mknod {
                fid,
                name,
                mode,
                gid,
            } => {
                let dir = self.dir(fid)?;
                let owner = self.fid(fid)?.owner(gid);
                self.share.mknod(&dir, name, mode, owner)?;
                return self.made(&dir, name);
            }
            Request::Mkdir {
                fid,
                name,
                mode,
                gid,
            } => {
                let dir = self.dir(fid)?;
                let owner = self.fid(fid)?.owner(gid);
                self.share.mkdir(&dir, name, mode, owner)?;
                return self.made(&dir, name);
            }
            Request::Rename { fid, dir, name } => {
                let to = self.dir(dir)?;
                let node = self.fid(fid)?.node.clone();
                let (from, old) = node.place()?;
                return self.rename(from, old, &to, name);
            }
            Request::Renameat {
                fid,
                name,
                new_dir,
                new_name,
            } => {
                let (from, to) = (self.dir(fid)?, self.dir(new_dir)?);
                return self.rename(&from, name, &to, new_name);
            }
            Request::Readlink { fid } => {
                let target = self.share.readlink(&self.fid(fid)?.node)?;
                self.reply.string(target.as_bytes());
            }
            Request::Getattr { fid } => {
                let fid = self.fid(fid)?;
                let stat = self.share.stat_of(&fid.node, fid.file())?;
                self.reply.attributes(&stat, self.share.root_dev());
            }
            Request::Setattr { fid, set } => {
                let fid = self.fid(fid)?;
                self.share.set(&fid.node, fid.file(), &set)?;
            }
            Request::Readdir { fid, offset, count } => {
                let room = total(&chain.writable).min(self.msize.into()) as usize;
                let room = room.saturating_sub(READ_HEAD).min(count as usize);
                return self.readdir(fid, offset, room);
            }
            Request::Fsync { fid, data_only } => match self.fid(fid)?.file() {
                Some(f) if data_only => f.sync_data().map_err(|e| host(&e))?,
                Some(f) => f.sync_all().map_err(|e| host(&e))?,
                None => {}
            },
            // Locks are the guest's own: nobody else asks here.
            Request::Lock { fid } => {
                self.fid(fid)?;
                self.reply.u8(LOCK_SUCCESS);
            }
            Request::Getlock { fid, rest } => {
                self.fid(fid)?;
                self.reply.u8(F_UNLCK);
                self.reply.bytes(rest);
            }
            Request::Link { dir, fid, name } => {
                let to = self.dir(dir)?;
                self.share.link(&self.fid(fid)?.node, &to, name)?;
            }
            Request::Unlinkat { fid, name, dir } => {
                let from = self.dir(fid)?;
                self.share.unlink(&from, name, dir)?;
            }
        }
        Ok(Answer::Reply)
    }

    /// Reads and follows the message behind a header.
    fn message(
        &mut self,
        size: u32,
        kind: u8,
        chain: &mut Chain,
        memory: &GuestMemory,
    ) -> Outcome<Answer> {
        let body = (size as usize).checked_sub(HEADER).ok_or(Errno::EINVAL)?;
        if body as u64 > total(&chain.readable) {
            return Err(Errno::EINVAL);
        }
        keep_front(&mut chain.readable, body as u64);
        let parsed = if kind == kind::WRITE {
            body.min(WRITE)
        } else {
            body
        };
        if parsed > MAX_BODY {
            return Err(Errno::EMSGSIZE);
        }
        let mut bytes = std::mem::take(&mut self.body);
        bytes.resize(parsed, 0);
        let whole = take_front(&mut chain.readable, memory, &mut bytes);
        let answer = match whole {
            true => parse(kind, &bytes).and_then(|r| self.perform(r, chain, memory)),
            false => Err(Errno::EIO),
        };
        self.body = bytes;
        answer
    }
}

fn pieces(buffers: &[Buffer]) -> impl Iterator<Item = (u64, u32)> {
    buffers.iter().map(|b| (b.addr, b.len))
}

/// The type of an entry, as readdir(3) numbers them.
fn entry_type(entry: &Entry) -> u8 {
    match entry.file_type() {
        Some(Type::Fifo) => 1,
        Some(Type::CharacterDevice) => 2,
        Some(Type::Directory) => 4,
        Some(Type::BlockDevice) => 6,
        Some(Type::File) => 8,
        Some(Type::Symlink) => 10,
        Some(Type::Socket) => 12,
        None => 0,
    }
}

impl Device for P9 {
    fn serve(
        &mut self,
        _: usize,
        chain: &mut Chain,
        memory: &GuestMemory,
        _: u64,
    ) -> Result<u32, Malformed> {
        let mut bytes = [0; HEADER];
        let room = total(&chain.writable);
        if !take_front(&mut chain.readable, memory, &mut bytes) || room < ERROR {
            return Err(Malformed::Request);
        }
        let (size, kind, tag) = header(bytes);
        self.reply.start();
        let answer = self.message(size, kind, chain, memory);
        let (extra, message) = match answer {
            Ok(Answer::Reply) if self.reply.len() as u64 > room => {
                (0, self.reply.error(tag, Errno::EMSGSIZE))
            }
            Ok(Answer::Reply) => (0, self.reply.finish(kind.wrapping_add(1), tag, 0)),
            Ok(Answer::Data(n)) => {
                self.reply.u32(n);
                (n, self.reply.finish(kind.wrapping_add(1), tag, n))
            }
            Err(e) => (0, self.reply.error(tag, e)),
        };
        if !put_front(&mut chain.writable, memory, message) {
            return Err(Malformed::Request);
        }
        Ok((message.len() as u32).saturating_add(extra))
    }

    fn reset(&mut self) {
        self.fids.clear();
    }
}

#[cfg(test)]
#[path = "device_tests.rs"]
mod tests;
