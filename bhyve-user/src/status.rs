//! What a running bhyve tells of itself: counters of exits and rings, on a Unix
//! socket in the run directory of the VM's user. Whoever connects gets one JSON
//! document; nobody is told anything unasked, so that it costs nothing.
//!
//! The directory is `/run/bhyve` for root (`/var/run/bhyve` on FreeBSD), else
//! `$XDG_RUNTIME_DIR/bhyve` or `/tmp/bhyve-UID`, mode 0700. A socket that nobody
//! answers on has been left by a process that is gone.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::unistd::{Uid, geteuid};
use serde::{Deserialize, Serialize};

use crate::{lock, sandbox};

/// How long somebody who asks may take to listen, and an answer to come.
const PATIENCE: Duration = Duration::from_secs(2);
/// Longer answers are not read.
const LONGEST: u64 = 4 << 20;

/// What one queue of a device has done. One thread writes it.
#[derive(Debug, Default)]
pub struct RingCounter {
    requests: AtomicU64,
    bytes: AtomicU64,
}

impl RingCounter {
    /// A request is done that moved so many bytes, both ways together.
    #[inline]
    pub fn count(&self, bytes: u64) {
        // One writer: no need for an atomic addition.
        let add = |c: &AtomicU64, n| {
            c.store(c.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
        };
        add(&self.requests, 1);
        add(&self.bytes, bytes);
    }
}

/// Rings by device, for the one VM of this process.
static RINGS: Mutex<Vec<(String, Vec<Arc<RingCounter>>)>> = Mutex::new(Vec::new());

/// Has a device's counters shown, one a queue.
pub fn show_rings(device: &str, counters: Vec<Arc<RingCounter>>) {
    lock(&RINGS).push((device.into(), counters));
}

/// A vCPU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuStatus {
    /// Its number.
    pub id: u32,
    /// What came to userland, by kind.
    pub exits: BTreeMap<String, u64>,
}

/// A queue.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingStatus {
    /// The device: emulation and slot.
    pub device: String,
    /// The queue's number.
    pub queue: usize,
    /// Requests done.
    pub requests: u64,
    /// Bytes moved by them, both ways together.
    pub bytes: u64,
}

/// What is told.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// 1.
    pub version: u32,
    /// The VM.
    pub vm: String,
    /// The process.
    pub pid: u32,
    /// When it began, seconds since 1970.
    pub started: u64,
    /// Its vCPUs.
    pub vcpus: Vec<VcpuStatus>,
    /// Queues that were used.
    pub rings: Vec<RingStatus>,
}

/// Queues that have served something.
pub fn rings() -> Vec<RingStatus> {
    let all = lock(&RINGS);
    let each = all.iter().flat_map(|(device, counters)| {
        counters.iter().enumerate().map(|(queue, c)| RingStatus {
            device: device.clone(),
            queue,
            requests: c.requests.load(Ordering::Relaxed),
            bytes: c.bytes.load(Ordering::Relaxed),
        })
    });
    each.filter(|r| r.requests > 0).collect()
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs())
}

/// The run directory of a user.
pub fn directory(user: Uid) -> PathBuf {
    if user.is_root() {
        return PathBuf::from(match cfg!(target_os = "freebsd") {
            true => "/var/run/bhyve",
            false => "/run/bhyve",
        });
    }
    if user == geteuid()
        && let Some(runtime) = std::env::var_os("XDG_RUNTIME_DIR").filter(|d| !d.is_empty())
    {
        return Path::new(&runtime).join("bhyve");
    }
    PathBuf::from(format!("/tmp/bhyve-{user}"))
}

fn socket_in(directory: &Path, vm: &str) -> PathBuf {
    directory.join(format!("{vm}.status"))
}

/// Starts to answer; `vcpus` is asked each time.
///
/// # Errors
/// The directory is another user's, or the socket cannot be made.
pub fn serve(
    vm: &str,
    vcpus: impl Fn() -> Vec<VcpuStatus> + Send + 'static,
) -> io::Result<PathBuf> {
    serve_in(&directory(geteuid()), vm, vcpus)
}

fn serve_in(
    directory: &Path,
    vm: &str,
    vcpus: impl Fn() -> Vec<VcpuStatus> + Send + 'static,
) -> io::Result<PathBuf> {
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true).mode(0o700).create(directory)?;
    let metadata = std::fs::symlink_metadata(directory)?;
    // Anybody can have made a folder in /tmp.
    if !metadata.is_dir() || metadata.uid() != geteuid().as_raw() || metadata.mode() & 0o022 != 0 {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "is not a folder of this user's alone",
        ));
    }
    let path = socket_in(directory, vm);
    // This process runs the VM: whoever had the name before is gone.
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(&path)?;
    sandbox::limit(&listener, sandbox::Purpose::Listener)?;
    let (vm, started) = (vm.to_owned(), now());
    std::thread::Builder::new()
        .name("status".into())
        .stack_size(128 << 10)
        .spawn(move || {
            sandbox::join();
            for stream in listener.incoming() {
                let status = Status {
                    version: 1,
                    vm: vm.clone(),
                    pid: std::process::id(),
                    started,
                    vcpus: vcpus(),
                    rings: rings(),
                };
                // Who has gone away meanwhile is not to be told.
                match stream {
                    Ok(stream) => drop(answer(stream, &status)),
                    Err(_) => crate::pause::sleep(Duration::from_millis(200)),
                }
            }
        })?;
    Ok(path)
}

fn answer(mut stream: UnixStream, status: &Status) -> io::Result<()> {
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(&serde_json::to_vec(status)?)
}

/// What the bhyve of a VM tells. `None` if none of this user's, or of root's,
/// answers. A socket that was left behind is removed where that is allowed.
///
/// # Errors
/// It answers, but not in words that can be understood.
pub fn ask(vm: &str) -> io::Result<Option<Status>> {
    let mut directories = vec![directory(geteuid())];
    directories.push(directory(Uid::from_raw(0)));
    directories.dedup();
    for directory in directories {
        if let Some(status) = ask_in(&directory, vm)? {
            return Ok(Some(status));
        }
    }
    Ok(None)
}

/// As [`ask`], of a bhyve that another user runs; for root.
///
/// # Errors
/// As for [`ask`].
pub fn ask_of(user: Uid, vm: &str) -> io::Result<Option<Status>> {
    // Where systemd has $XDG_RUNTIME_DIR of a user who is logged in.
    let runtime = PathBuf::from(format!("/run/user/{user}/bhyve"));
    for directory in [runtime, directory(user)] {
        if let Some(status) = ask_in(&directory, vm)? {
            return Ok(Some(status));
        }
    }
    Ok(None)
}

fn ask_in(directory: &Path, vm: &str) -> io::Result<Option<Status>> {
    let path = socket_in(directory, vm);
    let stream = match UnixStream::connect(&path) {
        Ok(stream) => stream,
        Err(e) => {
            if e.kind() == io::ErrorKind::ConnectionRefused {
                // Nobody listens; if it is not ours to remove it stays.
                let _ = std::fs::remove_file(&path);
            }
            return Ok(None);
        }
    };
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut text = Vec::new();
    stream.take(LONGEST).read_to_end(&mut text)?;
    let status: Status = serde_json::from_slice(&text)?;
    Ok((status.vm == vm).then_some(status))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn what_is_counted_is_told_and_a_dead_socket_is_nobody() {
        let top = tempfile::tempdir().unwrap();
        let directory = top.path().join("run");
        let ring = Arc::new(RingCounter::default());
        ring.count(4096);
        ring.count(512);
        show_rings("virtio-blk status-test", vec![Arc::default(), ring]);
        let vcpus = || {
            vec![VcpuStatus {
                id: 1,
                exits: BTreeMap::from([("inout".to_owned(), 7)]),
            }]
        };
        let path = serve_in(&directory, "vm", vcpus).unwrap();
        assert_eq!(
            std::fs::metadata(&directory).unwrap().permissions().mode() & 0o777,
            0o700
        );
        let status = ask_in(&directory, "vm").unwrap().unwrap();
        assert_eq!((status.pid, status.vcpus), (std::process::id(), vcpus()));
        let mine = |r: &&RingStatus| r.device == "virtio-blk status-test";
        let rings: Vec<_> = status.rings.iter().filter(mine).collect();
        assert_eq!(rings.len(), 1, "queues without requests are left out");
        assert_eq!(
            (rings[0].queue, rings[0].requests, rings[0].bytes),
            (1, 2, 4608)
        );

        assert_eq!(ask_in(&directory, "other").unwrap(), None);
        let dead = socket_in(&directory, "dead");
        drop(UnixListener::bind(&dead).unwrap());
        assert_eq!(ask_in(&directory, "dead").unwrap(), None);
        assert!(!dead.exists());
        drop(path);
    }

    #[test]
    fn a_folder_that_others_write_to_is_not_used() {
        let top = tempfile::tempdir().unwrap();
        let open = std::fs::Permissions::from_mode(0o777);
        std::fs::set_permissions(top.path(), open).unwrap();
        assert!(serve_in(top.path(), "vm", Vec::new).is_err());
    }
}
