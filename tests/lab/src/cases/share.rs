//! What host and guest share: a folder, memory, streams by ports and sockets,
//! drives; and the kinds of interrupts that come of them. The guest is Debian's
//! kernel of the usual flavour, for the cloud's has neither 9P nor AHCI. It is
//! large, and its drivers do not care what runs it: where there is a choice of
//! emulators it is the faster one.

mod drives;
mod memory;
mod streams;

use crate::apt;
use crate::command;
use crate::dirs::Dirs;
use crate::guest::{Guest, Load, linux_cmdline, said, shell};
use crate::host::{self, Config, Host, SHORT};
use crate::machine::Engine;
use crate::progress::step;
use crate::runner::{Case, Group, Lab};
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::virtio::{kill, types};

const UP: Duration = Duration::from_secs(400);
const DEVICES: &str = "-s 3,virtio-9p,share=/tmp/share -s 4,virtio-9p,fixed=/tmp/fixed,ro \
     -s 5,virtio-balloon,control=/tmp/balloon \
     -s 9,virtio-balloon,control=/tmp/fixed-balloon,noreport -s 6,virtio-console,org.lab.port=/tmp/port \
     -s 7,virtio-vsock,cid=7,path=/tmp/vsock -s 8,ahci,hd:/tmp/disk,cd:/tmp/cd";
/// In the order of their dependencies.
const MODULES: [&str; 28] = [
    "drivers/virtio/virtio_ring.ko",
    "drivers/virtio/virtio.ko",
    "drivers/virtio/virtio_pci_legacy_dev.ko",
    "drivers/virtio/virtio_pci_modern_dev.ko",
    "drivers/virtio/virtio_pci.ko",
    "drivers/virtio/virtio_balloon.ko",
    "drivers/char/virtio_console.ko",
    "net/vmw_vsock/vsock.ko",
    "net/vmw_vsock/vmw_vsock_virtio_transport_common.ko",
    "net/vmw_vsock/vmw_vsock_virtio_transport.ko",
    "lib/crc64.ko",
    "lib/crc64-rocksoft.ko",
    "crypto/crct10dif_common.ko",
    "lib/crc-t10dif.ko",
    "block/t10-pi.ko",
    "drivers/scsi/scsi_common.ko",
    "drivers/scsi/scsi_mod.ko",
    "drivers/scsi/sd_mod.ko",
    "drivers/cdrom/cdrom.ko",
    "drivers/scsi/sr_mod.ko",
    "drivers/ata/libata.ko",
    "drivers/ata/libahci.ko",
    "drivers/ata/ahci.ko",
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
    let engine = match lab.engine {
        Engine::Bochs => Engine::Qemu,
        other => other,
    };
    let mut config = Config::new(engine, 256);
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
    let mut files = modules;
    let sock = sock(&lab.dirs)?;
    files.push(("sock".to_owned(), sock.clone()));
    let initrd = host::guest_initrd_with(&lab.dirs, name, &files)?;
    config.file("sock", &sock);
    let hold = c_program(&lab.dirs, "hold", include_str!("../../host/hold.c"))?;
    config.file("hold", &hold);
    config.file("guest/linux", &image);
    config.file("guest/initrd", &initrd);
    Ok(Group {
        name: name.to_owned(),
        config,
        cases: vec![Case::new(name, share)],
    })
}

/// A module's file name.
///
/// # Errors
/// It has none.
pub fn base(module: &str) -> Result<String> {
    let name = Path::new(module).file_name().context("no file name")?;
    Ok(name.to_string_lossy().into_owned())
}

/// Debian's usual kernel of the same version as the host's: bzImage, modules.
///
/// # Errors
/// It is not there and cannot be fetched.
pub fn kernel(dirs: &Dirs, host: &str) -> Result<(PathBuf, PathBuf)> {
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

/// Host's or guest's end of a stream socket.
fn sock(dirs: &Dirs) -> Result<PathBuf> {
    c_program(dirs, "sock", include_str!("../../host/sock.c"))
}

/// A static program for the host or a guest, of one file of C.
///
/// # Errors
/// gcc refuses it, or the disk is full.
pub fn c_program(dirs: &Dirs, name: &str, text: &str) -> Result<PathBuf> {
    let dir = dirs.fresh(name)?;
    let source = dir.join("program.c");
    std::fs::write(&source, text)?;
    let program = dir.join(name);
    command::output(
        Command::new("gcc")
            .args(["-O1", "-static", "-o"])
            .arg(&program)
            .arg(&source),
    )?;
    Ok(program)
}

/// The first word of `md5sum`'s output in `text`.
fn sum(text: &str) -> Result<&str> {
    let mut lines = text.lines();
    lines
        .find_map(|l| l.trim().strip_suffix("  -"))
        .with_context(|| format!("no checksum in:\n{text}"))
}

/// A number from JSON.
fn number(json: &str, name: &str) -> Result<u64> {
    let (_, rest) = json
        .split_once(&format!("\"{name}\":"))
        .with_context(|| format!("no {name} in {json}"))?;
    let digits = rest.find(|c: char| !c.is_ascii_digit());
    Ok(rest[..digits.unwrap_or(rest.len())].parse()?)
}

fn share(_: &Lab, host: &mut Host) -> Result<()> {
    host.must(
        "mkdir -p /tmp/share/sub /tmp/fixed && echo 'the host was here' >/tmp/share/file && \
         echo secret >/tmp/secret && echo fixed >/tmp/fixed/file && \
         ln -s ../secret /tmp/share/out && ln -s /etc /tmp/share/etc && \
         chmod +x /sock && dd if=/dev/urandom of=/tmp/disk bs=1M count=4 && \
         dd if=/dev/urandom of=/tmp/cd bs=1M count=1",
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
    types(host, "chmod +x /sock")?;
    let done = folder(host)
        .and_then(|()| streams::port(host))
        .and_then(|()| streams::vsock(host))
        .and_then(|()| drives::ahci(host))
        .and_then(|()| drives::interrupts(host))
        .and_then(|()| memory::balloon(host));
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
        "cd /mnt/a && dd if=/dev/urandom of=/tmp/data bs=64k count=32 && \
         cp /tmp/data sub/data && mkdir new && mv sub/data new/moved && ln new/moved hard && \
         ln -s new/moved soft && chmod 640 hard && echo more >>new/moved && \
         [ $(ls new sub | wc -l) = 4 ] && rmdir sub && md5sum <soft",
    )?;
    let sum = self::sum(&sum)?.to_owned();
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
