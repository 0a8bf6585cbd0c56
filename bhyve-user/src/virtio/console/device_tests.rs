use super::*;
use crate::virtio::Built;
use crate::virtio::testbed::{Bed, Offer, wait};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

struct Rig {
    bed: Bed,
    dir: tempfile::TempDir,
    control: Vec<Offer>,
}

fn rig(features: u64) -> Rig {
    let dir = tempfile::tempdir().unwrap();
    let port = |name: &str| PortOptions {
        name: name.into(),
        path: dir.path().join(name),
    };
    let (identity, console) = Console::open(&[port("a"), port("b")]).unwrap();
    assert_eq!(identity.queues.len(), 6);
    let memory = GuestMemory::anonymous(32 << 20).unwrap();
    let built = Built::single(identity, console);
    let bed = Bed::new(built, memory, features);
    assert_eq!(bed.shared.config_read(4, 4), 2);
    Rig {
        bed,
        dir,
        control: Vec::new(),
    }
}

impl Rig {
    fn connect(&self, name: &str) -> UnixStream {
        let s = UnixStream::connect(self.dir.path().join(name)).unwrap();
        s.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        s
    }
    fn listen(&mut self, n: usize) {
        for _ in 0..n {
            let offer = self.bed.offer(CONTROL_IN, &[], &[16]);
            self.control.push(offer);
        }
    }
    fn tell(&mut self, port: u32, event: u16, value: u16) {
        let v = u64::from(port) | u64::from(event) << 32 | u64::from(value) << 48;
        self.bed.exchange(CONTROL_OUT, &[&v.to_le_bytes()], &[]);
    }
    /// The next control message: port, event, value, name.
    fn hear(&mut self) -> (u32, u16, u16, String) {
        let (head, len) = self.bed.used(CONTROL_IN);
        let offer = self.control.remove(0);
        assert_eq!(offer.head, head);
        let bytes = self.bed.bytes(&offer, len);
        let v = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        let name = String::from_utf8(bytes[8..].to_vec()).unwrap();
        (v as u32, (v >> 32) as u16, (v >> 48) as u16, name)
    }
}

/// A rig whose driver has made both ports and has opened them.
fn ready() -> Rig {
    let mut r = rig(F_MULTIPORT);
    r.listen(16);
    r.tell(0, 0, 1);
    assert_eq!(r.hear(), (0, 1, 1, String::new()));
    assert_eq!(r.hear(), (1, 1, 1, String::new()));
    for port in [0, 1] {
        r.tell(port, 3, 1);
        let name = ["a", "b"][port as usize].to_owned();
        assert_eq!(r.hear(), (port, 7, 1, name));
        r.tell(port, 6, 1);
    }
    r
}

#[test]
fn both_ends_of_a_port_talk() {
    let mut r = ready();
    let mut b = r.connect("b");
    assert_eq!(r.hear(), (1, 6, 1, String::new()));
    b.write_all(b"from the host").unwrap();
    std::thread::sleep(Duration::from_millis(20));
    // Kept until there is a buffer, in the buffer's measure.
    let first = r.bed.offer(4, &[], &[5, 3]);
    let (_, n) = r.bed.used(4);
    assert_eq!(r.bed.bytes(&first, n), b"from the");
    assert_eq!(r.bed.exchange(4, &[], &[100]), b" host");
    let later = r.bed.offer(4, &[], &[100]);
    assert!(r.bed.quiet(4));
    r.bed.exchange(5, &[b"from ", b"the guest"], &[]);
    let mut text = [0; 14];
    b.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"from the guest");
    b.write_all(b"!").unwrap();
    let (_, n) = r.bed.used(4);
    assert_eq!(r.bed.bytes(&later, n), b"!");
    // One program at a time.
    let mut other = r.connect("b");
    assert_eq!(other.read(&mut [0; 8]).unwrap(), 0);
    drop(b);
    r.bed.offer(4, &[], &[100]);
    assert_eq!(r.hear(), (1, 6, 0, String::new()));
    let _c = r.connect("b");
    assert_eq!(r.hear(), (1, 6, 1, String::new()));
}

#[test]
fn what_nobody_hears_is_lost_and_what_nobody_reads_waits() {
    let mut r = ready();
    r.bed.exchange(1, &[b"nobody is there"], &[]);
    let mut a = r.connect("a");
    assert_eq!(r.hear().1, 6);
    // More than a socket holds.
    let data: Vec<u8> = (0..50_000_u32).map(|i| (i * 7) as u8).collect();
    let mut offered = 0;
    for _ in 0..40 {
        r.bed.offer(1, &[&data], &[]);
        offered += 1;
    }
    std::thread::sleep(Duration::from_millis(50));
    let mut seen = vec![0; data.len()];
    for i in 0..offered {
        a.read_exact(&mut seen).unwrap();
        assert!(seen == data, "part {i}");
        r.bed.used(1);
    }
    // A program that leaves lets the rest through.
    for _ in 0..40 {
        r.bed.offer(1, &[&data], &[]);
    }
    drop(a);
    for _ in 0..40 {
        r.bed.used(1);
    }
    assert_eq!(r.hear(), (0, 6, 0, String::new()));
}

#[test]
fn a_driver_of_one_port_needs_no_control() {
    let mut r = rig(0);
    let mut a = r.connect("a");
    a.write_all(b"hello").unwrap();
    assert_eq!(r.bed.exchange(0, &[], &[64]), b"hello");
    r.bed.exchange(1, &[b"you"], &[]);
    let mut text = [0; 3];
    a.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"you");
}

#[test]
fn nonsense_on_the_control_queue_is_survived() {
    let mut r = rig(F_MULTIPORT);
    for (port, event, value) in [(2, 3, 1), (u32::MAX, 6, 1), (0, 99, 9), (0, 0, 7)] {
        r.tell(port, event, value);
    }
    // It asks and does not listen.
    for _ in 0..1000 {
        r.tell(0, 3, 1);
    }
    r.listen(1);
    assert_eq!(r.hear(), (0, 7, 1, "a".into()));
    // A buffer that is too small gets what fits; an empty one nothing.
    let small = r.bed.offer(CONTROL_IN, &[], &[3]);
    let (_, n) = r.bed.used(CONTROL_IN);
    assert_eq!(r.bed.bytes(&small, n).len(), 3);
    r.bed.exchange(1, &[], &[8]);
    r.bed.offer(0, &[b"readable"], &[]);
    assert!(!r.bed.broken());
    r.bed.offer(CONTROL_OUT, &[b"short"], &[]);
    wait("too short a message", || r.bed.broken());
}
