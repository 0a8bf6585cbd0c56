//! The lab tests: what a user or a guest sees of vmm.ko, bhyveload and bhyve.

mod config;
mod disk;
mod firmware;
mod freebsd;
mod freebsd_host;
mod guest_drivers;
pub mod guests;
mod kvm_unit_tests;
mod lifecycle;
mod linux;
mod net;
pub mod powercut;
mod share;
mod virtio;

use crate::machine::Engine;
use crate::runner::{Group, Lab};
use anyhow::Result;

/// Lab tests that an engine cannot run, and why.
pub fn unfit(engine: Engine) -> &'static [(&'static str, &'static str)] {
    match engine {
        Engine::Kvm | Engine::Bochs => &[],
        Engine::Qemu => &[
            (
                "freebsd-1-vcpu",
                "the TSC is not invariant there, and FreeBSD keeps time by HPET, which the test does not take",
            ),
            (
                "kvm-unit-tests-idt_test",
                "the emulated CPU does not set RFLAGS.RF for faults",
            ),
            (
                "kvm-unit-tests-emulator",
                "the emulated CPU lacks checks of MOV SS and of canonical addresses",
            ),
            (
                "kvm-unit-tests-msr",
                "the emulated CPU does not check that FS_BASE is canonical",
            ),
        ],
    }
}

/// All lab tests, by host.
///
/// # Errors
/// An image directory cannot be read.
pub fn all(lab: &Lab) -> Result<Vec<Group>> {
    // The longest first, so that the two hosts end at about the same time.
    let mut groups = vec![
        linux::group(lab),
        lifecycle::group(lab),
        freebsd::group(lab),
        freebsd_host::group(lab),
        guests::group(lab, lab.engine)?,
    ];
    if lab.engine == Engine::Bochs {
        // The other kind of CPU in every run.
        groups.push(guests::group(lab, Engine::Qemu)?);
    }
    groups.push(virtio::group(lab)?);
    if lab.engine != Engine::Kvm {
        groups.push(powercut::group(lab)?);
    }
    groups.push(share::group(lab)?);
    groups.extend(kvm_unit_tests::groups(lab)?);
    Ok(groups)
}
