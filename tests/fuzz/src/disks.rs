//! Disk images and folders, as bhyveload's loader meets them.

use bhyveload::console::{Console, Key};
use bhyveload::disk::{ReadAt, format};
use bhyveload::disks::{Device, Devices};
use bhyveload::error::LoadError;
use bhyveload::fs::iso9660::Iso9660;
use bhyveload::fs::ufs::Ufs;
use bhyveload::fs::{Attributes, FileSystem, FileType, resolve};
use bhyveload::input::Input;
use bhyveload::loader::Loader;
use bhyveload::volume::{Listed, Volume};
use bhyveload::{linkerhints, partition};
use std::ops::ControlFlow;
use std::time::Duration;

/// Largest image, in KiB.
const LARGEST: usize = 1024;
/// Most bytes of a file that is read.
const LIMIT: u64 = 1 << 20;

/// An image of few words: its size in KiB (u16), and then pieces, each with its
/// offset (u32), length (u16) and bytes. Everything else is zero.
fn image(data: &[u8]) -> Vec<u8> {
    let Some((size, mut rest)) = data.split_first_chunk::<2>() else {
        return Vec::new();
    };
    let size = usize::from(u16::from_le_bytes(*size)).min(LARGEST);
    let mut image = vec![0; size * 1024];
    while let Some((head, bytes)) = rest.split_first_chunk::<6>() {
        let offset = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
        let length = usize::from(u16::from_le_bytes([head[4], head[5]])).min(bytes.len());
        let (piece, after) = bytes.split_at(length);
        if let Some(place) = image.get_mut(offset..offset.saturating_add(length)) {
            place.copy_from_slice(piece);
        }
        rest = after;
    }
    image
}

/// Walks a file system as somebody does who looks for a kernel.
fn walk(fs: &dyn FileSystem) {
    for path in ["boot/kernel/kernel", "k/kernel", "boot/loader.conf", "l"] {
        if let Ok(Some((node, attributes))) = resolve(fs, path.as_bytes())
            && let Ok(data) = fs.read(node, LIMIT)
        {
            assert!(data.len() as u64 <= LIMIT);
            assert_eq!(data.len() as u64, attributes.size);
        }
    }
    let mut nodes = Vec::new();
    let _ = fs.entries(fs.root(), &mut |name, node| {
        assert!(!name.contains(&b'/') && !name.is_empty());
        nodes.push(node);
        if nodes.len() < 1000 {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    });
    for node in nodes {
        let _ = fs.attributes(node);
        let _ = fs.target(node);
        let _ = fs.entries(node, &mut |_, _| ControlFlow::Continue(()));
    }
}

/// A UFS image.
pub fn ufs(data: &[u8]) {
    if let Ok(Some(fs)) = Ufs::open(image(data)) {
        walk(&fs);
    }
}

/// An ISO 9660 image.
pub fn iso9660(data: &[u8]) {
    if let Ok(Some(fs)) = Iso9660::open(image(data)) {
        walk(&fs);
    }
}

/// Sets the checksums of a GPT right, where there is one: no fuzzer would.
fn seal(image: &mut [u8]) {
    let sum = |bytes: &[u8]| {
        !bytes.iter().fold(u32::MAX, |crc, &byte| {
            (0..8).fold(crc ^ u32::from(byte), |crc, _| {
                (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg())
            })
        })
    };
    if image.len() < 1024 || image[512..520] != *b"EFI PART" {
        return;
    }
    let word = |at: usize| u32::from_le_bytes(image[at..at + 4].try_into().unwrap_or_default());
    let (start, count, size) = (
        word(512 + 72) as usize * 512,
        word(512 + 80),
        word(512 + 84),
    );
    let table = (count as usize)
        .checked_mul(size as usize)
        .filter(|&length| length <= 16384)
        .and_then(|length| image.get(start..start + length));
    if let Some(table) = table {
        let crc = sum(table).to_le_bytes();
        image[512 + 88..512 + 92].copy_from_slice(&crc);
    }
    image[512 + 16..512 + 20].fill(0);
    let crc = sum(&image[512..512 + 92]).to_le_bytes();
    image[512 + 16..512 + 20].copy_from_slice(&crc);
}

/// Partition tables and what else an image is recognised by.
pub fn partitions(data: &[u8]) {
    let mut image = image(data);
    seal(&mut image);
    let _ = format::container(&image);
    let _ = format::foreign(&image);
    let disk: &dyn ReadAt = &image;
    let (found, _) = partition::all(disk).expect("memory can be read");
    for part in found {
        assert!(
            part.start
                .checked_add(part.size)
                .is_some_and(|end| end <= disk.size())
        );
    }
}

/// `linker.hints`.
pub fn linker_hints(data: &[u8]) {
    for hint in linkerhints::parse(data).unwrap_or_default() {
        assert!(!hint.file.contains('/'));
    }
}

/// A folder with a kernel and whatever files the input has.
struct Memory(Vec<(&'static str, Vec<u8>)>);

impl Memory {
    fn find(&self, path: &str) -> Option<&[u8]> {
        let path = path.trim_matches('/');
        let (_, data) = self.0.iter().find(|(name, _)| *name == path)?;
        Some(data)
    }
}

impl Volume for Memory {
    fn describe(&self, path: &str) -> String {
        path.to_owned()
    }

    fn attributes(&self, path: &str) -> Result<Option<Attributes>, LoadError> {
        Ok(self.find(path).map(|data| Attributes {
            kind: FileType::File,
            size: data.len() as u64,
        }))
    }

    fn read(&self, path: &str, limit: u64) -> Result<Option<Input>, LoadError> {
        Ok(self
            .find(path)
            .filter(|data| data.len() as u64 <= limit)
            .map(|data| Input {
                name: path.to_owned(),
                data: data.to_vec(),
            }))
    }

    fn list(&self, path: &str) -> Result<Option<Vec<Listed>>, LoadError> {
        Ok((path.trim_matches('/') == "boot/loader.conf.d").then(|| {
            vec![Listed {
                name: "a.conf".to_owned(),
                kind: FileType::File,
                size: 1,
            }]
        }))
    }
}

/// Plays keys; nobody reads what is said.
struct Keys<'a> {
    keys: std::slice::Iter<'a, u8>,
    terminal: bool,
    said: usize,
}

impl Console for Keys<'_> {
    fn print(&mut self, text: &str) -> Result<(), LoadError> {
        self.said += text.len();
        assert!(self.said < 64 << 20, "endless output");
        Ok(())
    }

    fn erase(&mut self) -> Result<(), LoadError> {
        Ok(())
    }

    fn key(&mut self, _: Option<Duration>) -> Result<Key, LoadError> {
        Ok(self.keys.next().map_or(Key::End, |&key| Key::Byte(key)))
    }

    fn is_terminal(&self) -> bool {
        self.terminal
    }
}

/// `loader.conf` and what it names, and keys pressed: the parts of the input
/// between 0xff bytes.
pub fn loader(data: &[u8]) {
    let mut parts = data.split(|&b| b == 0xff).map(<[u8]>::to_vec);
    let mut part = || parts.next().unwrap_or_default();
    let keys = part();
    let mut files = vec![(
        "boot/kernel/kernel",
        include_bytes!("../corpus/elf_kernel/plain").to_vec(),
    )];
    for name in [
        "boot/loader.conf",
        "boot/loader.conf.local",
        "boot/loader.conf.d/a.conf",
        "boot/nextboot.conf",
        "boot/include",
        "etc/fstab",
        "boot/kernel/linker.hints",
        "boot/kernel/m.ko",
    ] {
        files.push((name, part()));
    }
    let devices = Devices {
        list: vec![Device {
            name: "disk0".to_owned(),
            what: "memory".to_owned(),
            obstacle: None,
            preferred: false,
            volume: Some(Box::new(Memory(files))),
        }],
        warnings: Vec::new(),
    };
    let mut console = Keys {
        terminal: keys.first().is_some_and(|key| key & 1 != 0),
        keys: keys.iter(),
        said: 0,
    };
    if let Ok(mut loader) = Loader::new(&mut console, devices, Vec::new(), LIMIT) {
        let _ = loader.run();
    }
}
