//! Where the loader finds files: a file system on an image, or a host folder.

use crate::disk::Fault;
use crate::error::LoadError;
use crate::fs::{Attributes, FileSystem, FileType, resolve};
use crate::input::Input;
use std::ops::ControlFlow;

/// Most entries of a folder that are listed.
const MOST_LISTED: usize = 100_000;

/// An entry of a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// What it is, symlinks not followed.
    pub kind: FileType,
    /// Bytes of a file.
    pub size: u64,
}

/// A tree of files.
pub trait Volume {
    /// How the user knows a path in it, for errors.
    fn describe(&self, path: &str) -> String;

    /// What a path leads to. `None`: there is no such file.
    ///
    /// # Errors
    /// The image is damaged, or the path leads out of the tree.
    fn attributes(&self, path: &str) -> Result<Option<Attributes>, LoadError>;

    /// A file's contents. `None`: there is no such file.
    ///
    /// # Errors
    /// It is larger than `limit` or no regular file, or as [`Volume::attributes`].
    fn read(&self, path: &str, limit: u64) -> Result<Option<Input>, LoadError>;

    /// A folder's entries in order of their names. `None`: there is no such folder.
    ///
    /// # Errors
    /// As [`Volume::attributes`].
    fn list(&self, path: &str) -> Result<Option<Vec<Listed>>, LoadError>;
}

/// A file system on an image.
pub struct Mounted {
    /// The image and the partition, for errors.
    name: String,
    fs: Box<dyn FileSystem>,
}

impl std::fmt::Debug for Mounted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mounted").field("name", &self.name).finish()
    }
}

impl Mounted {
    /// The file system `fs` of the image and partition called `name`.
    #[must_use]
    pub fn new(name: impl Into<String>, fs: Box<dyn FileSystem>) -> Self {
        Self {
            name: name.into(),
            fs,
        }
    }

    fn fault(&self, path: &str) -> impl Fn(Fault) -> LoadError {
        let file = self.describe(path);
        move |fault| fault.of(file.as_str())
    }
}

impl Volume for Mounted {
    fn describe(&self, path: &str) -> String {
        format!("{}:/{}", self.name, path.trim_start_matches('/'))
    }

    fn attributes(&self, path: &str) -> Result<Option<Attributes>, LoadError> {
        let found = resolve(&*self.fs, path.as_bytes()).map_err(self.fault(path))?;
        Ok(found.map(|(_, attributes)| attributes))
    }

    fn read(&self, path: &str, limit: u64) -> Result<Option<Input>, LoadError> {
        let found = resolve(&*self.fs, path.as_bytes()).map_err(self.fault(path))?;
        let Some((node, _)) = found else {
            return Ok(None);
        };
        let data = self.fs.read(node, limit).map_err(self.fault(path))?;
        Ok(Some(Input {
            name: self.describe(path),
            data,
        }))
    }

    fn list(&self, path: &str) -> Result<Option<Vec<Listed>>, LoadError> {
        let found = resolve(&*self.fs, path.as_bytes()).map_err(self.fault(path))?;
        let Some((node, attributes)) = found else {
            return Ok(None);
        };
        if attributes.kind != FileType::Directory {
            return Ok(None);
        }
        let mut nodes = Vec::new();
        self.fs
            .entries(node, &mut |name, node| {
                nodes.push((String::from_utf8_lossy(name).into_owned(), node));
                if nodes.len() < MOST_LISTED {
                    ControlFlow::Continue(())
                } else {
                    ControlFlow::Break(())
                }
            })
            .map_err(self.fault(path))?;
        let mut listed = Vec::with_capacity(nodes.len());
        for (name, node) in nodes {
            let attributes = self.fs.attributes(node).map_err(self.fault(path))?;
            listed.push(Listed {
                name,
                kind: attributes.kind,
                size: attributes.size,
            });
        }
        listed.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Some(listed))
    }
}
