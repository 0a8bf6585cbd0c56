//! The command lines of vm-bhyve, libvirt, CBSD and iohyve, from tests/callers.
#![forbid(unsafe_code)]

use bhyveload::cli::Cli;
use clap::Parser;

const TABLE: &str = include_str!("../../tests/callers/bhyveload.txt");

#[test]
fn every_call_is_understood() {
    let mut count = 0;
    for line in TABLE.lines() {
        let (name, words) = line.split_once(": ").expect("NAME: ARGUMENTS");
        let words = shlex::split(words).expect("quotes that match");
        let all = std::iter::once("bhyveload").chain(words.iter().map(String::as_str));
        let cli = Cli::try_parse_from(all).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(&cli.vm, words.last().unwrap(), "{name}");
        let wired = words.iter().any(|w| w == "-S");
        assert_eq!(cli.wired, wired, "{name}");
        let variables = words.iter().filter(|w| *w == "-e").count();
        assert_eq!(cli.environment.len(), variables, "{name}");
        let disks = words.iter().filter(|w| *w == "-d").count();
        assert_eq!(cli.disk.len(), disks, "{name}");
        if name.starts_with("libvirt: ") {
            assert_eq!(cli.memory, 214 << 20, "{name}");
        }
        count += 1;
    }
    assert!(count > 10);
}
