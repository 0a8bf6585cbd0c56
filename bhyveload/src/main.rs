//! bhyveload: puts a kernel into a VM without a BIOS.
#![forbid(unsafe_code)]

use bhyveload::cli::{Cli, Guest, with_config};
use bhyveload::error::LoadError;
use bhyveload::vm::VmTarget;
use bhyveload::{freebsd, linux, multiboot};
use clap::Parser;
use std::fs::OpenOptions;
use std::io::{Write, stdout};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::process::ExitCode;
use vmmapi::MemFlags;

/// No file that is loaded can be larger than the memory below 4 GiB.
const LARGEST_FILE: u64 = 3 << 30;

fn open_console(name: &str) -> Result<Box<dyn Write>, LoadError> {
    if name == "stdio" {
        return Ok(Box::new(stdout()));
    }
    let bad = |problem: String| LoadError::new("-c", name, problem);
    let console = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(nix::fcntl::OFlag::O_NOCTTY.bits() | nix::fcntl::OFlag::O_NONBLOCK.bits())
        .open(name)
        .map_err(|e| bad(e.to_string()))?;
    let kind = console.metadata().map_err(|e| bad(e.to_string()))?;
    if !kind.file_type().is_char_device() {
        return Err(bad("is no terminal device".to_owned()).hint("give stdio or a /dev/... name"));
    }
    Ok(Box::new(console))
}

fn describe(target: &mut VmTarget, guest: &Guest) -> Result<Vec<String>, LoadError> {
    match guest {
        Guest::FreeBsd(boot) => {
            let loaded = freebsd::load(target, boot)?;
            let mut lines: Vec<String> = loaded
                .files
                .iter()
                .map(|f| {
                    format!(
                        "{:#010x} {:#x} bytes  {} ({})",
                        f.addr, f.size, f.name, f.kind
                    )
                })
                .collect();
            lines.extend(
                loaded
                    .environment
                    .iter()
                    .map(|(n, v)| format!("{n}=\"{v}\"")),
            );
            lines.push(format!(
                "entry {:#x}, modulep {:#x}, kernend {:#x}",
                loaded.entry, loaded.modulep, loaded.kernend
            ));
            Ok(lines)
        }
        Guest::Linux(boot) => {
            let loaded = linux::load(target, boot)?;
            let mut lines = vec![format!("{:#010x} {}", loaded.kernel, boot.kernel.name)];
            if let (Some(at), Some(initrd)) = (loaded.initrd, &boot.initrd) {
                lines.push(format!("{at:#010x} {}", initrd.name));
            }
            lines.push(format!("entry {:#x}", loaded.entry));
            Ok(lines)
        }
        Guest::Multiboot(boot) => {
            let loaded = multiboot::load(target, boot)?;
            Ok(vec![format!(
                "entry {:#x}, boot information {:#x}",
                loaded.entry, loaded.information
            )])
        }
    }
}

fn run(cli: &Cli) -> Result<(), LoadError> {
    let (guest, warnings) = cli.read(cli.memory.min(LARGEST_FILE))?;
    for warning in warnings {
        eprintln!("bhyveload: warning: {warning}");
    }
    let mut console = open_console(&cli.console)?;
    let flags = MemFlags {
        wired: cli.wired,
        in_core: cli.in_core,
    };
    let in_vm = |e| LoadError {
        file: cli.vm.clone(),
        ..LoadError::from(e)
    };
    let mut target = VmTarget::create(&cli.vm, cli.memory, flags).map_err(in_vm)?;
    match describe(&mut target, &guest) {
        Ok(lines) => {
            if cli.verbose {
                for line in lines {
                    writeln!(console, "{line}\r")
                        .map_err(|e| LoadError::new("-c", cli.console.as_str(), e.to_string()))?;
                }
            }
            Ok(())
        }
        Err(error) => {
            target.abandon().map_err(in_vm)?;
            Err(error)
        }
    }
}

fn main() -> ExitCode {
    let words = match with_config(std::env::args_os().collect()) {
        Ok(words) => words,
        Err(error) => {
            eprintln!("bhyveload: {error}");
            return ExitCode::FAILURE;
        }
    };
    match run(&Cli::parse_from(words)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bhyveload: {error}");
            ExitCode::FAILURE
        }
    }
}
