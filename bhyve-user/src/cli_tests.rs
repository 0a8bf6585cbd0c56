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
            "-s 2,ahci-hd,disk vm",
            "can have hostbridge, amd_hostbridge, lpc",
        ),
        ("-s 32,lpc vm", "slots go to 31"),
        ("-s 0,lpc -s 0,hostbridge vm", "already occupied"),
        ("-s lpc vm", "-s lpc"),
        ("-l bootrom,/x vm", "bhyveload"),
        ("-l com3,stdio vm", "com1, com2"),
        ("-l com1,floppy vm", "file:PATH"),
        ("-l com1,stdio -l com2,stdio vm", "already the other port's"),
        ("-g 1234 vm", "no debug server"),
        ("-p 1:0 vm", "only CPUs 0 to 0"),
        ("-U 123 vm", "32 hexadecimal"),
        ("-Z vm", "-Z"),
        ("--frob vm", "--frob"),
        ("-m", "-m needs an argument"),
        ("", "name comes last"),
        ("vm -A", "options come first"),
        ("../x", "cannot be"),
    ] {
        let e = run(line).unwrap_err();
        assert!(e.contains(words), "{line}: {e}");
    }
}

#[test]
fn help_is_not_an_error() {
    // libvirt compares whole lines.
    let list = run("-s help").unwrap_err();
    assert!(list.lines().any(|l| l == "virtio-blk"), "{list}");
    assert_eq!(run("-l help"), Err("com1\ncom2\npc-testdev\n".into()));
    assert!(run("-h").unwrap_err().starts_with("Usage: bhyve"));
}
