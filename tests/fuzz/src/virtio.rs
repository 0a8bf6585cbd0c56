//! What a driver does to a virtio device: its rings, its chains, its memory.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use bhyve::machine::Machine;
use bhyve::virtio::queue::{Layout, Queue};
use bhyve::virtio::worker::Shared;
use bhyve::virtio::{Built, balloon, blk, console, p9, vsock};
use vmmapi::GuestMemory;

use crate::machine::Silent;

/// Guest memory: rings in the first half, buffers in the second.
const MEMORY: u64 = 1 << 20;
const BUFFERS: u64 = MEMORY / 2;
/// Entries of each queue.
const SIZE: u16 = 16;
/// Steps of one input.
const STEPS: usize = 200;

/// An input, taken from its front; zeroes behind its end.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> u8 {
        let Some((&b, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        b
    }
    fn word(&mut self) -> u64 {
        (0..4).fold(0, |v, _| v << 8 | u64::from(self.byte()))
    }
    fn bytes(&mut self, n: usize) -> &'a [u8] {
        let (now, rest) = self.0.split_at(n.min(self.0.len()));
        self.0 = rest;
        now
    }
}

/// A folder that goes away with the run.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Folder {
        let name = format!(
            "bhyve-fuzz-{}-{:?}",
            std::process::id(),
            std::thread::current().id()
        );
        let path = std::env::temp_dir().join(name.replace(['(', ')'], ""));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(path.join("share/sub")).expect("a folder for the run");
        Folder(path)
    }
    fn at(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn layout(queue: usize) -> Layout {
    let base = 0x4000 * queue as u64;
    Layout {
        size: SIZE,
        desc: base,
        avail: base + 0x1000,
        used: base + 0x2000,
    }
}

/// Puts every queue where the driver has it.
fn start(shared: &Shared, queues: usize, bits: u8, features: u64) {
    for q in 0..queues {
        let queue = Queue::new(shared.memory(), layout(q), bits & 1 != 0, bits & 2 != 0);
        shared.set_queue(q, queue.ok(), features);
    }
    shared.activate(features);
}

fn drive(built: Built, memory: &GuestMemory, data: &[u8]) {
    let mut input = Input(data);
    let all = built.identity.features;
    let writable = built.identity.writable.clone();
    let (identity, shared) =
        Shared::assemble("fuzz".into(), built, memory.clone()).expect("descriptors");
    let queues = identity.queues.len();
    let bits = input.byte();
    let features = if bits & 4 != 0 {
        all
    } else {
        all & input.word()
    };
    start(&shared, queues, bits, features);
    let mut offered = vec![0_u16; queues];
    let mut next = 0_u16;
    for _ in 0..STEPS {
        if input.0.is_empty() {
            break;
        }
        let step = input.byte();
        let q = usize::from(input.byte()) % queues;
        match step % 8 {
            // A chain as a driver makes it.
            0..=3 => {
                let l = layout(q);
                let parts = input.byte() % 4 + 1;
                let head = next % SIZE;
                let mut at = BUFFERS + 0x1000 * u64::from(next % 64);
                for i in 0..parts {
                    let kind = input.byte();
                    let len = usize::from(input.byte()) << (kind >> 5);
                    let write = kind & 1 != 0;
                    if !write {
                        let bytes = input.bytes(len);
                        let _ = memory.write_bytes(at, bytes);
                    }
                    let index = next % SIZE;
                    next = next.wrapping_add(1);
                    let more = u64::from(i + 1 < parts);
                    let flags = more | u64::from(write) << 1;
                    let link = u64::from(next % SIZE);
                    let rest = len as u64 | flags << 32 | link << 48;
                    let slot = l.desc + 16 * u64::from(index);
                    let _ = memory.write(slot, &[at, rest]);
                    at += len as u64;
                }
                if let Some(n) = offered.get_mut(q) {
                    let slot = l.avail + 4 + 2 * u64::from(*n % SIZE);
                    let _ = memory.write(slot, &head);
                    *n = n.wrapping_add(1);
                    let _ = memory.write(l.avail + 2, n);
                }
                shared.notify(q);
                shared.serve_here();
            }
            // Memory as no driver has it.
            4 => {
                let at = input.word() % MEMORY;
                let n = usize::from(input.byte() % 64);
                let _ = memory.write_bytes(at, input.bytes(n));
            }
            5 => {
                shared.notify(usize::from(step) >> 3);
                shared.serve_here();
            }
            6 => {
                let (at, value) = (u64::from(input.byte()), input.word());
                shared.config_write(at, 1 << (step >> 6), value, &writable);
                let _ = shared.config_read(at, 8);
                shared.serve_here();
            }
            _ => {
                shared.reset();
                let _ = memory.fill(0, BUFFERS, 0);
                offered.fill(0);
                start(&shared, queues, bits, features);
                shared.serve_here();
            }
        }
    }
}

fn memory() -> Option<GuestMemory> {
    GuestMemory::anonymous(MEMORY).ok()
}

/// virtio-blk on a file.
pub fn virtio_blk(data: &[u8]) {
    let (folder, Some(memory)) = (Folder::new(), memory()) else {
        return;
    };
    let path = folder.at("disk");
    if fs::write(&path, [0x5a; 65536]).is_ok()
        && let Ok(built) = blk::build(&path, 2)
    {
        drive(built, &memory, data);
        let len = fs::metadata(&path).map_or(0, |m| m.len());
        assert_eq!(len, 65536, "a disk keeps its size");
    }
}

/// virtio-9p on a folder beside which there is a secret.
pub fn virtio_9p(data: &[u8]) {
    let (folder, Some(memory)) = (Folder::new(), memory()) else {
        return;
    };
    let secret = folder.at("secret");
    let made = fs::write(&secret, b"secret").is_ok()
        && fs::write(folder.at("share/file"), b"content").is_ok()
        && std::os::unix::fs::symlink("../secret", folder.at("share/link")).is_ok();
    if made && let Ok(built) = p9::build(&format!("share={}", folder.at("share"))) {
        drive(built, &memory, data);
        assert_eq!(fs::read(&secret).ok().as_deref(), Some(&b"secret"[..]));
        let entries = fs::read_dir(&folder.0).map_or(0, Iterator::count);
        assert_eq!(entries, 2, "nothing new beside the share");
    }
}

/// virtio-console with two ports.
pub fn virtio_console(data: &[u8]) {
    let (folder, Some(memory)) = (Folder::new(), memory()) else {
        return;
    };
    let conf = format!("a={},b={}", folder.at("a"), folder.at("b"));
    if let Ok(built) = console::build(&conf) {
        let _peer = std::os::unix::net::UnixStream::connect(folder.at("a"));
        drive(built, &memory, data);
    }
}

/// virtio-balloon, with a machine that takes nothing back.
pub fn virtio_balloon(data: &[u8]) {
    let Some(memory) = memory() else { return };
    let machine: Arc<dyn Machine> = Arc::new(Silent);
    if let Ok(built) = balloon::build("", &machine, &memory) {
        drive(built, &memory, data);
    }
}

/// virtio-vsock with one program that listens.
pub fn virtio_vsock(data: &[u8]) {
    let (folder, Some(memory)) = (Folder::new(), memory()) else {
        return;
    };
    let _program = std::os::unix::net::UnixListener::bind(folder.at("v_1"));
    if let Ok(built) = vsock::build(&format!("path={}", folder.at("v"))) {
        drive(built, &memory, data);
    }
}
