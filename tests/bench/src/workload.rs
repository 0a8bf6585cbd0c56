//! A Linux guest's day: it boots, compiles a program, idles, reads and writes its
//! disk, talks to the host, and compiles once more, on the disk.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use lab::console::Console;
use lab::guest::{Guest, Load, counted_cmdline, shell};
use lab::host::{self, SHORT};
use lab::machine::{Engine, Machine, Pci, Spec};
use lab::meter::reading;
use lab::progress::step;
use lab::runner::Lab;

use crate::compile;
use crate::files::{DISK, FILE_SYSTEM, Files, NETWORK, base};
use crate::results::{Column, Results};
use crate::session::{GUEST_MIB, Session};
use crate::{Outcome, Plan};

/// From the start to the guest's shell.
const UP: Duration = Duration::from_secs(1200);
/// The longest work in it.
const WORK: Duration = Duration::from_secs(1800);
/// Requests measured.
const REQUESTS: u32 = 1000;
/// Emulated seconds of doing nothing.
const IDLE: u32 = 20;

fn guest() -> Guest {
    let load = Load::Linux {
        initrd: Some("/guest/initrd".to_owned()),
        cmdline: counted_cmdline(Engine::Bochs),
    };
    let mut guest = Guest::new("/guest/linux", load);
    guest.memory_mib = GUEST_MIB;
    guest
}

/// Ticks since the kernel began that were not idle, by its own clock.
fn busy(uptime: &str) -> Result<f64> {
    let line = uptime
        .lines()
        .rev()
        .find(|l| l.split_whitespace().count() == 2 && l.contains('.'))
        .with_context(|| format!("no uptime in:\n{uptime}"))?;
    let mut words = line.split_whitespace().map(str::parse::<f64>);
    match (words.next(), words.next()) {
        (Some(Ok(up)), Some(Ok(idle))) => Ok((up - idle) * f64::from(lab::bochs::IPS)),
        _ => anyhow::bail!("/proc/uptime says {line:?}"),
    }
}

/// The parts of the day behind the boot, in their order.
pub const PARTS: [&str; 5] = ["compile-memory", "idle", "blk", "net", "compile-disk"];

/// Boots, does the parts that are asked for, and powers off. A part that fails
/// takes only its own numbers with it as long as the guest's shell answers.
///
/// # Errors
/// The guest does not boot or does not end.
pub fn day(session: &mut Session, plan: &Plan, outcome: &mut Outcome) -> Result<()> {
    let column = session.column;
    let name = column.name();
    session.host.must(HOST_READY, SHORT)?;
    step(&format!("{name}: boot"), || {
        session.start(
            guest(),
            &[
                "virtio-blk,/tmp/disk",
                "virtio-net,tap0",
                "virtio-blk,/tmp/system",
            ],
        )?;
        shell(session.host.guest(), UP)?;
        booted(session, &mut outcome.results)
    })?;
    for part in PARTS.iter().filter(|p| plan.wants(p)) {
        let results = &mut outcome.results;
        let done = step(&format!("{name}: {part}"), || match *part {
            "compile-memory" => in_memory(session, results),
            "idle" => idle(session, results),
            "blk" => disk(session, results),
            "net" => net(session, results),
            "compile-disk" => on_disk(session, results),
            other => bail!("there is no part {other}"),
        });
        if let Err(e) = done {
            outcome.failures.push(format!("{name}: {part}: {e:#}"));
            session
                .types("true")
                .context("the guest's shell after a failure")?;
        }
    }
    resident(session, &mut outcome.results)?;
    session.host.guest().send(b"poweroff -f\r")?;
    session.end()?;
    session
        .host
        .must("tunctl -d tap0; rm /tmp/disk /tmp/system", SHORT)
        .map(drop)
}

/// Two disks, and a network with somebody who answers. Programs are where they were
/// last time: Linux maps what it has of the 64 KiB around a page that is touched, by its
/// address, so that what is resident of a program depends on where it lies, by 150 KiB.
const HOST_READY: &str = "echo 0 >/proc/sys/kernel/randomize_va_space && \
    dd if=/dev/zero of=/tmp/disk bs=1M count=16 2>/dev/null && \
    cp /guest/disk /tmp/system && \
    tunctl -t tap0 && ip addr add 10.9.0.1/24 dev tap0 && ip link set tap0 up";

fn booted(session: &mut Session, results: &mut Results) -> Result<()> {
    let column = session.column;
    let reasons = session.reasons()?;
    let boot = busy(&session.types("cat /proc/uptime")?)?;
    results.add(column, "boot", BOOT, "instructions", boot);
    for (name, what, exits) in reasons {
        results.add(column, name, what, "exits", exits as f64);
    }
    session.types(PREPARE).map(drop)
}

const BOOT: &str = "Linux boot to its shell, by its clock less idle time";

fn disk(session: &mut Session, results: &mut Results) -> Result<()> {
    insert(session, &DISK)?;
    for (name, what, size) in [
        ("read", "virtio-blk, reading 4 KiB", 4096),
        ("write", "virtio-blk, writing 4 KiB", 4096),
        ("read", "virtio-blk, reading 64 KiB", 65536),
    ] {
        let key = format!("blk_{name}_{}k", size >> 10);
        let line = format!("meter {name} /dev/vda {size} {REQUESTS}");
        requests(session, results, &key, what, &line)?;
    }
    Ok(())
}

fn net(session: &mut Session, results: &mut Results) -> Result<()> {
    insert(session, &DISK)?;
    insert(session, &NETWORK)?;
    session.types("ip addr add 10.9.0.2/24 dev eth0 && ip link set eth0 up")?;
    session.types("ping -c 1 -W 10 10.9.0.1")?;
    for (key, what, verb, size) in [
        (
            "net_ping",
            "virtio-net, 64 bytes to the host and back",
            "ping",
            64,
        ),
        (
            "net_ping_1400",
            "virtio-net, 1,400 bytes to the host and back",
            "ping",
            1400,
        ),
        (
            "net_send",
            "virtio-net, a datagram of 1,400 bytes to the host",
            "send",
            1400,
        ),
    ] {
        let line = format!("meter {verb} 10.9.0.1 {size} {REQUESTS}");
        requests(session, results, key, what, &line)?;
    }
    Ok(())
}

/// The process's memory less the guest's, which is a mapping of vmm's, or one as large.
fn resident(session: &mut Session, results: &mut Results) -> Result<()> {
    let program = match session.column {
        Column::Kvm => "kvm-monitor",
        _ => "bhyve",
    };
    let line = format!(
        "awk '/^[0-9a-f]+-/{{v=/vmm/}} /^Size:/{{v=v||$2>65536}} /^Rss:/{{if(!v)s+=$2}} \
         END{{print s}}' /proc/$(pidof {program})/smaps"
    );
    let text = session.host.must(&line, SHORT)?;
    let kib: f64 = text.trim().parse().context("resident memory")?;
    let what = "memory of the process beyond the guest's";
    results.add(session.column, "resident", what, "KiB", kib);
    Ok(())
}

/// Runs the meter's `line` of [`REQUESTS`] requests; its ticks, and the exits
/// beside them.
fn requests(
    session: &mut Session,
    results: &mut Results,
    key: &str,
    what: &str,
    line: &str,
) -> Result<()> {
    let column = session.column;
    // What typing takes by itself.
    let before = session.exits()?;
    session.types("meter tsc")?;
    let typed = session.exits()?.saturating_sub(before);
    let before = session.exits()?;
    let text = session.types(line)?;
    let exits = session
        .exits()?
        .saturating_sub(before)
        .saturating_sub(typed);
    let reading = reading(&text)?;
    results.add(column, key, what, "instructions", reading.mean);
    results.add(
        column,
        &format!("{key}_least"),
        &format!("{what}, the fewest"),
        "instructions",
        reading.least,
    );
    let per_request = exits as f64 / f64::from(REQUESTS);
    results.add(column, &format!("{key}_exits"), what, "exits", per_request);
    Ok(())
}

/// What a guest that waits for its keyboard costs, beside the host that does.
fn idle(session: &mut Session, results: &mut Results) -> Result<()> {
    let wait = format!("sleep {IDLE}");
    // The boot's last work is over by then.
    session.host.must("sleep 2", SHORT)?;
    let exits = session.exits()?;
    let ticks = session.host.busy_ticks(lab::bochs::IPS)?;
    session.host.must(&wait, host::BOOT)?;
    let ticks = session
        .host
        .busy_ticks(lab::bochs::IPS)?
        .saturating_sub(ticks);
    let exits = session.exits()?.saturating_sub(exits);
    let second = |n: u64| n as f64 / f64::from(IDLE);
    let column = session.column;
    results.add(
        column,
        "idle",
        "idle Linux guest, exits a second",
        "exits",
        second(exits),
    );
    results.add(
        column,
        "idle_busy",
        "idle Linux guest, guest and host, a second",
        "instructions",
        second(ticks),
    );
    Ok(())
}

/// Inserts what is there and has not been inserted.
fn insert(session: &mut Session, modules: &[&str]) -> Result<()> {
    for module in modules {
        let file = base(Path::new(module))?;
        session.types(&format!(
            "[ ! -e /{file} ] || insmod /{file} && rm -f /{file}"
        ))?;
    }
    Ok(())
}

/// Compiles in a guest whose root is memory.
fn in_memory(session: &mut Session, results: &mut Results) -> Result<()> {
    let before = session.exits()?;
    let text = session.types(&compile::command(""))?;
    let exits = session.exits()?.saturating_sub(before);
    let ticks = reading(&text)?.mean;
    let column = session.column;
    results.add(column, "compile", compile::WHAT, "instructions", ticks);
    results.add(
        column,
        "compile_exits",
        compile::WHAT,
        "exits",
        exits as f64,
    );
    Ok(())
}

/// The archive's files are not executable.
const PREPARE: &str = "chmod +x /bin/meter /usr/bin/* /usr/lib/gcc/x86_64-linux-gnu/12/* \
    /lib64/* /lib/x86_64-linux-gnu/*";

/// Compiles on a virtio disk with a file system, cold caches and all.
fn on_disk(session: &mut Session, results: &mut Results) -> Result<()> {
    insert(session, &DISK)?;
    insert(session, &FILE_SYSTEM)?;
    session.types("mkdir /mnt && mount -t ext4 /dev/vdb /mnt && mount -t devtmpfs dev /mnt/dev")?;
    let before = session.exits()?;
    let text = session.types(&compile::command("/mnt"))?;
    let exits = session.exits()?.saturating_sub(before);
    let ticks = reading(&text)?.mean;
    let column = session.column;
    let what = "the same compile on a virtio disk";
    results.add(column, "compile_disk", what, "instructions", ticks);
    results.add(column, "compile_disk_exits", what, "exits", exits as f64);
    session.types("umount /mnt/dev; umount /mnt").map(drop)
}

/// The same kernel, the same work, and no hypervisor.
///
/// # Errors
/// The emulator does not start, or the machine does not do as it is told.
pub fn bare(lab: &Lab, files: &Files, plan: &Plan, results: &mut Results) -> Result<()> {
    let mut machine = step("bare: boot", || {
        let initramfs = fs::read(&files.initrd)?;
        let archive_mib = u32::try_from(initramfs.len() >> 20)?;
        let spec = Spec {
            engine: lab.engine,
            cpus: 1,
            count_instructions: false,
            disk: None,
            pci: Pci::default(),
            memory_mib: GUEST_MIB + archive_mib,
            kernel: lab.kit.kernel.image.clone(),
            initramfs,
            cmdline: counted_cmdline(lab.engine),
        };
        let mut machine = Machine::start(&spec, &lab.dirs.fresh("bench-bare")?)?;
        shell(&mut machine.com1, UP)?;
        Ok(machine)
    })?;
    let console = &mut machine.com1;
    let boot = busy(&types(console, "cat /proc/uptime")?)?;
    results.add(Column::Bare, "boot", BOOT, "instructions", boot);
    if plan.wants("compile-memory") {
        step("bare: compile-memory", || {
            types(console, PREPARE)?;
            let ticks = reading(&types(console, &compile::command(""))?)?.mean;
            results.add(
                Column::Bare,
                "compile",
                compile::WHAT,
                "instructions",
                ticks,
            );
            Ok(())
        })?;
    }
    Ok(())
}

/// Types a line into a Linux's shell; its output.
///
/// # Errors
/// Its status is not 0, or it does not end.
pub fn types(console: &mut Console, line: &str) -> Result<String> {
    console.send(format!("{line}; echo lab-status=$? lab-'end'\r").as_bytes())?;
    let found = console.expect(r"lab-status=(\d+) lab-end", WORK)?;
    ensure!(
        found.group(1) == "0",
        "`{line}` gives status {}:\n{}",
        found.group(1),
        found.before
    );
    Ok(found.before)
}

/// Compiles in guests by the bare machine's in memory.
pub fn ratios(results: &mut Results) {
    let Some(bare) = results.get(Column::Bare, "compile") else {
        return;
    };
    for (name, what, from) in [
        (
            "compile_ratio",
            "the compile, to the bare machine's",
            "compile",
        ),
        (
            "compile_disk_ratio",
            "the compile on a virtio disk, to the bare machine's in memory",
            "compile_disk",
        ),
    ] {
        for column in [Column::Ours, Column::Kvm] {
            if let Some(value) = results.get(column, from) {
                results.add(column, name, what, "ratio", value / bare);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_time_is_no_work() {
        let ticks = busy("cat /proc/uptime\r\n12.50 2.50\r\n").unwrap();
        assert_eq!(ticks, 10.0 * f64::from(lab::bochs::IPS));
    }
}
