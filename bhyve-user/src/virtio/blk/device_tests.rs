use super::*;
use crate::virtio::queue::Buffer;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A disk image that goes away with the test.
struct Image(PathBuf);
impl Image {
    fn new(content: &[u8]) -> Image {
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("bhyve-blk-{}-{n}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::write(&path, content).unwrap();
        Image(path)
    }
}
impl Drop for Image {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32).map(|i| (i * 7 + i / 512) as u8).collect()
}

struct Rig {
    blk: Blk,
    identity: Identity,
    memory: GuestMemory,
    features: u64,
}

fn open(path: &Path, options: &str) -> Result<Rig, Error> {
    let options: Options = format!("{}{options}", path.display()).parse().unwrap();
    let (identity, blk) = Blk::open(&options)?;
    Ok(Rig {
        blk,
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
        let now = fs::read(&image.0).unwrap();
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
    assert_eq!(fs::read(&image.0).unwrap(), content);
    let mut r = open(&image.0, ",ro").unwrap();
    assert_ne!(r.identity.features & F_RO, 0);
    assert_eq!(r.request(1, 0, 512, 0).0, S_IOERR);
    assert_eq!(r.request(0, 0, 0, 512).0, S_OK);
    assert_eq!(fs::read(&image.0).unwrap(), content);
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

/// A device that is full: every write is ENOSPC.
#[test]
fn a_full_host_is_an_io_error() {
    let image = Image::new(&pattern(4096));
    let mut r = open(&image.0, "").unwrap();
    r.blk
        .backend
        .replace_file(fs::File::options().write(true).open("/dev/full").unwrap());
    assert_eq!(r.request(1, 0, 512, 0).0, S_IOERR);
}

#[test]
fn discard_and_write_zeroes() {
    let content = pattern(64 << 10);
    let image = Image::new(&content);
    let mut r = open(&image.0, "").unwrap();
    assert_eq!(r.segment(13, 1, 2, 0), S_OK);
    let mut want = content.clone();
    want[512..1536].fill(0);
    assert_eq!(fs::read(&image.0).unwrap(), want);
    assert_eq!(r.segment(13, 16, 16, 1), S_OK, "may unmap");
    want[8192..16384].fill(0);
    assert_eq!(fs::read(&image.0).unwrap(), want);
    if r.features & F_DISCARD != 0 {
        assert_eq!(r.segment(11, 64, 64, 0), S_OK);
        want[32768..].fill(0);
        assert_eq!(fs::read(&image.0).unwrap(), want);
    }
    assert_eq!(r.segment(13, 127, 2, 0), S_IOERR);
    assert_eq!(fs::read(&image.0).unwrap(), want);
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
    // The host may not know, or not have it.
    let (done, data) = attempt(0, 3, 0, 8192);
    if done.is_some() {
        assert_eq!((done, &data[..]), (Some(8193), &content[1536..1536 + 8192]));
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
    assert_eq!(fs::read(&image.0).unwrap(), content);
    let r = open(&image.0, ",nocache").unwrap();
    assert!(!r.blk.at_once());
}
