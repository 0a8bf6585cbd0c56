//! Checks every record that the loader handed over, and the state it left.
//!
//! Prints each file (`preload: file NAME TYPE SIZE CRC`) and each variable
//! (`preload: env NAME=VALUE`) for the test outside to compare.
#![no_std]
#![no_main]

use guests::preload::{bytes, environment, files, find, kind, records, variable};
use guests::report::Report;
use guests::{KERNBASE, cpu, entry, println};

unsafe extern "C" {
    static __image_start: u8;
    static __image_end: u8;
}

const PAGE: u64 = 4096;
/// Where what the loader handed over starts and ends.
struct Bounds {
    kernel_start: u64,
    kernel_end: u64,
    kernend: u64,
}

fn read64(address: u64) -> u64 {
    // SAFETY: the loader's page tables map every address to the first GiB.
    unsafe { (address as *const u64).read_volatile() }
}

fn at<const N: usize>(data: &[u8], offset: usize) -> [u8; N] {
    let mut out = [0; N];
    for (to, from) in out.iter_mut().zip(data.get(offset..).unwrap_or(&[])) {
        *to = *from;
    }
    out
}

fn word(data: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(at(data, offset))
}

fn half(data: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(at(data, offset))
}

fn crc32(data: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in data {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ if crc & 1 != 0 { 0xedb8_8320 } else { 0 };
        }
    }
    !crc
}

fn entry_state(r: &mut Report) {
    let s = entry::state();
    r.equal("RSP", s.rsp, 0x1000);
    r.equal("word at RSP", u64::from(s.return_address), 0);
    r.equal("RFLAGS", s.rflags, 2);
    // ET reads as 1 on every CPU since the 486.
    r.equal("CR0 is PG|NE|PE", s.cr0 & !0x10, 0x8000_0021);
    r.equal("CR4 is PAE", s.cr4, 0x20);
    r.equal("EFER is LMA|LME", s.efer, 0x500);
    r.equal("CR3", s.cr3, 0x2000);
    r.equal("CS", u64::from(s.cs), 8);
    r.equal("SS", u64::from(s.ss), 16);
    r.equal("DS", u64::from(s.ds), 16);
    r.equal("ES", u64::from(s.es), 16);
    r.equal("GDT base", s.gdt_base(), 0x5000);
    r.equal("GDT limit", u64::from(s.gdt_limit()), 23);
    r.equal("GDT entry 0", read64(0x5000), 0);
    // Bit 40 is "accessed", which a CPU may set.
    r.equal(
        "GDT code",
        read64(0x5008) & !(1 << 40),
        0x0020_9800_0000_0000,
    );
    r.equal(
        "GDT data",
        read64(0x5010) & !(1 << 40),
        0x0000_9000_0000_0000,
    );
}

fn page_tables(r: &mut Report) {
    // Accessed and dirty belong to the CPU.
    const AD: u64 = 0x60;
    let all = |table: u64, wanted: &dyn Fn(u64) -> u64| {
        (0..512).all(|i| read64(table + 8 * i) & !AD == wanted(i))
    };
    r.check("PML4: every entry names the PDPT", all(0x2000, &|_| 0x3007));
    r.check("PDPT: every entry names the PD", all(0x3000, &|_| 0x4007));
    r.check(
        "PD: the first GiB in 2 MiB pages",
        all(0x4000, &|i| i << 21 | 0x87),
    );
    let here = (&raw const __image_start) as u64;
    let first = read64(here);
    r.check(
        "every GiB is an alias of the first",
        [0x20_0000, (1 << 30) + 0x20_0000, (77 << 30) + 0x20_0000]
            .iter()
            .all(|&va| read64(va) == first),
    );
    r.equal(
        "the image is at KERNBASE + 2 MiB",
        here,
        KERNBASE + 0x20_0000,
    );
}

fn kernel(r: &mut Report) -> Bounds {
    let s = entry::state();
    let number = |kind: u32| find(0, kind).map_or(0, |r| r.word());
    let text = |kind: u32| find(0, kind).map_or("", |r| r.text());
    println!(
        "preload: modulep {:#x}, kernend {:#x}",
        s.modulep, s.kernend
    );
    r.equal("modulep lies on a page", u64::from(s.modulep) % PAGE, 0);
    r.check(
        "the first record is a name",
        records().next().is_some_and(|r| r.kind == kind::NAME),
    );
    r.check("the kernel has a name", text(kind::NAME).starts_with('/'));
    r.check(
        "the first file is an elf kernel",
        text(kind::TYPE) == "elf kernel",
    );
    let start = number(kind::ADDR);
    let end = start + number(kind::SIZE);
    let image_end = (&raw const __image_end) as u64 - KERNBASE;
    r.equal("ADDR", start, 0x20_0000);
    r.check("SIZE covers the image and its bss", end >= image_end);

    let header = find(0, kind::ELFHDR).map_or(&[][..], |r| r.data);
    r.equal("ELFHDR has 64 bytes", header.len() as u64, 64);
    r.check(
        "ELFHDR is an ELF header",
        header.starts_with(b"\x7fELF\x02\x01\x01"),
    );
    let entry_point = word(header, 24);
    r.check(
        "ELFHDR's entry lies in the image",
        entry_point >= KERNBASE + start && entry_point < KERNBASE + end,
    );
    let shdr = find(0, kind::SHDR).map_or(0, |r| r.data.len() as u64);
    r.equal(
        "SHDR has e_shnum entries",
        shdr,
        u64::from(half(header, 60) & 0xffff) * 64,
    );

    let kernend = number(kind::KERNEND);
    r.equal(
        "KERNEND is the word on the stack",
        kernend,
        u64::from(s.kernend),
    );
    r.equal("KERNEND lies on a page", kernend % PAGE, 0);
    r.check(
        "KERNEND lies behind the records",
        kernend > u64::from(s.modulep),
    );
    Bounds {
        kernel_start: start,
        kernel_end: end,
        kernend,
    }
}

/// The value of one of our own symbols, by the tables the loader left.
fn lookup(symbols: &[u8], strings: &[u8], wanted: &str) -> Option<u64> {
    symbols.chunks_exact(24).find_map(|symbol| {
        let name = strings.get(half(symbol, 0) as usize..)?;
        let name = name.get(..wanted.len() + 1)?;
        (name.split_last()? == (&0, wanted.as_bytes())).then(|| word(symbol, 8))
    })
}

fn symbols(r: &mut Report, bounds: &Bounds) {
    let number = |kind: u32| find(0, kind).map_or(0, |r| r.word());
    let (ssym, esym) = (number(kind::SSYM), number(kind::ESYM));
    if !r.check(
        "SSYM and ESYM lie in the kernel",
        ssym >= bounds.kernel_start && ssym < esym && esym <= bounds.kernel_end,
    ) {
        return;
    }
    let symtab_size = word(bytes(ssym, 8), 0);
    let strtab = (ssym + 8 + symtab_size).next_multiple_of(8);
    if !r.check(
        "the symbol table ends before ESYM",
        symtab_size < esym - ssym && strtab < esym,
    ) {
        return;
    }
    let strtab_size = word(bytes(strtab, 8), 0);
    let end = (strtab + 8 + strtab_size).next_multiple_of(8);
    if !r.equal("the string table ends at ESYM", end, esym) {
        return;
    }
    let found = lookup(
        bytes(ssym + 8, symtab_size),
        bytes(strtab + 8, strtab_size),
        "guest_main",
    );
    r.equal(
        "the symbols give the address of guest_main",
        found.unwrap_or(0),
        guest_main as *const () as u64,
    );
}

fn howto_and_environment(r: &mut Report) {
    let howto = find(0, kind::HOWTO).map_or(0, |r| r.word());
    r.check("HOWTO has RB_SERIAL", howto & 0x1000 != 0);
    let verbose = variable("boot_verbose").is_some_and(|v| !v.eq_ignore_ascii_case("no"));
    r.check(
        "HOWTO has RB_VERBOSE if asked for",
        (howto & 0x800 != 0) == verbose,
    );
    for text in environment() {
        println!("preload: env {text}");
    }
    r.check(
        "every variable is NAME=VALUE",
        environment().all(|v| v.find('=').is_some_and(|i| i > 0)),
    );
    r.check(
        "smbios.bios.vendor=BHYVE",
        variable("smbios.bios.vendor") == Some("BHYVE"),
    );
    r.check("boot_serial is set", variable("boot_serial").is_some());
    r.check(
        "COM1 is hinted as the console",
        variable("hint.uart.0.port") == Some("0x3F8")
            && variable("hint.uart.0.flags") == Some("0x10"),
    );
    let leaf = cpu::cpuid(0x15, 0);
    let stated = cpu::cpuid(0, 0).eax >= 0x15 && leaf.eax != 0 && leaf.ebx != 0 && leaf.ecx != 0;
    let skips = variable("machdep.disable_tsc_calibration") == Some("1");
    r.check(
        "TSC calibration is skipped only with CPUID leaf 0x15",
        !skips || stated,
    );
}

fn smap(r: &mut Report, bounds: &Bounds) {
    let map = find(0, kind::SMAP).map_or(&[][..], |r| r.data);
    r.equal("SMAP holds whole entries", map.len() as u64 % 20, 0);
    let mut previous = 0;
    let mut ordered = true;
    let mut covered = false;
    for entry in map.chunks_exact(20) {
        let (base, length, kind) = (word(entry, 0), word(entry, 8), half(entry, 16));
        println!("preload: smap {base:#x} {length:#x} {kind}");
        ordered &= base >= previous && length > 0 && kind == 1;
        previous = base + length;
        covered |= base <= bounds.kernel_start && bounds.kernend <= base + length;
        // The last page of each range below 1 GiB holds what is put there.
        let last = base + length - 8;
        if last < 1 << 30 {
            let place = (KERNBASE + last) as *mut u64;
            // SAFETY: memory by the map, behind all that the loader left.
            let back = unsafe {
                place.write_volatile(!last);
                place.read_volatile()
            };
            r.equal("the last word of the range is memory", back, !last);
        }
    }
    r.check(
        "SMAP is memory in ascending order without overlaps",
        ordered && !map.is_empty(),
    );
    r.equal("SMAP starts with 640 KiB", word(map, 8), 0xa_0000);
    r.equal("SMAP goes on at 1 MiB", word(map, 20), 0x10_0000);
    r.check("SMAP covers all that was loaded", covered);
}

fn module(r: &mut Report, file: usize, addr: u64, size: u64) {
    let header = find(file, kind::ELFHDR).map_or(&[][..], |r| r.data);
    let sections = find(file, kind::SHDR).map_or(&[][..], |r| r.data);
    r.check(
        "module: ELFHDR of a relocatable amd64 object",
        header.starts_with(b"\x7fELF\x02") && half(header, 16) == 62 << 16 | 1,
    );
    r.equal(
        "module: SHDR has e_shnum entries",
        sections.len() as u64,
        u64::from(half(header, 60) & 0xffff) * 64,
    );
    let mut inside = true;
    let mut code = false;
    let mut tables = 0;
    for section in sections.chunks_exact(64) {
        let (kind, flags, place, length) = (
            half(section, 4),
            word(section, 8),
            word(section, 16),
            word(section, 32),
        );
        if place == 0 {
            continue;
        }
        inside &= place >= addr && place + length <= addr + size;
        code |= kind == 1 && flags & 4 != 0;
        tables += u32::from(kind == 2) + u32::from(kind == 4);
    }
    r.check("module: sections lie inside", inside);
    r.check(
        "module: it has code, symbols and relocations",
        code && tables >= 2,
    );
}

fn other_files(r: &mut Report, bounds: &Bounds) {
    let mut end = bounds.kernel_end;
    for file in 1..files() {
        let number = |kind: u32| find(file, kind).map_or(0, |r| r.word());
        let text = |kind: u32| find(file, kind).map_or("", |r| r.text());
        let (addr, size) = (number(kind::ADDR), number(kind::SIZE));
        let inside = addr >= end && addr % PAGE == 0 && size > 0 && addr + size <= bounds.kernend;
        if r.check(
            "a file lies on a page of its own behind the one before",
            inside,
        ) {
            println!(
                "preload: file {} {} {size} {:08x}",
                text(kind::NAME),
                text(kind::TYPE).split(' ').next().unwrap_or(""),
                crc32(bytes(addr, size))
            );
            end = addr + size;
        }
        if text(kind::TYPE) == "elf obj module" {
            module(r, file, addr, size);
        }
    }
    println!("preload: {} files", files());
    let last = {
        let mut all = records();
        while all.next().is_some() {}
        all.position() + 8
    };
    r.check("the records end before KERNEND", last <= bounds.kernend);
}

#[unsafe(no_mangle)]
extern "C" fn guest_main() -> ! {
    let mut r = Report::new("preload");
    entry_state(&mut r);
    page_tables(&mut r);
    let bounds = kernel(&mut r);
    symbols(&mut r, &bounds);
    howto_and_environment(&mut r);
    other_files(&mut r, &bounds);
    smap(&mut r, &bounds);
    r.finish()
}
