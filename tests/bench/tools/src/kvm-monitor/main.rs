//! bhyve's devices on Linux's KVM: the same loader, the same devices, the same
//! threads, and KVM in place of vmm.ko, so that a difference between the two
//! is the kernels'. One vCPU; KVM's own interrupt controllers and timer.
#![forbid(unsafe_code)]

mod loader;
mod machine;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bhyve::bus::{Buses, ones};
use bhyve::config::PciSlot;
use bhyve::i8042::I8042;
use bhyve::legacy::Legacy;
use bhyve::machine::Machine;
use bhyve::pci::Bdf;
use bhyve::pci::bar::Windows;
use bhyve::pci::catalog::Means;
use bhyve::pci::intx::Router;
use bhyve::pci::root::PciRoot;
use bhyve::pm::{self, Pm};
use bhyve::serial::LEGACY;
use bhyve::serial::backend::Spec;
use bhyve::serial::port::SerialPort;
use bhyve::tables;
use bhyveload::env::Environment;
use bhyveload::freebsd::FreeBsd;
use bhyveload::input::Input;
use bhyveload::{freebsd, linux};
use clap::Parser;
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vmmapi::GuestMemory;

use loader::KvmTarget;
use machine::KvmMachine;

#[derive(Debug, Parser)]
#[command(about = "Runs a guest on KVM with bhyve's devices; exits 1 when it powers off")]
struct Arguments {
    /// Guest memory, MiB
    #[arg(short, default_value_t = 256)]
    memory: u64,
    /// A FreeBSD kernel, or with --linux a bzImage
    #[arg(long)]
    kernel: PathBuf,
    /// The kernel is Linux
    #[arg(long)]
    linux: bool,
    /// Linux's initramfs
    #[arg(long)]
    initrd: Option<PathBuf>,
    /// Linux's command line
    #[arg(long, default_value = "")]
    cmdline: String,
    /// FreeBSD's environment, NAME=VALUE
    #[arg(short)]
    environment: Vec<String>,
    /// A PCI slot from 3 on, as bhyve's -s spells what comes behind its number
    #[arg(short = 's')]
    slots: Vec<String>,
}

/// Where Intel CPUs without unrestricted guests keep a TSS for real mode.
const TSS: usize = 0xfffb_d000;
/// The 8254's output at the speaker's port, as PCs have it.
const PIT: kvm_pit_config = kvm_pit_config {
    flags: KVM_PIT_SPEAKER_DUMMY,
    pad: [0; 15],
};

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(never) => never,
        Err(e) => {
            eprintln!("kvm-monitor: {e:#}");
            ExitCode::from(4)
        }
    }
}

fn input(path: &PathBuf) -> Result<Input> {
    let data = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(Input {
        name: path.display().to_string(),
        data,
    })
}

fn load(arguments: &Arguments, target: &mut KvmTarget<'_>) -> Result<()> {
    let kernel = input(&arguments.kernel)?;
    if arguments.linux {
        let boot = linux::Linux {
            kernel,
            initrd: arguments.initrd.as_ref().map(input).transpose()?,
            command_line: arguments.cmdline.clone(),
        };
        linux::load(target, &boot)?;
        return Ok(());
    }
    let mut environment = Environment::default();
    for variable in &arguments.environment {
        environment.set_from_argument(variable)?;
    }
    let boot = FreeBsd {
        kernel,
        kernel_name: "/boot/kernel/kernel".into(),
        kernel_args: None,
        modules: Vec::new(),
        environment,
    };
    freebsd::load(target, &boot)?;
    Ok(())
}

fn slots(arguments: &Arguments) -> Vec<PciSlot> {
    let at = |slot| Bdf {
        bus: 0,
        slot,
        func: 0,
    };
    let plain = |slot, emulation: &str| PciSlot {
        at: at(slot),
        emulation: emulation.into(),
        conf: String::new(),
    };
    let mut slots = vec![plain(0, "hostbridge"), plain(31, "lpc")];
    for (slot, text) in (3..31).zip(&arguments.slots) {
        let (emulation, conf) = text.split_once(',').unwrap_or((text, ""));
        slots.push(PciSlot {
            at: at(slot),
            emulation: emulation.into(),
            conf: conf.into(),
        });
    }
    slots
}

fn run(arguments: &Arguments) -> Result<ExitCode> {
    let kvm = Kvm::new().context("no /dev/kvm")?;
    let vm = Arc::new(kvm.create_vm().context("KVM_CREATE_VM")?);
    vm.set_tss_address(TSS)?;
    vm.create_irq_chip().context("KVM_CREATE_IRQCHIP")?;
    vm.create_pit2(PIT).context("KVM_CREATE_PIT2")?;
    let memory = GuestMemory::anonymous(arguments.memory << 20)?;
    vmmapi::kvm::set_memory(&vm, &memory)?;
    let mut vcpu = vm.create_vcpu(0).context("KVM_CREATE_VCPU")?;
    vcpu.set_cpuid2(&cpuid(&kvm)?)?;

    let machine: Arc<dyn Machine> = Arc::new(KvmMachine::new(Arc::clone(&vm)));
    let buses = Arc::new(Buses::default());
    Legacy::attach(Arc::clone(&machine), &buses)?;
    I8042::attach(Arc::clone(&machine), &buses)?;
    let _pm = Pm::new(Arc::clone(&machine), &buses)?;
    let router = Arc::new(Router::new(Arc::clone(&machine), 24));
    router.share(pm::SCI);
    let com1 = &LEGACY[0];
    router.reserve(com1.irq);
    let backend = Spec::Stdio.open(com1.name)?;
    let serial = SerialPort::new(Arc::clone(&machine), com1.base, com1.irq, backend);
    buses.ports.claim(com1.base, 8, Arc::new(serial.clone()))?;
    let means = Means {
        vm: "kvm",
        cpus: 1,
        machine: &machine,
        memory: &memory,
        virtio_msi: false,
    };
    let windows = Windows::new(vmmapi::abi::limits::LOWMEM_LIMIT);
    let pci = PciRoot::new(
        &slots(arguments),
        windows,
        &buses,
        &machine,
        &router,
        &means,
    )?;
    let facts = tables::acpi::Facts {
        cpus: 1,
        hpet: None,
        pci: &pci,
        serial: [true, false],
    };
    load(arguments, &mut KvmTarget::new(&memory, &vcpu)?)?;
    memory.write_bytes(tables::ACPI_BASE, &tables::acpi::build(&facts)?)?;
    let how = vcpu_loop(&mut vcpu, &buses);
    // What KVM counted goes with the VM.
    let exits = fs::read_to_string("/sys/kernel/debug/kvm/exits");
    serial.drain(Duration::from_secs(2));
    bhyve::serial::terminal::restore_all();
    if let Ok(exits) = exits {
        eprintln!("kvm exits {}", exits.trim());
    }
    how?;
    drop::<VmFd>(Arc::into_inner(vm).map_or_else(|| kvm.create_vm(), Ok)?);
    Ok(ExitCode::from(machine::POWERED_OFF))
}

/// What KVM supports, its paravirtual leaves included, and two bits of
/// CPUID.01H:ECX that it leaves to the monitor: the timer's TSC deadline, which
/// comes with its interrupt controllers, and that there is a hypervisor.
fn cpuid(kvm: &Kvm) -> Result<CpuId> {
    const TSC_DEADLINE: u32 = 1 << 24;
    const HYPERVISOR: u32 = 1 << 31;
    let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    for leaf in cpuid.as_mut_slice() {
        if leaf.function == 1 {
            leaf.ecx |= TSC_DEADLINE | HYPERVISOR;
        }
    }
    Ok(cpuid)
}

fn number(data: &[u8]) -> u64 {
    data.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b))
}

fn answer(data: &mut [u8], value: u64) {
    for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
        *to = from;
    }
}

/// Runs the guest until it powers off.
fn vcpu_loop(vcpu: &mut VcpuFd, buses: &Buses) -> Result<()> {
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(port, data)) => {
                let size = data.len() as u8;
                if let Some(device) = buses.ports.get(port) {
                    device.port_write(port, size, number(data) as u32);
                }
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                let size = data.len() as u8;
                let value = buses.ports.get(port).and_then(|d| d.port_read(port, size));
                answer(data, value.map_or(ones(size), u64::from));
            }
            Ok(VcpuExit::MmioRead(gpa, data)) => {
                let size = data.len() as u8;
                let value = buses.mmio.get(gpa, size).map(|d| d.mmio_read(gpa, size));
                answer(data, value.unwrap_or(ones(size)));
            }
            Ok(VcpuExit::MmioWrite(gpa, data)) => {
                let size = data.len() as u8;
                if let Some(device) = buses.mmio.get(gpa, size) {
                    device.mmio_write(gpa, size, number(data));
                }
            }
            Ok(VcpuExit::Shutdown) => bail!("the guest ended by a triple fault"),
            Ok(VcpuExit::Intr | VcpuExit::Hlt) => {}
            Ok(other) => bail!("KVM's exit {other:?} is not expected"),
            Err(e) if e.errno() == machine::EINTR => {}
            Err(e) => return Err(e).context("KVM_RUN"),
        }
        if machine::ended() {
            return Ok(());
        }
    }
}
