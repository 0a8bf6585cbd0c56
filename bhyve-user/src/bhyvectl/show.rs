//! The output, line by line as stock bhyvectl writes it.

use super::Failure;
use super::fields::alternate;
use std::io::{self, Write};
use vmmapi::abi::limits::*;
use vmmapi::{Capability, CpuSet, Exit, Mapping, RegName, SegDesc, Stat, Topology, Vm, VmExit};

pub(super) fn register(out: &mut impl Write, cpu: u32, name: &str, value: u64) -> io::Result<()> {
    let tabs = if name == "rflags" { "\t" } else { "\t\t" };
    writeln!(out, "{name}[{cpu}]{tabs}0x{value:016x}")
}

pub(super) fn descriptor(
    out: &mut impl Write,
    cpu: u32,
    name: &str,
    reg: RegName,
    d: &SegDesc,
) -> io::Result<()> {
    if matches!(reg, RegName::Gdtr | RegName::Idtr) {
        writeln!(out, "{name}[{cpu}]\t\t0x{:016x}/0x{:08x}", d.base, d.limit)
    } else {
        writeln!(
            out,
            "{name} desc[{cpu}]\t0x{:016x}/0x{:08x}/0x{:08x}",
            d.base, d.limit, d.access
        )
    }
}

pub(super) fn stat(out: &mut impl Write, stat: &Stat) -> io::Result<()> {
    // %ld: signed.
    writeln!(out, "{:<40}\t{}", stat.desc, stat.value as i64)
}

pub(super) fn cpus(out: &mut impl Write, banner: &str, cpus: &CpuSet) -> io::Result<()> {
    let list: Vec<String> = cpus.iter().map(|c| c.to_string()).collect();
    let list = if list.is_empty() {
        "(none)".into()
    } else {
        list.join(", ")
    };
    writeln!(out, "{banner}:\t {list}")
}

pub(super) fn intinfo(out: &mut impl Write, banner: &str, info: u64) -> io::Result<()> {
    if info & VM_INTINFO_VALID == 0 {
        return writeln!(out, "{banner}:\tn/a");
    }
    let kind = match info & VM_INTINFO_TYPE {
        VM_INTINFO_HWINTR => "extint",
        VM_INTINFO_NMI => "nmi",
        VM_INTINFO_SWINTR => "swint",
        _ => "exception",
    };
    write!(out, "{banner}:\t{kind} vector {}", info & VM_INTINFO_VECTOR)?;
    if info & VM_INTINFO_DEL_ERRCODE != 0 {
        write!(out, " errcode {}", alternate(info >> 32))?;
    }
    writeln!(out)
}

pub(super) fn capability(
    out: &mut impl Write,
    cpu: u32,
    cap: Capability,
    value: Option<i32>,
) -> io::Result<()> {
    let name = cap.name();
    match value {
        Some(value) => {
            let set = if value != 0 { "set" } else { "not set" };
            writeln!(out, "Capability \"{name}\" is {set} on vcpu {cpu}")
        }
        None => writeln!(out, "Capability \"{name}\" is not available"),
    }
}

pub(super) fn topology(out: &mut impl Write, t: &Topology) -> io::Result<()> {
    writeln!(
        out,
        "cpu_topology:\tsockets={}, cores={}, threads={}, maxcpus={}",
        t.sockets, t.cores, t.threads, t.maxcpus
    )
}

pub(super) fn gpa_pmap(out: &mut impl Write, gpa: u64, entries: &[u64]) -> io::Result<()> {
    write!(out, "gpa {}:", alternate(gpa))?;
    for &entry in entries {
        write!(out, " {}", alternate(entry))?;
    }
    writeln!(out)
}

/// The line that FreeBSD 10's bhyvectl had for low and high memory.
pub(super) fn memory_at(
    out: &mut impl Write,
    vm: &Vm,
    label: &str,
    gpa: u64,
) -> Result<(), Failure> {
    let found = vm
        .mmap_getnext(gpa)?
        .filter(|m| m.gpa == gpa && m.segid == VM_SYSMEM);
    let (len, flags) = found.map_or((0, 0), |m| (m.len, m.flags));
    let wired = if flags & VM_MEMMAP_F_WIRED != 0 {
        " wired"
    } else {
        ""
    };
    writeln!(out, "{label}\t\t0x{gpa:016x}/{len}{wired}")?;
    Ok(())
}

pub(super) fn memsegs(out: &mut impl Write, vm: &Vm) -> Result<(), Failure> {
    writeln!(out, "ID  Length      Name")?;
    for segid in 0.. {
        match vm.memseg(segid) {
            Ok(None) => {}
            Ok(Some(seg)) => {
                let name = seg.name.as_deref().unwrap_or("sysmem");
                writeln!(out, "{segid:<4}{:<12}{name}", human(seg.len))?;
            }
            // Past the last number that a segment can have.
            Err(e) if e.errno() == Some(nix::libc::EINVAL) => break,
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

pub(super) fn memmap(out: &mut impl Write, vm: &Vm) -> Result<(), Failure> {
    writeln!(
        out,
        "Address     Length      Segment     Offset      Prot  Flags"
    )?;
    for m in vm.mappings()? {
        let name = vm
            .memseg(m.segid)?
            .and_then(|s| s.name)
            .unwrap_or_else(|| "sysmem".into());
        writeln!(out, "{}", mapping(&m, &name))?;
    }
    Ok(())
}

fn mapping(m: &Mapping, name: &str) -> String {
    let bit = |flag, letter| if m.prot & flag != 0 { letter } else { '-' };
    let flags: Vec<&str> = [(VM_MEMMAP_F_WIRED, "wired"), (VM_MEMMAP_F_IOMMU, "iommu")]
        .iter()
        .filter(|f| m.flags & f.0 != 0)
        .map(|f| f.1)
        .collect();
    format!(
        "{:<12X}{:<12}{name:<12}{:<12X}{}{}{}   {}",
        m.gpa,
        human(m.len),
        m.segoff,
        bit(PROT_READ, 'R'),
        bit(PROT_WRITE, 'W'),
        bit(PROT_EXEC, 'X'),
        flags.join("/")
    )
}

/// humanize_number(3) with five digits, binary, suffix B: the largest unit
/// that keeps all five is not exceeded.
fn human(bytes: u64) -> String {
    let mut n = bytes;
    let mut units = ["", "K", "M", "G", "T", "P", "E"].iter();
    let mut unit = units.next().unwrap_or(&"");
    while n >= 99_999 {
        let Some(next) = units.next() else { break };
        // Rounds half up, as the C function does.
        n = (n >> 10) + (n >> 9 & 1);
        unit = next;
    }
    format!("{n}{unit}B")
}

/// As gmtime_r(3) and stock's own names of days and months.
pub(super) fn rtc_time(secs: i64) -> String {
    const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
    const MONTHS: [&str; 12] = [
        "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
    ];
    let days = secs.div_euclid(86_400);
    let time = secs.rem_euclid(86_400);
    let (year, month, day) = civil(days);
    let weekday = DAYS.get(days.rem_euclid(7) as usize).unwrap_or(&"UNK");
    let month = MONTHS.get(month).unwrap_or(&"UNK");
    format!(
        "rtc time {}: {weekday} {month} {day:02} {:02}:{:02}:{:02} {year}",
        alternate(secs as u64),
        time / 3600,
        time / 60 % 60,
        time % 60,
    )
}

/// Year, month (0 to 11) and day of the month of a day since 1970-01-01,
/// proleptic Gregorian; counted in years that start in March, so that the leap
/// day is the last.
fn civil(days: i64) -> (i64, usize, i64) {
    let z = i128::from(days) + 719_468;
    let era = z.div_euclid(146_097);
    let day_of_era = z.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = (from_march + 2) % 12;
    let year = era * 400 + year_of_era + i128::from(month < 2);
    (year as i64, month as usize, day as i64)
}

pub(super) fn exit(out: &mut impl Write, cpu: u32, e: &VmExit) -> io::Result<()> {
    writeln!(out, "vm exit[{cpu}]")?;
    writeln!(out, "\trip\t\t0x{:016x}", e.rip)?;
    writeln!(out, "\tinst_length\t{}", e.inst_length)?;
    match &e.exit {
        Exit::Inout(io) => {
            writeln!(out, "\treason\t\tINOUT")?;
            writeln!(out, "\tdirection\t{}", if io.input { "IN" } else { "OUT" })?;
            writeln!(out, "\tbytes\t\t{}", io.bytes)?;
            let string = if io.string { "STRING " } else { "" };
            let rep = if io.rep { "REP " } else { "" };
            writeln!(out, "\tflags\t\t{string}{rep}")?;
            writeln!(out, "\tport\t\t0x{:04x}", io.port)?;
            writeln!(out, "\teax\t\t0x{:08x}", io.eax)
        }
        Exit::Vmx(v) => {
            writeln!(out, "\treason\t\tVMX")?;
            writeln!(out, "\tstatus\t\t{}", v.status)?;
            writeln!(
                out,
                "\texit_reason\t0x{:08x} ({})",
                v.exit_reason, v.exit_reason
            )?;
            writeln!(out, "\tqualification\t0x{:016x}", v.qualification)?;
            writeln!(out, "\tinst_type\t\t{}", v.inst_type)?;
            writeln!(out, "\tinst_error\t\t{}", v.inst_error)
        }
        Exit::Svm { code, info1, info2 } => {
            writeln!(out, "\treason\t\tSVM")?;
            writeln!(out, "\texit_reason\t\t{}", alternate(*code))?;
            writeln!(out, "\texitinfo1\t\t{}", alternate(*info1))?;
            writeln!(out, "\texitinfo2\t\t{}", alternate(*info2))
        }
        // Stock has no words for the others.
        other => writeln!(out, "\treason\t\t{other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmmapi::Inout;

    fn text(write: impl FnOnce(&mut Vec<u8>) -> io::Result<()>) -> String {
        let mut out = Vec::new();
        write(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn registers_and_descriptors_look_as_stock_prints_them() {
        assert_eq!(
            text(|o| register(o, 0, "rip", 0xfff0)),
            "rip[0]\t\t0x000000000000fff0\n"
        );
        assert_eq!(
            text(|o| register(o, 1, "rflags", 2)),
            "rflags[1]\t0x0000000000000002\n"
        );
        let d = SegDesc {
            base: 0xffff_0000,
            limit: 0xffff,
            access: 0x93,
        };
        assert_eq!(
            text(|o| descriptor(o, 0, "cs", RegName::Cs, &d)),
            "cs desc[0]\t0x00000000ffff0000/0x0000ffff/0x00000093\n"
        );
        assert_eq!(
            text(|o| descriptor(o, 0, "gdtr", RegName::Gdtr, &d)),
            "gdtr[0]\t\t0x00000000ffff0000/0x0000ffff\n"
        );
    }

    #[test]
    fn statistics_are_forty_columns_a_tab_and_a_number() {
        let s = Stat {
            desc: "total number of vm exits".into(),
            value: 181_000,
        };
        assert_eq!(
            text(|o| stat(o, &s)),
            "total number of vm exits                \t181000\n"
        );
    }

    #[test]
    fn cpu_sets_and_events_are_listed() {
        assert_eq!(
            text(|o| cpus(o, "active cpus", &CpuSet::default())),
            "active cpus:\t (none)\n"
        );
        assert_eq!(text(|o| intinfo(o, "pending", 0)), "pending:\tn/a\n");
        assert_eq!(
            text(|o| intinfo(o, "current", 0x12_8000_0b0d)),
            "current:\texception vector 13 errcode 0x12\n"
        );
        assert_eq!(
            text(|o| intinfo(o, "x", 0x8000_0030)),
            "x:\textint vector 48\n"
        );
    }

    #[test]
    fn lengths_are_humanized_as_the_c_library_does() {
        for (bytes, expected) in [
            (0, "0B"),
            (99_998, "99998B"),
            (1 << 20, "1024KB"),
            (64 << 20, "65536KB"),
            (256 << 20, "256MB"),
            (3 << 30, "3072MB"),
            (1 << 40, "1024GB"),
        ] {
            assert_eq!(human(bytes), expected);
        }
    }

    #[test]
    fn a_mapping_is_one_line_of_the_table() {
        let m = Mapping {
            gpa: 0x1_0000_0000,
            segid: 0,
            segoff: 0x1_0000_0000,
            len: 1 << 30,
            prot: PROT_ALL,
            flags: VM_MEMMAP_F_WIRED | VM_MEMMAP_F_IOMMU,
        };
        assert_eq!(
            mapping(&m, "sysmem"),
            "100000000   1024MB      sysmem      100000000   RWX   wired/iommu"
        );
    }

    #[test]
    fn the_clock_reads_as_gmtime_does() {
        assert_eq!(rtc_time(0), "rtc time 0: Thu Jan 01 00:00:00 1970");
        assert_eq!(
            rtc_time(951_782_400),
            "rtc time 0x38bb0c00: Tue Feb 29 00:00:00 2000"
        );
        assert_eq!(
            rtc_time(1_709_251_199),
            "rtc time 0x65e11a7f: Thu Feb 29 23:59:59 2024"
        );
        assert_eq!(
            rtc_time(4_107_542_400),
            "rtc time 0xf4d41f80: Mon Mar 01 00:00:00 2100"
        );
        assert_eq!(
            rtc_time(1_798_761_599),
            "rtc time 0x6b36ec7f: Thu Dec 31 23:59:59 2026"
        );
    }

    #[test]
    fn an_exit_is_shown_field_by_field() {
        let e = VmExit {
            rip: 0x10,
            inst_length: 1,
            exit: Exit::Inout(Inout {
                port: 0x3f8,
                bytes: 1,
                eax: 0x41,
                ..Inout::default()
            }),
        };
        let shown = text(|o| exit(o, 0, &e));
        assert!(shown.starts_with("vm exit[0]\n\trip\t\t0x0000000000000010\n\tinst_length\t1\n"));
        assert!(shown.contains("\tdirection\tOUT\n"));
        assert!(shown.contains("\tport\t\t0x03f8\n\teax\t\t0x00000041\n"));
    }
}
