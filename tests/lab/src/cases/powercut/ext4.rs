//! The same with a file system between: Linux writes files to ext4, made by
//! Debian's mke2fs, and says of each when fsync(2) has returned. After the cut the
//! journal is replayed, as at a mount; then the file system has to be whole, and
//! every acknowledged file on it.

use super::{BUS, Outcome, base, mode, random};
use crate::command;
use crate::dirs::Dirs;
use crate::guest::{Guest, Load, linux_cmdline, shell};
use crate::host::{self, Config, Host, Kit, SHORT};
use crate::machine::Engine;
use crate::runner::{Case, Group, Lab};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Files of a round, each of [`super::RECORD`] bytes.
const FILES: u64 = 200;
/// Of them it is one up to here whose acknowledgement is waited for.
const LAST: u64 = 60;
/// From bhyve's start to the guest's shell, and to a file.
const UP: Duration = Duration::from_secs(300);
const WRITTEN: Duration = Duration::from_secs(120);
const MODE: super::Mode = mode("files of ext4, fsync'ed", "", true, true);

fn image(dirs: &Dirs) -> PathBuf {
    dirs.target.join("powercut-ext4.img")
}

/// The host of a round.
///
/// # Errors
/// The image cannot be made.
pub fn config(dirs: &Dirs, kit: &Kit) -> Result<Config> {
    let mut config = Config::new(Engine::Qemu, 256);
    let modules = BUS.iter().chain(&["drivers/block/virtio_blk.ko"]);
    let modules: Vec<(String, PathBuf)> = modules
        .map(|m| {
            let path = kit.kernel.modules.join(m);
            Ok((base(&path)?, path))
        })
        .collect::<Result<_>>()?;
    for (name, path) in &modules {
        config.file(name, path);
    }
    let initrd = host::guest_initrd_with(dirs, "powercut-ext4-guest", &modules)?;
    config.file("guest/linux", &kit.kernel.image);
    config.file("guest/initrd", &initrd);
    let image = image(dirs);
    let _ = fs::remove_file(&image);
    let mut mke2fs = Command::new("/sbin/mke2fs");
    mke2fs.args(["-q", "-t", "ext4"]).arg(&image).arg("16m");
    command::output(&mut mke2fs)?;
    config.disk = Some(image);
    Ok(config)
}

/// A round on a host that is up, with vmm.ko in it; the host is gone afterwards.
///
/// # Errors
/// The guest does not get so far; the file system is damaged.
pub fn round(dirs: &Dirs, host: &mut Host) -> Result<Outcome> {
    let seed = random() % 1_000_000;
    let aim = 5 + random() % (LAST - 5);
    let late = Duration::from_micros(random() % 5000);
    let mut load_drivers = String::new();
    for module in BUS.iter().chain(&["drivers/block/virtio_blk.ko"]) {
        load_drivers += &format!("insmod /{} && ", base(Path::new(module))?);
    }
    host.must(&format!("{load_drivers} true"), SHORT)?;
    let load = Load::Linux {
        initrd: Some("/guest/initrd".to_owned()),
        cmdline: linux_cmdline(),
    };
    let mut guest = Guest::new("/guest/linux", load);
    guest.options = "-s 3,virtio-blk,/dev/vda".to_owned();
    guest.start(host)?;
    let console = host.guest();
    shell(console, UP)?;
    console.send(
        format!("{load_drivers} mkdir /new && mount -t ext4 /dev/vda /new && echo moun'ted'\r")
            .as_bytes(),
    )?;
    console.expect("mounted", SHORT)?;
    console.send(
        format!(
            "i=0; while [ $i -lt {FILES} ]; do printf '%4096d' $((i+{seed})) | \
             dd of=/new/f$i bs=4096 iflag=fullblock conv=fsync 2>/dev/null || break; \
             echo dur'able' $i; i=$((i+1)); done\r"
        )
        .as_bytes(),
    )?;
    console.expect(&format!(r"durable {aim}\r"), WRITTEN)?;
    std::thread::sleep(late);
    let said = host.cut()?;

    // The last line may have been cut too.
    let acknowledged = said
        .match_indices("durable ")
        .filter(|(at, _)| said[*at..].contains('\n'))
        .count() as u64;
    ensure!(
        (aim + 1..=FILES).contains(&acknowledged),
        "{acknowledged} acknowledgements after file {aim}:\n{said}"
    );
    let files = recovered(dirs)?;
    let lost = (0..acknowledged).filter(|number| {
        let wanted = format!("{:4096}", number + seed);
        let file = fs::read(files.join(format!("f{number}")));
        !file.is_ok_and(|f| f == wanted.as_bytes())
    });
    Ok(Outcome {
        mode: MODE,
        aim,
        acknowledged,
        lost: lost.collect(),
    })
}

/// What is in the file system, after its journal.
fn recovered(dirs: &Dirs) -> Result<PathBuf> {
    let image = image(dirs);
    let mut replay = Command::new("/sbin/e2fsck");
    command::output(replay.args(["-E", "journal_only", "-y"]).arg(&image))
        .context("the journal")?;
    // It says nothing of wrong counts of what is free: ext4 puts them right at a mount.
    let mut check = Command::new("/sbin/e2fsck");
    command::output(check.args(["-f", "-n"]).arg(&image)).context("a damaged file system")?;
    let to = dirs.fresh("powercut-ext4-files")?;
    let mut dump = Command::new("/sbin/debugfs");
    let line = format!("rdump / {}", to.display());
    command::output(dump.args(["-R", &line]).arg(&image))?;
    Ok(to)
}

/// One round.
///
/// # Errors
/// The image cannot be made.
pub fn group(lab: &Lab) -> Result<Group> {
    Ok(Group {
        name: "power-cut-ext4".to_owned(),
        config: config(&lab.dirs, &lab.kit)?,
        cases: vec![Case::new("power-cut-ext4", |lab, host| {
            super::judge(&round(&lab.dirs, host)?)
        })],
    })
}
