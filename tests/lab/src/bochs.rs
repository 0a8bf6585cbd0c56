//! Bochs: VT-x emulated, and time a function of instructions. Debian's 2.7, or
//! another that the environment names.

use anyhow::{Context, Result};
use std::env;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;

/// Instructions per emulated second. Near to what Bochs really does, so that
/// emulated time is near to real time while the machine is busy.
pub const IPS: u32 = 50_000_000;

/// The path of a Bochs newer than Debian's. It is taken to deliver interrupts by
/// VMCS as the manual has it, and to tell the size of the compacted XSAVE area:
/// the workarounds for 2.7 are left out.
const OTHER: &str = "BHYVE_LAB_BOCHS";
/// The CPU model of Bochs, by its own name for it.
const MODEL: &str = "BHYVE_LAB_BOCHS_CPU";

/// Whether the environment names another Bochs than Debian's.
pub fn is_other() -> bool {
    other().is_some()
}

fn other() -> Option<OsString> {
    env::var_os(OTHER).filter(|path| !path.is_empty())
}

/// Starts Bochs from a CD with COM1 and COM2 connected to these loopback ports.
///
/// # Errors
/// The disk is full or there is no Bochs.
pub fn spawn(cpus: u32, memory_mib: u32, iso: &Path, dir: &Path, ports: [u16; 2]) -> Result<Child> {
    let rc = dir.join("bochsrc");
    fs::write(&rc, configuration(cpus, memory_mib, dir, iso, ports))?;
    // Debian's build has the debugger, which waits for this.
    let go = dir.join("debugger.rc");
    fs::write(&go, "c\n")?;
    // The display "term" wants a terminal; nobody looks at it.
    let pty = nix::pty::openpty(None, None).context("no pseudo-terminal")?;
    let slave = || -> Result<Stdio> { Ok(pty.slave.try_clone()?.into()) };
    // pdeathsig: an emulator must not outlive us, however we end.
    let child = Command::new("setpriv")
        .args(["--pdeathsig", "KILL"])
        .arg(other().unwrap_or_else(|| "bochs".into()))
        .args(["-q", "-f"])
        .arg(&rc)
        .arg("-rc")
        .arg(&go)
        .env("TERM", "xterm")
        .env_remove("BOCHSRC")
        .stdin(slave()?)
        .stdout(slave()?)
        .stderr(slave()?)
        .current_dir(dir)
        .spawn()
        .context("cannot start Bochs")?;
    drop(pty.slave);
    let mut screen = File::from(pty.master);
    thread::spawn(move || {
        let mut buffer = [0_u8; 4096];
        // Ends with EIO when Bochs has gone.
        while screen.read(&mut buffer).is_ok_and(|n| n > 0) {}
    });
    Ok(child)
}

fn configuration(cpus: u32, memory_mib: u32, dir: &Path, iso: &Path, ports: [u16; 2]) -> String {
    let serial = |n: usize, port: u16| {
        format!("com{n}: enabled=1, mode=socket-client, dev=127.0.0.1:{port}\n")
    };
    let model = env::var(MODEL).unwrap_or_else(|_| "corei7_skylake_x".to_owned());
    format!(
        "config_interface: textconfig\n\
         display_library: term\n\
         cpu: model={model}, count={cpus}, ips={IPS}, reset_on_triple_fault=0, ignore_bad_msrs=1\n\
         memory: guest={memory_mib}, host={memory_mib}\n\
         romimage: file=/usr/share/bochs/BIOS-bochs-latest\n\
         vgaromimage: file=/usr/share/vgabios/vgabios.bin\n\
         vga: extension=vbe, update_freq=1\n\
         ata0-master: type=cdrom, path={iso}, status=inserted\n\
         boot: cdrom\n\
         clock: sync=none, time0=utc\n\
         {com1}{com2}\
         log: {log}\n\
         panic: action=fatal\n\
         error: action=ignore\n\
         info: action=ignore\n\
         debug: action=ignore\n",
        iso = iso.display(),
        com1 = serial(1, ports[0]),
        com2 = serial(2, ports[1]),
        log = dir.join("bochs.log").display(),
    )
}
