//! Builds `vmm.ko` for the host kernel: a Rust static library for the kernel
//! target, linked to one object, handed to Kbuild beside the C shim.

use crate::command::output;
use crate::core_src::{self, CoreSource, KERNEL_CARGO_ARGS, kernel_cargo_env};
use crate::dirs::Dirs;
use crate::one_section;
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What a module's loader finds by name.
const LOADER_NAMES: [&str; 3] = ["init_module", "cleanup_module", "__this_module"];

/// How the kernel unwinds the C side's frames, which is a thirtieth of the module; without, it
/// follows frame pointers, as it has to in the Rust side.
const UNWINDING: [&str; 3] = [".orc_header", ".orc_unwind", ".orc_unwind_ip"];

/// Builds the module for the kernel with these headers, what `make -C` wants, and
/// returns the path of `vmm.ko`.
///
/// # Errors
/// The compiler, the linker or Kbuild fails.
pub fn build(dirs: &Dirs, headers: &Path) -> Result<PathBuf> {
    let source = core_src::ensure(dirs)?;
    let krate = dirs.root.join("vmm-kmod/kmod");
    let branches = branches(headers);
    let into = match branches {
        Branches::Unchecked => "kmod",
        Branches::Checked => "kmod-ibt",
    };
    let archive = crate::progress::step("vmm.ko: Rust", || {
        static_library(dirs, &source, into, &[], branches)
    })?;
    crate::progress::step("vmm.ko: Kbuild", || {
        let shim = shim(dirs, "vmm-linux")?;
        let exports = krate.join("exports.txt");
        let object = shim.join(SHIPPED);
        link(&archive, &exports, "linux", branches, &object)?;
        let (made, _) = kbuild(headers, &shim)?;
        let module = dirs.target.join("vmm.ko");
        match branches {
            Branches::Unchecked => shrink(&made, &module)?,
            // objtool's tables stay true.
            Branches::Checked => {
                fs::copy(&made, &module).with_context(|| format!("no {}", made.display()))?;
            }
        }
        output(Command::new("strip").arg("--strip-debug").arg(&module))?;
        Ok(module)
    })
}

/// The module of the Debian package `bhyve-dkms`, whose Rust half is one for all kernels, as it
/// is made for the kernel with these headers.
///
/// # Errors
/// The compiler, the linker or Kbuild fails, or objtool has found code that it does not like.
pub fn dkms(dirs: &Dirs, headers: &Path) -> Result<PathBuf> {
    let shim = shim(dirs, "vmm-dkms")?;
    let object_file = shim.join(SHIPPED);
    object(dirs, "kmod-ibt", &[], Branches::Checked, &object_file)?;
    let (made, said) = kbuild(headers, &shim)?;
    let complaints: Vec<&str> = said.lines().filter(|l| l.contains("objtool:")).collect();
    ensure!(complaints.is_empty(), "{}", complaints.join("\n"));
    let module = dirs.target.join("vmm-dkms.ko");
    output(
        Command::new("strip")
            .args(["--strip-debug", "-o"])
            .arg(&module)
            .arg(&made),
    )?;
    Ok(module)
}

/// The Rust half, as Kbuild finds it.
const SHIPPED: &str = "vmm_rust.o_shipped";

/// A copy of the shim's sources in the target directory's folder `into`.
fn shim(dirs: &Dirs, into: &str) -> Result<PathBuf> {
    let build = dirs.target.join(into);
    let shim = build.join("linux");
    // Stale shim sources must go, Kbuild's own products may stay.
    mirror(&dirs.root.join("vmm-kmod/linux"), &shim)?;
    mirror(&dirs.root.join("vmm-kmod/kmod"), &build.join("kmod"))?;
    Ok(shim)
}

/// Has Kbuild join the halves in `shim`; the module, and what was said.
fn kbuild(headers: &Path, shim: &Path) -> Result<(PathBuf, String)> {
    // Kbuild wants to know the command that made an object.
    fs::write(shim.join(".vmm_rust.o.cmd"), "")?;
    let said = output(
        Command::new("sh")
            .args(["-c", "exec make -C \"$0\" M=\"$1\" modules 2>&1"])
            .arg(headers)
            .arg(shim)
            .env_remove("MAKEFLAGS")
            .env_remove("MAKELEVEL"),
    )?;
    Ok((shim.join("vmm.ko"), said))
}

/// Leaves out of a module what nobody needs: nobody else calls what is in it, and the C
/// side's calls of the Rust side's functions are within a section now.
fn shrink(made: &Path, module: &Path) -> Result<()> {
    let mut objcopy = Command::new("objcopy");
    objcopy.args(["-R", ".comment"]);
    for section in UNWINDING {
        objcopy.args(["-R", section]);
    }
    for name in LOADER_NAMES {
        objcopy.arg(format!("--keep-global-symbol={name}"));
    }
    output(objcopy.arg(made).arg(module))?;
    let mut bytes = fs::read(module)?;
    one_section::settle(&mut bytes).with_context(|| format!("in {}", module.display()))?;
    fs::write(module, bytes)?;
    Ok(())
}

/// What a kernel thinks of indirect branches (SDM Vol. 1 §17.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Branches {
    /// They lead anywhere.
    Unchecked,
    /// The CPU checks that each leads to an ENDBR. objtool, which looks at all code of
    /// such a kernel's modules and completes it, takes constants among code for code.
    /// Returns and indirect calls go through the kernel's thunks, or the shim's.
    Checked,
}

/// The compiler's flags for the second kind, which are those of the C side: gcc's
/// -fcf-protection=branch -fno-jump-tables -mfunction-return=thunk-extern
/// -mindirect-branch=thunk-extern -mindirect-branch-cs-prefix -mharden-sls=all. Jump tables
/// are ways without a mark. `thunks` is for assembly.
const MARKED: &str = "-Z cf-protection=branch -C jump-tables=no \
     -Z function-return=thunk-extern -Z retpoline-external-thunk=yes -Z indirect-branch-cs-prefix=yes \
     -C target-feature=+harden-sls-ret,+harden-sls-ijmp --cfg thunks";

/// That of the kernel with these headers.
fn branches(headers: &Path) -> Branches {
    let checked = fs::read_to_string(headers.join("include/config/auto.conf"))
        .is_ok_and(|text| text.lines().any(|l| l == "CONFIG_X86_KERNEL_IBT=y"));
    if checked {
        Branches::Checked
    } else {
        Branches::Unchecked
    }
}

/// Builds the Rust half of the module as one object, `object`, with cargo's
/// `extra` arguments; `into` is the target directory.
///
/// # Errors
/// The compiler or the linker fails.
pub fn object(
    dirs: &Dirs,
    into: &str,
    extra: &[&str],
    branches: Branches,
    object: &Path,
) -> Result<()> {
    let source = core_src::ensure(dirs)?;
    let archive = crate::progress::step("vmm.ko: Rust", || {
        static_library(dirs, &source, into, extra, branches)
    })?;
    let exports = dirs.root.join("vmm-kmod/kmod/exports.txt");
    let freebsd = extra.contains(&"freebsd");
    let host = if freebsd { "freebsd" } else { "linux" };
    link(&archive, &exports, host, branches, object)
}

/// Where the Rust half of the module is.
const MODULE: &str = "vmm-kmod/kmod";

/// Its own addresses are relative, and so need no relocation within a section.
const OWN: &str = "-C relocation-model=pic -Z direct-access-external-data=yes -Z unstable-options \
     -C panic=immediate-abort -C force-frame-pointers=non-leaf";

/// A cargo command on the workspace `folder`, which is one of its own for the
/// kernel target; `into` is its target directory.
pub fn cargo(dirs: &Dirs, source: &CoreSource, folder: &str, into: &str, args: &[&str]) -> Command {
    let mut cargo = Command::new("cargo");
    let more = if folder == MODULE {
        OWN
    } else {
        "-C relocation-model=static"
    };
    kernel_cargo_env(&mut cargo, source, more);
    if let Some((verb, rest)) = args.split_first() {
        cargo.arg(verb);
        if *verb != "fmt" {
            cargo
                .args(KERNEL_CARGO_ARGS)
                .arg("--target-dir")
                .arg(dirs.target.join(into));
            if folder == MODULE {
                cargo.arg("-Zbuild-std-features=optimize_for_size");
            }
        }
        cargo.args(rest);
    }
    cargo.current_dir(dirs.root.join(folder));
    cargo
}

/// Builds tests/guests, a workspace of its own for the same target, and returns
/// the directory of its programs.
///
/// # Errors
/// The compiler fails.
pub fn guests(dirs: &Dirs) -> Result<PathBuf> {
    let source = core_src::ensure(dirs)?;
    crate::progress::step("guests", || {
        output(&mut cargo(
            dirs,
            &source,
            "tests/guests",
            "guests",
            &["build", "--release", "--bins"],
        ))
    })?;
    Ok(dirs.target.join("guests/x86_64-unknown-none/release"))
}

pub(crate) fn static_library(
    dirs: &Dirs,
    source: &CoreSource,
    into: &str,
    extra: &[&str],
    branches: Branches,
) -> Result<PathBuf> {
    let mut args = vec![
        "rustc",
        "--package",
        "vmm-module",
        "--release",
        "--message-format=json-render-diagnostics",
    ];
    args.extend(extra);
    // One section of code: what nobody calls has gone with LTO, and calls within a section
    // are the assembler's.
    args.extend(["--", "-Zfunction-sections=no"]);
    // Of what is for speed, too, no loop is unrolled or lies at a boundary: what is worth it is
    // written so.
    args.extend([
        "-Cllvm-args=-unroll-threshold=0",
        "-Cllvm-args=-align-loops=1",
    ]);
    let mut cargo = cargo(dirs, source, MODULE, into, &args);
    if branches == Branches::Checked {
        kernel_cargo_env(&mut cargo, source, &format!("{OWN} {MARKED}"));
    }
    let text = output(&mut cargo)?;
    text.lines()
        .filter_map(|l| serde_json::from_str::<serde_json::Value>(l).ok())
        .filter_map(|m| {
            m["filenames"].as_array().and_then(|files| {
                files
                    .iter()
                    .filter_map(|f| f.as_str())
                    .find(|f| f.ends_with(".a"))
                    .map(PathBuf::from)
            })
        })
        .next_back()
        .context("vmm-kmod/kmod made no static library")
}

/// A section for each kind of thing, and not for each function.
const SECTIONS: &str = "\
    .text 0 : { *(.text .text.*) }
    .rodata 0 : { *(.rodata .rodata.*) }
    .data.rel.ro 0 : { *(.data.rel.ro .data.rel.ro.*) }
    .data 0 : { *(.data .data.*) }
    .bss 0 : { *(.bss .bss.*) }
";
/// What objtool is told of the code, and nobody else.
const OBJTOOL: &str = "\
    .discard.intra_function_calls 0 : { KEEP(*(.discard.intra_function_calls)) }
    .discard.annotate_insn 0 : { KEEP(*(.discard.annotate_insn)) }
    .discard.noendbr 0 : { KEEP(*(.discard.noendbr)) }
    .discard.func_stack_frame_non_standard 0 : { KEEP(*(.discard.func_stack_frame_non_standard)) }
";

/// One relocatable object with what the C side calls on `host`, and what that
/// needs. A line of `exports` is a name, and the host if it is for one only. Beside the
/// library, with the extension `debug`, is the same with the lines of its source.
pub(crate) fn link(
    archive: &Path,
    exports: &Path,
    host: &str,
    branches: Branches,
    object: &Path,
) -> Result<()> {
    let names = fs::read_to_string(exports)
        .with_context(|| format!("cannot read {}", exports.display()))?;
    let names: Vec<&str> = names
        .lines()
        .map(str::trim)
        .filter(|l| !l.is_empty() && !l.starts_with('#'))
        .map(|l| l.split_once(' ').unwrap_or((l, host)))
        .filter(|(_, only)| *only == host)
        .map(|(name, _)| name)
        .collect();
    let script = archive.with_extension("lds");
    let told = if branches == Branches::Checked {
        OBJTOOL
    } else {
        ""
    };
    fs::write(&script, format!("SECTIONS {{\n{SECTIONS}{told}}}\n"))?;
    let mut ld = Command::new("ld");
    ld.args(["-r", "--gc-sections"]).arg("-T").arg(&script);
    if let Some(first) = names.first() {
        ld.args(["-e", first]);
    }
    for name in &names {
        ld.args(["-u", name]);
    }
    let whole = archive.with_extension("debug");
    output(ld.arg("-o").arg(&whole).arg(archive))?;
    if branches == Branches::Checked {
        let mut objcopy = Command::new("objcopy");
        objcopy.args(["--strip-debug", "-R", ".llvmbc", "-R", ".llvmcmd"]);
        return output(objcopy.arg(&whole).arg(object)).map(drop);
    }
    let joined = one_section::join(&fs::read(&whole)?, &names)
        .with_context(|| format!("cannot link {}", whole.display()))?;
    fs::write(object, joined)?;
    Ok(())
}

/// Copies the C files and Kbuild files of `from` to `to`, where they differ.
fn mirror(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    let entries = fs::read_dir(from).with_context(|| format!("no {}", from.display()))?;
    for entry in entries {
        let path = entry?.path();
        let Some(name) = path.file_name() else {
            continue;
        };
        let wanted = name == "Kbuild"
            || path
                .extension()
                .is_some_and(|e| e == "c" || e == "h" || e == "S");
        if !path.is_file() || !wanted {
            continue;
        }
        let target = to.join(name);
        let new = fs::read(&path)?;
        if fs::read(&target).ok().as_deref() != Some(&new) {
            fs::write(&target, new)?;
        }
    }
    Ok(())
}
