//! What `loader.conf` and its like have loaded.

use crate::script::{Script, boot, elf, folder, hints, kld, load, text};
use bhyveload::freebsd::FreeBsd;
use std::io::Write;
use std::os::unix::fs::symlink;

fn names(boot: &FreeBsd) -> Vec<&str> {
    boot.modules.iter().map(|m| m.name.as_str()).collect()
}

#[test]
fn the_files_are_read_in_freebsds_order_and_the_command_line_is_last() {
    let top = folder(&[
        ("boot/kernel/kernel", &elf(2, 1)),
        ("boot/defaults/loader.conf", b"a=\"defaults\"\nb=\"defaults\"\nloader_conf_files=\"/boot/device.hints /boot/loader.conf /boot/loader.conf.local\"\n"),
        ("boot/device.hints", b"hint.uart.0.at=\"isa\"\nb=\"hints\"\n"),
        ("boot/loader.conf", b"c=\"$b and ${a}\"\nd=\"conf\"\nloader_conf_files=\"$loader_conf_files /boot/more\"\n"),
        ("boot/more", b"d=\"more\"\ne=\"more\"\n"),
        ("boot/loader.conf.local", b"e=\"local\"\n"),
        ("boot/loader.conf.d/20.conf", b"f=\"20\"\n"),
        ("boot/loader.conf.d/10.conf", b"f=\"10\"\ng=\"10\"\n"),
        ("boot/loader.conf.d/README", b"g=\"readme\"\n"),
        ("boot/nextboot.conf", b"nextboot_enable=\"YES\"\ng=\"next\"\nh=\"next\"\n"),
        ("etc/fstab", b"/dev/vtbd0p2 / ufs rw,noatime 1 1\n"),
    ]);
    let (guest, said) = boot(&["-h", text(top.path()), "-e", "h=line"]);
    let values: Vec<_> = "abcdefgh"
        .chars()
        .map(|c| guest.environment.get(&c.to_string()).unwrap_or("-"))
        .collect();
    assert_eq!(
        values,
        [
            "defaults",
            "hints",
            "hints and defaults",
            "more",
            "more",
            "20",
            "next",
            "line"
        ],
        "{said}"
    );
    let get = |name| guest.environment.get(name);
    assert_eq!(get("vfs.root.mountfrom"), Some("ufs:/dev/vtbd0p2"));
    assert_eq!(get("vfs.root.mountfrom.options"), Some("rw,noatime"));
    assert_eq!(get("hint.uart.0.at"), Some("isa"));
    assert_eq!(get("currdev"), None);
    assert!(said.contains("nextboot.conf is in force"), "{said}");
}

#[test]
fn a_nextboot_that_is_switched_off_and_lines_that_make_no_sense_change_nothing() {
    let top = folder(&[
        ("boot/kernel/kernel", &elf(2, 1)),
        (
            "boot/nextboot.conf",
            b"nextboot_enable=\"NO\"\nkernel=\"other\"\n",
        ),
        ("boot/loader.conf", b"rubbish\x1b[2J\na=\"1\"\nb=\"open\n"),
    ]);
    let (guest, said) = boot(&["-h", text(top.path())]);
    assert_eq!(guest.kernel_name, "/boot/kernel/kernel");
    assert_eq!(guest.environment.get("a"), Some("1"));
    assert!(said.contains("loader.conf: line 1"), "{said}");
    assert!(said.contains("loader.conf: line 3"), "{said}");
    assert!(!said.contains('\x1b'));
}

#[test]
fn the_kernel_is_looked_for_where_its_variables_say() {
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(&elf(2, 3)).unwrap();
    let gz = gz.finish().unwrap();
    let top = folder(&[
        ("boot/kernel/kernel", &elf(2, 1)),
        ("boot/kernel.old/kernel", &elf(2, 2)),
        ("boot/zipped/kernel.gz", &gz),
        ("special", &elf(2, 4)),
        ("boot/kernel.old/m.ko", &elf(1, 5)),
    ]);
    let h = text(top.path());
    for (kernel, name, mark) in [
        ("kernel", "/boot/kernel/kernel", 1),
        ("kernel.old", "/boot/kernel.old/kernel", 2),
        ("/boot/kernel.old", "/boot/kernel.old/kernel", 2),
        ("zipped", "/boot/zipped/kernel", 3),
        ("/special", "/special", 4),
    ] {
        let (guest, _) = boot(&["-h", h, "-e", &format!("kernel={kernel}")]);
        assert_eq!(guest.kernel_name, name);
        assert_eq!(guest.kernel.data.last(), Some(&mark), "{kernel}");
    }
    // A kernel's modules are found beside it.
    let (guest, _) = boot(&["-h", h, "-e", "kernel=kernel.old", "-e", "m_load=YES"]);
    assert_eq!(names(&guest), ["/boot/kernel.old/m.ko"]);
    let path = guest.environment.get("module_path").unwrap();
    assert_eq!(path, "/boot/kernel.old;/boot/modules");
}

#[test]
fn modules_come_with_what_they_depend_on_by_linker_hints() {
    let kernel_versions = [1_201_000, 1_201_000, 1_299_999];
    let top = folder(&[
        (
            "boot/kernel/kernel",
            &kernel(&[("kernel", 1_201_000), ("virtio", 1)]),
        ),
        (
            "boot/kernel/if_a.ko",
            &kld(
                &[("if_a", 1)],
                &[
                    ("b", [1, 2, 2]),
                    ("virtio", [1, 1, 1]),
                    ("kernel", kernel_versions),
                ],
            ),
        ),
        (
            "boot/kernel/other.ko",
            &kld(&[("b", 2)], &[("c", [1, 1, 1])]),
        ),
        ("boot/modules/c.ko", &kld(&[("c", 1)], &[("b", [1, 2, 2])])),
        (
            "boot/kernel/new.ko",
            &kld(
                &[("new", 1)],
                &[("kernel", [1_300_000, 1_300_000, 1_399_999])],
            ),
        ),
        (
            "boot/kernel/lost.ko",
            &kld(&[("lost", 1)], &[("c", [1, 1, 1]), ("nowhere", [1, 1, 1])]),
        ),
        (
            "boot/kernel/linker.hints",
            &hints(&[
                ("if_a", 1, "if_a.ko"),
                ("b", 1, "old.ko"),
                ("b", 2, "other.ko"),
            ]),
        ),
        (
            "boot/loader.conf",
            b"if_a_load=YES\nif_a_flags=\"-x 1\"\nnew_load=YES\nlost_load=YES\n",
        ),
    ]);
    let h = text(top.path());
    let (guest, said) = boot(&[
        "-h",
        h,
        "-e",
        "if_a_load=YES",
        "-e",
        "new_load=NO",
        "-e",
        "lost_load=NO",
    ]);
    assert_eq!(
        names(&guest),
        [
            "/boot/kernel/if_a.ko",
            "/boot/kernel/other.ko",
            "/boot/modules/c.ko"
        ],
        "{said}"
    );
    assert_eq!(guest.modules[0].args.as_deref(), Some("-x 1"));
    // What cannot be loaded is left out, with what came with it, and said.
    let (guest, said) = boot(&["-h", h, "-e", "if_a_load=NO"]);
    assert_eq!(names(&guest), Vec::<&str>::new(), "{said}");
    assert!(said.contains("needs kernel of version 1300000"), "{said}");
    assert!(said.contains("nowhere"), "{said}");
}

/// A kernel that says which modules are in it: an executable with a set of
/// pointers in its one segment.
fn kernel(provides: &[(&str, u32)]) -> Vec<u8> {
    const BASE: u64 = 0xffff_ffff_8020_0000;
    let mut body = vec![0u8; 8 * provides.len()];
    for (i, (name, version)) in provides.iter().enumerate() {
        let at = |body: &Vec<u8>| BASE + body.len() as u64;
        let text = at(&body);
        body.extend_from_slice(name.as_bytes());
        body.resize((body.len() + 1).next_multiple_of(8), 0);
        let value = at(&body);
        body.extend_from_slice(&u64::from(*version).to_le_bytes());
        let record = at(&body);
        body.extend_from_slice(&1u32.to_le_bytes());
        body.extend_from_slice(&3u32.to_le_bytes());
        body.extend_from_slice(&value.to_le_bytes());
        body.extend_from_slice(&text.to_le_bytes());
        body[8 * i..8 * i + 8].copy_from_slice(&record.to_le_bytes());
    }
    let names = b"\0set_modmetadata_set\0";
    let mut file = elf(2, 0);
    file.truncate(64);
    let put = |file: &mut Vec<u8>, at: usize, bytes: &[u8]| {
        file[at..at + bytes.len()].copy_from_slice(bytes);
    };
    // Program header, segment, names, section headers.
    let (start, size) = (64 + 56, body.len());
    file.extend_from_slice(&1u32.to_le_bytes());
    file.extend_from_slice(&7u32.to_le_bytes());
    for v in [start as u64, BASE, BASE, size as u64, size as u64, 16] {
        file.extend_from_slice(&v.to_le_bytes());
    }
    file.extend_from_slice(&body);
    let at = file.len();
    file.extend_from_slice(names);
    file.resize(file.len().next_multiple_of(8), 0);
    let table = file.len();
    file.extend_from_slice(&[0; 64]);
    for (name, kind, addr, offset, size) in [
        (1u32, 1u32, BASE, start, 8 * provides.len()),
        (0, 3, 0, at, names.len()),
    ] {
        for v in [name, kind] {
            file.extend_from_slice(&v.to_le_bytes());
        }
        for v in [2, addr, offset as u64, size as u64, 0, 8, 0] {
            file.extend_from_slice(&v.to_le_bytes());
        }
    }
    put(&mut file, 24, &(BASE + 8).to_le_bytes());
    put(&mut file, 32, &64u64.to_le_bytes());
    put(&mut file, 40, &(table as u64).to_le_bytes());
    put(&mut file, 56, &1u16.to_le_bytes());
    put(&mut file, 60, &3u16.to_le_bytes());
    put(&mut file, 62, &2u16.to_le_bytes());
    file
}

#[test]
fn a_circle_or_a_long_chain_of_dependencies_ends() {
    let chain: Vec<(String, Vec<u8>)> = (0..100)
        .map(|i| {
            let next = format!("m{}", i + 1);
            let name = format!("m{i}");
            let module = kld(&[(&name, 1)], &[(&next, [1, 1, 1])]);
            (format!("boot/kernel/m{i}.ko"), module)
        })
        .collect();
    let kernel = kernel(&[("kernel", 1)]);
    let x = kld(&[("x", 1)], &[("y", [1, 1, 1])]);
    let y = kld(&[("y", 1)], &[("x", [1, 1, 1])]);
    let mut files: Vec<(&str, &[u8])> = vec![
        ("boot/kernel/kernel", &kernel),
        ("boot/kernel/x.ko", &x),
        ("boot/kernel/y.ko", &y),
    ];
    files.extend(chain.iter().map(|(n, d)| (n.as_str(), d.as_slice())));
    let top = folder(&files);
    let (guest, said) = boot(&[
        "-h",
        text(top.path()),
        "-e",
        "x_load=YES",
        "-e",
        "m0_load=YES",
    ]);
    assert_eq!(names(&guest), ["/boot/kernel/x.ko", "/boot/kernel/y.ko"]);
    assert!(said.contains("too deep"), "{said}");
}

#[test]
fn a_root_disk_is_loaded_as_it_is_or_nothing_is_booted() {
    let top = folder(&[
        ("boot/kernel/kernel", &elf(2, 1)),
        ("boot/mfs", b"DISK"),
        ("boot/loader.conf", b"mfsroot_load=YES\nmfsroot_type=\"md_image\"\nmfsroot_name=\"/boot/mfs\"\nentropy_load=YES\nentropy_type=\"boot_entropy_cache\"\nentropy_name=\"/boot/entropy\"\n"),
    ]);
    let h = text(top.path());
    let (guest, said) = boot(&["-h", h]);
    assert_eq!(guest.modules.len(), 1);
    assert_eq!(guest.modules[0].kind.as_deref(), Some("md_image"));
    assert_eq!(guest.modules[0].input.data, b"DISK");
    assert!(!said.contains("entropy"), "{said}");
    let mut script = Script::new("");
    let error = load(&["-h", h, "-e", "mfsroot_name=/boot/none"], &mut script).unwrap_err();
    assert!(error.to_string().contains("prompt"), "{error}");
    assert!(script.said.contains("/boot/none"), "{}", script.said);
}

/// CVE-2024-25940's kind: nothing that the guest's files name leads out of its folder.
#[test]
fn no_file_of_the_folder_leads_out_of_it() {
    let top = folder(&[
        ("secret", b"SECRET"),
        ("secret.ko", &elf(1, 9)),
        ("guest/boot/kernel/kernel", &elf(2, 1)),
        (
            "guest/boot/kernel/linker.hints",
            &hints(&[("evil", 1, "../../../secret.ko")]),
        ),
    ]);
    let guest = top.path().join("guest");
    let outside = top.path().join("secret");
    symlink(&outside, guest.join("boot/absolute")).unwrap();
    symlink("../../secret", guest.join("boot/climbs")).unwrap();
    symlink("../../", guest.join("boot/modules")).unwrap();
    for name in [
        "/../secret",
        "/boot/../../secret",
        "../secret",
        "/boot/absolute",
        "/boot/climbs",
        text(&outside),
    ] {
        let conf = format!(
            "m_load=YES\nm_type=\"etc\"\nm_name=\"{name}\"\nexec=\"include {name}\"\nexec=\"more {name}\"\nloader_conf_files=\"{name}\"\nnextboot_conf=\"{name}\"\n"
        );
        std::fs::write(guest.join("boot/loader.conf"), conf).unwrap();
        let (boot, said) = boot(&[
            "-h",
            text(&guest),
            "-e",
            "evil_load=YES",
            "-e",
            "secret_load=YES",
        ]);
        assert_eq!(boot.modules, [], "{name}");
        assert!(!said.contains("SECRET"), "{said}");
    }
    // The kernel itself.
    let mut script =
        Script::new("ls /..\nls /boot/modules\nmore /boot/climbs\nload /boot/climbs\n");
    load(
        &["-h", text(&guest), "-e", "kernel=/boot/climbs"],
        &mut script,
    )
    .unwrap_err();
    assert!(
        !script.said.contains("SECRET") && !script.said.contains("secret\n"),
        "{}",
        script.said
    );
    assert!(script.said.contains("leads out"), "{}", script.said);
}

#[test]
fn configuration_that_goes_round_in_circles_ends() {
    let many = (0..300)
        .map(|i| format!("loader_conf_files=\"/boot/f{i} $loader_conf_files\"\n"))
        .collect::<String>();
    let include = "include /boot/again\n".repeat(50);
    let top = folder(&[
        ("boot/kernel/kernel", &elf(2, 1)),
        ("boot/loader.conf", b"exec=\"include /boot/again\"\nloader_conf_files=\"/boot/loader.conf /boot/many\"\nx=\"$x$x$x\"\nexec=\"boot\"\nexec=\"quit\"\n"),
        ("boot/many", many.as_bytes()),
        ("boot/again", include.as_bytes()),
    ]);
    let (guest, said) = boot(&["-h", text(top.path())]);
    assert_eq!(guest.kernel_name, "/boot/kernel/kernel");
    assert!(said.contains("include"), "{said}");
}

#[test]
fn all_that_is_loaded_fits_into_the_guests_memory_or_is_not_read() {
    let top = folder(&[
        ("boot/kernel/kernel", &elf(2, 1)),
        (
            "boot/loader.conf",
            b"a_load=YES\na_type=t\na_name=/big\nb_load=YES\nb_type=t\nb_name=/big2\n",
        ),
    ]);
    for name in ["big", "big2"] {
        let file = std::fs::File::create(top.path().join(name)).unwrap();
        file.set_len(40 << 20).unwrap();
    }
    let (guest, said) = boot(&["-h", text(top.path())]);
    assert_eq!(names(&guest), ["/big"]);
    assert!(said.contains("give the VM more memory"), "{said}");
}

#[test]
fn flags_of_boot_become_variables_and_arguments() {
    let top = folder(&[
        ("boot/kernel/kernel", &elf(2, 1)),
        ("boot/loader.conf", b"kernel_options=\"-v\"\n"),
    ]);
    let (guest, _) = boot(&["-h", text(top.path())]);
    assert_eq!(guest.kernel_args.as_deref(), Some("-v"));
    assert_eq!(guest.environment.howto() & 0x800, 0x800);
}

#[test]
fn a_console_that_a_vm_has_not_is_refused_and_the_serial_one_stays() {
    let top = folder(&[
        ("boot/kernel/kernel", &elf(2, 1)),
        ("boot/loader.conf", b"console=\"vidconsole\"\n"),
    ]);
    let console = |guest: &FreeBsd| guest.environment.get("console").map(str::to_owned);
    let (guest, said) = boot(&["-h", text(top.path())]);
    assert_eq!(console(&guest), None);
    assert!(said.contains("vidconsole"), "{said}");
    let conf = b"console=\"comconsole,vidconsole\"\n";
    std::fs::write(top.path().join("boot/loader.conf"), conf).unwrap();
    let (guest, _) = boot(&["-h", text(top.path())]);
    assert_eq!(console(&guest).as_deref(), Some("comconsole,vidconsole"));
    assert_eq!(guest.environment.howto(), 0x2000_1000);
}
