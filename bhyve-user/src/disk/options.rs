//! What every disk is asked for with: the part of `-s N,virtio-blk,` behind the
//! comma, as bhyve(8) has it.

use std::path::PathBuf;
use std::str::FromStr;

/// A disk, as asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// The file or device.
    pub path: PathBuf,
    /// `nocache`: past the host's cache (O_DIRECT).
    pub nocache: bool,
    /// `sync` or `direct`: a write is on the disk when it is acknowledged.
    pub sync: bool,
    /// `ro`.
    pub read_only: bool,
    /// `nodelete`: no discard.
    pub no_delete: bool,
    /// `sectorsize=LOGICAL[/PHYSICAL]`, bytes.
    pub sector_size: Option<(u32, u32)>,
    /// `serial=`, at most 20 characters.
    pub serial: Option<String>,
}

/// `LOGICAL[/PHYSICAL]`: powers of two from 512 to 64 KiB.
fn sector_size(text: &str) -> Option<(u32, u32)> {
    let (logical, physical) = text.split_once('/').unwrap_or((text, text));
    let (logical, physical) = (logical.parse().ok()?, physical.parse().ok()?);
    let fits = |n: u32| n.is_power_of_two() && (512..=65536).contains(&n);
    (fits(logical) && fits(physical) && physical >= logical).then_some((logical, physical))
}

impl FromStr for Options {
    type Err = String;

    fn from_str(text: &str) -> Result<Options, String> {
        Options::parse(text, "")
    }
}

impl Options {
    /// Parses; `also` is what an emulation has beyond these options and took
    /// out of `text`, for a message.
    ///
    /// # Errors
    /// What cannot be followed.
    pub fn parse(text: &str, also: &str) -> Result<Options, String> {
        let mut parts = text.split(',');
        let path = parts.next().unwrap_or_default();
        if path.is_empty() {
            return Err("which disk? Its path comes first".into());
        }
        let mut o = Options {
            path: path.into(),
            ..Options::default()
        };
        for part in parts {
            match part.split_once('=').unwrap_or((part, "")) {
                ("nocache", "") => o.nocache = true,
                ("sync" | "direct", "") => o.sync = true,
                ("ro", "") => o.read_only = true,
                ("nodelete", "") => o.no_delete = true,
                ("sectorsize", sizes) => {
                    o.sector_size = Some(sector_size(sizes).ok_or_else(|| {
                        format!(
                            "{part}: LOGICAL or LOGICAL/PHYSICAL, powers of two from 512 to 65536"
                        )
                    })?);
                }
                ("serial" | "ser", id) if !id.is_empty() && id.len() <= 20 && id.is_ascii() => {
                    o.serial = Some(id.into());
                }
                ("serial" | "ser", _) => {
                    return Err(format!("{part}: 1 to 20 ASCII characters"));
                }
                _ => {
                    return Err(format!(
                        "no option \"{part}\"; there is nocache, direct, sync, ro, nodelete, \
                         sectorsize=, serial={also}"
                    ));
                }
            }
        }
        Ok(o)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_options_of_bhyve() {
        let o: Options = "/a,nocache,direct,ro,nodelete,sectorsize=512/4096,serial=X1"
            .parse()
            .unwrap();
        let want = Options {
            path: "/a".into(),
            nocache: true,
            sync: true,
            read_only: true,
            no_delete: true,
            sector_size: Some((512, 4096)),
            serial: Some("X1".into()),
        };
        assert_eq!(o, want);
        let plain: Options = "img".parse().unwrap();
        assert!(!plain.sync && !plain.nocache && !plain.read_only);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for bad in [
            "",
            ",ro",
            "a,rw",
            "a,ro=1",
            "a,sectorsize=",
            "a,sectorsize=100",
            "a,sectorsize=4096/512",
            "a,serial=",
            "a,serial=123456789012345678901",
        ] {
            assert!(bad.parse::<Options>().is_err(), "{bad}");
        }
    }
}
