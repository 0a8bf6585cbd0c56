//! Puts the code and the constants of a relocatable object into one section.
//!
//! A linker leaves every relocation of such an object to the loader, those too whose
//! place and target stay at the same distance whatever happens, and each is 24 bytes of a
//! module that nobody can strip: more than the call or the address is. Of code that is
//! compiled to be position-independent, and lies in one section with the constants, what
//! is left is what the loader alone knows: pointers in tables, the host's functions, and
//! what is written to. Beside code, constants are as safe from writes as it is.

use anyhow::{Context, Result, bail, ensure};
use object::elf::{
    R_X86_64_64, R_X86_64_PC32, R_X86_64_PC64, R_X86_64_PLT32, SHF_ALLOC, SectionHeader64,
};
use object::read::elf::{Rela as _, SectionHeader as _};
use object::write::{
    Object, Relocation, SectionId, StandardSection, Symbol, SymbolId, SymbolSection,
};
use object::{
    Architecture, BinaryFormat, Endianness, File, LittleEndian, Object as _, ObjectSection as _,
    ObjectSymbol as _, RelocationFlags, RelocationTarget, SectionFlags, SectionIndex, SymbolFlags,
    SymbolIndex, SymbolKind, SymbolScope,
};
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

/// The sections that come together, in this order: addresses of code stay what they were.
const TOGETHER: [&str; 3] = [".text", ".rodata", ".data.rel.ro"];
/// Those that stay by themselves, as they are written to.
const APART: [(&str, StandardSection); 2] = [
    (".data", StandardSection::Data),
    (".bss", StandardSection::UninitializedData),
];

/// Those that nobody reads in a kernel: what unwinds stacks, which never happens there, and
/// what linkers ask for.
const IGNORED: [&str; 3] = [".eh_frame", ".gcc_except_table", ".note.gnu.property"];

/// JMP with a 32-bit displacement.
const JMP: [u8; 5] = [0xe9, 0, 0, 0, 0];
/// Ends of the names of what every exit to userland goes through: they call the host directly.
const DIRECT: [&str; 3] = ["3run3run", "3run10run_on_svm", "vmm_rust_vm_run"];
/// From how many calls on a jump of its own is worth while.
const SEVERAL: u32 = 2;

/// `old`, linked into the sections [`TOGETHER`] and [`APART`], with the first in one. Of
/// its symbols `exports` are seen from outside, functions keep their names for who
/// traces a stack, and there is no more debugging information.
///
/// # Errors
/// It is no such object, or has a relocation that does not fit.
pub fn join(old: &[u8], exports: &[&str]) -> Result<Vec<u8>> {
    let old = File::parse(old).context("no object")?;
    ensure!(
        old.architecture() == Architecture::X86_64 && old.format() == BinaryFormat::Elf,
        "no object for x86-64"
    );
    let mut new = Object::new(BinaryFormat::Elf, Architecture::X86_64, Endianness::Little);
    let mut joiner = Joiner {
        places: sections(&old, &mut new)?,
        symbols: HashMap::new(),
        stubs: HashMap::new(),
        direct: direct(&old),
        old: &old,
        new: &mut new,
    };
    joiner.symbols(exports)?;
    joiner.stubs()?;
    for section in old.sections() {
        if joiner.places.contains_key(&section.index()) {
            for (offset, relocation) in section.relocations() {
                joiner.relocate(section.index(), offset, &relocation)?;
            }
        }
    }
    new.write().context("cannot write an object")
}

/// Where a section of the old object is in the new one.
#[derive(Clone, Copy)]
struct Place {
    section: SectionId,
    base: u64,
}

/// Copies the sections' bytes.
fn sections(old: &File<'_>, new: &mut Object<'_>) -> Result<HashMap<SectionIndex, Place>> {
    for section in old.sections() {
        let (name, size) = (section.name()?, section.size());
        let loaded = matches!(section.flags(), SectionFlags::Elf { sh_flags } if sh_flags & u64::from(SHF_ALLOC) != 0);
        let known = TOGETHER.contains(&name)
            || APART.iter().any(|(apart, _)| *apart == name)
            || IGNORED.contains(&name);
        ensure!(
            !loaded || size == 0 || known,
            "{size} bytes of section {name}, which has no place in the module: name it in SECTIONS, or among those that are ignored"
        );
    }
    let together = TOGETHER.map(|name| (name, StandardSection::Text));
    let mut places = HashMap::new();
    for (name, kind) in together.into_iter().chain(APART) {
        let Some(section) = old.section_by_name(name) else {
            continue;
        };
        let into = new.section_id(kind);
        let base = if kind == StandardSection::UninitializedData {
            new.append_section_bss(into, section.size(), section.align())
        } else {
            new.append_section_data(into, section.data()?, section.align())
        };
        places.insert(
            section.index(),
            Place {
                section: into,
                base,
            },
        );
    }
    Ok(places)
}

struct Joiner<'a, 'd> {
    old: &'a File<'d>,
    new: &'a mut Object<'static>,
    places: HashMap<SectionIndex, Place>,
    /// The new symbols of old ones that have a name outside.
    symbols: HashMap<SymbolIndex, SymbolId>,
    /// Addresses in `.text` of jumps to the host's functions.
    stubs: HashMap<SymbolIndex, u64>,
    /// Where of the old sections [`DIRECT`] are.
    direct: Vec<(SectionIndex, Range<u64>)>,
}

fn direct(old: &File<'_>) -> Vec<(SectionIndex, Range<u64>)> {
    old.symbols()
        .filter(|s| {
            s.name()
                .is_ok_and(|n| DIRECT.iter().any(|d| n.ends_with(d)))
        })
        .filter_map(|s| Some((s.section_index()?, s.address()..s.address() + s.size())))
        .collect()
}

impl Joiner<'_, '_> {
    fn symbols(&mut self, exports: &[&str]) -> Result<()> {
        let mut missing: Vec<&str> = exports.to_vec();
        for symbol in self.old.symbols() {
            let name = symbol.name()?;
            let exported = exports.contains(&name);
            let place = symbol
                .section_index()
                .and_then(|index| self.places.get(&index));
            let section = match place {
                Some(place) => SymbolSection::Section(place.section),
                None if symbol.is_undefined() && !name.is_empty() => SymbolSection::Undefined,
                None => continue,
            };
            let function = symbol.kind() == SymbolKind::Text && !name.is_empty();
            if !(function || exported || symbol.is_undefined()) {
                continue;
            }
            missing.retain(|m| *m != name);
            let id = self.new.add_symbol(Symbol {
                name: name.into(),
                value: symbol.address() + place.map_or(0, |p| p.base),
                size: symbol.size(),
                kind: symbol.kind(),
                scope: match (symbol.is_undefined(), exported) {
                    (true, _) => SymbolScope::Unknown,
                    (false, true) => SymbolScope::Linkage,
                    (false, false) => SymbolScope::Compilation,
                },
                weak: false,
                section,
                flags: SymbolFlags::None,
            });
            if symbol.is_undefined() {
                self.symbols.insert(symbol.index(), id);
            }
        }
        ensure!(missing.is_empty(), "no {} in it", missing.join(", "));
        Ok(())
    }

    /// A function of the host's that is called from several places gets one jump to it, which
    /// they call: five bytes and one relocation.
    fn stubs(&mut self) -> Result<()> {
        let mut calls: BTreeMap<usize, u32> = BTreeMap::new();
        for section in self.old.sections() {
            if self.places.contains_key(&section.index()) {
                for (at, relocation) in section.relocations() {
                    if let Some(host) = self.call(section.index(), at, &relocation) {
                        *calls.entry(host.0).or_default() += 1;
                    }
                }
            }
        }
        let text = self.new.section_id(StandardSection::Text);
        for (host, _) in calls.into_iter().filter(|(_, n)| *n >= SEVERAL) {
            let host = SymbolIndex(host);
            let Some(symbol) = self.symbols.get(&host) else {
                continue;
            };
            let at = self.new.append_section_data(text, &JMP, 1);
            self.stubs.insert(host, at);
            let relocation = Relocation {
                offset: at + 1,
                symbol: *symbol,
                addend: -4,
                flags: RelocationFlags::Elf {
                    r_type: R_X86_64_PLT32,
                },
            };
            self.new.add_relocation(text, relocation)?;
        }
        Ok(())
    }

    /// The function of the host's that a relocation is a call of, from a place from where a
    /// jump more does not matter.
    fn call(
        &self,
        of: SectionIndex,
        at: u64,
        relocation: &object::Relocation,
    ) -> Option<SymbolIndex> {
        if self.direct.iter().any(|(s, r)| *s == of && r.contains(&at)) {
            return None;
        }
        match (relocation.flags(), relocation.target()) {
            (
                RelocationFlags::Elf {
                    r_type: R_X86_64_PLT32,
                },
                RelocationTarget::Symbol(target),
            ) => self.symbols.contains_key(&target).then_some(target),
            _ => None,
        }
    }

    /// Settles a relocation of section `of`, or hands it on.
    fn relocate(
        &mut self,
        of: SectionIndex,
        offset: u64,
        relocation: &object::Relocation,
    ) -> Result<()> {
        let Some(&Place { section, base }) = self.places.get(&of) else {
            return Ok(());
        };
        let at = base + offset;
        let (RelocationFlags::Elf { r_type }, RelocationTarget::Symbol(target)) =
            (relocation.flags(), relocation.target())
        else {
            bail!("a relocation without a symbol at {at:#x}");
        };
        let width = match r_type {
            R_X86_64_PC32 | R_X86_64_PLT32 => 4,
            R_X86_64_PC64 | R_X86_64_64 => 8,
            _ => {
                bail!("a relocation of type {r_type} at {at:#x}, which module loaders do not take")
            }
        };
        let relative = r_type != R_X86_64_64;
        let symbol = self.old.symbol_by_index(target)?;
        let place = symbol.section_index().and_then(|i| self.places.get(&i));
        let (symbol, addend) = match place {
            Some(place) => {
                let address =
                    (place.base + symbol.address()).wrapping_add_signed(relocation.addend());
                if relative && place.section == section {
                    return self.settle(section, at, address.wrapping_sub(at) as i64, width);
                }
                (self.new.section_symbol(place.section), address as i64)
            }
            None => {
                if let Some(stub) = self
                    .call(of, offset, relocation)
                    .and_then(|host| self.stubs.get(&host))
                {
                    let address = stub.wrapping_add_signed(relocation.addend());
                    return self.settle(section, at, address.wrapping_sub(at) as i64, width);
                }
                let id = self.symbols.get(&target);
                let id = id.with_context(|| {
                    format!("what is at {at:#x} points to nothing that is loaded")
                })?;
                (*id, relocation.addend())
            }
        };
        let flags = RelocationFlags::Elf { r_type };
        let relocation = Relocation {
            offset: at,
            symbol,
            addend,
            flags,
        };
        self.new.add_relocation(section, relocation)?;
        Ok(())
    }

    /// Writes a distance of `width` bytes.
    fn settle(&mut self, section: SectionId, at: u64, distance: i64, width: usize) -> Result<()> {
        let bytes = distance.to_le_bytes();
        ensure!(
            width == 8 || i32::try_from(distance).is_ok(),
            "a distance of {distance} at {at:#x}"
        );
        let start = usize::try_from(at)?;
        self.new
            .section_mut(section)
            .data_mut()
            .get_mut(start..start + width)
            .with_context(|| format!("a relocation at {at:#x}, outside of its section"))?
            .copy_from_slice(&bytes[..width]);
        Ok(())
    }
}

/// Settles what is left of a linked module in the same way, in place: what [`join`] could not, as
/// it lies in other objects. What this frees goes with the next `strip`.
///
/// # Errors
/// It is no such object.
pub fn settle(module: &mut [u8]) -> Result<()> {
    let mut changes: Vec<(usize, Vec<u8>)> = Vec::new();
    {
        let file = object::read::elf::ElfFile64::<LittleEndian>::parse(&*module)?;
        let header = file.elf_header();
        let table = header.e_shoff.get(LittleEndian);
        let size_of_header = size_of::<SectionHeader64<LittleEndian>>() as u64;
        for (index, section) in file.elf_section_table().enumerate() {
            let Some((entries, _)) = section.rela(LittleEndian, &*module)? else {
                continue;
            };
            let of = SectionIndex(section.sh_info(LittleEndian) as usize);
            let target = file.section_by_index(of)?;
            let Some((start, _)) = target.file_range() else {
                continue;
            };
            let mut left = Vec::new();
            let mut settled = false;
            for entry in entries {
                let kind = entry.r_type(LittleEndian, false);
                let symbol = SymbolIndex(entry.r_sym(LittleEndian, false) as usize);
                let at = entry.r_offset(LittleEndian);
                let here = symbol.0 != 0
                    && matches!(kind, R_X86_64_PC32 | R_X86_64_PLT32)
                    && file.symbol_by_index(symbol)?.section_index() == Some(of);
                if here {
                    let address = file
                        .symbol_by_index(symbol)?
                        .address()
                        .wrapping_add_signed(entry.r_addend(LittleEndian));
                    let distance = i32::try_from(address.wrapping_sub(at) as i64)?;
                    changes.push((
                        usize::try_from(start + at)?,
                        distance.to_le_bytes().to_vec(),
                    ));
                    settled = true;
                } else {
                    left.extend_from_slice(object::pod::bytes_of(entry));
                }
            }
            if settled {
                let size = table + index.0 as u64 * size_of_header + SH_SIZE;
                changes.push((
                    usize::try_from(size)?,
                    (left.len() as u64).to_le_bytes().to_vec(),
                ));
                changes.push((usize::try_from(section.sh_offset(LittleEndian))?, left));
            }
        }
    }
    for (at, bytes) in changes {
        module
            .get_mut(at..at + bytes.len())
            .context("a section is outside of the file")?
            .copy_from_slice(&bytes);
    }
    Ok(())
}

/// Where a section's header has its size.
const SH_SIZE: u64 = 32;

#[cfg(test)]
mod tests {
    use super::*;
    use object::SectionKind;

    /// Code that calls `host` twice and `f` once, reads a constant and a variable; and a
    /// constant that points to `f`.
    fn sample() -> Vec<u8> {
        let mut o = Object::new(BinaryFormat::Elf, Architecture::X86_64, Endianness::Little);
        let text = o.section_id(StandardSection::Text);
        let constants = o.section_id(StandardSection::ReadOnlyData);
        let tables = o.add_section(
            Vec::new(),
            b".data.rel.ro".to_vec(),
            SectionKind::ReadOnlyDataWithRel,
        );
        let data = o.section_id(StandardSection::Data);
        o.append_section_data(text, &[0x90; 64], 16);
        o.append_section_data(constants, b"constant", 8);
        o.append_section_data(tables, &[0; 8], 8);
        o.append_section_data(data, b"variable", 8);
        let symbol = |o: &mut Object<'_>, name: &str, value, section| {
            o.add_symbol(Symbol {
                name: name.into(),
                value,
                size: 16,
                kind: SymbolKind::Text,
                scope: match section {
                    SymbolSection::Undefined => SymbolScope::Unknown,
                    _ => SymbolScope::Linkage,
                },
                weak: false,
                section,
                flags: SymbolFlags::None,
            })
        };
        let entry = symbol(&mut o, "entry", 0, SymbolSection::Section(text));
        let f = symbol(&mut o, "f", 48, SymbolSection::Section(text));
        let host = symbol(&mut o, "host", 0, SymbolSection::Undefined);
        assert_ne!(entry, f);
        let of_constants = o.section_symbol(constants);
        let of_data = o.section_symbol(data);
        for (section, offset, symbol, addend, r_type) in [
            (text, 1, host, -4, R_X86_64_PLT32),
            (text, 6, host, -4, R_X86_64_PLT32),
            (text, 11, f, -4, R_X86_64_PLT32),
            (text, 20, of_constants, 2 - 4, R_X86_64_PC32),
            (text, 28, of_data, -4, R_X86_64_PC32),
            (tables, 0, f, 0, R_X86_64_64),
        ] {
            let relocation = Relocation {
                offset,
                symbol,
                addend,
                flags: RelocationFlags::Elf { r_type },
            };
            o.add_relocation(section, relocation).unwrap();
        }
        o.write().unwrap()
    }

    #[test]
    fn what_would_be_lost_is_refused() {
        let with = |name: &str, kind| {
            let mut o = Object::new(BinaryFormat::Elf, Architecture::X86_64, Endianness::Little);
            let text = o.section_id(StandardSection::Text);
            o.append_section_data(text, &[0x90; 4], 16);
            let more = o.add_section(Vec::new(), name.as_bytes().to_vec(), kind);
            o.append_section_data(more, b"bytes", 1);
            join(&o.write().unwrap(), &[])
        };
        let error = with(".init_array", SectionKind::ReadOnlyData).unwrap_err();
        assert!(format!("{error:#}").contains("5 bytes of section .init_array"));
        assert!(with(".eh_frame", SectionKind::ReadOnlyData).is_ok());
        assert!(with(".comment", SectionKind::Other).is_ok(), "not loaded");
    }

    /// Where the distance at `at` leads to.
    fn target(text: &[u8], at: usize) -> usize {
        let distance = i32::from_le_bytes(text[at..at + 4].try_into().unwrap());
        at.wrapping_add_signed(distance as isize) + 4
    }

    #[test]
    fn distances_within_the_section_are_settled() {
        let joined = join(&sample(), &["entry"]).unwrap();
        let file = File::parse(&*joined).unwrap();
        let section = file.section_by_name(".text").unwrap();
        let text = section.data().unwrap();
        assert_eq!(target(text, 11), 48);
        assert_eq!(&text[target(text, 20)..][..6], b"nstant");
        // Both calls by one jump, which the loader leads to the host's function.
        let stub = target(text, 1);
        assert_eq!(target(text, 6), stub);
        assert_eq!(text[stub], JMP[0]);
        let left: Vec<(u64, u32)> = section
            .relocations()
            .map(|(at, r)| match r.flags() {
                RelocationFlags::Elf { r_type } => (at, r_type),
                other => panic!("{other:?}"),
            })
            .collect();
        // To the variable, from the table, and the jump's.
        let kinds: Vec<u32> = left.iter().map(|l| l.1).collect();
        assert_eq!(left.len(), 3, "{left:?}");
        assert!(kinds.contains(&R_X86_64_PC32) && kinds.contains(&R_X86_64_64));
        assert!(left.contains(&(stub as u64 + 1, R_X86_64_PLT32)));
    }

    #[test]
    fn only_exports_are_seen_from_outside() {
        let joined = join(&sample(), &["entry"]).unwrap();
        let file = File::parse(&*joined).unwrap();
        let symbol = |name| file.symbol_by_name(name).unwrap();
        assert!(symbol("entry").is_global());
        assert!(symbol("f").is_local());
        assert!(join(&sample(), &["absent"]).is_err());
    }

    #[test]
    fn what_was_left_is_settled_in_place() {
        let mut o = Object::new(BinaryFormat::Elf, Architecture::X86_64, Endianness::Little);
        let text = o.section_id(StandardSection::Text);
        o.append_section_data(text, &[0x90; 32], 16);
        let undefined = |name: &str| Symbol {
            name: name.into(),
            value: 0,
            size: 0,
            kind: SymbolKind::Unknown,
            scope: SymbolScope::Unknown,
            weak: false,
            section: SymbolSection::Undefined,
            flags: SymbolFlags::None,
        };
        let host = o.add_symbol(undefined("host"));
        let f = o.add_symbol(Symbol {
            value: 24,
            kind: SymbolKind::Text,
            scope: SymbolScope::Linkage,
            section: SymbolSection::Section(text),
            ..undefined("f")
        });
        for (offset, symbol) in [(1, f), (6, host)] {
            let relocation = Relocation {
                offset,
                symbol,
                addend: -4,
                flags: RelocationFlags::Elf {
                    r_type: R_X86_64_PLT32,
                },
            };
            o.add_relocation(text, relocation).unwrap();
        }
        let mut module = o.write().unwrap();
        settle(&mut module).unwrap();
        let file = File::parse(&*module).unwrap();
        let section = file.section_by_name(".text").unwrap();
        assert_eq!(target(section.data().unwrap(), 1), 24);
        let left: Vec<u64> = section.relocations().map(|(at, _)| at).collect();
        assert_eq!(left, [6]);
    }
}
