//! An emulator (or KVM) with a kernel in it and two serial ports.

use crate::console::{Console, Listening};
use crate::nudge::Nudge;
use crate::{bochs, iso, qemu};
use anyhow::{Context, Result, bail};
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

/// How long an emulator may take to connect its serial ports.
const CONNECT: Duration = Duration::from_secs(60);

/// What runs the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// QEMU with KVM, where that offers VMX or SVM to guests.
    Kvm,
    /// Bochs: VT-x, an exact instruction count, about 50 million instructions a second.
    Bochs,
    /// QEMU's TCG: AMD-V; an instruction count where a test asks for it.
    Qemu,
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Bochs => "bochs",
            Self::Qemu => "qemu",
        })
    }
}

impl Engine {
    /// KVM if this machine really offers VMX or SVM to guests, otherwise Bochs.
    pub fn auto() -> Self {
        if kvm_offers_virtualization() {
            Self::Kvm
        } else {
            Self::Bochs
        }
    }

    /// The Debian packages that the engine is in.
    pub fn packages(self) -> &'static [&'static str] {
        match self {
            Self::Bochs => &["bochs", "bochs-term", "bochsbios", "vgabios"],
            Self::Kvm | Self::Qemu => &["qemu-system-x86"],
        }
    }

    /// The time-stamp counter counts instructions.
    pub fn counts_instructions(self) -> bool {
        self == Self::Bochs
    }

    /// It has AMD-V, not VT-x.
    pub fn is_amd(self) -> bool {
        self == Self::Qemu
    }

    /// What the engine asks of vmm.ko, as insmod takes it.
    pub fn vmm_options(self) -> &'static str {
        match self {
            // Bochs 2.7 interrupts a guest that has IF=0 when a host interrupt
            // arrives while virtual-interrupt delivery is on.
            Self::Bochs if !bochs::is_other() => "use_apic_vid=0",
            Self::Bochs | Self::Kvm | Self::Qemu => "",
        }
    }

    /// Kernel parameters of a host besides these.
    pub const fn host_parameters(self) -> &'static str {
        match self {
            // Neither speculates, so there is nothing to mitigate.
            Self::Bochs | Self::Qemu => "mitigations=off",
            Self::Kvm => "",
        }
    }

    /// Kernel parameters that the engine asks of a Linux on it.
    pub fn kernel_parameters(self) -> String {
        match self {
            // CPUID promises the model's 3.5 GHz; the machine has BOCHS_IPS.
            // Bochs 2.7 gives the standard format's size for the compacted one
            // (CPUID.0DH.1:EBX), and Linux then turns XSAVE off altogether. Its
            // IA32_MISC_ENABLE says that REP MOVS is slow, which bhyve's does not: a guest
            // would then count a byte as an instruction where the bare machine copies words.
            Self::Bochs => format!(
                "tsc_early_khz={} tsc=reliable clearcpuid={}erms,rep_good",
                bochs::IPS / 1000,
                if bochs::is_other() {
                    ""
                } else {
                    "xsavec,xsaves,"
                }
            ),
            Self::Qemu => "tsc=reliable".to_owned(),
            Self::Kvm => String::new(),
        }
    }
}

/// A `/dev/kvm` that opens proves nothing; what KVM would tell a guest does.
fn kvm_offers_virtualization() -> bool {
    const VMX: u32 = 1 << 5; // CPUID.01H:ECX, SDM Vol. 2A, CPUID
    const SVM: u32 = 1 << 2; // CPUID 8000_0001H:ECX, APM Vol. 3 §E.4.2
    let Ok(kvm) = kvm_ioctls::Kvm::new() else {
        return false;
    };
    kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
        .is_ok_and(|cpuid| {
            cpuid.as_slice().iter().any(|leaf| {
                leaf.function == 1 && leaf.ecx & VMX != 0
                    || leaf.function == 0x8000_0001 && leaf.ecx & SVM != 0
            })
        })
}

/// What remaps the DMA of QEMU's devices.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Iommu {
    /// Nothing does.
    #[default]
    None,
    /// VT-d, with or without interrupt remapping.
    Intel {
        /// The table for interrupts too.
        interrupts: bool,
    },
    /// AMD-Vi. Debian's cloud kernel has no driver for it.
    Amd,
}

/// PCI devices for a QEMU.
#[derive(Debug, Clone, Default)]
pub struct Pci {
    /// What remaps their DMA.
    pub iommu: Iommu,
    /// Arguments as they stand: `-device`, `edu,addr=5.0`.
    pub arguments: Vec<String>,
}

/// A machine to start.
#[derive(Debug, Clone)]
pub struct Spec {
    /// What runs it.
    pub engine: Engine,
    /// Number of CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Make the time-stamp counter count instructions, in QEMU too. Whoever
    /// reads it often is slow there.
    pub count_instructions: bool,
    /// PCI devices besides QEMU's own.
    pub pci: Pci,
    /// bzImage.
    pub kernel: PathBuf,
    /// Initramfs, uncompressed.
    pub initramfs: Vec<u8>,
    /// Kernel command line.
    pub cmdline: String,
    /// A disk image for a virtio-blk of the machine's own; QEMU only.
    pub disk: Option<PathBuf>,
}

/// A running machine. Dropping it ends it.
#[derive(Debug)]
pub struct Machine {
    child: Child,
    /// COM1.
    pub com1: Console,
    /// COM2.
    pub com2: Console,
}

impl Machine {
    /// Starts a machine; its files and transcripts go to `dir`.
    ///
    /// # Errors
    /// The emulator is not there or does not start.
    pub fn start(spec: &Spec, dir: &Path) -> Result<Self> {
        let lossy = spec.engine == Engine::Qemu;
        Self::connect(dir, lossy, |ports, monitor| match spec.engine {
            Engine::Bochs => {
                let iso = iso::build(dir, &spec.kernel, &spec.initramfs, &spec.cmdline)?;
                bochs::spawn(spec.cpus, spec.memory_mib, &iso, dir, ports)
            }
            Engine::Kvm | Engine::Qemu => qemu::spawn(spec, dir, ports, monitor),
        })
    }

    /// Starts Bochs with a CD that is there already.
    ///
    /// # Errors
    /// As for [`Self::start`].
    pub fn start_bochs(cpus: u32, memory_mib: u32, iso: &Path, dir: &Path) -> Result<Self> {
        Self::connect(dir, false, |ports, _| {
            bochs::spawn(cpus, memory_mib, iso, dir, ports)
        })
    }

    /// `lossy`: it may need a [`Nudge`].
    fn connect(
        dir: &Path,
        lossy: bool,
        spawn: impl FnOnce([u16; 2], Option<u16>) -> Result<Child>,
    ) -> Result<Self> {
        let ports = [Listening::new()?, Listening::new()?];
        let numbers = [ports[0].port(), ports[1].port()];
        let monitor = lossy.then(Listening::new).transpose()?;
        let mut child = spawn(numbers, monitor.as_ref().map(Listening::port))?;
        let [first, second] = ports;
        let pid = child.id();
        let connected = (|| {
            let mut alive = || ended(&mut child, dir);
            let nudge = monitor
                .map(|m| Nudge::new(m.stream("monitor", CONNECT, &mut alive)?))
                .transpose()?;
            let mut com1 = first.accept(&dir.join("com1.log"), CONNECT, pid, &mut alive)?;
            let mut com2 = second.accept(&dir.join("com2.log"), CONNECT, pid, &mut alive)?;
            com1.nudge.clone_from(&nudge);
            com2.nudge = nudge;
            Ok((com1, com2))
        })();
        match connected {
            Ok((com1, com2)) => Ok(Self { child, com1, com2 }),
            Err(e) => {
                kill(&mut child);
                Err(e)
            }
        }
    }

    /// Waits until the machine has ended by itself.
    ///
    /// # Errors
    /// It has not within `timeout`.
    pub fn wait_end(&mut self, timeout: Duration) -> Result<()> {
        let deadline = std::time::Instant::now() + timeout;
        while self.child.try_wait()?.is_none() {
            if std::time::Instant::now() > deadline {
                bail!("the machine still runs after {} s", timeout.as_secs());
            }
            self.com1.silent();
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }
}

impl Machine {
    /// A power cut: SIGKILL. What COM2 has said until then, all of it.
    ///
    /// # Errors
    /// The machine cannot be killed, or its port stays open.
    pub fn cut(&mut self) -> Result<String> {
        self.child.kill().context("cannot kill the emulator")?;
        self.child.wait()?;
        // What is on its way still arrives.
        let deadline = std::time::Instant::now() + CONNECT;
        while self.com2.take(Duration::from_millis(100)).is_some() {
            if std::time::Instant::now() > deadline {
                bail!("the killed machine's serial port stays open");
            }
        }
        Ok(self.com2.text())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        kill(&mut self.child);
    }
}

fn kill(child: &mut Child) {
    // It may have ended by itself, which is as good.
    if child.kill().is_ok() && child.wait().is_err() {
        eprintln!("emulator {} cannot be waited for", child.id());
    }
}

fn ended(child: &mut Child, dir: &Path) -> Result<()> {
    match child.try_wait().context("cannot watch the emulator")? {
        None => Ok(()),
        Some(status) => bail!("the emulator ended ({status}); see {}", dir.display()),
    }
}
