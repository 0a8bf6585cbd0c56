//! A FreeBSD 12.1 host: vmm.ko and the programs in every mixture of ours and
//! FreeBSD's own boot the same guest to the same end.

use super::guests;
use crate::guest::{Guest, Load};
use crate::host::{Config, Host, SHORT};
use crate::images;
use crate::runner::{Case, Group, Lab};
use crate::{exitcost, freebsd_host, kmod_freebsd, size};
use anyhow::{Context, Result, ensure};
use std::time::Duration;

/// The small guest of the host's image, for FreeBSD's own bhyveload.
const STOCK_LOAD: &str =
    "/usr/sbin/bhyveload -m 256M -h /guest -e bhyvers.poweroff=1 -e bhyvers.clocktest=0 guest";

/// FreeBSD's own module for that host's kernel, in an image directory.
const EPAIR: &str = "host/if_epair.ko";

/// Instructions that a CPUID exit takes at most.
const CPUID: f64 = 300.0;
/// And an OUT to bhyve and back.
const OUT: f64 = 1500.0;

/// The host and its tests.
pub fn group(lab: &Lab) -> Group {
    let mut config = Config::new(lab.engine, 256);
    for guest in &lab.kit.guests {
        if guest.ends_with("exitcost") {
            config.file("guests/exitcost", guest);
        }
    }
    let epair = images::find(&lab.dirs, EPAIR);
    if let Some(module) = &epair {
        config.file("modules/if_epair.ko", module);
    }
    type Body = fn(&Lab, &mut Host) -> Result<()>;
    let names: [(&str, Body); 6] = [
        ("freebsd-host", ours),
        ("freebsd-host-epair", over_epair),
        ("freebsd-host-exit-cost", exit_cost),
        ("freebsd-host-size", sizes),
        ("freebsd-host-stock-bhyve", stock_bhyve),
        ("freebsd-host-stock-vmm", stock_vmm),
    ];
    let why_not = match freebsd_host::find(&lab.dirs) {
        Err(why) => Some(why),
        Ok(_) if !lab.engine.counts_instructions() => Some("a FreeBSD host needs Bochs".to_owned()),
        Ok(image) => {
            config.freebsd = Some(image);
            None
        }
    };
    let cases = names.map(|(name, body)| match &why_not {
        None if epair.is_none() && name == "freebsd-host-epair" => {
            Case::skipped(name, format!("no {EPAIR} in an image directory"))
        }
        None => Case::new(name, body),
        Some(why) => Case::skipped(name, why),
    });
    Group {
        name: "freebsd-host".to_owned(),
        config,
        cases: cases.into_iter().collect(),
    }
}

/// What the guest does with its disk.
const DISK: &str = "bhyvers.run=dd if=/dev/vtbd0 bs=4k skip=10 count=1 2>/dev/null | head -n 1; \
     printf 'and so was the guest' | dd of=/dev/vtbd0 bs=512 seek=8 conv=sync";

fn ours(_: &Lab, host: &mut Host) -> Result<()> {
    host.must(
        "dd if=/dev/zero of=/tmp/disk bs=1m count=16 2>/dev/null && \
         echo 'the host was here' | dd of=/tmp/disk bs=4k seek=10 conv=notrunc 2>/dev/null",
        SHORT,
    )?;
    let mut guest = guest();
    guest.vcpus = 2;
    guest.options = "-s 4,virtio-blk,/tmp/disk".to_owned();
    guest.environment.push(DISK.to_owned());
    guest.start(host)?;
    host.guest()
        .expect("the host was here", Duration::from_secs(300))?;
    to_power_off(host, &guest)?;
    host.must(
        "dd if=/tmp/disk bs=512 skip=8 count=1 2>/dev/null | grep -q 'and so was the guest'",
        SHORT,
    )
    .map(drop)
}

/// What the guest does with its network: takes from the host and gives it back,
/// and when it is told to, ends.
const NETWORK: &str = "bhyvers.run=ifconfig vtnet0 inet 10.7.0.2/24; nc 10.7.0.1 9001 </dev/null | \
     nc -N 10.7.0.1 9000; ping -q -c 3 10.7.0.1; nc -l 9002";

/// A guest at one end of an epair(4), the host at the other.
fn over_epair(_: &Lab, host: &mut Host) -> Result<()> {
    let mut guest = guest();
    guest.options = "-s 5,virtio-net,epair0b".to_owned();
    host.must("kldload /modules/if_epair.ko", SHORT)?;
    // The interface is not there yet.
    guest.start(host)?;
    guest.expect_exit(host, 4, SHORT)?;
    host.must(
        "grep epair0b /tmp/bhyve.err | grep -q 'ifconfig epair0 create'",
        SHORT,
    )?;
    guest.destroy(host)?;
    host.must(
        "ifconfig epair0 create && ifconfig epair0a inet 10.7.0.1/24 && ifconfig epair0b up && \
         dd if=/dev/random of=/tmp/data bs=64k count=8 2>/dev/null",
        SHORT,
    )?;
    host.must("nc -l 9000 >/tmp/got & nc -N -l 9001 </tmp/data &", SHORT)?;
    guest.environment.push(NETWORK.to_owned());
    guest.start(host)?;
    host.guest()
        .expect("3 packets received", Duration::from_secs(300))?;
    host.must("ping -q -c 3 10.7.0.2", SHORT)?;
    host.must(
        "test $(md5 -q /tmp/got) = $(md5 -q /tmp/data) && test $(wc -c </tmp/got) -eq 524288",
        SHORT,
    )?;
    host.must(
        "until nc -N 10.7.0.2 9002 </dev/null; do sleep 1; done",
        SHORT,
    )?;
    to_power_off(host, &guest)?;
    // The interfaces stay: FreeBSD 12.1 panics when one goes (if_qflush).
    host.must("rm /tmp/data /tmp/got", SHORT).map(drop)
}

/// What exits cost on this host, in instructions.
fn exit_cost(_: &Lab, host: &mut Host) -> Result<()> {
    let text = guests::passes(host, &guests::small("exitcost"))?;
    let costs = exitcost::costs(&text)?;
    for (name, most) in [("exit_cpuid", CPUID), ("exit_out", OUT)] {
        let cost = costs.iter().find(|c| c.0.name == name);
        let cost = cost.with_context(|| format!("{name} was not measured"))?.1;
        println!("freebsd-host-exit-cost: {name}: {cost}");
        ensure!(
            cost <= most,
            "{name} takes {cost} instructions, more than {most}"
        );
    }
    Ok(())
}

/// The module is small.
fn sizes(lab: &Lab, _: &mut Host) -> Result<()> {
    size::module(&kmod_freebsd::module(&lab.dirs))
}

/// FreeBSD's own programs on our module.
fn stock_bhyve(_: &Lab, host: &mut Host) -> Result<()> {
    host.must(STOCK_LOAD, SHORT)?;
    let guest = guest();
    let line = guest.run_line(host).replace("(bhyve ", "(/usr/sbin/bhyve ");
    host.must(&line, SHORT)?;
    to_power_off(host, &guest)
}

/// Our programs on FreeBSD's own module, which has none of our extensions.
fn stock_vmm(_: &Lab, host: &mut Host) -> Result<()> {
    host.unload_vmm()?;
    host.must("kldload /boot/kernel/vmm.ko", SHORT)?;
    let guest = guest();
    guest.start(host)?;
    to_power_off(host, &guest)?;
    // What follows every test takes our own away.
    host.unload_vmm()?;
    host.load_vmm("")
}

/// The guest of the host's image.
fn guest() -> Guest {
    let mut guest = Guest::new(
        "/guest/boot/kernel/kernel",
        Load::FreeBsd {
            mfsroot: Some("/guest/boot/mfsroot".to_owned()),
            modules: Vec::new(),
        },
    );
    guest.environment = vec![
        "bhyvers.poweroff=1".to_owned(),
        "bhyvers.clocktest=0".to_owned(),
    ];
    guest
}

fn to_power_off(host: &mut Host, guest: &Guest) -> Result<()> {
    let up = format!("GUEST UP ncpu={}", guest.vcpus);
    host.guest().expect(&up, Duration::from_secs(300))?;
    guest.expect_exit(host, 1, Duration::from_secs(120))?;
    guest.destroy(host)
}
