//! Two network cards of one Linux guest: one at a tap, one at the user-mode
//! network; ping and files whose checksums both ends know, each way.

use super::virtio::{base, kill, types};
use crate::guest::{Guest, Load, linux_cmdline, shell};
use crate::host::{Config, Host, SHORT};
use crate::runner::{Case, Lab};
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// From bhyve's start to the guest's shell.
const UP: Duration = Duration::from_secs(300);
/// The cards, in the order in which Linux names them.
const DEVICES: &str = "-s 5,virtio-net,tap0 -s 6,virtio-net,slirp,open,hostfwd=tcp:127.0.0.1:8080-80,mac=00:a0:98:aa:bb:cc";
/// What bhyve gives slot 5 of a VM called `guest`: 00:a0:98 and the start of
/// `printf 5-0-guest | md5sum`.
const MAC: &str = "00:a0:98:25:06:41";
/// Feature bits that a tap of Linux and its driver have to agree on: checksums
/// and TCP over IPv4 in pieces, both ways, mergeable buffers, the control queue;
/// indirect descriptors, event index, virtio 1.
const FEATURES: [usize; 9] = [0, 1, 7, 11, 15, 17, 28, 29, 32];

/// Debian's driver for the guest, in the order of its dependencies.
const MODULES: [&str; 3] = [
    "net/core/failover.ko",
    "drivers/net/net_failover.ko",
    "drivers/net/virtio_net.ko",
];
/// What the host's nc has received when it has ended, which it does early if
/// there is nothing to read for it. (`wait` would wait for bhyve too.)
const RECEIVED: &str = "while pidof nc; do sleep 0.1; done; md5sum /tmp/back";
/// The host's.
pub const TUN: &str = "drivers/net/tun.ko";

/// What goes into the guest's initramfs.
pub fn modules(lab: &Lab) -> Result<Vec<(String, PathBuf)>> {
    let path = |m: &&str| {
        let path = lab.kit.kernel.modules.join(m);
        Ok((base(&path)?, path))
    };
    MODULES.iter().map(path).collect()
}

/// Puts what the host needs into its configuration; the test.
pub fn case(lab: &Lab, config: &mut Config) -> Case {
    config.file("tun.ko", &lab.kit.kernel.modules.join(TUN));
    Case::new("virtio-net-linux", run)
}

/// The first word of `md5sum`'s output in `text`.
fn sum(text: &str) -> Result<&str> {
    let words = text.split_whitespace();
    let mut sums = words.filter(|w| w.len() == 32 && w.bytes().all(|b| b.is_ascii_hexdigit()));
    sums.next()
        .with_context(|| format!("no checksum in:\n{text}"))
}

fn run(_: &Lab, host: &mut Host) -> Result<()> {
    host.must(
        "grep -q ^tun /proc/modules || insmod /tun.ko; mkdir -p /tmp/www && \
         dd if=/dev/urandom of=/tmp/www/data bs=64k count=16 2>/dev/null",
        SHORT,
    )?;
    let want = sum(&host.must("md5sum /tmp/www/data", SHORT)?)?.to_owned();
    let load = Load::Linux {
        initrd: Some("/guest/initrd".to_owned()),
        cmdline: linux_cmdline(),
    };
    let mut guest = Guest::new("/guest/linux", load);
    guest.options = DEVICES.to_owned();

    // Without its tap bhyve says so, and how to get one.
    host.must(&guest.load_line(), SHORT)?;
    let line = guest.run_line(host);
    host.must(&line, SHORT)?;
    guest.expect_exit(host, 4, SHORT)?;
    host.must(
        "grep 'tap0' /tmp/bhyve.err | grep -q 'ip tuntap add'",
        SHORT,
    )?;
    guest.destroy(host)?;

    host.must(
        "tunctl -t tap0 && ip addr add 10.9.0.1/24 dev tap0 && ip link set tap0 up && \
         ip link set lo up && httpd -p 80 -h /tmp/www",
        SHORT,
    )?;
    guest.start(host)?;
    shell(host.guest(), UP)?;
    for module in super::virtio::BUS.iter().chain(&MODULES) {
        types(host, &format!("insmod /{}", base(Path::new(module))?))?;
    }
    tap(host, &want)?;
    user(host, &want)?;
    kill(host, &guest)?;
    host.must("killall httpd; tunctl -d tap0; rm -r /tmp/www", SHORT)
        .map(drop)
}

/// The cards of a FreeBSD guest.
pub const FREEBSD: &str = "-s 5,virtio-net,tap0 -s 6,virtio-net,slirp,open";

/// The host's part of them, before the guest is there.
pub fn freebsd_prepares(host: &mut Host) -> Result<()> {
    host.must(
        "grep -q ^tun /proc/modules || insmod /tun.ko; tunctl -t tap0 && \
         ip addr add 10.9.0.1/24 dev tap0 && ip link set lo up",
        SHORT,
    )
    .map(drop)
}

/// Has the host receive what one connection to a port of TCP brings, from now on.
fn listen(host: &mut Host, port: u16) -> Result<()> {
    // /proc/net/tcp: the port in hexadecimal digits, the peer, 0A for LISTEN.
    host.must(
        &format!(
            "(sleep 60 | nc -l -p {port} >/tmp/back) & i=0; \
             until cat /proc/net/tcp* | grep -q ':{port:04X} [0-9A-F:]* 0A '; \
             do i=$((i+1)); [ $i -lt 30 ] || break; sleep 1; done; [ $i -lt 30 ]"
        ),
        SHORT,
    )
    .map(drop)
}

/// A FreeBSD guest's ping and a file by tap and by the user-mode network.
pub fn freebsd(host: &mut Host) -> Result<()> {
    host.must("ip link set tap0 up", SHORT)?;
    let text = types(
        host,
        "dd if=/dev/random of=/tmp/net bs=64k count=16 2>/dev/null; md5 -q /tmp/net; \
         ifconfig vtnet0 inet 10.9.0.2/24 up; ifconfig vtnet1 inet 10.0.2.15/24 up; \
         ping -c 3 -t 30 10.9.0.1 && ping -c 3 -t 30 10.0.2.2",
    )?;
    let want = sum(&text)?.to_owned();
    for (gateway, port) in [("10.9.0.1", 9002), ("10.0.2.2", 9003)] {
        listen(host, port)?;
        types(host, &format!("nc -N {gateway} {port} </tmp/net"))?;
        let back = host.must(RECEIVED, SHORT)?;
        ensure!(
            sum(&back)? == want,
            "by {gateway} the guest's file has become\n{back}"
        );
    }
    types(host, "rm /tmp/net").map(drop)
}

fn tap(host: &mut Host, want: &str) -> Result<()> {
    let text = types(
        host,
        "ip link set lo up; ip addr add 10.9.0.2/24 dev eth0; ip link set eth0 up; \
         cat /sys/class/net/eth0/address /sys/class/net/eth0/carrier /sys/class/net/eth0/device/features",
    )?;
    ensure!(text.contains(MAC), "the address is not {MAC}:\n{text}");
    let features = text.lines().map(str::trim).find(|l| l.len() == 64);
    let features = features.with_context(|| format!("no feature bits in:\n{text}"))?;
    for bit in FEATURES {
        let agreed = features.as_bytes().get(bit) == Some(&b'1');
        ensure!(agreed, "no agreement on feature {bit}: {features}");
    }
    types(host, "ping -c 3 -W 10 10.9.0.1")?;
    host.must("ping -c 3 -W 10 10.9.0.2", SHORT)?;
    let text = types(
        host,
        "wget -q -O /tmp/data http://10.9.0.1/data; md5sum /tmp/data",
    )?;
    ensure!(sum(&text)? == want, "the host's file has become\n{text}");
    listen(host, 9000)?;
    types(host, "nc 10.9.0.1 9000 </tmp/data")?;
    let back = host.must(RECEIVED, SHORT)?;
    ensure!(sum(&back)? == want, "the guest's file has become\n{back}");
    Ok(())
}

fn user(host: &mut Host, want: &str) -> Result<()> {
    types(
        host,
        "printf '#!/bin/sh\\n[ \"$1\" = bound ] && ip addr add $ip/$mask dev $interface && \
         ip route add default via $router && echo lease $ip $router $dns $mtu\\ntrue\\n' >/tmp/dhcp && chmod +x /tmp/dhcp",
    )?;
    let text = types(
        host,
        "ip link set eth1 up; cat /sys/class/net/eth1/address; udhcpc -i eth1 -q -n -s /tmp/dhcp",
    )?;
    for wanted in ["00:a0:98:aa:bb:cc", "lease 10.0.2.15 10.0.2.2 10.0.2.3"] {
        ensure!(text.contains(wanted), "no {wanted:?} in:\n{text}");
    }
    types(host, "ping -c 3 -W 10 10.0.2.2")?;
    let text = types(
        host,
        "rm /tmp/data; wget -q -O /tmp/data http://10.0.2.2/data; md5sum /tmp/data",
    )?;
    ensure!(sum(&text)? == want, "the host's file has become\n{text}");
    listen(host, 9001)?;
    types(host, "nc 10.0.2.2 9001 </tmp/data")?;
    let back = host.must(RECEIVED, SHORT)?;
    ensure!(sum(&back)? == want, "the guest's file has become\n{back}");
    // The same by IPv6, with an address by the router's advertisement.
    types(
        host,
        "i=0; until ip -6 addr show dev eth1 | grep 'inet6 fec0:' | grep -qv tentative; do sleep 1; \
         i=$((i+1)); [ $i -lt 20 ] || break; done; ip -6 route; ping -6 -c 3 -W 10 fec0::2",
    )?;
    let text = types(
        host,
        "rm /tmp/data; wget -q -O /tmp/data 'http://[fec0::2]/data'; md5sum /tmp/data",
    )?;
    ensure!(sum(&text)? == want, "by IPv6 came\n{text}");
    // Nobody listens there, and the guest hears so at once.
    types(
        host,
        "! nc -w 5 10.0.2.2 9999 </dev/null && ! nc -w 5 fec0::2 9999 </dev/null",
    )?;
    // From the host into the guest.
    types(host, "httpd -p 80 -h /tmp")?;
    let text = host.must("wget -q -O - http://127.0.0.1:8080/data | md5sum", SHORT)?;
    ensure!(sum(&text)? == want, "through the forward came\n{text}");
    Ok(())
}
