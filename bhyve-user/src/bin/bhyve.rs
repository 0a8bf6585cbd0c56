//! bhyve(8): runs a VM that bhyveload(8) has made.
#![forbid(unsafe_code)]

use std::process::exit;

use bhyve::boot;
use bhyve::cli::{self, Command};
use bhyve::ending::ERROR;
use bhyve::vm;

fn main() {
    let args = std::env::args_os()
        .skip(1)
        .map(|a| a.to_string_lossy().into_owned());
    let status = match cli::parse(args) {
        Ok(Command::Print(text)) => {
            print!("{text}");
            0
        }
        Ok(Command::Help(text)) => {
            eprint!("{text}");
            0
        }
        Ok(Command::Run(config)) if config.boot && !boot::is_child() => boot::run(&config)
            .unwrap_or_else(|e| {
                eprintln!("bhyve: {e}");
                ERROR
            }),
        Ok(Command::Run(config)) => vm::run(*config).unwrap_or_else(|e| {
            eprintln!("bhyve: {e}");
            if matches!(&e, vm::Error::Vmm(e) if e.is_not_found()) {
                eprintln!("A guest is loaded by bhyveload first; bhyve --boot does both.");
            }
            ERROR
        }),
        Err(e) => {
            eprintln!("bhyve: {e}\nbhyve -h lists the options.");
            ERROR
        }
    };
    // Threads that wait for input or the guest must not hold the process.
    exit(status)
}
