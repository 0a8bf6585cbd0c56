//! What a program gives up once it is set up.
//!
//! On Linux a seccomp filter allows the system calls of the groups that were
//! asked for, in all threads, and Landlock the paths: in the calling thread, in
//! those that it starts later, and in those that call [`join`]. On FreeBSD it is
//! capability mode. Nothing that is open already is lost by it.
#![forbid(unsafe_code)]

#[cfg(target_os = "linux")]
mod calls;
#[cfg(target_os = "linux")]
mod linux;
#[cfg(target_os = "linux")]
use linux as host;
#[cfg(not(target_os = "linux"))]
mod other;
#[cfg(not(target_os = "linux"))]
use other as host;

use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::str::FromStr;

/// How strict.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Nothing is given up.
    Off,
    /// A call that is refused is named and fails.
    Log,
    /// A call that is refused is named, fails, and ends the program.
    #[default]
    On,
}

impl FromStr for Mode {
    type Err = String;
    fn from_str(s: &str) -> Result<Mode, String> {
        match s {
            "off" => Ok(Mode::Off),
            "log" => Ok(Mode::Log),
            "on" => Ok(Mode::On),
            _ => Err(format!("\"{s}\" is none of on, log and off")),
        }
    }
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Mode::Off => "off",
            Mode::Log => "log",
            Mode::On => "on",
        })
    }
}

/// What a descriptor is for from now on.
#[derive(Clone, Copy, Debug)]
pub enum Purpose<'a> {
    /// A VM's device: these requests, and mappings of its memory.
    Vm(&'a [u32]),
    /// A device of which these requests are made, and nothing else.
    Control(&'a [u32]),
    /// A terminal or what stands for one: both directions, and its modes.
    Terminal,
    /// The same, for output only.
    Output,
    /// A guest's disk, to be read, written, flushed and discarded.
    Disk,
    /// A file that is read.
    Image,
    /// A folder in which files are read.
    Folder,
    /// A network interface.
    Packets,
    /// A socket that others connect to, and those that have.
    Listener,
}

/// Takes the rights from a descriptor that its purpose does not need (on FreeBSD,
/// capsicum(4)); its duplicates keep theirs. On Linux the filter of system calls
/// is for all descriptors together, and nothing happens here.
///
/// # Errors
/// The host says no.
pub fn limit(fd: impl AsFd, purpose: Purpose<'_>) -> io::Result<()> {
    host::limit(fd.as_fd(), purpose)
}

/// What a program goes on needing besides memory, threads, time and the files and
/// sockets that it has open.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Files and folders to be read, with what is beneath.
    pub read: BTreeSet<PathBuf>,
    /// Files and folders to be read and changed, likewise.
    pub write: BTreeSet<PathBuf>,
    /// Folders that are held open, and beneath which files are opened by openat(2);
    /// true for those in which something is to be changed.
    pub folders: BTreeSet<(PathBuf, bool)>,
    /// Internet sockets of its own.
    pub network: bool,
    /// Unix sockets of its own.
    pub unix: bool,
    /// Memory that is executable or made so.
    pub executable_memory: bool,
}

impl Needs {
    /// Files are to be opened by their names.
    #[cfg(not(target_os = "linux"))]
    fn names(&self) -> bool {
        !(self.read.is_empty() && self.write.is_empty())
    }
}

/// Why a program could not be confined.
#[derive(Debug, thiserror::Error)]
#[error("the sandbox cannot be set up: {0}; --sandbox=off goes without it")]
pub struct Error(pub String);

/// What is in force.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// What this host could not give, in words.
    pub lacking: Vec<String>,
}

/// Confines this process. `refused` is told of each refused system call, by name,
/// on a thread of its own.
///
/// # Errors
/// The host can, but it did not work.
pub fn enter(
    mode: Mode,
    needs: &Needs,
    refused: impl Fn(&str) + Send + 'static,
) -> Result<Report, Error> {
    match mode {
        Mode::Off => Ok(Report::default()),
        Mode::Log | Mode::On => host::enter(needs, Box::new(refused)),
    }
}

/// Has a thread that was there before [`enter`] come under the rules for paths
/// too; to be called once the process is confined. Nothing without a sandbox.
///
/// # Errors
/// The host can, but it did not work.
pub fn join() -> Result<(), Error> {
    host::join()
}
