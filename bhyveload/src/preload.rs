//! The list of preloaded files that a FreeBSD kernel finds at `modulep`
//! (sys/sys/linker.h and sys/x86/include/metadata.h of FreeBSD 12.1).
//!
//! A record is a 32-bit type, a 32-bit size and that many bytes, padded to 8.

/// MODINFO_NAME: a string, and the first record of a file.
pub const NAME: u32 = 0x0001;
/// MODINFO_TYPE: a string.
pub const TYPE: u32 = 0x0002;
/// MODINFO_ADDR: guest physical address, 64 bits.
pub const ADDR: u32 = 0x0003;
/// MODINFO_SIZE: bytes, 64 bits.
pub const SIZE: u32 = 0x0004;
/// MODINFO_ARGS: a string.
pub const ARGS: u32 = 0x0006;
/// MODINFO_METADATA: set in the types below.
pub const METADATA: u32 = 0x8000;

/// MODINFOMD_ELFHDR: the ELF header.
pub const MD_ELFHDR: u32 = 0x0002;
/// MODINFOMD_SSYM: where the symbols start, 64 bits.
pub const MD_SSYM: u32 = 0x0003;
/// MODINFOMD_ESYM: where the symbols end, 64 bits.
pub const MD_ESYM: u32 = 0x0004;
/// MODINFOMD_DYNAMIC: virtual address of `_DYNAMIC`, 64 bits.
pub const MD_DYNAMIC: u32 = 0x0005;
/// MODINFOMD_ENVP: where the environment is, 64 bits.
pub const MD_ENVP: u32 = 0x0006;
/// MODINFOMD_HOWTO: boot flags, 32 bits.
pub const MD_HOWTO: u32 = 0x0007;
/// MODINFOMD_KERNEND: first free page after all that was loaded, 64 bits.
pub const MD_KERNEND: u32 = 0x0008;
/// MODINFOMD_SHDR: the section header table.
pub const MD_SHDR: u32 = 0x0009;
/// MODINFOMD_CTORS_ADDR: virtual address of `.ctors`, 64 bits.
pub const MD_CTORS_ADDR: u32 = 0x000a;
/// MODINFOMD_CTORS_SIZE: bytes of `.ctors`, 64 bits.
pub const MD_CTORS_SIZE: u32 = 0x000b;
/// MODINFOMD_SMAP: the memory map, entries of {base: u64, length: u64, type: u32}.
pub const MD_SMAP: u32 = 0x1001;

/// One file in guest memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Preloaded {
    /// The path the kernel knows it by.
    pub name: String,
    /// "elf kernel", "elf obj module", "md_image", …
    pub kind: String,
    /// The arguments, if any.
    pub args: Option<String>,
    /// Guest physical address.
    pub addr: u64,
    /// Bytes in guest memory.
    pub size: u64,
    /// Further records: type without [`METADATA`], and contents.
    pub metadata: Vec<(u32, Vec<u8>)>,
}

fn record(list: &mut Vec<u8>, kind: u32, data: &[u8]) {
    list.extend_from_slice(&kind.to_le_bytes());
    list.extend_from_slice(&(data.len() as u32).to_le_bytes());
    list.extend_from_slice(data);
    list.resize(list.len().next_multiple_of(8), 0);
}

fn string(list: &mut Vec<u8>, kind: u32, text: &str) {
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    record(list, kind, &bytes);
}

/// The list as the kernel reads it, the kernel itself first.
#[must_use]
pub fn encode(files: &[Preloaded]) -> Vec<u8> {
    let mut list = Vec::new();
    for file in files {
        string(&mut list, NAME, &file.name);
        string(&mut list, TYPE, &file.kind);
        if let Some(args) = &file.args {
            string(&mut list, ARGS, args);
        }
        record(&mut list, ADDR, &file.addr.to_le_bytes());
        record(&mut list, SIZE, &file.size.to_le_bytes());
        for (kind, data) in &file.metadata {
            record(&mut list, METADATA | kind, data);
        }
    }
    list.extend_from_slice(&[0; 8]);
    list
}

/// The memory map of a VM: 640 KiB, what is above 1 MiB, and what is above 4 GiB.
#[must_use]
pub fn smap(low: u64, high: u64) -> Vec<u8> {
    const MEMORY: u32 = 1;
    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;
    let mut map = Vec::new();
    let mut entry = |base: u64, length: u64| {
        map.extend_from_slice(&base.to_le_bytes());
        map.extend_from_slice(&length.to_le_bytes());
        map.extend_from_slice(&MEMORY.to_le_bytes());
    };
    entry(0, 640 * 1024);
    entry(MIB, low.saturating_sub(MIB));
    if high != 0 {
        entry(4 * GIB, high);
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_padded_to_eight_and_the_list_ends_in_zeroes() {
        let list = encode(&[Preloaded {
            name: "k".into(),
            kind: "elf kernel".into(),
            args: None,
            addr: 0x20_0000,
            size: 7,
            metadata: vec![(MD_HOWTO, 5u32.to_le_bytes().to_vec())],
        }]);
        let expected: Vec<u8> = [
            &[1, 0, 0, 0, 2, 0, 0, 0][..],
            b"k\0\0\0\0\0\0\0",
            &[2, 0, 0, 0, 11, 0, 0, 0],
            b"elf kernel\0\0\0\0\0\0",
            &[3, 0, 0, 0, 8, 0, 0, 0],
            &[0, 0, 0x20, 0, 0, 0, 0, 0],
            &[4, 0, 0, 0, 8, 0, 0, 0],
            &[7, 0, 0, 0, 0, 0, 0, 0],
            &[7, 0x80, 0, 0, 4, 0, 0, 0],
            &[5, 0, 0, 0, 0, 0, 0, 0],
            &[0; 8],
        ]
        .concat();
        assert_eq!(list, expected);
    }

    #[test]
    fn the_memory_map_leaves_the_hole_below_one_mebibyte() {
        let map = smap(256 << 20, 1 << 30);
        assert_eq!(map.len(), 60);
        assert_eq!(map[20..28], (1u64 << 20).to_le_bytes());
        assert_eq!(map[28..36], (255u64 << 20).to_le_bytes());
        assert_eq!(map[40..48], (4u64 << 30).to_le_bytes());
        assert_eq!(smap(256 << 20, 0).len(), 40);
    }
}
