//! Manual pages and shell completions. What the programs print as their help is
//! the source for which options there are; `packaging/man` adds the prose.
#![forbid(unsafe_code)]

pub mod completions;
pub mod man;
pub mod program;

use std::fs;
use std::io;
use std::path::Path;

/// Why there are no pages.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// See [`program::BadHelp`].
    #[error(transparent)]
    Help(#[from] program::BadHelp),
    /// See [`man::BadSource`].
    #[error(transparent)]
    Source(#[from] man::BadSource),
    /// A file.
    #[error("{0}: {1}")]
    File(String, io::Error),
}

fn write(dir: &Path, name: &str, text: &str) -> Result<(), Error> {
    let path = dir.join(name);
    fs::create_dir_all(dir)
        .and_then(|()| fs::write(&path, text))
        .map_err(|e| Error::File(path.display().to_string(), e))
}

/// Writes the manual pages, `NAME.SECTION`, into `dir`.
///
/// # Errors
/// The sources do not fit the programs, or a file cannot be written.
pub fn write_man(dir: &Path) -> Result<(), Error> {
    for (name, text) in man::pages()? {
        write(dir, &name, &text)?;
    }
    Ok(())
}

/// Writes the completions into `dir`, a folder a shell, each file named as that
/// shell looks for it.
///
/// # Errors
/// As [`write_man`].
pub fn write_completions(dir: &Path) -> Result<(), Error> {
    for program in program::all()? {
        for shell in completions::SHELLS {
            let name = (shell.file)(program.name);
            write(&dir.join(shell.name), &name, &(shell.text)(&program))?;
        }
    }
    Ok(())
}
