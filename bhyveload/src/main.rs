//! bhyveload: puts a kernel into a VM without a BIOS.
#![forbid(unsafe_code)]

use bhyve_sandbox::{Mode, Purpose};
use bhyveload::cli::{Cli, Guest, with_config};
use bhyveload::console::{Console, Terminal};
use bhyveload::error::LoadError;
use bhyveload::loader::Outcome;
use bhyveload::target::TargetError;
use bhyveload::vm::VmTarget;
use bhyveload::{freebsd, linux, multiboot, opened};
use clap::Parser;
use std::process::ExitCode;
use vmmapi::{MemFlags, Vm};

/// No file that is loaded can be larger than the memory below 4 GiB.
const LARGEST_FILE: u64 = 3 << 30;

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

fn in_vm(cli: &Cli, e: impl Into<TargetError>) -> LoadError {
    LoadError {
        file: cli.vm.clone(),
        ..LoadError::from(e.into())
    }
}

/// Puts everything out of reach but the files to be loaded and this VM.
fn confine(cli: &Cli, vm: &Vm, made: bool) -> Result<(), LoadError> {
    let (mode, name) = (cli.sandbox, cli.vm.clone());
    let refused = move |call: &str| {
        eprintln!("bhyveload: the sandbox refused {call}; --sandbox=log goes on all the same");
        if mode == Mode::On {
            // Half a guest is worse than none.
            if made && let Err(e) = Vm::destroy(&name) {
                eprintln!("bhyveload: {e}");
            }
            std::process::exit(1);
        }
    };
    let told = |e: String| LoadError::new("--sandbox", cli.sandbox.to_string(), e);
    let mut needs = cli.needs();
    if cfg!(target_os = "freebsd") && mode != Mode::Off {
        // In capability mode nothing has a name: what is read is opened before.
        for path in std::mem::take(&mut needs.read) {
            opened::keep(&path);
        }
        needs.write.clear();
        // FreeBSD's own vmm.ko destroys by name: there, half a guest stays, as
        // with FreeBSD's own bhyveload.
        let _ = Vm::keep_control();
        let limited = bhyve_sandbox::limit(vm, Purpose::Vm(&Vm::requests()));
        limited.map_err(|e| told(e.to_string()))?;
    }
    let report = bhyve_sandbox::enter(mode, &needs, refused).map_err(|e| told(e.to_string()))?;
    if cli.verbose {
        for what in report.lacking {
            eprintln!("bhyveload: sandbox: {what}");
        }
    }
    Ok(())
}

fn load(cli: &Cli, mut console: Terminal, vm: Vm, made: bool) -> Result<ExitCode, LoadError> {
    let limit = cli.memory.min(LARGEST_FILE);
    let guest = if cli.has_loader() {
        console.raw()?;
        match cli.run_loader(&mut console, limit)? {
            Outcome::Boot(boot) => Guest::FreeBsd(boot),
            Outcome::Leave(status) => return Ok(ExitCode::from(status)),
        }
    } else {
        cli.read(limit)?
    };
    let flags = MemFlags {
        wired: cli.wired,
        in_core: cli.in_core,
    };
    let mut target = VmTarget::prepare(vm, made, cli.memory, flags).map_err(|e| in_vm(cli, e))?;
    let lines = describe(&mut target, &guest)?;
    if cli.verbose {
        for line in lines {
            console.print(&format!("{line}\n"))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn run(cli: &Cli) -> Result<ExitCode, LoadError> {
    if let Some(warning) = cli.check()? {
        eprintln!("bhyveload: warning: {warning}");
    }
    // The VM comes first, so that nothing need be made when files are read.
    let (vm, made) = Vm::open_or_create(&cli.vm).map_err(|e| in_vm(cli, e))?;
    let result = Terminal::open(&cli.console).and_then(|console| {
        confine(cli, &vm, made)?;
        load(cli, console, vm, made)
    });
    if made && !matches!(result, Ok(ExitCode::SUCCESS)) {
        // Why it failed matters more.
        if let Err(e) = Vm::destroy(&cli.vm) {
            eprintln!("bhyveload: {e}");
        }
    }
    result
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
        Ok(status) => status,
        Err(error) => {
            eprintln!("bhyveload: {error}");
            ExitCode::FAILURE
        }
    }
}
