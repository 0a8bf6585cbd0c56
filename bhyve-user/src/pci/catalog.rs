//! The emulations that `-s` knows: a name, what its options are, and who
//! builds it.

use std::sync::Arc;

use vmmapi::GuestMemory;

use super::PciDevice;
use super::bridge::{self, HostBridge};
use super::function::Blueprint;
use crate::ahci::options::Kind;
use crate::config::PciSlot;
use crate::machine::Machine;
use crate::virtio::pci::VirtioPci;
use crate::virtio::{self, Built};

/// What devices have besides their slot.
pub struct Means<'a> {
    /// The VM's name.
    pub vm: &'a str,
    /// How many vCPUs it has.
    pub cpus: u32,
    /// The VM.
    pub machine: &'a Arc<dyn Machine>,
    /// Guest memory.
    pub memory: &'a GuestMemory,
    /// `-W`: virtio without MSI-X.
    pub virtio_msi: bool,
}

/// A function that is ready for its slot.
pub type Plan = (Blueprint, Box<dyn PciDevice>);

/// How an emulation is made.
#[derive(Clone, Copy)]
pub enum Builder {
    /// Any PCI function.
    Pci(fn(&PciSlot, &Means<'_>) -> Result<Plan, String>),
    /// A virtio device. Its options are [`PciSlot::conf`].
    Virtio(fn(&PciSlot, &Means<'_>) -> Result<Built, String>),
    /// The LPC bridge, which the root makes when everything else has its
    /// interrupt.
    Lpc,
}

/// An emulation.
#[derive(Clone, Copy)]
pub struct Emulation {
    /// Its name.
    pub name: &'static str,
    /// What goes behind the name, and what it is.
    pub help: &'static str,
    /// Who makes it.
    pub builder: Builder,
}

/// All of them, in the order that they are listed in.
pub const EMULATIONS: &[Emulation] = &[
    Emulation {
        name: "hostbridge",
        help: "a host bridge, as slot 0 has it",
        builder: Builder::Pci(|_, _| Ok((bridge::plan(0x1275, 0x1275), Box::new(HostBridge)))),
    },
    Emulation {
        name: "amd_hostbridge",
        help: "the same with AMD's numbers",
        builder: Builder::Pci(|_, _| Ok((bridge::plan(0x1022, 0x7432), Box::new(HostBridge)))),
    },
    Emulation {
        name: "lpc",
        help: "the bridge to com1 and com2, on bus 0",
        builder: Builder::Lpc,
    },
    Emulation {
        name: "virtio-blk",
        help: "PATH[,ro][,sync][,direct][,nocache][,nodelete][,serial=ID][,sectorsize=LOGICAL[/PHYSICAL]]\
               [,queues=N]: a disk, PATH a raw file or a block device; a queue for each vCPU",
        builder: Builder::Virtio(|slot, means| virtio::blk::build(&slot.conf, means.cpus)),
    },
    Emulation {
        name: "ahci",
        help: "hd:PATH[,OPTION...] or cd:PATH, up to 32 of them: a SATA adapter with its drives; \
               options as ahci-hd's",
        builder: Builder::Pci(|slot, means| ahci(None, slot, means)),
    },
    Emulation {
        name: "ahci-hd",
        help: "PATH[,ro][,sync][,direct][,nocache][,nodelete][,sectorsize=LOGICAL[/PHYSICAL]][,ser=ID]\
               [,model=NAME][,rev=REVISION][,nmrr=RATE]: a SATA disk",
        builder: Builder::Pci(|slot, means| ahci(Some(Kind::Hd), slot, means)),
    },
    Emulation {
        name: "ahci-cd",
        help: "PATH[,ser=ID][,rev=REVISION]: a SATA CD drive with an ISO image",
        builder: Builder::Pci(|slot, means| ahci(Some(Kind::Cd), slot, means)),
    },
    Emulation {
        name: "nvme",
        help: "PATH[,maxq=QUEUES][,qsz=ENTRIES][,sectsz=BYTES][,ser=ID][,eui64=N][,ro][,sync]\
               [,direct][,nocache][,nodelete]: an NVMe disk, PATH a raw file or a block device",
        builder: Builder::Pci(|slot, means| {
            let name = format!("nvme {}", slot.at);
            crate::nvme::build(&slot.conf, name, means.memory.clone())
        }),
    },
    Emulation {
        name: "virtio-9p",
        help: "NAME=PATH[,ro]: a folder of the host, shared by 9P2000.L as NAME",
        builder: Builder::Virtio(|slot, _| virtio::p9::build(&slot.conf)),
    },
    Emulation {
        name: "virtio-net",
        help: "[TAP|slirp[,open][,hostfwd=tcp|udp:[ADDRESS]:PORT-[ADDRESS:]PORT]][,mac=ADDRESS]\
               [,mtu=BYTES][,queues=N]: a network card, TAP the name of a tap device, on FreeBSD also \
               of an epair's end",
        builder: Builder::Virtio(virtio::net::build),
    },
    Emulation {
        name: "virtio-balloon",
        help: "[size=SIZE][,control=PATH][,noreport]: takes memory from the guest and gives it \
               to the host, with a socket to ask and change it by",
        builder: Builder::Virtio(|slot, means| {
            virtio::balloon::build(&slot.conf, means.machine, means.memory)
        }),
    },
    Emulation {
        name: "virtio-console",
        help: "NAME=PATH[,NAME=PATH]...: ports, each a Unix socket that a program connects to",
        builder: Builder::Virtio(|slot, _| virtio::console::build(&slot.conf)),
    },
    Emulation {
        name: "virtio-vsock",
        help: "path=PATH[,cid=N]: streams between guest and host, the host's side Unix sockets",
        builder: Builder::Virtio(|slot, _| virtio::vsock::build(&slot.conf)),
    },
    Emulation {
        name: "virtio-rnd",
        help: "the host's entropy",
        builder: Builder::Virtio(|slot, _| virtio::rnd::build(&slot.conf)),
    },
    Emulation {
        name: "passthru",
        help: "BUS/SLOT/FUNCTION[,rom=FILE]: a function of the host's PCI bus, which also may be \
               called pci0:BUS:SLOT:FUNCTION, pptN, or as Linux does; -S is needed, and \
               \"bhyvectl passthru list\" says what else",
        builder: Builder::Pci(super::passthru::build),
    },
];

fn ahci(only: Option<Kind>, slot: &PciSlot, means: &Means<'_>) -> Result<Plan, String> {
    let name = format!("ahci {}", slot.at);
    crate::ahci::build(&slot.conf, only, &name, means.memory)
}

/// The emulation of that name.
pub fn find(name: &str) -> Option<&'static Emulation> {
    EMULATIONS.iter().find(|e| e.name == name)
}

/// All names, for a message.
pub fn names() -> String {
    let names: Vec<&str> = EMULATIONS.iter().map(|e| e.name).collect();
    names.join(", ")
}

/// What `-s help` says: a name a line and nothing else, because libvirt compares
/// whole lines. What they are is in bhyve(8).
pub fn help() -> String {
    EMULATIONS.iter().map(|e| format!("{}\n", e.name)).collect()
}

/// Makes what a slot asks for; `None` for the LPC bridge.
///
/// # Errors
/// What is wrong with its options, or the host's side of it.
pub(super) fn plan(
    emulation: &Emulation,
    slot: &PciSlot,
    means: &Means<'_>,
) -> Result<Option<Plan>, String> {
    match emulation.builder {
        Builder::Pci(build) => build(slot, means).map(Some),
        Builder::Virtio(build) => {
            let built = build(slot, means)?;
            let name = format!("{} {}", slot.emulation, slot.at);
            let memory = means.memory.clone();
            let (plan, device) =
                VirtioPci::new(name, built, memory, means.virtio_msi).map_err(|e| e.to_string())?;
            Ok(Some((plan, Box::new(device))))
        }
        Builder::Lpc => Ok(None),
    }
}
