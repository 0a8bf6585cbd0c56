//! The devices of the loader: what is on the images given with `-d`, and the folder
//! given with `-h`.

use crate::disk::file::FileImage;
use crate::disk::format::{self, Foreign};
use crate::disk::{Read, Window};
use crate::error::LoadError;
use crate::fs::FileSystem;
use crate::fs::iso9660::Iso9660;
use crate::fs::ufs::{Ufs, Version};
use crate::hostdir::HostDir;
use crate::partition::{self, Kind, Partition};
use crate::volume::{Mounted, Volume};
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// A disk, a partition or the host folder.
#[derive(Debug)]
pub struct Device {
    /// The name, as FreeBSD's loader writes it: `disk0p2`, `disk0s1a`, `disk0`, `host0`.
    pub name: String,
    /// What is on it, in words.
    pub what: String,
    /// Why it cannot be read, where that matters to somebody who wants to boot it.
    pub obstacle: Option<&'static str>,
    /// The partition table prefers it.
    pub preferred: bool,
    /// Its files, where there is a file system that can be read.
    pub volume: Option<Box<dyn Volume + 'static>>,
}

impl std::fmt::Debug for dyn Volume {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.describe("/"))
    }
}

impl Device {
    /// Whether there is something that looks like FreeBSD's `/boot`.
    #[must_use]
    pub fn boots(&self) -> bool {
        const SIGNS: [&str; 4] = [
            "boot/kernel",
            "boot/loader.conf",
            "boot/defaults/loader.conf",
            "boot/device.hints",
        ];
        self.volume.as_ref().is_some_and(|volume| {
            SIGNS
                .iter()
                .any(|path| matches!(volume.attributes(path), Ok(Some(_))))
        })
    }
}

/// All of them.
#[derive(Debug, Default)]
pub struct Devices {
    /// In order: the host folder last.
    pub list: Vec<Device>,
    /// What is wrong with partition tables.
    pub warnings: Vec<String>,
}

type FileSystemBox = Box<dyn FileSystem>;

/// A file system, and what to call it.
fn mount(part: Window<Rc<FileImage>>) -> Read<Option<(String, FileSystemBox)>> {
    if let Some(fs) = Ufs::open(part.clone())? {
        let name = match fs.superblock().version {
            Version::Ufs1 => "UFS1",
            Version::Ufs2 => "UFS2",
        };
        return Ok(Some((name.to_owned(), Box::new(fs))));
    }
    Ok(Iso9660::open(part)?.map(|fs| ("ISO 9660".to_owned(), Box::new(fs) as FileSystemBox)))
}

fn device(image: &Rc<FileImage>, path: &Path, number: usize, part: &Partition) -> Device {
    let name = format!("disk{number}{}", part.name);
    let window = Window::new(Rc::clone(image), part.start, part.size);
    let table = if part.name.is_empty() {
        "whole disk"
    } else {
        part.kind.name()
    };
    let mut device = Device {
        what: format!("{table}, {} MiB", part.size >> 20),
        name,
        obstacle: None,
        preferred: part.preferred,
        volume: None,
    };
    // A whole disk with partitions in it has none of these, and swap may have
    // what was there before.
    if matches!(part.kind, Kind::Swap | Kind::Boot) {
        return device;
    }
    match mount(window.clone()) {
        Ok(Some((kind, fs))) => {
            device.what = format!("{kind}, {}", device.what);
            let place = if part.name.is_empty() {
                path.display().to_string()
            } else {
                format!("{}[{}]", path.display(), part.name)
            };
            device.volume = Some(Box::new(Mounted::new(place, fs)));
        }
        Ok(None) => match format::foreign(&window) {
            Ok(Some(foreign)) => {
                device.what = format!("{}, {}", foreign.name(), device.what);
                device.obstacle = matches!(foreign, Foreign::Zfs | Foreign::Geli | Foreign::Luks)
                    .then(|| foreign.name());
            }
            Ok(None) if part.kind == Kind::Zfs => device.obstacle = Some(Foreign::Zfs.name()),
            Ok(None) => {}
            Err(fault) => device.what = format!("{}, {fault}", device.what),
        },
        Err(fault) => {
            device.what = format!("{}, damaged: {fault}", device.what);
            device.obstacle = Some("damaged");
        }
    }
    device
}

impl Devices {
    /// Opens the images and the folder and looks what is on them.
    ///
    /// # Errors
    /// One cannot be opened, or is in a format that has to be converted first.
    pub fn open(images: &[PathBuf], host: Option<&Path>) -> Result<Self, LoadError> {
        let mut devices = Self::default();
        for (number, path) in images.iter().enumerate() {
            let file = path.display().to_string();
            let image = Rc::new(FileImage::open(path)?);
            if let Some((name, remedy)) =
                format::container(&*image).map_err(|f| f.of(file.as_str()))?
            {
                return Err(LoadError::new(
                    file,
                    "image format",
                    format!("is {name}, and only raw images can be read"),
                )
                .hint(format!("make a raw image of it: {remedy}")));
            }
            let (partitions, damage) = partition::all(&*image).map_err(|f| f.of(file.as_str()))?;
            devices
                .warnings
                .extend(damage.into_iter().map(|text| format!("{file}: {text}")));
            for part in &partitions {
                devices.list.push(device(&image, path, number, part));
            }
        }
        if let Some(path) = host {
            devices.list.push(Device {
                name: "host0".to_owned(),
                what: format!("host folder {}", path.display()),
                obstacle: None,
                preferred: false,
                volume: Some(Box::new(HostDir::open(path)?)),
            });
        }
        Ok(devices)
    }

    /// The number of a device by its name, with or without the colon.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<usize> {
        let name = name.trim_end_matches('/').trim_end_matches(':');
        self.list.iter().position(|d| d.name == name)
    }

    /// Where to boot from: what the partition table prefers, then the first that
    /// has a `/boot`.
    ///
    /// # Errors
    /// There is none; the error says what there is instead.
    pub fn choose(&self) -> Result<usize, LoadError> {
        let bootable: Vec<usize> = (0..self.list.len())
            .filter(|&i| self.list[i].boots())
            .collect();
        if let Some(&first) = bootable.first() {
            let preferred = bootable.iter().find(|&&i| self.list[i].preferred);
            return Ok(preferred.copied().unwrap_or(first));
        }
        let found: Vec<String> = self
            .list
            .iter()
            .filter(|d| self.list.len() == 1 || !d.what.starts_with("whole disk"))
            .map(|d| format!("{} ({})", d.name, d.what))
            .collect();
        let obstacle = |name| self.list.iter().any(|d| d.obstacle == Some(name));
        let (problem, hint) = if obstacle(Foreign::Zfs.name()) {
            (
                "FreeBSD's root is on ZFS here, which cannot be read yet",
                "put /boot on a UFS partition, or give a folder with a copy of /boot with -h",
            )
        } else if obstacle(Foreign::Geli.name()) || obstacle(Foreign::Luks.name()) {
            (
                "what there is to boot is encrypted, and cannot be read",
                "put an unencrypted /boot on a UFS partition, or give a copy of it with -h",
            )
        } else {
            (
                "there is no UFS or ISO 9660 file system with a /boot",
                "give an image that FreeBSD was installed on, or a kernel with --kernel",
            )
        };
        let list = if found.is_empty() {
            "nothing".to_owned()
        } else {
            found.join(", ")
        };
        Err(LoadError::new(
            "bhyveload",
            "boot device",
            format!("{problem}; found: {list}"),
        )
        .hint(hint))
    }
}
