use crate::build::{ENTRY, MIB, STRINGS, SYMBOLS, guest, kernel, module};
use bhyveload::freebsd::{KERNBASE, load};
use bhyveload::layout::{le32, le64};
use bhyveload::preload::{
    ADDR, ARGS, MD_CTORS_ADDR, MD_CTORS_SIZE, MD_DYNAMIC, MD_ELFHDR, MD_ENVP, MD_ESYM, MD_HOWTO,
    MD_KERNEND, MD_SHDR, MD_SMAP, MD_SSYM, METADATA, NAME, SIZE, TYPE,
};
use bhyveload::target::{MemoryTarget, Register};

/// The records of each file, as a kernel walks them from `modulep`.
fn walk(memory: &[u8], modulep: u64) -> Vec<Vec<(u32, Vec<u8>)>> {
    let mut files: Vec<Vec<(u32, Vec<u8>)>> = Vec::new();
    let mut at = modulep as usize;
    loop {
        let kind = le32(memory, at).unwrap();
        let size = le32(memory, at + 4).unwrap() as usize;
        if (kind, size) == (0, 0) {
            return files;
        }
        let record = (kind, memory[at + 8..at + 8 + size].to_vec());
        if kind == NAME {
            files.push(Vec::new());
        }
        files.last_mut().unwrap().push(record);
        at = (at + 8 + size).next_multiple_of(8);
    }
}

fn get(file: &[(u32, Vec<u8>)], kind: u32) -> Option<&[u8]> {
    file.iter().find(|r| r.0 == kind).map(|r| r.1.as_slice())
}

fn word(file: &[(u32, Vec<u8>)], kind: u32) -> u64 {
    le64(get(file, kind).unwrap(), 0).unwrap()
}

fn text(file: &[(u32, Vec<u8>)], kind: u32) -> &str {
    let bytes = get(file, kind).unwrap();
    let (nul, text) = bytes.split_last().unwrap();
    assert_eq!(*nul, 0);
    std::str::from_utf8(text).unwrap()
}

struct Booted {
    target: MemoryTarget,
    files: Vec<Vec<(u32, Vec<u8>)>>,
}

fn boot(tune: impl FnOnce(&mut bhyveload::freebsd::FreeBsd, &mut MemoryTarget)) -> Booted {
    let mut target = MemoryTarget::new(16 * MIB);
    let mut guest = guest();
    tune(&mut guest, &mut target);
    load(&mut target, &guest).unwrap();
    // The kernel finds the list through the words at RSP, and nothing else.
    let modulep = le32(&target.memory, 0x1004).unwrap();
    let files = walk(&target.memory, u64::from(modulep));
    Booted { target, files }
}

fn environment(booted: &Booted) -> Vec<String> {
    let at = word(&booted.files[0], METADATA | MD_ENVP) as usize;
    let memory = &booted.target.memory[at..];
    let end = memory.windows(2).position(|w| w == [0, 0]).unwrap();
    memory[..end]
        .split(|&b| b == 0)
        .map(|v| String::from_utf8(v.to_vec()).unwrap())
        .collect()
}

#[test]
fn the_kernel_lies_where_it_is_linked_with_its_bss_cleared() {
    let Booted { target, files } = boot(|_, _| {});
    let text: Vec<u8> = (0..100).collect();
    assert_eq!(target.memory[0x20_0000..0x20_0064], text);
    assert!(target.memory[0x20_0064..0x20_1003].iter().all(|&b| b == 0));
    assert_eq!(self::text(&files[0], NAME), "/boot/kernel/kernel");
    assert_eq!(self::text(&files[0], TYPE), "elf kernel");
    assert_eq!(word(&files[0], ADDR), 0x20_0000);
    assert_eq!(
        get(&files[0], METADATA | MD_ELFHDR).unwrap(),
        &kernel()[..64]
    );
    assert_eq!(get(&files[0], METADATA | MD_SHDR).unwrap().len(), 5 * 64);
    assert_eq!(
        word(&files[0], METADATA | MD_CTORS_ADDR),
        KERNBASE + 0x20_0040
    );
    assert_eq!(word(&files[0], METADATA | MD_CTORS_SIZE), 8);
    assert_eq!(word(&files[0], METADATA | MD_DYNAMIC), KERNBASE + 0x20_0020);
}

#[test]
fn symbols_follow_the_kernel_each_behind_its_size() {
    let Booted { target, files } = boot(|_, _| {});
    let (start, end) = (
        word(&files[0], METADATA | MD_SSYM),
        word(&files[0], METADATA | MD_ESYM),
    );
    assert_eq!(start, 0x20_1008);
    assert_eq!(word(&files[0], ADDR) + word(&files[0], SIZE), end);
    let mut expected = Vec::new();
    for table in [&SYMBOLS[..], STRINGS] {
        expected.extend_from_slice(&(table.len() as u64).to_le_bytes());
        expected.extend_from_slice(table);
        expected.resize(expected.len().next_multiple_of(8), 0);
    }
    assert_eq!(target.memory[start as usize..end as usize], expected);
}

#[test]
fn a_module_is_laid_out_and_its_section_headers_say_where() {
    let Booted { target, files } = boot(|_, _| {});
    let ko = &files[1];
    assert_eq!(text(ko, NAME), "/boot/kernel/foo.ko");
    assert_eq!(text(ko, TYPE), "elf obj module");
    assert_eq!(text(ko, ARGS), "a b");
    let (addr, size) = (word(ko, ADDR), word(ko, SIZE));
    assert_eq!(addr % 4096, 0);
    assert!(addr >= word(&files[0], ADDR) + word(&files[0], SIZE));
    assert_eq!(get(ko, METADATA | MD_ELFHDR).unwrap(), &module()[..64]);
    let shdrs = get(ko, METADATA | MD_SHDR).unwrap();
    let place = |i: usize| le64(shdrs, 64 * i + 16).unwrap();
    let bytes = |i: usize, len: usize| &target.memory[place(i) as usize..place(i) as usize + len];
    assert_eq!(bytes(1, 21), [0x90; 21]);
    assert_eq!(bytes(2, 5), [0xdd; 5]);
    assert_eq!(place(3) % 32, 0);
    assert_eq!(bytes(3, 0x30), [0; 0x30]);
    assert_eq!(bytes(4, 48), SYMBOLS);
    assert_eq!(bytes(5, 24), [0x77; 24]);
    assert_eq!(bytes(6, STRINGS.len()), STRINGS);
    // What is not for memory has no address: the kernel goes by that.
    assert_eq!((place(0), place(7), place(8)), (0, 0, 0));
    for i in 1..10 {
        let end = place(i) + le64(shdrs, 64 * i + 32).unwrap();
        assert!(
            place(i) == 0 || (place(i) >= addr && end <= addr + size),
            "section {i}"
        );
    }
}

#[test]
fn a_memory_disk_is_loaded_as_it_is_and_becomes_the_root() {
    let booted = boot(|_, _| {});
    let disk = &booted.files[2];
    assert_eq!(text(disk, TYPE), "md_image");
    assert_eq!(word(disk, SIZE), 5000);
    let at = word(disk, ADDR) as usize;
    assert_eq!(booted.target.memory[at..at + 5000], [0xee; 5000]);
    let env = environment(&booted);
    assert!(env.contains(&"vfs.root.mountfrom=ufs:/dev/md0".to_owned()));
}

#[test]
fn the_environment_has_the_defaults_and_what_was_asked_for() {
    let booted = boot(|guest, _| {
        guest.environment.set("kern.hz", "100");
        guest
            .environment
            .set("machdep.disable_tsc_calibration", "0");
    });
    assert_eq!(
        environment(&booted),
        [
            "boot_serial=1",
            "console=comconsole",
            "hint.uart.0.at=isa",
            "hint.uart.0.flags=0x10",
            "hint.uart.0.irq=4",
            "hint.uart.0.port=0x3F8",
            "kern.hz=100",
            "kernelname=/boot/kernel/kernel",
            "machdep.disable_tsc_calibration=0",
            "smbios.bios.vendor=BHYVE",
            "vfs.root.mountfrom=ufs:/dev/md0",
        ]
    );
    assert_eq!(
        get(&booted.files[0], METADATA | MD_HOWTO).unwrap(),
        0x1000u32.to_le_bytes()
    );
}

#[test]
fn tsc_calibration_is_left_out_only_where_the_frequency_is_stated() {
    let with = environment(&boot(|_, _| {}));
    assert!(with.contains(&"machdep.disable_tsc_calibration=1".to_owned()));
    let without = environment(&boot(|_, target| target.tsc_leaf = false));
    assert!(!without.iter().any(|v| v.starts_with("machdep.")));
}

#[test]
fn the_map_of_memory_and_the_end_of_what_was_loaded() {
    let Booted { target, files } = boot(|_, target| target.high = 1 << 30);
    let smap = get(&files[0], METADATA | MD_SMAP).unwrap();
    let entries: Vec<_> = smap
        .chunks_exact(20)
        .map(|e| {
            (
                le64(e, 0).unwrap(),
                le64(e, 8).unwrap(),
                le32(e, 16).unwrap(),
            )
        })
        .collect();
    assert_eq!(
        entries,
        [
            (0, 0xa_0000, 1),
            (0x10_0000, 15 * MIB as u64, 1),
            (4 << 30, 1 << 30, 1)
        ]
    );
    let kernend = word(&files[0], METADATA | MD_KERNEND);
    assert_eq!(Some(kernend as u32), le32(&target.memory, 0x1008));
    assert_eq!(kernend % 4096, 0);
    let modulep = u64::from(le32(&target.memory, 0x1004).unwrap());
    assert!(kernend > modulep && modulep > word(&files[2], ADDR));
    // Nothing was touched behind the end.
    assert!(target.memory[kernend as usize..].iter().all(|&b| b == 0xa5));
}

/// The guest physical address of a virtual one, by the tables in memory.
fn translate(memory: &[u8], cr3: u64, va: u64) -> u64 {
    let entry = |table: u64, shift: u32| {
        let slot = (table & !0xfff) + 8 * (va >> shift & 511);
        le64(memory, slot as usize).unwrap()
    };
    let (pml4e, mut e) = (entry(cr3, 39), 0);
    for (shift, parent) in [(30, Some(pml4e)), (21, None)] {
        let table = parent.unwrap_or(e);
        assert_eq!(table & 3, 3, "present and writable");
        e = entry(table, shift);
    }
    assert_eq!(e & 0x83, 0x83, "a present, writable 2 MiB page");
    (e & !0x1f_ffff) | (va & 0x1f_ffff)
}

#[test]
fn the_cpu_enters_in_long_mode_with_every_gibibyte_an_alias_of_the_first() {
    let Booted { target, .. } = boot(|_, _| {});
    let reg = |r| target.registers[&r];
    assert_eq!(reg(Register::Rip), ENTRY);
    assert_eq!(reg(Register::Rsp), 0x1000);
    assert_eq!(reg(Register::Rflags), 2);
    assert_eq!(reg(Register::Cr0), 0x8000_0021);
    assert_eq!(reg(Register::Cr4), 0x20);
    assert_eq!(reg(Register::Efer), 0x500);
    assert_eq!(le32(&target.memory, 0x1000), Some(0));
    let cr3 = reg(Register::Cr3);
    for va in [0x1000, 0x20_0010, ENTRY, 5 << 30 | 0x3f_f123, u64::MAX] {
        assert_eq!(
            translate(&target.memory, cr3, va),
            va & 0x3fff_ffff,
            "{va:#x}"
        );
    }
    let gdtr = target.descriptors[&Register::Gdtr];
    assert_eq!((gdtr.base, gdtr.limit), (0x5000, 23));
    let gdt = |selector: u64| le64(&target.memory, (gdtr.base + selector) as usize).unwrap();
    // Present 64-bit code, present data (SDM Vol. 3A §3.4.5).
    assert_eq!(gdt(reg(Register::Cs)) >> 40 & 0x2098, 0x2098);
    assert_eq!(gdt(reg(Register::Ss)) >> 40 & 0x98, 0x90);
    assert_eq!(target.descriptors[&Register::Cs].access, 0x209b);
}
