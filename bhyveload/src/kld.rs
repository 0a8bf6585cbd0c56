//! Modules of a FreeBSD amd64 kernel: relocatable objects (`.ko`), laid out as
//! the kernel's `link_elf_obj` wants to find them.

use crate::elffile::{EHDR64_SIZE, ElfFile, SHDR64_SIZE};
use crate::error::LoadError;
use crate::layout::{PAGE_SIZE, fits, round_up};
use crate::preload::{MD_ELFHDR, MD_SHDR, Preloaded};
use crate::target::LoadTarget;
use elf::abi;

/// The type by which the kernel finds a relocatable module.
pub const KIND: &str = "elf obj module";

const SHF_ALLOC: u64 = abi::SHF_ALLOC as u64;
/// SHT_X86_64_UNWIND.
const SHT_X86_64_UNWIND: u32 = 0x7000_0001;

/// Offset of `sh_addr` in an ELF64 section header.
const SH_ADDR: usize = 16;

struct Layout {
    next: u64,
    addresses: Vec<u64>,
}

impl Layout {
    fn place(&mut self, elf: &ElfFile<'_>, index: usize) -> Result<(), LoadError> {
        let section = &elf.sections[index];
        if !(section.sh_addralign.is_power_of_two() || section.sh_addralign == 0)
            || section.sh_addralign > PAGE_SIZE
        {
            return Err(LoadError::new(
                elf.name,
                format!("section {index} sh_addralign"),
                format!("{:#x} is no alignment within a page", section.sh_addralign),
            ));
        }
        let overflow = || {
            LoadError::new(
                elf.name,
                format!("section {index} sh_size"),
                format!("{:#x} bytes cannot be placed", section.sh_size),
            )
        };
        let at = round_up(self.next, section.sh_addralign).ok_or_else(overflow)?;
        self.next = at.checked_add(section.sh_size).ok_or_else(overflow)?;
        self.addresses[index] = at;
        Ok(())
    }
}

fn string_table(elf: &ElfFile<'_>, index: usize, field: &str) -> Result<usize, LoadError> {
    match elf.sections.get(index) {
        Some(section) if index != 0 && section.sh_type == abi::SHT_STRTAB => Ok(index),
        _ => Err(LoadError::new(
            elf.name,
            field,
            format!("section {index} is no string table"),
        )),
    }
}

/// Loads the module at `addr` (a page boundary), below `limit`.
///
/// # Errors
/// The file is no amd64 relocatable object with a symbol table, or does not fit.
pub fn load(
    target: &mut dyn LoadTarget,
    elf: &ElfFile<'_>,
    (name, args): (&str, Option<&str>),
    addr: u64,
    limit: u64,
) -> Result<Preloaded, LoadError> {
    elf.require_amd64()?;
    if elf.header.e_type != abi::ET_REL {
        return Err(LoadError::new(
            elf.name,
            "e_type",
            format!(
                "is {}, and an amd64 kernel module is a relocatable object (1)",
                elf.header.e_type
            ),
        ));
    }
    if elf.sections.is_empty() {
        return Err(LoadError::new(elf.name, "e_shnum", "no section headers"));
    }
    let symbols: Vec<usize> = (0..elf.sections.len())
        .filter(|&i| elf.sections[i].sh_type == abi::SHT_SYMTAB)
        .collect();
    let [symtab] = symbols[..] else {
        return Err(LoadError::new(
            elf.name,
            "section headers",
            format!("{} symbol tables, and there must be one", symbols.len()),
        )
        .hint("a stripped module cannot be loaded"));
    };
    let strtab = string_table(
        elf,
        elf.sections[symtab].sh_link as usize,
        "symbol table sh_link",
    )?;
    let shstrtab = string_table(elf, usize::from(elf.header.e_shstrndx), "e_shstrndx")?;

    let mut layout = Layout {
        next: addr,
        addresses: vec![0; elf.sections.len()],
    };
    for (i, section) in elf.sections.iter().enumerate() {
        let program = matches!(
            section.sh_type,
            abi::SHT_PROGBITS
                | abi::SHT_NOBITS
                | abi::SHT_INIT_ARRAY
                | abi::SHT_FINI_ARRAY
                | SHT_X86_64_UNWIND
        );
        if program && section.sh_size != 0 && section.sh_flags & SHF_ALLOC != 0 {
            layout.place(elf, i)?;
        }
    }
    if layout.next == addr {
        return Err(LoadError::new(
            elf.name,
            "section headers",
            "there is nothing to load",
        ));
    }
    for index in [symtab, strtab] {
        layout.place(elf, index)?;
    }
    // A file may keep names of sections and of symbols in one table.
    if shstrtab != strtab {
        layout.place(elf, shstrtab)?;
    }
    for (i, section) in elf.sections.iter().enumerate() {
        if !matches!(section.sh_type, abi::SHT_REL | abi::SHT_RELA) {
            continue;
        }
        let Some(applies_to) = elf.sections.get(section.sh_info as usize) else {
            return Err(LoadError::new(
                elf.name,
                format!("section {i} sh_info"),
                format!("names section {}, which is not there", section.sh_info),
            ));
        };
        // The kernel counts on relocations being there for what has an address.
        if applies_to.sh_flags & SHF_ALLOC != 0 {
            layout.place(elf, i)?;
        }
    }
    let size = layout.next - addr;
    fits(elf.name, "section headers sh_size", addr, size, 0, limit)?;

    target.zero(addr, size)?;
    let mut table = elf.section_table_bytes()?.to_vec();
    for (i, (&at, header)) in layout
        .addresses
        .iter()
        .zip(table.chunks_exact_mut(SHDR64_SIZE))
        .enumerate()
    {
        header[SH_ADDR..SH_ADDR + 8].copy_from_slice(&at.to_le_bytes());
        if at != 0 {
            target.write(at, elf.section_bytes(i)?)?;
        }
    }
    Ok(Preloaded {
        name: name.to_owned(),
        kind: KIND.to_owned(),
        args: args.map(str::to_owned),
        addr,
        size,
        metadata: vec![
            (MD_SHDR, table),
            (MD_ELFHDR, elf.data[..EHDR64_SIZE].to_vec()),
        ],
    })
}
