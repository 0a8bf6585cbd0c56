//! A compiler for the guest: this machine's gcc, with what it needs to build
//! one program of some size, stb_image from Debian's libstb-dev.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use lab::apt;
use lab::command::output;
use lab::dirs::Dirs;

const SOURCE: &str = "#define STB_IMAGE_IMPLEMENTATION\n\
    #define STB_IMAGE_WRITE_IMPLEMENTATION\n\
    #include \"stb_image.h\"\n\
    #include \"stb_image_write.h\"\n\
    int main(int argc, char **argv)\n\
    {\n\
    \tint x, y, n;\n\
    \tunsigned char *p = argc > 2 ? stbi_load(argv[1], &x, &y, &n, 0) : 0;\n\
    \treturn p == 0 || !stbi_write_png(argv[2], x, y, n, p, x * n);\n\
    }\n";
/// Where the work is in the guest.
pub const WORK: &str = "work";
/// The compiler's own name for itself.
const GCC: &str = "/usr/bin/x86_64-linux-gnu-gcc-12";

/// What the guest's shell runs; `root` is where the compiler's `/` is.
pub fn command(root: &str) -> String {
    let build = format!("{GCC} -O1 -static -o /{WORK}/program /{WORK}/main.c -lm");
    if root.is_empty() {
        format!("meter run {build}")
    } else {
        // The meter is outside; chroot(8) is busybox's.
        format!("meter run /bin/chroot {root} {build}")
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
    for name in ["stb_image.h", "stb_image_write.h"] {
        fs::copy(headers.join(name), work.join(name))
            .with_context(|| format!("libstb-dev has no {name}"))?;
    }
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
    for name in ["stb_image.h", "stb_image_write.h", "main.c"] {
        files.push((format!("{WORK}/{name}"), work.join(name)));
    }
    // gcc -static asks the linker for it through the plugin's path otherwise.
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
