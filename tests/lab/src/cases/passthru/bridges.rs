//! Functions behind bridges, and several of one device: what can be passed is what
//! their IOMMU groups allow.

use super::{small, to_host, to_ppt, with_iommu};
use crate::cases::guests;
use crate::guest::Guest;
use crate::host::{Host, SHORT};
use crate::machine::Iommu;
use crate::runner::{Case, Group, Lab};
use anyhow::{Context, Result, ensure};

/// An NVMe controller behind a port with ACS; two of edu behind a bridge to
/// conventional PCI, which tells the IOMMU its own number for both; an NVMe
/// controller and an edu as two functions of one device, without ACS.
const DEVICES: [&str; 10] = [
    "-device",
    "pcie-root-port,id=express,addr=8.0,chassis=1",
    "-device",
    "nvme,serial=behind,bus=express",
    "-device",
    "pcie-pci-bridge,id=conventional,addr=9.0",
    "-device",
    "edu,bus=conventional,addr=1.0",
    "-device",
    "edu,bus=conventional,addr=2.0",
];

const FIRST: &str = "0000:00:0a.0";
const SECOND: &str = "0000:00:0a.1";
/// What is in the way of the second while the host has the first.
const SHARED: &str = "with 0000:00:0a.0 (nvme)";

/// The two functions of one device.
pub fn pair() -> impl Iterator<Item = String> {
    let words = [
        "-device",
        "nvme,serial=first,addr=a.0,multifunction=on",
        "-device",
        "edu,addr=a.1",
    ];
    words.into_iter().map(str::to_owned)
}

/// The host and its test.
pub fn group(lab: &Lab) -> Group {
    let name = "passthru-bridges";
    let mut config = with_iommu(lab, 128, Iommu::Intel { interrupts: true });
    config.pci.arguments = DEVICES.map(str::to_owned).to_vec();
    config.pci.arguments.extend(pair());
    Group {
        name: name.to_owned(),
        config,
        cases: vec![Case::new(name, bridges)],
    }
}

fn bridges(_: &Lab, host: &mut Host) -> Result<()> {
    let list = host.must("bhyvectl passthru list", SHORT)?;
    // What the list says of a function; not all of it is in its line.
    let about = |name: &str| -> Result<String> {
        let line = list.lines().find(|l| l.starts_with(name));
        let line = line.with_context(|| format!("no {name} in:\n{list}"))?;
        let more = list
            .lines()
            .skip_while(|l| !l.starts_with(&format!("{name} (")))
            .take_while(|l| !l.is_empty());
        Ok([line]
            .into_iter()
            .chain(more)
            .collect::<Vec<_>>()
            .join("\n"))
    };
    for bridge in ["0000:00:08.0", "0000:00:09.0"] {
        let text = about(bridge)?;
        ensure!(text.contains("no: is a bridge"), "{text}");
    }
    // Theirs is the bridge's group too, which nobody's driver is in the way of.
    for alone in ["0000:01:00.0", "0000:02:01.0", "0000:02:02.0"] {
        let text = about(alone)?;
        ensure!(text.contains("ppt:") && !text.contains("shares"), "{text}");
    }
    let text = about(SECOND)?;
    ensure!(text.contains("shares") && text.contains(SHARED), "{text}");

    // Behind the bridge: DMA and interrupts have its number.
    to_ppt(host, "0000:02:01.0")?;
    guests::passes(host, &small("-s 5,passthru,2/1/0"))?;
    to_host(host, "0000:02:01.0")?;

    to_ppt(host, SECOND)?;
    let guest = refused(host)?;
    to_ppt(host, FIRST)?;
    guests::passes(host, &guest)?;
    to_host(host, SECOND)?;
    to_host(host, FIRST)
}

/// One of two functions is refused by the words of the list, until the other is
/// ppt's.
fn refused(host: &mut Host) -> Result<Guest> {
    let guest = small("-s 5,passthru,0/10/1");
    guest.start(host)?;
    guest.expect_exit(host, 4, SHORT)?;
    let error = host.must("cat /tmp/bhyve.err", SHORT)?;
    ensure!(
        error.contains("shares") && error.contains(SHARED),
        "{error}"
    );
    guest.destroy(host)?;
    Ok(guest)
}

/// As with Linux's groups where there are none: vmm.ko makes them. It can be told to
/// look away, and then says what it has seen.
pub fn own_groups(host: &mut Host) -> Result<()> {
    const LOOK_AWAY: &str = "/sys/module/vmm/parameters/unsafe_groups";
    to_ppt(host, SECOND)?;
    let guest = refused(host)?;
    to_ppt(host, FIRST)?;
    let list = host.must("bhyvectl passthru list", SHORT)?;
    let line = list.lines().find(|l| l.starts_with(SECOND));
    ensure!(line.is_some_and(|l| l.ends_with("yes")), "{list}");
    to_host(host, FIRST)?;
    host.must(&format!("echo 1 >{LOOK_AWAY}"), SHORT)?;
    guests::passes(host, &guest)?;
    host.must(&format!("echo 0 >{LOOK_AWAY}"), SHORT)?;
    let log = host.must("dmesg", SHORT)?;
    let said = "vmm: ppt 0/10/1: without the IOMMU's knowing it reaches 0/10/0";
    ensure!(log.contains(said), "no {said:?} in the log:\n{log}");
    to_host(host, SECOND)
}
