//! `linker.hints`: which file of a module folder holds which module
//! (kldxref(8); LINKER_HINTS_VERSION of FreeBSD's sys/sys/linker.h).

use crate::layout::{le32, round_up};

/// Largest file that is read (LINKER_HINTS_MAX).
pub const LARGEST: u64 = 1 << 20;

const VERSION: u32 = 1;
/// MDT_VERSION: a module, its version, and the file it is in.
const MODULE_VERSION: u32 = 3;

/// A module in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hint {
    /// The module.
    pub module: String,
    /// Its version.
    pub version: u32,
    /// The file in the same folder.
    pub file: String,
}

/// The counted string at `at`, and the offset behind it.
fn counted(data: &[u8], at: usize) -> Option<(String, usize)> {
    let length = usize::from(*data.get(at)?);
    let end = at + 1 + length;
    let text = std::str::from_utf8(data.get(at + 1..end)?).ok()?;
    Some((text.to_owned(), end))
}

fn hint(data: &[u8], at: usize) -> Option<Hint> {
    let (module, after) = counted(data, at)?;
    // Numbers stand at multiples of four from the start of the file.
    let number = usize::try_from(round_up(after as u64, 4)?).ok()?;
    let version = le32(data, number)?;
    let (file, _) = counted(data, number + 4)?;
    let plain = !file.is_empty() && !file.contains(['/', '\0']) && file != "..";
    plain.then_some(Hint {
        module,
        version,
        file,
    })
}

/// Decodes the file. A record that makes no sense is left out; `None` if it is
/// no `linker.hints` at all.
#[must_use]
pub fn parse(data: &[u8]) -> Option<Vec<Hint>> {
    if le32(data, 0)? != VERSION {
        return None;
    }
    let mut hints = Vec::new();
    let mut at = 4;
    while let (Some(length), Some(kind)) = (le32(data, at), le32(data, at + 4)) {
        let end = at
            .checked_add(4)
            .and_then(|start| start.checked_add(length as usize))
            .filter(|&end| end > at + 4 && end <= data.len());
        let Some(end) = end else {
            break;
        };
        if kind == MODULE_VERSION {
            hints.extend(hint(&data[..end], at + 8));
        }
        at = end;
    }
    Some(hints)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The file as kldxref writes it.
    pub fn encode(hints: &[(&str, u32, &str)]) -> Vec<u8> {
        let mut file = VERSION.to_le_bytes().to_vec();
        for (module, version, name) in hints {
            let start = file.len();
            file.extend_from_slice(&[0; 4]);
            file.extend_from_slice(&MODULE_VERSION.to_le_bytes());
            file.push(module.len() as u8);
            file.extend_from_slice(module.as_bytes());
            file.resize(file.len().next_multiple_of(4), 0);
            file.extend_from_slice(&version.to_le_bytes());
            file.push(name.len() as u8);
            file.extend_from_slice(name.as_bytes());
            file.resize(file.len().next_multiple_of(4), 0);
            let length = (file.len() - start - 4) as u32;
            file[start..start + 4].copy_from_slice(&length.to_le_bytes());
        }
        file
    }

    #[test]
    fn modules_are_found_in_their_files() {
        let hints = parse(&encode(&[
            ("pseudofs", 1, "pseudofs.ko"),
            ("a", 7, "other.ko"),
        ]))
        .unwrap();
        assert_eq!(hints[0].module, "pseudofs");
        assert_eq!(
            hints[1],
            Hint {
                module: "a".into(),
                version: 7,
                file: "other.ko".into()
            }
        );
    }

    #[test]
    fn nonsense_is_left_out_and_never_followed() {
        assert_eq!(parse(b""), None);
        assert_eq!(parse(&[2, 0, 0, 0]), None);
        let good = encode(&[("m", 1, "m.ko"), ("n", 1, "n.ko")]);
        for length in [0u32, 4, 5, 1 << 20, u32::MAX] {
            let mut bad = good.clone();
            bad[4..8].copy_from_slice(&length.to_le_bytes());
            assert!(parse(&bad).unwrap().len() < 2, "{length}");
        }
        for cut in 4..good.len() {
            assert!(parse(&good[..cut]).unwrap().len() <= 2);
        }
        // A file's name must not be a path (CVE-2024-25940's kind).
        assert_eq!(parse(&encode(&[("m", 1, "../../secret")])), Some(vec![]));
    }
}
