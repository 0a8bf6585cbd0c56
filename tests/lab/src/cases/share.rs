//! A folder that host and guest share by virtio. The guest is Debian's kernel of
//! the usual flavour, for the cloud's has no 9P.

use crate::apt;
use crate::dirs::Dirs;
use crate::guest::{Guest, Load, linux_cmdline, said, shell};
use crate::host::{self, Config, Host, SHORT};
use crate::progress::step;
use crate::runner::{Case, Group, Lab};
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::virtio::{kill, types};

const UP: Duration = Duration::from_secs(400);
const DEVICES: &str = "-s 3,virtio-9p,share=/tmp/share -s 4,virtio-9p,fixed=/tmp/fixed,ro";
/// In the order of their dependencies.
const MODULES: [&str; 10] = [
    "drivers/virtio/virtio_ring.ko",
    "drivers/virtio/virtio.ko",
    "drivers/virtio/virtio_pci_legacy_dev.ko",
    "drivers/virtio/virtio_pci_modern_dev.ko",
    "drivers/virtio/virtio_pci.ko",
    "fs/netfs/netfs.ko",
    "fs/fscache/fscache.ko",
    "net/9p/9pnet.ko",
    "net/9p/9pnet_virtio.ko",
    "fs/9p/9p.ko",
];

/// The host and its tests.
///
/// # Errors
/// The guest's initramfs cannot be made.
pub fn group(lab: &Lab) -> Result<Group> {
    let name = "virtio-share";
    let mut config = Config::new(lab.engine, 256);
    let (image, modules) = match kernel(&lab.dirs, &lab.kit.kernel.release) {
        Ok(found) => found,
        Err(e) => {
            let why = format!("Debian's usual kernel cannot be had: {e:#}");
            return Ok(Group {
                name: name.to_owned(),
                config,
                cases: vec![Case::skipped(name, &why)],
            });
        }
    };
    let modules: Vec<(String, PathBuf)> = MODULES
        .iter()
        .map(|m| Ok((base(m)?, modules.join(m))))
        .collect::<Result<_>>()?;
    let initrd = host::guest_initrd_with(&lab.dirs, name, &modules)?;
    config.file("guest/linux", &image);
    config.file("guest/initrd", &initrd);
    Ok(Group {
        name: name.to_owned(),
        config,
        cases: vec![Case::new(name, share)],
    })
}

fn base(module: &str) -> Result<String> {
    let name = Path::new(module).file_name().context("no file name")?;
    Ok(name.to_string_lossy().into_owned())
}

/// Debian's usual kernel of the same version as the host's: bzImage, modules.
fn kernel(dirs: &Dirs, host: &str) -> Result<(PathBuf, PathBuf)> {
    let release = host.replace("-cloud", "");
    let root = dirs.cache.join("guest").join(&release);
    let image = root.join(format!("boot/vmlinuz-{release}"));
    if !image.is_file() {
        step("Debian's usual kernel, for a guest", || {
            std::fs::create_dir_all(&root)?;
            let package = format!("linux-image-{release}");
            if apt::extract(&[], &[&package], &root).is_err() {
                // No package lists yet, or the mirror has moved on since.
                apt::update()?;
                apt::extract(&[], &[&package], &root)?;
            }
            Ok(())
        })?;
    }
    Ok((image, root.join(format!("lib/modules/{release}/kernel"))))
}

fn share(_: &Lab, host: &mut Host) -> Result<()> {
    host.must(
        "mkdir -p /tmp/share/sub /tmp/fixed && echo 'the host was here' >/tmp/share/file && \
         echo secret >/tmp/secret && echo fixed >/tmp/fixed/file && \
         ln -s ../secret /tmp/share/out && ln -s /etc /tmp/share/etc",
        SHORT,
    )?;
    let load = Load::Linux {
        initrd: Some("/guest/initrd".to_owned()),
        cmdline: linux_cmdline(),
    };
    let mut guest = Guest::new("/guest/linux", load);
    guest.options = DEVICES.to_owned();
    guest.start(host)?;
    shell(host.guest(), UP)?;
    for module in MODULES {
        types(host, &format!("insmod /{}", base(module)?))?;
    }
    let done = folder(host);
    if let Err(e) = done {
        return Err(e.context(said(host)));
    }
    kill(host, &guest)
}

fn folder(host: &mut Host) -> Result<()> {
    let text = types(
        host,
        "mkdir -p /mnt/a /mnt/b && \
         mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144 share /mnt/a && \
         mount -t 9p -o trans=virtio,version=9p2000.L fixed /mnt/b && cat /mnt/a/file /mnt/b/file",
    )?;
    ensure!(
        text.contains("the host was here") && text.contains("fixed"),
        "the folders are not there:\n{text}"
    );
    // Two megabytes, names that change, and a listing.
    let sum = types(
        host,
        "cd /mnt/a && i=0; while [ $i -lt 8192 ]; do printf '%256d' $i; i=$((i+1)); done >/tmp/data; \
         cp /tmp/data sub/data && mkdir new && mv sub/data new/moved && ln new/moved hard && \
         ln -s new/moved soft && chmod 640 hard && echo more >>new/moved && \
         [ $(ls new sub | wc -l) = 4 ] && rmdir sub && md5sum <soft",
    )?;
    let sum = sum
        .lines()
        .find_map(|l| l.strip_suffix("  -"))
        .with_context(|| format!("no checksum in:\n{sum}"))?
        .to_owned();
    let seen = host.must(
        "md5sum </tmp/share/hard; stat -c %a /tmp/share/new/moved; ls /tmp/share",
        SHORT,
    )?;
    ensure!(
        seen.contains(&sum) && seen.contains("640") && !seen.contains("sub"),
        "the host sees\n{seen}, the guest has written {sum}"
    );
    // Links lead out for the host, not for the guest; what is fixed stays.
    types(
        host,
        "! cat out; ! ls etc/init; ! touch /mnt/b/file; ! rm /mnt/b/file; \
         ! mknod dev c 1 3; cd /; umount /mnt/a /mnt/b",
    )?;
    Ok(())
}
