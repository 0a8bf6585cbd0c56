//! `cargo xtask boot`.

use crate::terminal;
use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::{Args, ValueEnum};
use lab::dirs::Dirs;
use lab::freebsd_host;
use lab::guest::{self, Load};
use lab::host::{self, Config, GUEST_EXIT, Host, Kit, SHORT};
use lab::images::{self, FreeBsd};
use lab::machine::Engine;
use lab::progress::{say, step};
use lab::report::{Instructions, Report};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// The VM's name in the host.
const VM: &str = "guest";

/// Where bhyve leaves its counts in the host.
const EXIT_STATS: &str = "/tmp/exits.json";

/// What the console of a guest whose userland is up says.
const LINUX_UP: &str = r"guest# ";
const FREEBSD_UP: &str =
    r"guest userland: |login: |Enter full pathname of shell|(?m)^# $|mountroot> |BHYVE-RS GUEST UP";

/// Engines by name on the command line.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum EngineName {
    /// KVM where it offers VMX or SVM to guests, otherwise Bochs
    Auto,
    /// QEMU with nested KVM
    Kvm,
    /// Bochs: VT-x emulated
    Bochs,
    /// QEMU's TCG: AMD-V emulated
    Qemu,
}

impl EngineName {
    /// The engine itself.
    pub fn resolve(self) -> Engine {
        match self {
            Self::Auto => Engine::auto(),
            Self::Kvm => Engine::Kvm,
            Self::Bochs => Engine::Bochs,
            Self::Qemu => Engine::Qemu,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum GuestName {
    /// FreeBSD from memory: a kernel and a memory-disk root
    Freebsd,
    /// FreeBSD from the first --disk, by its own loader.conf [default disk: the
    /// image directory's disk/freebsd-12.1-disk.img]
    FreebsdDisk,
    Linux,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum HostName {
    /// Debian's kernel
    Linux,
    /// FreeBSD 12.1, where an image directory has a host
    Freebsd,
}

/// Options of `cargo xtask boot`.
#[derive(Debug, Args)]
pub struct Options {
    /// Guest to boot [default: FreeBSD where an image is at hand, otherwise Linux]
    #[arg(long)]
    guest: Option<GuestName>,
    /// Guest kernel: a FreeBSD amd64 ELF file or a Linux bzImage
    #[arg(long)]
    kernel: Option<PathBuf>,
    /// FreeBSD memory-disk root
    #[arg(long)]
    mfsroot: Option<PathBuf>,
    /// Linux initramfs
    #[arg(long)]
    initrd: Option<PathBuf>,
    /// FreeBSD kernel module to preload
    #[arg(long)]
    module: Vec<PathBuf>,
    /// Raw disk image, for the guest a virtio disk (repeatable); the file
    /// itself stays as it is
    #[arg(long, value_name = "FILE")]
    disk: Vec<PathBuf>,
    /// FreeBSD kernel environment variable
    #[arg(short = 'e', value_name = "NAME=VALUE")]
    environment: Vec<String>,
    /// Linux kernel command line
    #[arg(long)]
    cmdline: Option<String>,
    /// The guest's vCPUs
    #[arg(short = 'c', default_value_t = 1)]
    vcpus: u32,
    /// The guest's memory, in MiB or with a suffix M or G
    #[arg(short = 'm', default_value = "256M")]
    memory: String,
    /// What runs the host
    #[arg(long, default_value = "auto")]
    engine: EngineName,
    /// The host's system
    #[arg(long, default_value = "linux")]
    host: HostName,
    /// The host's CPUs
    #[arg(long, default_value_t = 1)]
    host_cpus: u32,
    /// Added to the host kernel's command line; for FreeBSD, variables of its
    /// loader
    #[arg(long, default_value = "")]
    host_cmdline: String,
    /// Options for vmm.ko, as insmod takes them (account=1)
    #[arg(long, default_value = "")]
    vmm_options: String,
    /// Give the guest an x2APIC (bhyve -x)
    #[arg(long)]
    x2apic: bool,
    /// More options for bhyve, in one word
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    bhyve_options: String,
    /// Stop when the guest's console matches; fail if it never does
    #[arg(long, value_name = "REGEX")]
    expect: Option<String>,
    /// Type this line on the guest's console when its userland is up (repeatable);
    /// waits for the next prompt in between
    #[arg(long = "type", value_name = "LINE")]
    type_lines: Vec<String>,
    /// Go on until bhyve ends by itself, and take its exit status
    #[arg(long)]
    until_exit: bool,
    /// Seconds the guest may take
    #[arg(long, default_value_t = 900)]
    timeout: u64,
    /// Write a JSON report
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Directory of FreeBSD's release to fetch a guest from
    #[arg(long, value_name = "URL", default_value = images::FREEBSD_BASE_URL)]
    freebsd_base_url: String,
}

/// A guest's files and how it shows that it is up.
struct Guest {
    kind: GuestName,
    /// Nothing, where the disk has it.
    kernel: Option<PathBuf>,
    /// mfsroot or initrd.
    root: Option<PathBuf>,
    /// Disk images.
    disks: Vec<PathBuf>,
    up: &'static str,
}

/// Boots a guest.
pub fn run(dirs: &Dirs, options: &Options) -> Result<ExitCode> {
    let started = Instant::now();
    let engine = options.engine.resolve();
    let memory_mib = mebibytes(&options.memory)?;
    host::prerequisites(&[engine])?;
    let kit = match options.host {
        HostName::Linux => Kit::build(dirs)?,
        HostName::Freebsd => {
            let image = freebsd_host::find(dirs).map_err(|why| anyhow!("--host freebsd: {why}"))?;
            Kit::build_freebsd(dirs, &image)?
        }
    };
    let guest = choose(dirs, options, &kit)?;

    let mut config = Config::new(engine, memory_mib);
    config.cpus = options.host_cpus;
    config.cmdline.clone_from(&options.host_cmdline);
    if let Some(kernel) = &guest.kernel {
        config.file("guest/kernel", kernel);
    }
    if let Some(root) = &guest.root {
        config.file("guest/root", root);
    }
    for (i, module) in options.module.iter().enumerate() {
        config.file(&format!("guest/module{i}"), module);
    }
    for (i, disk) in guest.disks.iter().enumerate() {
        config.file(&format!("guest/disk{i}"), disk);
    }
    let mut host = step(&format!("host on {engine}"), || {
        Host::boot(dirs, &kit, &config, "boot")
    })?;
    host.load_vmm(&options.vmm_options)?;
    let start = host.busy_ticks(lab::bochs::IPS)?;
    let clock = Instant::now();
    let spec = in_host(&guest, options, memory_mib);
    step("bhyveload", || {
        host.must(&spec.load_line(), Duration::from_secs(120))
    })?;
    let loaded = host.busy_ticks(lab::bochs::IPS)?;
    let line = spec.run_line(&host);
    host.must(&line, SHORT)?;

    let outcome = match watch(&mut host, options, &guest) {
        Ok(outcome) => outcome,
        Err(e) => return Err(e.context(format!("bhyve said: {}", guest::said(&mut host)))),
    };
    let seconds = clock.elapsed().as_secs_f64();
    let stats = host.stats(VM, options.vcpus);
    let userland = host.must(&format!("cat {EXIT_STATS} 2>/dev/null || true"), SHORT)?;
    let instructions = if engine.counts_instructions() && options.host_cpus == 1 {
        let end = host.busy_ticks(lab::bochs::IPS)?;
        Some(Instructions {
            all: end.saturating_sub(start),
            bhyveload: loaded.saturating_sub(start),
        })
    } else {
        None
    };
    host.no_complaints()?;
    let output = host.guest().transcript().to_owned();
    println!();
    say(&format!(
        "{} after {seconds:.1} s ({:.1} s in all); console log {}",
        outcome.what,
        started.elapsed().as_secs_f64(),
        output.display()
    ));
    if let Some(file) = &options.report {
        let stats = stats.context("no statistics for the report")?;
        Report {
            engine: engine.to_string(),
            host: match kit.freebsd {
                None => kit.kernel.release.clone(),
                Some(_) => "FreeBSD 12.1".to_owned(),
            },
            guest: guest
                .kernel
                .as_ref()
                .or(guest.disks.first())
                .map(|path| path.display().to_string())
                .unwrap_or_default(),
            vcpus: options.vcpus,
            memory_mib,
            instructions,
            seconds,
            stats,
            // bhyve writes it at its end, if it came to one.
            userland: serde_json::from_str(&userland).ok(),
            output,
        }
        .write(file)?;
    }
    Ok(match outcome.status {
        // bhyve(8): 0 reset, 1 powered off, 2 halted are a guest's own doing.
        None | Some(0..=2) => ExitCode::SUCCESS,
        Some(_) => ExitCode::FAILURE,
    })
}

/// Memory sizes as bhyve(8) takes them: MiB, or with a suffix.
fn mebibytes(text: &str) -> Result<u32> {
    let (digits, unit) = match text.find(|c: char| !c.is_ascii_digit()) {
        Some(at) => text.split_at(at),
        None => (text, "M"),
    };
    let number: u32 = digits
        .parse()
        .with_context(|| format!("-m {text}: not a size"))?;
    let scale = match unit.to_ascii_uppercase().as_str() {
        "M" | "MB" => 1,
        "G" | "GB" => 1024,
        _ => bail!("-m {text}: the unit is M or G"),
    };
    number
        .checked_mul(scale)
        .filter(|&m| (16..=65536).contains(&m))
        .with_context(|| format!("-m {text}: 16M to 64G"))
}

fn choose(dirs: &Dirs, options: &Options, kit: &Kit) -> Result<Guest> {
    let linux = |kernel: PathBuf, root: Option<PathBuf>| Guest {
        kind: GuestName::Linux,
        kernel: Some(kernel),
        root,
        disks: options.disk.clone(),
        up: LINUX_UP,
    };
    let freebsd = |image: FreeBsd| Guest {
        kind: GuestName::Freebsd,
        kernel: Some(image.kernel),
        root: image.mfsroot,
        disks: options.disk.clone(),
        up: FREEBSD_UP,
    };
    if options.guest == Some(GuestName::FreebsdDisk) {
        ensure!(
            options.kernel.is_none() && options.mfsroot.is_none() && options.module.is_empty(),
            "--guest freebsd-disk takes kernel, modules and root from the disk"
        );
        let mut disks = options.disk.clone();
        if disks.is_empty() {
            disks.extend(images::local_freebsd_disk(dirs));
        }
        ensure!(!disks.is_empty(), "no disk image at hand: give --disk");
        return Ok(Guest {
            kind: GuestName::FreebsdDisk,
            kernel: None,
            root: None,
            disks,
            up: FREEBSD_UP,
        });
    }
    if let Some(kernel) = &options.kernel {
        let kind = options.guest.unwrap_or(kind_of(kernel)?);
        return Ok(match kind {
            GuestName::Linux => linux(
                kernel.clone(),
                Some(options.initrd.clone().unwrap_or(kit.guest_initrd.clone())),
            ),
            _ => freebsd(FreeBsd {
                kernel: kernel.clone(),
                mfsroot: options.mfsroot.clone(),
            }),
        });
    }
    let debian = || {
        let root = options.initrd.clone().unwrap_or(kit.guest_initrd.clone());
        linux(kit.kernel.image.clone(), Some(root))
    };
    if options.guest == Some(GuestName::Linux) {
        return Ok(debian());
    }
    if let Some(mut image) = images::local_freebsd(dirs) {
        if options.mfsroot.is_some() {
            image.mfsroot.clone_from(&options.mfsroot);
        }
        return Ok(freebsd(image));
    }
    match images::fetch_freebsd(dirs, &options.freebsd_base_url) {
        Ok(image) => Ok(freebsd(image)),
        Err(e) if options.guest == Some(GuestName::Freebsd) => {
            Err(e.context("no FreeBSD image at hand, and none to be had"))
        }
        Err(_) => {
            say(&format!(
                "no FreeBSD image at hand and none from {}: booting Debian's Linux kernel instead",
                options.freebsd_base_url
            ));
            Ok(debian())
        }
    }
}

/// A FreeBSD kernel is an ELF file; a bzImage has "HdrS" at 0x202.
fn kind_of(kernel: &Path) -> Result<GuestName> {
    let bytes =
        std::fs::read(kernel).with_context(|| format!("cannot read {}", kernel.display()))?;
    if bytes.starts_with(b"\x7fELF") {
        Ok(GuestName::Freebsd)
    } else if bytes.get(0x202..0x206) == Some(b"HdrS") {
        Ok(GuestName::Linux)
    } else {
        bail!(
            "{} is neither an ELF file nor a bzImage; say --guest",
            kernel.display()
        )
    }
}

/// The guest in the host's terms.
fn in_host(guest: &Guest, options: &Options, memory_mib: u32) -> guest::Guest {
    let root = guest.root.is_some().then(|| "/guest/root".to_owned());
    let load = match guest.kind {
        GuestName::Linux => Load::Linux {
            initrd: root,
            cmdline: options.cmdline.clone().unwrap_or_else(guest::linux_cmdline),
        },
        GuestName::FreebsdDisk => Load::Disk {
            images: (0..guest.disks.len())
                .map(|i| format!("/guest/disk{i}"))
                .collect(),
        },
        GuestName::Freebsd => Load::FreeBsd {
            mfsroot: root,
            modules: (0..options.module.len())
                .map(|i| format!("/guest/module{i}"))
                .collect(),
        },
    };
    let mut more = options.bhyve_options.clone();
    for i in 0..guest.disks.len() {
        more.push_str(&format!(" -s {},virtio-blk,/guest/disk{i}", i + 2));
    }
    if options.x2apic {
        more.push_str(" -x");
    }
    if options.report.is_some() {
        more.push_str(" --exit-stats ");
        more.push_str(EXIT_STATS);
    }
    guest::Guest {
        vm: VM.to_owned(),
        environment: options.environment.clone(),
        vcpus: options.vcpus,
        memory_mib,
        options: more,
        ..guest::Guest::new("/guest/kernel", load)
    }
}

/// How a run came to its end.
struct Outcome {
    /// bhyve's exit status, where it has ended.
    status: Option<i32>,
    what: String,
}

impl Outcome {
    fn exited(status: i32) -> Self {
        let what = match status {
            0 => "guest reset",
            1 => "guest powered off",
            2 => "guest halted",
            3 => "guest triple-faulted",
            _ => "bhyve failed",
        };
        Self {
            status: Some(status),
            what: format!("{what} (bhyve exit status {status})"),
        }
    }
}

fn watch(host: &mut Host, options: &Options, guest: &Guest) -> Result<Outcome> {
    if let Some(raw) = terminal::Raw::new()? {
        let mut status = None;
        let (control, console) = host.both();
        terminal::converse(console, || {
            let found = control.try_expect(&format!(r"{GUEST_EXIT}(\d+)"), Duration::ZERO)?;
            status = found.and_then(|f| f.group(1).parse().ok());
            Ok(status.is_some())
        })?;
        drop(raw);
        return Ok(status.map_or_else(
            || Outcome {
                status: None,
                what: "left the guest running".to_owned(),
            },
            Outcome::exited,
        ));
    }
    Script::new(options, guest)?.follow(host, Duration::from_secs(options.timeout))
}

/// What is to happen on the console of a guest that nobody sits at.
struct Script<'a> {
    up: regex::Regex,
    goal: Option<regex::Regex>,
    lines: std::slice::Iter<'a, String>,
    until_exit: bool,
    console: String,
    /// Start of what has not been matched yet.
    at: usize,
    is_up: bool,
}

impl<'a> Script<'a> {
    fn new(options: &'a Options, guest: &Guest) -> Result<Self> {
        Ok(Self {
            up: regex::Regex::new(guest.up)?,
            goal: options
                .expect
                .as_deref()
                .map(regex::Regex::new)
                .transpose()
                .context("--expect")?,
            lines: options.type_lines.iter(),
            until_exit: options.until_exit,
            console: String::new(),
            at: 0,
            is_up: false,
        })
    }

    fn follow(mut self, host: &mut Host, timeout: Duration) -> Result<Outcome> {
        let deadline = Instant::now() + timeout;
        let mut stdout = std::io::stdout();
        let mut exited = None;
        loop {
            let text = host
                .guest()
                .take(Duration::from_millis(100))
                .context("the host has ended")?;
            stdout.write_all(&text)?;
            stdout.flush()?;
            self.console.push_str(&String::from_utf8_lossy(&text));
            if let Some(outcome) = self.step(host)? {
                return Ok(outcome);
            }
            if let Some(status) = exited {
                // What was still on its way has been read by now.
                if text.is_empty() {
                    return self.ended(status);
                }
            } else {
                exited = host.guest_exit(Duration::ZERO)?;
            }
            if Instant::now() > deadline {
                let wanted = self.goal.as_ref().unwrap_or(&self.up);
                let what = if self.until_exit && self.is_up {
                    "bhyve still runs after".to_owned()
                } else {
                    format!("no /{wanted}/ within")
                };
                bail!("{what} {} s", timeout.as_secs());
            }
        }
    }

    /// Types what is due; says if the run has reached its goal.
    fn step(&mut self, host: &mut Host) -> Result<Option<Outcome>> {
        let up = self.up.find_at(&self.console, self.at).map(|m| m.end());
        if let Some(end) = up {
            self.is_up = true;
            if let Some(line) = self.lines.next() {
                self.at = end;
                host.guest().send(format!("{line}\r").as_bytes())?;
                return Ok(None);
            }
        }
        let goal = match &self.goal {
            Some(goal) => goal.is_match(&self.console),
            None => up.is_some(),
        };
        let done = goal && self.lines.len() == 0 && !self.until_exit;
        Ok(done.then(|| Outcome {
            status: None,
            what: "guest is up".to_owned(),
        }))
    }

    fn ended(&self, status: i32) -> Result<Outcome> {
        let outcome = Outcome::exited(status);
        if let Some(goal) = &self.goal {
            ensure!(
                goal.is_match(&self.console),
                "no /{goal}/ on the console: {}",
                outcome.what
            );
        } else {
            ensure!(
                self.is_up || status == 1,
                "the guest did not come up: {}",
                outcome.what
            );
        }
        Ok(outcome)
    }
}
