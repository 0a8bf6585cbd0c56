//! Where things are: the checkout, cargo's target directory, the private cache.

use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

/// The directories that every step works in.
#[derive(Debug, Clone)]
pub struct Dirs {
    /// The checkout.
    pub root: PathBuf,
    /// Cargo's target directory.
    pub target: PathBuf,
    /// `$XDG_CACHE_HOME/bhyve-rs` or `~/.cache/bhyve-rs`: what was downloaded.
    pub cache: PathBuf,
}

impl Dirs {
    /// Finds the directories for the checkout at `root`.
    ///
    /// # Errors
    /// There is no home directory, or the cache cannot be made.
    pub fn new(root: &Path) -> Result<Self> {
        let root = root
            .canonicalize()
            .with_context(|| format!("no checkout at {}", root.display()))?;
        let target = match std::env::var_os("CARGO_TARGET_DIR") {
            Some(dir) => root.join(dir),
            None => root.join("target"),
        };
        let base = match std::env::var_os("XDG_CACHE_HOME") {
            Some(dir) => PathBuf::from(dir),
            None => {
                PathBuf::from(std::env::var_os("HOME").context("HOME is not set")?).join(".cache")
            }
        };
        let cache = base.join("bhyve-rs");
        std::fs::create_dir_all(&cache)
            .with_context(|| format!("cannot make {}", cache.display()))?;
        Ok(Self {
            root,
            target,
            cache,
        })
    }

    /// A fresh, empty directory `target/lab/NAME`.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn fresh(&self, name: &str) -> Result<PathBuf> {
        let dir = self.target.join("lab").join(name);
        if dir.exists() {
            std::fs::remove_dir_all(&dir)
                .with_context(|| format!("cannot clear {}", dir.display()))?;
        }
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        Ok(dir)
    }
}
