//! What the controller says of itself and of its namespace (NVMe 1.4 §5.15).

use super::request::{MDTS, Namespace};

/// Bytes of every answer.
pub const SIZE: usize = 4096;
/// PCI vendor and device, bhyve's.
pub const VENDOR: u16 = 0xfb5d;
/// See [`VENDOR`].
pub const DEVICE: u16 = 0x0a0a;
/// Version 1.4.
pub const VERSION: u32 = 0x0001_0400;
/// Asynchronous events that may wait, less one.
pub const EVENTS: u8 = 3;
/// FreeBSD's organisation identifier, as bhyve has it.
const OUI: [u8; 3] = [0xfc, 0x9c, 0x58];
const MODEL: &str = "bhyve-NVMe";
const FIRMWARE: &str = "1.0";

/// What differs from one controller to the next.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The namespace.
    pub namespace: Namespace,
    /// Serial number, at most 20 characters.
    pub serial: String,
    /// The namespace's identifier.
    pub eui64: u64,
    /// There is a cache that a flush empties.
    pub cache: bool,
    /// Space can be given back.
    pub deallocate: bool,
}

fn put(page: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(to) = page.get_mut(at..at + bytes.len()) {
        to.copy_from_slice(bytes);
    }
}

/// ASCII fields are filled up with blanks.
fn text(page: &mut [u8], at: usize, len: usize, text: &str) {
    let mut field: Vec<u8> = text.bytes().take(len).collect();
    field.resize(len, b' ');
    put(page, at, &field);
}

/// Identify Controller (CNS 1, figure 251).
pub fn controller(facts: &Facts) -> Vec<u8> {
    let mut p = vec![0; SIZE];
    put(&mut p, 0, &VENDOR.to_le_bytes());
    put(&mut p, 2, &VENDOR.to_le_bytes());
    text(&mut p, 4, 20, &facts.serial);
    text(&mut p, 24, 40, MODEL);
    text(&mut p, 64, 8, FIRMWARE);
    // Recommended arbitration burst: 2^0; OUI low byte first.
    put(&mut p, 73, &OUI);
    put(&mut p, 77, &[MDTS]);
    put(&mut p, 80, &VERSION.to_le_bytes());
    // An I/O controller.
    put(&mut p, 111, &[1]);
    // Abort command limit less one.
    put(&mut p, 258, &[3, EVENTS]);
    // One firmware slot, read-only.
    put(&mut p, 260, &[0x03]);
    // Warning and critical temperatures, kelvin.
    put(&mut p, 266, &353_u16.to_le_bytes());
    put(&mut p, 268, &363_u16.to_le_bytes());
    // 64- and 16-byte entries, no others.
    put(&mut p, 512, &[0x66, 0x44]);
    put(&mut p, 516, &1_u32.to_le_bytes());
    // Write Zeroes, and Dataset Management where it does something.
    let oncs = 1 << 3 | u16::from(facts.deallocate) << 2;
    put(&mut p, 520, &oncs.to_le_bytes());
    put(&mut p, 525, &[u8::from(facts.cache)]);
    let nqn = format!(
        "nqn.2014.08.org.nvmexpress:fb5dfb5d{:<20}{MODEL:<40}",
        facts.serial
    );
    put(
        &mut p,
        768,
        nqn.as_bytes().get(..223).unwrap_or(nqn.as_bytes()),
    );
    // Power state 0: 1 W, in hundredths.
    put(&mut p, 2048, &100_u16.to_le_bytes());
    p
}

/// Identify Namespace (CNS 0, figure 249).
pub fn namespace(facts: &Facts) -> Vec<u8> {
    let mut p = vec![0; SIZE];
    let blocks = facts.namespace.blocks().to_le_bytes();
    for at in [0, 8, 16] {
        put(&mut p, at, &blocks);
    }
    // Deallocated blocks read as anything; Write Zeroes can deallocate.
    put(&mut p, 33, &[u8::from(facts.deallocate) << 3]);
    put(&mut p, 120, &facts.eui64.to_be_bytes());
    put(&mut p, 128 + 2, &[facts.namespace.shift]);
    p
}

/// The active namespaces above `after` (CNS 2).
pub fn active(after: u32) -> Vec<u8> {
    let mut p = vec![0; SIZE];
    if after == 0 {
        put(&mut p, 0, &1_u32.to_le_bytes());
    }
    p
}

/// The namespace's identifiers (CNS 3): an EUI-64.
pub fn descriptors(facts: &Facts) -> Vec<u8> {
    let mut p = vec![0; SIZE];
    put(&mut p, 0, &[1, 8]);
    put(&mut p, 4, &facts.eui64.to_be_bytes());
    p
}

/// SMART / Health Information (log page 2, figure 196): a healthy disk.
pub fn health() -> Vec<u8> {
    let mut p = vec![0; 512];
    // 35 °C in kelvin, all spare, threshold 10 %.
    put(&mut p, 1, &308_u16.to_le_bytes());
    put(&mut p, 3, &[100, 10, 0]);
    p
}

/// Firmware Slot Information (log page 3): slot 1 runs.
pub fn firmware() -> Vec<u8> {
    let mut p = vec![0; 512];
    put(&mut p, 0, &[1]);
    text(&mut p, 8, 8, FIRMWARE);
    p
}
