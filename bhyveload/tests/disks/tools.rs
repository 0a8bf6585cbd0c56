//! Debian's and FreeBSD's own tools, and a tree of files to put on an image.

use bhyveload::fs::{FileSystem, FileType, resolve};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tempfile::TempDir;

/// Runs a tool; `None`, with a line that says so, where there is none.
pub fn run(tool: &str, args: &[&str], input: &str) -> Option<()> {
    use std::io::Write;
    // sfdisk is not in everybody's path.
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap());
    let child = Command::new(tool)
        .args(args)
        .env("PATH", path)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            println!("no {tool} on this machine: not tested");
            return None;
        }
        Err(e) => panic!("{tool}: {e}"),
    };
    child
        .stdin
        .take()
        .unwrap()
        .write_all(input.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(
        output.status.success(),
        "{tool} {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Some(())
}

/// Bytes that differ from block to block.
pub fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| (i.wrapping_mul(31) ^ (i >> 9).wrapping_mul(7)) as u8)
        .collect()
}

/// Files of all shapes, and how they are called.
pub struct Tree {
    pub dir: TempDir,
    pub files: Vec<(String, Vec<u8>)>,
}

pub const MANY: usize = 700;

/// `sparse`: bytes before a file's only data.
pub fn tree(sparse: u64) -> Tree {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    let mut files = Vec::new();
    let mut put = |path: &str, data: Vec<u8>| {
        let at = root.join(path);
        fs::create_dir_all(at.parent().unwrap()).unwrap();
        fs::write(&at, &data).unwrap();
        files.push((path.to_owned(), data));
    };
    put("boot/kernel/kernel", pattern(3_000_001));
    put("boot/loader.conf", b"a=\"1\"\n".to_vec());
    put("boot/small", pattern(1));
    put("boot/block", pattern(32768));
    put("empty", Vec::new());
    // Beyond the direct blocks, not a whole number of fragments.
    put("double", pattern(12 * 8192 + 5000));
    put(&format!("{}/deep", ["d"; 12].join("/")), pattern(100));
    put("A name with Spaces, capitals and ümlauts.Long", pattern(10));
    for i in 0..MANY {
        put(&format!("many/file-number-{i}"), pattern(i % 7));
    }
    let path = root.join("sparse");
    let file = fs::File::create(&path).unwrap();
    std::os::unix::fs::FileExt::write_at(&file, b"the end", sparse).unwrap();
    for (link, target) in [
        ("short", "boot/small"),
        ("absolute", "/boot/kernel/kernel"),
        ("boot/up", "../../../../boot/../boot/small"),
        ("boot/k", "kernel"),
        ("circle", "circle"),
        ("boot/there", "../boot/back"),
        ("boot/back", "there"),
        ("dangling", "nowhere/at/all"),
    ] {
        symlink(target, root.join(link)).unwrap();
    }
    let long = format!("{}boot/small", "./".repeat(200));
    symlink(long, root.join("long")).unwrap();
    Tree { dir, files }
}

impl Tree {
    pub fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    pub fn image(&self) -> PathBuf {
        self.dir.path().join("image")
    }
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

pub fn get(fs: &dyn FileSystem, path: &str) -> Option<Vec<u8>> {
    let (node, attributes) = resolve(fs, path.as_bytes()).unwrap()?;
    assert_eq!(attributes.kind, FileType::File, "{path}");
    Some(fs.read(node, 64 << 20).unwrap())
}

/// Checks that all that is in the tree is found on the file system.
pub fn check(tree: &Tree, fs: &dyn FileSystem) {
    for (path, data) in &tree.files {
        assert!(get(fs, path).as_deref() == Some(data), "{path}");
    }
    for (link, target) in [
        ("short", "boot/small"),
        ("absolute", "boot/kernel/kernel"),
        ("boot/up", "boot/small"),
        ("boot/k/kernel", "boot/kernel/kernel"),
        ("long", "boot/small"),
        ("//boot/./kernel/../small", "boot/small"),
        ("../../boot/small", "boot/small"),
    ] {
        assert!(get(fs, link) == get(fs, target), "{link}");
    }
    for absent in ["nothing", "boot/small/x", "dangling", "boot/kernel/kernel/"] {
        let found = resolve(fs, absent.as_bytes()).unwrap();
        // A slash behind a file's name is let pass, as FreeBSD's loader does.
        assert_eq!(found.is_some(), absent.ends_with('/'), "{absent}");
    }
    for circle in ["circle", "boot/there", "boot/back/x"] {
        let fault = resolve(fs, circle.as_bytes()).unwrap_err();
        assert_eq!(fault.field, "symlink", "{circle}");
    }
    let (many, _) = resolve(fs, b"many").unwrap().unwrap();
    let mut count = 0;
    fs.entries(many, &mut |_, _| {
        count += 1;
        std::ops::ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(count, MANY);
    // What does not fit is not read at all.
    let (kernel, _) = resolve(fs, b"boot/kernel/kernel").unwrap().unwrap();
    assert_eq!(fs.read(kernel, 3_000_000).unwrap_err().field, "size");
}
