//! `--config`: what a file says of loading, and what goes before it.
#![forbid(unsafe_code)]

use bhyve_config::keys::{KEYS, Opt};
use bhyveload::cli::{Cli, with_config};
use clap::{CommandFactory, Parser};
use std::ffi::OsString;
use std::path::PathBuf;

const FILE: &str = r#"
name = "web"
[memory]
size = "1G"
wired = true
[boot]
kernel = "/k"
modules = ["/m1.ko", "/m2,type=t"]
environment = { "a.b" = "1", c = "-x" }
"#;

fn parse(file: &str, line: &str) -> Result<Cli, String> {
    let top = tempfile::tempdir().unwrap();
    let path = top.path().join("vm.toml");
    std::fs::write(&path, file).unwrap();
    let words = ["bhyveload", "--config"].into_iter().map(OsString::from);
    let words = words
        .chain([path.into_os_string()])
        .chain(line.split_whitespace().map(OsString::from));
    let words = with_config(words.collect()).map_err(|e| e.to_string())?;
    Cli::try_parse_from(words).map_err(|e| e.to_string())
}

#[test]
fn the_file_alone_is_enough() {
    let cli = parse(FILE, "").unwrap();
    assert_eq!(
        (cli.vm.as_str(), cli.memory, cli.wired),
        ("web", 1 << 30, true)
    );
    assert_eq!(cli.kernel, Some(PathBuf::from("/k")));
    assert_eq!(cli.module, ["/m1.ko", "/m2,type=t"]);
    assert_eq!(cli.environment, ["a.b=1", "c=-x"]);
}

#[test]
fn the_command_line_goes_before_the_file() {
    let cli = parse(FILE, "-m 2G -e c=3 --module /m3 other").unwrap();
    assert_eq!((cli.vm.as_str(), cli.memory), ("other", 2 << 30));
    assert_eq!(cli.module, ["/m3"]);
    assert_eq!(cli.environment.last().map(String::as_str), Some("c=3"));
    // Another thing to boot takes what belongs to the file's with it.
    let cli = parse(FILE, "--linux /vmlinuz").unwrap();
    assert_eq!((cli.kernel, cli.module.len()), (None, 0));
    assert_eq!(cli.linux, Some(PathBuf::from("/vmlinuz")));
}

#[test]
fn mistakes_have_a_place() {
    let e = parse("[boot]\nkernal = \"/k\"", "").unwrap_err();
    assert!(
        e.contains("vm.toml:2:1: there is no key \"boot.kernal\"; did you mean boot.kernel?"),
        "{e}"
    );
}

#[test]
fn every_option_has_a_key() {
    // What is about the command line itself.
    let without = ["config", "help"];
    let known = |option: &str| {
        KEYS.iter().any(|k| match k.bhyveload {
            Opt::Value(o) | Opt::Prefixed(o, _) | Opt::Pairs(o) => o == option,
            Opt::Flag(yes, no) => option == yes || option == no,
            Opt::Operand => option.is_empty(),
            Opt::None => false,
        })
    };
    for a in Cli::command()
        .get_arguments()
        .filter(|a| !without.contains(&a.get_id().as_str()))
    {
        let long = a.get_long().map(|l| format!("--{l}"));
        let short = a.get_short().map(|s| format!("-{s}"));
        let mut names: Vec<String> = long.into_iter().chain(short).collect();
        if names.is_empty() {
            names.push(String::new());
        }
        assert!(
            names.iter().any(|n| known(n)),
            "{names:?} has no key in bhyve-user/config/src/keys.rs"
        );
    }
}
