//! ISO 9660 with Rock Ridge names and symlinks (ECMA-119; SUSP and RRIP 1.12).

mod record;
mod rockridge;

use super::{Attributes, FileSystem, FileType, LARGEST_DIRECTORY, Visit, too_large};
use crate::disk::{Fault, Read, ReadAt, array};
use crate::layout::le16;
use record::Record;
use rockridge::RockRidge;

const SECTOR: u64 = 2048;
/// The first volume descriptor.
const DESCRIPTORS: u64 = 16;
/// Most volume descriptors that are looked at.
const MOST_DESCRIPTORS: u64 = 64;
/// The root directory's record in the primary volume descriptor.
const ROOT_RECORD: u64 = 156;

/// An ISO 9660 file system on `image`. A node is the offset of a directory record.
#[derive(Debug)]
pub struct Iso9660<R> {
    image: R,
    root: u64,
    block: u64,
    /// Bytes to skip in each record's system use area; `None` without Rock Ridge.
    skip: Option<usize>,
}

impl<R: ReadAt> Iso9660<R> {
    /// Looks for a primary volume descriptor. `None`: there is none.
    ///
    /// # Errors
    /// It is damaged, or the image cannot be read.
    pub fn open(image: R) -> Read<Option<Self>> {
        for number in DESCRIPTORS..DESCRIPTORS + MOST_DESCRIPTORS {
            let at = number * SECTOR;
            if at + SECTOR > image.size() {
                return Ok(None);
            }
            let descriptor = array::<256>(&image, at)?;
            if descriptor[1..6] != *b"CD001" {
                return Ok(None);
            }
            match descriptor[0] {
                1 => {
                    let block = u64::from(le16(&descriptor, 128).unwrap_or_default());
                    if ![512, 1024, 2048].contains(&block) {
                        return Err(Fault::new("logical block size", format!("is {block}")));
                    }
                    let mut fs = Self {
                        image,
                        root: at + ROOT_RECORD,
                        block,
                        skip: None,
                    };
                    fs.skip = fs.rock_ridge_skip()?;
                    return Ok(Some(fs));
                }
                255 => return Ok(None),
                _ => {}
            }
        }
        Ok(None)
    }

    /// The `SP` entry of the root's own record says that there is Rock Ridge.
    fn rock_ridge_skip(&self) -> Read<Option<usize>> {
        let root = self.record(self.root)?;
        let own = self.record(self.extent(&root))?;
        Ok(rockridge::skip(&own.system_use))
    }

    fn extent(&self, record: &Record) -> u64 {
        (u64::from(record.extent) + u64::from(record.attributes)) * self.block
    }

    fn record(&self, at: u64) -> Read<Record> {
        let damaged = || Fault::new(format!("directory record at {at:#x}"), "is damaged");
        let [length] = array::<1>(&self.image, at)?;
        let mut bytes = vec![0; usize::from(length)];
        self.image.read_at(at, &mut bytes)?;
        Record::parse(&bytes).ok_or_else(damaged)
    }

    fn rock_ridge(&self, record: &Record) -> Read<RockRidge> {
        match self.skip {
            Some(skip) => rockridge::parse(&self.image, self.block, &record.system_use, skip),
            None => Ok(RockRidge::default()),
        }
    }

    fn kind_of(record: &Record, more: &RockRidge) -> FileType {
        if more.link.is_some() {
            FileType::Symlink
        } else if record.is_directory() || more.child.is_some() {
            FileType::Directory
        } else if more.is_special {
            FileType::Other
        } else {
            FileType::File
        }
    }
}

impl<R: ReadAt> FileSystem for Iso9660<R> {
    fn kind(&self) -> &'static str {
        "cd9660"
    }

    fn root(&self) -> u64 {
        self.root
    }

    fn attributes(&self, node: u64) -> Read<Attributes> {
        let record = self.record(node)?;
        let more = self.rock_ridge(&record)?;
        Ok(Attributes {
            kind: Self::kind_of(&record, &more),
            size: u64::from(record.size),
        })
    }

    fn entries(&self, directory: u64, visit: Visit<'_>) -> Read<()> {
        let mut record = self.record(directory)?;
        // A directory that was too deep stands elsewhere.
        if let Some(child) = self.rock_ridge(&record)?.child {
            record = self.record(u64::from(child) * self.block)?;
        }
        let size = u64::from(record.size);
        if !record.is_directory() || size > LARGEST_DIRECTORY {
            return Err(Fault::new(
                format!("directory record at {directory:#x}"),
                format!("is no directory that can be read ({size:#x} bytes)"),
            ));
        }
        let start = self.extent(&record);
        let mut data = vec![0; size as usize];
        self.image.read_at(start, &mut data)?;
        let mut at = 0;
        while let Some(&length) = data.get(at) {
            let length = usize::from(length);
            // Records do not cross sectors; what is left of one is zero.
            if length == 0 {
                at = (at + 1).next_multiple_of(SECTOR as usize);
                continue;
            }
            let node = start + at as u64;
            let entry = data
                .get(at..at + length)
                .and_then(Record::parse)
                .ok_or_else(|| {
                    Fault::new(format!("directory record at {node:#x}"), "is damaged")
                })?;
            at += length;
            if matches!(entry.name[..], [0] | [1]) {
                continue;
            }
            let more = self.rock_ridge(&entry)?;
            if more.is_relocated {
                continue;
            }
            let name = more.name.unwrap_or_else(|| entry.plain_name());
            if name.is_empty() || name.iter().any(|&b| b == 0 || b == b'/') {
                continue;
            }
            if visit(&name, node).is_break() {
                break;
            }
        }
        Ok(())
    }

    fn read(&self, file: u64, limit: u64) -> Read<Vec<u8>> {
        let record = self.record(file)?;
        let more = self.rock_ridge(&record)?;
        if Self::kind_of(&record, &more) != FileType::File {
            return Err(Fault::new("file", "is not a regular file"));
        }
        if more.is_compressed {
            return Err(Fault::new("file", "is compressed (zisofs)"));
        }
        if record.is_scattered() {
            return Err(Fault::new("file", "has several extents or is interleaved"));
        }
        let size = u64::from(record.size);
        if size > limit {
            return Err(too_large(size, limit));
        }
        let start = self.extent(&record);
        if start.saturating_add(size) > self.image.size() {
            return Err(Fault::new(
                "extent",
                format!("{size:#x} bytes at {start:#x} lie outside the image"),
            )
            .hint("the image is truncated or damaged"));
        }
        let mut data = vec![0; size as usize];
        self.image.read_at(start, &mut data)?;
        Ok(data)
    }

    fn target(&self, link: u64) -> Read<Vec<u8>> {
        let record = self.record(link)?;
        self.rock_ridge(&record)?
            .link
            .ok_or_else(|| Fault::new("file", "is not a symlink"))
    }

    fn same(&self, entry: &[u8], wanted: &[u8]) -> bool {
        if self.skip.is_some() {
            entry == wanted
        } else {
            entry.eq_ignore_ascii_case(wanted)
        }
    }
}
