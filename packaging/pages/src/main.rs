//! `pages DIR` writes the manual pages into DIR/man and the completions into
//! DIR/completions; for packagers who have no `cargo xtask`.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let (Some(dir), None) = (args.next().map(PathBuf::from), args.next()) else {
        eprintln!("usage: pages DIR");
        return ExitCode::FAILURE;
    };
    let written = pages::write_man(&dir.join("man"))
        .and_then(|()| pages::write_completions(&dir.join("completions")));
    match written {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("pages: {e}");
            ExitCode::FAILURE
        }
    }
}
