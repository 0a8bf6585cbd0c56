//! Functions behind bridges, and several of one device: what can be passed is what
//! their IOMMU groups allow.

use super::{small, to_host, to_ppt, with_iommu};
use crate::cases::guests;
use crate::host::{Host, SHORT};
use crate::machine::Iommu;
use crate::runner::{Case, Group, Lab};
use anyhow::{Context, Result, ensure};

/// An NVMe controller behind a port with ACS; two of edu behind a bridge to
/// conventional PCI, which tells the IOMMU its own number for both; an NVMe
/// controller and an edu as two functions of one device, without ACS.
const DEVICES: [&str; 14] = [
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
    "-device",
    "nvme,serial=first,addr=a.0,multifunction=on",
    "-device",
    "edu,addr=a.1",
];

/// The host and its test.
pub fn group(lab: &Lab) -> Group {
    let name = "passthru-bridges";
    let mut config = with_iommu(lab, 128, Iommu::Intel { interrupts: true });
    config.pci.arguments = DEVICES.map(str::to_owned).to_vec();
    Group {
        name: name.to_owned(),
        config,
        cases: vec![Case::new(name, bridges)],
    }
}

fn bridges(_: &Lab, host: &mut Host) -> Result<()> {
    const FIRST: &str = "0000:00:0a.0";
    const SECOND: &str = "0000:00:0a.1";
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
    let shared = format!("with {FIRST} (nvme)");
    ensure!(text.contains("shares") && text.contains(&shared), "{text}");

    // Behind the bridge: DMA and interrupts have its number.
    to_ppt(host, "0000:02:01.0")?;
    guests::passes(host, &small("-s 5,passthru,2/1/0"))?;
    to_host(host, "0000:02:01.0")?;

    // One of two functions is refused by the same words, until the other is ppt's.
    to_ppt(host, SECOND)?;
    let guest = small("-s 5,passthru,0/10/1");
    guest.start(host)?;
    guest.expect_exit(host, 4, SHORT)?;
    let error = host.must("cat /tmp/bhyve.err", SHORT)?;
    ensure!(
        error.contains("shares") && error.contains(&shared),
        "{error}"
    );
    guest.destroy(host)?;
    to_ppt(host, FIRST)?;
    guests::passes(host, &guest)?;
    to_host(host, SECOND)?;
    to_host(host, FIRST)
}
