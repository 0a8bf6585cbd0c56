//! A compiler for the guest: this machine's gcc, with what it needs to build
//! one program of some size: 1.6 thousand million instructions' worth, most of
//! them cc1's.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use lab::apt;
use lab::command::output;
use lab::dirs::Dirs;

/// What is compiled, for the table.
pub const WHAT: &str = "gcc -O1, stb_image_write to a static program";
const SOURCE: &str = "#define STB_IMAGE_WRITE_IMPLEMENTATION\n\
    #include \"stb_image_write.h\"\n\
    int main(int argc, char **argv)\n\
    {\n\
    \tunsigned char pixels[16 * 16 * 3] = { 0 };\n\
    \treturn argc != 2 || !stbi_write_png(argv[1], 16, 16, 3, pixels, 48);\n\
    }\n";
/// The library's one file.
const HEADER: &str = "stb_image_write.h";
/// Where the work is in the guest.
pub const WORK: &str = "work";
/// The compiler's own name for itself.
const GCC: &str = "/usr/bin/x86_64-linux-gnu-gcc-12";

/// What the guest's shell runs; `root` is where the compiler's `/` is.
pub fn command(root: &str) -> String {
    let build =
        format!("{GCC} -O1 -fno-use-linker-plugin -static -o /{WORK}/program /{WORK}/main.c -lm");
    // gcc looks for as and ld there.
    let path = "PATH=/bin:/usr/bin";
    if root.is_empty() {
        format!("{path} meter run {build}")
    } else {
        // The meter is outside; chroot(8) is busybox's.
        format!("{path} meter run /bin/chroot {root} {build}")
    }
}

/// Files for the guest: path in the guest (relative to `/`), path here.
///
/// # Errors
/// gcc does not compile the program here, or apt has no libstb-dev.
pub fn files(dirs: &Dirs) -> Result<Vec<(String, PathBuf)>> {
    let stb = dirs.cache.join("stb");
    let headers = stb.join("usr/include/stb");
    if !headers.is_dir() && apt::extract(&[], &["libstb-dev"], &stb).is_err() {
        apt::update()?;
        apt::extract(&[], &["libstb-dev"], &stb)?;
    }
    let work = dirs.fresh("bench-compile")?;
    fs::copy(headers.join(HEADER), work.join(HEADER))
        .with_context(|| format!("libstb-dev has no {HEADER}"))?;
    fs::write(work.join("main.c"), SOURCE)?;
    let mut names = BTreeSet::new();
    // Headers, as the compiler found them.
    let rule = gcc(&work, &["-O1", "-M", "main.c"])?;
    for word in rule.split_whitespace().filter(|w| w.starts_with('/')) {
        names.insert(word.to_owned());
    }
    // Objects and archives, as the linker did.
    let trace = gcc(
        &work,
        &[
            "-O1",
            "-static",
            "-Wl,--trace",
            "-o",
            "program",
            "main.c",
            "-lm",
        ],
    )?;
    for line in trace.lines().filter(|l| l.starts_with('/')) {
        // A member of an archive is ARCHIVE(MEMBER).
        let path = line.split('(').next().unwrap_or(line);
        if !path.starts_with("/tmp/") {
            names.insert(path.to_owned());
        }
    }
    // -lm is a linker script that names two more.
    for library in ["libm-2.36.a", "libmvec.a", "libm.a"] {
        names.insert(gcc(&work, &[&format!("-print-file-name={library}")])?);
    }
    let mut programs = vec![GCC.to_owned()];
    for program in ["cc1", "as", "collect2", "ld"] {
        let found = gcc(&work, &[&format!("-print-prog-name={program}")])?;
        programs.push(if found.starts_with('/') {
            found
        } else {
            format!("/usr/bin/{found}")
        });
    }
    let mut files = Vec::new();
    for program in &programs {
        for line in output(Command::new("ldd").arg(program))?.lines() {
            if let Some(at) = line.find('/') {
                let path = line.get(at..).unwrap_or_default();
                let path = path.split_whitespace().next().unwrap_or_default();
                names.insert(path.to_owned());
            }
        }
        names.insert(program.clone());
    }
    for name in names {
        let real = Path::new(&name)
            .canonicalize()
            .with_context(|| format!("gcc names {name}"))?;
        // By the name that it is asked for, contents and all.
        files.push((clean(&name)?, real));
    }
    for name in [HEADER, "main.c"] {
        files.push((format!("{WORK}/{name}"), work.join(name)));
    }
    ensure!(files.len() > 20, "gcc told of {} files only", files.len());
    Ok(files)
}

fn gcc(work: &Path, arguments: &[&str]) -> Result<String> {
    let text = output(
        Command::new(GCC)
            .args(arguments)
            .env("LC_ALL", "C")
            .current_dir(work),
    )?;
    Ok(text.trim_end().to_owned())
}

/// A path without its leading slash and its "..".
fn clean(path: &str) -> Result<String> {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    ensure!(!parts.is_empty(), "{path} is no file");
    Ok(parts.join("/"))
}
