//! A host with one of the two hypervisors in it, and a guest on that.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use lab::dirs::Dirs;
use lab::guest::{Guest, Load};
use lab::host::{Config, GUEST_EXIT, Host, Kit, SHORT};
use lab::machine::Engine;
use lab::stats;

use crate::results::Column;
use crate::tools::Tools;
use crate::workload::Files;

/// A guest's memory, MiB; the compiler's guest has to hold its own disk.
pub const GUEST_MIB: u32 = 512;
/// A guest from start to end.
const RUN: Duration = Duration::from_secs(600);
/// KVM and what it stands on.
const KVM_MODULES: [&str; 3] = [
    "virt/lib/irqbypass.ko",
    "arch/x86/kvm/kvm.ko",
    "arch/x86/kvm/kvm-intel.ko",
];

/// The host, with one hypervisor loaded.
pub struct Session {
    /// The host.
    pub host: Host,
    /// Which hypervisor.
    pub column: Column,
    running: Option<Guest>,
}

impl Session {
    /// Boots a host and loads the hypervisor.
    ///
    /// # Errors
    /// Either does not come up.
    pub fn boot(
        dirs: &Dirs,
        kit: &Kit,
        engine: Engine,
        tools: &Tools,
        files: &Files,
        column: Column,
    ) -> Result<Session> {
        let mut config = Config::new(engine, GUEST_MIB);
        config.file("guest/linux", &kit.kernel.image);
        for guest in &kit.guests {
            if let Some(name) = guest.file_name() {
                config.file(&format!("guests/{}", name.to_string_lossy()), guest);
            }
        }
        config.file("tools/kvm-monitor", &tools.kvm_monitor);
        config.file("tools/first-exit", &tools.first_exit);
        for (name, path) in files.in_host() {
            config.file(name, path);
        }
        if column == Column::Kvm {
            for module in KVM_MODULES {
                config.file(&format!("kvm/{module}"), &kit.kernel.modules.join(module));
            }
        }
        let mut host = lab::progress::step(&format!("host for {}", column.name()), || {
            Host::boot(dirs, kit, &config, &format!("bench-{}", column.name()))
        })?;
        host.must("chmod +x /tools/*", SHORT)?;
        match column {
            Column::Kvm => {
                for module in KVM_MODULES {
                    host.must(&format!("insmod /kvm/{module}"), SHORT)?;
                }
                host.must("mount -t debugfs debugfs /sys/kernel/debug", SHORT)?;
            }
            _ => host.load_vmm("")?,
        }
        Ok(Session {
            host,
            column,
            running: None,
        })
    }

    /// Starts a guest with these `-s` devices (from slot 3 on).
    ///
    /// # Errors
    /// It does not start.
    pub fn start(&mut self, mut guest: Guest, devices: &[&str]) -> Result<()> {
        match self.column {
            Column::Kvm => {
                let line = kvm_line(&guest, devices)?;
                self.host.must(&line, SHORT)?;
            }
            _ => {
                for (slot, device) in (3..).zip(devices) {
                    guest.options.push_str(&format!(" -s {slot},{device}"));
                }
                guest.start(&mut self.host)?;
            }
        }
        self.running = Some(guest);
        Ok(())
    }

    /// Waits for the guest's power-off and removes the VM.
    ///
    /// # Errors
    /// It ends otherwise.
    pub fn end(&mut self) -> Result<()> {
        let guest = self.running.take().context("no guest runs")?;
        guest.expect_exit(&mut self.host, 1, RUN)?;
        if self.column != Column::Kvm {
            guest.destroy(&mut self.host)?;
        }
        Ok(())
    }

    /// Types a line into the guest's shell; its output.
    ///
    /// # Errors
    /// Its status is not 0, or it does not end.
    pub fn types(&mut self, line: &str) -> Result<String> {
        let console = self.host.guest();
        console.send(format!("{line}; echo lab-status=$? lab-'end'\r").as_bytes())?;
        let found = console.expect(r"lab-status=(\d+) lab-end", RUN)?;
        ensure!(
            found.group(1) == "0",
            "`{line}` in the guest gives status {}:\n{}",
            found.group(1),
            found.before
        );
        Ok(found.before)
    }

    /// All exits of the running guest so far.
    ///
    /// # Errors
    /// Nobody tells.
    pub fn exits(&mut self) -> Result<u64> {
        if self.column == Column::Kvm {
            let text = self.host.must("cat /sys/kernel/debug/kvm/exits", SHORT)?;
            return text.trim().parse().context("KVM's count of exits");
        }
        let stats = self.host.stats("guest", 1)?;
        match stats.get("total number of vm exits") {
            Some(n) => Ok(*n),
            None => bail!("no count of exits among {:?}", stats::exits(&stats)),
        }
    }
}

/// The monitor's command line, in the place of bhyve's.
fn kvm_line(guest: &Guest, devices: &[&str]) -> Result<String> {
    let mut line = format!(
        "(/tools/kvm-monitor -m {} --kernel {}",
        guest.memory_mib, guest.kernel
    );
    if let Load::Linux { initrd, cmdline } = &guest.load {
        let initrd = initrd.as_ref().context("a Linux guest without initramfs")?;
        line.push_str(&format!(" --linux --initrd {initrd} --cmdline '{cmdline}'"));
    }
    for device in devices {
        line.push_str(&format!(" -s {device}"));
    }
    line.push_str(&format!(
        " </dev/ttyS1 >/dev/ttyS1 2>/tmp/bhyve.err; echo \"{GUEST_EXIT}$?\") &"
    ));
    Ok(line)
}
