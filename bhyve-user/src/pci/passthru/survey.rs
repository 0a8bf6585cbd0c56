//! Which functions of the host's can be passed, why not the others, and what would
//! make it possible. `bhyvectl passthru list` shows it; bhyve says the same of the
//! one function that it was asked for.

#[cfg(target_os = "freebsd")]
#[path = "survey/freebsd.rs"]
mod platform;
#[cfg(target_os = "linux")]
#[path = "survey/linux.rs"]
mod platform;

use std::collections::BTreeMap;

use serde::Serialize;
use vmm_core::iommu::acs;
use vmm_core::iommu::pci::Config;
use vmmapi::host_pci::PciAddress;

use super::backend::BindError;

/// Of a function without message-signalled interrupts.
pub const NO_MESSAGES: &str = "has neither MSI nor MSI-X: its interrupt line (INTx) would have to be shared with the host and is not passed";

/// A function of the host's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// Where it is.
    pub at: PciAddress,
    /// What the host calls it.
    pub name: String,
    /// Vendor and device.
    pub id: (u16, u16),
    /// Class, subclass and programming interface.
    pub class: u32,
    /// Type of the configuration header: 0 for what is no bridge.
    pub header: u8,
    /// The driver that has it.
    pub driver: Option<String>,
    /// IOMMU group, where the host tells.
    pub group: Option<u32>,
    /// MSI or MSI-X; `None` where it was not to be found out.
    pub messages: Option<bool>,
    /// There is a way to reset it alone; likewise.
    pub reset: Option<bool>,
}

impl Function {
    fn is_ppt(&self) -> bool {
        let driver = self.driver.as_deref().unwrap_or_default();
        // FreeBSD's with the unit.
        let unit = driver.strip_prefix("ppt").unwrap_or("x");
        unit.bytes().all(|b| b.is_ascii_digit())
    }
    fn is_bridge(&self) -> bool {
        self.header != 0
    }
    /// What kind of device it is, in a word or two.
    pub fn kind(&self) -> &'static str {
        match (self.class >> 16, self.class >> 8 & 0xff) {
            (1, 6) => "SATA",
            (1, 8) => "NVMe",
            (1, _) => "storage",
            (2, _) => "network",
            (3, _) => "display",
            (4, _) => "multimedia",
            (5, _) => "memory",
            (6, 0) => "host bridge",
            (6, 1) => "ISA bridge",
            (6, 4) => "PCI bridge",
            (6, _) => "bridge",
            (7, _) => "communication",
            (8, 6) => "IOMMU",
            (8, _) => "system",
            (0xc, 3) => "USB",
            (0xc, 5) => "SMBus",
            (0xc, _) => "serial bus",
            _ => "other",
        }
    }
}

/// What of the host's matters besides its functions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Survey {
    /// In order of their places.
    pub functions: Vec<Function>,
    /// vmm.ko is loaded, and so there is the driver ppt.
    pub ppt: bool,
    /// An IOMMU is in use; `None` where the host does not tell.
    pub iommu: Option<bool>,
    /// A device could send the host any interrupt, and nobody has allowed that.
    pub interrupts_open: bool,
    /// Groups are those of [`acs`], as the host has none.
    pub own_groups: bool,
    /// Devices may be passed that share a group with the host's.
    pub groups_allowed: bool,
}

/// Why a function cannot be passed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Obstacle {
    /// One of `no-iommu`, `interrupts`, `bridge`, `no-msi`, `group`, `driver`, `vmm`.
    pub kind: &'static str,
    /// In words, the function being the subject.
    pub text: String,
    /// What to type, or to change, so that it goes away; empty if nothing does.
    pub commands: Vec<String>,
}

/// The host's functions.
///
/// # Errors
/// It does not show them.
pub fn host() -> Result<Survey, String> {
    platform::host()
}

impl Survey {
    fn find(&self, at: PciAddress) -> Option<&Function> {
        self.functions.iter().find(|f| f.at == at)
    }

    /// The function that is `pptN`: on FreeBSD that unit, on Linux the N-th that ppt
    /// holds.
    pub fn unit(&self, n: u64) -> Option<PciAddress> {
        let named = format!("ppt{n}");
        let mut ppt = self.functions.iter().filter(|f| f.is_ppt());
        let by_name = ppt.clone().find(|f| f.driver.as_ref() == Some(&named));
        let by_order = || {
            let n = usize::try_from(n).ok()?;
            ppt.nth(n).filter(|f| f.driver.as_deref() == Some("ppt"))
        };
        by_name.or_else(by_order).map(|f| f.at)
    }

    /// What is in the way of passing a function; the ones that nothing can be done
    /// about first.
    pub fn obstacles(&self, f: &Function) -> Vec<Obstacle> {
        let mut all = Vec::new();
        let mut add = |kind, text: String, commands: Vec<String>| {
            all.push(Obstacle {
                kind,
                text,
                commands,
            });
        };
        if f.is_bridge() {
            let text = "is a bridge: the devices behind it can be passed, not it".into();
            add("bridge", text, Vec::new());
            return all;
        }
        if f.class >> 16 == 6 {
            let text = "is a part of the host's chipset, which the host cannot do without";
            add("bridge", text.into(), Vec::new());
            return all;
        }
        if f.messages == Some(false) {
            add("no-msi", NO_MESSAGES.into(), Vec::new());
        }
        if self.iommu == Some(false) {
            let text = "could write to all of the host's memory: no IOMMU is in use".into();
            add("no-iommu", text, platform::iommu_commands());
        } else if self.iommu == Some(true) && f.group.is_none() {
            let text = "is not behind the host's IOMMU".into();
            add("no-iommu", text, Vec::new());
        }
        if self.interrupts_open {
            let text = "could send the host any interrupt: the host does not use its IOMMU, and \
                        vmm.ko's own driver remaps one function's interrupts with AMD-Vi \
                        alone: VT-d remaps those of the host's functions with them, or none";
            add("interrupts", text.into(), platform::interrupt_commands());
        }
        if !self.ppt {
            let text = "needs the driver ppt, which comes with vmm.ko: that is not loaded".into();
            add("vmm", text, platform::vmm_commands());
        }
        if !f.is_ppt() {
            let text = match &f.driver {
                Some(driver) => format!("is held by the host's driver {driver}, not by ppt"),
                None => "is not held by ppt".into(),
            };
            add("driver", text, platform::ppt_commands(f));
        }
        let others: Vec<&Function> = self.group_mates(f);
        if !others.is_empty() {
            let names = others.iter().map(|o| {
                let driver = o.driver.as_deref().unwrap_or_default();
                format!("{} ({driver})", o.name)
            });
            let text = format!(
                "shares IOMMU group {} with {}: what is in a group can reach each other, so \
                 no part of it may stay with a driver of the host's",
                f.group.unwrap_or_default(),
                names.collect::<Vec<_>>().join(", ")
            );
            let commands = others.iter().flat_map(|o| platform::ppt_commands(o));
            let mut commands: Vec<String> = commands.collect();
            if self.own_groups {
                commands.push(platform::group_command());
            }
            add("group", text, commands);
        }
        all
    }

    /// Functions of the same group that the host uses.
    fn group_mates(&self, f: &Function) -> Vec<&Function> {
        let mates = self.functions.iter().filter(|o| {
            !(self.own_groups && self.groups_allowed)
                && f.group.is_some()
                && o.group == f.group
                && o.at != f.at
                && !o.is_bridge()
                && o.driver.is_some()
                && !o.is_ppt()
        });
        mates.collect()
    }

    /// Why a function cannot be passed, all of it; `None` if nothing is in the way.
    pub fn refusal(&self, at: PciAddress) -> Option<String> {
        let Some(f) = self.find(at) else {
            return Some(format!(
                "the host has no PCI function {at}; \"bhyvectl passthru list\" shows those that it has"
            ));
        };
        let obstacles = self.obstacles(f);
        (!obstacles.is_empty()).then(|| text(&f.name, at, &obstacles))
    }

    /// What the kernel's refusal means.
    pub fn explain(&self, at: PciAddress, e: &BindError) -> String {
        use nix::libc::{EBUSY, EINVAL, EIO, ENOENT, ENXIO};
        let name = self.find(at).map_or("", |f| f.name.as_str());
        let BindError::Kernel(error) = e else {
            return format!("{name} ({at}): {e}");
        };
        let why = match error.errno() {
            Some(ENOENT) => "is not held by ppt",
            Some(ENXIO) => {
                "has no IOMMU that vmm.ko can use, or one that cannot keep its interrupts from \
                 the host's (no interrupt remapping; vmm.ko's option unsafe_interrupts=1 takes \
                 that risk)"
            }
            Some(EBUSY) => {
                "belongs to another VM, or a device of its IOMMU group is used by the host"
            }
            Some(EINVAL) => {
                "needs guest memory that is wired: give -S to bhyveload and to bhyve, and make \
                 the VM anew"
            }
            Some(EIO) => "cannot be reset, or has gone",
            _ => "",
        };
        format!("{name} ({at}) {why}: {error}; the kernel's log may say more")
    }
}

/// Numbers the groups that vmm.ko makes where the host's kernel makes none.
fn number_groups(functions: &mut [Function], pci: &impl Config) {
    let mut numbers = BTreeMap::new();
    for f in functions {
        let new = numbers.len() as u32;
        let group = acs::group(pci, rid(f.at));
        f.group = Some(*numbers.entry(group).or_insert(new));
    }
}

fn rid(at: PciAddress) -> u16 {
    u16::from(at.bus) << 8 | u16::from(at.slot) << 3 | u16::from(at.func)
}

/// One function's obstacles as both programs print them.
pub fn text(name: &str, at: PciAddress, obstacles: &[Obstacle]) -> String {
    let mut text = format!("{name} ({at}) cannot be passed:");
    for o in obstacles {
        text.push_str(&format!("\n  it {}", o.text));
        if !o.commands.is_empty() {
            text.push(':');
        }
        for c in &o.commands {
            text.push_str(&format!("\n    {c}"));
        }
    }
    text
}

/// Whether a configuration space has MSI or MSI-X in its list. `image` may end
/// early: then it is not known.
#[cfg(target_os = "linux")]
fn has_messages(image: &[u8]) -> Option<bool> {
    let image: &[u8; 256] = image.get(..256)?.try_into().ok()?;
    let (rules, _) = super::request::Rules::new(image);
    Some(rules.msi.is_some() || rules.msix.is_some())
}

// Over a tree like Linux's sysfs.
#[cfg(all(test, target_os = "linux"))]
#[path = "survey_tests.rs"]
mod tests;
