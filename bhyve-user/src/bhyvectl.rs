//! bhyvectl(8), in FreeBSD's words and with its output, so that scripts which
//! know the one can use the other.
//!
//! As there, options are not executed in the order given but in a fixed one:
//! create, set, show, run, stop, destroy.

mod fields;
mod look;
mod options;
mod passthru;
mod show;
mod view;

use options::Given;
pub use options::usage;
use std::io::{self, Write};
use std::process::ExitCode;
use vmmapi::{
    Capability, CpusetWhich, Error, MemFlags, RegName, SegDesc, SuspendHow, Vcpu, Vm, X2apicState,
};

/// Why bhyvectl stops.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}\nTry --help for the list of options.")]
    Usage(String),
    #[error("VM:{0} is not created.\n{1}")]
    NotCreated(String, Error),
    #[error(transparent)]
    Vm(#[from] Error),
    #[error("{0}")]
    Other(String),
    #[error("standard output: {0}")]
    Output(#[from] io::Error),
}

/// Runs bhyvectl: 0, or 1 with a message on standard error.
pub fn main(args: &[String]) -> ExitCode {
    let mut out = io::stdout().lock();
    match run(args, &mut out).and_then(|()| Ok(out.flush()?)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("bhyvectl: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[String], out: &mut impl Write) -> Result<(), Failure> {
    if let Some(done) = passthru::run(args, out) {
        return done;
    }
    if let Some(done) = view::run(args, out) {
        return done;
    }
    let given = options::parse(args).map_err(Failure::Usage)?;
    if given.has("help") {
        write!(out, "{}", usage())?;
        return Ok(());
    }
    let name = given.text("vm").ok_or_else(|| {
        Failure::Usage("which VM? Give --vm=<name>, or say list, stats, top or help.".into())
    })?;
    if given.only(&["vm", "cpu", "destroy"]) && given.has("destroy") {
        // No need to open it: what cannot be opened can be destroyed still.
        return destroy(name);
    }
    let vm = if given.has("create") {
        Vm::create(name)?
    } else {
        match Vm::open(name) {
            Err(e) if e.is_not_found() => return Err(Failure::NotCreated(name.into(), e)),
            opened => opened?,
        }
    };
    let cpu = given.number("cpu").map_err(Failure::Usage)?.unwrap_or(0);
    let cpu =
        u32::try_from(cpu).map_err(|_| Failure::Usage(format!("--cpu={cpu} is too large")))?;
    let session = Session {
        vcpu: vm.vcpu(cpu),
        vm,
        given: &given,
    };
    session.set()?;
    session.show(out)?;
    if given.has("run") {
        show::exit(out, cpu, &session.vcpu.run()?)?;
    }
    if given.has("force-reset") {
        session.vm.suspend(SuspendHow::Reset)?;
    }
    if given.has("force-poweroff") {
        session.vm.suspend(SuspendHow::Poweroff)?;
    }
    if given.has("destroy") {
        drop(session);
        destroy(name)?;
    }
    Ok(())
}

fn destroy(name: &str) -> Result<(), Failure> {
    Vm::destroy(name).map_err(|e| Failure::Other(view::explain_destroy(name, &e)))
}

struct Session<'a> {
    vm: Vm,
    vcpu: Vcpu,
    given: &'a Given,
}

impl Session<'_> {
    fn number(&self, option: &str) -> Result<Option<u64>, Failure> {
        self.given.number(option).map_err(Failure::Usage)
    }

    /// A number that must fit a smaller type.
    fn small<T: TryFrom<u64>>(&self, option: &str) -> Result<Option<T>, Failure> {
        let Some(n) = self.number(option)? else {
            return Ok(None);
        };
        T::try_from(n)
            .map(Some)
            .map_err(|_| Failure::Usage(format!("--{option}={n} is too large")))
    }

    fn wants(&self, option: &str) -> bool {
        self.given.has(option) || self.given.has("get-all")
    }

    fn set(&self) -> Result<(), Failure> {
        if let Some(mib) = self.number("set-mem")? {
            let bytes = mib
                .checked_next_multiple_of(2)
                .and_then(|m| m.checked_mul(1 << 20))
                .ok_or_else(|| Failure::Usage(format!("--set-mem={mib} is too large")))?;
            self.vm.setup_memory(bytes, MemFlags::default())?;
        }
        for (name, reg) in options::REGISTERS {
            if let Some(value) = self.number(&format!("set-{name}"))? {
                self.vcpu.set_register(*reg, value)?;
            }
        }
        let desc = SegDesc {
            base: self.number("desc-base")?.unwrap_or(0),
            limit: self.small("desc-limit")?.unwrap_or(0),
            access: self.small("desc-access")?.unwrap_or(0),
        };
        for (name, reg) in options::DESCRIPTORS {
            if self.given.has(&format!("set-desc-{name}")) {
                let table = matches!(reg, RegName::Gdtr | RegName::Idtr);
                let access = if table { 0 } else { desc.access };
                self.vcpu.set_desc(*reg, SegDesc { access, ..desc })?;
            }
        }
        for (name, reg) in options::SELECTORS {
            if let Some(value) = self.number(&format!("set-{name}"))? {
                self.vcpu.set_register(*reg, value)?;
            }
        }
        if let Some(state) = self.number("set-x2apic-state")? {
            let state = match state {
                0 => X2apicState::Disabled,
                1 => X2apicState::Enabled,
                n => {
                    let text = format!("--set-x2apic-state={n}: 0 (disabled) or 1 (enabled)");
                    return Err(Failure::Usage(text));
                }
            };
            self.vcpu.set_x2apic_state(state)?;
        }
        if let Some(text) = self.given.text("unassign-pptdev") {
            let (bus, slot, func) = options::bus_slot_func(text).ok_or_else(|| {
                Failure::Usage(format!(
                    "--unassign-pptdev={text}: bus/slot/function, as 3/0/0"
                ))
            })?;
            self.vm.unbind_pptdev(bus, slot, func)?;
        }
        if self.given.has("inject-nmi") {
            self.vcpu.inject_nmi()?;
        }
        if let Some(lvt) = self.small("assert-lapic-lvt")? {
            self.vcpu.lapic_local_irq(lvt)?;
        }
        Ok(())
    }

    fn show(&self, out: &mut impl Write) -> Result<(), Failure> {
        let cpu = self.vcpu.id();
        if self.wants("get-memseg") {
            show::memsegs(out, &self.vm)?;
        }
        if self.wants("get-memmap") {
            show::memmap(out, &self.vm)?;
        }
        for (option, label, gpa) in [
            ("get-lowmem", "lowmem", 0),
            ("get-highmem", "highmem", vmmapi::abi::limits::HIGHMEM_BASE),
        ] {
            if self.given.has(option) {
                show::memory_at(out, &self.vm, label, gpa)?;
            }
        }
        for (name, reg) in options::REGISTERS {
            // What stock bhyvectl has no option to set comes in its order too.
            if self.wants(&format!("get-{name}")) {
                show::register(out, cpu, name, self.vcpu.register(*reg)?)?;
            }
        }
        for (name, reg) in options::DESCRIPTORS {
            if self.wants(&format!("get-desc-{name}")) {
                show::descriptor(out, cpu, name, *reg, &self.vcpu.desc(*reg)?)?;
            }
        }
        for (name, reg) in options::SELECTORS {
            if self.wants(&format!("get-{name}")) {
                let tabs = "\t\t";
                writeln!(
                    out,
                    "{name}[{cpu}]{tabs}0x{:04x}",
                    self.vcpu.register(*reg)?
                )?;
            }
        }
        self.show_fields(out)?;
        if self.wants("get-x2apic-state") {
            writeln!(
                out,
                "x2apic_state[{cpu}]\t{}",
                self.vcpu.x2apic_state()?.raw()
            )?;
        }
        self.capability(out)?;
        if let Some(gpa) = self.number("get-gpa-pmap")? {
            show::gpa_pmap(out, gpa, &self.vm.gpa_pmap(gpa)?)?;
        }
        self.rtc(out)?;
        for (option, banner, which) in [
            ("get-active-cpus", "active cpus", CpusetWhich::Active),
            (
                "get-suspended-cpus",
                "suspended cpus",
                CpusetWhich::Suspended,
            ),
        ] {
            if self.wants(option) {
                show::cpus(out, banner, &self.vm.cpus(which)?)?;
            }
        }
        if self.given.has("get-debug-cpus") {
            show::cpus(out, "debug cpus", &self.vm.cpus(CpusetWhich::Debug)?)?;
        }
        if self.wants("get-intinfo") {
            let (pending, current) = self.vcpu.intinfo()?;
            show::intinfo(out, "pending", pending)?;
            show::intinfo(out, "current", current)?;
        }
        if self.wants("get-stats") {
            writeln!(out, "vcpu{cpu} stats:")?;
            for stat in self.vcpu.stats()? {
                show::stat(out, &stat)?;
            }
        }
        if self.wants("get-cpu-topology") {
            show::topology(out, &self.vm.topology()?)?;
        }
        Ok(())
    }

    /// Fields of the VMCS or VMCB. The kernel shows some of them; with
    /// `--get-all` those that it does not show are marked.
    fn show_fields(&self, out: &mut impl Write) -> Result<(), Failure> {
        let all = self.given.has("get-all");
        let cpu = self.vcpu.id();
        let intel = fields::host_is_intel();
        for group in fields::GROUPS {
            let asked = self.given.has(group.option);
            if !(asked || all && group.is_of(intel)) {
                continue;
            }
            for field in group.fields_of(intel) {
                match self.vcpu.hardware_field(field.number)? {
                    Some(value) => writeln!(out, "{}", field.line(cpu, value))?,
                    None if all => writeln!(out, "{}", field.absent(cpu))?,
                    None => {
                        return Err(Failure::Other(format!(
                            "--{}: this vmm.ko does not show {} (of VM \"{}\")",
                            group.option,
                            field.label,
                            self.vm.name()
                        )));
                    }
                }
            }
        }
        Ok(())
    }

    fn capability(&self, out: &mut impl Write) -> Result<(), Failure> {
        let named = match self.given.text("capname") {
            None => None,
            Some(name) => Some(Capability::from_name(name).ok_or_else(|| {
                let names: Vec<&str> = Capability::ALL.iter().map(|c| c.name()).collect();
                Failure::Usage(format!("--capname={name}: one of {}", names.join(", ")))
            })?),
        };
        if let Some(value) = self.small("setcap")? {
            let cap = named.ok_or_else(|| {
                Failure::Usage("--setcap wants to know which: --capname=<capname>".into())
            })?;
            self.vcpu
                .set_capability(cap, value)
                .map_err(|e| match is_enoent(&e) {
                    true => {
                        Failure::Other(format!("Capability \"{}\" is not available", cap.name()))
                    }
                    false => e.into(),
                })?;
        }
        if !self.wants("getcap") {
            return Ok(());
        }
        for &cap in Capability::ALL
            .iter()
            .filter(|c| named.is_none_or(|n| n == **c))
        {
            let value = match self.vcpu.capability(cap) {
                Ok(value) => Some(value),
                // What 12.1 does not know yet is EINVAL there.
                Err(e) if is_enoent(&e) || e.errno() == Some(nix::libc::EINVAL) => None,
                Err(e) => return Err(e.into()),
            };
            show::capability(out, self.vcpu.id(), cap, value)?;
        }
        Ok(())
    }

    fn rtc(&self, out: &mut impl Write) -> Result<(), Failure> {
        let offset = self.small("rtc-nvram-offset")?.unwrap_or(0);
        if let Some(value) = self.small("set-rtc-nvram")? {
            self.vm.rtc_write(offset, value)?;
        }
        if self.wants("get-rtc-nvram") {
            writeln!(
                out,
                "rtc nvram[{offset:03}]: 0x{:02x}",
                self.vm.rtc_read(offset)?
            )?;
        }
        if let Some(secs) = self.small("set-rtc-time")? {
            self.vm.rtc_settime(secs)?;
        }
        if self.wants("get-rtc-time") {
            writeln!(out, "{}", show::rtc_time(self.vm.rtc_gettime()?))?;
        }
        Ok(())
    }
}

fn is_enoent(e: &Error) -> bool {
    e.errno() == Some(nix::libc::ENOENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(args: &[&str]) -> String {
        let args: Vec<String> = args.iter().map(|a| (*a).to_owned()).collect();
        run(&args, &mut Vec::new())
            .expect_err("must fail")
            .to_string()
    }

    #[test]
    fn what_is_wrong_on_the_command_line_is_named() {
        assert!(failure(&["--get-stats"]).contains("--vm=<name>"));
        assert!(failure(&["--vm=x", "--frobnicate"]).contains("--frobnicate"));
        assert!(failure(&["--vm=x", "--set-rip"]).contains("--set-rip"));
    }

    #[test]
    fn a_vm_that_is_not_there_is_reported_as_stock_does() {
        let text = failure(&["--vm=bhyvectl-test-no-such-vm", "--get-rip"]);
        assert!(
            text.starts_with("VM:bhyvectl-test-no-such-vm is not created."),
            "{text}"
        );
    }

    #[test]
    fn help_names_every_option() {
        let mut out = Vec::new();
        run(&["--help".to_owned()], &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        for option in [
            "--create",
            "--set-rip=<RIP>",
            "--get-desc-gdtr",
            "--get-vmcs-vpid",
        ] {
            assert!(text.contains(option), "{option}");
        }
    }
}
