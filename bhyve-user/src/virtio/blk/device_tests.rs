use super::*;
use crate::disk::rig::{self, Image, pattern};
use crate::virtio::blk::build;
use crate::virtio::queue::Buffer;
use crate::virtio::testbed::Bed;
use std::fs;
use std::path::Path;

struct Rig {
    blk: Blk,
    identity: Identity,
    memory: GuestMemory,
    features: u64,
}

fn open(path: &Path, options: &str) -> Result<Rig, Error> {
    let options: Options = format!("{}{options}", path.display()).parse().unwrap();
    let (identity, mut blks) = Blk::open(&options, 1)?;
    Ok(Rig {
        blk: blks.remove(0),
        features: identity.features,
        identity,
        memory: GuestMemory::anonymous(1 << 20).unwrap(),
    })
}

const DATA: u64 = 0x10_000;
const STATUS: u64 = 0x9000;

fn buffer(addr: u64, len: u32) -> Buffer {
    Buffer { addr, len }
}

impl Rig {
    /// A request with `len` bytes at [`DATA`] in two buffers; status, used length.
    fn request(&mut self, kind: u32, sector: u64, out: u32, len: u32) -> (u8, u32) {
        let header = u128::from(kind) | u128::from(sector) << 64;
        self.memory.write(0x8000, &header.to_le_bytes()).unwrap();
        self.memory.write(STATUS, &0xff_u8).unwrap();
        let halves = |n: u32| {
            let first = n / 2;
            let list = [
                buffer(DATA, first),
                buffer(DATA + u64::from(first), n - first),
            ];
            list.into_iter().filter(|b| b.len > 0)
        };
        let mut chain = Chain::default();
        chain.readable.push(buffer(0x8000, 16));
        chain.readable.extend(halves(out));
        chain.writable.extend(halves(len));
        chain.writable.push(buffer(STATUS, 1));
        let used = self
            .blk
            .serve(0, &mut chain, &self.memory, self.features)
            .unwrap();
        (self.memory.read(STATUS).unwrap(), used)
    }
    fn data(&self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_bytes(DATA, &mut bytes).unwrap();
        bytes
    }
    fn segment(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> u8 {
        let s = u128::from(sector) | u128::from(sectors) << 64 | u128::from(flags) << 96;
        self.memory.write(DATA, &s.to_le_bytes()).unwrap();
        self.request(kind, 0, 16, 0).0
    }
}

#[test]
fn reads_and_writes_reach_the_file() {
    let content = pattern(64 << 10);
    for options in ["", ",sync", ",direct"] {
        let image = Image::new(&content);
        let mut r = open(&image.0, options).unwrap();
        assert_eq!(r.request(0, 3, 0, 8192), (0, 8193));
        assert_eq!(r.data(8192), content[1536..1536 + 8192]);
        r.memory.fill(DATA, 1024, 0xa5).unwrap();
        assert_eq!(r.request(1, 126, 1024, 0), (0, 1));
        assert_eq!(r.request(4, 0, 0, 0), (0, 1));
        let now = image.content();
        assert_eq!(now[..63 << 10], content[..63 << 10]);
        assert_eq!(now[63 << 10..], [0xa5; 1024]);
    }
}

#[test]
fn past_the_cache_any_guest_address_will_do() {
    let content = pattern(512 << 10);
    let image = Image::new(&content);
    let mut r = match open(&image.0, ",nocache") {
        Ok(r) => r,
        // A temporary directory in memory may know no direct I/O.
        Err(Error::Io(e)) if e.raw_os_error() == Some(nix::libc::EINVAL) => return,
        Err(e) => panic!("{e}"),
    };
    let mut chain = Chain::default();
    let header = 0_u128.to_le_bytes();
    r.memory.write(0x8000, &header).unwrap();
    chain.readable.push(buffer(0x8000, 16));
    chain.writable.push(buffer(0x2_0001, 256 << 10));
    chain.writable.push(buffer(STATUS, 1));
    r.blk.serve(0, &mut chain, &r.memory, r.features).unwrap();
    assert_eq!(r.memory.read::<u8>(STATUS).unwrap(), 0);
    let mut back = vec![0; 256 << 10];
    r.memory.read_bytes(0x2_0001, &mut back).unwrap();
    assert_eq!(back, content[..256 << 10]);
}

#[test]
fn what_cannot_be_done_is_an_error_and_changes_nothing() {
    let content = pattern(4096);
    let image = Image::new(&content);
    let mut r = open(&image.0, "").unwrap();
    assert_eq!(r.request(0, 8, 0, 512).0, S_IOERR, "beyond the end");
    assert_eq!(r.request(1, 7, 1024, 0).0, S_IOERR);
    assert_eq!(r.request(0, 0, 0, 100).0, S_IOERR);
    assert_eq!(r.request(99, 0, 0, 512).0, S_UNSUPP);
    assert_eq!(image.content(), content);
    let mut r = open(&image.0, ",ro").unwrap();
    assert_ne!(r.identity.features & F_RO, 0);
    assert_eq!(r.request(1, 0, 512, 0).0, S_IOERR);
    assert_eq!(r.request(0, 0, 0, 512).0, S_OK);
    assert_eq!(image.content(), content);
}

#[test]
fn the_hosts_errors_become_the_guests() {
    let image = Image::new(&pattern(8192));
    let mut r = open(&image.0, "").unwrap();
    // Someone makes the file shorter.
    let file = fs::File::options().write(true).open(&image.0).unwrap();
    file.set_len(4096).unwrap();
    assert_eq!(r.request(0, 0, 0, 8192).0, S_IOERR);
    assert_eq!(r.request(0, 0, 0, 4096).0, S_OK);
}

#[test]
fn a_full_or_broken_host_is_an_io_error() {
    let image = Image::new(&pattern(4096));
    let mut r = open(&image.0, "").unwrap();
    r.blk.backend.replace_file(rig::full());
    assert_eq!(r.request(0, 0, 0, 512).0, S_OK);
    assert_eq!(r.request(1, 0, 512, 0).0, S_IOERR);
    assert_eq!(r.segment(13, 0, 1, 0), S_IOERR);
    r.blk.backend.replace_file(rig::broken());
    assert_eq!(r.request(0, 0, 0, 512).0, S_IOERR);
    assert_eq!(r.request(1, 0, 512, 0).0, S_IOERR);
    assert_eq!(r.request(4, 0, 0, 0).0, S_IOERR);
    // The next flush would be told that all is well, and it is not.
    let again = fs::File::options().write(true).open(&image.0).unwrap();
    r.blk.backend.replace_file(again);
    assert_eq!(r.request(1, 0, 512, 0).0, S_OK);
    assert_eq!(r.request(4, 0, 0, 0).0, S_IOERR);
    assert!(r.blk.backend.share().unwrap().flush().is_err());
}

/// A driver that does not know of flushes takes what is acknowledged for
/// durable: where it cannot be made so, the write fails.
#[test]
fn without_flushes_a_write_is_durable_or_fails() {
    let image = Image::new(&pattern(4096));
    let mut r = open(&image.0, "").unwrap();
    // Writes are taken, and none can be made durable.
    r.blk.backend.replace_file(rig::fleeting());
    assert_eq!(r.request(1, 0, 512, 0).0, S_OK);
    r.features &= !F_FLUSH;
    assert_eq!(r.request(1, 0, 512, 0).0, S_IOERR);
}

#[test]
fn each_vcpu_has_a_queue_of_the_one_disk() {
    let content = pattern(64 << 10);
    let image = Image::new(&content);
    let conf = image.0.display().to_string();
    let queues = |conf: &str, cpus| {
        let built = build(conf, cpus).unwrap();
        let told = u16::from_le_bytes([built.identity.config[34], built.identity.config[35]]);
        assert_eq!(built.groups.len(), built.identity.queues.len());
        let many = built.identity.features & F_MQ != 0;
        (built.identity.queues.len(), told, many)
    };
    assert_eq!(queues(&conf, 1), (1, 1, false));
    assert_eq!(queues(&conf, 3), (3, 3, true));
    assert_eq!(queues(&conf, 400), (16, 16, true));
    assert_eq!(queues(&format!("{conf},queues=2"), 1), (2, 2, true));
    assert_eq!(queues(&format!("{conf},queues=1"), 8), (1, 1, false));

    for options in ["", ",sync", ",ro"] {
        let built = build(&format!("{conf}{options}"), 2).unwrap();
        let memory = GuestMemory::anonymous(16 << 20).unwrap();
        let mut bed = Bed::new(built, memory, u64::MAX);
        let header =
            |kind: u32, sector: u64| (u128::from(kind) | u128::from(sector) << 64).to_le_bytes();
        // What one queue writes the other flushes and reads.
        let write = bed.exchange(1, &[&header(1, 5), &[0x3c; 512]], &[1]);
        assert_eq!(write, [if options == ",ro" { S_IOERR } else { S_OK }]);
        assert_eq!(bed.exchange(0, &[&header(4, 0)], &[1]), [S_OK]);
        let back = bed.exchange(0, &[&header(0, 5)], &[512, 1]);
        assert_eq!(back[..512], image.content()[5 * 512..6 * 512]);
        assert_eq!(back[512], S_OK);
        // Both at once.
        let reads: Vec<_> = (0..32)
            .map(|n| (n % 2, bed.offer(n % 2, &[&header(0, n as u64)], &[512, 1])))
            .collect();
        for (n, (queue, offer)) in reads.iter().enumerate() {
            let (head, len) = bed.used(*queue);
            assert_eq!((head, len), (offer.head, 513));
            let at = n * 512;
            assert_eq!(bed.bytes(offer, 512), image.content()[at..at + 512]);
        }
    }
    assert_eq!(image.content()[2560..3072], [0x3c; 512]);
}

#[test]
fn discard_and_write_zeroes() {
    let content = pattern(64 << 10);
    let image = Image::new(&content);
    let mut r = open(&image.0, "").unwrap();
    assert_eq!(r.segment(13, 1, 2, 0), S_OK);
    let mut want = content.clone();
    want[512..1536].fill(0);
    assert_eq!(image.content(), want);
    assert_eq!(r.segment(13, 16, 16, 1), S_OK, "may unmap");
    want[8192..16384].fill(0);
    assert_eq!(image.content(), want);
    if r.features & F_DISCARD != 0 {
        assert_eq!(r.segment(11, 64, 64, 0), S_OK);
        want[32768..].fill(0);
        assert_eq!(image.content(), want);
    }
    assert_eq!(r.segment(13, 127, 2, 0), S_IOERR);
    assert_eq!(image.content(), want);
    let r = open(&image.0, ",nodelete").unwrap();
    assert_eq!(r.features & F_DISCARD, 0);
}

#[test]
fn serials_and_sizes_are_told() {
    let image = Image::new(&pattern(8192));
    let mut r = open(&image.0, ",serial=DISK-1").unwrap();
    r.memory.fill(DATA, 64, 0xee).unwrap();
    assert_eq!(r.request(8, 0, 0, 20), (0, 21));
    assert_eq!(r.data(21), *b"DISK-1\0\0\0\0\0\0\0\0\0\0\0\0\0\0\xee");
    let id = serial_of(b"/some/disk");
    assert!(id.starts_with("BHYVE-") && id.len() == 20);
    assert_ne!(id, serial_of(b"/some/disl"));
    let r = open(&image.0, ",sectorsize=512/4096").unwrap();
    let c = &r.identity.config;
    assert_eq!(c.len(), 60);
    assert_eq!(c[..8], 16_u64.to_le_bytes());
    assert_eq!(c[20..24], 512_u32.to_le_bytes());
    assert_eq!(c[24..28], [3, 0, 8, 0]);
}

#[test]
fn requests_without_header_or_status_are_malformed() {
    let image = Image::new(&pattern(8192));
    let mut r = open(&image.0, "").unwrap();
    let full = |readable: &[Buffer], writable: &[Buffer]| {
        let mut chain = Chain::default();
        chain.readable.extend(readable);
        chain.writable.extend(writable);
        chain
    };
    let status = [buffer(STATUS, 1)];
    for mut chain in [
        full(&[], &status),
        full(&[buffer(0x8000, 15)], &status),
        full(&[buffer(0x8000, 16)], &[]),
    ] {
        let e = r.blk.serve(0, &mut chain, &r.memory, r.features);
        assert_eq!(e, Err(Malformed::Request));
    }
}

#[test]
fn what_is_no_raw_disk_is_refused() {
    let refused = |image: &Image, options: &str| open(&image.0, options).err().unwrap().to_string();
    assert!(refused(&Image::new(b"QFI\xfb    "), "").contains("qcow2"));
    assert!(refused(&Image::new(b""), "").contains("size"));
    assert!(refused(&Image::new(&[0; 513]), "").contains("513"));
    assert!(refused(&Image::new(&[0; 512]), ",sectorsize=4096").contains("4096"));
    assert!(open(Path::new("/dev/null"), "").is_err());
    assert!(open(&std::env::temp_dir(), "").is_err());
}

#[test]
fn a_vcpu_reads_what_the_host_has_in_memory_and_does_nothing_else() {
    let content = pattern(64 << 10);
    let image = Image::new(&content);
    let mut r = open(&image.0, "").unwrap();
    let mut attempt = |kind: u32, sector: u64, out: u32, len: u32| {
        let header = u128::from(kind) | u128::from(sector) << 64;
        r.memory.write(0x8000, &header.to_le_bytes()).unwrap();
        r.memory.fill(DATA, 8192, 0x5a).unwrap();
        let mut chain = Chain::default();
        chain.readable.push(buffer(0x8000, 16));
        chain
            .readable
            .extend((out > 0).then_some(buffer(DATA, out)));
        chain
            .writable
            .extend((len > 0).then_some(buffer(DATA, len)));
        chain.writable.push(buffer(STATUS, 1));
        let done = r.blk.request(&mut chain, &r.memory, r.features, true);
        let mut data = vec![0; 8192];
        r.memory.read_bytes(DATA, &mut data).unwrap();
        (done.unwrap(), data)
    };
    // The host may not know, or not have it; the second time it is worth mapping.
    for _ in 0..3 {
        let (done, data) = attempt(0, 3, 0, 8192);
        if done.is_some() {
            assert_eq!((done, &data[..]), (Some(8193), &content[1536..1536 + 8192]));
        }
    }
    // Writes, flushes and errors take their time.
    for (kind, sector, out, len) in [
        (1, 0, 512, 0),
        (4, 0, 0, 0),
        (0, 128, 0, 512),
        (77, 0, 0, 0),
    ] {
        assert_eq!(attempt(kind, sector, out, len).0, None, "request {kind}");
    }
    assert_eq!(image.content(), content);
    let r = open(&image.0, ",nocache").unwrap();
    assert!(!r.blk.at_once());
}

/// A file that shrinks under a mapping is SIGBUS, which must end nothing.
#[test]
fn a_file_that_becomes_shorter_fails_its_reads_only() {
    let content = pattern(256 << 10);
    let image = Image::new(&content);
    let conf = image.0.display().to_string();
    let memory = GuestMemory::anonymous(16 << 20).unwrap();
    let mut bed = Bed::new(build(&conf, 1).unwrap(), memory, u64::MAX);
    let header = |sector: u64| (u128::from(sector) << 64).to_le_bytes();
    let mut read = |sector| {
        let back = bed.exchange(0, &[&header(sector)], &[65536, 1]);
        let at = sector as usize * 512;
        (
            back[65536] == S_OK,
            back[..65536] == content[at..at + 65536],
        )
    };
    assert_eq!(read(256), (true, true));
    assert_eq!(read(256), (true, true));
    let file = fs::File::options().write(true).open(&image.0).unwrap();
    file.set_len(128 << 10).unwrap();
    assert!(!read(256).0);
    assert!(!read(256).0);
    assert_eq!(read(0), (true, true));
}
