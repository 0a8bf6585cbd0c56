//! System use entries: Rock Ridge's names, symlinks and relocated directories.

use crate::disk::{Fault, Read, ReadAt};
use crate::fs::LONGEST_PATH;
use crate::layout::le32;

/// Most continuation areas of one record.
const MOST_AREAS: usize = 16;

/// What Rock Ridge adds to a record.
#[derive(Debug, Clone, Default)]
pub struct RockRidge {
    /// The name (`NM`).
    pub name: Option<Vec<u8>>,
    /// The target of a symlink (`SL`).
    pub link: Option<Vec<u8>>,
    /// Where the directory really is (`CL`), a logical block.
    pub child: Option<u32>,
    /// The entry is a directory's that stands elsewhere in the tree (`RE`).
    pub is_relocated: bool,
    /// It is a device, FIFO or socket (`PX`).
    pub is_special: bool,
    /// Its contents are compressed (`ZF`).
    pub is_compressed: bool,
}

/// The entries of a system use area: signature and data behind version.
fn entries(area: &[u8]) -> impl Iterator<Item = ([u8; 2], &[u8])> {
    let mut rest = area;
    std::iter::from_fn(move || {
        let [a, b, length, _version, ..] = *rest else {
            return None;
        };
        let entry = rest.get(4..usize::from(length))?;
        rest = &rest[usize::from(length)..];
        Some(([a, b], entry))
    })
}

/// The bytes to skip in every area, by the `SP` entry of the root's own record.
pub fn skip(area: &[u8]) -> Option<usize> {
    entries(area).find_map(|(signature, data)| match (&signature, data) {
        (b"SP", [0xbe, 0xef, skip, ..]) => Some(usize::from(*skip)),
        _ => None,
    })
}

/// A symlink under construction.
#[derive(Default)]
struct Link {
    text: Vec<u8>,
    /// The next component goes on where the last has ended.
    joined: bool,
}

impl Link {
    fn add(&mut self, data: &[u8]) {
        let mut rest = data;
        while let [flags, length, ..] = *rest {
            let Some(text) = rest.get(2..2 + usize::from(length)) else {
                return;
            };
            rest = &rest[2 + usize::from(length)..];
            if flags & 8 != 0 {
                self.text = b"/".to_vec();
                continue;
            }
            if !self.joined && !self.text.is_empty() && !self.text.ends_with(b"/") {
                self.text.push(b'/');
            }
            self.text.extend_from_slice(match flags & 6 {
                2 => b".",
                4 => b"..",
                _ => text,
            });
            self.joined = flags & 1 != 0;
        }
    }
}

/// Reads the entries of a record's system use area and of its continuations.
///
/// # Errors
/// A continuation is not on the image, or there are too many.
pub fn parse(image: &dyn ReadAt, block: u64, area: &[u8], skip: usize) -> Read<RockRidge> {
    let mut found = RockRidge::default();
    let mut link: Option<Link> = None;
    let mut area = area.get(skip..).unwrap_or_default().to_vec();
    for _ in 0..MOST_AREAS {
        let mut next = None;
        for (signature, data) in entries(&area) {
            match (&signature, data) {
                (b"NM", [flags, text @ ..]) if flags & 6 == 0 => {
                    let name = found.name.get_or_insert_default();
                    name.extend_from_slice(text);
                }
                (b"SL", [_flags, components @ ..]) => {
                    link.get_or_insert_default().add(components);
                }
                (b"CL", data) => found.child = le32(data, 0),
                (b"RE", _) => found.is_relocated = true,
                (b"ZF", _) => found.is_compressed = true,
                (b"PX", data) => {
                    let mode = le32(data, 0).unwrap_or_default() & 0xf000;
                    found.is_special = ![0x4000, 0x8000, 0xa000, 0].contains(&mode);
                }
                (b"CE", data) => {
                    next = le32(data, 0).zip(le32(data, 8)).zip(le32(data, 16));
                }
                (b"ST", _) => break,
                _ => {}
            }
        }
        let Some(((at, offset), length)) = next else {
            let long = |text: &[u8]| text.len() as u64 > LONGEST_PATH;
            found.link = link.map(|l| l.text);
            if found.name.as_deref().is_some_and(long) || found.link.as_deref().is_some_and(long) {
                return Err(Fault::new(
                    "Rock Ridge",
                    "a name is longer than a path can be",
                ));
            }
            return Ok(found);
        };
        if u64::from(length) > block {
            return Err(Fault::new(
                "Rock Ridge CE",
                format!("is an area of {length:#x} bytes"),
            ));
        }
        area = vec![0; length as usize];
        image.read_at(u64::from(at) * block + u64::from(offset), &mut area)?;
    }
    Err(Fault::new(
        "Rock Ridge CE",
        format!("more than {MOST_AREAS} areas, perhaps in a circle"),
    ))
}
