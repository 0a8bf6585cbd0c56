//! A vCPU's thread: run the guest, do what it left for, run it again.

pub mod dump;
pub mod inout;
pub mod msr;
pub mod ops;
pub mod regfile;
pub mod strings;

use std::sync::Arc;

use vmmapi::{Exit, Inout, Left, Runner, SuspendHow, Vcpu, VmExit};

use crate::ending::Failed;
use crate::mmio;
use crate::vm::Vm;
use ops::VcpuOps;

/// What follows an exit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Run the guest again.
    Run,
    /// Run the guest again with this in RAX: an IN is done.
    RunWithRax(u64),
    /// The VM is stopping; this vCPU is done.
    Stop(SuspendHow),
    /// The guest cannot go on; says why and what to do.
    Fail(String),
}

/// #UD.
const UD: u8 = 6;
/// #GP.
pub(crate) const GP: u8 = 13;

/// Runs a vCPU until the VM stops. `Ok` says how; errors have been reported.
pub fn run(vm: &Arc<Vm>, vcpu: &Vcpu) -> Result<SuspendHow, Failed> {
    let stats = vm.stats.vcpu(vcpu.id());
    let failed = |e: vmmapi::Error| {
        eprintln!("{e}");
        Failed
    };
    let mut runner = Runner::new(vcpu).map_err(failed)?;
    let ports = &vm.buses.ports;
    let mut rax = None;
    loop {
        // The fast path; everything else is behind a call.
        if let Left::Inout(io) = runner.run(rax.take()).map_err(failed)? {
            stats.count_inout(&io);
            match inout::emulate(ports, vm.config.strict_io, &io) {
                inout::Done::Out => {}
                inout::Done::In(value) => rax = Some(value),
                inout::Done::Unclaimed => return Err(stuck(vm, vcpu, &io)),
            }
            continue;
        }
        let exit = runner.exit();
        stats.count(&exit.exit);
        match other(vm, vcpu, &mut runner, &exit) {
            Ok(Next::Run) => {}
            Ok(Next::RunWithRax(value)) => rax = Some(value),
            Ok(Next::Stop(how)) => return Ok(how),
            Ok(Next::Fail(why)) => {
                eprint!("{}", dump::report(vcpu, &vm.memory, &exit, &why));
                return Err(Failed);
            }
            Err(e) => {
                eprint!("{}", dump::report(vcpu, &vm.memory, &exit, &e.to_string()));
                return Err(Failed);
            }
        }
    }
}

/// The guest used a port that nobody has, and must not.
#[cold]
fn stuck(vm: &Vm, vcpu: &Vcpu, io: &Inout) -> Failed {
    let exit = VmExit {
        // The report reads the registers anyway.
        rip: vcpu.register(vmmapi::RegName::Rip).unwrap_or(0),
        inst_length: 0,
        exit: Exit::Inout(*io),
    };
    if let Next::Fail(why) = inout::unclaimed(io) {
        eprint!("{}", dump::report(vcpu, &vm.memory, &exit, &why));
    }
    Failed
}

#[cold]
fn other(vm: &Arc<Vm>, vcpu: &Vcpu, runner: &mut Runner, exit: &VmExit) -> vmmapi::Result<Next> {
    Ok(match &exit.exit {
        Exit::InoutStr(s) => {
            let all = ops::Physical {
                memory: &vm.memory,
                mmio: &vm.buses.mmio,
            };
            strings::emulate(&vm.buses.ports, vm.config.strict_io, vcpu, &all, s)?
        }
        Exit::InstEmul(e) => mmio::emulate(&vm.buses.mmio, &vm.memory, vcpu, runner, exit, e)?,
        Exit::Rdmsr { msr } => vm.msrs.read(vcpu, *msr)?,
        Exit::Wrmsr { msr, value } => vm.msrs.write(vcpu, *msr, *value)?,
        Exit::SpinupAp { vcpu: id, rip } => crate::vm::spin_up(vm, *id, *rip)?,
        Exit::Suspended(how) => Next::Stop(*how),
        Exit::Pause => {
            std::thread::yield_now();
            Next::Run
        }
        Exit::Debug => {
            // Stopped by bhyvectl; look again soon.
            crate::pause::sleep(std::time::Duration::from_millis(10));
            Next::Run
        }
        Exit::Bogus
        | Exit::Reqidle
        | Exit::Mtrap
        | Exit::Hlt { .. }
        | Exit::Rendezvous
        | Exit::IoapicEoi { .. } => Next::Run,
        Exit::Monitor | Exit::Mwait | Exit::Vminsn => {
            // CPUID offers none of them.
            vcpu.inject_fault(UD, None)?;
            Next::Run
        }
        Exit::TaskSwitch(t) => Next::Fail(format!(
            "a hardware task switch ({:?} to selector {:#x}) is not emulated; an operating system that uses one \
             (32-bit double-fault handlers do) has usually crashed already: look at its console",
            t.reason, t.selector
        )),
        Exit::Paging { gpa, fault_type } => Next::Fail(format!(
            "access of kind {fault_type} to guest-physical {gpa:#x} cannot be resolved: is -m the size that the loader was given?"
        )),
        Exit::Vmx(v) if v.status != 0 => Next::Fail(format!(
            "VM entry failed: VM-instruction error {} ({})",
            v.inst_error,
            if v.inst_type == 0 {
                "VMLAUNCH"
            } else {
                "VMRESUME"
            }
        )),
        Exit::Vmx(v) if matches!(v.exit_reason & 0xffff, 33 | 34) => Next::Fail(format!(
            "VM entry failed: the guest's state is invalid (reason {}, qualification {:#x}); look for what does not fit \
             together among the registers below (SDM Vol. 3C §26.3)",
            v.exit_reason & 0xffff,
            v.qualification
        )),
        Exit::Vmx(v) => Next::Fail(format!(
            "VT-x exit with reason {} (SDM Vol. 3D appendix C), qualification {:#x}, is not handled",
            v.exit_reason, v.qualification
        )),
        Exit::Svm { code, info1, info2 } => Next::Fail(format!(
            "AMD-V exit with code {code:#x} (APM Vol. 2 appendix C), info {info1:#x} and {info2:#x}, is not handled"
        )),
        Exit::Bpt { .. } | Exit::Db { .. } | Exit::Ipi { .. } => Next::Fail(
            "an exit that was not asked for; do vmm.ko and bhyve belong together?".into(),
        ),
        Exit::Unknown { code, .. } => Next::Fail(format!(
            "exit code {code} is unknown; do vmm.ko and bhyve belong together?"
        )),
        // Handled by the caller.
        Exit::Inout(_) => Next::Run,
    })
}

/// A vCPU thread's whole life; the VM learns how it ended.
pub fn thread(vm: &Arc<Vm>, vcpu: &Vcpu) {
    let pins = vm.config.pins.iter().filter(|(v, _)| *v == vcpu.id());
    let hosts: Vec<usize> = pins.map(|(_, host)| *host).collect();
    if !hosts.is_empty()
        && let Err(e) = vmmapi::pin_thread(&hosts)
    {
        eprintln!("-p: vCPU {} cannot be pinned to {hosts:?}: {e}", vcpu.id());
    }
    let result = run(vm, vcpu);
    vm.ended(result);
}
