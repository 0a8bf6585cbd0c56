use super::*;
use crate::virtio::Built;
use crate::virtio::testbed::{Bed, Offer, wait};
use std::os::unix::net::UnixListener;
use vmmapi::GuestMemory;

const CID: u64 = 7;

struct Rig {
    bed: Bed,
    dir: tempfile::TempDir,
    offers: VecDeque<Offer>,
}

fn rig() -> Rig {
    let dir = tempfile::tempdir().unwrap();
    let options = Options {
        cid: CID,
        path: dir.path().join("v"),
    };
    let (identity, device) = Vsock::open(&options).unwrap();
    let memory = GuestMemory::anonymous(32 << 20).unwrap();
    let bed = Bed::new(Built::single(identity, device), memory, 0);
    assert_eq!(bed.shared.config_read(0, 8), CID);
    Rig {
        bed,
        dir,
        offers: VecDeque::new(),
    }
}

fn guest(host_port: u32, guest_port: u32, op: u16, len: u32) -> Header {
    Header {
        src_cid: CID,
        dst_cid: HOST,
        src_port: guest_port,
        dst_port: host_port,
        len,
        kind: STREAM,
        op,
        flags: 0,
        buf_alloc: 1000,
        fwd_cnt: 0,
    }
}

impl Rig {
    fn say(&mut self, h: &Header, data: &[u8]) {
        self.bed.exchange(TX, &[&h.bytes(), data], &[]);
    }
    fn listen(&mut self, n: usize) {
        for _ in 0..n {
            let offer = self.bed.offer(RX, &[], &[44, 600]);
            self.offers.push_back(offer);
        }
    }
    fn hear(&mut self) -> (Header, Vec<u8>) {
        let (_, len) = self.bed.used(RX);
        let offer = self.offers.pop_front().unwrap();
        let mut bytes = self.bed.bytes(&offer, len);
        let data = bytes.split_off(HEADER);
        let h = Header::parse(bytes[..].try_into().unwrap());
        assert_eq!((h.src_cid, h.dst_cid, h.kind), (HOST, CID, STREAM));
        assert_eq!(h.len as usize, data.len());
        (h, data)
    }
    fn program(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.dir.path().join(format!("v_{port}"))).unwrap()
    }
    fn limit(s: &UnixStream) {
        s.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    }
}

#[test]
fn the_guest_reaches_a_program_of_the_host() {
    let mut r = rig();
    let program = r.program(52);
    r.listen(20);
    r.say(&guest(52, 1024, op::REQUEST, 0), b"");
    let (h, _) = r.hear();
    assert_eq!((h.op, h.src_port, h.dst_port), (op::RESPONSE, 52, 1024));
    assert_eq!(h.buf_alloc, BUFFER);
    let (mut end, _) = program.accept().unwrap();
    Rig::limit(&end);
    r.say(&guest(52, 1024, op::RW, 5), b"hello");
    let mut text = [0; 5];
    end.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"hello");
    // As much as the guest has room for, in packets of its buffers' size.
    end.write_all(&[7; 1500]).unwrap();
    let (first, data) = r.hear();
    assert_eq!((first.op, data.len(), first.fwd_cnt), (op::RW, 600, 5));
    assert_eq!(r.hear().1.len(), 400);
    assert!(r.bed.quiet(RX));
    let mut more = guest(52, 1024, op::CREDIT_UPDATE, 0);
    more.fwd_cnt = 1000;
    r.say(&more, b"");
    assert_eq!(r.hear().1, [7; 500]);
    more.op = op::CREDIT_REQUEST;
    r.say(&more, b"");
    assert_eq!(r.hear().0.op, op::CREDIT_UPDATE);
    // The program ends, then the guest.
    more.fwd_cnt = 1500;
    more.op = op::CREDIT_UPDATE;
    r.say(&more, b"");
    drop(end);
    let (h, _) = r.hear();
    assert_eq!((h.op, h.flags), (op::SHUTDOWN, NO_SEND));
    more.op = op::SHUTDOWN;
    more.flags = 3;
    r.say(&more, b"");
    assert_eq!(r.hear().0.op, op::RST);
    assert!(!r.bed.broken());
}

#[test]
fn a_guest_with_too_few_buffers_loses_nothing() {
    let mut r = rig();
    let program = r.program(52);
    r.listen(2);
    r.say(&guest(52, 1024, op::REQUEST, 0), b"");
    r.hear();
    let (mut end, _) = program.accept().unwrap();
    let sent: Vec<u8> = (0..1000_u32).map(|i| i as u8).collect();
    end.write_all(&sent).unwrap();
    drop(end);
    // One buffer of 600 bytes is left: the rest waits for the next.
    let mut heard = r.hear().1;
    assert_eq!(heard.len(), 600);
    assert!(r.bed.quiet(RX));
    r.listen(3);
    heard.extend(r.hear().1);
    assert_eq!(heard, sent);
    let mut more = guest(52, 1024, op::CREDIT_UPDATE, 0);
    more.fwd_cnt = 1000;
    r.say(&more, b"");
    let (h, _) = r.hear();
    assert_eq!((h.op, h.flags), (op::SHUTDOWN, NO_SEND));
    assert!(!r.bed.broken());
}

#[test]
fn a_program_of_the_host_reaches_the_guest() {
    let mut r = rig();
    r.listen(8);
    let mut s = UnixStream::connect(r.dir.path().join("v")).unwrap();
    Rig::limit(&s);
    s.write_all(b"CONNECT 99\nfirst").unwrap();
    let (h, _) = r.hear();
    assert_eq!((h.op, h.dst_port), (op::REQUEST, 99));
    assert!(r.bed.quiet(RX), "nothing before the guest has answered");
    r.say(&guest(h.src_port, 99, op::RESPONSE, 0), b"");
    let want = format!("OK {}\n", h.src_port);
    let mut line = vec![0; want.len()];
    s.read_exact(&mut line).unwrap();
    assert_eq!(line, want.as_bytes());
    assert_eq!(r.hear().1, b"first");
    // The guest resets: the program sees the end.
    r.say(&guest(h.src_port, 99, op::RST, 0), b"");
    assert_eq!(s.read(&mut [0; 8]).unwrap(), 0);
    // And one that is refused, and one that says nonsense.
    let mut t = UnixStream::connect(r.dir.path().join("v")).unwrap();
    Rig::limit(&t);
    t.write_all(b"CONNECT 1\n").unwrap();
    let (h, _) = r.hear();
    r.say(&guest(h.src_port, 1, op::RST, 0), b"");
    assert_eq!(t.read(&mut [0; 8]).unwrap(), 0);
    let mut u = UnixStream::connect(r.dir.path().join("v")).unwrap();
    Rig::limit(&u);
    u.write_all(b"HELO\n").unwrap();
    assert_eq!(u.read(&mut [0; 8]).unwrap(), 0);
}

#[test]
fn a_guest_that_does_not_keep_to_its_credit_is_cut_off() {
    let mut r = rig();
    let program = r.program(1);
    r.listen(30);
    r.say(&guest(1, 5, op::REQUEST, 0), b"");
    r.hear();
    let (_end, _) = program.accept().unwrap();
    // The program reads nothing: its socket fills, then our buffer.
    let data = vec![1; 32 << 10];
    let mut reset = false;
    for _ in 0..100 {
        r.say(&guest(1, 5, op::RW, data.len() as u32), &data);
        let at = crate::virtio::testbed::layout(RX).used + 2;
        let seen: u16 = r.bed.memory.read(at).unwrap();
        while r.offers.len() > 30 - usize::from(seen) {
            reset |= r.hear().0.op == op::RST;
        }
        if reset {
            break;
        }
    }
    assert!(reset, "what is beyond the buffer ends the stream");
    assert!(!r.bed.broken());
}

#[test]
fn nonsense_is_answered_with_a_reset_or_not_at_all() {
    let mut r = rig();
    r.listen(8);
    // Nobody listens; no such stream; of another kind.
    for (op, kind) in [(op::REQUEST, 1), (op::RW, 1), (77, 1), (op::REQUEST, 2)] {
        let h = Header {
            kind,
            ..guest(4000, 1, op, 0)
        };
        r.say(&h, b"");
        assert_eq!(r.hear().0.op, super::op::RST, "{op} {kind}");
    }
    // To others, from others, and resets of nothing.
    for h in [
        Header {
            dst_cid: 9,
            ..guest(1, 1, op::REQUEST, 0)
        },
        Header {
            src_cid: 9,
            ..guest(1, 1, op::REQUEST, 0)
        },
        guest(1, 1, op::RST, 0),
    ] {
        r.say(&h, b"");
    }
    assert!(r.bed.quiet(RX));
    // A guest that never receives: its packets wait, and nothing grows.
    let mut r = rig();
    for _ in 0..MOST_PACKETS {
        r.say(&guest(4000, 1, op::RW, 0), b"");
    }
    r.bed.offer(TX, &[&guest(4000, 1, op::RW, 0).bytes()], &[]);
    assert!(r.bed.quiet(TX));
    r.listen(2);
    r.hear();
    r.bed.used(TX);
    assert!(!r.bed.broken());
    r.bed
        .offer(TX, &[&guest(1, 1, op::RW, 100).bytes(), b"few"], &[]);
    wait("a length beyond the packet", || r.bed.broken());
}
