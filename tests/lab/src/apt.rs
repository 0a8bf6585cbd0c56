//! Debian packages: installed where a program is needed, downloaded and
//! extracted where only files are, so that the user's machine stays as it is.

use crate::command::output;
use crate::progress::step;
use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The machine is Debian 12 on amd64.
///
/// # Errors
/// It is something else; the error says what.
pub fn require_debian_12() -> Result<()> {
    let text = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
    let field = |name: &str| {
        text.lines()
            .find_map(|l| l.strip_prefix(name)?.strip_prefix('='))
            .map(|v| v.trim_matches('"').to_owned())
            .unwrap_or_default()
    };
    let (id, version) = (field("ID"), field("VERSION_ID"));
    ensure!(
        id == "debian" && version == "12",
        "this machine is {id} {version}; the lab is set up for Debian 12 (its 6.1 kernel, Bochs 2.7)"
    );
    ensure!(
        std::env::consts::ARCH == "x86_64",
        "this machine is {}; the lab needs amd64",
        std::env::consts::ARCH
    );
    Ok(())
}

/// Installs those of `packages` that are missing.
///
/// # Errors
/// Packages are missing and we are not root, or apt fails.
pub fn ensure_installed(packages: &[&str]) -> Result<()> {
    let missing: Vec<&str> = packages
        .iter()
        .copied()
        .filter(|p| !is_installed(p))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.join(" ");
    if !nix::unistd::geteuid().is_root() {
        bail!(
            "these Debian packages are missing and only root can install them; run\n    apt-get install --no-install-recommends {list}"
        );
    }
    step(&format!("installing Debian packages: {list}"), || {
        let install = |packages: &[&str]| {
            output(
                Command::new("apt-get")
                    .env("DEBIAN_FRONTEND", "noninteractive")
                    .args(["install", "-y", "-qq", "--no-install-recommends"])
                    .args(packages),
            )
        };
        // Fresh machines have no package lists, old ones stale lists.
        if install(&missing).is_err() {
            update()?;
            install(&missing)?;
        }
        Ok(())
    })
}

/// `apt-get update` with the machine's own sources.
///
/// # Errors
/// apt fails.
pub fn update() -> Result<()> {
    output(Command::new("apt-get").args(["update", "-qq"])).map(drop)
}

/// dpkg has `package` installed.
pub fn is_installed(package: &str) -> bool {
    output(Command::new("dpkg-query").args(["-W", "-f=${Status}", package]))
        .is_ok_and(|s| s.ends_with(" installed"))
}

/// The packages that `package` depends on, by name, in its newest version.
///
/// # Errors
/// apt does not know the package.
pub fn depends(package: &str) -> Result<Vec<String>> {
    let text = output(Command::new("apt-cache").args(["--no-all-versions", "show", package]))?;
    let line = text
        .lines()
        .find_map(|l| l.strip_prefix("Depends: "))
        .with_context(|| format!("Debian's {package} names no dependency"))?;
    Ok(line
        .split(',')
        .filter_map(|d| d.split_whitespace().next())
        .map(str::to_owned)
        .collect())
}

/// Downloads `packages` with apt's `options` and extracts them into `into`.
///
/// # Errors
/// The download or the extraction fails.
pub fn extract(options: &[String], packages: &[&str], into: &Path) -> Result<()> {
    let debs = into.join(".debs");
    fs::create_dir_all(&debs)?;
    output(
        Command::new("apt-get")
            .args(options)
            .args(["-o", "APT::Sandbox::User=root", "-qq", "download"])
            .args(packages)
            .current_dir(&debs),
    )?;
    for entry in fs::read_dir(&debs)? {
        output(
            Command::new("dpkg-deb")
                .arg("-x")
                .arg(entry?.path())
                .arg(into),
        )?;
    }
    fs::remove_dir_all(&debs)?;
    Ok(())
}

/// A private apt state that looks at other suites than the machine does, through
/// the mirror that the machine is configured for.
#[derive(Debug)]
pub struct PrivateApt {
    options: Vec<String>,
}

impl PrivateApt {
    /// Makes the state in `dir` for `suites` and fetches their package lists.
    ///
    /// # Errors
    /// The machine has no Debian source, or the mirror does not answer.
    pub fn new(dir: &Path, suites: &[&str]) -> Result<Self> {
        for sub in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(dir.join(sub))?;
        }
        let mirror = mirror()?;
        let keyring = "/usr/share/keyrings/debian-archive-keyring.gpg";
        let sources: String = suites
            .iter()
            .map(|suite| format!("deb [signed-by={keyring}] {mirror} {suite} main\n"))
            .collect();
        let list = dir.join("sources.list");
        fs::write(&list, sources)?;
        let set = |name: &str, path: &Path| ["-o".to_owned(), format!("{name}={}", path.display())];
        let mut options = Vec::new();
        options.extend(set("Dir::Etc::SourceList", &list));
        options.extend(set("Dir::Etc::SourceParts", Path::new("/dev/null")));
        options.extend(set("Dir::Etc::Preferences", Path::new("/dev/null")));
        options.extend(set("Dir::Etc::PreferencesParts", Path::new("/dev/null")));
        options.extend(set("Dir::State::Lists", &dir.join("lists")));
        options.extend(set("Dir::Cache", &dir.join("cache")));
        for option in ["Acquire::Languages=none", "APT::Sandbox::User=root"] {
            options.extend(["-o".to_owned(), option.to_owned()]);
        }
        output(
            Command::new("apt-get")
                .args(&options)
                .args(["update", "-qq"]),
        )?;
        Ok(Self { options })
    }

    /// The versions of `package` that the suites have.
    ///
    /// # Errors
    /// apt fails.
    pub fn versions(&self, package: &str) -> Result<Vec<String>> {
        let text = output(
            Command::new("apt-cache")
                .args(&self.options)
                .args(["madison", package]),
        )?;
        Ok(text
            .lines()
            .filter_map(|l| l.split('|').nth(1))
            .map(|v| v.trim().to_owned())
            .collect())
    }

    /// Downloads and extracts `packages` (`name=version`) into `into`.
    ///
    /// # Errors
    /// The download or the extraction fails.
    pub fn extract(&self, packages: &[&str], into: &Path) -> Result<()> {
        extract(&self.options, packages, into)
    }
}

/// The URI of the Debian archive in the machine's own apt configuration.
fn mirror() -> Result<String> {
    let ask = || {
        output(Command::new("apt-get").args([
            "indextargets",
            "--format",
            "$(REPO_URI)",
            "Created-By: Packages",
            "Origin: Debian",
            "Label: Debian",
        ]))
    };
    let mut text = ask()?;
    if text.trim().is_empty() {
        update()?;
        text = ask()?;
    }
    let uri = text
        .lines()
        .next()
        .context("apt is configured with no Debian archive (Label: Debian)")?;
    Ok(uri.trim().to_owned())
}

/// Fetches `uri` into `file` with apt's own downloader, checked against
/// `sha256` (hexadecimal) where that is given.
///
/// # Errors
/// No net, no such file, or another checksum.
pub fn download(uri: &str, file: &Path, sha256: Option<&str>) -> Result<()> {
    let helper = PathBuf::from("/usr/lib/apt/apt-helper");
    let mut command = Command::new(helper);
    command
        .args(["-o", "APT::Sandbox::User=root"])
        .args([
            "-o",
            "Acquire::Retries=0",
            "-o",
            "Acquire::http::Timeout=10",
        ])
        .args(["-o", "Acquire::https::Timeout=10"])
        .arg("download-file")
        .arg(uri)
        .arg(file);
    if let Some(sum) = sha256 {
        command.arg(format!("SHA256:{sum}"));
    }
    output(&mut command).map(drop)
}
