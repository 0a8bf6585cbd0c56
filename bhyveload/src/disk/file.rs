//! A disk image that is a file or a block device of the host.

use super::{Fault, Read, ReadAt, outside};
use crate::error::LoadError;
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;

/// What FreeBSD's disks want: whole sectors at sector boundaries.
const SECTOR: u64 = 4096;

/// An open image.
#[derive(Debug)]
pub struct FileImage {
    file: File,
    size: u64,
    /// A character device (a disk on FreeBSD) takes whole sectors only.
    whole_sectors: bool,
}

impl FileImage {
    /// Opens an image for reading.
    ///
    /// # Errors
    /// It cannot be opened, is neither a file nor a disk, or is empty.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let bad = |problem: String| LoadError::new(path.display().to_string(), "-d", problem);
        let mut file = crate::opened::open(path).map_err(|e| bad(e.to_string()))?;
        let kind = file.metadata().map_err(|e| bad(e.to_string()))?.file_type();
        if kind.is_dir() {
            return Err(bad("is a folder, and -d takes a disk image".to_owned())
                .hint("give a folder with -h"));
        }
        if !kind.is_file() && !kind.is_block_device() && !kind.is_char_device() {
            return Err(bad("is neither a file nor a disk".to_owned()));
        }
        let size = file
            .seek(SeekFrom::End(0))
            .map_err(|e| bad(e.to_string()))?;
        if size == 0 {
            return Err(bad("is empty".to_owned()));
        }
        Ok(Self {
            file,
            size,
            whole_sectors: kind.is_char_device(),
        })
    }

    fn exact(&self, offset: u64, buffer: &mut [u8]) -> Read<()> {
        self.file
            .read_exact_at(buffer, offset)
            .map_err(|e| Fault::new("image", format!("offset {offset:#x}: {e}")))
    }
}

impl ReadAt for FileImage {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Read<()> {
        let len = buffer.len() as u64;
        let end = offset
            .checked_add(len)
            .filter(|&end| end <= self.size)
            .ok_or_else(|| outside(offset, buffer.len(), self.size))?;
        if !self.whole_sectors {
            return self.exact(offset, buffer);
        }
        let start = offset / SECTOR * SECTOR;
        let stop = end.next_multiple_of(SECTOR).min(self.size);
        let mut sectors = vec![0; (stop - start) as usize];
        self.exact(start, &mut sectors)?;
        let skip = (offset - start) as usize;
        buffer.copy_from_slice(&sectors[skip..skip + buffer.len()]);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_read_and_folders_named_as_such() {
        let top = tempfile::tempdir().unwrap();
        let path = top.path().join("disk");
        std::fs::write(&path, (0..=255).collect::<Vec<u8>>()).unwrap();
        let mut image = FileImage::open(&path).unwrap();
        for whole in [false, true] {
            image.whole_sectors = whole;
            assert_eq!(super::super::array::<3>(&image, 7).unwrap(), [7, 8, 9]);
            assert!(image.read_at(255, &mut [0; 2]).is_err());
        }
        let error = FileImage::open(top.path()).unwrap_err();
        assert!(error.to_string().contains("-h"), "{error}");
        std::fs::write(&path, b"").unwrap();
        assert!(FileImage::open(&path).is_err());
    }
}
