//! Damaged images: whatever the bytes, the answer is a load that stays within
//! guest memory or an error, and never a panic.

use crate::build::{MIB, bzimage, guest, input, kernel, kludge, module, multiboot_elf32};
use bhyveload::input::Input;
use bhyveload::target::MemoryTarget;
use bhyveload::{conf, freebsd, linux, multiboot};
use proptest::prelude::*;

/// Values that sit at the edges of what a loader computes with.
const EDGES: [u64; 12] = [
    0,
    1,
    0x7f,
    0xfff,
    0x1000,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x7fff_ffff_ffff_ffff,
    0xffff_ffff_8000_0000,
    0xffff_ffff_ffff_f000,
    u64::MAX,
];

/// Writes 1 to 8 bytes at some places near the headers or anywhere, then cuts the end off.
fn damage() -> impl Strategy<Value = Damage> {
    let value = prop_oneof![prop::sample::select(&EDGES[..]), any::<u64>()];
    let patch = (
        any::<prop::sample::Index>(),
        any::<bool>(),
        value,
        1usize..=8,
    );
    (
        prop::collection::vec(patch, 1..4),
        prop::option::weighted(0.2, any::<prop::sample::Index>()),
    )
}

/// Where (in the tables, or anywhere), what, how many bytes of it.
type Patch = (prop::sample::Index, bool, u64, usize);
/// Patches, and where the file ends if it is cut.
type Damage = (Vec<Patch>, Option<prop::sample::Index>);

fn apply(mut file: Vec<u8>, (patches, cut): &Damage, tables: std::ops::Range<usize>) -> Vec<u8> {
    for (place, in_tables, value, length) in patches {
        let at = if *in_tables {
            tables.start + place.index(tables.len())
        } else {
            place.index(file.len())
        };
        for (slot, byte) in file[at..].iter_mut().zip(value.to_le_bytes()).take(*length) {
            *slot = byte;
        }
    }
    if let Some(cut) = cut {
        file.truncate(cut.index(file.len()));
    }
    file
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn kernels(damage in damage()) {
        let mut boot = guest();
        boot.modules.clear();
        boot.kernel.data = apply(kernel(), &damage, 16..64 + 112);
        match freebsd::load(&mut MemoryTarget::new(4 * MIB), &boot) {
            Ok(loaded) => prop_assert!(loaded.kernend <= 4 * MIB as u64),
            Err(error) => prop_assert_eq!(error.file, "kernel"),
        }
    }

    #[test]
    fn modules(damage in damage()) {
        let mut boot = guest();
        let file = module();
        let tables = file.len() - 640..file.len();
        boot.modules[0].input.data = apply(file, &damage, tables);
        match freebsd::load(&mut MemoryTarget::new(4 * MIB), &boot) {
            Ok(loaded) => prop_assert!(loaded.kernend <= 4 * MIB as u64),
            Err(error) => prop_assert!(error.file == "foo.ko" || error.file == "root.img"),
        }
    }

    #[test]
    fn bzimages(damage in damage()) {
        let boot = linux::Linux {
            kernel: input("bzImage", apply(bzimage(), &damage, 0x1f1..0x268)),
            initrd: Some(input("initrd", vec![1; 100])),
            command_line: "x".to_owned(),
        };
        if let Err(error) = linux::load(&mut MemoryTarget::new(8 * MIB), &boot) {
            prop_assert!(!error.field.is_empty() && error.file != "VM", "{}", error);
        }
    }

    #[test]
    fn multiboot_files(damage in damage(), elf in any::<bool>()) {
        let file = if elf { multiboot_elf32() } else { kludge() };
        let boot = multiboot::Multiboot {
            kernel: input("k", apply(file, &damage, 16..48)),
            modules: vec![(input("m", vec![2; 10]), "m".to_owned())],
            command_line: "x".to_owned(),
        };
        if let Err(error) = multiboot::load(&mut MemoryTarget::new(8 * MIB), &boot) {
            prop_assert!(!error.field.is_empty() && error.file != "VM", "{}", error);
        }
    }

    #[test]
    fn gzip_files(data in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut file = vec![0x1f, 0x8b];
        file.extend(data);
        if let Err(error) = (Input { name: "z".to_owned(), data: file }).decompressed(1000) {
            prop_assert_eq!(error.file, "z");
        }
    }

    #[test]
    fn configuration_files(text in "[a-z_=\"\\\\# \n]{0,60}") {
        let parsed = conf::parse(&text);
        assert!(parsed.settings.len() + parsed.bad.len() <= text.lines().count());
    }
}
