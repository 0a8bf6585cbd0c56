//! `--boot` as far as it goes without a kernel: what the parent process does with
//! its children. Their parts are played by scripts.
#![forbid(unsafe_code)]

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// One at a time: a process that one test starts holds for a moment what another is
/// writing, and then that cannot be executed.
static ALONE: Mutex<()> = Mutex::new(());

/// bhyve in a folder of its own, with this for bhyveload.
fn folder(bhyveload: &str) -> (tempfile::TempDir, MutexGuard<'static, ()>) {
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let top = tempfile::tempdir().unwrap();
    std::fs::copy(env!("CARGO_BIN_EXE_bhyve"), top.path().join("bhyve")).unwrap();
    let script = top.path().join("bhyveload");
    std::fs::write(&script, format!("#!/bin/sh\n{bhyveload}\n")).unwrap();
    std::fs::set_permissions(&script, PermissionsExt::from_mode(0o755)).unwrap();
    std::fs::write(
        top.path().join("vm.toml"),
        "name = \"boot-test-no-such-vm\"\nmemory.size = \"64M\"\n[boot]\nkernel = \"/a b\"\n",
    )
    .unwrap();
    (top, alone)
}

fn bhyve(top: &Path) -> Command {
    let mut command = Command::new(top.join("bhyve"));
    command
        .current_dir(top)
        .args(["--config", "vm.toml", "--boot"]);
    command
}

#[test]
fn what_is_loaded_is_the_files() {
    let (top, _alone) = folder("for word; do echo \"<$word>\"; done; exit 3");
    let out = bhyve(top.path()).output().unwrap();
    assert_eq!(
        String::from_utf8_lossy(&out.stdout),
        "<-m>\n<64M>\n<--kernel>\n</a b>\n<boot-test-no-such-vm>\n"
    );
    assert_eq!(out.status.code(), Some(4));
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(said.contains("could not be loaded"), "{said}");
}

#[test]
fn without_anything_to_load_it_says_so() {
    let (top, _alone) = folder("exit 0");
    let out = Command::new(top.path().join("bhyve"))
        .args(["--boot", "vm"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(said.contains("[boot]"), "{said}");
}

#[test]
fn a_signal_ends_the_child_and_nothing_is_started_after_it() {
    let (top, _alone) =
        folder("trap 'echo ended; exit 0' TERM; echo up; while :; do sleep 0.1; done");
    let mut child = bhyve(top.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "up");
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT).unwrap();
    assert_eq!(lines.next().unwrap().unwrap(), "ended");
    let out = child.wait_with_output().unwrap();
    assert_eq!(out.status.code(), Some(4));
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(said.contains("ended by a signal"), "{said}");
}
