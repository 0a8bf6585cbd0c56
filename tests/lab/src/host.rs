//! A Linux or FreeBSD host with our module and programs in it, obeying shell
//! lines on COM1.

use crate::cpio::Initramfs;
use crate::dirs::Dirs;
use crate::host_kernel::{self, HostKernel};
use crate::machine::{Engine, Machine, Pci, Spec};
use crate::progress::step;
use crate::stats::{self, Stats};
use crate::{apt, busybox, freebsd_host, kmod, programs};
use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const HOST_INIT: &str = include_str!("../host/init");
/// /init of Linux guests.
pub const GUEST_INIT: &str = include_str!("../host/guest-init");
const TSC_SOURCE: &str = include_str!("../host/tsc.S");

/// A host's boot, with room for a slow machine.
pub const BOOT: Duration = Duration::from_secs(300);
/// A command that does little.
pub const SHORT: Duration = Duration::from_secs(60);

/// Packages that building needs.
const BUILD_PACKAGES: [&str; 9] = [
    "binutils",
    "gcc",
    "gcc-12",
    "grub-common",
    "grub-pc-bin",
    "libc6-dev",
    "libelf1",
    "make",
    "xorriso",
];

/// How the end of a bhyve in the background is announced, before its status.
pub const GUEST_EXIT: &str = "@guest-exit ";

/// What goes into hosts, built once.
#[derive(Debug, Clone)]
pub struct Kit {
    /// Kernel of the host and of Linux guests.
    pub kernel: HostKernel,
    /// Our module, for that kernel.
    pub module: PathBuf,
    /// [`programs::PROGRAMS`], static.
    pub programs: Vec<PathBuf>,
    /// Prints the time-stamp counter.
    tsc: PathBuf,
    busybox: PathBuf,
    /// A Linux guest's initramfs: busybox and a shell.
    pub guest_initrd: PathBuf,
    /// The host is FreeBSD, of this image.
    pub freebsd: Option<freebsd_host::Image>,
    /// Programs of tests/guests, where [`Self::with_guests`] has built them.
    pub guests: Vec<PathBuf>,
}

impl Kit {
    /// Sets up what is missing and builds everything.
    ///
    /// # Errors
    /// Not Debian 12, no root where packages are missing, no net the first
    /// time, or something of ours does not compile.
    pub fn build(dirs: &Dirs) -> Result<Self> {
        prerequisites(&[])?;
        let kernel = host_kernel::ensure(dirs)?;
        let module = kmod::build(dirs, &kernel.headers)?;
        let programs = step("bhyve, bhyvectl, bhyveload", || programs::build(dirs))?;
        Ok(Self {
            kernel,
            module,
            programs,
            tsc: tsc(dirs)?,
            busybox: busybox::ensure(dirs)?,
            guest_initrd: guest_initrd(dirs)?,
            freebsd: None,
            guests: Vec::new(),
        })
    }

    /// The same for a FreeBSD host of `image`.
    ///
    /// # Errors
    /// As for [`Self::build`].
    pub fn build_freebsd(dirs: &Dirs, image: &freebsd_host::Image) -> Result<Self> {
        prerequisites(&[])?;
        let (module, programs, tsc) = freebsd_host::build(dirs, image)?;
        Ok(Self {
            kernel: host_kernel::ensure(dirs)?,
            module,
            programs,
            tsc,
            busybox: busybox::ensure(dirs)?,
            guest_initrd: guest_initrd(dirs)?,
            freebsd: Some(image.clone()),
            guests: Vec::new(),
        })
    }

    /// Builds tests/guests too.
    ///
    /// # Errors
    /// They do not compile.
    pub fn with_guests(mut self, dirs: &Dirs) -> Result<Self> {
        self.guests = crate::cases::guests::programs(&kmod::guests(dirs)?);
        Ok(self)
    }
}

/// Sees to the Debian packages for building, for `engines`, and for those only.
///
/// # Errors
/// Not Debian 12, or packages are missing and cannot be installed.
pub fn prerequisites(engines: &[Engine]) -> Result<()> {
    apt::require_debian_12()?;
    let mut packages = BUILD_PACKAGES.to_vec();
    // grub-mkrescue runs mformat for its EFI half, which is left out without it.
    packages.push("mtools");
    // Disks of Linux guests are made by mke2fs.
    packages.push("e2fsprogs");
    for engine in engines {
        packages.extend(engine.packages());
    }
    apt::ensure_installed(&packages)
}

fn tsc(dirs: &Dirs) -> Result<PathBuf> {
    let dir = dirs.fresh("tsc")?;
    let source = dir.join("tsc.S");
    fs::write(&source, TSC_SOURCE)?;
    let program = dir.join("tsc");
    crate::command::output(
        Command::new("gcc")
            .args(["-nostdlib", "-static", "-o"])
            .arg(&program)
            .arg(&source),
    )?;
    Ok(program)
}

/// Makes the initramfs of a Linux guest.
///
/// # Errors
/// There is no busybox, or the disk is full.
pub fn guest_initrd(dirs: &Dirs) -> Result<PathBuf> {
    guest_initrd_with(dirs, "guest", &[])
}

/// As [`guest_initrd`], in `target/lab/NAME`, with more files: path in the
/// guest (relative to `/`), path here.
///
/// # Errors
/// A file cannot be read, or as for [`guest_initrd`].
pub fn guest_initrd_with(dirs: &Dirs, name: &str, files: &[(String, PathBuf)]) -> Result<PathBuf> {
    let file = dirs.fresh(name)?.join("initrd");
    let mut initramfs = Initramfs::new(GUEST_INIT, &busybox::ensure(dirs)?)?;
    for (name, from) in files {
        initramfs.file(name, from)?;
    }
    fs::write(&file, initramfs.finish()?)?;
    Ok(file)
}

/// Kernel parameters that leave out what costs seconds in an emulator and has
/// no bearing on a hypervisor: self-tests of ciphers, certificates, tracers.
/// AppArmor is left out, and so that SELinux does not take its place (which, other
/// than AppArmor, looks at every ioctl), the rest of Debian's list is named.
pub const LEAN: &str = "cryptomgr.notests init_on_alloc=0 \
    lsm=landlock,lockdown,yama,tomoyo \
    initcall_blacklist=load_system_certificate_list,init_kprobe_trace,init_blk_tracer,bpf_rstat_kfunc_init,cubictcp_register";

/// How to start a host.
#[derive(Debug, Clone)]
pub struct Config {
    /// What runs it.
    pub engine: Engine,
    /// The host's CPUs.
    pub cpus: u32,
    /// The host's memory in MiB.
    pub memory_mib: u32,
    /// [`Spec::count_instructions`].
    pub count_instructions: bool,
    /// PCI devices of a QEMU.
    pub pci: Pci,
    /// Added to the host kernel's command line.
    pub cmdline: String,
    /// Files for the host: path in the host (relative to `/`), path here.
    pub files: Vec<(String, PathBuf)>,
    /// [`Spec::disk`].
    pub disk: Option<PathBuf>,
    /// The host is FreeBSD.
    pub freebsd: Option<freebsd_host::Image>,
}

impl Config {
    /// One CPU, and memory for a guest of `guest_mib` and the files it needs.
    pub fn new(engine: Engine, guest_mib: u32) -> Self {
        Self {
            engine,
            cpus: 1,
            memory_mib: guest_mib + 512,
            count_instructions: false,
            pci: Pci::default(),
            cmdline: String::new(),
            files: Vec::new(),
            disk: None,
            freebsd: None,
        }
    }

    /// Puts the file `from` at `/name`.
    pub fn file(&mut self, name: &str, from: &Path) {
        self.files.push((name.to_owned(), from.to_owned()));
    }
}

/// What a shell line said.
#[derive(Debug, Clone)]
pub struct Output {
    /// The shell's exit status.
    pub status: i32,
    /// Standard output and error.
    pub text: String,
}

/// A running host.
#[derive(Debug)]
pub struct Host {
    machine: Machine,
    engine: Engine,
    freebsd: bool,
    /// A guest's end, announced while another line was waited for.
    guest_exit: Option<i32>,
    /// [`Self::cut`].
    gone: bool,
}

impl Host {
    /// Boots a host with `kit` in it; files and transcripts go to
    /// `target/lab/NAME`.
    ///
    /// # Errors
    /// The emulator or the kernel does not come up.
    pub fn boot(dirs: &Dirs, kit: &Kit, config: &Config, name: &str) -> Result<Self> {
        let dir = dirs.fresh(name)?;
        let mut machine = match &kit.freebsd {
            None => Self::start_linux(kit, config, &dir),
            Some(image) => Self::start_freebsd(image, kit, config, &dir),
        }?;
        machine
            .com1
            .expect("@lab-ready\r?\n", BOOT)
            .context("the host does not come up")?;
        Ok(Self {
            machine,
            engine: config.engine,
            freebsd: kit.freebsd.is_some(),
            guest_exit: None,
            gone: false,
        })
    }

    fn start_freebsd(
        image: &freebsd_host::Image,
        kit: &Kit,
        config: &Config,
        dir: &Path,
    ) -> Result<Machine> {
        let mut files = vec![("lab/vmm.ko".to_owned(), kit.module.clone(), false)];
        let mut program = |name: &str, path: &Path| {
            files.push((format!("lab/{name}"), path.to_owned(), true));
        };
        for (name, path) in programs::PROGRAMS.iter().zip(&kit.programs) {
            program(name, path);
        }
        program("tsc", &kit.tsc);
        let mut bytes = 0;
        for (name, path) in &config.files {
            bytes += fs::metadata(path)?.len();
            files.push((name.clone(), path.clone(), false));
        }
        // The memory disk and what was copied from it.
        let files_mib = u32::try_from(bytes >> 20)? * 2;
        freebsd_host::start(
            image,
            config.engine,
            config.cpus,
            config.memory_mib + files_mib + 128,
            &files,
            &config.cmdline,
            dir,
        )
    }

    fn start_linux(kit: &Kit, config: &Config, dir: &Path) -> Result<Machine> {
        let mut initramfs = Initramfs::new(HOST_INIT, &kit.busybox)?;
        initramfs.file("vmm.ko", &kit.module)?;
        for (name, path) in programs::PROGRAMS.iter().zip(&kit.programs) {
            initramfs.program(&format!("bin/{name}"), path)?;
        }
        initramfs.program("bin/tsc", &kit.tsc)?;
        for (name, path) in &config.files {
            initramfs.file(name, path)?;
        }
        let engine = config.engine;
        let initramfs = initramfs.finish()?;
        // The archive itself and its unpacked copy are both in memory for a while.
        let archive_mib = u32::try_from(initramfs.len() >> 20)? * 2;
        let spec = Spec {
            engine,
            cpus: config.cpus,
            memory_mib: config.memory_mib + archive_mib,
            count_instructions: config.count_instructions,
            pci: config.pci.clone(),
            kernel: kit.kernel.image.clone(),
            initramfs,
            disk: config.disk.clone(),
            cmdline: format!(
                "console=ttyS0,115200 quiet nokaslr {LEAN} {} {} {}",
                engine.kernel_parameters(),
                engine.host_parameters(),
                config.cmdline
            ),
        };
        Machine::start(&spec, dir)
    }

    /// A power cut: the machine is killed, and with it all that runs on it. What
    /// the guest's console has said.
    ///
    /// # Errors
    /// It cannot be killed.
    pub fn cut(&mut self) -> Result<String> {
        self.gone = true;
        self.machine.cut()
    }

    /// There was a power cut.
    pub fn is_gone(&self) -> bool {
        self.gone
    }

    /// Loads vmm.ko with these options, and those that the engine needs.
    ///
    /// # Errors
    /// It refuses.
    pub fn load_vmm(&mut self, options: &str) -> Result<()> {
        let engine = self.engine.vmm_options();
        if self.freebsd {
            let mut line = String::new();
            for option in engine.split_whitespace().chain(options.split_whitespace()) {
                let tunable = if option.starts_with("use_apic_vid=") {
                    format!("vmx.{option}")
                } else {
                    option.to_owned()
                };
                line.push_str(&format!("kenv hw.vmm.{tunable} && "));
            }
            return self
                .must(&format!("{line}kldload /lab/vmm.ko"), SHORT)
                .map(drop);
        }
        self.load_vmm_from("/vmm.ko", options)
    }

    /// The same, of a module elsewhere in a Linux host.
    ///
    /// # Errors
    /// It refuses.
    pub fn load_vmm_from(&mut self, module: &str, options: &str) -> Result<()> {
        let engine = self.engine.vmm_options();
        self.must(&format!("insmod {module} {engine} {options}"), SHORT)
            .map(drop)
    }

    /// Unloads vmm.ko.
    ///
    /// # Errors
    /// It refuses.
    pub fn unload_vmm(&mut self) -> Result<()> {
        let line = if self.freebsd {
            "kldunload vmm"
        } else {
            "rmmod vmm"
        };
        self.must(line, SHORT).map(drop)
    }

    /// The serial port that the guest's console goes to, as a path in the host.
    pub fn guest_port(&self) -> &'static str {
        if self.freebsd {
            "/dev/cuau1"
        } else {
            "/dev/ttyS1"
        }
    }

    /// The shell line that prints the TSC and, on a line of its own, the
    /// seconds that the host was idle.
    pub(crate) fn clocks(&self) -> &'static str {
        if self.freebsd {
            "tsc"
        } else {
            "{ tsc; cut -d' ' -f2 /proc/uptime; }"
        }
    }

    /// The guest's console, COM2.
    pub fn guest(&mut self) -> &mut crate::console::Console {
        &mut self.machine.com2
    }

    /// The host's console, COM1.
    pub fn control(&mut self) -> &mut crate::console::Console {
        &mut self.machine.com1
    }

    /// The host's console and the guest's, to use together.
    pub fn both(&mut self) -> (&mut crate::console::Console, &mut crate::console::Console) {
        (&mut self.machine.com1, &mut self.machine.com2)
    }

    /// Obeys one shell line and waits for its end.
    ///
    /// # Errors
    /// The host has gone or is silent for `timeout`.
    pub fn run(&mut self, line: &str, timeout: Duration) -> Result<Output> {
        self.start(line)?;
        self.finish(timeout)
            .with_context(|| format!("in the host: {line}"))
    }

    /// As [`Self::run`], and the line must succeed.
    ///
    /// # Errors
    /// As for [`Self::run`], or a status other than 0.
    pub fn must(&mut self, line: &str, timeout: Duration) -> Result<String> {
        let out = self.run(line, timeout)?;
        ensure!(
            out.status == 0,
            "`{line}` in the host gives status {}:\n{}",
            out.status,
            out.text
        );
        Ok(out.text)
    }

    /// Types one shell line; [`Self::finish`] waits for its end.
    ///
    /// # Errors
    /// The host has gone, or the line is not one line.
    pub fn start(&mut self, line: &str) -> Result<()> {
        // The terminal's line discipline keeps 4095 characters of a line.
        ensure!(
            line.len() < 4000 && !line.contains('\n'),
            "not one shell line: {line}"
        );
        self.machine.com1.send(format!("{line}\n").as_bytes())
    }

    /// Waits for the end of the line that [`Self::start`] typed.
    ///
    /// # Errors
    /// The host has gone or does not end it within `timeout`.
    pub fn finish(&mut self, timeout: Duration) -> Result<Output> {
        let found = self.machine.com1.expect(r"@lab-done (\d+)\r?\n", timeout)?;
        let mut text = String::new();
        for line in found.before.lines() {
            if let Some(status) = line.strip_prefix(GUEST_EXIT) {
                self.guest_exit = status.trim().parse().ok();
            } else if !line.starts_with("@lab-done") {
                text.push_str(line.trim_end());
                text.push('\n');
            }
        }
        Ok(Output {
            status: found.group(1).parse().unwrap_or(-1),
            text: text.trim_start_matches('\n').to_owned(),
        })
    }

    /// bhyve's exit status, if it has ended within `wait`, once.
    ///
    /// # Errors
    /// The host has gone.
    pub fn guest_exit(&mut self, wait: Duration) -> Result<Option<i32>> {
        if let Some(status) = self.guest_exit.take() {
            return Ok(Some(status));
        }
        let found = self
            .machine
            .com1
            .try_expect(&format!(r"{GUEST_EXIT}(\d+)\r?\n"), wait)?;
        found
            .map(|f| f.group(1).parse().context("bhyve's exit status"))
            .transpose()
    }

    /// TSC ticks that the host has not spent idle: an emulator lets time pass
    /// in HLT without executing anything. Idle time is known to 10 ms. Once
    /// bhyve has ended, the value at its end.
    ///
    /// Both clocks are read by one line: between two the host waits, idle.
    ///
    /// # Errors
    /// The host has gone.
    pub fn busy_ticks(&mut self, tsc_hz: u32) -> Result<u64> {
        let line = format!(
            "if [ -e /tmp/bhyve.end ]; then cat /tmp/bhyve.end; else {}; fi",
            self.clocks()
        );
        let text = self.must(&line, SHORT)?;
        let numbers = || {
            let mut words = text.split_whitespace();
            let tsc: u64 = words.next()?.parse().ok()?;
            let idle: f64 = words.next()?.parse().ok()?;
            Some((tsc, idle))
        };
        let (tsc, idle) = numbers().with_context(|| format!("the host's clocks said {text:?}"))?;
        Ok(tsc.saturating_sub((idle * f64::from(tsc_hz)) as u64))
    }

    /// The statistics of the VM `name`, summed over its vCPUs.
    ///
    /// # Errors
    /// bhyvectl fails.
    pub fn stats(&mut self, name: &str, vcpus: u32) -> Result<Stats> {
        let line = format!(
            "i=0; while [ $i -lt {vcpus} ]; do bhyvectl --get-stats --cpu=$i --vm={name} || break; \
             i=$((i+1)); done; [ $i = {vcpus} ]"
        );
        Ok(stats::parse(&self.must(&line, SHORT)?))
    }

    /// The kernel has complained about nothing since the last look.
    ///
    /// # Errors
    /// It has; with its log.
    pub fn no_complaints(&mut self) -> Result<()> {
        let log = self.must("dmesg -c", SHORT)?;
        const BAD: [&str; 12] = [
            "lock order reversal",
            "non-sleepable",
            "panic:",
            "BUG:",
            "WARNING:",
            "Oops",
            "general protection",
            "Call Trace",
            "rcu_preempt self-detected",
            "blocked for more than",
            "Bad page",
            "soft lockup",
        ];
        if let Some(bad) = BAD.iter().find(|b| log.contains(*b)) {
            bail!("the host's kernel says \"{bad}\":\n{log}");
        }
        Ok(())
    }
}
