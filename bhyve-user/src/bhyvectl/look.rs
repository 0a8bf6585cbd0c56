//! A look at VMs from outside: what the kernel counts, and what the bhyve that
//! runs one tells of itself.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;

use nix::errno::Errno;
use nix::unistd::{Uid, User};
use serde::Serialize;
use vmmapi::abi::limits::VM_SYSMEM;
use vmmapi::{CpusetWhich, Error, Vm};

use crate::status::{self, Status};

/// How a VM is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// A bhyve runs it.
    Running,
    /// Loaded, and nobody has run it yet.
    Loaded,
    /// It was run, and is still there.
    Ended,
    /// It has no memory yet.
    Empty,
    /// It is another user's.
    NoAccess,
    /// It is being destroyed.
    GoingAway,
    /// The kernel does not tell.
    Unknown,
}

impl State {
    /// In a word.
    pub fn word(self) -> &'static str {
        match self {
            State::Running => "running",
            State::Loaded => "loaded",
            State::Ended => "ended",
            State::Empty => "empty",
            State::NoAccess => "no access",
            State::GoingAway => "going away",
            State::Unknown => "unknown",
        }
    }
}

/// A vCPU's counters.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Cpu {
    /// Its number.
    pub id: u32,
    /// The kernel's statistics, by their descriptions.
    pub kernel: BTreeMap<String, u64>,
    /// What came to bhyve, by kind; empty where it does not tell.
    pub userland: BTreeMap<String, u64>,
}

/// A VM as it is now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Look {
    /// Its name.
    pub name: String,
    /// How it is doing.
    pub state: State,
    /// What there is to say about that, in words.
    pub note: String,
    /// Owner of its device node.
    pub owner: String,
    /// The bhyve that runs it.
    pub pid: Option<u32>,
    /// When that began, seconds since 1970.
    pub started: Option<u64>,
    /// Guest memory, bytes.
    pub memory: u64,
    /// How much of it is there, bytes; absent where the kernel does not tell.
    pub resident: Option<u64>,
    /// vCPUs that were started.
    pub vcpus: Vec<Cpu>,
    /// Queues of devices; empty where bhyve does not tell.
    pub rings: Vec<status::RingStatus>,
}

/// FreeBSD's word for memory that is there, in its statistics.
const RESIDENT: &str = "Resident memory";

/// The name of a user, or the number.
fn user(id: u32) -> String {
    let found = User::from_uid(Uid::from_raw(id));
    found
        .ok()
        .flatten()
        .map_or_else(|| id.to_string(), |u| u.name)
}

/// A look at one VM.
///
/// # Errors
/// There is none of that name, or it cannot be a name.
pub fn look(name: &str) -> Result<Look, Error> {
    let owner = std::fs::metadata(format!("/dev/vmm/{name}"))
        .map_or_else(|_| "?".into(), |m| user(m.uid()));
    let mut look = Look {
        name: name.into(),
        state: State::Unknown,
        note: String::new(),
        owner,
        pid: None,
        started: None,
        memory: 0,
        resident: None,
        vcpus: Vec::new(),
        rings: Vec::new(),
    };
    match Vm::open(name) {
        Ok(vm) => fill(&mut look, &vm),
        Err(e) => match e.errno().map(Errno::from_raw) {
            Some(Errno::EACCES | Errno::EPERM) => {
                look.state = State::NoAccess;
                look.note = format!("belongs to {}; look as that user or as root", look.owner);
            }
            Some(Errno::ENXIO | Errno::ENODEV) => {
                look.state = State::GoingAway;
                look.note =
                    "is being destroyed; a process that has it open keeps its memory".into();
            }
            Some(Errno::EBUSY) => {
                look.state = State::Running;
                look.note = "the kernel lets only the process that runs it look".into();
            }
            _ => return Err(e),
        },
    }
    Ok(look)
}

fn fill(look: &mut Look, vm: &Vm) {
    let holders = holders(&look.name);
    let mut answer = status::ask(&look.name);
    if let (Ok(None), Some((_, _, user))) = (&answer, holders.first()) {
        answer = status::ask_of(Uid::from_raw(*user), &look.name);
    }
    let told = match answer {
        Ok(told) => told,
        Err(e) => {
            look.note = format!("its bhyve's counters cannot be read: {e}");
            None
        }
    };
    look.memory = vm.mappings().map_or(0, |all| {
        let system = all.iter().filter(|m| m.segid == VM_SYSMEM);
        system.map(|m| m.len).sum()
    });
    let active = vm.cpus(CpusetWhich::Active).unwrap_or_default();
    for id in active.iter() {
        look.vcpus.push(cpu(vm, id, told.as_ref()));
    }
    // Memory is counted with the first vCPU, started or not.
    let first = look.vcpus.iter().find(|c| c.id == 0);
    look.resident = first
        .map(|c| c.kernel.clone())
        .or_else(|| stats(vm, 0))
        .and_then(|s| s.get(RESIDENT).copied());
    if let Some(told) = told {
        look.state = State::Running;
        look.pid = Some(told.pid);
        look.started = Some(told.started);
        look.rings = told.rings;
        return;
    }
    (look.state, look.note) = if let Some((pid, program, _)) = holders.first() {
        look.pid = Some(*pid);
        let note = format!("by {program}, which tells no counters");
        (State::Running, note)
    } else if is_busy(vm) {
        (State::Running, "by a process that tells no counters".into())
    } else if active.count() > 0 {
        let note = format!(
            "nobody runs it any more: load it again, or bhyvectl --vm={} --destroy",
            look.name
        );
        (State::Ended, note)
    } else if look.memory > 0 {
        (State::Loaded, "nobody runs it yet".into())
    } else {
        (State::Empty, "nothing is loaded".into())
    };
}

fn stats(vm: &Vm, id: u32) -> Option<BTreeMap<String, u64>> {
    let all = vm.vcpu(id).stats().ok()?;
    Some(all.into_iter().map(|s| (s.desc, s.value)).collect())
}

fn cpu(vm: &Vm, id: u32, told: Option<&Status>) -> Cpu {
    let userland = told.and_then(|t| t.vcpus.iter().find(|v| v.id == id));
    Cpu {
        id,
        kernel: stats(vm, id).unwrap_or_default(),
        userland: userland.map(|v| v.exits.clone()).unwrap_or_default(),
    }
}

/// FreeBSD's kernel shows no register of a vCPU that runs.
fn is_busy(vm: &Vm) -> bool {
    let rip = vm.vcpu(0).register(vmmapi::RegName::Rip);
    cfg!(target_os = "freebsd") && rip.is_err_and(|e| e.errno() == Some(Errno::EBUSY as i32))
}

/// Other processes that have a VM's node open, as far as we may see them: number,
/// program and user.
#[cfg(target_os = "linux")]
fn holders(name: &str) -> Vec<(u32, String, u32)> {
    let node = std::path::PathBuf::from(format!("/dev/vmm/{name}"));
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbered = processes.filter_map(|p| {
        let pid: u32 = p.file_name().to_str()?.parse().ok()?;
        Some((pid, p.path()))
    });
    let holds = |folder: &std::path::Path| {
        let files = std::fs::read_dir(folder.join("fd"))
            .into_iter()
            .flatten()
            .flatten();
        let mut links = files.filter_map(|f| std::fs::read_link(f.path()).ok());
        links.any(|l| l == node)
    };
    numbered
        .filter(|(pid, folder)| *pid != std::process::id() && holds(folder))
        .map(|(pid, folder)| {
            let program = std::fs::read_to_string(folder.join("comm")).unwrap_or_default();
            let user = std::fs::metadata(&folder).map_or(0, |m| m.uid());
            (pid, program.trim().to_owned(), user)
        })
        .collect()
}

#[cfg(not(target_os = "linux"))]
fn holders(_: &str) -> Vec<(u32, String, u32)> {
    Vec::new()
}

/// A look at every VM.
///
/// # Errors
/// `/dev/vmm` cannot be read.
pub fn all() -> Result<Vec<Look>, Error> {
    let names = Vm::list()?;
    Ok(names
        .iter()
        .filter_map(|name| match look(name) {
            Ok(look) => Some(look),
            // Gone meanwhile.
            Err(e) if e.is_not_found() => None,
            Err(e) => Some(Look {
                name: name.clone(),
                state: State::Unknown,
                note: e.to_string(),
                owner: "?".into(),
                pid: None,
                started: None,
                memory: 0,
                resident: None,
                vcpus: Vec::new(),
                rings: Vec::new(),
            }),
        })
        .collect())
}
