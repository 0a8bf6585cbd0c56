//! From no VM to the first exit that userland sees, on vmm.ko or on KVM, in
//! nanoseconds of the host's clock.
#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use kvm_ioctls::{Kvm, VcpuExit};
use vmmapi::{Exit, Flat32, GuestMemory, MemFlags, Vm};

const MEMORY: u64 = 128 << 20;
const AT: u64 = 0x1000;
/// `out 0x99, al`: nobody in the kernel has that port.
const CODE: [u8; 2] = [0xe6, 0x99];
const PORT: u16 = 0x99;
const ROUNDS: u32 = 40;
/// A CPU's state after INIT does not find the code: flat real mode does.
const RFLAGS: u64 = 2;

fn main() -> ExitCode {
    let kvm = std::env::args().nth(1).as_deref() == Some("kvm");
    // Whoever reads this takes the least.
    for _ in 0..ROUNDS {
        let started = Instant::now();
        let result = if kvm { on_kvm() } else { on_vmm() };
        let took = started.elapsed().as_nanos();
        match result {
            Ok(()) => println!("first-exit {took}"),
            Err(e) => {
                eprintln!("first-exit: {e:#}");
                return ExitCode::FAILURE;
            }
        }
        if !kvm && let Err(e) = Vm::destroy("first-exit") {
            eprintln!("first-exit: {e}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

fn on_vmm() -> Result<()> {
    let vm = Vm::create("first-exit")?;
    let memory = vm.setup_memory(MEMORY, MemFlags::default())?;
    memory.write_bytes(AT, &CODE)?;
    let bsp = vm.vcpu(0);
    bsp.set_capability(vmmapi::Capability::UnrestrictedGuest, 1)?;
    bsp.setup_flat32(&Flat32 {
        eip: AT as u32,
        ..Flat32::default()
    })?;
    bsp.activate()?;
    loop {
        match bsp.run()?.exit {
            Exit::Bogus => {}
            Exit::Inout(io) if io.port == PORT => return Ok(()),
            other => bail!("the first exit is {other:?}"),
        }
    }
}

fn on_kvm() -> Result<()> {
    let kvm = Kvm::new().context("no /dev/kvm")?;
    let vm = kvm.create_vm()?;
    let memory = GuestMemory::anonymous(MEMORY)?;
    vmmapi::kvm::set_memory(&vm, &memory)?;
    memory.write_bytes(AT, &CODE)?;
    let mut vcpu = vm.create_vcpu(0)?;
    let mut sregs = vcpu.get_sregs()?;
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    regs.rip = AT;
    regs.rflags = RFLAGS;
    vcpu.set_regs(&regs)?;
    match vcpu.run()? {
        VcpuExit::IoOut(PORT, _) => Ok(()),
        other => bail!("the first exit is {other:?}"),
    }
}
