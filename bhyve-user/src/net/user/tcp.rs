//! TCP: each connection of the guest's ends here, at a smoltcp socket, and
//! goes on over a socket of the host's.
//!
//! A connection has a smoltcp interface of its own, whose address is the peer
//! that the guest believes to talk to. So a segment finds its connection by
//! one look into a map, whatever their number.

use std::collections::HashMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr};
use std::os::fd::AsFd;

use mio::net::{TcpListener, TcpStream};
use mio::{Interest, Registry, Token};
use nix::sys::socket::{setsockopt, sockopt};
use smoltcp::iface::{self, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{self, Checksum, DeviceCapabilities, Medium, PacketMeta};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{HardwareAddress, IpCidr, IpVersion};

use super::link::Link;
use super::{Kind, ours, seen, token};

/// Connections at a time; the one that was idle the longest makes room.
pub const MOST: usize = 512;
/// Bytes that a connection holds each way.
const BUFFER: usize = 64 << 10;
/// A peer that is silent for so long while it owes an answer is gone.
const PATIENCE: Duration = Duration::from_secs(120);
/// The largest piece for a guest that cuts segments itself: an IPv4 packet.
const LARGEST: usize = 65535;

/// Who talks to whom, as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// The guest's end.
    pub guest: SocketAddr,
    /// The other.
    pub peer: SocketAddr,
}

/// What smoltcp sees of the wire: at most one packet that came, and room for
/// those that go.
struct Port<'a> {
    version: IpVersion,
    packet: Option<&'a [u8]>,
    link: &'a mut Link,
}

struct Rx<'a>(&'a [u8]);
struct Tx<'a> {
    version: IpVersion,
    link: &'a mut Link,
    segment: Option<u16>,
}

impl phy::RxToken for Rx<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

impl phy::TxToken for Tx<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        self.link.tcp(self.version, len, self.segment, f)
    }

    fn set_meta(&mut self, meta: PacketMeta) {
        self.segment = meta.segmentation_offload_size.map(u16::from);
    }
}

impl phy::Device for Port<'_> {
    type RxToken<'b>
        = Rx<'b>
    where
        Self: 'b;
    type TxToken<'b>
        = Tx<'b>
    where
        Self: 'b;

    fn receive(&mut self, _: Instant) -> Option<(Rx<'_>, Tx<'_>)> {
        let tx = Tx {
            version: self.version,
            link: self.link,
            segment: None,
        };
        Some((Rx(self.packet.take()?), tx))
    }

    fn transmit(&mut self, _: Instant) -> Option<Tx<'_>> {
        if !self.link.room() {
            self.link.starved = true;
            return None;
        }
        Some(Tx {
            version: self.version,
            link: self.link,
            segment: None,
        })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut caps = DeviceCapabilities::default();
        caps.medium = Medium::Ip;
        caps.max_transmission_unit = self.link.mtu;
        // Checked before, and left to the link.
        caps.checksum.tcp = Checksum::None;
        let takes = self.link.guest_takes;
        if takes.csum && takes.tso4 {
            caps.segmentation.tcpv4 = LARGEST.try_into().ok();
        }
        caps
    }
}

fn version(address: IpAddr) -> IpVersion {
    match address {
        IpAddr::V4(_) => IpVersion::Ipv4,
        IpAddr::V6(_) => IpVersion::Ipv6,
    }
}

/// An interface with the address `address`.
fn interface(address: IpAddr, link: &mut Link, now: Instant) -> Interface {
    let mut config = iface::Config::new(HardwareAddress::Ip);
    config.random_seed = super::random();
    let version = version(address);
    let mut port = Port {
        version,
        packet: None,
        link,
    };
    let mut interface = Interface::new(config, &mut port, now);
    interface.update_ip_addrs(|list| {
        let _ = list.push(IpCidr::new(
            address.into(),
            if address.is_ipv4() { 32 } else { 128 },
        ));
    });
    interface
}

fn socket() -> Socket<'static> {
    let mut socket = Socket::new(
        SocketBuffer::new(vec![0; BUFFER]),
        SocketBuffer::new(vec![0; BUFFER]),
    );
    socket.set_nagle_enabled(false);
    socket.set_timeout(Some(PATIENCE));
    socket
}

/// One connection.
struct Flow {
    key: Key,
    stream: TcpStream,
    interface: Interface,
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    /// The guest's SYN, while the host connects.
    syn: Option<Vec<u8>>,
    /// What the host's socket is ready for, as far as known.
    readable: bool,
    writable: bool,
    /// The host's peer has closed its half, or all.
    read_closed: bool,
    /// What was passed on.
    eof_to_guest: bool,
    eof_to_host: bool,
    due: Option<Instant>,
    used: Instant,
}

enum End {
    /// Both halves closed.
    Done,
    /// The host's side broke.
    Host,
}

impl Flow {
    fn new(key: Key, stream: TcpStream, link: &mut Link, now: Instant) -> Flow {
        let mut sockets = SocketSet::new(Vec::with_capacity(1));
        let handle = sockets.add(socket());
        Flow {
            key,
            stream,
            interface: interface(key.peer.ip(), link, now),
            sockets,
            handle,
            syn: None,
            readable: true,
            writable: true,
            read_closed: false,
            eof_to_guest: false,
            eof_to_host: false,
            due: None,
            used: now,
        }
    }

    /// Feeds a packet of the guest's, if there is one, and moves what can be
    /// moved; tells when the connection has ended.
    fn turn(&mut self, packet: Option<&[u8]>, link: &mut Link, now: Instant) -> Option<End> {
        let version = version(self.key.peer.ip());
        if packet.is_some() {
            self.used = now;
            let mut port = Port {
                version,
                packet,
                link,
            };
            self.interface
                .poll_ingress_single(now, &mut port, &mut self.sockets);
        }
        let moved = self.shovel();
        self.interface.poll_maintenance(now);
        let mut port = Port {
            version,
            packet: None,
            link,
        };
        // As much as a buffer holds, segment by segment.
        while self
            .interface
            .poll_egress(now, &mut port, &mut self.sockets)
            != iface::PollResult::None
        {}
        self.due = if link.room() {
            self.interface.poll_at(now, &self.sockets)
        } else {
            None
        };
        let socket = self.sockets.get_mut::<Socket>(self.handle);
        match (moved, socket.state()) {
            (Err(_), _) => Some(End::Host),
            (Ok(()), State::Closed) => Some(End::Done),
            _ => None,
        }
    }

    /// Moves bytes both ways.
    fn shovel(&mut self) -> io::Result<()> {
        let socket = self.sockets.get_mut::<Socket>(self.handle);
        while self.readable && !self.eof_to_guest && socket.can_send() {
            let result = socket.send(|buffer| match self.stream.read(buffer) {
                Ok(n) => (n, Ok((n, n == buffer.len()))),
                Err(e) => (0, Err(e)),
            });
            match result {
                Ok(Ok((0, _))) => {
                    self.eof_to_guest = true;
                    socket.close();
                }
                // Less than asked for: there is no more, and a later edge
                // tells of what comes; but the end may have come with it.
                Ok(Ok((_, full))) => self.readable = full || self.read_closed,
                Ok(Err(e)) if e.kind() == ErrorKind::WouldBlock => self.readable = false,
                Ok(Err(e)) if e.kind() == ErrorKind::Interrupted => {}
                Ok(Err(e)) => return Err(e),
                Err(_) => break,
            }
        }
        while self.writable && socket.can_recv() {
            let result = socket.recv(|buffer| match self.stream.write(buffer) {
                Ok(n) => (n, Ok(())),
                Err(e) => (0, Err(e)),
            });
            match result {
                Ok(Ok(())) => {}
                Ok(Err(e)) if e.kind() == ErrorKind::WouldBlock => self.writable = false,
                Ok(Err(e)) if e.kind() == ErrorKind::Interrupted => {}
                Ok(Err(e)) => return Err(e),
                Err(_) => break,
            }
        }
        let closed = matches!(
            socket.state(),
            State::CloseWait | State::LastAck | State::Closing | State::TimeWait
        );
        if closed && !socket.can_recv() && !self.eof_to_host {
            self.eof_to_host = true;
            self.stream.shutdown(Shutdown::Write)?;
        }
        Ok(())
    }

    /// Has the host's peer see a reset and not an end.
    fn reset_host(&self) {
        let now = nix::libc::linger {
            l_onoff: 1,
            l_linger: 0,
        };
        let _ = setsockopt(&self.stream.as_fd(), sockopt::Linger, &now);
    }
}

/// All connections.
#[derive(Default)]
pub struct Flows {
    slots: Vec<Option<Flow>>,
    free: Vec<usize>,
    index: HashMap<Key, usize>,
}

impl Flows {
    /// Whether the connection is known.
    pub fn has(&self, key: &Key) -> bool {
        self.index.contains_key(key)
    }

    /// A packet of the guest's for a known connection.
    pub fn packet(&mut self, key: &Key, packet: &[u8], link: &mut Link, now: Instant) {
        let Some(&slot) = self.index.get(key) else {
            return;
        };
        let Some(Some(flow)) = self.slots.get_mut(slot) else {
            return;
        };
        // A SYN sent again while the host connects says nothing new.
        if flow.syn.is_some() {
            return;
        }
        let end = flow.turn(Some(packet), link, now);
        self.finish(slot, end, link, now);
    }

    /// The guest's SYN for a new connection, that goes on to `to`.
    ///
    /// # Errors
    /// The host has no socket for it, or refuses at once.
    pub fn connect(
        &mut self,
        key: Key,
        to: SocketAddr,
        syn: &[u8],
        link: &mut Link,
        registry: &Registry,
        now: Instant,
    ) -> io::Result<()> {
        let stream = TcpStream::connect(to)?;
        let mut flow = Flow::new(key, stream, link, now);
        flow.syn = Some(syn.to_vec());
        flow.writable = false;
        self.insert(flow, registry)
    }

    /// A connection of the host's to a forwarded port.
    ///
    /// # Errors
    /// The host's.
    pub fn accept(
        &mut self,
        stream: TcpStream,
        from: SocketAddr,
        guest: SocketAddr,
        link: &mut Link,
        registry: &Registry,
        now: Instant,
    ) -> io::Result<()> {
        let seen = seen(from, guest);
        let free = |port: u16| {
            let key = Key {
                guest,
                peer: SocketAddr::new(seen.ip(), port),
            };
            (port != 0 && !self.has(&key)).then_some(key)
        };
        let ports = std::iter::once(seen.port()).chain(49152..=65535);
        let Some(key) = ports.into_iter().find_map(free) else {
            return Err(ErrorKind::AddrInUse.into());
        };
        let _ = stream.set_nodelay(true);
        let mut flow = Flow::new(key, stream, link, now);
        let cx = flow.interface.context();
        let socket = flow.sockets.get_mut::<Socket>(flow.handle);
        socket
            .connect(cx, key.guest, key.peer)
            .map_err(|e| io::Error::other(e.to_string()))?;
        self.insert(flow, registry)?;
        let Some(&slot) = self.index.get(&key) else {
            return Ok(());
        };
        self.turn(slot, None, link, now);
        Ok(())
    }

    fn insert(&mut self, mut flow: Flow, registry: &Registry) -> io::Result<()> {
        if self.index.len() >= MOST {
            let flows = self.slots.iter().enumerate();
            let flows = flows.filter_map(|(i, f)| Some((f.as_ref()?.used, i)));
            if let Some((_, slot)) = flows.min() {
                self.remove(slot);
            }
        }
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        let both = Interest::READABLE | Interest::WRITABLE;
        let registered = registry.register(&mut flow.stream, token(Kind::Tcp, slot), both);
        if let (Ok(()), Some(place)) = (&registered, self.slots.get_mut(slot)) {
            self.index.insert(flow.key, slot);
            *place = Some(flow);
        } else {
            self.free.push(slot);
        }
        registered
    }

    fn remove(&mut self, slot: usize) {
        // Closing the socket takes it out of the poll.
        if let Some(flow) = self.slots.get_mut(slot).and_then(Option::take) {
            self.index.remove(&flow.key);
            self.free.push(slot);
        }
    }

    fn turn(&mut self, slot: usize, packet: Option<&[u8]>, link: &mut Link, now: Instant) {
        if let Some(Some(flow)) = self.slots.get_mut(slot) {
            let end = flow.turn(packet, link, now);
            self.finish(slot, end, link, now);
        }
    }

    fn finish(&mut self, slot: usize, end: Option<End>, link: &mut Link, now: Instant) {
        let Some(end) = end else { return };
        let Some(Some(flow)) = self.slots.get_mut(slot) else {
            return;
        };
        match end {
            End::Host => {
                flow.sockets.get_mut::<Socket>(flow.handle).abort();
                let mut port = Port {
                    version: version(flow.key.peer.ip()),
                    packet: None,
                    link,
                };
                flow.interface
                    .poll_egress(now, &mut port, &mut flow.sockets);
            }
            // Closed without both ends having said so: the guest has reset it.
            End::Done if !(flow.eof_to_guest && flow.eof_to_host) => flow.reset_host(),
            End::Done => {}
        }
        self.remove(slot);
    }

    /// The host says that something is possible with a connection's socket.
    /// Returns the guest's SYN where the host could not connect, and why.
    pub fn ready(
        &mut self,
        slot: usize,
        event: &mio::event::Event,
        link: &mut Link,
        now: Instant,
    ) -> Option<(Vec<u8>, io::Error)> {
        let flow = self.slots.get_mut(slot)?.as_mut()?;
        flow.readable |= event.is_readable() || event.is_read_closed() || event.is_error();
        flow.writable |= event.is_writable() || event.is_error();
        flow.read_closed |= event.is_read_closed() || event.is_error();
        let Some(syn) = flow.syn.take() else {
            self.turn(slot, None, link, now);
            return None;
        };
        let failed = match (flow.stream.take_error(), flow.stream.peer_addr()) {
            (Ok(Some(e)) | Err(e), _) => Some(e),
            (Ok(None), Ok(_)) => None,
            (Ok(None), Err(e)) if e.kind() == ErrorKind::NotConnected => {
                // Not yet.
                flow.syn = Some(syn);
                return None;
            }
            (Ok(None), Err(e)) => Some(e),
        };
        if let Some(e) = failed {
            self.remove(slot);
            return Some((syn, e));
        }
        let _ = flow.stream.set_nodelay(true);
        let socket = flow.sockets.get_mut::<Socket>(flow.handle);
        if socket.listen(flow.key.peer).is_err() {
            self.remove(slot);
            return Some((syn, ErrorKind::ConnectionRefused.into()));
        }
        self.turn(slot, Some(&syn), link, now);
        None
    }

    /// Serves what is due; with `all`, everything.
    pub fn timers(&mut self, all: bool, link: &mut Link, now: Instant) {
        for slot in 0..self.slots.len() {
            let due = match self.slots.get(slot) {
                Some(Some(f)) => f.syn.is_none() && (all || f.due.is_some_and(|d| d <= now)),
                _ => false,
            };
            if due {
                self.turn(slot, None, link, now);
            }
        }
    }

    /// When [`Flows::timers`] has something to do.
    pub fn due(&self) -> Option<Instant> {
        self.slots.iter().flatten().filter_map(|f| f.due).min()
    }

    /// Ends all connections.
    pub fn clear(&mut self) {
        for slot in 0..self.slots.len() {
            if let Some(Some(flow)) = self.slots.get(slot) {
                flow.reset_host();
            }
            self.remove(slot);
        }
    }

    /// How many there are.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.index.len()
    }
}

/// Answers a packet that belongs to no connection, as a host without that port
/// does: with a reset, unless it is one.
pub fn refuse(packet: &[u8], to: IpAddr, link: &mut Link, now: Instant) {
    let mut interface = interface(to, link, now);
    let mut none = SocketSet::new(Vec::new());
    let mut port = Port {
        version: version(to),
        packet: Some(packet),
        link,
    };
    interface.poll_ingress_single(now, &mut port, &mut none);
}

/// A forwarded port of the host's.
pub struct Forward {
    /// Where connections come in.
    pub listener: TcpListener,
    /// Where they go.
    pub guest: SocketAddr,
}

impl Forward {
    /// Listens.
    ///
    /// # Errors
    /// The host's: the port is taken, or not for us.
    pub fn listen(at: SocketAddr, guest: SocketAddr) -> io::Result<Forward> {
        debug_assert!(ours(guest.ip()));
        let listener = TcpListener::bind(at)?;
        Ok(Forward { listener, guest })
    }

    /// Its place in the poll.
    ///
    /// # Errors
    /// The host's.
    pub fn register(&mut self, registry: &Registry, at: Token) -> io::Result<()> {
        registry.register(&mut self.listener, at, Interest::READABLE)
    }
}
