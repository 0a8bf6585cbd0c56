//! A driver's side of the rings against a card whose network is a socket.

use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use super::*;
use crate::net::{GSO_TCPV4, Header, NEEDS_CSUM};
use crate::virtio::queue::{Layout, Queue};
use crate::virtio::status;
use crate::virtio::worker::Shared;

const MAC: Mac = Mac([0, 0xa0, 0x98, 1, 2, 3]);
const MODERN: u64 = feature::VERSION_1;
const BUFFERS: u64 = 0x10_0000;

/// What a port was told.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Told {
    Takes(Offloads),
    Enable(bool),
}

/// A network of which the test has the other end.
struct Socket {
    near: UnixDatagram,
    told: Arc<Mutex<Vec<Told>>>,
}

impl Port for Socket {
    fn takes(&self) -> Offloads {
        Offloads::ALL
    }
    fn gives(&self) -> Offloads {
        Offloads::ALL
    }
    fn guest_takes(&mut self, offloads: Offloads) -> std::io::Result<()> {
        lock(&self.told).push(Told::Takes(offloads));
        Ok(())
    }
    fn enable(&mut self, on: bool) -> std::io::Result<()> {
        lock(&self.told).push(Told::Enable(on));
        Ok(())
    }
    fn send(&mut self, packet: &[u8]) -> std::io::Result<()> {
        self.near.send(packet).map(drop)
    }
    fn receive(&mut self, into: &mut [u8]) -> std::io::Result<Option<usize>> {
        match self.near.recv(into) {
            Ok(n) => Ok(Some(n)),
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => Ok(None),
            Err(e) => Err(e),
        }
    }
    fn fd(&self) -> RawFd {
        self.near.as_raw_fd()
    }
}

struct Far {
    socket: UnixDatagram,
    told: Arc<Mutex<Vec<Told>>>,
}

fn port() -> (Box<dyn Port>, Far) {
    let (near, socket) = UnixDatagram::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    let patience = Some(Duration::from_secs(20));
    socket.set_read_timeout(patience).unwrap();
    let told: Arc<Mutex<Vec<Told>>> = Arc::default();
    let port = Socket {
        near,
        told: Arc::clone(&told),
    };
    (Box::new(port), Far { socket, told })
}

/// A driver.
struct Driver {
    memory: GuestMemory,
    shared: Arc<Shared>,
    features: u64,
    queues: Vec<(Layout, u16)>,
    next: u64,
}

impl Driver {
    /// A card with these ports, and a driver that has accepted `features`.
    fn new(ports: Vec<Box<dyn Port>>, features: u64) -> Driver {
        let mut driver = Driver::not_up(ports, features);
        driver.up();
        driver
    }

    /// One whose queues run, and that has not set DRIVER_OK yet.
    fn not_up(ports: Vec<Box<dyn Port>>, features: u64) -> Driver {
        let memory = GuestMemory::anonymous(16 << 20).unwrap();
        let built = super::super::card(MAC, None, ports);
        assert_eq!(features & !MODERN & !built.identity.features, 0);
        let (identity, shared) = Shared::start("card".into(), built, memory.clone()).unwrap();
        let queues = identity.queues.len();
        let mut driver = Driver {
            memory,
            shared,
            features,
            queues: Vec::new(),
            next: BUFFERS,
        };
        for i in 0..queues {
            driver
                .queues
                .push((Layout::legacy(1 + 4 * i as u32, 16), 0));
        }
        driver.start_queues();
        driver
    }

    fn start(&mut self) {
        self.start_queues();
        self.up();
    }

    fn start_queues(&mut self) {
        for (i, (layout, added)) in self.queues.iter_mut().enumerate() {
            *added = 0;
            self.memory.write(layout.avail + 2, &0_u16).unwrap();
            self.memory.write(layout.used + 2, &0_u16).unwrap();
            let q = Queue::new(&self.memory, *layout, false, false).unwrap();
            self.shared.set_queue(i, Some(q), self.features);
        }
    }

    fn up(&mut self) {
        *lock(&self.shared.status) = status::DRIVER_OK;
        self.shared.activate(self.features);
    }

    /// Adds a chain: what to read, then lengths to write; the addresses.
    fn add(&mut self, queue: usize, readable: &[&[u8]], writable: &[u32]) -> Vec<u64> {
        let (layout, added) = self.queues[queue];
        let n = u64::from(added) * 8 % u64::from(layout.size);
        assert!(readable.len() + writable.len() <= 8);
        let mut places = Vec::new();
        let lens = readable.iter().map(|r| (r.len() as u32, 0));
        let lens = lens.chain(writable.iter().map(|&w| (w, 2)));
        let lens: Vec<(u32, u16)> = lens.collect();
        for (i, &(len, write)) in lens.iter().enumerate() {
            let at = self.next;
            self.next += u64::from(len) + 7;
            let flags = write | u16::from(i + 1 < lens.len());
            let d = layout.desc + 16 * (n + i as u64);
            self.memory.write(d, &at).unwrap();
            self.memory.write(d + 8, &len).unwrap();
            self.memory.write(d + 12, &flags).unwrap();
            self.memory
                .write(d + 14, &(n as u16 + i as u16 + 1))
                .unwrap();
            if let Some(r) = readable.get(i) {
                self.memory.write_bytes(at, r).unwrap();
            }
            places.push(at);
        }
        let slot = u64::from(added % layout.size);
        self.memory
            .write(layout.avail + 4 + 2 * slot, &(n as u16))
            .unwrap();
        let added = added + 1;
        self.memory.write(layout.avail + 2, &added).unwrap();
        self.queues[queue].1 = added;
        self.shared.notify(queue);
        places
    }

    fn used(&self, queue: usize) -> u16 {
        self.memory.read(self.queues[queue].0.used + 2).unwrap()
    }

    /// Waits until `n` chains were given back; the last one's length.
    fn served(&self, queue: usize, n: u16) -> u32 {
        self.wait(|| self.used(queue) == n);
        let slot = u64::from((n - 1) % 16);
        let at = self.queues[queue].0.used + 4 + 8 * slot + 4;
        self.memory.read(at).unwrap()
    }

    fn wait(&self, mut done: impl FnMut() -> bool) {
        let start = Instant::now();
        while !done() {
            assert!(start.elapsed() < Duration::from_secs(20), "nothing happens");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut b = vec![0; len];
        self.memory.read_bytes(at, &mut b).unwrap();
        b
    }

    fn needs_reset(&self) -> bool {
        *lock(&self.shared.status) & status::NEEDS_RESET != 0
    }

    /// A control command's answer.
    fn control(&mut self, queue: usize, command: &[u8]) -> u8 {
        let n = self.queues[queue].1 + 1;
        let (head, data) = command.split_at(2.min(command.len()));
        let places = if data.is_empty() {
            self.add(queue, &[head], &[1])
        } else {
            self.add(queue, &[head, data], &[1])
        };
        self.served(queue, n);
        self.bytes(*places.last().unwrap(), 1)[0]
    }
}

fn frame(to: [u8; 6], len: usize) -> Vec<u8> {
    let mut f = to.to_vec();
    f.extend((6..len).map(|i| i as u8));
    f
}

fn packet(header: Header, frame: &[u8]) -> Vec<u8> {
    [&header.bytes()[..], frame].concat()
}

impl Far {
    fn recv(&self) -> Vec<u8> {
        let mut buffer = vec![0; LARGEST];
        let n = self.socket.recv(&mut buffer).unwrap();
        buffer.truncate(n);
        buffer
    }
    fn send(&self, header: Header, frame: &[u8]) {
        self.socket.send(&packet(header, frame)).unwrap();
    }
}

#[test]
fn packets_go_out_whatever_the_buffers_look_like() {
    let (p, far) = port();
    let mut d = Driver::new(vec![p], MODERN);
    let f = frame(MAC.0, 100);
    d.add(1, &[&[0; 12], &f], &[]);
    d.add(1, &[&packet(Header::default(), &f)], &[]);
    d.add(1, &[&[0; 5], &[0; 7], &f[..1], &f[1..60], &f[60..]], &[]);
    for _ in 0..3 {
        assert_eq!(far.recv(), packet(Header::default(), &f));
    }
    assert_eq!(d.served(1, 3), 0);
}

#[test]
fn old_drivers_have_a_shorter_header() {
    let (p, far) = port();
    let mut d = Driver::new(vec![p], 0);
    let f = frame(MAC.0, 70);
    d.add(1, &[&[0; 10], &f], &[]);
    assert_eq!(far.recv(), packet(Header::default(), &f));
    let places = d.add(0, &[], &[10, 1600]);
    far.send(Header::default(), &f);
    assert_eq!(d.served(0, 1), 80);
    assert_eq!(d.bytes(places[0], 10), [0; 10]);
    assert_eq!(d.bytes(places[1], 71), [&f[..], &[0]].concat());
}

#[test]
fn a_legacy_driver_sends_and_commands_before_driver_ok_and_receives_after() {
    let (p, far) = port();
    let mut d = Driver::not_up(vec![p], 0);
    let f = frame(MAC.0, 70);
    far.send(Header::default(), &f);
    let places = d.add(0, &[], &[1600]);
    d.add(1, &[&[0; 10], &f], &[]);
    assert_eq!(far.recv(), packet(Header::default(), &f));
    assert_eq!(d.control(2, &[0, 0, 1]), OK);
    // The same thread has looked at the queue of received packets before.
    assert_eq!(d.used(0), 0);
    d.up();
    assert_eq!(d.served(0, 1), 80);
    assert_eq!(d.bytes(places[0] + 10, 70), f);
}

#[test]
fn a_packet_takes_as_many_buffers_as_it_needs() {
    let (p, far) = port();
    let mut d = Driver::new(vec![p], MODERN | F_MRG_RXBUF);
    let places: Vec<u64> = (0..2).flat_map(|_| d.add(0, &[], &[1000])).collect();
    let f = frame(MAC.0, 2500);
    far.send(Header::default(), &f);
    // It waits for the third, and does not lose its way.
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(d.used(0), 0);
    d.next = BUFFERS + 0x1000;
    let third = d.add(0, &[], &[2000])[0];
    assert_eq!(d.served(0, 3), 2512 - 2000);
    let mut seen = d.bytes(places[0], 1000);
    seen.extend(d.bytes(places[1], 1000));
    seen.extend(d.bytes(third, 512));
    let mut want = packet(Header::default(), &f);
    want[10] = 3;
    assert_eq!(seen, want);
}

#[test]
fn packets_wait_for_buffers_in_order() {
    let (p, far) = port();
    let mut d = Driver::new(vec![p], MODERN);
    for len in [60, 61, 62] {
        far.send(Header::default(), &frame(MAC.0, len));
    }
    std::thread::sleep(Duration::from_millis(20));
    for (n, len) in [(1, 60), (2, 61), (3, 62)] {
        d.add(0, &[], &[12, 1600]);
        assert_eq!(d.served(0, n), 12 + len);
    }
}

#[test]
fn a_packet_that_fits_nowhere_is_lost_and_the_next_arrives() {
    let (p, far) = port();
    let mut d = Driver::new(vec![p], MODERN);
    d.add(0, &[], &[100]);
    far.send(Header::default(), &frame(MAC.0, 1000));
    far.send(Header::default(), &frame(MAC.0, 80));
    assert_eq!(d.served(0, 1), 92);
    // With mergeable buffers, all of the driver's being too few.
    let (p, far) = port();
    let mut d = Driver::new(vec![p], MODERN | F_MRG_RXBUF);
    d.queues[0].0.size = 2;
    let q = Queue::new(&d.memory, d.queues[0].0, false, false).unwrap();
    d.shared.set_queue(0, Some(q), d.features);
    let layout = d.queues[0].0;
    for i in 0..2_u64 {
        let at = layout.desc + 16 * i;
        d.memory.write(at, &(BUFFERS + 200 * i)).unwrap();
        d.memory.write(at + 8, &100_u32).unwrap();
        d.memory.write(at + 12, &2_u16).unwrap();
        d.memory
            .write(layout.avail + 4 + 2 * i, &(i as u16))
            .unwrap();
    }
    d.memory.write(layout.avail + 2, &2_u16).unwrap();
    d.shared.notify(0);
    far.send(Header::default(), &frame(MAC.0, 1000));
    far.send(Header::default(), &frame(MAC.0, 150));
    d.wait(|| d.used(0) == 2);
}

#[test]
fn work_is_left_to_the_device_only_as_agreed() {
    let csum = Header {
        flags: NEEDS_CSUM,
        csum_start: 34,
        csum_offset: 16,
        ..Header::default()
    };
    let cut = Header {
        gso_type: GSO_TCPV4,
        gso_size: 1000,
        hdr_len: 54,
        ..csum
    };
    let f = frame(MAC.0, 3000);
    let (p, far) = port();
    let mut d = Driver::new(vec![p], MODERN | F_CSUM | F_HOST_TSO4);
    d.add(1, &[&packet(csum, &f)], &[]);
    d.add(1, &[&packet(cut, &f)], &[]);
    assert_eq!(far.recv(), packet(csum, &f));
    assert_eq!(far.recv(), packet(cut, &f));
    // Without agreement the packet is dropped, and its buffers come back.
    let (p, far) = port();
    let mut d = Driver::new(vec![p], MODERN);
    d.add(1, &[&packet(cut, &f)], &[]);
    d.add(1, &[&packet(csum, &f)], &[]);
    d.add(1, &[&packet(Header::default(), &f)], &[]);
    assert_eq!(d.served(1, 3), 0);
    assert_eq!(far.recv(), packet(Header::default(), &f));
    // And nothing is left to a driver that has not agreed.
    let place = d.add(0, &[], &[4000])[0];
    far.send(cut, &f);
    d.served(0, 1);
    assert_eq!(d.bytes(place, 12), Header::default().bytes());
    assert!(!d.needs_reset());
}

#[test]
fn the_network_hears_what_the_driver_takes_and_of_its_end() {
    let (p, far) = port();
    let all = F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_ECN;
    let d = Driver::new(vec![p], MODERN | all);
    let takes = Offloads {
        csum: true,
        tso4: true,
        tso6: false,
        ecn: true,
    };
    assert_eq!(lock(&far.told).as_slice(), [Told::Takes(takes)]);
    d.shared.reset();
    let none = Told::Takes(Offloads::default());
    assert_eq!(lock(&far.told).last(), Some(&none));
    // TSO is nothing without checksums.
    let (p, far) = port();
    Driver::new(vec![p], MODERN | F_GUEST_TSO4);
    assert_eq!(lock(&far.told).first(), Some(&none));
}

#[test]
fn after_a_reset_all_starts_anew() {
    let (p, far) = port();
    let mut d = Driver::new(vec![p], MODERN);
    assert_eq!(d.control(2, &[0, 0, 0]), OK);
    // It waits for a buffer when the reset comes.
    far.send(Header::default(), &frame(MAC.0, 500));
    std::thread::sleep(Duration::from_millis(20));
    d.shared.reset();
    d.start();
    d.add(0, &[], &[1600]);
    let other = frame([2; 6], 60);
    far.send(Header::default(), &other);
    assert_eq!(d.served(0, 1), 72);
}

#[test]
fn addresses_are_filtered_as_the_driver_says() {
    let (p, far) = port();
    let mut d = Driver::new(vec![p], MODERN | F_CTRL_VQ | F_CTRL_RX | F_CTRL_MAC_ADDR);
    assert_eq!(d.control(2, &[0, 0, 0]), OK);
    for _ in 0..2 {
        d.add(0, &[], &[1600]);
    }
    let others = [[2, 0, 0, 0, 0, 9], [1, 0, 0x5e, 0, 0, 1]];
    for to in others {
        far.send(Header::default(), &frame(to, 60));
    }
    far.send(Header::default(), &frame(MAC.0, 61));
    assert_eq!(d.served(0, 1), 73);
    let mine = others[0];
    assert_eq!(d.control(2, &[&[1, 1][..], &mine].concat()), OK);
    let config = (0..6).map(|i| d.shared.config_read(i, 1) as u8);
    assert_eq!(config.collect::<Vec<u8>>(), mine);
    far.send(Header::default(), &frame(MAC.0, 60));
    far.send(Header::default(), &frame(mine, 62));
    assert_eq!(d.served(0, 2), 74);
    assert_eq!(d.control(2, &[9, 9, 9]), ERR);
    assert_eq!(d.control(2, &[4, 0, 1, 0]), ERR, "no MQ");
    assert!(!d.needs_reset());
}

/// Chains that are no packets: each stops the device, and no thread.
#[test]
fn malformed_chains_stop_the_device() {
    type Bad = fn(&mut Driver, &Far);
    let bad: [(&str, Bad); 5] = [
        ("something to write in a packet to send", |d, _| {
            d.add(1, &[&[0; 12], &[0; 60]], &[8]);
        }),
        ("no whole header", |d, _| {
            d.add(1, &[&[0; 11]], &[]);
        }),
        ("something to read in a buffer to receive", |d, far| {
            d.add(0, &[&[0; 60]], &[1600]);
            far.send(Header::default(), &frame(MAC.0, 60));
        }),
        ("a buffer smaller than the header", |d, far| {
            d.add(0, &[], &[11]);
            far.send(Header::default(), &frame(MAC.0, 60));
        }),
        ("a command without a place for its answer", |d, _| {
            d.add(2, &[&[0, 0], &[1]], &[]);
        }),
    ];
    for (what, act) in &bad {
        let (p, far) = port();
        let mut d = Driver::new(vec![p], MODERN);
        act(&mut d, &far);
        d.wait(|| d.needs_reset());
        // A reset mends it.
        d.shared.reset();
        d.start();
        d.add(1, &[&[0; 12], &[7; 60]], &[]);
        assert_eq!(d.served(1, 1), 0, "{what}");
        assert!(!d.needs_reset(), "{what}");
    }
}

#[test]
fn packets_of_impossible_size_are_dropped() {
    let (p, far) = port();
    let mut d = Driver::new(vec![p], MODERN);
    d.add(1, &[&[0; 12]], &[]);
    d.add(1, &[&[0; 12], &[0; 13]], &[]);
    let huge = vec![0; 70_000];
    d.next = 0x20_0000;
    d.add(1, &[&[0; 12], &huge], &[]);
    d.add(1, &[&[0; 12], &frame(MAC.0, 64)], &[]);
    assert_eq!(d.served(1, 4), 0);
    assert_eq!(far.recv(), packet(Header::default(), &frame(MAC.0, 64)));
    // Runts from the network do not reach the driver.
    d.add(0, &[], &[1600]);
    far.socket.send(&[0; 5]).unwrap();
    far.send(Header::default(), &[0; 13]);
    far.send(Header::default(), &frame(MAC.0, 60));
    assert_eq!(d.served(0, 1), 72);
}

#[test]
fn pairs_of_queues_are_used_as_the_driver_says() {
    let (ports, fars): (Vec<_>, Vec<_>) = (0..3).map(|_| port()).unzip();
    let mut d = Driver::new(ports, MODERN | F_MQ | F_CTRL_VQ);
    assert_eq!(d.shared.config_read(8, 2), 3);
    let f = frame(MAC.0, 60);
    for pairs in [0_u8, 4] {
        assert_eq!(d.control(6, &[4, 0, pairs, 0]), ERR);
    }
    assert_eq!(d.control(6, &[4, 0, 2, 0]), OK);
    d.wait(|| lock(&fars[1].told).last() == Some(&Told::Enable(true)));
    d.add(3, &[&packet(Header::default(), &f)], &[]);
    assert_eq!(fars[1].recv(), packet(Header::default(), &f));
    d.add(2, &[], &[1600]);
    fars[1].send(Header::default(), &f);
    assert_eq!(d.served(2, 1), 72);
    assert!(lock(&fars[2].told).is_empty(), "the third is off");
    assert_eq!(d.control(6, &[4, 0, 1, 0]), OK);
    d.wait(|| lock(&fars[1].told).last() == Some(&Told::Enable(false)));
}

#[test]
fn without_mq_the_control_queue_is_the_third() {
    let (ports, fars): (Vec<_>, Vec<_>) = (0..2).map(|_| port()).unzip();
    let mut d = Driver::new(ports, MODERN | F_CTRL_VQ);
    assert_eq!(d.control(2, &[0, 0, 1]), OK);
    d.add(0, &[], &[1600]);
    fars[0].send(Header::default(), &frame(MAC.0, 60));
    assert_eq!(d.served(0, 1), 72);
}

#[test]
fn a_network_that_goes_takes_the_link_down() {
    let (p, far) = port();
    let mut d = Driver::new(vec![p], MODERN | F_STATUS);
    assert_eq!(d.shared.config_read(6, 2), 1);
    drop(far.socket);
    d.add(1, &[&[0; 12], &frame(MAC.0, 60)], &[]);
    d.wait(|| d.shared.config_read(6, 2) == 0);
    assert_eq!(d.served(1, 1), 0);
    // A card that is plugged in nowhere has none from the start.
    let mut d = Driver::new(Vec::new(), MODERN | F_STATUS);
    assert_eq!(d.shared.config_read(6, 2), 0);
    d.add(1, &[&[0; 12], &frame(MAC.0, 60)], &[]);
    assert_eq!(d.served(1, 1), 0);
}
