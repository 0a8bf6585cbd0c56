//! `bhyvectl list`, `stats` and `top`: VMs at a glance.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmmapi::Vm;

use super::Failure;
use super::look::{Look, all, look};
use crate::serial::terminal;

/// What `bhyvectl help` says of these.
pub const USAGE: &str = "\
bhyvectl list [--json]
bhyvectl stats [--vm <vmname>] [--json]
bhyvectl top [--vm <vmname>] [--interval <seconds>] [--rounds <number>] [--json]
bhyvectl passthru list [--json]

list says of every VM how it is doing, stats what was counted, and top shows
what happens each second: exits by reason and vCPU, what goes through the rings
of devices, memory that is there. On a terminal it is left with q; elsewhere it
writes round after round. passthru list shows the host's PCI functions, which of
them a VM can be given, and what would have to be done for the others. With
--json each answer is one line.
";

/// A command line of one of these.
#[derive(Debug, PartialEq)]
struct Wanted {
    json: bool,
    vm: Option<String>,
    interval: Duration,
    rounds: Option<u64>,
}

fn options(command: &str, words: &[String]) -> Result<Wanted, Failure> {
    let mut wanted = Wanted {
        json: false,
        vm: None,
        interval: Duration::from_secs(2),
        rounds: None,
    };
    let usage = |text: String| Failure::Usage(format!("{text}\n\n{USAGE}"));
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let (name, mut value) = match word.split_once('=') {
            Some((n, v)) => (n, Some(v.to_owned())),
            None => (word.as_str(), None),
        };
        let mut text = || {
            let value = value.take().or_else(|| words.next().cloned());
            value.ok_or_else(|| usage(format!("{name} needs an argument")))
        };
        match (name, command) {
            ("--json", _) => wanted.json = true,
            ("--vm", "stats" | "top") => wanted.vm = Some(text()?),
            ("--interval", "top") => {
                let t = text()?;
                let seconds = t.parse().ok().filter(|s| (0.05..=86_400.0).contains(s));
                let seconds = seconds
                    .ok_or_else(|| usage(format!("--interval {t}: 0.05 to 86400 seconds")))?;
                wanted.interval = Duration::from_secs_f64(seconds);
            }
            ("--rounds", "top") => {
                let t = text()?;
                let n = t
                    .parse()
                    .map_err(|_| usage(format!("--rounds {t}: a number")))?;
                wanted.rounds = Some(n);
            }
            _ => return Err(usage(format!("{command} has no option {word}"))),
        }
    }
    Ok(wanted)
}

/// Does it, if the first word is one of these.
pub(super) fn run(args: &[String], out: &mut impl Write) -> Option<Result<(), Failure>> {
    let (command, words) = args.split_first()?;
    let result = |run: &mut dyn FnMut(Wanted) -> Result<(), Failure>| {
        Some(options(command, words).and_then(run))
    };
    match command.as_str() {
        "list" => result(&mut |w| {
            let looks = all()?;
            match w.json {
                true => json(out, &looks),
                false => list(out, &looks),
            }
        }),
        "stats" => result(&mut |w| {
            let looks = wanted(&w)?;
            match w.json {
                true => json(out, &looks),
                false => stats(out, &looks),
            }
        }),
        "top" => result(&mut |w| top(out, &w)),
        "help" => Some(write!(out, "{USAGE}").map_err(Failure::from)),
        _ => None,
    }
}

fn wanted(w: &Wanted) -> Result<Vec<Look>, Failure> {
    match &w.vm {
        None => Ok(all()?),
        Some(name) => match look(name) {
            Ok(look) => Ok(vec![look]),
            Err(e) if e.is_not_found() => Err(Failure::NotCreated(name.clone(), e)),
            Err(e) => Err(e.into()),
        },
    }
}

fn json(out: &mut impl Write, value: &impl serde::Serialize) -> Result<(), Failure> {
    serde_json::to_writer(&mut *out, value).map_err(io::Error::from)?;
    writeln!(out)?;
    Ok(())
}

/// Bytes in the unit that keeps three digits or four.
fn size(bytes: u64) -> String {
    let mut units = ["B", "K", "M", "G", "T"].iter();
    let (mut n, mut unit) = (bytes as f64, units.next().unwrap_or(&""));
    while n >= 1024.0 {
        let Some(next) = units.next() else { break };
        n /= 1024.0;
        unit = next;
    }
    match n {
        n if *unit == "B" || n >= 100.0 || n.fract() == 0.0 => format!("{n:.0}{unit}"),
        n => format!("{n:.1}{unit}"),
    }
}

fn list(out: &mut impl Write, looks: &[Look]) -> Result<(), Failure> {
    let width = looks.iter().map(|l| l.name.len()).max().unwrap_or(0).max(4);
    writeln!(
        out,
        "{:<width$}  {:<10} {:>5} {:>8} {:>8} {:>8}  {:<8} NOTE",
        "NAME", "STATE", "VCPUS", "MEMORY", "RESIDENT", "PID", "OWNER"
    )?;
    for l in looks {
        let line = format!(
            "{:<width$}  {:<10} {:>5} {:>8} {:>8} {:>8}  {:<8} {}",
            l.name,
            l.state.word(),
            l.vcpus.len(),
            size(l.memory),
            l.resident.map_or_else(|| "-".into(), size),
            l.pid.map_or_else(|| "-".into(), |p| p.to_string()),
            l.owner,
            l.note
        );
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

/// The kernel's counters that stand for a reason to leave the guest.
fn is_exit(description: &str) -> bool {
    let d = description;
    (d.starts_with("vm exits ")
        || d.starts_with("number of times ")
        || d.starts_with("number of monitor trap"))
        && !d.contains("astpending")
        && !d.contains("pending at exit")
        && !d.contains("requested at exit")
        || d == "number of vm exits due to exceptions"
        || d == "number of vm exits for unknown reason"
}

/// A counter's description without what all have in common.
fn reason(description: &str) -> String {
    let mut d = description;
    for prefix in [
        "number of vm exits due to ",
        "number of vm exits for ",
        "vm exits due to ",
        "vm exits for ",
        "number of times ",
        "number of ",
    ] {
        d = d.strip_prefix(prefix).unwrap_or(d);
    }
    d.trim_end_matches(" was intercepted").to_owned()
}

fn stats(out: &mut impl Write, looks: &[Look]) -> Result<(), Failure> {
    for l in looks {
        writeln!(
            out,
            "{}: {}{}{}",
            l.name,
            l.state.word(),
            if l.note.is_empty() { "" } else { ", " },
            l.note
        )?;
        for cpu in &l.vcpus {
            writeln!(out, "  vcpu{}:", cpu.id)?;
            for (what, n) in cpu.kernel.iter().filter(|(_, n)| **n > 0) {
                writeln!(out, "    {what:<45} {n:>14}")?;
            }
            for (kind, n) in &cpu.userland {
                writeln!(out, "    {:<45} {n:>14}", format!("to bhyve: {kind}"))?;
            }
        }
        for r in &l.rings {
            let ring = format!("{} queue {}", r.device, r.queue);
            writeln!(
                out,
                "  {ring:<34} {:>14} requests {:>14} bytes",
                r.requests, r.bytes
            )?;
        }
    }
    Ok(())
}

/// What happened between two looks at a VM, a second.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
struct Rates {
    name: String,
    state: super::look::State,
    note: String,
    /// Seconds between the looks.
    seconds: f64,
    resident: Option<u64>,
    memory: u64,
    /// By vCPU, by reason.
    exits: BTreeMap<u32, BTreeMap<String, f64>>,
    /// All exits, by vCPU.
    total: BTreeMap<u32, f64>,
    /// Exits that came to bhyve, by vCPU.
    userland: BTreeMap<u32, f64>,
    rings: Vec<RingRate>,
}

#[derive(Clone, Debug, PartialEq, serde::Serialize)]
struct RingRate {
    device: String,
    queue: usize,
    requests: f64,
    bytes: f64,
}

fn rates(before: Option<&Look>, now: &Look, seconds: f64) -> Rates {
    // A VM that began anew meanwhile counts from nothing.
    let a_second = |now: u64, before: u64| now.saturating_sub(before) as f64 / seconds;
    let mut rates = Rates {
        name: now.name.clone(),
        state: now.state,
        note: now.note.clone(),
        seconds,
        resident: now.resident,
        memory: now.memory,
        exits: BTreeMap::new(),
        total: BTreeMap::new(),
        userland: BTreeMap::new(),
        rings: Vec::new(),
    };
    let Some(before) = before else {
        return rates;
    };
    for cpu in &now.vcpus {
        let was = before.vcpus.iter().find(|c| c.id == cpu.id);
        let old = |what: &str| was.and_then(|c| c.kernel.get(what)).copied().unwrap_or(0);
        let mut reasons = BTreeMap::new();
        for (what, n) in cpu.kernel.iter().filter(|(what, _)| is_exit(what)) {
            if *n > old(what) {
                reasons.insert(reason(what), a_second(*n, old(what)));
            }
        }
        let all = "total number of vm exits";
        let total = cpu.kernel.get(all).copied().unwrap_or(0);
        rates.total.insert(cpu.id, a_second(total, old(all)));
        let user = "number of vm exits handled in userspace";
        let handled = cpu.kernel.get(user).copied().unwrap_or(0);
        rates.userland.insert(cpu.id, a_second(handled, old(user)));
        rates.exits.insert(cpu.id, reasons);
    }
    for ring in &now.rings {
        let same =
            |r: &&crate::status::RingStatus| (&r.device, r.queue) == (&ring.device, ring.queue);
        let was = before.rings.iter().find(same);
        rates.rings.push(RingRate {
            device: ring.device.clone(),
            queue: ring.queue,
            requests: a_second(ring.requests, was.map_or(0, |r| r.requests)),
            bytes: a_second(ring.bytes, was.map_or(0, |r| r.bytes)),
        });
    }
    rates
}

/// A round as text. `end` ends lines.
fn round(rates: &[Rates], end: &str) -> String {
    let mut text = String::new();
    for r in rates {
        let resident = r.resident.map_or_else(|| "?".into(), size);
        text += &format!(
            "{}: {}, memory {resident} of {}{}{}{end}",
            r.name,
            r.state.word(),
            size(r.memory),
            if r.note.is_empty() { "" } else { "; " },
            r.note
        );
        let mut reasons: BTreeMap<&str, f64> = BTreeMap::new();
        for (reason, n) in r.exits.values().flatten() {
            *reasons.entry(reason).or_default() += n;
        }
        let mut sorted: Vec<(&str, f64)> = reasons.into_iter().collect();
        sorted.sort_by(|a, b| b.1.total_cmp(&a.1));
        if !r.total.is_empty() {
            let cpus: String = r
                .total
                .keys()
                .map(|c| format!("{:>10}", format!("vcpu{c}")))
                .collect();
            text += &format!("  {:<34}{:>10}{cpus}{end}", "exits a second", "all");
            let mut line = |name: &str, all: f64, each: &dyn Fn(&u32) -> f64| {
                let each: String = r
                    .total
                    .keys()
                    .map(|c| format!("{:>10.0}", each(c)))
                    .collect();
                text += &format!("  {name:<34}{all:>10.0}{each}{end}");
            };
            line("all", r.total.values().sum(), &|c| {
                r.total.get(c).copied().unwrap_or(0.0)
            });
            line("to bhyve", r.userland.values().sum(), &|c| {
                r.userland.get(c).copied().unwrap_or(0.0)
            });
            for (reason, all) in sorted {
                line(reason, all, &|c| {
                    let of = r.exits.get(c).and_then(|e| e.get(reason));
                    of.copied().unwrap_or(0.0)
                });
            }
        }
        if !r.rings.is_empty() {
            text += &format!(
                "  {:<34}{:>10}{:>10}{end}",
                "rings a second", "requests", "bytes"
            );
        }
        for ring in &r.rings {
            let name = format!("{} queue {}", ring.device, ring.queue);
            text += &format!(
                "  {name:<34}{:>10.0}{:>10}{end}",
                ring.requests,
                size(ring.bytes as u64)
            );
        }
        text += end;
    }
    if rates.is_empty() {
        text += "no VMs";
        text += end;
    }
    text
}

fn top(out: &mut impl Write, w: &Wanted) -> Result<(), Failure> {
    let screen = !w.json && io::stdout().is_terminal() && io::stdin().is_terminal();
    if screen {
        terminal::make_raw(&io::stdin(), true).map_err(io::Error::from)?;
        // The other screen, without a cursor.
        write!(out, "\x1b[?1049h\x1b[?25l")?;
    }
    let result = rounds(out, w, screen);
    if screen {
        write!(out, "\x1b[?25h\x1b[?1049l")?;
        out.flush()?;
        terminal::restore_all();
    }
    result
}

fn rounds(out: &mut impl Write, w: &Wanted, screen: bool) -> Result<(), Failure> {
    let mut before = wanted(w)?;
    let mut taken = Instant::now();
    let mut left = w.rounds;
    while left != Some(0) {
        left = left.map(|n| n - 1);
        if pause(taken + w.interval, screen)? {
            return Ok(());
        }
        let seconds = taken.elapsed().as_secs_f64();
        taken = Instant::now();
        let now = match wanted(w) {
            // It was there, and is gone: that is an end, not a failure.
            Err(Failure::NotCreated(..)) => return Ok(()),
            now => now?,
        };
        let all: Vec<Rates> = now
            .iter()
            .map(|l| rates(before.iter().find(|b| b.name == l.name), l, seconds))
            .collect();
        before = now;
        if w.json {
            json(out, &all)?;
        } else if screen {
            let help = "q leaves";
            write!(out, "\x1b[H\x1b[J{}{help}", round(&all, "\r\n"))?;
        } else {
            write!(out, "{}", round(&all, "\n"))?;
        }
        out.flush()?;
    }
    Ok(())
}

/// Waits; true if the user wants to leave.
fn pause(until: Instant, screen: bool) -> Result<bool, Failure> {
    let left = || until.saturating_duration_since(Instant::now());
    if !screen {
        std::thread::sleep(left());
        return Ok(false);
    }
    let stdin = io::stdin();
    loop {
        let rest = left();
        if rest.is_zero() {
            return Ok(false);
        }
        let timeout = PollTimeout::try_from(rest).unwrap_or(PollTimeout::ZERO);
        let mut fds = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Ok(0) | Err(nix::errno::Errno::EINTR) => {}
            Ok(_) => {
                let mut keys = [0; 16];
                let n = nix::unistd::read(&stdin, &mut keys).map_err(io::Error::from)?;
                // q, Q, Ctrl-C, or nobody there any more.
                let leaves = keys.iter().take(n).any(|k| matches!(k, b'q' | b'Q' | 3));
                if leaves || n == 0 {
                    return Ok(true);
                }
            }
            Err(e) => return Err(io::Error::from(e).into()),
        }
    }
}

/// Why a VM that could not be destroyed could not be.
pub(super) fn explain_destroy(name: &str, error: &vmmapi::Error) -> String {
    let mut text = error.to_string();
    let others = Vm::list().unwrap_or_default();
    if error.is_not_found() {
        text += &match others.as_slice() {
            [] => "; there are no VMs".to_owned(),
            all => format!("; there are: {}", all.join(", ")),
        };
    } else if let Ok(look) = look(name) {
        text += &format!("; it is {}", look.state.word());
        if let Some(pid) = look.pid {
            text += &format!(", process {pid}");
        }
        if look.owner != "?" {
            text += &format!(", owned by {}", look.owner);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::look::{Cpu, State};
    use super::*;
    use crate::status::RingStatus;

    fn sample(exits: u64, requests: u64) -> Look {
        let kernel = [
            ("total number of vm exits", exits),
            ("number of times hlt was intercepted", exits / 2),
            ("number of times astpending at exit", exits),
            ("number of vm exits handled in userspace", 1),
            ("Resident memory", 3 << 20),
        ];
        Look {
            name: "web".into(),
            state: State::Running,
            note: String::new(),
            owner: "root".into(),
            pid: Some(7),
            started: Some(1),
            memory: 256 << 20,
            resident: Some(3 << 20),
            vcpus: vec![Cpu {
                id: 0,
                kernel: kernel.map(|(d, n)| (d.to_owned(), n)).into(),
                userland: BTreeMap::new(),
            }],
            rings: vec![RingStatus {
                device: "virtio-blk 0:3:0".into(),
                queue: 0,
                requests,
                bytes: requests * 4096,
            }],
        }
    }

    fn text(write: impl FnOnce(&mut Vec<u8>) -> Result<(), Failure>) -> String {
        let mut out = Vec::new();
        write(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_list_has_a_line_a_vm() {
        let shown = text(|o| list(o, &[sample(10, 0)]));
        let lines: Vec<Vec<&str>> = shown
            .lines()
            .map(|l| l.split_whitespace().collect())
            .collect();
        assert_eq!(lines[0][..3], ["NAME", "STATE", "VCPUS"]);
        assert_eq!(lines[1], ["web", "running", "1", "256M", "3M", "7", "root"]);
    }

    #[test]
    fn rates_are_differences_a_second() {
        let (before, now) = (sample(1000, 10), sample(3000, 30));
        let r = rates(Some(&before), &now, 2.0);
        assert_eq!(r.total[&0], 1000.0);
        assert_eq!(r.exits[&0], BTreeMap::from([("hlt".to_owned(), 500.0)]));
        assert_eq!((r.rings[0].requests, r.rings[0].bytes), (10.0, 40960.0));
        // Begun anew: nothing is negative.
        assert_eq!(rates(Some(&now), &before, 2.0).total[&0], 0.0);
        let shown = round(&[r], "\n");
        assert!(shown.contains("hlt"), "{shown}");
        let ring = shown.lines().find(|l| l.contains("virtio-blk")).unwrap();
        assert!(ring.ends_with("10       40K"), "{ring}");
    }

    #[test]
    fn scripts_get_one_line_of_json() {
        let shown = text(|o| json(o, &[sample(1, 1)]));
        assert_eq!(shown.lines().count(), 1);
        let read: serde_json::Value = serde_json::from_str(&shown).unwrap();
        assert_eq!(read[0]["state"], "running");
        assert_eq!(read[0]["vcpus"][0]["kernel"]["total number of vm exits"], 1);
        assert_eq!(read[0]["rings"][0]["bytes"], 4096);
    }

    #[test]
    fn options_are_those_of_the_command() {
        let words =
            |line: &str| -> Vec<String> { line.split_whitespace().map(String::from).collect() };
        let w = options("top", &words("--vm web --interval=0.5 --rounds 3 --json")).unwrap();
        assert_eq!(
            (w.vm.as_deref(), w.rounds, w.json),
            (Some("web"), Some(3), true)
        );
        assert_eq!(w.interval, Duration::from_millis(500));
        for (command, line) in [
            ("list", "--vm web"),
            ("top", "--interval 0"),
            ("top", "--interval"),
            ("stats", "web"),
            ("top", "--rounds -1"),
        ] {
            assert!(options(command, &words(line)).is_err(), "{command} {line}");
        }
    }

    #[test]
    fn sizes_are_short() {
        for (bytes, shown) in [
            (0, "0B"),
            (1023, "1023B"),
            (1536, "1.5K"),
            (256 << 20, "256M"),
            (5 << 40, "5T"),
        ] {
            assert_eq!(size(bytes), shown);
        }
    }
}
