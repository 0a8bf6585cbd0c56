//! A host with one of the two hypervisors in it, and a guest on that.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use lab::guest::{Guest, Load};
use lab::host::{Config, GUEST_EXIT, Host, SHORT};
use lab::runner::Lab;
use lab::stats;

use crate::files::Files;
use crate::results::Column;
use crate::tools::Tools;
use crate::workload;

/// A guest's memory, MiB; the compiler's guest has to hold its own disk.
pub const GUEST_MIB: u32 = 512;
/// A guest from start to end.
const RUN: Duration = Duration::from_secs(1200);
/// KVM and what it stands on.
const KVM_MODULES: [&str; 2] = ["virt/lib/irqbypass.ko", "arch/x86/kvm/kvm.ko"];
/// Its half for VT-x, and that for AMD-V.
const KVM_INTEL: &str = "arch/x86/kvm/kvm-intel.ko";
const KVM_AMD: &str = "arch/x86/kvm/kvm-amd.ko";

/// A kind of exit: its name, what it is, and how many.
pub type Reason = (&'static str, &'static str, u64);

/// A tap for the guest's network card.
const TUN: &str = "drivers/net/tun.ko";

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
    pub fn boot(lab: &Lab, tools: &Tools, files: &Files, column: Column) -> Result<Session> {
        let kit = &lab.kit;
        let cpu = if lab.engine.is_amd() {
            KVM_AMD
        } else {
            KVM_INTEL
        };
        let kvm_modules = KVM_MODULES.into_iter().chain([cpu]);
        let mut config = Config::new(lab.engine, GUEST_MIB);
        config.count_instructions = true;
        config.file("guest/linux", &kit.kernel.image);
        for guest in &kit.guests {
            if let Some(name) = guest.file_name() {
                config.file(&format!("guests/{}", name.to_string_lossy()), guest);
            }
        }
        if let Some(monitor) = &tools.kvm_monitor {
            config.file("tools/kvm-monitor", monitor);
        }
        config.file("tools/first-exit", &tools.first_exit);
        for (name, path) in files.in_host() {
            config.file(name, path);
        }
        config.file("tun.ko", &kit.kernel.modules.join(TUN));
        if column == Column::Kvm {
            for module in kvm_modules.clone() {
                config.file(&format!("kvm/{module}"), &kit.kernel.modules.join(module));
            }
        }
        let mut host = lab::progress::step(&format!("host for {}", column.name()), || {
            Host::boot(&lab.dirs, kit, &config, &format!("bench-{}", column.name()))
        })?;
        host.must("chmod +x /tools/* && insmod /tun.ko", SHORT)?;
        match column {
            Column::Kvm => {
                for module in kvm_modules {
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

    /// As [`workload::types`], in the guest.
    ///
    /// # Errors
    /// As there.
    pub fn types(&mut self, line: &str) -> Result<String> {
        workload::types(self.host.guest(), line)
    }

    /// Exits of the running guest so far, all and by reason: a name, what it is,
    /// and how many.
    ///
    /// # Errors
    /// Nobody tells.
    pub fn reasons(&mut self) -> Result<Vec<Reason>> {
        let table: [(Reason, &[&str], &[&str]); 7] = [
            (
                ("boot_exits", "exits of that boot", 0),
                &["total number of vm exits"],
                &["exits"],
            ),
            (
                ("boot_exits_io", "of these, port I/O", 0),
                &["number of times in/out was intercepted"],
                &["io_exits"],
            ),
            (
                ("boot_exits_memory", "of these, EPT violations and MMIO", 0),
                &[
                    "vm exits due to nested page fault",
                    "vm exits for instruction emulation",
                ],
                &["pf_taken"],
            ),
            (
                (
                    "boot_exits_interrupt",
                    "of these, interrupts and timers of the host",
                    0,
                ),
                &[
                    "vm exits due to external interrupt",
                    "vm exits due to preemption timer",
                ],
                &["irq_exits"],
            ),
            (
                ("boot_exits_window", "of these, interrupt window", 0),
                &["vm exits due to interrupt window opening"],
                &["irq_window_exits"],
            ),
            (
                ("boot_exits_hlt", "of these, HLT", 0),
                &["number of times hlt was intercepted"],
                &["halt_exits"],
            ),
            (
                ("boot_exits_userland", "of these, to userland", 0),
                &["number of vm exits handled in userspace"],
                &["io_exits", "mmio_exits"],
            ),
        ];
        let mut counts = Vec::new();
        if self.column == Column::Kvm {
            for (reason, _, files) in table {
                let mut sum = 0;
                for file in files {
                    sum += self.kvm(file)?;
                }
                counts.push((reason.0, reason.1, sum));
            }
            return Ok(counts);
        }
        let stats = self.host.stats("guest", 1)?;
        for (reason, names, _) in table {
            let sum = names.iter().filter_map(|n| stats.get(*n)).sum();
            counts.push((reason.0, reason.1, sum));
        }
        Ok(counts)
    }

    /// A count of KVM's own.
    fn kvm(&mut self, name: &str) -> Result<u64> {
        let line = format!("cat /sys/kernel/debug/kvm/{name}");
        let text = self.host.must(&line, SHORT)?;
        text.trim()
            .parse()
            .with_context(|| format!("KVM's count {name}"))
    }

    /// All exits of the running guest so far.
    ///
    /// # Errors
    /// Nobody tells.
    pub fn exits(&mut self) -> Result<u64> {
        if self.column == Column::Kvm {
            return self.kvm("exits");
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
