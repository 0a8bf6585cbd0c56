//! User-mode networking: the guest's packets become sockets of this process,
//! so that a guest has a network without root and without an interface on the
//! host. `slirp` in bhyve's words; the addresses are slirp's too.
//!
//! ```text
//! 10.0.2.2    fec0::2    the gateway, and the host itself (its loopback interface)
//! 10.0.2.3    fec0::3    name server: the host's
//! 10.0.2.15   fec0::/64  the guest, by DHCP, by router advertisement
//! ```
//!
//! TCP is smoltcp's at the guest's side and the host's at the other
//! (`tcp`); UDP and ICMP are translated datagram by datagram (`udp`); what is
//! IPv6's alone is in `ipv6`.
//! Everything the guest writes is parsed by smoltcp's checked packet types.
//! There is no thread of its own: whoever sends and receives moves it on.

mod dhcp;
mod icmp;
mod ipv6;
mod link;
pub mod options;
mod resolver;
mod tcp;
mod udp;

use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use mio::{Events, Poll, Token};
use smoltcp::time::Instant as SmolInstant;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol,
    Icmpv4DstUnreachable, IpAddress, IpProtocol, Ipv4Packet, Ipv6Packet, TcpPacket, UdpPacket,
};

use super::mac::Mac;
use super::{HEADER, Header, NEEDS_CSUM, Offloads, Port};
use icmp::Reason;
use ipv6::{DNS6, GATEWAY6};
use link::Link;
use options::{Forward, Options, Protocol};
use tcp::Key;

/// The gateway, which is the host.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// The name server.
pub const DNS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
/// The guest.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const NETMASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);
const DNS_PORT: u16 = 53;
/// The gateway's card, as slirp has it.
const GATEWAY_MAC: EthernetAddress = EthernetAddress([0x52, 0x55, 10, 0, 2, 2]);
/// Events taken from the host at a time.
const EVENTS: usize = 64;
/// The largest datagram.
const DATAGRAM: usize = 65536;

/// Whose turn an event of the host's is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Tcp,
    Udp,
    TcpForward,
    UdpForward,
}

fn token(kind: Kind, slot: usize) -> Token {
    Token(slot << 2 | kind as usize)
}

fn untoken(token: Token) -> (Kind, usize) {
    let kind = match token.0 & 3 {
        0 => Kind::Tcp,
        1 => Kind::Udp,
        2 => Kind::TcpForward,
        _ => Kind::UdpForward,
    };
    (kind, token.0 >> 2)
}

/// Whether an address is of the guest's network.
fn local(ip: Ipv4Addr) -> bool {
    let [a, b, c, _] = ip.octets();
    (a, b, c) == (10, 0, 2)
}

/// Whether a guest may have an address: one of its network that means nothing
/// else there.
fn ours(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            let [.., d] = ip.octets();
            local(ip) && (4..255).contains(&d)
        }
        IpAddr::V6(ip) => ipv6::ours(ip),
    }
}

/// Under what address a guest sees somebody who comes by a forwarded port: his
/// own, unless that means something else in the guest's world or is of the
/// other kind; then the gateway's.
fn seen(from: SocketAddr, guest: SocketAddr) -> SocketAddr {
    let ip = match (from.ip().to_canonical(), guest) {
        (IpAddr::V4(a), SocketAddr::V4(_)) if !a.is_loopback() && !local(a) => a.into(),
        (IpAddr::V6(a), SocketAddr::V6(_)) if ipv6::outside(a) => a.into(),
        (_, SocketAddr::V4(_)) => GATEWAY.into(),
        (_, SocketAddr::V6(_)) => GATEWAY6.into(),
    };
    SocketAddr::new(ip, from.port())
}

/// A packet of the guest's.
#[derive(Clone, Copy)]
struct Packet<'a> {
    from: IpAddr,
    to: IpAddr,
    payload: &'a [u8],
    /// With its header.
    whole: &'a [u8],
}

impl<'a> Packet<'a> {
    /// The parts of a packet that has been checked.
    fn parse(whole: &'a [u8]) -> Option<Packet<'a>> {
        if let Ok(ip) = Ipv4Packet::new_checked(whole)
            && ip.version() == 4
        {
            let (from, to) = (ip.src_addr().into(), ip.dst_addr().into());
            let payload = ip.payload();
            return Some(Packet {
                from,
                to,
                payload,
                whole,
            });
        }
        let ip = Ipv6Packet::new_checked(whole).ok()?;
        let (from, to) = (ip.src_addr().into(), ip.dst_addr().into());
        let payload = ip.payload();
        Some(Packet {
            from,
            to,
            payload,
            whole,
        })
    }
}

/// Something that an outsider cannot guess, for TCP's first sequence number.
fn random() -> u64 {
    use std::hash::{BuildHasher, Hasher, RandomState};
    RandomState::new().build_hasher().finish()
}

/// Why a user-mode network cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// A port to forward is taken or forbidden.
    #[error("hostfwd: the host does not let us have {protocol:?} port {at}: {why}")]
    Forward {
        /// TCP or UDP.
        protocol: Protocol,
        /// The host's address and port.
        at: SocketAddr,
        /// What the host says.
        why: io::Error,
    },
    /// Out of descriptors.
    #[error("slirp: {0}")]
    Host(#[from] io::Error),
}

/// A user-mode network.
pub struct UserNet {
    open: bool,
    poll: Poll,
    events: Events,
    start: Instant,
    link: Link,
    resolver: resolver::Resolver,
    tcp: tcp::Flows,
    udp: udp::Flows,
    tcp_forwards: Vec<tcp::Forward>,
    udp_forwards: Vec<udp::Forward>,
    buffer: Vec<u8>,
    /// When the router makes itself known again, to a guest that asked once.
    advert: Option<Instant>,
}

impl UserNet {
    /// A network for a card with the address `guest`, whose largest IP packet
    /// has `mtu` bytes. The ports to forward are bound at once.
    ///
    /// # Errors
    /// [`UserError`].
    pub fn new(options: &Options, guest: Mac, mtu: u16) -> Result<UserNet, UserError> {
        let poll = Poll::new()?;
        crate::sandbox::need(|n| {
            n.network = true;
            n.read.insert(resolver::FILE.into());
        });
        let (mut tcp_forwards, mut udp_forwards) = (Vec::new(), Vec::new());
        for f in &options.forwards {
            let refused = |why| UserError::Forward {
                protocol: f.protocol,
                at: f.host,
                why,
            };
            forward(f, &poll, &mut tcp_forwards, &mut udp_forwards).map_err(refused)?;
        }
        Ok(UserNet {
            open: options.open,
            poll,
            events: Events::with_capacity(EVENTS),
            start: Instant::now(),
            link: Link::new(EthernetAddress(guest.0), mtu.into()),
            resolver: resolver::Resolver::new(),
            tcp: tcp::Flows::default(),
            udp: udp::Flows::default(),
            tcp_forwards,
            udp_forwards,
            buffer: vec![0; DATAGRAM],
            advert: None,
        })
    }

    /// Time as smoltcp counts it.
    fn now(&self) -> SmolInstant {
        let us = self.start.elapsed().as_micros();
        SmolInstant::from_micros(i64::try_from(us).unwrap_or(i64::MAX))
    }

    /// Where the host finds what the guest calls `ip`, for its `port`.
    fn outside(&mut self, ip: IpAddr, port: u16) -> Option<IpAddr> {
        if !self.open {
            return None;
        }
        let ip = match ip {
            IpAddr::V4(ip) => ip,
            IpAddr::V6(GATEWAY6) => return Some(Ipv6Addr::LOCALHOST.into()),
            IpAddr::V6(DNS6) if port == DNS_PORT => return self.resolver.server(),
            IpAddr::V6(ip) => return ipv6::outside(ip).then_some(ip.into()),
        };
        match ip {
            GATEWAY => Some(Ipv4Addr::LOCALHOST.into()),
            DNS if port == DNS_PORT => self.resolver.server(),
            _ => {
                let [first, ..] = ip.octets();
                let nowhere = local(ip) || first == 0 || first == 127 || first >= 224;
                (!nowhere).then_some(ip.into())
            }
        }
    }

    fn arp(&mut self, data: &[u8]) {
        let Ok(packet) = ArpPacket::new_checked(data) else {
            return;
        };
        let Ok(ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Request,
            source_hardware_addr,
            source_protocol_addr,
            target_protocol_addr,
            ..
        }) = ArpRepr::parse(&packet)
        else {
            return;
        };
        // Everybody else is behind the gateway, and the rest of this network
        // does not exist.
        if ![GATEWAY, DNS].contains(&target_protocol_addr) || !source_hardware_addr.is_unicast() {
            return;
        }
        let reply = ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Reply,
            source_hardware_addr: GATEWAY_MAC,
            source_protocol_addr: target_protocol_addr,
            target_hardware_addr: source_hardware_addr,
            target_protocol_addr: source_protocol_addr,
        };
        let mut bytes = vec![0; reply.buffer_len()];
        reply.emit(&mut ArpPacket::new_unchecked(&mut bytes));
        self.link.arp(source_hardware_addr, &bytes);
    }

    fn tcp(&mut self, header: Header, ip: &Packet<'_>) {
        let Ok(packet) = TcpPacket::new_checked(ip.payload) else {
            return;
        };
        let (from, to, whole) = (ip.from, ip.to, ip.whole);
        // One that is left to us is right: nothing happened to it on the way.
        let trusted = header.flags & NEEDS_CSUM != 0;
        if !trusted && !packet.verify_checksum(&from.into(), &to.into()) {
            return;
        }
        let key = Key {
            guest: SocketAddr::new(from, packet.src_port()),
            peer: SocketAddr::new(to, packet.dst_port()),
        };
        // smoltcp takes nothing else for an interface's address.
        let unicast = IpAddress::from(to).is_unicast();
        if key.guest.port() == 0 || key.peer.port() == 0 || !unicast {
            return;
        }
        let now = self.now();
        if self.tcp.has(&key) {
            self.tcp.packet(&key, whole, &mut self.link, now);
            return;
        }
        if !packet.syn() || packet.ack() {
            tcp::refuse(whole, to, &mut self.link, now);
            return;
        }
        let Some(host) = self.outside(to, key.peer.port()) else {
            let here = match to {
                IpAddr::V4(to) => local(to),
                IpAddr::V6(to) => ipv6::local(to),
            };
            if self.open && !here {
                self.unreachable(ip, Reason::Host);
            } else {
                tcp::refuse(whole, to, &mut self.link, now);
            }
            return;
        };
        let host = SocketAddr::new(host, key.peer.port());
        let registry = self.poll.registry();
        if let Err(e) = self
            .tcp
            .connect(key, host, whole, &mut self.link, registry, now)
        {
            self.not_connected(whole, &e);
        }
    }

    /// Answers a SYN whose connection the host could not make.
    fn not_connected(&mut self, syn: &[u8], why: &io::Error) {
        let now = self.now();
        let Some(ip) = Packet::parse(syn) else {
            return;
        };
        match why.kind() {
            ErrorKind::HostUnreachable | ErrorKind::TimedOut => {
                self.unreachable(&ip, Reason::Host);
            }
            ErrorKind::NetworkUnreachable => {
                self.unreachable(&ip, Reason::Net);
            }
            _ => tcp::refuse(syn, ip.to, &mut self.link, now),
        }
    }

    fn udp(&mut self, header: Header, source: EthernetAddress, ip: &Packet<'_>) {
        let Ok(packet) = UdpPacket::new_checked(ip.payload) else {
            return;
        };
        let (from, to) = (ip.from, ip.to);
        let trusted = header.flags & NEEDS_CSUM != 0;
        // IPv4's may be left out.
        let summed = packet.checksum() != 0 || to.is_ipv6();
        if !trusted && summed && !packet.verify_checksum(&from.into(), &to.into()) {
            return;
        }
        let data = packet.payload();
        let server = to == GATEWAY || to == Ipv4Addr::BROADCAST;
        if packet.dst_port() == dhcp::SERVER && server {
            dhcp::serve(&mut self.link, source, data, self.open);
            return;
        }
        if !ours(from) || packet.src_port() == 0 || packet.dst_port() == 0 {
            return;
        }
        let key = Key {
            guest: SocketAddr::new(from, packet.src_port()),
            peer: SocketAddr::new(to, packet.dst_port()),
        };
        let now = Instant::now();
        for f in &mut self.udp_forwards {
            if f.answer(&key, data, now) {
                return;
            }
        }
        let fate = match self.outside(to, key.peer.port()) {
            Some(host) => {
                let host = SocketAddr::new(host, key.peer.port());
                self.udp.send(key, host, data, self.poll.registry(), now)
            }
            None => udp::Fate::Refused,
        };
        if matches!(fate, udp::Fate::Refused) {
            self.unreachable(ip, Reason::Port);
        }
    }

    fn ipv4(&mut self, header: Header, source: EthernetAddress, data: &[u8]) {
        let Ok(ip) = Ipv4Packet::new_checked(data) else {
            return;
        };
        // Fragments are not put together: TCP has none, and UDP that needs
        // them is rare enough.
        let whole = !ip.more_frags() && ip.frag_offset() == 0;
        if ip.version() != 4 || !ip.verify_checksum() || !whole {
            return;
        }
        let from = ip.src_addr();
        if ours(from.into()) {
            self.link.guest = source;
        } else if !from.is_unspecified() || ip.next_header() != IpProtocol::Udp {
            return;
        }
        // Behind the packet there may be padding.
        let len = usize::from(ip.total_len());
        let packet = Packet {
            from: from.into(),
            to: ip.dst_addr().into(),
            payload: ip.payload(),
            whole: data.get(..len).unwrap_or(data),
        };
        match ip.next_header() {
            IpProtocol::Tcp => self.tcp(header, &packet),
            IpProtocol::Udp => self.udp(header, source, &packet),
            IpProtocol::Icmp => self.icmp(&ip, &packet),
            _ => self.unreachable4(packet.whole, Icmpv4DstUnreachable::ProtoUnreachable),
        }
    }

    /// A packet of the guest's. What makes no sense is dropped, as a network
    /// does.
    fn input(&mut self, packet: &[u8]) {
        let Some((head, frame)) = packet.split_at_checked(HEADER) else {
            return;
        };
        let Some(head) = head.first_chunk() else {
            return;
        };
        let header = Header::parse(*head);
        let Ok(eth) = EthernetFrame::new_checked(frame) else {
            return;
        };
        let (from, to) = (eth.src_addr(), eth.dst_addr());
        let for_us = to == GATEWAY_MAC;
        if !from.is_unicast() {
            return;
        }
        match eth.ethertype() {
            EthernetProtocol::Arp if for_us || to.is_broadcast() => self.arp(eth.payload()),
            EthernetProtocol::Ipv4 if for_us || to.is_broadcast() => {
                self.ipv4(header, from, eth.payload());
            }
            EthernetProtocol::Ipv6 if for_us || to.is_multicast() => {
                self.ipv6(header, from, eth.payload());
            }
            _ => {}
        }
    }

    /// Takes the host's events and serves what is due.
    fn turn(&mut self) {
        // Interrupted or out of memory: the next turn tries again.
        if self
            .poll
            .poll(&mut self.events, Some(Duration::ZERO))
            .is_err()
        {
            return;
        }
        let now = self.now();
        let mut failed = Vec::new();
        for event in &self.events {
            let (kind, slot) = untoken(event.token());
            match kind {
                Kind::Tcp => failed.extend(self.tcp.ready(slot, event, &mut self.link, now)),
                Kind::Udp => {
                    let time = Instant::now();
                    let buffer = &mut self.buffer;
                    // A refusal needs the datagram that it is about, which is
                    // gone: the guest hears with the next one it sends.
                    let _ = self.udp.ready(slot, &mut self.link, buffer, time);
                }
                Kind::TcpForward => {
                    if let Some(f) = self.tcp_forwards.get(slot) {
                        let registry = self.poll.registry();
                        accept(f, &mut self.tcp, &mut self.link, registry, now);
                    }
                }
                Kind::UdpForward => {
                    if let Some(f) = self.udp_forwards.get_mut(slot) {
                        f.ready(&mut self.link, &mut self.buffer, Instant::now());
                    }
                }
            }
        }
        for (syn, why) in failed {
            self.not_connected(&syn, &why);
        }
        let all = self.link.starved && self.link.room();
        if all {
            self.link.starved = false;
            let time = Instant::now();
            for slot in self.udp.left() {
                self.udp.ready(slot, &mut self.link, &mut self.buffer, time);
            }
            for f in self.udp_forwards.iter_mut().filter(|f| f.left()) {
                f.ready(&mut self.link, &mut self.buffer, time);
            }
        }
        self.tcp.timers(all, &mut self.link, now);
        self.udp.timers(Instant::now());
        self.advertise_when_due();
    }
}

fn forward(
    f: &Forward,
    poll: &Poll,
    tcp: &mut Vec<tcp::Forward>,
    udp: &mut Vec<udp::Forward>,
) -> io::Result<()> {
    match f.protocol {
        Protocol::Tcp => {
            let mut one = tcp::Forward::listen(f.host, f.guest)?;
            one.register(poll.registry(), token(Kind::TcpForward, tcp.len()))?;
            tcp.push(one);
        }
        Protocol::Udp => {
            let mut one = udp::Forward::bind(f.host, f.guest)?;
            one.register(poll.registry(), token(Kind::UdpForward, udp.len()))?;
            udp.push(one);
        }
    }
    Ok(())
}

/// Takes the connections that wait at a forwarded port.
fn accept(
    f: &tcp::Forward,
    flows: &mut tcp::Flows,
    link: &mut Link,
    registry: &mio::Registry,
    now: SmolInstant,
) {
    loop {
        match f.listener.accept() {
            // One that the host has no place for is closed.
            Ok((stream, from)) => {
                let _ = flows.accept(stream, from, f.guest, link, registry, now);
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) if e.kind() == ErrorKind::ConnectionAborted => {}
            Err(_) => return,
        }
    }
}

impl Port for UserNet {
    /// Checksums are not looked at, and TCP in one piece is as good as in
    /// many.
    fn takes(&self) -> Offloads {
        Offloads {
            csum: true,
            tso4: true,
            tso6: true,
            ecn: false,
        }
    }

    /// smoltcp makes no large segments for IPv6.
    fn gives(&self) -> Offloads {
        Offloads {
            tso6: false,
            ..self.takes()
        }
    }

    fn guest_takes(&mut self, offloads: Offloads) -> io::Result<()> {
        self.tcp.clear();
        self.udp.clear();
        self.link.clear();
        self.advert = None;
        self.link.guest_takes = offloads;
        Ok(())
    }

    fn send(&mut self, packet: &[u8]) -> io::Result<()> {
        self.input(packet);
        Ok(())
    }

    fn receive(&mut self, into: &mut [u8]) -> io::Result<Option<usize>> {
        if !self.link.waiting() {
            self.turn();
        }
        Ok(self.link.pop(into))
    }

    fn pending(&self) -> bool {
        self.link.waiting()
    }

    fn fd(&self) -> RawFd {
        self.poll.as_raw_fd()
    }

    fn deadline(&self) -> Option<Instant> {
        let tcp = self.tcp.due().map(|at| {
            let us = u64::try_from(at.total_micros()).unwrap_or(0);
            self.start + Duration::from_micros(us)
        });
        let all = tcp.into_iter().chain(self.udp.due()).chain(self.advert);
        all.min()
    }
}

#[cfg(test)]
#[path = "user_tests.rs"]
mod tests;
