//! Child processes whose output matters only when they fail.

use anyhow::{Context, Result, bail};
use std::process::{Command, Stdio};

/// Lines of a failed command's output that are shown.
const TAIL_LINES: usize = 40;

/// Runs `command` to its end and returns its standard output.
///
/// # Errors
/// The command cannot be started, or ends unsuccessfully; the error then
/// carries the command line and the end of what it said.
pub fn output(command: &mut Command) -> Result<String> {
    let shown = display(command);
    let out = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run `{shown}`"))?;
    let stdout = String::from_utf8_lossy(&out.stdout).into_owned();
    if out.status.success() {
        return Ok(stdout);
    }
    let said = format!("{stdout}{}", String::from_utf8_lossy(&out.stderr));
    let lines: Vec<&str> = said.lines().collect();
    let tail = lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n");
    bail!("`{shown}` failed ({}):\n{tail}", out.status)
}

/// Runs `command` with our own standard output and error.
///
/// # Errors
/// The command cannot be started, or ends unsuccessfully.
pub fn inherit(command: &mut Command) -> Result<()> {
    let shown = display(command);
    let status = command
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("cannot run `{shown}`"))?;
    if !status.success() {
        bail!("`{shown}` failed ({status})");
    }
    Ok(())
}

fn display(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for arg in command.get_args() {
        text.push(' ');
        text.push_str(&arg.to_string_lossy());
    }
    text
}
