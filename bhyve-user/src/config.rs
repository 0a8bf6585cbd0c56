//! What the command line asked for.

use std::path::PathBuf;

use crate::pci::Bdf;
use crate::serial::backend::Spec;

/// A `-s` option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciSlot {
    /// Where.
    pub at: Bdf,
    /// What.
    pub emulation: String,
    /// The rest, the emulation's own business.
    pub conf: String,
}

/// `-c`: sockets × cores × threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    /// Sockets.
    pub sockets: u16,
    /// Cores a socket.
    pub cores: u16,
    /// Threads a core.
    pub threads: u16,
}

impl Topology {
    /// All virtual CPUs.
    pub fn cpus(&self) -> u32 {
        u32::from(self.sockets) * u32::from(self.cores) * u32::from(self.threads)
    }
}

/// Everything about one run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Name of the VM, as given to bhyveload.
    pub name: String,
    /// `-c`.
    pub topology: Topology,
    /// `-m`, bytes.
    pub memory: u64,
    /// `-s`.
    pub slots: Vec<PciSlot>,
    /// `-l com1` and `-l com2`.
    pub serial: [Option<Spec>; 2],
    /// `-l pc-testdev`.
    pub testdev: bool,
    /// `-A`.
    pub acpi: bool,
    /// Not `-Y`.
    pub mptable: bool,
    /// `-C`.
    pub core_memory: bool,
    /// `-e`.
    pub strict_io: bool,
    /// `-H`.
    pub halt_exits: bool,
    /// `-P`.
    pub pause_exits: bool,
    /// `-S`.
    pub wired: bool,
    /// Not `-w`.
    pub strict_msr: bool,
    /// `-W`: virtio without MSI-X.
    pub virtio_msi: bool,
    /// `-u`.
    pub utc: bool,
    /// `-x`.
    pub x2apic: bool,
    /// `-U`.
    pub uuid: Option<[u8; 16]>,
    /// `-p vcpu:hostcpu`, in order.
    pub pins: Vec<(u32, usize)>,
    /// `-v`.
    pub verbose: bool,
    /// `--exit-stats`.
    pub exit_stats: Option<PathBuf>,
}

impl Config {
    /// The defaults of bhyve(8) for a VM of this name.
    pub fn new(name: &str) -> Config {
        Config {
            name: name.into(),
            topology: Topology {
                sockets: 1,
                cores: 1,
                threads: 1,
            },
            memory: 256 << 20,
            slots: Vec::new(),
            serial: [None, None],
            testdev: false,
            acpi: false,
            mptable: true,
            core_memory: false,
            strict_io: false,
            halt_exits: false,
            pause_exits: false,
            wired: false,
            strict_msr: true,
            virtio_msi: false,
            utc: false,
            x2apic: false,
            uuid: None,
            pins: Vec::new(),
            verbose: false,
            exit_stats: None,
        }
    }
}
