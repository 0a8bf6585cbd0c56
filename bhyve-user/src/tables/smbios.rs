//! SMBIOS 2.8 structures (DMTF DSP0134).

use super::{ACPI_BASE, SMBIOS_BASE, TooLarge, seal};
use crate::config::Topology;

const ENTRY: usize = 32;
/// Processors that get a structure of their own.
const MAX_SOCKETS: u16 = 32;

/// What the structures tell.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// The system's UUID, as text would have it (big-endian fields).
    pub uuid: [u8; 16],
    /// CPUs.
    pub topology: Topology,
    /// Bytes of memory below and above 4 GiB.
    pub low: u64,
    /// See `low`.
    pub high: u64,
}

struct Structures {
    bytes: Vec<u8>,
    count: u16,
    largest: usize,
}

impl Structures {
    /// Appends a structure and returns its handle.
    fn add(&mut self, kind: u8, body: &[u8], strings: &[&str]) -> u16 {
        let handle = self.count;
        let start = self.bytes.len();
        self.bytes.extend([kind, body.len() as u8 + 4]);
        self.bytes.extend(handle.to_le_bytes());
        self.bytes.extend(body);
        for s in strings {
            self.bytes.extend(s.as_bytes());
            self.bytes.push(0);
        }
        self.bytes.extend(if strings.is_empty() {
            &[0, 0][..]
        } else {
            &[0][..]
        });
        self.largest = self.largest.max(self.bytes.len() - start);
        self.count += 1;
        handle
    }
}

/// Little-endian fields, one after another.
fn body(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

/// Entry point and structures for [`SMBIOS_BASE`].
pub fn build(facts: &Facts) -> Result<Vec<u8>, TooLarge> {
    let mut s = Structures {
        bytes: Vec::new(),
        count: 0,
        largest: 0,
    };
    // ISA, PCI, shadowing, boot from CD, EDD; ACPI; BBS, virtual machine.
    let bios_features = 0x0008_9090_u64.to_le_bytes();
    s.add(
        0,
        &body(&[
            &[1, 2],
            &0xf000_u16.to_le_bytes(),
            &[3, 0],
            &bios_features,
            &[1, 0x14, 0, 0, 0xff, 0xff],
        ]),
        &["BHYVE", "1.00", "03/14/2014"],
    );
    let u = facts.uuid;
    // The first three fields are little-endian (§7.2.1).
    let uuid = [
        u[3], u[2], u[1], u[0], u[5], u[4], u[7], u[6], u[8], u[9], u[10], u[11], u[12], u[13],
        u[14], u[15],
    ];
    s.add(
        1,
        &body(&[&[1, 2, 3, 4], &uuid, &[6, 5, 6]]),
        &[" ", "BHYVE", "1.0", "None", "None", " "],
    );
    s.add(
        3,
        &body(&[&[1, 2, 2, 3, 4, 3, 3, 3, 3], &[0; 4], &[0, 0, 0, 0, 5]]),
        &[" ", "1.0", "None", "None", "None"],
    );
    let t = facts.topology;
    let small = |n: u32| n.min(255) as u8;
    let cores = small(t.cores.into());
    let threads = small(u32::from(t.cores) * u32::from(t.threads));
    for socket in 0..t.sockets.min(MAX_SOCKETS) {
        let name = format!("CPU #{socket}");
        s.add(
            4,
            // Central processor, family "other", populated and enabled, no
            // upgrade, no caches, 64-bit capable.
            &body(&[
                &[1, 3, 1, 2],
                &[0; 8],
                &[3, 0],
                &[0; 6],
                &[0x41, 6],
                &[0xff; 6],
                &[4, 5, 6, cores, cores, threads, 4, 0, 1, 0],
            ]),
            &[&name, " ", " ", "None", "None", "None"],
        );
    }
    let total = facts.low + facts.high;
    let array = s.add(
        16,
        &body(&[
            &[3, 3, 3],
            &0x8000_0000_u32.to_le_bytes(),
            &0xfffe_u16.to_le_bytes(),
            &1_u16.to_le_bytes(),
            &total.to_le_bytes(),
        ]),
        &[],
    );
    let mib = total >> 20;
    let (size, extended) = if mib < 0x7fff {
        (mib as u16, 0)
    } else {
        (0x7fff, mib.min(0x7fff_ffff) as u32)
    };
    s.add(
        17,
        &body(&[
            &array.to_le_bytes(),
            &0xfffe_u16.to_le_bytes(),
            &[64, 0, 64, 0],
            &size.to_le_bytes(),
            &[2, 0, 1, 2, 2],
            &4_u16.to_le_bytes(),
            &[0, 0, 3, 4, 5, 6, 0],
            &extended.to_le_bytes(),
            &[0; 8],
        ]),
        &[" ", " ", " ", "None", "None", "None"],
    );
    for (start, size) in [(0, facts.low), (1 << 32, facts.high)] {
        if size > 0 {
            let (first, last) = (u64::to_le_bytes(start), (start + size - 1).to_le_bytes());
            s.add(
                19,
                &body(&[&[0xff; 8], &array.to_le_bytes(), &[1], &first, &last]),
                &[],
            );
        }
    }
    s.add(32, &[0; 7], &[]);
    s.add(127, &[], &[]);

    let mut out = b"_SM_\0".to_vec();
    out.extend([ENTRY as u8 - 1, 2, 8]);
    out.extend((s.largest as u16).to_le_bytes());
    out.extend([0; 6]);
    let mut dmi = b"_DMI_\0".to_vec();
    dmi.extend((s.bytes.len() as u16).to_le_bytes());
    dmi.extend((SMBIOS_BASE as u32 + ENTRY as u32).to_le_bytes());
    dmi.extend(s.count.to_le_bytes());
    dmi.push(0x28);
    seal(&mut dmi, 5);
    out.append(&mut dmi);
    seal(&mut out, 4);
    out.resize(ENTRY, 0);
    out.append(&mut s.bytes);
    let room = (ACPI_BASE - SMBIOS_BASE) as usize;
    if out.len() > room {
        return Err(TooLarge("SMBIOS table", out.len(), room));
    }
    Ok(out)
}

/// A UUID that stays the same for a VM of this name on this host (RFC 9562
/// §5.8, vendor's own scheme).
pub fn default_uuid(host: &str, vm: &str) -> [u8; 16] {
    let mut out = [0; 16];
    for (half, chunk) in out.chunks_exact_mut(8).enumerate() {
        // FNV-1a, seeded by the half.
        let seed = 0xcbf2_9ce4_8422_2325_u64 ^ half as u64;
        let hash = host.bytes().chain([0]).chain(vm.bytes());
        let hash = hash.fold(seed, |h, b| {
            (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
        });
        chunk.copy_from_slice(&hash.to_be_bytes());
    }
    out[6] = out[6] & 0x0f | 0x80;
    out[8] = out[8] & 0x3f | 0x80;
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tables::checksum;

    fn facts() -> Facts {
        Facts {
            uuid: *b"\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\x0c\x0d\x0e\x0f\x10",
            topology: Topology {
                sockets: 2,
                cores: 4,
                threads: 2,
            },
            low: 3 << 30,
            high: 61 << 30,
        }
    }

    /// (type, formatted part, strings) of every structure.
    fn parse(t: &[u8]) -> Vec<(u8, Vec<u8>, Vec<String>)> {
        let (mut at, mut all) = (ENTRY, Vec::new());
        while at < t.len() {
            let len = usize::from(t[at + 1]);
            let end = at + len + t[at + len..].windows(2).position(|w| w == [0, 0]).unwrap() + 2;
            let strings = t[at + len..end - 2]
                .split(|b| *b == 0)
                .map(|s| String::from_utf8(s.to_vec()).unwrap());
            all.push((
                t[at],
                t[at..at + len].to_vec(),
                strings.filter(|s| !s.is_empty()).collect(),
            ));
            at = end;
        }
        all
    }

    #[test]
    fn every_structure_can_be_found_and_has_its_length() {
        let t = build(&facts()).unwrap();
        assert_eq!((checksum(&t[..31]), checksum(&t[16..31])), (0, 0));
        let all = parse(&t);
        let kinds: Vec<(u8, usize)> = all.iter().map(|s| (s.0, s.1.len())).collect();
        assert_eq!(
            kinds,
            [
                (0, 24),
                (1, 27),
                (3, 22),
                (4, 42),
                (4, 42),
                (16, 23),
                (17, 40),
                (19, 31),
                (19, 31),
                (32, 11),
                (127, 4)
            ]
        );
        assert_eq!(usize::from(u16::from_le_bytes([t[28], t[29]])), all.len());
        assert_eq!(
            usize::from(u16::from_le_bytes([t[22], t[23]])) + ENTRY,
            t.len()
        );
        assert_eq!(all[0].2, ["BHYVE", "1.00", "03/14/2014"]);
        assert_eq!(
            all[1].1[8..24],
            [4, 3, 2, 1, 6, 5, 8, 7, 9, 10, 11, 12, 13, 14, 15, 16]
        );
        assert_eq!(all[3].1[35..38], [4, 4, 8]);
        assert_eq!(all[6].1[12..14], [0xff, 0x7f]);
        assert_eq!(all[6].1[28..32], (64 * 1024_u32).to_le_bytes());
        assert_eq!(all[8].1[15..23], (1_u64 << 32).to_le_bytes());
    }

    #[test]
    fn many_sockets_still_fit() {
        let mut f = facts();
        f.topology.sockets = 4000;
        assert!(build(&f).is_ok());
    }

    #[test]
    fn the_default_uuid_depends_on_host_and_name() {
        let a = default_uuid("host", "vm");
        assert_eq!(a, default_uuid("host", "vm"));
        assert_ne!(a, default_uuid("host", "vm2"));
        assert_ne!(a, default_uuid("hostv", "m"));
        assert_eq!((a[6] >> 4, a[8] >> 6), (8, 2));
    }
}
