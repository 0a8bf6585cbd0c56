//! What the command line asked for.

use std::path::PathBuf;

use bhyve_config::settings::Setting;
use bhyve_config::{Device, Origin, Settings, Value, keys};
use bhyve_sandbox::Mode;

use crate::dbgport::backend::Address;
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

/// `-l bootrom,FILE[,VARIABLES][,fwcfg=KIND]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootRom {
    /// The firmware's image.
    pub rom: PathBuf,
    /// The file of its variables.
    pub variables: Option<PathBuf>,
    /// It was to have QEMU's interface to its hypervisor.
    pub qemu: bool,
}

/// As `-l bootrom,` takes it.
impl std::fmt::Display for BootRom {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.rom.display())?;
        if let Some(file) = &self.variables {
            write!(f, ",{}", file.display())?;
        }
        if self.qemu {
            f.write_str(",fwcfg=qemu")?;
        }
        Ok(())
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
    /// `-b`: the console at port 0x220.
    pub bvmcons: bool,
    /// `-g`: the debug port, 0x224.
    pub debug: Option<Address>,
    /// `-l pc-testdev`.
    pub testdev: bool,
    /// `-l bootrom`.
    pub bootrom: Option<BootRom>,
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
    /// Not `--no-pv`.
    pub pv: bool,
    /// `--tsc-khz`.
    pub tsc_khz: Option<u32>,
    /// `-U`.
    pub uuid: Option<[u8; 16]>,
    /// `-p vcpu:hostcpu`, in order.
    pub pins: Vec<(u32, usize)>,
    /// `-v`.
    pub verbose: bool,
    /// `--exit-stats`.
    pub exit_stats: Option<PathBuf>,
    /// `-D`: the VM goes when the guest has powered itself off.
    pub destroy_on_poweroff: bool,
    /// `--sandbox`.
    pub sandbox: Mode,
    /// `--boot`: load, run, load again after a reset, destroy.
    pub boot: bool,
    /// What only bhyveload has a use for.
    pub load: Vec<Setting>,
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
            bvmcons: false,
            debug: None,
            testdev: false,
            bootrom: None,
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
            pv: true,
            uuid: None,
            pins: Vec::new(),
            verbose: false,
            exit_stats: None,
            tsc_khz: None,
            destroy_on_poweroff: false,
            sandbox: Mode::default(),
            boot: false,
            load: Vec::new(),
        }
    }

    /// The settings that make this configuration of the defaults.
    pub fn settings(&self) -> Settings {
        let mut settings = Settings::default();
        let mut put = |path: &str, value: Value| {
            if let Some(key) = keys::find(path) {
                settings.set(Setting {
                    key,
                    value,
                    at: Origin::default(),
                });
            }
        };
        let new = Config::new("");
        let text = |t: String| Value::Text(t);
        if !self.name.is_empty() {
            put("name", text(self.name.clone()));
        }
        if let Some(uuid) = &self.uuid {
            put("uuid", text(uuid_text(uuid)));
        }
        let t = self.topology;
        match (t.cores, t.threads) {
            (1, 1) if t.sockets == 1 => {}
            (1, 1) => put("cpu.count", text(t.sockets.to_string())),
            _ => {
                put("cpu.sockets", text(t.sockets.to_string()));
                put("cpu.cores", text(t.cores.to_string()));
                put("cpu.threads", text(t.threads.to_string()));
            }
        }
        if !self.pins.is_empty() {
            let all = self.pins.iter().map(|(v, h)| format!("{v}:{h}"));
            put("cpu.pin", Value::List(all.collect()));
        }
        // bhyveload has to be told the same.
        put("memory.size", text(size_text(self.memory)));
        for (path, is, was) in [
            ("memory.wired", self.wired, new.wired),
            ("memory.in_core", self.core_memory, new.core_memory),
            ("machine.acpi", self.acpi, new.acpi),
            ("machine.mptable", self.mptable, new.mptable),
            ("machine.x2apic", self.x2apic, new.x2apic),
            ("machine.pv", self.pv, new.pv),
            ("machine.strict_io", self.strict_io, new.strict_io),
            ("machine.strict_msr", self.strict_msr, new.strict_msr),
            ("machine.halt_exits", self.halt_exits, new.halt_exits),
            ("machine.pause_exits", self.pause_exits, new.pause_exits),
            ("machine.rtc_utc", self.utc, new.utc),
            ("machine.virtio_msi", self.virtio_msi, new.virtio_msi),
            ("serial.bvmcons", self.bvmcons, new.bvmcons),
            ("machine.testdev", self.testdev, new.testdev),
            ("run.verbose", self.verbose, new.verbose),
            (
                "run.destroy_on_poweroff",
                self.destroy_on_poweroff,
                new.destroy_on_poweroff,
            ),
            ("run.boot", self.boot, new.boot),
        ] {
            if is != was {
                put(path, Value::Bool(is));
            }
        }
        for (path, spec) in ["serial.com1", "serial.com2"].iter().zip(&self.serial) {
            if let Some(spec) = spec {
                put(path, text(spec.to_string()));
            }
        }
        if let Some(address) = &self.debug {
            put("serial.bvmdebug", text(address.to_string()));
        }
        if let Some(firmware) = &self.bootrom {
            put("machine.bootrom", text(firmware.to_string()));
        }
        if let Some(khz) = self.tsc_khz {
            put("machine.tsc_khz", text(khz.to_string()));
        }
        if let Some(file) = &self.exit_stats {
            put("run.exit_stats", text(file.display().to_string()));
        }
        if self.sandbox != new.sandbox {
            put("run.sandbox", text(self.sandbox.to_string()));
        }
        settings.values.extend(self.load.iter().cloned());
        for s in &self.slots {
            settings.set_device(Device {
                place: (s.at.bus, s.at.slot, s.at.func),
                emulation: s.emulation.clone(),
                conf: s.conf.clone(),
                at: Origin::default(),
            });
        }
        settings
    }
}

/// The size as `-m` takes it; it is a multiple of 4 KiB.
fn size_text(bytes: u64) -> String {
    for (shift, unit) in [(30, "G"), (20, "M")] {
        if bytes.is_multiple_of(1 << shift) {
            return format!("{}{unit}", bytes >> shift);
        }
    }
    format!("{}K", bytes >> 10)
}

fn uuid_text(uuid: &[u8; 16]) -> String {
    let mut text = String::new();
    for (i, byte) in uuid.iter().enumerate() {
        if matches!(i, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}
