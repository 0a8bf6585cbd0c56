//! Streams of bytes between programs of host and guest: a console's port, and
//! sockets of the guest's that are Unix sockets of the host's.

use super::super::virtio::types;
use super::{number, sum};
use crate::host::{Host, SHORT};
use anyhow::{Result, ensure};

/// A port, in both directions.
pub fn port(host: &mut Host) -> Result<()> {
    host.must(
        "(echo from-the-host; sleep 30) | timeout 40 /sock unix /tmp/port >/tmp/heard 2>&1 &",
        SHORT,
    )?;
    let text = types(
        host,
        "p=/dev/$(basename $(dirname $(grep -l org.lab.port /sys/class/virtio-ports/*/name))); \
         head -n 1 <$p && (cat /tmp/data; echo; echo from-the-guest) >$p; md5sum </tmp/data",
    )?;
    ensure!(
        text.contains("from-the-host"),
        "the port says nothing:\n{text}"
    );
    let seen = host.must(
        "i=0; until tail -n 1 /tmp/heard | grep -q from-the-guest; do sleep 1; i=$((i+1)); \
         [ $i -lt 20 ] || break; done; head -c 2097152 /tmp/heard | md5sum; tail -c 15 /tmp/heard",
        SHORT,
    )?;
    ensure!(
        sum(&seen)? == sum(&text)? && seen.contains("from-the-guest"),
        "the host has heard {seen}, the guest has said {text}"
    );
    Ok(())
}

/// The guest's sockets, asked for by either side.
pub fn vsock(host: &mut Host) -> Result<()> {
    // From the host: 2 MiB there, a line back.
    types(
        host,
        "(echo hello-host | timeout 50 /sock vlisten 1024 >/tmp/got) & sleep 1",
    )?;
    let text = host.must(
        "(echo CONNECT 1024; cat /tmp/share/hard) | timeout 50 /sock unix /tmp/vsock; \
         md5sum </tmp/share/hard",
        SHORT,
    )?;
    ensure!(
        text.starts_with("OK ") && text.contains("hello-host"),
        "the host hears:\n{text}"
    );
    let got = types(host, "wait; md5sum </tmp/got")?;
    ensure!(sum(&got)? == sum(&text)?, "sent {text}, got {got}");
    // Nobody listens there.
    let text = host.must(
        "echo CONNECT 1025 | timeout 20 /sock unix /tmp/vsock",
        SHORT,
    )?;
    ensure!(!text.contains("OK"), "nobody answers: {text}");
    // From the guest.
    host.must(
        "(echo hello-guest | timeout 50 /sock listen /tmp/vsock_5000 >/tmp/got) &",
        SHORT,
    )?;
    let text = types(
        host,
        "timeout 50 /sock vsock 2 5000 </tmp/data; md5sum </tmp/data; ! /sock vsock 2 5001 </dev/null",
    )?;
    ensure!(text.contains("hello-guest"), "the guest hears:\n{text}");
    let got = host.must(
        "while pidof sock; do sleep 0.1; done >/dev/null; md5sum </tmp/got",
        SHORT,
    )?;
    ensure!(sum(&got)? == sum(&text)?, "sent {text}, got {got}");
    // Whoever looks at the rings sees what went over them: 2 MiB and headers.
    let text = host.must("bhyvectl stats --vm guest --json", SHORT)?;
    for queue in [0, 1] {
        let ring = text.split("\"device\":\"").find(|part| {
            part.starts_with("virtio-vsock") && part.contains(&format!("\"queue\":{queue},"))
        });
        let bytes = number(ring.unwrap_or_default(), "bytes")?;
        ensure!(
            (2 << 20..3 << 20).contains(&bytes),
            "queue {queue} has moved {bytes} bytes: {text}"
        );
    }
    Ok(())
}
