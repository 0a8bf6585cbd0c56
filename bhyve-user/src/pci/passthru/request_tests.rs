use super::*;
use proptest::prelude::*;

fn at(bus: u8, slot: u8, func: u8) -> Which {
    Which::At(PciAddress { bus, slot, func })
}

#[test]
fn a_function_can_be_named_as_every_program_does() {
    for (text, which) in [
        ("5/0/0", at(5, 0, 0)),
        ("10/31/7", at(10, 31, 7)),
        ("pci10:0:1", at(10, 0, 1)),
        ("pci0:10:0:1", at(10, 0, 1)),
        ("ppt3", Which::Unit(3)),
        ("0000:0a:1f.3", at(10, 31, 3)),
        ("0a:1f.3", at(10, 31, 3)),
    ] {
        assert_eq!(parse_which(text), Some(which), "{text}");
    }
    for bad in [
        "",
        "5",
        "5/0",
        "5/0/0/0",
        "256/0/0",
        "0/32/0",
        "0/0/8",
        "pci1:5:0:0",
        "0001:05:00.0",
        "ppt",
        "pptx",
        "a/0/0",
        "1f.3",
        "-1/0/0",
        "::.",
        "pci",
        "pci0:0:0:0:0",
    ] {
        assert_eq!(parse_which(bad), None, "{bad}");
    }
}

#[test]
fn options_are_the_function_and_a_rom() {
    let o: Options = "2/0/0,rom=/a.rom".parse().unwrap();
    assert_eq!((o.which, o.rom), (at(2, 0, 0), Some("/a.rom".into())));
    let e = "2/0/0,msi=off".parse::<Options>().unwrap_err();
    assert!(e.contains("msi=off") && e.contains("rom=FILE"), "{e}");
    assert!("".parse::<Options>().unwrap_err().contains("5/0/0"));
    assert!("2/0/0,rom=".parse::<Options>().is_err());
}

/// A network card: PM, VPD (hidden), MSI with 64 bits and masks, PCIe, MSI-X, and
/// registers of its own at 0xe4.
pub(in crate::pci::passthru) fn card() -> [u8; 256] {
    let mut c = [0; 256];
    let mut put = |at: usize, bytes: &[u8]| c[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &[0x86, 0x80, 0xd3, 0x10, 0x07, 0x04, 0x18, 0x00]);
    put(0x0a, &[0x00, 0x02, 0x10, 0x40, 0x80, 0x80]);
    put(0x10, &0xfebc_0000_u32.to_le_bytes());
    put(0x30, &0xfeb8_0000_u32.to_le_bytes());
    put(0x34, &[0xc8]);
    put(0x3c, &[11, 1]);
    put(0xc8, &[0x01, 0x40, 0x22, 0xfe, 0x03, 0x21, 0x00, 0x00]);
    put(0x40, &[0x03, 0xd0, 0, 0, 0, 0, 0, 0]);
    put(0xd0, &[0x05, 0x60, 0x86, 0x01, 1, 2, 3, 4, 5]);
    put(
        0x60,
        &[
            0x10, 0xa0, 0x02, 0x00, 0xc1, 0x8c, 0x00, 0x10, 0x1f, 0x28, 0x03, 0x00,
        ],
    );
    put(
        0xa0,
        &[
            0x11, 0x00, 0x04, 0x80, 0x03, 0x00, 0x00, 0x00, 0x03, 0x20, 0x00, 0x00,
        ],
    );
    put(0xf0, &[0x5a, 0xa5]);
    c
}

fn ids(config: &Config) -> Vec<u8> {
    let mut found = Vec::new();
    let mut at = config.get8(CAP_POINTER);
    while at != 0 && found.len() < 49 {
        found.push(config.get8(at.into()));
        at = config.get8(u16::from(at) + 1);
    }
    found
}

#[test]
fn the_guest_sees_a_filtered_card() {
    let (rules, config) = Rules::new(&card());
    assert_eq!(ids(&config), [CAP_PM, CAP_MSI, CAP_PCIE, CAP_MSIX]);
    assert_eq!(config.get(0, 4), 0x10d3_8086);
    assert_eq!(config.get16(COMMAND), CMD_IO | CMD_MEMORY);
    assert_eq!(config.get8(STATUS), 0x10, "no INTx is pending");
    assert_eq!(config.get8(HEADER_TYPE), 0, "one function");
    assert_eq!(config.get8(INT_PIN), 0, "no INTx");
    assert_eq!((config.get(BAR0, 4), config.get(ROM, 4)), (0, 0));
    assert_eq!(config.get(0x40, 4), 0, "VPD is hidden");
    // PM: no wake-up, on. MSI: no masks, off, no message. PCIe: no FLR.
    assert_eq!(config.get(0xca, 2), 0x0622);
    assert_eq!(config.get16(0xcc), 8);
    assert_eq!(config.get16(0xd2), 0x0086);
    assert_eq!(config.get(0xd4, 4), 0);
    assert_eq!(config.get(0x64, 4), 0x0000_8cc1);
    assert_eq!(config.get16(0xa2), 4);
    let msix = MsixCapability {
        at: 0xa0,
        vectors: 5,
        table: (3, 0),
        pba: (3, 0x2000),
    };
    assert_eq!(rules.msix, Some(msix));
    assert_eq!(
        rules.msi,
        Some(MsiCapability {
            at: 0xd0,
            wide: true
        })
    );
}

#[test]
fn writes_go_where_they_belong() {
    let (rules, mut config) = Rules::new(&card());
    let mut write = |offset, size, value| rules.write(&mut config, offset, size, value);
    // Identity, the capabilities' own bytes, hidden ones.
    for offset in [
        0x00, 0x08, 0x28, 0x2c, 0x34, 0x40, 0x44, 0xc8, 0xd0, 0xa0, 0xa4, 0x64,
    ] {
        assert_eq!(write(offset, 4, u32::MAX), [], "{offset:#x}");
    }
    // Errors that the device saw are cleared in it.
    assert_eq!(write(0x04, 4, 0xffff_0007), [(0x07, 1, 0xf9)]);
    assert_eq!(write(0x6a, 2, 0xffff), [(0x6a, 1, 0x0f)]);
    // Power state, MSI, MSI-X, the device's control register: only written down.
    for (offset, size, value) in [
        (0xcc, 2, 3),
        (0xd2, 2, 0xff),
        (0xa2, 2, 0xc000),
        (0x68, 2, 0xffff),
    ] {
        assert_eq!(write(offset, size, value), [], "{offset:#x}");
    }
    // What belongs to no capability is the device's own.
    assert_eq!(write(0xf0, 2, 0x1234), [(0xf0, 2, 0x1234)]);
    assert_eq!(config.get16(0xcc), 0x0b, "D3, and no reset on the way back");
    assert_eq!(config.get16(0xd2), 0x00f7 & 0x00ff | 0x0080);
    assert_eq!(config.get16(0xa2), 0xc004);
    assert_eq!(config.get16(0x68), 0x7fff, "no function-level reset");
    assert_eq!(config.get(0, 4), 0x10d3_8086);
}

#[test]
fn reads_of_both_are_merged() {
    let (rules, config) = Rules::new(&card());
    assert!(!rules.reads_device(0, 4) && !rules.reads_device(0xd0, 4));
    assert!(rules.reads_device(0xf0, 1) && rules.reads_device(4, 4));
    let ours = config.get(4, 4);
    assert_eq!(rules.merge(4, 4, ours, 0xa5a5_a5a5), 0xa510_0003);
    assert_eq!(rules.merge(0xf0, 2, 0, 0x1234), 0x1234);
}

proptest! {
    /// A device's list may be anything: it ends, nothing panics, the guest's list is
    /// good, and no write reaches the registers that are the kernel's.
    #[test]
    fn any_configuration_space_is_survived(
        image in proptest::collection::vec(any::<u8>(), 256),
        links in proptest::collection::vec((0x40..=0xff_u8, prop::sample::select(vec![1_u8, 3, 5, 9, 0xd, 0x10, 0x11])), 0..8),
        writes in proptest::collection::vec((0..64_u16, any::<u32>()), 0..32),
    ) {
        let mut image: [u8; 256] = image.try_into().unwrap();
        image[6] |= 0x10;
        let mut link = 0x34;
        for (at, id) in links {
            let at = usize::from(at & !3);
            image[link] = at as u8;
            image[at] = id;
            link = (at + 1).min(0xff);
        }
        let (rules, mut config) = Rules::new(&image);
        prop_assert!(ids(&config).len() < 49);
        for (offset, value) in writes {
            for (at, size, _) in rules.write(&mut config, offset * 4, 4, value) {
                let reached = at..at + u16::from(size);
                prop_assert!(!reached.clone().any(|o| (0x10..0x28).contains(&o) || o < 6));
                for cap in rules.msi.map(|m| m.at).into_iter().chain(rules.msix.map(|m| m.at)) {
                    prop_assert!(!reached.contains(&(cap + 2)));
                }
            }
        }
    }
}
