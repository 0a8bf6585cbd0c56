//! ICMP: echoes to the gateway, and what tells the guest that a packet came to nothing.

use std::net::IpAddr;

use smoltcp::wire::{
    Icmpv4DstUnreachable, Icmpv4Packet, Icmpv4Repr, Icmpv6DstUnreachable, Ipv4Packet, Ipv4Repr,
};

use super::{DNS, GATEWAY, Packet, UserNet, local};

/// What an ICMP error quotes of the packet that it is about (RFC 1812
/// §4.3.2.3), less headers.
const QUOTE: usize = 548;

/// Why a packet comes to nothing.
#[derive(Clone, Copy)]
pub(super) enum Reason {
    Net,
    Host,
    Port,
    Prohibited,
}

impl UserNet {
    /// Tells the guest that its packet came to nothing.
    pub(super) fn unreachable(&mut self, packet: &Packet<'_>, reason: Reason) {
        match packet.to {
            IpAddr::V4(_) => {
                let reason = match reason {
                    Reason::Net => Icmpv4DstUnreachable::NetUnreachable,
                    Reason::Host => Icmpv4DstUnreachable::HostUnreachable,
                    Reason::Port => Icmpv4DstUnreachable::PortUnreachable,
                    Reason::Prohibited => Icmpv4DstUnreachable::HostProhibited,
                };
                self.unreachable4(packet.whole, reason);
            }
            IpAddr::V6(_) => {
                let reason = match reason {
                    Reason::Net => Icmpv6DstUnreachable::NoRoute,
                    Reason::Host => Icmpv6DstUnreachable::AddrUnreachable,
                    Reason::Port => Icmpv6DstUnreachable::PortUnreachable,
                    Reason::Prohibited => Icmpv6DstUnreachable::AdminProhibit,
                };
                self.unreachable6(packet.whole, reason);
            }
        }
    }

    pub(super) fn unreachable4(&mut self, packet: &[u8], reason: Icmpv4DstUnreachable) {
        let Ok(ip) = Ipv4Packet::new_checked(packet) else {
            return;
        };
        // Never about a broadcast or the like (RFC 1122 §3.2.2).
        let to = ip.dst_addr();
        if to.is_broadcast() || to.is_multicast() || (local(to) && to.octets().ends_with(&[255])) {
            return;
        }
        let Ok(header) = Ipv4Repr::parse(&ip, &smoltcp::phy::ChecksumCapabilities::ignored())
        else {
            return;
        };
        let data = ip.payload();
        let repr = Icmpv4Repr::DstUnreachable {
            reason,
            header,
            data: data.get(..QUOTE).unwrap_or(data),
        };
        // A packet for the gateway is answered by it, one that passes too.
        self.link.icmp(GATEWAY, ip.src_addr(), &repr);
    }

    pub(super) fn icmp(&mut self, ip: &Ipv4Packet<&[u8]>, whole: &Packet<'_>) {
        let Ok(packet) = Icmpv4Packet::new_checked(ip.payload()) else {
            return;
        };
        let caps = smoltcp::phy::ChecksumCapabilities::default();
        let Ok(Icmpv4Repr::EchoRequest {
            ident,
            seq_no,
            data,
        }) = Icmpv4Repr::parse(&packet, &caps)
        else {
            return;
        };
        if [GATEWAY, DNS].contains(&ip.dst_addr()) {
            let reply = Icmpv4Repr::EchoReply {
                ident,
                seq_no,
                data,
            };
            self.link.icmp(ip.dst_addr(), ip.src_addr(), &reply);
        } else {
            // A process has no right to send an echo: the guest is told so.
            self.unreachable(whole, Reason::Prohibited);
        }
    }
}
