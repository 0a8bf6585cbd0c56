//! Builds `vmm.ko` for FreeBSD/amd64 from Linux: the same Rust object with
//! FreeBSD's error numbers, and the C shim against a kernel source tree. On
//! FreeBSD itself vmm-kmod/freebsd/Makefile does the second half.

use crate::command::output;
use crate::dirs::Dirs;
use crate::{core_src, kmod};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Debian packages that this needs besides the compiler of the Linux host.
pub const PACKAGES: [&str; 2] = ["clang-14", "lld-14"];

/// What sys/conf/kmod.mk and kern.mk give a module of amd64.
const CFLAGS: &[&str] = &[
    "-target",
    "x86_64-unknown-freebsd",
    "-O2",
    "-pipe",
    "-std=gnu99",
    "-D_KERNEL",
    "-DKLD_MODULE",
    "-DSMP",
    "-nostdinc",
    "-fno-strict-aliasing",
    "-fno-common",
    "-fno-omit-frame-pointer",
    "-mno-omit-leaf-frame-pointer",
    "-mcmodel=kernel",
    "-mno-red-zone",
    "-mno-mmx",
    "-mno-sse",
    "-mno-avx",
    "-msoft-float",
    "-fno-asynchronous-unwind-tables",
    "-fno-stack-protector",
    "-ffreestanding",
    "-fwrapv",
    "-Wall",
    "-Wstrict-prototypes",
    "-Wmissing-prototypes",
    "-Wpointer-arith",
    "-Wcast-qual",
    "-Wno-pointer-sign",
    // The kernel's printf has more conversions than the compiler knows.
    "-Wno-format",
    "-Werror",
];

/// Builds the module against the kernel sources in `sys` (a FreeBSD
/// `/usr/src/sys`) and returns the path of `vmm.ko`.
///
/// # Errors
/// `sys` is not a kernel source tree; the compiler or the linker fails.
pub fn build(dirs: &Dirs, sys: &Path) -> Result<PathBuf> {
    let sys = fs::canonicalize(sys).with_context(|| format!("no {}", sys.display()))?;
    ensure!(
        sys.join("amd64/include/vmparam.h").is_file(),
        "{} is not FreeBSD's sys directory: it has no amd64/include/vmparam.h",
        sys.display()
    );
    let source = core_src::ensure(dirs)?;
    let archive = crate::progress::step("vmm.ko: Rust", || {
        kmod::static_library(dirs, &source, "kmod-freebsd", &["--features", "freebsd"])
    })?;
    crate::progress::step("vmm.ko: C", || {
        let dir = dirs.fresh("vmm-freebsd")?;
        let rust = dir.join("vmm_rust.o");
        let krate = dirs.root.join("vmm-kmod/kmod");
        kmod::link(&archive, &krate.join("exports.txt"), &rust)?;
        symlink(sys.join("amd64/include"), dir.join("machine"))?;
        symlink(sys.join("x86/include"), dir.join("x86"))?;
        // sys/bus.h wants these two, which the kernel's build makes.
        for interface in ["bus_if.m", "device_if.m"] {
            output(
                Command::new("awk")
                    .arg("-f")
                    .arg(sys.join("tools/makeobjops.awk"))
                    .arg(sys.join("kern").join(interface))
                    .arg("-h")
                    .current_dir(&dir),
            )?;
        }
        let mut objects = vec![rust];
        for file in c_files(&dirs.root.join("vmm-kmod/freebsd"))? {
            let object = dir
                .join(file.file_name().unwrap_or_default())
                .with_extension("o");
            output(
                Command::new("clang-14")
                    .args(CFLAGS)
                    .arg("-I")
                    .arg(&krate)
                    .arg("-I")
                    .arg(&dir)
                    .arg("-I")
                    .arg(&sys)
                    .arg("-I")
                    .arg(sys.join("contrib/ck/include"))
                    .arg("-c")
                    .arg(&file)
                    .arg("-o")
                    .arg(&object),
            )?;
            objects.push(object);
        }
        let whole = dir.join("vmm.whole");
        output(
            Command::new("ld.lld-14")
                .args(["-m", "elf_x86_64_fbsd", "-r", "-o"])
                .arg(&whole)
                .args(&objects),
        )?;
        let module = dir.join("vmm.ko");
        // Like kmod.mk: nothing of a module is visible to others.
        output(
            Command::new("objcopy")
                .args(["--strip-debug", "--keep-global-symbol=vmm"])
                .arg(&whole)
                .arg(&module),
        )?;
        Ok(module)
    })
}

fn c_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("no {}", dir.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "c") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}
