//! The wire to the guest: frames on their way there, with bounds, and the
//! headers around what the other modules have to say.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, Icmpv4Packet, Icmpv4Repr, Icmpv6Packet,
    Icmpv6Repr, IpAddress as Address, IpProtocol, IpVersion, Ipv4Packet, Ipv4Repr, Ipv6ExtHeader,
    Ipv6FragmentHeader, Ipv6FragmentRepr, Ipv6Packet, Ipv6Repr, TcpPacket, UdpPacket, UdpRepr,
    checksum,
};

use super::GATEWAY_MAC;
use crate::net::{ETHERNET, GSO_TCPV4, HEADER, Header, NEEDS_CSUM, Offloads};

/// Frames and bytes that wait for the guest at most. A connection with more to
/// say waits, a datagram is lost.
const MOST_PACKETS: usize = 256;
const MOST_BYTES: usize = 1 << 20;
/// Spare buffers that are kept, and their largest size.
const SPARE: usize = 16;
const SPARE_BYTES: usize = 4096;
/// Bytes of an IPv4 header without options.
const IPV4: usize = 20;
/// Bytes of an IPv6 header, and of what makes a fragment one.
const IPV6: usize = 40;
const FRAGMENT: usize = 8;
/// Hops that a packet of ours may take.
const HOPS: u8 = 64;
/// Where TCP's checksum is, bytes into its header.
const TCP_CSUM: u16 = 16;

/// The wire.
pub struct Link {
    out: VecDeque<Vec<u8>>,
    bytes: usize,
    spare: Vec<Vec<u8>>,
    ident: u16,
    /// The guest's address, as last seen.
    pub guest: EthernetAddress,
    /// What the guest takes.
    pub guest_takes: Offloads,
    /// Largest IP packet, bytes.
    pub mtu: usize,
    /// Something could not be said for want of room.
    pub starved: bool,
}

impl Link {
    /// A wire to a guest with this address.
    pub fn new(guest: EthernetAddress, mtu: usize) -> Link {
        Link {
            out: VecDeque::new(),
            bytes: 0,
            spare: Vec::new(),
            ident: 0,
            guest,
            guest_takes: Offloads::default(),
            mtu,
            starved: false,
        }
    }

    /// Whether another frame may be queued.
    pub fn room(&self) -> bool {
        self.out.len() < MOST_PACKETS && self.bytes < MOST_BYTES
    }

    /// Whether frames wait.
    pub fn waiting(&self) -> bool {
        !self.out.is_empty()
    }

    /// The next packet for the guest into `into`.
    pub fn pop(&mut self, into: &mut [u8]) -> Option<usize> {
        let packet = self.out.pop_front()?;
        self.bytes -= packet.len();
        let len = packet.len();
        let copied = into.get_mut(..len).map(|to| to.copy_from_slice(&packet));
        if packet.capacity() <= SPARE_BYTES && self.spare.len() < SPARE {
            self.spare.push(packet);
        }
        copied.map(|()| len)
    }

    /// Forgets what waits.
    pub fn clear(&mut self) {
        self.out.clear();
        self.bytes = 0;
    }

    /// Queues an Ethernet frame of `len` bytes behind its header. `fill` writes
    /// them, and may leave work to the guest. Without room they are lost.
    fn frame<R>(
        &mut self,
        to: EthernetAddress,
        ethertype: EthernetProtocol,
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> (Header, R),
    ) -> R {
        let mut packet = self.spare.pop().unwrap_or_default();
        packet.clear();
        packet.resize(HEADER + ETHERNET + len, 0);
        let (head, rest) = packet.split_at_mut(HEADER);
        let mut eth = EthernetFrame::new_unchecked(rest);
        eth.set_src_addr(GATEWAY_MAC);
        eth.set_dst_addr(to);
        eth.set_ethertype(ethertype);
        let (header, result) = fill(eth.payload_mut());
        head.copy_from_slice(&header.bytes());
        if self.room() {
            self.bytes += packet.len();
            self.out.push_back(packet);
        } else {
            self.starved = true;
        }
        result
    }

    /// Queues an ARP packet.
    pub fn arp(&mut self, to: EthernetAddress, packet: &[u8]) {
        self.frame(to, EthernetProtocol::Arp, packet.len(), |b| {
            b.copy_from_slice(packet);
            (Header::default(), ())
        });
    }

    /// Queues a TCP packet of `len` bytes, IP header included, that `fill`
    /// writes without TCP's checksum; `segment` is the payload of each piece
    /// that it has to be cut into (over IPv4).
    pub fn tcp<R>(
        &mut self,
        version: IpVersion,
        len: usize,
        segment: Option<u16>,
        fill: impl FnOnce(&mut [u8]) -> R,
    ) -> R {
        let csum = self.guest_takes.csum;
        let ethertype = match version {
            IpVersion::Ipv4 => EthernetProtocol::Ipv4,
            IpVersion::Ipv6 => EthernetProtocol::Ipv6,
        };
        self.frame(self.guest, ethertype, len, |b| {
            let result = fill(b);
            let Some((from, to, start)) = ends(version, b) else {
                return (Header::default(), result);
            };
            let tcp_len = len.saturating_sub(start) as u32;
            let rest = b.get_mut(start..).unwrap_or_default();
            let Ok(mut tcp) = TcpPacket::new_checked(rest) else {
                return (Header::default(), result);
            };
            if !csum {
                tcp.fill_checksum(&from, &to);
                return (Header::default(), result);
            }
            let headers = usize::from(tcp.header_len()) + start + ETHERNET;
            // The sum of the pseudo-header, for the receiver to go on from.
            tcp.set_checksum(checksum::pseudo_header(
                &from,
                &to,
                IpProtocol::Tcp,
                tcp_len,
            ));
            let header = Header {
                flags: NEEDS_CSUM,
                csum_start: (start + ETHERNET) as u16,
                csum_offset: TCP_CSUM,
                gso_type: if segment.is_some() { GSO_TCPV4 } else { 0 },
                gso_size: segment.unwrap_or(0),
                hdr_len: if segment.is_some() { headers as u16 } else { 0 },
            };
            (header, result)
        })
    }

    /// Queues an IPv4 packet, in fragments if it has to be.
    pub fn ipv4(
        &mut self,
        to: EthernetAddress,
        from_ip: Ipv4Addr,
        to_ip: Ipv4Addr,
        protocol: IpProtocol,
        payload: &[u8],
    ) {
        self.ident = self.ident.wrapping_add(1);
        let ident = self.ident;
        // Fragments are multiples of eight bytes.
        let most = self.mtu.saturating_sub(IPV4).max(8) & !7;
        let whole = payload.len() <= self.mtu.saturating_sub(IPV4);
        let most = if whole { payload.len().max(1) } else { most };
        let count = payload.len().div_ceil(most).max(1);
        for i in 0..count {
            let at = i * most;
            let part = payload.get(at..).unwrap_or_default();
            let part = part.get(..most).unwrap_or(part);
            let repr = Ipv4Repr {
                src_addr: from_ip,
                dst_addr: to_ip,
                next_header: protocol,
                payload_len: part.len(),
                hop_limit: HOPS,
            };
            self.frame(to, EthernetProtocol::Ipv4, IPV4 + part.len(), |b| {
                let mut ip = Ipv4Packet::new_unchecked(b);
                repr.emit(&mut ip, &ChecksumCapabilities::default());
                if !whole {
                    ip.set_dont_frag(false);
                    ip.set_ident(ident);
                    ip.set_more_frags(i + 1 < count);
                    ip.set_frag_offset(at as u16);
                    ip.fill_checksum();
                }
                ip.payload_mut().copy_from_slice(part);
                (Header::default(), ())
            });
        }
    }

    /// Queues an IPv6 packet, in fragments if it has to be (RFC 8200 §4.5).
    pub fn ipv6(
        &mut self,
        to: EthernetAddress,
        (from_ip, to_ip): (Ipv6Addr, Ipv6Addr),
        protocol: IpProtocol,
        hop_limit: u8,
        payload: &[u8],
    ) {
        let room = self.mtu.saturating_sub(IPV6);
        let whole = payload.len() <= room;
        let most = if whole {
            payload.len().max(1)
        } else {
            room.saturating_sub(FRAGMENT).max(8) & !7
        };
        self.ident = self.ident.wrapping_add(1);
        let ident = self.ident;
        let count = payload.len().div_ceil(most).max(1);
        let extra = if whole { 0 } else { FRAGMENT };
        for i in 0..count {
            let at = i * most;
            let part = payload.get(at..).unwrap_or_default();
            let part = part.get(..most).unwrap_or(part);
            let repr = Ipv6Repr {
                src_addr: from_ip,
                dst_addr: to_ip,
                next_header: if whole {
                    protocol
                } else {
                    IpProtocol::Ipv6Frag
                },
                payload_len: extra + part.len(),
                hop_limit,
            };
            let len = IPV6 + extra + part.len();
            self.frame(to, EthernetProtocol::Ipv6, len, |b| {
                let mut ip = Ipv6Packet::new_unchecked(b);
                repr.emit(&mut ip);
                let body = ip.payload_mut();
                if !whole {
                    let mut next = Ipv6ExtHeader::new_unchecked(&mut *body);
                    next.set_next_header(protocol);
                    next.set_header_len(0);
                    let fragment = Ipv6FragmentRepr {
                        frag_offset: (at / 8) as u16,
                        more_frags: i + 1 < count,
                        ident: ident.into(),
                    };
                    fragment.emit(&mut Ipv6FragmentHeader::new_unchecked(next.payload_mut()));
                }
                if let Some(to) = body.get_mut(extra..) {
                    to.copy_from_slice(part);
                }
                (Header::default(), ())
            });
        }
    }

    /// Queues a datagram; both addresses are of one kind.
    pub fn udp(&mut self, to: EthernetAddress, from: SocketAddr, dst: SocketAddr, data: &[u8]) {
        let repr = UdpRepr {
            src_port: from.port(),
            dst_port: dst.port(),
        };
        let len = repr.header_len() + data.len();
        if len > usize::from(u16::MAX) - IPV4 {
            return;
        }
        let mut datagram = vec![0; len];
        repr.emit(
            &mut UdpPacket::new_unchecked(&mut datagram),
            &from.ip().into(),
            &dst.ip().into(),
            data.len(),
            |b| b.copy_from_slice(data),
            &ChecksumCapabilities::default(),
        );
        match (from.ip(), dst.ip()) {
            (IpAddr::V4(from), IpAddr::V4(dst)) => {
                self.ipv4(to, from, dst, IpProtocol::Udp, &datagram);
            }
            (IpAddr::V6(from), IpAddr::V6(dst)) => {
                self.ipv6(to, (from, dst), IpProtocol::Udp, HOPS, &datagram);
            }
            _ => {}
        }
    }

    /// Queues an ICMP message.
    pub fn icmp(&mut self, from: Ipv4Addr, to: Ipv4Addr, repr: &Icmpv4Repr<'_>) {
        let mut message = vec![0; repr.buffer_len()];
        repr.emit(
            &mut Icmpv4Packet::new_unchecked(&mut message),
            &ChecksumCapabilities::default(),
        );
        self.ipv4(self.guest, from, to, IpProtocol::Icmp, &message);
    }

    /// Queues an ICMPv6 message; `more` goes behind it.
    pub fn icmp6(
        &mut self,
        mac: EthernetAddress,
        (from, to): (Ipv6Addr, Ipv6Addr),
        repr: &Icmpv6Repr<'_>,
        more: &[u8],
    ) {
        let mut message = vec![0; repr.buffer_len()];
        repr.emit(
            &from,
            &to,
            &mut Icmpv6Packet::new_unchecked(&mut message[..]),
            &ChecksumCapabilities::ignored(),
        );
        message.extend(more);
        Icmpv6Packet::new_unchecked(&mut message[..]).fill_checksum(&from, &to);
        // Neighbours believe only what no router has passed on (RFC 4861
        // §6.1.2, §7.1.2).
        let hops = if matches!(repr, Icmpv6Repr::Ndisc(_)) {
            255
        } else {
            HOPS
        };
        self.ipv6(mac, (from, to), IpProtocol::Icmpv6, hops, &message);
    }
}

/// Who a packet is from and for, and where its payload starts.
fn ends(version: IpVersion, packet: &[u8]) -> Option<(Address, Address, usize)> {
    Some(match version {
        IpVersion::Ipv4 => {
            let ip = Ipv4Packet::new_checked(packet).ok()?;
            let start = usize::from(ip.header_len());
            (ip.src_addr().into(), ip.dst_addr().into(), start)
        }
        IpVersion::Ipv6 => {
            let ip = Ipv6Packet::new_checked(packet).ok()?;
            // smoltcp puts nothing between, but for what is none of TCP's.
            if ip.next_header() != IpProtocol::Tcp {
                return None;
            }
            (ip.src_addr().into(), ip.dst_addr().into(), IPV6)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
    const B: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);

    fn link() -> Link {
        Link::new(EthernetAddress([2, 0, 0, 0, 0, 1]), 1500)
    }

    #[test]
    fn large_datagrams_are_fragmented_and_whole_again() {
        let mut link = link();
        let data: Vec<u8> = (0..4000_u32).map(|i| i as u8).collect();
        link.udp(
            link.guest,
            SocketAddr::new(A.into(), 53),
            SocketAddr::new(B.into(), 999),
            &data,
        );
        let mut buffer = vec![0; 70000];
        let mut whole = Vec::new();
        let mut more = true;
        while let Some(n) = link.pop(&mut buffer) {
            let ip = Ipv4Packet::new_checked(&buffer[HEADER + ETHERNET..n]).unwrap();
            assert!(ip.verify_checksum());
            assert!(usize::from(ip.total_len()) <= 1500);
            assert_eq!(usize::from(ip.frag_offset()), whole.len());
            more = ip.more_frags();
            whole.extend_from_slice(ip.payload());
        }
        assert!(!more);
        let udp = UdpPacket::new_checked(&whole[..]).unwrap();
        assert!(udp.verify_checksum(&A.into(), &B.into()));
        assert_eq!(udp.payload(), data);
    }

    #[test]
    fn so_are_those_of_ipv6() {
        let mut link = link();
        let (a, b) = ("fec0::2".parse().unwrap(), "fec0::15".parse().unwrap());
        let data: Vec<u8> = (0..4000_u32).map(|i| i as u8).collect();
        let (from, to) = (SocketAddr::new(a, 53), SocketAddr::new(b, 999));
        link.udp(link.guest, from, to, &data);
        let mut buffer = vec![0; 70000];
        let mut whole = Vec::new();
        let mut more = true;
        while let Some(n) = link.pop(&mut buffer) {
            assert!(n <= HEADER + ETHERNET + 1500);
            let ip = Ipv6Packet::new_checked(&buffer[HEADER + ETHERNET..n]).unwrap();
            assert_eq!(ip.next_header(), IpProtocol::Ipv6Frag);
            let ext = Ipv6ExtHeader::new_checked(ip.payload()).unwrap();
            assert_eq!(ext.next_header(), IpProtocol::Udp);
            let fragment = Ipv6FragmentHeader::new_checked(ext.payload()).unwrap();
            assert_eq!(usize::from(fragment.frag_offset()) * 8, whole.len());
            more = fragment.more_frags();
            whole.extend_from_slice(&ip.payload()[FRAGMENT..]);
        }
        assert!(!more);
        let udp = UdpPacket::new_checked(&whole[..]).unwrap();
        assert!(udp.verify_checksum(&a.into(), &b.into()));
        assert_eq!(udp.payload(), data);
    }

    #[test]
    fn the_queue_is_bounded() {
        let mut link = link();
        let data = vec![0; 60_000];
        for _ in 0..10_000 {
            link.ipv4(link.guest, A, B, IpProtocol::Udp, &[0; 1000]);
        }
        assert_eq!(link.out.len(), MOST_PACKETS);
        assert!(link.starved);
        link.clear();
        for _ in 0..100 {
            link.ipv4(link.guest, A, B, IpProtocol::Udp, &data);
        }
        assert!(link.bytes < MOST_BYTES + 60_100);
    }

    #[test]
    fn a_partial_checksum_completes_to_the_right_one() {
        let mut link = link();
        let fill = |b: &mut [u8]| {
            let repr = Ipv4Repr {
                src_addr: A,
                dst_addr: B,
                next_header: IpProtocol::Tcp,
                payload_len: b.len() - IPV4,
                hop_limit: 64,
            };
            let mut ip = Ipv4Packet::new_unchecked(b);
            repr.emit(&mut ip, &ChecksumCapabilities::default());
            let mut tcp = TcpPacket::new_unchecked(ip.payload_mut());
            tcp.set_header_len(20);
            for (i, b) in tcp.payload_mut().iter_mut().enumerate() {
                *b = i as u8;
            }
        };
        let mut buffer = vec![0; 70000];
        link.tcp(IpVersion::Ipv4, IPV4 + 20 + 101, None, fill);
        let n = link.pop(&mut buffer).unwrap();
        let right = buffer[HEADER + ETHERNET..n].to_vec();
        let tcp = TcpPacket::new_checked(&right[IPV4..]).unwrap();
        assert!(tcp.verify_checksum(&A.into(), &B.into()));
        assert_eq!(
            buffer[0], 0,
            "nothing is left to a guest that takes nothing"
        );

        link.guest_takes.csum = true;
        link.tcp(IpVersion::Ipv4, IPV4 + 20 + 101, None, fill);
        let n = link.pop(&mut buffer).unwrap();
        let h = Header::parse(buffer[..10].try_into().unwrap());
        assert_eq!(h.flags, NEEDS_CSUM);
        // As a driver does it: the sum from csum_start on, into its place.
        let start = HEADER + usize::from(h.csum_start);
        let s = !checksum::data(&buffer[start..n]);
        let at = start + usize::from(h.csum_offset);
        buffer[at..at + 2].copy_from_slice(&s.to_be_bytes());
        assert_eq!(&buffer[HEADER + ETHERNET..n], right);
    }
}
