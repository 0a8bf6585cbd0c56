use super::*;
use crate::bus::Buses;
use crate::config::PciSlot;
use crate::machine::Machine;
use crate::machine::fake::Fake;
use crate::pci::Bdf;
use crate::pci::bar::Windows;
use crate::pci::intx::Router;
use crate::pci::root::Means;
use crate::tables::checksum;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

fn pci() -> Arc<PciRoot> {
    let slot = |slot, emulation: &str| PciSlot {
        at: Bdf {
            bus: 0,
            slot,
            func: 0,
        },
        emulation: emulation.into(),
        conf: String::new(),
    };
    let machine: Arc<dyn Machine> = Fake::new();
    let router = Arc::new(Router::new(machine.clone(), 32));
    let buses = Arc::new(Buses::default());
    PciRoot::new(
        &[slot(0, "hostbridge"), slot(31, "lpc")],
        Windows::new(0xc000_0000),
        &buses,
        &machine,
        &router,
        &Means {
            vm: "vm",
            cpus: 1,
            machine: &machine,
            memory: &vmmapi::GuestMemory::anonymous(1 << 20).unwrap(),
            virtio_msi: false,
        },
    )
    .unwrap()
}

fn image(cpus: u32) -> Vec<u8> {
    build(&Facts {
        cpus,
        hpet: Some(0x8086_a701),
        pci: &pci(),
        serial: [true, true],
    })
    .unwrap()
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(b[at..at + 4].try_into().unwrap())
}

/// The table at a guest address.
fn table(image: &[u8], address: u32) -> &[u8] {
    let at = (address - ACPI_BASE as u32) as usize;
    &image[at..at + u32_at(image, at + 4) as usize]
}

fn find<'a>(image: &'a [u8], signature: &[u8; 4]) -> &'a [u8] {
    let rsdt = table(image, u32_at(image, 16));
    let mut all = rsdt[36..]
        .chunks_exact(4)
        .map(|e| table(image, u32_at(e, 0)));
    all.find(|t| &t[..4] == signature).unwrap()
}

#[test]
fn a_guest_finds_every_table_with_a_sum_of_zero() {
    let i = image(2);
    assert_eq!(&i[..8], b"RSD PTR ");
    assert_eq!((checksum(&i[..20]), checksum(&i[..36])), (0, 0));
    let xsdt = table(&i, u32_at(&i, 24));
    let rsdt = table(&i, u32_at(&i, 16));
    assert_eq!(xsdt[36..].len(), 2 * rsdt[36..].len());
    for t in [rsdt, xsdt]
        .into_iter()
        .chain([b"APIC", b"FACP", b"HPET", b"MCFG"].map(|s| find(&i, s)))
    {
        assert_eq!(checksum(t), 0, "{:?}", &t[..4]);
    }
    let fadt = find(&i, b"FACP");
    assert_eq!(&table(&i, u32_at(fadt, 36))[..4], b"FACS");
    assert_eq!(u32_at(fadt, 36) % 64, 0);
    let dsdt = table(&i, u32_at(fadt, 40));
    assert_eq!((&dsdt[..4], checksum(dsdt)), (&b"DSDT"[..], 0));
    assert_eq!(u32_at(find(&i, b"HPET"), 36), 0x8086_a701);
}

#[test]
fn cpus_that_an_xapic_cannot_name_have_x2apic_entries() {
    let i = image(300);
    let madt = find(&i, b"APIC");
    let (mut at, mut kinds) = (44, [0; 16]);
    while at < madt.len() {
        kinds[usize::from(madt[at])] += 1;
        at += usize::from(madt[at + 1]);
    }
    assert_eq!(
        (
            at, kinds[0], kinds[9], kinds[1], kinds[2], kinds[4], kinds[10]
        ),
        (madt.len(), 255, 45, 1, 2, 1, 1)
    );
    assert!(
        build(&Facts {
            cpus: 60000,
            hpet: None,
            pci: &pci(),
            serial: [false; 2]
        })
        .is_err()
    );
}

/// Disassembles a table, or `None` where there is no iasl.
fn disassemble(name: &str, bytes: &[u8]) -> Option<String> {
    let dir: PathBuf =
        std::env::temp_dir().join(format!("bhyve-acpi-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let file = dir.join("t.aml");
    std::fs::write(&file, bytes).unwrap();
    let Ok(run) = Command::new("iasl").arg("-d").arg(&file).output() else {
        eprintln!("skipped: iasl (package acpica-tools) is not here");
        return None;
    };
    let text = std::fs::read_to_string(dir.join("t.dsl"));
    let said =
        String::from_utf8_lossy(&run.stderr).into_owned() + &String::from_utf8_lossy(&run.stdout);
    assert!(run.status.success(), "{said}");
    let text = text.unwrap();
    // Compiling it again finds what the disassembler lets pass.
    let again = Command::new("iasl")
        .arg("-p")
        .arg(dir.join("again"))
        .arg(dir.join("t.dsl"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&again.stdout).into_owned()
        + &String::from_utf8_lossy(&again.stderr);
    assert!(
        again.status.success() && said.contains("0 Errors"),
        "{said}"
    );
    std::fs::remove_dir_all(&dir).unwrap();
    Some(text)
}

#[test]
fn iasl_understands_the_dsdt() {
    let i = image(2);
    let Some(text) = disassemble("dsdt", table(&i, u32_at(find(&i, b"FACP"), 40))) else {
        return;
    };
    let flat: String = text.split_whitespace().collect::<Vec<_>>().join(" ");
    for part in [
        "Name (_S5",
        "Device (PC00)",
        "Device (ISA)",
        "Device (LNKH)",
        "Device (COM1)",
        "Device (COM2)",
        "Device (HPET)",
        "Method (_SRS",
    ] {
        assert!(flat.contains(part), "{part} is missing:\n{text}");
    }
    assert!(
        flat.contains("FindSetRightBit (SIRA, Local0) Local0-- PIRA = Local0"),
        "{text}"
    );
    assert!(!text.contains("Unknown"), "{text}");
}

#[test]
fn iasl_understands_the_other_tables() {
    let i = image(2);
    for (name, expected) in [
        (b"APIC", "Local Apic ID : 01"),
        (b"FACP", "Reset Register"),
        (b"MCFG", "End Bus Number : FF"),
        (b"HPET", "HPET"),
    ] {
        let Some(text) = disassemble(&String::from_utf8_lossy(name), find(&i, name)) else {
            return;
        };
        assert!(text.contains(expected), "{text}");
        assert!(!text.contains("Invalid"), "{text}");
    }
}
