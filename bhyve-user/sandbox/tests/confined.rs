//! What a confined process can and cannot do. The process is this test once more:
//! there is no way back out of a sandbox.
#![cfg(target_os = "linux")]
#![forbid(unsafe_code)]

use bhyve_sandbox::{Mode, Needs, enter, join};
use std::fs::File;
use std::io::{ErrorKind, IsTerminal, Read, Write};
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

const ROLE: &str = "SANDBOX_TEST_FOLDER";

/// Runs a test of this file again, as the process to be confined.
fn confined(test: &str, folder: &Path) {
    let out = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(ROLE, folder)
        .output()
        .unwrap();
    assert!(
        out.status.success(),
        "{}\n{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
}

fn role() -> Option<PathBuf> {
    std::env::var_os(ROLE).map(PathBuf::from)
}

fn is_refused<T>(result: std::io::Result<T>) -> bool {
    result.is_err_and(|e| e.kind() == ErrorKind::PermissionDenied)
}

#[test]
fn what_is_open_goes_on_and_nothing_new_comes() {
    let Some(folder) = role() else {
        let top = tempfile::tempdir().unwrap();
        std::fs::write(top.path().join("open"), b"open before").unwrap();
        return confined("what_is_open_goes_on_and_nothing_new_comes", top.path());
    };
    let mut open = File::open(folder.join("open")).unwrap();
    let (asked, wanted) = mpsc::channel::<()>();
    let (refusals, seen) = mpsc::channel();
    // A thread from before is confined as well.
    let early = std::thread::spawn({
        let file = folder.join("open");
        move || {
            wanted.recv().unwrap();
            is_refused(File::open(file))
        }
    });
    enter(Mode::On, &Needs::default(), move |call| {
        refusals.send(call.to_owned()).unwrap();
    })
    .unwrap();

    let mut text = String::new();
    open.read_to_string(&mut text).unwrap();
    assert_eq!(text, "open before");
    // An ioctl; if it were refused, that would be said below.
    assert!(!open.is_terminal());
    assert_eq!(std::thread::spawn(|| 6 * 7).join().unwrap(), 42);
    drop(vec![1_u8; 64 << 20]);
    std::thread::sleep(Duration::from_millis(1));

    asked.send(()).unwrap();
    assert!(early.join().unwrap(), "a thread from before");
    assert!(is_refused(File::open(folder.join("open"))));
    assert!(is_refused(File::create(folder.join("new"))));
    assert!(is_refused(TcpListener::bind("127.0.0.1:0")));
    assert!(is_refused::<()>(Err(Command::new("/bin/true").exec())));
    let mut said = Vec::new();
    while let Ok(call) = seen.recv_timeout(Duration::from_secs(5)) {
        said.push(call);
        if said.len() >= 5 {
            break;
        }
    }
    assert_eq!(said, ["openat", "openat", "openat", "socket", "execve"]);
}

#[test]
fn a_folder_stays_within_reach_and_nothing_beside_it() {
    let Some(top) = role() else {
        let top = tempfile::tempdir().unwrap();
        std::fs::create_dir(top.path().join("shared")).unwrap();
        std::fs::create_dir(top.path().join("read")).unwrap();
        std::fs::write(top.path().join("secret"), b"s").unwrap();
        std::fs::write(top.path().join("read/a"), b"a").unwrap();
        std::os::unix::fs::symlink("../secret", top.path().join("shared/link")).unwrap();
        return confined(
            "a_folder_stays_within_reach_and_nothing_beside_it",
            top.path(),
        );
    };
    let needs = Needs {
        read: [top.join("read")].into(),
        write: [top.join("shared")].into(),
        ..Needs::default()
    };
    let (go, wait) = mpsc::channel::<()>();
    let early = std::thread::spawn({
        let secret = top.join("secret");
        move || {
            wait.recv().unwrap();
            join().unwrap();
            is_refused(File::open(secret))
        }
    });
    let report = enter(Mode::On, &needs, |_| {}).unwrap();
    let mut file = File::create(top.join("shared/new")).unwrap();
    file.write_all(b"new").unwrap();
    assert_eq!(std::fs::read(top.join("read/a")).unwrap(), b"a");
    if !report.lacking.is_empty() {
        eprintln!("no Landlock here: {:?}", report.lacking);
        return;
    }
    go.send(()).unwrap();
    assert!(
        early.join().unwrap(),
        "a thread from before that has joined"
    );
    assert!(is_refused(File::create(top.join("read/b"))));
    assert!(is_refused(File::open(top.join("secret"))));
    assert!(is_refused(File::open(top.join("shared/link"))));
    assert!(is_refused(File::open(top.join("shared/../secret"))));
}

#[test]
fn sockets_of_the_wanted_kind_only() {
    if role().is_none() {
        return confined("sockets_of_the_wanted_kind_only", Path::new("/"));
    }
    let needs = Needs {
        network: true,
        ..Needs::default()
    };
    enter(Mode::On, &needs, |_| {}).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    assert!(is_refused(std::os::unix::net::UnixStream::connect("/x")));
    assert!(is_refused(File::open("/etc/passwd")));
}
