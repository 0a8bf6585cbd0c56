//! A host folder for `-h`, which nothing named inside it can lead out of.
//!
//! The names come from the guest's own `loader.conf`: a `..`, an absolute symlink
//! or a symlink that climbs must not reach the host's files (CVE-2024-25940).

use crate::error::LoadError;
use crate::fs::{Attributes, FileType};
use crate::input::Input;
use crate::volume::{Listed, Volume};
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{Mode, SFlag};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path};

/// The open folder.
#[derive(Debug)]
pub struct HostDir {
    dir: OwnedFd,
    name: String,
}

impl HostDir {
    /// Opens the folder.
    ///
    /// # Errors
    /// It is not there, or is no folder.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let name = path.display().to_string();
        let bad = |e: std::io::Error| LoadError::new(name.as_str(), "-h", e.to_string());
        let dir = crate::opened::open(path).map_err(bad)?;
        if !dir.metadata().map_err(bad)?.is_dir() {
            return Err(bad(Errno::ENOTDIR.into()));
        }
        Ok(Self {
            dir: dir.into(),
            name,
        })
    }

    /// Opens what a path beneath the folder leads to; a leading `/` means the
    /// folder itself. `None`: there is nothing.
    fn open_path(&self, path: &str) -> Result<Option<File>, LoadError> {
        let name = self.describe(path);
        let relative = path.trim_start_matches('/');
        let escape = || {
            LoadError::new(
                name.as_str(),
                "path",
                "leads out of the folder given with -h",
            )
        };
        if relative.contains('\0') {
            return Ok(None);
        }
        if Path::new(relative)
            .components()
            .any(|c| !matches!(c, Component::Normal(_) | Component::CurDir))
        {
            return Err(escape());
        }
        let relative = if relative.is_empty() { "." } else { relative };
        match self.open_beneath(Path::new(relative)) {
            Ok(fd) => Ok(Some(File::from(fd))),
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ENAMETOOLONG) => Ok(None),
            Err(Errno::EXDEV | Errno::ELOOP) => Err(escape()),
            Err(e) => Err(LoadError::new(name.as_str(), "file", e.desc())),
        }
    }

    #[cfg(target_os = "linux")]
    fn open_beneath(&self, path: &Path) -> nix::Result<OwnedFd> {
        use nix::fcntl::{OpenHow, ResolveFlag, openat2};
        let how = OpenHow::new()
            .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        match openat2(self.dir.as_fd(), path, how) {
            // Kernels before 5.6, and sandboxes that do not know the call.
            Err(Errno::ENOSYS | Errno::EPERM) => self.walk(path),
            other => other,
        }
    }

    #[cfg(not(target_os = "linux"))]
    fn open_beneath(&self, path: &Path) -> nix::Result<OwnedFd> {
        self.walk(path)
    }

    /// Opens one component after the other and follows no symlink at all.
    fn walk(&self, path: &Path) -> nix::Result<OwnedFd> {
        let names: Vec<_> = path
            .components()
            .filter_map(|c| match c {
                Component::Normal(name) => Some(name),
                _ => None,
            })
            .collect();
        let Some((last, folders)) = names.split_last() else {
            return self.dir.try_clone().map_err(|_| Errno::EMFILE);
        };
        let base = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        let mut dir = self.dir.try_clone().map_err(|_| Errno::EMFILE)?;
        for folder in folders {
            dir = openat(
                dir.as_fd(),
                *folder,
                base | OFlag::O_DIRECTORY,
                Mode::empty(),
            )
            .map_err(
                // A symlink opened as a folder without following: Linux says ENOTDIR.
                |e| match e {
                    Errno::ENOTDIR | Errno::EMLINK => Errno::ELOOP,
                    other => other,
                },
            )?;
        }
        openat(dir.as_fd(), *last, base | OFlag::O_NONBLOCK, Mode::empty())
    }
}

fn kind_of(kind: std::fs::FileType) -> FileType {
    if kind.is_file() {
        FileType::File
    } else if kind.is_dir() {
        FileType::Directory
    } else if kind.is_symlink() {
        FileType::Symlink
    } else {
        FileType::Other
    }
}

impl Volume for HostDir {
    fn describe(&self, path: &str) -> String {
        format!(
            "{}/{}",
            self.name.trim_end_matches('/'),
            path.trim_start_matches('/')
        )
    }

    fn attributes(&self, path: &str) -> Result<Option<Attributes>, LoadError> {
        let Some(file) = self.open_path(path)? else {
            return Ok(None);
        };
        let metadata = file
            .metadata()
            .map_err(|e| LoadError::new(self.describe(path), "file", e.to_string()))?;
        Ok(Some(Attributes {
            kind: kind_of(metadata.file_type()),
            size: metadata.len(),
        }))
    }

    fn read(&self, path: &str, limit: u64) -> Result<Option<Input>, LoadError> {
        let Some(file) = self.open_path(path)? else {
            return Ok(None);
        };
        Input::from_file(&self.describe(path), file, limit).map(Some)
    }

    fn list(&self, path: &str) -> Result<Option<Vec<Listed>>, LoadError> {
        let bad = |e: Errno| LoadError::new(self.describe(path), "folder", e.desc());
        let Some(file) = self.open_path(path)? else {
            return Ok(None);
        };
        let mut dir = match Dir::from_fd(OwnedFd::from(file)) {
            Ok(dir) => dir,
            Err(Errno::ENOTDIR) => return Ok(None),
            Err(e) => return Err(bad(e)),
        };
        let mut names = Vec::new();
        for entry in dir.iter() {
            let entry = entry.map_err(bad)?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                names.push(String::from_utf8_lossy(name).into_owned());
            }
        }
        names.sort();
        let mut listed = Vec::with_capacity(names.len());
        for name in names {
            let no_follow = nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW;
            // Gone since, or a name that is no text.
            let Ok(stat) = nix::sys::stat::fstatat(&dir, name.as_str(), no_follow) else {
                continue;
            };
            listed.push(Listed {
                kind: match SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT {
                    SFlag::S_IFREG => FileType::File,
                    SFlag::S_IFDIR => FileType::Directory,
                    SFlag::S_IFLNK => FileType::Symlink,
                    _ => FileType::Other,
                },
                size: u64::try_from(stat.st_size).unwrap_or_default(),
                name,
            });
        }
        Ok(Some(listed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn folder() -> (tempfile::TempDir, HostDir) {
        let top = tempfile::tempdir().unwrap();
        let inside = top.path().join("guest");
        std::fs::create_dir_all(inside.join("boot/kernel")).unwrap();
        std::fs::write(inside.join("boot/kernel/kernel"), b"KERNEL").unwrap();
        std::fs::write(top.path().join("secret"), b"SECRET").unwrap();
        symlink("../../secret", inside.join("boot/climbs")).unwrap();
        symlink(top.path().join("secret"), inside.join("boot/absolute")).unwrap();
        symlink("..", inside.join("up")).unwrap();
        let dir = HostDir::open(&inside).unwrap();
        (top, dir)
    }

    const OUTSIDE: [&str; 4] = [
        "/../secret",
        "boot/../../secret",
        "boot/climbs",
        "/boot/absolute",
    ];

    #[test]
    fn a_file_inside_is_read_and_a_missing_one_is_none() {
        let (_top, dir) = folder();
        let kernel = dir.read("/boot/kernel/kernel", 100).unwrap().unwrap();
        assert_eq!(kernel.data, b"KERNEL");
        assert!(kernel.name.ends_with("guest/boot/kernel/kernel"));
        assert_eq!(dir.read("boot/nothing", 100).unwrap(), None);
        assert_eq!(dir.read("boot/kernel", 100).unwrap_err().field, "file");
        assert_eq!(dir.read("boot/kernel/kernel", 3).unwrap_err().field, "size");
    }

    #[test]
    fn nothing_leads_out() {
        let (_top, dir) = folder();
        for path in OUTSIDE.into_iter().chain(["up/secret"]) {
            let error = dir.read(path, 100).unwrap_err();
            assert_eq!(error.field, "path", "{path}");
        }
    }

    #[test]
    fn the_walk_without_openat2_does_not_leave_either() {
        let (_top, dir) = folder();
        assert!(dir.walk(Path::new("boot/kernel/kernel")).is_ok());
        for path in ["boot/climbs", "boot/absolute", "up/secret"] {
            assert_eq!(
                dir.walk(Path::new(path)).unwrap_err(),
                Errno::ELOOP,
                "{path}"
            );
        }
    }
}
