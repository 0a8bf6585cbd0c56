//! A guest in a host: the command lines that load and run it, and its end.

use crate::console::Console;
use crate::host::{GUEST_EXIT, Host, LEAN, SHORT};
use crate::machine::Engine;
use anyhow::{Result, bail, ensure};
use std::time::Duration;

/// What bhyveload is to load; paths are the host's.
#[derive(Debug, Clone)]
pub enum Load {
    /// A FreeBSD kernel.
    FreeBsd {
        /// Memory-disk root.
        mfsroot: Option<String>,
        /// Modules.
        modules: Vec<String>,
    },
    /// FreeBSD by its own loader's means, from disk images.
    Disk {
        /// Images, disk0 first.
        images: Vec<String>,
    },
    /// A Linux bzImage.
    Linux {
        /// Initramfs.
        initrd: Option<String>,
        /// Kernel command line.
        cmdline: String,
    },
    /// A multiboot kernel.
    Multiboot {
        /// Modules.
        modules: Vec<String>,
    },
}

/// A guest to run.
#[derive(Debug, Clone)]
pub struct Guest {
    /// The VM's name.
    pub vm: String,
    /// Kernel file in the host.
    pub kernel: String,
    /// What kind of kernel, and what goes with it.
    pub load: Load,
    /// Kernel environment, `NAME=VALUE`.
    pub environment: Vec<String>,
    /// vCPUs.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// More options for bhyveload.
    pub load_options: String,
    /// More options for bhyve.
    pub options: String,
}

impl Guest {
    /// A guest called `guest`, with one vCPU and 256 MiB.
    pub fn new(kernel: &str, load: Load) -> Self {
        Self {
            vm: "guest".to_owned(),
            kernel: kernel.to_owned(),
            load,
            environment: Vec::new(),
            vcpus: 1,
            memory_mib: 256,
            load_options: String::new(),
            options: String::new(),
        }
    }

    /// bhyveload's command line.
    pub fn load_line(&self) -> String {
        let mut words = vec![format!("bhyveload -m {}M", self.memory_mib)];
        let mut option = |name: &str, value: &str| words.push(format!("{name} {}", quoted(value)));
        match &self.load {
            Load::FreeBsd { mfsroot, modules } => {
                option("--kernel", &self.kernel);
                if let Some(file) = mfsroot {
                    option("--mfsroot", file);
                }
                for module in modules {
                    option("--module", module);
                }
            }
            Load::Disk { images } => {
                for image in images {
                    option("-d", image);
                }
            }
            Load::Linux { initrd, cmdline } => {
                option("--linux", &self.kernel);
                if let Some(file) = initrd {
                    option("--initrd", file);
                }
                option("--cmdline", cmdline);
            }
            Load::Multiboot { modules } => {
                option("--multiboot", &self.kernel);
                for module in modules {
                    option("--module", module);
                }
            }
        }
        for variable in &self.environment {
            option("-e", variable);
        }
        if !self.load_options.is_empty() {
            words.push(self.load_options.clone());
        }
        words.push(self.vm.clone());
        // Nobody sits at the loader, so it does not wait for a key.
        words.push("</dev/null".to_owned());
        words.join(" ")
    }

    /// bhyve's command line, in the background of the host's shell, with its
    /// console on COM2. The counter is read the moment bhyve ends, and the end
    /// announced on COM1.
    pub fn run_line(&self, host: &Host) -> String {
        let Self {
            vm,
            vcpus,
            memory_mib,
            options,
            ..
        } = self;
        let (port, clocks) = (host.guest_port(), host.clocks());
        format!(
            "rm -f /tmp/bhyve.end; (bhyve -A -H -c {vcpus} -m {memory_mib}M -s 0,hostbridge -s 31,lpc \
             -l com1,stdio {options} {vm} <{port} >{port} 2>/tmp/bhyve.err; status=$?; \
             {clocks} >/tmp/bhyve.end; echo \"{GUEST_EXIT}$status\") &"
        )
    }

    /// Loads the guest and starts bhyve.
    ///
    /// # Errors
    /// bhyveload fails, or the host has gone.
    pub fn start(&self, host: &mut Host) -> Result<()> {
        host.must(&self.load_line(), Duration::from_secs(120))?;
        let line = self.run_line(host);
        host.must(&line, SHORT)?;
        Ok(())
    }

    /// Waits for bhyve's end and checks its exit status.
    ///
    /// # Errors
    /// Another status, or no end within `timeout`.
    pub fn expect_exit(&self, host: &mut Host, status: i32, timeout: Duration) -> Result<()> {
        let deadline = std::time::Instant::now() + timeout;
        let found = loop {
            if let Some(found) = host.guest_exit(Duration::from_millis(200))? {
                break found;
            }
            ensure!(
                std::time::Instant::now() < deadline,
                "bhyve has not ended after {} s; its console:\n{}",
                timeout.as_secs(),
                host.guest().tail()
            );
        };
        ensure!(
            found == status,
            "bhyve's exit status is {found}, not {status}: {}\nits console:\n{}",
            said(host),
            host.guest().tail()
        );
        Ok(())
    }

    /// Removes the VM.
    ///
    /// # Errors
    /// bhyvectl fails.
    pub fn destroy(&self, host: &mut Host) -> Result<()> {
        host.must(&format!("bhyvectl --destroy --vm={}", self.vm), SHORT)
            .map(drop)
    }
}

/// Waits for the shell of a Linux guest, at most `limit`. What is typed while
/// it starts is lost now and then: a guest with interrupts off keeps the host
/// from its serial port, whose FIFO has 16 bytes.
///
/// # Errors
/// It does not come, or does not answer.
pub fn shell(console: &mut Console, limit: Duration) -> Result<()> {
    const ANSWER: Duration = Duration::from_secs(5);
    console.expect("guest# ", limit)?;
    for _ in 0..10 {
        std::thread::sleep(Duration::from_millis(200));
        console.send(b"\r")?;
        if console.try_expect("guest# ", ANSWER)?.is_some() {
            return Ok(());
        }
    }
    bail!("the guest's shell does not answer:\n{}", console.tail())
}

/// A Linux guest's command line where nothing else is asked.
pub fn linux_cmdline() -> String {
    format!("console=ttyS0,115200 {LEAN}")
}

/// The same where instructions are counted, in a guest and on the bare `engine`
/// alike: without what mitigates a speculation that does not happen, and without
/// randomness in the addresses of kernel and programs.
pub fn counted_cmdline(engine: Engine) -> String {
    format!(
        "{} nokaslr norandmaps {} {}",
        linux_cmdline(),
        engine.kernel_parameters(),
        engine.host_parameters()
    )
}

/// What bhyve and the host's kernel have said of late.
pub fn said(host: &mut Host) -> String {
    host.run("cat /tmp/bhyve.err; dmesg | tail -n 30", SHORT)
        .map_or_else(|e| format!("(host gone: {e})"), |o| o.text)
}

/// One word for the host's shell.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}
