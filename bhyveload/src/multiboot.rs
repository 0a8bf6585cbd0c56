//! A multiboot 1 kernel (Multiboot Specification 0.6.96), which is what
//! conformance suites such as kvm-unit-tests are.

use crate::bios;
use crate::cpu;
use crate::elffile::ElfFile;
use crate::error::LoadError;
use crate::input::Input;
use crate::layout::{PAGE_SIZE, fits, le32, round_up, slice};
use crate::target::LoadTarget;
use elf::abi;
use elf::file::Class;

const MAGIC: u32 = 0x1bad_b002;
/// The header lies in the first so many bytes, at a multiple of 4 (§3.1).
const SEARCH: usize = 8192;

const FLAG_VIDEO: u32 = 1 << 2;
/// Flags 3 to 15 must be understood (§3.1.2), and are not defined.
const FLAGS_UNKNOWN: u32 = 0xfff8;
const FLAG_ADDRESSES: u32 = 1 << 16;

/// Where the boot information goes unless the kernel lies there.
const INFORMATION: u64 = 0x9000;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// A multiboot guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Multiboot {
    /// The kernel.
    pub kernel: Input,
    /// Modules, each with its string.
    pub modules: Vec<(Input, String)>,
    /// What follows the kernel's name in its command line.
    pub command_line: String,
}

/// What was loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loaded {
    /// Where the kernel is entered.
    pub entry: u32,
    /// Where the boot information lies.
    pub information: u64,
}

/// The multiboot header: its offset in the file and its flags.
#[must_use]
pub fn find_header(data: &[u8]) -> Option<(usize, u32)> {
    (0..data.len().min(SEARCH)).step_by(4).find_map(|at| {
        let flags = le32(data, at + 4)?;
        let sum = MAGIC.wrapping_add(flags).wrapping_add(le32(data, at + 8)?);
        (le32(data, at)? == MAGIC && sum == 0).then_some((at, flags))
    })
}

struct Image<'a> {
    parts: Vec<Part<'a>>,
    entry: u32,
}

struct Part<'a> {
    field: String,
    gpa: u64,
    bytes: &'a [u8],
    size: u64,
}

/// The a.out kludge: the header says where the file goes (§3.1.3).
fn by_addresses<'a>(input: &'a Input, at: usize) -> Result<Image<'a>, LoadError> {
    let file = input.name.as_str();
    let data = input.data.as_slice();
    let word = |i: usize| {
        le32(data, at + 12 + 4 * i)
            .map(u64::from)
            .ok_or_else(|| LoadError::new(file, "multiboot header", "is truncated"))
    };
    let (header, load, load_end, bss_end, entry) =
        (word(0)?, word(1)?, word(2)?, word(3)?, word(4)?);
    let before = header.checked_sub(load).ok_or_else(|| {
        LoadError::new(
            file,
            "load_addr",
            format!("{load:#x} lies above header_addr {header:#x}"),
        )
    })?;
    let start = (at as u64).checked_sub(before).ok_or_else(|| {
        LoadError::new(
            file,
            "header_addr",
            format!("{header:#x} puts the start of the text before the file"),
        )
    })?;
    let length = if load_end == 0 {
        data.len() as u64 - start
    } else {
        load_end.checked_sub(load).ok_or_else(|| {
            LoadError::new(
                file,
                "load_end_addr",
                format!("{load_end:#x} lies below load_addr"),
            )
        })?
    };
    let bytes = slice(file, "load_end_addr", data, start, length)?;
    let size = if bss_end == 0 {
        length
    } else {
        bss_end
            .checked_sub(load)
            .filter(|&size| size >= length)
            .ok_or_else(|| {
                LoadError::new(
                    file,
                    "bss_end_addr",
                    format!("{bss_end:#x} lies below the data's end"),
                )
            })?
    };
    Ok(Image {
        parts: vec![Part {
            field: "load_addr/bss_end_addr".to_owned(),
            gpa: load,
            bytes,
            size,
        }],
        entry: entry as u32,
    })
}

fn by_elf<'a>(input: &'a Input) -> Result<Image<'a>, LoadError> {
    let elf = ElfFile::parse(&input.name, &input.data)?;
    let machine = match elf.header.class {
        Class::ELF32 => abi::EM_386,
        Class::ELF64 => abi::EM_X86_64,
    };
    if elf.header.e_machine != machine {
        return Err(LoadError::new(
            input.name.as_str(),
            "e_machine",
            format!("is {}, and must be {machine}", elf.header.e_machine),
        ));
    }
    let mut parts = Vec::new();
    for (i, segment) in elf.segments.iter().enumerate() {
        if segment.p_type == abi::PT_LOAD && segment.p_memsz != 0 {
            parts.push(Part {
                field: format!("program header {i} p_paddr/p_memsz"),
                gpa: segment.p_paddr,
                bytes: elf.segment_bytes(i)?,
                size: segment.p_memsz,
            });
        }
    }
    let entry = u32::try_from(elf.header.e_entry).map_err(|_| {
        LoadError::new(
            input.name.as_str(),
            "e_entry",
            format!("{:#x} lies above 4 GiB", elf.header.e_entry),
        )
    })?;
    Ok(Image { parts, entry })
}

struct Information {
    base: u64,
    bytes: Vec<u8>,
}

impl Information {
    fn append(&mut self, data: &[u8]) -> u32 {
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
        let at = self.base + self.bytes.len() as u64;
        self.bytes.extend_from_slice(data);
        at as u32
    }

    fn string(&mut self, text: &str) -> u32 {
        let mut bytes = text.as_bytes().to_vec();
        bytes.push(0);
        self.append(&bytes)
    }

    fn put(&mut self, offset: usize, value: u32) {
        self.bytes[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
    }
}

fn information(
    base: u64,
    boot: &Multiboot,
    modules: &[(u64, u64)],
    (low, high): (u64, u64),
) -> Vec<u8> {
    // The GDT comes first, then the 88 bytes of §3.3.
    const GDT: usize = cpu::MULTIBOOT_GDT_SIZE as usize;
    const FLAGS: u32 = 1 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9;
    let mut info = Information {
        base,
        bytes: vec![0; GDT + 88],
    };
    let mut mods = Vec::new();
    for ((start, end), (_, text)) in modules.iter().zip(&boot.modules) {
        let text = info.string(text);
        for word in [*start as u32, *end as u32, text, 0] {
            mods.extend_from_slice(&word.to_le_bytes());
        }
    }
    let mut map = Vec::new();
    let ranges = [
        (0, 0xa_0000),
        (MIB, low.saturating_sub(MIB)),
        (4 * GIB, high),
    ];
    for (base, length) in ranges.into_iter().filter(|r: &(u64, u64)| r.1 != 0) {
        map.extend_from_slice(&20u32.to_le_bytes());
        map.extend_from_slice(&base.to_le_bytes());
        map.extend_from_slice(&length.to_le_bytes());
        map.extend_from_slice(&1u32.to_le_bytes());
    }
    let line = match boot.command_line.as_str() {
        "" => boot.kernel.name.clone(),
        rest => format!("{} {rest}", boot.kernel.name),
    };
    let line = info.string(&line);
    let loader = info.string("bhyveload");
    let mods_at = info.append(&mods);
    let map_at = info.append(&map);
    for (offset, value) in [
        (0, FLAGS),
        (4, 640),
        (8, ((low.saturating_sub(MIB)) / 1024) as u32),
        (16, line),
        (20, modules.len() as u32),
        (24, mods_at),
        (44, map.len() as u32),
        (48, map_at),
        (64, loader),
    ] {
        info.put(GDT + offset, value);
    }
    info.bytes
}

/// Loads the kernel and its modules, and sets the boot vCPU to enter.
///
/// # Errors
/// A file is not what it should be, or they do not fit into the VM's memory.
pub fn load(target: &mut dyn LoadTarget, boot: &Multiboot) -> Result<Loaded, LoadError> {
    let file = boot.kernel.name.as_str();
    let limit = target.low_memory();
    let (at, flags) = find_header(&boot.kernel.data).ok_or_else(|| {
        LoadError::new(
            file,
            "multiboot header",
            format!("there is none in the first {SEARCH} bytes"),
        )
    })?;
    if flags & (FLAG_VIDEO | FLAGS_UNKNOWN) != 0 {
        return Err(LoadError::new(
            file,
            "multiboot header flags",
            format!("{flags:#x} asks for something this loader does not do"),
        ));
    }
    let image = if flags & FLAG_ADDRESSES != 0 {
        by_addresses(&boot.kernel, at)?
    } else {
        by_elf(&boot.kernel)?
    };
    let mut end = MIB;
    for part in &image.parts {
        fits(file, &part.field, part.gpa, part.size, 0, limit)?;
        target.write(part.gpa, part.bytes)?;
        let filled = part.bytes.len() as u64;
        target.zero(part.gpa + filled, part.size.saturating_sub(filled))?;
        end = end.max(part.gpa + part.size);
    }
    if !image
        .parts
        .iter()
        .any(|p| u64::from(image.entry).wrapping_sub(p.gpa) < p.size)
    {
        return Err(LoadError::new(
            file,
            "entry",
            format!("{:#x} lies in nothing that is loaded", image.entry),
        ));
    }

    let page = |at: u64| round_up(at, PAGE_SIZE).unwrap_or(u64::MAX);
    let mut modules = Vec::new();
    for (module, _) in &boot.modules {
        let start = page(end);
        let size = module.data.len() as u64;
        fits(&module.name, "size", start, size, 0, limit)?;
        target.write(start, &module.data)?;
        end = start + size;
        modules.push((start, end));
    }

    let memory = (limit, target.high_memory());
    let length = information(INFORMATION, boot, &modules, memory).len() as u64;
    let low_is_free = image
        .parts
        .iter()
        .all(|p| p.gpa >= INFORMATION + length || p.gpa + p.size <= INFORMATION);
    let base = if low_is_free && INFORMATION + length <= 0x9_0000 {
        INFORMATION
    } else {
        page(end)
    };
    fits(file, "boot information", base, length, 0, limit)?;
    target.write(base, &information(base, boot, &modules, memory))?;
    let at = base + cpu::MULTIBOOT_GDT_SIZE;
    let first = if image.parts.iter().all(|p| p.gpa >= bios::END) {
        target.write(0, &bios::image(image.entry, cpu::MULTIBOOT_EAX))?;
        bios::SETUP
    } else {
        image.entry
    };
    cpu::enter_multiboot(target, first, at as u32, base)?;
    Ok(Loaded {
        entry: image.entry,
        information: at,
    })
}
