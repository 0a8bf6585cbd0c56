//! What the pages and completions say against what the programs say.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::process::Command;

use pages::completions::SHELLS;
use pages::man;
use pages::program::{self, Program};

/// The options that a help text lists, found without the parser under test: the
/// first words of its lines, out of brackets.
fn listed(program: &Program) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for line in program.help.lines() {
        let line = line.trim_start();
        if program.name == "bhyvectl" {
            // Usage: bhyvectl --vm=<vmname>, then [--option=<argument>] a line.
            let words = line
                .trim_start_matches("Usage: bhyvectl ")
                .trim_start_matches('[');
            found.extend(words.split(['=', ']']).next().map(str::to_owned));
        } else {
            let names = line.split_once(": ").map_or(line, |(names, _)| names);
            for word in names.split(", ").take_while(|w| w.starts_with('-')) {
                found.extend(word.split([' ', '=']).next().map(str::to_owned));
            }
        }
    }
    found.retain(|w| w.starts_with('-') && w.len() > 1);
    found
}

/// The options that a page explains.
fn explained(page: &str) -> BTreeSet<String> {
    let items = page.lines().filter_map(|l| l.strip_prefix(".It Fl "));
    items
        .flat_map(|item| item.split(" , Fl ").map(str::to_owned).collect::<Vec<_>>())
        .filter_map(|names| names.split(' ').next().map(|n| format!("-{n}")))
        .collect()
}

#[test]
fn every_option_is_in_the_manual_and_no_other() {
    let pages = man::pages().unwrap();
    for program in program::all().unwrap() {
        let name = format!("{}.8", program.name);
        let (_, page) = pages.iter().find(|(n, _)| *n == name).expect("a page");
        let listed = listed(&program);
        assert!(listed.len() > 10, "{name}: {listed:?}");
        assert_eq!(listed, explained(page), "{name}");
        assert!(!page.lines().any(|l| l.starts_with('@')), "{name}");
    }
}

#[test]
fn every_emulation_is_in_the_manual() {
    let pages = man::pages().unwrap();
    let (_, page) = pages.iter().find(|(n, _)| n == "bhyve.8").expect("bhyve.8");
    for emulation in bhyve::pci::catalog::EMULATIONS {
        let item = format!(".It Cm {}", emulation.name);
        assert!(page.lines().any(|l| l.starts_with(&item)), "{item}");
    }
}

#[test]
fn every_key_of_a_file_is_in_the_manual_and_its_example_is_read() {
    let pages = man::pages().unwrap();
    let (_, page) = pages
        .iter()
        .find(|(n, _)| n == "bhyve.toml.5")
        .expect("a page");
    let items: BTreeSet<&str> = page
        .lines()
        .filter_map(|l| l.strip_prefix(".It Li "))
        .collect();
    let keys = bhyve_config::keys::KEYS.iter().map(|k| k.path);
    let devices = bhyve_config::keys::DEVICE_KEYS
        .iter()
        .map(|(name, _)| *name);
    assert_eq!(items, keys.chain(devices).collect());
    let (_, example) = page
        .split_once(".Bd -literal -offset indent\n")
        .expect("an example");
    let (example, _) = example.split_once(".Ed").expect("its end");
    let packaged = [
        include_str!("../../debian/example.toml"),
        include_str!("../../freebsd/bhyve-rs/files/example.toml"),
    ];
    for text in packaged.into_iter().chain([example]) {
        bhyve_config::file::parse("example", text).expect("a file without mistakes");
    }
}

#[test]
fn references_to_our_own_pages_lead_somewhere() {
    let pages = man::pages().unwrap();
    let names: Vec<&str> = pages.iter().map(|(n, _)| n.as_str()).collect();
    for (file, page) in &pages {
        for reference in page.lines().filter_map(|l| l.strip_prefix(".Xr ")) {
            let mut words = reference.split(' ');
            let target = format!("{}.{}", words.next().unwrap(), words.next().unwrap());
            let ours = target.starts_with("bhyve") || target.starts_with("vmm");
            // bhyve_config(5) is FreeBSD's.
            let known = names.contains(&target.as_str()) || target == "bhyve_config.5";
            assert!(!ours || known, "{file} names {target}");
        }
    }
}

/// What bash offers for the last of `words`.
fn bash(program: &Program, words: &[&str]) -> BTreeSet<String> {
    let text = (SHELLS[0].text)(program);
    let script = format!(
        "{text}\nCOMP_WORDS=({})\nCOMP_CWORD={}\n_{}\nprintf '%s\\n' \"${{COMPREPLY[@]}}\"",
        words
            .iter()
            .map(|w| format!("'{w}'"))
            .collect::<Vec<_>>()
            .join(" "),
        words.len() - 1,
        program.name,
    );
    let out = Command::new("bash")
        .args(["--norc", "-c", &script])
        .output()
        .expect("bash");
    let (stdout, stderr) = (
        out.stdout,
        String::from_utf8_lossy(&out.stderr).into_owned(),
    );
    // compopt only knows what to do in an interactive shell.
    assert!(stderr.lines().all(|l| l.contains("compopt")), "{stderr}");
    let text = String::from_utf8(stdout).unwrap();
    text.lines()
        .filter(|l| !l.is_empty())
        .map(str::to_owned)
        .collect()
}

#[test]
fn bash_completes_every_option() {
    let [bhyve, bhyvectl, bhyveload] = program::all().unwrap();
    for program in [&bhyve, &bhyvectl, &bhyveload] {
        assert_eq!(
            bash(program, &[program.name, "-"]),
            listed(program),
            "{}",
            program.name
        );
    }
    assert_eq!(
        bash(&bhyvectl, &["bhyvectl", "--force-"]),
        ["--force-poweroff", "--force-reset"]
            .map(str::to_owned)
            .into()
    );
    // bash has split --setcap=1 at the equals sign.
    assert_eq!(
        bash(&bhyvectl, &["bhyvectl", "--setcap", "=", "1"]),
        ["1".to_owned()].into()
    );
    assert!(bash(&bhyve, &["bhyve", "-s", "4,virtio-"]).contains("4,virtio-blk"));
    assert!(bash(&bhyveload, &["bhyveload", "--kernel", "/et"]).contains("/etc"));
}

#[test]
fn the_other_shells_have_every_option() {
    for program in program::all().unwrap() {
        for shell in &SHELLS[1..] {
            let text = (shell.text)(&program);
            for option in listed(&program) {
                let name = option.trim_start_matches('-');
                let has = match (shell.name, option.starts_with("--")) {
                    ("zsh", _) => ["[", "=[", "+["]
                        .iter()
                        .any(|end| text.contains(&format!("\t'*{option}{end}"))),
                    ("fish", true) => {
                        text.contains(&format!(" -l {name} "))
                            || text.contains(&format!(" -l {name}\n"))
                    }
                    ("fish", false) => text.contains(&format!(" -s {name} ")),
                    (_, long) => {
                        let list = if long { "'c%--%(" } else { "'c%-%(" };
                        let words = text.split(list).nth(1).and_then(|r| r.split(')').next());
                        words.is_some_and(|w| w.split(' ').any(|w| w == name))
                    }
                };
                assert!(has, "{}: {}: {option}\n{text}", program.name, shell.name);
            }
        }
    }
}
