//! Images that lie: whatever a byte says, there is an answer, soon.

use crate::tools::{run, text};
use bhyveload::disk::{ReadAt, Window};
use bhyveload::fs::iso9660::Iso9660;
use bhyveload::fs::ufs::Ufs;
use bhyveload::fs::{FileSystem, resolve};
use proptest::prelude::*;
use std::fs;
use std::ops::ControlFlow;
use std::sync::OnceLock;

/// A small image of each kind, as this machine's tools make it.
fn images() -> &'static [Vec<u8>] {
    static IMAGES: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    IMAGES.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        fs::create_dir_all(root.join("boot/kernel")).unwrap();
        fs::write(root.join("boot/kernel/kernel"), vec![7; 70_000]).unwrap();
        fs::write(root.join("boot/loader.conf"), "a=\"1\"\n").unwrap();
        std::os::unix::fs::symlink("boot/kernel", root.join("k")).unwrap();
        let image = dir.path().join("image");
        let mut made = Vec::new();
        for (tool, args) in [
            (
                "makefs",
                "-t ffs -B little -b 40% -o version=2,bsize=4096,fsize=512",
            ),
            (
                "makefs",
                "-t ffs -B little -b 40% -o version=1,bsize=4096,fsize=512",
            ),
            ("xorriso", "-as mkisofs -quiet -R -o"),
        ] {
            let mut words: Vec<&str> = args.split(' ').collect();
            let (image_name, root_name) = (text(&image), text(&root));
            words.extend([image_name, root_name]);
            if run(tool, &words, "").is_some() {
                made.push(fs::read(&image).unwrap());
            }
        }
        made
    })
}

/// Looks at everything; answers may be errors, but they must come.
fn look(image: &dyn ReadAt) {
    let mut systems: Vec<Box<dyn FileSystem + '_>> = Vec::new();
    if let Ok(Some(fs)) = Ufs::open(image) {
        systems.push(Box::new(fs));
    }
    if let Ok(Some(fs)) = Iso9660::open(image) {
        systems.push(Box::new(fs));
    }
    for fs in systems {
        for path in ["boot/kernel/kernel", "k/kernel", "boot/loader.conf"] {
            if let Ok(Some((node, _))) = resolve(&*fs, path.as_bytes()) {
                let _ = fs.read(node, 1 << 20);
            }
        }
        let mut nodes = Vec::new();
        let _ = fs.entries(fs.root(), &mut |_, node| {
            nodes.push(node);
            ControlFlow::Continue(())
        });
        for node in nodes {
            let _ = fs.attributes(node);
            let _ = fs.target(node);
        }
    }
    let _ = bhyveload::partition::all(image);
    let _ = bhyveload::disk::format::foreign(image);
    let _ = bhyveload::disk::format::container(image);
}

/// Where structures are: superblock, inodes, directory records of small images.
fn place(size: usize) -> impl Strategy<Value = usize> {
    prop_oneof![
        3 => 65536..(65536 + 1400).min(size),
        1 => 8192..8192 + 1400usize,
        3 => 32768..(32768 + 12288).min(size),
        3 => 65536..size.min(300_000),
        1 => 0..size,
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]
    #[test]
    fn any_word_of_an_image_may_be_anything(
        which in 0usize..3,
        changes in prop::collection::vec((place(100_000), prop_oneof![
            any::<u64>(), Just(u64::MAX), Just(0), Just(1), 0u64..4096
        ], 1usize..=8), 1..6),
        cut in prop_oneof![4 => Just(usize::MAX), 1 => 0usize..400_000],
    ) {
        let images = images();
        if let Some(image) = images.get(which) {
            let mut image = image.clone();
            for (at, value, len) in changes {
                if let Some(bytes) = image.get_mut(at..at + len) {
                    bytes.copy_from_slice(&value.to_le_bytes()[..len]);
                }
            }
            image.truncate(cut);
            look(&image);
        }
    }

    #[test]
    fn noise_is_answered(noise in prop::collection::vec(any::<u8>(), 0..70_000)) {
        look(&noise);
    }
}

/// Little-endian words into an image.
fn put(image: &mut [u8], at: usize, value: u64, len: usize) {
    image[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
}

/// A UFS2 image by hand: one cylinder group, inodes at fragment 40 (of 512 bytes).
fn ufs2() -> Vec<u8> {
    const SB: usize = 65536;
    let mut image = vec![0; 512 * 1024];
    for (at, value, len) in [
        (16, 160, 4),
        (44, 1, 4),
        (48, 4096, 4),
        (52, 512, 4),
        (184, 64, 4),
        (188, 1024, 4),
        (1000, SB as u64, 8),
        (1080, 1024, 8),
        (1320, 120, 4),
        (1372, 0x1954_0119, 4),
    ] {
        put(&mut image, SB + at, value, len);
    }
    inode(&mut image, 2, 0x41ed, 512, 300);
    let entries: &[(u32, &str)] = &[(2, "."), (2, ".."), (3, "f"), (4, "l")];
    let dir = 300 * 512;
    let mut at = dir;
    for (i, (ino, name)) in entries.iter().enumerate() {
        let last = i + 1 == entries.len();
        let len = if last { dir + 512 - at } else { 12 };
        put(&mut image, at, u64::from(*ino), 4);
        put(&mut image, at + 4, len as u64, 2);
        image[at + 7] = name.len() as u8;
        image[at + 8..at + 8 + name.len()].copy_from_slice(name.as_bytes());
        at += len;
    }
    image
}

const INODES: usize = 160 * 512;

fn inode(image: &mut [u8], number: usize, mode: u64, size: u64, first: u64) {
    let at = INODES + 256 * number;
    put(image, at, mode, 2);
    put(image, at + 16, size, 8);
    put(image, at + 112, first, 8);
}

fn open(image: &[u8]) -> Ufs<&[u8]> {
    Ufs::open(image).unwrap().unwrap()
}

#[test]
fn a_file_larger_than_the_image_is_refused_or_sparse() {
    let mut image = ufs2();
    inode(&mut image, 3, 0x81a4, u64::MAX, 0);
    let fs = open(&image);
    let (f, _) = resolve(&fs, b"f").unwrap().unwrap();
    assert_eq!(fs.read(f, 3 << 30).unwrap_err().field, "size");
    // All hole: allowed, and bounded by the limit.
    inode(&mut image, 3, 0x81a4, 1 << 20, 0);
    let fs = open(&image);
    assert_eq!(fs.read(f, 1 << 20).unwrap(), vec![0; 1 << 20]);
}

#[test]
fn blocks_outside_the_file_system_are_named() {
    for wild in [1024, 1020, u64::MAX, i64::MAX as u64, 1 << 55] {
        let mut image = ufs2();
        inode(&mut image, 3, 0x81a4, 4096, wild);
        let fault = open(&image).read(3, 1 << 20).unwrap_err();
        assert_eq!(fault.field, "inode 3", "{wild:#x}: {fault}");
    }
    // An inode number beyond the groups.
    let mut image = ufs2();
    put(&mut image, 300 * 512 + 24, 64, 4);
    let fault = resolve(&open(&image), b"f").unwrap_err();
    assert_eq!(fault.field, "inode 64");
}

#[test]
fn indirect_blocks_that_point_at_themselves_end() {
    let mut image = ufs2();
    // Triple indirection through one block full of its own address.
    for i in 0..512 {
        put(&mut image, 400 * 512 + 8 * i, 400, 8);
    }
    let reach = (12 + 512 + 512 * 512 + 3) * 4096;
    inode(&mut image, 3, 0x81a4, reach, 400);
    for i in 0..3 {
        put(&mut image, INODES + 256 * 3 + 208 + 8 * i, 400, 8);
    }
    let fs = open(&image);
    assert_eq!(fs.read(3, 1 << 20).unwrap_err().field, "size");
    put(
        &mut image,
        INODES + 256 * 3 + 16,
        (12 + 512 + 600) * 4096,
        8,
    );
    let data = open(&image).read(3, 8 << 20).unwrap();
    assert_eq!(data.len(), (12 + 512 + 600) * 4096);
}

#[test]
fn directories_that_are_damaged_or_endless_are_named() {
    // Entry lengths: none, odd, beyond the block; a name beyond its entry.
    for (at, value, len) in [(4, 0, 2), (4, 13, 2), (4, 516, 2), (4, 4, 2), (7, 200, 1)] {
        let mut image = ufs2();
        put(&mut image, 300 * 512 + at, value, len);
        let fault = resolve(&open(&image), b"f").unwrap_err();
        assert_eq!(fault.field, "directory 2", "{at} {value}");
    }
    let mut image = ufs2();
    inode(&mut image, 2, 0x41ed, u64::MAX, 300);
    assert!(resolve(&open(&image), b"f").is_err());
    inode(&mut image, 2, 0x41ed, 1 << 20, 300);
    let fault = resolve(&open(&image), b"nothing").unwrap_err();
    assert!(fault.problem.contains("hole"), "{fault}");
}

#[test]
fn symlinks_longer_than_their_inode_or_a_path_are_refused() {
    let mut image = ufs2();
    inode(&mut image, 4, 0xa1ff, 5000, 0);
    assert!(resolve(&open(&image), b"l").is_err());
    inode(&mut image, 4, 0xa1ff, 119, 0);
    image[INODES + 1024 + 112..INODES + 1024 + 112 + 120].fill(b'/');
    let (node, _) = resolve(&open(&image), b"l").unwrap().unwrap();
    assert_eq!(node, 2);
    // fs_maxsymlinklen says that more fits than an inode has.
    put(&mut image, 65536 + 1320, 4000, 4);
    inode(&mut image, 4, 0xa1ff, 1000, 300);
    assert!(open(&image).target(4).unwrap().len() == 1000);
}

#[test]
fn superblock_fields_are_checked() {
    for (at, value, field) in [
        (48, 3 << 20, "fs_bsize"),
        (48, 0, "fs_bsize"),
        (52, 0, "fs_fsize"),
        (52, 8192, "fs_fsize"),
        (44, 0, "fs_ncg"),
        (184, 0, "fs_ipg"),
        (188, 0xffff_ffff, "fs_fpg"),
        (1084, 0x7fff_ffff, "fs_size"),
    ] {
        let mut image = ufs2();
        put(&mut image, 65536 + at, value, 4);
        assert_eq!(Ufs::open(&image).unwrap_err().field, field);
    }
    let mut image = ufs2();
    image[65536 + 1372..65536 + 1376].reverse();
    assert_eq!(Ufs::open(&image).unwrap_err().field, "fs_magic");
    assert!(Ufs::open(&vec![0u8; 100]).unwrap().is_none());
}

#[test]
fn a_circle_of_rock_ridge_continuations_ends() {
    let Some(image) = images().get(2) else {
        return;
    };
    let mut image = image.clone();
    // Every NM becomes a CE that leads to a block with a CE to itself.
    let target = 200u32;
    let ce = |image: &mut [u8], at: usize| {
        image[at..at + 4].copy_from_slice(b"CE\x1c\x01");
        for (i, value) in [target, 0, 28].into_iter().enumerate() {
            put(image, at + 4 + 8 * i, u64::from(value), 4);
        }
    };
    let root = u32::from_le_bytes(image[32768 + 158..32768 + 162].try_into().unwrap());
    let start = root as usize * 2048;
    // The root's second entry that is not itself: its system use area.
    let mut at = start;
    for _ in 0..2 {
        at += usize::from(image[at]);
    }
    let name = usize::from(image[at + 32]);
    let area = at + (33 + name).next_multiple_of(2);
    ce(&mut image, area);
    ce(&mut image, target as usize * 2048);
    let window = Window::new(&image, 0, u64::MAX);
    let fs = Iso9660::open(&window).unwrap().unwrap();
    let fault = resolve(&fs, b"nothing").unwrap_err();
    assert_eq!(fault.field, "Rock Ridge CE");
}
