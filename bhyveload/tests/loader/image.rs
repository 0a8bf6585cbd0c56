//! Disk images from end to end, and those that are refused.

use crate::script::{Script, boot, elf, folder, load, text};
use std::path::Path;
use std::process::Command;

/// Runs a tool; `None` where there is none.
fn tool(name: &str, args: &[&str]) -> Option<()> {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap());
    match Command::new(name).args(args).env("PATH", path).output() {
        Ok(output) if output.status.success() => Some(()),
        Ok(output) => panic!("{name}: {}", String::from_utf8_lossy(&output.stderr)),
        Err(e) => {
            println!("{name}: {e}: not tested");
            None
        }
    }
}

fn tree(root: &str) -> tempfile::TempDir {
    folder(&[
        ("boot/kernel/kernel", &elf(2, 7)),
        ("boot/loader.conf", b"where=\"$currdev\"\n"),
        ("etc/fstab", root.as_bytes()),
    ])
}

/// A UFS image of a root whose fstab says `root`.
fn ufs(image: &Path, root: &str) -> Option<()> {
    let tree = tree(root);
    let args = [
        "-t",
        "ffs",
        "-o",
        "version=2",
        "-s",
        "2m",
        text(image),
        text(tree.path()),
    ];
    tool("makefs", &args)
}

/// A GPT with these file systems by an entry each, type and contents. By hand:
/// sfdisk wants a file and its own alignment.
fn gpt(parts: &[(u32, Vec<u8>)]) -> Vec<u8> {
    gpt_of_sectors(512, parts)
}

fn gpt_of_sectors(sector: usize, parts: &[(u32, Vec<u8>)]) -> Vec<u8> {
    let mut disk = vec![0u8; 34 * sector];
    let mut table = vec![0u8; 128 * 128];
    for (i, (kind, data)) in parts.iter().enumerate() {
        let first = (disk.len() / sector) as u64;
        disk.extend_from_slice(data);
        disk.resize(disk.len().next_multiple_of(sector), 0);
        let last = (disk.len() / sector) as u64 - 1;
        let entry = &mut table[128 * i..];
        entry[..4].copy_from_slice(&kind.to_le_bytes());
        entry[4..16].copy_from_slice(&[
            0xcf, 0x6e, 0xd6, 0x11, 0x8f, 0xf8, 0x00, 0x02, 0x2d, 0x09, 0x71, 0x2b,
        ]);
        entry[32..40].copy_from_slice(&first.to_le_bytes());
        entry[40..48].copy_from_slice(&last.to_le_bytes());
    }
    let sum = |bytes: &[u8]| {
        let mut crc = flate2::Crc::new();
        crc.update(bytes);
        crc.sum().to_le_bytes()
    };
    let mut header = b"EFI PART\0\0\x01\0\x5c\0\0\0".to_vec();
    header.resize(92, 0);
    header[72] = 2;
    header[80] = 128;
    header[84] = 128;
    header[88..92].copy_from_slice(&sum(&table));
    let crc = sum(&header);
    header[16..20].copy_from_slice(&crc);
    disk[sector..sector + 92].copy_from_slice(&header);
    disk[2 * sector..2 * sector + table.len()].copy_from_slice(&table);
    disk.resize(disk.len() + 33 * sector, 0);
    disk
}

const UFS: u32 = 0x516e_7cb6;
const ZFS: u32 = 0x516e_7cba;
const SWAP: u32 = 0x516e_7cb5;

#[test]
fn the_first_disk_that_boots_is_booted_and_others_can_be_named() {
    let top = tempfile::tempdir().unwrap();
    let part = top.path().join("part");
    if ufs(&part, "/dev/vtbd0p2 / ufs rw 1 1\n").is_none() {
        return;
    }
    let data = std::fs::read(&part).unwrap();
    let (one, two) = (top.path().join("one"), top.path().join("two"));
    std::fs::write(&one, gpt(&[(SWAP, vec![0; 4096]), (UFS, data)])).unwrap();
    ufs(&two, "/dev/vtbd1 / ufs ro 1 1\n").unwrap();
    let (guest, said) = boot(&["-d", text(&one), "-d", text(&two)]);
    assert_eq!(guest.kernel.data, elf(2, 7));
    let get = |name| guest.environment.get(name);
    assert_eq!(get("where"), Some("disk0p2:"), "{said}");
    assert_eq!(get("vfs.root.mountfrom"), Some("ufs:/dev/vtbd0p2"));
    let mut script =
        Script::new("lsdev\nset currdev=disk1:\nls boot\nload disk0p2:/boot/kernel/kernel\nboot\n");
    let line = [
        "-d",
        text(&one),
        "-d",
        text(&two),
        "-e",
        "autoboot_delay=NO",
    ];
    let bhyveload::loader::Outcome::Boot(guest) = load(&line, &mut script).unwrap() else {
        panic!("{}", script.said);
    };
    assert_eq!(guest.kernel_name, "/boot/kernel/kernel");
    assert_eq!(
        guest.environment.get("vfs.root.mountfrom"),
        Some("ufs:/dev/vtbd1")
    );
    for wanted in [
        "* disk0p2: UFS2",
        "  disk0p1: freebsd-swap",
        "  disk1: UFS2, whole disk",
    ] {
        assert!(script.said.contains(wanted), "{wanted}: {}", script.said);
    }
}

#[test]
fn install_media_boot_from_their_cd_file_system() {
    let top = tempfile::tempdir().unwrap();
    let image = top.path().join("disc1.iso");
    let tree = tree("/dev/iso9660/12_1_RELEASE_AMD64_CD / cd9660 ro 0 0\n");
    let args = [
        "-as",
        "mkisofs",
        "-quiet",
        "-R",
        "-o",
        text(&image),
        text(tree.path()),
    ];
    if tool("xorriso", &args).is_none() {
        return;
    }
    let (guest, said) = boot(&["-d", text(&image)]);
    assert!(said.contains("disk0 (ISO 9660"), "{said}");
    assert_eq!(
        guest.environment.get("vfs.root.mountfrom"),
        Some("cd9660:/dev/iso9660/12_1_RELEASE_AMD64_CD")
    );
}

#[test]
fn what_cannot_be_booted_is_named_with_the_way_out() {
    let top = tempfile::tempdir().unwrap();
    let image = top.path().join("image");
    let mut pool = vec![0u8; 300 * 1024];
    pool[128 * 1024..128 * 1024 + 8].copy_from_slice(&0x00ba_b10c_u64.to_le_bytes());
    let mut geli = vec![0u8; 64 * 1024];
    let last = geli.len() - 512;
    geli[last..last + 9].copy_from_slice(b"GEOM::ELI");
    let mut damaged = vec![0u8; 128 * 1024];
    damaged[65536 + 1000..65536 + 1008].copy_from_slice(&65536u64.to_le_bytes());
    damaged[65536 + 1372..65536 + 1376].copy_from_slice(&0x1954_0119u32.to_le_bytes());
    for (data, wanted) in [
        // A disk with sectors of 4 KiB.
        (
            gpt_of_sectors(4096, &[(SWAP, vec![0; 4096]), (ZFS, pool.clone())]),
            &["ZFS", "disk0p2"][..],
        ),
        (gpt(&[(ZFS, pool.clone())]), &["ZFS", "disk0p1", "-h"][..]),
        (pool, &["ZFS", "disk0 "]),
        (gpt(&[(UFS, geli)]), &["encrypted", "GELI", "disk0p1"]),
        (gpt(&[(UFS, damaged)]), &["damaged: fs_bsize"]),
        (
            gpt(&[(SWAP, vec![0; 4096])]),
            &["no UFS or ISO 9660", "freebsd-swap"],
        ),
        (
            b"QFI\xfb\0\0\0\x03".to_vec(),
            &["qcow2", "qemu-img convert"],
        ),
        (b"KDMV\x01\0\0\0".to_vec(), &["VMDK", "qemu-img convert"]),
        (b"\xfd7zXZ\0\0".to_vec(), &["xz", "unxz"]),
        (Vec::new(), &["is empty"]),
    ] {
        std::fs::write(&image, &data).unwrap();
        let error = load(&["-d", text(&image)], &mut Script::new("")).unwrap_err();
        for word in wanted {
            assert!(error.to_string().contains(word), "{word}: {error}");
        }
    }
    let error = load(&["-d", "/nonexistent/image"], &mut Script::new("")).unwrap_err();
    assert!(error.to_string().contains("/nonexistent/image"), "{error}");
}

#[test]
fn stocks_loader_library_is_taken_for_the_built_in_one_and_others_refused() {
    use bhyveload::cli::Cli;
    use clap::Parser;
    let check = |loader: &str| {
        Cli::try_parse_from(["bhyveload", "-l", loader, "-d", "x", "vm"])
            .unwrap()
            .check()
    };
    let warning = check("/boot/userboot_lua.so").unwrap().unwrap();
    assert!(warning.contains("no scripts"), "{warning}");
    let error = check("/usr/local/grub.so").unwrap_err();
    assert!(error.to_string().contains("leave -l away"), "{error}");
}
