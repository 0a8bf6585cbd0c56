//! VMs come and go, in good order and in bad.

use super::{firmware, linux};
use crate::host::{Config, Host, SHORT};
use crate::machine::Engine;
use crate::runner::{Case, Group, Lab, eventually};
use anyhow::{Context, Result, ensure};
use std::time::Duration;

const CYCLES: u32 = 1000;
/// Growth of used memory over [`CYCLES`] that is still noise; a page lost per
/// cycle would be 4000 KiB.
const NOISE_KIB: i64 = 2000;

/// The host and its tests.
pub fn group(lab: &Lab) -> Group {
    let mut config = Config::new(lab.engine, 256);
    config.file("guest/kernel", &lab.kit.kernel.image);
    config.file("guest/root", &lab.kit.guest_initrd);
    Group {
        name: "lifecycle".to_owned(),
        config,
        cases: vec![
            Case::new("module-load-unload", module_load_unload),
            Case::new("create-destroy-1000", create_destroy),
            firmware::case(),
            Case::new("destroy-loaded-vm", destroy_loaded),
            Case::new("destroy-running-vm", destroy_running),
            Case::new("kill-9-running-vm", kill_running),
            Case::new("module-busy-while-vm-exists", module_busy),
        ],
    }
}

/// Those that take little time, for a host with [`linux::guest`] on an engine that is
/// not the run's own.
pub fn few(engine: Engine) -> [Case; 4] {
    let name = |name: &str| format!("{engine}-{name}");
    [
        Case::new(name("module-load-unload"), module_load_unload),
        Case::new(name("destroy-running-vm"), destroy_running),
        Case::new(name("kill-9-running-vm"), kill_running),
        Case::new(name("module-busy-while-vm-exists"), module_busy),
    ]
}

fn module_load_unload(_: &Lab, host: &mut Host) -> Result<()> {
    for _ in 0..10 {
        host.must("test -c /dev/vmmctl", SHORT)?;
        host.must("rmmod vmm", SHORT)?;
        host.must("test ! -e /dev/vmmctl -a ! -e /dev/vmm", SHORT)?;
        host.load_vmm("")?;
    }
    Ok(())
}

/// Memory in use that is not cache, in KiB.
fn used_kib(host: &mut Host) -> Result<i64> {
    host.must("sync; echo 3 >/proc/sys/vm/drop_caches", SHORT)?;
    let text = host.must("cat /proc/meminfo", SHORT)?;
    let field = |name: &str| {
        text.lines()
            .find_map(|l| {
                l.strip_prefix(name)?
                    .split_whitespace()
                    .next()?
                    .parse::<i64>()
                    .ok()
            })
            .with_context(|| format!("/proc/meminfo has no {name}"))
    };
    Ok(field("MemTotal:")? - field("MemFree:")? - field("Cached:")?)
}

fn cycle(host: &mut Host, count: u32) -> Result<()> {
    let line = format!(
        "i=0; while [ $i -lt {count} ]; do bhyvectl --create --vm=cycle && test -c /dev/vmm/cycle \
         && bhyvectl --destroy --vm=cycle || break; i=$((i+1)); done; [ $i = {count} ]"
    );
    host.must(&line, Duration::from_secs(600)).map(drop)
}

fn create_destroy(_: &Lab, host: &mut Host) -> Result<()> {
    cycle(host, 20)?;
    let before = used_kib(host)?;
    cycle(host, CYCLES)?;
    let grown = used_kib(host)? - before;
    ensure!(
        grown < NOISE_KIB,
        "{CYCLES} create/destroy cycles have eaten {grown} KiB"
    );
    Ok(())
}

fn destroy_loaded(_: &Lab, host: &mut Host) -> Result<()> {
    let guest = linux::guest();
    let mut load_and_destroy = || {
        host.must(&guest.load_line(), Duration::from_secs(120))?;
        guest.destroy(host)?;
        used_kib(host)
    };
    // The page allocator keeps what is freed on per-CPU lists, large pages
    // included, which count as used: they fill up in the first rounds, and
    // one or two more are on them after some rounds than after others.
    let mut before = 0;
    for _ in 0..6 {
        before = before.max(load_and_destroy()?);
    }
    for _ in 0..3 {
        load_and_destroy()?;
    }
    let mut after = i64::MAX;
    for _ in 0..3 {
        after = after.min(load_and_destroy()?);
    }
    // The loader touches more than 15 MiB of guest memory each time: of that
    // nothing stays, four rounds later.
    let grown = after - before;
    ensure!(grown < NOISE_KIB, "destroying four times keeps {grown} KiB");
    Ok(())
}

fn start(host: &mut Host) -> Result<crate::guest::Guest> {
    let guest = linux::guest();
    guest.start(host)?;
    host.guest()
        .expect("Linux version", Duration::from_secs(120))?;
    Ok(guest)
}

fn destroy_running(_: &Lab, host: &mut Host) -> Result<()> {
    let guest = start(host)?;
    guest.destroy(host)?;
    eventually("bhyve ends when its VM is destroyed", SHORT, || {
        Ok(host.guest_exit(Duration::from_millis(100))?.is_some())
    })
}

/// What `bhyvectl list` says of a VM.
pub fn listed(host: &mut Host, vm: &str, state: &str) -> Result<()> {
    let text = host.must("bhyvectl list", SHORT)?;
    let line = text.lines().find(|l| l.starts_with(vm));
    let word = line.and_then(|l| l.split_whitespace().nth(1));
    ensure!(word == Some(state), "{vm} is not {state}: {text}");
    Ok(())
}

fn kill_running(_: &Lab, host: &mut Host) -> Result<()> {
    let guest = start(host)?;
    host.must("kill -9 $(pidof bhyve)", SHORT)?;
    guest.expect_exit(host, 128 + 9, SHORT)?;
    listed(host, "guest", "ended")?;
    guest.destroy(host)?;
    // And the same name is free again.
    host.must("bhyvectl --create --vm=guest", SHORT)?;
    guest.destroy(host)
}

fn module_busy(_: &Lab, host: &mut Host) -> Result<()> {
    host.must("bhyvectl --create --vm=held", SHORT)?;
    listed(host, "held", "empty")?;
    let out = host.run("rmmod vmm", SHORT)?;
    ensure!(
        out.status != 0,
        "rmmod took the module away from under a VM"
    );
    host.must("test -c /dev/vmm/held", SHORT)?;
    host.must("bhyvectl --destroy --vm=held", SHORT).map(drop)
}
