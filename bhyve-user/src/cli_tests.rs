use super::*;

fn run(line: &str) -> Result<Config, String> {
    match parse(line.split_whitespace().map(String::from)) {
        Ok(Command::Run(c)) => Ok(*c),
        Ok(Command::Print(text) | Command::Help(text)) => Err(text),
        Err(e) => Err(e.0),
    }
}

#[test]
fn the_manual_pages_example() {
    let c = run("-c 2 -s 0,hostbridge -s 1,lpc -l com1,stdio -A -H -P -m 1G vm1").unwrap();
    assert_eq!(c.name, "vm1");
    assert_eq!(
        c.topology,
        Topology {
            sockets: 2,
            cores: 1,
            threads: 1
        }
    );
    assert_eq!(c.memory, 1 << 30);
    assert_eq!(c.serial, [Some(Spec::Stdio), None]);
    assert!(c.acpi && c.halt_exits && c.pause_exits && c.mptable && c.strict_msr);
    assert_eq!(
        c.slots[1].at,
        Bdf {
            bus: 0,
            slot: 1,
            func: 0
        }
    );
}

#[test]
fn flags_can_be_bundled_and_arguments_attached() {
    let c = run(
        "-AHPwxYeSuWC -c4 -m512M -s31:7,lpc -p0:1 -U 01020304-0506-0708-090a-0b0c0d0e0f10 -- vm",
    )
    .unwrap();
    assert!(
        c.acpi
            && c.x2apic
            && !c.mptable
            && c.strict_io
            && c.wired
            && c.utc
            && !c.strict_msr
            && c.virtio_msi
    );
    assert_eq!(c.pins, [(0, 1)]);
    assert_eq!(c.uuid.unwrap()[15], 0x10);
    assert_eq!(c.slots[0].at.func, 7);
}

#[test]
fn topologies_as_in_bhyve_8() {
    let t = |s: &str| {
        run(&format!("-c {s} vm"))
            .map(|c| (c.topology.sockets, c.topology.cores, c.topology.threads))
    };
    assert_eq!(t("8,sockets=2,cores=2,threads=2"), Ok((2, 2, 2)));
    assert_eq!(t("cpus=4,cores=4"), Ok((1, 4, 1)));
    assert_eq!(t("cores=3"), Ok((1, 3, 1)));
    assert_eq!(t("200"), Ok((200, 1, 1)));
    assert!(t("4,cores=3").unwrap_err().contains("is 3"));
    for bad in ["0", "x", "70000", "sockets=300,cores=300", "dies=2", "2x"] {
        assert!(
            t(bad).unwrap_err().starts_with(&format!("-c {bad}")),
            "{bad}"
        );
    }
}

#[test]
fn memory_sizes() {
    let m = |s: &str| run(&format!("-m {s} vm")).map(|c| c.memory);
    assert_eq!(m("256"), Ok(256 << 20));
    assert_eq!(m("2g"), Ok(2 << 30));
    assert_eq!(m("1048576K"), Ok(1 << 30));
    assert_eq!(m("268435456"), Ok(256 << 20));
    for bad in ["", "0", "-1", "12Q", "99999999T", "1K"] {
        assert!(m(bad).is_err(), "{bad}");
    }
}

#[test]
fn refusals_name_the_option_and_what_would_do() {
    for (line, words) in [
        (
            "-s 2,e1000,tap0 vm",
            "can have hostbridge, amd_hostbridge, lpc",
        ),
        ("-s 32,lpc vm", "slots go to 31"),
        ("-s 0,lpc -s 0,hostbridge vm", "already occupied"),
        ("-s lpc vm", "-s lpc"),
        ("-l bootrom vm", "which firmware"),
        ("-l bootrom,/x,/vars,/y vm", "\"/y\"?"),
        ("-l bootrom,/x,fwcfg=none vm", "fwcfg=bhyve|qemu"),
        ("-l com3,stdio vm", "com1, com2"),
        ("-l com1,floppy vm", "file:PATH"),
        ("-l com1,stdio -l com2,stdio vm", "already the other port's"),
        ("-G 1234 vm", "no debug server"),
        ("-g w1234 vm", "not [ADDRESS:]PORT"),
        ("-p 1:0 vm", "only CPUs 0 to 0"),
        ("-U 123 vm", "32 hexadecimal"),
        ("-Z vm", "-Z"),
        ("--frob vm", "--frob"),
        ("--snadbox=on vm", "did you mean --sandbox?"),
        ("-m", "-m needs an argument"),
        ("", "name comes last"),
        ("vm -A", "options come first"),
        ("../x", "cannot be"),
    ] {
        let e = run(line).unwrap_err();
        assert!(e.contains(words), "{line}: {e}");
    }
}

fn config_file(text: &str) -> tempfile::NamedTempFile {
    use std::io::Write;
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

#[test]
fn a_file_says_what_a_command_line_says_and_the_command_line_goes_before_it() {
    let file = config_file(
        "name = \"web\"\ncpu.count = 2\nmemory.size = \"1G\"\nmachine.acpi = true\n\
         serial.com1 = \"stdio\"\n[[device]]\nslot = 3\nemulation = \"virtio-rnd\"\n\
         [boot]\nkernel = \"/k\"\n",
    );
    let path = file.path().display();
    let c = run(&format!("--config {path}")).unwrap();
    let mut same = run("-c 2 -m 1G -A -l com1,stdio -s 3,virtio-rnd web").unwrap();
    same.load.clone_from(&c.load);
    assert_eq!(c, same);
    assert_eq!(c.load.len(), 1);
    let c = run(&format!(
        "-m 2G --config={path} -s 3,lpc -l com2,stdio -o machine.acpi=off other"
    ))
    .unwrap();
    assert_eq!(
        (c.memory, c.name.as_str(), c.acpi),
        (2 << 30, "other", false)
    );
    assert_eq!(c.slots.len(), 1);
    assert_eq!(c.slots[0].emulation, "lpc");
    assert_eq!(c.serial, [None, Some(Spec::Stdio)]);
}

#[test]
fn mistakes_in_a_file_have_a_place() {
    let file = config_file("name = \"web\"\n[memory]\nsize = \"12Q\"\n");
    let path = file.path().display().to_string();
    let e = run(&format!("--config {path}")).unwrap_err();
    assert!(
        e.starts_with(&format!("{path}:3:8: memory.size: 12Q: a size is")),
        "{e}"
    );
    let e = run("--config /nonexistent.toml").unwrap_err();
    assert!(e.starts_with("/nonexistent.toml: No such file"), "{e}");
}

#[test]
fn variables_are_those_of_newer_bhyves() {
    let file = config_file("memory.size=512M\npci.0.31.0.device=lpc\nlpc.com1.path=stdio\n");
    let c = run(&format!(
        "-k {} -o acpi_tables=true -o cpus=2 vm",
        file.path().display()
    ))
    .unwrap();
    assert_eq!(
        c,
        run("-m 512M -s 31,lpc -l com1,stdio -A -c 2 vm").unwrap()
    );
    assert!(
        run("-o x86.mptable=perhaps vm")
            .unwrap_err()
            .starts_with("-o: x86.mptable")
    );
}

#[test]
fn every_option_has_a_key() {
    // What is without effect, or about the command line itself.
    let without = [
        "-h",
        "-I",
        "-K",
        "-k",
        "-o",
        "--config",
        "--help",
        "--print-config",
    ];
    let mut options: Vec<String> = USAGE
        .lines()
        .filter_map(|l| {
            l.strip_prefix("       -")?
                .split_once(':')
                .map(|(o, _)| format!("-{o}"))
        })
        .collect();
    assert!(options.len() > 25, "{options:?}");
    options.retain(|o| !without.contains(&o.as_str()));
    for option in options {
        let known = bhyve_config::keys::KEYS.iter().any(|k| match k.bhyve {
            Opt::Value(o) | Opt::Prefixed(o, _) | Opt::Pairs(o) => o == option,
            Opt::Flag(yes, no) => option == yes || option == no,
            Opt::None | Opt::Operand => false,
        });
        assert!(known || option == "-s", "{option} has no key");
    }
}

mod round_trip {
    use super::*;
    use proptest::prelude::*;

    fn option() -> impl Strategy<Value = String> {
        let flag = prop::sample::select("aACDeHPSuvwWxY".chars().collect::<Vec<_>>());
        prop_oneof![
            flag.prop_map(|f| format!("-{f}")),
            (1u16..4, 1u16..4, 1u16..4)
                .prop_map(|(s, c, t)| format!("-c sockets={s},cores={c},threads={t}")),
            (1u16..9).prop_map(|n| format!("-c {n}")),
            (256u64..1 << 20).prop_map(|k| format!("-m {}K", k * 4)),
            (0u32..1, 0usize..64).prop_map(|(v, h)| format!("-p {v}:{h}")),
            "[a-z/]{1,8}".prop_map(|p| format!("-l com1,file:{p}")),
            prop::sample::select(vec!["stdio", "pty", "/dev/x", "unix:/s", "tcp=1.2.3.4:5"])
                .prop_map(|s| format!("-l com2,{s}")),
            Just("-l pc-testdev".to_owned()),
            Just("-l bootrom,/fw.fd,/vars.fd,fwcfg=qemu".to_owned()),
            Just("--boot".to_owned()),
            Just("--sandbox=log".to_owned()),
            "[a-z/]{1,8}".prop_map(|p| format!("--exit-stats {p}")),
            (1_000u32..).prop_map(|khz| format!("--tsc-khz {khz}")),
            "[0-9a-f]{32}".prop_map(|u| format!("-U {u}")),
            Just("-o boot.kernel=/k -o boot.environment.a.b=c".to_owned()),
        ]
    }

    proptest! {
        #[test]
        fn print_config_says_the_same(
            options in prop::collection::vec(option(), 0..12),
            slots in prop::collection::btree_map((0u8..32, 0u8..8), "[a-z/=,]{0,12}", 0..5),
        ) {
            let mut line = options.join(" ");
            for ((slot, func), conf) in slots {
                let comma = if conf.is_empty() { "" } else { "," };
                line += &format!(" -s {slot}:{func},virtio-blk{comma}{conf}");
            }
            let config = run(&format!("{line} vm")).map_err(TestCaseError::fail)?;
            let text = run(&format!("{line} --print-config vm")).unwrap_err();
            let file = config_file(&text);
            let again = run(&format!("--config {}", file.path().display()));
            let plain = |c: Config| {
                let load: Vec<_> = c.load.iter().map(|s| (s.key.path, s.value.clone())).collect();
                (Config { load: Vec::new(), ..c }, load)
            };
            prop_assert_eq!(again.map(plain), Ok(plain(config)), "{}", text);
        }
    }
}

#[test]
fn firmware_comes_with_its_variables() {
    let c = run("-l bootrom,/fw.fd,/vars.fd,fwcfg=qemu vm").unwrap();
    let firmware = c.bootrom.unwrap();
    assert_eq!(firmware.rom, std::path::Path::new("/fw.fd"));
    assert_eq!(firmware.variables, Some("/vars.fd".into()));
    assert!(firmware.qemu);
    assert_eq!(firmware.to_string(), "/fw.fd,/vars.fd,fwcfg=qemu");
    let c = run("-l bootrom,/fw.fd vm").unwrap();
    assert_eq!(c.bootrom.unwrap().variables, None);
}

#[test]
fn help_is_not_an_error() {
    // libvirt compares whole lines.
    let list = run("-s help").unwrap_err();
    assert!(list.lines().any(|l| l == "virtio-blk"), "{list}");
    assert_eq!(
        run("-l help"),
        Err("com1\ncom2\npc-testdev\nbootrom\n".into())
    );
    assert!(run("-h").unwrap_err().starts_with("Usage: bhyve"));
}
