//! The parts of `buildworld` that need no FreeBSD: arguments, the order of
//! rounds, statistics.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("buildworld/buildworld")
}

fn run(args: &[&str]) -> Output {
    Command::new("sh")
        .arg(script())
        .args(args)
        .output()
        .expect("sh runs")
}

fn stdout(args: &[&str]) -> String {
    let out = run(args);
    assert!(
        out.status.success(),
        "{args:?}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8(out.stdout).unwrap()
}

fn complaint(args: &[&str]) -> String {
    let out = run(args);
    assert!(!out.status.success(), "{args:?} was accepted");
    String::from_utf8(out.stderr).unwrap()
}

/// The table's line of a mode, in words.
fn line(table: &str, mode: &str) -> Vec<String> {
    let line = table.lines().find(|l| l.starts_with(mode));
    line.unwrap_or_else(|| panic!("no {mode} in {table}"))
        .split_whitespace()
        .map(str::to_owned)
        .collect()
}

/// What a command says of files with these contents.
fn of_files(command: &str, contents: &[&str]) -> Output {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let call = NEXT.fetch_add(1, Ordering::Relaxed);
    let files: Vec<PathBuf> = (0..contents.len())
        .map(|i| std::env::temp_dir().join(format!("buildworld-{}-{call}-{i}", std::process::id())))
        .collect();
    let mut args = vec![command];
    for (file, text) in files.iter().zip(contents) {
        std::fs::write(file, text).unwrap();
        args.push(file.to_str().unwrap());
    }
    let out = run(&args);
    for file in &files {
        std::fs::remove_file(file).unwrap();
    }
    out
}

fn table(results: &str) -> Output {
    of_files("stats", &[results])
}

#[test]
fn statistics() {
    let out = table(
        "# mode round seconds user sys exits\n\
         native 1 102 190 5 0\nours 1 104 191 6 1000\n\
         native 2 100 200 7 0\nours 2 103 191 6 3000\n\
         native 3 108 195 6 0\n",
    );
    let text = String::from_utf8(out.stdout).unwrap();
    // Median of three and of two, extremes, the sample's deviation, means.
    let native = line(&text, "native");
    assert_eq!(
        native[1..],
        [
            "3", "102.00", "100.00", "108.00", "4.16", "195.00", "6.00", "0.0"
        ]
    );
    let ours = line(&text, "ours");
    assert_eq!(ours[2], "103.50");
    // 4000 exits in 207 seconds; 103.5 ÷ 102; 103 ÷ 108 to 104 ÷ 100.
    assert_eq!(ours[8..], ["19.3", "1.0147", "(0.9537", "to", "1.0400)"]);
}

#[test]
fn results_of_several_boots_are_one_table() {
    let out = of_files(
        "stats",
        &[
            "native 1 100 190 5 0\n",
            "ours 1 104 191 6 1000\nours 2 102 191 6 0\n",
        ],
    );
    let text = String::from_utf8(out.stdout).unwrap();
    assert_eq!(line(&text, "ours")[9], "1.0300");
    assert!(!text.contains("ours to stock"));
}

#[test]
fn ours_and_stock_are_compared() {
    let out = table("ours 1 90 1 1 0\nours 2 110 1 1 0\nours 3 99 1 1 0\nstock 1 120 1 1 0\n");
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(
        text.ends_with("ours to stock:   0.8250 (0.7500 to 0.9167)\n"),
        "{text}"
    );
}

#[test]
fn only_exits_of_the_job_count() {
    let out = of_files(
        "between",
        &[
            "100 total number of vm exits\n7 vm exits due to apic write\n4096 Resident memory\n",
            "150 total number of vm exits\n7 vm exits due to apic write\n8192 Resident memory\n",
        ],
    );
    assert_eq!(
        String::from_utf8(out.stdout).unwrap(),
        "50 total number of vm exits\n0 vm exits due to apic write\n"
    );
}

#[test]
fn results_that_are_none_are_named() {
    let out = table("native 1 100 1 1 0\nours 1 fast 1 1 0\n");
    assert!(!out.status.success());
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(
        text.contains("line 2") && text.contains("ours 1 fast"),
        "{text}"
    );
    assert!(!table("# nothing\n").status.success());
}

#[test]
fn counts_of_several_vcpus_are_added() {
    use std::io::Write;
    let mut child = Command::new("sh")
        .arg(script())
        .arg("sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let stats = "vcpu0 stats:\ntotal number of vm exits                \t100\n\
                 vm exits due to apic write\t 7\n\
                 total number of vm exits                \t11\n";
    child
        .stdin
        .take()
        .unwrap()
        .write_all(stats.as_bytes())
        .unwrap();
    let out = child.wait_with_output().unwrap();
    assert_eq!(
        String::from_utf8(out.stdout).unwrap(),
        "111 total number of vm exits\n7 vm exits due to apic write\n"
    );
}

#[test]
fn rounds_take_turns_and_guests_and_host_are_matched() {
    let plan = stdout(&[
        "run",
        "--image",
        "/disks/world.img",
        "--ours",
        "/opt/ours",
        "--cpus",
        "4",
        "--memory",
        "6G",
        "--rounds",
        "2",
        "--dry-run",
    ]);
    let order: Vec<&str> = plan
        .lines()
        .filter_map(|l| l.strip_prefix("+ result "))
        .map(|l| &l[..l.len() - " 0 0 0 0".len()])
        .collect();
    assert_eq!(
        order,
        [
            "native 1", "ours 1", "stock 1", "native 2", "ours 2", "stock 2"
        ]
    );
    assert!(plan.contains("cpuset -l 0-3 chroot"));
    let guests: Vec<&str> = plan.lines().filter(|l| l.contains("-c 4 -m 6G")).collect();
    assert_eq!(guests.len(), 4);
    assert!(
        guests
            .iter()
            .all(|l| l.contains("virtio-blk,/disks/world.img"))
    );
    assert_eq!(plan.matches("kldload /opt/ours/vmm.ko").count(), 2);
    // Whatever was mounted is not when a guest has the disk.
    let mut mounted = false;
    for l in plan.lines() {
        mounted = l.starts_with("+ mount /dev/md0p2")
            || mounted && !(l.starts_with("+ umount ") && l.ends_with(".mnt"));
        assert!(!(mounted && l.contains("virtio-blk")), "{l}");
    }
}

#[test]
fn wrong_arguments_are_named() {
    for (args, names) in [
        (&["run"][..], "--image"),
        (&["run", "--image", "x", "--rounds", "0"], "--rounds 0"),
        (&["run", "--image", "x", "--cpus", "two"], "--cpus two"),
        (&["run", "--image", "x", "--memory", "4X"], "--memory 4X"),
        (
            &["run", "--image", "x", "--memory", "4096"],
            "--memory 4096",
        ),
        (
            &["run", "--image", "x", "--modes", "xen"],
            "there are native, ours and stock",
        ),
        (&["run", "--image", "x"], "--ours DIR"),
        (&["run", "--image"], "wants a value"),
        (&["run", "--imgae", "x"], "--imgae: no such option"),
        (&["stats", "/nonexistent/results"], "no such file"),
        (&["build"], "prepare, run and stats"),
    ] {
        let said = complaint(args);
        assert!(said.contains(names), "{args:?}: {said}");
    }
}

#[test]
fn on_another_system_it_says_so() {
    if cfg!(target_os = "freebsd") {
        return;
    }
    let said = complaint(&["run", "--image", "x", "--modes", "native"]);
    assert!(said.contains("it needs FreeBSD"), "{said}");
}
