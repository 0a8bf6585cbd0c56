//! What IPv6 has that IPv4 has not: neighbours are found and routers make
//! themselves known by ICMPv6 (RFC 4861), and addresses come of that (RFC
//! 4862).
//!
//! The prefix is slirp's. It is site-local, of old, so that a guest takes IPv4
//! for a name that has both (RFC 6724 §2.1 gives the two different labels):
//! the host may well have no way out by IPv6.

use std::net::Ipv6Addr;
use std::time::{Duration, Instant};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::time::Duration as SmolDuration;
use smoltcp::wire::{
    EthernetAddress, Icmpv6DstUnreachable, Icmpv6Packet, Icmpv6Repr, IpProtocol, Ipv6Packet,
    Ipv6Repr, NdiscNeighborFlags, NdiscPrefixInfoFlags, NdiscPrefixInformation, NdiscRepr,
    NdiscRouterFlags, RawHardwareAddress,
};

use super::{GATEWAY_MAC, Packet, Reason, UserNet};
use crate::net::Header;

/// The gateway, which is the host.
pub const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfec0, 0, 0, 0, 0, 0, 0, 2);
/// The name server.
pub const DNS6: Ipv6Addr = Ipv6Addr::new(0xfec0, 0, 0, 0, 0, 0, 0, 3);
/// The gateway on the link, from which a router has to speak (RFC 4861
/// §4.2).
const ROUTER: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);
const PREFIX: Ipv6Addr = Ipv6Addr::new(0xfec0, 0, 0, 0, 0, 0, 0, 0);
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_NODES_MAC: EthernetAddress = EthernetAddress([0x33, 0x33, 0, 0, 0, 1]);
/// IPv6 needs packets of this size (RFC 8200 §5).
const LEAST_MTU: usize = 1280;
/// How often the router makes itself known, and how long it is believed.
const ADVERT: Duration = Duration::from_secs(600);
const LIFETIME: SmolDuration = SmolDuration::from_secs(1800);
const PREFERRED: SmolDuration = SmolDuration::from_secs(14400);
const VALID: SmolDuration = SmolDuration::from_secs(86400);
/// What an ICMPv6 error quotes of the packet that it is about: all that leaves
/// the error within IPv6's least MTU (RFC 4443 §2.4), less headers.
const QUOTE: usize = LEAST_MTU - 40 - 8 - 40;

/// Whether an address is of the guest's network.
pub fn local(ip: Ipv6Addr) -> bool {
    ip.octets().starts_with(&[0xfe, 0xc0, 0, 0, 0, 0, 0, 0]) || ip.is_unicast_link_local()
}

/// Whether a guest may have an address: see [`super::ours`].
pub fn ours(ip: Ipv6Addr) -> bool {
    let [.., d] = ip.segments();
    local(ip) && ![GATEWAY6, DNS6, ROUTER].contains(&ip) && d != 0
}

/// Whether an address means the same to the guest and to the host.
pub fn outside(ip: Ipv6Addr) -> bool {
    // The upper half of nothing: unspecified, loopback, IPv4 in disguise.
    let upper = ip.octets().starts_with(&[0; 8]);
    !(upper || local(ip) || ip.is_multicast())
}

/// The option that names a server (RFC 8106 §5.1).
fn name_server() -> Vec<u8> {
    let mut option = vec![25, 3, 0, 0];
    option.extend((LIFETIME.secs() as u32).to_be_bytes());
    option.extend(DNS6.octets());
    option
}

impl UserNet {
    /// A packet of IPv6.
    pub(super) fn ipv6(&mut self, header: Header, source: EthernetAddress, data: &[u8]) {
        let Ok(ip) = Ipv6Packet::new_checked(data) else {
            return;
        };
        if ip.version() != 6 || self.link.mtu < LEAST_MTU {
            return;
        }
        let from = ip.src_addr();
        let packet = Packet {
            from: from.into(),
            to: ip.dst_addr().into(),
            payload: ip.payload(),
            whole: data.get(..ip.total_len()).unwrap_or(data),
        };
        if ours(from) {
            self.link.guest = source;
        } else if !from.is_unspecified() || ip.next_header() != IpProtocol::Icmpv6 {
            return;
        }
        match ip.next_header() {
            IpProtocol::Tcp => self.tcp(header, &packet),
            IpProtocol::Udp => self.udp(header, source, &packet),
            IpProtocol::Icmpv6 => self.icmp6(&ip, source, &packet),
            // Other headers, fragments among them, are not followed.
            _ => {}
        }
    }

    fn icmp6(&mut self, ip: &Ipv6Packet<&[u8]>, source: EthernetAddress, packet: &Packet<'_>) {
        let (from, to) = (ip.src_addr(), ip.dst_addr());
        let caps = ChecksumCapabilities::default();
        let message = Icmpv6Packet::new_checked(ip.payload())
            .and_then(|m| Icmpv6Repr::parse(&from, &to, &m, &caps));
        let Ok(message) = message else {
            return;
        };
        match message {
            Icmpv6Repr::EchoRequest {
                ident,
                seq_no,
                data,
            } if ours(from) => {
                let reply = Icmpv6Repr::EchoReply {
                    ident,
                    seq_no,
                    data,
                };
                if [GATEWAY6, DNS6, ROUTER].contains(&to) {
                    self.link.icmp6(source, (to, from), &reply, &[]);
                } else {
                    // A process has no right to send an echo.
                    self.unreachable(packet, Reason::Prohibited);
                }
            }
            // Only from the link itself: no router has passed it on.
            Icmpv6Repr::Ndisc(what) if ip.hop_limit() == 255 => match what {
                NdiscRepr::NeighborSolicit { target_addr, .. } => {
                    self.neighbor(target_addr, from, source);
                }
                NdiscRepr::RouterSolicit { .. } => self.advertise(),
                _ => {}
            },
            _ => {}
        }
    }

    /// Where an address of ours is. A guest that asks from no address is
    /// about to take it (RFC 4862 §5.4.3).
    fn neighbor(&mut self, target: Ipv6Addr, from: Ipv6Addr, source: EthernetAddress) {
        if ![GATEWAY6, DNS6, ROUTER].contains(&target) {
            return;
        }
        let mut flags = NdiscNeighborFlags::OVERRIDE | NdiscNeighborFlags::ROUTER;
        let (mac, to) = if from.is_unspecified() {
            (ALL_NODES_MAC, ALL_NODES)
        } else {
            flags |= NdiscNeighborFlags::SOLICITED;
            (source, from)
        };
        let repr = NdiscRepr::NeighborAdvert {
            flags,
            target_addr: target,
            lladdr: Some(RawHardwareAddress::from(GATEWAY_MAC)),
        };
        let repr = Icmpv6Repr::Ndisc(repr);
        self.link.icmp6(mac, (target, to), &repr, &[]);
    }

    /// Makes the router known, and when that is due again.
    fn advertise(&mut self) {
        self.advert = Some(Instant::now() + ADVERT);
        let repr = NdiscRepr::RouterAdvert {
            hop_limit: 64,
            flags: NdiscRouterFlags::empty(),
            router_lifetime: LIFETIME,
            reachable_time: SmolDuration::ZERO,
            retrans_time: SmolDuration::ZERO,
            lladdr: Some(RawHardwareAddress::from(GATEWAY_MAC)),
            mtu: u32::try_from(self.link.mtu).ok(),
            prefix_info: Some(NdiscPrefixInformation {
                prefix_len: 64,
                flags: NdiscPrefixInfoFlags::ON_LINK | NdiscPrefixInfoFlags::ADDRCONF,
                valid_lifetime: VALID,
                preferred_lifetime: PREFERRED,
                prefix: PREFIX,
            }),
        };
        let server = if self.open { name_server() } else { Vec::new() };
        let repr = Icmpv6Repr::Ndisc(repr);
        self.link
            .icmp6(ALL_NODES_MAC, (ROUTER, ALL_NODES), &repr, &server);
    }

    pub(super) fn advertise_when_due(&mut self) {
        if self.advert.is_some_and(|at| Instant::now() >= at) {
            self.advertise();
        }
    }

    /// Tells the guest that its packet came to nothing.
    pub(super) fn unreachable6(&mut self, packet: &[u8], reason: Icmpv6DstUnreachable) {
        let Ok(ip) = Ipv6Packet::new_checked(packet) else {
            return;
        };
        // Never about a multicast, nor to nobody (RFC 4443 §2.4).
        if ip.dst_addr().is_multicast() || !ours(ip.src_addr()) {
            return;
        }
        let Ok(header) = Ipv6Repr::parse(&ip) else {
            return;
        };
        let data = ip.payload();
        let repr = Icmpv6Repr::DstUnreachable {
            reason,
            header,
            data: data.get(..QUOTE).unwrap_or(data),
        };
        let guest = self.link.guest;
        self.link
            .icmp6(guest, (GATEWAY6, ip.src_addr()), &repr, &[]);
    }
}
