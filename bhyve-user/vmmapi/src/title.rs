//! What ps(1) shows.

/// Makes the process's title `bhyve: NAME`, by which vm-bhyve and libvirt find a
/// VM's process. FreeBSD only: Linux shows the command line.
#[cfg(target_os = "freebsd")]
pub fn set_process_title(name: &str) {
    // A VM's name has no NUL: it has been the name of a file in /dev/vmm.
    if let Ok(name) = std::ffi::CString::new(name) {
        // SAFETY: both are strings that end with NUL, and the format takes one.
        unsafe { libc::setproctitle(c"%s".as_ptr(), name.as_ptr()) }
    }
}

/// Linux shows the command line, which names the VM: nothing to do.
#[cfg(not(target_os = "freebsd"))]
pub fn set_process_title(_name: &str) {}
