//! A file to load: its bytes, and the name to use in errors.

use crate::error::LoadError;
use flate2::read::GzDecoder;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// A file's contents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Input {
    /// The file as the user named it.
    pub name: String,
    /// Its bytes, decompressed where asked for.
    pub data: Vec<u8>,
}

const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

impl Input {
    /// Reads at most `limit` bytes of an open file.
    ///
    /// # Errors
    /// It cannot be read, is no regular file, or holds more.
    pub fn from_file(name: &str, file: File, limit: u64) -> Result<Self, LoadError> {
        let metadata = file
            .metadata()
            .map_err(|e| LoadError::new(name, "file", e.to_string()))?;
        if !metadata.is_file() {
            return Err(LoadError::new(name, "file", "is not a regular file"));
        }
        let mut data = Vec::new();
        file.take(limit.saturating_add(1))
            .read_to_end(&mut data)
            .map_err(|e| LoadError::new(name, "file", e.to_string()))?;
        if data.len() as u64 > limit {
            return Err(too_large(name, "size", limit));
        }
        Ok(Self {
            name: name.to_owned(),
            data,
        })
    }

    /// Reads at most `limit` bytes of the file at `path`.
    ///
    /// # Errors
    /// As [`Input::from_file`], or it cannot be opened or is empty.
    pub fn open(path: &Path, limit: u64) -> Result<Self, LoadError> {
        let name = path.display().to_string();
        let file = crate::opened::open(path)
            .map_err(|e| LoadError::new(name.as_str(), "file", e.to_string()))?;
        let input = Self::from_file(&name, file, limit)?;
        if input.data.is_empty() {
            return Err(LoadError::new(name, "file", "is empty"));
        }
        Ok(input)
    }

    /// Whether the bytes are those of a gzip file.
    #[must_use]
    pub fn is_gzip(&self) -> bool {
        self.data.starts_with(&GZIP_MAGIC)
    }

    /// The same file without gzip compression; `limit` bounds what comes out.
    ///
    /// # Errors
    /// The compressed data is damaged, or holds more than `limit` bytes.
    pub fn decompressed(self, limit: u64) -> Result<Self, LoadError> {
        if !self.is_gzip() {
            return Ok(self);
        }
        let mut data = Vec::new();
        GzDecoder::new(self.data.as_slice())
            .take(limit.saturating_add(1))
            .read_to_end(&mut data)
            .map_err(|e| {
                LoadError::new(self.name.as_str(), "gzip data", e.to_string())
                    .hint("the file is truncated or damaged")
            })?;
        if data.len() as u64 > limit {
            return Err(too_large(&self.name, "decompressed size", limit));
        }
        Ok(Self {
            name: self.name,
            data,
        })
    }

    /// The last component of the name.
    #[must_use]
    pub fn base_name(&self) -> &str {
        self.name.rsplit('/').next().unwrap_or(&self.name)
    }
}

fn too_large(name: &str, field: &str, limit: u64) -> LoadError {
    LoadError::new(
        name,
        field,
        format!("is more than the {limit:#x} bytes of guest memory below 4 GiB"),
    )
    .hint("give the VM more memory with -m")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn gz(data: &[u8]) -> Input {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(data).unwrap();
        Input {
            name: "kernel.gz".into(),
            data: encoder.finish().unwrap(),
        }
    }

    #[test]
    fn gzip_is_undone_and_anything_else_is_left_alone() {
        assert_eq!(gz(b"hello").decompressed(100).unwrap().data, b"hello");
        let plain = Input {
            name: "k".into(),
            data: b"plain".to_vec(),
        };
        assert_eq!(plain.clone().decompressed(1).unwrap(), plain);
    }

    #[test]
    fn a_bomb_and_a_damaged_file_are_refused() {
        let bomb = gz(&vec![0; 1 << 20]).decompressed(4096).unwrap_err();
        assert_eq!(bomb.field, "decompressed size");
        let mut short = gz(&[7; 5000]);
        short.data.truncate(short.data.len() / 2);
        let short = short.decompressed(1 << 20).unwrap_err();
        assert_eq!(
            (short.file.as_str(), short.field.as_str()),
            ("kernel.gz", "gzip data")
        );
    }
}
