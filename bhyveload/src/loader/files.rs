//! Finding and loading kernels, modules and other files.

use super::{Loaded, Loader};
use crate::conf::Wanted;
use crate::elffile::{ElfFile, is_elf};
use crate::error::LoadError;
use crate::fs::FileType;
use crate::input::Input;
use crate::kldmeta::{self, Depend, Metadata};
use crate::linkerhints;

/// Most files.
const MOST_FILES: usize = 256;
/// How deep dependencies may go.
const DEEPEST: usize = 32;
/// What the module path has when nobody says otherwise.
const MODULE_PATH: &str = "/boot/modules";
const KLD: &str = "elf obj module";

/// Whether a type is one that the kernel links, and not data.
fn is_kld(kind: Option<&str>) -> bool {
    matches!(kind, None | Some(KLD | "elf module"))
}

fn metadata(input: &Input) -> Result<Metadata, LoadError> {
    if !is_elf(&input.data) {
        return Err(
            LoadError::new(input.name.as_str(), "e_ident", "this is not an ELF file")
                .hint("load -t TYPE loads a file as it is"),
        );
    }
    Ok(kldmeta::parse(&ElfFile::parse(&input.name, &input.data)?))
}

impl Loader<'_> {
    /// The first of `paths` that is a file, without its `.gz`; `unzip`: without
    /// compression whatever it is called.
    fn first(&self, paths: &[String], unzip: bool) -> Result<Option<(String, Input)>, LoadError> {
        for path in paths {
            let (volume, inner) = self.locate(path)?;
            let is_file = volume
                .attributes(inner)?
                .is_some_and(|a| a.kind == FileType::File);
            if !is_file {
                continue;
            }
            let Some(input) = volume.read(inner, self.room())? else {
                continue;
            };
            let input = if unzip || path.ends_with(".gz") {
                input.decompressed(self.room())?
            } else {
                input
            };
            let name = inner.strip_suffix(".gz").unwrap_or(inner).to_owned();
            return Ok(Some((name, input)));
        }
        Ok(None)
    }

    fn variable(&self, name: &str, default: &str) -> String {
        self.environment.get(name).unwrap_or(default).to_owned()
    }

    /// The folders that modules are looked for in: the kernel's first.
    fn folders(&self) -> Vec<String> {
        let path = self.variable("module_path", MODULE_PATH);
        let mut folders: Vec<String> = self.kernel_folder.iter().cloned().collect();
        for folder in path.split(';').filter(|f| !f.is_empty()) {
            if !folders.iter().any(|f| f == folder) {
                folders.push(folder.to_owned());
            }
        }
        folders
    }

    /// Where a kernel may be: `kernel` is a folder beneath `/boot`, a folder, or a file;
    /// `bootfile` lists names of files in it.
    fn kernel_candidates(&self, kernel: &str) -> Vec<String> {
        let boot_file = self.variable("bootfile", "kernel");
        let mut names: Vec<&str> = boot_file
            .split([';', ','])
            .map(str::trim)
            .filter(|f| !f.is_empty())
            .collect();
        if !names.contains(&"kernel") {
            names.push("kernel");
        }
        let mut candidates = Vec::new();
        for name in names {
            if name.starts_with('/') {
                candidates.push(name.to_owned());
            }
            if kernel.contains('/') {
                candidates.push(format!("{kernel}/{name}"));
            } else {
                candidates.push(format!("/boot/{kernel}/{name}"));
            }
        }
        if kernel.contains('/') {
            candidates.push(kernel.to_owned());
        } else {
            candidates.push(format!("/boot/{kernel}"));
            candidates.push(format!("/{kernel}"));
        }
        candidates
    }

    /// Loads a kernel; by the variables `kernel` and `bootfile` unless it is named.
    ///
    /// # Errors
    /// It is not there or no kernel.
    pub(super) fn load_kernel(
        &mut self,
        name: Option<&str>,
        args: Option<String>,
    ) -> Result<(), LoadError> {
        let kernel = name.map_or_else(|| self.variable("kernel", "kernel"), str::to_owned);
        let paths: Vec<String> = self
            .kernel_candidates(&kernel)
            .into_iter()
            .flat_map(|path| [format!("{path}.gz"), path].into_iter().rev())
            .collect();
        let Some((path, input)) = self.first(&paths, true)? else {
            let (volume, _) = self.locate("/")?;
            return Err(LoadError::new(
                volume.describe(&paths[0]),
                "file",
                "there is no kernel here",
            )
            .hint("name another with kernel= in boot/loader.conf or with load"));
        };
        let metadata = metadata(&input)?;
        let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
        self.kernel_folder = Some(folder.to_owned());
        self.print(&format!("{path} {} bytes\n", input.data.len()))?;
        self.files.push(Loaded {
            name: path,
            kind: None,
            args,
            input,
            metadata,
        });
        let folders = self.folders().join(";");
        self.environment.set("module_path", folders);
        Ok(())
    }

    /// The files in which a module of that file name may be.
    fn kld_paths(&self, name: &str) -> Vec<String> {
        const SUFFIXES: [&str; 3] = [".ko", "", ".ko.gz"];
        if name.contains('/') {
            return SUFFIXES.iter().map(|s| format!("{name}{s}")).collect();
        }
        self.folders()
            .iter()
            .flat_map(|f| SUFFIXES.iter().map(move |s| format!("{f}/{name}{s}")))
            .collect()
    }

    /// The file that holds a module, by the folders' `linker.hints`.
    fn hinted(
        &mut self,
        module: &str,
        wanted: Option<&Depend>,
    ) -> Result<Option<String>, LoadError> {
        for folder in self.folders() {
            if !self.hints.contains_key(&folder) {
                let path = format!("{folder}/linker.hints");
                let (volume, inner) = self.locate(&path)?;
                let input = volume.read(inner, linkerhints::LARGEST)?;
                let hints = input.and_then(|input| linkerhints::parse(&input.data));
                self.hints.insert(folder.clone(), hints.unwrap_or_default());
            }
            let hints = self.hints.get(&folder).map(Vec::as_slice);
            let best = hints
                .unwrap_or_default()
                .iter()
                .filter(|hint| {
                    hint.module == module && wanted.is_none_or(|w| w.accepts(hint.version))
                })
                .max_by_key(|hint| {
                    let preferred = wanted.is_some_and(|w| w.versions.1 == hint.version);
                    (preferred, hint.version)
                });
            if let Some(hint) = best {
                return Ok(Some(format!("{folder}/{}", hint.file)));
            }
        }
        Ok(None)
    }

    /// Loads a module and the modules that it depends on, or none of them.
    ///
    /// # Errors
    /// One of them is not there, or is none.
    pub(super) fn load_module(
        &mut self,
        name: &str,
        args: Option<String>,
    ) -> Result<(), LoadError> {
        let before = self.files.len();
        let loaded = self.load_with_dependencies(name, None, args, 0);
        if loaded.is_err() {
            self.files.truncate(before);
        }
        loaded
    }

    fn load_with_dependencies(
        &mut self,
        name: &str,
        wanted: Option<&Depend>,
        args: Option<String>,
        depth: usize,
    ) -> Result<(), LoadError> {
        let hinted = if name.contains('/') {
            None
        } else {
            self.hinted(name, wanted)?
        };
        // A dependency goes by the name of the module, a command by that of the file.
        let mut paths = self.kld_paths(name);
        if wanted.is_some() {
            paths.splice(0..0, hinted);
        } else {
            paths.extend(hinted);
        }
        let Some((path, input)) = self.first(&paths, true)? else {
            return Err(LoadError::new(
                name,
                "module",
                format!("is not in {}", self.folders().join(", ")),
            ));
        };
        if self.files.iter().any(|f| f.name == path) {
            return Ok(());
        }
        let metadata = metadata(&input)?;
        let depends = metadata.depends.clone();
        self.push(Loaded {
            name: path.clone(),
            kind: None,
            args,
            input,
            metadata,
        })?;
        for depend in &depends {
            if self.provided(&path, depend)? {
                continue;
            }
            if depth == DEEPEST {
                return Err(LoadError::new(path, "dependencies", "are too deep"));
            }
            self.load_with_dependencies(&depend.module, Some(depend), None, depth + 1)
                .map_err(|error| error.hint(format!("{path} depends on it")))?;
        }
        Ok(())
    }

    /// Whether a file that has been loaded has the module.
    fn provided(&self, path: &str, depend: &Depend) -> Result<bool, LoadError> {
        let mut versions = self
            .files
            .iter()
            .flat_map(|f| &f.metadata.provides)
            .filter(|(module, _)| *module == depend.module)
            .map(|(_, version)| *version)
            .peekable();
        if versions.peek().is_none() {
            // A kernel that says nothing of itself may have it all the same.
            let silent = self
                .files
                .first()
                .is_some_and(|kernel| kernel.metadata.provides.is_empty());
            return Ok(silent);
        }
        let newest = versions.clone().max().unwrap_or_default();
        if versions.any(|version| depend.accepts(version)) {
            return Ok(true);
        }
        let (least, _, most) = depend.versions;
        Err(LoadError::new(
            path,
            "dependencies",
            format!(
                "needs {} of version {least} to {most}, and it is {newest}",
                depend.module
            ),
        )
        .hint("the module was built for another kernel"))
    }

    fn push(&mut self, file: Loaded) -> Result<(), LoadError> {
        if self.files.len() >= MOST_FILES {
            return Err(LoadError::new(
                file.name,
                "load",
                format!("more than {MOST_FILES} files"),
            ));
        }
        let size = file.input.data.len();
        let kind = file.kind.as_deref().unwrap_or("module");
        let line = format!("{} {size} bytes ({kind})\n", file.name);
        self.files.push(file);
        self.print(&line)
    }

    /// Loads a file as it is, under the name of a type.
    ///
    /// # Errors
    /// It is not there.
    pub(super) fn load_raw(
        &mut self,
        name: &str,
        kind: &str,
        args: Option<String>,
    ) -> Result<(), LoadError> {
        let mut paths = vec![name.to_owned(), format!("{name}.gz")];
        if !name.contains('/') {
            let in_folders = self
                .folders()
                .into_iter()
                .flat_map(|f| [format!("{f}/{name}"), format!("{f}/{name}.gz")]);
            paths = in_folders.collect();
        }
        let Some((path, input)) = self.first(&paths, false)? else {
            let (volume, inner) = self.locate(&paths[0])?;
            return Err(LoadError::new(
                volume.describe(inner),
                "file",
                "there is no such file",
            ));
        };
        if input.data.is_empty() {
            return Err(LoadError::new(input.name, "file", "is empty"));
        }
        self.push(Loaded {
            name: path,
            kind: Some(kind.to_owned()),
            args,
            input,
            metadata: Metadata::default(),
        })
    }

    /// Loads a file of a type: the kernel first, then modules and others.
    ///
    /// # Errors
    /// It is not there, or not what it should be.
    pub(super) fn load(
        &mut self,
        name: &str,
        kind: Option<&str>,
        args: Option<String>,
    ) -> Result<(), LoadError> {
        match kind {
            Some(kind) if !is_kld(Some(kind)) => {
                if self.files.is_empty() {
                    return Err(LoadError::new(
                        name,
                        "load",
                        "the kernel must be loaded first",
                    ));
                }
                self.load_raw(name, kind, args)
            }
            _ if self.files.is_empty() => self.load_kernel(Some(name), args),
            _ => self.load_module(name, args),
        }
    }

    /// Loads the kernel and what `loader.conf` wants with it. As with FreeBSD's
    /// loader a guest goes without a module that cannot be loaded; but not without
    /// its root.
    ///
    /// # Errors
    /// The kernel or a memory disk is not there.
    pub(super) fn load_configured(&mut self) -> Result<(), LoadError> {
        let args = Some(self.variable("kernel_options", "")).filter(|o| !o.is_empty());
        if let Some(flags) = &args {
            self.boot_flags(flags);
        }
        self.load_kernel(None, args)?;
        let blacklist = self.variable("module_blacklist", "");
        for (key, module) in self.modules.to_load() {
            let name = module.name.as_deref().unwrap_or(&key).to_owned();
            if blacklist.split([';', ',', ' ']).any(|word| word == name) {
                self.print(&format!("{name} is in module_blacklist; left out\n"))?;
                continue;
            }
            self.load_wanted(&key, &name, &module)?;
        }
        Ok(())
    }

    fn load_wanted(&mut self, key: &str, name: &str, module: &Wanted) -> Result<(), LoadError> {
        if let Some(command) = &module.before {
            self.obey_quietly(command)?;
        }
        let result = self.load(name, module.kind.as_deref(), module.flags.clone());
        let command = match result {
            Ok(()) => &module.after,
            Err(error) => {
                let error = LoadError {
                    field: format!("{key}_load: {}", error.field),
                    ..error
                };
                if matches!(module.kind.as_deref(), Some("md_image" | "mfs_root")) {
                    return Err(error);
                }
                // Absent until the guest has shut down once: nobody's mistake.
                if module.kind.as_deref() != Some("boot_entropy_cache") {
                    self.print(&format!("{error}\n"))?;
                }
                &module.error
            }
        };
        match command {
            Some(command) => self.obey_quietly(command),
            None => Ok(()),
        }
    }

    /// Sets the variables that flags of `boot` stand for (`-s`: boot_single, …).
    pub(super) fn boot_flags(&mut self, text: &str) {
        const FLAGS: [(char, &str); 10] = [
            ('a', "boot_askname"),
            ('C', "boot_cdrom"),
            ('d', "boot_ddb"),
            ('D', "boot_multicons"),
            ('g', "boot_gdb"),
            ('h', "boot_serial"),
            ('m', "boot_mute"),
            ('p', "boot_pause"),
            ('r', "boot_dfltroot"),
            ('s', "boot_single"),
        ];
        for word in text.split_whitespace() {
            for c in word.strip_prefix('-').unwrap_or_default().chars() {
                let name = match c {
                    'v' => Some("boot_verbose"),
                    c => FLAGS.iter().find(|(f, _)| *f == c).map(|(_, name)| *name),
                };
                if let Some(name) = name {
                    self.environment.set(name, "YES");
                }
            }
        }
    }
}
