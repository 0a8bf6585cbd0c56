use crate::tools::{check, get, run, text, tree};
use bhyveload::disk::file::FileImage;
use bhyveload::fs::iso9660::Iso9660;

#[test]
fn rock_ridge_names_symlinks_and_deep_directories() {
    let tree = tree(1 << 20);
    let (image, root) = (tree.image(), tree.root());
    let args = [
        "-as",
        "mkisofs",
        "-quiet",
        "-R",
        "-o",
        text(&image),
        text(&root),
    ];
    if run("xorriso", &args, "").is_none() {
        return;
    }
    let fs = Iso9660::open(FileImage::open(&image).unwrap())
        .unwrap()
        .unwrap();
    check(&tree, &fs);
}

#[test]
fn makefs_writes_what_is_read_as_well() {
    let tree = tree(1 << 20);
    let (image, root) = (tree.image(), tree.root());
    let args = ["-t", "cd9660", "-o", "rockridge", text(&image), text(&root)];
    if run("makefs", &args, "").is_none() {
        return;
    }
    let fs = Iso9660::open(FileImage::open(&image).unwrap())
        .unwrap()
        .unwrap();
    // makefs puts neither long symlinks nor directories that deep on a CD right.
    for path in [
        "boot/kernel/kernel",
        "boot/loader.conf",
        "many/file-number-33",
    ] {
        let data = &tree.files.iter().find(|(p, _)| p == path).unwrap().1;
        assert!(get(&fs, path).as_ref() == Some(data), "{path}");
    }
}

#[test]
fn plain_names_are_found_in_small_letters() {
    let tree = tree(1);
    let (image, root) = (tree.image(), tree.root());
    let script = format!(
        "-rockridge off -outdev stdio:{} -map {} / -commit -end",
        text(&image),
        text(&root)
    );
    let words: Vec<&str> = script.split(' ').collect();
    if run("xorriso", &words, "").is_none() {
        return;
    }
    let fs = Iso9660::open(FileImage::open(&image).unwrap())
        .unwrap()
        .unwrap();
    assert_eq!(get(&fs, "BOOT/loader.CONF").unwrap(), b"a=\"1\"\n");
    assert_eq!(get(&fs, "boot/kernel/kernel").unwrap().len(), 3_000_001);
}
