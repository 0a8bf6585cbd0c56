//! The project's commands. `cargo xtask boot` boots a guest on our vmm.ko,
//! bhyveload and bhyve; `cargo xtask test` tests everything.
#![forbid(unsafe_code)]

mod bench;
mod boot;
mod check;
mod deb;
mod fuzz;
mod pages;
mod port;
mod terminal;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand, ValueEnum};
use lab::dirs::Dirs;
use lab::kmod_freebsd::Headers;
use lab::machine::{Engine, Machine, Pci, Spec};
use lab::progress::step;
use lab::{
    apt, core_src, host, host_kernel, kmod, kmod_freebsd, programs, programs_freebsd, ziglang,
};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

#[derive(Debug, Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    about = "Build, boot and test bhyve"
)]
struct Arguments {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Boot a guest on our vmm.ko, bhyveload and bhyve, in a host in an emulator
    Boot(Box<boot::Options>),
    /// Check and test everything
    Test(check::Options),
    /// Measure vmm.ko and bhyve against KVM and the bare machine
    Bench(bench::Options),
    /// Cut the power of a host whose guest writes, again and again, and count what
    /// acknowledged writes are lost
    PowerCut {
        /// How often
        #[arg(long, default_value_t = 50)]
        rounds: u32,
    },
    /// Run a fuzz target for some time
    Fuzz(fuzz::Options),
    /// Build vmm.ko, for Debian's cloud kernel unless told otherwise, and print its path
    Kmod {
        /// The kernel that it is for
        #[arg(long, default_value = "linux")]
        host: KmodHost,
        /// FreeBSD's kernel sources, its /usr/src/sys; without them the module is
        /// compiled and linked against the headers that ziglang carries, a check
        #[arg(long)]
        sys: Option<PathBuf>,
        /// The headers of a Linux kernel, /lib/modules/RELEASE/build, instead of
        /// Debian's cloud kernel's
        #[arg(long)]
        headers: Option<PathBuf>,
    },
    /// Build bhyve, bhyvectl and bhyveload and print their paths
    Programs {
        /// The system that they are for: static programs for Linux, or FreeBSD/amd64
        #[arg(long, default_value = "linux")]
        host: KmodHost,
        /// An installed FreeBSD (its usr/lib): the programs are static and run
        /// on that release. Without it they are for FreeBSD 14 and later
        #[arg(long, value_name = "DIR")]
        sysroot: Option<PathBuf>,
    },
    /// Build Debian packages of the programs and, with DKMS, of the module
    Deb,
    /// Write the FreeBSD ports with their distfiles and print their paths
    Port,
    /// Write the manual pages and print their paths
    Man,
    /// Write the shell completions and print their paths
    Completions,
    /// Boot Debian's kernel on the bare emulator, to compare a guest's log with
    Bare {
        /// What runs it
        #[arg(long, default_value = "bochs")]
        engine: boot::EngineName,
        /// CPUs
        #[arg(short = 'c', default_value_t = 1)]
        cpus: u32,
        /// Added to the kernel's command line
        #[arg(long, default_value = "")]
        cmdline: String,
        /// Kernel in place of Debian's
        #[arg(long)]
        kernel: Option<PathBuf>,
    },
}

/// Systems that vmm.ko and the programs can be built for.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum KmodHost {
    /// Debian, with its cloud kernel
    Linux,
    /// FreeBSD/amd64
    Freebsd,
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<ExitCode> {
    // cargo run says where the package is; a moved binary is not supported.
    let package = std::env::var_os("CARGO_MANIFEST_DIR").context("run me as `cargo xtask`")?;
    let dirs = Dirs::new(&Path::new(&package).join("../.."))?;
    match arguments.command {
        Verb::Boot(options) => boot::run(&dirs, &options),
        Verb::Test(options) => check::run(&dirs, &options),
        Verb::Bench(options) => bench::run(&dirs, &options),
        Verb::PowerCut { rounds } => {
            host::prerequisites(&[Engine::Qemu])?;
            let kit = host::Kit::build(&dirs)?.with_guests(&dirs)?;
            lab::cases::powercut::run(&dirs, &kit, rounds)?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::Fuzz(options) => fuzz::run(&dirs, &options),
        Verb::Kmod {
            host: KmodHost::Freebsd,
            sys,
            headers: _,
        } => {
            host::prerequisites(&[])?;
            let headers = match sys {
                Some(sys) => {
                    apt::ensure_installed(&kmod_freebsd::PACKAGES)?;
                    Headers::tree(&sys)?
                }
                None => Headers::Zig(ziglang::ensure(&dirs)?),
            };
            println!("{}", kmod_freebsd::build(&dirs, &headers)?.display());
            if matches!(headers, Headers::Zig(_)) {
                eprintln!("(it compiles and links; to load it, build it with --sys)");
            }
            Ok(ExitCode::SUCCESS)
        }
        Verb::Kmod {
            host: KmodHost::Linux,
            headers,
            ..
        } => {
            host::prerequisites(&[])?;
            let headers = match headers {
                Some(headers) => headers,
                None => host_kernel::ensure(&dirs)?.headers,
            };
            core_src::ensure(&dirs)?;
            println!("{}", kmod::build(&dirs, &headers)?.display());
            Ok(ExitCode::SUCCESS)
        }
        Verb::Programs { host, sysroot } => {
            host::prerequisites(&[])?;
            let built = step("bhyve, bhyvectl, bhyveload", || match host {
                KmodHost::Linux => programs::build(&dirs),
                KmodHost::Freebsd => programs_freebsd::build(&dirs, sysroot.as_deref()),
            })?;
            for program in built {
                println!("{}", program.display());
            }
            Ok(ExitCode::SUCCESS)
        }
        Verb::Deb => {
            host::prerequisites(&[])?;
            for package in deb::build(&dirs)? {
                println!("{}", package.display());
            }
            Ok(ExitCode::SUCCESS)
        }
        Verb::Port => {
            host::prerequisites(&[])?;
            list(&port::write(&dirs)?)
        }
        Verb::Man => list(&pages::write(&dirs)?.join("man")),
        Verb::Completions => list(&pages::write(&dirs)?.join("completions")),
        Verb::Bare {
            engine,
            cpus,
            cmdline,
            kernel,
        } => bare(&dirs, engine.resolve(), cpus, &cmdline, kernel),
    }
}

/// Prints the paths of all files in a folder.
fn list(folder: &Path) -> Result<ExitCode> {
    for file in pages::files(folder)? {
        println!("{}", file.display());
    }
    Ok(ExitCode::SUCCESS)
}

fn bare(
    dirs: &Dirs,
    engine: Engine,
    cpus: u32,
    cmdline: &str,
    kernel: Option<PathBuf>,
) -> Result<ExitCode> {
    host::prerequisites(&[engine])?;
    let kernel = match kernel {
        Some(file) => file,
        None => host_kernel::ensure(dirs)?.image,
    };
    let initramfs = std::fs::read(host::guest_initrd(dirs)?)?;
    let spec = Spec {
        disk: None,
        engine,
        cpus,
        memory_mib: 1024,
        count_instructions: false,
        pci: Pci::default(),
        kernel,
        initramfs,
        cmdline: format!(
            "console=ttyS0,115200 {} {} {cmdline}",
            host::LEAN,
            engine.kernel_parameters()
        ),
    };
    let dir = dirs.fresh("bare")?;
    let mut machine = Machine::start(&spec, &dir)?;
    let interactive = terminal::Raw::new()?;
    if interactive.is_some() {
        terminal::converse(&mut machine.com1, || Ok(false))?;
    } else {
        step("userland on the bare machine", || {
            machine.com1.expect("guest userland: .*", host::BOOT)
        })?;
        machine.com1.expect("# ", Duration::from_secs(10))?;
        println!("{}", machine.com1.text());
    }
    println!("console log: {}", machine.com1.transcript().display());
    Ok(ExitCode::SUCCESS)
}
