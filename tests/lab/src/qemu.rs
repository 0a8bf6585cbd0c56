//! QEMU: with TCG for AMD-V, with KVM where that offers VT-x.

use crate::machine::{Engine, Iommu, Spec};
use anyhow::{Context, Result};
use std::ffi::OsString;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// Starts QEMU with COM1 and COM2 connected to these loopback ports, and its
/// monitor to another.
///
/// # Errors
/// The disk is full or there is no QEMU.
pub fn spawn(spec: &Spec, dir: &Path, ports: [u16; 2], monitor: Option<u16>) -> Result<Child> {
    let initramfs = dir.join("initramfs");
    fs::write(&initramfs, &spec.initramfs)?;
    let mut command = common(spec, ports);
    if let Some(port) = monitor {
        command.args(["-monitor", &format!("tcp:127.0.0.1:{port}")]);
    }
    command
        .arg("-kernel")
        .arg(&spec.kernel)
        .arg("-initrd")
        .arg(&initramfs)
        .args(["-append", &spec.cmdline]);
    if let Some(disk) = &spec.disk {
        // QEMU's flush is fdatasync(2): what it has acknowledged survives it.
        let mut drive = OsString::from("if=none,id=disk,format=raw,cache=writeback,file=");
        drive.push(disk);
        command.arg("-drive").arg(drive);
        command.args(["-device", "virtio-blk-pci,drive=disk"]);
    }
    logged(command, dir)
}

fn common(spec: &Spec, ports: [u16; 2]) -> Command {
    let acceleration: &[&str] = if spec.engine == Engine::Kvm {
        &["-accel", "kvm", "-cpu", "host"]
    } else {
        &["-accel", "tcg", "-cpu", "EPYC,+svm,+npt"]
    };
    // pdeathsig: an emulator must not outlive us, however we end.
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "qemu-system-x86_64"])
        .args(["-machine", "q35", "-nodefaults", "-no-user-config"])
        .args(["-display", "none", "-no-reboot"])
        .args(acceleration)
        .args(["-smp", &spec.cpus.to_string()])
        .args(["-m", &spec.memory_mib.to_string()]);
    if spec.count_instructions && spec.engine == Engine::Qemu {
        // An instruction takes a nanosecond, and a tick of the TSC.
        command.args(["-icount", "shift=0"]);
    }
    // It has to be there before the devices that it is for.
    let iommu = match spec.pci.iommu {
        Iommu::None => None,
        Iommu::Intel { interrupts: true } => Some("intel-iommu,intremap=on"),
        Iommu::Intel { interrupts: false } => Some("intel-iommu,intremap=off"),
        Iommu::Amd => Some("amd-iommu,intremap=on"),
    };
    if let Some(iommu) = iommu {
        command.args(["-device", iommu]);
    }
    command.args(&spec.pci.arguments);
    for port in ports {
        command.args(["-serial", &format!("tcp:127.0.0.1:{port}")]);
    }
    command
}

fn logged(mut command: Command, dir: &Path) -> Result<Child> {
    let log = File::create(dir.join("qemu.log"))?;
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("cannot start QEMU")
}
