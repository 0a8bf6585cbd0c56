//! Devices of the host's given to guests. Only QEMU emulates IOMMUs: VT-d and AMD-Vi,
//! both beside AMD-V. The host is Linux; its cloud kernel has a driver for VT-d, which
//! can be told to keep away, and for NVMe; none for AMD-Vi, none for e1000e.

mod bridges;
mod freebsd;
mod left;
mod linux;
mod shared;

use crate::cases::guests;
use crate::guest::{Guest, said};
use crate::host::{Config, Host, SHORT};
use crate::machine::{Engine, Iommu};
use crate::runner::{Case, Group, Lab};
use anyhow::{Context, Result, ensure};
use left::{Driver, Holder};
use std::time::Duration;

/// From bhyve's start to the guest's shell.
const UP: Duration = Duration::from_secs(400);
/// A transfer of edu's takes 100 ms.
const RUN: Duration = Duration::from_secs(300);
const EDU: &str = "0000:00:05.0";
const NIC: &str = "0000:00:06.0";
const NVME: &str = "0000:00:07.0";
/// Instructions from what asks edu for an interrupt to the guest's handler, at most.
const INTERRUPT: u64 = 3000;
/// MiB that a guest writes to the disk and the host reads.
const MIB: u32 = 4;
/// Set to a number, it is how often a guest with a device is killed.
const CYCLES: &str = "BHYVE_LAB_CYCLES";
/// As often in every run.
const FEW: u32 = 3;
/// Set to a number, it is how many seconds of the guest's its devices are kept busy.
const SECONDS: &str = "BHYVE_LAB_SECONDS";
/// So many in every run.
const A_FEW_SECONDS: u32 = 5;

/// The hosts and their tests.
///
/// # Errors
/// An image cannot be made.
pub fn groups(lab: &Lab) -> Result<Vec<Group>> {
    let small = Group {
        name: "passthru".to_owned(),
        config: config(lab, "small", 128, Iommu::Intel { interrupts: true })?,
        cases: vec![
            Case::new("passthru-words", words),
            Case::new("passthru-edu", edu),
            Case::new("passthru-cycles", |_, host| cycles(Driver::Hosts, host)),
            Case::new("passthru-reset", reset),
        ],
    };
    let mut vtd = Group {
        name: "passthru-own-vtd".to_owned(),
        config: config(lab, "vtd", 128, Iommu::Intel { interrupts: false })?,
        cases: vec![Case::new("passthru-own-vtd", |_, host| {
            open_interrupts(host)?;
            bridges::own_groups(host)?;
            // QEMU's unit keeps one fault of a function until it is read.
            own(
                host,
                &["vmm: ppt 0/5/0: DMA write to 0xa000000 is not allowed"],
            )?;
            // QEMU's AMD-Vi has what is behind a port come from bus 0.
            left::forgotten(host)?;
            cycles(Driver::Own, host)
        })],
    };
    vtd.config.pci.arguments.extend(bridges::pair());
    vtd.config.pci.arguments.extend(left::port());
    vtd.config.cmdline = "intel_iommu=off no_timer_check".to_owned();
    let amdvi = Group {
        name: "passthru-own-amdvi".to_owned(),
        config: config(lab, "amdvi", 128, Iommu::Amd)?,
        cases: vec![Case::new("passthru-own-amdvi", |_, host| {
            // It remaps the interrupts of one function, so that nothing has to be
            // allowed. QEMU's unit says nothing of an entry that is not present.
            own(host, &[])?;
            cycles(Driver::Own, host)?;
            // The data is the entry's number.
            let wrong = Wrong {
                own: Some("00 00"),
                at: 0x4c,
                bytes: "\\101\\0",
            };
            remapped(host, &wrong)
        })],
    };
    Ok(vec![
        small,
        bridges::group(lab),
        linux::group(lab)?,
        freebsd::group(lab)?,
        vtd,
        shared::group(lab)?,
        amdvi,
    ])
}

/// A host with all three; `name` is its disk's.
fn config(lab: &Lab, name: &str, guest_mib: u32, iommu: Iommu) -> Result<Config> {
    let mut config = with_iommu(lab, guest_mib, iommu);
    // One each: the hosts may run at the same time.
    let disk = lab.dirs.fresh(&format!("passthru-disk-{name}"))?;
    let disk = disk.join("disk");
    std::fs::File::create(&disk)?.set_len(64 << 20)?;
    let drive = format!("file={},if=none,id=disk,format=raw", disk.display());
    for word in [
        "-device",
        "edu,addr=5.0,dma_mask=0xffffffffff",
        "-netdev",
        "user,id=net,restrict=on,guestfwd=tcp:10.0.2.100:7-cmd:cat",
        "-device",
        "e1000e,netdev=net,addr=6.0",
        "-drive",
        &drive,
        "-device",
        "nvme,drive=disk,serial=lab,addr=7.0",
    ] {
        config.pci.arguments.push(word.to_owned());
    }
    left::program(&lab.dirs, &mut config, name)?;
    Ok(config)
}

/// A host with an IOMMU and our guest for edu.
fn with_iommu(lab: &Lab, guest_mib: u32, iommu: Iommu) -> Config {
    // Of the engines only this one has an IOMMU.
    let mut config = Config::new(Engine::Qemu, guest_mib);
    config.count_instructions = true;
    // On a busy machine the kernel may take the timer for dead while it boots.
    config.cmdline = "intel_iommu=on no_timer_check".to_owned();
    config.pci.iommu = iommu;
    for guest in &lab.kit.guests {
        if guest.ends_with("edu") {
            config.file("guests/edu", guest);
        }
    }
    config
}

/// Gives a function to ppt by the words that `bhyvectl passthru list` prints.
fn to_ppt(host: &mut Host, name: &str) -> Result<()> {
    let folder = format!("/sys/bus/pci/devices/{name}");
    let line = format!(
        "echo ppt >{folder}/driver_override; \
         if [ -e {folder}/driver ]; then echo {name} >{folder}/driver/unbind; fi; \
         echo {name} >/sys/bus/pci/drivers_probe; readlink {folder}/driver"
    );
    let driver = host.must(&line, SHORT)?;
    ensure!(driver.trim().ends_with("/ppt"), "{name} has {driver}");
    Ok(())
}

/// Gives it back to whoever of the host wants it.
fn to_host(host: &mut Host, name: &str) -> Result<()> {
    let folder = format!("/sys/bus/pci/devices/{name}");
    let line = format!(
        "echo >{folder}/driver_override; echo {name} >{folder}/driver/unbind; \
         echo {name} >/sys/bus/pci/drivers_probe"
    );
    host.must(&line, SHORT).map(drop)
}

fn small(options: &str) -> Guest {
    let mut guest = guests::small("edu");
    guest.load_options = "-S".to_owned();
    guest.options = format!("-S {options}");
    guest
}

/// What is in the way is said by both programs, in the same words; and what to type
/// helps.
fn words(_: &Lab, host: &mut Host) -> Result<()> {
    let list = host.must("bhyvectl passthru list", SHORT)?;
    let line = |name: &str| {
        let line = list.lines().find(|l| l.starts_with(name));
        line.with_context(|| format!("no {name} in:\n{list}"))
    };
    ensure!(line("0000:00:00.0")?.contains("no: is a part of"), "{list}");
    ensure!(line(NVME)?.contains("nvme"), "{list}");
    ensure!(line(EDU)?.ends_with("not yet, see below"), "{list}");
    let said = format!("{EDU} (0/5/0) cannot be passed:");
    let advice: Vec<&str> = list
        .lines()
        .skip_while(|l| *l != said)
        .take_while(|l| !l.is_empty())
        .collect();
    ensure!(advice.len() > 2, "no advice for {EDU} in:\n{list}");
    let mut guest = small("-s 5,passthru,0/5/0");
    guest.start(host)?;
    guest.expect_exit(host, 4, SHORT)?;
    let error = host.must("cat /tmp/bhyve.err", SHORT)?;
    for line in &advice {
        ensure!(error.contains(line), "not {line:?}, but\n{error}");
    }
    for command in advice.iter().filter_map(|l| l.strip_prefix("    ")) {
        host.must(command, SHORT)?;
    }
    let list = host.must("bhyvectl passthru list", SHORT)?;
    let edu = list.lines().find(|l| l.starts_with(EDU));
    ensure!(edu.is_some_and(|l| l.ends_with("yes")), "{list}");
    guest.destroy(host)?;
    // Memory that is not wired.
    guest.options = "-s 5,passthru,0/5/0".to_owned();
    guest.start(host)?;
    guest.expect_exit(host, 4, SHORT)?;
    let error = host.must("cat /tmp/bhyve.err", SHORT)?;
    ensure!(error.contains("give -S"), "{error}");
    guest.destroy(host)?;
    to_host(host, EDU)
}

/// Registers, a thousand interrupts, DMA, DMA to where the guest has no memory.
fn edu(_: &Lab, host: &mut Host) -> Result<()> {
    to_ppt(host, EDU)?;
    host.must("dmesg -c >/dev/null", SHORT)?;
    let text = guests::passes(host, &small("-s 5,passthru,0/5/0"))?;
    let cost = text
        .lines()
        .find_map(|l| l.strip_prefix("edu: interrupt "))
        .context("it has not counted interrupts")?;
    println!("passthru-edu: an interrupt takes (least, mean) {cost} instructions");
    let least: u64 = cost.split(' ').next().unwrap_or_default().trim().parse()?;
    ensure!(
        least <= INTERRUPT,
        "an interrupt takes {least} instructions, more than {INTERRUPT}"
    );
    let log = host.must("dmesg", SHORT)?;
    ensure!(
        log.contains("DMAR") && log.contains("00:05.0"),
        "DMA to nowhere is not in the host's log:\n{log}"
    );
    to_host(host, EDU)
}

/// Our own VT-d driver remaps no interrupts, which has to be allowed.
fn open_interrupts(host: &mut Host) -> Result<()> {
    to_ppt(host, EDU)?;
    let guest = small("-s 5,passthru,0/5/0");
    guest.start(host)?;
    guest.expect_exit(host, 4, SHORT)?;
    let error = host.must("cat /tmp/bhyve.err", SHORT)?;
    ensure!(error.contains("unsafe_interrupts"), "{error}");
    guest.destroy(host)?;
    host.must(
        "echo 1 >/sys/module/vmm/parameters/unsafe_interrupts",
        SHORT,
    )?;
    to_host(host, EDU)
}

/// The host's kernel does not use the IOMMU: our own driver does. `faults`: what it, or
/// the kernel, says of DMA to nowhere, one of them.
fn own(host: &mut Host, faults: &[&str]) -> Result<()> {
    to_ppt(host, EDU)?;
    let list = host.must("bhyvectl passthru list", SHORT)?;
    let edu = list.lines().find(|l| l.starts_with(EDU));
    ensure!(edu.is_some_and(|l| l.ends_with("yes")), "{list}");
    let guest = small("-s 5,passthru,0/5/0");
    // What is in the log already is not of this.
    let lines = "dmesg | wc -l";
    let before: usize = host.must(lines, SHORT)?.trim().parse()?;
    guests::passes(host, &guest)?;
    let log = host.must("dmesg", SHORT)?;
    let is_on = "vmm: the IOMMU at ";
    ensure!(log.contains(is_on), "no {is_on:?} in the log:\n{log}");
    let new = |text: &str| log.lines().skip(before).any(|l| l.contains(text));
    ensure!(
        faults.is_empty() || faults.iter().any(|f| new(f)),
        "none of {faults:?} in the log:\n{log}"
    );
    to_host(host, EDU)
}

/// A message that is not edu's own.
struct Wrong {
    /// What its own has there.
    own: Option<&'static str>,
    /// Where the message is (PCI Local Bus 3.0 §6.8.1), an offset of configuration space.
    at: u32,
    /// As for printf.
    bytes: &'static str,
}

/// edu's interrupts go through a table in which it has its own entry alone: when it
/// sends another message, nothing arrives, and it all comes back with its own. Here the
/// host changes the message; the guest goes on whether interrupts come or not.
fn remapped(host: &mut Host, wrong: &Wrong) -> Result<()> {
    to_ppt(host, EDU)?;
    let mut guest = small("-s 5,passthru,0/5/0");
    guest.environment.push("guest.poll=1".to_owned());
    guest.start(host)?;
    host.guest()
        .expect("edu: busy", RUN)
        .map_err(|e| e.context(said(host)))?;
    // The line with its counts.
    let count = "n=$(grep 'ppt 00:05.0' /proc/interrupts)";
    let more = format!(
        "{count}; m=$n; i=0; while [ \"$n\" = \"$m\" ] && [ $i -lt 600 ]; do i=$((i+1)); sleep 0.1; {count}; done; \
         [ -n \"$n\" ] && [ \"$n\" != \"$m\" ]"
    );
    host.must(&more, RUN)?;
    let Wrong { own, at, bytes } = wrong;
    let place = format!("/sys/bus/pci/devices/{EDU}/config bs=1");
    let save = format!(
        "printf '{bytes}' >/tmp/wrong; \
         dd if={place} skip={at} count=$(wc -c </tmp/wrong) of=/tmp/own 2>/dev/null; \
         od -An -tx1 /tmp/own; dmesg -c >/dev/null"
    );
    let read = host.must(&save, SHORT)?;
    ensure!(own.is_none_or(|own| read.trim() == own), "it sends {read}");
    let send = |file: &str| format!("dd if=/tmp/{file} of={place} seek={at} conv=notrunc");
    let none = format!(
        "{}; sleep 1; {count}; m=$n; sleep 2; {count}; \
         echo \"$m\" \"$n\"; [ -n \"$n\" ] && [ \"$n\" = \"$m\" ]",
        send("wrong")
    );
    host.must(&none, SHORT)?;
    let log = host.must("dmesg", SHORT)?;
    ensure!(
        !log.contains("No irq handler for vector"),
        "the host got an interrupt that is nobody's:\n{log}"
    );
    host.must(&send("own"), SHORT)?;
    host.must(&more, RUN)?;
    host.must("kill -9 $(pidof bhyve)", SHORT)?;
    guest.expect_exit(host, 128 + 9, SHORT)?;
    guest.destroy(host)?;
    to_host(host, EDU)
}

/// A function does no DMA.
fn quiet(host: &mut Host, name: &str) -> Result<()> {
    let line = format!(
        "dd if=/sys/bus/pci/devices/{name}/config bs=1 skip=4 count=1 2>/dev/null | od -An -tx1"
    );
    let command = host.must(&line, SHORT)?;
    let command =
        u8::from_str_radix(command.trim(), 16).with_context(|| format!("no byte: {command:?}"))?;
    ensure!(command & 4 == 0, "{name} is bus master still: {command:#x}");
    Ok(())
}

/// The guest resets its machine in the middle of the device's DMA, and what is
/// started in the same VM then finds the device as new.
fn reset(_: &Lab, host: &mut Host) -> Result<()> {
    to_ppt(host, EDU)?;
    let mut guest = small("-s 5,passthru,0/5/0");
    guest.environment.push("guest.reset=1".to_owned());
    guest.start(host)?;
    host.guest()
        .expect("edu: reset", RUN)
        .map_err(|e| e.context(said(host)))?;
    guest.expect_exit(host, 0, SHORT)?;
    quiet(host, EDU)?;
    // There is no way to reset edu: its transfer, which gets nowhere, lasts 100 ms.
    host.must("sleep 1", SHORT)?;
    guest.environment.clear();
    guests::passes(host, &guest)?;
    quiet(host, EDU)?;
    to_host(host, EDU)
}

/// How long devices are to be kept busy.
fn seconds() -> Result<u32> {
    match std::env::var(SECONDS) {
        Ok(n) => n.parse().with_context(|| format!("{SECONDS}={n}")),
        Err(_) => Ok(A_FEW_SECONDS),
    }
}

/// The host reads the first [`MIB`] of the disk, which is its own again, and their
/// MD5 is to be `sum`.
fn host_reads(host: &mut Host, sum: &str) -> Result<()> {
    let line = format!(
        "i=0; while [ ! -b /dev/nvme0n1 ] && [ $i -lt 100 ]; do i=$((i+1)); sleep 0.1; done; \
         head -c {MIB}m /dev/nvme0n1 | md5sum"
    );
    let read = host.must(&line, SHORT)?;
    ensure!(read.contains(sum), "the host reads {read}, not {sum}");
    Ok(())
}

/// bhyve killed while the device does DMA, again and again; each time the host can use
/// the device, which reaches nothing of the guest's.
fn cycles(driver: Driver, host: &mut Host) -> Result<()> {
    let count = match std::env::var(CYCLES) {
        Ok(n) => n.parse().with_context(|| format!("{CYCLES}={n}"))?,
        Err(_) => FEW,
    };
    for n in 1..=count {
        cycle(driver, host, n, n == 1 || n == count)
            .with_context(|| format!("round {n} of {count}"))?;
    }
    Ok(())
}

fn cycle(driver: Driver, host: &mut Host, n: u32, thorough: bool) -> Result<()> {
    to_ppt(host, EDU)?;
    to_ppt(host, NVME)?;
    let mut guest = small("-s 5,passthru,0/5/0 -s 7,passthru,0/7/0");
    guest.environment.push("guest.wait=1".to_owned());
    guest.start(host)?;
    host.guest()
        .expect("edu: busy", RUN)
        .map_err(|e| e.context(said(host)))?;
    host.must("kill -9 $(pidof bhyve)", SHORT)?;
    guest.expect_exit(host, 128 + 9, SHORT)?;
    // A device that goes on would be seen here.
    quiet(host, EDU)?;
    guest.destroy(host)?;
    left::check(host, driver, Holder::Ppt, false)?;
    to_host(host, EDU)?;
    to_host(host, NVME)?;
    left::check(host, driver, Holder::Host, thorough)?;
    // The host's own driver reads and writes the disk.
    let line = format!(
        "i=0; while [ ! -b /dev/nvme0n1 ] && [ $i -lt 100 ]; do i=$((i+1)); sleep 0.1; done; \
         echo round {n} | dd of=/dev/nvme0n1 bs=512 conv=sync,fsync 2>/dev/null && \
         echo 3 >/proc/sys/vm/drop_caches && head -c 16 /dev/nvme0n1"
    );
    let read = host.must(&line, SHORT)?;
    ensure!(
        read.contains(&format!("round {n}")),
        "the disk has {read:?}"
    );
    Ok(())
}
