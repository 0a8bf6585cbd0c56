//! Every key there is, with what it means: the readers, the command lines, the
//! printer and the manual page bhyve.toml(5) all go by this one table.

/// What a key's value looks like in TOML.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A string.
    Text,
    /// A string, or an integer.
    Number,
    /// `true` or `false`.
    Bool,
    /// A string, or an array of strings.
    List,
    /// A table of strings.
    Table,
}

/// How a program is told on its command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opt {
    /// Not at all: the program has no use for it.
    None,
    /// Its only operand.
    Operand,
    /// The option, then the value; a list's option is repeated.
    Value(&'static str),
    /// The option, then this and the value: `-l`, `com1,` and `stdio`.
    Prefixed(&'static str, &'static str),
    /// This option for `true`, that for `false`; empty where there is none.
    Flag(&'static str, &'static str),
    /// `NAME=VALUE` behind the option, for each entry.
    Pairs(&'static str),
}

/// A key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// Its path in TOML, such as `memory.size`.
    pub path: &'static str,
    /// What its value looks like.
    pub kind: Kind,
    /// bhyve's option.
    pub bhyve: Opt,
    /// bhyveload's option.
    pub bhyveload: Opt,
    /// Its name in bhyve_config(5); empty where there is none. One with `!` before
    /// it means the opposite.
    pub variable: &'static str,
    /// What it is without being given, for readers.
    pub default: &'static str,
    /// What it does: sentences.
    pub doc: &'static str,
}

use Kind::{Bool, List, Number, Table, Text};
use Opt::{Flag, None as No, Operand, Pairs, Prefixed, Value};

const fn key(
    path: &'static str,
    kind: Kind,
    (bhyve, bhyveload, variable): (Opt, Opt, &'static str),
    default: &'static str,
    doc: &'static str,
) -> Key {
    Key {
        path,
        kind,
        bhyve,
        bhyveload,
        variable,
        default,
        doc,
    }
}

/// All keys but those of devices, in the order in which they are printed.
pub const KEYS: &[Key] = &[
    key(
        "name",
        Text,
        (Operand, Operand, "name"),
        "",
        "Name of the VM: what /dev/vmm shows and what bhyvectl is given. A name on the command line goes before it.",
    ),
    key(
        "uuid",
        Text,
        (Value("-U"), No, "uuid"),
        "made from the host's and the VM's name",
        "UUID that the guest finds in its SMBIOS tables.",
    ),
    key(
        "cpu.count",
        Number,
        (Prefixed("-c", "cpus="), No, "cpus"),
        "1",
        "Virtual CPUs. With sockets, cores and threads it must be their product.",
    ),
    key(
        "cpu.sockets",
        Number,
        (Prefixed("-c", "sockets="), No, "sockets"),
        "1",
        "Sockets that the guest sees.",
    ),
    key(
        "cpu.cores",
        Number,
        (Prefixed("-c", "cores="), No, "cores"),
        "1",
        "Cores of a socket.",
    ),
    key(
        "cpu.threads",
        Number,
        (Prefixed("-c", "threads="), No, "threads"),
        "1",
        "Threads of a core.",
    ),
    key(
        "cpu.pin",
        List,
        (Value("-p"), No, ""),
        "",
        "Virtual CPUs that stay on one host CPU each, as \"vcpu:hostcpu\".",
    ),
    key(
        "memory.size",
        Number,
        (Value("-m"), Value("-m"), "memory.size"),
        "256M",
        "Guest memory: a number with K, M, G or T behind it; without one, MiB.",
    ),
    key(
        "memory.wired",
        Bool,
        (Flag("-S", ""), Flag("-S", ""), "memory.wired"),
        "false",
        "Guest memory is wired down, which PCI passthrough needs.",
    ),
    key(
        "memory.in_core",
        Bool,
        (Flag("-C", ""), Flag("-C", ""), "memory.guest_in_core"),
        "false",
        "Guest memory is part of core files.",
    ),
    key(
        "machine.acpi",
        Bool,
        (Flag("-A", ""), No, "acpi_tables"),
        "false",
        "The guest gets ACPI tables. Nearly every guest wants them.",
    ),
    key(
        "machine.mptable",
        Bool,
        (Flag("", "-Y"), No, "x86.mptable"),
        "true",
        "The guest gets an MP table.",
    ),
    key(
        "machine.x2apic",
        Bool,
        (Flag("-x", "-a"), No, "x86.x2apic"),
        "false",
        "Local APICs are in x2APIC mode when the guest starts.",
    ),
    key(
        "machine.pv",
        Bool,
        (Flag("", "--no-pv"), No, "x86.pv"),
        "true",
        "The guest is offered KVM's paravirtual interface (clock, end of interrupt, IPIs and wake-ups by hypercall), \
         which Linux uses by itself. FreeBSD's own vmm.ko has none.",
    ),
    key(
        "machine.tsc_khz",
        Number,
        (Value("--tsc-khz"), No, "x86.tsc_khz"),
        "",
        "Frequency of the guest's TSC, kHz, so that it is the same on all hosts; without it, the host's. The host's CPU has to \
         have TSC scaling (VT-x) or a TSC ratio (AMD-V). FreeBSD's own vmm.ko cannot set it.",
    ),
    key(
        "machine.strict_io",
        Bool,
        (Flag("-e", ""), No, "x86.strictio"),
        "false",
        "bhyve ends when the guest uses an I/O port that nobody emulates.",
    ),
    key(
        "machine.strict_msr",
        Bool,
        (Flag("", "-w"), No, "x86.strictmsr"),
        "true",
        "An MSR that nobody emulates gives the guest #GP. Otherwise reads are 0 and writes are dropped.",
    ),
    key(
        "machine.halt_exits",
        Bool,
        (Flag("-H", ""), No, "x86.vmexit_on_hlt"),
        "false",
        "The guest is left on HLT. An idle guest sleeps here in any case.",
    ),
    key(
        "machine.pause_exits",
        Bool,
        (Flag("-P", ""), No, "x86.vmexit_on_pause"),
        "false",
        "The guest is left on PAUSE.",
    ),
    key(
        "machine.rtc_utc",
        Bool,
        (Flag("-u", ""), No, "!rtc.use_localtime"),
        "false",
        "The real-time clock keeps UTC, not the host's local time.",
    ),
    key(
        "machine.virtio_msi",
        Bool,
        (Flag("-W", ""), No, "!virtio_msix"),
        "false",
        "virtio devices offer MSI in place of MSI-X.",
    ),
    key(
        "machine.testdev",
        Bool,
        (Prefixed("-l", "pc-testdev"), No, "lpc.pc-testdev"),
        "false",
        "The guest has the test device of kvm-unit-tests.",
    ),
    key(
        "machine.bootrom",
        Text,
        (Prefixed("-l", "bootrom,"), No, "lpc.bootrom"),
        "",
        "Firmware image, a ROM that ends at 4 GiB and is started in place of what bhyveload loads.",
    ),
    key(
        "serial.com1",
        Text,
        (Prefixed("-l", "com1,"), No, "lpc.com1.path"),
        "",
        "What COM1 is connected to: \"stdio\", \"pty\", a terminal's /dev/ name, \"file:PATH\", \"unix:PATH\" or \
         \"tcp=ADDRESS:PORT\".",
    ),
    key(
        "serial.com2",
        Text,
        (Prefixed("-l", "com2,"), No, "lpc.com2.path"),
        "",
        "What COM2 is connected to, likewise.",
    ),
    key(
        "serial.bvmcons",
        Bool,
        (Flag("-b", ""), No, "bvmcons"),
        "false",
        "The guest has bhyve's first console, at port 0x220, on standard input and output: for kernels of its time, which \
         have \"device bvmconsole\".",
    ),
    key(
        "serial.bvmdebug",
        Number,
        (Value("-g"), No, "bvmdebug.port"),
        "",
        "The guest has bhyve's debug port, 0x224, and this is the TCP port, or ADDRESS:PORT, at which a debugger reaches the \
         stub of a kernel that has \"options GDB\" and \"device bvmdebug\". Without an address only this machine reaches it.",
    ),
    key(
        "run.verbose",
        Bool,
        (Flag("-v", ""), No, ""),
        "false",
        "bhyve says at its end what the guest was left for.",
    ),
    key(
        "run.exit_stats",
        Text,
        (Value("--exit-stats"), No, ""),
        "",
        "File that bhyve writes those counts to at its end, as JSON.",
    ),
    key(
        "run.destroy_on_poweroff",
        Bool,
        (Flag("-D", ""), No, "destroy_on_poweroff"),
        "false",
        "bhyve destroys the VM when the guest has powered itself off.",
    ),
    key(
        "run.sandbox",
        Text,
        (Value("--sandbox"), Value("--sandbox"), ""),
        "on",
        "\"on\": when all is set up, bhyve and bhyveload give up what they no longer need, and a system call beyond that \
         ends them. \"log\": such a call is named and fails. \"off\": nothing is given up.",
    ),
    key(
        "run.boot",
        Bool,
        (Flag("--boot", ""), No, ""),
        "false",
        "bhyve loads the guest by bhyveload, runs it, loads it again after a reset, and destroys the VM at the end.",
    ),
    key(
        "boot.disk",
        List,
        (No, Value("-d"), ""),
        "",
        "Disk images to boot from: the first that has a loadable system is taken.",
    ),
    key(
        "boot.host",
        Text,
        (No, Value("-h"), ""),
        "",
        "Host folder that stands for the guest's root: boot/loader.conf and the kernel are read from it.",
    ),
    key(
        "boot.kernel",
        Text,
        (No, Value("--kernel"), ""),
        "",
        "FreeBSD kernel to boot.",
    ),
    key(
        "boot.modules",
        List,
        (No, Value("--module"), ""),
        "",
        "Files that go with the kernel: \"FILE[,type=T][,name=N][,args=A]\".",
    ),
    key(
        "boot.mfsroot",
        Text,
        (No, Value("--mfsroot"), ""),
        "",
        "Memory disk with FreeBSD's root file system.",
    ),
    key(
        "boot.linux",
        Text,
        (No, Value("--linux"), ""),
        "",
        "Linux bzImage to boot.",
    ),
    key(
        "boot.initrd",
        Text,
        (No, Value("--initrd"), ""),
        "",
        "Initramfs for Linux.",
    ),
    key(
        "boot.cmdline",
        Text,
        (No, Value("--cmdline"), ""),
        "",
        "Command line for Linux and multiboot kernels.",
    ),
    key(
        "boot.multiboot",
        Text,
        (No, Value("--multiboot"), ""),
        "",
        "Multiboot 1 kernel to boot.",
    ),
    key(
        "boot.environment",
        Table,
        (No, Pairs("-e"), ""),
        "",
        "Variables of the FreeBSD kernel's environment.",
    ),
    key(
        "boot.console",
        Text,
        (No, Value("-c"), ""),
        "stdio",
        "Where bhyveload's messages and prompt go: \"stdio\" or a terminal's /dev/ name.",
    ),
    key(
        "boot.loader",
        Text,
        (No, Value("-l"), ""),
        "",
        "Loader program of stock bhyveload. There is none here, and bhyveload says so.",
    ),
    key(
        "boot.verbose",
        Bool,
        (No, Flag("--verbose", ""), ""),
        "false",
        "bhyveload says what it loads where.",
    ),
];

/// A key of `[[device]]`: name and what it does.
pub const DEVICE_KEYS: &[(&str, &str)] = &[
    (
        "slot",
        "Where the device is: \"slot\", \"slot:function\" or \"bus:slot:function\"; a number is a slot of bus 0.",
    ),
    (
        "emulation",
        "What it is: a name that bhyve -s help lists, such as \"virtio-blk\".",
    ),
    (
        "conf",
        "Its options as -s has them behind the emulation's name. In its place every other key of the table is an \
         option: path (or backend) is what stands first, true gives the key alone, anything else key=value, and an \
         array repeats it.",
    ),
];

/// The key with a path.
pub fn find(path: &str) -> Option<&'static Key> {
    KEYS.iter().find(|k| k.path == path)
}

/// The key behind a variable of bhyve_config(5), and whether the variable means
/// its opposite.
pub fn by_variable(name: &str) -> Option<(&'static Key, bool)> {
    let find = |name: &str| KEYS.iter().find(|k| !name.is_empty() && k.variable == name);
    find(name)
        .map(|k| (k, false))
        .or_else(|| find(&format!("!{name}")).map(|k| (k, true)))
}

/// Of `known`, what was probably meant by `word`.
pub fn nearest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    known
        .map(|k| (strsim::damerau_levenshtein(word, k), k))
        .min()
        .filter(|(d, k)| *d <= 1 + k.len() / 4)
        .map(|(_, k)| k)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn paths_and_variables_are_unique_and_every_key_is_explained() {
        let mut seen = BTreeSet::new();
        for k in KEYS {
            assert!(seen.insert(k.path), "{}", k.path);
            assert!(
                k.variable.is_empty() || seen.insert(k.variable) || k.variable == k.path,
                "{}",
                k.variable
            );
            assert!(k.doc.ends_with('.'), "{}", k.path);
            assert!(k.bhyve != No || k.bhyveload != No, "{}", k.path);
        }
    }

    #[test]
    fn a_slip_of_the_pen_is_recognised() {
        let keys = || KEYS.iter().map(|k| k.path);
        assert_eq!(nearest("memory.szie", keys()), Some("memory.size"));
        assert_eq!(nearest("serial.com3", keys()), Some("serial.com1"));
        assert_eq!(nearest("entirely.else", keys()), None);
    }
}
