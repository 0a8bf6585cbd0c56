//! Linux from its own disk, an ext4 file system that Debian's mke2fs has made, with
//! a queue for each of its vCPUs, of the disk and of the network; a kill -9, and what
//! is left after it.

use super::share::c_program;
use super::virtio::{BUS, base, kill, types};
use crate::busybox;
use crate::guest::{Guest, Load, linux_cmdline, shell};
use crate::host::{self, Config, Host, SHORT};
use crate::machine::Engine;
use crate::runner::{Case, Group, Lab};
use anyhow::{Context, Result, ensure};
use regex::Regex;
use serde_json::Value;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// From bhyve's start to the guest's shell.
const UP: Duration = Duration::from_secs(300);
const DISK: &str = "/tmp/root";
const DEVICES: &str = "-s 4,virtio-blk,/tmp/root -s 5,virtio-net,tap1,queues=2";
/// What mounts the disk: its driver.
const MODULES: [&str; 1] = ["drivers/block/virtio_blk.ko"];

/// The host and its test. Linux does not care what runs it: where there is a choice
/// of emulators it is the faster one.
///
/// # Errors
/// A file cannot be made.
pub fn group(lab: &Lab) -> Result<Group> {
    let engine = match lab.engine {
        Engine::Bochs => Engine::Qemu,
        other => other,
    };
    let mut config = Config::new(engine, 256);
    let program = c_program(&lab.dirs, "queues", include_str!("../../host/queues.c"))?;
    config.file("queues", &program);
    let intrude = c_program(&lab.dirs, "intrude", include_str!("../../host/intrude.c"))?;
    config.file("intrude", &intrude);
    config.file("guest/root-disk", &disk(lab, &program)?);
    config.file("tun.ko", &lab.kit.kernel.modules.join(super::net::TUN));
    let modules = BUS.iter().chain(&MODULES);
    let mut files: Vec<(String, PathBuf)> = modules
        .map(|m| {
            let path = lab.kit.kernel.modules.join(m);
            Ok((base(&path)?, path))
        })
        .collect::<Result<_>>()?;
    // In their order, which is also the sign that the root is elsewhere.
    let names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
    let list = lab.dirs.fresh("root-modules")?.join("modules");
    fs::write(&list, names.join("\n"))?;
    files.push(("modules".to_owned(), list));
    let initrd = host::guest_initrd_with(&lab.dirs, "guest-root", &files)?;
    config.file("guest/linux", &lab.kit.kernel.image);
    config.file("guest/initrd", &initrd);
    Ok(Group {
        name: "linux-disk".to_owned(),
        config,
        cases: vec![Case::new("linux-disk", survives)],
    })
}

/// The guest's disk: a file system with all that its userland needs.
fn disk(lab: &Lab, program: &Path) -> Result<PathBuf> {
    let dir = lab.dirs.fresh("root-disk")?;
    let root = dir.join("root");
    for name in ["bin", "dev", "proc", "sys", "tmp", "sbin", "root"] {
        fs::create_dir_all(root.join(name))?;
    }
    fs::copy(busybox::ensure(&lab.dirs)?, root.join("bin/busybox"))?;
    fs::copy(program, root.join("bin/queues"))?;
    fs::write(root.join("sbin/init"), host::GUEST_INIT)?;
    for name in ["bin/busybox", "bin/queues", "sbin/init"] {
        fs::set_permissions(root.join(name), fs::Permissions::from_mode(0o755))?;
    }
    for (name, path) in super::net::modules(lab)? {
        fs::copy(path, root.join("root").join(name))?;
    }
    let disk = dir.join("disk");
    let mut mke2fs = Command::new("/sbin/mke2fs");
    mke2fs.args(["-q", "-t", "ext4", "-E", "root_owner=0:0", "-d"]);
    crate::command::output(mke2fs.arg(&root).arg(&disk).arg("10m"))?;
    Ok(disk)
}

fn survives(_: &Lab, host: &mut Host) -> Result<()> {
    host.must(
        &format!(
            "cp /guest/root-disk {DISK} && insmod /tun.ko && chmod +x /queues && \
             /queues tap tap1 && ip addr add 10.9.1.1/24 dev tap1 && ip link set tap1 up"
        ),
        SHORT,
    )?;
    let load = Load::Linux {
        initrd: Some("/guest/initrd".to_owned()),
        cmdline: linux_cmdline(),
    };
    let mut guest = Guest::new("/guest/linux", load);
    guest.vcpus = 2;
    guest.options = DEVICES.to_owned();
    guest.start(host)?;
    shell(host.guest(), UP)?;
    let text = types(
        host,
        "grep ' / ' /proc/mounts; cat /sys/block/vda/queue/write_cache; echo queues $(ls /sys/block/vda/mq); \
         for i in failover net_failover virtio_net; do insmod /root/$i.ko || echo no $i; done",
    )?;
    for wanted in ["/dev/vda / ext4 rw", "write back", "queues 0 1"] {
        ensure!(text.contains(wanted), "no {wanted:?} in:\n{text}");
    }
    network(host)?;
    disk_queues(host)?;

    // What is synced outlives the machine.
    let text = types(
        host,
        "mkdir /root/new && dd if=/dev/urandom of=/root/new/data bs=64k count=8 && \
         mv /root/new/data /root/new/moved && rm /root/virtio_net.ko && sync && md5sum /root/new/moved",
    )?;
    let sum = sum(&text)?;
    // Unread, the prompt would pass for the next guest's.
    host.guest().expect("guest# ", SHORT)?;
    kill(host, &guest)?;
    guest.options += " --sandbox=log";
    guest.start(host)?;
    shell(host.guest(), UP)?;
    let text = types(
        host,
        "grep ' / ' /proc/mounts; ls /root; md5sum /root/new/moved; dmesg | grep -i ext4",
    )?;
    ensure!(
        text.contains("/dev/vda / ext4 rw")
            && text.contains(&sum)
            && !text.contains("virtio_net")
            && !text.contains("EXT4-fs error"),
        "of {sum} is left:\n{text}"
    );
    sandbox(host)?;
    // This time in order: the file system is clean afterwards.
    host.guest().send(b"mount -o remount,ro / && poweroff\r")?;
    guest.expect_exit(host, 1, Duration::from_secs(120))?;
    guest.destroy(host)?;
    host.must(&format!("rm {DISK}; /queues tap tap1 0"), SHORT)
        .map(drop)
}

fn sum(text: &str) -> Result<String> {
    let words = text.split_whitespace();
    let mut sums = words.filter(|w| w.len() == 32 && w.bytes().all(|b| b.is_ascii_hexdigit()));
    let sum = sums
        .next()
        .with_context(|| format!("no checksum in:\n{text}"))?;
    Ok(sum.to_owned())
}

/// Who takes bhyve over cannot make a folder; the call is named, and with
/// --sandbox=log the guest goes on.
fn sandbox(host: &mut Host) -> Result<()> {
    // mkdir(2), which gives EPERM.
    let told = host.must("chmod +x /intrude; /intrude $(pidof bhyve) 83", SHORT)?;
    ensure!(told.contains("returns -1"), "mkdir in bhyve: {told}");
    host.must(
        "until grep -q 'the sandbox refused mkdir; --sandbox=log goes on' /tmp/bhyve.err; do sleep 1; done",
        SHORT,
    )?;
    types(host, "ls /root").map(drop)
}

/// Each vCPU sends by its own pair of queues; then there is one, and two again.
fn network(host: &mut Host) -> Result<()> {
    let text = types(
        host,
        "ip addr add 10.9.1.2/24 dev eth0; ip link set eth0 up; echo pairs $(ls /sys/class/net/eth0/queues); \
         taskset 1 ping -c 3 -W 10 10.9.1.1 && taskset 2 ping -c 3 -W 10 10.9.1.1",
    )?;
    ensure!(
        text.contains("pairs rx-0 rx-1 tx-0 tx-1"),
        "not two pairs of queues:\n{text}"
    );
    host.must("ping -c 3 -W 10 10.9.1.2", SHORT)?;
    for queue in [1, 3] {
        counted(host, "virtio-net", queue)?;
    }
    let (mut wanted, mut said) = (String::new(), String::new());
    for pairs in [1, 2] {
        wanted += &format!("channels {pairs} of 2\r\n");
        said += &types(
            host,
            &format!(
                "queues set eth0 {pairs} && taskset 1 ping -c 2 -W 10 10.9.1.1 && \
                 taskset 2 ping -c 2 -W 10 10.9.1.1"
            ),
        )?;
    }
    for line in wanted.lines() {
        ensure!(said.contains(line), "no {line:?} in:\n{said}");
    }
    Ok(())
}

/// Each vCPU reads by its own queue, and `bhyvectl top` sees it.
fn disk_queues(host: &mut Host) -> Result<()> {
    host.must(
        "(bhyvectl top --vm guest --interval 0.5 --json >/tmp/top 2>&1 &); until [ -s /tmp/top ]; do sleep 1; done",
        SHORT,
    )?;
    let before = [requests(host, 0)?, requests(host, 1)?];
    types(
        host,
        "taskset 1 dd if=/dev/vda of=/dev/null bs=64k skip=96 count=8 && \
         taskset 2 dd if=/dev/vda of=/dev/null bs=64k skip=112 count=8",
    )?;
    let after = [requests(host, 0)?, requests(host, 1)?];
    ensure!(
        before[0] < after[0] && before[1] < after[1],
        "requests of the disk's queues: {before:?} before, {after:?} after"
    );
    // The next line has the last of it; the one behind it may be cut by the kill.
    let lines = host.must(
        "n=$(wc -l </tmp/top); until [ $(wc -l </tmp/top) -ge $((n+2)) ]; do sleep 1; done; \
         kill $(pidof bhyvectl); sed '$d' /tmp/top",
        SHORT,
    )?;
    top(&lines, 8.0 * 65536.0).with_context(|| format!("of bhyvectl top:\n{lines}"))
}

/// Checks what `bhyvectl top` has said while both of the disk's queues moved so many
/// bytes: a line a round, all of it by the second.
fn top(lines: &str, bytes: f64) -> Result<()> {
    let (mut moved, mut exits, mut reasons) = ([0.0; 2], [0.0; 2], [0.0; 2]);
    for line in lines.lines() {
        let rounds: Value = serde_json::from_str(line)?;
        let round = &rounds[0];
        ensure!(
            round["name"] == "guest" && round["state"] == "running",
            "a VM that is not there: {line}"
        );
        let (resident, memory) = (round["resident"].as_u64(), round["memory"].as_u64());
        ensure!(
            resident > Some(1 << 20) && resident <= memory,
            "{resident:?} bytes are there of {memory:?}"
        );
        let seconds = number(&round["seconds"])?;
        for at in [0, 1] {
            let cpu = at.to_string();
            exits[at] += number(&round["total"][&cpu])? * seconds;
            let by_reason = round["exits"][&cpu].as_object().context("no reasons")?;
            for rate in by_reason.values() {
                reasons[at] += number(rate)? * seconds;
            }
        }
        let rings = round["rings"].as_array().context("no rings")?;
        for ring in rings {
            let disk = ring["device"]
                .as_str()
                .is_some_and(|d| d.starts_with("virtio-blk"));
            let queue = ring["queue"].as_u64().and_then(|q| usize::try_from(q).ok());
            if disk && let Some(sum) = queue.and_then(|q| moved.get_mut(q)) {
                ensure!(
                    number(&ring["requests"])? > 0.0 || number(&ring["bytes"])? == 0.0,
                    "bytes without a request: {ring}"
                );
                *sum += number(&ring["bytes"])? * seconds;
            }
        }
    }
    // Rates are rounded.
    ensure!(
        moved.iter().all(|n| *n >= bytes - 1.0),
        "the disk's queues move {moved:?} bytes, not {bytes} each"
    );
    ensure!(
        exits.iter().all(|n| *n >= 1.0) && reasons.iter().all(|n| *n >= 1.0),
        "the vCPUs exit {exits:?} times, for reasons {reasons:?} times"
    );
    Ok(())
}

fn number(value: &Value) -> Result<f64> {
    value
        .as_f64()
        .with_context(|| format!("no number: {value}"))
}

fn requests(host: &mut Host, queue: u32) -> Result<u64> {
    counted(host, "virtio-blk", queue)
}

/// How many requests bhyve has counted in a queue; there have to be some.
fn counted(host: &mut Host, device: &str, queue: u32) -> Result<u64> {
    let told = host.must("bhyvectl stats --vm guest --json", SHORT)?;
    let ring = Regex::new(&format!(
        r#""device":"{device}[^"]*","queue":{queue},"requests":([1-9]\d*)"#
    ))?;
    let found = ring.captures(&told).and_then(|c| c.get(1));
    let count =
        found.with_context(|| format!("nothing counted for queue {queue} of {device}:\n{told}"))?;
    Ok(count.as_str().parse()?)
}
