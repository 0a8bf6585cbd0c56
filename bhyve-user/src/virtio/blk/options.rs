//! The part of `-s N,virtio-blk,` behind the comma.

use std::str::FromStr;

use crate::disk::options as disk_options;

/// Most request queues.
pub const MOST_QUEUES: u16 = 16;

/// A disk, as asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// What every disk has.
    pub disk: disk_options::Options,
    /// `queues=`: request queues; else one for each vCPU, as far as
    /// [`MOST_QUEUES`].
    pub queues: Option<u16>,
}

impl FromStr for Options {
    type Err = String;

    fn from_str(text: &str) -> Result<Options, String> {
        let (mut disk, mut queues) = (Vec::new(), None);
        for part in text.split(',') {
            match part.split_once('=') {
                Some(("queues", n)) => {
                    let n = n.parse().ok().filter(|n| (1..=MOST_QUEUES).contains(n));
                    queues = Some(n.ok_or_else(|| format!("{part}: 1 to {MOST_QUEUES}"))?);
                }
                _ => disk.push(part),
            }
        }
        Ok(Options {
            disk: disk_options::Options::parse(&disk.join(","), ", queues=")?,
            queues,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_are_counted_and_the_rest_is_every_disks() {
        let o: Options = "/a,queues=4,ro".parse().unwrap();
        assert_eq!(o.queues, Some(4));
        assert!(o.disk.read_only);
        assert_eq!("/a".parse::<Options>().unwrap().queues, None);
        for bad in ["/a,queues=0", "/a,queues=17", "/a,queues=", "/a,queues"] {
            assert!(bad.parse::<Options>().is_err(), "{bad}");
        }
        let e = "/a,rw".parse::<Options>().unwrap_err();
        assert!(e.contains("serial=, queues="), "{e}");
    }
}
