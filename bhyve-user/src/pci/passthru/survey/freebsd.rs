//! `/dev/pci` tells. FreeBSD has no groups, and says whether there is an IOMMU only
//! when the first device is passed.

use std::collections::BTreeMap;

use vmm_core::iommu::pci::Config;
use vmmapi::host_pci::{self, HostFunction};

use super::{Function, Survey, number_groups, rid};
use crate::pci::passthru::request::Rules;

pub(super) fn host() -> Result<Survey, String> {
    let attached = host_pci::attached().map_err(|e| e.to_string())?;
    let functions = attached.into_iter().filter(|a| a.segment == 0);
    let mut functions: Vec<Function> = functions
        .map(|a| Function {
            at: a.at,
            name: format!("pci0:{}:{}:{}", a.at.bus, a.at.slot, a.at.func),
            id: a.id,
            class: a.class,
            header: a.header,
            driver: a.driver.map(|(name, unit)| format!("{name}{unit}")),
            group: None,
            messages: messages(a.at),
            reset: None,
        })
        .collect();
    functions.sort_by_key(|f| f.at);
    // Only root can read them all.
    let open = |f: &Function| Some((rid(f.at), HostFunction::open(f.at).ok()?));
    if let Some(all) = functions.iter().map(open).collect() {
        number_groups(&mut functions, &Spaces(all));
    }
    let wanted = host_pci::iommu_wanted();
    Ok(Survey {
        functions,
        ppt: wanted.is_some(),
        iommu: if wanted == Some(false) {
            Some(false)
        } else {
            None
        },
        interrupts_open: false,
        own_groups: true,
        groups_allowed: host_pci::groups_allowed(),
    })
}

/// Functions, by requester ID.
struct Spaces(BTreeMap<u16, HostFunction>);

impl Config for Spaces {
    fn config(&self, rid: u16, at: u16) -> Option<u32> {
        let function = self.0.get(&rid)?;
        Some(function.config_read(at, 4).unwrap_or(u32::MAX))
    }
}

pub(super) fn group_command() -> String {
    "or, if the guest is to be trusted: sysctl hw.vmm.ppt.unsafe_groups=1".into()
}

/// Writing is what the kernel lets only root do, and opening is for both.
fn messages(at: host_pci::PciAddress) -> Option<bool> {
    let function = HostFunction::open(at).ok()?;
    let mut image = [0; 256];
    for (at, four) in (0..).step_by(4).zip(image.chunks_exact_mut(4)) {
        four.copy_from_slice(&function.config_read(at, 4).ok()?.to_le_bytes());
    }
    let (rules, _) = Rules::new(&image);
    Some(rules.msi.is_some() || rules.msix.is_some())
}

pub(super) fn iommu_commands() -> Vec<String> {
    vec![
        "switch VT-d (Intel) or the IOMMU (AMD) on in the firmware's setup, and take \
         hw.vmm.iommu.enable=0 out of /boot/loader.conf"
            .into(),
    ]
}

/// FreeBSD never says that interrupts are open.
pub(super) fn interrupt_commands() -> Vec<String> {
    Vec::new()
}

pub(super) fn vmm_commands() -> Vec<String> {
    vec!["kldload vmm".into()]
}

pub(super) fn ppt_commands(f: &Function) -> Vec<String> {
    let at = f.at;
    vec![
        format!("devctl set driver -f {} ppt", f.name),
        format!("or pptdevs=\"{at}\" in /boot/loader.conf, beside vmm_load=\"YES\", and a reboot"),
    ]
}
