//! A guest (smoltcp again, with Ethernet) against real sockets of the host.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::thread::{self, JoinHandle};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{self, DeviceCapabilities, Medium};
use smoltcp::socket::{dhcpv4, icmp, tcp as gtcp, udp as gudp};
use smoltcp::wire::{HardwareAddress, Icmpv4Packet, Icmpv4Repr, IpCidr, Ipv4Repr};

use super::*;
use crate::net::{ETHERNET, GSO_TCPV4, LARGEST};

#[path = "ipv6_tests.rs"]
mod six;

const MAC: Mac = Mac([0, 0xa0, 0x98, 1, 2, 3]);

/// The guest's card: the other end of the port.
struct Card {
    net: UserNet,
    /// The largest packet that came, and whether one was to be cut.
    largest: usize,
    gso: u16,
    csum: bool,
}

struct Rx(Vec<u8>);
struct Tx<'a>(&'a mut UserNet, bool);

impl phy::RxToken for Rx {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl phy::TxToken for Tx<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut packet = vec![0; HEADER + len];
        let r = f(&mut packet[HEADER..]);
        if self.1 {
            // A driver that leaves the checksum says so, with a wrong one.
            packet[0] = NEEDS_CSUM;
        }
        self.0.send(&packet).unwrap();
        r
    }
}

impl phy::Device for Card {
    type RxToken<'b> = Rx;
    type TxToken<'b> = Tx<'b>;
    fn receive(&mut self, _: SmolInstant) -> Option<(Rx, Tx<'_>)> {
        let mut buffer = vec![0; LARGEST];
        let n = self.net.receive(&mut buffer).unwrap()?;
        buffer.truncate(n);
        let header = Header::parse(*buffer.first_chunk().unwrap());
        self.largest = self.largest.max(n);
        if header.gso_type == GSO_TCPV4 {
            self.gso = header.gso_size;
        }
        assert!(self.csum || header == Header::default(), "{header:?}");
        let ip = &buffer[HEADER..];
        Some((Rx(ip.to_vec()), Tx(&mut self.net, self.csum)))
    }
    fn transmit(&mut self, _: SmolInstant) -> Option<Tx<'_>> {
        Some(Tx(&mut self.net, self.csum))
    }
    fn capabilities(&self) -> DeviceCapabilities {
        let mut caps = DeviceCapabilities::default();
        caps.medium = Medium::Ethernet;
        caps.max_transmission_unit = 1500 + ETHERNET;
        if self.csum {
            caps.checksum.tcp = phy::Checksum::None;
            caps.checksum.udp = phy::Checksum::None;
        }
        caps
    }
}

struct TestGuest {
    card: Card,
    interface: Interface,
    sockets: SocketSet<'static>,
    start: Instant,
}

impl TestGuest {
    fn new(options: &str, offloads: Offloads) -> TestGuest {
        let mut o = Options::default();
        for word in options.split(',').filter(|w| !w.is_empty()) {
            assert_eq!(o.word(word), Ok(true));
        }
        let mut net = UserNet::new(&o, MAC, 1500).unwrap();
        net.guest_takes(offloads.and(net.gives())).unwrap();
        let mut card = Card {
            net,
            largest: 0,
            gso: 0,
            csum: offloads.csum,
        };
        let mac = HardwareAddress::Ethernet(EthernetAddress(MAC.0));
        let mut interface = Interface::new(Config::new(mac), &mut card, SmolInstant::ZERO);
        interface.update_ip_addrs(|a| {
            a.push(IpCidr::new(GUEST.into(), 24)).unwrap();
        });
        interface
            .routes_mut()
            .add_default_ipv4_route(GATEWAY)
            .unwrap();
        TestGuest {
            card,
            interface,
            sockets: SocketSet::new(Vec::new()),
            start: Instant::now(),
        }
    }

    fn turn(&mut self) {
        let now = SmolInstant::from_micros(self.start.elapsed().as_micros() as i64);
        self.interface.poll(now, &mut self.card, &mut self.sockets);
    }

    /// Turns until `done` says what came of it.
    fn until<T>(&mut self, mut done: impl FnMut(&mut SocketSet<'static>) -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            self.turn();
            if let Some(t) = done(&mut self.sockets) {
                return t;
            }
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "nothing came of it"
            );
            thread::sleep(Duration::from_micros(200));
        }
    }

    fn tcp(&mut self) -> SocketHandle {
        let buffer = || gtcp::SocketBuffer::new(vec![0; 65536]);
        self.sockets.add(gtcp::Socket::new(buffer(), buffer()))
    }

    fn connect(&mut self, ip: impl Into<IpAddress>, port: u16) -> SocketHandle {
        let handle = self.tcp();
        let socket = self.sockets.get_mut::<gtcp::Socket>(handle);
        let cx = self.interface.context();
        socket
            .connect(cx, (ip.into(), port), 40000 + port % 20000)
            .unwrap();
        handle
    }

    fn udp(&mut self, port: u16) -> SocketHandle {
        let buffer =
            || gudp::PacketBuffer::new(vec![gudp::PacketMetadata::EMPTY; 8], vec![0; 65536]);
        let handle = self.sockets.add(gudp::Socket::new(buffer(), buffer()));
        self.sockets
            .get_mut::<gudp::Socket>(handle)
            .bind(port)
            .unwrap();
        handle
    }
}

const NOTHING: Offloads = Offloads {
    csum: false,
    tso4: false,
    tso6: false,
    ecn: false,
};

/// Bytes that tell their place.
fn pattern(n: usize) -> Vec<u8> {
    (0..n).map(|i| (i ^ i >> 8 ^ i >> 16) as u8).collect()
}

/// A host's server that sends back what it gets, until its end.
fn echo() -> (u16, JoinHandle<usize>) {
    echo_at("127.0.0.1:0")
}

fn echo_at(address: &str) -> (u16, JoinHandle<usize>) {
    let listener = TcpListener::bind(address).unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = thread::spawn(move || {
        let (mut s, _) = listener.accept().unwrap();
        let (mut all, mut buffer) = (0, [0; 9000]);
        loop {
            match s.read(&mut buffer).unwrap() {
                0 => return all,
                n => s.write_all(&buffer[..n]).unwrap(),
            }
            all += 1;
        }
    });
    (port, server)
}

/// Sends a megabyte to the host and gets it back, then closes; both ends see
/// the other's end.
fn transfer(offloads: Offloads) -> TestGuest {
    let (port, server) = echo();
    let guest = TestGuest::new("open", offloads);
    let guest = transfer_to(guest, GATEWAY.into(), port);
    server.join().unwrap();
    guest
}

fn transfer_to(mut guest: TestGuest, gateway: IpAddress, port: u16) -> TestGuest {
    let handle = guest.connect(gateway, port);
    let data = pattern(1 << 20);
    let (mut sent, mut back) = (0, Vec::new());
    guest.until(|sockets| {
        let s = sockets.get_mut::<gtcp::Socket>(handle);
        if s.can_send() && sent < data.len() {
            sent += s.send_slice(&data[sent..]).unwrap();
        }
        if s.can_recv() {
            s.recv(|b| {
                back.extend_from_slice(b);
                (b.len(), ())
            })
            .unwrap();
        }
        (back.len() == data.len()).then(|| s.close())
    });
    assert!(back == data, "what comes back is not what was sent");
    guest.until(|sockets| {
        let s = sockets.get_mut::<gtcp::Socket>(handle);
        matches!(s.state(), gtcp::State::TimeWait | gtcp::State::Closed).then_some(())
    });
    guest
}

#[test]
fn a_megabyte_to_the_host_and_back_without_offloads() {
    let guest = transfer(NOTHING);
    assert!(guest.card.largest <= HEADER + ETHERNET + 1500);
    assert_eq!(guest.card.gso, 0);
}

#[test]
fn with_offloads_the_guest_gets_large_pieces_to_cut() {
    let guest = transfer(Offloads::ALL);
    assert!(guest.card.largest > 3000, "{}", guest.card.largest);
    assert!((500..=1460).contains(&guest.card.gso), "{}", guest.card.gso);
}

#[test]
fn checksums_alone_leave_packets_whole() {
    let guest = transfer(Offloads {
        csum: true,
        ..NOTHING
    });
    assert!(guest.card.largest <= HEADER + ETHERNET + 1500);
}

#[test]
fn a_forwarded_port_leads_to_the_guest() {
    // A port that is free now.
    let port = {
        let l = TcpListener::bind("127.0.0.1:0").unwrap();
        l.local_addr().unwrap().port()
    };
    // Forwards work without `open`.
    let mut guest = TestGuest::new(&format!("hostfwd=tcp:127.0.0.1:{port}-22"), Offloads::ALL);
    let handle = guest.tcp();
    guest
        .sockets
        .get_mut::<gtcp::Socket>(handle)
        .listen(22)
        .unwrap();
    let client = thread::spawn(move || {
        let mut s = TcpStream::connect(("127.0.0.1", port)).unwrap();
        s.write_all(b"hello").unwrap();
        s.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        s.read_to_string(&mut answer).unwrap();
        answer
    });
    let mut heard = Vec::new();
    guest.until(|sockets| {
        let s = sockets.get_mut::<gtcp::Socket>(handle);
        if s.can_recv() {
            s.recv(|b| {
                heard.extend_from_slice(b);
                (b.len(), ())
            })
            .unwrap();
        }
        (s.state() == gtcp::State::CloseWait && !s.can_recv()).then(|| {
            assert_eq!(s.remote_endpoint().unwrap().addr, GATEWAY.into());
            s.send_slice(b"good bye").unwrap();
            s.close();
        })
    });
    assert_eq!(heard, b"hello");
    guest.until(|_| client.is_finished().then_some(()));
    assert_eq!(client.join().unwrap(), "good bye");
    guest.until(|sockets| {
        let s = sockets.get_mut::<gtcp::Socket>(handle);
        (s.state() == gtcp::State::Closed).then_some(())
    });
}

#[test]
fn a_port_that_is_taken_is_named() {
    let l = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = l.local_addr().unwrap();
    let mut o = Options::default();
    o.word(&format!("hostfwd=tcp:127.0.0.1:{}-22", at.port()))
        .unwrap();
    let e = UserNet::new(&o, MAC, 1500).err().unwrap().to_string();
    assert!(e.contains(&at.to_string()), "{e}");
}

/// How a connection attempt ends: true if it is refused.
fn refused(options: &str, ip: Ipv4Addr, port: u16) -> bool {
    let mut guest = TestGuest::new(options, NOTHING);
    let handle = guest.connect(ip, port);
    guest.until(
        |sockets| match sockets.get::<gtcp::Socket>(handle).state() {
            gtcp::State::Closed => Some(true),
            gtcp::State::Established => Some(false),
            _ => None,
        },
    )
}

#[test]
fn a_port_where_nobody_listens_refuses() {
    let port = {
        let l = TcpListener::bind("127.0.0.1:0").unwrap();
        l.local_addr().unwrap().port()
    };
    assert!(refused("open", GATEWAY, port));
}

#[test]
fn without_open_there_is_no_way_out() {
    let (port, server) = echo();
    assert!(refused("", GATEWAY, port));
    assert!(refused("", Ipv4Addr::new(192, 0, 2, 1), 80));
    assert!(!refused("open", GATEWAY, port));
    server.join().unwrap();
}

#[test]
fn addresses_of_the_guests_own_network_lead_nowhere() {
    for ip in [[10, 0, 2, 77], [127, 0, 0, 1], [224, 0, 0, 1], [0, 0, 0, 1]] {
        let o = Options {
            open: true,
            ..Options::default()
        };
        let mut net = UserNet::new(&o, MAC, 1500).unwrap();
        assert_eq!(net.outside(Ipv4Addr::from(ip).into(), 80), None, "{ip:?}");
    }
}

#[test]
fn a_guest_that_resets_has_its_peer_see_it() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut guest = TestGuest::new("open", Offloads::ALL);
    let handle = guest.connect(GATEWAY, port);
    guest.until(|s| s.get::<gtcp::Socket>(handle).may_send().then_some(()));
    let (mut s, _) = listener.accept().unwrap();
    guest.sockets.get_mut::<gtcp::Socket>(handle).abort();
    for _ in 0..10 {
        guest.turn();
    }
    let e = s.read(&mut [0]).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::ConnectionReset);
    assert_eq!(guest.card.net.tcp.len(), 0);
}

#[test]
fn a_peer_that_resets_has_the_guest_see_it() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut guest = TestGuest::new("open", NOTHING);
    let handle = guest.connect(GATEWAY, port);
    guest.until(|s| s.get::<gtcp::Socket>(handle).may_send().then_some(()));
    let (s, _) = listener.accept().unwrap();
    let now = nix::libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    nix::sys::socket::setsockopt(&s, nix::sys::socket::sockopt::Linger, &now).unwrap();
    drop(s);
    guest.until(|s| (!s.get::<gtcp::Socket>(handle).is_open()).then_some(()));
    assert_eq!(guest.card.net.tcp.len(), 0);
}

#[test]
fn a_reset_of_the_card_ends_its_connections() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut guest = TestGuest::new("open", NOTHING);
    let handle = guest.connect(GATEWAY, port);
    guest.until(|s| s.get::<gtcp::Socket>(handle).may_send().then_some(()));
    let (mut s, _) = listener.accept().unwrap();
    guest.card.net.guest_takes(NOTHING).unwrap();
    assert!(s.read(&mut [0]).is_err());
    assert_eq!(guest.card.net.tcp.len(), 0);
}

#[test]
fn datagrams_go_out_and_answers_come_from_where_they_went() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let mut guest = TestGuest::new("open", Offloads::ALL);
    let handle = guest.udp(5000);
    let s = guest.sockets.get_mut::<gudp::Socket>(handle);
    s.send_slice(b"ping", (GATEWAY, port)).unwrap();
    guest.turn();
    guest.turn();
    let mut buffer = [0; 100];
    let (n, from) = server.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..n], b"ping");
    // Somebody else's datagram to that port does not reach the guest.
    let stranger = UdpSocket::bind("127.0.0.1:0").unwrap();
    stranger.send_to(b"spoof", from).unwrap();
    server.send_to(b"pong", from).unwrap();
    let (data, meta) = guest.until(|sockets| {
        let s = sockets.get_mut::<gudp::Socket>(handle);
        let (data, meta) = s.recv().ok()?;
        Some((data.to_vec(), meta))
    });
    assert_eq!(data, b"pong");
    assert_eq!(meta.endpoint, (GATEWAY, port).into());
}

#[test]
fn a_forwarded_datagram_is_answered_through_its_port() {
    let port = {
        let s = UdpSocket::bind("127.0.0.1:0").unwrap();
        s.local_addr().unwrap().port()
    };
    let mut guest = TestGuest::new(&format!("hostfwd=udp:127.0.0.1:{port}-53"), NOTHING);
    let handle = guest.udp(53);
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.send_to(b"who?", ("127.0.0.1", port)).unwrap();
    let meta = guest.until(|sockets| {
        let s = sockets.get_mut::<gudp::Socket>(handle);
        let (data, meta) = s.recv().ok()?;
        assert_eq!(data, b"who?");
        Some(meta)
    });
    let s = guest.sockets.get_mut::<gudp::Socket>(handle);
    s.send_slice(b"me", meta.endpoint).unwrap();
    for _ in 0..5 {
        guest.turn();
    }
    let mut buffer = [0; 100];
    let (n, from) = client.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..n], b"me");
    assert_eq!(from.port(), port);
}

#[test]
fn the_gateway_answers_an_echo() {
    let mut guest = TestGuest::new("", Offloads::ALL);
    let buffer = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 4], vec![0; 4096]);
    let handle = guest.sockets.add(icmp::Socket::new(buffer(), buffer()));
    let s = guest.sockets.get_mut::<icmp::Socket>(handle);
    s.bind(icmp::Endpoint::Ident(7)).unwrap();
    let request = Icmpv4Repr::EchoRequest {
        ident: 7,
        seq_no: 3,
        data: b"anybody there?",
    };
    let bytes = s.send(request.buffer_len(), GATEWAY.into()).unwrap();
    request.emit(
        &mut Icmpv4Packet::new_unchecked(bytes),
        &phy::ChecksumCapabilities::default(),
    );
    guest.until(|sockets| {
        let s = sockets.get_mut::<icmp::Socket>(handle);
        let (data, from) = s.recv().ok()?;
        assert_eq!(from, GATEWAY.into());
        let packet = Icmpv4Packet::new_checked(data).unwrap();
        assert_eq!(
            Icmpv4Repr::parse(&packet, &phy::ChecksumCapabilities::default()).unwrap(),
            Icmpv4Repr::EchoReply {
                ident: 7,
                seq_no: 3,
                data: b"anybody there?",
            }
        );
        Some(())
    });
}

#[test]
fn dhcp_tells_address_gateway_name_server_and_mtu() {
    let mut guest = TestGuest::new("open", NOTHING);
    guest.interface.update_ip_addrs(|a| a.clear());
    guest.interface.routes_mut().remove_default_ipv4_route();
    let handle = guest.sockets.add(dhcpv4::Socket::new());
    let lease = guest.until(
        |sockets| match sockets.get_mut::<dhcpv4::Socket>(handle).poll() {
            Some(dhcpv4::Event::Configured(c)) => Some((
                c.address,
                c.router,
                c.dns_servers.to_vec(),
                c.server.address,
            )),
            _ => None,
        },
    );
    let address = smoltcp::wire::Ipv4Cidr::new(GUEST, 24);
    assert_eq!(lease, (address, Some(GATEWAY), vec![DNS], GATEWAY));
}

/// One frame of each kind that the network knows, as a guest would send it.
fn frames() -> Vec<Vec<u8>> {
    let caps = &phy::ChecksumCapabilities::default();
    let frame = |kind: EthernetProtocol, len: usize, fill: &dyn Fn(&mut [u8])| {
        let mut packet = vec![0; HEADER + ETHERNET + len];
        let mut eth = EthernetFrame::new_unchecked(&mut packet[HEADER..]);
        eth.set_src_addr(EthernetAddress(MAC.0));
        eth.set_dst_addr(GATEWAY_MAC);
        eth.set_ethertype(kind);
        fill(eth.payload_mut());
        packet
    };
    let ipv4 = |protocol: IpProtocol, to: Ipv4Addr, len: usize, fill: &dyn Fn(&mut [u8])| {
        frame(EthernetProtocol::Ipv4, 20 + len, &|b| {
            let repr = Ipv4Repr {
                src_addr: GUEST,
                dst_addr: to,
                next_header: protocol,
                payload_len: len,
                hop_limit: 64,
            };
            let mut ip = Ipv4Packet::new_unchecked(b);
            repr.emit(&mut ip, caps);
            fill(ip.payload_mut());
        })
    };
    let arp = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Request,
        source_hardware_addr: EthernetAddress(MAC.0),
        source_protocol_addr: GUEST,
        target_hardware_addr: EthernetAddress::default(),
        target_protocol_addr: GATEWAY,
    };
    let tcp = |to: Ipv4Addr, flags: u8| {
        ipv4(IpProtocol::Tcp, to, 44, &move |b| {
            let mut t = TcpPacket::new_unchecked(b);
            t.set_src_port(1234);
            t.set_dst_port(80);
            t.set_header_len(24);
            t.set_syn(flags & 1 != 0);
            t.set_ack(flags & 2 != 0);
            t.fill_checksum(&GUEST.into(), &to.into());
        })
    };
    let udp = |to: Ipv4Addr, port: u16, len: usize| {
        ipv4(IpProtocol::Udp, to, 8 + len, &move |b| {
            let repr = smoltcp::wire::UdpRepr {
                src_port: 68,
                dst_port: port,
            };
            let (from, to) = (GUEST.into(), to.into());
            let mut packet = UdpPacket::new_unchecked(b);
            // Looks like DHCP up to its magic number.
            let body = |b: &mut [u8]| {
                b[..3].copy_from_slice(&[1, 1, 6]);
                b[236..240].copy_from_slice(&[0x63, 0x82, 0x53, 0x63]);
                b[240..].fill(53);
            };
            repr.emit(&mut packet, &from, &to, len, body, caps);
        })
    };
    let mut all = vec![
        frame(EthernetProtocol::Arp, 28, &|b| {
            arp.emit(&mut ArpPacket::new_unchecked(b));
        }),
        frame(EthernetProtocol::Ipv6, 60, &|b| b.fill(0x60)),
        tcp(GATEWAY, 1),
        tcp(GATEWAY, 2),
        tcp(Ipv4Addr::BROADCAST, 1),
        udp(GATEWAY, 67, 300),
        udp(Ipv4Addr::BROADCAST, 67, 300),
        udp(DNS, 53, 260),
        ipv4(IpProtocol::Icmp, GATEWAY, 16, &|b| {
            b.copy_from_slice(&[8, 0, 0xf7, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        }),
        ipv4(IpProtocol::Igmp, GATEWAY, 8, &|_| ()),
    ];
    all.extend(six::messages());
    all
}

/// A number that depends on all before.
fn next(seed: &mut u64) -> usize {
    *seed = seed
        .wrapping_mul(6364136223846793005)
        .wrapping_add(1442695040888963407);
    (*seed >> 33) as usize
}

#[test]
fn packets_without_sense_do_no_more_than_vanish() {
    let mut net = UserNet::new(&Options::default(), MAC, 1500).unwrap();
    let mut into = vec![0; LARGEST];
    let mut answers = 0;
    let mut all = |net: &mut UserNet, packet: &[u8]| {
        net.send(packet).unwrap();
        while let Some(n) = net.receive(&mut into).unwrap() {
            assert!(n <= HEADER + ETHERNET + 1500);
            answers += 1;
        }
    };
    let mut seed = 1;
    for frame in frames() {
        for len in 0..=frame.len() {
            all(&mut net, &frame[..len]);
        }
        for _ in 0..2000 {
            let mut bad = frame.clone();
            for _ in 0..1 + next(&mut seed) % 4 {
                let at = next(&mut seed) % bad.len();
                bad[at] = next(&mut seed) as u8;
            }
            // Half of them go unchecked.
            bad[0] = (next(&mut seed) & 1) as u8;
            all(&mut net, &bad);
        }
    }
    assert!(answers > 100, "the frames are not understood: {answers}");
    assert_eq!((net.tcp.len(), net.udp.len()), (0, 0));
}

/// A guest whose segments are nearly right: sequence numbers around those that
/// are due, any flags, windows, options and lengths. `steps` of them.
fn almost_tcp(steps: usize) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for (i, s) in listener.incoming().enumerate() {
            let Ok(mut s) = s else { return };
            let _ = s.set_nonblocking(true);
            let _ = s.write(&pattern(i * 977 % 200_000));
            thread::spawn(move || {
                for _ in 0..i % 5 {
                    thread::sleep(Duration::from_millis(1));
                    let _ = s.read(&mut [0; 5000]);
                }
            });
        }
    });
    let mut seed = 2;
    let mut guest = TestGuest::new("open", Offloads::ALL);
    let net = &mut guest.card.net;
    let mut into = vec![0; LARGEST];
    // What each of the guest's ports has seen: what is due, and acknowledged.
    let mut seen = [(0_u32, 0_u32); 8];
    let at = HEADER + ETHERNET;
    for _ in 0..steps {
        let local = next(&mut seed) % seen.len();
        let (due, acked) = seen[local];
        let near = |seed: &mut u64, n: u32| match next(seed) % 8 {
            0 => n.wrapping_add(next(seed) as u32 % 3000).wrapping_sub(1500),
            1 => next(seed) as u32,
            _ => n,
        };
        let options = 4 * (next(&mut seed) % 11);
        let len = [0, 1, 100, 1460, 20_000][next(&mut seed) % 5];
        let mut packet = vec![0; at + 40 + options + len];
        packet[..at].copy_from_slice(&frames()[2][..at]);
        packet[0] = NEEDS_CSUM;
        let repr = Ipv4Repr {
            src_addr: GUEST,
            dst_addr: GATEWAY,
            next_header: IpProtocol::Tcp,
            payload_len: 20 + options + len,
            hop_limit: 64,
        };
        let caps = phy::ChecksumCapabilities::default();
        let mut ip = Ipv4Packet::new_unchecked(&mut packet[at..]);
        repr.emit(&mut ip, &caps);
        let b = ip.payload_mut();
        b[..2].copy_from_slice(&(1024 + local as u16).to_be_bytes());
        b[2..4].copy_from_slice(&port.to_be_bytes());
        b[4..8].copy_from_slice(&near(&mut seed, acked).to_be_bytes());
        b[8..12].copy_from_slice(&near(&mut seed, due).to_be_bytes());
        b[12] = ((5 + options / 4) << 4) as u8;
        // SYN, ACK, FIN and the rest.
        let any = next(&mut seed) as u8;
        b[13] = [2, 0x10, 0x10, 0x18, 0x18, 0x11, 4, any][next(&mut seed) % 8];
        b[14..16].copy_from_slice(&(next(&mut seed) as u16).to_be_bytes());
        for o in &mut b[20..20 + options] {
            *o = [0, 1, 2, 3, 4, 5, 8, 10, any][next(&mut seed) % 9];
        }
        net.send(&packet).unwrap();
        while let Some(n) = net.receive(&mut into).unwrap() {
            let ip = Ipv4Packet::new_checked(&into[at..n]).unwrap();
            let Ok(tcp) = TcpPacket::new_checked(ip.payload()) else {
                continue;
            };
            let slot = usize::from(tcp.dst_port().wrapping_sub(1024));
            if let Some(s) = seen.get_mut(slot) {
                let next = tcp.seq_number() + tcp.segment_len();
                *s = (next.0 as u32, tcp.ack_number().0 as u32);
            }
        }
        assert!(net.tcp.len() <= seen.len());
    }
}

#[test]
fn segments_without_sense_leave_the_network_standing() {
    almost_tcp(5000);
    // It still works.
    transfer(Offloads::ALL);
}

#[test]
fn connections_are_bounded() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let o = Options {
        open: true,
        ..Options::default()
    };
    let mut net = UserNet::new(&o, MAC, 1500).unwrap();
    let mut into = vec![0; LARGEST];
    let at = HEADER + ETHERNET + 20;
    for local in 1..=tcp::MOST as u16 + 50 {
        let mut packet = frames()[2].clone();
        packet[at..at + 2].copy_from_slice(&local.to_be_bytes());
        packet[at + 2..at + 4].copy_from_slice(&port.to_be_bytes());
        packet[0] = NEEDS_CSUM;
        net.send(&packet).unwrap();
        while net.receive(&mut into).unwrap().is_some() {}
    }
    assert!(net.tcp.len() <= tcp::MOST);
}

#[test]
fn a_guest_that_takes_nothing_does_not_make_the_host_pile_up() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let mut guest = TestGuest::new("open", Offloads::ALL);
    let handle = guest.udp(5000);
    let s = guest.sockets.get_mut::<gudp::Socket>(handle);
    s.send_slice(b"go", (GATEWAY, port)).unwrap();
    guest.turn();
    guest.turn();
    let (_, from) = server.recv_from(&mut [0; 10]).unwrap();
    for _ in 0..2000 {
        let _ = server.send_to(&[0; 1400], from);
    }
    // The guest fetches one packet now and then.
    let mut into = vec![0; LARGEST];
    let mut got = 0;
    for _ in 0..5000 {
        if guest.card.net.receive(&mut into).unwrap().is_some() {
            got += 1;
        }
    }
    assert!(got > 64, "what waited at the host is fetched later: {got}");
}
