//! One VM: everything made and wired together, its vCPUs started, its end
//! awaited.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use vmmapi::abi::limits::LOWMEM_LIMIT;
use vmmapi::{
    Capability, GuestMemory, IntrTrigger, MemFlags, RegName, SuspendHow, Topology, Vcpu,
    X2apicState,
};

use bhyve_sandbox::Mode;

use crate::bus::{BusError, Buses};
use crate::config::Config;
use crate::dbgport::backend::{Address, Line};
use crate::dbgport::{self, DebugPort};
use crate::ending::{ERROR, Ending, Failed, POWERED_OFF};
use crate::i8042::I8042;
use crate::legacy::Legacy;
use crate::machine::{Machine, OutRing, Suspend};
use crate::pci::Bdf;
use crate::pci::bar::Windows;
use crate::pci::intx::Router;
use crate::pci::root::{Means, PciError, PciRoot};
use crate::pm::{self, Pm};
use crate::sandbox::Purpose;
use crate::serial::backend::Spec;
use crate::serial::bvmcons::{self, BvmConsole};
use crate::serial::port::SerialPort;
use crate::serial::{LEGACY, terminal};
use crate::stats::Stats;
use crate::tables::{self, TooLarge};
use crate::testdev::{self, TestDev};
use crate::vcpu::Next;
use crate::vcpu::msr::{Msrs, Vendor};
use crate::{boot, firmware, lock, sandbox, signals, status, vcpu};

/// Why a VM could not be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel said no.
    #[error("{0}")]
    Vmm(#[from] vmmapi::Error),
    /// The machine lacks unrestricted guests.
    #[error(
        "{0} vCPUs need a CPU with unrestricted guests (VT-x of 2010 or later); this one can have 1"
    )]
    OneCpu(u32),
    /// The TSC cannot be scaled.
    #[error(
        "--tsc-khz {0} (machine.tsc_khz): guests have the host's TSC here: its CPU has neither TSC scaling \
         nor a TSC ratio, or not of that much, or vmm.ko is FreeBSD's own; leave it out"
    )]
    Tsc(u32),
    /// PCI.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// A host device, but memory that may go.
    #[error(
        "-s {0},passthru: a device reaches guest memory at any time, so all of it has to stay where \
         it is: give -S (memory.wired) to bhyve, and to bhyveload too"
    )]
    NotWired(Bdf),
    /// Two devices want the same ports or memory.
    #[error("device: {0}")]
    Bus(#[from] BusError),
    /// A backend of a serial port.
    #[error("-l {0}: {1}")]
    Serial(&'static str, io::Error),
    /// The debug port.
    #[error("-g {0}: {1}")]
    Debug(Address, io::Error),
    /// A firmware table.
    #[error("{0}{hint}", hint = if .0.0 == "MP table" { "; -Y leaves it out" } else { "" })]
    Table(#[from] TooLarge),
    /// The MP table knows one PCI hierarchy.
    #[error("the MP table cannot describe PCI buses other than 0; -Y leaves it out")]
    MpTableBuses,
    /// The sandbox.
    #[error(transparent)]
    Sandbox(#[from] bhyve_sandbox::Error),
    /// A file that is written at the end.
    #[error("--exit-stats {0}: {1}")]
    ExitStats(String, io::Error),
    /// See [`firmware::Error`].
    #[error(transparent)]
    Firmware(#[from] firmware::Error),
    /// A thread or a signal mask.
    #[error("{0}: {1}")]
    System(&'static str, io::Error),
}

/// The kernel's side of [`Machine`].
struct Kernel {
    vm: vmmapi::Vm,
    complained: AtomicBool,
    /// Output rings in use.
    rings: AtomicU32,
}

impl OutRing for vmmapi::OutRing {
    fn set_open(&self, open: bool) {
        vmmapi::OutRing::set_open(self, open);
    }
    fn take(&self, to: &mut VecDeque<u8>) {
        vmmapi::OutRing::take(self, |byte| to.push_back(byte));
    }
}

impl Kernel {
    /// A line that cannot be raised is a fault of this program, not of the
    /// guest; one message is enough.
    fn check(&self, result: vmmapi::Result<()>) {
        if let Err(e) = result
            && !self.complained.swap(true, Ordering::Relaxed)
        {
            eprintln!("{e}\r");
        }
    }
}

impl Machine for Kernel {
    fn isa_assert(&self, irq: u8, ioapic: Option<u8>) {
        self.check(self.vm.isa_assert(irq.into(), ioapic.map(u32::from)));
    }
    fn isa_deassert(&self, irq: u8, ioapic: Option<u8>) {
        self.check(self.vm.isa_deassert(irq.into(), ioapic.map(u32::from)));
    }
    fn isa_level_triggered(&self, irq: u8) {
        self.check(self.vm.isa_set_trigger(irq.into(), IntrTrigger::Level));
    }
    fn ioapic_assert(&self, pin: u8) {
        self.check(self.vm.ioapic_assert(pin.into()));
    }
    fn ioapic_deassert(&self, pin: u8) {
        self.check(self.vm.ioapic_deassert(pin.into()));
    }
    fn constant_port(&self, port: u16, value: Option<u8>) {
        self.check(self.vm.set_constant_port(port, value));
    }
    fn out_ring(&self, port: u16) -> Option<Box<dyn OutRing>> {
        // Without one, each byte is an exit.
        let n = self.rings.fetch_add(1, Ordering::Relaxed);
        let ring = self.vm.out_ring(n, port).ok().flatten()?;
        Some(Box::new(ring))
    }
    fn doorbell(&self, port: u16, value: Option<u16>, fd: Option<BorrowedFd<'_>>) -> bool {
        // Without it, each notification is an exit.
        self.vm.set_doorbell(port, value, fd).unwrap_or(false)
    }
    fn msi(&self, address: u64, data: u64) {
        // The guest chose the address: a wrong one goes nowhere.
        self.vm.post_msi(address, data);
    }
    fn kernel(&self) -> Option<vmmapi::Vm> {
        Some(self.vm.clone())
    }
    fn can_release_memory(&self) -> bool {
        self.vm.has(vmmapi::abi::layout::EXT_F_RELEASE)
    }
    fn release_memory(&self, gpa: u64, len: u64) -> io::Result<u64> {
        self.vm.release_memory(gpa, len).map_err(io::Error::other)
    }
    fn suspend(&self, how: Suspend) {
        let how = match how {
            Suspend::Reset => SuspendHow::Reset,
            Suspend::PowerOff => SuspendHow::Poweroff,
            Suspend::Halt => SuspendHow::Halt,
            Suspend::TripleFault => SuspendHow::TripleFault,
        };
        match self.vm.suspend(how) {
            Err(e) if e.errno() == Some(nix::libc::EALREADY) => {}
            r => self.check(r),
        }
    }
}

/// A VM whose vCPUs can run.
pub struct Vm {
    /// The command line.
    pub config: Config,
    /// The kernel's VM.
    pub vm: vmmapi::Vm,
    /// Guest memory.
    pub memory: GuestMemory,
    /// Who answers where.
    pub buses: Arc<Buses>,
    /// MSRs left to userland.
    pub msrs: Msrs,
    /// Counters.
    pub stats: Stats,
    ending: Arc<Ending>,
    machine: Arc<dyn Machine>,
    pm: Arc<Pm>,
    serial: Vec<SerialPort>,
    bvmcons: Option<BvmConsole>,
    exit_stats: Option<File>,
    started: Mutex<BTreeSet<u32>>,
}

/// Capabilities and APIC mode of a vCPU, before it runs.
fn prepare(config: &Config, vcpu: &Vcpu) -> vmmapi::Result<()> {
    // Without this exit an idle guest burns a CPU; with it the kernel puts
    // the thread to sleep. -H therefore changes nothing but whether a kernel
    // without it is an error.
    match vcpu.set_capability(Capability::HaltExit, 1) {
        Err(e) if config.halt_exits => return Err(e),
        _ => {}
    }
    if config.pause_exits {
        vcpu.set_capability(Capability::PauseExit, 1)?;
    }
    let state = if config.x2apic {
        X2apicState::Enabled
    } else {
        X2apicState::Disabled
    };
    vcpu.set_x2apic_state(state)?;
    // Where the CPU lacks INVPCID the guest does not see it.
    let _ = vcpu.set_capability(Capability::EnableInvpcid, 1);
    Ok(())
}

/// Runs a VM to its end; returns the exit status.
pub fn run(config: Config) -> Result<i32, Error> {
    let is_child = boot::is_child();
    if is_child {
        boot::follow_parent();
    }
    let name = config.name.clone();
    sandbox::announce(config.sandbox);
    signals::block().map_err(|e| Error::System("signal mask", e.into()))?;
    let result = Vm::new(config).and_then(|vm| {
        signals::listen(
            Arc::clone(&vm.pm),
            Arc::clone(&vm.machine),
            Arc::clone(&vm.ending),
        );
        let bsp = vm.vm.vcpu(0);
        let rip = bsp.register(RegName::Rip)?;
        bsp.set_register(RegName::Rip, rip)?;
        vmmapi::set_process_title(&vm.config.name);
        if vm.config.verbose {
            for what in vm.vm.lacking() {
                eprintln!("bhyve: vmm.ko lacks an addition of ours: {what}\r");
            }
        }
        let told = Arc::downgrade(&vm);
        let vcpus = move || {
            told.upgrade()
                .map_or_else(Vec::new, |vm| vm.stats.by_vcpu())
        };
        if let Err(e) = status::serve(&name, vcpus)
            && vm.config.verbose
        {
            let folder = status::directory(nix::unistd::geteuid());
            eprintln!(
                "bhyve: bhyvectl will not see counters: {}: {e}",
                folder.display()
            );
        }
        confine(&vm)?;
        start(&vm, bsp)?;
        let status = vm.ending.wait();
        vm.finish();
        if status == POWERED_OFF && vm.config.destroy_on_poweroff {
            vmmapi::Vm::destroy(vm.vm.name())?;
        }
        if vm.config.sandbox != Mode::Off {
            // The process ends. Devices that tidied up would be refused their calls.
            std::mem::forget(vm);
        }
        Ok(status)
    });
    terminal::restore_all();
    if is_child && !boot::is_child() {
        // The parent has died, whose task this was.
        vmmapi::Vm::destroy(&name)?;
    }
    result
}

/// Gives up what is not needed from here on.
fn confine(vm: &Arc<Vm>) -> Result<(), Error> {
    let mode = vm.config.sandbox;
    let destroys = vm.config.destroy_on_poweroff || boot::is_child();
    if destroys && vmmapi::Vm::keep_control().is_err() {
        sandbox::need(|n| {
            n.write.insert("/dev/vmmctl".into());
        });
    }
    limit(vm).map_err(|e| Error::System("rights of descriptors", e))?;
    let ending = Arc::clone(&vm.ending);
    let report = sandbox::enter(mode, move |call| {
        eprintln!("bhyve: the sandbox refused {call}; --sandbox=log goes on all the same\r");
        if mode == Mode::On {
            ending.end(ERROR);
        }
    })?;
    if vm.config.verbose {
        for what in report.lacking {
            eprintln!("bhyve: sandbox: {what}");
        }
    }
    Ok(())
}

/// Takes rights from the descriptors that no device has opened.
fn limit(vm: &Arc<Vm>) -> io::Result<()> {
    let requests = vmmapi::Vm::requests();
    sandbox::limit(&vm.vm, Purpose::Vm(&requests))?;
    sandbox::limit(io::stdin(), Purpose::Terminal)?;
    sandbox::limit(io::stdout(), Purpose::Output)?;
    sandbox::limit(io::stderr(), Purpose::Output)
}

/// Activates a vCPU and gives it its thread.
fn start(vm: &Arc<Vm>, vcpu: Vcpu) -> Result<(), Error> {
    let id = vcpu.id();
    lock(&vm.started).insert(id);
    vcpu.activate()?;
    vm.ending.started();
    let shared = Arc::clone(vm);
    let thread = std::thread::Builder::new().name(format!("vcpu {id}"));
    let spawned = thread.spawn(move || vcpu::thread(&shared, &vcpu));
    spawned
        .map(drop)
        .map_err(|e| Error::System("vCPU thread", e))
}

/// Starts an application processor in real mode at the start-up IPI's page.
pub fn spin_up(vm: &Arc<Vm>, id: i32, rip: u64) -> vmmapi::Result<Next> {
    let cpus = vm.config.topology.cpus();
    let Some(id) = u32::try_from(id).ok().filter(|id| (1..cpus).contains(id)) else {
        return Ok(Next::Fail(format!("start-up IPI for vCPU {id} of {cpus}")));
    };
    if lock(&vm.started).contains(&id) {
        return Ok(Next::Run);
    }
    let ap = vm.vm.vcpu(id);
    ap.reset()?;
    prepare(&vm.config, &ap)?;
    ap.set_capability(Capability::UnrestrictedGuest, 1)?;
    let vector = (rip >> 12) & 0xff;
    ap.set_register(RegName::Rip, 0)?;
    let mut cs = ap.desc(RegName::Cs)?;
    cs.base = vector << 12;
    ap.set_desc(RegName::Cs, cs)?;
    ap.set_register(RegName::Cs, vector << 8)?;
    match start(vm, ap) {
        Ok(()) => Ok(Next::Run),
        Err(Error::Vmm(e)) => Err(e),
        Err(e) => Ok(Next::Fail(e.to_string())),
    }
}

impl Vm {
    fn new(config: Config) -> Result<Arc<Vm>, Error> {
        let passed = config.slots.iter().find(|s| s.emulation == "passthru");
        if let Some(slot) = passed.filter(|_| !config.wired) {
            return Err(Error::NotWired(slot.at));
        }
        let vm = match config.bootrom {
            Some(_) => firmware::open(&config.name)?,
            None => vmmapi::Vm::open(&config.name)?,
        };
        let bsp = vm.vcpu(0);
        let cpus = config.topology.cpus();
        if cpus > 1 && bsp.capability(Capability::UnrestrictedGuest).is_err() {
            return Err(Error::OneCpu(cpus));
        }
        let t = config.topology;
        vm.set_topology(Topology {
            sockets: t.sockets,
            cores: t.cores,
            threads: t.threads,
            ..Topology::default()
        })?;
        prepare(&config, &bsp)?;
        match config.tsc_khz {
            None => vm.set_pv(config.pv)?,
            Some(khz) if vm.set_tsc(config.pv, khz)? => {}
            Some(khz) => return Err(Error::Tsc(khz)),
        }
        let flags = MemFlags {
            wired: config.wired,
            in_core: config.core_memory,
        };
        let memory = vm.setup_memory(config.memory, flags)?;

        let machine: Arc<dyn Machine> = Arc::new(Kernel {
            rings: AtomicU32::new(0),
            vm: vm.clone(),
            complained: AtomicBool::new(false),
        });
        let ending = Arc::new(Ending::default());
        let buses = Arc::new(Buses::default());
        Legacy::attach(Arc::clone(&machine), &buses)?;
        I8042::attach(Arc::clone(&machine), &buses)?;
        let pm = Pm::new(Arc::clone(&machine), &buses)?;
        let pins = vm.ioapic_pincount()?.min(255) as u8;
        let router = Arc::new(Router::new(Arc::clone(&machine), pins));
        router.share(pm::SCI);
        let (serial, present) = serial_ports(&config, &machine, &buses, &router)?;
        let bvmcons = match config.bvmcons {
            true => {
                let backend = Spec::Stdio
                    .open("bvmcons")
                    .map_err(|e| Error::Serial("bvmcons", e))?;
                let console = BvmConsole::new(backend);
                buses
                    .ports
                    .claim(bvmcons::PORT, 4, Arc::new(console.clone()))?;
                Some(console)
            }
            false => None,
        };
        if let Some(address) = config.debug {
            let line = Line::open(address).map_err(|e| Error::Debug(address, e))?;
            let port = Arc::new(DebugPort::new(line));
            buses.ports.claim(dbgport::device::PORT, 4, port)?;
        }
        let mut windows = Windows::new(LOWMEM_LIMIT);
        if config.testdev {
            windows.io = testdev::END.into();
            testdev::attach_buffer(&vm, &buses)?;
            let ending = Arc::clone(&ending);
            TestDev::attach(Arc::clone(&machine), &buses, move |status| {
                ending.end(status.into());
                // The guest expects not to go on.
                loop {
                    std::thread::park();
                }
            })?;
        }
        if let Some(rom) = &config.bootrom {
            firmware::install(&vm, &buses, rom, cpus)?;
        }
        let means = Means {
            vm: &config.name,
            cpus,
            machine: &machine,
            memory: &memory,
            virtio_msi: config.virtio_msi,
        };
        let pci = PciRoot::new(&config.slots, windows, &buses, &machine, &router, &means)?;
        set_rtc(&vm, &memory, config.utc)?;
        write_tables(&config, &vm, &memory, &pci, present)?;

        // While files can be made.
        let exit_stats = match &config.exit_stats {
            Some(path) => Some(
                File::create(path).map_err(|e| Error::ExitStats(path.display().to_string(), e))?,
            ),
            None => None,
        };

        let vm = Arc::new(Vm {
            msrs: Msrs::new(Vendor::host(), config.strict_msr),
            stats: Stats::new(config.exit_stats.is_some()),
            exit_stats,
            started: Mutex::default(),
            config,
            vm,
            memory,
            buses,
            ending,
            machine,
            pm,
            serial,
            bvmcons,
        });
        Ok(vm)
    }

    /// A vCPU's thread is done.
    pub fn ended(&self, result: Result<SuspendHow, Failed>) {
        self.ending.ended(result);
    }

    /// Lets output go out, gives the terminal back, and tells what was asked
    /// for.
    fn finish(&self) {
        if let Some(console) = &self.bvmcons {
            console.drain();
        }
        for port in &self.serial {
            port.drain(Duration::from_secs(2));
        }
        terminal::restore_all();
        if self.config.verbose {
            for (kind, n) in self.stats.kinds() {
                eprintln!("{n:>12} {kind}");
            }
        }
        if let Some(mut file) = self.exit_stats.as_ref() {
            let mut kernel: BTreeMap<String, u64> = BTreeMap::new();
            for &id in lock(&self.started).iter() {
                for s in self.vm.vcpu(id).stats().unwrap_or_default() {
                    *kernel.entry(s.desc).or_default() += s.value;
                }
            }
            let text = self.stats.json(&kernel);
            if let Err(e) = file.write_all(text.as_bytes()) {
                eprintln!("--exit-stats: {e}");
            }
        }
    }
}

/// The legacy serial ports; with an LPC bridge both are there.
fn serial_ports(
    config: &Config,
    machine: &Arc<dyn Machine>,
    buses: &Buses,
    router: &Router,
) -> Result<(Vec<SerialPort>, [bool; 2]), Error> {
    let lpc = config.slots.iter().any(|s| s.emulation == "lpc");
    let (mut ports, mut present) = (Vec::new(), [false; 2]);
    for ((legacy, spec), present) in LEGACY.iter().zip(&config.serial).zip(&mut present) {
        if spec.is_none() && !lpc {
            continue;
        }
        *present = true;
        router.reserve(legacy.irq);
        let spec = spec.as_ref().unwrap_or(&Spec::None);
        let backend = spec
            .open(legacy.name)
            .map_err(|e| Error::Serial(legacy.name, e))?;
        let port = SerialPort::new(Arc::clone(machine), legacy.base, legacy.irq, backend);
        buses.ports.claim(legacy.base, 8, Arc::new(port.clone()))?;
        ports.push(port);
    }
    Ok((ports, present))
}

/// The RTC's time, and the memory size in its NVRAM: units of 64 KiB above
/// 16 MiB at 0x34, above 4 GiB at 0x5b.
fn set_rtc(vm: &vmmapi::Vm, memory: &GuestMemory, utc: bool) -> Result<(), Error> {
    let [l0, l1, ..] = (memory.low_size().saturating_sub(16 << 20) >> 16).to_le_bytes();
    let [h0, h1, h2, ..] = (memory.high_size() >> 16).to_le_bytes();
    for (offset, value) in [(0x34, l0), (0x35, l1), (0x5b, h0), (0x5c, h1), (0x5d, h2)] {
        vm.rtc_write(offset, value)?;
    }
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs() as i64);
    let offset = if utc {
        0
    } else {
        chrono::Local::now().offset().local_minus_utc().into()
    };
    vm.rtc_settime(now + offset)?;
    Ok(())
}

/// Firmware tables where guests look for them.
fn write_tables(
    config: &Config,
    vm: &vmmapi::Vm,
    memory: &GuestMemory,
    pci: &PciRoot,
    serial: [bool; 2],
) -> Result<(), Error> {
    let cpus = config.topology.cpus();
    if config.mptable {
        if pci.buses().keys().any(|b| *b != 0) {
            return Err(Error::MpTableBuses);
        }
        let table = tables::mptable::build(cpus, &pci.intx_map())?;
        memory.write_bytes(tables::MPTABLE_BASE, &table)?;
    }
    let host = nix::unistd::gethostname().unwrap_or_default();
    let facts = tables::smbios::Facts {
        uuid: config
            .uuid
            .unwrap_or_else(|| tables::smbios::default_uuid(&host.to_string_lossy(), &config.name)),
        topology: config.topology,
        low: memory.low_size(),
        high: memory.high_size(),
    };
    memory.write_bytes(tables::SMBIOS_BASE, &tables::smbios::build(&facts)?)?;
    if config.acpi {
        let facts = tables::acpi::Facts {
            cpus,
            hpet: vm.hpet_capabilities().ok(),
            pci,
            serial,
        };
        memory.write_bytes(tables::ACPI_BASE, &tables::acpi::build(&facts)?)?;
    }
    Ok(())
}
