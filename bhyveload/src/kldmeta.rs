//! What a kernel or a module says of itself: the modules in it and those it
//! depends on (`set_modmetadata_set`; sys/sys/module.h of FreeBSD).

use crate::elffile::ElfFile;
use crate::layout::{le32, le64};
use elf::abi;
use std::collections::HashMap;

/// A dependency on a module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Depend {
    /// The module.
    pub module: String,
    /// Least, preferred and greatest version.
    pub versions: (u32, u32, u32),
}

impl Depend {
    /// Whether a version of the module will do.
    #[must_use]
    pub fn accepts(&self, version: u32) -> bool {
        (self.versions.0..=self.versions.2).contains(&version)
    }
}

/// A file's metadata.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Metadata {
    /// Modules in the file, with their versions.
    pub provides: Vec<(String, u32)>,
    /// Modules it needs.
    pub depends: Vec<Depend>,
}

const SET: &str = "set_modmetadata_set";
/// MDT_DEPEND.
const DEPEND: u32 = 1;
/// MDT_VERSION.
const VERSION: u32 = 3;
/// Longest name of a module (MAXMODNAME).
const LONGEST_NAME: usize = 32;
/// A kernel with everything in it has some 600.
const MOST: usize = 4096;

/// Bytes of a file at a place that a pointer led to.
type Bytes<'a> = &'a [u8];

/// Follows the pointers of a linked file, or of a relocatable one.
enum Pointers<'a> {
    /// An executable: a pointer is an address in a segment.
    Linked(&'a ElfFile<'a>),
    /// An object: a pointer is where a relocation is, by section and offset.
    Object {
        elf: &'a ElfFile<'a>,
        relocations: HashMap<(usize, u64), (usize, u64)>,
    },
}

/// A place in a file: the section (of an object) or nothing, and the offset in
/// it or the address.
#[derive(Clone, Copy)]
struct Place {
    section: usize,
    offset: u64,
}

impl<'a> Pointers<'a> {
    fn of(elf: &'a ElfFile<'a>) -> Self {
        if elf.header.e_type != abi::ET_REL {
            return Self::Linked(elf);
        }
        let mut relocations = HashMap::new();
        for (index, section) in elf.sections.iter().enumerate() {
            if section.sh_type != abi::SHT_RELA {
                continue;
            }
            let symbols = elf.section_bytes(section.sh_link as usize);
            let (Ok(entries), Ok(symbols)) = (elf.section_bytes(index), symbols) else {
                continue;
            };
            for entry in entries.chunks_exact(24) {
                let (Some(at), Some(info), Some(addend)) =
                    (le64(entry, 0), le64(entry, 8), le64(entry, 16))
                else {
                    continue;
                };
                if info & 0xffff_ffff != u64::from(abi::R_X86_64_64) {
                    continue;
                }
                let symbol = usize::try_from(info >> 32)
                    .ok()
                    .and_then(|number| symbols.get(number.checked_mul(24)?..)?.get(..24));
                let Some(symbol) = symbol else {
                    continue;
                };
                let target = usize::from(u16::from_le_bytes([symbol[6], symbol[7]]));
                let value = le64(symbol, 8).unwrap_or_default().wrapping_add(addend);
                relocations.insert((section.sh_info as usize, at), (target, value));
            }
        }
        Self::Object { elf, relocations }
    }

    /// The bytes from a place to the end of what it lies in.
    fn bytes(&self, place: Place) -> Option<Bytes<'a>> {
        match self {
            Self::Linked(elf) => (0..elf.segments.len()).find_map(|i| {
                let segment = &elf.segments[i];
                let within = place.offset.checked_sub(segment.p_vaddr)?;
                if segment.p_type != abi::PT_LOAD {
                    return None;
                }
                let bytes = elf.segment_bytes(i).ok()?;
                bytes.get(usize::try_from(within).ok()?..)
            }),
            Self::Object { elf, .. } => elf
                .section_bytes(place.section)
                .ok()?
                .get(usize::try_from(place.offset).ok()?..),
        }
    }

    /// Where the pointer at a place leads.
    fn follow(&self, place: Place) -> Option<Place> {
        match self {
            Self::Linked(_) => Some(Place {
                section: 0,
                offset: le64(self.bytes(place)?, 0)?,
            }),
            Self::Object { relocations, .. } => {
                let &(section, offset) = relocations.get(&(place.section, place.offset))?;
                Some(Place { section, offset })
            }
        }
    }

    fn record(&self, at: Place, found: &mut Metadata) -> Option<()> {
        let behind = |bytes: u64| Place {
            offset: at.offset.wrapping_add(bytes),
            ..at
        };
        let kind = le32(self.bytes(at)?, 4)?;
        if kind != DEPEND && kind != VERSION {
            return None;
        }
        let data = self.bytes(self.follow(behind(8))?)?;
        let name = self.bytes(self.follow(behind(16))?)?;
        let name = &name[..name.len().min(LONGEST_NAME)];
        let end = name.iter().position(|&b| b == 0)?;
        let module = std::str::from_utf8(&name[..end]).ok()?.to_owned();
        if kind == VERSION {
            found.provides.push((module, le32(data, 0)?));
        } else {
            found.depends.push(Depend {
                module,
                versions: (le32(data, 0)?, le32(data, 4)?, le32(data, 8)?),
            });
        }
        Some(())
    }
}

/// The metadata of a kernel or a module; a record that makes no sense is left out.
#[must_use]
pub fn parse(elf: &ElfFile<'_>) -> Metadata {
    let mut found = Metadata::default();
    let pointers = Pointers::of(elf);
    for (index, section) in elf.sections.iter().enumerate() {
        if elf.section_name(section) != Some(SET) {
            continue;
        }
        let base = match pointers {
            Pointers::Linked(_) => section.sh_addr,
            Pointers::Object { .. } => 0,
        };
        let count = (section.sh_size / 8).min(MOST as u64);
        for i in 0..count {
            let pointer = Place {
                section: index,
                offset: base.wrapping_add(8 * i),
            };
            if let Some(record) = pointers.follow(pointer) {
                pointers.record(record, &mut found);
            }
        }
    }
    found
}
