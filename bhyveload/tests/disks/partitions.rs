use crate::tools::{run, text};
use bhyveload::disk::{ReadAt, Window, array};
use bhyveload::partition::{Kind, Partition, all, bsd, gpt};
use std::fs;

const MIB: usize = 1 << 20;

/// A disk of `mib` MiB partitioned by sfdisk(8).
fn sfdisk(mib: usize, script: &str) -> Option<Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk");
    fs::write(&image, vec![0; mib * MIB]).unwrap();
    run("sfdisk", &["-q", "--no-reread", text(&image)], script)?;
    Some(fs::read(&image).unwrap())
}

fn names(partitions: &[Partition]) -> Vec<(&str, Kind, u64, u64)> {
    partitions
        .iter()
        .map(|p| (p.name.as_str(), p.kind, p.start >> 20, p.size >> 20))
        .collect()
}

const UFS: &str = "516E7CB6-6ECF-11D6-8FF8-00022D09712B";
const GPT: &str = "label: gpt\n\
    start=2048,size=2048,type=83BD6B9D-7F41-11DC-BE0B-001560B84F0F\n\
    start=4096,size=8192,type=516E7CB6-6ECF-11D6-8FF8-00022D09712B,attrs=GUID:59\n\
    start=12288,size=2048,type=516E7CB5-6ECF-11D6-8FF8-00022D09712B\n\
    start=14336,size=2048,type=516E7CBA-6ECF-11D6-8FF8-00022D09712B\n\
    start=16384,size=2048,type=U\n";

#[test]
fn gpt_with_freebsds_types_and_its_bootme() {
    let Some(disk) = sfdisk(10, GPT) else {
        return;
    };
    let (found, damage) = all(&disk).unwrap();
    assert_eq!(
        names(&found),
        [
            ("", Kind::Other, 0, 10),
            ("p1", Kind::Boot, 1, 1),
            ("p2", Kind::Ufs, 2, 4),
            ("p3", Kind::Swap, 6, 1),
            ("p4", Kind::Zfs, 7, 1),
            ("p5", Kind::Efi, 8, 1),
        ]
    );
    assert_eq!(damage, Vec::<String>::new());
    let preferred: Vec<_> = found.iter().filter(|p| p.preferred).collect();
    assert_eq!(preferred.len(), 1);
    assert_eq!(preferred[0].name, "p2");
}

#[test]
fn the_backup_stands_in_for_a_damaged_table_and_damage_of_both_is_named() {
    let Some(mut disk) = sfdisk(10, GPT) else {
        return;
    };
    // The first entry's start.
    disk[1024 + 32] ^= 1;
    assert_eq!(all(&disk).unwrap().0.len(), 6);
    disk[512 + 40] ^= 1;
    assert_eq!(all(&disk).unwrap().0.len(), 6);
    let end = disk.len();
    disk[end - 512 + 24] ^= 1;
    let fault = gpt::partitions(&disk).unwrap_err();
    assert!(fault.field.contains("CRC32"), "{fault}");
    let (found, damage) = all(&disk).unwrap();
    // What is left is the protective MBR, and that protects nothing.
    assert_eq!(names(&found), [("", Kind::Other, 0, 10)]);
    assert_eq!(damage.len(), 1);
}

#[test]
fn a_table_that_says_more_than_there_is_ends_at_the_image() {
    let Some(mut disk) = sfdisk(
        10,
        &format!("label: gpt\nstart=2048,size=14336,type={UFS}\n"),
    ) else {
        return;
    };
    disk.truncate(4 * MIB);
    let (found, _) = all(&disk).unwrap();
    assert_eq!(names(&found)[1], ("p1", Kind::Ufs, 1, 3));
    disk.truncate(MIB);
    assert_eq!(all(&disk).unwrap().0.len(), 1);
}

/// A disklabel by the definition in sys/disklabel.h: `a` and `c`, offsets from `base`.
fn label(base: u32, sectors: u32) -> Vec<u8> {
    let mut label = vec![0u8; 512];
    let mut put = |at: usize, value: u32| {
        label[at..at + 4].copy_from_slice(&value.to_le_bytes());
    };
    put(0, 0x8256_4557);
    put(40, 512);
    put(132, 0x8256_4557);
    put(148, sectors - 2048);
    put(152, base + 2048);
    put(148 + 32, sectors);
    put(152 + 32, base);
    put(148 + 48, 100);
    put(152 + 48, base + 4096);
    label[138] = 4;
    label[148 + 12] = 7;
    label[148 + 48 + 12] = 1;
    let sum = label
        .chunks(2)
        .fold(0, |sum, w| sum ^ u16::from_le_bytes([w[0], w[1]]));
    label[136..138].copy_from_slice(&sum.to_le_bytes());
    label
}

#[test]
fn slices_logical_drives_and_labels_with_both_kinds_of_offsets() {
    let script = "label: dos\n\
        start=2048,size=8192,type=a5,bootable\n\
        start=10240,size=2048,type=83\n\
        start=12288,size=8192,type=5\n\
        start=14336,size=2048,type=a5\n\
        start=18432,size=1024,type=c\n";
    for base in [0, 2048] {
        let Some(mut disk) = sfdisk(10, script) else {
            return;
        };
        disk[MIB + 512..MIB + 1024].copy_from_slice(&label(base, 8192));
        let (found, damage) = all(&disk).unwrap();
        assert_eq!(damage, Vec::<String>::new());
        assert_eq!(
            names(&found),
            [
                ("", Kind::Other, 0, 10),
                ("s1", Kind::FreeBsd, 1, 4),
                ("s1a", Kind::Ufs, 2, 3),
                ("s1d", Kind::Swap, 3, 0),
                ("s2", Kind::Other, 5, 1),
                ("s5", Kind::FreeBsd, 7, 1),
                ("s6", Kind::Other, 9, 0),
            ]
        );
        assert!(found[1].preferred && found[2].preferred && !found[5].preferred);
        disk[MIB + 512 + 150] ^= 1;
        let (found, damage) = all(&disk).unwrap();
        assert_eq!(found.len(), 5);
        assert!(damage[0].contains("d_checksum"), "{damage:?}");
    }
}

#[test]
fn a_dedicated_disk_has_its_label_without_a_slice() {
    let mut disk = vec![0; 8 * MIB];
    disk[512..1024].copy_from_slice(&label(0, 16384));
    let (found, _) = all(&disk).unwrap();
    assert_eq!(names(&found)[1], ("a", Kind::Ufs, 1, 7));
}

#[test]
fn a_chain_of_logical_drives_that_turns_back_ends() {
    let mut disk = vec![0; MIB];
    let mut entry = |sector: usize, slot: usize, kind: u8, first: u32| {
        let at = 512 * sector + 446 + 16 * slot;
        disk[at + 4] = kind;
        disk[at + 8..at + 12].copy_from_slice(&first.to_le_bytes());
        disk[at + 12..at + 16].copy_from_slice(&1u32.to_le_bytes());
        disk[512 * sector + 510..512 * sector + 512].copy_from_slice(&[0x55, 0xaa]);
    };
    entry(0, 0, 5, 8);
    entry(8, 0, 0xa5, 1);
    entry(8, 1, 5, 4);
    entry(12, 1, 5, 4);
    let (found, _) = all(&disk).unwrap();
    assert!(found.len() < 100, "{}", found.len());
}

#[test]
fn offsets_at_the_end_of_the_world_are_no_partitions() {
    let mut wild = label(0, 16384);
    for at in (148..212).step_by(4) {
        wild[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
    }
    let sum = wild
        .chunks(2)
        .fold(0, |sum, w| sum ^ u16::from_le_bytes([w[0], w[1]]));
    let old = u16::from_le_bytes([wild[136], wild[137]]);
    wild[136..138].copy_from_slice(&(sum ^ old).to_le_bytes());
    let slice = [vec![0; 512], wild, vec![0; 4096]].concat();
    let found = bsd::partitions(&slice, 0).unwrap().unwrap();
    assert_eq!(found, []);
    let window = Window::new(&slice, 512, 100);
    assert_eq!(window.size(), 100);
    assert!(array::<101>(&window, 0).is_err());
}
