//! The command lines of vm-bhyve, libvirt, CBSD and iohyve, from tests/callers.
#![forbid(unsafe_code)]

use std::process::{Command as Process, Output};

use bhyve::cli::{self, Command};
use bhyve::config::Config;
use bhyve::pci::catalog;
use bhyve::virtio;

const BHYVE: &str = include_str!("../../tests/callers/bhyve.txt");
const BHYVECTL: &str = include_str!("../../tests/callers/bhyvectl.txt");

/// Options that somebody gives and that are not here; a line that has one is
/// refused with a message that names it.
const LACKING: [&str; 1] = ["-n"];

fn vectors(table: &str) -> impl Iterator<Item = (&str, Vec<String>)> {
    table
        .lines()
        .filter(|l| !l.is_empty() && !l.starts_with('#'))
        .map(|line| {
            let (name, words) = line.split_once(": ").expect("NAME: ARGUMENTS");
            (name, shlex::split(words).expect("quotes that match"))
        })
}

fn parse(words: &[String]) -> Result<Config, String> {
    match cli::parse(words.iter().cloned()) {
        Ok(Command::Run(config)) => Ok(*config),
        Ok(other) => panic!("{words:?}: {other:?}"),
        Err(e) => Err(e.0),
    }
}

/// The devices of `-l`, as `-l help` lists them.
fn lpc_devices() -> Vec<String> {
    match cli::parse(["-l".into(), "help".into()]) {
        Ok(Command::Print(text)) => text.lines().map(String::from).collect(),
        other => panic!("-l help: {other:?}"),
    }
}

/// What of a command line is not here, as its refusal must name it, and the
/// rest of the line.
fn split(words: &[String]) -> (Vec<String>, Vec<String>) {
    let lpc = lpc_devices();
    let (mut lacking, mut rest) = (Vec::new(), Vec::new());
    let mut words = words.iter();
    while let Some(word) = words.next() {
        // Only these take a word whose contents we may lack.
        if !["-s", "-l", "-n"].contains(&word.as_str()) {
            rest.push(word.clone());
            continue;
        }
        let value = words.next().expect("a value").clone();
        let missing = match word.as_str() {
            "-s" => {
                let emulation = value.split(',').nth(1).expect("an emulation");
                (catalog::find(emulation).is_none()).then(|| emulation.to_owned())
            }
            "-l" => {
                let device = value.split(',').next().unwrap_or_default();
                (!lpc.iter().any(|d| d == device)).then(|| device.to_owned())
            }
            flag => LACKING.contains(&flag).then(|| flag.to_owned()),
        };
        match missing {
            Some(what) => lacking.push(what),
            None => rest.extend([word.clone(), value]),
        }
    }
    (lacking, rest)
}

/// Reads a device's options, without making the device.
fn options(emulation: &str, conf: &str) -> Result<(), String> {
    match emulation {
        "passthru" => conf
            .parse::<bhyve::pci::passthru::request::Options>()
            .map(drop),
        "nvme" => conf.parse::<bhyve::nvme::options::Options>().map(drop),
        "virtio-9p" => conf.parse::<virtio::p9::Options>().map(drop),
        "virtio-blk" => conf.parse::<virtio::blk::options::Options>().map(drop),
        "virtio-console" => virtio::console::parse(conf).map(drop),
        "virtio-net" => conf.parse::<bhyve::net::options::Options>().map(drop),
        _ => Ok(()),
    }
}

#[test]
fn every_call_is_understood_or_refused_for_what_is_not_here() {
    let mut count = 0;
    for (name, words) in vectors(BHYVE) {
        count += 1;
        let (lacking, rest) = split(&words);
        match parse(&words) {
            Ok(_) => assert!(
                lacking.iter().all(|l| LACKING.contains(&l.as_str())),
                "{name}"
            ),
            Err(e) => assert!(lacking.iter().any(|l| e.contains(l)), "{name}: {e}"),
        }
        let config = parse(&rest).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(&config.name, words.last().unwrap(), "{name}");
        for slot in &config.slots {
            let refused = options(&slot.emulation, &slot.conf).err();
            // What is not here is named; anything else is a mistake.
            let foreign = ["vale", "netgraph", "ram="]
                .iter()
                .any(|n| refused.as_ref().is_some_and(|e| e.starts_with(n)));
            assert!(refused.is_none() || foreign, "{name}: {refused:?}");
        }
        if words.iter().any(|w| w.starts_with("-AHPw")) {
            assert!(
                config.acpi && config.halt_exits && config.pause_exits,
                "{name}"
            );
            assert!(!config.strict_msr, "{name}");
        }
    }
    assert!(count > 40);
}

#[test]
fn details_that_callers_count_on() {
    let by_name = |name: &str| {
        let found = vectors(BHYVE).find(|(n, _)| *n == name);
        let (_, rest) = split(&found.unwrap_or_else(|| panic!("no {name}")).1);
        parse(&rest).unwrap()
    };
    let pinned = by_name("libvirt, pinned CPUs");
    assert_eq!(pinned.pins, [(0, 1), (0, 3), (0, 4), (1, 0), (1, 4)]);
    assert_eq!(pinned.memory, 214 << 20);
    assert!(pinned.utc && !pinned.acpi);
    // CBSD gives bytes.
    assert_eq!(by_name("cbsd, UEFI").memory, 4 << 30);
    let wide = by_name("vm-bhyve, second bus, no MP table");
    assert!(!wide.mptable);
    assert!(wide.slots.iter().any(|s| s.at.bus == 1));
    assert!(by_name("iohyve").serial[0].is_some());
}

fn bhyve(args: &[&str]) -> (Output, String, String) {
    let out = Process::new(env!("CARGO_BIN_EXE_bhyve"))
        .args(args)
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (text(&out.stdout), text(&out.stderr));
    (out, stdout, stderr)
}

/// What libvirt's bhyve_capabilities.c, of various years, runs and looks for.
#[test]
fn libvirt_finds_out_what_there_is() {
    let (out, stdout, help) = bhyve(&["-h"]);
    assert!(out.status.success() && stdout.is_empty());
    assert!(help.contains("-u:") && help.contains("-A:"));
    assert!(!help.contains("-c vcpus") && !help.contains("-n:"));

    let (_, list, _) = bhyve(&["-s", "help"]);
    assert!(
        list.lines().eq(catalog::EMULATIONS.iter().map(|e| e.name)),
        "{list}"
    );

    for device in [
        "ahci",
        "e1000",
        "fbuf",
        "hda",
        "nvme",
        "virtio-9p",
        "virtio-rnd",
        "xhci",
    ] {
        let (out, _, stderr) = bhyve(&["-s", &format!("0,{device}")]);
        let denied = stderr.contains(&format!("pci slot 0:0: unknown device \"{device}\""));
        assert_eq!(
            denied,
            catalog::find(device).is_none(),
            "{device}: {stderr}"
        );
        assert!(!out.status.success());
    }
    let (_, _, stderr) = bhyve(&["-l", "bootrom"]);
    let denied = stderr.contains("bhyve: invalid lpc device configuration 'bootrom'");
    assert_eq!(
        denied,
        !lpc_devices().iter().any(|d| d == "bootrom"),
        "{stderr}"
    );
    let (_, _, stderr) = bhyve(&["-s", "0,fbuf,password="]);
    assert!(catalog::find("fbuf").is_some() || stderr.contains("unknown device \"fbuf\""));
}

#[test]
fn bhyvectl_understands_every_call() {
    for (name, words) in vectors(BHYVECTL) {
        let out = Process::new(env!("CARGO_BIN_EXE_bhyvectl"))
            .args(&words)
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&out.stderr);
        // There is no such VM; that must be all that is wrong.
        assert!(!out.status.success(), "{name}");
        assert!(!stderr.contains("--help"), "{name}: {stderr}");
        let vm = words
            .iter()
            .find_map(|w| w.find("callers-").map(|at| &w[at..]))
            .unwrap();
        let no_vmm = stderr.contains("/dev/vmmctl");
        assert!(no_vmm || stderr.contains(vm), "{name}: {stderr}");
    }
}
