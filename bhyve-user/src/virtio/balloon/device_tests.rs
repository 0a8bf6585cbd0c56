use super::*;
use crate::machine::fake::{Event, Fake};
use crate::virtio::Built;
use crate::virtio::testbed::{Bed, wait};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use vmmapi::GuestMemory;

const PIECE: u64 = super::super::ledger::PIECE;

fn bed(options: &str, features: u64) -> (Bed, Arc<Fake>) {
    let fake = Fake::new();
    let memory = GuestMemory::anonymous(32 << 20).unwrap();
    let options: Options = options.parse().unwrap();
    let (identity, balloon) = Balloon::open(&options, fake.clone()).unwrap();
    let built = Built::single(identity, balloon);
    (Bed::new(built, memory, features), fake)
}

fn numbers(pages: impl Iterator<Item = u64>) -> Vec<u8> {
    pages.flat_map(|p| (p as u32).to_le_bytes()).collect()
}

#[test]
fn a_piece_goes_when_all_of_it_is_in_the_balloon() {
    let (mut bed, fake) = bed("size=8M", u64::MAX);
    assert_eq!(bed.shared.config_read(0, 4), 2048);
    let first = 16 << 20;
    let page = |i: u64| (first + i * 4096) / 4096;
    let half = numbers((0..256).map(page));
    let other = numbers((256..512).map(page));
    bed.exchange(0, &[&half], &[]);
    assert_eq!(fake.take(), []);
    bed.exchange(0, &[&other[..7], &other[7..]], &[]);
    assert_eq!(fake.take(), [Event::Released(first, PIECE)]);
    bed.exchange(0, &[&other], &[]);
    assert_eq!(fake.take(), []);
    // Taken out and put in again.
    bed.exchange(1, &[&half], &[]);
    bed.exchange(0, &[&half], &[]);
    assert_eq!(fake.take(), [Event::Released(first, PIECE)]);
    // A new driver knows nothing of it.
    bed.shared.config_write(4, 4, 512, &(4..8));
    assert_eq!(bed.shared.config_read(4, 4), 512);
}

#[test]
fn pages_that_are_not_there_do_nothing() {
    let (mut bed, fake) = bed("", u64::MAX);
    let wild = numbers([8192, 8191 + 8192, u64::from(u32::MAX), 1 << 20].into_iter());
    bed.exchange(0, &[&wild, b"xyz"], &[16]);
    bed.exchange(1, &[&wild], &[]);
    bed.exchange(0, &[], &[16]);
    assert_eq!(fake.take(), []);
    assert!(!bed.broken());
    let many = vec![0; MOST_PAGES as usize * 4 + 4];
    bed.offer(0, &[&many], &[]);
    wait("too many at once", || bed.broken());
}

#[test]
fn reported_pages_go_in_whole_pieces() {
    let (mut bed, fake) = bed("", u64::MAX);
    // The testbed's buffers start at 4 MiB.
    bed.offer(3, &[], &[(4 << 20) - 64, 3 << 20]);
    let (_, len) = bed.used(3);
    assert_eq!(len, 0);
    // Both are neighbours: from 4 MiB on, up to nearly 11 MiB.
    let at = 4 << 20;
    let released = fake.take();
    let total: u64 = released
        .iter()
        .map(|e| match e {
            Event::Released(gpa, len) => {
                assert!(gpa % PIECE == 0 && len % PIECE == 0 && *gpa >= at);
                *len
            }
            e => panic!("{e:?}"),
        })
        .sum();
    assert!((2..=3).contains(&(total / PIECE)), "{released:?}");
    // Without statistics, the queue before it is the reporting one.
    let (mut bed, fake) = self::bed("", F_REPORTING);
    bed.offer(2, &[], &[4 << 20]);
    bed.used(2);
    assert_eq!(fake.take().len(), 1);
    bed.offer(3, &[], &[64]);
    wait("a queue that is for nothing", || bed.broken());
}

struct Control(BufReader<UnixStream>);
impl Control {
    fn open(path: &Path) -> Control {
        let stream = UnixStream::connect(path).unwrap();
        let limit = Some(std::time::Duration::from_secs(20));
        stream.set_read_timeout(limit).unwrap();
        Control(BufReader::new(stream))
    }
    fn say(&mut self, line: &str) {
        self.0.get_mut().write_all(line.as_bytes()).unwrap();
    }
    fn hear(&mut self) -> String {
        let mut line = String::new();
        match self.0.read_line(&mut line) {
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => {}
            r => drop(r.unwrap()),
        }
        line.trim().to_owned()
    }
    fn ask(&mut self, line: &str) -> String {
        self.say(&format!("{line}\n"));
        self.hear()
    }
}

#[test]
fn the_control_socket_changes_and_tells() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("balloon");
    let (mut bed, _fake) = bed(&format!("control={},noreport", path.display()), u64::MAX);
    let mut c = Control::open(&path);
    assert_eq!(c.ask("size 16M"), "ok");
    assert_eq!(bed.shared.config_read(0, 4), 4096);
    assert_eq!(bed.shared.generation(), 1);
    assert_eq!(c.ask("size 32M"), "error: the guest has 32M");
    assert!(c.ask("grow").starts_with("error: "));
    assert_eq!(
        c.ask("stats"),
        "{\"size\":16777216,\"actual\":0,\"released\":0,\"reported\":0}",
        "a guest without statistics"
    );
    // The driver leaves a buffer, and fills it again when it gets it back.
    let mut statistic = 4_u16.to_le_bytes().to_vec();
    statistic.extend(77_u64.to_le_bytes());
    bed.offer(2, &[&statistic], &[]);
    assert!(bed.quiet(2), "the buffer is kept");
    c.say("stats\nsize 0\n");
    bed.used(2);
    assert_eq!(c.hear(), "ok", "of the second command");
    statistic[2] = 78;
    bed.offer(2, &[&statistic], &[]);
    assert!(c.hear().contains("\"free_memory\":78"));
    // A guest that does not answer: what it told last, after a while.
    c.say("stats\n");
    bed.used(2);
    assert!(c.hear().contains("\"free_memory\":78"));
    // Whoever talks nonsense is hung up on.
    c.say(&"x".repeat(10_000));
    assert_eq!(c.hear(), "");
    assert_eq!(Control::open(&path).ask("size 0"), "ok");
}
