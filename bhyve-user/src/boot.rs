//! `--boot`: a VM from loading to its end. This process is the parent of
//! bhyveload and of the bhyve that runs the guest, has no devices, and sees to it that no VM is left behind.

use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::sync::{Arc, Mutex};

use bhyve_config::{Argument, Program, Settings};
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::{Pid, getppid};

use crate::config::Config;
use crate::ending::ERROR;
use crate::lock;

/// Says in the environment of the bhyve that runs the guest who its parent is.
const PARENT: &str = "BHYVE_BOOT_PARENT";

/// Why a guest could not be booted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing says what to load.
    #[error(
        "--boot: nothing says what to load; give the configuration file a [boot] section, or say -o boot.kernel=FILE"
    )]
    Nothing,
    /// A program could not be started.
    #[error("{0}: {1}")]
    Start(String, std::io::Error),
    /// bhyveload has said why.
    #[error("the guest could not be loaded")]
    Load,
    /// A signal, before there was a guest to tell.
    #[error("ended by a signal")]
    Ended,
    /// Signals.
    #[error("signals: {0}")]
    Signals(Errno),
}

/// Whether this process runs the guest for another one's `--boot`.
pub fn is_child() -> bool {
    let parent = std::env::var(PARENT).ok().and_then(|p| p.parse().ok());
    parent.is_some_and(|p: i32| Pid::from_raw(p) == getppid())
}

/// What the child of a `--boot` does first: if its parent dies, the guest is asked
/// to power off.
pub fn follow_parent() {
    #[cfg(target_os = "linux")]
    if let Err(e) = nix::sys::prctl::set_pdeathsig(Signal::SIGTERM) {
        eprintln!(
            "bhyve: the end of process {} will not be noticed: {e}",
            getppid()
        );
    }
}

/// Loads, runs, loads again; the exit status is 0 for a guest that powered
/// itself off, else bhyve's.
///
/// # Errors
/// [`Error`]; there is no VM left then either.
pub fn run(config: &Config) -> Result<i32, Error> {
    let mut settings = config.settings();
    settings
        .values
        .retain(|s| !matches!(s.key.path, "run.boot" | "run.destroy_on_poweroff"));
    let sources = ["disk", "host", "kernel", "linux", "multiboot"];
    if !sources
        .iter()
        .any(|s| settings.get(&format!("boot.{s}")).is_some())
    {
        return Err(Error::Nothing);
    }
    let children = Arc::new(Children::default());
    listen(Arc::clone(&children))?;
    let mut made = Made(None);
    loop {
        if !children.follow(Program::Bhyveload, &settings)?.success() {
            return Err(Error::Load);
        }
        made.0 = Some(config.name.clone());
        let status = children.follow(Program::Bhyve, &settings)?;
        match status.code() {
            Some(0) => {}
            Some(1) => return Ok(0),
            Some(code) => return Ok(code),
            None => {
                let signal = status.signal().unwrap_or(0);
                eprintln!("bhyve: the guest's process ended by signal {signal}");
                return Ok(ERROR);
            }
        }
    }
}

/// The VM that is ours, to be destroyed whatever happens.
struct Made(Option<String>);

impl Drop for Made {
    fn drop(&mut self) {
        if let Some(name) = &self.0
            && let Err(e) = vmmapi::Vm::destroy(name)
            && !e.is_not_found()
        {
            eprintln!("bhyve: {e}");
        }
    }
}

/// Hands signals that ask for an end on to the child, as SIGTERM.
fn listen(children: Arc<Children>) -> Result<(), Error> {
    let mut set = SigSet::empty();
    for s in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        set.add(s);
    }
    set.thread_block().map_err(Error::Signals)?;
    std::thread::spawn(move || {
        while set.wait().is_ok() {
            let mut state = lock(&children.state);
            state.ending = true;
            if let Some(pid) = state.child
                && let Err(e) = kill(pid, Signal::SIGTERM)
            {
                eprintln!("bhyve: process {pid}: {e}");
            }
        }
    });
    Ok(())
}

#[derive(Default)]
struct State {
    child: Option<Pid>,
    /// Somebody asked for an end.
    ending: bool,
}

/// The child of the moment.
#[derive(Default)]
struct Children {
    state: Mutex<State>,
}

impl Children {
    /// Starts a program and waits for its end.
    fn follow(&self, which: Program, settings: &Settings) -> Result<ExitStatus, Error> {
        let mut child = {
            let mut state = lock(&self.state);
            if state.ending {
                return Err(Error::Ended);
            }
            let child = spawn(which, settings)?;
            state.child = Some(Pid::from_raw(child.id().cast_signed()));
            child
        };
        // The process stays until it has been taken off: no signal may reach
        // another one of its number.
        let pid = Pid::from_raw(child.id().cast_signed());
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
        while waitid(Id::Pid(pid), flags) == Err(Errno::EINTR) {}
        lock(&self.state).child = None;
        child
            .wait()
            .map_err(|e| Error::Start("waiting for a child".into(), e))
    }
}

/// The program's file: beside this one, or where the shell would look.
fn program(name: &str) -> PathBuf {
    let beside = std::env::current_exe()
        .ok()
        .map(|me| me.with_file_name(name));
    beside
        .filter(|p| p.is_file())
        .unwrap_or_else(|| name.into())
}

fn spawn(which: Program, settings: &Settings) -> Result<Child, Error> {
    let path = match which {
        Program::Bhyveload => program("bhyveload"),
        Program::Bhyve => std::env::current_exe().unwrap_or_else(|_| program("bhyve")),
    };
    let all = settings.arguments(which);
    let words: Vec<OsString> = all
        .iter()
        .flat_map(Argument::words)
        .map(Into::into)
        .collect();
    Command::new(&path)
        .args(words)
        .env(PARENT, std::process::id().to_string())
        .spawn()
        .map_err(|e| Error::Start(path.display().to_string(), e))
}
