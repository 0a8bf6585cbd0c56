//! FreeBSD's own gdb stub at bhyve's debug port: the test is a debugger that speaks
//! the remote protocol (the GDB manual, "Remote Protocol") over TCP.

use crate::guest::{Guest, Load};
use crate::host::{Config, Host, SHORT};
use crate::images;
use crate::runner::{Case, Lab};
use anyhow::{Context, Result, ensure};
use object::read::elf::ElfFile64;
use object::{LittleEndian, Object, ObjectSegment, ObjectSymbol};
use std::path::Path;
use std::time::Duration;

const NAME: &str = "freebsd-debug-port";
/// The kernel of the images with `options DDB, GDB` and `device bvmdebug`.
const KERNEL: &str = "freebsd-12.1-gdb.kernel";
/// What the guest does when it is up: nobody has to type.
const RUN: &str = "bhyvers.run=sysctl debug.kdb.current=gdb; sysctl debug.kdb.enter=1";
/// Where the stub's registers have RIP, in the digits of `g`: after sixteen others.
const RIP: usize = 16 * 16;
/// Where it stops: kdb_enter() is part of it.
const STOP: &str = "kdb_sysctl_enter";
/// Bytes of code that are read.
const CODE: usize = 16;

/// The test; its kernel goes into the host's file system.
pub fn case(lab: &Lab, config: &mut Config) -> Case {
    let Some(kernel) = images::find(&lab.dirs, KERNEL) else {
        return Case::skipped(NAME, format!("no {KERNEL} in an image directory"));
    };
    config.file("guest/gdb", &kernel);
    Case::new(NAME, move |_, host| run(host, &kernel))
}

fn run(host: &mut Host, kernel: &Path) -> Result<()> {
    let file = std::fs::read(kernel)?;
    let elf = ElfFile64::<LittleEndian>::parse(&*file)?;
    let mut guest = Guest::new(
        "/guest/gdb",
        Load::FreeBsd {
            mfsroot: Some("/guest/root".to_owned()),
            modules: Vec::new(),
        },
    );
    for variable in ["bhyvers.clocktest=0", "bhyvers.poweroff=1", RUN] {
        guest.environment.push(variable.to_owned());
    }
    guest.options = "-g 1234".to_owned();
    guest.start(host)?;
    let found = host.guest().expect(
        "(?s)GDB: debug ports:([^\r\n]*).*KDB: enter: sysctl",
        Duration::from_secs(300),
    )?;
    let ports = found.group(1).to_owned();
    ensure!(ports.contains("bvm"), "the guest's debug ports:{ports}");

    // It says where it stopped, unasked, and a signal.
    let mut debugger = Debugger::connect(host)?;
    let stop = debugger.packet("")?;
    ensure!(stop.starts_with("T05"), "no breakpoint: {stop}");
    let signal = debugger.packet("?")?;
    ensure!(signal == "S05", "not SIGTRAP: {signal}");
    let registers = debugger.packet("g")?;
    let rip = registers.get(RIP..RIP + 16).and_then(bytes);
    let rip = rip.and_then(|b| b.try_into().ok()).map(u64::from_le_bytes);
    let rip = rip.with_context(|| format!("no RIP among the registers: {registers}"))?;
    let inside = elf
        .symbols()
        .find(|s| s.address() <= rip && rip < s.address() + s.size())
        .and_then(|s| s.name().ok());
    ensure!(
        inside == Some(STOP),
        "it stopped at {rip:#x}, in {inside:?}"
    );
    let code = debugger.packet(&format!("m{rip:x},{CODE:x}"))?;
    let real = elf
        .segments()
        .find_map(|s| s.data_range(rip, CODE as u64).ok().flatten());
    ensure!(
        real.is_some() && bytes(&code).as_deref() == real,
        "its code at {rip:#x} is {code}, in its file {real:x?}"
    );
    println!("{NAME}: stopped at {rip:#x} in {STOP}, whose code there is {code}");
    debugger.send("c")?;

    let host = debugger.host;
    host.guest().expect(
        "(?s)RUN END status=0.*BHYVE-RS GUEST UP",
        Duration::from_secs(300),
    )?;
    guest.expect_exit(host, 1, Duration::from_secs(120))?;
    // nc ends with the connection, and what writes to it is not needed any more.
    host.must("kill $(cat /tmp/gdb.holder); rm -f /tmp/gdb.*", SHORT)?;
    guest.destroy(host)
}

/// Bytes of hexadecimal digits.
fn bytes(digits: &str) -> Option<Vec<u8>> {
    (0..digits.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(digits.get(at..at + 2)?, 16).ok())
        .collect()
}

/// A packet's text without its run lengths: `*` and a character, 29 above how often
/// the one before is repeated.
fn expanded(text: &str) -> String {
    let mut out = String::new();
    let mut characters = text.chars();
    while let Some(c) = characters.next() {
        match (c, out.chars().last()) {
            ('*', Some(last)) => {
                let times = characters
                    .next()
                    .map_or(0, |n| (n as usize).saturating_sub(29));
                out.extend(std::iter::repeat_n(last, times));
            }
            _ => out.push(c),
        }
    }
    out
}

fn checksum(text: &str) -> u8 {
    text.bytes().fold(0, u8::wrapping_add)
}

/// A debugger in the host, by busybox's nc: what goes to it by a FIFO that stays
/// open, what came in a file.
struct Debugger<'a> {
    host: &'a mut Host,
    /// Packets that have come.
    packets: usize,
}

impl<'a> Debugger<'a> {
    fn connect(host: &'a mut Host) -> Result<Self> {
        host.must(
            "ifconfig lo 127.0.0.1 && rm -f /tmp/gdb.* && mkfifo /tmp/gdb.in && \
             { sleep 100000 >/tmp/gdb.in & echo $! >/tmp/gdb.holder; } && \
             { nc 127.0.0.1 1234 </tmp/gdb.in >/tmp/gdb.out & }",
            SHORT,
        )?;
        Ok(Self { host, packets: 0 })
    }

    fn send(&mut self, text: &str) -> Result<()> {
        let sum = checksum(text);
        self.host
            .must(
                &format!("printf '%s' '${text}#{sum:02x}' >/tmp/gdb.in"),
                SHORT,
            )
            .map(drop)
    }

    /// Sends `text`, unless it is empty, and gives the stub's next packet.
    fn packet(&mut self, text: &str) -> Result<String> {
        if !text.is_empty() {
            self.send(text)?;
        }
        self.packets += 1;
        let n = self.packets;
        // `#` is in no packet's text; two digits come after it.
        let came = self.host.must(
            &format!(
                "i=0; until [ \"$(tr -d '\\n' </tmp/gdb.out | grep -o '#..' | wc -l)\" -ge {n} ] || [ $i -ge 600 ]; \
                 do i=$((i+1)); sleep 0.1; done; cat /tmp/gdb.out; echo"
            ),
            Duration::from_secs(300),
        )?;
        let packet = came.split('$').nth(n).and_then(|p| p.split_once('#'));
        let (packet, rest) =
            packet.with_context(|| format!("no packet {n} to \"{text}\": {came}"))?;
        let said = rest.get(..2).and_then(|s| u8::from_str_radix(s, 16).ok());
        ensure!(
            said == Some(checksum(packet)),
            "packet {n}'s checksum is {said:?}: {came}"
        );
        self.host.must("printf + >/tmp/gdb.in", SHORT)?;
        Ok(expanded(packet))
    }
}
