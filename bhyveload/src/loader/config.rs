//! Reading `loader.conf` and what goes with it.

use super::{Loader, MOST_STEPS};
use crate::conf::{expand, parse, root_of_fstab};
use crate::error::LoadError;
use crate::fs::FileType;
use std::collections::BTreeSet;

/// Largest configuration file that is read.
const LARGEST_CONF: u64 = 1 << 20;
/// Most configuration files.
const MOST_FILES: usize = 100;

const DEFAULTS: &str = "/boot/defaults/loader.conf";
const FILES: &str = "/boot/device.hints /boot/loader.conf";
const DIRS: &str = "/boot/loader.conf.d";
const LOCAL: &str = "/boot/loader.conf.local";
const NEXTBOOT: &str = "/boot/nextboot.conf";

impl Loader<'_> {
    /// Reads all configuration files of the current device, in FreeBSD's order: the
    /// defaults, `loader_conf_files`, `loader_conf_dirs`, `local_loader_conf_files`,
    /// `nextboot_conf`.
    pub(super) fn configure(&mut self) -> Result<(), LoadError> {
        self.steps = MOST_STEPS;
        let mut read = BTreeSet::new();
        self.read_conf(DEFAULTS, &mut read)?;
        self.read_conf_list("loader_conf_files", FILES, &mut read)?;
        for dir in self.words("loader_conf_dirs", DIRS) {
            let listed = self
                .locate(&dir)
                .and_then(|(volume, path)| volume.list(path));
            match listed {
                Ok(Some(list)) => {
                    for entry in list {
                        if entry.name.ends_with(".conf") && entry.kind != FileType::Directory {
                            self.read_conf(&format!("{dir}/{}", entry.name), &mut read)?;
                        }
                    }
                }
                Ok(None) => {}
                Err(error) => self.print(&format!("{error}\n"))?,
            }
        }
        self.read_conf_list("local_loader_conf_files", LOCAL, &mut read)?;
        self.read_nextboot(&mut read)?;
        for (name, value) in self.fixed.clone() {
            self.set(&name, &value)?;
        }
        Ok(())
    }

    fn words(&self, variable: &str, default: &str) -> Vec<String> {
        let list = self.environment.get(variable).unwrap_or(default);
        list.split_whitespace().map(str::to_owned).collect()
    }

    /// Reads the files that a variable names; they may change the variable.
    fn read_conf_list(
        &mut self,
        variable: &str,
        default: &str,
        read: &mut BTreeSet<String>,
    ) -> Result<(), LoadError> {
        loop {
            let next = self
                .words(variable, default)
                .into_iter()
                .find(|name| !read.contains(name));
            match next {
                Some(name) => self.read_conf(&name, read)?,
                None => return Ok(()),
            }
        }
    }

    fn text(&self, path: &str) -> Result<Option<String>, LoadError> {
        let (volume, path) = self.locate(path)?;
        let input = volume.read(path, LARGEST_CONF)?;
        Ok(input.map(|input| String::from_utf8_lossy(&input.data).into_owned()))
    }

    /// Reads one file, if it is there. What is wrong with it is told, and no reason
    /// not to go on.
    fn read_conf(&mut self, path: &str, read: &mut BTreeSet<String>) -> Result<(), LoadError> {
        if !read.insert(path.to_owned()) || read.len() > MOST_FILES {
            return Ok(());
        }
        match self.text(path) {
            Ok(Some(text)) => self.apply(path, &text),
            Ok(None) => Ok(()),
            Err(error) => self.print(&format!("{error}\n")),
        }
    }

    /// `read-conf`: reads one file now.
    pub(super) fn read_conf_command(&mut self, path: &str) -> Result<(), LoadError> {
        match self.text(path)? {
            Some(text) => self.apply(path, &text),
            None => Err(LoadError::new(path, "file", "there is no such file")),
        }
    }

    fn apply(&mut self, path: &str, text: &str) -> Result<(), LoadError> {
        let parsed = parse(text);
        for (line, problem) in parsed.bad {
            self.print(&format!("{path}: line {line} {problem}; left out\n"))?;
        }
        for (name, value) in parsed.settings {
            if name == "exec" {
                self.obey_quietly(&value)?;
                continue;
            }
            let value = expand(&value, |name| self.environment.get(name));
            if let Err(error) = self.set(&name, &value) {
                self.print(&format!("{path}: {error}; left out\n"))?;
            }
        }
        Ok(())
    }

    /// nextboot(8): the image is only read here, so it is the guest that takes the
    /// file away (rc.d/nextboot does, when it is up).
    fn read_nextboot(&mut self, read: &mut BTreeSet<String>) -> Result<(), LoadError> {
        let path = self
            .environment
            .get("nextboot_conf")
            .unwrap_or(NEXTBOOT)
            .to_owned();
        if let Ok(Some(text)) = self.text(&path) {
            if text.starts_with("nextboot_enable=\"NO\"") || !read.insert(path.clone()) {
                return Ok(());
            }
            self.print(&format!(
                "{path} is in force until the guest removes it, which its rc.d/nextboot does\n"
            ))?;
            self.apply(&path, &text)?;
        }
        Ok(())
    }

    /// Sets `vfs.root.mountfrom` by the `/etc/fstab` of `rootdev` or of the current
    /// device, unless it is set.
    pub(super) fn mount_root(&mut self) -> Result<(), LoadError> {
        if self.environment.get("vfs.root.mountfrom").is_some() {
            return Ok(());
        }
        let device = self
            .environment
            .get("rootdev")
            .and_then(|name| self.devices.find(name))
            .unwrap_or(self.current);
        let fstab = format!("{}:/etc/fstab", self.devices.list[device].name);
        let root = match self.text(&fstab) {
            Ok(text) => text.as_deref().and_then(root_of_fstab),
            Err(error) => {
                self.print(&format!("{error}\n"))?;
                None
            }
        };
        if let Some((device, options)) = root {
            self.environment.set("vfs.root.mountfrom", device);
            if self.environment.get("vfs.root.mountfrom.options").is_none() {
                self.environment.set("vfs.root.mountfrom.options", options);
            }
            return Ok(());
        }
        let disk = |kind: Option<&str>| matches!(kind, Some("md_image" | "mfs_root"));
        if !self.files.iter().any(|f| disk(f.kind.as_deref())) {
            self.print(
                "No root in /etc/fstab: the kernel will look by itself, and may ask for one \
                 (set vfs.root.mountfrom=ufs:/dev/vtbd0p2 or the like)\n",
            )?;
        }
        Ok(())
    }
}
