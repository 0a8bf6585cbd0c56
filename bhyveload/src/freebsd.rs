//! A FreeBSD amd64 kernel, with its modules, memory disks and environment, as
//! FreeBSD's own loader would have left them in memory.

use crate::cpu::{self, freebsd_layout};
use crate::elffile::{EHDR64_SIZE, ElfFile, is_elf};
use crate::env::{Environment, check_length};
use crate::error::LoadError;
use crate::input::Input;
use crate::kld;
use crate::layout::{PAGE_SIZE, fits, round_up};
use crate::linux;
use crate::multiboot;
use crate::preload::{self, Preloaded};
use crate::target::LoadTarget;
use elf::abi;

/// Where the kernel's image is linked: physical 0 (sys/amd64/include/vmparam.h).
pub const KERNBASE: u64 = 0xffff_ffff_8000_0000;

/// The loader's page tables show only the first GiB, and the kernel reads what it
/// was handed through them.
const REACH: u64 = 1 << 30;

/// A file that goes with the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// Its contents.
    pub input: Input,
    /// The path the kernel shall know it by.
    pub name: String,
    /// The type; without one the file must be a kernel module. Anything else
    /// ("md_image", "mfs_root", "boot_entropy_cache", …) is loaded as it is.
    pub kind: Option<String>,
    /// Arguments for a kernel module.
    pub args: Option<String>,
}

/// Everything that a FreeBSD guest is started with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FreeBsd {
    /// The kernel.
    pub kernel: Input,
    /// The path the kernel shall know itself by.
    pub kernel_name: String,
    /// The kernel's arguments, as `boot` of loader(8) takes them, if any.
    pub kernel_args: Option<String>,
    /// Modules and memory disks, in order.
    pub modules: Vec<Module>,
    /// The environment before [`set_defaults`].
    pub environment: Environment,
}

/// What was loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    /// Where the kernel is entered (a virtual address).
    pub entry: u64,
    /// Guest physical address of the list of preloaded files.
    pub modulep: u64,
    /// First free page.
    pub kernend: u64,
    /// The preloaded files.
    pub files: Vec<Preloaded>,
    /// The environment the kernel gets.
    pub environment: Environment,
}

/// Sets the variables that every guest gets unless it has its own value.
///
/// `smbios.bios.vendor` and `boot_serial` are stock bhyveload's; the hints tell
/// the kernel that COM1 is its console, which a host folder's `device.hints`
/// would say (flag 0x10 is "console" for uart(4)).
///
/// `machdep.disable_tsc_calibration` is ours: FreeBSD measures its TSC against
/// one second of the 8254, tens of thousands of exits, unless told not to
/// (sys/x86/x86/tsc.c). Told so, it takes the frequency from CPUID leaf 0x15,
/// which our VMM states exactly. Without that leaf it would guess from the CPU's
/// name, so it is set only where the leaf is there.
pub fn set_defaults(environment: &mut Environment, has_tsc_leaf: bool) {
    environment.set_default("smbios.bios.vendor", "BHYVE");
    environment.set_default("boot_serial", "1");
    environment.set_default("console", "comconsole");
    if !environment
        .iter()
        .any(|(name, _)| name.starts_with("hint.uart."))
    {
        for (name, value) in [
            ("hint.uart.0.at", "isa"),
            ("hint.uart.0.port", "0x3F8"),
            ("hint.uart.0.flags", "0x10"),
            ("hint.uart.0.irq", "4"),
        ] {
            environment.set_default(name, value);
        }
    }
    if has_tsc_leaf {
        environment.set_default("machdep.disable_tsc_calibration", "1");
    }
}

fn require_kernel<'a>(input: &'a Input) -> Result<ElfFile<'a>, LoadError> {
    let name = input.name.as_str();
    if !is_elf(&input.data) {
        let error = LoadError::new(name, "e_ident", "this is not an ELF file");
        return Err(if linux::is_bzimage(&input.data) {
            error.hint("it is a Linux bzImage: load it with --linux")
        } else {
            error
        });
    }
    let elf = ElfFile::parse(name, &input.data)?;
    let multiboot_hint = |error: LoadError| {
        if multiboot::find_header(&input.data).is_some() {
            error.hint("it has a multiboot header: load it with --multiboot")
        } else {
            error
        }
    };
    elf.require_amd64().map_err(multiboot_hint)?;
    if elf.header.e_type != abi::ET_EXEC {
        let error = LoadError::new(
            name,
            "e_type",
            format!(
                "is {}, and a kernel is an executable (2)",
                elf.header.e_type
            ),
        );
        return Err(if elf.header.e_type == abi::ET_REL {
            error.hint("this looks like a kernel module: load it with --module")
        } else {
            error
        });
    }
    if elf.header.e_entry < KERNBASE {
        return Err(multiboot_hint(
            LoadError::new(
                name,
                "e_entry",
                format!(
                    "{:#x} lies below KERNBASE {KERNBASE:#x}",
                    elf.header.e_entry
                ),
            )
            .hint("this is no FreeBSD kernel; perhaps a program"),
        ));
    }
    Ok(elf)
}

/// Loads the kernel's segments; answers their lowest and highest address.
fn load_segments(
    target: &mut dyn LoadTarget,
    elf: &ElfFile<'_>,
    limit: u64,
) -> Result<(u64, u64), LoadError> {
    let mut first = u64::MAX;
    let mut last = 0;
    for (i, segment) in elf.segments.iter().enumerate() {
        if segment.p_type != abi::PT_LOAD || segment.p_memsz == 0 {
            continue;
        }
        let field = format!("program header {i} p_vaddr/p_memsz");
        let Some(gpa) = segment.p_vaddr.checked_sub(KERNBASE) else {
            return Err(LoadError::new(
                elf.name,
                field,
                format!("{:#x} lies below KERNBASE {KERNBASE:#x}", segment.p_vaddr),
            ));
        };
        fits(
            elf.name,
            &field,
            gpa,
            segment.p_memsz,
            freebsd_layout::END,
            limit,
        )?;
        // 640 KiB to 1 MiB is not memory in the map the kernel gets.
        if gpa < 0x10_0000 && gpa + segment.p_memsz > 0xa_0000 {
            return Err(LoadError::new(
                elf.name,
                field,
                format!("{gpa:#x} lies in the hole below 1 MiB"),
            ));
        }
        let bytes = elf.segment_bytes(i)?;
        target.write(gpa, bytes)?;
        let filled = bytes.len() as u64;
        target.zero(gpa + filled, segment.p_memsz - filled)?;
        first = first.min(gpa);
        last = last.max(gpa + segment.p_memsz);
    }
    if first == u64::MAX {
        return Err(LoadError::new(
            elf.name,
            "program headers",
            "there is no PT_LOAD segment",
        ));
    }
    let entry = elf.header.e_entry - KERNBASE;
    let inside = elf.segments.iter().any(|s| {
        s.p_type == abi::PT_LOAD && entry.wrapping_sub(s.p_vaddr.wrapping_sub(KERNBASE)) < s.p_memsz
    });
    if !inside {
        return Err(LoadError::new(
            elf.name,
            "e_entry",
            format!("{:#x} lies in no PT_LOAD segment", elf.header.e_entry),
        ));
    }
    Ok((first, last))
}

/// Appends the symbol and string tables, each after its size; answers the
/// records and the new end.
fn load_symbols(
    target: &mut dyn LoadTarget,
    elf: &ElfFile<'_>,
    start: u64,
    limit: u64,
) -> Result<Option<(u64, u64)>, LoadError> {
    let in_segment = |offset: u64, size: u64| {
        elf.segments.iter().any(|s| {
            s.p_type == abi::PT_LOAD
                && offset >= s.p_offset
                && offset.saturating_add(size) <= s.p_offset.saturating_add(s.p_filesz)
        })
    };
    let Some(symtab) = elf.sections.iter().rposition(|s| {
        s.sh_type == abi::SHT_SYMTAB && s.sh_size != 0 && !in_segment(s.sh_offset, s.sh_size)
    }) else {
        return Ok(None);
    };
    let strtab = elf.sections[symtab].sh_link as usize;
    if elf
        .sections
        .get(strtab)
        .is_none_or(|s| s.sh_type != abi::SHT_STRTAB)
    {
        return Err(LoadError::new(
            elf.name,
            format!("section {symtab} sh_link"),
            format!("section {strtab} is no string table"),
        ));
    }
    let mut at = start;
    for (index, what) in [(symtab, "symbol table"), (strtab, "string table")] {
        let bytes = elf.section_bytes(index)?;
        let size = bytes.len() as u64;
        fits(
            elf.name,
            &format!("{what} sh_size"),
            at,
            size + 16,
            0,
            limit,
        )?;
        target.write(at, &size.to_le_bytes())?;
        target.write(at + 8, bytes)?;
        let end = at + 8 + size;
        let aligned = end.next_multiple_of(8);
        target.zero(end, aligned - end)?;
        at = aligned;
    }
    Ok(Some((start, at)))
}

fn load_kernel(
    target: &mut dyn LoadTarget,
    boot: &FreeBsd,
    elf: &ElfFile<'_>,
    limit: u64,
) -> Result<Preloaded, LoadError> {
    let (first, last) = load_segments(target, elf, limit)?;
    let mut end = last.next_multiple_of(8);
    let mut metadata = Vec::new();
    let word = |value: u64| value.to_le_bytes().to_vec();
    if !elf.sections.is_empty() {
        metadata.push((preload::MD_SHDR, elf.section_table_bytes()?.to_vec()));
        if let Some(ctors) = elf
            .sections
            .iter()
            .find(|s| elf.section_name(s) == Some(".ctors"))
        {
            metadata.push((preload::MD_CTORS_ADDR, word(ctors.sh_addr)));
            metadata.push((preload::MD_CTORS_SIZE, word(ctors.sh_size)));
        }
        if let Some((ssym, esym)) = load_symbols(target, elf, end, limit)? {
            metadata.push((preload::MD_SSYM, word(ssym)));
            metadata.push((preload::MD_ESYM, word(esym)));
            end = esym;
        }
    }
    if let Some(dynamic) = elf.segments.iter().find(|s| s.p_type == abi::PT_DYNAMIC) {
        metadata.push((preload::MD_DYNAMIC, word(dynamic.p_vaddr)));
    }
    metadata.push((preload::MD_ELFHDR, elf.data[..EHDR64_SIZE].to_vec()));
    Ok(Preloaded {
        name: boot.kernel_name.clone(),
        kind: "elf kernel".to_owned(),
        args: boot.kernel_args.clone(),
        addr: first,
        size: end - first,
        metadata,
    })
}

fn next_page(name: &str, at: u64) -> Result<u64, LoadError> {
    round_up(at, PAGE_SIZE).ok_or_else(|| LoadError::new(name, "size", "the address space is full"))
}

fn load_module(
    target: &mut dyn LoadTarget,
    module: &Module,
    addr: u64,
    limit: u64,
) -> Result<Preloaded, LoadError> {
    let data = &module.input.data;
    let file = module.input.name.as_str();
    match module.kind.as_deref() {
        None | Some(kld::KIND | "elf module") => {
            let elf = ElfFile::parse(file, data).map_err(|error| {
                if is_elf(data) {
                    error
                } else {
                    error.hint("name a type, as in FILE,type=md_image, to load it as it is")
                }
            })?;
            let args = module.args.as_deref();
            kld::load(target, &elf, (&module.name, args), addr, limit)
        }
        Some("elf kernel" | "elf64 kernel") => Err(LoadError::new(
            file,
            "type",
            "a module cannot be a second kernel",
        )),
        Some(kind) => {
            if data.is_empty() {
                return Err(LoadError::new(file, "size", "is empty"));
            }
            fits(file, "size", addr, data.len() as u64, 0, limit)?;
            target.write(addr, data)?;
            Ok(Preloaded {
                name: module.name.clone(),
                kind: kind.to_owned(),
                args: module.args.clone(),
                addr,
                size: data.len() as u64,
                metadata: Vec::new(),
            })
        }
    }
}

/// Loads everything into `target` and sets the boot vCPU to enter the kernel.
///
/// # Errors
/// A file is not what it should be, or all of it does not fit below 1 GiB or
/// into the VM's memory.
pub fn load(target: &mut dyn LoadTarget, boot: &FreeBsd) -> Result<Loaded, LoadError> {
    let limit = target.low_memory().min(REACH);
    let elf = require_kernel(&boot.kernel)?;
    let kernel = load_kernel(target, boot, &elf, limit)?;
    let mut end = kernel.addr + kernel.size;
    let mut files = vec![kernel];
    for module in &boot.modules {
        let addr = next_page(&module.input.name, end)?;
        let loaded = load_module(target, module, addr, limit)?;
        end = addr + loaded.size;
        files.push(loaded);
    }

    let mut environment = boot.environment.clone();
    environment.set_default("kernelname", &boot.kernel_name);
    let disk = files
        .iter()
        .any(|f| f.kind == "md_image" || f.kind == "mfs_root");
    if disk {
        environment.set_default("vfs.root.mountfrom", "ufs:/dev/md0");
    }
    set_defaults(&mut environment, target.has_tsc_leaf());
    for (name, value) in environment.iter() {
        check_length(name, value)
            .map_err(|problem| LoadError::new("environment", name, problem))?;
    }

    let kernel_file = boot.kernel.name.as_str();
    let envp = next_page(kernel_file, end)?;
    let text = environment.encode();
    fits(
        kernel_file,
        "environment",
        envp,
        text.len() as u64,
        0,
        limit,
    )?;
    target.write(envp, &text)?;

    let modulep = next_page(kernel_file, envp + text.len() as u64)?;
    let smap = preload::smap(target.low_memory(), target.high_memory());
    files[0].metadata.extend([
        (
            preload::MD_HOWTO,
            environment.howto().to_le_bytes().to_vec(),
        ),
        (preload::MD_ENVP, envp.to_le_bytes().to_vec()),
        (preload::MD_KERNEND, vec![0; 8]),
        (preload::MD_SMAP, smap),
    ]);
    let size = preload::encode(&files).len() as u64;
    fits(kernel_file, "preload metadata", modulep, size, 0, limit)?;
    let kernend = next_page(kernel_file, modulep + size)?;
    fits(kernel_file, "kernend", kernend, 0, 0, limit)?;
    for (kind, data) in &mut files[0].metadata {
        if *kind == preload::MD_KERNEND {
            *data = kernend.to_le_bytes().to_vec();
        }
    }
    target.write(modulep, &preload::encode(&files))?;

    // Both are below REACH, so the 32-bit words of the entry hold them.
    cpu::enter_freebsd(target, elf.header.e_entry, modulep as u32, kernend as u32)?;
    Ok(Loaded {
        entry: elf.header.e_entry,
        modulep,
        kernend,
        files,
        environment,
    })
}
