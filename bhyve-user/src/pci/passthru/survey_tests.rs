use super::*;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

/// Configuration space with these capabilities, one behind the other.
fn config(header: u8, capabilities: &[u8]) -> [u8; 256] {
    let mut c = [0; 256];
    c[0x0e] = header;
    let mut at = 0x40;
    if !capabilities.is_empty() {
        (c[0x06], c[0x34]) = (0x10, at as u8);
    }
    for (i, id) in capabilities.iter().enumerate() {
        let next = if i + 1 < capabilities.len() {
            at + 0x20
        } else {
            0
        };
        (c[at], c[at + 1]) = (*id, next as u8);
        at += 0x20;
    }
    c
}

struct Tree(tempfile::TempDir);

impl Tree {
    fn new() -> Tree {
        let tree = Tree(tempfile::tempdir().unwrap());
        fs::create_dir_all(tree.path("bus/pci/devices")).unwrap();
        fs::create_dir_all(tree.path("bus/pci/drivers/ppt")).unwrap();
        fs::create_dir_all(tree.path("kernel/iommu_groups")).unwrap();
        tree
    }
    fn path(&self, p: &str) -> std::path::PathBuf {
        self.0.path().join(p)
    }
    /// A function with its class, driver and group.
    fn add(&self, name: &str, class: u32, config: &[u8], driver: &str, group: Option<u32>) {
        let folder = self.path("bus/pci/devices").join(name);
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("vendor"), "0x8086\n").unwrap();
        fs::write(folder.join("device"), "0x10d3\n").unwrap();
        fs::write(folder.join("class"), format!("0x{class:06x}\n")).unwrap();
        fs::write(folder.join("config"), config).unwrap();
        if !driver.is_empty() {
            let of = self.path("bus/pci/drivers").join(driver);
            fs::create_dir_all(&of).unwrap();
            symlink(of, folder.join("driver")).unwrap();
        }
        if let Some(group) = group {
            let of = self.path("kernel/iommu_groups").join(group.to_string());
            fs::create_dir_all(&of).unwrap();
            symlink(of, folder.join("iommu_group")).unwrap();
        }
    }
    fn survey(&self) -> Survey {
        super::platform::survey(self.0.path() as &Path).unwrap()
    }
}

fn kinds(s: &Survey, name: &str) -> Vec<&'static str> {
    let f = s.functions.iter().find(|f| f.name == name).unwrap();
    s.obstacles(f).iter().map(|o| o.kind).collect()
}

#[test]
fn a_tree_tells_what_can_be_passed_and_what_is_in_the_way() {
    let t = Tree::new();
    let msix = config(0, &[0x01, 0x05, 0x11]);
    t.add("0000:00:00.0", 0x06_0000, &config(0, &[]), "", Some(0));
    t.add(
        "0000:00:1c.0",
        0x06_0400,
        &config(1, &[0x05]),
        "pcieport",
        Some(1),
    );
    t.add("0000:05:00.0", 0x02_0000, &msix, "ppt", Some(2));
    t.add("0000:06:00.0", 0x02_0000, &msix, "e1000e", Some(3));
    t.add("0000:07:00.0", 0x01_0802, &msix, "", Some(4));
    t.add(
        "0000:08:00.0",
        0x03_0000,
        &config(0, &[0x01]),
        "ppt",
        Some(5),
    );
    t.add("0000:09:00.0", 0x03_0000, &msix, "ppt", Some(6));
    t.add("0000:09:00.1", 0x04_0300, &msix, "snd_hda_intel", Some(6));
    t.add("0000:09:00.2", 0x0c_0330, &msix, "", Some(6));
    t.add("0000:0a:00.0", 0x02_0000, &msix, "ppt", None);
    t.add("0001:00:00.0", 0x02_0000, &msix, "ppt", Some(7));
    let s = t.survey();
    assert!(s.functions.iter().all(|f| !f.name.starts_with("0001")));
    assert_eq!(s.functions.len(), 10);
    assert_eq!(kinds(&s, "0000:05:00.0"), [] as [&str; 0]);
    assert_eq!(s.refusal(s.functions[2].at), None);
    assert_eq!(kinds(&s, "0000:00:00.0"), ["bridge"]);
    assert_eq!(kinds(&s, "0000:00:1c.0"), ["bridge"]);
    assert_eq!(kinds(&s, "0000:06:00.0"), ["driver"]);
    assert_eq!(kinds(&s, "0000:07:00.0"), ["driver"]);
    assert_eq!(kinds(&s, "0000:08:00.0"), ["no-msi"]);
    assert_eq!(
        kinds(&s, "0000:09:00.0"),
        ["group"],
        "a driverless mate is none"
    );
    assert_eq!(kinds(&s, "0000:0a:00.0"), ["no-iommu"]);
    // The second of ppt's, in the order of places.
    assert_eq!(s.unit(1), Some(s.functions[5].at));
    assert_eq!(s.unit(4), None);
}

#[test]
fn the_refusal_says_what_to_type() {
    let t = Tree::new();
    let msix = config(0, &[0x11]);
    t.add("0000:06:00.0", 0x02_0000, &msix, "e1000e", Some(3));
    t.add("0000:06:00.1", 0x02_0000, &msix, "ixgbe", Some(3));
    let s = t.survey();
    let text = s.refusal(s.functions[0].at).unwrap();
    assert_eq!(
        text,
        "0000:06:00.0 (6/0/0) cannot be passed:
  it is held by the host's driver e1000e, not by ppt:
    echo ppt > /sys/bus/pci/devices/0000:06:00.0/driver_override
    echo 0000:06:00.0 > /sys/bus/pci/devices/0000:06:00.0/driver/unbind
    echo 0000:06:00.0 > /sys/bus/pci/drivers_probe
  it shares IOMMU group 3 with 0000:06:00.1 (ixgbe): what is in a group can reach each other, so \
no part of it may stay with a driver of the host's:
    echo ppt > /sys/bus/pci/devices/0000:06:00.1/driver_override
    echo 0000:06:00.1 > /sys/bus/pci/devices/0000:06:00.1/driver/unbind
    echo 0000:06:00.1 > /sys/bus/pci/drivers_probe"
    );
    let nobody = PciAddress {
        bus: 99,
        slot: 0,
        func: 0,
    };
    assert!(
        s.refusal(nobody)
            .unwrap()
            .contains("no PCI function 99/0/0")
    );
}

#[test]
fn where_the_host_makes_no_groups_those_of_vmm_ko_are_shown() {
    let t = Tree::new();
    fs::create_dir_all(t.path("firmware/acpi/tables/DMAR")).unwrap();
    fs::create_dir_all(t.path("module/vmm/parameters")).unwrap();
    fs::write(t.path("module/vmm/parameters/unsafe_interrupts"), "Y\n").unwrap();
    fs::write(t.path("module/vmm/parameters/unsafe_groups"), "0\n").unwrap();
    // Express endpoints, the first with siblings: MSI-X behind that capability.
    let mut first = config(0x80, &[0x10, 0x11]);
    first[0x0e] = 0x80;
    t.add("0000:06:00.0", 0x02_0000, &first, "ppt", None);
    let next = config(0, &[0x10, 0x11]);
    t.add("0000:06:00.1", 0x02_0000, &next, "ixgbe", None);
    t.add("0000:07:00.0", 0x02_0000, &next, "ppt", None);
    let s = t.survey();
    let groups: Vec<_> = s.functions.iter().map(|f| f.group).collect();
    assert_eq!(groups, [Some(0), Some(0), Some(1)]);
    assert_eq!(kinds(&s, "0000:06:00.0"), ["group"]);
    let text = s.refusal(s.functions[0].at).unwrap();
    assert!(
        text.contains("group 0 with 0000:06:00.1 (ixgbe)") && text.contains("unsafe_groups"),
        "{text}"
    );
    assert_eq!(kinds(&s, "0000:07:00.0"), [] as [&str; 0]);
    // With access control services (PCI Express 6.0 §7.7.11) they are told apart.
    let mut wide = first.to_vec();
    wide.resize(4096, 0);
    wide[0x100..0x104].copy_from_slice(&0x1_000d_u32.to_le_bytes());
    fs::write(t.path("bus/pci/devices/0000:06:00.0/config"), &wide).unwrap();
    assert_eq!(kinds(&t.survey(), "0000:06:00.0"), [] as [&str; 0]);
    fs::write(t.path("bus/pci/devices/0000:06:00.0/config"), first).unwrap();
    // Who cannot read them all is not told wrong ones.
    fs::write(t.path("bus/pci/devices/0000:07:00.0/config"), &next[..64]).unwrap();
    assert!(t.survey().functions.iter().all(|f| f.group.is_none()));
    fs::write(t.path("bus/pci/devices/0000:07:00.0/config"), next).unwrap();
    fs::write(t.path("module/vmm/parameters/unsafe_groups"), "1\n").unwrap();
    assert_eq!(kinds(&t.survey(), "0000:06:00.0"), [] as [&str; 0]);
}

#[test]
fn without_iommu_or_module_everything_says_so() {
    let t = Tree::new();
    t.add("0000:06:00.0", 0x02_0000, &config(0, &[0x05]), "", None);
    fs::remove_dir(t.path("bus/pci/drivers/ppt")).unwrap();
    let all = ["no-iommu", "vmm", "driver"];
    assert_eq!(kinds(&t.survey(), "0000:06:00.0"), all);
    // VT-d or AMD-Vi that the host leaves alone is vmm.ko's to use.
    let open = ["interrupts", "vmm", "driver"];
    for table in ["DMAR", "IVRS"] {
        let table = t.path("firmware/acpi/tables").join(table);
        fs::create_dir_all(&table).unwrap();
        assert_eq!(kinds(&t.survey(), "0000:06:00.0"), open);
        fs::remove_dir(&table).unwrap();
    }
    // AMD's, by this table, with an I/O APIC's entry: one function's interrupts can
    // be remapped.
    let mut ivrs = vec![0; 48];
    ivrs.extend([0x10, 0, 32, 0]);
    ivrs.extend([0; 20]);
    ivrs.extend([0x48, 0, 0, 0, 0, 0xa0, 0, 1]);
    let table = t.path("firmware/acpi/tables/IVRS");
    fs::write(&table, &ivrs).unwrap();
    assert_eq!(kinds(&t.survey(), "0000:06:00.0"), open[1..]);
    ivrs[79] = 2;
    fs::write(&table, &ivrs).unwrap();
    assert_eq!(kinds(&t.survey(), "0000:06:00.0"), open);
    fs::remove_file(&table).unwrap();
    fs::create_dir_all(t.path("firmware/acpi/tables/DMAR")).unwrap();
    // With VT-d the kernel's own remapping, which its controllers' names tell.
    let chip = t.path("kernel/irq/9/chip_name");
    fs::create_dir_all(chip.parent().unwrap()).unwrap();
    for (name, left) in [("IO-APIC\n", &open[..]), ("IR-IO-APIC\n", &open[1..])] {
        fs::write(&chip, name).unwrap();
        assert_eq!(kinds(&t.survey(), "0000:06:00.0"), left, "{name}");
    }
    fs::remove_file(&chip).unwrap();
    fs::create_dir_all(t.path("module/vmm/parameters")).unwrap();
    fs::write(t.path("module/vmm/parameters/unsafe_interrupts"), "Y\n").unwrap();
    assert_eq!(kinds(&t.survey(), "0000:06:00.0"), open[1..]);
}

#[test]
fn what_cannot_be_read_is_not_held_against_it() {
    let t = Tree::new();
    let short = &config(0, &[])[..64];
    t.add("0000:06:00.0", 0x02_0000, short, "ppt", Some(1));
    let s = t.survey();
    assert_eq!(s.functions[0].messages, None, "not root");
    assert_eq!(kinds(&s, "0000:06:00.0"), [] as [&str; 0]);
}
