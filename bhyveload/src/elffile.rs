//! An ELF file whose header and tables have been checked against its size.
//!
//! The `elf` crate decodes the structures; the checks before it are ours because
//! an error has to name the field.

use crate::error::LoadError;
use crate::layout::slice;
use elf::abi;
use elf::endian::LittleEndian;
use elf::file::{Class, FileHeader, parse_ident};
use elf::parse::{ParseAt, ParsingTable};
pub use elf::section::SectionHeader;
pub use elf::segment::ProgramHeader;

/// A checked ELF file.
#[derive(Debug)]
pub struct ElfFile<'a> {
    /// The name to put in errors.
    pub name: &'a str,
    /// The whole file.
    pub data: &'a [u8],
    /// Its header.
    pub header: FileHeader<LittleEndian>,
    /// Its program headers.
    pub segments: Vec<ProgramHeader>,
    /// Its section headers; empty if it has none.
    pub sections: Vec<SectionHeader>,
}

/// Size of an ELF64 header.
pub const EHDR64_SIZE: usize = 64;
/// Size of an ELF64 section header.
pub const SHDR64_SIZE: usize = 64;

/// Whether `data` starts like an ELF file.
#[must_use]
pub fn is_elf(data: &[u8]) -> bool {
    data.starts_with(&abi::ELFMAGIC)
}

fn machine_name(machine: u16) -> String {
    match machine {
        abi::EM_386 => "i386".to_owned(),
        abi::EM_X86_64 => "amd64".to_owned(),
        abi::EM_AARCH64 => "arm64".to_owned(),
        abi::EM_ARM => "arm".to_owned(),
        abi::EM_PPC => "powerpc".to_owned(),
        abi::EM_PPC64 => "powerpc64".to_owned(),
        abi::EM_RISCV => "riscv".to_owned(),
        other => format!("machine {other}"),
    }
}

fn table<P: ParseAt>(
    file: (&str, &[u8]),
    field: &str,
    class: Class,
    (offset, entsize, count): (u64, u16, u64),
) -> Result<Vec<P>, LoadError> {
    let (name, data) = file;
    if count == 0 || offset == 0 {
        return Ok(Vec::new());
    }
    let expected = P::size_for(class);
    if usize::from(entsize) != expected {
        return Err(LoadError::new(
            name,
            format!("e_{field}entsize"),
            format!("is {entsize}, and must be {expected}"),
        ));
    }
    let bytes = slice(
        name,
        &format!("e_{field}off"),
        data,
        offset,
        count * u64::from(entsize),
    )?;
    Ok(
        ParsingTable::<LittleEndian, P>::new(LittleEndian, class, bytes)
            .iter()
            .collect(),
    )
}

impl<'a> ElfFile<'a> {
    /// Decodes the header and both tables of `data`.
    ///
    /// # Errors
    /// It is not a little-endian ELF file of a supported version, or its tables
    /// are not all inside it.
    pub fn parse(name: &'a str, data: &'a [u8]) -> Result<Self, LoadError> {
        if !is_elf(data) {
            return Err(LoadError::new(name, "e_ident", "this is not an ELF file"));
        }
        let header_size = match data.get(abi::EI_CLASS) {
            Some(&abi::ELFCLASS32) => 52,
            _ => EHDR64_SIZE as u64,
        };
        let header_bytes = slice(name, "ELF header", data, 0, header_size)?;
        if header_bytes[abi::EI_DATA] != abi::ELFDATA2LSB {
            return Err(LoadError::new(
                name,
                "e_ident[EI_DATA]",
                "not little-endian: this file is not for an x86 machine",
            ));
        }
        let ident = parse_ident::<LittleEndian>(header_bytes)
            .map_err(|e| LoadError::new(name, "e_ident", e.to_string()))?;
        let header = FileHeader::parse_tail(ident, &header_bytes[abi::EI_NIDENT..])
            .map_err(|e| LoadError::new(name, "ELF header", e.to_string()))?;
        if header.version != u32::from(abi::EV_CURRENT) {
            return Err(LoadError::new(
                name,
                "e_version",
                format!("is {}, and must be 1", header.version),
            ));
        }
        let segments = table(
            (name, data),
            "ph",
            header.class,
            (
                header.e_phoff,
                header.e_phentsize,
                u64::from(header.e_phnum),
            ),
        )?;
        let sections = table(
            (name, data),
            "sh",
            header.class,
            (
                header.e_shoff,
                header.e_shentsize,
                u64::from(header.e_shnum),
            ),
        )?;
        Ok(Self {
            name,
            data,
            header,
            segments,
            sections,
        })
    }

    /// Checks that the file is for amd64.
    ///
    /// # Errors
    /// It is not; an i386 one is named as such.
    pub fn require_amd64(&self) -> Result<(), LoadError> {
        let machine = self.header.e_machine;
        if machine == abi::EM_386 {
            return Err(LoadError::new(
                self.name,
                "e_machine",
                "this is an i386 file, and only amd64 kernels can be loaded",
            )
            .hint("take the kernel of the amd64 release"));
        }
        if machine != abi::EM_X86_64 {
            return Err(LoadError::new(
                self.name,
                "e_machine",
                format!("this file is for {}, not amd64", machine_name(machine)),
            ));
        }
        if self.header.class != Class::ELF64 {
            return Err(LoadError::new(
                self.name,
                "e_ident[EI_CLASS]",
                "is 32-bit, and must be ELF64",
            ));
        }
        Ok(())
    }

    /// The file's bytes of a program header.
    ///
    /// # Errors
    /// They are not all in the file, or are more than the segment holds.
    pub fn segment_bytes(&self, index: usize) -> Result<&'a [u8], LoadError> {
        let segment = self.segments.get(index).ok_or_else(|| {
            LoadError::new(self.name, "e_phnum", format!("no program header {index}"))
        })?;
        if segment.p_filesz > segment.p_memsz {
            return Err(LoadError::new(
                self.name,
                format!("program header {index} p_filesz"),
                format!(
                    "{:#x} is more than p_memsz {:#x}",
                    segment.p_filesz, segment.p_memsz
                ),
            ));
        }
        slice(
            self.name,
            &format!("program header {index} p_offset/p_filesz"),
            self.data,
            segment.p_offset,
            segment.p_filesz,
        )
    }

    /// The file's bytes of a section (none for SHT_NOBITS).
    ///
    /// # Errors
    /// They are not all in the file.
    pub fn section_bytes(&self, index: usize) -> Result<&'a [u8], LoadError> {
        let section = self
            .sections
            .get(index)
            .ok_or_else(|| LoadError::new(self.name, "e_shnum", format!("no section {index}")))?;
        if section.sh_type == abi::SHT_NOBITS {
            return Ok(&[]);
        }
        slice(
            self.name,
            &format!("section {index} sh_offset/sh_size"),
            self.data,
            section.sh_offset,
            section.sh_size,
        )
    }

    /// The raw section header table.
    ///
    /// # Errors
    /// It is not all in the file.
    pub fn section_table_bytes(&self) -> Result<&'a [u8], LoadError> {
        slice(
            self.name,
            "e_shoff",
            self.data,
            self.header.e_shoff,
            u64::from(self.header.e_shnum) * u64::from(self.header.e_shentsize),
        )
    }

    /// The name of a section, or nothing where the string table does not hold it.
    #[must_use]
    pub fn section_name(&self, section: &SectionHeader) -> Option<&'a str> {
        let names = self
            .section_bytes(usize::from(self.header.e_shstrndx))
            .ok()?;
        let name = names.get(usize::try_from(section.sh_name).ok()?..)?;
        let end = name.iter().position(|&b| b == 0)?;
        std::str::from_utf8(&name[..end]).ok()
    }
}
