//! sysfs tells; so do the commands.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use vmm_core::iommu::ivrs;
use vmm_core::iommu::pci::Config;

use super::{Function, Survey, has_messages, number_groups, rid};
use crate::pci::passthru::request::parse_linux;

pub(super) fn host() -> Result<Survey, String> {
    survey(Path::new("/sys"))
}

/// The functions of a tree like `/sys`. Those of other segments than the first are
/// left out: bhyve(8) has no words for them.
pub(super) fn survey(sys: &Path) -> Result<Survey, String> {
    let devices = sys.join("bus/pci/devices");
    let fail = |e| format!("{}: {e}", devices.display());
    let mut functions = Vec::new();
    let mut spaces = Spaces::default();
    for entry in fs::read_dir(&devices).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(at) = parse_linux(&name) else {
            continue;
        };
        let folder = entry.path();
        let number = |file: &str| {
            let text = fs::read_to_string(folder.join(file)).unwrap_or_default();
            u32::from_str_radix(text.trim().trim_start_matches("0x"), 16).unwrap_or(0)
        };
        // Without privilege these are 64 bytes.
        let config = fs::read(folder.join("config")).unwrap_or_default();
        let link = |file: &str| {
            let target = fs::read_link(folder.join(file)).ok()?;
            Some(target.file_name()?.to_string_lossy().into_owned())
        };
        functions.push(Function {
            at,
            id: (number("vendor") as u16, number("device") as u16),
            class: number("class"),
            header: config.get(0x0e).map_or(0, |h| h & 0x7f),
            driver: link("driver"),
            group: link("iommu_group").and_then(|g| g.parse().ok()),
            messages: has_messages(&config),
            reset: Some(folder.join("reset").exists()),
            name,
        });
        spaces.0.insert(rid(at), config);
    }
    functions.sort_by_key(|f| f.at);
    let mut groups = fs::read_dir(sys.join("kernel/iommu_groups"))
        .into_iter()
        .flatten();
    let tables = sys.join("firmware/acpi/tables");
    let iommu = match groups.next() {
        Some(_) => Some(true),
        // One that the host does not use: vmm.ko may.
        None if ["DMAR", "IVRS"].iter().any(|t| tables.join(t).exists()) => None,
        None => Some(false),
    };
    // vmm.ko's own driver remaps interrupts where it can do so for one function, and
    // leaves them to the kernel where that does.
    let remapped = || {
        if tables.join("DMAR").exists() {
            return kernel_remaps(sys);
        }
        ivrs::interrupts(&fs::read(tables.join("IVRS")).unwrap_or_default())
    };
    let own_groups = iommu.is_none();
    // Only root can read them.
    if own_groups && spaces.0.values().all(|s| s.len() >= 256) {
        number_groups(&mut functions, &spaces);
    }
    let parameter = |name| fs::read_to_string(sys.join(name)).unwrap_or_default();
    let allowed = parameter(ALLOWED);
    Ok(Survey {
        functions,
        ppt: sys.join("bus/pci/drivers/ppt").exists(),
        iommu,
        own_groups,
        groups_allowed: !matches!(parameter(GROUPS).trim(), "" | "0"),
        interrupts_open: iommu.is_none() && !allowed.starts_with('Y') && !remapped(),
    })
}

/// Whether the kernel remaps interrupts: the names of its interrupt controllers begin so
/// then, whether it remaps DMA or not.
fn kernel_remaps(sys: &Path) -> bool {
    let interrupts = fs::read_dir(sys.join("kernel/irq"));
    interrupts
        .into_iter()
        .flatten()
        .flatten()
        .any(|n| fs::read(n.path().join("chip_name")).is_ok_and(|name| name.starts_with(b"IR-")))
}

/// Configuration spaces, by requester ID.
#[derive(Default)]
struct Spaces(BTreeMap<u16, Vec<u8>>);

impl Config for Spaces {
    fn config(&self, rid: u16, at: u16) -> Option<u32> {
        let space = self.0.get(&rid)?;
        let four = space.get(usize::from(at)..).and_then(|s| s.first_chunk());
        Some(four.map_or(u32::MAX, |four| u32::from_le_bytes(*four)))
    }
}

/// vmm.ko's parameters.
const ALLOWED: &str = "module/vmm/parameters/unsafe_interrupts";
const GROUPS: &str = "module/vmm/parameters/unsafe_groups";

pub(super) fn group_command() -> String {
    format!("or, if the guest is to be trusted: echo 1 > /sys/{GROUPS}")
}

pub(super) fn interrupt_commands() -> Vec<String> {
    vec![format!(
        "add intel_iommu=on to the kernel's command line and take intremap=off away (with an AMD \
         CPU, amd_iommu=off); or, if the guest is to be trusted: \
         echo 1 > /sys/{ALLOWED}"
    )]
}

pub(super) fn iommu_commands() -> Vec<String> {
    vec![
        "switch VT-d (Intel) or the IOMMU (AMD) on in the firmware's setup, and with an Intel CPU \
         add intel_iommu=on to the kernel's command line"
            .into(),
    ]
}

pub(super) fn vmm_commands() -> Vec<String> {
    vec!["modprobe vmm".into()]
}

pub(super) fn ppt_commands(f: &Function) -> Vec<String> {
    let name = &f.name;
    let folder = format!("/sys/bus/pci/devices/{name}");
    let mut all = vec![format!("echo ppt > {folder}/driver_override")];
    if f.driver.is_some() {
        all.push(format!("echo {name} > {folder}/driver/unbind"));
    }
    all.push(format!("echo {name} > /sys/bus/pci/drivers_probe"));
    all
}
