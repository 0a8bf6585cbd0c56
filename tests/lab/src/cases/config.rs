//! A VM from one file: loaded, run, looked at, loaded again after its reset, and
//! gone at the end.

use crate::guest::{linux_cmdline, said};
use crate::host::{GUEST_EXIT, Host, SHORT};
use anyhow::{Result, ensure};
use std::time::Duration;

const UP: Duration = Duration::from_secs(240);

fn file() -> String {
    format!(
        r#"name = "guest"
cpu.count = 2
memory.size = "256M"
[machine]
acpi = true
[serial]
com1 = "stdio"
[[device]]
slot = 0
emulation = "hostbridge"
[[device]]
slot = 4
emulation = "virtio-blk"
path = "/tmp/config.img"
ro = true
[[device]]
slot = 31
emulation = "lpc"
[boot]
linux = "/guest/kernel"
initrd = "/guest/root"
cmdline = "{}"
"#,
        linux_cmdline()
    )
}

/// What a line in the host says, which must hold `words`.
fn says(host: &mut Host, line: &str, words: &[&str]) -> Result<String> {
    let text = host.must(line, SHORT)?;
    for word in words {
        ensure!(
            text.contains(word),
            "no {word:?} in what {line:?} says: {text}"
        );
    }
    Ok(text)
}

/// The test.
///
/// # Errors
/// It fails.
pub fn boot(host: &mut Host) -> Result<()> {
    let lines: Vec<String> = file().lines().map(|l| format!("'{l}'")).collect();
    host.must(
        &format!("printf '%s\\n' {} >/tmp/vm.toml", lines.join(" ")),
        SHORT,
    )?;
    host.must("head -c 1048576 /dev/zero >/tmp/config.img", SHORT)?;
    let run = "bhyve --config /tmp/vm.toml --boot </dev/ttyS1 >/dev/ttyS1 2>/tmp/bhyve.err";
    host.must(&format!("({run}; echo \"{GUEST_EXIT}$?\") &"), SHORT)?;
    host.guest().expect("guest userland: ", UP)?;
    host.guest().expect("guest# ", SHORT)?;

    says(host, "bhyvectl list", &["guest ", "running", "256M"])?;
    // The process that runs the guest is confined, all of its threads.
    let pid = "pid=$(bhyvectl list --json | sed 's/.*\"pid\":\\([0-9]*\\).*/\\1/')";
    let filters = format!("{pid}; cat /proc/$pid/task/*/status | grep Seccomp: | sort -u");
    let filters = says(host, &filters, &["2"])?;
    ensure!(
        filters.lines().count() == 1,
        "threads without a filter: {filters}"
    );
    says(
        host,
        "bhyvectl stats --vm guest --json",
        &["\"inout\":", "total number of vm exits", "\"id\":1"],
    )?;
    says(
        host,
        "bhyvectl top --rounds 1 --interval 1",
        &["exits a second", "vcpu1", "to bhyve", "hlt"],
    )?;

    host.guest().send(b"reboot\r")?;
    host.guest().expect("Linux version", UP)?;
    // The older process is the parent. A kernel that young hears no power button.
    host.must(
        "set -- $(pidof bhyve); kill $2; sleep 2; kill $2; true",
        SHORT,
    )?;
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    let status = loop {
        if let Some(status) = host.guest_exit(Duration::from_millis(200))? {
            break status;
        }
        ensure!(
            std::time::Instant::now() < deadline,
            "bhyve --boot has not ended: {}",
            said(host)
        );
    };
    ensure!(
        status == 0,
        "bhyve --boot ends with {status}: {}",
        said(host)
    );
    host.must("test ! -e /dev/vmm/guest", SHORT)?;
    let refused = host.run("bhyvectl --vm=guest --destroy 2>&1", SHORT)?;
    ensure!(
        refused.status != 0 && refused.text.contains("there are no VMs"),
        "destroyed twice: {}",
        refused.text
    );
    Ok(())
}
