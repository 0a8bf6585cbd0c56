//! Power cuts: a guest writes numbered records and says of each when it is
//! durable; in the middle of it SIGKILL takes the machine that its host runs on,
//! and everything with it. What was acknowledged must be on the disk.
//!
//! The guest's disk is the host's own disk, /dev/vda, whose image is a file of
//! this machine: what bhyve's host has in its cache only is lost. QEMU runs the
//! host, for Bochs has no disk that Debian's cloud kernel knows.

pub mod ext4;

use super::virtio::{BUS, base};
use crate::dirs::Dirs;
use crate::guest::{Guest, Load};
use crate::host::{Config, Host, Kit, SHORT};
use crate::machine::Engine;
use crate::runner::{Case, Group, Lab};
use anyhow::{Context, Result, ensure};
use std::fmt;
use std::fs::File;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Records of a round, as `tests/guests/src/bin/powercut.rs` writes them.
const RECORDS: u64 = 200;
const RECORD: usize = 4096;
/// The disk has room for all of them, and for what else the guest does not touch.
const DISK: u64 = 2 << 20;
/// From bhyve's start to a record.
const WRITTEN: Duration = Duration::from_secs(120);
const IMAGE: &str = "powercut.img";

/// What makes an acknowledged record durable.
#[derive(Clone, Copy, Debug)]
pub struct Mode {
    /// Its name.
    pub name: &'static str,
    /// Options behind the disk's path.
    options: &'static str,
    /// The guest's driver knows of flushes.
    feature: bool,
    /// The guest flushes after each write.
    flush: bool,
    /// It is a control: nothing makes anything durable.
    pub control: bool,
}

const fn mode(name: &'static str, options: &'static str, feature: bool, flush: bool) -> Mode {
    Mode {
        name,
        options,
        feature,
        flush,
        control: false,
    }
}

/// Every way in which a write is said to be durable.
pub const MODES: [Mode; 5] = [
    mode("write and flush", "", true, true),
    mode("sync", ",sync", true, false),
    mode("direct", ",direct", true, false),
    mode("nocache, write and flush", ",nocache", true, true),
    mode("a driver without flushes", "", false, false),
];

/// Writes that nobody flushes: a cut that takes none of them is no power cut.
pub const CONTROL: Mode = Mode {
    control: true,
    ..mode("control: no flush", "", true, false)
};

/// What a round came to.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Its mode.
    pub mode: Mode,
    /// The record whose acknowledgement was waited for.
    pub aim: u64,
    /// How many were acknowledged when the power went.
    pub acknowledged: u64,
    /// Records that were acknowledged and are not on the disk.
    pub lost: Vec<u64>,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: cut after record {}, {} acknowledged, {} of them lost",
            self.mode.name,
            self.aim,
            self.acknowledged,
            self.lost.len()
        )
    }
}

/// Any number.
fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// Word `at` of record `number`, as the guest makes it.
fn word(seed: u64, number: u64, at: u64) -> u64 {
    seed.wrapping_add(number << 16)
        .wrapping_add(at)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// The disk's image, in the place that every round's host finds it.
fn image(dirs: &Dirs) -> PathBuf {
    dirs.target.join(IMAGE)
}

/// The host of a round.
///
/// # Errors
/// The image cannot be made.
pub fn config(dirs: &Dirs, kit: &Kit) -> Result<Config> {
    let mut config = Config::new(Engine::Qemu, 128);
    for module in BUS.iter().chain(&["drivers/block/virtio_blk.ko"]) {
        let path = kit.kernel.modules.join(module);
        config.file(&base(&path)?, &path);
    }
    let guest = kit.guests.iter().find(|g| g.ends_with("powercut"));
    config.file("guest", guest.context("no guest of that name")?);
    let image = image(dirs);
    File::create(&image)?.set_len(DISK)?;
    config.disk = Some(image);
    Ok(config)
}

/// A round on a host that is up, with vmm.ko in it; the host is gone afterwards.
///
/// # Errors
/// The guest does not get so far, or says that it could not write.
pub fn round(dirs: &Dirs, host: &mut Host, mode: Mode) -> Result<Outcome> {
    let seed = random() >> 1;
    let aim = 20 + random() % (RECORDS - 40);
    // Somewhere between two acknowledgements, or a few.
    let late = Duration::from_micros(random() % 5000);
    for module in BUS.iter().chain(&["drivers/block/virtio_blk.ko"]) {
        host.must(&format!("insmod /{}", base(Path::new(module))?), SHORT)?;
    }
    let load = Load::FreeBsd {
        mfsroot: None,
        modules: Vec::new(),
    };
    let mut guest = Guest::new("/guest", load);
    guest.memory_mib = 128;
    guest.options = format!("-s 3,virtio-blk,/dev/vda{}", mode.options);
    for (name, value) in [
        ("records", RECORDS),
        ("seed", seed),
        ("flush", mode.flush.into()),
        ("feature", mode.feature.into()),
    ] {
        guest.environment.push(format!("powercut.{name}={value}"));
    }
    guest.start(host)?;
    let at = format!(r"powercut: record {aim}\r|FAIL");
    let found = host.guest().expect(&at, WRITTEN)?;
    ensure!(!found.before.contains("FAIL"), "{}", found.before);
    std::thread::sleep(late);
    let said = host.cut()?;

    // The last line may have been cut too.
    let acknowledged = said
        .match_indices("powercut: record ")
        .filter(|(at, _)| said[*at..].contains('\n'))
        .count() as u64;
    ensure!(
        (aim + 1..=RECORDS).contains(&acknowledged),
        "{acknowledged} acknowledgements after record {aim}:\n{said}"
    );
    let disk = File::open(image(dirs))?;
    let mut lost = Vec::new();
    for number in 0..acknowledged {
        let mut record = [0; RECORD];
        disk.read_exact_at(&mut record, (number + 1) * RECORD as u64)?;
        let (words, _) = record.as_chunks::<8>();
        let whole = (0..)
            .zip(words)
            .all(|(at, w)| u64::from_le_bytes(*w) == word(seed, number, at));
        if !whole {
            lost.push(number);
        }
    }
    Ok(Outcome {
        mode,
        aim,
        acknowledged,
        lost,
    })
}

/// What is wrong with an outcome.
///
/// # Errors
/// A loss, or a control without one.
pub fn judge(outcome: &Outcome) -> Result<()> {
    if outcome.mode.control {
        ensure!(!outcome.lost.is_empty(), "{outcome}: no power was cut");
    } else {
        ensure!(outcome.lost.is_empty(), "{outcome}: {:?}", outcome.lost);
    }
    Ok(())
}

/// A few rounds, and the control.
///
/// # Errors
/// The image cannot be made.
pub fn group(lab: &Lab) -> Result<Group> {
    let config = config(&lab.dirs, &lab.kit)?;
    let modes = [MODES[0], MODES[1], MODES[4], CONTROL];
    let case = |mode: Mode| {
        let name = format!("power-cut-{}", mode.name.replace([',', ':', ' '], "-"));
        Case::new(name, move |lab, host| {
            let outcome = round(&lab.dirs, host, mode)?;
            judge(&outcome)
        })
    };
    Ok(Group {
        name: "power-cut".to_owned(),
        config,
        cases: modes.map(case).into(),
    })
}

/// As many rounds as asked for, each on a host of its own, the modes and a file
/// system in turn, and the control at the end; a line each.
///
/// # Errors
/// A round cannot be run, or has lost something.
pub fn run(dirs: &Dirs, kit: &Kit, rounds: u32) -> Result<()> {
    let mut tally = (0, 0);
    for number in 0..=rounds {
        // Behind the last of the modes comes the file system.
        let mode = if number == rounds {
            Some(&CONTROL)
        } else {
            MODES.get(number as usize % (MODES.len() + 1))
        };
        let config = match mode {
            Some(_) => config(dirs, kit)?,
            None => ext4::config(dirs, kit)?,
        };
        let mut host = Host::boot(dirs, kit, &config, "power-cut")?;
        host.load_vmm("")?;
        let outcome = match mode {
            Some(mode) => round(dirs, &mut host, *mode)?,
            None => ext4::round(dirs, &mut host)?,
        };
        println!("round {}: {outcome}", number + 1);
        judge(&outcome)?;
        if !outcome.mode.control {
            tally.0 += outcome.acknowledged;
            tally.1 += outcome.lost.len();
        }
    }
    println!(
        "{rounds} power cuts: {} records acknowledged, {} of them lost",
        tally.0, tally.1
    );
    Ok(())
}
