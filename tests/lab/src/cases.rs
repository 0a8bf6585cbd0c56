//! The lab tests: what a user or a guest sees of vmm.ko, bhyveload and bhyve.

mod config;
mod debug_port;
mod disk;
mod firmware;
mod freebsd;
mod freebsd_host;
mod guest_drivers;
pub mod guests;
mod kvm_unit_tests;
mod lifecycle;
mod linux;
mod linux_disk;
mod net;
mod passthru;
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
                "kvm-unit-tests-idt_test",
                "the bare emulated CPU does not get through it: CR4 takes reserved bits",
            ),
            (
                "kvm-unit-tests-emulator",
                "the bare emulated CPU fails four of it: MOV SS, and #SS for addresses that are not canonical",
            ),
            (
                "kvm-unit-tests-msr",
                "the bare emulated CPU does not get through it: FS_BASE and GS_BASE take any address",
            ),
            (
                "kvm-unit-tests-x2apic",
                "QEMU's VMRUN does not read that interrupts are held off behind an STI, and its NMI comes there",
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
        groups.push(linux::few(lab, Engine::Qemu));
    }
    groups.push(virtio::group(lab)?);
    if lab.engine != Engine::Kvm {
        groups.push(powercut::group(lab)?);
        groups.push(powercut::ext4::group(lab)?);
    }
    groups.push(linux_disk::group(lab)?);
    groups.push(share::group(lab)?);
    groups.extend(passthru::groups(lab)?);
    groups.extend(kvm_unit_tests::groups(lab)?);
    Ok(groups)
}
