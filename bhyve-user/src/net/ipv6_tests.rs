//! The same over IPv6.

use std::net::Ipv6Addr;

use smoltcp::wire::{
    Icmpv6Packet, Icmpv6Repr, Ipv6Packet, Ipv6Repr, NdiscPrefixInfoFlags, NdiscRepr,
};

use super::super::ipv6::{DNS6, GATEWAY6};
use super::*;

const GUEST6: Ipv6Addr = Ipv6Addr::new(0xfec0, 0, 0, 0, 0, 0, 0, 0x15);
const LINK_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0x2a0, 0x98ff, 0xfe01, 0x203);
const ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);

/// A guest with an address of the prefix.
fn guest6(options: &str, offloads: Offloads) -> TestGuest {
    let mut guest = TestGuest::new(options, offloads);
    guest.interface.update_ip_addrs(|a| {
        a.clear();
        a.push(IpCidr::new(GUEST6.into(), 64)).unwrap();
    });
    let routes = guest.interface.routes_mut();
    routes.add_default_ipv6_route(GATEWAY6).unwrap();
    guest
}

/// Whether this machine has IPv6 at all.
fn possible() -> bool {
    let there = UdpSocket::bind("[::1]:0").is_ok();
    if !there {
        eprintln!("this machine has no ::1");
    }
    there
}

/// A frame with an ICMPv6 message of the guest's.
pub fn message(from: Ipv6Addr, to: Ipv6Addr, hops: u8, repr: &Icmpv6Repr<'_>) -> Vec<u8> {
    let len = repr.buffer_len();
    let mut packet = vec![0; HEADER + ETHERNET + 40 + len];
    let mut eth = EthernetFrame::new_unchecked(&mut packet[HEADER..]);
    eth.set_src_addr(EthernetAddress(MAC.0));
    eth.set_dst_addr(if to.is_multicast() {
        EthernetAddress([0x33, 0x33, 0, 0, 0, 2])
    } else {
        GATEWAY_MAC
    });
    eth.set_ethertype(EthernetProtocol::Ipv6);
    let header = Ipv6Repr {
        src_addr: from,
        dst_addr: to,
        next_header: IpProtocol::Icmpv6,
        payload_len: len,
        hop_limit: hops,
    };
    let mut ip = Ipv6Packet::new_unchecked(eth.payload_mut());
    header.emit(&mut ip);
    let caps = phy::ChecksumCapabilities::default();
    repr.emit(
        &from,
        &to,
        &mut Icmpv6Packet::new_unchecked(ip.payload_mut()),
        &caps,
    );
    packet
}

/// What a guest asks a router, and a neighbour.
pub fn messages() -> Vec<Vec<u8>> {
    let solicit = Icmpv6Repr::Ndisc(NdiscRepr::RouterSolicit { lladdr: None });
    let neighbour = Icmpv6Repr::Ndisc(NdiscRepr::NeighborSolicit {
        target_addr: GATEWAY6,
        lladdr: None,
    });
    let echo = Icmpv6Repr::EchoRequest {
        ident: 7,
        seq_no: 3,
        data: b"anybody there?",
    };
    vec![
        message(LINK_LOCAL, ROUTERS, 255, &solicit),
        message(GUEST6, GATEWAY6, 255, &neighbour),
        message(GUEST6, GATEWAY6, 64, &echo),
        message(
            GUEST6,
            Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1),
            64,
            &echo,
        ),
    ]
}

/// The ICMPv6 message in a frame for the guest.
fn heard(net: &mut UserNet, f: impl FnOnce(&Ipv6Packet<&[u8]>, Icmpv6Repr<'_>)) {
    let mut into = vec![0; LARGEST];
    let n = net.receive(&mut into).unwrap().unwrap();
    let ip = Ipv6Packet::new_checked(&into[HEADER + ETHERNET..n]).unwrap();
    let message = Icmpv6Packet::new_checked(ip.payload()).unwrap();
    let caps = phy::ChecksumCapabilities::default();
    let repr = Icmpv6Repr::parse(&ip.src_addr(), &ip.dst_addr(), &message, &caps).unwrap();
    f(&ip, repr);
    assert_eq!(net.receive(&mut into).unwrap(), None);
}

#[test]
fn a_router_tells_prefix_mtu_and_name_server() {
    let options = Options {
        open: true,
        ..Options::default()
    };
    let mut net = UserNet::new(&options, MAC, 1500).unwrap();
    let [solicit, neighbour, ..] = &messages()[..] else {
        panic!();
    };
    // A router has passed this one on.
    let mut far = solicit.clone();
    far[HEADER + ETHERNET + 7] = 254;
    net.send(&far).unwrap();
    assert_eq!(net.receive(&mut vec![0; LARGEST]).unwrap(), None);
    assert_eq!(net.deadline(), None);
    net.send(solicit).unwrap();
    heard(&mut net, |ip, repr| {
        assert!(ip.src_addr().is_unicast_link_local() && ip.hop_limit() == 255);
        assert!(ip.payload().windows(16).any(|w| w == DNS6.octets()));
        let Icmpv6Repr::Ndisc(NdiscRepr::RouterAdvert {
            router_lifetime,
            lladdr,
            mtu,
            prefix_info: Some(prefix),
            ..
        }) = repr
        else {
            panic!("{repr:?}");
        };
        assert!(router_lifetime.secs() > 600 && mtu == Some(1500));
        assert_eq!(lladdr, Some(GATEWAY_MAC.into()));
        assert!(prefix.flags.contains(NdiscPrefixInfoFlags::ADDRCONF));
        assert!(prefix.is_valid_prefix_info() && prefix.prefix_len == 64);
        assert!(GUEST6.octets().starts_with(&prefix.prefix.octets()[..8]));
    });
    // It says so again before it is forgotten.
    assert!(net.deadline().is_some());
    net.send(neighbour).unwrap();
    heard(&mut net, |_, repr| {
        assert!(matches!(
            repr,
            Icmpv6Repr::Ndisc(NdiscRepr::NeighborAdvert { target_addr: GATEWAY6, lladdr, .. })
                if lladdr == Some(GATEWAY_MAC.into())
        ));
    });
}

#[test]
fn an_echo_is_the_gateways_and_nobody_elses() {
    let mut net = UserNet::new(&Options::default(), MAC, 1500).unwrap();
    let [.., near, far] = &messages()[..] else {
        panic!();
    };
    net.send(near).unwrap();
    heard(&mut net, |ip, repr| {
        assert_eq!((ip.src_addr(), ip.dst_addr()), (GATEWAY6, GUEST6));
        assert!(matches!(
            repr,
            Icmpv6Repr::EchoReply {
                ident: 7,
                seq_no: 3,
                data: b"anybody there?"
            }
        ));
    });
    net.send(far).unwrap();
    heard(&mut net, |_, repr| {
        assert!(
            matches!(repr, Icmpv6Repr::DstUnreachable { .. }),
            "{repr:?}"
        );
    });
    // Where packets are too small for IPv6 there is none.
    let mut net = UserNet::new(&Options::default(), MAC, 1000).unwrap();
    net.send(near).unwrap();
    assert_eq!(net.receive(&mut vec![0; LARGEST]).unwrap(), None);
}

#[test]
fn a_megabyte_over_ipv6() {
    if !possible() {
        return;
    }
    for offloads in [NOTHING, Offloads::ALL] {
        let (port, server) = echo_at("[::1]:0");
        let guest = guest6("open", offloads);
        let guest = transfer_to(guest, GATEWAY6.into(), port);
        server.join().unwrap();
        assert!(guest.card.largest <= HEADER + ETHERNET + 1500);
        assert!(guest.card.largest > 1000, "{}", guest.card.largest);
    }
}

#[test]
fn where_nobody_listens_and_where_nobody_is() {
    let mut guest = guest6("open", NOTHING);
    let handle = guest.connect(GATEWAY6, 1);
    guest.until(|sockets| {
        let state = sockets.get::<gtcp::Socket>(handle).state();
        (state == gtcp::State::Closed).then_some(())
    });
    let options = Options {
        open: true,
        ..Options::default()
    };
    let mut net = UserNet::new(&options, MAC, 1500).unwrap();
    for ip in [
        "::",
        "::1",
        "::ffff:127.0.0.1",
        "ff02::1",
        "fe80::2",
        "fec0::77",
    ] {
        assert_eq!(net.outside(ip.parse().unwrap(), 80), None, "{ip}");
    }
}

#[test]
fn datagrams_over_ipv6() {
    if !possible() {
        return;
    }
    let server = UdpSocket::bind("[::1]:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let mut guest = guest6("open", NOTHING);
    let handle = guest.udp(5000);
    let s = guest.sockets.get_mut::<gudp::Socket>(handle);
    s.send_slice(b"ping", (GATEWAY6, port)).unwrap();
    for _ in 0..4 {
        guest.turn();
    }
    let mut buffer = [0; 100];
    let (n, from) = server.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..n], b"ping");
    server.send_to(b"pong", from).unwrap();
    let from = guest.until(|sockets| {
        let s = sockets.get_mut::<gudp::Socket>(handle);
        let (data, meta) = s.recv().ok()?;
        assert_eq!(data, b"pong");
        Some(meta.endpoint)
    });
    assert_eq!(from, (GATEWAY6, port).into());
}

#[test]
fn a_port_on_all_addresses_leads_to_either_kind_of_guest() {
    if !possible() {
        return;
    }
    let port = {
        let l = TcpListener::bind("[::]:0").unwrap();
        l.local_addr().unwrap().port()
    };
    for (rule, six) in [("22", false), ("[fec0::15]:22", true)] {
        let options = format!("hostfwd=tcp:[::]:{port}-{rule}");
        let mut guest = if six {
            guest6(&options, NOTHING)
        } else {
            TestGuest::new(&options, NOTHING)
        };
        let handle = guest.tcp();
        let socket = guest.sockets.get_mut::<gtcp::Socket>(handle);
        socket.listen(22).unwrap();
        let client = TcpStream::connect(("::1", port)).unwrap();
        let from = guest.until(|sockets| {
            let s = sockets.get::<gtcp::Socket>(handle);
            s.may_send().then(|| s.remote_endpoint().unwrap().addr)
        });
        let gateway: IpAddr = if six { GATEWAY6.into() } else { GATEWAY.into() };
        assert_eq!(from, gateway.into());
        drop(client);
    }
}
