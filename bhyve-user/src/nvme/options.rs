//! The part of `-s N,nvme,` behind the comma, as bhyve(8) has it.

use std::str::FromStr;

use crate::disk::options as disk_options;

/// Entries of a queue if nothing else is asked.
const QUEUE: u16 = 2048;
/// I/O queues if nothing else is asked.
const QUEUES: u16 = 8;
/// Most I/O queues.
pub const MOST_QUEUES: u16 = 16;

/// A controller, as asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The namespace's disk; `sectsz=` is its sector size, `ser=` its serial.
    pub disk: disk_options::Options,
    /// `maxq=`: I/O queue pairs.
    pub queues: u16,
    /// `qsz=`: most entries of a queue.
    pub entries: u16,
    /// `eui64=`: the namespace's identifier.
    pub eui64: Option<u64>,
}

impl FromStr for Options {
    type Err = String;

    fn from_str(text: &str) -> Result<Options, String> {
        let mut disk = Vec::new();
        let mut o = Options {
            disk: disk_options::Options::default(),
            queues: QUEUES,
            entries: QUEUE,
            eui64: None,
        };
        for part in text.split(',') {
            let bad = |what: &str| format!("{part}: {what}");
            match part.split_once('=').unwrap_or((part, "")) {
                ("maxq", n) => {
                    o.queues = n
                        .parse()
                        .ok()
                        .filter(|n| (1..=MOST_QUEUES).contains(n))
                        .ok_or_else(|| bad("1 to 16 queues"))?;
                }
                ("qsz", n) => {
                    o.entries = n
                        .parse()
                        .ok()
                        .filter(|n| (2..=4096).contains(n))
                        .ok_or_else(|| bad("2 to 4096 entries"))?;
                }
                // The commands of a queue are done one by one.
                ("ioslots", n) if n.parse::<u16>().is_ok() => {}
                ("eui64", n) => {
                    let hex = n.strip_prefix("0x").map(|h| u64::from_str_radix(h, 16));
                    let n = hex.unwrap_or_else(|| n.parse());
                    o.eui64 = Some(n.map_err(|_| bad("a number of 64 bits"))?);
                }
                ("sectsz", n) => disk.push(format!("sectorsize={n}")),
                // What keeps acknowledged writes is virtio-blk's words for it.
                ("ram", _) => {
                    return Err(bad("no memory disks; a file in a tmpfs makes the same"));
                }
                _ => disk.push(part.to_owned()),
            }
        }
        o.disk = disk.join(",").parse()?;
        if o.disk.sector_size.is_some_and(|(l, _)| l > 4096) {
            return Err("sectsz: 512 to 4096".into());
        }
        Ok(o)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_options_of_bhyve() {
        let o: Options = "/a,maxq=4,qsz=64,ioslots=8,sectsz=4096,ser=X,eui64=0x10,ro"
            .parse()
            .unwrap();
        assert_eq!((o.queues, o.entries, o.eui64), (4, 64, Some(16)));
        assert_eq!(o.disk.sector_size, Some((4096, 4096)));
        assert!(o.disk.read_only && o.disk.serial.as_deref() == Some("X"));
        for bad in [
            "",
            "/a,maxq=0",
            "/a,qsz=1",
            "/a,eui64=x",
            "ram=64",
            "/a,sectsz=65536",
        ] {
            assert!(bad.parse::<Options>().is_err(), "{bad}");
        }
    }
}
