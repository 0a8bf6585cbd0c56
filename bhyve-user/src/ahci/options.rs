//! The part of `-s N,ahci…,` behind the comma, as bhyve(8) has it:
//! `ahci,hd:PATH[,OPTIONS],cd:PATH,…`, `ahci-hd,PATH[,OPTIONS]`,
//! `ahci-cd,PATH[,OPTIONS]`.

use crate::disk::options as disk_options;

/// Ports of an adapter.
pub const PORTS: usize = 32;
/// Bytes of a CD's sector.
pub const CD_SECTOR: u32 = 2048;

/// What is at a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A disk.
    Hd,
    /// A CD drive.
    Cd,
}

/// A drive, as asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drive {
    /// What it is.
    pub kind: Kind,
    /// Its image.
    pub disk: disk_options::Options,
    /// `model=`, at most 40 characters.
    pub model: Option<String>,
    /// `rev=`, at most 8 characters.
    pub revision: Option<String>,
    /// `nmrr=`: nominal media rotation rate.
    pub rotation: Option<u16>,
}

/// Parses the drives.
///
/// # Errors
/// What cannot be followed.
pub fn parse(conf: &str, only: Option<Kind>) -> Result<Vec<Drive>, String> {
    let mut drives: Vec<(Kind, Vec<&str>)> = Vec::new();
    if let Some(kind) = only {
        drives.push((kind, conf.split(',').collect()));
    } else {
        for part in conf.split(',') {
            if let Some(path) = part.strip_prefix("hd:") {
                drives.push((Kind::Hd, vec![path]));
            } else if let Some(path) = part.strip_prefix("cd:") {
                drives.push((Kind::Cd, vec![path]));
            } else if let Some((_, parts)) = drives.last_mut() {
                parts.push(part);
            } else {
                return Err(format!("\"{part}\": a drive is hd:PATH or cd:PATH"));
            }
        }
    }
    if drives.len() > PORTS {
        return Err(format!("{} drives; there are {PORTS} ports", drives.len()));
    }
    drives
        .iter()
        .map(|(kind, parts)| drive(*kind, parts))
        .collect()
}

fn drive(kind: Kind, parts: &[&str]) -> Result<Drive, String> {
    let mut disk = Vec::new();
    let mut d = Drive {
        kind,
        disk: disk_options::Options::default(),
        model: None,
        revision: None,
        rotation: None,
    };
    let text = |part: &str, value: &str, most: usize| {
        if value.is_empty() || value.len() > most || !value.is_ascii() {
            return Err(format!("{part}: 1 to {most} ASCII characters"));
        }
        Ok(Some(value.to_owned()))
    };
    for &part in parts {
        match part.split_once('=').unwrap_or((part, "")) {
            ("model", value) => d.model = text(part, value, 40)?,
            ("rev", value) => d.revision = text(part, value, 8)?,
            ("nmrr", value) => {
                let n = value.parse().map_err(|_| format!("{part}: a number"))?;
                d.rotation = Some(n);
            }
            _ => disk.push(part),
        }
    }
    let mut disk = disk.join(",");
    if kind == Kind::Cd {
        disk.push_str(",ro");
    }
    d.disk = disk.parse()?;
    let bad = match (kind, d.disk.sector_size) {
        (Kind::Cd, Some(_)) => Some("sectorsize: a CD's sectors are 2048 bytes"),
        (Kind::Hd, Some((logical, _))) if logical > 4096 => Some("sectorsize: 512 to 4096"),
        _ => None,
    };
    match bad {
        Some(bad) => Err(bad.into()),
        None => Ok(d),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_options_of_bhyve() {
        let d = parse("hd:/a,ser=X,model=M,nmrr=1,cd:/b.iso,hd:/c,ro", None).unwrap();
        assert_eq!(d.len(), 3);
        assert_eq!((d[0].kind, d[1].kind), (Kind::Hd, Kind::Cd));
        assert_eq!(d[0].model.as_deref(), Some("M"));
        assert_eq!(d[0].disk.serial.as_deref(), Some("X"));
        assert!(d[1].disk.read_only && d[2].disk.read_only && !d[0].disk.read_only);
        let hd = parse("/x,rev=2,nocache", Some(Kind::Hd)).unwrap();
        assert!(hd[0].disk.nocache && hd[0].revision.as_deref() == Some("2"));
        assert_eq!(parse("/x", Some(Kind::Cd)).unwrap()[0].kind, Kind::Cd);
        for bad in [
            "/a",
            "",
            "hd:",
            "hd:/a,model=",
            "hd:/a,sectorsize=65536",
            "hd:/a,x",
        ] {
            assert!(parse(bad, None).is_err(), "{bad}");
        }
    }
}
