//! A Linux bzImage by the 64-bit boot protocol, 2.12 or newer
//! (Documentation/arch/x86/boot.rst and zero-page.rst of Linux).

use crate::cpu::{self, linux_layout};
use crate::error::LoadError;
use crate::input::Input;
use crate::layout::{PAGE_SIZE, fits, le16, le32, le64, round_up, slice};
use crate::target::LoadTarget;

/// Offsets in the setup header, which are the same in the file and in the zero page.
mod offset {
    pub const HEADER: usize = 0x1f1;
    pub const SETUP_SECTS: usize = 0x1f1;
    pub const BOOT_FLAG: usize = 0x1fe;
    pub const JUMP_LENGTH: usize = 0x201;
    pub const MAGIC: usize = 0x202;
    pub const VERSION: usize = 0x206;
    pub const TYPE_OF_LOADER: usize = 0x210;
    pub const LOADFLAGS: usize = 0x211;
    pub const RAMDISK_IMAGE: usize = 0x218;
    pub const RAMDISK_SIZE: usize = 0x21c;
    pub const CMD_LINE_PTR: usize = 0x228;
    pub const INITRD_ADDR_MAX: usize = 0x22c;
    pub const KERNEL_ALIGNMENT: usize = 0x230;
    pub const RELOCATABLE: usize = 0x234;
    pub const XLOADFLAGS: usize = 0x236;
    pub const CMDLINE_SIZE: usize = 0x238;
    pub const PREF_ADDRESS: usize = 0x258;
    pub const INIT_SIZE: usize = 0x260;
    /// Zero page: number of E820 entries.
    pub const E820_COUNT: usize = 0x1e8;
    /// Zero page: E820 entries of 20 bytes.
    pub const E820_TABLE: usize = 0x2d0;
}

const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
const LOADER_UNDEFINED: u8 = 0xff;
/// The 64-bit entry lies this far into the protected-mode code.
const ENTRY_64: u64 = 0x200;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// A Linux guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Linux {
    /// The bzImage.
    pub kernel: Input,
    /// An initramfs.
    pub initrd: Option<Input>,
    /// The command line.
    pub command_line: String,
}

/// What was loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loaded {
    /// Where the kernel is entered.
    pub entry: u64,
    /// Where the kernel lies.
    pub kernel: u64,
    /// Where the initramfs lies, if there is one.
    pub initrd: Option<u64>,
}

/// Whether `data` has the boot sector and header of a bzImage.
#[must_use]
pub fn is_bzimage(data: &[u8]) -> bool {
    le16(data, offset::BOOT_FLAG) == Some(0xaa55)
        && data.get(offset::MAGIC..offset::MAGIC + 4) == Some(b"HdrS")
}

struct Header<'a> {
    setup: &'a [u8],
    code: &'a [u8],
    address: u64,
    init_size: u64,
    command_line_max: usize,
    initrd_max: u64,
}

fn parse<'a>(input: &'a Input) -> Result<Header<'a>, LoadError> {
    let file = input.name.as_str();
    let data = input.data.as_slice();
    let truncated = |field: &str| {
        LoadError::new(file, field, "lies outside the file")
            .hint("the file is truncated or damaged")
    };
    if !is_bzimage(data) {
        let error = LoadError::new(file, "header", "this is not a Linux bzImage");
        return Err(if crate::elffile::is_elf(data) {
            error.hint("it is an ELF file: take arch/x86/boot/bzImage, or use --kernel for FreeBSD")
        } else {
            error
        });
    }
    let version = le16(data, offset::VERSION).ok_or_else(|| truncated("version"))?;
    if version < 0x20c {
        return Err(LoadError::new(
            file,
            "version",
            format!(
                "boot protocol {}.{:02} is older than 2.12",
                version >> 8,
                version & 0xff
            ),
        )
        .hint("Linux 3.8 and newer have it"));
    }
    let init_size = le32(data, offset::INIT_SIZE).ok_or_else(|| truncated("init_size"))?;
    let loadflags = data[offset::LOADFLAGS];
    if loadflags & LOADED_HIGH == 0 {
        return Err(LoadError::new(
            file,
            "loadflags",
            "this is a zImage, not a bzImage",
        ));
    }
    let xloadflags = le16(data, offset::XLOADFLAGS).ok_or_else(|| truncated("xloadflags"))?;
    if xloadflags & XLF_KERNEL_64 == 0 {
        return Err(LoadError::new(
            file,
            "xloadflags",
            "the kernel has no 64-bit entry: it is a 32-bit kernel",
        )
        .hint("take an amd64 kernel"));
    }
    let setup_sectors = match data[offset::SETUP_SECTS] {
        0 => 4,
        n => u64::from(n),
    };
    let setup_size = (setup_sectors + 1) * 512;
    let header_end = offset::MAGIC as u64 + u64::from(data[offset::JUMP_LENGTH]);
    let setup = slice(file, "setup_sects", data, 0, setup_size)?;
    if header_end > offset::E820_TABLE as u64 || header_end > setup_size {
        return Err(LoadError::new(
            file,
            "jump",
            format!("the header's end {header_end:#x} is impossible"),
        ));
    }
    let code = &data[setup.len()..];
    if code.len() as u64 <= ENTRY_64 {
        return Err(truncated("protected-mode code"));
    }
    let alignment =
        le32(data, offset::KERNEL_ALIGNMENT).ok_or_else(|| truncated("kernel_alignment"))?;
    let preferred = le64(data, offset::PREF_ADDRESS).ok_or_else(|| truncated("pref_address"))?;
    let relocatable = data[offset::RELOCATABLE] != 0;
    if relocatable && !alignment.is_power_of_two() {
        return Err(LoadError::new(
            file,
            "kernel_alignment",
            format!("{alignment:#x} is no power of two"),
        ));
    }
    if preferred < MIB {
        return Err(LoadError::new(
            file,
            "pref_address",
            format!("{preferred:#x} lies below 1 MiB"),
        ));
    }
    Ok(Header {
        setup,
        code,
        address: preferred,
        init_size: u64::from(init_size).max(code.len() as u64),
        command_line_max: le32(data, offset::CMDLINE_SIZE).unwrap_or(255) as usize,
        initrd_max: u64::from(le32(data, offset::INITRD_ADDR_MAX).unwrap_or(0x37ff_ffff)),
    })
}

fn e820(low: u64, high: u64) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, 0xa_0000, E820_RAM),
        (0xa_0000, 0x6_0000, E820_RESERVED),
        (MIB, low.saturating_sub(MIB), E820_RAM),
        // PCI configuration space by memory (ECAM) of bhyve: Linux believes the
        // ACPI table MCFG only where the map or the DSDT reserves it.
        (0xe000_0000, 0x1000_0000, E820_RESERVED),
    ];
    if high != 0 {
        map.push((4 * GIB, high, E820_RAM));
    }
    map
}

/// Loads the kernel, initramfs and command line, and sets the boot vCPU to enter.
///
/// # Errors
/// A file is not what it should be, or they do not fit into the VM's memory.
pub fn load(target: &mut dyn LoadTarget, boot: &Linux) -> Result<Loaded, LoadError> {
    let limit = target.low_memory();
    let header = parse(&boot.kernel)?;
    let file = boot.kernel.name.as_str();
    fits(
        file,
        "init_size",
        header.address,
        header.init_size,
        MIB,
        limit,
    )?;
    target.write(header.address, header.code)?;

    let line = boot.command_line.as_bytes();
    let room = (0x9_0000 - linux_layout::COMMAND_LINE as usize - 1).min(header.command_line_max);
    if line.len() > room {
        return Err(LoadError::new(
            file,
            "cmdline_size",
            format!(
                "the command line has {} bytes, and the kernel takes {room}",
                line.len()
            ),
        ));
    }
    if line.contains(&0) {
        return Err(LoadError::new("--cmdline", "text", "holds a NUL byte"));
    }
    target.write(linux_layout::COMMAND_LINE, line)?;
    target.write(linux_layout::COMMAND_LINE + line.len() as u64, &[0])?;

    let initrd = match &boot.initrd {
        None => None,
        Some(initrd) => {
            let size = initrd.data.len() as u64;
            let top = limit.min(header.initrd_max + 1);
            let floor = round_up(header.address + header.init_size, PAGE_SIZE).unwrap_or(u64::MAX);
            let at = top
                .checked_sub(size)
                .map(|at| at & !(PAGE_SIZE - 1))
                .filter(|&at| at >= floor)
                .ok_or_else(|| {
                    LoadError::new(
                        initrd.name.as_str(),
                        "size",
                        format!("{size:#x} bytes do not fit between the kernel's end {floor:#x} and {top:#x}"),
                    )
                    .hint("give the VM more memory with -m")
                })?;
            target.write(at, &initrd.data)?;
            Some((at, size))
        }
    };

    let mut page = vec![0u8; PAGE_SIZE as usize];
    let header_end = offset::MAGIC + usize::from(header.setup[offset::JUMP_LENGTH]);
    page[offset::HEADER..header_end].copy_from_slice(&header.setup[offset::HEADER..header_end]);
    page[offset::TYPE_OF_LOADER] = LOADER_UNDEFINED;
    let mut put32 = |at: usize, value: u32| page[at..at + 4].copy_from_slice(&value.to_le_bytes());
    put32(offset::CMD_LINE_PTR, linux_layout::COMMAND_LINE as u32);
    if let Some((at, size)) = initrd {
        put32(offset::RAMDISK_IMAGE, at as u32);
        put32(offset::RAMDISK_SIZE, size as u32);
    }
    let map = e820(limit, target.high_memory());
    page[offset::E820_COUNT] = map.len() as u8;
    let table = page[offset::E820_TABLE..].chunks_exact_mut(20);
    for (slot, (base, length, kind)) in table.zip(map) {
        slot[..8].copy_from_slice(&base.to_le_bytes());
        slot[8..16].copy_from_slice(&length.to_le_bytes());
        slot[16..].copy_from_slice(&kind.to_le_bytes());
    }
    target.write(linux_layout::ZERO_PAGE, &page)?;

    let entry = header.address + ENTRY_64;
    cpu::enter_linux(target, entry)?;
    Ok(Loaded {
        entry,
        kernel: header.address,
        initrd: initrd.map(|(at, _)| at),
    })
}
