use crate::tools::{check, get, run, text, tree};
use bhyveload::disk::file::FileImage;
use bhyveload::fs::ufs::{Ufs, Version};

/// Makes an image with FreeBSD's own makefs(8) and reads all of it back.
fn round_trip(version: Version, options: &str, sparse: u64) {
    let tree = tree(sparse);
    let made = run(
        "makefs",
        &[
            "-t",
            "ffs",
            "-B",
            "little",
            "-o",
            options,
            "-b",
            "10%",
            "-f",
            "1000",
            text(&tree.image()),
            text(&tree.root()),
        ],
        "",
    );
    if made.is_none() {
        return;
    }
    let fs = Ufs::open(FileImage::open(&tree.image()).unwrap())
        .unwrap()
        .unwrap();
    assert_eq!(fs.superblock().version, version);
    check(&tree, &fs);
    let end = get(&fs, "sparse").unwrap();
    assert_eq!(end.len() as u64, sparse + 7);
    assert!(end.ends_with(b"\0\0the end"));
    assert!(end[..sparse as usize].iter().all(|&b| b == 0));
}

#[test]
fn ufs2_with_blocks_of_32_kib() {
    round_trip(Version::Ufs2, "version=2,bsize=32768,fsize=4096", 3 << 20);
}

#[test]
fn ufs2_with_small_blocks_reaches_double_indirection() {
    round_trip(Version::Ufs2, "version=2,bsize=4096,fsize=512", 9 << 20);
}

#[test]
fn ufs1() {
    round_trip(Version::Ufs1, "version=1,bsize=8192,fsize=1024", 20 << 20);
}
