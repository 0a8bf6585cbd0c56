//! The device: streams by their ports, and packets either way.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

use super::backend::{Asked, BUFFER, State, Stream};
use super::request::{HEADER, Header, NO_RECEIVE, NO_SEND, STREAM, op};
use super::{HOST, Options};
use crate::virtio::listener::Listener;
use crate::virtio::queue::{Chain, Malformed, put_front, take_front, total};
use crate::virtio::wait::{Ready, Sources};
use crate::virtio::{Cx, Device, Identity, Turn};

/// Entries of a queue.
const QUEUE: u16 = 128;
/// Receive, send; the third, events, has nothing to say.
const RX: usize = 0;
const TX: usize = 1;
/// Most streams, of either side's asking.
const MOST_STREAMS: usize = 256;
/// Packets that may wait for the guest's buffers before its own wait for them.
const MOST_PACKETS: usize = 512;
/// Bytes of data in a packet.
const PART: usize = 16 << 10;
/// Ports of streams that programs of the host ask for start here.
const FIRST_PORT: u32 = 1 << 30;

/// A stream's ports: the host's, the guest's.
type Key = (u32, u32);

/// A socket device.
pub struct Vsock {
    cid: u64,
    path: PathBuf,
    listener: Listener,
    /// Programs that have not said which port they want, by a number.
    asking: BTreeMap<u32, Stream>,
    streams: BTreeMap<Key, Stream>,
    packets: VecDeque<Header>,
    next_port: u32,
    /// No buffer to receive into: the driver will notify of one.
    hungry: bool,
    /// The guest's packets wait until ours are out.
    held: bool,
    /// What the tokens of the last sleep were.
    tokens: Vec<Token>,
    part: Vec<u8>,
}

#[derive(Clone, Copy, Debug)]
enum Token {
    Listener,
    Asking(u32),
    Stream(Key),
}

impl Vsock {
    /// Listens at the path.
    ///
    /// # Errors
    /// What the host says.
    pub fn open(options: &Options) -> io::Result<(Identity, Vsock)> {
        // A program's socket is connected to when the guest asks for it.
        crate::sandbox::need(|n| n.unix = true);
        let identity = Identity {
            kind: 19,
            // Simple communication controller, other.
            class: (7, 0x80),
            queues: vec![QUEUE; 3],
            config: options.cid.to_le_bytes().to_vec(),
            ..Identity::default()
        };
        // A socket for each stream that the guest asks for.
        crate::sandbox::need(|n| n.unix = true);
        let device = Vsock {
            cid: options.cid,
            path: options.path.clone(),
            listener: Listener::bind(&options.path)?,
            asking: BTreeMap::new(),
            streams: BTreeMap::new(),
            packets: VecDeque::new(),
            next_port: FIRST_PORT,
            hungry: true,
            held: false,
            tokens: Vec::new(),
            part: vec![0; PART],
        };
        Ok((identity, device))
    }

    fn header(&self, (host, guest): Key, op: u16) -> Header {
        Header {
            src_cid: HOST,
            dst_cid: self.cid,
            src_port: host,
            dst_port: guest,
            kind: STREAM,
            op,
            buf_alloc: BUFFER,
            ..Header::default()
        }
    }

    fn say(&mut self, key: Key, op: u16, flags: u32) {
        let mut header = self.header(key, op);
        header.flags = flags;
        if let Some(s) = self.streams.get_mut(&key) {
            header.fwd_cnt = s.taken;
            s.told = s.taken;
        }
        self.packets.push_back(header);
    }

    /// Ends a stream without more ado.
    fn cut(&mut self, key: Key) {
        self.streams.remove(&key);
        self.say(key, op::RST, 0);
    }

    fn count(&self) -> usize {
        self.streams.len() + self.asking.len()
    }

    /// A program of the guest wants `PATH_PORT`.
    fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = OsString::from(&self.path);
        path.push(format!("_{port}"));
        // A program that is slow to accept is as good as none: nobody waits.
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        connect(fd.as_raw_fd(), &UnixAddr::new(path.as_os_str())?)?;
        Ok(fd.into())
    }

    /// A packet of the guest's; `bytes` is what follows the header.
    fn packet(&mut self, h: &Header, bytes: &[u8]) {
        let key = (h.dst_port, h.src_port);
        if h.src_cid != self.cid || h.dst_cid != HOST {
            return;
        }
        if h.kind != STREAM {
            if h.op != op::RST {
                self.say(key, op::RST, 0);
            }
            return;
        }
        if let Some(s) = self.streams.get_mut(&key) {
            s.peer_alloc = h.buf_alloc;
            s.peer_fwd = h.fwd_cnt;
        }
        let state = self.streams.get(&key).map(|s| s.state);
        match (h.op, state) {
            (op::REQUEST, None) if self.count() < MOST_STREAMS => match self.connect(h.dst_port) {
                Ok(socket) => {
                    let mut s = Stream::new(socket, State::Open);
                    (s.peer_alloc, s.peer_fwd) = (h.buf_alloc, h.fwd_cnt);
                    self.streams.insert(key, s);
                    self.say(key, op::RESPONSE, 0);
                }
                Err(_) => self.say(key, op::RST, 0),
            },
            (op::RESPONSE, Some(State::Requested)) => {
                let accepted = self.streams.get_mut(&key).is_some_and(|s| {
                    s.state = State::Open;
                    let line = format!("OK {}\n", key.0);
                    s.socket
                        .write(line.as_bytes())
                        .is_ok_and(|n| n == line.len())
                });
                if !accepted {
                    self.cut(key);
                }
            }
            (op::RST, _) => {
                if let Some(mut s) = self.streams.remove(&key) {
                    // What it has sent before still arrives, if it can.
                    let _ = s.flush();
                }
            }
            (op::SHUTDOWN, Some(_)) => {
                if let Some(s) = self.streams.get_mut(&key) {
                    s.guest_done |= h.flags & NO_SEND != 0;
                    s.host_done |= h.flags & NO_RECEIVE != 0;
                }
                self.write(key);
            }
            (op::RW, Some(State::Open)) => {
                // More than it was told that there is room: it counts wrongly.
                let fits = self.streams.get_mut(&key).is_some_and(|s| {
                    let fits = bytes.len() <= s.room() && !s.guest_done;
                    if fits {
                        s.put(bytes);
                    }
                    fits
                });
                if fits {
                    self.write(key);
                } else {
                    self.cut(key);
                }
            }
            (op::CREDIT_REQUEST, Some(_)) => self.say(key, op::CREDIT_UPDATE, 0),
            (op::CREDIT_UPDATE, Some(_)) => {}
            _ => self.cut(key),
        }
    }

    /// Writes to the program what waits for it, and ends what is at its end.
    fn write(&mut self, key: Key) {
        let Some(s) = self.streams.get_mut(&key) else {
            return;
        };
        if s.flush().is_err() {
            self.cut(key);
            return;
        }
        let over = s.guest_done && s.host_done && s.waiting() == 0;
        let tell = s.should_tell();
        if over {
            self.cut(key);
        } else if tell {
            self.say(key, op::CREDIT_UPDATE, 0);
        }
    }

    /// A program has said which port it wants.
    fn asked(&mut self, number: u32) {
        let Some(s) = self.asking.get_mut(&number) else {
            return;
        };
        match s.ask() {
            Asked::Wait => {}
            Asked::Nonsense => drop(self.asking.remove(&number)),
            Asked::Port(port) => {
                let Some(mut s) = self.asking.remove(&number) else {
                    return;
                };
                s.state = State::Requested;
                let key = (number, port);
                self.streams.insert(key, s);
                self.say(key, op::REQUEST, 0);
            }
        }
    }

    fn accept(&mut self) {
        while self.count() < MOST_STREAMS
            && let Some(socket) = self.listener.accept()
        {
            let mut number = self.next_port;
            while self.asking.contains_key(&number)
                || self.streams.keys().any(|(host, _)| *host == number)
            {
                number = number.checked_add(1).unwrap_or(FIRST_PORT);
            }
            self.next_port = number.checked_add(1).unwrap_or(FIRST_PORT);
            self.asking
                .insert(number, Stream::new(socket, State::Asking));
            self.asked(number);
        }
    }

    /// A buffer of the guest's; `None` if it has none.
    fn buffer(&mut self, cx: &mut Cx<'_>) -> Result<Option<Chain>, Malformed> {
        let mut chain = Chain::default();
        if !cx.pop(RX, &mut chain)? {
            self.hungry = true;
            return Ok(None);
        }
        if total(&chain.writable) < HEADER as u64 {
            return Err(Malformed::Request);
        }
        Ok(Some(chain))
    }

    /// Sends the guest what waits for it.
    fn flush(&mut self, cx: &mut Cx<'_>) -> Result<(), Malformed> {
        for _ in 0..MOST_PACKETS {
            if self.packets.is_empty() {
                break;
            }
            let Some(mut chain) = self.buffer(cx)? else {
                return Ok(());
            };
            let Some(header) = self.packets.pop_front() else {
                break;
            };
            if !put_front(&mut chain.writable, cx.memory, &header.bytes()) {
                return Err(Malformed::Buffer);
            }
            cx.push(RX, &chain, HEADER as u32)?;
        }
        Ok(())
    }

    /// Carries a part of what a program says into the guest.
    fn read(&mut self, key: Key, cx: &mut Cx<'_>) -> Result<(), Malformed> {
        // In order with what was said before.
        self.flush(cx)?;
        if !self.packets.is_empty() || !self.streams.get(&key).is_some_and(Stream::reads) {
            return Ok(());
        }
        let memory = cx.memory;
        if cx.queue(RX).map_or(Ok(0), |q| q.waiting(memory))? == 0 {
            // Found again by pop, which asks to be notified.
            if self.buffer(cx)?.is_none() {
                return Ok(());
            }
            return Err(Malformed::Request);
        }
        let Some(s) = self.streams.get_mut(&key) else {
            return Ok(());
        };
        let most = (s.credit() as usize).min(PART);
        let Some(part) = self.part.get_mut(..most) else {
            return Ok(());
        };
        let n = match s.socket.read(part) {
            Ok(0) => {
                s.host_done = true;
                self.say(key, op::SHUTDOWN, NO_SEND);
                self.write(key);
                return self.flush(cx);
            }
            Ok(n) => n,
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                return Ok(());
            }
            Err(_) => {
                self.cut(key);
                return self.flush(cx);
            }
        };
        self.deliver(key, n, cx)
    }

    /// Delivers what was read while the guest had too few buffers.
    fn deliver_kept(&mut self, cx: &mut Cx<'_>) -> Result<(), Malformed> {
        let keys: Vec<Key> = self
            .streams
            .iter()
            .filter(|(_, s)| !s.kept.is_empty())
            .map(|(&key, _)| key)
            .collect();
        for key in keys {
            // In order with what was said before.
            if self.hungry || !self.packets.is_empty() {
                return Ok(());
            }
            let Some(s) = self.streams.get_mut(&key) else {
                continue;
            };
            let kept = std::mem::take(&mut s.kept);
            if let Some(part) = self.part.get_mut(..kept.len()) {
                part.copy_from_slice(&kept);
                self.deliver(key, kept.len(), cx)?;
            }
        }
        Ok(())
    }

    /// Delivers the first `n` bytes of the part, in as many packets as the
    /// guest's buffers make of it.
    fn deliver(&mut self, key: Key, n: usize, cx: &mut Cx<'_>) -> Result<(), Malformed> {
        let mut done = 0;
        while done < n {
            let Some(mut chain) = self.buffer(cx)? else {
                // The rest goes into the buffers that it notifies of.
                let rest = self.part.get(done..n).unwrap_or_default();
                if let Some(s) = self.streams.get_mut(&key) {
                    s.kept = rest.to_vec();
                }
                return Ok(());
            };
            let room = (total(&chain.writable) as usize).saturating_sub(HEADER);
            let now = room.min(n - done);
            let mut header = self.header(key, op::RW);
            header.len = now as u32;
            if let Some(s) = self.streams.get_mut(&key) {
                header.fwd_cnt = s.taken;
                s.told = s.taken;
                s.sent = s.sent.wrapping_add(now as u32);
            }
            let bytes = self.part.get(done..done + now).unwrap_or_default();
            let whole = put_front(&mut chain.writable, cx.memory, &header.bytes())
                && put_front(&mut chain.writable, cx.memory, bytes);
            if !whole || now == 0 {
                return Err(Malformed::Request);
            }
            cx.push(RX, &chain, (HEADER + now) as u32)?;
            done += now;
        }
        Ok(())
    }
}

impl Stream {
    /// Whether the program is listened to.
    fn reads(&self) -> bool {
        self.state == State::Open && !self.host_done && self.kept.is_empty() && self.credit() > 0
    }
}

impl Device for Vsock {
    fn turn(&mut self, queue: usize, cx: &mut Cx<'_>) -> Result<Turn, Malformed> {
        match queue {
            RX => {
                self.hungry = false;
                self.flush(cx)?;
                self.deliver_kept(cx)?;
                Ok(Turn::Idle)
            }
            TX => {
                if self.packets.len() >= MOST_PACKETS {
                    self.held = true;
                    return Ok(Turn::Idle);
                }
                let mut chain = Chain::default();
                if !cx.pop(TX, &mut chain)? {
                    return Ok(Turn::Idle);
                }
                let mut bytes = [0; HEADER];
                if !take_front(&mut chain.readable, cx.memory, &mut bytes) {
                    return Err(Malformed::Request);
                }
                let header = Header::parse(&bytes);
                let len = u64::from(header.len);
                if len > total(&chain.readable) || len > u64::from(BUFFER) {
                    return Err(Malformed::Request);
                }
                let mut data = vec![0; len as usize];
                if !take_front(&mut chain.readable, cx.memory, &mut data) {
                    return Err(Malformed::Buffer);
                }
                self.packet(&header, &data);
                cx.push(TX, &chain, 0)?;
                self.flush(cx)?;
                Ok(Turn::More)
            }
            // Buffers for events, of which there are none.
            _ => Ok(Turn::Idle),
        }
    }

    fn activate(&mut self, _: &mut Cx<'_>) -> Result<(), Malformed> {
        self.hungry = false;
        Ok(())
    }

    fn reset(&mut self) {
        // The programs see the end of their streams.
        self.streams.clear();
        self.packets.clear();
        self.hungry = true;
        self.held = false;
    }

    fn polls(&self) -> bool {
        true
    }

    fn sources(&mut self, sources: &mut Sources) {
        self.tokens.clear();
        let mut add = |token: Token, fd: &dyn AsRawFd, read, write| {
            sources.add(self.tokens.len(), &fd.as_raw_fd(), read, write);
            self.tokens.push(token);
        };
        if self.streams.len() + self.asking.len() < MOST_STREAMS {
            add(Token::Listener, &self.listener, true, false);
        }
        for (&number, s) in &self.asking {
            add(Token::Asking(number), &s.socket, true, false);
        }
        for (&key, s) in &self.streams {
            let read = !self.hungry && s.reads();
            let write = s.waiting() > 0;
            if read || write {
                add(Token::Stream(key), &s.socket, read, write);
            }
        }
        if self.held && self.packets.len() < MOST_PACKETS {
            sources.timeout(Duration::ZERO);
        }
    }

    fn woken(&mut self, ready: &[Ready], cx: &mut Cx<'_>) -> Result<(), Malformed> {
        for r in ready {
            match self.tokens.get(r.token).copied() {
                Some(Token::Listener) => self.accept(),
                Some(Token::Asking(number)) => self.asked(number),
                Some(Token::Stream(key)) => {
                    if r.write {
                        self.write(key);
                    }
                    if r.read && !self.hungry {
                        self.read(key, cx)?;
                    }
                }
                None => {}
            }
        }
        self.flush(cx)?;
        if self.held && self.packets.len() < MOST_PACKETS {
            self.held = false;
            for _ in 0..QUEUE {
                if self.turn(TX, cx)? == Turn::Idle {
                    return Ok(());
                }
            }
            self.held = true;
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "device_tests.rs"]
mod tests;
