//! The DHCP server (RFC 2131): one address, always the same.

use std::net::{Ipv4Addr, SocketAddr};

use smoltcp::wire::{DhcpMessageType, DhcpOption, DhcpPacket, DhcpRepr, EthernetAddress};

use super::link::Link;
use super::{DNS, GATEWAY, GUEST, NETMASK};

/// Port of servers.
pub const SERVER: u16 = 67;
const CLIENT: u16 = 68;
/// A day; an address is never given to anybody else.
const LEASE: u32 = 86400;
/// Interface MTU (RFC 2132 §5.1).
const OPT_MTU: u8 = 26;

/// What the server says to a message.
fn answer(request: &DhcpRepr<'_>) -> Option<DhcpMessageType> {
    // One for another server is none of ours.
    if request.server_identifier.is_some_and(|s| s != GATEWAY) {
        return None;
    }
    match request.message_type {
        DhcpMessageType::Discover => Some(DhcpMessageType::Offer),
        DhcpMessageType::Request => {
            // A new lease asks by option, a renewal by its own address.
            let wanted = request.requested_ip.unwrap_or(request.client_ip);
            let right = wanted == GUEST;
            Some(if right {
                DhcpMessageType::Ack
            } else {
                DhcpMessageType::Nak
            })
        }
        DhcpMessageType::Inform => Some(DhcpMessageType::Ack),
        _ => None,
    }
}

/// Answers a client's message, if it is one.
pub fn serve(link: &mut Link, from: EthernetAddress, message: &[u8], dns: bool) {
    let Ok(packet) = DhcpPacket::new_checked(message) else {
        return;
    };
    let Ok(request) = DhcpRepr::parse(&packet) else {
        return;
    };
    let Some(kind) = answer(&request) else { return };
    let gives = matches!(kind, DhcpMessageType::Offer | DhcpMessageType::Ack);
    let inform = request.message_type == DhcpMessageType::Inform;
    let mtu = (link.mtu as u16).to_be_bytes();
    let more = [DhcpOption {
        kind: OPT_MTU,
        data: &mtu,
    }];
    let reply = DhcpRepr {
        message_type: kind,
        transaction_id: request.transaction_id,
        secs: 0,
        client_hardware_address: request.client_hardware_address,
        client_ip: if inform {
            request.client_ip
        } else {
            Ipv4Addr::UNSPECIFIED
        },
        your_ip: if gives && !inform {
            GUEST
        } else {
            Ipv4Addr::UNSPECIFIED
        },
        server_ip: GATEWAY,
        router: gives.then_some(GATEWAY),
        subnet_mask: gives.then_some(NETMASK),
        relay_agent_ip: Ipv4Addr::UNSPECIFIED,
        broadcast: request.broadcast,
        requested_ip: None,
        client_identifier: None,
        server_identifier: Some(GATEWAY),
        parameter_request_list: None,
        dns_servers: (gives && dns).then(|| [DNS].into_iter().collect()),
        max_size: None,
        lease_duration: (gives && !inform).then_some(LEASE),
        renew_duration: None,
        rebind_duration: None,
        additional_options: if gives { &more } else { &[] },
    };
    let mut bytes = vec![0; reply.buffer_len()];
    if reply
        .emit(&mut DhcpPacket::new_unchecked(&mut bytes))
        .is_err()
    {
        return;
    }
    // To an address that the client does not have yet only a broadcast gets
    // through, unless its card is named (RFC 2131 §4.1).
    let wide = reply.broadcast || !gives;
    let (mac, ip) = if wide {
        (EthernetAddress::BROADCAST, Ipv4Addr::BROADCAST)
    } else if inform || !request.client_ip.is_unspecified() {
        (from, request.client_ip)
    } else {
        (from, GUEST)
    };
    let server = SocketAddr::new(GATEWAY.into(), SERVER);
    link.udp(mac, server, SocketAddr::new(ip.into(), CLIENT), &bytes);
}
