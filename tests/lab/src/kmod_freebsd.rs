//! Builds `vmm.ko` for FreeBSD/amd64 from Linux: the same Rust object with
//! FreeBSD's error numbers, and the C shim against a kernel source tree, or, to
//! check it, against a newer FreeBSD's headers without one. On FreeBSD itself
//! vmm-kmod/freebsd/Makefile does the second half.

use crate::command::output;
use crate::dirs::Dirs;
use crate::ziglang::Zig;
use crate::{core_src, kmod, one_section};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Debian packages that this needs besides the compiler of the Linux host.
pub const PACKAGES: [&str; 2] = ["clang-14", "lld-14"];

/// What sys/conf/kmod.mk and kern.mk give a module of amd64.
const CFLAGS: &[&str] = &[
    "-O2",
    "-pipe",
    "-std=gnu99",
    "-D_KERNEL",
    "-DKLD_MODULE",
    "-DSMP",
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

/// What the C shim is compiled against.
#[derive(Debug, Clone)]
pub enum Headers {
    /// A FreeBSD `/usr/src/sys`.
    Tree(PathBuf),
    /// The headers that ziglang carries: a check that the shim compiles and
    /// links for a newer FreeBSD. That module is not for loading.
    Zig(Zig),
}

/// Headers of ziglang's FreeBSD that its package lacks, because a kernel's build
/// makes them; the shim uses nothing of them.
const GENERATED: [&str; 2] = ["bus_if.h", "device_if.h"];

impl Headers {
    /// A kernel source tree.
    ///
    /// # Errors
    /// `sys` is none.
    pub fn tree(sys: &Path) -> Result<Self> {
        let sys = fs::canonicalize(sys).with_context(|| format!("no {}", sys.display()))?;
        ensure!(
            sys.join("amd64/include/vmparam.h").is_file(),
            "{} is not FreeBSD's sys directory: it has no amd64/include/vmparam.h",
            sys.display()
        );
        Ok(Self::Tree(sys))
    }

    /// Whether what the file includes is there: ziglang has nothing of PCI.
    fn has(&self, file: &Path) -> bool {
        matches!(self, Self::Tree(_)) || file.file_stem().is_none_or(|stem| stem != "ppt")
    }

    /// Makes in `dir` what the includes need.
    fn prepare(&self, dir: &Path) -> Result<()> {
        match self {
            Self::Tree(sys) => {
                symlink(sys.join("amd64/include"), dir.join("machine"))?;
                symlink(sys.join("x86/include"), dir.join("x86"))?;
                // The kernel's build makes these.
                for interface in ["kern/bus_if.m", "kern/device_if.m", "dev/pci/pci_if.m"] {
                    output(
                        Command::new("awk")
                            .arg("-f")
                            .arg(sys.join("tools/makeobjops.awk"))
                            .arg(sys.join(interface))
                            .arg("-h")
                            .current_dir(dir),
                    )?;
                }
            }
            Self::Zig(_) => {
                for file in GENERATED {
                    fs::write(dir.join(file), "/* Made by a kernel's build. */\n")?;
                }
            }
        }
        Ok(())
    }

    /// The compiler with its options; `ours` are the folders of includes that go
    /// before all others.
    fn compiler(&self, ours: [&Path; 2]) -> Command {
        let mut cc = match self {
            Self::Tree(_) => {
                let mut clang = Command::new("clang-14");
                clang.args(["-target", "x86_64-unknown-freebsd", "-nostdinc"]);
                clang
            }
            Self::Zig(zig) => {
                let mut cc = zig.command(&["cc", "-target", "x86_64-freebsd.15.0"]);
                cc.arg("-fno-sanitize=undefined");
                cc
            }
        };
        cc.args(CFLAGS);
        // dev/pci/pcivar.h of 12 is older than this warning.
        cc.arg("-Wno-unused-but-set-variable");
        for folder in ours {
            cc.arg("-I").arg(folder);
        }
        if let Self::Tree(sys) = self {
            cc.arg("-I").arg(sys);
            cc.arg("-I").arg(sys.join("contrib/ck/include"));
        }
        cc
    }

    fn linker(&self) -> Command {
        match self {
            Self::Tree(_) => Command::new("ld.lld-14"),
            Self::Zig(zig) => zig.command(&["ld.lld"]),
        }
    }
}

/// Where [`build`] has put the module that it built for a kernel from its sources.
pub fn module(dirs: &Dirs) -> PathBuf {
    dirs.target.join("lab/vmm-freebsd/vmm.ko")
}

/// Builds the module and returns the path of `vmm.ko`.
///
/// # Errors
/// The compiler or the linker fails.
pub fn build(dirs: &Dirs, headers: &Headers) -> Result<PathBuf> {
    let source = core_src::ensure(dirs)?;
    let archive = crate::progress::step("vmm.ko: Rust", || {
        kmod::static_library(
            dirs,
            &source,
            "kmod-freebsd",
            &["--features", "freebsd"],
            kmod::Branches::Unchecked,
        )
    })?;
    crate::progress::step("vmm.ko: C", || {
        let name = match headers {
            Headers::Tree(_) => "vmm-freebsd",
            Headers::Zig(_) => "vmm-freebsd-check",
        };
        let dir = dirs.fresh(name)?;
        let rust = dir.join("vmm_rust.o");
        let krate = dirs.root.join("vmm-kmod/kmod");
        kmod::link(
            &archive,
            &krate.join("exports.txt"),
            "freebsd",
            kmod::Branches::Unchecked,
            &rust,
        )?;
        let mut objects = vec![rust];
        headers.prepare(&dir)?;
        for file in c_files(&dirs.root.join("vmm-kmod/freebsd"))? {
            if !headers.has(&file) {
                continue;
            }
            let object = dir
                .join(file.file_name().unwrap_or_default())
                .with_extension("o");
            let mut cc = headers.compiler([&krate, &dir]);
            output(cc.arg("-c").arg(&file).arg("-o").arg(&object))?;
            objects.push(object);
        }
        let whole = dir.join("vmm.whole");
        output(
            headers
                .linker()
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
        let mut bytes = fs::read(&module)?;
        one_section::settle(&mut bytes).with_context(|| format!("in {}", module.display()))?;
        fs::write(&module, bytes)?;
        output(Command::new("strip").arg("--strip-debug").arg(&module))?;
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
