//! Makes small images of each kind.

use bhyveload::env::Environment;
use bhyveload::freebsd::{FreeBsd, KERNBASE, Module};
use bhyveload::input::Input;

pub const MIB: usize = 1 << 20;
pub const ENTRY: u64 = KERNBASE + 0x20_0010;

pub fn input(name: &str, data: Vec<u8>) -> Input {
    Input {
        name: name.to_owned(),
        data,
    }
}

pub struct Section {
    pub name: &'static str,
    pub kind: u32,
    pub flags: u64,
    pub addr: u64,
    pub data: Vec<u8>,
    /// Differs from the data's length for SHT_NOBITS.
    pub size: u64,
    pub link: u32,
    pub info: u32,
    pub align: u64,
}

impl Section {
    pub fn new(name: &'static str, kind: u32, flags: u64, data: &[u8]) -> Self {
        Self {
            name,
            kind,
            flags,
            addr: 0,
            size: data.len() as u64,
            data: data.to_vec(),
            link: 0,
            info: 0,
            align: 8,
        }
    }
}

/// A segment: virtual address, contents, size in memory.
pub struct Segment {
    pub kind: u32,
    pub vaddr: u64,
    pub data: Vec<u8>,
    pub memsz: u64,
}

/// An ELF64 file: header, program headers, segments, sections, section headers.
/// A null section comes before and `.shstrtab` after the given ones.
pub fn elf64(kind: u16, entry: u64, segments: &[Segment], sections: &[Section]) -> Vec<u8> {
    let mut names = vec![0u8];
    let mut body = Vec::new();
    let base = 64 + 56 * segments.len();
    let mut phdrs = Vec::new();
    for s in segments {
        while !(base + body.len()).is_multiple_of(16) {
            body.push(0);
        }
        let at = (base + body.len()) as u64;
        body.extend_from_slice(&s.data);
        phdrs.extend_from_slice(&s.kind.to_le_bytes());
        phdrs.extend_from_slice(&7u32.to_le_bytes());
        for v in [at, s.vaddr, s.vaddr, s.data.len() as u64, s.memsz, 16] {
            phdrs.extend_from_slice(&v.to_le_bytes());
        }
    }
    let mut shdrs = vec![0u8; 64];
    let mut add = |s: &Section, body: &mut Vec<u8>, names: &mut Vec<u8>| {
        let name = names.len() as u32;
        names.extend_from_slice(s.name.as_bytes());
        names.push(0);
        while !(base + body.len()).is_multiple_of(8) {
            body.push(0);
        }
        let at = (base + body.len()) as u64;
        let data = if s.name == ".shstrtab" {
            names.clone()
        } else {
            s.data.clone()
        };
        let size = if s.name == ".shstrtab" {
            data.len() as u64
        } else {
            s.size
        };
        body.extend_from_slice(&data);
        shdrs.extend_from_slice(&name.to_le_bytes());
        shdrs.extend_from_slice(&s.kind.to_le_bytes());
        for v in [s.flags, s.addr, at, size] {
            shdrs.extend_from_slice(&v.to_le_bytes());
        }
        shdrs.extend_from_slice(&s.link.to_le_bytes());
        shdrs.extend_from_slice(&s.info.to_le_bytes());
        for v in [s.align, 0] {
            shdrs.extend_from_slice(&v.to_le_bytes());
        }
    };
    let count = if sections.is_empty() {
        0
    } else {
        for s in sections {
            add(s, &mut body, &mut names);
        }
        add(&Section::new(".shstrtab", 3, 0, &[]), &mut body, &mut names);
        sections.len() + 2
    };
    while !(base + body.len()).is_multiple_of(8) {
        body.push(0);
    }
    let shoff = if count == 0 { 0 } else { base + body.len() };
    let mut file = b"\x7fELF\x02\x01\x01\x09\0\0\0\0\0\0\0\0".to_vec();
    file.extend_from_slice(&kind.to_le_bytes());
    file.extend_from_slice(&62u16.to_le_bytes());
    file.extend_from_slice(&1u32.to_le_bytes());
    for v in [entry, 64, shoff as u64] {
        file.extend_from_slice(&v.to_le_bytes());
    }
    file.extend_from_slice(&0u32.to_le_bytes());
    for v in [64, 56, segments.len(), 64, count, count.saturating_sub(1)] {
        file.extend_from_slice(&(v as u16).to_le_bytes());
    }
    assert_eq!(file.len(), 64);
    file.extend_from_slice(&phdrs);
    file.extend_from_slice(&body);
    if count != 0 {
        file.extend_from_slice(&shdrs);
    }
    file
}

pub const SYMBOLS: [u8; 48] = [0x51; 48];
pub const STRINGS: &[u8] = b"\0main\0x\0";

/// A kernel of one segment with a bss and symbols.
pub fn kernel() -> Vec<u8> {
    let mut symtab = Section::new(".symtab", 2, 0, &SYMBOLS);
    symtab.link = 3;
    let mut ctors = Section::new(".ctors", 1, 2, &[1, 2, 3, 4, 5, 6, 7, 8]);
    ctors.addr = KERNBASE + 0x20_0040;
    elf64(
        2,
        ENTRY,
        &[
            Segment {
                kind: 1,
                vaddr: KERNBASE + 0x20_0000,
                data: (0..100).collect(),
                memsz: 0x1003,
            },
            Segment {
                kind: 2,
                vaddr: KERNBASE + 0x20_0020,
                data: vec![0; 16],
                memsz: 16,
            },
        ],
        &[ctors, symtab, Section::new(".strtab", 3, 0, STRINGS)],
    )
}

/// A module with text, data, bss, symbols and relocations.
pub fn module() -> Vec<u8> {
    let mut bss = Section::new(".bss", 8, 3, &[]);
    bss.size = 0x30;
    bss.align = 32;
    let mut symtab = Section::new(".symtab", 2, 0, &SYMBOLS);
    symtab.link = 6;
    let mut rela = Section::new(".rela.text", 4, 0, &[0x77; 24]);
    rela.link = 4;
    rela.info = 1;
    let mut debug = Section::new(".rela.debug", 4, 0, &[0x66; 24]);
    debug.info = 7;
    elf64(
        1,
        0,
        &[],
        &[
            Section::new(".text", 1, 6, &[0x90; 21]),
            Section::new(".data", 1, 3, &[0xdd; 5]),
            bss,
            symtab,
            rela,
            Section::new(".strtab", 3, 0, STRINGS),
            Section::new(".debug", 1, 0, &[9; 40]),
            debug,
        ],
    )
}

pub fn guest() -> FreeBsd {
    FreeBsd {
        kernel: input("kernel", kernel()),
        kernel_name: "/boot/kernel/kernel".to_owned(),
        kernel_args: None,
        modules: vec![
            Module {
                input: input("foo.ko", module()),
                name: "/boot/kernel/foo.ko".to_owned(),
                kind: None,
                args: Some("a b".to_owned()),
            },
            Module {
                input: input("root.img", vec![0xee; 5000]),
                name: "/boot/root.img".to_owned(),
                kind: Some("md_image".to_owned()),
                args: None,
            },
        ],
        environment: Environment::default(),
    }
}

/// A bzImage of protocol 2.15 with a setup of 4 sectors and 3000 bytes of code.
pub fn bzimage() -> Vec<u8> {
    let mut file = vec![0u8; 5 * 512];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[4]);
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(0x202, b"HdrS");
    put(0x206, &0x20fu16.to_le_bytes());
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x230, &0x20_0000u32.to_le_bytes());
    put(0x234, &[1]);
    put(0x236, &0x3fu16.to_le_bytes());
    put(0x238, &255u32.to_le_bytes());
    put(0x258, &0x20_0000u64.to_le_bytes());
    put(0x260, &0x10_0000u32.to_le_bytes());
    file.extend((0..3000).map(|i| i as u8));
    file
}

/// A multiboot file by the a.out kludge: 64 bytes of text at 1 MiB and a bss.
pub fn kludge() -> Vec<u8> {
    const FLAGS: u32 = 1 << 16;
    let words = [
        0x1bad_b002,
        FLAGS,
        0u32.wrapping_sub(0x1bad_b002).wrapping_sub(FLAGS),
        0x10_0010,
        0x10_0000,
        0x10_0040,
        0x10_2000,
        0x10_0030,
    ];
    let mut file = vec![0x90; 16];
    file.extend(words.into_iter().flat_map(u32::to_le_bytes));
    file.resize(64, 0x91);
    file
}

/// A multiboot ELF32 file with one segment at 4 MiB.
pub fn multiboot_elf32() -> Vec<u8> {
    let mut file = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    for v in [2u16, 3] {
        file.extend_from_slice(&v.to_le_bytes());
    }
    for v in [1u32, 0x40_0004, 52, 0, 0] {
        file.extend_from_slice(&v.to_le_bytes());
    }
    for v in [52u16, 32, 1, 40, 0, 0] {
        file.extend_from_slice(&v.to_le_bytes());
    }
    for v in [1u32, 96, 0xc040_0000, 0x40_0000, 16, 0x2000, 7, 4] {
        file.extend_from_slice(&v.to_le_bytes());
    }
    assert_eq!(file.len(), 84);
    for v in [0x1bad_b002u32, 0, 0u32.wrapping_sub(0x1bad_b002)] {
        file.extend_from_slice(&v.to_le_bytes());
    }
    file.extend_from_slice(&[0xcc; 16]);
    file
}
