//! Errors that name the VM, what was asked of it, and a way out.

use std::io;

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A device could not be opened.
    #[error("{path}: {source}{}", hint_open(.path, .source))]
    Open {
        /// Its path.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// A VM could not be made.
    #[error("cannot create VM \"{vm}\": {source}{}", hint_create(.vm, .source))]
    Create {
        /// Its name.
        vm: String,
        /// Why.
        source: io::Error,
    },
    /// A VM could not be destroyed.
    #[error("cannot destroy VM \"{vm}\": {source}{}", hint_destroy(.source))]
    Destroy {
        /// Its name.
        vm: String,
        /// Why.
        source: io::Error,
    },
    /// A name that no VM can have.
    #[error(
        "\"{vm}\" cannot name a VM: a name has 1 to {} bytes and neither '/' nor NUL",
        vmm_abi::limits::VM_MAX_NAMELEN
    )]
    Name {
        /// The name.
        vm: String,
    },
    /// A request that the kernel refused.
    #[error("VM \"{vm}\"{}: {request}: {source}{}", cpu(.vcpu), hint_request(.request, .source))]
    Request {
        /// The VM.
        vm: String,
        /// The vCPU, where the request is about one.
        vcpu: Option<i32>,
        /// The request, such as `VM_RUN`.
        request: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Guest memory could not be mapped into this process.
    #[error("VM \"{vm}\": cannot map {len} bytes of guest memory at {gpa:#x}: {source}")]
    Map {
        /// The VM.
        vm: String,
        /// Guest-physical address.
        gpa: u64,
        /// Length, bytes.
        len: u64,
        /// Why.
        source: io::Error,
    },
    /// The VM has memory already, of another size or elsewhere.
    #[error(
        "VM \"{vm}\" has {have} already where {want} was wanted: give the loader and bhyve the \
         same memory options (-m, -S), or destroy the VM first"
    )]
    MemoryMismatch {
        /// The VM.
        vm: String,
        /// What it has.
        have: String,
        /// What was wanted.
        want: String,
    },
    /// An address range that is not guest memory.
    #[error("guest-physical [{gpa:#x}, +{len:#x}) is not guest memory")]
    NotMemory {
        /// Guest-physical address.
        gpa: u64,
        /// Length, bytes.
        len: u64,
    },
    /// The kernel answered something that this library does not know.
    #[error(
        "VM \"{vm}\": {request}: the kernel answered {value}, which this version does not know"
    )]
    Answer {
        /// The VM.
        vm: String,
        /// The request.
        request: &'static str,
        /// The number.
        value: i64,
    },
}

/// [`Error`] by default.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// The host's error number, where there is one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Error::Open { source, .. }
            | Error::Create { source, .. }
            | Error::Destroy { source, .. }
            | Error::Request { source, .. }
            | Error::Map { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }

    /// Whether there is no VM of that name.
    pub fn is_not_found(&self) -> bool {
        match self {
            Error::Open { path, source } => {
                path.starts_with("/dev/vmm/") && source.kind() == io::ErrorKind::NotFound
            }
            Error::Destroy { source, .. } => no_such_vm(source),
            _ => false,
        }
    }
}

fn cpu(vcpu: &Option<i32>) -> String {
    vcpu.map_or_else(String::new, |n| format!(", vCPU {n}"))
}

/// FreeBSD's `hw.vmm.destroy` and both control devices answer EINVAL or ENOENT.
fn no_such_vm(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ENOENT | libc::EINVAL))
}

fn hint_open(path: &str, e: &io::Error) -> &'static str {
    match (e.raw_os_error(), path == "/dev/vmmctl") {
        (Some(libc::ENOENT), true) => {
            " (is vmm.ko loaded? Linux: insmod vmm.ko; FreeBSD: kldload vmm)"
        }
        (Some(libc::ENOENT), false) => {
            " (no such VM: the names in /dev/vmm are those that exist, bhyvectl --create makes one)"
        }
        (Some(libc::EACCES | libc::EPERM), _) => " (run as root, or get access to the device)",
        (Some(libc::ENXIO | libc::ENODEV), _) => " (the VM is being destroyed)",
        _ => "",
    }
}

/// Also jailed root is refused, where the jail's parameter is off.
const NOT_ROOT: &str = if cfg!(target_os = "freebsd") {
    " (run as root; a jail needs allow.vmm)"
} else {
    " (run as root)"
};

fn hint_create(vm: &str, e: &io::Error) -> String {
    match e.raw_os_error() {
        Some(libc::EEXIST) => format!(
            " (a VM of that name exists: use it, or remove it with bhyvectl --vm={vm} --destroy)"
        ),
        Some(libc::ENXIO) => {
            " (vmm.ko found no usable VT-x or AMD-V on this machine; the kernel's log says what \
             is missing)"
                .into()
        }
        Some(libc::ENOENT) => {
            " (is vmm.ko loaded? Linux: insmod vmm.ko; FreeBSD: kldload vmm)".into()
        }
        Some(libc::EACCES | libc::EPERM) => NOT_ROOT.into(),
        Some(libc::EINVAL | libc::ENAMETOOLONG) => {
            " (the kernel refuses the name; FreeBSD 12 takes at most 31 bytes)".into()
        }
        _ => String::new(),
    }
}

fn hint_destroy(e: &io::Error) -> &'static str {
    match e.raw_os_error() {
        Some(libc::ENOENT | libc::EINVAL) => " (there is no VM of that name)",
        Some(libc::EACCES | libc::EPERM) => NOT_ROOT,
        Some(libc::EBUSY) => " (it is being destroyed already)",
        _ => "",
    }
}

fn hint_request(request: &str, e: &io::Error) -> &'static str {
    match (e.raw_os_error(), request) {
        (Some(libc::ENOTTY), _) => {
            " (this vmm.ko does not know the request: kernel and userland differ in version)"
        }
        (Some(libc::ENXIO), _) => " (the VM is being destroyed)",
        (Some(libc::EBUSY), "VM_REINIT") => " (a vCPU is still running)",
        (Some(libc::EBUSY), _) => " (another thread or process is running this vCPU)",
        (Some(libc::ENOMEM), _) => " (the host is out of memory, or of memory it may wire)",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_module_and_a_missing_vm_get_different_advice() {
        let enoent = || io::Error::from_raw_os_error(libc::ENOENT);
        let ctl = Error::Open {
            path: "/dev/vmmctl".into(),
            source: enoent(),
        };
        assert!(ctl.to_string().contains("is vmm.ko loaded?"));
        assert!(!ctl.is_not_found());
        let vm = Error::Open {
            path: "/dev/vmm/web".into(),
            source: enoent(),
        };
        assert!(vm.to_string().contains("no such VM"));
        assert!(vm.is_not_found());
    }

    #[test]
    fn a_refused_request_names_vm_cpu_request_and_errno() {
        let e = Error::Request {
            vm: "web".into(),
            vcpu: Some(3),
            request: "VM_RUN",
            source: io::Error::from_raw_os_error(libc::EBUSY),
        };
        let text = e.to_string();
        assert!(text.starts_with("VM \"web\", vCPU 3: VM_RUN: "), "{text}");
        assert!(text.contains("another thread or process is running this vCPU"));
        assert_eq!(e.errno(), Some(libc::EBUSY));
    }
}
